"""How good decisions were: regret relative to random, with luck taken out, and its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DRAWS = 10_000
"""Bootstrap samples."""

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Estimate:
    """A number and between which limits it may be.

    Attributes:
        value: The number.
        low: 2.5 % of the bootstrap samples are below.
        high: 2.5 % are above.
    """

    value: float
    low: float
    high: float


def best_loss(inserted: Array) -> Array:
    """Expected loss of each network at its best site, luck taken out.

    The lowest of several noisy means is too low on average. So the best site is picked on one
    half of the runs and its loss read on the other half, in all ways to halve them. What is left
    is an error to the safe side: where the pick is not the best site, the loss is too high.

    Args:
        inserted: Shape (sites, networks, runs), two runs or more.

    Returns:
        Shape (networks,).

    Example:
        >>> best_loss(np.array([[[1.0, 5.0]], [[3.0, 3.0]]]))  # 1 is picked and 5 read; 3 and 3
        array([4.])
    """
    runs = range(inserted.shape[2])
    found = []
    for half in combinations(runs, len(runs) // 2):
        other = [run for run in runs if run not in half]
        for pick, read in ((list(half), other), (other, list(half))):
            site = inserted[:, :, pick].mean(2).argmin(0)
            found.append(inserted[:, :, read].mean(2)[site, np.arange(len(site))])
    return np.mean(found, axis=0)


@dataclass(frozen=True)
class Yardstick:
    """What a choice of the site is held against.

    Attributes:
        best: Expected loss of each network at its best site, shape (networks,).
        mean: That of the mean over the sites: a choice at random.
    """

    best: Array
    mean: Array


def yardstick(inserted: Array) -> Yardstick:
    """From the losses after insertion at every site.

    Args:
        inserted: Shape (sites, networks, runs), two runs or more.
    """
    return Yardstick(best_loss(inserted), inserted.mean(axis=(0, 2)))


def signal(against: Yardstick) -> float:
    """How far the mean site is above the best, in standard errors over the networks.

    Where that is not clear of zero the place hardly matters, and regret relative to random says
    little.
    """
    spread = against.mean - against.best
    error = spread.std(ddof=1) / np.sqrt(len(spread))
    return float(spread.mean() / error) if error > 0 else float("inf")


def resampled_regret(loss: Array, against: Yardstick, seed: int, draws: int = DRAWS) -> Array:
    """Regret relative to random, of all networks and of bootstrap samples of them.

        Σ (L(chosen) − L(best)) / Σ (mean over sites of L − L(best)),   sums over networks

    0 is always the best site in expectation, 1 no better than chance; a rule that inserts nothing
    where that is best gets below 0.

    Args:
        loss: Expected loss of each network under the rule, shape (networks,).
        against: What it is held against.
        seed: Of the bootstrap; rules with the same seed are compared on the same samples.
        draws: How many samples.

    Returns:
        Shape (1 + draws,): the regret of all networks, then of the samples.
    """
    rows = _samples(len(loss), seed, draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (loss - against.best)[rows].sum(1) / (against.mean - against.best)[rows].sum(1)


def estimate(resampled: Array) -> Estimate:
    """The percentile interval.

    Args:
        resampled: The value, then those of bootstrap samples, as `resampled_regret` gives them.
    """
    tail = (1 - LEVEL) / 2
    samples = resampled[1:]
    if np.isnan(samples).any():
        return Estimate(float(resampled[0]), float("nan"), float("nan"))
    low, high = np.quantile(samples, [tail, 1 - tail], method="nearest")
    return Estimate(float(resampled[0]), float(low), float(high))


def mean_difference(loss: Array, other: Array, seed: int, draws: int = DRAWS) -> Estimate:
    """Mean over the networks of loss − other, with the percentile interval over networks.

    Args:
        loss: Shape (networks,).
        other: Of the same networks.
        seed: Of the bootstrap.
        draws: How many samples.
    """
    return estimate((loss - other)[_samples(len(loss), seed, draws)].mean(1))


def _samples(count: int, seed: int, draws: int) -> NDArray[np.int64]:
    """All rows once, then rows drawn with replacement; shape (1 + draws, count)."""
    drawn = np.random.default_rng(seed).integers(count, size=(draws, count))
    return np.concatenate([np.arange(count)[None], drawn])
