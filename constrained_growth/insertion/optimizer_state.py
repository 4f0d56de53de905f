"""New parameters in running optimizers; the state of the old ones is kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from constrained_growth.errors import OptimizerError


def as_optimizers(optimizer: object) -> tuple[Optimizer, ...]:
    """A tuple of one optimizer, several or None."""
    if optimizer is None:
        return ()
    given = (optimizer,) if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(given, Sequence) or not all(isinstance(one, Optimizer) for one in given):
        raise OptimizerError(f"optimizer={optimizer!r:.80} is no torch.optim.Optimizer.")
    return tuple(given)


def check_optimizers(
    model: nn.Module, optimizers: Sequence[Optimizer], blocks: Iterable[nn.Module]
) -> None:
    """Refuse optimizers that cannot take the parameters of the blocks."""
    ours = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptimizerError(
                "optimizer=LBFGS has one flat state for all parameters, which cannot grow; train "
                "with another one, or insert with optimizer=None and make a new LBFGS."
            )
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise OptimizerError(
                f"optimizer={type(optimizer).__name__} trains none of the model's parameters."
            )
    named = [pair for block in blocks for pair in block.named_parameters()]
    left = {name for name, p in named if not any(_takes(one, p) for one in optimizers)}
    if optimizers and left:
        kinds = " and ".join(type(one).__name__ for one in optimizers)
        only = "only matrices" if "Muon" in kinds else "only parameters with sparse gradients"
        raise OptimizerError(
            f"optimizer={kinds} takes {only}, and the new layers have {sorted(left)}; "
            "give all that train the model, optimizer=[one, other], or insert with optimizer=None."
        )


def add_parameters(
    optimizers: Sequence[Optimizer],
    model: nn.Module,
    new: Iterable[Tensor],
    counterparts: Mapping[int, Tensor],
) -> None:
    """Add new parameters to the groups of their neighbours, without state.

    A parameter that copies an old one (`counterparts`: its `id` → the old one) joins the group of
    that. Otherwise a matrix joins the group of the nearest matrix, best one before it, and a vector
    that of a vector: weight decay is often off for those. A group in the model's order stays so:
    an optimizer made for a replayed model can load its state dict.
    """
    if not optimizers:
        return
    named = dict(model.named_parameters())
    order = {id(parameter): place for place, parameter in enumerate(named.values())}
    homes = {id(p): (o, g) for o in optimizers for g in o.param_groups for p in g["params"]}
    for parameter in new:
        fit = {key: home for key, home in homes.items() if _takes(home[0], parameter)}
        like = counterparts.get(id(parameter))
        if like is None or id(like) not in fit:
            trained = [other for other in named.values() if id(other) in fit]
            like = _neighbour(parameter, order, trained)
        optimizer, group = fit[id(like)]
        _warn_of_common_count(optimizer, group)
        _add_in_order(group["params"], parameter, order)
        if isinstance(optimizer, torch.optim.Adagrad):
            # It makes its state when it is built; older versions of torch cannot at a step.
            settings = {key: value for key, value in group.items() if key in optimizer.defaults}
            fresh = torch.optim.Adagrad([parameter], **settings)
            optimizer.state[parameter] = fresh.state[parameter]
    names = {id(parameter): name for name, parameter in named.items()}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if "param_names" in group:
            group["param_names"] = [names.get(id(p), "") for p in group["params"]]


@contextmanager
def groups_kept_on_error(optimizer: Optimizer) -> Iterator[None]:
    """After an error, restore the groups and settings, and drop states that are new."""
    groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]
    states = set(optimizer.state)
    try:
        yield
    except BaseException:
        optimizer.param_groups[:] = [group for group, _, _ in groups]
        for group, settings, params in groups:
            group.clear()
            group.update(settings)
            group["params"][:] = params
        for parameter in [p for p in optimizer.state if p not in states]:
            del optimizer.state[parameter]
        raise


def _takes(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether an optimizer can train such a parameter."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        return False
    return parameter.dim() == 2 or type(optimizer).__name__ != "Muon"


_COUNTS = {"step", "steps", "k", "t", "num_steps", "n_steps", "step_count", "num_updates", "iter"}
"""Names under which a group counts steps: in Apex's FusedAdam, Adan, Prodigy, schedule-free."""


def _warn_of_common_count(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Warn where Adam's bias correction, say, is over for parameters that join now."""
    own = {name for p in group["params"] for name in optimizer.state.get(p, ())}
    for name in () if own & _COUNTS else _COUNTS & group.keys():
        value, start = group[name], optimizer.defaults.get(name)
        if isinstance(value, Real | Tensor) and 1 <= float(value) != start:
            warnings.warn(
                f"optimizer={type(optimizer).__name__} counts the steps of a group, "
                f"{name}={float(value):g}, and not of each parameter: if it corrects a bias by "
                "that, steps of the new parameters are several times too large at first. Move what "
                "record.new_parameters(model) returns to a group with a count of its own, or "
                "train with an optimizer that counts for each parameter.",
                stacklevel=4,
            )


def _neighbour(parameter: Tensor, order: Mapping[int, int], trained: Sequence[Tensor]) -> Tensor:
    """The last trained parameter of the same kind before it, or else the first one after it."""
    same_kind = [other for other in trained if (other.dim() > 1) == (parameter.dim() > 1)]
    like = same_kind or trained
    before = [other for other in like if order[id(other)] < order[id(parameter)]]
    return before[-1] if before else like[0]


def _add_in_order(params: list[Tensor], parameter: Tensor, order: Mapping[int, int]) -> None:
    """At its place in the model's order, if the group is in that order; else at the end."""
    places = [order.get(id(other), -1) for other in params]
    here = order[id(parameter)]
    in_order = places == sorted(places) and -1 not in places
    index = sum(place < here for place in places) if in_order else len(params)
    params.insert(index, parameter)
