"""Rules that compare sensitivities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from constrained_growth._arguments import function, number, positive_int
from constrained_growth.errors import RuleError
from constrained_growth.norms import Frobenius
from constrained_growth.rules.rule import check_sensitivities
from constrained_growth.solution import Decision, Norm, Sensitivity
from constrained_growth.statistics import MIN_CONFIDENCE, interval


@dataclass(frozen=True)
class TopK:
    """The k candidates with the largest sensitivities; a tie goes to the one that comes first.

    A candidate with sensitivity exactly 0 is not chosen: to first order it gains nothing.

    Args:
        k: How many.
        cost: Rank by sensitivity per unit of this cost, such as `lambda s: s.num_parameters`.

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
        positive_int("k", self.k, RuleError)
        function("cost", self.cost, RuleError, "lambda s: s.num_new_parameters", optional=True)

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """The k best."""
        check_sensitivities(sensitivities)
        scores = {}
        for name, sensitivity in sensitivities.items():
            cost = 1.0 if self.cost is None else self.cost(sensitivity)
            if not cost > 0:
                raise RuleError(f'cost of TopK is {cost} for candidate "{name}", not positive.')
            scores[name] = sensitivity.value / cost
        ranked = sorted((name for name in scores if scores[name] > 0), key=lambda n: -scores[n])
        chosen = tuple(ranked[: self.k])
        what = "sensitivity" if self.cost is None else "sensitivity per cost"
        reason = f"largest {what} of {len(scores)}" if chosen else f"no {what} above 0"
        return Decision(chosen, reason)


@dataclass(frozen=True)
class Threshold:
    """Every candidate whose sensitivity exceeds a threshold, largest first; possibly none.

    Args:
        absolute: Insert where the sensitivity is above this number.
        relative: Insert where it is above this number times the mean gradient norm of the layers
            the network already has, in the same norm. Needs the stationarity of the solution.
        max_insertions: At most this many; None (default) for all.
        confidence: Compare not the value but the lower end of the `statistics.interval` of this
            confidence with the threshold (0 if none is given).

    Raises:
        RuleError: None is given or one is out of range; or, when called, the stationarity or a
            standard error that is needed is missing.

    Example:
        >>> given = {"a": Sensitivity(0.2, baseline=0.1), "b": Sensitivity(0.5, baseline=0.1)}
        >>> Threshold(absolute=0.3)(given).chosen, Threshold(relative=1.0)(given).chosen
        (('b',), ('b', 'a'))
    """

    absolute: float | None = None
    relative: float | None = None
    max_insertions: int | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        if self.absolute is self.relative is self.confidence is None:
            raise RuleError("Threshold needs absolute=…, relative=… or confidence=….")
        number("absolute", self.absolute, RuleError, "[0, inf]", optional=True)
        number("relative", self.relative, RuleError, "[0, inf]", optional=True)
        number("confidence", self.confidence, RuleError, f"[{MIN_CONFIDENCE}, 1)", optional=True)
        positive_int("max_insertions", self.max_insertions, RuleError, optional=True)

    @property
    def norm(self) -> Norm | None:
        """That of gradients, whose intervals are proven, unless `solve` is given another."""
        return None if self.relative is self.confidence is None else Frobenius()

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """All candidates above their threshold."""
        check_sensitivities(sensitivities)
        bars = {name: self._threshold(s) for name, s in sensitivities.items()}
        over = [name for name, s in sensitivities.items() if self._lower(name, s) > bars[name]]
        chosen = tuple(sorted(over, key=lambda n: -sensitivities[n].value)[: self.max_insertions])
        bar = max(bars.values(), default=0.0)
        surely = "" if self.confidence is None else f" with confidence {self.confidence:g}"
        return Decision(chosen, f"{len(over)} of {len(bars)} sensitivities above {bar:.3g}{surely}")

    def _lower(self, name: str, sensitivity: Sensitivity) -> float:
        """The sensitivity, or the lower end of its confidence interval."""
        if self.confidence is None:
            return sensitivity.value
        if math.isnan(sensitivity.standard_error):
            raise RuleError(
                f"confidence={self.confidence!r} of Threshold needs the standard error of "
                f'candidate "{name}", which is unknown; use several batches.'
            )
        return interval(sensitivity, self.confidence)[0]

    def _threshold(self, sensitivity: Sensitivity) -> float:
        if self.relative is None:
            return self.absolute or 0.0
        if sensitivity.baseline is None:
            raise RuleError(
                f"relative={self.relative!r} of Threshold needs solve(..., stationarity=True), "
                "with a norm of λ alone, such as cg.norms.Frobenius(); it was "
                f"norm={sensitivity.norm!r}."
            )
        return max(self.absolute or 0.0, self.relative * sensitivity.baseline)


@dataclass(frozen=True)
class Generalizes:
    """The candidates whose step lowers the loss on samples that it was not made from, clearly.

    Possibly none. With `solve(..., validation=data)` these are the samples of `data`; otherwise
    each group of the training samples is asked about the step that the others propose
    (`cross_fitted`), to which θ has been fitted too. To be asked about a candidate that is
    already chosen, `then(TopK(1), Generalizes())`, as the best of many slopes looks good by chance.

    A slope may be significant and small: with enough samples it is wherever the network is not
    trained to its end, and training on without a layer does as well there. So the effect has to
    have a size too, in standard deviations of the samples.

    Args:
        level: Of the one-sided test; how often a slope that is not negative passes, at most.
        effect_size: Least `held_out.effect_size`. By default 0.3, which told networks that a
            layer helps from others in `bench decisions --family whether`; 0 asks for significance
            alone.

    Raises:
        RuleError: `level` is not between 0 and 1, or `effect_size` negative; or, when called,
            there is a single sample.

    Example:
        >>> from constrained_growth.solution import HeldOut
        >>> given = {"a": Sensitivity(0.2, held_out=HeldOut(-0.1, 0.02, 1e-6, 0.5))}
        >>> Generalizes()(given).chosen
        ('a',)
    """

    level: float = 0.05
    effect_size: float = 0.3

    def __post_init__(self) -> None:
        number("level", self.level, RuleError, "(0, 1)")
        number("effect_size", self.effect_size, RuleError, "[0, inf)")

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """Those, in the order given."""
        check_sensitivities(sensitivities)
        found = {name: s.held_out or s.cross_fitted for name, s in sensitivities.items()}
        values = {name: other.pvalue if other else math.nan for name, other in found.items()}
        if unknown := [name for name, value in values.items() if math.isnan(value)]:
            raise RuleError(
                f"Generalizes: nothing is known of other samples for {unknown}; give several "
                "samples as data, or as solve(..., validation=data)."
            )
        sizes = {name: held_out.effect_size for name, held_out in found.items() if held_out}
        chosen = tuple(
            name
            for name, value in values.items()
            if value < self.level and sizes[name] >= self.effect_size
        )
        least, most = min(values.values(), default=1.0), max(sizes.values(), default=0.0)
        reason = (
            f"on other samples {len(chosen) or 'none'} of {len(values)} lower the loss clearly: "
            f"the largest effect is {most:.2g} standard deviations of a sample (at least "
            f"{self.effect_size:g} is asked), the least p {least:.2g} (less than {self.level:g} is)"
        )
        return Decision(chosen, reason, evidence={"pvalues": values, "effect_sizes": sizes})
