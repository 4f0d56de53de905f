"""λ of all candidates from one forward and one backward pass of the network as it is.

Only two tensors are needed at a site: x, what is there, and δ = ∂L/∂x. A block turns them into
its multipliers without standing in the network. (x, δ) of several small batches are collected
and worked off together; large ones are worked off as backward delivers them and then dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from constrained_growth.errors import DataError
from constrained_growth.observation import (
    batch_size,
    batches,
    call,
    device_of,
    hooked,
)
from constrained_growth.recording import Recorder, Site
from constrained_growth.tallies import Estimate, accumulation_dtype


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
) -> Measurement:
    """λ of all candidates, their variances and, if asked for, ∇_θ L, as means over the samples.

    With a mean loss L_b on batch b of n_b samples and N = Σ n_b,

        λ = −(1/N) Σ_b n_b ∇_v L_b,

    so a ragged last batch counts by its size. The variance of λ comes from the per-sample
    multipliers λ_n where the block has them in closed form, and else from the batches:

        tr Cov(λ) = (Σ_n ‖λ_n‖² − N‖λ‖²) / ((N − 1) N)            over samples,
        tr Cov(λ) = (Σ_b n_b‖λ_b‖² − N‖λ‖²) / ((B − 1) N)         over B batches.

    Args:
        model: Run in the mode (train or eval) it is in, with gradients on (`differentiable`).
        loss_fn: `loss_fn(output, target)`, a scalar mean over the samples of the batch.
        data: `(input, target)` pairs.
        sites: From `GrowthProblem`.
        gradients: Also ∇_θ L, which costs one product more per layer.
        moments: Also the second moments that some norms need.
        progress: Progress bar: True, False, or None for one on a terminal when it takes long.

    Raises:
        DataError: No batches, or a batch or loss that cannot be used.
        CandidateError: A site was not reached exactly once.
    """
    recorder = Recorder(sites, moments=moments)
    named = model.named_parameters() if gradients else ()
    parameters = {name: p for name, p in named if p.requires_grad}
    totals = [torch.zeros_like(p, dtype=accumulation_dtype(p.dtype)) for p in parameters.values()]
    loss_sum: Tensor | float = 0.0
    num_samples = num_batches = 0
    bar = tqdm(
        data, desc="multipliers", unit="batch", leave=False, delay=1, disable=_quiet(progress)
    )
    with hooked(recorder.hooks()):
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
    return Measurement(
        loss=float(loss_sum) / num_samples,
        estimates=recorder.estimates(num_samples),
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


def _accumulate(totals: list[Tensor], grads: Sequence[Tensor | None], size: int) -> None:
    for total, grad in zip(totals, grads, strict=True):
        if grad is not None:
            total.add_(grad, alpha=size)


def _quiet(progress: bool | None) -> bool | None:
    """The `disable` of tqdm: None means off where standard error is no terminal."""
    return None if progress is None else not progress
