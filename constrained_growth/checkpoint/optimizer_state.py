"""The state of an optimizer by the names of the parameters.

PyTorch numbers the parameters. After an insertion, or with other parameter groups, the same number
means another parameter, and a state of the wrong shape is loaded without an error.
"""

# torch.distributed.checkpoint.state_dict goes by names too, but does not keep a run exact (seen in
# torch 2.13): of an optimizer without state it takes a step to make one, so that Adam's step count
# is one too high; new parameters without a state make it raise; the groups must be those that
# were saved; and shapes are not checked.

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from constrained_growth._sharding import state_like
from constrained_growth.errors import CheckpointError


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    for number, group in enumerate(found):
        if "" in group:
            raise CheckpointError(
                f"optimizer: group {number} trains a parameter that model={type(model).__name__} "
                "does not have; give one nn.Module that holds all the parameters it trains."
            )
    return found


def named_state(optimizer: torch.optim.Optimizer, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """`{"class": …, "state": {name: {...}}, "groups": [{"params": [names], ...settings}]}`."""
    content, by_number = optimizer.state_dict(), {}
    for group, named in zip(content["param_groups"], names, strict=True):
        by_number.update(zip(group["params"], named, strict=True))
        group["params"] = list(named)
    state = {by_number.get(key, key): kept for key, kept in content["state"].items()}
    return {"class": _class_of(optimizer), "state": state, "groups": content["param_groups"]}


def _class_of(optimizer: Any) -> str:
    """The name of its class, or of the one that it wraps, as Accelerate's do."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def check_named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, content: Mapping[str, Any]
) -> None:
    """Refuse the state of an optimizer of another class, or that trained other parameters."""
    have = {name for group in parameter_names(optimizer, model) for name in group}
    want = {name for group in content["groups"] for name in group["params"]}
    if have != want:
        missing, more = sorted(want - have), sorted(have - want)
        raise CheckpointError(
            f"optimizer trains {len(have)} parameters, the checkpoint has those of {len(want)}: "
            f"missing {missing[:3]}, too many {more[:3]}. Make it for the same parameters of the "
            "model, after replay."
        )
    saved, given = content.get("class"), _class_of(optimizer)
    if saved not in (None, given):  # which files of earlier versions do not tell
        raise CheckpointError(
            f"optimizer={given}: the one that was saved is of the class {saved}, with a state and "
            "settings of its own; make one of that class, or go on without the saved state."
        )


def load_named_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, content: Mapping[str, Any]
) -> None:
    """Load a `named_state`; the groups become those of the state, whatever they are now."""
    check_named_state(optimizer, model, content)
    parameters = dict(model.named_parameters())
    names = [name for group in content["groups"] for name in group["params"]]
    numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
    state = {}
    for name, kept in content["state"].items():
        own = copy.deepcopy(kept)  # the optimizer writes to it, and a checkpoint may be used again
        own = state_like(own, parameters[name]) if name in parameters else own
        state[numbers.get(name, name)] = own

    named = {
        id(p): name
        for group in optimizer.param_groups
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False)
    }

    def groups(given: Mapping[Any, Any]) -> list[Any]:
        found = [{**g, "params": [given[n] for n in g["params"]]} for g in content["groups"]]
        for group, saved in zip(found, content["groups"], strict=True):
            if named:  # by those who made the optimizer
                own = [named[id(parameters[name])] for name in saved["params"]]
                group["param_names"] = own
        return found

    needed = optimizer.defaults.keys() & optimizer.param_groups[0].keys()
    optimizer.param_groups[:] = groups(parameters)
    optimizer.load_state_dict({"state": state, "param_groups": groups(numbers)})
    # those that only a later version of PyTorch has it adds itself
    missing = needed - optimizer.param_groups[0].keys()
    if missing:
        raise CheckpointError(
            f"optimizer={type(optimizer).__name__} has settings that the one saved did not have, "
            f"{sorted(missing)[:3]}; make it of the class that it had in the run that was saved."
        )


def arrange_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, names: Sequence[Sequence[str]]
) -> None:
    """Let each group of an optimizer train the parameters of these names, in their order."""
    parameters = dict(model.named_parameters())
    unknown = [name for group in names for name in group if name not in parameters]
    if unknown or len(names) != len(optimizer.param_groups):
        raise CheckpointError(
            f"optimizer has {len(optimizer.param_groups)} groups, the checkpoint {len(names)}, and "
            f"parameters of it that {type(model).__name__} has not: {unknown[:3]}. Make it as in "
            "the run that was saved."
        )
    for group, own in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[name] for name in own]
