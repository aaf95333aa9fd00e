"""One step of a method on one device: which formulas apply, and with which numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

from trivet.generation.engine import STRETCH
from trivet.model.attention import SMALL
from trivet.model.logprobs import CHUNK, KEPT
from trivet.plan import formulas as f
from trivet.plan.formulas import Term, term
from trivet.plan.options import Config
from trivet.plan.parts import Part, attention_rows, split
from trivet.plan.shapes import Machine, Shape

SAMPLES = ("ppo", "grpo", "pairwise-grpo")
WHOLE = ("reward-model", "dpo", "pairwise-grpo")  # losses that compare the completions of a group
SCORING_BUDGET = 8192  # of rewards.learned.LearnedReward
# share kept by the allocator, by whether it is a CPU: glibc's malloc, measured (docs/plan.md), or a
# GPU's, assumed
ALLOCATOR = {True: 0.95, False: 0.1}
# large tensors, which malloc maps and returns one by one
LARGE = ("cache", "head's gradient", "gathered weights")
Terms = dict[str, Term]


class Model(NamedTuple):
    """One of the models in memory at the same time."""

    shape: Shape
    scalar: bool  # a scalar head in place of the vocabulary's
    held: float  # parameters that it does not share with another model
    trained: float

    @property
    def parameters(self) -> float:
        """All parameters that its passes read."""
        return self.shape.trunk + self.shape.hidden if self.scalar else self.shape.parameters


@dataclass(frozen=True)
class Step:
    """What one step of a method needs on one device. scorer: the reward model's shape, if the
    reward is a model.
    """

    method: str
    shape: Shape
    scorer: Shape | None
    config: Config
    machine: Machine

    # the models, and how the step is split
    # --------------------------------------------------------------------------------------------

    def option(self, name: str) -> Any:
        """The value of --NAME, or the method's default."""
        recipe = import_module(f"trivet.recipes.{self.method.replace('-', '_')}").Config
        default = {field.name: field.default for field in fields(recipe)}.get(name)
        return (default is not None and getattr(self.config, name)) or default

    @property
    def samples(self) -> bool:
        """Whether completions are sampled rather than read from the data."""
        return self.method in SAMPLES

    @property
    def size(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.config.precision == "bfloat16" else 4

    @property
    def ranks(self) -> int:
        """Devices that share the weights."""
        return self.config.devices

    @property
    def sharded(self) -> bool:
        """Whether several devices share the weights."""
        return self.ranks > 1

    @property
    def group(self) -> int:
        """Completions per prompt."""
        return 1 if self.method == "sft" else self.option("group_size") if self.samples else 2

    @property
    def groups(self) -> int:
        """Prompts per step on this device."""
        return math.ceil(self.config.prompts_per_step / self.ranks)

    @property
    def epochs(self) -> int:
        """Passes over each batch."""
        return self.option("epochs_per_batch") or 1

    def split(self, budget: int, whole: bool = False) -> Part:
        """The step split into microbatches of this budget."""
        return split(
            self.groups,
            self.group,
            self.config.prompt_tokens,
            self.config.completion_tokens,
            budget,
            whole,
        )

    @property
    def part(self) -> Part:
        """The microbatches of training."""
        budget = self.config.microbatch_tokens or (2048 if self.machine.cpu else 16384)
        return self.split(budget, self.method in WHOLE)

    @cached_property
    def models(self) -> dict[str, Model]:
        """All models in memory at the same time, the policy (or the reward model in training)
        first.
        """
        lora, config, shape = self.config.lora, self.config, self.shape

        def trained(model: Shape, scalar: bool) -> float:
            whole = model.trunk + model.hidden if scalar else model.parameters
            return lora * model.adapted + scalar * model.hidden if lora else whole

        # a scorer shares the policy's frozen base if it has adapters and the same shape
        def scorer_model(model: Shape) -> Model:
            own = trained(model, True)
            return Model(
                model, True, own if lora and model == shape else model.trunk + model.hidden, own
            )

        scalar = self.method == "reward-model"
        learned = trained(shape, scalar)
        whole = shape.trunk + shape.hidden if scalar else shape.parameters
        models = {"weights": Model(shape, scalar, whole + learned if lora else whole, learned)}
        needs = {"ppo": True, "pairwise-grpo": True, "grpo": config.reference}
        if needs.get(self.method):
            models["reference"] = Model(shape, False, 0 if lora else whole, 0)
        if self.method == "ppo":
            head = Model(shape, True, shape.hidden, shape.hidden)
            models["critic"] = head if config.shared_critic else scorer_model(self.scorer or shape)
        if self.scorer is not None and self.samples:
            models["reward model"] = scorer_model(self.scorer)._replace(trained=0)
        return models

    # memory
    # --------------------------------------------------------------------------------------------

    @cached_property
    def resident(self) -> Terms:
        """Bytes that stay from step to step."""
        config, terms = self.config, {"program": term(f.program, measured=self.machine.program)}
        if self.sharded and config.offload_optimizer:
            return terms  # the host's memory holds the shards of weights, gradients and moments
        for name, model in self.models.items():
            terms[name] = term(f.weights, parameters=model.held, ranks=self.ranks)
        if config.quantize != "none":
            bits, base = int(config.quantize[0]), self.models["weights"]
            numbers = {"parameters": base.held, "matrices": self.shape.matrices}
            terms["weights"] = term(f.quantized_weights, **numbers, bits=bits)
        trained = sum(model.trained for model in self.models.values())
        terms["optimizer"] = term(f.adam, trained=trained, ranks=self.ranks)
        heads = sum(not model.scalar and model.held > 0 for model in self.models.values())
        if self.size == 2 and heads and not self.sharded:
            terms["casts of the head"] = term(f.head_cast, head=heads * self.shape.head)
        return terms

    @cached_property
    def phases(self) -> dict[str, Terms]:
        """Bytes that are allocated and freed within a step, by phase."""
        phases = dict[str, Terms]()
        if self.samples and not self.config.servers:
            phases["generation"] = self._sampling_memory(self.groups, self.group)
            if self.config.eval_limit:
                phases["evaluation"] = self._sampling_memory(
                    math.ceil(self.config.eval_limit / self.ranks), 1
                )
        if "reward model" in self.models:
            phases["reward"] = self._forward_memory(
                "reward model", self.split(SCORING_BUDGET).tokens
            )
        if "reference" in self.models or self.method == "dpo":
            phases["reference"] = self._forward_memory(
                "reference" if "reference" in self.models else "weights", self.part.tokens
            )
        several = self.part.number > 1  # then gradients of earlier microbatches exist
        trained = {name: model.trained for name, model in self.models.items() if model.trained}
        for name in trained:
            before = (
                sum(trained.values()) if several else 0 if name == "weights" else trained["weights"]
            )
            phases[BACKWARD[name]] = self._gradients(before) | self._training_memory(
                self.models[name]
            )
        phases["end of the backward"] = self._gradients(sum(trained.values()))
        if self.models["weights"].trained == self.shape.parameters and not self.sharded:
            heads = self.shape.head * (1 if self.shape.tied else 0.5)
            phases["end of the backward"]["head's gradient"] = term(f.tied_gradients, head=heads)
        for terms in phases.values():
            working = sum(item.value for name, item in terms.items() if name not in LARGE)
            share = ALLOCATOR[self.machine.cpu]
            terms["kept by the allocator"] = term(f.kept_by_allocator, working=working, share=share)
        return phases

    def _gradients(self, trained: float) -> Terms:
        if not trained or (self.sharded and self.config.offload_optimizer):
            return {}
        return {"gradients": term(f.gradients, trained=trained, ranks=self.ranks)}

    def _casts(self, shape: Shape, matrices: float) -> Terms:
        if self.sharded:
            return {
                "gathered weights": term(
                    f.gathered_weights, block=shape.block, root=shape.root, size=self.size
                )
            }
        return {"casts of matrices": term(f.casts, matrices=matrices)} if self.size == 2 else {}

    def _forward_memory(self, name: str, tokens: float) -> Terms:
        """Bytes during a pass without gradients."""
        shape = self.models[name].shape
        numbers = {
            "tokens": tokens,
            "hidden": shape.hidden,
            "widest": shape.widest,
            "size": self.size,
        }
        casts = (
            shape.matrices
            if self.models[name].trained and not self.config.lora
            else shape.matrices / shape.layers
        )
        return {"activations": term(f.forward_activations, **numbers)} | self._casts(shape, casts)

    def _sampling_memory(self, prompts: int, group: int) -> Terms:
        """Bytes while the engine samples: prompts in one pass, then every row token by token."""
        shape, rows = self.shape, prompts * group
        columns = self.config.prompt_tokens + STRETCH * -(
            -(self.config.completion_tokens - 1) // STRETCH
        )
        terms = {
            "cache": term(
                f.cache_bytes, rows=rows, columns=columns, **_widths(shape), size=self.size
            )
        }
        numbers = {"hidden": shape.hidden, "widest": shape.widest, "size": self.size}
        prefill = term(f.forward_activations, tokens=prompts * self.config.prompt_tokens, **numbers)
        logits = term(f.sampling, rows=rows, vocabulary=shape.vocabulary, size=self.size)
        terms |= {"activations": prefill} if prefill.value > logits.value else {"logits": logits}
        if self.sharded:
            numbers = {"parameters": shape.parameters, "root": shape.root, "size": self.size}
            return terms | {"gathered weights": term(f.gathered_model, **numbers)}
        return terms | self._casts(shape, shape.matrices + shape.head)

    @cached_property
    def server(self) -> Terms:
        """Bytes on a server, as if all completions of a step were sampled at once."""
        if not (self.samples and self.config.servers):
            return {}
        shape, servers = self.shape, self.config.servers
        each = shape.latent or shape.kv_heads * (shape.key_width + shape.value_width)
        rows = max(self.config.prompts_per_step * self.group, self.config.eval_limit)
        columns = self.config.prompt_tokens + self.config.completion_tokens
        numbers = {
            "rows": rows,
            "columns": columns,
            "layers": shape.layers,
            "numbers": each,
            "servers": servers,
        }
        return {
            "program": term(f.program, measured=self.machine.program),
            "weights": term(f.server_weights, parameters=shape.parameters, servers=servers),
            "cache": term(f.server_cache, **numbers),
        }

    def kept(self, shape: Shape) -> Terms:
        """What the forward pass of a microbatch keeps for its backward pass."""
        part, size = self.part, self.size
        widths = {"inputs": shape.inputs, "norms": shape.norms}
        terms = {"activations": term(f.activations, tokens=part.tokens, **widths, size=size)}
        numbers = {"heads": shape.heads} | _widths(shape) | part.rows._asdict()
        if self.machine.cpu and part.longest_row <= SMALL:
            terms["activations of attention"] = term(f.attention_activations, **numbers, size=size)
        else:
            del numbers["pairs"]
            terms["activations of attention"] = term(
                f.fused_attention_activations, **numbers, size=size
            )
        if shape.experts:
            widths = {"expert_inputs": shape.expert_inputs, "expert_gates": shape.expert_gates}
            number = size if self.sharded else 4  # autocast does not cover the experts' products
            terms["activations of experts"] = term(
                f.expert_activations, tokens=part.tokens, **widths, size=number
            )
        if self.config.lora:
            numbers = {"tokens": part.tokens, "rank": self.config.lora, "adapters": shape.adapters}
            terms["states of adapters"] = term(f.adapter_activations, **numbers, size=size)
        if self.config.gradient_checkpointing:
            numbers = {"tokens": part.tokens, "hidden": shape.hidden, "layers": shape.layers}
            return {"activations": term(f.checkpointed_activations, **numbers, kept=total(terms))}
        return terms

    def _training_memory(self, model: Model) -> Terms:
        """Bytes at the peak of a microbatch's forward and backward passes: in the backward pass of
        the head or of the last block.
        """
        shape, part, size = model.shape, self.part, self.size
        terms = self.kept(shape) | self._casts(shape, shape.matrices / shape.layers)
        whole = model.trained == model.parameters
        if self.sharded and whole:
            root = shape.hidden if model.scalar else shape.root
            terms["gradients of a block"] = term(
                f.block_gradients, block=shape.block, root=root, size=size
            )
        numbers = {
            "tokens": part.tokens,
            "hidden": shape.hidden,
            "widest": shape.widest,
            "size": size,
        }
        inside = {"inside a block": term(f.block_backward, **numbers)}
        if model.scalar:
            return terms | inside
        columns, width = self.head_columns
        buffers = {
            "learned": part.learned,
            "hidden": shape.hidden,
            "chunk": part.learned * width,
            "size": size,
        }
        at_head = {
            "logits": term(f.kept_logits, learned=part.learned, columns=columns, size=size),
            "head's buffers": term(f.head_buffers, **buffers),
        }
        if whole and not self.sharded:
            terms["head's gradient"] = term(f.head_gradient, head=shape.head)
        return terms | (at_head if total(at_head) > total(inside) else inside)

    @property
    def head_columns(self) -> tuple[int, int]:
        """How many columns of the vocabulary have their logits kept for the backward pass, and how
        many are processed at once.
        """
        limit = CHUNK["cpu"] if self.machine.cpu else 1 << 26
        width = min(self.shape.vocabulary, max(256, limit // max(1, self.part.learned)))
        held = KEPT // max(1, self.part.learned * width * self.size)
        return min(self.shape.vocabulary, width * held), width

    # work
    # --------------------------------------------------------------------------------------------

    @cached_property
    def flops(self) -> dict[str, Terms]:
        """Floating-point operations by phase."""
        work, part = dict[str, Terms](), self.part
        if self.samples:
            work["generation"] = self._decoding_flops()
        for name, of in self._passes().items():
            held = self.split(SCORING_BUDGET) if name == "reward" else part
            work[name] = self._forward_flops(of, held, held.number)
        for name, model in self.models.items():
            if not model.trained:
                continue
            forward = self._forward_flops(model, part, part.number * self.epochs)
            work[FORWARD[name]], work[BACKWARD[name]] = (
                forward,
                self._backward_flops(model, forward),
            )
        trained = sum(model.trained for model in self.models.values())
        work["optimizer"] = {
            "AdamW": term(f.adamw_flops, trained=trained * self.epochs / self.ranks)
        }
        return work

    def _passes(self) -> dict[str, Model]:
        """The passes without gradients, by phase. DPO computes its reference once per pair, before
        the first step.
        """
        passes = dict[str, Model]()
        if "reward model" in self.models:
            passes["reward"] = self.models["reward model"]
        if "reference" in self.models or self.method == "dpo":
            passes["reference"] = Model(self.shape, False, 0, 0)
        if "critic" in self.models:
            passes["old values"] = self.models["critic"]
        return passes

    def _forward_flops(self, model: Model, part: Part, count: float) -> Terms:
        """Operations of a forward pass over `count` microbatches."""
        shape = model.shape
        learned = (
            part.sequences
            if model is self.models.get("reward model") or self.method == "reward-model"
            else part.learned
        )
        head = shape.hidden if model.scalar else shape.head
        terms = self._trunk_flops(shape, count * part.tokens, count * part.rows.pairs)
        return terms | {"head": term(f.head_flops, head=head, learned=count * learned)}

    def _trunk_flops(self, shape: Shape, tokens: float, pairs: float) -> Terms:
        widths = _widths(shape)
        del widths["kv_heads"]
        terms = {
            "matrices": term(
                f.matrix_flops, active=shape.matrices + shape.active_experts, tokens=tokens
            ),
            "attention": term(f.attention_flops, heads=shape.heads, **widths, pairs=pairs),
        }
        if self.config.lora:
            adapters = self.config.lora * shape.adapted
            terms["adapters"] = term(f.adapter_flops, adapters=adapters, tokens=tokens)
        return terms

    def _decoding_flops(self) -> Terms:
        """Operations of sampling: the prompts in one pass, then every row token by token over the
        whole cache, as if no completion ended early.
        """
        prompt, new, groups = (
            self.config.prompt_tokens,
            self.config.completion_tokens - 1,
            self._prompts_sampled,
        )
        rows = groups * self.group
        pairs = attention_rows(1, 1, prompt, 0).pairs * groups + rows * self._columns()
        terms = self._trunk_flops(self.shape, groups * prompt + rows * new, pairs)
        return terms | {
            "head": term(f.head_flops, head=self.shape.head, learned=groups + rows * new)
        }

    @property
    def _prompts_sampled(self) -> float:
        """Prompts that a device samples from; with servers, each server's share."""
        servers = self.config.servers
        return self.config.prompts_per_step / servers if servers else self.groups

    def _columns(self) -> int:
        """Columns of the cache, summed over the decoded tokens."""
        prompt, new = self.config.prompt_tokens, self.config.completion_tokens - 1
        return sum(prompt + STRETCH * -(-t // STRETCH) for t in range(1, new + 1))

    def _backward_flops(self, model: Model, forward: Terms) -> Terms:
        frozen = model.trained != model.parameters and not self.config.shared_critic
        once = {"matrices", "head"} if frozen else set[str]()
        again, work = bool(self.config.gradient_checkpointing), Terms()
        for name, item in forward.items():
            repeated = item.value if again and name != "head" else 0
            if name == "head" and not model.scalar:
                columns = self.shape.vocabulary - self.head_columns[0]
                numbers = {
                    "learned": self.part.number * self.epochs * self.part.learned,
                    "hidden": self.shape.hidden,
                }
                repeated = f.logits_again(**numbers, columns=columns)
            factors = 1 if name in once and not (name == "head" and model.scalar) else 2
            work[name] = term(f.backward_flops, forward=item.value, factors=factors, again=repeated)
        return work

    # bytes
    # --------------------------------------------------------------------------------------------

    @cached_property
    def moved(self) -> dict[str, Terms]:
        """Estimated bytes moved to and from the device's memory by phase, for matrices,
        activations, the cache and the optimizer.
        """
        work, part, size = dict[str, Terms](), self.part, self.size
        if self.samples:
            shape, steps, servers = (
                self.shape,
                max(1, self.config.completion_tokens - 1),
                max(1, self.config.servers),
            )
            rows, share = (
                self._prompts_sampled * self.group,
                shape.active_experts / (shape.experts or 1),
            )
            experts = f.touched_experts(experts=shape.experts, share=share, rows=rows * servers)
            cache = f.cache_bytes(
                rows=rows, columns=self._columns() / steps, **_widths(shape), size=size
            )
            if self.server:
                cache = self.server["cache"].value
            matrices = (shape.matrices + shape.head + experts) / servers
            numbers = {
                "steps": steps,
                "matrices": matrices,
                "cache": cache,
                "size": 2 if self.server else size,
            }
            work["generation"] = {"decoding": term(f.decode_bytes, **numbers)}
        for name, model in self._passes().items():
            work[name] = self._pass_bytes(f.forward_bytes, model, part.number)
        for name, model in self.models.items():
            if model.trained:
                count = part.number * self.epochs
                work[FORWARD[name]] = self._pass_bytes(f.forward_bytes, model, count)
                work[BACKWARD[name]] = self._pass_bytes(f.backward_bytes, model, count)
        trained = self.epochs * sum(model.trained for model in self.models.values())
        work["optimizer"] = {"AdamW": term(f.adamw_bytes, trained=trained, ranks=self.ranks)}
        return work

    def _pass_bytes(self, formula: Callable[..., float], model: Model, count: float) -> Terms:
        shape = model.shape
        matrices = shape.matrices + shape.experts + (0 if model.scalar else shape.head)
        kept = count * total(self.kept(shape))
        return {
            "pass": term(
                formula, microbatches=math.ceil(count), matrices=matrices, kept=kept, size=self.size
            )
        }

    @cached_property
    def sent(self) -> dict[str, Terms]:
        """Bytes that a device receives from the others by phase; with the optimizer offloaded, also
        those over the bus to the host.
        """
        work, size, count = dict[str, Terms](), self.size, math.ceil(self.part.number)
        if self.server:
            work["generation"] = {"weights": term(f.sync_bytes, parameters=self.shape.parameters)}
        if not self.sharded:
            return work
        if self.samples and not self.server:
            numbers = {"parameters": self.shape.parameters, "ranks": self.ranks, "size": size}
            work["generation"] = {"gather": term(f.gather_bytes, passes=1, **numbers)}
        for name, model in self._passes().items():
            numbers = {"parameters": model.parameters, "ranks": self.ranks, "size": size}
            work[name] = {"gather": term(f.gather_bytes, passes=count, **numbers)}
        for name, model in self.models.items():
            if model.trained:
                numbers = {"parameters": model.parameters, "ranks": self.ranks, "size": size}
                gather = {"gather": term(f.gather_bytes, passes=count * self.epochs, **numbers)}
                scatter = term(
                    f.scatter_bytes,
                    passes=count * self.epochs,
                    trained=model.trained,
                    ranks=self.ranks,
                )
                work[FORWARD[name]], work[BACKWARD[name]] = gather, gather | {"scatter": scatter}
                if self.config.offload_optimizer:
                    numbers = {
                        "parameters": model.parameters,
                        "trained": model.trained,
                        "ranks": self.ranks,
                    }
                    bus = {"host": term(f.offload_bytes, passes=2 * count * self.epochs, **numbers)}
                    work[BACKWARD[name]] = work[BACKWARD[name]] | bus
        return work

    @cached_property
    def times(self) -> dict[str, Terms]:
        """Seconds of computing, of moving bytes to and from memory, and of receiving, by phase."""
        machine, share, times = self.machine, self.config.efficiency, dict[str, Terms]()
        rate = machine.rate_16 if self.size == 2 else machine.rate_32
        link = machine.link if self.ranks <= NODE else machine.network
        for phase, terms in self.flops.items():
            moved, sent = total(self.moved[phase]), total(self.sent.get(phase, {}))
            times[phase] = {
                "computing": term(
                    f.compute_seconds, flops=total(terms), peak=rate, efficiency=share
                ),
                "moving": term(
                    f.moving_seconds, moved=moved, bandwidth=machine.bandwidth, efficiency=share
                ),
            }
            if sent:
                times[phase]["receiving"] = term(
                    f.moving_seconds, moved=sent, bandwidth=link, efficiency=share
                )
        return times

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by phase: the slowest of these, since they overlap."""
        return {
            phase: max(item.value for item in terms.values()) for phase, terms in self.times.items()
        }

    # results
    # --------------------------------------------------------------------------------------------

    def held(self, phase: str) -> float:
        """Bytes in memory during this phase."""
        return total(self.resident) + total(self.phases[phase])

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=self.held)

    @property
    def peak(self) -> float:
        """Peak bytes on a device."""
        return self.held(self.peak_phase)

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by part at the peak."""
        terms = self.resident | self.phases[self.peak_phase]
        return {name: item.value for name, item in terms.items() if item.value}

    def with_options(self, **options: Any) -> "Step":
        """The same step with other options."""
        return replace(self, config=replace(self.config, **options))

    @property
    def largest_microbatch(self) -> int:
        """The largest --microbatch-tokens that fits, at most the whole step; 0 if none does."""
        prompt, completion, whole = (
            self.config.prompt_tokens,
            self.config.completion_tokens,
            self.method in WHOLE,
        )
        sizes = [
            n
            for n in range(1, self.group + 1)
            if self.group % n == 0 and not whole and n * completion >= prompt
        ]
        budgets = [prompt + n * completion for n in sizes if n < self.group]
        budgets += [n * (prompt + self.group * completion) for n in range(1, self.groups + 1)]
        low, high = 0, len(budgets)
        while low < high:  # binary search, since memory only grows with the budget
            middle = (low + high) // 2
            fits = self.with_options(microbatch_tokens=budgets[middle]).peak <= self.machine.memory
            low, high = (middle + 1, high) if fits else (low, middle)
        return budgets[low - 1] if low else 0

    @property
    def fits(self) -> bool:
        """Whether the step fits on the training devices and on the servers, if any. A quantized
        base can't be sharded.
        """
        possible = self.config.quantize == "none" or not self.sharded
        return possible and max(self.peak, total(self.server)) <= self.machine.memory

    @property
    def devices_needed(self) -> int:
        """The fewest devices, a power of two, on which a step fits with the smallest microbatch; 0
        if it never does.
        """
        for devices in (2**power for power in range(15)):
            if self.with_options(devices=devices, microbatch_tokens=1).fits:
                return devices
        return 0

    def remedy(self) -> dict[str, int | bool]:
        """The mildest options that make the step fit: a smaller microbatch, then checkpointing,
        servers, more devices; {} if none do.
        """
        if self.largest_microbatch and total(self.server) <= self.machine.memory:
            return {"microbatch_tokens": self.largest_microbatch}
        ways: list[dict[str, int | bool]] = [{}, {"gradient_checkpointing": True}]
        if self.samples and total(self.server) <= self.machine.memory:
            ways += [
                way | {"servers": self._servers_needed} for way in ways if not self.config.servers
            ]
        elif self.samples:
            ways = [way | {"servers": self._servers_needed} for way in ways]
        for devices in (self.ranks * 2**power for power in range(15)):
            for way in ways:
                best = self.with_options(**way, devices=devices, microbatch_tokens=1)
                if best.fits:
                    more = {"devices": devices} if devices != self.ranks else {}
                    return more | way | {"microbatch_tokens": best.largest_microbatch}
        return {}

    @property
    def _servers_needed(self) -> int:
        """The fewest servers, a power of two, that can hold the weights and the cache."""
        sampling = [self.with_options(servers=2**power) for power in range(15)]
        return next(
            (s.config.servers for s in sampling if total(s.server) <= self.machine.memory),
            sampling[-1].config.servers,
        )

    @property
    def smallest_bytes(self) -> float:
        """Bytes that more devices can't reduce: a block's weights and gradients, and the smallest
        microbatch.
        """
        return self.with_options(
            devices=1 << 20, microbatch_tokens=1, gradient_checkpointing=True
        ).held("backward")


# in the order of a step; FORWARD and BACKWARD follow
PHASES = ("generation", "evaluation", "reward", "reference", "old values")
FORWARD = {"weights": "forward", "critic": "critic's forward"}
BACKWARD = {"weights": "backward", "critic": "critic's backward"}
NODE = 8  # devices that share the fast link


def total(terms: Terms) -> float:
    """The sum of the terms."""
    return sum(item.value for item in terms.values())


def _widths(shape: Shape) -> dict[str, float]:
    return {
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "key_width": shape.key_width,
        "value_width": shape.value_width,
    }
