"""A run: its data, its directory, and the loop around a recipe's loop."""

import json
import math
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from trivet.batch import Rollouts
from trivet.data import Example, load_examples, split_by_prompt
from trivet.errors import InputError
from trivet.model.load import load_policy, model_facts, model_folder, save_model
from trivet.model.text import load_tokenizer, stop_ids
from trivet.run.options import Options, check, to_toml

Metrics = dict[str, float]
NOT_CAUSAL = ("Classification", "QuestionAnswering", "ForMaskedLM", "ForPreTraining")


class Run:
    """What a recipe's loop needs around it: tokenizer, device, examples, random generator, optimizers, and a directory.

    form: 'supervised', 'preference' or 'prompts', what the rows must hold. Nothing is written before the first step is done.
    """

    def __init__(self, config: Options, method: str, form: str):
        check(config, method)
        self.config, self.method, self.start_from = config, method, model_folder(config.model)
        self.out = Path(config.out or f"runs/{method}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self.device)
            self.generator = torch.Generator(self.device).manual_seed(config.seed)
        except (RuntimeError, AssertionError):
            raise InputError(f"--device {self.device}: torch finds no such device here; use cpu or auto") from None
        kind, self.context, self.vocabulary = model_facts(self.start_from)
        if kind.endswith(NOT_CAUSAL) and method != "reward-model":  # that one may go on from a reward model
            raise InputError(f"--model {config.model} is a {kind}; {method} needs a causal language model")
        self.tokenizer = load_tokenizer(self.start_from, config.chat_template)
        self.stops = stop_ids(self.start_from, self.tokenizer)
        self.counts: Counter[str] = Counter()
        self._read_data(form)
        torch.manual_seed(config.seed)
        self.model: Any = None  # the recipe's policy or reward model, saved at the end
        self.note: Callable[[str], None] = lambda text: None  # a line for whoever watches
        self.samples: list[dict[str, Any]] = []
        self.steps = config.steps or max(1, round(config.epochs * len(self.train) / config.prompts_per_step))

    def _read_data(self, form: str) -> None:
        config, room = self.config, self.context - self.config.max_completion_tokens
        if room < 1:
            raise InputError(
                f"--max-completion-tokens {config.max_completion_tokens} leaves no room for a prompt in the context of "
                f"{config.model} ({self.context} tokens); lower it"
            )

        def load(path: str, counts: Counter[str]) -> list[Example]:
            limits = {"max_prompt": min(config.max_prompt_tokens, room), "max_completion": config.max_completion_tokens}
            examples = load_examples(path, self.tokenizer, self.stops, form, counts=counts, **limits)
            highest = max(max(ids) for example in examples for ids in (example.prompt, *example.completions))
            if highest >= self.vocabulary:
                said = f"its tokenizer gives token id {highest}, but its model has {self.vocabulary} ids"
                raise InputError(f"{config.model}: {said}; take a tokenizer and a model that belong together")
            return examples

        self.train = load(config.data, self.counts)
        if config.eval_data:
            heldout = Counter[str]()
            self.heldout = load(config.eval_data, heldout)
            self.counts |= {f"held-out data, {key}": n for key, n in heldout.items() if key.startswith(("left", "cut"))}
        else:
            self.train, self.heldout = split_by_prompt(self.train, config.eval_fraction, config.seed)
        if not self.train:
            raise InputError(f"{config.data}: all rows fell into the held-out share; lower --eval-fraction")
        self.counts["for training"], self.counts["held out"] = len(self.train), len(self.heldout)
        self.heldout = self.heldout[: config.eval_limit]

    def load_policy(self) -> Any:
        """The causal language model that --model names; it is what the run saves."""
        config = self.config
        self.model = load_policy(
            self.start_from, device=self.device, precision=config.precision, from_scratch=config.from_scratch
        )
        return self.model

    def batches(self) -> Iterator[tuple[int, list[Example]]]:
        """(step, examples) for every step from 1, in an order shuffled anew each epoch."""
        order = random.Random(self.config.seed)
        queue: list[Example] = []
        for step in range(1, self.steps + 1):
            while len(queue) < self.config.prompts_per_step:
                queue += order.sample(self.train, len(self.train))
            yield step, queue[: self.config.prompts_per_step]
            del queue[: self.config.prompts_per_step]

    def evaluates(self, step: int) -> bool:
        """Whether this step ends with an evaluation: the last one does, and every eval_every-th."""
        every = self.config.eval_every
        return bool(self.heldout) and (step == self.steps or (every > 0 and step % every == 0))

    def keep_samples(self, step: int, rollouts: Rollouts, rewards: Tensor, most: int = 4) -> None:
        """Note the first few completions of a step for samples.jsonl."""
        size = rollouts.groups.group_size
        for b, text in enumerate(rollouts.texts[:most]):
            kept = {"step": step, "prompt": rollouts.rows[b // size].get("prompt"), "completion": text}
            self.samples.append(kept | {"reward": float(rewards[b]), "finished": bool(rollouts.finished[b])})


class Optimizer:
    """AdamW with warm-up, linear decay if asked for, and a limit on the gradient's norm."""

    def __init__(self, model: Any, config: Options, steps: int, lr: float | None = None):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.parameters, lr=config.lr if lr is None else lr, weight_decay=0.0)
        self.max_grad_norm, warmup = config.max_grad_norm, config.warmup_steps

        def scale(done: int) -> float:
            fall = max(0.0, 1 - done / steps) if config.lr_decay else 1.0
            return min(1.0, (done + 1) / (warmup + 1)) * fall

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, scale)

    def step(self) -> Metrics:
        """Take the step, clear the gradients; returns the gradient's norm before clipping, and the learning rate."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        if not math.isfinite(norm):
            raise InputError("the gradient is not finite: lower --lr, or check the weights of --model and the rewards")
        lr = float(self.schedule.get_last_lr()[0])
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": lr}


Watch = Callable[
    [Run, int, Metrics], None
]  # called with step 0 and no metrics when the run is ready, then after each step


def follow(train: Callable[..., Iterator[Metrics]], run: Run, watch: Watch | None = None) -> Path:
    """Go through a recipe's loop and keep its record: config.toml, metrics.jsonl, samples.jsonl, summary.json, model/.

    Returns the run directory.
    """
    began, heldout, totals = time.perf_counter(), {}, Counter[str]()
    if watch:
        watch(run, 0, {})
    for step, metrics in enumerate(train(run.config, run), 1):
        metrics = {"step": step, "seconds": round(time.perf_counter() - began, 3)} | metrics
        totals += Counter({key: int(value) for key, value in metrics.items() if key.startswith("tokens/")})
        heldout |= {key: value for key, value in metrics.items() if key.startswith("eval/")}
        if step == 1:
            run.out.mkdir(parents=True, exist_ok=True)
            (run.out / "config.toml").write_text(f"# trivet {run.method} --config config.toml\n" + to_toml(run.config))
        _append(run.out / "metrics.jsonl", [metrics])
        _append(run.out / "samples.jsonl", run.samples)
        run.samples.clear()
        if run.config.save_every and step % run.config.save_every == 0 and step < run.steps:
            save_model(run.model, run.tokenizer, run.out / "checkpoints" / f"step-{step}")
        if watch:
            watch(run, step, metrics)
    save_model(run.model, run.tokenizer, run.out / "model")
    summary = {
        "method": run.method,
        "started_from": run.start_from,
        "steps": run.steps,
        "seconds": round(time.perf_counter() - began, 2),
        "peak_memory_bytes": peak_memory(run.device),
        "tokens_generated": totals["tokens/generated"],
        "tokens_trained": totals["tokens/trained"],
        "eval": heldout,
        "data": dict(run.counts),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {run.device}",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return run.out


def peak_memory(device: str) -> int:
    """Bytes: the most that the GPU held for us, else the most resident memory of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    lines = [
        {key: value if value == value else None for key, value in line.items()} for line in lines
    ]  # JSON has no NaN
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
