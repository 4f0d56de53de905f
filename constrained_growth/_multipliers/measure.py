"""λ of all candidates: one forward and one backward pass over the data, two sums per pin.

For each batch the collector brings (x, δ) of every site, and the accumulators of its candidates
take them in; or, in the graph, the blocks stand at their pins and autograd gives −∇_v L itself.
∇_θ L is added up by hooks as backward delivers it, so that no second copy of all gradients is held.
Several processes add up their sums once, at the end.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from constrained_growth._data import batch_size
from constrained_growth._distributed import add_up, everywhere, several
from constrained_growth._multipliers.accumulator import (
    NOTHING_MORE,
    Accumulator,
    Counts,
    Estimate,
    Wanted,
)
from constrained_growth._multipliers.closed_form import by_sample
from constrained_growth._multipliers.groups import ALL, Groups, Span, accumulation_dtype
from constrained_growth._multipliers.in_graph import Standing, rounds
from constrained_growth._sharding import Leaves, is_spread, summed_like
from constrained_growth._sites.collector import Collector, Use, count_of_nodes
from constrained_growth._sites.model import call, checked_loss, device_of
from constrained_growth._sites.site import Site
from constrained_growth._sites.untouched import full_precision, untouched
from constrained_growth.blocks import has_factors
from constrained_growth.errors import BlockError, DataError
from constrained_growth.solution import Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Measurement:
    """What one pass over the data gives: means over the samples, by candidate or parameter."""

    loss: float
    estimates: dict[str, Estimate]
    gradients: dict[str, Tensor] | None
    num_samples: int
    num_batches: int


class Pass:
    """The sums of a pass over the data, batch by batch; arguments as in `GrowthProblem`."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        sites: Sequence[Site],
        method: Method,
        *,
        gradients: bool,
        wanted: Wanted = NOTHING_MORE,
        groups: Groups | None = None,
    ) -> None:
        self._model, self._loss_fn, self._sites = model, loss_fn, sites
        self._groups, self._wanted = groups, wanted
        self._collector = Collector(sites)
        self._rounds = rounds(sites) if method is Method.IN_GRAPH else []
        self.accumulators = accumulators(sites, wanted)
        named = model.named_parameters() if gradients else ()
        self.reached: set[str] = set()  # candidates that had a gradient in the graph, be it zero
        self._parameters = {name: p for name, p in named if p.requires_grad}
        self._totals = {
            name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype), requires_grad=False)
            for name, p in self._parameters.items()
        }
        self._leaves = Leaves(model, self._parameters)
        self._with_gradients = gradients
        self._devices = {site.device for site in sites}
        # in float64, and on the device: asking for each loss would wait for the device
        device = device_of(model) or torch.device("cpu")
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._samples, self._batches, self._weight = 0, 0, 0.0
        self._joinable = [all(map(has_factors, site.blocks.values())) for site in sites]
        self._waiting: list[list[Use]] = [[] for _ in sites]
        self._waiting_bytes, self._waiting_for = 0, (0, 0.0)
        self._room = max(2**21, sum(a.nbytes for a in self.accumulators.values()) // 2)
        self._latest: tuple[Span, int] | None = None
        self._now = 0.0  # the weight of the batch that is on its way
        self._task = -1  # PyTorch's number of its backward pass
        self.nodes = 0  # of autograd, in the forward pass of the latest batch

    def watching(self) -> ExitStack:
        """The hooks on the model and its parameters, which `add` needs, for a while."""

        def stream(name: str, leaf: Tensor) -> Any:
            return leaf.register_hook(functools.partial(self._take, self._totals[name]))

        with ExitStack() as stack:  # which lets go of the first if the second fails
            stack.enter_context(self._leaves.watching(stream))
            if not self._rounds:
                stack.enter_context(self._collector.watching())
            return stack.pop_all()

    def _take(self, total: Tensor, gradient: Tensor) -> Tensor:
        """Add up a gradient as backward delivers it, and send it on without its memory.

        What comes in another pass is a derivative that the model or its loss takes.
        """
        if torch._C._current_graph_task_id() != self._task:
            return gradient
        if is_spread(total):
            total.add_(summed_like(gradient.to(total.dtype) * self._now, total))
        else:
            total.add_(gradient, alpha=self._now)
        # autograd.grad would hold the gradients of all parameters at once; it gets a zero
        return gradient if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    def add(self, input: Any, target: Any, weight: float, *, counts: bool = True) -> Tensor:
        """Take in one batch and return its loss: one pass, in the graph one for each round.

        It does not count where it is run only because other processes run one.
        """
        size = batch_size(input, target)
        self._now = weight if counts else 0.0
        if self._rounds:
            loss = self._add_in_graph(input, target, size, weight, counts=counts)
        else:
            self._start(size, weight)
            self._collector.begin(self.take, counts)
            loss = self._loss_of(input, target)
            self._collector.backward(loss, list(self._leaves.values.values()))
            if self._waiting_bytes > self._room or not self._waiting_bytes:
                self._flush()
        if counts:
            self._loss.add_(loss.detach().to(self._loss.device), alpha=weight)
            self._count(size, weight)
        return loss.detach()

    def _count(self, size: int, weight: float) -> None:
        self._samples += size
        self._batches += 1
        self._weight += weight

    def _loss_of(self, input: Any, target: Any) -> Tensor:
        torch.clear_autocast_cache()  # with its casts each batch makes as many nodes as the first
        before = count_of_nodes()
        loss = checked_loss(self._loss_fn(call(self._model, input), target))
        self.nodes = count_of_nodes() - before
        if not loss.requires_grad:
            raise DataError(
                "loss_fn returned a tensor without a graph, on which nothing depends; compute it "
                "from the model's output without detach(), item() or torch.no_grad()."
            )
        # a loss or a model may run backward passes of its own: this hook is called in ours only,
        # and before those of the parameters
        loss.register_hook(self._begin_backward)
        return loss

    def _begin_backward(self, _: Tensor) -> None:
        self._task = torch._C._current_graph_task_id()

    def accumulate(self, uses: Sequence[list[Use]], size: int, weight: float) -> None:
        """Take in a batch of which is known what it brought to each site."""
        self._start(size, weight)
        with torch.no_grad(), full_precision(*self._devices):
            for index, here in enumerate(uses):
                if here:
                    self.take(index, here, True)
        self._count(size, weight)

    def _start(self, size: int, weight: float) -> None:
        """Batches of one size and weight may be joined."""
        if (size, weight) != self._waiting_for:
            self._flush()
            self._waiting_for = size, weight

    def take(self, index: int, uses: list[Use], counts: bool) -> None:
        """Take in what a batch has brought to a site, now or with the next ones.

        A product over few samples is slow, as it reads and writes all of λ. So small batches
        of the same size and weight wait to be joined, in half the room of λ.
        """
        if not counts:
            return
        size, _ = self._waiting_for
        bytes_here = uses[0].x.nbytes + uses[0].delta.nbytes
        joinable = self._joinable[index] and len(uses) == 1 and by_sample(uses, size)
        if joinable and len(self._sites) * bytes_here <= self._room:
            self._waiting[index].append(uses[0])
            self._waiting_bytes += bytes_here
        else:
            self._add(index, uses, size)

    def _complete(self) -> None:
        self._flush()
        for accumulator in self.accumulators.values():
            accumulator.count_all(self._samples, self._weight, self._batches)

    def _flush(self) -> None:
        """Take in what waits."""
        size, _ = self._waiting_for
        with torch.no_grad(), full_precision(*self._devices):
            for index, waiting in enumerate(self._waiting):
                shapes = {use.x.shape for use in waiting}
                for uses in [waiting] if len(shapes) == 1 else [[use] for use in waiting]:
                    self._add(index, [_joined(uses)], size * len(uses), len(uses))
        self._waiting = [[] for _ in self._sites]
        self._waiting_bytes = 0
        self._advance()

    def _add(self, index: int, uses: Sequence[Use], size: int, batches: int = 1) -> None:
        _, weight = self._waiting_for
        span = self._span(size, batches)
        for name in self._sites[index].blocks:
            self.accumulators[name].add(uses, size, weight, batches=batches, span=span)

    def _span(self, size: int, batches: int = 1) -> Span:
        """The groups for what comes in now; all sites have the same until the next flush."""
        if self._groups is None:
            return ALL
        span = self._groups.span(size, batches)
        self._latest = span, size
        return span

    def _advance(self) -> None:
        """What comes next goes into the next groups."""
        if self._groups is not None and self._latest is not None:
            self._groups.advance(*self._latest)
        self._latest = None

    def _add_in_graph(
        self, input: Any, target: Any, size: int, weight: float, *, counts: bool
    ) -> Tensor:
        first: Tensor | None = None
        # a round each for candidates that share a site: behind one another, one would be
        # differentiated through the next, which at a kink is not by the identity
        for index, names in enumerate(self._rounds):
            standing = Standing(self._sites, names, keeps=self._wanted.moments)
            pins = [leaf for leaves in standing.leaves.values() for leaf in leaves.values()]
            leaves = list(self._leaves.values.values()) if index == 0 else []
            with ExitStack() as stack:
                if index < len(self._rounds) - 1:  # each round sees the same random numbers
                    stack.enter_context(untouched(self._model, self._loss_fn))
                stack.enter_context(standing.in_model())
                loss = self._loss_of(input, target)
                outputs = [y for uses in standing.uses.values() for _, y in uses]
                inputs = [*pins, *leaves, *outputs]
                grads: Sequence[Tensor | None] = [None] * len(inputs)
                if loss.requires_grad:
                    # while the blocks stand: checkpointed parts run again within backward
                    with full_precision(*self._devices):
                        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
            first = loss if first is None else first
            if counts:
                found = iter(grads)
                deltas = iter(grads[len(pins) + len(leaves) :])
                span = self._span(size)
                for name, here in standing.leaves.items():
                    uses = [
                        replace(use, delta=torch.zeros_like(use.x) if delta is None else delta)
                        for (use, _), delta in zip(standing.uses[name], deltas, strict=False)
                    ]
                    there = list(itertools.islice(found, len(here)))
                    self.reached.update({name} if any(g is not None for g in there) else ())
                    multiplier = {
                        key: torch.zeros_like(pin) if grad is None else -grad
                        for (key, pin), grad in zip(here.items(), there, strict=True)
                    }
                    moved = standing.moved.get(name)
                    accumulator = self.accumulators[name]
                    accumulator.add_in_graph(multiplier, moved, uses, size, weight, span)
        self._advance()
        assert first is not None
        return first

    def reduce(self, group: ProcessGroup | None) -> None:
        """Add up what the processes of a group have taken in, once, at the end; all call this."""
        self._complete()
        if not several(group):
            return
        mine = {name: accumulator.counts for name, accumulator in self.accumulators.items()}
        found = everywhere(
            lambda: (self._samples, self._batches, self._weight, self._sizes(), mine), group
        )
        # a mean over different models would be the λ of none of them, and nothing else would show
        # it; not compared exactly, as devices round norms differently
        sizes = [process[3] for process in found]
        alike = all(len(here) == len(sizes[0]) for here in sizes)
        if not alike or not np.allclose(sizes, sizes[:1], rtol=1e-6, atol=0, equal_nan=True):
            raise DataError(
                "model: its parameters are not the same on all processes of the group; load the "
                "same state dict on each, or train with DistributedDataParallel."
            )
        self._samples = sum(process[0] for process in found)
        self._batches = sum(process[1] for process in found)
        self._weight = sum(process[2] for process in found)
        sums = [self._loss, *(t for t in self._totals.values() if not is_spread(t))]
        for name, accumulator in self.accumulators.items():
            counts: list[Counts] = [process[4][name] for process in found]
            sums += accumulator.join(counts)
        add_up(sums, group)

    def _sizes(self) -> list[float]:
        """The norms of the parameters, to tell one model from another."""
        kept = (p for p in self._model.parameters() if p.is_floating_point())
        parameters = (p.detach() for p in kept if not is_spread(p))
        norms = [torch.linalg.vector_norm(p, dtype=torch.float64).cpu() for p in parameters]
        return torch.stack(norms).tolist() if norms else []

    def estimates(self) -> dict[str, Estimate]:
        """Candidate → what is known of it."""
        self._complete()
        return {name: a.estimate() for name, a in self.accumulators.items()}

    def measurement(self, name: str = "data") -> Measurement:
        """The means over what was taken in, the data of this name.

        Those of θ take the place of their sums.
        """
        if self._samples == 0:
            raise DataError(
                f"{name} yields no batches; give an iterable that can be iterated more than once, "
                "such as a DataLoader or a list of (input, target) pairs."
            )
        estimates = self.estimates()
        refuse_moving(estimates)
        gradients = {name: total.div_(self._weight) for name, total in self._totals.items()}
        return Measurement(
            loss=float(self._loss) / self._weight,
            estimates=estimates,
            gradients=gradients if self._with_gradients else None,
            num_samples=self._samples,
            num_batches=self._batches,
        )


def _joined(uses: Sequence[Use]) -> Use:
    if len(uses) == 1:
        return uses[0]
    return Use(torch.cat([use.x for use in uses]), torch.cat([use.delta for use in uses]))


def accumulators(sites: Sequence[Site], wanted: Wanted) -> dict[str, Accumulator]:
    """Candidate → what its multiplier is summed up in."""
    return {
        name: Accumulator(block, wanted, conditional=name in site.conditional)
        for site in sites
        for name, block in site.blocks.items()
    }


def refuse_moving(estimates: Mapping[str, Estimate]) -> None:
    """Refuse blocks that are the identity on the first batch and not on a later one."""
    for name, estimate in estimates.items():
        if estimate.moved > 1:  # NaN is for the status of the solution
            raise BlockError(
                f'the block of candidate "{name}" is the identity on the first batch and not '
                "on a later one. An identity layer belongs right after its own activation; "
                "elsewhere use ResidualMLP(width, hidden, activation)."
            )
