"""λ of all candidates from one forward and one backward pass of the network as it is.

Only two tensors are needed at a site: x, what is there, and δ = ∂L/∂x. A block turns them into
its multipliers without standing in the network. (x, δ) of several small batches are collected
and worked off together; large ones are worked off as backward delivers them and then dropped.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from constrained_growth._data import Weight, batch_size, batch_weight, batches
from constrained_growth._distributed import add_up, everywhere, in_step, several
from constrained_growth._multipliers.grouping import Site
from constrained_growth._multipliers.keeping import is_as_before, is_watched, kept_in
from constrained_growth._multipliers.merging import (
    emptying,
    in_groups,
    joined,
    may_merge,
    numbers_in,
    parts_of,
)
from constrained_growth._multipliers.recording import Recorder
from constrained_growth._multipliers.tallies import Estimate, accumulation_dtype, scaled
from constrained_growth._sharding import Leaves, is_sharded, is_spread, summed_like
from constrained_growth._sites.collector import hooked
from constrained_growth._sites.model import call, checked_loss, device_of
from constrained_growth.errors import DataError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Measurement:
    """What one pass over the data gives.

    Attributes:
        loss: Mean loss over the samples.
        estimates: Candidate → λ = −∇_v L, its variance and moments.
        gradients: Name → ∇L of the trainable parameters, or None if not asked for.
        num_samples: How many samples were read.
        num_batches: How many batches were read.
    """

    loss: float
    estimates: dict[str, Estimate]
    gradients: dict[str, Tensor] | None
    num_samples: int
    num_batches: int


def measure(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    sites: Sequence[Site],
    *,
    gradients: bool,
    moments: bool = False,
    progress: bool | None = None,
    group: ProcessGroup | None = None,
    weight: Weight = None,
    merge: bool = True,
) -> Measurement:
    """λ of all candidates, their variances and, if asked for, ∇_θ L, as means over the samples.

    With a mean loss L_b on batch b of n_b samples and N = Σ n_b,

        λ = −(1/N) Σ_b n_b ∇_v L_b,

    so a ragged last batch counts by its size. The variance of λ comes from the per-sample
    multipliers λ_n where the block has them in closed form, and else from the batches:

        tr Cov(λ) = (Σ_n ‖λ_n‖² − N‖λ‖²) / ((N − 1) N)            over samples,
        tr Cov(λ) = (Σ_b n_b‖λ_b‖² − N‖λ‖²) / ((B − 1) N)         over B batches.

    With a `weight` w_b of batch b and W = Σ w_b this is done for the losses (w_b/n_b) L_b, and
    λ is N/W times what comes out; the variance is that for given weights.

    Args:
        model: Run in the mode (train or eval) it is in, with gradients on (`differentiable`).
        loss_fn: `loss_fn(output, target)`, a scalar mean over the samples of the batch.
        data: `(input, target)` pairs.
        sites: From `GrowthProblem`.
        gradients: Also ∇_θ L, which costs one product more per layer.
        moments: Also the second moments that some norms need.
        progress: Progress bar: True, False, or None for one on a terminal when it takes long.
        group: The processes that have a shard of the data each. They all call this, and get the
            means over all the data; sums and counts are added up, never norms.
        weight: How much a batch counts, as in `GrowthProblem`; those of weight 0 are passed over.
        merge: Whether small batches may run together.

    Raises:
        DataError: No batches, or a batch or loss that cannot be used.
        CandidateError: A site was not reached exactly once.
        GrowthError: Another process failed.
    """
    running = MultiplierPass(
        model, loss_fn, sites, gradients=gradients, moments=moments, weight=weight
    )
    quiet = None if progress is None else not progress
    bar = tqdm(data, desc="multipliers", unit="batch", leave=False, delay=1, disable=quiet)

    sharded = is_sharded(model)
    merge = merge and not several(group) and not is_watched(model)

    def read() -> None:
        pairs = batches(bar, device_of(model))
        with running.watching():
            if not sharded:
                running.add_all(pairs, merge=merge)
                return
            counting = (pair for pair in pairs if batch_weight(weight, *pair) > 0)
            for (input, target), new in in_step(counting, group):
                running.add(input, target, counts=new)

    everywhere(read, group, collective=sharded)
    running.reduce(group)
    return running.measurement(last=True)


class MultiplierPass:
    """The sums of a pass over the data, batch by batch.

    Args:
        model: Run in the mode (train or eval) it is in, with gradients on (`differentiable`).
        loss_fn: `loss_fn(output, target)`, a scalar mean over the samples of the batch.
        sites: From `GrowthProblem`.
        gradients: Also ∇_θ L.
        moments: Also the second moments that some norms need.
        weight: How much a batch counts, as in `GrowthProblem`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        sites: Sequence[Site],
        *,
        gradients: bool,
        moments: bool,
        weight: Weight = None,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._weight = weight
        self._recorder = Recorder(sites, moments=moments)
        named = model.named_parameters() if gradients else ()
        self._parameters = {name: p for name, p in named if p.requires_grad}
        self._gradients = [
            torch.zeros_like(p, dtype=accumulation_dtype(p.dtype), requires_grad=False)
            for p in self._parameters.values()
        ]
        self._leaves = Leaves(model, self._parameters)
        self._with_gradients = gradients
        self._streams = sum(total.nbytes for total in self._gradients) > _SMALL
        device = device_of(model) or torch.device("cpu")
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._num_samples = 0
        self._num_batches = 0
        self._size = 0
        self._whole = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The hooks on the model and its parameters, which `add` needs, for a while."""
        totals = dict(zip(self._parameters, self._gradients, strict=True))

        def stream(name: str, leaf: Tensor) -> Any:
            return leaf.register_hook(functools.partial(self._take, totals[name]))

        with (
            self._leaves.watching(stream if self._streams else None),
            hooked(self._recorder.hooks()),
        ):
            yield

    def add(self, input: object, target: object, *, counts: bool = True) -> None:
        """Take in one batch: one forward and one backward pass.

        Args:
            input: Of the model.
            target: Goes to the loss with the output.
            counts: False for one that is run only because other processes run one.

        Raises:
            DataError: The batch or its loss cannot be used.
            CandidateError: A site was not reached exactly once.
        """
        self._add_group([(input, target)], counts=counts)

    def add_all(self, pairs: Iterable[tuple[Any, Any]], *, merge: bool) -> None:
        """Take in batches one after the other, small ones several at a time where that is exact.

        The loss is that of each batch alone, on its part of the output. It is done where all
        blocks have closed forms, and the model treats every sample alone and keeps nothing of it.

        Args:
            pairs: `(input, target)` batches.
            merge: Whether several may be run through the model as one.

        Raises:
            DataError, CandidateError: As `add`.
        """
        pairs = iter(pairs)
        first = next((pair for pair in pairs if batch_weight(self._weight, *pair) > 0), None)
        if first is None:
            return
        at_most = self._recorder.mergeable(batch_size(*first)) if merge else 1
        kept = kept_in(self._model, self._loss_fn) if at_most > 1 else None
        output = self._add_group([first])
        still = kept is not None and is_as_before(kept, kept_in(self._model, self._loss_fn))
        others = list(itertools.islice(pairs, 1))
        merges = still and may_merge(self._model, first, others, output)
        room = at_most * numbers_in(first[0]) if merges else 0
        del first, output, kept
        left = emptying(others, pairs)
        for group in in_groups(left, room) if room else ([pair] for pair in left):
            self._add_group(group)

    def _add_group(self, group: Sequence[tuple[Any, Any]], *, counts: bool = True) -> object:
        """One forward and one backward pass over batches put together; what came out."""
        weights = [batch_weight(self._weight, *pair) for pair in group]
        if not all(weights):  # where a mean is over nothing, the loss is NaN
            group = [pair for pair, weight in zip(group, weights, strict=True) if weight]
            weights = [weight for weight in weights if weight]
        if not group:
            return None
        sizes = [batch_size(*pair) for pair in group]
        self._size = sum(sizes)
        self._recorder.begin(self._size, counts=counts)
        try:
            output = call(self._model, joined([input for input, _ in group]))
            if len(group) > 1:
                self._recorder.check_samples()
            parts, reached = parts_of(output, sizes)
        except Exception:
            if len(group) == 1:
                raise
            for pair in group:  # a model may well refuse so many samples
                self.add(*pair)
            return None
        loss: Any = None
        for part, (_, target), weight in zip(parts, group, weights, strict=True):
            share = weight / self._size
            mean = checked_loss(self._loss_fn(part, target))
            part_of_it = mean if share == 1 else mean * share
            loss = part_of_it if loss is None else loss + part_of_it
        loss = loss if counts else loss * 0
        leaves = self._leaves.values
        grads = self._recorder.backward(loss, list(leaves.values()))
        if len(reached) < len(group):
            self._recorder.refuse_unreached()
        if not self._streams and self._leaves.sharded:
            self._add_gradients(dict(zip(leaves, grads, strict=True)))
        elif not self._streams:
            for total, grad in zip(self._gradients, grads, strict=True):
                if grad is not None:
                    total.add_(grad, alpha=self._size)
        if not counts:
            return None
        self._loss.add_(loss.detach().to(self._loss.device), alpha=self._size)
        self._num_samples += self._size
        self._num_batches += len(group)
        self._whole += sum(weights)
        return output.detach() if isinstance(output, Tensor) else None

    def _add_gradients(self, grads: Mapping[str, Tensor | None]) -> None:
        for (name, parameter), total in zip(self._parameters.items(), self._gradients, strict=True):
            grad = grads.get(name)
            if grad is None and is_spread(parameter):  # but there may be one on other processes
                grad = torch.zeros(parameter.shape, dtype=total.dtype, device=total.device)
            if grad is not None:
                self._add(total, grad)

    def _add(self, total: Tensor, gradient: Tensor) -> None:
        if is_spread(total):
            total.add_(summed_like(gradient.to(total.dtype) * self._size, total))
        else:
            total.add_(gradient, alpha=self._size)

    def _take(self, total: Tensor, gradient: Tensor) -> Tensor | None:
        """Add up a large gradient as backward delivers it, and send it on without its memory."""
        self._add(total, gradient)
        return None if gradient.is_sparse else gradient.new_zeros(()).expand_as(gradient)

    def reduce(self, group: ProcessGroup | None) -> None:
        """Add up what the processes of a group have taken in, each its part; all call this.

        Afterwards each has the sums of all, so that this is done once, at the end.

        Raises:
            DataError: The model is not the same on all processes.
        """
        if not several(group):
            return
        counts = everywhere(
            lambda: (self._num_samples, self._num_batches, self._whole, self._sizes()), group
        )
        if any(not _close(sizes, counts[0][3]) for _, _, _, sizes in counts):
            raise DataError(
                "model: its parameters are not the same on all processes of the group; load the "
                "same state dict on each, or train with DistributedDataParallel."
            )
        self._num_samples = sum(samples for samples, _, _, _ in counts)
        self._num_batches = sum(batches for _, batches, _, _ in counts)
        self._whole = sum(whole for _, _, whole, _ in counts)
        alone = [total for total in self._gradients if not is_spread(total)]
        add_up([self._loss, *alone], group)
        self._recorder.reduce(group)

    def _sizes(self) -> list[float]:
        """The norms of the parameters, to tell one model from another."""
        kept = (p for p in self._model.parameters() if p.is_floating_point())
        parameters = (p.detach() for p in kept if not is_spread(p))
        norms = [torch.linalg.vector_norm(p, dtype=torch.float64).cpu() for p in parameters]
        return torch.stack(norms).tolist() if norms else []

    @property
    def num_samples(self) -> int:
        """How many samples were taken in so far."""
        return self._num_samples

    def totals(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Candidate → Σ n_b λ_b and name → Σ n_b ∇L_b as they stand, not copies."""
        gradients = dict(zip(self._parameters, self._gradients, strict=True))
        return self._recorder.totals(), gradients

    def measurement(self, *, last: bool = False) -> Measurement:
        """The means over what was taken in so far; more may be taken in afterwards.

        Args:
            last: No more will be: the sums become the means in place.

        Raises:
            DataError: Nothing was.
        """
        count = self._num_samples
        if count == 0:
            raise DataError(
                "data yields no batches; give an iterable that can be iterated more than once, "
                "such as a DataLoader or a list of (input, target) pairs (a generator is "
                "exhausted after its first use)."
            )
        whole = self._whole
        means = (total.div_(whole) if last else total / whole for total in self._gradients)
        estimates = self._recorder.estimates(count, last=last)
        if whole != count:
            estimates = {name: scaled(e, count / whole) for name, e in estimates.items()}
        return Measurement(
            loss=float(self._loss) / whole,
            estimates=estimates,
            gradients=dict(zip(self._parameters, means, strict=True))
            if self._with_gradients
            else None,
            num_samples=count,
            num_batches=self._num_batches,
        )


_SMALL = 2**20
"""Bytes of gradients that backward may deliver all at once, which is faster."""


def _close(sizes: Sequence[float], others: Sequence[float]) -> bool:
    same = len(sizes) == len(others)
    return same and np.allclose(sizes, others, rtol=1e-6, atol=0, equal_nan=True)
