"""λ of all candidates from one forward and one backward pass of the network as it is.

Only two tensors are needed at a site: x, what is there, and δ = ∂L/∂x. A block turns them into
its multipliers without standing in the network. (x, δ) of several small batches are collected
and worked off together; large ones are worked off as backward delivers them and then dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from tqdm import tqdm

from constrained_growth.blocks import HasFactors, pinned_parameters
from constrained_growth.errors import CandidateError, DataError
from constrained_growth.observation import batch_size, batches, call, device_of, hooked


@dataclass(frozen=True)
class Site:
    """One place in the model, with all the blocks that could stand there.

    Attributes:
        after: Qualified name of the module whose output is the site.
        module: That module.
        blocks: Candidate name → block, on the site's device and dtype.
        shape: Shape of the tensor there on the first batch.
        bytes: Its size on the first batch.
        overwritten: Whether the model changes the tensor in place afterwards.
        anchor: Whether backward has to be asked for δ here; at the other sites it passes anyway
            on its way to the anchors.
    """

    after: str
    module: nn.Module
    blocks: Mapping[str, nn.Module]
    shape: tuple[int, ...]
    bytes: int
    overwritten: bool
    anchor: bool


@dataclass(frozen=True)
class Measurement:
    """What one pass over the data gives.

    Attributes:
        loss: Mean loss over the samples.
        multipliers: Candidate → pinned parameter → λ = −∇_v L.
        variances: Candidate → tr Cov(λ), NaN where it cannot be known.
        gradients: Name → ∇L of the trainable parameters, or None if not asked for.
        num_samples: How many samples were read.
        num_batches: How many batches were read.
    """

    loss: float
    multipliers: dict[str, dict[str, Tensor]]
    variances: dict[str, float]
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
    progress: bool | None = None,
) -> Measurement:
    """λ of all candidates, their variances and, if asked for, ∇_θ L, as means over the samples.

    With a mean loss L_b on batch b of n_b samples and N = Σ n_b,

        λ = −(1/N) Σ_b n_b ∇_v L_b,

    so a ragged last batch counts by its size. The variance of λ comes from the per-sample
    multipliers λ_n where the block has them in closed form, and else from the batches:

        tr Cov(λ) = (Σ_n ‖λ_n‖² − N‖λ‖²) / ((N − 1) N)            over samples,
        tr Cov(λ) = (Σ_b n_b‖λ_b‖² − N‖λ‖²) / ((B − 1) N)         over B batches.

    Args:
        model: Run in the mode (train or eval) it is in.
        loss_fn: `loss_fn(output, target)`, a scalar mean over the samples of the batch.
        data: `(input, target)` pairs.
        sites: From `GrowthProblem`.
        gradients: Also ∇_θ L, which costs one product more per layer.
        progress: Progress bar: True, False, or None for one on a terminal when it takes long.

    Raises:
        DataError: No batches, or a batch or loss that cannot be used.
        CandidateError: A site was not reached exactly once.
    """
    recorder = _Recorder(sites)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad and gradients}
    totals = [torch.zeros_like(p, dtype=_wide(p.dtype)) for p in parameters.values()]
    loss_sum: Tensor | float = 0.0
    num_samples = num_batches = 0
    bar = tqdm(
        data, desc="multipliers", unit="batch", leave=False, delay=1, disable=_quiet(progress)
    )
    with hooked(recorder.hooks()), torch.enable_grad():
        for input, target in batches(bar, device_of(model)):
            size = batch_size(input, target)
            recorder.begin(size)
            loss = checked_loss(loss_fn(call(model, input), target))
            grads = recorder.backward(loss, list(parameters.values()))
            _accumulate(totals, grads, size)
            loss_sum = loss_sum + loss.detach().double() * size
            num_samples, num_batches = num_samples + size, num_batches + 1
    if num_batches == 0:
        raise DataError(
            "data yields no batches; give an iterable that can be iterated more than once, such "
            "as a DataLoader or a list of (input, target) pairs (a generator is exhausted after "
            "its first use)."
        )
    recorder.flush()
    return Measurement(
        loss=float(loss_sum) / num_samples,
        multipliers={n: t.multiplier(num_samples) for n, t in recorder.tallies.items()},
        variances={n: t.variance(num_samples) for n, t in recorder.tallies.items()},
        gradients={n: t / num_samples for n, t in zip(parameters, totals, strict=True)}
        if gradients
        else None,
        num_samples=num_samples,
        num_batches=num_batches,
    )


def checked_loss(loss: object) -> Tensor:
    """The loss, if it is a scalar tensor.

    Raises:
        DataError: It is not.
    """
    if not isinstance(loss, Tensor):
        raise DataError(
            f"loss_fn returned a {type(loss).__name__}, not a scalar tensor; it is called as "
            "loss_fn(model output, target)."
        )
    if loss.dim() != 0:
        raise DataError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not a scalar; use the mean "
            'over the samples (reduction="mean").'
        )
    return loss


def block_multipliers(block: nn.Module, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """∇_v of one batch by differentiating the block alone at its pins; for blocks of any kind.

    Args:
        block: The block; neither its parameters nor its buffers are touched.
        x: The tensor at the site.
        delta: ∂L/∂x, same shape.

    Returns:
        Pinned parameter → −gradient.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in pinned_parameters(block).items()}
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    with torch.enable_grad():
        y = torch.func.functional_call(block, {**buffers, **leaves}, (x,))
    if not y.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        y, list(leaves.values()), delta.to(y.dtype), allow_unused=True, materialize_grads=True
    )
    return {name: -grad for name, grad in zip(leaves, grads, strict=True)}


class _Recorder:
    """Collects (x, δ) at the sites during forward and backward, and works them off."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites
        self._tallies = [[_Tally(block) for block in site.blocks.values()] for site in sites]
        # as much room as the answer takes: what the missing gradient of θ leaves free
        answer = sum(tally.bytes for tallies in self._tallies for tally in tallies)
        self._room = max(_SMALL, answer)
        self._batch = 2 * sum(site.bytes for site in sites)
        self._streams = self._batch > self._room
        self._closed = [all(tally.is_closed for tally in tallies) for tallies in self._tallies]
        self._xs: list[Tensor | None] = [None] * len(sites)
        self._inputs: list[Tensor | GradientEdge | None] = [None] * len(sites)
        self._pending: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sites]
        self._pending_bytes = 0
        self._size = 0
        self._receivers = [functools.partial(self._receive, index) for index in range(len(sites))]

    @property
    def tallies(self) -> dict[str, _Tally]:
        """Candidate → its running sums."""
        pairs = zip(self._sites, self._tallies, strict=True)
        return {n: t for site, ts in pairs for n, t in zip(site.blocks, ts, strict=True)}

    def hooks(self) -> dict[nn.Module, Callable[..., Any]]:
        """Module → forward hook."""
        sites = enumerate(self._sites)
        return {site.module: functools.partial(self._see, index) for index, site in sites}

    def begin(self, size: int) -> None:
        """Get ready for a batch of `size` samples."""
        if size != self._size:
            self.flush()
        self._size = size

    def backward(self, loss: Tensor, parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
        """One backward pass down to the sites (and parameters, whose gradients it returns)."""
        if None in self._xs or not loss.requires_grad:
            self._complain(lambda x: x is None or not loss.requires_grad)
        inputs = [edge for edge in self._inputs if edge is not None]
        grads = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)
        if not self._streams:
            for index in range(len(inputs)):
                self._receive(index, grads[index])
        if any(x is not None for x in self._xs):
            self._complain(lambda x: x is not None)
        self._inputs = [None] * len(self._sites)
        if self._pending_bytes + self._batch > self._room:
            self.flush()
        return grads[len(inputs) :]

    def flush(self) -> None:
        """Work off whatever is pending."""
        for tallies, pending in zip(self._tallies, self._pending, strict=True):
            if pending:
                x, delta = pending[0] if len(pending) == 1 else map(torch.cat, zip(*pending))
                pending.clear()
                _work_off(tallies, x, delta, self._size, samples_in_front=True)
        self._pending_bytes = 0

    def _see(self, index: int, module: nn.Module, args: object, output: object) -> Tensor | None:
        """Note x at a site in the forward pass; what it returns takes the place of the output."""
        site = self._sites[index]
        if not isinstance(output, Tensor) or self._xs[index] is not None:
            raise CandidateError(
                f'after="{site.after}": in a later batch its output is a {type(output).__name__}, '
                "or it is reached several times; a site is reached exactly once by a tensor."
            )
        starts_graph = not output.requires_grad
        if starts_graph:
            output = output.detach().requires_grad_().clone()
        self._xs[index] = output.detach().clone() if site.overwritten else output.detach()
        if self._streams:
            output.register_hook(self._receivers[index])
        if site.anchor or not self._streams:
            self._inputs[index] = get_gradient_edge(output) if site.overwritten else output
        return output if starts_graph else None

    def _receive(self, index: int, delta: Tensor | None) -> None:
        """Take δ at a site, to be worked off at once where memory counts, else later."""
        x = self._xs[index]
        if x is None or delta is None:
            return
        self._xs[index] = None
        samples_in_front = x.dim() > 1 and x.shape[0] == self._size
        if self._streams or not samples_in_front or not self._closed[index]:
            _work_off(self._tallies[index], x, delta, self._size, samples_in_front)
            return
        pending = self._pending[index]
        if pending and pending[0][0].shape != x.shape:
            self.flush()
        pending.append((x, delta))
        self._pending_bytes += x.nbytes + delta.nbytes

    def _complain(self, is_bad: Callable[[Tensor | None], bool]) -> None:
        bad = [s.after for s, x in zip(self._sites, self._xs, strict=True) if is_bad(x)]
        raise CandidateError(
            f"after={bad}: some batch did not reach these sites in forward, or its loss does not "
            "depend on them; choose sites that every batch passes."
        )


_SMALL = 2**20
"""Bytes of (x, δ) that may always wait to be worked off together."""


@torch.no_grad()
def _work_off(
    tallies: Sequence[_Tally], x: Tensor, delta: Tensor, size: int, samples_in_front: bool
) -> None:
    for tally in tallies:
        if tally.is_closed and samples_in_front:
            tally.add_samples(x, delta, size)
        else:
            tally.add_batch(x, delta, size)


class _Tally:
    """Running sums for one candidate: Σ n_b λ_b, Σ ‖·‖², and over how many units."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._sums = {
            name: torch.zeros_like(p, dtype=_wide(p.dtype), requires_grad=False)
            for name, p in pinned_parameters(block).items()
        }
        first = next(iter(self._sums.values()))
        self._squares = torch.zeros((), dtype=torch.float64, device=first.device)
        self._units = 0
        self.is_closed = isinstance(block, HasFactors)
        self.bytes = sum(total.nbytes for total in self._sums.values())

    def add_samples(self, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in one or more batches of `size` samples each, sample by sample."""
        for factor in self._block.factors(x, delta):  # type: ignore[operator]
            total = self._sums[factor.weight]
            psi, phi = factor.cotangent.to(total.dtype), factor.features.to(total.dtype)
            self._squares.add_(sum_of_squares(psi, phi, factor.bias is not None), alpha=size**2)
            if psi.dim() > 2:
                psi, phi = psi.flatten(0, -2), phi.flatten(0, -2)
            total.addmm_(psi.T, phi, alpha=-size)
            if factor.bias is not None:
                self._sums[factor.bias].sub_(psi.sum(0), alpha=size)
        self._units += x.shape[0]

    def add_batch(self, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in one batch as a whole, by differentiating the block alone."""
        for name, value in block_multipliers(self._block, x, delta).items():
            self._squares.add_(value.square().sum(dtype=torch.float64), alpha=size)
            self._sums[name].add_(value, alpha=size)
        self._units += 1

    def multiplier(self, num_samples: int) -> dict[str, Tensor]:
        """λ, the mean over the samples."""
        return {name: total / num_samples for name, total in self._sums.items()}

    def variance(self, num_samples: int) -> float:
        """Tr Cov(λ), unbiased; NaN when there is only one unit."""
        if self._units < 2:
            return math.nan
        mean = self.multiplier(num_samples).values()
        spread = float(self._squares) - num_samples * sum(_squared_norm(value) for value in mean)
        return max(spread, 0.0) / (self._units - 1) / num_samples


def sum_of_squares(psi: Tensor, phi: Tensor, has_bias: bool) -> Tensor:
    """Σ_n ‖λ_n‖² over the samples, without forming λ_n where that is dearer.

    At a site without further dimensions ‖λ_n‖² = ‖ψ_n‖²(‖φ_n‖² + 1), the 1 for the bias. With T
    positions per sample it is Σ_st (ψ_s·ψ_t)(φ_s·φ_t + 1), or the square of the product itself
    when that is smaller.

    Args:
        psi: Cotangents, shape (samples, ..., out).
        phi: Features, shape (samples, ..., in).
        has_bias: Whether a bias is pinned too.
    """
    if psi.dim() == 2:
        sizes = torch.linalg.vector_norm(psi, dim=1)
        both = sizes * torch.linalg.vector_norm(phi, dim=1)
        return torch.dot(both, both) + torch.dot(sizes, sizes) if has_bias else both.dot(both)
    psi, phi = psi.flatten(1, -2), phi.flatten(1, -2)
    positions, out, width = psi.shape[1], psi.shape[2], phi.shape[2]
    if positions * (out + width) <= out * width:
        return ((psi @ psi.mT) * (phi @ phi.mT + float(has_bias))).sum()
    squares = (psi.mT @ phi).square().sum()
    return squares + psi.sum(1).square().sum() if has_bias else squares


def _accumulate(totals: list[Tensor], grads: Sequence[Tensor | None], size: int) -> None:
    for total, grad in zip(totals, grads, strict=True):
        if grad is not None:
            total.add_(grad, alpha=size)


def _squared_norm(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _quiet(progress: bool | None) -> bool | None:
    """The `disable` of tqdm: None means off where standard error is no terminal."""
    return None if progress is None else not progress
