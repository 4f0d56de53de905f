"""States of the models and of what else is saved: read, checked, and loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from constrained_growth._sharding import spread_like
from constrained_growth._sites.untouched import generators_of
from constrained_growth.errors import CheckpointError
from constrained_growth.insertion.description import first_difference


def check_weights(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Refuse weights of other names, shapes or dtypes."""
    own = model.state_dict()
    shapes = [
        {k: tuple(v.shape) if isinstance(v, Tensor) else () for k, v in state.items()}
        for state in (own, weights)
    ]
    if differing := first_difference(*shapes):
        raise CheckpointError(
            f"model={type(model).__name__} does not fit the checkpoint: {differing} there. Give "
            "cg.replay(fresh_model, checkpoint.record)."
        )
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.dtype != own[name].dtype:
            raise CheckpointError(
                f'model={type(model).__name__}: its "{name}" is {own[name].dtype}, and '
                f"{value.dtype} in the checkpoint; convert the model, model.to({value.dtype})."
            )


def load_weights(pairs: Sequence[tuple[nn.Module, Mapping[str, Any]]]) -> None:
    """Load what fits; what a module's own `set_extra_state` refuses is loaded nowhere."""
    before = []
    for one, weights in pairs:
        own = one.state_dict()
        tensors = all(isinstance(value, Tensor) for value in own.values())
        before.append((one, None if tensors else copy.deepcopy(own)))
        try:
            one.load_state_dict({k: spread_like(v, own[k]) for k, v in weights.items()})
        except BaseException:
            for other, state in before:
                if state is not None:
                    other.load_state_dict(state)
            raise


def state_of(thing: Any) -> Any:
    """The state of an object, of a generator, of those of a loader, or of each in a list."""
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    if hasattr(thing, "state_dict"):
        return thing.state_dict()
    return [state_of(part) for part in _parts(thing)]


def _check_scheduler(name: str, scheduler: LRScheduler, state: Any) -> None:
    """Refuse the state of a scheduler of another class, which PyTorch would take."""
    own = {key for key in scheduler.state_dict() if not key.startswith("_")}
    missing = own - state.keys() if isinstance(state, Mapping) else own
    if missing:
        raise CheckpointError(
            f"{name}={type(scheduler).__name__} has {sorted(missing)[:3]}, and the one that was "
            "saved has not; make it as in the run that was saved."
        )


def _parts(thing: Any) -> Sequence[Any]:
    """The schedulers of a list, say, or the generators of a loader, which can be a list too."""
    several = isinstance(thing, list | tuple) and thing and hasattr(thing[0], "state_dict")
    return thing if several else generators_of(thing)


def set_state(name: str, thing: Any, state: Any) -> None:
    """Load what `state_of` returned."""
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    elif hasattr(thing, "load_state_dict"):
        if isinstance(thing, LRScheduler):
            _check_scheduler(name, thing, state)
        thing.load_state_dict(state)
    else:
        parts = _parts(thing)
        if isinstance(state, Mapping):
            raise CheckpointError(f"{name} is a list, and a single one was saved; give that.")
        if len(parts) != len(state):
            what = "parts" if parts is thing else "generators"
            raise CheckpointError(
                f"{name} has {len(parts)} {what} and had {len(state)} when it was saved."
            )
        for part, kept in zip(parts, state, strict=True):
            set_state(name, part, kept)
