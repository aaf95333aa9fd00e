# Few verbs. `make quickstart` and `make test` do all the set-up they need on a fresh machine.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: quickstart test bench install vllm clean

quickstart: .venv/installed  ## all six methods on the embedded story model, a few minutes
	@$(BIN)/trivet quickstart --out runs/quickstart

test: .venv/developed  ## lint, types, tests, and the planted defects that the tests must catch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n 2
	$(BIN)/python tests/mutants.py

bench: .venv/developed  ## Trivet against TRL on this machine, the two smaller models, some ten minutes; docs in benchmarks/
	$(BIN)/python benchmarks/compare.py --quick

install: .venv/installed  ## the environment only

vllm: .vllm/bin/vllm  ## vLLM's CPU build in an environment of its own, 3.4 GB, for --vllm; docs/servers.md

.vllm/bin/vllm: scripts/install_vllm.sh
	@PYTHON=$(PYTHON) sh scripts/install_vllm.sh .vllm
	@touch $@

# torch first and by itself: TORCH="torch --index-url https://download.pytorch.org/whl/cpu" picks another build
.venv/installed: pyproject.toml
	@echo "setting up .venv: $(TORCH), then trivet and what it needs (a minute or two) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/developed: .venv/installed
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -qq -y chromium) >/dev/null 2>&1 || echo "no chromium: the tests of the page are skipped"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/trl-1.12.0 trl==1.12.0
	@touch $@

clean:
	rm -rf .venv .vllm runs dist build .pytest_cache .ruff_cache
