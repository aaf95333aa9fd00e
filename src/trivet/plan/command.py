"""trivet plan: read the options, plan, and print a table, the formulas or JSON."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from trivet.arguments import parse
from trivet.errors import InputError, first_line
from trivet.places import is_path, model_folder, require_model
from trivet.plan import formulas
from trivet.plan.options import Config
from trivet.plan.shapes import SHAPES, Shape, card_of, own_shape, shape_of, this_machine
from trivet.plan.step import ALLOCATOR, BACKWARD, FORWARD, PHASES, SAMPLES, Step, total
from trivet.recipes import METHODS

NO_MODEL = (
    "no model was named; pass --model with a folder or hub name that has a config.json or one of "
    f"{', '.join(SHAPES)}, or pass --layers, --hidden and --heads"
)


def plan(args: Sequence[str]) -> None:
    """trivet plan"""
    config: Config = parse(Config, list(args))
    check(config)
    shape = own_shape(config) if config.layers else named_shape(config.model)
    scorer = None
    if config.reward_model:
        scorer = shape if config.reward_model == "same" else named_shape(config.reward_model)
    machine = this_machine() if config.card == "this" else card_of(config.card)
    overrides = {"memory": config.memory_gb * 1e9, "bandwidth": config.bandwidth * 1e9}
    overrides |= {"rate_16": config.tflops * 1e12, "rate_32": config.tflops * 1e12}
    machine = machine._replace(**{name: value for name, value in overrides.items() if value})
    methods = [method for method in METHODS if method in (config.method or METHODS)]
    steps = [Step(method, shape, scorer, config, machine) for method in methods]
    if config.json:
        print(
            json.dumps(
                {"shape": asdict(shape), "machine": machine._asdict(), "options": vars(config)}
                | as_json(steps)
            )
        )
        return
    console = Console(highlight=False, soft_wrap=True)
    for line in header(steps[0]):
        console.print(line)
    columns = table(steps)
    needed = Measurement.get(console, console.options.update(width=1000), columns).maximum
    # a narrow terminal wraps lines; nothing is cut
    Console(highlight=False, width=max(console.width, needed)).print(columns)
    for line in remarks(steps):
        console.print(line)
    if config.formulas:
        for step in steps:
            console.print(
                "\n".join(["", f"[bold]{step.method}[/bold]", *formula_lines(step)]), markup=True
            )


def check(config: Config) -> None:
    """Raise InputError for options that can't be planned."""
    for method in config.method:
        if method not in METHODS:
            raise InputError(f"unknown method '{method}'; choose from {', '.join(METHODS)}")
    if not (config.model or config.layers):
        raise InputError(NO_MODEL)
    if config.model and config.layers:
        raise InputError(
            "--layers describes a shape of your own, instead of --model; pass only one of the two"
        )
    least = ("prompt_tokens", "completion_tokens", "prompts_per_step", "devices")
    for name in least:
        if getattr(config, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least 1"
            )
    others = (
        "group_size",
        "epochs_per_batch",
        "microbatch_tokens",
        "eval_limit",
        "lora",
        "memory_gb",
        "tflops",
        "bandwidth",
    )
    for name in (*others, "layers", "kv_heads", "head_dim", "feed_forward", "experts"):
        if getattr(config, name) < 0:
            raise InputError(
                f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be at least 0"
            )
    if not 0 < config.efficiency <= 1:
        raise InputError(
            f"--efficiency is {config.efficiency}; it must be above 0 and at most 1, a share of "
            "the peak"
        )
    if config.quantize != "none" and not config.lora:
        raise InputError(
            "--quantize stores the frozen base below adapters in few bits; pass --lora RANK too"
        )
    if config.quantize != "none" and config.devices > 1:
        raise InputError(
            f"--quantize {config.quantize} works only on one device; drop it or pass --devices 1"
        )
    if config.offload_optimizer and config.devices == 1:
        raise InputError("--offload-optimizer needs sharding; pass --devices of at least 2")


def named_shape(name: str) -> Shape:
    """The shape of a folder, a hub name or a built-in shape."""
    from transformers import AutoConfig

    builtin = next((key for key in SHAPES if key.lower() == name.lower()), None)
    if builtin and not Path(name).exists():
        numbers = {key: value for key, value in SHAPES[builtin].items() if key != "source"}
        return shape_of(AutoConfig.for_model(**numbers), builtin, SHAPES[builtin]["source"])
    from trivet.model.trust import refusal, trusted

    folder = model_folder(name)
    require_model(folder)
    if (
        "/" not in name
        and (near := difflib.get_close_matches(name, SHAPES, n=1, cutoff=0.8))
        and not is_path(name)
    ):
        raise InputError(
            f"--model {name}: neither a folder nor a built-in shape; the nearest known one is "
            f"{near[0]}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted())
    except Exception as error:  # transformers and the hub client raise many exception types
        reason = refusal(error) or first_line(error)
        raise InputError(
            f"--model {name}: its config.json can't be read ({reason}); built-in shapes need none: "
            f"{', '.join(SHAPES)}"
        ) from None
    return shape_of(config, name, "its config.json")


# Output
# ------------------------------------------------------------------------------------------------


def header(step: Step) -> list[str]:
    """The lines above the table: the model, the step and the machine."""
    shape, config, machine = step.shape, step.config, step.machine
    active = shape.matrices + shape.active_experts + shape.head
    kind = f", {count(active)} active per token" if shape.experts else ""
    lengths = (
        f"prompts of {config.prompt_tokens} and completions of {config.completion_tokens} tokens"
    )
    how = [f"{config.precision} products"]
    how += [f"adapters of rank {config.lora}"] if config.lora else []
    how += [f"base in {config.quantize}"] if config.quantize != "none" else []
    how += ["gradient checkpointing"] if config.gradient_checkpointing else []
    how += ["optimizer offloaded"] if config.offload_optimizer else []
    rate = machine.rate_16 if step.size == 2 else machine.rate_32
    many = f"{config.devices} x " if config.devices > 1 else ""
    return [
        f"[bold]{shape.name}[/bold]  {shape.parameters:,} parameters{kind} "
        f"[dim]({shape.source})[/dim]",
        f"{config.prompts_per_step} prompts per step, {lengths}; {', '.join(how)}",
        f"{many}{machine.name}: {bytes_(machine.memory)}, {rate / 1e12:,.3g} TFLOP/s, "
        f"{machine.bandwidth / 1e9:,.0f} GB/s, "
        f"at {config.efficiency:.0%} of these speeds",
    ]


def table(steps: list[Step]) -> Table:
    """A table of the methods side by side: memory by part, work and time by phase, what fits."""
    result = Table(box=None, padding=(0, 0, 0, 2), pad_edge=False, header_style="bold")
    result.add_column("", no_wrap=True)
    for step in steps:
        group = f"\n{step.group} each" if step.group > 1 else ""
        result.add_column(
            step.method.replace("-", "\n", 1) + group,
            justify="right",
            no_wrap=True,
            vertical="bottom",
        )

    def section(
        title: str, cells: list[dict[str, float]], units: tuple[tuple[str, float], ...]
    ) -> None:
        sums = [sum(cell.values()) for cell in cells]
        unit, size = next((unit for unit in units if max(sums) < 10_000 * unit[1]), units[-1])
        result.add_row(f"[dim]{title}, {unit}[/dim]")
        names = dict.fromkeys(name for cell in cells for name in cell)
        for name in sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else 0):
            result.add_row(
                f" {name}", *(digits(cell[name] / size) if name in cell else "" for cell in cells)
            )
        result.add_row(
            " [bold]total[/bold]", *(f"[bold]{digits(value / size)}[/bold]" for value in sums)
        )

    section("peak memory of a device", [step.parts for step in steps], BYTES)
    result.add_row(" reached in", *(SHORT.get(step.peak_phase, step.peak_phase) for step in steps))
    if any(step.server for step in steps):
        servers = [{name: item.value for name, item in step.server.items()} for step in steps]
        section(f"memory of each of {steps[0].config.servers} servers", servers, BYTES)
    result.add_row(
        " fits", *("[green]yes[/green]" if step.fits else "[red]no[/red]" for step in steps)
    )
    result.add_row(
        " --microbatch-tokens up to",
        *(f"{step.largest_microbatch:,}" if step.largest_microbatch else "-" for step in steps),
    )
    section("operations per device and step", [sums(step.flops) for step in steps], OPERATIONS)
    section("moved to and from memory", [sums(step.moved) for step in steps], BYTES)
    if any(step.sent for step in steps):
        section("received from other devices", [sums(step.sent) for step in steps], BYTES)
    section(
        "time of a step", [step.seconds for step in steps], (("ms", 1e-3), ("s", 1), ("min", 60))
    )
    return result


BYTES = (("MiB", 2**20), ("GiB", 2**30), ("TiB", 2**40))
OPERATIONS = (("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15), ("EFLOP", 1e18))
ORDER = (*PHASES, *FORWARD.values(), *BACKWARD.values(), "optimizer")
SHORT = {"end of the backward": "its end", "critic's backward": "critic's"}


def sums(phases: dict[str, dict[str, formulas.Term]]) -> dict[str, float]:
    """The sum of the terms of each phase."""
    return {phase: total(terms) for phase, terms in phases.items()}


def digits(value: float) -> str:
    """A number with three significant digits, or rounded to a whole number if it has more."""
    return (
        f"{value:,.0f}"
        if value >= 99.95 or value == 0
        else f"{value:.1f}"
        if value >= 9.995
        else f"{value:.2f}"
    )


def remarks(steps: list[Step]) -> list[str]:
    """The lines below the table: what would fit, and what the numbers assume."""
    step, lines = steps[0], list[str]()
    ways = [
        " ".join(as_flag(*item) for item in step.remedy().items())
        for step in steps
        if not step.fits
    ]
    for way in dict.fromkeys(ways):
        names = ", ".join(
            step.method
            for step, remedy in zip((s for s in steps if not s.fits), ways, strict=True)
            if remedy == way
        )
        lines.append(
            f"{names}: {f'fits with {way}' if way else 'no option found that makes it fit'}"
        )
    if "" in ways and step.smallest_bytes > step.machine.memory:
        least, block = bytes_(step.smallest_bytes), count(step.shape.block)
        lines.append(
            f"any number of devices: each needs at least {least}, mostly for one block of {block} "
            "parameters and its gradient; use larger devices or --lora"
        )
    if step.sharded and any(s.peak_phase == "generation" and not s.fits for s in steps):
        lines.append(
            "to sample, every device gathers the whole model; with --servers, vLLM samples instead"
        )
    if any(step.method == "dpo" for step in steps):
        lines.append(
            "dpo: reference log-probs are computed once per pair before the first step; here, in "
            "every step"
        )
    if any(step.method in SAMPLES for step in steps) and not step.scorer:
        lines.append("rewards: a program, at no cost; --reward-model same for a learned one")
    if step.machine.cpu:
        lines.append(
            f"kept by the allocator: {ALLOCATOR[True]:.0%} of temporary memory, as measured on CPUs"
        )
    else:
        lines.append(
            "not measured on a GPU: its fused attention, allocator share and context are "
            "assumptions"
        )
    for step in steps:
        shared = step.config.prompts_per_step % step.ranks
        if shared and step is steps[0] and step.sharded:
            lines.append(
                f"{step.config.prompts_per_step} prompts on {step.ranks} devices: some devices "
                "wait for others"
            )
    return [f"[dim]{line}[/dim]" for line in lines]


def as_flag(name: str, value: int | bool) -> str:
    """The option as written on the command line."""
    return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")


def formula_lines(step: Step) -> list[str]:
    """Lines that show every number with its formula."""
    lines = list[str]()

    def section(title: str, terms: dict[str, formulas.Term], unit: Any) -> None:
        lines.extend([f"  [dim]{title}[/dim]"] if terms else [])
        lines.extend(
            f"    {name}: {item.text()} = {unit(item.value)}".replace("[", "\\[")
            for name, item in terms.items()
        )

    section("memory that stays", step.resident, bytes_)
    for phase, terms in step.phases.items():
        section(f"memory in {phase}: {bytes_(step.held(phase))} in total", terms, bytes_)
    section("memory of a server", step.server, bytes_)
    for phase, terms in step.flops.items():
        section(f"operations of {phase}", terms, flops)
    for phase, terms in step.moved.items():
        section(f"bytes moved in {phase}", terms, bytes_)
    for phase, terms in step.sent.items():
        section(f"bytes received in {phase}", terms, bytes_)
    for phase, terms in step.times.items():
        section(f"time of {phase}: the longest of", terms, seconds)
    return lines


def as_json(steps: list[Step]) -> dict[str, Any]:
    """All numbers by method, for JSON."""

    def values(phases: dict[str, dict[str, formulas.Term]]) -> dict[str, dict[str, float]]:
        return {
            phase: {name: item.value for name, item in terms.items()}
            for phase, terms in phases.items()
        }

    return {
        "methods": {
            step.method: {
                "peak_bytes": step.peak,
                "peak_phase": step.peak_phase,
                "memory": step.parts,
                "resident": {name: item.value for name, item in step.resident.items()},
                "phases": values(step.phases),
                "server": {name: item.value for name, item in step.server.items()},
                "fits": step.fits,
                "fits_with": {} if step.fits else step.remedy(),
                "largest_microbatch_tokens": step.largest_microbatch,
                "devices_needed": step.devices_needed,
                "microbatch": step.part._asdict() | {"rows": step.part.rows._asdict()},
                "flops": values(step.flops),
                "bytes_moved": values(step.moved),
                "bytes_received": values(step.sent),
                "seconds": step.seconds,
            }
            for step in steps
        }
    }


def bytes_(value: float) -> str:
    """A number of bytes with its unit."""
    return _with_unit(value, BYTES)


def flops(value: float) -> str:
    """A number of operations with its unit."""
    return _with_unit(value, OPERATIONS)


def _with_unit(value: float, units: tuple[tuple[str, float], ...]) -> str:
    unit, size = next((unit for unit in units if value < 1000 * unit[1]), units[-1])
    return f"{digits(value / size)} {unit}"


def seconds(value: float) -> str:
    """A duration with its unit."""
    return _with_unit(value, (("ms", 1e-3), ("s", 1)))


def count(value: float) -> str:
    """A number of parameters in M or B."""
    return f"{value / 1e9:,.1f} B" if value >= 1e9 else f"{value / 1e6:,.0f} M"
