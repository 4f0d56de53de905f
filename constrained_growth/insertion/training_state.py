"""What trains on as a model grows: its optimizers, and averaged copies of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from constrained_growth._arguments import several
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.errors import CandidateError, OptimizerError

Copies = nn.Module | Sequence[nn.Module]


def as_optimizers(optimizer: object) -> tuple[Optimizer, ...]:
    """A tuple of one optimizer, several or None."""
    return several("optimizer", optimizer, Optimizer, OptimizerError, "a torch.optim.Optimizer")


def as_copies(averaged: object) -> tuple[nn.Module, ...]:
    """A tuple of one copy, several or none."""
    return several("averaged", averaged, nn.Module, CandidateError, "copies of the model")


def grown_in(copy: nn.Module) -> nn.Module:
    """The module that grows: the one within an `AveragedModel`."""
    return copy.module if isinstance(copy, AveragedModel) else copy


def checked_copies(model: nn.Module, averaged: object) -> list[nn.Module]:
    """The modules that grow with the model; refuse what is no copy of it."""
    copies = list(dict.fromkeys(grown_in(one) for one in as_copies(averaged)))  # each once
    own = set(model.parameters())
    for one in copies:
        shared = not own.isdisjoint(one.parameters())
        if shared or parameter_shapes(one) != parameter_shapes(model):
            fault = "shares parameters with" if shared else "differs by name and shape from"
            raise CandidateError(
                f"averaged={type(one).__name__} {fault} the model; give a copy of it."
            )
    return copies


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
        trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if trained and ours.isdisjoint(trained):
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
    that of a vector: weight decay is often off for those. Where nothing is trained yet they join
    the first group. A group in the model's order stays so: an optimizer made for a replayed model
    can load its state dict.
    """
    if not optimizers:
        return
    named = dict(model.named_parameters())
    order = {id(parameter): place for place, parameter in enumerate(named.values())}
    homes = {id(p): (o, g) for o in optimizers for g in o.param_groups for p in g["params"]}
    for parameter in new:
        fit = {key: home for key, home in homes.items() if _takes(home[0], parameter)}
        like = counterparts.get(id(parameter))
        trained = [other for other in named.values() if id(other) in fit]
        if trained:
            known = like is not None and id(like) in fit
            optimizer, group = fit[id(like if known else _neighbour(parameter, order, trained))]
        else:
            optimizer = next(one for one in optimizers if _takes(one, parameter))
            group = optimizer.param_groups[0]
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


def groups_and_states(optimizers: Iterable[Optimizer]) -> list[Any]:
    """The containers of optimizers in which something changes as they take new parameters."""
    found: list[Any] = []
    for optimizer in optimizers:
        groups = optimizer.param_groups
        found += [groups, optimizer.state, *groups, *(group["params"] for group in groups)]
    return found


def _takes(optimizer: Optimizer, parameter: Tensor) -> bool:
    """Whether an optimizer can train such a parameter."""
    if isinstance(optimizer, torch.optim.SparseAdam):
        return False
    # by name, as Muon came to PyTorch late, and before that everyone had one of their own
    return parameter.dim() == 2 or type(optimizer).__name__ != "Muon"


_COUNTS = {"step", "steps", "k", "t", "num_steps", "n_steps", "step_count", "num_updates", "iter"}
"""Usual names for a count of steps: in Apex's FusedAdam, Adan, Prodigy, schedule-free. Whatever
else is a whole number, in all groups the same, and neither a setting nor a scheduler's, is one."""


def _warn_of_common_count(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Warn where Adam's bias correction, say, is over for parameters that join now."""
    if any(name in _COUNTS for p in group["params"] for name in optimizer.state.get(p, ())):
        return
    # some keep it beside the states of parameters, under a name
    common = {name: value for name, value in optimizer.state.items() if isinstance(name, str)}
    for name, value in {**group, **common}.items():
        start, named = optimizer.defaults.get(name, 0), name in _COUNTS
        groups = () if name in common else optimizer.param_groups
        if not _is_count(value, named=named) or name.endswith(("lr", "momentum")):
            continue
        is_count = named or (_is_count(start) and all(g.get(name) == value for g in groups))
        if is_count and 1 <= float(value) != start:
            warnings.warn(
                f"optimizer={type(optimizer).__name__} counts the steps of a group, "
                f"{name}={float(value):g}, and not of each parameter: if it corrects a bias by "
                "that, steps of the new parameters are several times too large at first. Move what "
                "record.new_parameters(model) returns to a group with a count of its own, or "
                "train with an optimizer that counts for each parameter.",
                stacklevel=4,
            )


def _is_count(value: object, *, named: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        return False
    if isinstance(value, Tensor) and value.numel() != 1:
        return False
    return named or (not isinstance(value, float) and float(value).is_integer())


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
