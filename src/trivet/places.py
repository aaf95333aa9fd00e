"""What a person names, a model, rows, a reward, a template: is it a path on this machine, and is it there? Imports nothing heavy."""

import os
from pathlib import Path
from typing import Any

from trivet.errors import InputError

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
KINDS = (".jsonl", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")


def is_path(name: str) -> bool:
    """Whether a folder here is meant, there or not, and no hub name."""
    return Path(name).exists() or name[0] in "/." or ("/" in name and Path(name).parts[0] in os.listdir())


def is_local_model(name: str) -> bool:
    """Whether this is a folder with a model, or an adapter, in it."""
    return any((Path(name) / file).exists() for file in (CONFIG, ADAPTER_CONFIG))


def model_folder(name: str) -> str:
    """The model inside a run directory, or the name as it is."""
    inside = str(Path(name) / "model")
    return inside if is_local_model(inside) else name


def require_model(name: str, files: tuple[str, ...] = (CONFIG, ADAPTER_CONFIG)) -> None:
    """InputError where no model is named, or a folder here that has none of these files. A hub name passes."""
    if not name:
        raise InputError("no model was named: give --model a Hugging Face name or folder (or use --preset toy)")
    if is_path(name) and not any((Path(name) / file).exists() for file in files):
        raise InputError(f"{name}: no config.json there; a model is a folder as transformers' save_pretrained makes it")


def data_file(path: str) -> tuple[Path | None, str]:
    """The file of rows of this name and its kind; no file where the name is that of a folder or a hub data set.

    Errors: InputError where nothing is named, no such file is there, or its kind is unknown.
    """
    if not path:
        raise InputError(
            "no data was named: give --data a file (.jsonl, .json, .csv, .parquet) or a hub name (or use --preset toy)"
        )
    file, packed = Path(path), Path(path.lower()).suffix
    kind = Path(path.lower().removesuffix(packed if packed in PACKED else "")).suffix
    if file.is_dir() or (not file.exists() and kind not in KINDS):
        return None, kind
    if not file.exists():
        raise InputError(f"{path}: no such file")
    if kind not in KINDS:
        raise InputError(f"{path}: unknown kind of file; use {', '.join(KINDS)}, each also as .gz or .zst")
    return file, kind


def require_reward(name: str) -> None:
    """InputError where a reward is a function in a file, file.py:function, and there is no such file."""
    source, _, _ = name.rpartition(":")
    if source.endswith(".py") and not Path(source).is_file():
        raise InputError(f"reward {name}: no file {source}")


def require_template(name: str) -> None:
    """InputError where a chat template is a file that is not there."""
    if name not in ("", "plain") and not Path(name).is_file():
        raise InputError(f"--chat-template takes 'plain' or the path of a Jinja template, and there is no file {name}")


def require_places(config: Any) -> None:
    """InputError for the first thing that the options of a command name and that is not there."""
    named = vars(config)
    if model := named.get("model"):
        require_model(model_folder(model))
    for data in filter(None, (named.get("data"), named.get("eval_data"))):
        data_file(data)
    for reward in named.get("reward", ()):
        require_reward(reward)
    require_template(named.get("chat_template", ""))
