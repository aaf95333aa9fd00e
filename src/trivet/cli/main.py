"""The command line: one command per method, and a few to look at what they made."""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from trivet.cli.early import refuse_early
from trivet.cli.help import WHERE, print_help
from trivet.dependencies import require_extra
from trivet.errors import InputError, nearest
from trivet.recipes import METHODS

HELP = """trivet · post-train language models on preferences and rewards

methods       trivet METHOD --model NAME --data FILE [--out DIR] [options]     (--help lists them)
  sft             supervised fine-tuning on the answers given
  reward-model    a scalar head that ranks completions, from preference pairs
  dpo             direct preference optimization, from preference pairs
  ppo             proximal policy optimization with a learned critic, from a reward
  grpo            group relative policy optimization, from a reward
  pairwise-grpo   Bradley-Terry over every ranked pair of a sampled group, from a reward
  run             a recipe of your own: trivet run mymethod.py --model NAME --data FILE (docs/your-own-method.md)
  resume          go on with a run that was stopped or killed: trivet resume RUN
  replay          make a step again whose gradient was not finite: trivet replay RUN/skipped/step-N

before a run
  plan            memory by part, operations, time and the largest microbatch, of any size: trivet plan --model Qwen3-0.6B

looking
  quickstart      all six on the embedded story model, a few minutes on a laptop; then one table, one page
  compare         the same table for any runs: trivet compare RUN RUN ...
  report          one page to read and keep, for any runs: trivet report RUN RUN ...
  watch           the same page, live in the browser while a run goes on: trivet watch RUN
  plot            any metrics of any runs as PNG and SVG: trivet plot RUN ... --y reward kl
  generate        completions from a run, folder or hub name
  score           rewards for rows of a file

Every method takes --preset toy (no download), --config FILE.toml, and flags on top of either."""
RESUME = """trivet resume RUN [options]

Go on with a run that was stopped or killed, from its newest checkpoint, to the same bits.

What does not change the result may be given anew: --generate-with URL ... (servers that have moved), --vllm, --track, --save-every,
--keep, and --microbatch-tokens (to rounding). It then stands in config.toml."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for input that can't be used (said in one sentence), 130 for Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what can't be written, half of a surrogate pair, is spelled out
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if args[0] in ("--version", "version"):
        import importlib.metadata

        print(f"trivet {importlib.metadata.version('trivet')}")
        return 0
    try:
        return run_command(args[0], args[1:])
    except BrokenPipeError:  # whoever read our output, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:  # an OSError: a full disk, a directory that can't be made
        if first_to_fail(error):
            print(f"trivet {args[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        said = str(stopped) or "stopped; what was written so far is kept"
        if leads():
            print(f"\ntrivet {args[0]}: {said}", file=sys.stderr)
        return getattr(stopped, "code", 130)
    except Exception as error:
        if first_to_fail(error):
            raise
        return 1  # it fails because another process of the run has, and that one has said why


def leads() -> bool:
    """Whether this process speaks for the run: one alone, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def first_to_fail(error: BaseException) -> bool:
    """Whether this process says what went wrong: of those that torchrun has started only the first to fail (distributed/ranks.py)."""
    return getattr(error, "first_to_fail", leads())


COMMANDS = {  # command: the module that has its function; the methods and resume are launched
    "quickstart": "cli.quickstart",
    "compare": "report.compare",
    "report": "report.page",
    "watch": "report.watch",
    "plot": "report.plots",
    "generate": "cli.commands",
    "score": "cli.commands",
    "replay": "runner.replay",
    "plan": "plan.command",
}


def run_command(command: str, args: list[str]) -> int:
    """One command with its own arguments."""
    wants_help = bool({"-h", "--help"} & set(args))
    if command not in (*METHODS, *COMMANDS, "resume", "run"):
        near = nearest(command, [*METHODS, "resume", "run", *COMMANDS])
        raise InputError(f"unknown command; the nearest known one is '{near}' (trivet --help lists all)")
    if wants_help and (command in METHODS or command in WHERE):
        print_help(command)
        return 0
    if command == "resume" and (wants_help or not args or args[0].startswith("-")):
        print(RESUME)
        return 0 if wants_help else 2
    if command == "run":
        own = require_file(args)
        if wants_help:
            print_help(command, own)
            return 0
    refuse_early(command, args)
    if command in COMMANDS:
        if command == "watch":
            require_extra("watch", "trivet watch")
        getattr(importlib.import_module(f"trivet.{COMMANDS[command]}"), command)(args)
    else:
        train(command, args)
    return 0


def require_file(args: list[str]) -> Path:
    """The file of the recipe that `run` is given. Errors: InputError where it is missing."""
    if not args or args[0].startswith("-"):
        raise InputError("name the file of a recipe first: trivet run mymethod.py --model NAME --data FILE")
    if not Path(args[0]).is_file():
        raise InputError(f"there is no file {args[0]}; give the path of a recipe (docs/your-own-method.md)")
    return Path(args[0])


def train(command: str, args: list[str]) -> None:
    """A method, or a recipe of one's own, from its beginning; or `resume` of a run."""
    from trivet.arguments import parse, read_flags, typed
    from trivet.report.terminal import Terminal
    from trivet.runner.launch import launch
    from trivet.runner.methods import load_recipe
    from trivet.runner.resume import config_of, resume

    with closing(Terminal()) as terminal:  # else a progress line swallows what is said after it
        if command == "resume":
            kind = type(config_of(Path(args[0])))
            options = typed(kind, read_flags(kind, args[1:]), "--")
            out, quiet = resume(args[0], terminal, **options), False
        else:
            source, args = (args[0], args[1:]) if command == "run" else (command, args)
            recipe = load_recipe(source)
            config = parse(recipe.Config, args, vars(recipe).get("PRESETS"))
            quiet = config.quiet
            out = launch(config, None if quiet else terminal)
    if leads():
        print(out if quiet else f"  model in {out / 'model'}, all of it on one page: trivet report {out}")


if __name__ == "__main__":
    sys.exit(main())
