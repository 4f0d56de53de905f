"""A look at the sites of a model: what is there on the first batch, and which blocks fit."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from constrained_growth._data import Weight, batch_weight, batches
from constrained_growth._distributed import everywhere, in_step, several, take_from_first
from constrained_growth._multipliers.anchors import anchors_of
from constrained_growth._multipliers.fitting import check_fit
from constrained_growth._multipliers.grouping import Site
from constrained_growth._sharding import is_sharded, is_spread
from constrained_growth._sites.collector import hooked
from constrained_growth._sites.context import Context, context_of, detached, takes_context
from constrained_growth._sites.model import call, checked_loss, device_of, tensors_of
from constrained_growth._sites.outputs import Which, tensor_at, with_tensor
from constrained_growth.blocks import pinned_parameters
from constrained_growth.candidates.candidate import Candidate
from constrained_growth.errors import CandidateError, DataError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Place:
    """Where a site is.

    Attributes:
        after: Qualified name of the module.
        output: Which tensor of its output; see `Candidate`.
        module: That module.
    """

    after: str
    output: Which
    module: nn.Module


@dataclass(frozen=True)
class _Facts:
    """What a site is like, for the processes that cannot see for themselves.

    Attributes:
        shape, bytes: Of the tensor there on the first batch; the bytes of all its uses.
        dtype: What a block there has to be in.
        overwritten, copied, anchor, shared: As in `Site`.
    """

    shape: tuple[int, ...]
    bytes: int
    dtype: torch.dtype
    overwritten: bool
    copied: bool
    anchor: bool
    shared: bool


@dataclass(frozen=True)
class _Seen:
    """What was at a site at one use of its module.

    Attributes:
        x: A copy of the tensor.
        passed: What the model went on with, a tensor of its own in the graph.
        version: Its version counter when it came out.
        context: What else the module was called with.
        autocast: Whether it ran under autocast.
        foreign: Whether the module gave on a tensor that came from elsewhere.
    """

    x: Tensor
    passed: Tensor
    version: int
    context: Context
    autocast: bool
    foreign: bool


def look_at_sites(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    candidates: Mapping[Place, Sequence[Candidate]],
    group: ProcessGroup | None,
    weight: Weight = None,
) -> tuple[tuple[Site, ...], object]:
    """The sites, the same on all processes, with the blocks that fit there; and the first input.

    Args:
        model: Run once on the first batch, with gradients on (`differentiable`).
        loss_fn: `loss_fn(output, target)`.
        data: `(input, target)` pairs; on some processes there may be none.
        candidates: What could stand where.
        group: The processes that have a shard of the data each.
        weight: How much a batch counts; the first one that does is looked at.

    Raises:
        DataError, CandidateError, BlockError: As `GrowthProblem` says.
    """
    seen: list[list[_Seen]] = [[] for _ in candidates]
    examples: list[object] = []

    def look() -> tuple[object, list[_Facts] | None]:
        layout = [_layout(place, each) for place, every in candidates.items() for each in every]
        counting = (b for b in batches(data, device_of(model)) if batch_weight(weight, *b) > 0)
        counting = (batch for batch, _ in in_step(counting, group)) if sharded else counting
        first = next(counting, None)
        if first is None:
            return layout, None
        examples.append(first[0])
        facts = _probe(model, loss_fn, first, list(candidates), seen)
        if sharded:
            _refuse_reduced(model, candidates, facts)
        return layout, facts

    sharded = is_sharded(model)
    found = everywhere(look, group, collective=sharded)
    if any(layout != found[0][0] for layout, _ in found):
        names = [each.name for every in candidates.values() for each in every]
        raise CandidateError(
            f"candidates={names} are not the same on all processes of the group; give each the "
            "same candidates in the same order."
        )
    facts = next((facts for _, facts in found if facts is not None), None)
    if facts is None:
        raise DataError("data yields no batches; give at least one (input, target) pair.")
    sites = [
        _site(place, fact, _site_device(place.module, model, here), every, model)
        for (place, every), fact, here in zip(candidates.items(), facts, seen, strict=True)
    ]
    if several(group):
        sites = [
            replace(site, blocks={name: copy.deepcopy(b) for name, b in site.blocks.items()})
            for site in sites
        ]
        blocks = [block for site in sites for block in site.blocks.values()]
        take_from_first([t.detach() for block in blocks for t in tensors_of(block)], group)

    def check() -> None:
        for site, here in zip(sites, seen, strict=True):
            for name, block in site.blocks.items():
                for use in here:
                    check_fit(name, block, use.x, use.context)

    everywhere(check, group)
    return tuple(sites), next(iter(examples), None)


def _refuse_reduced(
    model: nn.Module, candidates: Mapping[Place, Sequence[Candidate]], facts: Sequence[_Facts]
) -> None:
    for (place, every), here in zip(candidates.items(), facts, strict=True):
        own = _parameter_dtype(model, here.dtype)
        if here.dtype != own:
            raise CandidateError(
                f'model={type(model).__name__}: the output of "{place.after}" is {here.dtype}, and '
                f"the parameters of the sharded model are {own}: layers cannot be sharded with a "
                "MixedPrecisionPolicy yet; use fully_shard without one, under torch.autocast."
            )
        for candidate in every:
            if any(is_spread(parameter) for parameter in candidate.block.parameters()):
                raise CandidateError(
                    f'candidate "{candidate.name}": its block has sharded parameters of its own (a '
                    "copy of a sharded block, say), which cannot be inserted; make blocks of "
                    "whole tensors."
                )


def _site(
    place: Place,
    facts: _Facts,
    device: torch.device,
    candidates: Sequence[Candidate],
    model: nn.Module,
) -> Site:
    module = place.module
    blocks = {c.name: _brought(c, module, device, facts.dtype, model) for c in candidates}
    pinned = [p for block in blocks.values() for p in pinned_parameters(block).values()]
    return Site(
        after=place.after,
        module=module,
        blocks=blocks,
        unsure=tuple(key for key, block in blocks.items() if not _exact_after(block, module)),
        kinds={key: _kind(block, facts.shape) for key, block in blocks.items()},
        shape=facts.shape,
        device=device,
        bytes=facts.bytes,
        pinned_bytes=sum(parameter.nbytes for parameter in pinned),
        overwritten=facts.overwritten,
        copied=facts.copied,
        anchor=facts.anchor,
        output=place.output,
        shared=facts.shared,
        context=any(takes_context(block) for block in blocks.values()),
    )


def _site_device(module: nn.Module, model: nn.Module, seen: Sequence[_Seen]) -> torch.device:
    found = seen[0].x.device if seen else device_of(module) or device_of(model)
    return found or torch.device("cpu")


def _layout(place: Place, candidate: Candidate) -> tuple[object, ...]:
    """What has to be the same on all processes."""
    shapes = [t.shape for t in tensors_of(candidate.block)]
    return candidate.name, place.after, place.output, shapes


def _probe(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    first: tuple[Any, Any],
    places: Sequence[Place],
    seen: Sequence[list[_Seen]],
) -> list[_Facts]:
    """Run the first batch, note what is `seen` at every site, and what the sites are like."""
    began: dict[nn.Module, int] = {}
    looking = True

    def begin(module: nn.Module, args: object) -> None:
        began[module] = _now()

    def see(index: int, module: nn.Module, args: Any, kwargs: Any, output: object) -> Any:
        place = places[index]
        x = tensor_at(place.after, output, place.output)
        if looking:
            _check_tensor(place.after, x.detach())
        # an identity in the graph makes every site a tensor of its own, also for frozen models
        passed = (x if x.requires_grad else x.detach().requires_grad_()).clone()
        if looking:  # and not in what backward runs again (checkpointing)
            seen[index].append(
                _Seen(
                    x=passed.detach().clone(),
                    passed=passed,
                    version=passed._version,
                    context=detached(context_of(module, args, kwargs)),
                    autocast=torch.is_autocast_enabled(x.device.type),
                    foreign=x.grad_fn is None or x.grad_fn._sequence_nr() < began[module],
                )
            )
        return passed if x is output else with_tensor(output, place.output, passed)

    hooks = [(place.module, functools.partial(see, i)) for i, place in enumerate(places)]
    starts = [module.register_forward_pre_hook(begin) for module in {p.module for p in places}]
    try:
        with hooked(hooks):
            output = call(model, first[0])
            looking = False
            for place, here in zip(places, seen, strict=True):
                _check_seen(place.after, here)
            loss = checked_loss(loss_fn(output, first[1]))
            if not bool(torch.isfinite(loss)):
                raise DataError(
                    f"loss_fn gives {loss.item()} on the first batch; look for NaN or Inf in the "
                    "data, the model's parameters, or the loss."
                )
            passed = [[use.passed for use in here] for here in seen]
            anchors = anchors_of(loss, [place.after for place in places], passed)
    finally:
        for handle in starts:
            handle.remove()
    facts = []
    for index, here in enumerate(seen):
        x = here[0].x
        overwritten = any(use.passed._version != use.version for use in here)
        facts.append(
            _Facts(
                shape=tuple(x.shape),
                bytes=sum(use.x.nbytes for use in here),
                dtype=_parameter_dtype(model, x.dtype) if here[0].autocast else x.dtype,
                overwritten=overwritten,
                copied=overwritten or any(use.foreign for use in here),
                anchor=index in anchors,
                shared=len(here) > 1,
            )
        )
    return facts


def _now() -> int:
    """Where the numbering of autograd's nodes has come to."""
    node = torch.zeros((), requires_grad=True).clone().grad_fn
    return 0 if node is None else node._sequence_nr()


def _parameter_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """What the parameters of the model are in, whatever autocast makes of them on the way."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def _check_tensor(after: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise CandidateError(
            f'after="{after}" returns a {x.dtype} tensor, and a site carries floating-point '
            "numbers; choose another submodule."
        )
    if not torch.is_grad_enabled():
        raise CandidateError(
            f'after="{after}" runs with gradients switched off, so that backward does not pass '
            "it: under torch.no_grad(), or under gradient checkpointing with use_reentrant=True. "
            "Checkpoint with use_reentrant=False, or choose another submodule."
        )
    if not bool(torch.isfinite(x).all()):
        raise DataError(
            f'the output of "{after}" holds NaN or Inf on the first batch; look at the data and '
            "the model's parameters."
        )


def _check_seen(after: str, seen: Sequence[_Seen]) -> None:
    if not seen:
        raise CandidateError(
            f'after="{after}" is never reached in the forward pass; choose another submodule.'
        )


def _brought(
    candidate: Candidate,
    site: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    model: nn.Module,
) -> nn.Module:
    """The candidate's block, or a copy, on a device, in a dtype and in the mode of its site."""
    block = candidate.block
    pinned_parameters(block)
    shares = not set(block.modules()).isdisjoint(model.modules())  # whose hooks are the site's
    training = site.training
    other_mode = any(module.training != training for module in block.modules())
    moved = any(p.device != device or p.dtype != dtype for p in block.parameters())
    if shares or other_mode or moved:
        block = copy.deepcopy(block).to(device=device, dtype=dtype).train(training)
    return block


def _exact_after(block: nn.Module, module: nn.Module) -> bool:
    """Whether a block says that it is the identity on all that a module can give."""
    exact_after = getattr(block, "exact_after", None)
    return callable(exact_after) and bool(exact_after(module))


def _kind(block: nn.Module, shape: tuple[int, ...]) -> Hashable:
    """None: no blocks are processed together."""
    return None
