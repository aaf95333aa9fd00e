"""Resume a run that was stopped or killed, from its newest intact checkpoint.

out = resume("runs/grpo")
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from trivet.arguments import parse_values, read_toml
from trivet.errors import InputError
from trivet.runner.launch import Watch, launch
from trivet.runner.methods import load_recipe
from trivet.step.options import Options
from trivet.store.fingerprint import require_paths
from trivet.store.reading import recipe_source
from trivet.store.record import require_free

# options that do not change what the run computes
MAY_CHANGE = ("generate_with", "vllm", "track", "save_every", "keep", "microbatch_tokens")


def resume(out: str | Path, /, watch: Watch | None = None, **options: Any) -> Path:
    """Resume a run that was stopped or killed. options: new values for options in MAY_CHANGE.

    Errors: InputError if there is no run, it is done, or an option would change what it computes.
    """
    out = Path(out)
    if (out / "summary.json").exists():
        raise InputError(f"{out} is done; its model is in {out / 'model'}")
    require_free(out)
    before = config_of(out)
    config = replace(before, **parse_values(type(before), options, "") | {"out": str(out)})
    if other := sorted(options.keys() - set(MAY_CHANGE)):
        allowed = ", ".join(
            f"--{name.replace('_', '-')}" for name in MAY_CHANGE if hasattr(config, name)
        )
        raise InputError(
            f"--{other[0].replace('_', '-')} would change what the run computes; resume accepts "
            f"only {allowed}; the other options are in {out / 'config.toml'}"
        )
    if _uses_servers(config) != _uses_servers(before):
        raise InputError(
            "this run samples with vLLM servers; resume with --vllm or --generate-with"
            if _uses_servers(before)
            else "this run samples in its own process; resume without --vllm and --generate-with"
        )
    return launch(config, watch, again=True)


def _uses_servers(config: Options) -> bool:
    return bool(vars(config).get("generate_with") or vars(config).get("vllm"))


def config_of(out: Path) -> Options:
    """Read the options of the run in this directory. Errors: InputError if it holds no run."""
    kind = load_recipe(recipe_source(out)).Config
    config = kind(
        **parse_values(kind, read_toml(str(out / "config.toml")), f"{out / 'config.toml'}: ")
    )
    require_paths(config, out)
    return config
