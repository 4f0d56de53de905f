"""Hugging Face Transformers: what a model changes when it gains a layer.

`cg.find_candidates`, `cg.insert`, `cg.replay`, `Grower`, `grow` and the callbacks do this by
themselves for models of Transformers and models that contain one: what `save_pretrained` writes
after an insertion, the stock class loads by `from_pretrained`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth import candidates, insertion
from constrained_growth._arguments import instance
from constrained_growth._extras import extra_packages
from constrained_growth._sites.untouched import untouched
from constrained_growth._sites.wrapper import without_inserted
from constrained_growth.bookkeeping import register
from constrained_growth.candidates.candidate import Proposals
from constrained_growth.errors import CandidateError
from constrained_growth.insertion.description import INTERNAL, LAYER_NUMBERS

with extra_packages():
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["find_candidates", "insert", "replay"]

insert = insertion.insert
replay = insertion.replay


def find_candidates(model: PreTrainedModel, example_input: object = None) -> Proposals:
    """Propose candidates as `cg.find_candidates` does, from an example of the sizes in the config.

    After each layer that the config counts this is a copy, so that the grown model is the one that
    its class makes of a longer config; after a layer that changes the shape, such as the first
    block of a stage, or that only its place can have, such as the first block of T5, a copy of the
    next one. Where a copy cannot be the identity, as in BERT (post-norm), it is a residual block,
    which the config does not count: load by `replay`.

    Args:
        model: A model of Transformers, left as it was.
        example_input: As in the data, a dict of keyword arguments. None (default) makes token ids
            or an image of the sizes in the config.

    Returns:
        The candidates, named after their sites. Printed, a table with the reasons and with the
        layers that were skipped.

    Raises:
        CandidateError: The model is not of Transformers, there is no example for its kind of
            input, or nothing can be inserted.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(
        ...     vocab_size=9, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        ... )
        >>> [candidate.after for candidate in find_candidates(GPT2LMHeadModel(config))]
        ['transformer.h.0', 'transformer.h.1']
    """
    instance("model", model, PreTrainedModel, CandidateError, "one, or use cg.find_candidates")
    example = _example_of(model) if example_input is None else example_input
    return candidates.find_candidates(model, example)


def _example_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """An input of the sizes that the config says."""
    config = model.config
    name = model.main_input_name
    like = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        vocabulary = int(config.get_text_config().vocab_size)
        ids = torch.randint(vocabulary, (2, 8), generator=generator).to(like.device)
        return {name: ids, **({"decoder_input_ids": ids} if config.is_encoder_decoder else {})}
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 64
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (2, getattr(config, "num_channels", 3), height, width)
        return {name: torch.randn(shape, generator=generator, dtype=torch.float32).to(like)}
    raise CandidateError(
        f"model={type(model).__name__} takes {name!r}, for which there is no example; give one: "
        f"find_candidates(model, {{{name!r}: …}})."
    )


@register(PreTrainedModel)
def _bookkeeping(model: PreTrainedModel) -> _Books | None:
    """None for a class of the user's that cannot be made from its config alone."""
    try:
        return _Books(model)
    except Exception:
        return None


# The lists of layers, and the config entries that count them. What one more layer changes is found
# by building a model from a longer config on the meta device: a skeleton.


@dataclass(frozen=True)
class _Stack:
    """A list of layers whose length is an entry of the config."""

    part: str  # of the config that has the entry ("text_config"), or ""
    entry: str  # the attribute that holds the number of layers
    index: int | None = None  # in it, if it is a list (`depths`)
    name: str = ""  # of the nn.ModuleList or nn.Sequential


class _Books:
    """The books of one model: its config, and what its layers and modules know of the depth."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._modules = dict(_stock_modules(model))
        self._layers = {
            name: list(module.children())
            for name, module in self._modules.items()
            if isinstance(module, nn.ModuleList | nn.Sequential)
        }
        self._before = _skeleton(model, model.config)
        self._longer: tuple[dict[str, Any], nn.Module] | None = None  # the last one, by its config

    @cached_property
    def _stacks(self) -> tuple[_Stack, ...]:
        """The stacks of the model, each confirmed by building a model from a longer config."""
        found: dict[str, _Stack] = {}
        for counter in _counters(self._model.config):
            config = copy.deepcopy(self._model.config)
            _lengthen(config, counter, None)
            try:
                longer = self._built(config)
            except Exception:  # it counts something else too, or must agree with another entry
                continue
            # an entry that lengthens several lists does not say to which a layer belongs
            built: dict[str, Any] = dict(longer.named_modules())
            lists = self._layers.items()
            grown = [n for n, old in lists if n in built and len(built[n]) == len(old) + 1]
            if len(grown) == 1:
                found.setdefault(grown[0], replace(counter, name=grown[0]))
        return tuple(found[name] for name in self._layers if name in found)

    @cached_property
    def _places(self) -> dict[nn.Module, tuple[_Stack, int]]:
        """The stack that a layer is an element of, and its place there."""
        numbered = ((stack, enumerate(self._layers[stack.name])) for stack in self._stacks)
        return {layer: (stack, place) for stack, layers in numbered for place, layer in layers}

    def counts(self, after: str) -> bool:
        return self._model.get_submodule(after) in self._places

    def refusal(self, after: str, layer: nn.Module) -> str | None:
        if not self.counts(after):
            return None
        stack, place = self._places[self._model.get_submodule(after)]
        layers = list(self._layers[stack.name])
        layers.insert(place + 1, layer)
        return self._fault({stack: layers}, self._skeleton({stack: layers}))

    def update(self, around: Sequence[nn.Module]) -> None:
        now = {stack: list(self._modules[stack.name].children()) for stack in self._stacks}
        grown = {s: layers for s, layers in now.items() if len(layers) > len(self._layers[s.name])}
        if not grown:
            return
        longer = self._skeleton(grown)
        fault = self._fault(grown, longer)
        if fault is not None:
            raise CandidateError(fault)
        self._fit_configs(longer, around)
        self._fit_attributes(grown, longer)
        for stack, layers in grown.items():
            built = longer.get_submodule(stack.name).children()
            for layer, one in zip(layers, built, strict=True):
                _renumber(layer, one)
            _follow_neighbours(layers)

    def _sources(self, stack: _Stack, layers: Sequence[nn.Module]) -> list[tuple[int, bool]]:
        """For each layer which of the old ones it is or is a copy of; and whether it is new.

        A new layer is a copy of the one before it, or else of the one after it.
        """
        old = [without_inserted(layer) for layer in self._layers[stack.name]]
        found: list[tuple[int, bool]] = []
        place = -1
        for layer in map(without_inserted, layers):
            if place + 1 < len(old) and old[place + 1] is layer:
                place += 1
                found.append((place, False))
            else:
                near = [p for p in (place, place + 1) if 0 <= p < len(old)]
                copied = [p for p in near if _traits(old[p]) == _traits(layer)]
                found.append(((copied or near)[0], True))
        return found

    def _skeleton(self, grown: Mapping[_Stack, Sequence[nn.Module]]) -> nn.Module:
        """A model of the class with these layers in its stacks."""
        config = copy.deepcopy(self._model.config)
        for stack, layers in grown.items():
            _lengthen(config, stack, [source for source, _ in self._sources(stack, layers)])
        return self._built(config)

    def _built(self, config: PreTrainedConfig) -> nn.Module:
        content = config.to_dict()
        if self._longer is None or self._longer[0] != content:
            self._longer = content, _skeleton(self._model, config)
        return self._longer[1]

    def _fault(self, grown: Mapping[_Stack, Sequence[nn.Module]], longer: nn.Module) -> str | None:
        """Why the stock class makes another model of the longer config; None if it does not."""
        kind, entries = type(self._model).__name__, " and ".join(f'"{s.entry}"' for s in grown)
        where = f"the config of {kind} with a longer {entries}"
        names = tuple(f"{stack.name}." for stack in grown)
        outside = [
            {n: tuple(p.shape) for n, p in one.named_parameters() if not n.startswith(names)}
            for one in (self._before, longer)
        ]
        if outside[0] != outside[1]:
            differing = sorted(set(outside[0].items()) ^ set(outside[1].items()))[0][0]
            return f'{where} also changes "{differing}", so the stock class cannot load the model.'
        for stack, layers in grown.items():
            built = list(longer.get_submodule(stack.name).children())
            old = list(self._before.get_submodule(stack.name).children())
            if len(built) != len(layers):
                return f'{where} gives {len(built)} layers in "{stack.name}".'
            for place, (source, is_new) in enumerate(self._sources(stack, layers)):
                # Skeletons are compared with skeletons: the model may be adapted (LoRA).
                own, stock = _traits(self._layers[stack.name][source]), old[source]
                is_copy = not is_new or own == _traits(layers[place])
                differing = _traits(built[place]) ^ _traits(stock if is_copy else layers[place])
                if differing:
                    first = "; ".join(map(" ".join, sorted(differing)[:2]))
                    return (
                        f"{where} makes layer {place} another one ({first}), as its layers depend "
                        "on their number; use a block such as ResidualMLP, or another site."
                    )
        return None

    def _fit_configs(self, longer: nn.Module, around: Sequence[nn.Module]) -> None:
        """Give the modules new configs; other models may hold the old ones."""
        memo: dict[int, Any] = {}
        built = dict(longer.named_modules())
        before = dict(self._before.named_modules())
        for name, module in self._modules.items():
            if isinstance(module, PreTrainedModel) and name in built:
                config = copy.deepcopy(module.config, memo)
                _change(config, before[name].config, built[name].config)
        for module in (*around, *self._model.modules()):
            for key, value in list(vars(module).items()):
                if isinstance(value, PreTrainedConfig) and id(value) in memo:
                    setattr(module, key, memo[id(value)])

    def _fit_attributes(self, grown: Iterable[_Stack], longer: nn.Module) -> None:
        """Give modules outside the stacks the attributes that they have in the longer model."""
        before = dict(self._before.named_modules())
        names = tuple(f"{stack.name}." for stack in grown)
        for name, built in longer.named_modules():
            if name.startswith(names) or name not in before or name not in self._modules:
                continue
            for key, value in vars(built).items():
                if _is_plain(value) and vars(before[name]).get(key) != value:
                    setattr(self._modules[name], key, copy.deepcopy(value))


def _follow_neighbours(layers: Sequence[nn.Module]) -> None:
    """Give each layer what Transformers itself has set on the others: checkpointing, hooks."""
    alike = [dict(_stock_modules(layer)) for layer in layers]
    for name, module in ((name, module) for modules in alike for name, module in modules.items()):
        for other in [one[name] for one in alike if type(one.get(name)) is type(module)]:
            for key in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                if key in vars(other):
                    vars(module).setdefault(key, vars(other)[key])
            for hook in () if _library_hooks(module) else _library_hooks(other):
                module.register_forward_hook(hook)


def _library_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks by which Transformers collects hidden states and attentions."""
    hooks = module._forward_hooks.values()
    return [hook for hook in hooks if getattr(hook, "__module__", "").startswith("transformers.")]


def _stock_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules by the names that they have without inserted layers around them."""
    module = without_inserted(module)
    yield name, module
    for key, child in module.named_children():
        yield from _stock_modules(child, f"{name}.{key}" if name else key)


def _skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    """A model of the same class from a config, on the meta device."""
    # no memory, and no random numbers; a class may write to the config that it is given
    with untouched(model), torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def _renumber(layer: nn.Module, built: nn.Module) -> None:
    """Give a layer the numbers that it has in a model built at that depth."""
    modules = dict(built.named_modules())
    for name, module in _stock_modules(layer):
        like = modules.get(name, built)  # another module in its place, as an adapter
        for key in LAYER_NUMBERS & vars(module).keys():
            numbers = [vars(one)[key] for one in (like, *built.modules()) if key in vars(one)]
            setattr(module, key, next(iter(numbers), getattr(module, key)))


def _change(config: Any, before: Any, after: Any) -> None:
    """Make the changes to a config, and to its parts, that lead from one to another."""
    for name, value in vars(after).items():
        old, own = vars(before).get(name), vars(config).get(name)
        if isinstance(value, PreTrainedConfig):
            if isinstance(old, PreTrainedConfig) and isinstance(own, PreTrainedConfig):
                _change(own, old, value)
        elif old != value:
            setattr(config, name, copy.deepcopy(value))


def _counters(config: PreTrainedConfig) -> Iterator[_Stack]:
    """Entries of a config, and of its parts, that may count layers."""
    parts = {name: v for name, v in vars(config).items() if isinstance(v, PreTrainedConfig)}
    for part, holder in {"": config, **parts}.items():
        for entry, value in vars(holder).items():
            if not _COUNTING.search(entry):
                continue
            if type(value) is int and value > 0:
                yield _Stack(part, entry)
            elif isinstance(value, list | tuple) and all(type(v) is int for v in value):
                yield from (_Stack(part, entry, index) for index in range(len(value)))


def _lengthen(config: PreTrainedConfig, stack: _Stack, order: Sequence[int] | None) -> None:
    """Let a config count the layers of an order (None: one more, at the end)."""
    holder: Any = getattr(config, stack.part) if stack.part else config
    value = getattr(holder, stack.entry)
    depth = value if stack.index is None else value[stack.index]
    order = [*range(depth), depth - 1] if order is None else order
    if stack.index is None:
        setattr(holder, stack.entry, len(order))
        if stack.entry == "num_decoder_layers":  # of T5; `generate` sizes its cache by another name
            holder.decoder_layers = len(order)
        for name, listed in list(vars(holder).items()):
            if "layer" in name and isinstance(listed, list | tuple) and len(listed) == depth:
                setattr(holder, name, type(listed)(listed[source] for source in order))
    else:
        changed = [len(order) if i == stack.index else v for i, v in enumerate(value)]
        setattr(holder, stack.entry, type(value)(changed))


def _traits(layer: nn.Module) -> set[tuple[str, str, str]]:
    """Classes, shapes and plain attributes of a layer, except for numbers and dropout."""
    layer, found = without_inserted(layer), set[tuple[str, str, str]]()
    for name, module in layer.named_modules():
        found.add((name, "class", type(module).__name__))
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found |= {(name, key, str(tuple(tensor.shape))) for key, tensor in tensors}
        for key, value in vars(module).items() if "drop" not in name else ():
            # a list may have an entry for each layer of the model
            if _is_plain(value) and key not in LAYER_NUMBERS | INTERNAL and "drop" not in key:
                found.add((name, key, repr(value)))
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


_COUNTING = re.compile(r"layers?$|depths?$|^n_layer|blocks$")
