"""Models whose parameters are spread over the processes by `fully_shard` (FSDP2).

A process keeps a part of each parameter, as a `DTensor`. Forward and backward put the whole ones
together where they are needed, on all processes at once, and let them go again: all processes
have to run the model equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from constrained_growth.errors import CandidateError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether processes have parts of its parameters each, by `fully_shard`."""
    return bool(sharded_modules(model))


def reshard(model: nn.Module) -> None:
    """Let go of the whole parameters that a forward pass without a backward pass leaves behind."""
    for module in sharded_modules(model):
        module.reshard()


def check_sharding(model: nn.Module, group: ProcessGroup | None) -> None:
    """Refuse any sharding but by `fully_shard` over the processes of the group."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise CandidateError(
            f"model={type(model).__name__} is sharded by FullyShardedDataParallel, which keeps its "
            "parameters in one flat tensor, into which no layer can be inserted. Use "
            "torch.distributed.fsdp.fully_shard, or insert before the model is wrapped."
        )
    reshard(model)  # else parameters left whole by a pass are not DTensors
    managed = {id(p) for module in sharded_modules(model) for p in module.parameters()}
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        if id(parameter) not in managed or parameter.device_mesh.mesh.tolist() != ranks:
            raise CandidateError(
                f'model={type(model).__name__}: its parameter "{name}" is spread over '
                f"{parameter.device_mesh} as {parameter.placements}; fully_shard with a mesh of "
                f"one dimension over the group, {ranks}, is supported, and not tensor parallelism "
                "or hybrid sharding."
            )


def is_spread(tensor: object) -> bool:
    """Whether a tensor is a `DTensor`, of which this process has a part."""
    if type(tensor) in (Tensor, nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: T) -> T:
    """The whole of a tensor that is spread over processes, which all call this; else itself."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[union-attr]


def spread_like(tensor: Tensor, other: Any) -> Tensor:
    """A whole tensor, the same on all processes, spread as another one is; all call this."""
    if not is_spread(other) or is_spread(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def state_like(state: Mapping[str, Any], parameter: Any) -> dict[str, Any]:
    """What an optimizer remembers of a parameter, spread as the parameter is; all call this."""
    alike = {key for key, kept in state.items() if getattr(kept, "shape", None) == parameter.shape}
    return {
        key: spread_like(kept, parameter) if key in alike and kept.dim() > 0 else kept
        for key, kept in state.items()
    }


def summed_like(tensor: Tensor, other: Any) -> Tensor:
    """The sum over the processes of a whole tensor of each, spread as `other`; all call this."""
    from torch.distributed.tensor import DTensor, Partial

    # "partial" says that the whole is the sum: one reduce-scatter, and no process holds the sum
    parts = DTensor.from_local(tensor, other.device_mesh, [Partial()], run_check=False)
    return parts.redistribute(placements=other.placements)


class Leaves:
    """What to differentiate by: the whole parameters, as they stand in the graph.

    A sharded model makes them in its forward pass; `values` has those made so far, by name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._modules = sharded_modules(model)
        self._places = {}
        for name in parameters:
            owner, _, key = name.rpartition(".")
            self._places[name] = (model.get_submodule(owner), key)
        self.values: dict[str, Tensor] = {} if self._modules else dict(parameters)

    @contextmanager
    def watching(self, see: Callable[[str, Tensor], RemovableHandle]) -> Iterator[None]:
        """Find them as the model runs; `see(name, leaf)`, told once of each, adds a hook."""
        handles, known = [], set()

        def note(names: Iterable[str]) -> None:
            for name in names:
                owner, key = self._places[name]
                leaf = owner._parameters[key]
                if leaf is None or (self._modules and is_spread(leaf)):
                    continue  # of a module further in, which puts it together when it runs
                self.values[name] = leaf
                if (name, id(leaf)) not in known:
                    known.add((name, id(leaf)))
                    handles.append(see(name, leaf))

        for module in self._modules:
            here = set(module.modules())
            names = [name for name, (owner, _) in self._places.items() if owner in here]
            # fully_shard's own hook comes before it, and has put the whole parameters there
            handles.append(module.register_forward_pre_hook(lambda *_, n=names: note(n)))
        try:
            if not self._modules:
                note(self._places)
            yield
        finally:
            for handle in handles:
                handle.remove()
