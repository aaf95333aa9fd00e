"""From --generate-with, --vllm and --max-staleness to what generates in the engine's place; without them, the engine itself."""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from trivet.batch import Example, Rollouts
from trivet.errors import InputError
from trivet.generation.engine import Engine
from trivet.generation.local import Local, python_with_vllm
from trivet.generation.server import Servers
from trivet.generation.vllm import Server
from trivet.step import Metrics
from trivet.step.metrics import mean, reduced
from trivet.step.result import Result
from trivet.step.run import Batches, Run

TIMEOUT = 600.0  # seconds for a group of completions, and to wait for a server that works; or TRIVET_SERVER_TIMEOUT
EXACT = {"cpu": 1e-4}  # nats between server and learner in float32, at most; elsewhere 1e-2
ROUGH = 0.05  # nats on average, in bfloat16
PROBES, LONGEST = 4, 512  # prompts of the probe, and their longest


class Elsewhere:
    """Generation by servers in one run. Of many processes, the first one has them."""

    def __init__(self, run: Run, out: Path, start_from: str, context: int):
        self.run, self.out, self.start_from, self.context = run, out, start_from, context
        self.servers: Servers | None = None

    def engine(self, engine: Engine) -> Any:
        """What generates in place of this engine."""
        python = self.run.devices.first(python_with_vllm) if vars(self.run.config)["vllm"] else None
        return self.run.devices.servers(partial(self._servers, engine, python), engine)

    def _servers(self, engine: Engine, python: Path | None, **sharing: Any) -> Servers:
        """sharing: how the policy is published where many processes hold it."""
        run, config = self.run, vars(self.run.config)
        exact, device = config["precision"] == "float32", torch.device(run.device).type
        timeout = float(os.environ.get("TRIVET_SERVER_TIMEOUT", "") or TIMEOUT)
        known: dict[str, Any] = {
            "stops": engine.stops,
            "cut": {"temperature": engine.temperature, "top_k": engine.top_k, "top_p": engine.top_p},
            "timeout": timeout,
            "exact": exact,
            "tolerance": EXACT.get(device, 1e-2) if exact else ROUGH,
        }
        servers = [Server(url=url, **known) for url in map(address, config["generate_with"])]
        if python:
            local = self._local(python)
            adapter = bool(getattr(run.model, "peft_config", None))
            url = f"http://127.0.0.1:{local.port}"
            servers.append(Server(url=url, local=local, base=self.start_from if adapter else "", **known))
        self.servers = Servers(
            engine=engine,
            servers=servers,
            folder=self.out / "served",
            probes=probes(run.train),
            patience=timeout,
            staleness=config["max_staleness"],
            untie=device == "cpu",
            nccl=device == "cuda" and over_nccl(),
            note=run.note,
            **sharing,
        )
        return self.servers

    def ahead(self, batches: Batches) -> Batches:
        """The same batches; the servers look ahead at those that they may already write."""
        return batches if self.servers is None else self.servers.ahead(batches)

    def metrics(self, result: Result) -> Metrics:
        """What a step on completions of the servers adds to its metrics."""
        if self.servers is None or not isinstance(result.completions, Rollouts):
            return {}
        logprobs = result.numbers.get("old_logprob", result.numbers.get("logprob"))
        return ratio_metrics(result.completions, logprobs) | self.servers.metrics()

    def _local(self, python: Path) -> Local:
        run, config = self.run, vars(self.run.config)
        cpu, policy = torch.device(run.device).type == "cpu", run.model
        longest = min(self.context, config["max_prompt_tokens"] + config["max_completion_tokens"])
        flags = ["--dtype", config["precision"], "--max-model-len", str(longest), "--enable-scale-out"]
        flags += ["--logprobs-mode", "processed_logprobs", "--skip-tokenizer-init", "--generation-config", "vllm"]
        flags += ["--disable-uvicorn-access-log"]
        if adapters := getattr(policy, "peft_config", None):
            rank = max(int(adapter.r) for adapter in adapters.values())
            flags += ["--enable-lora", "--max-lora-rank", str(next(r for r in RANKS if r >= rank))]
            flags += ["--max-loras", str(1 + config["max_staleness"])]
        flags += ["--enforce-eager", "--max-num-seqs", "64"] if cpu else ["--gpu-memory-utilization", "0.4"]
        flags += shlex.split(os.environ.get("TRIVET_VLLM_FLAGS", ""))
        return Local(python, self.out / "vllm.log", flags)


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes


@contextmanager
def servers_of(run: Run, out: Path, start_from: str, context: int) -> Iterator[Elsewhere | None]:
    """Within it the run generates where its options say; afterwards our own servers are ended."""
    if not (vars(run.config).get("generate_with") or vars(run.config).get("vllm")):
        yield None
        return
    run.servers = elsewhere = Elsewhere(run, out, start_from, context)
    try:
        yield elsewhere
    finally:
        if elsewhere.servers is not None:
            elsewhere.servers.close()
            with suppress(OSError):
                elsewhere.out.rmdir()  # of a run that failed in its first step nothing else is left


def check_servers(run: Run) -> None:
    """InputError for options of servers that do not go together."""
    config = vars(run.config)
    servers = bool(config.get("generate_with") or config.get("vllm"))
    if config.get("max_staleness") and not servers:
        raise InputError("--max-staleness needs somebody who generates meanwhile: give --generate-with URL, or --vllm")
    if servers and over_nccl() and run.devices.size > 1:
        raise InputError(
            "TRIVET_WEIGHT_SYNC=nccl does not work under torchrun yet; leave it out, weights then go as files"
        )


def over_nccl() -> bool:
    """Whether full weights are to go from GPU to GPU."""
    return os.environ.get("TRIVET_WEIGHT_SYNC", "") == "nccl"


def address(url: str) -> str:
    """The URL of a server up to its port."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        fine = False
    if not fine:
        raise InputError(f"--generate-with {url}: expected a URL like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def probes(train: Sequence[Example]) -> list[list[int]]:
    """A few prompts of different lengths, the longest of the first ones among them."""
    found = sorted({tuple(train[i].prompt[:LONGEST]) for i in range(min(64, len(train)))}, key=lambda x: (len(x), x))
    count = min(PROBES, len(found))
    return [list(found[-1 - i * (len(found) - 1) // max(1, count - 1)]) for i in range(count)]


def ratio_metrics(rollouts: Rollouts, logprobs: torch.Tensor | None) -> Metrics:
    """How well tokens of other weights, or another engine, stand for the learner's own.

    The mean of pi / pi_sampler before the cap, which is 1 on average over many, and the effective sample size
    (sum rho)^2 / (n sum rho^2), 1 where all weigh the same.
    """
    if logprobs is None or not rollouts.versions:
        return {}
    mask = rollouts.groups.mask
    ratio = torch.where(mask, (logprobs - rollouts.logprobs).exp(), 0.0)  # (B, T)
    return reduced(
        {
            "sampling/importance_sampling_ratio/mean": mean(ratio, mask),
            "sampling/effective_sample_size": (ratio.sum().square(), ratio.square().sum() * mask.sum()),
        }
    )
