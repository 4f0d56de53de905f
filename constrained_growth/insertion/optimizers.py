"""New parameters in running optimizers, the memory of the old ones kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from constrained_growth.errors import OptimizerError


def as_optimizers(optimizer: object) -> tuple[Optimizer, ...]:
    """One optimizer, several or none, as a tuple.

    Raises:
        OptimizerError: It is something else.
    """
    if optimizer is None:
        return ()
    given = (optimizer,) if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(given, Sequence) or not all(isinstance(one, Optimizer) for one in given):
        raise OptimizerError(
            f"optimizer={optimizer!r:.80} is neither a torch.optim.Optimizer nor a sequence of "
            "them."
        )
    return tuple(given)


def check_optimizers(
    model: nn.Module, optimizers: Sequence[Optimizer], blocks: Iterable[nn.Module] = ()
) -> None:
    """Refuse optimizers that cannot take new parameters, before anything is changed.

    Args:
        model: Not grown yet.
        optimizers: The ones that train it.
        blocks: The layers that are to be inserted.

    Raises:
        OptimizerError: One of them trains none of the model's parameters, or keeps one memory for
            all parameters together (LBFGS); or none of them takes some parameter of a block
            (Muon takes only matrices, SparseAdam only what has sparse gradients).
    """
    ours = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise OptimizerError(
                "optimizer=LBFGS keeps one flat memory of all parameters, which cannot grow; "
                "insert with optimizer=None and make a new LBFGS."
            )
        if not ours & {id(p) for p in _trained(optimizer)}:
            raise OptimizerError(
                f"optimizer={type(optimizer).__name__} trains none of the model's parameters; give "
                "the one that trains this model, or optimizer=None."
            )
    named = [pair for block in blocks for pair in block.named_parameters()]
    left = {name for name, p in named if not any(_takes(one, p) for one in optimizers)}
    if optimizers and left:
        kinds = " and ".join(type(one).__name__ for one in optimizers)
        only = "only matrices" if "Muon" in kinds else "only parameters with sparse gradients"
        raise OptimizerError(
            f"optimizer={kinds} takes {only}, and the new layers have {sorted(left)}; "
            "give all the optimizers that train the model, optimizer=[one, other], or insert with "
            "optimizer=None and add the new parameters to yours."
        )


def adopt(
    optimizers: Sequence[Optimizer],
    model: nn.Module,
    new: Iterable[Tensor],
    counterparts: Mapping[int, Tensor] = MappingProxyType({}),
) -> None:
    """Put new parameters into the groups of their neighbours, in the order of the model.

    A new matrix goes to the group of the last matrix before it in `model.parameters()`, a new
    vector to that of the last vector (weight decay is often off for those), so that a layer gets
    the settings of the one it follows; without one before, of the first one after. A parameter
    that has a counterpart goes to the group of that. Of several optimizers only those count
    that can take the parameter. Inside a group that is in the model's order it stands at its place
    in that order, so that an optimizer made for a replayed model has the same order and can load
    this one's state. The state of the old parameters is not touched; new ones start without any.

    Args:
        optimizers: Changed in place.
        model: With the new parameters in it.
        new: The new parameters.
        counterparts: `id` of a new parameter → the old one it is a copy of.
    """
    named = dict(model.named_parameters())
    order = {id(parameter): place for place, parameter in enumerate(named.values())}
    homes = {id(p): (o, g) for o in optimizers for g in o.param_groups for p in g["params"]}
    for parameter in new if optimizers else ():
        fit = {key: home for key, home in homes.items() if _takes(home[0], parameter)}
        like = counterparts.get(id(parameter))
        if like is None or id(like) not in fit:
            trained = [other for other in named.values() if id(other) in fit]
            like = _neighbour(parameter, order, trained)
        optimizer, group = fit[id(like)]
        _place(group["params"], parameter, order)
        if isinstance(optimizer, torch.optim.Adagrad):
            _begin(optimizer, group, parameter)
    names = {id(parameter): name for name, parameter in named.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "param_names" in group:
                group["param_names"] = [names.get(id(p), "") for p in group["params"]]


@contextmanager
def kept_on_error(optimizer: Optimizer) -> Iterator[None]:
    """After an error the optimizer has the groups, settings and states again that it had."""
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


def _neighbour(parameter: Tensor, order: Mapping[int, int], trained: Sequence[Tensor]) -> Tensor:
    """The last trained parameter of the same kind before it, or else the first one after it."""
    here = order[id(parameter)]
    same_kind = [other for other in trained if (other.dim() > 1) == (parameter.dim() > 1)]
    candidates = same_kind or trained
    before = [other for other in candidates if order[id(other)] < here]
    return before[-1] if before else candidates[0]


def _begin(optimizer: torch.optim.Adagrad, group: Mapping[str, Any], parameter: Tensor) -> None:
    """The state that Adagrad makes when it is built; older torch cannot make it at a step."""
    settings = {key: value for key, value in group.items() if key in optimizer.defaults}
    optimizer.state[parameter] = torch.optim.Adagrad([parameter], **settings).state[parameter]


def _place(params: list[Tensor], parameter: Tensor, order: Mapping[int, int]) -> None:
    places = [order.get(id(other), -1) for other in params]
    here = order[id(parameter)]
    in_order = places == sorted(places) and -1 not in places
    index = sum(place < here for place in places) if in_order else len(params)
    params.insert(index, parameter)


def _trained(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
