"""Rules that compare sensitivities with each other or with a bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from constrained_growth.errors import RuleError
from constrained_growth.solution import Decision, Sensitivity
from constrained_growth.statistics import MIN_CONFIDENCE, interval


@dataclass(frozen=True)
class TopK:
    """The k candidates of the largest sensitivity; on a tie the one that comes first.

    A candidate whose sensitivity is exactly 0 is not chosen: there is nothing to gain to first
    order.

    Args:
        k: How many.
        cost: Sensitivity per unit of a cost, such as `lambda s: s.num_parameters`. None
            (default) for the sensitivity itself.

    Raises:
        RuleError: k is not a positive whole number, or a cost is not positive.

    Source:
        Herberg et al., arXiv 2311.15995, with k = 1 and the squared norm of λ_W.

    Example:
        >>> TopK(1)({"a": Sensitivity(0.2), "b": Sensitivity(0.5)}).chosen
        ('b',)
    """

    k: int = 1
    cost: Callable[[Sensitivity], float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise RuleError(f"k={self.k!r} of TopK is not a positive whole number.")

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """The k best."""
        scores = {name: self._score(name, s) for name, s in sensitivities.items()}
        ranked = sorted((name for name in scores if scores[name] > 0), key=lambda n: -scores[n])
        chosen = tuple(ranked[: self.k])
        what = "sensitivity" if self.cost is None else "sensitivity per cost"
        reason = f"largest {what} of {len(scores)}" if chosen else f"no {what} above 0"
        return Decision(chosen, reason)

    def _score(self, name: str, sensitivity: Sensitivity) -> float:
        cost = 1.0 if self.cost is None else self.cost(sensitivity)
        if not cost > 0:
            raise RuleError(
                f'cost of TopK gives {cost} for candidate "{name}"; it must be positive.'
            )
        return sensitivity.value / cost


@dataclass(frozen=True)
class Threshold:
    """Every candidate whose sensitivity exceeds a threshold, largest first; maybe none.

    Args:
        absolute: Insert where the sensitivity is above this number.
        relative: Insert where it is above this number times the mean, over the layers the
            network already has, of the norm of their own gradients (in the same norm;
            candidates are not part of that mean). Needs the stationarity, which `solve` computes
            by default. With both given, a candidate has to exceed both.
        max_insertions: At most so many; None (default) for all.
        confidence: Insert only what is above the bar (0 if none is given) with this confidence,
            going by the standard error: the lower limit of `statistics.interval` has to be above
            it. What lies above it by chance of the sample is then not inserted, with at least
            this probability. None (default) goes by the value alone.

    Raises:
        RuleError: Neither threshold nor confidence is given, one is out of range, `relative` is
            used on a solution without stationarity, or `confidence` where a standard error is not
            known.

    Example:
        >>> rule = Threshold(absolute=0.3)
        >>> rule({"a": Sensitivity(0.2), "b": Sensitivity(0.5)}).chosen
        ('b',)
        >>> Threshold(relative=1.0)({"a": Sensitivity(0.2, baseline=0.4)}).chosen
        ()
    """

    absolute: float | None = None
    relative: float | None = None
    max_insertions: int | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.absolute is None and self.relative is None and self.confidence is None:
            raise RuleError(
                "Threshold needs absolute=…, relative=… or confidence=…, such as relative=1.0."
            )
        for name in ("absolute", "relative"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise RuleError(f"{name}={value!r} of Threshold must not be negative.")
        if self.confidence is not None and not MIN_CONFIDENCE <= self.confidence < 1:
            raise RuleError(
                f"confidence={self.confidence!r} of Threshold must be at least {MIN_CONFIDENCE} "
                "and below 1, such as 0.95."
            )
        if self.max_insertions is not None and self.max_insertions < 1:
            raise RuleError(
                f"max_insertions={self.max_insertions!r} of Threshold must be positive."
            )

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """All that exceed their bar."""
        bars = {name: self._bar(s) for name, s in sensitivities.items()}
        over = [name for name, s in sensitivities.items() if self._limit(name, s) > bars[name]]
        chosen = tuple(sorted(over, key=lambda n: -sensitivities[n].value)[: self.max_insertions])
        bar = max(bars.values(), default=0.0)
        surely = "" if self.confidence is None else f" with confidence {self.confidence:g}"
        return Decision(chosen, f"{len(over)} of {len(bars)} sensitivities above {bar:.3g}{surely}")

    def _limit(self, name: str, sensitivity: Sensitivity) -> float:
        """The sensitivity, or a lower confidence limit of it."""
        if self.confidence is None:
            return sensitivity.value
        if math.isnan(sensitivity.standard_error):
            raise RuleError(
                f"confidence={self.confidence!r} of Threshold needs the standard error of "
                f'candidate "{name}", which is not known; give several batches, or leave it out.'
            )
        return interval(sensitivity, self.confidence)[0]

    def _bar(self, sensitivity: Sensitivity) -> float:
        if self.relative is None:
            return self.absolute or 0.0
        if sensitivity.baseline is None:
            raise RuleError(
                f"relative={self.relative!r} of Threshold needs the gradients of the layers the "
                "network has; call solve(problem, rule, stationarity=True)."
            )
        return max(self.absolute or 0.0, self.relative * sensitivity.baseline)
