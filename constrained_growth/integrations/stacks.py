"""The lists of layers in a Transformers model, and the config entries that count them.

What one more layer changes is found by building the model from a longer config, on the meta device
(without memory for its parameters), and comparing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.untouched import untouched
from constrained_growth.errors import CandidateError
from constrained_growth.insertion.layer import WithInsertedLayer


@dataclass(frozen=True)
class Stack:
    """A list of layers whose length is an entry of the config."""

    name: str  # of the nn.ModuleList or nn.Sequential
    part: str  # of the config that has the entry ("text_config"), or ""
    entry: str  # the attribute that holds the number of layers
    index: int | None  # in it, if it is a list (`depths`)


Arrangement = Mapping[Stack, Sequence[int]]
"""For each layer of a grown stack: which of the old layers it is, or is inserted after."""


def find_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The stacks of a model, each confirmed by building a model from a longer config."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    found: dict[str, Stack] = {}
    for part, entry, index in _counters(model.config):
        longer = copy.deepcopy(model.config)
        _lengthen(longer, Stack("", part, entry, index), None)
        try:
            built: dict[str, Any] = dict(skeleton(model, longer).named_modules())
        except Exception:  # it counts something else too, or must agree with another entry
            continue
        grown = [n for n, one in lists.items() if n in built and len(built[n]) == len(one) + 1]
        if len(grown) == 1:
            found.setdefault(grown[0], Stack(grown[0], part, entry, index))
    return tuple(found[name] for name in lists if name in found)


def layers_of(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """The layers, in their order."""
    return list(model.get_submodule(stack.name).children())


def without_inserted(layer: nn.Module) -> nn.Module:
    """The layer itself, where other layers are wrapped around it."""
    return without_inserted(layer.base) if isinstance(layer, WithInsertedLayer) else layer


def longer_config(config: PreTrainedConfig, arrangement: Arrangement) -> PreTrainedConfig:
    """The config of a grown model; lists in it with an entry per layer grow too."""
    config = copy.deepcopy(config)
    for stack, order in arrangement.items():
        _lengthen(config, stack, order)
    return config


def skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    """A model of the same class from a config, on the meta device."""
    with untouched(model), torch.device("meta"):
        return type(model)(config)


def check_same(
    model: nn.Module, before: nn.Module, longer: nn.Module, arrangement: Arrangement
) -> None:
    """Refuse a grown model if the stock class makes another one from the longer config.

    `before` and `longer` are the skeletons of the old and of the longer config.
    """
    for stack, order in arrangement.items():
        old, built = layers_of(before, stack), layers_of(longer, stack)
        where = f'model={type(model).__name__}: its config with a longer "{stack.entry}"'
        if len(built) != len(order):
            raise CandidateError(f'{where} gives {len(built)} layers in "{stack.name}".')
        for place, layer in enumerate(map(without_inserted, layers_of(model, stack))):
            source, is_new = order[place], order[place] in order[:place]
            if is_new and parameter_shapes(layer) != parameter_shapes(built[place]):
                raise CandidateError(
                    f"{where} gives layer {place} other parameters; the stock class cannot load it."
                )
            # A new layer is a copy of the one before it or, at a change of shape, after it.
            alike = old[source : source + 1 + is_new]
            settings = _settings(built[place])
            differing = [sorted(settings ^ _settings(one), key=str) for one in alike]
            if all(differing):
                raise CandidateError(
                    f"{where} makes layer {place} another one: {differing[0][:2]}, as its layers "
                    "depend on their number; use a block that is wrapped around its site, such as "
                    "ResidualMLP, or another site."
                )


def renumber(model: nn.Module, stack: Stack, longer: nn.Module) -> None:
    """Give the layers of a stack the numbers that they have in a model built at that depth."""
    numbered = dict(longer.get_submodule(stack.name).named_modules())
    for name, module in model.get_submodule(stack.name).named_modules():
        for key in _NUMBERS & vars(module).keys():
            setattr(module, key, getattr(numbered[name], key))


def update_config(config: PreTrainedConfig, wanted: PreTrainedConfig) -> None:
    """Make a config equal to another one in place, its parts too."""
    for name, value in vars(wanted).items():
        present = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig) and isinstance(present, PreTrainedConfig):
            update_config(present, value)
        elif present != value:
            setattr(config, name, copy.deepcopy(value))


def _counters(config: PreTrainedConfig) -> Iterator[tuple[str, str, int | None]]:
    """Entries of a config that may count layers: part, attribute, index."""
    parts = {"": config} | {
        name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)
    }
    for part, holder in parts.items():
        for entry, value in vars(holder).items():
            if not _COUNTING.search(entry):
                continue
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                yield part, entry, None
            elif isinstance(value, list | tuple) and all(type(v) is int for v in value):
                yield from ((part, entry, index) for index in range(len(value)))


def _lengthen(config: PreTrainedConfig, stack: Stack, order: Sequence[int] | None) -> None:
    """Let a config count the layers of an order (None: one more, at the end)."""
    holder: Any = getattr(config, stack.part) if stack.part else config
    value = getattr(holder, stack.entry)
    depth = value if stack.index is None else value[stack.index]
    order = [*range(depth), depth - 1] if order is None else order
    if stack.index is None:
        setattr(holder, stack.entry, len(order))
        for name, listed in list(vars(holder).items()):
            if "layer" in name and isinstance(listed, list | tuple) and len(listed) == depth:
                setattr(holder, name, type(listed)(listed[source] for source in order))
    else:
        changed = [len(order) if i == stack.index else v for i, v in enumerate(value)]
        setattr(holder, stack.entry, type(value)(changed))


def _settings(layer: nn.Module) -> set[tuple[str, str, Any]]:
    """The plain attributes of the modules of a layer, except for numbers and dropout."""
    return {
        (name, key, value)
        for name, module in layer.named_modules()
        if "drop" not in name
        for key, value in [("class", type(module).__name__), *vars(module).items()]
        if isinstance(value, bool | int | float | str) and key not in _NUMBERS | {"training"}
        if "drop" not in key
    }


_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "layer_num"})
_COUNTING = re.compile(r"layers?$|depths?$|^n_layer|blocks$")
