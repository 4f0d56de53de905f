"""Several insertions at once, within a budget of parameters and multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from constrained_growth._arguments import function, instance, number, positive_int
from constrained_growth._data import batch_size, batches
from constrained_growth._distributed import everywhere
from constrained_growth._sites.model import call, device_of
from constrained_growth._sites.untouched import untouched
from constrained_growth.blocks.protocol import called_with
from constrained_growth.curvature import stand
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.rule import check_question
from constrained_growth.solution import Decision, Planned, Sensitivity, Solution, listed

Array = NDArray[np.float64]


def half_square(sensitivity: Sensitivity) -> float:
    """½‖λ‖², the largest value of ⟨λ, s⟩ − ½‖s‖², where ‖λ‖ is in the dual of the norm of s.

    It ranks candidates, but does not say how far the loss will fall.
    """
    found = instance("sensitivity", sensitivity, Sensitivity, RuleError, "one of a solution")
    return found.value**2 / 2


@dataclass(frozen=True)
class Budget:
    """The candidates with the largest total gain within a budget, solved to proven optimality.

        maximise Σ_c gain_c x_c   over   x_c ∈ {0, 1}

        subject to   Σ_c params_c x_c ≤ parameters,   Σ_c madds_c x_c ≤ multiply_adds,
                     Σ_{c at a site} x_c ≤ per_site   for every site,
                     Σ_c a_c x_c ≤ b   for each of the `constraints` (a, b).

    Gains are summed, which is right to first order. The evidence holds the `gain`, a proven upper
    `bound` on it, the relative `gap` between them, and the `prices`: the multipliers of the limits
    in the relaxation 0 ≤ x ≤ 1, in gain per parameter and per multiply-add.

    Args:
        parameters: Upper limit on the new parameters, pinned and free ones together.
        multiply_adds: Upper limit on the additional multiply-adds per sample of a forward pass,
            counted by PyTorch's `FlopCounterMode` on the first batch, without elementwise ones.
        per_site: Upper limit on the insertions at one site; None for no limit.
        gain: From a sensitivity to what the insertion is worth, `half_square` (½‖λ‖²) by default.
            Candidates without a positive gain are not taken, unless `constraints` ask for them.
        constraints: Further limits (a, b), each a dict of coefficients by candidate and a bound:
            `({"3": 1, "5": 1}, 1)` for not both, `({"5": 1, "3": -1}, 0)` for 5 only with 3,
            `({"3": -1, "5": -1}, -1)` for at least one of them.

    Raises:
        RuleError: A limit is negative or none is given; a gain is not finite; or `constraints`
            name no candidate, or no choice satisfies them.

    Source:
        Kellerer, Pferschy and Pisinger, *Knapsack Problems*, 2004; solved by HiGHS through
        `scipy.optimize.milp`.

    Example:
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate("1", cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> [cg.solve(problem, rule=Budget(n)).decision.chosen for n in (20, 19)]
        [('1',), ()]
    """

    parameters: float | None = None
    multiply_adds: float | None = None
    per_site: int | None = 1
    gain: Callable[[Sensitivity], float] = half_square
    constraints: Sequence[tuple[Mapping[str, float], float]] = ()

    def __post_init__(self) -> None:
        instance("constraints", self.constraints, Sequence, RuleError, "[({'3': 1, '5': 1}, 1)]")
        if self.parameters is None and self.multiply_adds is None and not self.constraints:
            raise RuleError("Budget needs parameters=…, multiply_adds=… or constraints=….")
        for given in self.constraints:
            if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], Mapping):
                raise RuleError(
                    f"constraints: {given!r:.80} is no pair of coefficients and a bound, such as "
                    "({'3': 1, '5': 1}, 1)."
                )
            number("constraints: the bound", given[1], RuleError, "(-inf, inf)")
            for name, value in given[0].items():
                number(f"constraints: the coefficient of {name!r}", value, RuleError, "(-inf, inf)")
        number("parameters", self.parameters, RuleError, "[0, inf)", optional=True)
        number("multiply_adds", self.multiply_adds, RuleError, "[0, inf)", optional=True)
        function("gain", self.gain, RuleError, "cg.rules.half_square")
        positive_int("per_site", self.per_site, RuleError, optional=True)

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The best choice within the budget."""
        check_question(problem, solution)
        given = solution.sensitivities
        gains = {name: float(self.gain(s)) for name, s in given.items()}
        for name, gain in gains.items():
            if not math.isfinite(gain):
                raise RuleError(f'gain of Budget gives {gain} for candidate "{name}".')
        unknown = {name for row, _ in self.constraints for name in row} - set(given)
        if unknown:
            raise RuleError(
                f"constraints name {sorted(unknown)!r:.200}, which are no candidates; there are "
                f"{listed(map(repr, given), 400)}."
            )
        names = [name for name, gain in gains.items() if gain > 0 or self.constraints]
        costs: dict[str, dict[str, float]] = {}
        if self.parameters is not None:
            costs["parameters"] = {name: given[name].num_new_parameters for name in names}
        if self.multiply_adds is not None:
            planned = {name: solution.candidates[name] for name in names}
            costs["multiply_adds"] = _multiply_adds(problem, planned) if names else {}
        limits = {key: float(getattr(self, key)) for key in costs}
        rows = [[cost[name] for name in names] for cost in costs.values()]
        bounds = list(limits.values())
        if self.per_site is not None:
            for site in dict.fromkeys(given[name].site for name in names):
                rows.append([float(given[name].site == site) for name in names])
                bounds.append(float(self.per_site))
        for row, bound in self.constraints:
            rows.append([float(row.get(name, 0.0)) for name in names])
            bounds.append(float(bound))
        taken, found = _knapsack(
            np.array([gains[name] for name in names]),
            np.array(rows, dtype=float).reshape(len(bounds), len(names)),
            np.array(bounds),
        )
        chosen = tuple(sorted((names[i] for i in taken), key=lambda name: -gains[name]))
        spent = {key: sum(cost[name] for name in chosen) for key, cost in costs.items()}
        parts = (f"{spent[key]:g} of {limits[key]:g} {key.replace('_', '-')}" for key in limits)
        best = f"the best {len(chosen)} for {' and '.join(parts) or 'the constraints'}"
        reason = best if chosen else "no candidate with a gain fits the budget"
        evidence = {
            **found,
            "prices": dict(zip(costs, found["prices"], strict=False)),  # not those of the sites
            "gains": gains,
            "costs": costs,
            "spent": spent,
            "limits": limits,
            "passes": 0.0,
        }
        return Decision(chosen, reason, evidence=evidence)


def _knapsack(gains: Array, rows: Array, limits: Array) -> tuple[list[int], dict[str, Any]]:
    """Maximise gains·x over x ∈ {0, 1}ⁿ with rows x ≤ limits."""
    from scipy.optimize import Bounds, LinearConstraint, linprog, milp  # seconds to import

    if len(gains) == 0:
        nothing = dict.fromkeys(("gain", "bound", "gap", "relaxed"), 0.0)
        return [], {**nothing, "prices": [0.0] * len(limits)}
    # HiGHS has absolute tolerances, so everything is scaled to about 1; rows by powers of two,
    # which keeps whole numbers exact: with rounded ones it fails six times as often
    scale, largest = np.abs(gains).max() or 1.0, np.maximum(np.abs(rows).max(axis=1), 1.0)
    sizes = 2.0 ** np.ceil(np.log2(largest))
    objective, scaled, bounds = -gains / scale, rows / sizes[:, None], limits / sizes
    constraints = [LinearConstraint(scaled, -np.inf, bounds)]  # type: ignore[arg-type]
    while True:
        result = milp(
            objective,
            integrality=np.ones(len(gains)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.status == 2:
            raise RuleError("Budget: no choice of candidates satisfies all; loosen one limit.")
        if result.status != 0 or result.x is None:
            raise RuleError(f"Budget: the knapsack was not solved: {result.message}")
        x = np.round(result.x)  # whole numbers to the solver's tolerance only
        if bool((rows @ x <= limits).all()):
            break
        # over a limit, though within the solver's tolerance: exclude exactly this choice
        constraints.append(LinearConstraint(2 * x - 1, -np.inf, x.sum() - 1))  # type: ignore[arg-type]
    relaxed = linprog(objective, A_ub=scaled, b_ub=bounds, bounds=(0, 1), method="highs")
    if relaxed.status != 0:
        raise RuleError(f"Budget: the relaxation was not solved: {relaxed.message}")
    gain = float(gains @ x)
    bound = max(-scale * float(result.mip_dual_bound), gain)
    return np.flatnonzero(x).tolist(), {
        "gain": gain,
        "bound": bound,
        "gap": (bound - gain) / gain if gain > 0 else 0.0,
        "relaxed": -scale * float(relaxed.fun),
        # SciPy's marginals belong to the minimum of −gain, so the prices have the opposite sign
        "prices": np.maximum(-scale * relaxed.ineqlin.marginals / sizes, 0.0).tolist(),
    }


def _multiply_adds(problem: GrowthProblem, candidates: Mapping[str, Planned]) -> dict[str, float]:
    """Multiply-adds per sample of each block on the first batch, over all calls of its site."""
    totals = dict.fromkeys(candidates, 0.0)

    def counted(name: str, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with FlopCounterMode(display=False) as counter:
            called_with(block, {}, (x, *args), kwargs)
        totals[name] += counter.get_total_flops() / 2  # one multiply-add is two operations
        return x

    def count() -> dict[str, float] | None:
        with (
            untouched(problem.model, problem.loss_fn, problem.data),
            torch.no_grad(),
            ExitStack() as stack,
        ):
            for first in batches(problem.data, device_of(problem.model)):
                for name, planned in candidates.items():
                    layer = partial(counted, name, planned.block)
                    stack.enter_context(stand(problem.model, planned, layer))
                call(problem.model, first[0])
                return {name: total / batch_size(*first) for name, total in totals.items()}
        return None

    every = everywhere(count, problem.group)
    return next(counts for counts in every if counts is not None)  # the first that has batches
