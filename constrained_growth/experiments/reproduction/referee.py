"""The statistics a referee would ask for: paired, with intervals, against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from constrained_growth.experiments.reproduction.protocols import Experiment, Reference
from constrained_growth.experiments.reproduction.runs import Array, Runs

LAST = 10
"""The final loss is the mean over so many last epochs."""

DRAWS = 10_000

STEPS = (1, 10, 100)
"""After so many epochs (steps, on all data at once) arms are compared, and at the end."""


@dataclass(frozen=True)
class Summary:
    """Mean, median and quartiles of some runs."""

    runs: int
    mean: float
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """One arm against another, seed by seed; a difference is first − second.

    Attributes:
        runs: How many pairs.
        mean: Mean difference, with its 95 % bootstrap interval (bias-corrected, accelerated).
        interval: That interval.
        median: Median difference.
        median_interval: Its 95 % bootstrap interval (percentiles).
        smaller: In how many pairs the first is smaller.
        equal: In how many both are the same.
        p: Of the two-sided Wilcoxon signed-rank test; 1 if all pairs are equal.
    """

    runs: int
    mean: float
    interval: tuple[float, float]
    median: float
    median_interval: tuple[float, float]
    smaller: int
    equal: int
    p: float


@dataclass(frozen=True)
class Agreement:
    """Whether ours and the reference's runs can be of one population; p-values, two-sided.

    Attributes:
        mean: Of the difference of the means.
        median: Of the difference of the medians.
    """

    mean: float | None
    median: float | None


def final_loss(runs: Runs) -> Array:
    """Mean training loss of the last epochs of each run, the last value carried forward."""
    return np.ascontiguousarray(runs.loss[-LAST:], dtype=float).mean(axis=0)


def drop(runs: Runs, epoch: int, after: int) -> Array:
    """By how much the loss of each run fell in so many epochs from this one on."""
    return (runs.loss[epoch] - runs.loss[epoch + after]).astype(float)


def summary(values: Array) -> Summary:
    """Mean, median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return Summary(len(values), float(values.mean()), float(median), float(low), float(high))


def paired(first: Array, second: Array) -> Paired:
    """Compare two arms seed by seed.

    Args:
        first: One number for each seed.
        second: The same seeds in the same order.
    """
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


def agreement(ours: Array, reference: Reference) -> Agreement:
    """Test the hypothesis that the reference's runs and ours are draws from one population.

    Of the reference a mean, a median and the number of runs are known, not the runs, so that
    rank tests cannot be made. Under the hypothesis both samples are like draws from ours; so
    pairs of samples of the two sizes are drawn from ours, and p is the share of pairs whose
    means (medians) differ at least as much as those observed. Nothing normal is assumed: final
    losses are skewed, some of them near zero.

    Args:
        ours: Final losses of our runs.
        reference: What is known of the others.
    """
    draw = np.random.default_rng(0)
    theirs = draw.choice(ours, (DRAWS, reference.runs))
    again = draw.choice(ours, (DRAWS, len(ours)))

    def p(known: float | None, statistic: Callable[..., Any]) -> float | None:
        if known is None:
            return None
        by_chance = np.abs(statistic(theirs, axis=1) - statistic(again, axis=1))
        observed = abs(statistic(ours) - known)
        return float((1 + (by_chance >= observed).sum()) / (1 + DRAWS))

    return Agreement(p(reference.mean, np.mean), p(reference.median, np.median))


def same_share(held: int, runs: int, other_held: int, other_runs: int) -> float:
    """P-value of Fisher's exact test that two counts have one probability behind them."""
    table = [[held, runs - held], [other_held, other_runs - other_held]]
    test: Any = stats.fisher_exact(table)
    return float(test.pvalue)


def work(runs: Runs, experiment: Experiment, samples: int, epoch: int | None = None) -> Array:
    """Multiply-adds that each run has spent after 0, 1, … epochs, shape (epochs + 1, seeds).

    Counted: a training step costs a sample three forward passes (forward, and backward a product
    for the gradients of the weights and one for those of the inputs); the choice of a site one
    forward pass and one backward to the inputs over all data, and at each site two passes of the
    new layer (one does for a layer with one weight). Runs that stopped spend nothing more.
    Biases and activations are not counted.

    Args:
        runs: One arm.
        experiment: Its protocol.
        samples: Training samples.
        epoch: When the layer was inserted; that of the protocol by default.
    """
    epoch = experiment.before if epoch is None else epoch
    small, grown = (3.0 * samples * float(count) for count in runs.operations[:2])
    choice = samples * float(runs.operations[2])
    chosen = runs.site >= 0
    spent = np.zeros((len(runs.loss) + 1, len(runs.site)))
    for e in range(len(runs.loss)):
        now = np.where(chosen & (e >= epoch), grown, small) if small != grown else small
        spent[e + 1] = spent[e] + now * (e < runs.trained)
        if e == epoch:
            spent[e + 1] += choice * chosen * (epoch < runs.trained)
    return spent


def saving(experiment: Experiment, small: int, grown: int) -> float:
    """Share of the multiply-adds saved against the final network from the start, choice excluded.

    Args:
        experiment: Its protocol.
        small: Multiply-adds of the small network for one sample.
        grown: Those of the grown one.
    """
    return experiment.before * (grown - small) / (experiment.epochs * grown)


def reached(runs: Runs, level: float, spent: Array | None = None) -> Array:
    """After how many epochs, or what work, the loss of each run first is at or below a level.

    Args:
        runs: One arm.
        level: In nats.
        spent: What to count instead of epochs, as from `work`.

    Returns:
        One number for each seed, infinity for a run that never gets there.
    """
    below = runs.loss <= level
    first = below.argmax(axis=0)
    at = first.astype(float) if spent is None else spent[first, np.arange(below.shape[1])]
    return np.where(below.any(axis=0), at, math.inf)


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
