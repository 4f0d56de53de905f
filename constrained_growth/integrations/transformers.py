"""Hugging Face Transformers: candidates for a model, and insertions that the stock class can load.

problem = cg.GrowthProblem(model, loss_fn, batches, find_candidates(model))
insert(model, cg.solve(problem), optimizer=optimizer)
model.save_pretrained(folder)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from constrained_growth import insertion
from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth._sites.wrapper import without_inserted
from constrained_growth.candidates.candidate import Candidate, Proposals
from constrained_growth.candidates.discovery import block_after, runs_of
from constrained_growth.errors import CandidateError
from constrained_growth.insertion.layer import structure_kept_on_error
from constrained_growth.insertion.record import GrowthRecord
from constrained_growth.solution import Solution


def find_candidates(model: PreTrainedModel, example_input: object = None) -> Proposals:
    """Propose a copy of each layer as a candidate after it.

    The layers are those that the config counts: decoder and encoder layers, the blocks of the
    stages of a convolutional network. Grown by copies, a model is the one that its class makes of
    a longer config. After a layer that changes the shape, such as the first block of a stage, the
    candidate is a copy of the next one. Where a copy cannot be the identity, as in BERT
    (post-norm), it is a residual block, which the config does not count: load by `replay`.

    Args:
        model: A model of Transformers, left as it was.
        example_input: As in the data, a dict of keyword arguments. None (default) makes token ids
            or an image of the sizes in the config.

    Returns:
        The candidates, named after their sites. Printed, a table with the reasons and with the
        layers that were skipped.

    Raises:
        CandidateError: The model is not of Transformers, the config counts no layers, or nothing
            can be inserted after them.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(
        ...     vocab_size=9, n_embd=4, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        ... )
        >>> [candidate.after for candidate in find_candidates(GPT2LMHeadModel(config))]
        ['transformer.h.0', 'transformer.h.1']
    """
    stacks = _checked_stacks(model)
    candidates, reasons, skipped = list[Candidate](), dict[str, str](), dict[str, str]()
    with untouched(model), differentiable(), torch.no_grad():
        runs = runs_of(model, _example_of(model) if example_input is None else example_input)
        for stack in stacks:
            names = [f"{stack.name}.{place}" for place, _ in enumerate(_layers_of(model, stack))]
            for name, following in zip(names, [*names[1:], ""], strict=True):
                block, why = None, "the forward pass does not call it"
                if name in runs:
                    block, why = block_after(runs[name], runs.get(following))
                if block is None:
                    skipped[name] = why
                else:
                    candidates.append(Candidate(name, block))
                    reasons[name] = why
    if not candidates:
        raise CandidateError(
            f"model={type(model).__name__}: nothing can follow a layer: {skipped}."
        )
    return Proposals(candidates, reasons, skipped)


def insert(
    model: PreTrainedModel,
    solution: Solution,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    averaged: nn.Module | Sequence[nn.Module] = (),
    data: Iterable[Any] | None = None,
) -> GrowthRecord:
    """Insert the chosen layers as `cg.insert` does, and update the config.

    The config gets the new depth, lists in it with an entry per layer (`layer_types`) grow too,
    and the layers are renumbered to fit the cache of keys and values: what `save_pretrained`
    writes, the stock class loads by `from_pretrained`. A model whose layers depend on their number
    or on the depth, so that the stock class would make another one, is refused.

    Arguments, result and errors are those of `cg.insert`; the config too is changed in place, and
    restored after an error.

    Raises:
        CandidateError: The stock class could not load the grown model.
    """
    return insertion.insert(
        model,
        solution,
        optimizer=optimizer,
        averaged=averaged,
        data=data,
        bookkeeping=_bookkeeping(model),
    )


def replay(
    model: PreTrainedModel,
    record: GrowthRecord,
    *,
    blocks: Mapping[str, nn.Module] | None = None,
    strict: bool = True,
) -> PreTrainedModel:
    """Repeat recorded insertions on a fresh model as `cg.replay` does, and update the config.

    Needed only for layers that the config does not count (around a post-norm layer); load other
    models by `from_pretrained`. Arguments and errors are those of `cg.replay`.

    Raises:
        CandidateError: The stock class could not load the grown model.
    """
    update = _bookkeeping(model)
    with structure_kept_on_error(model, then=update):
        insertion.replay(model, record, blocks=blocks, strict=strict)
        update(model)
    return model


def _checked_stacks(model: object) -> tuple[_Stack, ...]:
    if not isinstance(model, PreTrainedModel):
        raise CandidateError(f"model={type(model).__name__} is no PreTrainedModel; use cg.insert.")
    stacks = _find_stacks(model)
    if not stacks:
        kind = type(model).__name__
        raise CandidateError(f"model={kind}: its config counts no layers; use cg.find_candidates.")
    return stacks


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


def _bookkeeping(model: PreTrainedModel) -> Callable[[nn.Module], object]:
    """A function that fits config and layer numbers to a model, called before its copies."""
    stacks = {stack.name: stack for stack in _checked_stacks(model)}
    before = config = copy.deepcopy(model.config)
    longer: nn.Module = model
    arrangement: dict[_Stack, list[int]] = {}
    old = {
        name: [without_inserted(layer) for layer in module.children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }

    def update(one: nn.Module) -> None:
        nonlocal arrangement, config, longer
        if not isinstance(one, PreTrainedModel):
            raise CandidateError(f"averaged={type(one).__name__} is not a model of Transformers.")
        if one is model:
            now = {name: list(model.get_submodule(name).children()) for name in old}
            grown = [name for name in old if len(now[name]) > len(old[name])]
            if set(grown) - stacks.keys():
                raise CandidateError(
                    f"the config of {type(model).__name__} does not count the layers of "
                    f"{sorted(set(grown) - stacks.keys())}, and the stock class could not load one "
                    f"more; choose a layer of {list(stacks)}, or insert by cg.insert."
                )
            arrangement = {
                stacks[name]: [
                    count - 1
                    for count in accumulate(without_inserted(m) in old[name] for m in now[name])
                ]
                for name in grown
            }
            config = copy.deepcopy(before)
            for stack, order in arrangement.items():
                _lengthen(config, stack, order)
            if arrangement:
                longer = _skeleton(model, copy.deepcopy(config))
                _check_same(model, _skeleton(model, copy.deepcopy(before)), longer, arrangement)
        is_grown = all(len(_layers_of(one, s)) == len(order) for s, order in arrangement.items())
        _update_config(one.config, config if is_grown else before)
        for stack in arrangement if is_grown else ():
            _renumber(one, stack, longer)
            _follow_neighbours(_layers_of(one, stack))

    return update


def _follow_neighbours(layers: Sequence[nn.Module]) -> None:
    """Give each layer what Transformers itself has set on the others: checkpointing, hooks."""
    alike = [dict(layer.named_modules()) for layer in layers]
    for modules in alike:
        for name, module in modules.items():
            for other in [one[name] for one in alike if type(one.get(name)) is type(module)]:
                for key in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                    if key in vars(other) and key not in vars(module):
                        setattr(module, key, vars(other)[key])
                for hook in () if _library_hooks(module) else _library_hooks(other):
                    module.register_forward_hook(hook)


def _library_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks by which Transformers collects hidden states and attentions."""
    hooks = module._forward_hooks.values()
    return [hook for hook in hooks if getattr(hook, "__module__", "").startswith("transformers.")]


# The lists of layers, and the config entries that count them. What one more layer changes is found
# by building a model from a longer config on the meta device.


@dataclass(frozen=True)
class _Stack:
    """A list of layers whose length is an entry of the config."""

    name: str  # of the nn.ModuleList or nn.Sequential
    part: str  # of the config that has the entry ("text_config"), or ""
    entry: str  # the attribute that holds the number of layers
    index: int | None  # in it, if it is a list (`depths`)


_Arrangement = Mapping[_Stack, Sequence[int]]
"""For each layer of a grown stack: which of the old layers it is, or is inserted after."""


def _find_stacks(model: PreTrainedModel) -> tuple[_Stack, ...]:
    """The stacks of a model, each confirmed by building a model from a longer config."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    found: dict[str, _Stack] = {}
    for part, entry, index in _counters(model.config):
        longer = copy.deepcopy(model.config)
        _lengthen(longer, _Stack("", part, entry, index), None)
        try:
            built: dict[str, Any] = dict(_skeleton(model, longer).named_modules())
        except Exception:  # it counts something else too, or must agree with another entry
            continue
        grown = [n for n, one in lists.items() if n in built and len(built[n]) == len(one) + 1]
        if len(grown) == 1:
            found.setdefault(grown[0], _Stack(grown[0], part, entry, index))
    return tuple(found[name] for name in lists if name in found)


def _layers_of(model: nn.Module, stack: _Stack) -> list[nn.Module]:
    return list(model.get_submodule(stack.name).children())


def _skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> nn.Module:
    """A model of the same class from a config, on the meta device."""
    with untouched(model), torch.device("meta"):
        return type(model)(config)


def _check_same(
    model: nn.Module, before: nn.Module, longer: nn.Module, arrangement: _Arrangement
) -> None:
    """Refuse a grown model if the stock class makes another one from the longer config."""
    for stack, order in arrangement.items():
        old, built = _layers_of(before, stack), _layers_of(longer, stack)
        where = f'model={type(model).__name__}: its config with a longer "{stack.entry}"'
        if len(built) != len(order):
            raise CandidateError(f'{where} gives {len(built)} layers in "{stack.name}".')
        for place, layer in enumerate(map(without_inserted, _layers_of(model, stack))):
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
                    "depend on their number; use a block such as ResidualMLP, or another site."
                )


def _renumber(model: nn.Module, stack: _Stack, longer: nn.Module) -> None:
    """Give the layers of a stack the numbers that they have in a model built at that depth."""
    numbered = dict(longer.get_submodule(stack.name).named_modules())
    for name, module in model.get_submodule(stack.name).named_modules():
        for key in _NUMBERS & vars(module).keys():
            setattr(module, key, getattr(numbered[name], key))


def _update_config(config: PreTrainedConfig, wanted: PreTrainedConfig) -> None:
    """Make a config equal to another one in place, its parts too."""
    for name, value in vars(wanted).items():
        present = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig) and isinstance(present, PreTrainedConfig):
            _update_config(present, value)
        elif present != value:
            setattr(config, name, copy.deepcopy(value))


def _counters(config: PreTrainedConfig) -> Iterator[tuple[str, str, int | None]]:
    """Entries of a config that may count layers: part, attribute, index."""
    parts = {"": config} | {
        name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)
    }
    for part, holder in parts.items():
        for entry, value in vars(holder).items():
            if _COUNTING.search(entry) and type(value) is int and value > 0:
                yield part, entry, None
            elif _COUNTING.search(entry) and isinstance(value, list | tuple):
                every = range(len(value)) if all(type(v) is int for v in value) else ()
                yield from ((part, entry, index) for index in every)


def _lengthen(config: PreTrainedConfig, stack: _Stack, order: Sequence[int] | None) -> None:
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
