"""Decoding alone: 8 GSM8K questions, 8 completions of each, 128 tokens in all of them.

    python benchmarks/decode.py S            every peer in a process of its own
    python benchmarks/decode.py S trivet     one of them, in this process; prints one JSON line

The first call of each is a warm-up. `transformers` keeps float32 weights under bf16 autocast, as a trainer does; `transformers-bf16`
has its weights cast once, the fastest that its generate does here. `vllm` runs in an environment of its own, since its CPU build pins
torch: --vllm-python names that environment's Python. Its threads are bound to all cores (by default it leaves one to its server, and
takes half as long again), products and weights are bf16 as in ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import workloads

Sampler = Callable[[], int]  # samples all rows; returns how many tokens it made


def main() -> None:
    """Time one peer, or all of them one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("size", choices=tuple(workloads.SHAPES))
    parser.add_argument("peer", nargs="?", choices=tuple(PEERS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="processes of each peer, in turn")
    parser.add_argument(
        "--vllm-python",
        default="",
        help="Python of an environment with vLLM; without it vLLM is left out",
    )
    chosen = parser.parse_args()
    if chosen.peer:
        print(json.dumps(measure(chosen.peer, chosen.size, chosen.runs)))
        return
    threads = str(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    of_vllm = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(threads) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    for _, peer in product(range(chosen.rounds), PEERS):
        python = chosen.vllm_python if peer == "vllm" else sys.executable
        if python:
            command = [python, __file__, chosen.size, peer, "--runs", str(chosen.runs)]
            own = environment | (of_vllm if peer == "vllm" else {})
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=own, check=True)
            print(
                next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")),
                flush=True,
            )


def measure(peer: str, size: str, runs: int) -> dict[str, Any]:
    """Seconds of each call after the first, tokens per second, peak memory."""
    from run_one import peak_megabytes

    sample = PEERS[peer](size)
    seconds, tokens = list[float](), 0
    for _ in range(runs + 1):
        began = time.perf_counter()
        tokens = sample()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[1:])
    return {
        "peer": peer,
        "size": size,
        "seconds": [round(value, 3) for value in seconds[1:]],
        "median_seconds": round(median, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / median, 1),
        "peak_mb": round(peak_megabytes(), 1),
    }


def trivet(size: str) -> Sampler:
    """The in-process engine, log-probabilities and texts included."""
    from functools import partial

    from trivet_side import as_example

    from trivet.generation.engine import Engine
    from trivet.model.load import load_policy
    from trivet.model.text import decode_completion, load_tokenizer

    folder = str(workloads.model_folder(size))
    tokenizer, policy = (
        load_tokenizer(folder),
        load_policy(folder, device=workloads.DEVICE, precision="bfloat16"),
    )
    workloads.set_lengths(policy, "full")
    prompts = [
        as_example(row) for row in workloads.load_rows("grpo", tokenizer, workloads.EXAMPLES, size)
    ]
    decode, generator = (
        partial(decode_completion, tokenizer),
        torch.Generator(workloads.DEVICE).manual_seed(0),
    )
    engine = Engine(decode, [workloads.EOS], workloads.ROOM[size], 1.0, generator)
    return lambda: int(engine.generate(policy, prompts, workloads.COMPLETIONS).groups.present.sum())


def transformers(size: str, dtype: torch.dtype = torch.float32) -> Sampler:
    """transformers' own generate on left-padded rows, one for each completion."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = workloads.model_folder(size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    workloads.set_lengths(model, "full")
    model.to(workloads.DEVICE, dtype)
    prompts = [
        row.prompt for row in workloads.load_rows("grpo", tokenizer, workloads.EXAMPLES, size)
    ]
    batch = tokenizer(prompts, padding=True, return_tensors="pt").to(workloads.DEVICE)

    def sample() -> int:
        with torch.no_grad(), torch.autocast(workloads.DEVICE, torch.bfloat16):
            rows = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=True,
                top_k=0,
                num_return_sequences=workloads.COMPLETIONS,
                max_new_tokens=workloads.ROOM[size],
            )
        return rows[:, batch["input_ids"].shape[1] :].numel()

    return sample


def transformers_bf16(size: str) -> Sampler:
    """The same with weights in bfloat16."""
    return transformers(size, torch.bfloat16)


def vllm(size: str) -> Sampler:
    """vLLM on the same token ids, with the sampled log-probabilities; ignore_eos stands for the bias on EOS."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    folder = workloads.model_folder(size)
    rows = workloads.load_rows(
        "grpo", AutoTokenizer.from_pretrained(folder), workloads.EXAMPLES, size
    )
    engine = LLM(
        str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_seqs=64
    )
    room = workloads.ROOM[size]
    how = SamplingParams(
        n=workloads.COMPLETIONS, temperature=1.0, max_tokens=room, ignore_eos=True, logprobs=0
    )
    prompts = [{"prompt_token_ids": row.prompt_ids} for row in rows]

    def sample() -> int:
        answers = engine.generate(prompts, how, use_tqdm=False)
        return sum(len(output.token_ids) for answer in answers for output in answer.outputs)

    return sample


PEERS = {
    "trivet": trivet,
    "transformers": transformers,
    "transformers-bf16": transformers_bf16,
    "vllm": vllm,
}


if __name__ == "__main__":
    main()
