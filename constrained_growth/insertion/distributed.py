"""Update DistributedDataParallel and `fully_shard` after an insertion."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from constrained_growth._arguments import instance
from constrained_growth._distributed import take_from_first
from constrained_growth._sharding import is_spread, sharded_modules, state_like
from constrained_growth._sites.model import tensors_of
from constrained_growth._sites.wrapper import WithInsertedLayer, inserted_layers
from constrained_growth.errors import CandidateError
from constrained_growth.insertion.training_state import as_optimizers


def rewrap(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
    """Register inserted layers with the wrapper that trains a model on several processes.

    All processes call it, after `insert` or `replay`; new layers get the values of the first one.
    A DistributedDataParallel is initialised again in place with the same settings: references to
    it stay valid. In a model sharded by `fully_shard` (FSDP2) each new layer is sharded on the
    same mesh; its parameters are replaced, in the optimizers too. Another model stays as it is.

    Args:
        model: Grown; changed in place.
        optimizer: One or several that train it, the new parameters already in them.

    Raises:
        CandidateError: A DistributedDataParallel has settings that cannot be restored.

    Example:
        >>> rewrap(nn.Linear(2, 1))  # with one process there is nothing to do
    """
    instance("model", model, nn.Module, CandidateError, "an nn.Module")
    optimizers = as_optimizers(optimizer)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            _reinitialise(module)
    sharded = sharded_modules(model)
    if sharded:
        mesh = next(p for one in sharded for p in one.parameters() if is_spread(p)).device_mesh
        wrappers = [one for one in model.modules() if isinstance(one, WithInsertedLayer)]
        for layer in (layer for one in wrappers for layer in inserted_layers(one).values()):
            if not any(is_spread(p) for p in layer.parameters()):
                _shard(layer, mesh, optimizers)


def _reinitialise(wrapper: DistributedDataParallel) -> None:
    """Initialise a wrapper again in place; its hooks and its mode stay."""
    given: Any = wrapper
    if given.mixed_precision is not None or given._delay_all_reduce_params:
        raise CandidateError(
            "model: its DistributedDataParallel cannot be initialised again in place; make it "
            "without mixed_precision= and delay_all_reduce_named_params= (autocast still works)."
        )
    names = ["device_ids", "output_device", "dim", "process_group", "find_unused_parameters"]
    names += ["gradient_as_bucket_view", "static_graph", "skip_all_reduce_unused_params"]
    known = inspect.signature(DistributedDataParallel.__init__).parameters  # of this torch
    settings = {name: getattr(given, name) for name in names if name in known}
    if not given.bucket_bytes_cap_default:
        settings["bucket_cap_mb"] = given.bucket_bytes_cap / 2**20
    module, training, syncs_buffers = wrapper.module, wrapper.training, given.broadcast_buffers
    hooks = {key: vars(wrapper)[key] for key in vars(nn.Module()) if "hooks" in key}
    reductions = list(given._comm_hooks)
    # its reducer holds the list of parameters, and can only be made anew
    wrapper.__init__(module, **settings)
    given.broadcast_buffers = syncs_buffers
    wrapper.training = training
    vars(wrapper).update(hooks)
    for reduction, state in reductions:
        wrapper.register_comm_hook(state, reduction)


def _shard(layer: nn.Module, mesh: Any, optimizers: Sequence[Optimizer]) -> None:
    """Shard one layer, and replace its parameters in the optimizers."""
    from torch.distributed.fsdp import fully_shard

    # each process has drawn values of its own, and would keep a part of its own
    take_from_first((tensor.detach() for tensor in tensors_of(layer)), mesh.get_group())
    before = dict(layer.named_parameters())
    fully_shard(layer, mesh=mesh)
    now = dict(layer.named_parameters())
    new: dict[int, Tensor] = {id(before[name]): now[name] for name in before}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [new.get(id(p), p) for p in group["params"]]
        for old in [p for p in optimizer.state if id(p) in new]:
            state = optimizer.state.pop(old)
            optimizer.state[new[id(old)]] = state_like(state, new[id(old)])
