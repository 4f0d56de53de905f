"""Propose candidates for any model, from one forward pass of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._activations import TanhLU
from constrained_growth._data import moved
from constrained_growth._sites.collector import hooked
from constrained_growth._sites.context import NO_CONTEXT, Context, context_of
from constrained_growth._sites.model import call, device_of
from constrained_growth._sites.outputs import tensor_in
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.blocks import (
    CopiedBlock,
    IdentityConv2d,
    IdentityLinear,
    ResidualConv2d,
    ResidualMLP,
)
from constrained_growth.candidates.candidate import Candidate, Proposals
from constrained_growth.errors import BlockError, CandidateError


def find_candidates(model: nn.Module, example_input: object) -> Proposals:
    """Propose candidates for a model of any kind, from one forward pass of it.

    * After each block of a stack (elements of an `nn.ModuleList` or `nn.Sequential` of a class
      that repeats there: the layers of a transformer, the blocks of a ResNet) a `CopiedBlock` of
      it, if zeros at the ends of its branches make it the identity; after a block that changes
      the shape a copy of the next one; else, as after a post-norm layer, a residual block.
      Nothing is proposed inside these blocks.
    * After an activation module the layer that is exactly the identity there (`IdentityLinear`,
      on images `IdentityConv2d`) if there is one (ReLU, TanhLU), else a residual block.
    * After any other module that keeps the shape of its input and has parameters and children, a
      residual block: `ResidualMLP` over the last dimension, on images `ResidualConv2d`.
    * If all this gives nothing, as in a model whose activations are functions, a residual block
      after each linear layer and convolution.

    A site is reached exactly once and carries a floating-point tensor of at least two dimensions.
    The output of the model is no site, nor is anything inside a layer inserted earlier.

    Args:
        model: The model, left as it was.
        example_input: One input as in the data: a tensor, a tuple, or a dict of keyword arguments.

    Returns:
        The candidates, in the order of the forward pass, named after their sites: a tuple that
        prints as a table, with the reasons and with the modules that were skipped.

    Raises:
        CandidateError: Nothing was found.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> found = find_candidates(net, torch.randn(5, 2))
        >>> [candidate.after for candidate in found]
        ['1']
        >>> print(found)
        after  block           pinned  why
        1      IdentityLinear      20  ReLU is the identity on what comes out of it
    """
    with untouched(model), differentiable(), torch.no_grad():
        # untouched also restores the random state, from which new blocks are initialised
        runs = runs_of(model, example_input)
        search = _Search(model, runs, last=next(reversed(runs.values())).y)
        _propose_after_stacks(search)
        _propose_after_modules(search)
        if all(block is None for block, _ in search.proposed.values()):
            _propose_after_leaves(search)
        proposals = _without_repetition(search)
    if not proposals:
        looked = "".join(f"\n  {name}: {why}" for name, why in proposals.skipped.items())
        raise CandidateError(
            f"model={type(model).__name__}: there is no layer to propose; write the candidates by "
            f"hand: cg.Candidate(after='name of a submodule', block=...).{looked}"
        )
    return proposals


Proposed = tuple[nn.Module | None, str]
"""A block and why it is proposed, or None and why there is none."""


@dataclass(frozen=True)
class _Search:
    """The state of the search."""

    model: nn.Module
    runs: Mapping[str, Run]  # of its modules, in the order they finished
    last: Tensor | None  # the tensor in the output of the model
    proposed: dict[str, Proposed] = field(default_factory=dict)  # by site
    closed: set[str] = field(default_factory=set)  # blocks of stacks: nothing is proposed inside

    def is_open(self, name: str) -> bool:
        """Whether a module is neither inside a block of a stack, nor has one inside it."""
        inside = _is_within(name, self.closed)
        around = any(_is_within(one, {name}) for one in self.closed)
        return not (inside or around or _is_inside_inserted(name, self.model))


def _propose_after_stacks(search: _Search) -> None:
    """Copies of blocks, innermost stacks first; else a copy of the next, or a residual block."""
    stacked = dict(_stacked(search.model, search.runs))
    inside_out = sorted(stacked, key=lambda name: -name.count("."))
    copies: dict[str, Proposed] = {}
    for name in inside_out:
        if search.is_open(name):
            copies[name] = copy_of(search.runs[name])
            if copies[name][0] is not None:
                search.closed.add(name)
    kinds = {type(search.runs[name].module) for name in search.closed}
    inside_out.sort(key=lambda name: type(search.runs[name].module) not in kinds)  # stable
    for name in inside_out:
        run = search.runs[name]
        if name not in search.closed and not search.is_open(name):
            continue
        search.closed.add(name)
        why, following = _why_not(search, run), search.runs.get(stacked[name])
        proposed = (None, why) if why else block_after(run, following, copies[name])
        search.proposed[name] = proposed


def block_after(run: Run, following: Run | None, copied: Proposed | None = None) -> Proposed:
    """After a block of a stack: a copy of it (`copied`), or of the next, or a residual block."""
    block, why = copied or copy_of(run)
    if block is not None or run.y is None:
        return block, why
    if following is not None and following.x is not None and following.x.shape == run.y.shape:
        block, reason = copy_of(following)
        if block is not None:
            return block, f"{reason} of the next"
    block, reason = _residual(run, nn.ReLU())
    kind = type(run.module).__name__
    return block, reason if block is None else f"{reason}; no copy, as {kind} {why}"


def _propose_after_modules(search: _Search) -> None:
    """Layers after activations, and after other modules that keep the shape."""
    for name, run in search.runs.items():
        activation = _activation(run)
        is_block = run.keeps_shape and run.is_composite
        is_open = name not in search.closed and search.is_open(name)
        if not name or not (activation or is_block) or not is_open:
            continue
        why = _why_not(search, run)
        if why and (activation or run.y is not search.last):
            search.proposed[name] = None, why
        elif not why:
            after = _after_activation(run, activation) if activation else _residual(run, nn.ReLU())
            search.proposed[name] = after


def _propose_after_leaves(search: _Search) -> None:
    """Residual blocks after linear layers and convolutions."""
    for name, run in search.runs.items():
        leaf = isinstance(run.module, nn.Linear | nn.Conv2d)
        if leaf and name and search.is_open(name) and not _why_not(search, run):
            search.proposed[name] = _residual(run, nn.ReLU())


def _without_repetition(search: _Search) -> Proposals:
    """The candidates in the order of the pass, each tensor once."""
    places: dict[tuple[int, int], str] = {}
    candidates, reasons = [], {}
    skipped = {name: why for name, (block, why) in search.proposed.items() if block is None}
    for name, run in search.runs.items():
        block, why = search.proposed.get(name, (None, ""))
        if block is None:
            continue
        earlier = places.setdefault((id(run.y), run.version), name)
        if earlier != name:
            skipped[name] = f'the tensor is the one after "{earlier}"'
        else:
            candidates.append(Candidate(name, block))
            reasons[name] = why
    return Proposals(candidates, reasons, skipped)


def _why_not(search: _Search, run: Run) -> str:
    """Why a module cannot be a site; "" if it can."""
    if run.y is not None and run.y is search.last:
        return "its output is that of the model"
    if run.count > 1:
        return f"it runs {run.count} times in one pass"
    if run.y is None or run.y.dim() < 2:
        return "its output is no floating-point tensor of two or more dimensions"
    return ""


def _stacked(model: nn.Module, runs: Mapping[str, Run]) -> Iterator[tuple[str, str]]:
    """Names of the blocks that repeat, each with that of the next element of its list, or ""."""
    lists = []
    for owner, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            names = [f"{owner}.{key}" if owner else key for key, _ in container.named_children()]
            ran = [name for name in names if name in runs and runs[name].is_composite]
            lists.append([n for n in ran if not isinstance(runs[n].module, _CONTAINERS)])
    counts = [Counter(type(runs[name].module) for name in names) for names in lists]
    kinds = {kind for one in counts for kind, count in one.items() if count > 1}
    for names in lists:
        for name, following in zip(names, [*names, ""][1:], strict=True):
            if type(runs[name].module) in kinds:
                yield name, following
    listed = {name for names in lists for name in names}
    whole = (name for name, run in runs.items() if isinstance(run.module, _INDIVISIBLE))
    yield from ((name, "") for name in whole if name and name not in listed)


_INDIVISIBLE = nn.TransformerEncoderLayer
"""In eval mode its forward bypasses its own submodules, so no site is inside."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _after_activation(run: Run, activation: nn.Module) -> Proposed:
    """The layer that is the identity after an activation, or a residual block with it."""
    kind = type(activation).__name__
    identity = IdentityConv2d if run.on_channels else IdentityLinear
    if not run.on_channels or (run.y is not None and run.y.dim() == 4):
        try:
            block = identity(_width(run), activation)
            return block, f"{kind} is the identity on what comes out of it"
        except BlockError:
            pass
    try:
        return _residual(run, activation)
    except BlockError:  # like Softmax, not elementwise
        return None, f"{kind} is not an elementwise activation"


def _residual(run: Run, activation: nn.Module) -> Proposed:
    width, why = _width(run), "a residual block, the identity after everything"
    if not run.on_channels:
        return ResidualMLP(width, width, activation), why
    if run.y is not None and run.y.dim() == 4:
        return ResidualConv2d(width, activation), why
    return None, "there is no block for channels in tensors of this many dimensions"


def _width(run: Run) -> int:
    assert run.y is not None
    return run.y.shape[1] if run.on_channels else run.y.shape[-1]


def _activation(run: Run) -> nn.Module | None:
    known = type(run.module).__module__ in (nn.ReLU.__module__, TanhLU.__module__)
    return run.module if known and run.keeps_shape and not run.is_composite else None


def _is_within(name: str, owners: Iterable[str]) -> bool:
    return name.startswith(tuple(f"{owner}." for owner in owners))


def _is_inside_inserted(name: str, model: nn.Module) -> bool:
    """Whether a module is a layer inserted earlier, or a part of one."""
    parts = name.split(".")
    owners = (".".join(parts[:i]) for i, part in enumerate(parts) if part == "inserted")
    return any(hasattr(model.get_submodule(owner), "base") for owner in owners)


@dataclass
class Run:
    """What one module did in the forward pass, the last time that it ran."""

    module: nn.Module
    count: int = 0  # how many times it ran
    x: Tensor | None = None  # the first argument, if it is a tensor
    context: Context = NO_CONTEXT  # the other arguments
    y: Tensor | None = None  # the tensor in its output
    version: int = 0  # the version counter of y when it came out
    on_channels: bool = False  # whether dimension 1 of y counts channels, as after a convolution

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the input."""
        return self.x is not None and self.y is not None and self.x.shape == self.y.shape

    @property
    def is_composite(self) -> bool:
        """Whether it has children and parameters."""
        has_children = next(self.module.children(), None) is not None
        return has_children and next(self.module.parameters(), None) is not None


def copy_of(run: Run) -> tuple[CopiedBlock | None, str]:
    """A copy of a module that is the identity, and why; or None, and why there is none."""
    kind = type(run.module).__name__
    if not run.keeps_shape:
        return None, "changes the shape"
    try:
        with torch.enable_grad():
            args = (run.x, *run.context.args)
            block = CopiedBlock(run.module, args=args, kwargs=run.context.kwargs, share=True)
        return block, f"one more {kind}, a copy"
    except BlockError as error:
        return None, str(error).partition(". ")[0].removeprefix(f"module={kind} ")


def runs_of(model: nn.Module, example_input: object) -> dict[str, Run]:
    """Run the model once; name → run of its modules, in the order they finished."""
    names = {module: name for name, module in model.named_modules()}
    runs: dict[str, Run] = {}
    layouts: dict[int, bool] = {}
    kept: list[Tensor | None] = []  # or ids would be used again
    on_channels = False

    def see(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        nonlocal on_channels
        run = runs.setdefault(names[module], Run(module))
        first = args[0] if args else next(iter(kwargs.values()), None)
        run.count += 1
        run.x = first if isinstance(first, Tensor) else None
        run.context = context_of(module, args, kwargs)
        try:
            run.y = tensor_in(output)
        except CandidateError:
            run.y = None
        run.version = 0 if run.y is None else run.y._version
        if isinstance(module, nn.GroupNorm) or type(module).__module__ in _ON_CHANNELS:
            on_channels = True
        elif isinstance(module, _ON_LAST_DIMENSION):
            on_channels = False
        elif run.keeps_shape:
            on_channels = layouts.get(id(run.x), on_channels)
        run.on_channels = on_channels and run.y is not None and run.y.dim() > 2
        layouts[id(run.y)] = on_channels
        kept.extend((run.x, run.y))

    with hooked((module, see) for module in names):
        call(model, moved(example_input, device_of(model)))
    return runs


_ON_CHANNELS = (nn.Conv2d.__module__, nn.BatchNorm2d.__module__, nn.InstanceNorm2d.__module__)
_ON_LAST_DIMENSION = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
