"""Propose candidates for any model, from one forward pass of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._activations import TanhLU
from constrained_growth._arguments import instance, positive_int
from constrained_growth._sites.context import alike
from constrained_growth._sites.model import check_can_change, check_has_values, list_of
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth._sites.wrapper import WithInsertedLayer, is_inserted
from constrained_growth.blocks import (
    CopiedBlock,
    IdentityConv2d,
    IdentityLinear,
    ResidualConv2d,
    ResidualMLP,
    pinned_parameters,
)
from constrained_growth.blocks.protocol import moves
from constrained_growth.bookkeeping import Books, open_books
from constrained_growth.candidates.candidate import Candidate, Proposals
from constrained_growth.candidates.run import Run, is_same, runs_of, unwrappable
from constrained_growth.errors import BlockError, CandidateError


def find_candidates(
    model: nn.Module, example_input: object, *, max_parameters: int | None = None
) -> Proposals:
    """Propose candidates for a model of any kind, from one forward pass of it.

    * After each block of a stack (elements of an `nn.ModuleList` or `nn.Sequential` of a class
      that repeats there: the layers of a transformer, the blocks of a ResNet) a `CopiedBlock` of
      it, if zeros at the ends of its branches make it the identity; after a block that changes
      the shape a copy of the next one; else, as after a post-norm layer, a residual block.
      Nothing is proposed inside these blocks.
    * After an activation module the layer that is exactly the identity there (`IdentityLinear`,
      on images `IdentityConv2d`) if there is one (ReLU, TanhLU), else a residual block. So after
      a recurrent module (`nn.LSTM`), on the sequence that it returns.
    * After any other module that keeps the shape of its input and has parameters and children, a
      residual block: `ResidualMLP` over the last dimension, on images `ResidualConv2d`.
    * If all this gives nothing, as in a model whose activations are functions, a residual block
      after each linear layer, convolution and embedding.

    A site is reached exactly once and carries a floating-point tensor of at least two dimensions.
    The output of the model is no site, nor is what only a view or a copy turns into it, nor
    anything inside a layer inserted earlier. A block that would have more parameters than the
    model is narrowed.

    Args:
        model: The model, left as it was.
        example_input: One input as in the data: a tensor, a tuple, or a dict of keyword arguments.
        max_parameters: The most that a block may have. None (default) for as many as the model.

    Returns:
        The candidates, in the order of the forward pass, named after their sites: a tuple that
        prints as a table, with the reasons. Its `skipped` says why nothing is proposed after
        others that were considered, and after layers from which no activation leads to a site.

    Raises:
        CandidateError: Nothing was found, or an argument is wrong.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> found = find_candidates(net, torch.randn(5, 2))
        >>> [candidate.after for candidate in found]
        ['1']
        >>> print(found)
        after  block           parameters  pinned  why
        1      IdentityLinear          20      20  ReLU is the identity on what comes out of it
        <BLANKLINE>
        nothing proposed after
        2  its output is that of the model
    """
    instance("model", model, nn.Module, CandidateError, "an nn.Module")
    check_can_change(model)
    check_has_values(model)
    if max_parameters is None:
        max_parameters = max(1, _size(model))
    positive_int("max_parameters", max_parameters, CandidateError)
    with untouched(model), differentiable():
        # each time from the same random state
        with untouched(model, first=True):
            runs = runs_of(model, example_input)
        search = _Search(model, open_books(model), runs, last=next(reversed(runs.values())).y)
        with untouched(model), torch.no_grad():
            _propose_after_stacks(search)
            _propose_after_modules(search)
            _fit(search, max_parameters)
            if all(block is None for block, _ in search.proposed.values()):
                _propose_after_leaves(search)
                _fit(search, max_parameters)
        for name in search.books.uncounted(search.proposed):
            if search.proposed[name][0] is not None:
                search.proposed[name] = None, "the class of the model could not load a layer here"
        _check_class(search, example_input)
        _explain_leaves(search)
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

Copied = tuple[CopiedBlock | None, str]


@dataclass(frozen=True)
class _Search:
    """The state of the search."""

    model: nn.Module
    books: Books
    runs: Mapping[str, Run]  # of its modules, in the order they finished
    last: Tensor | None  # the tensor in the output of the model
    proposed: dict[str, Proposed] = field(default_factory=dict)  # by site
    closed: set[str] = field(default_factory=set)  # blocks of stacks: nothing is proposed inside
    zeros: dict[Any, Tensor] = field(default_factory=dict)  # of copies, by shape, dtype and device

    def is_open(self, name: str) -> bool:
        """Whether a module is neither inside a block of a stack, nor has one inside it."""
        inside = _is_within(name, self.closed)
        around = any(_is_within(one, {name}) for one in self.closed)
        return not (inside or around or is_inserted(name, self.model))


def _propose_after_stacks(search: _Search) -> None:
    """Copies of blocks, innermost stacks first; else a copy of the next, or a residual block."""
    stacked = dict(_stacked(search.model, search.runs))
    inside_out = sorted(stacked, key=lambda name: -name.count("."))
    copies: dict[str, Copied] = {}
    for name in inside_out:
        if search.is_open(name):
            copies[name] = _copy_of(search.runs[name], search.zeros)
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
        search.proposed[name] = (
            (None, why) if why else _after_block(search, name, stacked[name], copies[name])
        )


def _after_block(search: _Search, name: str, following: str, copied: Copied) -> Proposed:
    """After a block of a stack: a copy of it (`copied`), or of the next, or a residual block."""
    run, after = search.runs[name], search.runs.get(following) if following else None
    block, why = copied
    refusal = None if block is None else search.books.refusal(name, block.module)
    if run.y is None or (block is not None and refusal is None):
        return block, why
    if after is not None and after.x is not None and after.x.shape == run.y.shape:
        if not alike(run.context, after.context):
            return None, "the next is called with other arguments, which a copy of it would need"
        block, reason = _copy_of(after, search.zeros)
        if block is not None and search.books.refusal(name, block.module) is None:
            return block, f"{reason} of the next"
    if refusal is not None:
        return None, refusal
    block, reason = _residual(run, nn.ReLU())
    kind = type(run.module).__name__
    return block, reason if block is None else f"{reason}; no copy, as {kind} {why}"


def _propose_after_modules(search: _Search) -> None:
    """Layers after activations, and after other modules that keep the shape."""
    for name, run in search.runs.items():
        activation = _activation(run)
        is_block = isinstance(run.module, nn.RNNBase) or (run.keeps_shape and run.is_composite)
        is_open = name not in search.closed and search.is_open(name)
        if not name or not (activation or is_block) or not is_open:
            continue
        why = _why_not(search, run)
        if why:
            search.proposed[name] = None, why
        elif activation:
            search.proposed[name] = _after_activation(run, activation)
        else:
            search.proposed[name] = _residual(run, nn.ReLU())


def _propose_after_leaves(search: _Search) -> None:
    """Residual blocks after linear layers, convolutions, embeddings: all that have a matrix."""
    for name, run in search.runs.items():
        leaf = _is_leaf(run.module) and any(p.dim() > 1 for p in run.module.parameters())
        if leaf and name and search.is_open(name) and not _why_not(search, run):
            search.proposed[name] = _residual(run, nn.ReLU())


def _is_leaf(module: nn.Module) -> bool:
    """Whether it has parameters and no children."""
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _fit(search: _Search, most: int) -> None:
    """Narrow blocks of too many parameters; drop copies that move what comes out of their site."""
    for name, (block, _) in search.proposed.items():
        run = search.runs[name]
        if block is None or run.y is None:
            continue
        if _size(block) > most:
            search.proposed[name] = _narrowed(block, run, most)
        elif isinstance(block, CopiedBlock) and run.y._version == run.version:  # as it came out
            fits = False
            with suppress(Exception):
                fits = bool(moves(block, run.y.detach(), run.context) <= 1)
            if not fits:
                search.proposed[name] = None, "a copy is not the identity on what comes out of it"


def _narrowed(block: nn.Module, run: Run, most: int) -> Proposed:
    """A residual block in the place of one with too many parameters."""
    limit = f"{type(block).__name__} has {_size(block):,} parameters, more than {most:,}"
    kind, width = ResidualConv2d if run.on_channels else ResidualMLP, _width(run)
    activation = getattr(block, "activation", nn.ReLU())
    narrow, wider = (_size(kind(width, hidden=h, activation=activation)) for h in (1, 2))
    hidden = 1 + (most - narrow) // (wider - narrow)
    if isinstance(block, CopiedBlock) or hidden < 1:
        return None, limit
    why = f"a residual block narrowed to {hidden}, as {limit}"
    return kind(width, hidden=hidden, activation=activation), why


def _size(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def _check_class(search: _Search, example_input: object) -> None:
    """Drop sites of which the program asks the class, which a layer around them would hide."""
    around = [
        name
        for name, (block, _) in search.proposed.items()
        if block is not None
        and not (isinstance(block, CopiedBlock) and list_of(search.model, search.runs[name].module))
    ]
    why = "the output changes with another module in its place (forward() may ask for its class)"
    for name in unwrappable(search.model, example_input, around, search.last):
        search.proposed[name] = None, why


def _explain_leaves(search: _Search) -> None:
    """Say of all modules that have parameters of their own why nothing is proposed after them."""
    sites = {id(search.runs[n].y) for n, (block, _) in search.proposed.items() if block is not None}
    for run in reversed(list(search.runs.values())):
        vectors = all(p.dim() < 2 for p in run.module.parameters())
        if id(run.y) in sites and vectors and not run.is_composite:
            sites.add(id(run.x))  # through activations, normalisations, dropout
    for name, module in search.model.named_modules():
        known = name in search.proposed or _is_within(name, {*search.proposed, *search.closed})
        if not (name and _is_leaf(module)) or known or is_inserted(name, search.model):
            continue
        run = search.runs.get(name)
        if run is None:
            search.proposed[name] = None, "the forward pass does not call it"
        elif id(run.y) not in sites:
            why = _why_not(search, run) or "other sites come first, as no activation module follows"
            search.proposed[name] = None, why


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
            loads = search.books.loads(name, block)
            reasons[name] = why if loads else f"{why}; its class does not load it: use cg.replay"
    order = {name: place for place, name in enumerate(search.runs)}
    skipped = dict(sorted(skipped.items(), key=lambda item: order.get(item[0], len(order))))
    return Proposals(candidates, reasons, skipped)


def _why_not(search: _Search, run: Run) -> str:
    """Why a module cannot be a site; "" if it can."""
    if run.y is not None and search.last is not None and is_same(run.y, search.last):
        return "its output is that of the model"
    if run.count > 1:
        return f"it runs {run.count} times in one pass"
    if run.y is None or run.y.dim() < 2:
        return "its output is no floating-point tensor of two or more dimensions"
    if not run.y.numel():
        return "its output is empty"
    if not run.differentiable:
        return "it runs with gradients switched off, or in a transform of torch.func"
    if run.module._backward_pre_hooks:
        return "it has a full backward pre-hook, which would not act on a layer there"
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
    listed = [name for names in lists for name in names]
    stacked = {name for name in listed if type(runs[name].module) in kinds}
    others = [name for name in listed if name not in stacked and not _is_within(name, stacked)]
    across = Counter(type(runs[name].module) for name in others)  # stages of one block each
    kinds |= {kind for kind, count in across.items() if count > 1}
    for names in lists:
        for name, following in zip(names, [*names, ""][1:], strict=True):
            if type(runs[name].module) in kinds:
                yield name, following
    whole = (name for name, run in runs.items() if isinstance(run.module, _INDIVISIBLE))
    yield from ((name, "") for name in whole if name and name not in listed)


_INDIVISIBLE = nn.TransformerEncoderLayer
"""In eval mode its forward bypasses its own submodules, so no site is inside."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, WithInsertedLayer)


def _after_activation(run: Run, activation: nn.Module) -> Proposed:
    """The layer that is the identity after an activation, or a residual block with it."""
    kind = type(activation).__name__
    identity = IdentityConv2d if run.on_channels else IdentityLinear
    if not run.on_channels or (run.y is not None and run.y.dim() == 4):
        with suppress(BlockError):
            block = identity(_width(run), activation)
            return block, f"{kind} is the identity on what comes out of it"
    with suppress(BlockError):
        return _residual(run, activation)
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


def _copy_of(run: Run, zeros: dict[Any, Tensor]) -> Copied:
    """A copy of a module that is the identity, and why; or None, and why there is none.

    The pins of copies of one shape share their memory. They stay dense: a kernel that is given
    their address may read all of it.
    """
    kind = type(run.module).__name__
    if run.x is None or not run.keeps_shape:
        return None, "changes the shape"
    try:
        with torch.enable_grad():
            args = (run.x.detach(), *run.context.args)
            block = CopiedBlock(run.module, args=args, kwargs=run.context.kwargs, share=True)
    except BlockError as error:
        return None, str(error).partition(". ")[0].removeprefix(f"module={kind} ")
    for pin in pinned_parameters(block).values():
        key = pin.shape, pin.dtype, pin.device
        if type(pin) is nn.Parameter:
            pin.data = zeros.setdefault(key, pin.data)
    return block, f"one more {kind}, a copy"
