"""Whether a run goes on with the data, the rewards and from the place that it was begun with."""

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

END = 1 << 20  # bytes of a large file that are looked at, at its beginning and its end


def facts_of(train: Sequence[Example], heldout: Sequence[Example]) -> dict[str, Any]:
    """How many examples there are, and the SHA-256 of them; of more than are held, of the rows of a thousand."""
    found, shown = hashlib.sha256(), list[Any]()
    examples: Iterable[Example] = heldout
    if isinstance(train, LazyExamples):
        shown = [train.rows[i] for i in range(0, len(train), -(-len(train) // 1000))]
    else:
        examples = (*train, *heldout)
    for row in shown:
        found.update(repr(row).encode(errors="surrogatepass"))
    for x in examples:
        found.update(
            marshal.dumps((x.prompt, x.completions, x.learned), 2) + repr(x.row).encode(errors="surrogatepass")
        )
    return {"training": len(train), "sha256": found.hexdigest()}


def require_examples(out: Path, data: str, now: dict[str, Any], note: Callable[[str], None]) -> None:
    """InputError where there is not the same number of examples as the run was begun with; where they differ, it is noted."""
    known = read_object(out / "run.json").get("examples", now)
    if known == now:
        return
    what = f"{data}, or what reads it, is not what it was when the run began"
    counts = [facts.get("training") if isinstance(facts, dict) else None for facts in (known, now)]
    if counts[0] != counts[1]:
        said = "restore it, or begin a new run from the weights of a checkpoint"
        raise InputError(f"{out}: {what}: {counts[0]} examples then, {counts[1]} now; {said}")
    note(f"{what}; going on with what it is now, so not to the same bits")


def facts_of_rewards(names: Sequence[str]) -> dict[str, str]:
    """For each reward that is a file, a function in one, or a model's folder: the SHA-256 of what is there.

    Of a large file its size, its first and its last megabyte, so that a reward model is not read once more.
    """
    found = dict[str, str]()
    for name in names:
        path = Path(model_folder(_path_of(name)))
        there = path.rglob("*") if is_local_model(str(path)) else [path]
        files = sorted(x for x in there if x.is_file())
        known = hashlib.sha256()
        for each in files:
            size = each.stat().st_size
            with each.open("rb") as file:
                known.update(f"{each.relative_to(path)} {size} ".encode() + file.read(END))
                file.seek(max(file.tell(), size - END))
                known.update(file.read())
        found |= {name: known.hexdigest()} if files else {}
    return found


def note_rewards(out: Path, now: dict[str, str], note: Callable[[str], None]) -> None:
    """Say which rewards are not what they were when the run in `out` was begun."""
    known = read_object(out / "run.json").get("rewards", now)
    for name in (name for name in now if isinstance(known, dict) and known.get(name) != now[name]):
        note(f"reward {name} is not what it was when the run began; going on with what it is now")


def _path_of(name: str) -> str:
    """The file of file.py:function or module:function; what is no function stays."""
    source, _, function = name.rpartition(":")
    if not source or function.startswith("//"):
        return name
    return source if source.endswith(".py") else getattr(sys.modules.get(source), "__file__", None) or name


def require_paths(config: Options, out: Path) -> None:
    """InputError where a path of the options is meant from the directory in which the run was begun, and not there from here."""
    began = Path(str(read_object(out / "run.json").get("directory", "")))
    for name in (config.model, config.data, config.eval_data, config.chat_template, *getattr(config, "reward", ())):
        path = _path_of(name)
        if path and not Path(path).exists() and (began / path).exists():
            said = f"{path} is meant from {began}, where the run was begun"
            raise InputError(f"{out}: {said}; go there: cd {began}, and name {out.absolute()}")
