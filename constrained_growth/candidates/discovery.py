"""Where could a layer stand, and which one? A sensible answer from watching the model run once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._activations import TanhLU
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.blocks import (
    CopiedBlock,
    IdentityConv2d,
    IdentityLinear,
    ResidualConv2d,
    ResidualMLP,
)
from constrained_growth.candidates.candidate import Candidate
from constrained_growth.candidates.proposals import Proposals
from constrained_growth.candidates.runs import Run, follows, runs_of
from constrained_growth.errors import BlockError, CandidateError


def find_candidates(model: nn.Module, example_input: object) -> Proposals:
    """A sensible set of candidates for a model of any kind, by watching it run once.

    Looks at the modules in the order in which they run, at what repeats and at the shapes that
    flow:

    * After each block of a stack (elements of an `nn.ModuleList` or `nn.Sequential` of a class
      that repeats there: the layers of a transformer, the blocks of a ResNet) a `CopiedBlock` of
      it, if it can be the identity by zeros at the ends of its branches. After one that changes
      the shape it is a copy of the next; where neither can be, as after a post-norm layer, a
      residual block. What is inside is then left alone.
    * After an activation module the layer that is exactly the identity there (`IdentityLinear`,
      on images `IdentityConv2d`) if there is one (ReLU, TanhLU), else a residual block.
    * After any other module that keeps the shape of its input and has parameters and children, a
      residual block: `ResidualMLP` over the last dimension, on images `ResidualConv2d`.
    * If all this gives nothing, as where activations are functions and not modules, a residual
      block after each linear layer and convolution.

    Only sites that are reached once and carry floating-point tensors of at least two dimensions
    count, each tensor once; the output of the model does not, nor what is inside a layer inserted
    earlier. The tensor of a tuple, dict or dataclass is its first.

    Args:
        model: The model, left as it was.
        example_input: One input as in the data: a tensor, a tuple, or a dict of keyword arguments.

    Returns:
        The candidates, in the order of the forward pass, named after their sites; a tuple, and
        `print` shows it as a table, with what was passed over and why.

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
        # which also puts the random state back that the blocks draw from
        runs = runs_of(model, example_input)
        search = _Search(model, runs, last=next(reversed(runs.values())).y)
        _propose_after_stacks(search)
        _propose_after_modules(search)
        if not search.found:
            _propose_after_leaves(search)
        proposals = _without_repetition(search)
    if not proposals:
        looked = "".join(f"\n  {name}: {why}" for name, why in proposals.skipped.items())
        raise CandidateError(
            f"model={type(model).__name__} has no block, activation module or inner layer after "
            "which a layer could be proposed; write the candidates by hand: "
            f"cg.Candidate(after='name of a submodule', block=...).{looked}"
        )
    return proposals


@dataclass(frozen=True)
class _Search:
    """What is known so far.

    Attributes:
        model: The model.
        runs: What was seen of its modules, in the order they finished.
        last: The tensor in the output of the model (or of what is inside its wrapper).
        found: Site → block and why.
        skipped: Module → why nothing is proposed after it.
        closed: Blocks of stacks that are dealt with: nothing is proposed inside.
    """

    model: nn.Module
    runs: Mapping[str, Run]
    last: Tensor | None
    found: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)

    def is_open(self, name: str) -> bool:
        """Whether a module is neither inside a block of a stack, nor has one inside it."""
        inside = _is_within(name, self.closed)
        around = any(_is_within(one, {name}) for one in self.closed)
        return not (inside or around or _is_inside_inserted(name, self.model))

    def settle(self, name: str, block: nn.Module | None, why: str) -> None:
        """Note what is proposed after a module, or why nothing is, if there is something to say."""
        if block is not None:
            self.found[name] = block, why
        elif why:
            self.skipped[name] = why


def _propose_after_stacks(search: _Search) -> None:
    """Copies of blocks, from the inside out; where a block has none, the next, or a residual."""
    stacked = dict(_stacked(search.model, search.runs))
    inside_out = sorted(stacked, key=lambda name: -name.count("."))
    copies: dict[str, tuple[nn.Module | None, str]] = {}
    for name in inside_out:
        if search.is_open(name):
            copies[name] = _copy_of(search.runs[name])
            if copies[name][0] is not None:
                search.closed.add(name)
    kinds = {type(search.runs[name].module) for name in search.closed}
    inside_out.sort(key=lambda name: type(search.runs[name].module) not in kinds)  # stable
    for name in inside_out:
        run = search.runs[name]
        if name not in search.closed and not search.is_open(name):
            continue
        search.closed.add(name)
        why = _why_not(search, run)
        if why:
            search.skipped[name] = why
            continue
        block, why = copies[name]
        following = search.runs.get(stacked[name])
        if block is None and following is not None and follows(following, run):
            block, reason = _copy_of(following)
            why = f"{reason} of the next" if block is not None else why
        if block is None:
            block, reason = _residual(run, nn.ReLU())
            kind = type(run.module).__name__
            why = f"{reason}; no copy, as {kind} {why}" if block is not None else reason
        search.settle(name, block, why)


def _propose_after_modules(search: _Search) -> None:
    """What stands best after activations, and after other modules that keep the shape."""
    for name, run in search.runs.items():
        activation = _activation(run)
        is_block = run.keeps_shape and run.is_composite
        if not name or not (activation or is_block) or not search.is_open(name):
            continue
        if name in search.closed:
            continue
        why = _why_not(search, run)
        if why:
            search.skipped.update({name: why} if activation or run.y is not search.last else {})
        elif activation is None:
            search.settle(name, *_residual(run, nn.ReLU()))
        else:
            search.settle(name, *_after_activation(run, activation))


def _propose_after_leaves(search: _Search) -> None:
    """Residual blocks after linear layers and convolutions."""
    for name, run in search.runs.items():
        leaf = isinstance(run.module, nn.Linear | nn.Conv2d)
        if leaf and name and search.is_open(name) and not _why_not(search, run):
            search.settle(name, *_residual(run, nn.ReLU()))


def _without_repetition(search: _Search) -> Proposals:
    """The candidates in the order of the pass, each tensor once."""
    places: dict[tuple[int, int], str] = {}
    candidates, reasons, skipped = [], {}, dict(search.skipped)
    for name, run in search.runs.items():
        if name in search.found:
            earlier = places.setdefault((id(run.y), run.version), name)
            if earlier != name:
                skipped[name] = f'the tensor is the one after "{earlier}"'
                continue
            block, reasons[name] = search.found[name]
            candidates.append(Candidate(name, block))
    return Proposals(candidates, reasons, skipped)


def _why_not(search: _Search, run: Run) -> str:
    """Why a module can be no site, or nothing."""
    if run.y is not None and run.y is search.last:
        return "its output is that of the model"
    if run.count > 1:
        return f"it runs {run.count} times in one pass"
    if run.y is None or run.y.dim() < 2:
        return "what comes out is no floating-point tensor of two dimensions or more"
    return ""


def _stacked(model: nn.Module, runs: Mapping[str, Run]) -> Iterator[tuple[str, str]]:
    """Names of the blocks that repeat, each with that of the next element of its list, or ""."""
    lists = [*_lists(model, runs)]
    kinds = {kind for names in lists for kind, count in _kinds(runs, names).items() if count > 1}
    for names in lists:
        for name, following in zip(names, [*names, ""][1:], strict=True):
            if type(runs[name].module) in kinds:
                yield name, following
    listed = {name for names in lists for name in names}
    whole = (name for name, run in runs.items() if isinstance(run.module, _INDIVISIBLE))
    yield from ((name, "") for name in whole if name and name not in listed)


def _kinds(runs: Mapping[str, Run], names: Iterable[str]) -> Counter[type]:
    return Counter(type(runs[name].module) for name in names)


def _lists(model: nn.Module, runs: Mapping[str, Run]) -> Iterator[list[str]]:
    """The elements of each list of modules that have parts and parameters and ran."""
    for owner, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            names = [f"{owner}.{key}" if owner else key for key, _ in container.named_children()]
            ran = [name for name in names if name in runs and runs[name].is_composite]
            yield [name for name in ran if not isinstance(runs[name].module, _CONTAINERS)]


_INDIVISIBLE = nn.TransformerEncoderLayer
"""In eval mode it passes its own submodules by, so that no site is inside."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _copy_of(run: Run) -> tuple[nn.Module | None, str]:
    """A copy of a block that does nothing, and why; or None, and why there is none."""
    kind = type(run.module).__name__
    if not run.keeps_shape:
        return None, "changes the shape"
    try:
        with torch.enable_grad():
            args = (run.x, *run.context.args)
            block = CopiedBlock(run.module, args=args, kwargs=run.context.kwargs)
        return block, f"one more {kind}, a copy"
    except BlockError as error:
        return None, str(error).partition(". ")[0].removeprefix(f"module={kind} ")


def _after_activation(run: Run, activation: nn.Module) -> tuple[nn.Module | None, str]:
    """The layer that is the identity after an activation, or a residual block with it."""
    kind = type(activation).__name__
    identity = IdentityConv2d if run.on_channels else IdentityLinear
    if not run.on_channels or (run.y is not None and run.y.dim() == 4):
        try:
            return identity(
                _width(run), activation
            ), f"{kind} is the identity on what comes out of it"
        except BlockError:
            pass
    try:
        return _residual(run, activation)
    except BlockError:  # like Softmax, not elementwise
        return None, f"{kind} is not an elementwise activation"


def _residual(run: Run, activation: nn.Module) -> tuple[nn.Module | None, str]:
    """A residual block after a module, and why; or None, and why there is none."""
    assert run.y is not None
    if run.on_channels and run.y.dim() != 4:
        return None, f"no block here for channels in tensors of {run.y.dim()} dimensions"
    width = _width(run)
    make: Callable[[Any], nn.Module] = (
        functools.partial(ResidualConv2d, width)
        if run.on_channels
        else functools.partial(ResidualMLP, width, width)
    )
    return make(activation), "a residual block, the identity after everything"


def _width(run: Run) -> int:
    assert run.y is not None
    return run.y.shape[1] if run.on_channels else run.y.shape[-1]


def _activation(run: Run) -> nn.Module | None:
    """The module, if it is an activation."""
    is_one = type(run.module).__module__ in _ACTIVATION_HOMES and not run.is_composite
    return run.module if is_one and run.keeps_shape else None


_ACTIVATION_HOMES = (nn.ReLU.__module__, TanhLU.__module__)


def _is_within(name: str, owners: Iterable[str]) -> bool:
    return any(name.startswith(f"{owner}.") for owner in owners)


def _is_inside_inserted(name: str, model: nn.Module) -> bool:
    """Whether a module is a layer inserted earlier, or a part of one."""
    parts = name.split(".")
    owners = (".".join(parts[:i]) for i, part in enumerate(parts) if part == "inserted")
    return any(hasattr(model.get_submodule(owner), "base") for owner in owners)
