"""What an optimizer remembers, by the names of the parameters and not by their numbers.

PyTorch numbers the parameters. After an insertion, or with groups put together differently, the
same number means another parameter, and loading the state of another shape goes unnoticed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from constrained_growth._sharding import state_like
from constrained_growth.errors import CheckpointError


def named_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimizer's `state_dict()`, with names of parameters in the place of numbers.

    Args:
        optimizer: Any with PyTorch's `state_dict()`.
        model: Has all the parameters that it trains.

    Returns:
        `{"state": {name: {...}}, "groups": [{"params": [names], …settings}]}`.

    Raises:
        CheckpointError: The optimizer trains a parameter that is not in the model.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> named_state(optimizer, model)["groups"][0]["params"]
        ['weight', 'bias']
    """
    content = optimizer.state_dict()
    names = parameter_names(optimizer, model)
    by_number = {
        number: name
        for group, named in zip(content["param_groups"], names, strict=True)
        for number, name in zip(group["params"], named, strict=True)
    }
    groups = [
        {**group, "params": named}
        for group, named in zip(content["param_groups"], names, strict=True)
    ]
    return {
        "state": {by_number.get(key, key): kept for key, kept in content["state"].items()},
        "groups": groups,
    }


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group, in its order.

    Raises:
        CheckpointError: The optimizer trains a parameter that is not in the model.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    for number, group in enumerate(found):
        if "" in group:
            raise CheckpointError(
                f"optimizer: group {number} trains a parameter that model={type(model).__name__} "
                "does not have; give the model whose parameters it trains, all of them in one "
                "nn.Module."
            )
    return found


def check_named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, content: Mapping[str, Any]
) -> None:
    """Refuse a state that belongs to other parameters, before anything is changed.

    Raises:
        CheckpointError: The optimizer trains other parameters than those of the state.
    """
    have = {name for group in parameter_names(optimizer, model) for name in group}
    want = {name for group in content["groups"] for name in group["params"]}
    if have != want:
        missing, more = sorted(want - have), sorted(have - want)
        raise CheckpointError(
            f"optimizer trains {len(have)} parameters, the checkpoint has those of {len(want)}: "
            f"missing {missing[:3]}, too many {more[:3]}. Make it for the same parameters of the "
            "model, after replay."
        )


def load_named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, content: Mapping[str, Any]
) -> None:
    """Give an optimizer the state of `named_state`, whatever the order of its parameters.

    Its groups become those of the state, in membership, order and settings.

    Args:
        optimizer: Trains the same parameters; changed in place.
        model: Has them, under the same names.
        content: From `named_state`.

    Raises:
        CheckpointError: The optimizer trains other parameters; it is not changed then.
    """
    check_named_state(optimizer, model, content)
    parameters = dict(model.named_parameters())
    numbers: dict[Any, int] = {}
    for group in content["groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
    optimizer.param_groups[:] = [
        {**group, "params": [parameters[name] for name in group["params"]]}
        for group in content["groups"]
    ]
    optimizer.load_state_dict(
        {
            "state": {
                numbers.get(name, name): state_like(copy.deepcopy(kept), parameters[name])
                if name in parameters
                else copy.deepcopy(kept)
                for name, kept in content["state"].items()
            },
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]}
                for group in content["groups"]
            ],
        }
    )


def put_right(
    optimizer: torch.optim.Optimizer, model: nn.Module, names: Sequence[Sequence[str]]
) -> None:
    """Give each parameter its own state, after PyTorch loaded a state by number.

    Args:
        optimizer: Was given the state of parameters that may have had other numbers; changed in
            place.
        model: Has the parameters.
        names: `parameter_names` of when the state was saved.

    Raises:
        CheckpointError: The optimizer trains other parameters.
    """
    if parameter_names(optimizer, model) == [list(group) for group in names]:
        return
    content = optimizer.state_dict()
    if [len(group["params"]) for group in content["param_groups"]] != [len(g) for g in names]:
        raise CheckpointError(
            f"optimizer has groups of {[len(g['params']) for g in content['param_groups']]} "
            f"parameters, the checkpoint {[len(group) for group in names]}; make it as it was made "
            "in the run that was saved."
        )
    flat = [name for group in names for name in group]
    groups = zip(content["param_groups"], names, strict=True)
    load_named_state(
        optimizer,
        model,
        {
            "state": {
                flat[key] if isinstance(key, int) else key: kept
                for key, kept in content["state"].items()
            },
            "groups": [{**group, "params": list(named)} for group, named in groups],
        },
    )
