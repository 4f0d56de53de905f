"""Several insertions at once, under limits on what they may cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.counting import multiply_adds
from constrained_growth.solution import Decision, Sensitivity, Solution


def half_square(sensitivity: Sensitivity) -> float:
    """½‖λ‖², the most that ⟨λ, s⟩ − ½‖s‖² can be, where ‖λ‖ is the dual of the norm of s.

    The predicted decrease for a quadratic model of unit curvature, up to a factor that is the
    same for all candidates; it says which are better and by what ratio, not by how much the loss
    will fall.
    """
    return sensitivity.value**2 / 2


@dataclass(frozen=True)
class Knapsack:
    """Which items to take: maximise Σ gain x over x ∈ {0, 1} with rows x ≤ limits.

    Attributes:
        gains: One for each item, positive.
        rows: What each item takes of each resource, not negative; shape (resources, items).
        limits: How much of each there is.
    """

    gains: NDArray[np.float64]
    rows: NDArray[np.float64]
    limits: NDArray[np.float64]


@dataclass(frozen=True)
class Packing:
    """The answer to a knapsack.

    Attributes:
        taken: Indices of the items.
        gain: What they are worth together.
        bound: No choice is worth more than this, which is proven.
        prices: By how much the best of the relaxation 0 ≤ x ≤ 1 grows with each limit: its
            multipliers, not negative.
        relaxed: The best of the relaxation.
    """

    taken: tuple[int, ...]
    gain: float
    bound: float
    prices: tuple[float, ...]
    relaxed: float


@dataclass(frozen=True)
class Budget:
    """The candidates of the largest summed gain that a budget pays for, to proven optimality.

        maximise Σ_c gain_c x_c   over   x_c ∈ {0, 1}

        subject to   Σ_c params_c x_c ≤ parameters,   Σ_c madds_c x_c ≤ multiply_adds,
                     Σ_{c at a site} x_c ≤ per_site   for every site.

    Gains are added up, which is right to first order. The decision's evidence holds the gain, a
    proven bound on it and the `gap` between them (0 where it is the optimum), and the `prices`:
    the multipliers of the limits in the relaxation 0 ≤ x ≤ 1, in gain per parameter and gain per
    multiply-add, 0 where a limit does not bind.

    Args:
        parameters: At most so many new parameters, free ones included.
        multiply_adds: At most so many more multiply-adds per sample of a forward pass; see
            `counting.multiply_adds` for what is counted.
        per_site: At most so many insertions at one site; None for any number.
        gain: What an insertion is worth, a function of its sensitivity: `half_square` (½‖λ‖²) by
            default. Candidates worth nothing are not taken.

    Raises:
        RuleError: A limit is negative or none is given; or a gain is not finite.

    Source:
        Kellerer, Pferschy and Pisinger, *Knapsack Problems*, 2004; the solver is HiGHS, by
        `scipy.optimize.milp`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> cg.solve(problem, rule=Budget(parameters=20)).decision.chosen
        ('1',)
        >>> cg.solve(problem, rule=Budget(parameters=19)).decision.chosen
        ()
    """

    parameters: float | None = None
    multiply_adds: float | None = None
    per_site: int | None = 1
    gain: Callable[[Sensitivity], float] = half_square

    def __post_init__(self) -> None:
        if self.parameters is None and self.multiply_adds is None:
            raise RuleError("Budget needs parameters=… or multiply_adds=…, such as parameters=1e4.")
        for name in ("parameters", "multiply_adds"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise RuleError(f"{name}={value!r} of Budget must be finite and not negative.")
        if self.per_site is not None and self.per_site < 1:
            raise RuleError(f"per_site={self.per_site!r} of Budget must be positive.")

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The best choice within the budget."""
        sensitivities = solution.sensitivities
        gains = {name: self._gain(name, s) for name, s in sensitivities.items()}
        names = [name for name, gain in gains.items() if gain > 0]
        costs: dict[str, Mapping[str, float]] = {}
        limits: dict[str, float] = {}
        if self.parameters is not None:
            costs["parameters"] = {n: sensitivities[n].num_new_parameters for n in names}
            limits["parameters"] = self.parameters
        if self.multiply_adds is not None:
            planned = {name: solution.candidates[name] for name in names}
            costs["multiply_adds"] = multiply_adds(problem, planned) if names else {}
            limits["multiply_adds"] = self.multiply_adds
        rows = [[costs[key][name] for name in names] for key in costs]
        bounds = [limits[key] for key in costs]
        if self.per_site is not None:
            for site in dict.fromkeys(sensitivities[name].site for name in names):
                rows.append([float(sensitivities[name].site == site) for name in names])
                bounds.append(float(self.per_site))
        packing = pack(
            Knapsack(
                np.array([gains[name] for name in names], dtype=np.float64),
                np.array(rows, dtype=np.float64).reshape(len(bounds), len(names)),
                np.array(bounds, dtype=np.float64),
            )
        )
        chosen = tuple(sorted((names[i] for i in packing.taken), key=lambda n: -gains[n]))
        spent = {key: sum(cost[name] for name in chosen) for key, cost in costs.items()}
        return Decision(
            chosen,
            _reason(chosen, spent, limits),
            {},
            _evidence(packing, gains, costs, spent, limits),
        )

    def _gain(self, name: str, sensitivity: Sensitivity) -> float:
        gain = float(self.gain(sensitivity))
        if not math.isfinite(gain):
            raise RuleError(f'gain of Budget gives {gain} for candidate "{name}".')
        return gain


def pack(knapsack: Knapsack) -> Packing:
    """Solve a knapsack to proven optimality.

    Args:
        knapsack: With no items, nothing is taken.

    Raises:
        RuleError: The solver gave up.
    """
    gains, rows, limits = knapsack.gains, knapsack.rows, knapsack.limits
    if len(gains) == 0:
        return Packing((), 0.0, 0.0, (0.0,) * len(limits), 0.0)
    scale = gains.max()
    sizes = np.maximum(rows.max(axis=1), 1.0)
    scaled, bounds = rows / sizes[:, None], limits / sizes
    relaxed = linprog(-gains / scale, A_ub=scaled, b_ub=bounds, bounds=(0, 1), method="highs")
    if relaxed.status != 0:
        raise RuleError(f"Budget: the relaxation was not solved: {relaxed.message}")
    constraints = [LinearConstraint(scaled, -np.inf, bounds)]  # type: ignore[arg-type]
    while True:
        result = milp(
            -gains / scale,
            integrality=np.ones(len(gains)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.status != 0 or result.x is None:
            raise RuleError(f"Budget: the knapsack was not solved: {result.message}")
        x = np.round(result.x)
        if bool((rows @ x <= limits).all()):
            break
        # within the solver's tolerance and over the limit all the same: exclude this very choice
        constraints.append(LinearConstraint(2 * x - 1, -np.inf, x.sum() - 1))  # type: ignore[arg-type]
    gain = float(gains @ x)
    # SciPy's marginals are of the minimum of −gain: the price is the opposite
    prices = -scale * relaxed.ineqlin.marginals / sizes
    return Packing(
        taken=tuple(int(i) for i in np.flatnonzero(x)),
        gain=gain,
        bound=max(-scale * float(result.mip_dual_bound), gain),
        prices=tuple(float(max(price, 0.0)) for price in prices),
        relaxed=-scale * float(relaxed.fun),
    )


def _reason(
    chosen: tuple[str, ...], spent: Mapping[str, float], limits: Mapping[str, float]
) -> str:
    parts = [f"{spent[key]:g} of {limits[key]:g} {key.replace('_', '-')}" for key in limits]
    return f"the best {len(chosen)} for {' and '.join(parts)}" if chosen else "nothing is worth it"


def _evidence(
    packing: Packing,
    gains: Mapping[str, float],
    costs: Mapping[str, Mapping[str, float]],
    spent: Mapping[str, float],
    limits: Mapping[str, float],
) -> dict[str, Any]:
    gap = (packing.bound - packing.gain) / packing.gain if packing.gain > 0 else 0.0
    return {
        "gain": packing.gain,
        "bound": packing.bound,
        "gap": gap,
        "relaxed": packing.relaxed,
        "prices": dict(zip(costs, packing.prices, strict=False)),
        "gains": dict(gains),
        "costs": {key: dict(cost) for key, cost in costs.items()},
        "spent": dict(spent),
        "limits": dict(limits),
        "passes": 0.0,
    }
