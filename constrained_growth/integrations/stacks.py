"""The lists of layers in a Transformers model, the config entries that count them, and longer ones.

What another layer changes is found by building the model again from a longer config, without
memory for its parameters (on the meta device), and comparing.
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


@dataclass(frozen=True)
class Stack:
    """A list of layers whose length the config says.

    Attributes:
        name: Qualified name of the `nn.ModuleList` or `nn.Sequential`.
        part: Name of the part of the config that counts it ("text_config"), or "".
        entry: The attribute that says how many layers there are.
        index: Which element of it does, where it is a list (`depths`), else None.
    """

    name: str
    part: str
    entry: str
    index: int | None


Arrangement = Mapping[Stack, Sequence[int]]
"""For each layer that a stack is to have: which present layer it is, or is put after."""


@dataclass(frozen=True)
class Setting:
    """A value that an attribute of the config, or of a module, is to have."""

    owner: Any
    name: str
    value: Any


def find_stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The stacks of a model, each tried out by making the config longer."""
    found: dict[str, Stack] = {}
    for part, entry, index in _counters(model.config):
        longer = copy.deepcopy(model.config)
        _lengthen(longer, Stack("", part, entry, index), None)
        try:
            built = dict(skeleton(model, longer).named_modules())
        except Exception:  # it counts something else, too, or has to fit another entry
            continue
        grown = [
            name
            for name, module in model.named_modules()
            if _is_list(module) and name in built and len(built[name]) == len(module) + 1  # type: ignore[arg-type]
        ]
        if len(grown) == 1:
            found.setdefault(grown[0], Stack(grown[0], part, entry, index))
    order = [name for name, _ in model.named_modules() if name in found]
    return tuple(found[name] for name in order)


def layers_of(model: nn.Module, stack: Stack) -> list[nn.Module]:
    """The layers, in their order."""
    return list(model.get_submodule(stack.name).children())


def longer_config(model: PreTrainedModel, arrangement: Arrangement) -> PreTrainedConfig:
    """A config of the depth that an arrangement has, and its lists of one entry for each layer."""
    config = copy.deepcopy(model.config)
    for stack, order in arrangement.items():
        _lengthen(config, stack, order)
    return config


def skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    """A model of the same class from a config, without memory for its parameters."""
    with untouched(model), torch.device("meta"):
        return type(model)(config)


def check_same(
    model: PreTrainedModel,
    arrangement: Arrangement,
    inserted: Mapping[tuple[Stack, int], Mapping[str, tuple[int, ...]]],
    longer: nn.Module,
) -> None:
    """Refuse to insert where the stock class would not make the same model of the longer config.

    Args:
        model: As it is.
        arrangement: The layers it is to have.
        inserted: Stack and place of each new layer → shapes of its parameters.
        longer: Built from the longer config.

    Raises:
        CandidateError: A layer would get other parameters or another setting, or the list
            another length.
    """
    present = skeleton(model, copy.deepcopy(model.config))
    for stack, order in arrangement.items():
        built, old = layers_of(longer, stack), layers_of(present, stack)
        where = f'model={type(model).__name__}: its config with a longer "{stack.entry}"'
        if len(built) != len(order):
            raise CandidateError(f'{where} gives {len(built)} layers in "{stack.name}".')
        for place, source in enumerate(order):
            shapes = inserted.get((stack, place))
            if shapes is not None and shapes != parameter_shapes(built[place]):
                raise CandidateError(
                    f"{where} gives layer {place} other parameters than the new layer has; the "
                    "stock class could not load it."
                )
            alike = [old[source]] if shapes is None else old[source : source + 2]
            settings = _settings(built[place])
            differing = [sorted(settings ^ _settings(layer), key=str) for layer in alike]
            if all(differing):
                raise CandidateError(
                    f"{where} makes layer {place} another one: {differing[0][:2]}. Its layers "
                    "depend on their number, so none can be put between them; use a block that "
                    "stands around its site, such as ResidualMLP, or choose another site."
                )


def numbering(model: nn.Module, stack: Stack, longer: nn.Module) -> Iterator[Setting]:
    """The numbers that the modules of a stack are to know themselves by."""
    numbered = dict(longer.get_submodule(stack.name).named_modules())
    for name, module in model.get_submodule(stack.name).named_modules():
        for key in _NUMBERS & vars(module).keys():
            yield Setting(module, key, getattr(numbered[name], key))


def config_settings(config: PreTrainedConfig, longer: PreTrainedConfig) -> Iterator[Setting]:
    """What makes a config like a longer one, its parts included."""
    for name, value in vars(longer).items():
        present = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig) and isinstance(present, PreTrainedConfig):
            yield from config_settings(present, value)
        elif present != value:
            yield Setting(config, name, value)


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
    """Let a config count the layers of an order (None: one more, put last)."""
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


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.Sequential)


def _settings(layer: nn.Module) -> set[tuple[str, str, Any]]:
    """What the modules of a layer are like, apart from their numbers and their dropout."""
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
