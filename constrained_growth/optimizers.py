"""New parameters in a running optimizer, the memory of the old ones kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.errors import OptimizerError


def check_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, blocks: Iterable[nn.Module] = ()
) -> None:
    """Refuse an optimizer that cannot take new parameters, before anything is changed.

    Args:
        model: Not grown yet.
        optimizer: The one to ask.
        blocks: The layers that are to be inserted.

    Raises:
        OptimizerError: It trains none of the model's parameters, keeps one memory for all
            parameters together (LBFGS), or takes only matrices (Muon) while a block has others.
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
    vectors = [name for b in blocks for name, p in b.named_parameters() if p.dim() != 2]
    if vectors and type(optimizer).__name__ == "Muon":
        raise OptimizerError(
            f"optimizer=Muon takes only matrices, and the new layers have {sorted(set(vectors))}; "
            "insert with optimizer=None and add the new parameters to your optimizers."
        )


def adopt(optimizer: torch.optim.Optimizer, model: nn.Module, new: Iterable[Tensor]) -> None:
    """Put new parameters into the groups of their neighbours, in the order of the model.

    A new matrix goes to the group of the last matrix before it in `model.parameters()`, a new
    vector to that of the last vector (weight decay is often off for those), so that a layer gets
    the settings of the one it follows; without one before, of the first one after. Inside a
    group that is in the model's order it stands at its place in that order, so that an optimizer
    made for a replayed model has the same order and can load this one's state. The state of the
    old parameters is not touched; new ones start without any.

    Args:
        optimizer: Changed in place.
        model: With the new parameters in it.
        new: The new parameters.
    """
    named = dict(model.named_parameters())
    order = {id(parameter): place for place, parameter in enumerate(named.values())}
    home = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = [parameter for parameter in named.values() if id(parameter) in home]
    for parameter in new:
        group = home[id(_neighbour(parameter, order, trained))]
        _place(group["params"], parameter, order)
        if isinstance(optimizer, torch.optim.Adagrad):
            _begin(optimizer, group, parameter)
    names = {id(parameter): name for name, parameter in named.items()}
    for group in optimizer.param_groups:
        if "param_names" in group:
            group["param_names"] = [names.get(id(p), "") for p in group["params"]]


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


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
