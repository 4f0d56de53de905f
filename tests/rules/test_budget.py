"""Several insertions under a budget: a knapsack, against enumeration and CVXPY."""

import itertools
import json
from dataclasses import replace
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
from constrained_growth.rules.budget import Budget, Knapsack, pack
from constrained_growth.rules.counting import multiply_adds


def knapsack(gains: Any, rows: Any, limits: Any) -> Knapsack:
    array = np.array(rows, dtype=float).reshape(len(limits), len(gains))
    return Knapsack(np.array(gains, dtype=float), array, np.array(limits, dtype=float))


def best_by_enumeration(problem: Knapsack) -> float:
    """The best of all subsets."""
    number = len(problem.gains)
    subsets = np.array(list(itertools.product((0, 1), repeat=number))).reshape(-1, number)
    feasible = ((subsets @ problem.rows.T) <= problem.limits).all(axis=1)
    return float((subsets @ problem.gains)[feasible].max())


@st.composite
def knapsacks(draw: st.DrawFn, most: int = 10**6, least_gain: float = 1e-6) -> Knapsack:
    number = draw(st.integers(1, 12))
    counts = st.lists(st.integers(0, most), min_size=number, max_size=number)
    rows = [draw(counts), draw(counts)]
    sites = draw(st.lists(st.integers(0, 3), min_size=number, max_size=number))
    rows += [[int(site == here) for site in sites] for here in set(sites)]
    limits = [draw(st.integers(0, 3 * most)) for _ in range(2)] + [1] * len(set(sites))
    gains = draw(st.lists(st.floats(least_gain, 10), min_size=number, max_size=number))
    return knapsack(gains, rows, limits)


@given(knapsacks())
def test_the_optimum_is_that_of_all_subsets(problem: Knapsack) -> None:
    packing = pack(problem)
    best = best_by_enumeration(problem)
    assert packing.gain == pytest.approx(best, rel=1e-9)
    assert packing.gain == pytest.approx(float(problem.gains[list(packing.taken)].sum()), rel=1e-12)
    assert (problem.rows[:, list(packing.taken)].sum(axis=1) <= problem.limits).all()
    assert packing.gain <= packing.bound <= packing.gain * (1 + 1e-6)
    assert packing.relaxed >= best * (1 - 1e-9)


@given(knapsacks())
def test_prices_prove_the_relaxation(problem: Knapsack) -> None:
    """LP duality: prices and the worth of the bounds x ≤ 1 add up to the optimum."""
    packing = pack(problem)
    assert all(price >= 0 for price in packing.prices)
    prices = np.array(packing.prices)
    rest = np.maximum(problem.gains - prices @ problem.rows, 0).sum()
    assert float(prices @ problem.limits + rest) == pytest.approx(packing.relaxed, rel=1e-6)


@settings(max_examples=30)
@given(knapsacks(most=100, least_gain=0.1))
def test_relaxation_is_that_of_cvxpy(problem: Knapsack) -> None:
    """An interior-point method finds the same optimum, on numbers that it can bear."""
    x = cp.Variable(len(problem.gains))
    limits = problem.rows @ x <= problem.limits
    relaxed = cp.Problem(cp.Maximize(problem.gains @ x), [limits, x >= 0, x <= 1])
    relaxed.solve(solver=cp.CLARABEL)
    best = float(relaxed.value)  # type: ignore[arg-type]
    assert pack(problem).relaxed == pytest.approx(best, rel=1e-5, abs=1e-6)


def test_price_of_a_budget_is_its_slope() -> None:
    """Ten per two parameters, then three per one: 4 parameters pay for one and two thirds."""
    gains, weights = [10.0, 9.0, 1.0], [2.0, 3.0, 1.0]
    packing = pack(knapsack(gains, [weights], [4.0]))
    assert packing.prices == pytest.approx((3.0,))
    assert packing.relaxed == pytest.approx(10 + 2 * 3)
    assert (packing.taken, packing.gain) == ((0, 2), 11.0)
    more = pack(knapsack(gains, [weights], [4.001])).relaxed
    assert (more - packing.relaxed) / 0.001 == pytest.approx(packing.prices[0])
    assert pack(knapsack(gains, [weights], [7.0])).prices == (0.0,)


def test_limits_hold_exactly_also_where_the_solver_is_tolerant() -> None:
    """One too many in a hundred million is within its tolerance, and over the limit."""
    big = 10**8
    packing = pack(knapsack([2.0, 1.0], [[big + 1, big]], [big]))
    assert packing.taken == (1,)


# --- the rule ---------------------------------------------------------------------------------


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


def decided(rule: Any) -> tuple[cg.Solution, dict[str, float]]:
    model, data, candidates = several()
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)
    with nothing_left_behind(model):
        solution = cg.solve(problem, rule=rule)
    return solution, multiply_adds(problem, solution.candidates)


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
    solution, counts = decided(Budget(parameters, operations, per_site))
    sensitivities = solution.sensitivities
    best = 0.0
    for size in range(6):
        for names in itertools.combinations(sensitivities, size):
            sites = [sensitivities[name].site for name in names]
            new = sum(sensitivities[name].num_new_parameters for name in names)
            fits = parameters is None or new <= parameters
            fits &= operations is None or sum(counts[name] for name in names) <= operations
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
    """4·4, 2·4·7, 6·6, 2·6·2 for each sample, and nothing for elementwise products."""
    _, counts = decided(cg.TopK(1))
    assert counts == {"a": 16, "b": 56, "c": 36, "d": 24, "e": 0}


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
    counts = multiply_adds(problem, cg.solve(problem).candidates)
    assert counts == {"1": 4 * 4 * 3 * 3 * 9}
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    data = [(torch.randn(5, 3, 2), torch.randint(2, (5,)))]
    problem = cg.GrowthProblem(
        model, nn.CrossEntropyLoss(), data, [cg.Candidate("1", IdentityLinear(4, nn.ReLU()))]
    )
    assert multiply_adds(problem, cg.solve(problem).candidates) == {"1": 3 * 16}


def test_gain_of_ones_own() -> None:
    solution, _ = decided(Budget(parameters=20, gain=lambda s: float(s.site == "1")))
    assert solution.decision.chosen == ("a",)
    solution, _ = decided(Budget(parameters=20, gain=lambda s: -1.0))
    assert solution.decision.chosen == ()
    assert solution.decision.evidence["gain"] == 0.0
    model, data, candidates = several()
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)
    with nothing_left_behind(model), refused(cg.RuleError, "gain", "nan", '"a"'):
        cg.solve(problem, rule=Budget(parameters=20, gain=lambda s: float("nan")))


def test_larger_gains_first() -> None:
    solution, _ = decided(Budget(parameters=1e4))
    values = [solution.sensitivities[name].value for name in solution.decision.chosen]
    assert len(values) == 3
    assert values == sorted(values, reverse=True)
    again = replace(Budget(parameters=1e4), per_site=None)
    assert len(decided(again)[0].decision.chosen) == 5


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
def test_budgets_that_make_no_sense(options: dict[str, Any], words: list[str]) -> None:
    with refused(cg.RuleError, *words):
        Budget(**options)
