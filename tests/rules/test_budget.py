"""Several insertions under a budget: a knapsack, against enumeration and CVXPY."""

import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import Gain, candidate, classified, feedforward, nothing_left_behind, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualMLP
from constrained_growth.rules import Budget


@pytest.fixture(scope="module")
def solved() -> tuple[cg.GrowthProblem, cg.Solution]:
    """Some solution, whose sensitivities are replaced by those of a knapsack."""
    torch.manual_seed(0)
    problem = cg.GrowthProblem(
        feedforward(2, 4, 3), nn.CrossEntropyLoss(), classified(20), [candidate()]
    )
    return problem, cg.solve(problem)


@dataclass(frozen=True)
class Knapsack:
    """Gains and numbers of parameters of some candidates, their sites, and the limits."""

    gains: list[float]
    parameters: list[int]
    sites: list[int]
    limit: int
    per_site: int | None = 1

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """A and b of the constraints A x ≤ b, that on the parameters first."""
        rows, limits = [self.parameters], [float(self.limit)]
        for here in sorted(set(self.sites)) if self.per_site else ():
            rows.append([int(site == here) for site in self.sites])
            limits.append(float(self.per_site or 0))
        return np.array(rows, dtype=float), np.array(limits, dtype=float)

    def best_by_enumeration(self) -> float:
        """The largest gain of all subsets."""
        number = len(self.gains)
        subsets = np.array(list(itertools.product((0, 1), repeat=number))).reshape(-1, number)
        rows, limits = self.rows()
        return float((subsets @ self.gains)[((subsets @ rows.T) <= limits).all(axis=1)].max())

    def decided(self, solved: tuple[cg.GrowthProblem, cg.Solution]) -> tuple[list[int], Any]:
        """Indices of what `Budget` chooses, and its evidence."""
        problem, solution = solved
        given = {
            str(i): cg.Sensitivity(gain, num_new_parameters=n, site=str(site))
            for i, (gain, n, site) in enumerate(
                zip(self.gains, self.parameters, self.sites, strict=True)
            )
        }
        rule = Budget(self.limit, per_site=self.per_site, gain=lambda s: s.value)
        decision = rule.decide(problem, replace(solution, sensitivities=given))
        assert json.loads(json.dumps(decision.evidence)) == decision.evidence
        return sorted(map(int, decision.chosen)), decision.evidence


@st.composite
def knapsacks(draw: st.DrawFn, most: int = 10**6, least_gain: float = 1e-6) -> Knapsack:
    number = draw(st.integers(1, 12))

    def many(each: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(each, min_size=number, max_size=number))

    return Knapsack(
        gains=many(st.floats(least_gain, 10)),
        parameters=many(st.integers(0, most)),
        sites=many(st.integers(0, 3)),
        limit=draw(st.integers(0, 3 * most)),
        per_site=draw(st.sampled_from([1, 2, None])),
    )


@given(knapsack=knapsacks())
def test_the_optimum_is_that_of_all_subsets(knapsack: Knapsack, solved: Any) -> None:
    taken, evidence = knapsack.decided(solved)
    best, (rows, limits) = knapsack.best_by_enumeration(), knapsack.rows()
    gain = sum(knapsack.gains[i] for i in taken)
    assert evidence["gain"] == pytest.approx(best, rel=1e-9)
    assert evidence["gain"] == pytest.approx(gain, rel=1e-12)
    assert (rows[:, taken].sum(axis=1) <= limits).all()
    assert evidence["gain"] <= evidence["bound"] <= evidence["gain"] * (1 + 1e-6)
    assert evidence["relaxed"] >= best * (1 - 1e-9)


def asked(solved: Any, gains: list[float], sites: list[int], rule: Budget) -> cg.Decision:
    problem, solution = solved
    some = {
        str(i): cg.Sensitivity(gain, num_new_parameters=1, site=str(site))
        for i, (gain, site) in enumerate(zip(gains, sites, strict=True))
    }
    return rule.decide(problem, replace(solution, sensitivities=some))


@given(data=st.data(), number=st.integers(1, 8))
def test_constraints_of_the_user_are_kept(data: st.DataObject, number: int, solved: Any) -> None:
    """Against all subsets; constraints may exclude each other, require, and be impossible."""
    gains = data.draw(st.lists(st.floats(-5, 5), min_size=number, max_size=number))
    sizes = st.lists(st.integers(-2, 2), min_size=number, max_size=number)
    rows = data.draw(st.lists(st.tuples(sizes, st.integers(-2, 3)), min_size=1, max_size=3))
    constraints = [
        ({str(i): a for i, a in enumerate(row) if a}, float(bound)) for row, bound in rows
    ]
    rule = Budget(3, per_site=None, gain=lambda s: s.value, constraints=constraints)
    feasible = [
        subset
        for size in range(4)  # each has one parameter, of 3
        for subset in itertools.combinations(range(number), size)
        if all(sum(row[i] for i in subset) <= bound for row, bound in rows)
    ]
    if not feasible:
        with refused(cg.RuleError, "no choice of candidates"):
            asked(solved, gains, [0] * number, rule)
        return
    decision = asked(solved, gains, [0] * number, rule)
    taken = sorted(map(int, decision.chosen))
    assert tuple(taken) in feasible
    best = max(sum(gains[i] for i in subset) for subset in feasible)
    assert sum(gains[i] for i in taken) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_neighbours_stages_and_precedence(solved: Any) -> None:
    gains, sites = [5.0, 4.0, 3.0, 0.5], [0, 1, 2, 3]

    def chosen(*constraints: Any) -> tuple[str, ...]:
        rule = Budget(gain=lambda s: s.value, constraints=constraints)
        return asked(solved, gains, sites, rule).chosen

    neighbours = [({str(i): 1, str(i + 1): 1}, 1) for i in range(3)]
    assert chosen(*neighbours) == ("0", "2")
    assert chosen(({"0": 1, "1": 1}, 1), ({"2": 1, "3": 1}, 1)) == ("0", "2")  # one per stage
    assert chosen(({"0": 1, "3": -1}, 0), ({"0": 1, "1": 1, "2": 1, "3": 1}, 2)) == ("1", "2")
    assert chosen(({"3": -1}, -1), ({"0": 1, "1": 1, "2": 1, "3": 1}, 2)) == ("0", "3")
    with refused(cg.RuleError, "['7'], which are no candidates"):
        chosen(({"7": 1}, 1))


@given(knapsack=knapsacks())
def test_prices_prove_the_relaxation(knapsack: Knapsack, solved: Any) -> None:
    """LP duality: what is left of the limit is priced, and each site takes what pays the most.

    max Σ g x over the relaxation = price · limit + Σ over sites of the best of (g − price · n) x.
    """
    _, evidence = knapsack.decided(solved)
    price = evidence["prices"]["parameters"]
    assert price >= 0
    rest = np.array(knapsack.gains) - price * np.array(knapsack.parameters)
    by_site = [np.sort(rest[np.array(knapsack.sites) == site])[::-1] for site in range(4)]
    worth = sum(np.maximum(values[: knapsack.per_site], 0).sum() for values in by_site)
    assert price * knapsack.limit + worth == pytest.approx(evidence["relaxed"], rel=1e-6)


@settings(max_examples=30)
@given(knapsack=knapsacks(most=100, least_gain=0.1))
def test_relaxation_is_that_of_cvxpy(knapsack: Knapsack, solved: Any) -> None:
    """An interior-point method finds the same optimum, on numbers that it can bear."""
    x, (rows, limits) = cp.Variable(len(knapsack.gains)), knapsack.rows()
    objective = cp.Maximize(np.array(knapsack.gains) @ x)
    relaxed = cp.Problem(objective, [rows @ x <= limits, x >= 0, x <= 1])
    relaxed.solve(solver=cp.CLARABEL)
    best = float(relaxed.value)  # type: ignore[arg-type]
    assert knapsack.decided(solved)[1]["relaxed"] == pytest.approx(best, rel=1e-5, abs=1e-6)


def test_price_of_a_budget_is_its_slope(solved: Any) -> None:
    """Ten per two parameters, then three per one: 4 parameters pay for one and two thirds."""
    knapsack = Knapsack([10.0, 9.0, 1.0], [2, 3, 1], [0, 1, 2], 4)
    taken, evidence = knapsack.decided(solved)
    price = evidence["prices"]["parameters"]
    assert price == pytest.approx(3.0)
    assert evidence["relaxed"] == pytest.approx(10 + 2 * 3)
    assert (taken, evidence["gain"]) == ([0, 2], 11.0)
    _, more = replace(knapsack, limit=4.001).decided(solved)
    assert (more["relaxed"] - evidence["relaxed"]) / 0.001 == pytest.approx(price)
    _, enough = replace(knapsack, limit=7).decided(solved)
    assert enough["prices"]["parameters"] == 0.0


def test_limits_hold_exactly_also_where_the_solver_is_tolerant(solved: Any) -> None:
    """One too many in a hundred million is within its tolerance, and over the limit."""
    big = 10**8
    assert Knapsack([2.0, 1.0], [big + 1, big], [0, 1], big).decided(solved)[0] == [1]


# --- on networks ------------------------------------------------------------------------------


def several() -> tuple[nn.Module, Any, list[cg.Candidate]]:
    model, data = feedforward(2, 4, 6, 3), classified(40, batch=16)
    return (
        model,
        data,
        [
            candidate("1", 4, name="a"),
            cg.Candidate("1", ResidualMLP(4, 7, torch.tanh), "b"),
            candidate("3", 6, name="c"),
            cg.Candidate("3", ResidualMLP(6, 2, torch.tanh), "d"),
            cg.Candidate("0", Gain(4), "e"),
        ],
    )


def decided(rule: Any) -> cg.Solution:
    model, data, candidates = several()
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)
    with nothing_left_behind(model):
        return cg.solve(problem, rule=rule)


def multiply_adds(problem: cg.GrowthProblem) -> dict[str, float]:
    """What `Budget` counts, of candidates that all have a gain."""
    rule = Budget(multiply_adds=1e9, gain=lambda s: 1.0)
    return cg.solve(problem, rule=rule).decision.evidence["costs"]["multiply_adds"]


MULTIPLY_ADDS = {"a": 16, "b": 56, "c": 36, "d": 24, "e": 0}
"""4·4, 2·4·7, 6·6, 2·6·2 for each sample, and nothing for elementwise products."""


@pytest.mark.parametrize(
    ("parameters", "operations", "per_site"),
    [
        (60, None, 1),
        (None, 60, 1),
        (90, 80, 1),
        (90, 80, 2),
        (1e5, 1e5, None),
        (3, 1e5, 1),
        (0, 0, 1),
    ],
)
def test_budget_against_enumeration(
    parameters: float | None, operations: float | None, per_site: int | None
) -> None:
    solution = decided(Budget(parameters, operations, per_site))
    sensitivities = solution.sensitivities
    best = 0.0
    for size in range(6):
        for names in itertools.combinations(sensitivities, size):
            sites = [sensitivities[name].site for name in names]
            new = sum(sensitivities[name].num_new_parameters for name in names)
            fits = parameters is None or new <= parameters
            fits &= operations is None or sum(MULTIPLY_ADDS[name] for name in names) <= operations
            fits &= per_site is None or all(sites.count(site) <= per_site for site in sites)
            if fits:
                best = max(best, sum(sensitivities[name].value ** 2 / 2 for name in names))
    evidence = solution.decision.evidence
    found = sum(sensitivities[name].value ** 2 / 2 for name in solution.decision.chosen)
    assert found == pytest.approx(best, rel=1e-12)
    assert evidence["gain"] == pytest.approx(best, rel=1e-12)
    assert evidence["gap"] == pytest.approx(0.0, abs=1e-9)
    assert json.loads(json.dumps(evidence)) == evidence
    assert set(evidence["prices"]) == {
        key
        for key, value in (("parameters", parameters), ("multiply_adds", operations))
        if value is not None
    }


def test_multiply_adds_are_counted() -> None:
    model, data, candidates = several()
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)
    assert multiply_adds(problem) == MULTIPLY_ADDS


def test_multiply_adds_of_convolutions_and_positions() -> None:
    class Convolution(nn.Module):
        pinned = ("layer.weight",)

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            nn.init.zeros_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(x)

    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 2))
    data = [(torch.randn(5, 1, 6, 6), torch.randint(2, (5,)))]
    problem = cg.GrowthProblem(
        model, nn.CrossEntropyLoss(), data, [cg.Candidate("1", Convolution())]
    )
    assert multiply_adds(problem) == {"1": 4 * 4 * 3 * 3 * 9}
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    data = [(torch.randn(5, 3, 2), torch.randint(2, (5,)))]
    problem = cg.GrowthProblem(
        model, nn.CrossEntropyLoss(), data, [cg.Candidate("1", IdentityLinear(4, nn.ReLU()))]
    )
    assert multiply_adds(problem) == {"1": 3 * 16}


def test_a_users_own_gain() -> None:
    solution = decided(Budget(parameters=20, gain=lambda s: float(s.site == "1")))
    assert solution.decision.chosen == ("a",)
    solution = decided(Budget(parameters=20, gain=lambda s: -1.0))
    assert solution.decision.chosen == ()
    assert solution.decision.evidence["gain"] == 0.0
    model, data, candidates = several()
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)
    with nothing_left_behind(model), refused(cg.RuleError, "gain", "nan", '"a"'):
        cg.solve(problem, rule=Budget(parameters=20, gain=lambda s: float("nan")))


def test_larger_gains_first() -> None:
    solution = decided(Budget(parameters=1e4))
    values = [solution.sensitivities[name].value for name in solution.decision.chosen]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)
    again = replace(Budget(parameters=1e4), per_site=None)
    assert len(decided(again).decision.chosen) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["parameters=", "multiply_adds="]),
        ({"parameters": -1}, ["parameters=-1"]),
        ({"parameters": float("nan")}, ["parameters=nan"]),
        ({"multiply_adds": float("inf")}, ["multiply_adds=inf"]),
        ({"parameters": 1, "per_site": 0}, ["per_site=0"]),
    ],
)
def test_budget_arguments_out_of_range(options: dict[str, Any], words: list[str]) -> None:
    with refused(cg.RuleError, *words):
        Budget(**options)
