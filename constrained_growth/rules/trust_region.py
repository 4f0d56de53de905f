"""One candidate by a trust region: model, step, trial, acceptance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from constrained_growth.curvature import Curvature, VirtualLoss, hessian
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.quadratic import QuadraticModel, Step, quadratic_model
from constrained_growth.rules.redundancy import gains_beyond_old
from constrained_growth.solution import Decision, Solution


@dataclass(frozen=True)
class TrustRegionState:
    """What a trust region remembers from one decision to the next.

    Attributes:
        radius: Δ.
    """

    radius: float


class TrustRegion:
    """The candidate of the largest predicted decrease, if its step does what was predicted.

    For each candidate a step in its new parameters is computed,

        s ≈ argmin −⟨λ, s⟩ + ½⟨s, B s⟩   over ‖s‖ ≤ Δ,

    and the best step by the predicted decrease is *tried*: with the layer standing at its site,
    moved by s, the loss is evaluated over the data. With ρ = actual/predicted decrease,

    * ρ ≥ η₁: the layer is chosen, and inserted at s instead of at its pin, so that the loss falls
      by the actual decrease as it is inserted. With ρ ≥ η₂ and s at the boundary, Δ grows.
    * else: nothing has happened to the model, Δ shrinks to a part of ‖s‖, and the best step for
      that Δ is tried, which may be another candidate's; after `max_tries` nothing is chosen.

    Δ is remembered from one decision to the next in `state`.

    Args:
        radius: Δ of the first decision, in the Euclidean norm of all pinned parameters of a
            candidate: 1.0 moves an identity layer as far as one of its weights is from zero.
        eta1: η₁ = 0.1, the least agreement of a step that is accepted.
        eta2: η₂ = 0.75, the least that makes Δ grow.
        shrink: By which factor Δ shrinks; 1/4 as in the textbook.
        grow: By which it grows; 2 as in the textbook.
        max_radius: Δ grows no further.
        curvature: B: `hessian` (default) or `gauss_newton`, or a function of your own of a
            `VirtualLoss` and a vector.
        joint: Let the old parameters move along in the quadratic model: then candidates are
            compared by what they offer beyond what the old ones could do (see
            `gains_beyond_old`), with the Gauss–Newton matrix. The step that is tried is in the
            new parameters, as these are what is inserted.
        damping: Of that, relative to the curvature along the gradient.
        max_products: At most so many products with B for each candidate. One that has no more
            pinned parameters is solved exactly, the others by Steihaug–Toint.
        tolerance: These stop once the slope of the model has fallen by this factor.
        max_tries: At most so many steps are tried for a decision.
        progress: Progress bar: True, False, or None (default) for one on a terminal when it takes
            longer than a second.

    Attributes:
        state: What is remembered.

    Raises:
        RuleError: An argument is out of range.

    Source:
        Conn, Gould and Toint, *Trust-Region Methods*, 2000, algorithm 6.1.1; Nocedal and Wright,
        *Numerical Optimization*, 2nd ed. 2006, algorithm 4.1.

    Example:
        >>> import constrained_growth as cg
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate("1", cg.blocks.ResidualMLP(4, 4, torch.tanh))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> decision = cg.solve(problem, rule=TrustRegion()).decision
        >>> decision.chosen, decision.evidence["actual"] > 0
        (('1',), True)
    """

    def __init__(
        self,
        radius: float = 1.0,
        *,
        eta1: float = 0.1,
        eta2: float = 0.75,
        shrink: float = 0.25,
        grow: float = 2.0,
        max_radius: float = 1e3,
        curvature: Curvature = hessian,
        joint: bool = False,
        damping: float = 1e-2,
        max_products: int = 20,
        tolerance: float = 0.1,
        max_tries: int = 8,
        progress: bool | None = None,
    ) -> None:
        _check_between("radius", radius, 0, max_radius)
        _check_between("eta1", eta1, 0, 1)
        _check_between("eta2", eta2, eta1, 1)
        _check_between("shrink", shrink, 0, 1)
        _check_between("grow", grow, 1, math.inf)
        _check_between("tolerance", tolerance, 0, 1)
        _check_between("damping", damping, 0, math.inf)
        for name, count in (("max_products", max_products), ("max_tries", max_tries)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise RuleError(f"{name}={count!r} of TrustRegion is not a positive whole number.")
        if not callable(curvature):
            raise RuleError(
                f"curvature={curvature!r} of TrustRegion cannot be called; give "
                "cg.curvature.hessian or cg.curvature.gauss_newton."
            )
        self.eta1, self.eta2 = eta1, eta2
        self.shrink, self.grow, self.max_radius = shrink, grow, max_radius
        self.curvature = curvature
        self.joint, self.damping = joint, damping
        self.max_products, self.tolerance, self.max_tries = max_products, tolerance, max_tries
        self.progress = progress
        self.state = TrustRegionState(radius)

    def __repr__(self) -> str:
        return f"TrustRegion(radius={self.state.radius:g})"

    def state_dict(self) -> dict[str, float]:
        """What is remembered, to be saved in a checkpoint."""
        return {"radius": self.state.radius}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Go on from what was saved.

        Raises:
            RuleError: It is not from a trust region.
        """
        try:
            radius = float(state_dict["radius"])
        except (KeyError, TypeError, ValueError) as error:
            raise RuleError(
                f"state_dict={state_dict!r} is not that of a TrustRegion, a dict with a radius."
            ) from error
        _check_between("radius", radius, 0, self.max_radius)
        self.state = TrustRegionState(radius)

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The candidate whose step was accepted, or none.

        Raises:
            RuleError: The solution has no multipliers (a monitor's sketch).
        """
        names = tuple(solution.sensitivities)
        missing = [name for name in names if name not in solution.multipliers]
        if missing:
            raise RuleError(f"solution has no multipliers of {missing}; TrustRegion needs them.")
        if not names:
            return Decision((), "no candidates")
        losses = {name: VirtualLoss(problem, solution.candidates[name]) for name in names}
        beyond: Mapping[str, float] | None = None
        spent = 0.0
        if self.joint:
            planned = {name: solution.candidates[name] for name in names}
            beyond, spent = gains_beyond_old(
                problem, planned, damping=self.damping, max_products=self.max_products
            )
        quiet = None if self.progress is None else not self.progress
        bar = tqdm(names, desc="models", unit="candidate", leave=False, delay=1, disable=quiet)
        models = {name: self._model(losses[name], solution, name) for name in bar}
        decision = self._tried(losses, models, beyond)
        passes = spent + sum(loss.passes for loss in losses.values())
        evidence = {**decision.evidence, "passes": passes}
        return Decision(decision.chosen, decision.reason, decision.values, evidence)

    def _model(self, loss: VirtualLoss, solution: Solution, name: str) -> QuadraticModel:
        multiplier = torch.cat(
            [t.reshape(-1).to(torch.float64) for t in solution.multipliers[name].values()]
        )
        return quadratic_model(
            multiplier,
            lambda vector: self.curvature(loss, vector),
            self.state.radius,
            max_products=self.max_products,
            tolerance=self.tolerance,
        )

    def _tried(
        self,
        losses: Mapping[str, VirtualLoss],
        models: Mapping[str, QuadraticModel],
        beyond: Mapping[str, float] | None,
    ) -> Decision:
        """Try steps until one is accepted, and remember the radius."""
        radius, base, tries = self.state.radius, None, []
        for _ in range(self.max_tries):
            steps = {name: model.step(radius) for name, model in models.items()}
            predicted = {name: step.predicted for name, step in steps.items()}
            scores = predicted if beyond is None else _where_positive(beyond, predicted)
            best = max(scores, key=lambda name: scores[name])
            step, loss = steps[best], losses[best]
            base = loss(torch.zeros_like(step.vector)) if base is None else base
            if not scores[best] > 0 or step.predicted <= loss.rounding(base):
                break
            actual = base - loss(step.vector)
            ratio = actual / step.predicted if math.isfinite(actual) else -math.inf
            accepted = ratio >= self.eta1
            tries.append(_account(best, step, actual, ratio, radius))
            if accepted:
                if ratio >= self.eta2 and step.at_boundary:
                    radius = min(self.grow * radius, self.max_radius)
                self.state = TrustRegionState(radius)
                return Decision(
                    (best,),
                    f"decrease {actual:.3g} of {step.predicted:.3g} predicted",
                    {best: loss.unflatten(step.vector)},
                    _evidence(tries, predicted, beyond, radius),
                )
            radius = self.shrink * min(radius, float(step.vector.norm()))
        self.state = TrustRegionState(radius)
        reason = (
            f"none of {len(tries)} steps did what was predicted" if tries else "nothing to gain"
        )
        predicted = {name: model.step(radius).predicted for name, model in models.items()}
        return Decision((), reason, {}, _evidence(tries, predicted, beyond, radius))


def _where_positive(
    beyond: Mapping[str, float], predicted: Mapping[str, float]
) -> dict[str, float]:
    """The gains beyond the old parameters, of candidates that have a step to try."""
    return {name: gain if predicted[name] > 0 else 0.0 for name, gain in beyond.items()}


def _account(name: str, step: Step, actual: float, ratio: float, radius: float) -> dict[str, Any]:
    return {
        "candidate": name,
        "predicted": step.predicted,
        "actual": actual if math.isfinite(actual) else None,
        "rho": ratio if math.isfinite(ratio) else None,
        "radius": radius,
        "length": float(step.vector.norm()),
        "at_boundary": step.at_boundary,
    }


def _evidence(
    tries: list[dict[str, Any]],
    predicted: Mapping[str, float],
    beyond: Mapping[str, float] | None,
    radius: float,
) -> dict[str, Any]:
    """The last try, all tries, and what was compared."""
    last = {key: tries[-1][key] for key in ("predicted", "actual", "rho")} if tries else {}
    gains = {} if beyond is None else {"beyond_old": dict(beyond)}
    return {**last, "radius": radius, "tries": tries, "predictions": dict(predicted), **gains}


def _check_between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or not 0 < value < math.inf:
        raise RuleError(
            f"{name}={value!r} of TrustRegion must be positive and between {low} and {high}."
        )
