"""New parameters in a running optimizer, the memory of the old ones kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.errors import OptimizerError


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that cannot take new parameters, before anything is changed.

    Raises:
        OptimizerError: It trains none of the model's parameters, or keeps one memory for all
            parameters together (LBFGS).
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(f"optimizer={optimizer!r} is not a torch.optim.Optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            "optimizer=LBFGS keeps one flat memory of all parameters, which cannot grow; insert "
            "with optimizer=None and make a new LBFGS."
        )
    if not {id(p) for p in model.parameters()} & {id(p) for p in _trained(optimizer)}:
        raise OptimizerError(
            "optimizer trains none of the model's parameters; give the one that trains this model, "
            "or optimizer=None."
        )


def adopt(optimizer: torch.optim.Optimizer, model: nn.Module, new: Iterable[Tensor]) -> None:
    """Put new parameters into the groups of their neighbours, in the order of the model.

    A new matrix goes to the group of the nearest matrix in `model.parameters()`, a new vector to
    that of the nearest vector (weight decay is often off for those), so that it gets the
    settings of its neighbours. Inside a group that is in the model's order it stands at its place
    in that order, so that an optimizer made for a replayed model has the same order and can load
    this one's state. The state of the old parameters is not touched; new ones start without any.

    Args:
        optimizer: Changed in place.
        model: With the new parameters in it.
        new: The new parameters.
    """
    named = dict(model.named_parameters())
    order = {id(parameter): place for place, parameter in enumerate(named.values())}
    home = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for parameter in new:
        group = home[_neighbour(parameter, order, named, home)]
        _place(group["params"], parameter, order)
        home[id(parameter)] = group
    names = {id(parameter): name for name, parameter in named.items()}
    for group in optimizer.param_groups:
        if "param_names" in group:
            group["param_names"] = [names.get(id(p), "") for p in group["params"]]


def _neighbour(
    parameter: Tensor,
    order: Mapping[int, int],
    named: Mapping[str, Tensor],
    home: Mapping[int, Any],
) -> int:
    """The id of the nearest trained parameter of the same kind, or of any kind."""
    here = order[id(parameter)]
    trained = [other for other in named.values() if id(other) in home]
    same_kind = [other for other in trained if (other.dim() > 1) == (parameter.dim() > 1)]

    def distance(other: Tensor) -> tuple[int, bool]:
        return abs(order[id(other)] - here), order[id(other)] > here

    return id(min(same_kind or trained, key=distance))


def _place(params: list[Tensor], parameter: Tensor, order: Mapping[int, int]) -> None:
    places = [order.get(id(other), -1) for other in params]
    here = order[id(parameter)]
    in_order = places == sorted(places) and -1 not in places
    index = sum(place < here for place in places) if in_order else len(params)
    params.insert(index, parameter)


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
