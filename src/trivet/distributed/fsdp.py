"""Models sharded over many processes by FSDP2: a block's weights are gathered when it runs.

Rank 0 reads a model's files, and each rank keeps its shards. A second copy of every model's modules
is kept without memory (`trees`), so that a reference, a critic or the model to save can be made as
in one process.
"""

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from trivet.errors import InputError
from trivet.model.adapters import inject, is_adapter_parameter
from trivet.model.attention import NAME
from trivet.model.blocks import blocks, checkpoint_blocks
from trivet.model.forward import shares_prefix
from trivet.model.load import PRECISIONS, base_of, from_config
from trivet.model.weights import hold_weights
from trivet.step.options import Options
from trivet.step.reference_cache import digest

NO_QUANTIZED = "quantized weights can't be sharded; use full ones, or run in one process"


class ShardedModels:
    """The models of a run, each with the holder of its weights (model.weights.WeightsHolder, here
    Root).

    in_microbatches: trivet.model.forward.in_microbatches, shared among the processes.
    """

    def __init__(
        self,
        config: Options,
        device: torch.device,
        mesh: DeviceMesh,
        in_microbatches: Callable[..., Tensor],
    ):
        self.config, self.device = config, device
        self.mesh, self.in_microbatches = mesh, in_microbatches
        # a copy of each model's modules on meta, from which other models are made
        self.trees: dict[int, Any] = {}
        self.starts: dict[int, str] = {}  # digest of the weights that a model was loaded with
        # during a dummy pass that keeps the ranks' collectives in step; its gradient is zero
        self.idle = False

    def load(self, load: Callable[..., Any], name: str, **options: Any) -> Any:
        """Load a model by load(name): rank 0 reads the files into its CPU memory, and each rank
        keeps its shards.
        """
        full, facts = dict[str, Tensor](), None
        if dist.get_rank() == 0:
            model = load(name, **options | {"device": "cpu"})
            if getattr(model, "is_quantized", False):
                raise InputError(f"model {name}: {NO_QUANTIZED}")
            own = getattr(model, "generation_config", None)  # from its file
            adapter = getattr(model, "peft_config", {}).get("default")
            facts = (
                hasattr(model, "score"),
                adapter,
                shares_prefix(model),
                digest(model, []),
                own,
                torch.get_rng_state(),
            )
            full = {
                key: x.detach() for key, x in (*model.named_parameters(), *model.named_buffers())
            }
        scorer, adapter, shares, start, own, random_state = broadcast(facts)
        kind, labels = (
            (AutoModelForSequenceClassification, {"num_labels": 1})
            if scorer
            else (AutoModelForCausalLM, {})
        )
        with torch.device("meta"):
            model = from_config(base_of(name)[0], kind, **labels).eval()
            if adapter is not None:
                inject(model, adapter)
        model.compute_dtype = PRECISIONS[options.get("precision", self.config.precision)]
        if own is not None:
            model.generation_config = own
        self._shard(model, shares, partial(broadcast_tensor, full, self.device))
        full.clear()
        gc.collect()  # modules are in reference cycles, so the full model would stay for a while
        self.starts[id(model)] = start
        torch.set_rng_state(random_state)
        return model

    def make(self, function: Callable[..., Any], model: Any, *args: Any, **options: Any) -> Any:
        """Shard the model that a function makes from a loaded one; tensors that the two share stay
        shared.

        The function gets the same modules, with full adapters and with Hollow instead of the base.
        """
        held = dict([*model.named_parameters(), *model.named_buffers()])
        tree = self.trees[id(model)]
        memo = dict[int, Any]()
        for name, x in (*tree.named_parameters(), *tree.named_buffers()):
            shard = held[name]
            base = isinstance(x, torch.nn.Parameter) and not is_adapter_parameter(name)
            memo[id(x)] = Hollow(shard, self.device) if base else full_tensor(shard).clone()
        made = function(copy.deepcopy(tree, memo), *args, **options)
        return None if made is None else self._shard(made, shares_prefix(model))

    def _shard(
        self, model: Any, shares: bool, given: Callable[[str, Tensor], Tensor] = lambda name, x: x
    ) -> Any:
        """Shard a model, one block at a time. given: returns the values of its tensors on meta."""
        model._shares_prefix = shares
        if shares:
            model.set_attn_implementation(NAME)
        named = [*model.named_parameters(), *model.named_buffers()]
        self.trees[id(model)] = copy.deepcopy(model, {id(x): on_meta(x) for _, x in named})
        if self.config.gradient_checkpointing:
            checkpoint_blocks(model)
        names = {id(x): name for name, x in named}
        root, pinned = Root(model, self), self.device.type == "cuda"
        offload = (
            CPUOffloadPolicy(pin_memory=pinned)
            if self.config.offload_optimizer
            else OffloadPolicy()
        )
        for unit in (*blocks(model), root):
            made = dict[int, tuple[Tensor, Tensor]]()  # tied weights are made only once
            shared = list[tuple[Any, str, Tensor]]()
            for owned in (
                owned
                for module in unit.modules()
                for owned in (module._parameters, module._buffers)
            ):
                for key, x in owned.items():
                    if x is None or isinstance(x, DTensor):
                        continue
                    if id(x) not in made:
                        made[id(x)] = x, _filled(x, partial(given, names[id(x)]))
                    owned[key] = made[id(x)][1]  # type: ignore[assignment]
                    if isinstance(x, Hollow) and not x.copied:
                        shared.append((owned, key, x.of))
            # blocks are gathered in the type of the matrix products; embeddings, head and last
            # norm, which compute in float32, are not
            kind = None if unit is root else model.compute_dtype
            policy = MixedPrecisionPolicy(
                param_dtype=kind, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            fully_shard(
                unit,
                mesh=self.mesh,
                reshard_after_forward=unit is not root,
                mp_policy=policy,
                offload_policy=offload,
            )
            unit.set_gradient_divide_factor(1.0)  # type: ignore[operator]  shares of one mean: they add up
            unit.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
            # like loading a state: FSDP picks them up before the first forward
            for owned, key, x in shared:
                owned[key] = torch.nn.Parameter(x.detach(), requires_grad=False)
        hold_weights(model, root)
        with torch.no_grad():
            root(lambda: None)  # FSDP now knows which module is the root
        root.reshard()  # type: ignore[operator]
        return model

    def whole(self, model: Any) -> Any:
        """Return the unsharded model in the CPU memory of rank 0; None on the other ranks."""
        adapter, state = hasattr(model, "peft_config"), dict[str, Tensor]()
        seen = dict[int, Tensor]()
        first = dist.get_rank() == 0
        for name, x in model.state_dict(keep_vars=True).items():
            if adapter and not is_adapter_parameter(name):
                continue  # the base stays where it is
            if id(x) not in seen:
                full = full_tensor(x)
                seen[id(x)] = full.cpu() if first else torch.empty(0)
            state[name] = seen[id(x)]
        if not first:
            return None
        twin = copy.deepcopy(self.trees[id(model)])
        twin.load_state_dict(state, assign=True, strict=not adapter)
        twin.config = model.config
        if hasattr(model, "generation_config"):
            twin.generation_config = model.generation_config
        return twin


class Root(torch.nn.Module):
    """The module that FSDP treats as the model: its forward runs calls that need the weights."""

    def __init__(self, model: Any, models: ShardedModels):
        super().__init__()
        self.model, self.inside = model, False
        self.models = models
        self.in_microbatches = models.in_microbatches
        self.make, self.load = models.make, models.load

    def forward(self, call: Callable[[], Any]) -> Any:
        """Return call(), with the root's weights gathered."""
        self.inside = True
        try:
            return call()
        finally:
            self.inside = False

    def gathered_pass(self, call: Callable[[], Tensor]) -> Tensor:
        """Run a pass through the model as the root's forward, so that the root's weights are
        gathered for it.
        """
        if self.inside:
            return call()

        def forward() -> Tensor:
            if (head := self.model.get_output_embeddings()) is not None:
                # the version of gathered weights does not show that they have changed
                head.weight._cast_key = None
            return call().clone()  # FSDP hooks the result, which must not be a view

        result = self(forward)
        if not torch.is_grad_enabled():
            self.reshard()  # type: ignore[operator]  no backward pass will do it
        return _Idle.apply(result) if self.models.idle and result.requires_grad else result  # type: ignore[no-any-return]


class _Idle(torch.autograd.Function):
    """The identity, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


def broadcast(x: Any = None) -> Any:
    """Return rank 0's object on every rank."""
    objects = [x]
    dist.broadcast_object_list(objects, 0, device=torch.device("cpu"))
    return objects[0]


def broadcast_tensor(
    full: dict[str, Tensor], device: torch.device, name: str, like: Tensor
) -> Tensor:
    """Return the tensor of this name in rank 0's dictionary; `like` has its shape and type on every
    rank.
    """
    x = torch.empty(like.shape, dtype=like.dtype, device=device)
    if dist.get_rank() == 0:
        x.copy_(full[name])
    dist.broadcast(x, 0)
    return x


def local(x: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor if it is not sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


@contextmanager
def gathered(root: Any) -> Iterator[None]:
    """Gather all weights of the model on every rank until the context ends."""
    units = [unit for unit in root.modules() if isinstance(unit, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not root, recurse=False)
            unit.reshard()


def full_tensor(x: Tensor) -> Tensor:
    """Return the unsharded tensor, which may share memory with x. Every rank must call this."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def on_meta(x: Tensor) -> Tensor:
    """Return a tensor of the same shape and type without memory."""
    like = torch.empty_like(x, device="meta")
    return torch.nn.Parameter(like, x.requires_grad) if isinstance(x, torch.nn.Parameter) else like


class Hollow(torch.nn.Parameter):
    """A placeholder for a sharded tensor while one model is made from another: its shape without
    its memory. A deep copy of it stands for a copy of the tensor.
    """

    def __new__(cls, of: Tensor, device: torch.device, *, copied: bool = False) -> "Hollow":
        return super().__new__(
            cls, torch.zeros((), dtype=of.dtype, device=device).expand(of.shape), of.requires_grad
        )

    def __init__(self, of: Tensor, device: torch.device, *, copied: bool = False):
        self.of, self.copied = of, copied

    def __deepcopy__(self, memo: Any) -> "Hollow":
        return Hollow(self.of, self.device, copied=True)


def _filled(x: Any, given: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor's values before sharding; a shared tensor stays on meta, as it will be
    replaced.
    """
    if not (x.is_meta or isinstance(x, Hollow)):
        return x
    full = given(x) if x.is_meta else full_tensor(x.of).clone() if x.copied else on_meta(x)
    return torch.nn.Parameter(full, x.requires_grad) if isinstance(x, torch.nn.Parameter) else full
