"""Take up a training run where it was saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._distributed import everywhere, num_processes
from constrained_growth._sharding import reshard, spread_like
from constrained_growth.checkpoint.loading import Checkpoint, load
from constrained_growth.checkpoint.optimizer_states import check_named_state, load_named_state
from constrained_growth.checkpoint.random_states import set_random_state
from constrained_growth.checkpoint.states import give_state
from constrained_growth.errors import CheckpointError
from constrained_growth.insertion.distributed import rewrap
from constrained_growth.insertion.replay import replay


@dataclass(frozen=True)
class Resumed:
    """A training run as it was saved.

    Attributes:
        model: The model given, grown and with its values.
        optimizer: Made by the factory, with its memory.
        scheduler: Made by its factory, or None.
        checkpoint: What was read, with `record`, `step` and `extra`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    checkpoint: Checkpoint


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    **stateful: object,
) -> None:
    """Give model, optimizer and the rest the values of a checkpoint, and put the random state back.

    Args:
        checkpoint: From `load`.
        model: Of the same architecture: `replay(fresh_model, checkpoint.record)`.
        optimizer: Trains the same parameters; the order and its groups need not be the same.
        **stateful: As for `save`, under the same names. What was saved and is not given here is
            passed over.

    Raises:
        CheckpointError: The model has other parameters or buffers, the optimizer trains others,
            or something was not saved. Nothing is changed then.
    """
    _check_weights(model, checkpoint.weights)
    if optimizer is not None:
        if checkpoint.optimizer is None:
            raise CheckpointError(
                "optimizer: the checkpoint has no state of one; save(…, optimizer=…)."
            )
        check_named_state(optimizer, model, checkpoint.optimizer)
    for name in stateful:
        if name not in checkpoint.states:
            raise CheckpointError(
                f"{name}: the checkpoint has states of {sorted(checkpoint.states)} and none of "
                f'"{name}"; save it under that name: save(…, {name}=…).'
            )
    for name, thing in stateful.items():
        give_state(name, thing, checkpoint.states[name])
    reshard(model)
    own = model.state_dict()
    model.load_state_dict({k: spread_like(v, own[k]) for k, v in checkpoint.weights.items()})
    if optimizer is not None and checkpoint.optimizer is not None:
        load_named_state(optimizer, model, checkpoint.optimizer)
    set_random_state(checkpoint.random)


def resume(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer_factory: Callable[[Any], torch.optim.Optimizer],
    *,
    scheduler_factory: Callable[[torch.optim.Optimizer], Any] | None = None,
    blocks: Mapping[str, nn.Module] | None = None,
    **stateful: object,
) -> Resumed:
    """Take up a training run where it was saved: the same numbers from there on, bit for bit.

    Grows the fresh model as the record says, makes the optimizer for it, and gives everything
    its values and the random state it had. With `torch.distributed` all processes call this, as
    many as saved it, with the model wrapped as it was (in DistributedDataParallel, by
    `fully_shard`); what is inserted is wrapped too, as by `rewrap`.

    Args:
        path: Of the file.
        model: As it was before the first insertion; changed in place.
        optimizer_factory: `optimizer_factory(model.parameters()) -> Optimizer`.
        scheduler_factory: `scheduler_factory(optimizer)`; its state is the one saved as
            `scheduler=`. None (default) for no scheduler.
        blocks: For blocks of your own, as for `replay`.
        **stateful: As for `restore`.

    Returns:
        Model, optimizer, scheduler and the checkpoint.

    Raises:
        CheckpointError: The file cannot be used, or does not fit; the model is as it was.
        RecordError: The record does not fit the model; it is as it was.
    """
    found: list[Checkpoint] = []
    everywhere(lambda: found.append(load(path)), None)
    (checkpoint,) = found
    processes = num_processes(None)
    if checkpoint.num_processes != processes:
        raise CheckpointError(
            f'path="{path}" was saved by {checkpoint.num_processes} processes, and there are '
            f"{processes}: how the data and the random numbers are shared out would not be the "
            "same. Start as many, or load it and restore the model and the optimizer alone."
        )
    places = [(module, dict(module._modules)) for module in model.modules()]
    try:
        replay(model, checkpoint.record, blocks=blocks)
        rewrap(model)
        optimizer = optimizer_factory(model.parameters())
        scheduler = None if scheduler_factory is None else scheduler_factory(optimizer)
        if scheduler is not None:
            stateful = {**stateful, "scheduler": scheduler}
        restore(checkpoint, model, optimizer=optimizer, **stateful)
    except BaseException:
        for module, children in places:
            module._modules.clear()
            module._modules.update(children)
        raise
    return Resumed(model, optimizer, scheduler, checkpoint)


def _check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    have = {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
    want = {name: getattr(value, "shape", None) for name, value in weights.items()}
    differing = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"model={type(model).__name__} does not fit the checkpoint: {len(differing)} entries "
            f'of the state dict differ, first "{first}" with shape {have.get(first)}, in the '
            f"checkpoint {want.get(first)}. Give the architecture that was saved: "
            "cg.replay(fresh_model, checkpoint.record)."
        )
