"""When to ask whether a layer would help: now, later, or never."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from constrained_growth.errors import RuleError
from constrained_growth.solution import Solution, Status
from constrained_growth.statistics import squared_norm


class When(Enum):
    """An answer to the question when to insert; each value is a sentence."""

    NOW = "It is time: ask a rule which layer to insert."
    LATER = "Train on, and ask again."
    NEVER = "Train on, and stop asking: there is nothing more to gain by a layer."


@dataclass(frozen=True)
class PlateauState:
    """What a plateau rule remembers.

    Attributes:
        best: The lowest loss so far since the last NOW.
        stale: How many losses ago it was.
        count: How often it has said NOW.
        over: Whether it has said NEVER.
    """

    best: float = math.inf
    stale: int = 0
    count: int = 0
    over: bool = False


class Plateau:
    """Says NOW when the training loss has stopped falling.

    The loss counts as falling when it is below the lowest one so far by more than `tolerance`
    times that; after `patience` losses in a row that are not, it is time, and the watch begins
    anew. It never is again once the loss is at the target or not finite, or after `most` times.

    Args:
        patience: How many losses without progress to wait for.
        tolerance: What is progress, relative to the loss (as in PyTorch's `ReduceLROnPlateau`).
        target: A loss that is low enough to need no layer; None (default) for none.
        most: How often to say NOW at most; None (default) for any number.

    Attributes:
        state: What is remembered.

    Raises:
        RuleError: An argument is out of range.

    Example:
        >>> plateau = Plateau(patience=2)
        >>> [plateau.update(loss).name for loss in (1.0, 0.5, 0.5, 0.5, 0.5, 0.4)]
        ['LATER', 'LATER', 'LATER', 'NOW', 'LATER', 'LATER']
    """

    def __init__(
        self,
        patience: int = 5,
        tolerance: float = 1e-3,
        *,
        target: float | None = None,
        most: int | None = None,
    ) -> None:
        for name, value in (("patience", patience), ("most", most)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "most" and value is None):
                raise RuleError(f"{name}={value!r} of Plateau is not a positive whole number.")
        if not 0 <= tolerance < 1:
            raise RuleError(f"tolerance={tolerance!r} of Plateau must lie between 0 and 1.")
        self.patience, self.tolerance, self.target, self.most = patience, tolerance, target, most
        self.state = PlateauState()

    def __repr__(self) -> str:
        return f"Plateau(patience={self.patience}, tolerance={self.tolerance:g})"

    def update(self, loss: float) -> When:
        """Take note of a loss, of an epoch for example, and say when.

        Args:
            loss: The training loss.
        """
        state, loss = self.state, float(loss)
        reached = self.target is not None and loss <= self.target
        if state.over or not math.isfinite(loss) or reached:
            self.state = replace(state, over=True)
            return When.NEVER
        if loss < state.best - self.tolerance * abs(state.best) or math.isinf(state.best):
            self.state = replace(state, best=loss, stale=0)
            return When.LATER
        if state.stale + 1 < self.patience:
            self.state = replace(state, stale=state.stale + 1)
            return When.LATER
        if self.most is not None and state.count >= self.most:
            self.state = replace(state, over=True)
            return When.NEVER
        self.state = PlateauState(count=state.count + 1)
        return When.NOW

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, to be saved in a checkpoint; JSON takes it."""
        best = self.state.best if math.isfinite(self.state.best) else None
        return {**asdict(self.state), "best": best}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what was saved.

        Raises:
            RuleError: It is not from a plateau rule.
        """
        try:
            best = state_dict["best"]
            self.state = PlateauState(
                math.inf if best is None else float(best),
                int(state_dict["stale"]),
                int(state_dict["count"]),
                bool(state_dict["over"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RuleError(f"state_dict={state_dict!r} is not that of a Plateau.") from error


@dataclass(frozen=True)
class Exhausted:
    """Says NOW when new parameters offer more than the old ones still do.

    NOW when the largest ‖λ_c‖ of a candidate is at least `ratio` times ‖∇_θ L‖: a step of a given
    length then lowers the loss more, to first order, in the new parameters than in the old ones.
    LATER where they do not, or where no multiplier is significantly different from zero; and
    NEVER where that is so at a stationary θ, so that nobody has anything to offer.

    Args:
        ratio: How much more; 1 by default. Both norms are Frobenius norms.
        significance: A multiplier is zero when its norm is below so many standard errors. One
            whose standard error is not known is not taken for zero.

    Raises:
        RuleError: An argument is negative; or, when called, the solution has no stationarity or
            no multipliers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> solution = cg.solve(cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate]))
        >>> Exhausted(ratio=0.1, significance=0.0)(solution).name
        'NOW'
        >>> Exhausted(ratio=9.0, significance=0.0)(solution).name
        'LATER'
    """

    ratio: float = 1.0
    significance: float = 2.0

    def __post_init__(self) -> None:
        for name in ("ratio", "significance"):
            if not getattr(self, name) >= 0:
                raise RuleError(
                    f"{name}={getattr(self, name)!r} of Exhausted must not be negative."
                )

    def __call__(self, solution: Solution) -> When:
        """When, going by a solution."""
        if solution.stationarity is None:
            raise RuleError(
                "solution has no stationarity, with which Exhausted compares the multipliers; call "
                "solve(problem, rule, stationarity=True)."
            )
        missing = [name for name in solution.sensitivities if name not in solution.multipliers]
        if missing:
            raise RuleError(f"solution has no multipliers of {missing}, which Exhausted needs.")
        sizes = {
            name: math.sqrt(squared_norm(multiplier.values()))
            for name, multiplier in solution.multipliers.items()
        }
        zero = all(
            sizes[name] <= self.significance * math.sqrt(sensitivity.variance)
            for name, sensitivity in solution.sensitivities.items()
        )
        if zero or not any(sizes.values()):
            settled = solution.status is Status.KKT_MULTIPLIERS
            return When.NEVER if settled else When.LATER
        enough = max(sizes.values()) >= self.ratio * solution.stationarity
        return When.NOW if enough else When.LATER
