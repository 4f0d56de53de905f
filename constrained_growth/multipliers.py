"""λ of all candidates from one forward and one backward pass of the network as it is.

Only two tensors are needed at a site: x, what is there, and δ = ∂L/∂x. A block turns them into
its multipliers without standing in the network. (x, δ) of several small batches are collected
and worked off together; large ones are worked off as backward delivers them and then dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from tqdm import tqdm

from constrained_growth.blocks import AffineFactors, HasFactors, pinned_parameters
from constrained_growth.errors import CandidateError, DataError
from constrained_growth.observation import batch_size, batches, call, device_of, watching


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
    modules = {site.after: site.module for site in sites}
    with watching(modules, recorder.see), torch.enable_grad():
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
        self.tallies = {n: _Tally(b) for site in sites for n, b in site.blocks.items()}
        answer = sum(tally.bytes for tally in self.tallies.values())
        # as much room as the answer takes: what the missing gradient of θ leaves free
        self._room = max(_SMALL, answer) // len(sites)
        self._sites = {site.after: site for site in sites}
        self._streams = 2 * sum(site.bytes for site in sites) > max(_SMALL, answer)
        self._pending = {site.after: _Pending() for site in sites}
        self._x: dict[str, Tensor] = {}
        self._edges: dict[str, GradientEdge] = {}
        self._size = 0

    def begin(self, size: int) -> None:
        """Get ready for a batch of `size` samples."""
        if size != self._size:
            self.flush()
        self._size = size
        self._x.clear()
        self._edges.clear()

    def see(self, name: str, _: object, output: object) -> Tensor | None:
        """Note x at a site in the forward pass; what it returns takes the place of the output."""
        site = self._sites[name]
        if not isinstance(output, Tensor) or name in self._x:
            raise CandidateError(
                f'after="{name}": in a later batch its output is a {type(output).__name__}, or '
                "it is reached several times; a site is reached exactly once by a tensor."
            )
        starts_graph = not output.requires_grad
        if starts_graph:
            output = output.detach().requires_grad_().clone()
        self._x[name] = output.detach().clone() if site.overwritten else output.detach()
        if self._streams:
            output.register_hook(functools.partial(self._receive, name))
        if site.anchor or not self._streams:
            self._edges[name] = get_gradient_edge(output)
        return output if starts_graph else None

    def backward(self, loss: Tensor, parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
        """One backward pass down to the sites (and parameters, whose gradients it returns)."""
        missing = self._sites.keys() - self._x.keys()
        if missing or not loss.requires_grad:
            raise CandidateError(
                f"after={sorted(missing or self._sites)}: a batch did not reach these sites in "
                "forward, or its loss does not depend on them."
            )
        edges = list(self._edges.items())
        inputs = [*(edge for _, edge in edges), *parameters]
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        self._edges.clear()
        if not self._streams:
            for (name, _), delta in zip(edges, grads, strict=False):
                self._receive(name, delta)
        if self._x:
            raise CandidateError(
                f"after={sorted(self._x)}: the loss does not depend on these sites."
            )
        return grads[len(edges) :]

    def flush(self) -> None:
        """Work off whatever is pending."""
        for name in self._pending:
            self._work_off(name)

    def _receive(self, name: str, delta: Tensor | None) -> None:
        if delta is None:
            return
        pending = self._pending[name]
        pending.add(self._x.pop(name), delta)
        if pending.bytes > self._room or not self._all_by_sample(name, pending.xs[0]):
            self._work_off(name)

    def _all_by_sample(self, name: str, x: Tensor) -> bool:
        blocks = self._sites[name].blocks
        return all(self.tallies[candidate].by_sample(x, self._size) for candidate in blocks)

    @torch.no_grad()
    def _work_off(self, name: str) -> None:
        pending = self._pending[name]
        if not pending.xs:
            return
        one_batch = pending.xs[0]
        x, delta = pending.take()
        for candidate in self._sites[name].blocks:
            tally = self.tallies[candidate]
            add = tally.add_samples if tally.by_sample(one_batch, self._size) else tally.add_batch
            add(x, delta, self._size)


_SMALL = 2**20
"""Bytes of (x, δ) that may always wait to be worked off together."""


@dataclass
class _Pending:
    """(x, δ) of some batches at one site, waiting."""

    xs: list[Tensor] = field(default_factory=list)
    deltas: list[Tensor] = field(default_factory=list)
    bytes: int = 0

    def add(self, x: Tensor, delta: Tensor) -> None:
        if self.xs and self.xs[0].shape[1:] != x.shape[1:]:
            raise DataError(
                f"the tensor at a site has shape {tuple(x.shape)} in one batch and "
                f"{tuple(self.xs[0].shape)} in another; pad the batches to one length."
            )
        self.xs.append(x)
        self.deltas.append(delta.detach())
        self.bytes += x.nbytes + delta.nbytes

    def take(self) -> tuple[Tensor, Tensor]:
        single = len(self.xs) == 1
        pair = (
            (self.xs[0], self.deltas[0]) if single else (torch.cat(self.xs), torch.cat(self.deltas))
        )
        self.xs, self.deltas, self.bytes = [], [], 0
        return pair


class _Tally:
    """Running sums for one candidate: Σ n_b λ_b, Σ ‖·‖², and over how many units."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._sums = {
            name: torch.zeros_like(p, dtype=_wide(p.dtype), requires_grad=False)
            for name, p in pinned_parameters(block).items()
        }
        self._squares: Tensor | float = 0.0
        self._units = 0
        self.bytes = sum(total.nbytes for total in self._sums.values())

    def by_sample(self, x: Tensor, size: int) -> bool:
        """Whether the multipliers of single samples are known: a closed form, samples in front."""
        return isinstance(self._block, HasFactors) and x.dim() > 1 and x.shape[0] == size

    def add_samples(self, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in one or more batches of `size` samples each, sample by sample."""
        assert isinstance(self._block, HasFactors)
        for factor in self._block.factors(x, delta):
            wide = _widened(factor, self._sums[factor.weight].dtype)
            squares = squared_norms(wide).sum(dtype=torch.float64)
            self._squares = self._squares + squares * size**2
            self._subtract_product(wide, size)
        self._units += x.shape[0]

    def add_batch(self, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in one batch as a whole, by differentiating the block alone."""
        for name, value in block_multipliers(self._block, x, delta).items():
            self._squares = self._squares + value.square().sum(dtype=torch.float64) * size
            self._sums[name].add_(value, alpha=size)
        self._units += 1

    def _subtract_product(self, factor: AffineFactors, size: int) -> None:
        """Add −n Σ ψφᵀ and −n Σ ψ, the weight n of the batch folded into the product."""
        psi, phi = factor.cotangent.flatten(0, -2), factor.features.flatten(0, -2)
        self._sums[factor.weight].addmm_(psi.T, phi, alpha=-size)
        if factor.bias is not None:
            self._sums[factor.bias].sub_(psi.sum(0), alpha=size)

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


def squared_norms(factor: AffineFactors) -> Tensor:
    """‖λ_n‖² of every sample n, without forming λ_n where that is dearer.

    For a site without further dimensions ‖ψ_n‖²(‖φ_n‖² + 1); with T positions per sample
    Σ_st (ψ_s·ψ_t)(φ_s·φ_t + 1), or the product itself when it is smaller (the 1 is the bias).
    """
    psi, phi = factor.cotangent, factor.features
    one = 0.0 if factor.bias is None else 1.0
    if psi.dim() == 2:
        return torch.linalg.vecdot(psi, psi) * (torch.linalg.vecdot(phi, phi) + one)
    psi, phi = psi.flatten(1, -2), phi.flatten(1, -2)
    positions, out, width = psi.shape[1], psi.shape[2], phi.shape[2]
    if positions * (out + width) <= out * width:
        return ((psi @ psi.mT) * (phi @ phi.mT + one)).sum((1, 2))
    squares = (psi.mT @ phi).square().sum((1, 2))
    return squares + psi.sum(1).square().sum(1) if one else squares


def _accumulate(totals: list[Tensor], grads: Sequence[Tensor | None], size: int) -> None:
    for total, grad in zip(totals, grads, strict=True):
        if grad is not None:
            total.add_(grad, alpha=size)


def _widened(factor: AffineFactors, dtype: torch.dtype) -> AffineFactors:
    """The factor in the dtype of the sums, the same object where it is already."""
    psi, phi = factor.cotangent, factor.features
    if psi.dtype == phi.dtype == dtype:
        return factor
    return replace(factor, cotangent=psi.to(dtype), features=phi.to(dtype))


def _squared_norm(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _quiet(progress: bool | None) -> bool | None:
    """The `disable` of tqdm: None means off where standard error is no terminal."""
    return None if progress is None else not progress
