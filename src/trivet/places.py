"""Resolve the models, data, rewards and templates a user names: is it a local path, and does it
exist? Imports nothing heavy.
"""

import os
from pathlib import Path
from typing import Any

from trivet.errors import InputError

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
KINDS = (".jsonl", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")


def is_path(name: str) -> bool:
    """Whether this names a local folder, existing or not, rather than something on the hub."""
    return (
        Path(name).exists()
        or name[0] in "/."
        or ("/" in name and Path(name).parts[0] in os.listdir())
    )


def is_local_model(name: str) -> bool:
    """Whether this is a folder that holds a model or an adapter."""
    return any((Path(name) / file).exists() for file in (CONFIG, ADAPTER_CONFIG))


def model_folder(name: str) -> str:
    """The model folder inside a run directory; any other name unchanged."""
    inside = str(Path(name) / "model")
    return inside if is_local_model(inside) else name


def require_model(name: str, files: tuple[str, ...] = (CONFIG, ADAPTER_CONFIG)) -> None:
    """Raise InputError if no model is named, or if it is a local folder without any of these files.
    Hub names pass.
    """
    if not name:
        raise InputError(
            "no model was named; pass --model with a Hugging Face name or a folder, or --preset toy"
        )
    if is_path(name) and not any((Path(name) / file).exists() for file in files):
        raise InputError(
            f"{name}: no config.json there; a model is a folder written by transformers' "
            "save_pretrained"
        )


def data_file(path: str) -> tuple[Path | None, str]:
    """The data file of this name and its type; None for the file if the name is a folder or a hub
    dataset.

    Errors: InputError if nothing is named, the file does not exist, or its type is unknown.
    """
    if not path:
        raise InputError(
            "no data was named; pass --data with a file (.jsonl, .json, .csv, .parquet) or a hub "
            "name, or --preset toy"
        )
    file, packed = Path(path), Path(path.lower()).suffix
    kind = Path(path.lower().removesuffix(packed if packed in PACKED else "")).suffix
    if file.is_dir() or (not file.exists() and kind not in KINDS):
        return None, kind
    if not file.exists():
        raise InputError(f"{path}: no such file")
    if kind not in KINDS:
        raise InputError(
            f"{path}: unknown file type; use {', '.join(KINDS)}, optionally with .gz or .zst"
        )
    return file, kind


def require_reward(name: str) -> None:
    """Raise InputError if a reward is a function in a file (file.py:function) that does not
    exist.
    """
    source, _, _ = name.rpartition(":")
    if source.endswith(".py") and not Path(source).is_file():
        raise InputError(f"reward {name}: no file {source}")


def require_template(name: str) -> None:
    """Raise InputError if the chat template is a file that does not exist."""
    if name not in ("", "plain") and not Path(name).is_file():
        raise InputError(
            f"--chat-template takes 'plain' or the path of a Jinja template; no file {name}"
        )


def require_places(config: Any) -> None:
    """Raise InputError for the first thing named in the options of a command that does not
    exist.
    """
    options = vars(config)
    if model := options.get("model"):
        require_model(model_folder(model))
    for data in filter(None, (options.get("data"), options.get("eval_data"))):
        data_file(data)
    for reward in options.get("reward", ()):
        require_reward(reward)
    require_template(options.get("chat_template", ""))
