# Few verbs. `make quickstart` and `make test` do all the set-up they need on a fresh machine.
PYTHON ?= python3
TORCH_VERSION := 2.13.0
TORCH ?= torch==$(TORCH_VERSION)
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
LOCKED := PIP_CONSTRAINT=requirements.lock PIP_BUILD_CONSTRAINT=requirements.lock $(PIP)

.PHONY: quickstart test test-all test-bounds lock bench install vllm clean

quickstart: .venv/installed  ## all six methods on the embedded story model, a few minutes
	@$(BIN)/trivet quickstart --out runs/quickstart

test: .venv/developed  ## lint, types, and the tests that a change is first tried with: a few minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n 2

test-all: test  ## and the rest: processes in numbers, servers, kills, fuzzing, and the planted defects that the tests must catch
	$(BIN)/pytest -n 2 -m slow
	$(BIN)/python tests/mutants.py

test-bounds: .venv/developed  ## a part of the tests with the lowest and with the newest versions of all libraries; 3 GB each for torch
	$(BIN)/python scripts/bounds.py lowest
	$(BIN)/python scripts/bounds.py newest

lock: .venv/developed  ## write requirements.lock anew: the newest versions that pyproject.toml allows
	@echo "torch==$(TORCH_VERSION)" >.venv/torch.txt
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --constraint .venv/torch.txt \
		--no-annotate --no-header --quiet | grep -vE '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' >.venv/requirements.lock
	@(echo "# Written by 'make lock'. torch, $(TORCH_VERSION), is not here: its build is yours to choose (Makefile, TORCH)."; \
		cat .venv/requirements.lock) >requirements.lock

bench: .venv/developed  ## Trivet against TRL on this machine, the two smaller models, some ten minutes; docs in benchmarks/
	$(BIN)/python benchmarks/compare.py --quick

install: .venv/installed  ## the environment only

vllm: .vllm/bin/vllm  ## vLLM's CPU build in an environment of its own, 3.4 GB, for --vllm; docs/servers.md

.vllm/bin/vllm: scripts/install_vllm.sh
	@PYTHON=$(PYTHON) sh scripts/install_vllm.sh .vllm
	@touch $@

# torch first and by itself: TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" picks another build
.venv/installed: pyproject.toml requirements.lock
	@echo "setting up .venv: $(TORCH), then trivet and what it needs (a minute or two) ..."
	@$(PYTHON) -m venv .venv
	@$(LOCKED) install $(TORCH)
	@$(LOCKED) install --editable .
	@touch $@

.venv/developed: .venv/installed
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -qq -y chromium) >/dev/null 2>&1 || echo "no chromium: the tests of the page are skipped"
	@$(LOCKED) install --editable ".[dev]"
	@$(PIP) install --no-deps --target .venv/trl-1.12.0 trl==1.12.0
	@touch $@

clean:
	rm -rf .venv .vllm runs dist build .pytest_cache .ruff_cache
