"""What the first batch tells: what is at each site, which blocks fit, and which way to λ is right.

The model runs twice on the first batch of the data: once as it is, watched at its sites, and once
with the blocks standing there at their pins. The first gives λ in closed form, the second in the
graph (by autograd through the blocks, right for every loss). Where both agree the first, which is
cheaper, serves for all the data; where they do not, the second. That the *loss* is the same both
times is the check that no block moves it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from constrained_growth._data import Weight, batch_size, batch_weight, batches
from constrained_growth._distributed import everywhere, in_step, several, take_from_first
from constrained_growth._multipliers.accumulator import Estimate
from constrained_growth._multipliers.fit import check_fit
from constrained_growth._multipliers.measure import Pass
from constrained_growth._sharding import is_sharded, is_spread
from constrained_growth._sites.collector import Collector, Use, transformed
from constrained_growth._sites.context import Context, detached, takes_context
from constrained_growth._sites.model import call, checked_loss, device_of, tensors_of
from constrained_growth._sites.outputs import Which
from constrained_growth._sites.site import Site
from constrained_growth._sites.untouched import untouched
from constrained_growth.blocks import pinned_parameters
from constrained_growth.candidates.candidate import Candidate
from constrained_growth.errors import BlockError, CandidateError, DataError
from constrained_growth.solution import Method

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
    """What a site is like, for the processes that have no data to see for themselves.

    Attributes:
        dtype: What a block there has to be in.
        overwritten: As in `Site`.
    """

    dtype: torch.dtype
    overwritten: bool


@dataclass(frozen=True)
class _FirstBatch:
    """The first batch, and what was seen as the model ran on it.

    Attributes:
        input, target, weight: Of the batch.
        loss: Its loss.
        uses: For each site what it brought there, on which the loss depends.
        seen: For each site all that was there, δ not being known.
    """

    input: Any
    target: Any
    weight: float
    loss: float
    uses: list[list[Use]]
    seen: list[list[Use]]


def look_at_sites(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    candidates: Mapping[Place, Sequence[Candidate]],
    group: ProcessGroup | None,
    weight: Weight = None,
) -> tuple[tuple[Site, ...], object, Method]:
    """The sites, the same on all processes, with the blocks that fit there; and the first input.

    Args:
        model: Run on the first batch, with gradients on (`differentiable`).
        loss_fn: `loss_fn(output, target)`.
        data: `(input, target)` pairs; on some processes there may be none.
        candidates: What could stand where.
        group: The processes that have a shard of the data each.
        weight: How much a batch counts; the first one that does is looked at.

    Returns:
        The sites, the first input (None without data here), and the way to λ.

    Raises:
        DataError, CandidateError, BlockError: As `GrowthProblem` says.
    """
    sharded = is_sharded(model)
    firsts: list[_FirstBatch] = []

    def look() -> tuple[object, list[_Facts] | None]:
        for place in candidates:
            _check_hooks(place)
        layout = [_layout(place, each) for place, every in candidates.items() for each in every]
        weighed = ((*b, batch_weight(weight, *b)) for b in batches(data, device_of(model)))
        counting = (batch for batch in weighed if batch[2] > 0)
        counting = (batch for batch, _ in in_step(counting, group)) if sharded else counting
        batch = next(counting, None)
        if batch is None:
            return layout, None
        first, facts = _run(model, loss_fn, batch, list(candidates))
        firsts.append(first)
        if sharded:
            _refuse_reduced(model, candidates, facts)
        return layout, facts

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
    first = firsts[0] if firsts else None
    sites = [
        _site(place, fact, _device(place.module, model, first, index), every, model)
        for index, ((place, every), fact) in enumerate(zip(candidates.items(), facts, strict=True))
    ]
    if several(group):
        sites = [
            replace(site, blocks={name: copy.deepcopy(b) for name, b in site.blocks.items()})
            for site in sites
        ]
        blocks = [block for site in sites for block in site.blocks.values()]
        take_from_first([t.detach() for block in blocks for t in tensors_of(block)], group)

    def check() -> None:
        for site, here in zip(sites, first.seen if first else [[] for _ in sites], strict=True):
            for name, block in site.blocks.items():
                for use in here:
                    check_fit(name, block, use.x, use.context)

    def compare() -> bool:
        return first is None or _closed_form_holds(model, loss_fn, sites, first)

    everywhere(check, group)
    holds = all(everywhere(compare, group, collective=sharded))
    method = Method.CLOSED_FORM if holds else Method.IN_GRAPH
    return tuple(sites), None if first is None else first.input, method


def _run(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: tuple[Any, Any, float],
    places: Sequence[Place],
) -> tuple[_FirstBatch, list[_Facts]]:
    """Run the model on the first batch, watched at its sites, all of which get copies."""
    cpu = torch.device("cpu")
    # copies, so that in-place changes of what is handed on show, and x is what it was
    sites = [Site(p.after, p.module, p.output, {}, (), cpu, True, True) for p in places]
    dtypes: dict[str, torch.dtype] = {}
    seen: list[list[Use]] = [[] for _ in places]  # δ still to come
    versions: list[list[tuple[Tensor, int]]] = [[] for _ in places]
    originals: list[tuple[Tensor, int]] = []
    uses: list[list[Use]] = [[] for _ in places]
    reached: set[int] = set()

    def inspect(index: int, x: Tensor, context: Context, alias: Tensor | None) -> None:
        after = places[index].after
        reached.add(index)
        if transformed(x):
            return
        _check_tensor(after, x.detach())
        if alias is None:
            return
        autocast = torch.is_autocast_enabled(x.device.type)
        dtypes[after] = _parameter_dtype(model, x.dtype) if autocast else x.dtype
        seen[index].append(Use(x.detach(), x.detach(), detached(context)))
        versions[index].append((alias, alias._version))
        originals.append((x.detach(), x._version))

    def take(index: int, here: list[Use], _: object) -> None:
        uses[index] = here

    collector = Collector(sites, inspect)
    input, target, weight = batch
    with untouched(model), collector.watching():
        collector.begin(take)
        loss = checked_loss(loss_fn(call(model, input), target))
        for index, place in enumerate(places):
            _check_reached(place.after, index in reached)
        _check_finite(loss)
        changed = [any(a._version != v for a, v in here) for here in versions]
        originals_changed = any(x._version != version for x, version in originals)
        for place, here in zip(places, seen, strict=True):
            _check_differentiable(place.after, bool(here))
        _refuse_reentrant(loss)
        if loss.requires_grad:
            collector.backward(loss)
    first = _FirstBatch(input, target, weight, float(loss.detach()), uses, seen)
    if originals_changed or any(changed):
        _refuse_kept_and_overwritten(model, loss_fn, first, places, changed)
    facts = [_Facts(dtypes[p.after], flag) for p, flag in zip(places, changed, strict=True)]
    return first, facts


def _loss_without_hooks(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], first: _FirstBatch
) -> float:
    with untouched(model):
        return float(checked_loss(loss_fn(call(model, first.input), first.target)).detach())


def _refuse_kept_and_overwritten(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    first: _FirstBatch,
    places: Sequence[Place],
    changed: Sequence[bool],
) -> None:
    """Refuse sites whose tensor is changed in place, the changed one being read elsewhere too.

    A layer there would have an output of its own, so that the other reader no longer sees the
    change, and the function would move.
    """
    plain = _loss_without_hooks(model, loss_fn, first)
    if abs(plain - first.loss) <= _allowed_in_loss(model, first):
        return
    names = [place.after for place, flag in zip(places, changed, strict=True) if flag]
    raise CandidateError(
        f"after={names or [place.after for place in places]}: the model changes the tensor there "
        "in place, and something that keeps the tensor itself (a hook, an attribute, a second "
        f"output) reads it changed: with a layer there the loss would move from {plain:.6g} to "
        f"{first.loss:.6g}. Choose another submodule, or let the model change a copy."
    )


def _closed_form_holds(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    sites: Sequence[Site],
    first: _FirstBatch,
) -> bool:
    """Whether λ of the first batch in closed form is what autograd gives through the blocks.

    Raises:
        CandidateError: The loss does not depend on a site.
        BlockError: The blocks move the loss.
    """
    closed = Pass(model, loss_fn, sites, Method.CLOSED_FORM, gradients=False)
    in_graph = Pass(model, loss_fn, sites, Method.IN_GRAPH, gradients=False)
    closed.accumulate(first.uses, batch_size(first.input, first.target), 1.0)
    with untouched(model), in_graph.watching():
        loss = float(in_graph.add(first.input, first.target, 1.0))
    epsilon = _epsilon(model, sites)
    if not abs(loss - first.loss) <= _allowed_in_loss(model, first, epsilon):
        again = _loss_without_hooks(model, loss_fn, first)
        if abs(again - first.loss) <= _allowed_in_loss(model, first, epsilon):
            _refuse_moving_loss(sites, first.loss, loss)
        return False  # the model is not a function of its input: nothing can be compared
    found, exact = closed.estimates(), in_graph.estimates()
    holds = True
    for index, site in enumerate(sites):
        scale = sum(
            float(_norm(use.delta)) * (float(_norm(use.x)) + math.sqrt(use.x.numel()))
            for use in first.uses[index]
        )
        reached = bool(first.uses[index])
        for name in site.blocks:
            reached = reached or name in in_graph.reached
            holds = holds and _agree(found[name], exact[name], scale, epsilon)
        if not reached:
            raise CandidateError(
                f'after="{site.after}": the loss does not depend on the output of this module, '
                "so no layer there could change it; choose another submodule."
            )
    return holds


def _agree(found: Estimate, true: Estimate, scale: float, epsilon: float) -> bool:
    """Whether two multipliers are the same up to rounding.

    The sums are in other orders, which costs ε of the summands; and both rest on a δ that was
    rounded. A difference that is larger by chance makes λ dearer, not wrong.
    """
    pairs = [(found.multiplier[key], value) for key, value in true.multiplier.items()]
    difference = math.hypot(*(float(_norm(one - other)) for one, other in pairs))
    size = math.hypot(*(float(_norm(other)) for _, other in pairs))
    return not difference > math.sqrt(epsilon) / 3 * size + 3 * epsilon * scale


def _norm(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _epsilon(model: nn.Module, sites: Sequence[Site]) -> float:
    """The coarsest machine precision that the numbers went through."""
    parameters = [p for site in sites for block in site.blocks.values() for p in block.parameters()]
    parameters += [p for p in model.parameters() if p.is_floating_point()]
    kinds = {p.dtype for p in parameters}
    kinds |= {
        torch.get_autocast_dtype(device)
        for device in {p.device.type for p in parameters}
        if torch.is_autocast_enabled(device)
    }
    rough = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}  # of products, in float32
    products = rough[torch.get_float32_matmul_precision()] if torch.float32 in kinds else 0.0
    return max([products, *(torch.finfo(kind).eps for kind in kinds)])


def _allowed_in_loss(model: nn.Module, first: _FirstBatch, epsilon: float | None = None) -> float:
    """By how much rounding at the sites may move the loss, amplified by a deep model."""
    epsilon = _epsilon(model, ()) if epsilon is None else epsilon
    slopes = [float(_norm(use.delta)) * float(_norm(use.x)) for here in first.uses for use in here]
    return 10 * math.sqrt(epsilon) * max([abs(first.loss), *slopes])


def _refuse_moving_loss(sites: Sequence[Site], before: float, after: float) -> None:
    names = [name for site in sites for name in site.blocks]
    raise BlockError(
        f"candidates={names}: with their blocks standing at their pins the loss of the first batch "
        f"is {after:.6g} instead of {before:.6g}. One of them is not the identity as it is called "
        "there, or something else than the model reads the tensor at its site; make a problem with "
        "each alone to see which."
    )


def _check_finite(loss: Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise DataError(
            f"loss_fn gives {loss.item()} on the first batch; look for NaN or Inf in the "
            "data, the model's parameters, or the loss."
        )


def _check_reached(after: str, reached: bool) -> None:
    if not reached:
        raise CandidateError(
            f'after="{after}" is never reached in the forward pass; choose another submodule.'
        )


def _check_differentiable(after: str, seen: bool) -> None:
    if not seen:
        raise CandidateError(
            f'after="{after}" runs with gradients switched off, so that backward does not pass '
            "it: under torch.no_grad(), or under gradient checkpointing with use_reentrant=True; "
            "or it runs only inside a transform of torch.func, such as vmap. "
            "Checkpoint with use_reentrant=False, or choose another submodule."
        )


def _check_hooks(place: Place) -> None:
    if place.module._backward_pre_hooks:
        raise CandidateError(
            f'after="{place.after}" has a full backward pre-hook. It may change the gradient that '
            "comes out of a layer there, and not the gradient of that layer's own parameters; "
            "remove the hook, or choose another submodule."
        )


def _check_tensor(after: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise CandidateError(
            f'after="{after}" returns a {x.dtype} tensor, and a site carries floating-point '
            "numbers; choose another submodule."
        )
    if not bool(torch.isfinite(x).all()):
        raise DataError(
            f'the output of "{after}" holds NaN or Inf on the first batch; look at the data and '
            "the model's parameters."
        )


def _refuse_reentrant(loss: Tensor) -> None:
    """Refuse a graph with a part that was checkpointed in the way that takes no `autograd.grad`."""
    nodes, known = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise CandidateError(
                "model: a part of it is checkpointed with use_reentrant=True, through which "
                "PyTorch gives no gradients with respect to tensors on the way; use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        nodes += [following for following, _ in node.next_functions]


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


def _layout(place: Place, candidate: Candidate) -> tuple[object, ...]:
    """What has to be the same on all processes."""
    shapes = [t.shape for t in tensors_of(candidate.block)]
    return candidate.name, place.after, place.output, shapes


def _site(
    place: Place,
    facts: _Facts,
    device: torch.device,
    candidates: Sequence[Candidate],
    model: nn.Module,
) -> Site:
    module = place.module
    blocks = {c.name: _brought(c, module, device, facts.dtype, model) for c in candidates}
    return Site(
        after=place.after,
        module=module,
        output=place.output,
        blocks=blocks,
        conditional=tuple(key for key, block in blocks.items() if not _exact_after(block, module)),
        device=device,
        overwritten=facts.overwritten,
        needs_context=any(takes_context(block) for block in blocks.values()),
    )


def _device(
    module: nn.Module, model: nn.Module, first: _FirstBatch | None, index: int
) -> torch.device:
    found = first.seen[index][0].x.device if first else device_of(module) or device_of(model)
    return found or torch.device("cpu")


def _parameter_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """What the parameters of the model are in, whatever autocast makes of them on the way."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


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
