"""Where could a layer stand, and which one? A sensible answer from watching the model run once."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.activations import TanhLU
from constrained_growth.blocks import (
    CopiedBlock,
    IdentityConv2d,
    IdentityLinear,
    ResidualConv2d,
    ResidualMLP,
    pinned_parameters,
)
from constrained_growth.candidates import Candidate
from constrained_growth.errors import BlockError, CandidateError
from constrained_growth.observation import (
    call,
    device_of,
    differentiable,
    eagerly,
    hooked,
    moved,
    untouched,
)
from constrained_growth.outputs import tensor_in


class Proposals(tuple[Candidate, ...]):
    """Candidates, with what speaks for each and what was passed over. Printed, a table.

    A tuple of candidates in all else: give it to `GrowthProblem` as it is, or pick from it.

    Attributes:
        reasons: Candidate → why this block there.
        skipped: Qualified name of a module that was looked at → why nothing is proposed there.
    """

    reasons: Mapping[str, str]
    skipped: Mapping[str, str]

    def __new__(
        cls,
        candidates: Iterable[Candidate] = (),
        reasons: Mapping[str, str] | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> Proposals:
        """The candidates with their reasons."""
        self = super().__new__(cls, candidates)
        self.reasons, self.skipped = dict(reasons or {}), dict(skipped or {})
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.reasons, self.skipped

    def __str__(self) -> str:
        rows = [("after", "block", "pinned", "why")]
        for candidate in self:
            pinned = sum(p.numel() for p in pinned_parameters(candidate.block).values())
            kind, why = type(candidate.block).__name__, self.reasons.get(candidate.name, "")
            rows.append((candidate.after, kind, f"{pinned:,}", why))
        wide = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{after:{wide[0]}}  {kind:{wide[1]}}  {pinned:>{wide[2]}}  {why}"
            for after, kind, pinned, why in rows
        ]
        if self.skipped:
            lines += ["", "nothing proposed after"]
            longest = max(map(len, self.skipped))
            lines += [f"{name:{longest}}  {why}" for name, why in self.skipped.items()]
        return "\n".join(line.rstrip() for line in lines)


def find_candidates(model: nn.Module, example_input: object) -> Proposals:
    """A sensible set of candidates for a model of any kind, by watching it run once.

    Looks at the modules in the order in which they run, at what repeats and at the shapes that
    flow:

    * After each block of a stack (elements of one class and one shape in an `nn.ModuleList` or
      `nn.Sequential`: the layers of a transformer, the blocks of a ResNet stage) a `CopiedBlock`
      of it, if it can be the identity by zeros at the ends of its branches; else, as after a
      post-norm layer, a residual block. What is inside is then left alone.
    * After an activation module the layer that is exactly the identity there (`IdentityLinear`,
      on images `IdentityConv2d`) if there is one (ReLU, TanhLU), else a residual block.
    * After any other module that keeps the shape of its input and has parameters and children, a
      residual block: `ResidualMLP` over the last dimension, on images `ResidualConv2d`.

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
    with untouched(model), differentiable(), eagerly(), torch.no_grad():
        # which also puts the random state back that the blocks draw from
        runs = _watched(model, example_input)
        candidates, reasons, skipped = _proposed(model, runs)
    if not candidates:
        looked = "".join(f"\n  {name}: {why}" for name, why in skipped.items())
        raise CandidateError(
            f"model={type(model).__name__} has no activation module and no module that keeps the "
            "shape of its input, after which a layer could be proposed; write the candidates by "
            f"hand: cg.Candidate(after='name of a submodule', block=...).{looked}"
        )
    return Proposals(candidates, reasons, skipped)


@dataclass
class _Run:
    """What was seen of one module.

    Attributes:
        module: The module.
        count: How often it ran.
        args, kwargs: What it was called with, last.
        x: The first argument, if it is a tensor.
        y: The tensor in its output; None if there is none.
        version: The version counter of y when it came out.
        on_channels: Whether the second dimension of y counts channels, as after a convolution.
    """

    module: nn.Module
    count: int = 0
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    x: Tensor | None = None
    y: Tensor | None = None
    version: int = 0
    on_channels: bool = False

    @property
    def keeps_shape(self) -> bool:
        return self.x is not None and self.y is not None and self.x.shape == self.y.shape

    @property
    def is_block(self) -> bool:
        has_children = next(self.module.children(), None) is not None
        has_parameters = next(self.module.parameters(), None) is not None
        return self.keeps_shape and has_children and has_parameters


def _watched(model: nn.Module, example_input: object) -> dict[str, _Run]:
    """Run the model once; what was seen of each of its modules, in the order they finished."""
    names = {module: name for name, module in model.named_modules()}
    runs: dict[str, _Run] = {}
    on_channels = [False]

    def see(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        run = runs.setdefault(names[module], _Run(module))
        run.count += 1
        run.args, run.kwargs = args, kwargs
        first = args[0] if args else next(iter(kwargs.values()), None)
        run.x = first if isinstance(first, Tensor) else None
        try:
            run.y = tensor_in(output)
        except CandidateError:
            run.y = None
        run.version = 0 if run.y is None else run.y._version
        if isinstance(module, nn.GroupNorm) or type(module).__module__ in _ON_CHANNELS:
            on_channels[0] = True
        elif isinstance(module, _ON_LAST_DIMENSION):
            on_channels[0] = False
        run.on_channels = on_channels[0] and run.y is not None and run.y.dim() > 2

    with hooked((module, see) for module in names):
        call(model, moved(example_input, device_of(model)))
    return runs


_ON_CHANNELS = (nn.Conv2d.__module__, nn.BatchNorm2d.__module__, nn.InstanceNorm2d.__module__)
_ON_LAST_DIMENSION = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)


def _proposed(
    model: nn.Module, runs: Mapping[str, _Run]
) -> tuple[list[Candidate], dict[str, str], dict[str, str]]:
    """The candidates, candidate → reason, and module → why nothing is proposed after it."""
    last = next(reversed(runs.values())).y  # of the model, or what is inside its wrapper
    stacked = set(_stacked(model, runs))
    skipped: dict[str, str] = {}
    blocks: dict[str, tuple[nn.Module, str]] = {}
    insides: set[str] = set()
    for name in _outermost_first(runs):
        run = runs[name]
        if run.y is not None and run.y is last:
            if name and (name in stacked or _activation(run) is not None):
                skipped[name] = "its output is that of the model"
        elif _is_within(name, insides) or _is_inside_inserted(name, model):
            continue
        else:
            found, why = _proposal(run, in_stack=name in stacked)
            if found is None:
                skipped.update({name: why} if why else {})
                continue
            if name in stacked:
                insides.add(name)
            blocks[name] = found, why
    places: dict[tuple[int, int], str] = {}
    candidates, reasons = [], {}
    for name, run in runs.items():
        if name in blocks and not _is_within(name, insides - {name}):
            block, why = blocks[name]
            earlier = places.setdefault((id(run.y), run.version), name)
            if earlier != name:
                skipped[name] = f'the tensor is the one after "{earlier}"'
                continue
            candidates.append(Candidate(name, block))
            reasons[name] = why
    return candidates, reasons, skipped


def _outermost_first(runs: Mapping[str, _Run]) -> list[str]:
    return sorted((name for name in runs if name), key=lambda name: name.count("."))


def _is_within(name: str, owners: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:i]) in owners for i in range(1, len(parts)))


def _is_inside_inserted(name: str, model: nn.Module) -> bool:
    """Whether a module is a layer inserted earlier, or a part of one."""
    parts = name.split(".")
    owners = (".".join(parts[:i]) for i, part in enumerate(parts) if part == "inserted")
    return any(hasattr(model.get_submodule(owner), "base") for owner in owners)


def _stacked(model: nn.Module, runs: Mapping[str, _Run]) -> Iterator[str]:
    """Names of the blocks that repeat, which are elements of lists of modules."""
    whole = (name for name, run in runs.items() if isinstance(run.module, _INDIVISIBLE))
    yield from (name for name in whole if name and runs[name].is_block)
    for owner, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        found = [f"{owner}.{key}" if owner else key for key, _ in container.named_children()]
        found = [name for name in found if name in runs and runs[name].is_block]
        found = [name for name in found if not isinstance(runs[name].module, _CONTAINERS)]
        classes = Counter(type(runs[name].module) for name in found)
        yield from (name for name in found if classes[type(runs[name].module)] > 1)


_INDIVISIBLE = nn.TransformerEncoderLayer
"""In eval mode it passes its own submodules by, so that no site is inside."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _proposal(run: _Run, *, in_stack: bool) -> tuple[nn.Module | None, str]:
    """The block to propose after one module, and why; or None, and why not (or nothing to say)."""
    activation = _activation(run)
    if not (in_stack or run.is_block or activation is not None):
        return None, ""
    if run.count > 1:
        return None, f"it runs {run.count} times in one pass"
    if run.y is None or run.y.dim() < 2:
        return None, "what comes out is no floating-point tensor of two dimensions or more"
    kind = type(run.module).__name__
    refusal = ""
    if in_stack:
        try:
            with torch.enable_grad():
                copied = CopiedBlock(run.module, args=run.args, kwargs=run.kwargs)
            return copied, f"one more {kind}, a copy of this one"
        except BlockError as error:
            refusal = f"; no copy of {kind}: {error}"
    if run.on_channels and run.y.dim() != 4:
        return None, f"no block here for channels in tensors of {run.y.dim()} dimensions{refusal}"
    width = run.y.shape[1] if run.on_channels else run.y.shape[-1]
    if activation is not None:
        try:
            identity = IdentityConv2d if run.on_channels else IdentityLinear
            why = f"{kind} is the identity on what comes out of it"
            return identity(width, activation), why
        except BlockError:
            pass
    residual: Callable[[Any], nn.Module] = (
        functools.partial(ResidualConv2d, width)
        if run.on_channels
        else functools.partial(ResidualMLP, width, width)
    )
    try:
        why = f"a residual block is the identity after {kind}, as after everything"
        return residual(activation or nn.ReLU()), why + refusal
    except BlockError:  # like Softmax, not elementwise
        return None, f"{kind} is not an elementwise activation"


def _activation(run: _Run) -> nn.Module | None:
    """The module, if it is an activation."""
    is_one = type(run.module).__module__ in _ACTIVATION_HOMES and not run.is_block
    return run.module if is_one and run.keeps_shape else None


_ACTIVATION_HOMES = (nn.ReLU.__module__, TanhLU.__module__)
