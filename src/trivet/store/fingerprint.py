"""Checks that a run resumes with the data and rewards, and from the directory, it began with."""

import hashlib
import marshal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from trivet.batch import Example
from trivet.data.examples import LazyExamples
from trivet.errors import InputError
from trivet.places import is_local_model, model_folder
from trivet.step.options import Options
from trivet.store.reading import read_object

END = 1 << 20  # bytes that are hashed at the beginning and at the end of a large file


def facts_of(train: Sequence[Example], heldout: Sequence[Example]) -> dict[str, Any]:
    """Return the number of examples and their SHA-256; of training examples that are not held in
    memory, only the rows of a thousand are hashed.
    """
    sha256, sampled_rows = hashlib.sha256(), list[Any]()
    examples: Iterable[Example] = heldout
    if isinstance(train, LazyExamples):
        sampled_rows = [train.rows[i] for i in range(0, len(train), -(-len(train) // 1000))]
    else:
        examples = (*train, *heldout)
    for row in sampled_rows:
        sha256.update(repr(row).encode(errors="surrogatepass"))
    for x in examples:
        sha256.update(
            marshal.dumps((x.prompt, x.completions, x.learned), 2)
            + repr(x.row).encode(errors="surrogatepass")
        )
    return {"training": len(train), "sha256": sha256.hexdigest()}


def require_examples(
    out: Path, data: str, now: dict[str, Any], note: Callable[[str], None]
) -> None:
    """Raise an InputError if the number of examples differs from that at the start of the run; if
    only their contents differ, print a note.
    """
    then = read_object(out / "run.json").get("examples", now)
    if then == now:
        return
    what = f"{data}, or the code that reads it, has changed since the run began"
    counts = [facts.get("training") if isinstance(facts, dict) else None for facts in (then, now)]
    if counts[0] != counts[1]:
        advice = "restore it, or start a new run from the weights of a checkpoint"
        raise InputError(f"{out}: {what}: {counts[0]} examples then, {counts[1]} now; {advice}")
    note(f"{what}; continuing with the new version, so results will not be bit-identical")


def facts_of_rewards(names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each reward that is a file, a function in one, or a model's folder.

    Of a large file only the size and the first and last megabyte are hashed, so that a reward model
    is not read once more.
    """
    digests = dict[str, str]()
    for name in names:
        path = Path(model_folder(_path_of(name)))
        paths = path.rglob("*") if is_local_model(str(path)) else [path]
        files = sorted(x for x in paths if x.is_file())
        sha256 = hashlib.sha256()
        for each in files:
            size = each.stat().st_size
            with each.open("rb") as file:
                sha256.update(f"{each.relative_to(path)} {size} ".encode() + file.read(END))
                file.seek(max(file.tell(), size - END))
                sha256.update(file.read())
        digests |= {name: sha256.hexdigest()} if files else {}
    return digests


def note_rewards(out: Path, now: dict[str, str], note: Callable[[str], None]) -> None:
    """Print a note for each reward that has changed since the run in `out` began."""
    then = read_object(out / "run.json").get("rewards", now)
    for name in (name for name in now if isinstance(then, dict) and then.get(name) != now[name]):
        note(f"reward {name} has changed since the run began; continuing with the new version")


def _path_of(name: str) -> str:
    """Return the file of file.py:function or module:function; other names stay as they are."""
    source, _, function = name.rpartition(":")
    if not source or function.startswith("//"):
        return name
    return (
        source
        if source.endswith(".py")
        else getattr(sys.modules.get(source), "__file__", None) or name
    )


def require_paths(config: Options, out: Path) -> None:
    """Raise an InputError if a relative path in the options exists only from the directory in which
    the run started.
    """
    began = Path(str(read_object(out / "run.json").get("directory", "")))
    for name in (
        config.model,
        config.data,
        config.eval_data,
        config.chat_template,
        *getattr(config, "reward", ()),
    ):
        path = _path_of(name)
        if path and not Path(path).exists() and (began / path).exists():
            raise InputError(
                f"{path} is relative to {began}, where the run started; run `cd {began} && trivet "
                f"resume {out.absolute()}`"
            )
