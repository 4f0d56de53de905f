"""The lists of layers in a Transformers model, and the config entries that count them.

What one more layer changes is found by building the model from a longer config, on the meta device
(without memory for its parameters), and comparing.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.untouched import untouched
from constrained_growth.errors import CandidateError


@dataclass(frozen=True)
class Stack:
    """A list of layers whose length is an entry of the config.

    Attributes:
        name: Qualified name of the `nn.ModuleList` or `nn.Sequential`.
        part: Name of the part of the config that has the entry ("text_config"), or "".
        entry: The attribute that holds the number of layers.
        index: The index in it, if it is a list (`depths`), else None.
    """

    name: str
    part: str
    entry: str
    index: int | None


@dataclass(frozen=True)
class Layer:
    """A layer that a stack is to have.

    Attributes:
        source: Number of the present layer that it is, or that it is inserted after.
        new: Name → shape of its parameters if it is inserted, else None.
    """

    source: int
    new: Mapping[str, tuple[int, ...]] | None = None


Arrangement = Mapping[Stack, list[Layer]]
"""The layers that the stacks of a grown model have."""


def find_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The stacks of a model, each confirmed by building a model from a longer config."""
    found: dict[str, Stack] = {}
    for part, entry, index in _counters(model.config):
        longer = copy.deepcopy(model.config)
        _lengthen(longer, Stack("", part, entry, index), None)
        try:
            built = dict(skeleton(model, longer).named_modules())
        except Exception:  # it counts something else too, or must agree with another entry
            continue
        grown = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential)
            and name in built
            and len(built[name]) == len(module) + 1  # type: ignore[arg-type]
        ]
        if len(grown) == 1:
            found.setdefault(grown[0], Stack(grown[0], part, entry, index))
    order = [name for name, _ in model.named_modules() if name in found]
    return tuple(found[name] for name in order)


def layers_of(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """The layers, in their order."""
    return list(model.get_submodule(stack.name).children())


def longer_config(model: PreTrainedModel, arrangement: Arrangement) -> PreTrainedConfig:
    """The config of a grown model; lists in it with an entry per layer grow too."""
    config = copy.deepcopy(model.config)
    for stack, layers in arrangement.items():
        _lengthen(config, stack, [layer.source for layer in layers])
    return config


def skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    """A model of the same class from a config, on the meta device."""
    with untouched(model), torch.device("meta"):
        return type(model)(config)


def check_same(model: PreTrainedModel, arrangement: Arrangement, longer: nn.Module) -> None:
    """Refuse to insert where the stock class makes another model of the longer config.

    Args:
        model: Not grown yet.
        arrangement: The layers that it is to have.
        longer: Built from the longer config.

    Raises:
        CandidateError: A layer would get other parameters or another setting, or the list
            another length.
    """
    present = skeleton(model, copy.deepcopy(model.config))
    for stack, layers in arrangement.items():
        built, old = layers_of(longer, stack), layers_of(present, stack)
        where = f'model={type(model).__name__}: its config with a longer "{stack.entry}"'
        if len(built) != len(layers):
            raise CandidateError(f'{where} gives {len(built)} layers in "{stack.name}".')
        for place, layer in enumerate(layers):
            if layer.new is not None and dict(layer.new) != parameter_shapes(built[place]):
                raise CandidateError(
                    f"{where} gives layer {place} other parameters than the new layer has; the "
                    "stock class could not load it."
                )
            # A new layer is a copy of the one before it or, at a change of shape, after it.
            alike = old[layer.source : layer.source + (1 if layer.new is None else 2)]
            settings = _settings(built[place])
            differing = [sorted(settings ^ _settings(one), key=str) for one in alike]
            if all(differing):
                raise CandidateError(
                    f"{where} makes layer {place} another one: {differing[0][:2]}. Its layers "
                    "depend on their number, so none can be inserted between them; use a block "
                    "that is wrapped around its site, such as ResidualMLP, or another site."
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


def _lengthen(config: PreTrainedConfig, stack: Stack, sources: list[int] | None) -> None:
    """Set the number of layers; `sources` are the present ones they come from (None: one more)."""
    holder: Any = getattr(config, stack.part) if stack.part else config
    value = getattr(holder, stack.entry)
    depth = value if stack.index is None else value[stack.index]
    sources = [*range(depth), depth - 1] if sources is None else sources
    if stack.index is None:
        setattr(holder, stack.entry, len(sources))
        for name, listed in list(vars(holder).items()):
            if "layer" in name and isinstance(listed, list | tuple) and len(listed) == depth:
                setattr(holder, name, type(listed)(listed[source] for source in sources))
    else:
        changed = [len(sources) if i == stack.index else v for i, v in enumerate(value)]
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
