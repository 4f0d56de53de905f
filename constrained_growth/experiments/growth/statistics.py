"""When a run has reached a loss, and how much less that took than another: medians over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from constrained_growth.experiments.decisions.statistics import DRAWS, Estimate, estimate

Array = NDArray[np.float64]

SMOOTH = 5
"""The loss is the mean over so many rows."""


def smoothed(loss: Sequence[float], rows: int = SMOOTH) -> Array:
    """At each row the mean over the last few, or over all there are.

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


def saving(
    costs: Sequence[float | None], others: Sequence[float | None], seed: int = 0
) -> Estimate:
    """One minus the median over seeds of cost / other, with the bootstrap interval over seeds.

    A cost of None counts as more than any number: then the saving may be −∞.

    Args:
        costs: One for each seed.
        others: Of the same seeds, none of them None.
        seed: Of the bootstrap.

    Example:
        >>> saving([1.0, 1.0, None], [2.0, 4.0, 2.0]).value
        0.5
    """
    pairs = zip(costs, others, strict=True)
    ratios = np.array([np.inf if a is None or b is None else a / b for a, b in pairs])
    rows = np.random.default_rng(seed).integers(len(ratios), size=(DRAWS, len(ratios)))
    drawn = np.quantile(ratios[rows], 0.5, axis=1, method="higher")
    whole = np.quantile(ratios, 0.5, method="higher")
    return estimate(1 - np.concatenate([[whole], drawn]))
