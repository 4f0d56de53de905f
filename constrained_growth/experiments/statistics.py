"""The statistics of all studies: bootstrap intervals, paired comparisons, regret, savings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.floating]

DRAWS = 10_000
"""Bootstrap samples."""

LEVEL = 0.95
"""Of the confidence intervals."""

SMOOTH = 5
"""A smoothed loss is the mean over this many rows."""


@dataclass(frozen=True)
class Estimate:
    """A number with its percentile bootstrap interval, 2.5 % of the samples below and above it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | Array) -> Spread:
        """Of some numbers."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)


def estimate(resampled: Array) -> Estimate:
    """The percentile interval, from the value followed by those of bootstrap samples."""
    tail = (1 - LEVEL) / 2
    samples = resampled[1:]
    if np.isnan(samples).any():
        return Estimate(float(resampled[0]), float("nan"), float("nan"))
    low, high = np.quantile(samples, [tail, 1 - tail], method="nearest")
    return Estimate(float(resampled[0]), float(low), float(high))


def mean_difference(loss: Array, other: Array) -> Estimate:
    """Mean of loss − other over the same networks, with its interval over networks."""
    return estimate((loss - other)[_rows(len(loss), 0)].mean(1))


def _rows(count: int, seed: int, draws: int = DRAWS) -> NDArray[np.int64]:
    """All rows once, then rows drawn with replacement; shape (1 + draws, count)."""
    drawn = np.random.default_rng(seed).integers(count, size=(draws, count))
    return np.concatenate([np.arange(count)[None], drawn])


def best_loss(inserted: Array) -> Array:
    """Expected loss of each network at its best site, cross-fitted, shape (networks,).

    The lowest of several noisy means is too low on average. So the best site is picked on one
    half of the runs and its loss read on the other half, in all ways to halve them. The error that
    remains is on the safe side: where the pick is not the best site, the loss is too high.
    `inserted` has the losses after inserting at each site, shape (sites, networks, runs).

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
    """Expected loss of each network at its best site, and the mean over its sites (at random)."""

    best: Array
    mean: Array

    @classmethod
    def of(cls, inserted: Array) -> Yardstick:
        """From the losses after insertion at each site, shape (sites, networks, runs)."""
        return cls(best_loss(inserted), inserted.mean(axis=(0, 2)))

    @property
    def signal(self) -> float:
        """How far the mean site is above the best one, in standard errors over the networks.

        Where this is not clearly above zero the place hardly matters, and regret relative to
        random says little.
        """
        spread = self.mean - self.best
        error = spread.std(ddof=1) / np.sqrt(len(spread))
        return float(spread.mean() / error) if error > 0 else float("inf")


def resampled_regret(loss: Array, against: Yardstick, seed: int, draws: int = DRAWS) -> Array:
    """Regret relative to random, of all networks and of bootstrap samples of them, (1 + draws,).

        Σ (L(chosen) − L(best)) / Σ (mean over sites of L − L(best)),   sums over networks

    0 is the best site in expectation, 1 no better than chance; a rule that inserts nothing where
    that is best gets below 0. Rules with the same seed are compared on the same samples. `loss` is
    the expected loss of each network under the rule, shape (networks,).
    """
    rows = _rows(len(loss), seed, draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (loss - against.best)[rows].sum(1) / (against.mean - against.best)[rows].sum(1)


def resampled_mean_regret(losses: Sequence[Array], against: Sequence[Yardstick]) -> Array:
    """Mean over tasks of the regret relative to random, the networks of each resampled."""
    each = [
        resampled_regret(loss, of, 1_000 * (1 + index))
        for index, (loss, of) in enumerate(zip(losses, against, strict=True))
    ]
    return np.mean(each, axis=0)


def mean_regret(losses: Sequence[Array], against: Sequence[Yardstick]) -> Estimate:
    """`resampled_mean_regret` with its interval."""
    return estimate(resampled_mean_regret(losses, against))


def smoothed(loss: Sequence[float], rows: int = SMOOTH) -> Array:
    """At each row the mean over the last few, or over as many as there are.

    Example:
        >>> smoothed([4.0, 2.0, 0.0, 1.0], 2)
        array([4. , 3. , 1. , 0.5])
    """
    values = np.asarray(loss, dtype=np.float64)
    return np.array([values[max(0, i + 1 - rows) : i + 1].mean() for i in range(len(values))])


def first_at_most(loss: Sequence[float], target: float) -> int | None:
    """The first row whose smoothed loss is not above the target, or None.

    Example:
        >>> first_at_most([4.0, 2.0, 1.0], 2.5), first_at_most([4.0, 2.0, 1.0], 1.0)
        (2, None)
    """
    (found,) = np.nonzero(smoothed(loss) <= target)
    return int(found[0]) if len(found) else None


def saving(costs: Sequence[float | None], others: Sequence[float | None]) -> Estimate:
    """One minus the median over seeds of cost / other, with its interval over seeds.

    A cost of None exceeds every number: then the saving may be −∞.

    Example:
        >>> saving([1.0, 1.0, None], [2.0, 4.0, 2.0]).value
        0.5
    """
    pairs = zip(costs, others, strict=True)
    ratios = np.array([np.inf if a is None or b is None else a / b for a, b in pairs])
    drawn = ratios[_rows(len(ratios), 0)]
    return estimate(1 - np.quantile(drawn, 0.5, axis=1, method="higher"))


@dataclass(frozen=True)
class Paired:
    """One arm against another, seed by seed; a difference is first − second.

    The 95 % intervals are bootstrap intervals, bias-corrected and accelerated for the mean, of
    percentiles for the median. `smaller` and `equal` count pairs in which the first is smaller, or
    both are equal; `p` is that of the two-sided Wilcoxon signed-rank test, 1 if all are equal.
    """

    runs: int
    mean: float
    interval: tuple[float, float]
    median: float
    median_interval: tuple[float, float]
    smaller: int
    equal: int
    p: float


def paired(first: Array, second: Array) -> Paired:
    """Compare two arms on the same seeds, given in the same order."""
    difference = first - second
    if np.ptp(difference) > 0:
        mean = _interval(difference, np.mean, "BCa")
        median = _interval(difference, np.median, "percentile")
    else:
        mean = median = float(difference[0]), float(difference[0])
    wilcoxon: Any = stats.wilcoxon(difference) if difference.any() else None
    return Paired(
        len(difference),
        float(difference.mean()),
        mean,
        float(np.median(difference)),
        median,
        int((difference < 0).sum()),
        int((difference == 0).sum()),
        1.0 if wilcoxon is None else float(wilcoxon.pvalue),
    )


def _interval(values: Array, statistic: Callable[..., Any], method: str) -> tuple[float, float]:
    found = stats.bootstrap(
        (values,),
        statistic,
        n_resamples=DRAWS,
        method=method,
        random_state=np.random.default_rng(0),  # type: ignore[call-arg]  # in every SciPy
        vectorized=True,
    ).confidence_interval
    return float(found.low), float(found.high)


def agreement(
    ours: Array, runs: int, mean: float | None, median: float | None
) -> dict[str, float | None]:
    """Two-sided p-values for the hypothesis that a reference's runs and ours are one population.

    The single runs of the reference are not known, so that no rank test is possible. Pairs of
    samples of the two sizes are drawn from our runs, and p is the share of pairs whose means
    (medians) differ at least as much as those observed; None where the figure is not known. Final
    losses are skewed, so that nothing is assumed to be normal.
    """
    draw = np.random.default_rng(0)
    theirs = draw.choice(ours, (DRAWS, runs))
    again = draw.choice(ours, (DRAWS, len(ours)))

    def p(known: float | None, statistic: Callable[..., Any]) -> float | None:
        if known is None:
            return None
        by_chance = np.abs(statistic(theirs, axis=1) - statistic(again, axis=1))
        observed = abs(statistic(ours) - known)
        return float((1 + (by_chance >= observed).sum()) / (1 + DRAWS))

    return {"mean": p(mean, np.mean), "median": p(median, np.median)}


def same_share(held: int, runs: int, other_held: int, other_runs: int) -> float:
    """P-value of Fisher's exact test that two counts have the same probability."""
    test: Any = stats.fisher_exact([[held, runs - held], [other_held, other_runs - other_held]])
    return float(test.pvalue)
