"""Going on with a run that was stopped or killed, from its newest checkpoint that is whole.

out = resume("runs/grpo")
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from trivet.arguments import read_toml, typed
from trivet.errors import InputError
from trivet.runner.launch import Watch, launch
from trivet.runner.methods import load_recipe
from trivet.step.options import Options
from trivet.store.fingerprint import require_paths
from trivet.store.reading import recipe_source
from trivet.store.record import require_free

MAY_CHANGE = ("generate_with", "vllm", "track", "save_every", "keep", "microbatch_tokens")  # not what is computed


def resume(out: str | Path, /, watch: Watch | None = None, **options: Any) -> Path:
    """Go on with a run that was stopped or killed. options: other values from here on, of those in MAY_CHANGE.

    Errors: InputError where there is no run, it is done, or an option would change what it computes.
    """
    out = Path(out)
    if (out / "summary.json").exists():
        raise InputError(f"{out} is done: its model is in {out / 'model'}")
    require_free(out)
    before = config_of(out)
    config = replace(before, **typed(type(before), options, "") | {"out": str(out)})
    if other := sorted(options.keys() - set(MAY_CHANGE)):
        may = ", ".join(f"--{name.replace('_', '-')}" for name in MAY_CHANGE if hasattr(config, name))
        raise InputError(
            f"--{other[0].replace('_', '-')} would change what the run computes; resume takes {may}, the rest stands in {out / 'config.toml'}"
        )
    if _served(config) != _served(before):
        who = "servers generate" if _served(before) else "the run itself generates"
        raise InputError(
            f"{out}: {who}, and others would write other tokens; only servers can take the place of servers"
        )
    return launch(config, watch, again=True)


def _served(config: Options) -> bool:
    return bool(vars(config).get("generate_with") or vars(config).get("vllm"))


def config_of(out: Path) -> Options:
    """The options of the run in this directory. Errors: InputError where it is none."""
    kind = load_recipe(recipe_source(out)).Config
    config = kind(**typed(kind, read_toml(str(out / "config.toml")), f"{out / 'config.toml'}: "))
    require_paths(config, out)
    return config
