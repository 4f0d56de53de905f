"""What the first batch tells: what is at each site, and which blocks fit there.

1. The model runs with its sites watched, on the first batches until each site has been passed. What
   would make λ another network's than that of the inserted layer is refused here.
2. The blocks are brought to the device, precision and mode of their sites, and tried on them.
3. λ of these batches in closed form is compared with λ in the graph, which decides the way to take.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from constrained_growth._data import Weight, counted
from constrained_growth._distributed import everywhere, in_step, several, take_from_first
from constrained_growth._multipliers.agreement import settle
from constrained_growth._multipliers.fit import check_fit, share_at_kinks
from constrained_growth._multipliers.grown import FirstBatch
from constrained_growth._random_state import drawing, random_state
from constrained_growth._sharding import is_sharded, is_spread
from constrained_growth._sites.collector import (
    Collector,
    Use,
    count_of_nodes,
    inputs_first,
    transformed,
)
from constrained_growth._sites.context import Context, detached, takes_context
from constrained_growth._sites.model import (
    call,
    checked_loss,
    coarsest_epsilon,
    device_of,
    loss_of,
    tensors_of,
)
from constrained_growth._sites.site import Site
from constrained_growth._sites.snapshot import deepcopied, reached
from constrained_growth._sites.untouched import untouched
from constrained_growth.blocks import pinned_parameters
from constrained_growth.bookkeeping import Books
from constrained_growth.candidates import Candidate
from constrained_growth.errors import CandidateError, DataError
from constrained_growth.solution import Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Places = Sequence[tuple[Site, Sequence[Candidate]]]
"""Sites of which only the place is known yet, and what could stand there."""

_MOST_BATCHES = 64
"""In so many batches a site has to be passed once: in the first ones an expert may be idle."""

_Facts = tuple[torch.dtype, bool]
"""Of a site: what a block there has to be in, and whether the model changes the tensor in place."""


def look_at_sites(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    places: Places,
    group: ProcessGroup | None,
    weight: Weight,
    books: Books,
    listed: Mapping[str, bool],
) -> tuple[tuple[Site, ...], object, Method, set[int]]:
    """The sites with the blocks that fit there, the first input, the way to λ, numbers of nodes.

    They are the same on all processes, but for the input, None without data here, and the numbers
    of nodes in the graphs of the batches looked at. The `listed` candidates could go in as next
    elements of their lists, which the books may count.
    """
    sharded = is_sharded(model)
    looks: list[tuple[list[int], FirstBatch]] = []  # the sites seen first on it, by index

    def look() -> tuple[object, list[_Facts | None] | None]:
        for site, _ in places:
            if site.module._backward_pre_hooks:
                raise CandidateError(
                    f'after="{site.after}" has a full backward pre-hook, which would not act on '
                    "the parameters of a layer there; remove it, or choose another submodule."
                )
        layout = [
            (c.name, s.after, s.output, c.wrapped, [t.shape for t in tensors_of(c.block)])
            for s, every in places
            for c in every
        ]
        counting = ((x, y) for x, y, _ in counted(data, device_of(model), weight))
        # a sharded model runs on all processes at once, those without more batches too
        counting = (batch for batch, _ in in_step(counting, group)) if sharded else counting
        facts: list[_Facts | None] = [None] * len(places)
        for number, batch in enumerate(itertools.islice(counting, 1 if sharded else _MOST_BATCHES)):
            missing = [index for index, fact in enumerate(facts) if fact is None]
            here = [places[index][0] for index in missing]
            # each from other random numbers, or a layer that is left out by chance always is
            with drawing(number or None):
                first, found = _run(model, loss_fn, batch, here)
            looks.append(([missing[place] for place in found], first))
            for place, fact in found.items():
                facts[missing[place]] = fact
            if None not in facts:
                break
        if sharded and looks:
            _refuse_reduced(model, places, facts)
        return layout, facts if looks else None

    found = everywhere(look, group, collective=sharded)
    if any(layout != found[0][0] for layout, _ in found):
        names = [each.name for _, every in places for each in every]
        raise CandidateError(
            f"candidates={names} are not the same on all processes of the group; give each the "
            "same candidates in the same order."
        )
    reports = [facts for _, facts in found if facts is not None]
    if not reports:
        raise DataError("data yields no batches; give at least one (input, target) pair.")
    seen = {i: uses for some, first in looks for i, uses in zip(some, first.seen, strict=True)}
    sites = [
        _filled(site, every, _known(site, some), model, seen.get(index, []))
        for index, ((site, every), *some) in enumerate(zip(places, *reports, strict=True))
    ]
    if several(group):  # copies, of the user's blocks, whose random values differ there
        sites = [
            replace(site, blocks={name: deepcopied(b) for name, b in site.blocks.items()})
            for site in sites
        ]
        blocks = [block for site in sites for block in site.blocks.values()]
        take_from_first([t.detach() for block in blocks for t in tensors_of(block)], group)

    def check() -> None:
        for index, uses in seen.items():
            for name, block in sites[index].blocks.items():
                for use in uses:
                    check_fit(name, block, use.x, use.context)

    def compare() -> tuple[bool, set[str]]:
        here = [([sites[index] for index in some], first) for some, first in looks if some]
        found = [settle(model, loss_fn, *each, books, listed) for each in here]
        return all(holds for holds, _ in found), set().union(*(others for _, others in found))

    everywhere(check, group)
    outcomes = everywhere(compare, group, collective=sharded)
    method = Method.CLOSED_FORM if all(holds for holds, _ in outcomes) else Method.IN_GRAPH
    around = set[str]().union(*(others for _, others in outcomes))
    sites = [replace(site, around=around & site.blocks.keys()) for site in sites]
    nodes = {first.nodes for _, first in looks}
    return tuple(sites), looks[0][1].input if looks else None, method, nodes


def look_at_another(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: tuple[Any, Any],
    sites: Sequence[Site],
    books: Books,
    listed: Mapping[str, bool],
) -> tuple[bool, set[str]]:
    """What `settle` says of a batch whose graph is another one than that of the first."""
    first, found = _run(model, loss_fn, batch, sites)
    # a site that is not passed may be one whose module is run in another way than by a call
    uses, seen = (dict(zip(found, some, strict=True)) for some in (first.uses, first.seen))
    every = range(len(sites))
    first = replace(
        first, uses=[uses.get(i, []) for i in every], seen=[seen.get(i, []) for i in every]
    )
    return settle(model, loss_fn, sites, first, books, listed, later=True)


def _run(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: tuple[Any, Any],
    sites: Sequence[Site],
) -> tuple[FirstBatch, dict[int, _Facts]]:
    """Run the model on a batch, watched at its sites; both are of those sites that it passes."""
    dtypes: dict[int, torch.dtype] = {}
    seen: list[list[Use]] = [[] for _ in sites]  # δ still to come
    uses: list[list[Use]] = [[] for _ in sites]
    aliases: list[list[tuple[Tensor, int]]] = [[] for _ in sites]  # and their version counters
    originals: list[tuple[Tensor, int]] = []
    hidden: set[int] = set()  # sites without gradients

    def inspect(index: int, x: Tensor, context: Context, alias: Tensor | None) -> None:
        if not transformed(x):
            _check_tensor(sites[index].after, x.detach())
        if transformed(x) or alias is None:
            hidden.add(index)
            return
        if x.numel() == 0:  # as of an expert that is called with no samples
            return
        # an inserted layer has the precision of its neighbours' parameters, not of what is cast
        autocast = torch.is_autocast_enabled(x.device.type)
        dtypes[index] = _parameter_dtype(model, x.dtype) if autocast else x.dtype
        seen[index].append(Use(x.detach(), x.detach(), detached(context)))
        # version counters tell later writes, to the alias or to x itself, held by a hook, say
        aliases[index].append((alias, alias._version))
        originals.append((x.detach(), x._version))

    def take(index: int, here: list[Use], _: object) -> None:
        uses[index] = here

    collector = Collector(sites, inspect)
    input, target = batch
    random = random_state()
    with untouched(model, loss_fn, first=True), collector.watching():
        collector.begin(take)
        before = count_of_nodes()
        loss = loss_of(loss_fn, call(model, input), target)
        nodes = count_of_nodes() - before
        drawn = torch.get_rng_state()
        if not bool(torch.isfinite(loss)):
            raise DataError(
                f"loss_fn gives {loss.item()} on the first batch; look for NaN or Inf in the "
                "data, the model's parameters, or the loss."
            )
        for index, site in enumerate(sites):
            if index in hidden and not seen[index]:
                raise CandidateError(
                    f'after="{site.after}" runs with gradients switched off (under '
                    "torch.no_grad(), or gradient checkpointing with use_reentrant=True) or only "
                    "inside a transform of torch.func, such as vmap. Checkpoint with "
                    "use_reentrant=False, or choose another submodule."
                )
        changed = [any(t._version != v for t, v in here) for here in aliases]
        changes = any(changed) or any(t._version != v for t, v in originals)
        if any(n.name() == "CheckpointFunctionBackward" for n in inputs_first(loss.grad_fn)):
            raise CandidateError(
                "model: a part of it is checkpointed with use_reentrant=True, which gives no "
                "gradients at its sites; use checkpoint(..., use_reentrant=False)."
            )
        if loss.requires_grad:
            try:
                collector.backward(loss)
            except RuntimeError as error:
                if "inplace operation" not in str(error):
                    raise
                mode = "train" if model.training else "eval"
                raise DataError(
                    f"model={type(model).__name__} in {mode} mode: its loss has no gradient, as a "
                    f"tensor that backward needs is changed in place ({error!s:.120}…). If "
                    "loss.backward() fails too, try the other mode or clone the tensor; otherwise "
                    "choose other submodules."
                ) from error
            _refuse_carried_graph(model, loss_fn, batch)  # backward has freed the graph by now
    facts = {index: (dtypes[index], changed[index]) for index, here in enumerate(seen) if here}
    uses, seen = [uses[index] for index in facts], [seen[index] for index in facts]
    first = FirstBatch(input, target, float(loss.detach()), random, drawn, uses, seen, nodes)
    if changes:
        pairs = zip(sites, changed, strict=True)
        names = [site.after for site, flag in pairs if flag or not any(changed)]
        _refuse_kept_and_overwritten(model, loss_fn, first, names)
    return first, facts


def _refuse_kept_and_overwritten(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], first: FirstBatch, names: list[str]
) -> None:
    """Refuse sites whose tensor is changed in place and read elsewhere too.

    That reader would not see the change to the output of a layer there: the function would move.
    """
    # watched, as with a layer there, who reads x does not see what the model writes to the alias
    plain = first.loss_unwatched(model, loss_fn)
    if not first.is_same(plain, coarsest_epsilon(model.parameters())):
        raise CandidateError(
            f"after={names}: the model changes the tensor there in place, and a hook, an attribute "
            "or a second output reads it changed: with a layer there the loss would move from "
            f"{plain:.6g} to {first.loss:.6g}. Choose another submodule, or change a copy."
        )


def _check_tensor(after: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise CandidateError(
            f'after="{after}" returns a {x.dtype} tensor, and a site carries floating-point '
            "numbers; choose another submodule."
        )
    if x.is_nested or x.layout is not torch.strided:
        raise CandidateError(
            f'after="{after}" returns a {"nested" if x.is_nested else x.layout} tensor, and blocks '
            "work on dense ones; choose another submodule, or pad the samples."
        )
    if not bool(torch.isfinite(x).all()):
        raise DataError(
            f'the output of "{after}" holds NaN or Inf on the first batch; look at the data and '
            "the model's parameters."
        )


def _refuse_carried_graph(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], batch: tuple[Any, Any]
) -> None:
    """Refuse what keeps a tensor with its graph and reads it when it runs again."""
    kept = [t for t in reached(model, loss_fn) if isinstance(t, Tensor) and not t.is_leaf]
    if not kept:
        return
    # the second run would reach into the graph of the first one, here as in training
    try:
        loss = checked_loss(loss_fn(call(model, batch[0]), batch[1]))
        grads = torch.autograd.grad(loss, kept, allow_unused=True) if loss.requires_grad else ()
        carried = any(grad is not None for grad in grads)
    except RuntimeError:  # it went back through a graph that backward has freed
        carried = True
    if carried:
        raise CandidateError(
            f"model={type(model).__name__} or loss_fn keeps state from batch to batch with the "
            "graph it came from, so that the loss of a batch has gradients in all batches before; "
            "detach it where it is kept: self.state = state.detach()."
        )


def _refuse_reduced(model: nn.Module, places: Places, facts: Sequence[_Facts | None]) -> None:
    for (site, every), fact in zip(places, facts, strict=True):
        if fact is None:  # to be refused by all processes
            continue
        dtype, own = fact[0], _parameter_dtype(model, fact[0])
        if dtype != own:
            raise CandidateError(
                f'model={type(model).__name__}: the output of "{site.after}" is {dtype}, and '
                f"the parameters of the sharded model are {own}: layers cannot be sharded with a "
                "MixedPrecisionPolicy yet; use fully_shard without one, under torch.autocast."
            )
        for candidate in every:
            if any(is_spread(parameter) for parameter in candidate.block.parameters()):
                raise CandidateError(
                    f'candidate "{candidate.name}": its block has sharded parameters of its own, '
                    "which cannot be inserted; make blocks of whole tensors."
                )


def _known(site: Site, reports: Iterable[_Facts | None]) -> _Facts:
    """What some process knows of a site."""
    for facts in reports:
        if facts is not None:
            return facts
    raise CandidateError(
        f'after="{site.after}" is never reached in the forward pass on the first batches (at most '
        f"{_MOST_BATCHES}); choose another submodule, or put a batch in front that passes it."
    )


def _filled(
    site: Site,
    candidates: Sequence[Candidate],
    facts: _Facts,
    model: nn.Module,
    seen: Sequence[Use],
) -> Site:
    """The site with the blocks of its candidates, brought there."""
    device = seen[0].x.device if seen else device_of(site.module) or device_of(model)
    device = device or torch.device("cpu")
    dtype, overwritten = facts
    blocks = {c.name: _brought(c.block, site.module, device, dtype, model) for c in candidates}
    exact = {name: getattr(block, "exact_after", None) for name, block in blocks.items()}
    return replace(
        site,
        blocks=blocks,
        conditional=tuple(
            n for n, holds in exact.items() if not (callable(holds) and holds(site.module))
        ),
        device=device,
        overwritten=overwritten,
        needs_context=any(takes_context(block) for block in blocks.values()),
        kinks={name: share_at_kinks(block, seen) for name, block in blocks.items()},
    )


def _parameter_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """What the parameters of the model are in, whatever autocast makes of them on the way."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def _brought(
    block: nn.Module, site: nn.Module, device: torch.device, dtype: torch.dtype, model: nn.Module
) -> nn.Module:
    """A candidate's block, or a copy, on a device, in a dtype and in the mode of its site."""
    pinned_parameters(block)
    shares = not set(block.modules()).isdisjoint(model.modules())  # whose hooks are the site's
    training = site.training
    other_mode = any(module.training != training for module in block.modules())
    moved = any(p.device != device or p.dtype != dtype for p in block.parameters())
    if shares or other_mode or moved:
        kept = () if shares or moved else tensors_of(block)  # a copy for the mode takes no memory
        block = deepcopied(block, {id(t): t for t in kept})
        block = block.to(device=device, dtype=dtype).train(training)
    return block
