"""When to insert a layer: now, later, or never."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Any

from constrained_growth._arguments import instance, number, positive_int
from constrained_growth.errors import RuleError
from constrained_growth.solution import Solution, Status
from constrained_growth.statistics import squared_norm


class When(Enum):
    """When to insert a layer; each value is a sentence."""

    NOW = "It is time: ask a rule which layer to insert."
    LATER = "Train on, and ask again."
    NEVER = "Train on, and stop asking: another layer has nothing to gain."


@dataclass(eq=False)
class Plateau:
    """Says NOW when the training loss has stopped falling.

    A loss is progress if it is below the lowest one so far by more than `tolerance` times that.
    After `patience` losses in a row without progress the answer is NOW, and counting starts again.
    The answer is NEVER from the moment the loss reaches the `target` or is not finite, or after
    `most` times NOW (None, the default of both: no limit).

    Attributes:
        best: The lowest loss since the last NOW; None before the first.
        stale: How many losses have come since then without progress.
        count: How many times the answer was NOW.
        over: Whether the answer was NEVER.

    Raises:
        RuleError: An argument is out of range.

    Example:
        >>> plateau = Plateau(patience=2)
        >>> [plateau.update(loss).name for loss in (1.0, 0.5, 0.5, 0.5, 0.5, 0.4)]
        ['LATER', 'LATER', 'LATER', 'NOW', 'LATER', 'LATER']
    """

    patience: int = 5
    tolerance: float = 1e-3
    _: KW_ONLY
    target: float | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        positive_int("patience", self.patience, RuleError)
        positive_int("most", self.most, RuleError, optional=True)
        number("tolerance", self.tolerance, RuleError, "[0, 1)")
        number("target", self.target, RuleError, "[-inf, inf]", optional=True)
        self.best: float | None = None
        self.stale, self.count, self.over = 0, 0, False

    def update(self, loss: float) -> When:
        """Record a training loss, such as that of an epoch, and say when."""
        try:
            loss = float(loss)  # also of a tensor
        except (TypeError, ValueError, RuntimeError):
            raise RuleError(f"loss={loss!r:.80} is no number; give that of an epoch.") from None
        reached = self.target is not None and loss <= self.target
        if self.over or not math.isfinite(loss) or reached:
            self.over = True
            return When.NEVER
        if self.best is None or loss < self.best - self.tolerance * abs(self.best):
            self.best, self.stale = loss, 0
            return When.LATER
        if self.stale + 1 < self.patience:
            self.stale += 1
            return When.LATER
        if self.most is not None and self.count >= self.most:
            self.over = True
            return When.NEVER
        self.best, self.stale, self.count = None, 0, self.count + 1
        return When.NOW

    def state_dict(self) -> dict[str, Any]:
        """The attributes, to be saved in a checkpoint; JSON takes them."""
        return {"best": self.best, "stale": self.stale, "count": self.count, "over": self.over}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state; a RuleError if it is not from a plateau rule."""
        if not isinstance(state_dict, Mapping) or state_dict.keys() != self.state_dict().keys():
            raise RuleError(f"state_dict={state_dict!r} is not that of a Plateau.")
        vars(self).update(state_dict)


@dataclass(frozen=True)
class Exhausted:
    """Says NOW when new parameters have more to gain than the old ones.

    Called with a solution, it answers NOW when the largest ‖λ_c‖ of a candidate is at least
    `ratio` times ‖∇_θ L‖: to first order, a step of given length then lowers the loss more in the
    new parameters than in the old ones. LATER if not, or if no multiplier differs significantly
    from zero; NEVER if that is so at a stationary θ, where neither has anything to gain.

    Args:
        ratio: How much larger; 1 by default. Both norms are Frobenius norms.
        significance: A multiplier counts as zero if its norm is below this many standard errors;
            not if its standard error is unknown.

    Raises:
        RuleError: An argument is negative; or, when called, the solution has no stationarity or
            no multipliers.
    """

    ratio: float = 1.0
    significance: float = 2.0

    def __post_init__(self) -> None:
        number("ratio", self.ratio, RuleError, "[0, inf]")
        number("significance", self.significance, RuleError, "[0, inf]")

    def __call__(self, solution: Solution) -> When:
        """The answer for a solution."""
        instance("solution", solution, Solution, RuleError, "what cg.solve(problem) returns")
        if solution.stationarity is None:
            raise RuleError("Exhausted needs the stationarity: solve(..., stationarity=True).")
        missing = [name for name in solution.sensitivities if name not in solution.multipliers]
        if missing:
            raise RuleError(f"solution has no multipliers of {missing}; Exhausted needs them.")
        sizes = {n: math.sqrt(squared_norm(m.values())) for n, m in solution.multipliers.items()}
        zero = all(
            sizes[name] <= self.significance * math.sqrt(sensitivity.variance)
            for name, sensitivity in solution.sensitivities.items()
        )
        if zero or not any(sizes.values()):
            return When.NEVER if solution.status is Status.KKT_MULTIPLIERS else When.LATER
        enough = max(sizes.values()) >= self.ratio * solution.stationarity
        return When.NOW if enough else When.LATER
