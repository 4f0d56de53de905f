"""One candidate by a trust region: model, step, trial, acceptance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch

from constrained_growth._arguments import flag, function, number, positive_int
from constrained_growth._progress import progress_bar
from constrained_growth.curvature import Curvature, VirtualLoss, hessian
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.rule import check_question
from constrained_growth.rules.subproblem import Steps, trust_region_steps
from constrained_growth.solution import Decision, Solution


@dataclass(eq=False, repr=False)
class TrustRegion:
    """The candidate with the largest predicted decrease, if its step achieves it.

    For each candidate a step in its new parameters is computed,

        s ≈ argmin −⟨λ, s⟩ + ½⟨s, B s⟩   over ‖s‖ ≤ Δ,

    and the one with the largest predicted decrease is *tried*: the loss is evaluated with the
    layer at its site, moved by s. With ρ = actual/predicted decrease,

    * ρ ≥ η₁: the layer is chosen and inserted at s instead of at its pins, so the loss falls by
      the actual decrease on insertion. If ρ ≥ η₂ and s is at the boundary, Δ grows.
    * otherwise Δ shrinks to a fraction of ‖s‖, and the best step for that Δ is tried, possibly of
      another candidate. After `max_tries` nothing is chosen.

    Args:
        radius: Δ of the first decision, in the Euclidean norm over all pins of a candidate.
        eta1: η₁, the smallest ρ of an accepted step.
        eta2: η₂, the smallest ρ with which Δ grows.
        shrink: Factor by which Δ shrinks; like `grow`, that of the textbook by default.
        grow: Factor by which Δ grows.
        max_radius: Upper limit of Δ.
        curvature: B: `hessian` (default), `gauss_newton`, or your own `curvature.Curvature`.
        max_products: Limit on the products with B for each candidate. With no more pinned
            parameters than this the subproblem is solved exactly, else over λ, B λ, B² λ, …
        tolerance: No further product is taken once the gradient of the subproblem has fallen by
            this factor.
        max_tries: How many steps are tried for one decision at most.
        progress: Progress bar: True, False, or None (default) for on a terminal, after a second.

    Attributes:
        current_radius: Δ, remembered from one decision to the next.

    Raises:
        RuleError: An argument is out of range, or the solution has no multipliers.

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

    radius: float = 1.0
    _: KW_ONLY
    eta1: float = 0.1
    eta2: float = 0.75
    shrink: float = 0.25
    grow: float = 2.0
    max_radius: float = 1e3
    curvature: Curvature = hessian
    max_products: int = 20
    tolerance: float = 0.1
    max_tries: int = 8
    progress: bool | None = None

    def __post_init__(self) -> None:
        number("max_radius", self.max_radius, RuleError, "(0, inf)")
        number("radius", self.radius, RuleError, f"(0, {self.max_radius}]")
        number("eta1", self.eta1, RuleError, "(0, 1]")
        number("eta2", self.eta2, RuleError, f"({self.eta1}, 1]")
        number("shrink", self.shrink, RuleError, "(0, 1)")
        number("grow", self.grow, RuleError, "(1, inf)")
        number("tolerance", self.tolerance, RuleError, "(0, 1]")
        flag("progress", self.progress, RuleError, optional=True)
        positive_int("max_products", self.max_products, RuleError)
        positive_int("max_tries", self.max_tries, RuleError)
        function("curvature", self.curvature, RuleError, "cg.curvature.hessian")
        self.current_radius = self.radius

    def __repr__(self) -> str:
        return f"TrustRegion(radius={self.current_radius:g})"

    def state_dict(self) -> dict[str, float]:
        """The current radius, to be saved in a checkpoint."""
        return {"radius": self.current_radius}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Continue from a saved state; a RuleError if it is not from a trust region."""
        try:
            radius = float(state_dict["radius"])
        except (KeyError, TypeError, ValueError) as error:
            raise RuleError(f"state_dict={state_dict!r} is not that of a TrustRegion.") from error
        number("state_dict of TrustRegion: radius", radius, RuleError, f"(0, {self.max_radius}]")
        self.current_radius = radius

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The candidate whose step was accepted, or none."""
        check_question(problem, solution)
        names = tuple(solution.sensitivities)
        missing = [name for name in names if name not in solution.multipliers]
        if missing:
            raise RuleError(f"solution has no multipliers of {missing}; TrustRegion needs them.")
        if not names:
            return Decision((), "no candidates")
        losses = {name: VirtualLoss(problem, solution.candidates[name]) for name in names}
        radius, base, steps = self.current_radius, None, dict[str, Steps]()
        for name in progress_bar(names, desc="models", unit="candidate", progress=self.progress):
            steps[name] = trust_region_steps(
                torch.cat([t.reshape(-1).double() for t in solution.multipliers[name].values()]),
                partial(self.curvature, losses[name]),
                radius,
                max_products=self.max_products,
                tolerance=self.tolerance,
            )
        at = {name: step(radius) for name, step in steps.items()}
        tries: list[dict[str, Any]] = []
        chosen, values, reason = (), {}, "nothing to gain"
        for _ in range(self.max_tries):
            best = max(at, key=lambda name: at[name].predicted)
            step, loss, length = at[best], losses[best], float(at[best].vector.norm())
            base = loss(torch.zeros_like(step.vector)) if base is None else base
            if not step.predicted > loss.rounding(base):
                break
            actual = base - loss(step.vector)
            rho = actual / step.predicted if math.isfinite(actual) else None
            tries.append(
                {
                    "candidate": best,
                    "predicted": step.predicted,
                    "actual": None if rho is None else actual,
                    "rho": rho,
                    "radius": radius,
                    "length": length,
                    "at_boundary": step.at_boundary,
                }
            )
            if rho is not None and rho >= self.eta1:
                chosen, values = (best,), {best: loss.unflatten(step.vector)}
                reason = f"decrease {actual:.3g} of {step.predicted:.3g} predicted"
                if rho >= self.eta2 and step.at_boundary:
                    radius = min(self.grow * radius, self.max_radius)
                break
            radius = self.shrink * min(radius, length)
            at = {name: step(radius) for name, step in steps.items()}
            reason = f"none of {len(tries)} steps achieved the predicted decrease"
        self.current_radius = radius
        evidence = {key: tries[-1][key] for key in ("predicted", "actual", "rho") if tries}
        predictions = {name: step.predicted for name, step in at.items()}
        passes = sum(loss.passes for loss in losses.values())
        evidence |= {"radius": radius, "tries": tries, "predictions": predictions, "passes": passes}
        return Decision(chosen, reason, values, evidence)
