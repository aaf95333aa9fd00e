"""Generation by servers, as set up by --generate-with, --vllm and --max-staleness; without them the
engine itself generates.
"""

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
from trivet.generation.local import LocalServer, python_with_vllm
from trivet.generation.server import Servers
from trivet.generation.vllm import Server
from trivet.step import Metrics
from trivet.step.metrics import mean, reduced
from trivet.step.result import Result
from trivet.step.run import Batches, Run

# seconds for a group of completions, and to wait for a working server; or TRIVET_SERVER_TIMEOUT
TIMEOUT = 600.0
EXACT = {"cpu": 1e-4}  # largest difference from the learner, nats in float32; elsewhere 1e-2
ROUGH = 0.05  # nats on average, in bfloat16
PROBES, LONGEST = 4, 512  # how many prompts the probe has, and the tokens of its longest


class ServerGeneration:
    """Generation by servers in one run. With many processes, rank 0 has the servers."""

    def __init__(self, run: Run, out: Path, start_from: str, context: int):
        self.run, self.out, self.start_from, self.context = run, out, start_from, context
        self.servers: Servers | None = None

    def engine(self, engine: Engine) -> Any:
        """Return what generates instead of this engine."""
        python = self.run.devices.first(python_with_vllm) if vars(self.run.config)["vllm"] else None
        return self.run.devices.servers(partial(self._servers, engine, python), engine)

    def _servers(self, engine: Engine, python: Path | None, **sharing: Any) -> Servers:
        """Set up the servers. sharing: how the policy is published if many processes hold it."""
        run, config = self.run, vars(self.run.config)
        exact, device = config["precision"] == "float32", torch.device(run.device).type
        timeout = float(os.environ.get("TRIVET_SERVER_TIMEOUT", "") or TIMEOUT)
        options: dict[str, Any] = {
            "stops": engine.stops,
            "cut": {
                "temperature": engine.temperature,
                "top_k": engine.top_k,
                "top_p": engine.top_p,
            },
            "timeout": timeout,
            "exact": exact,
            "tolerance": EXACT.get(device, 1e-2) if exact else ROUGH,
        }
        servers = [Server(url=url, **options) for url in map(address, config["generate_with"])]
        if python:
            local = self._local(python)
            adapter = bool(getattr(run.model, "peft_config", None))
            url = f"http://127.0.0.1:{local.port}"
            servers.append(
                Server(url=url, local=local, base=self.start_from if adapter else "", **options)
            )
        self.servers = Servers(
            engine=engine,
            servers=servers,
            folder=self.out / "served",
            probes=probes(run.train),
            patience=timeout,
            staleness=config["max_staleness"],
            untie=device == "cpu",
            note=run.note,
            **sharing,
        )
        return self.servers

    def ahead(self, batches: Batches) -> Batches:
        """Yield the same batches; the servers look ahead at those that they may already sample."""
        return batches if self.servers is None else self.servers.ahead(batches)

    def metrics(self, result: Result) -> Metrics:
        """The metrics that a step on completions of the servers adds."""
        if self.servers is None or not isinstance(result.completions, Rollouts):
            return {}
        logprobs = result.numbers.get("old_logprob", result.numbers.get("logprob"))
        return ratio_metrics(result.completions, logprobs) | self.servers.metrics()

    def _local(self, python: Path) -> LocalServer:
        run, config = self.run, vars(self.run.config)
        cpu, policy = torch.device(run.device).type == "cpu", run.model
        longest = min(self.context, config["max_prompt_tokens"] + config["max_completion_tokens"])
        flags = [
            "--dtype",
            config["precision"],
            "--max-model-len",
            str(longest),
            "--enable-scale-out",
        ]
        flags += [
            "--logprobs-mode",
            "processed_logprobs",
            "--skip-tokenizer-init",
            "--generation-config",
            "vllm",
        ]
        flags += ["--disable-uvicorn-access-log"]
        if adapters := getattr(policy, "peft_config", None):
            rank = max(int(adapter.r) for adapter in adapters.values())
            flags += ["--enable-lora", "--max-lora-rank", str(next(r for r in RANKS if r >= rank))]
            flags += ["--max-loras", str(1 + config["max_staleness"])]
        flags += (
            ["--enforce-eager", "--max-num-seqs", "64"]
            if cpu
            else ["--gpu-memory-utilization", "0.4"]
        )
        flags += shlex.split(os.environ.get("TRIVET_VLLM_FLAGS", ""))
        return LocalServer(python, self.out / "vllm.log", flags)


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # adapter ranks that vLLM accepts


@contextmanager
def servers_of(
    run: Run, out: Path, start_from: str, context: int
) -> Iterator[ServerGeneration | None]:
    """Make the run generate where its options say; on exit, stop the servers that we started."""
    if not (vars(run.config).get("generate_with") or vars(run.config).get("vllm")):
        yield None
        return
    run.servers = generation = ServerGeneration(run, out, start_from, context)
    try:
        yield generation
    finally:
        if generation.servers is not None:
            generation.servers.close()
            with suppress(OSError):
                generation.out.rmdir()  # empty if the run failed in its first step


def check_servers(run: Run) -> None:
    """Raise an InputError for server options that do not go together."""
    config = vars(run.config)
    servers = bool(config.get("generate_with") or config.get("vllm"))
    if config.get("max_staleness") and not servers:
        raise InputError(
            "--max-staleness needs servers that generate ahead of training; add --vllm or "
            "--generate-with URL"
        )


def address(url: str) -> str:
    """Return the URL of a server up to its port."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        fine = False
    if not fine:
        raise InputError(f"--generate-with {url}: expected a URL like http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


def probes(train: Sequence[Example]) -> list[list[int]]:
    """Choose a few of the first prompts, of different lengths, the longest among them."""
    prompts = sorted(
        {tuple(train[i].prompt[:LONGEST]) for i in range(min(64, len(train)))},
        key=lambda x: (len(x), x),
    )
    count = min(PROBES, len(prompts))
    return [list(prompts[-1 - i * (len(prompts) - 1) // max(1, count - 1)]) for i in range(count)]


def ratio_metrics(rollouts: Rollouts, logprobs: torch.Tensor | None) -> Metrics:
    """How well tokens sampled by other weights, or by another engine, stand in for the learner's.

    The mean of rho = pi / pi_sampler before the cap, which is 1 on average over many tokens, and
    the effective sample size (sum rho)^2 / (n sum rho^2), 1 if all have the same weight.
    """
    if logprobs is None or not rollouts.versions:
        return {}
    mask = rollouts.groups.mask
    ratio = torch.where(mask, (logprobs - rollouts.logprobs).exp(), 0.0)  # (B, T)
    return reduced(
        {
            "sampling/importance_sampling_ratio/mean": mean(ratio, mask),
            "sampling/effective_sample_size": (
                ratio.sum().square(),
                ratio.square().sum() * mask.sum(),
            ),
        }
    )
