"""What a sample says about the size of a multiplier: confidence intervals, agreement of decisions.

The intervals need tr Cov(λ̂) alone, which every solve has, and hold whatever the covariance is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import NormalDist

from torch import Tensor

from constrained_growth._arguments import function, instance, number
from constrained_growth._later import with_fields
from constrained_growth._sharding import whole
from constrained_growth.errors import RuleError
from constrained_growth.solution import Decision, Sensitivity

__all__ = ["agreement", "interval"]

MIN_CONFIDENCE = 0.79
"""Below it `interval` has no proof: Székely and Bakirov's bound holds for z² ≥ 1.54."""


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """‖·‖²_F of several tensors together, squared and summed in float64."""
    sizes = (tensor.abs() if tensor.is_complex() else tensor for tensor in tensors)
    return sum(float(whole(size.double().square().sum())) for size in sizes)


def interval(sensitivity: Sensitivity, confidence: float = 0.95) -> tuple[float, float]:
    """A confidence interval for ‖λ‖, in any norm, given λ̂ from a sample.

        ‖λ̂‖ ± z s,   s = L √tr Cov(λ̂),   z the two-sided normal quantile; cut off at 0

    It holds with at least this confidence for normal λ̂ of any covariance, since
    |‖λ̂‖ − ‖λ‖| ≤ L ‖λ̂ − λ‖_F, and among all quadratic forms of mean tr Cov the heaviest tail
    belongs to that with one direction only. It is as wide as it has to be when there is one, and
    too wide by a factor of about √d when the noise is spread over d directions. For a norm without
    a known L, such as those of second moments, s is the standard error, and the interval holds for
    large samples only, and not where λ is zero.

    Args:
        sensitivity: Of a solution.
        confidence: At least 0.79 and below 1.

    Returns:
        Lower and upper limit; (0, inf) when neither is known.

    Raises:
        RuleError: The confidence is out of range.

    Source:
        Székely and Bakirov, *Extremal probabilities for Gaussian quadratic forms*, Probability
        Theory and Related Fields 126, 2003.

    Example:
        >>> low, high = interval(Sensitivity(value=1.0, standard_error=0.1))
        >>> round(low, 3), round(high, 3)
        (0.804, 1.196)
    """
    instance("sensitivity", sensitivity, Sensitivity, RuleError, "one of solution.sensitivities")
    number("confidence", confidence, RuleError, f"[{MIN_CONFIDENCE}, 1)")
    bound = sensitivity.error_bound
    error = sensitivity.standard_error if math.isnan(bound) else bound
    if not math.isfinite(error):
        return 0.0, math.inf
    half = -NormalDist().inv_cdf((1 - confidence) / 2) * error
    return max(0.0, sensitivity.value - half), sensitivity.value + half


def agreement(
    sensitivities: Mapping[str, Sensitivity],
    rule: Callable[[Mapping[str, Sensitivity]], Decision],
) -> float:
    """How often a rule would decide the same on other samples of the same size.

    On a bootstrap sample each sensitivity differs from its `value` as its replicate does from the
    mean of all replicates.

    Args:
        sensitivities: Of a solution.
        rule: A function of the sensitivities; it is called for each of their `replicates`.

    Returns:
        The share of the bootstrap samples on which it chooses the same candidates; NaN without
        replicates.

    Source:
        Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 6.

    Example:
        >>> given = {
        ...     "a": Sensitivity(1.0, replicates=(1.1, 0.8, 1.0, 1.1)),
        ...     "b": Sensitivity(0.7, replicates=(0.6, 0.9, 0.8, 0.5)),
        ... }
        >>> agreement(given, lambda s: Decision((max(s, key=lambda n: s[n].value),)))
        0.75
    """
    function("rule", rule, RuleError, "cg.TopK(1)")
    instance("sensitivities", sensitivities, Mapping, RuleError, "those of a solution")
    columns = []
    for sensitivity in sensitivities.values():
        replicates = sensitivity.replicates
        mean = math.fsum(replicates) / max(1, len(replicates))
        columns.append([max(0.0, sensitivity.value + r - mean) for r in replicates])
    chosen, same = set(rule(sensitivities).chosen), []
    for draw in zip(*columns, strict=False):
        pairs = zip(sensitivities.items(), draw, strict=True)
        other = {name: with_fields(one, value=value) for (name, one), value in pairs}
        same.append(set(rule(other).chosen) == chosen)
    return sum(same) / len(same) if same else math.nan
