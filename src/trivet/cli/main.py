"""The command line: one command per method, and a few to inspect what the methods made."""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from trivet.cli.early import refuse_early
from trivet.cli.help import COMMAND_OPTIONS, print_help
from trivet.dependencies import require_extra
from trivet.errors import InputError, nearest
from trivet.recipes import METHODS

HELP = """trivet · post-train language models on preferences and rewards

train         trivet METHOD --model NAME --data FILE [--out DIR] [options]   (--help lists options)
  sft             supervised fine-tuning on the answers in the data
  reward-model    train a scalar head to rank completions, from preference pairs
  dpo             direct preference optimization, from preference pairs
  ppo             proximal policy optimization with a learned critic, from a reward
  grpo            group relative policy optimization, from a reward
  pairwise-grpo   Bradley-Terry over every ranked pair of a sampled group, from a reward
  run             train with your own recipe (docs/your-own-method.md):
                  trivet run mymethod.py --model NAME --data FILE
  resume          continue a run that was stopped or killed: trivet resume RUN
  replay          repeat a step whose gradient was not finite: trivet replay RUN/skipped/step-N

predict
  plan            predict memory by part, operations, time and the largest microbatch of a step,
                  for a model of any size: trivet plan --model Qwen3-0.6B

inspect
  quickstart      train the embedded story model with all six methods, in a few minutes on a
                  laptop; then print one table and write one page
  compare         print the same table for any runs: trivet compare RUN RUN ...
  report          write one page to read and keep for any runs: trivet report RUN RUN ...
  watch           show the same page live in the browser during a run: trivet watch RUN
  plot            draw any metrics of any runs as PNG and SVG: trivet plot RUN ... --y reward kl
  generate        sample completions from a run, folder or hub name
  score           score the rows of a file with rewards

Every method takes --preset toy (no download) and --config FILE.toml; flags override both."""
RESUME = """trivet resume RUN [options]

Continue a run that was stopped or killed from its newest checkpoint, with bit-identical results.

Options that do not change the result may be set again: --generate-with URL ... (servers that have
moved), --vllm, --track, --save-every, --keep, and --microbatch-tokens (same up to rounding). The
new values are saved in config.toml."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input (explained in one sentence), 130
    for Ctrl-C.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # escape halves of surrogate pairs
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
    except BrokenPipeError:  # the reader of our output, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (InputError, OSError) as error:  # OSError: a full disk, a directory that can't be made
        if first_to_fail(error):
            print(f"trivet {args[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        message = str(stopped) or "stopped; everything written so far is kept"
        if is_rank_0():
            print(f"\ntrivet {args[0]}: {message}", file=sys.stderr)
        return getattr(stopped, "code", 130)
    except Exception as error:
        if first_to_fail(error):
            raise
        return 1  # it failed because another rank did, and that one reports why


def is_rank_0() -> bool:
    """Whether this process prints for the run: the only one, or rank 0 of those torchrun
    started.
    """
    return os.environ.get("RANK", "0") == "0"


def first_to_fail(error: BaseException) -> bool:
    """Whether this process reports what went wrong: under torchrun, only the first rank to fail
    does (distributed/ranks.py).
    """
    return getattr(error, "first_to_fail", is_rank_0())


COMMANDS = {  # command: the module with its function; methods, run and resume go through launch
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
    """Run one command with its arguments and return the exit code."""
    wants_help = bool({"-h", "--help"} & set(args))
    if command not in (*METHODS, *COMMANDS, "resume", "run"):
        near = nearest(command, [*METHODS, "resume", "run", *COMMANDS])
        raise InputError(
            f"unknown command; the nearest known one is '{near}' (trivet --help lists them all)"
        )
    if wants_help and (command in METHODS or command in COMMAND_OPTIONS):
        print_help(command)
        return 0
    if command == "resume" and (wants_help or not args or args[0].startswith("-")):
        print(RESUME)
        return 0 if wants_help else 2
    if command == "run":
        file = require_file(args)
        if wants_help:
            print_help(command, file)
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
    """The recipe file named in the arguments of `run`. Errors: InputError if it is missing."""
    if not args or args[0].startswith("-"):
        raise InputError(
            "name the file of a recipe first: trivet run mymethod.py --model NAME --data FILE"
        )
    if not Path(args[0]).is_file():
        raise InputError(f"no file {args[0]}; pass the path of a recipe (docs/your-own-method.md)")
    return Path(args[0])


def train(command: str, args: list[str]) -> None:
    """Train with a method or a user's recipe from the start, or resume a run."""
    from trivet.arguments import parse, parse_values, read_flags
    from trivet.report.terminal import Terminal
    from trivet.runner.launch import launch
    from trivet.runner.methods import load_recipe
    from trivet.runner.resume import config_of, resume

    with closing(Terminal()) as terminal:  # or a progress line would swallow later output
        if command == "resume":
            kind = type(config_of(Path(args[0])))
            options = parse_values(kind, read_flags(kind, args[1:]), "--")
            out, quiet = resume(args[0], terminal, **options), False
        else:
            source, args = (args[0], args[1:]) if command == "run" else (command, args)
            recipe = load_recipe(source)
            config = parse(recipe.Config, args, vars(recipe).get("PRESETS"))
            quiet = config.quiet
            out = launch(config, None if quiet else terminal)
    if is_rank_0():
        print(
            out
            if quiet
            else f"  model saved to {out / 'model'}; for the full report: trivet report {out}"
        )


if __name__ == "__main__":
    sys.exit(main())
