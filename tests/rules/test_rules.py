"""From sensitivities to a decision."""

import pickle
import random
from collections.abc import Mapping
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import (
    Gain,
    candidate,
    classified,
    feedforward,
    mean_loss,
    nothing_left_behind,
    refused,
    solved,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import ResidualMLP
from constrained_growth.rules import Fixed, Random, otherwise, then


def sensitivities(**values: float) -> dict[str, cg.Sensitivity]:
    return {name: cg.Sensitivity(value) for name, value in values.items()}


def counted(**values: tuple[float, int]) -> dict[str, cg.Sensitivity]:
    return {name: cg.Sensitivity(v, num_parameters=n) for name, (v, n) in values.items()}


# --- optimality, by CVXPY -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_threshold_is_a_group_lasso_and_top_k_a_linear_program(seed: int) -> None:
    """min −⟨λ, v⟩ + ½‖v‖² + τ Σ_c ‖v_c‖ leaves c at its pin exactly where ‖λ_c‖ ≤ τ.

    And v_c ≠ 0 has the subgradient condition λ_c = v_c + τ v_c/‖v_c‖. The k largest maximise
    Σ ‖λ_c‖ x_c over 0 ≤ x ≤ 1, Σ x_c ≤ k, whose price is that of the next one.
    """
    torch.manual_seed(seed)
    model, data = feedforward(2, 4, 5, 4, 3), classified(30)
    places = [
        cg.Candidate(after, ResidualMLP(width, hidden, torch.tanh), f"{after}, {hidden}")
        for after, width in (("1", 4), ("3", 5), ("5", 4))
        for hidden in (2, 3)
    ]
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, places)
    solution = cg.solve(problem, cg.TopK(1), norm=cg.norms.Frobenius())
    sizes = {name: s.value for name, s in solution.sensitivities.items()}
    ordered = sorted(sizes.values(), reverse=True)
    tau = (ordered[2] + ordered[3]) / 2

    rule = cg.Threshold(absolute=tau)
    chosen = cg.solve(problem, rule, norm=cg.norms.Frobenius()).decision.chosen
    lambdas = {
        name: np.concatenate([t.flatten().numpy() for t in pins.values()]) / tau
        for name, pins in solution.multipliers.items()
    }
    moves = {name: cp.Variable(len(value)) for name, value in lambdas.items()}
    terms = [cp.sum_squares(v) / 2 - lambdas[name] @ v + cp.norm(v) for name, v in moves.items()]
    cp.Problem(cp.Minimize(cp.sum(cp.hstack(terms)))).solve(solver=cp.CLARABEL)
    found = {name: np.asarray(v.value) for name, v in moves.items()}
    assert {name for name, v in found.items() if np.linalg.norm(v) > 1e-4} == set(chosen)
    for name in chosen:
        v = found[name]
        np.testing.assert_allclose(v + v / np.linalg.norm(v), lambdas[name], atol=1e-4)

    top = cg.solve(problem, cg.TopK(3), norm=cg.norms.Frobenius()).decision.chosen
    x, values = cp.Variable(len(sizes)), np.array(list(sizes.values())) / tau
    limit: Any = cp.sum(x) <= 3
    cp.Problem(cp.Maximize(values @ x), [limit, x >= 0, x <= 1]).solve(solver=cp.CLARABEL)
    assert {n for n, share in zip(sizes, np.asarray(x.value), strict=True) if share > 0.5} == set(
        top
    )
    price = float(np.asarray(limit.dual_value)) * tau
    assert ordered[3] * (1 - 1e-4) <= price <= ordered[2] * (1 + 1e-4)


# --- TopK -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "values", "chosen"),
    [
        (1, {"a": 0.1, "b": 0.3, "c": 0.2}, ("b",)),
        (2, {"a": 0.1, "b": 0.3, "c": 0.2}, ("b", "c")),
        (9, {"a": 0.1, "b": 0.3, "c": 0.2}, ("b", "c", "a")),
        (1, {"a": 0.2, "b": 0.2}, ("a",)),
        (1, {"b": 0.2, "a": 0.2}, ("b",)),
        (2, {"a": 0.1, "b": 0.2, "c": 0.2, "d": 0.2}, ("b", "c")),
        (2, {"a": 0.0, "b": 0.2}, ("b",)),
        (1, {"a": 0.0, "b": 0.0}, ()),
        (1, {}, ()),
    ],
)
def test_top_k(k: int, values: dict[str, float], chosen: tuple[str, ...]) -> None:
    assert cg.TopK(k)(sensitivities(**values)).chosen == chosen


@given(st.lists(st.floats(0, 10), max_size=8), st.integers(1, 9))
def test_top_k_takes_none_smaller_than_what_it_leaves(values: list[float], k: int) -> None:
    named = {str(index): cg.Sensitivity(value) for index, value in enumerate(values)}
    chosen = cg.TopK(k)(named).chosen
    taken = [named[name].value for name in chosen]
    left = [s.value for name, s in named.items() if name not in chosen]
    assert len(chosen) == min(k, sum(value > 0 for value in values))
    assert taken == sorted(taken, reverse=True)
    assert not taken or min(taken) >= max(left, default=0)


def test_top_k_per_unit_of_cost() -> None:
    wide = counted(wide=(1.0, 100), narrow=(0.5, 10))
    assert cg.TopK(1)(wide).chosen == ("wide",)
    decision = cg.TopK(1, cost=lambda s: s.num_parameters)(wide)
    assert decision.chosen == ("narrow",)
    assert "per cost" in decision.reason


@pytest.mark.parametrize("k", [0, -1, 1.0, True, None, "1"])
def test_k_is_a_positive_whole_number(k: Any) -> None:
    with refused(cg.RuleError, f"k={k!r}", "positive whole number"):
        cg.TopK(k)


@pytest.mark.parametrize("cost", [0, -1, float("nan")])
def test_cost_that_is_not_positive(cost: float) -> None:
    with refused(cg.RuleError, "cost", f"{cost}", '"a"'):
        cg.TopK(1, cost=lambda s: cost)(sensitivities(a=1.0))


# --- Threshold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"absolute": 0.15}, ("b", "c")),
        ({"absolute": 0.2}, ("b",)),
        ({"absolute": 0.3}, ()),
        ({"absolute": 0.0}, ("b", "c", "a")),
        ({"relative": 1.5}, ("b", "c")),
        ({"relative": 2.5}, ("b",)),
        ({"relative": 3.0}, ()),
        ({"relative": 1.5, "absolute": 0.25}, ("b",)),
        ({"relative": 2.5, "absolute": 0.05}, ("b",)),
        ({"absolute": 0.0, "max_insertions": 2}, ("b", "c")),
    ],
)
def test_threshold(options: dict[str, Any], chosen: tuple[str, ...]) -> None:
    given = {
        name: cg.Sensitivity(value, baseline=0.1)
        for name, value in {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0}.items()
    }
    assert cg.Threshold(**options)(given).chosen == chosen


def test_relative_threshold_is_relative_to_the_layers_of_the_model() -> None:
    """Each layer's gradient over all its parameters; their mean, without the candidates."""
    model, data = feedforward(2, 4, 5, 3), classified(30, batch=12)
    layers = [model.get_submodule(str(index)) for index in (0, 2, 4)]
    norms = []
    for layer in layers:
        grads = torch.autograd.grad(mean_loss(model, data), list(layer.parameters()))
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
    baseline = sum(norms) / 3
    candidates = [candidate("1", 4), candidate("3", 5), cg.Candidate("0", Gain(4))]
    values = {n: s.value for n, s in solved(model, data, *candidates).sensitivities.items()}
    for value in values.values():
        for tilt, inside in ((1 + 1e-9, False), (1 - 1e-9, True)):
            rule = cg.Threshold(relative=tilt * value / baseline)
            chosen = solved(model, data, *candidates, rule=rule).decision.chosen
            bar = tilt * value
            assert set(chosen) == {name for name, other in values.items() if other > bar}
            assert (value > bar) is inside


def test_relative_threshold_without_stationarity() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    with (
        nothing_left_behind(model),
        refused(cg.RuleError, "relative=1.0", "stationarity=True"),
    ):
        solved(model, data, candidate(), rule=cg.Threshold(relative=1.0), stationarity=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["absolute=", "relative="]),
        ({"absolute": -0.1}, ["absolute=-0.1", "[0, inf]"]),
        ({"relative": -1.0}, ["relative=-1.0", "[0, inf]"]),
        ({"absolute": float("nan")}, ["absolute=nan"]),
        ({"absolute": 1.0, "max_insertions": 0}, ["max_insertions=0"]),
        ({"confidence": 0.3}, ["confidence=0.3"]),
        ({"confidence": 1.0}, ["confidence=1.0"]),
    ],
)
def test_threshold_arguments_out_of_range(options: dict[str, Any], words: list[str]) -> None:
    with refused(cg.RuleError, *words):
        cg.Threshold(**options)


def test_threshold_with_confidence() -> None:
    """z = 1.96 standard errors above the bar, and not one hair less."""
    z = 1.959963984540054
    for error, bar in ((0.1, 0.0), (0.01, 0.5)):
        for tilt, inside in ((1 + 1e-9, True), (1 - 1e-9, False)):
            one = {"a": cg.Sensitivity(bar + tilt * z * error, error)}
            rule = cg.Threshold(absolute=bar, confidence=0.95)
            assert (rule(one).chosen == ("a",)) is inside
            assert "confidence 0.95" in rule(one).reason
    assert cg.Threshold(confidence=0.9)({"a": cg.Sensitivity(0.1, 9.0)}).chosen == ()
    relative = {"a": cg.Sensitivity(2.0, 0.1, baseline=1.0), "b": cg.Sensitivity(2, 1, baseline=1)}
    assert cg.Threshold(relative=1.5, confidence=0.9)(relative).chosen == ("a",)


def test_confidence_needs_a_standard_error() -> None:
    with refused(cg.RuleError, "confidence=0.9", '"a"', "unknown"):
        cg.Threshold(confidence=0.9)(sensitivities(a=1.0))


def test_pure_noise_is_rarely_inserted() -> None:
    """The loss does not depend on the sample: λ is zero in the population, noise in a sample."""
    model = feedforward(2, 4, 3, activation=nn.Tanh)
    one = cg.Candidate("1", cg.blocks.ResidualLinear(4, torch.tanh))
    signs = torch.randint(2, (60, 80)) * 2.0 - 1
    taken = {0.8: 0, 0.95: 0}
    for sign in signs.mT:
        data = [(torch.randn(60, 2), sign.view(-1, 1))]
        solution = solved(
            model,
            data,
            one,
            rule=cg.Threshold(confidence=0.8),
            norm=None,  # the rule's own
            loss_fn=lambda output, target: (output * target).mean(),
        )
        for confidence in taken:
            decision = cg.Threshold(confidence=confidence)(solution.sensitivities)
            taken[confidence] += len(decision.chosen)
    assert 0 < taken[0.8] <= 0.2 * 80
    assert taken[0.95] <= 0.05 * 80


# --- controls -------------------------------------------------------------------------------------


def test_random_draws_uniformly() -> None:
    given = sensitivities(a=0.1, b=0.3, c=0.2)
    draws = [Random(seed=seed)(given).chosen for seed in range(600)]
    for name in given:
        assert 150 < draws.count((name,)) < 250
    pairs = {Random(2, seed)(given).chosen for seed in range(100)}
    assert len(pairs) == 6
    assert all(set(Random(9, seed)(given).chosen) == set(given) for seed in range(5))
    assert Random(seed=4)(given) == Random(seed=4)(given)
    assert Random()({}).chosen == ()
    before = random.getstate()
    Random(seed=7)(given)
    assert random.getstate() == before


def test_fixed() -> None:
    given = sensitivities(a=0.1, b=0.3, c=0.2)
    for rule, chosen in (
        (Fixed(0), ("a",)),
        (Fixed(-1), ("c",)),
        (Fixed("b", 0, "b"), ("b", "a")),
        (Fixed(), ()),
    ):
        assert rule(given).chosen == chosen
        assert pickle.loads(pickle.dumps(rule)) == rule
    for bad in (3, -4, "d"):
        with refused(cg.RuleError, repr(bad), "'a', 'b', 'c'"):
            Fixed(bad)(given)
    for bad in (1.5, True, None):
        with refused(cg.RuleError, repr(bad)):
            Fixed(bad)  # type: ignore[arg-type]
    with refused(cg.RuleError, "k=0"):
        Random(0)


def test_composed_rules_are_values() -> None:
    for compose in (then, otherwise):
        rule = compose(cg.TopK(2), cg.Threshold(absolute=0.1))
        assert pickle.loads(pickle.dumps(rule)) == rule != compose(cg.TopK(2))
        assert repr(rule).startswith(f"{compose.__name__}(TopK(k=2, cost=None), Threshold(")
    assert then(cg.TopK(2)) != otherwise(cg.TopK(2))


# --- one after the other --------------------------------------------------------------------------


class Asking:
    """A rule with `decide`: the first candidate it is shown, moved a little."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def decide(self, problem: cg.GrowthProblem, solution: cg.Solution, /) -> cg.Decision:
        self.seen.append((problem, solution.decision, list(solution.sensitivities)))
        name = next(iter(solution.sensitivities))
        values = {name: {k: 0.1 * v for k, v in solution.multipliers[name].items()}}
        return cg.Decision((name,), "asked", values, {"passes": 2.5})


def test_then_decides_about_what_the_rule_before_chose() -> None:
    given = sensitivities(a=0.1, b=0.3, c=0.2, d=0.25)
    assert then(cg.TopK(3), Fixed(0))(given).chosen == ("b",)
    rule = then(cg.Threshold(absolute=0.15), cg.TopK(3), Fixed(-1))
    decision = rule(given)
    assert decision.chosen == ("d",)
    assert decision.reason.split("; then ") == [
        "3 of 4 sensitivities above 0.15",
        "largest sensitivity of 3",
        "fixed in advance",
    ]
    nothing = then(cg.Threshold(absolute=9.0), Fixed("a"))(given)
    assert nothing.chosen == ()
    assert then(cg.TopK(1))(given).chosen == ("b",)


def test_then_with_a_rule_that_needs_the_model() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    candidates = [candidate("1"), candidate("3"), cg.Candidate("0", Gain(4))]
    values = {n: s.value for n, s in solved(model, data, *candidates).sensitivities.items()}
    ranked = sorted(values, key=lambda name: -values[name])
    rule = Asking()
    solution = solved(model, data, *candidates, rule=then(cg.TopK(2), rule))
    ((problem, empty, seen),) = rule.seen
    assert problem.model is model
    assert empty == cg.Decision()
    assert seen == [name for name in values if name in ranked[:2]]
    assert solution.decision.chosen == (seen[0],)
    assert solution.decision.values.keys() == {seen[0]}
    assert solution.decision.evidence["passes"] == 2.5
    assert len(solution.sensitivities) == 3
    twice = then(rule, rule, cg.TopK(1))
    assert solved(model, data, *candidates, rule=twice).decision.evidence["passes"] == 5.0


@pytest.mark.parametrize("rules", [(), (None,), (cg.TopK(1), "TopK"), (cg.TopK,)])
@pytest.mark.parametrize("compose", [then, otherwise])
def test_composing_what_is_not_a_rule(compose: Any, rules: Any) -> None:
    with refused(cg.RuleError, compose.__name__):
        compose(*rules)


def test_otherwise_is_the_first_rule_that_chooses_anything() -> None:
    given = sensitivities(a=0.1, b=0.3, c=0.2)
    high, low = cg.Threshold(absolute=9.0), cg.Threshold(absolute=0.15)
    assert otherwise(low, Fixed("a"))(given).chosen == ("b", "c")
    decision = otherwise(high, Fixed(), Fixed("a"), low)(given)
    assert decision.chosen == ("a",)
    assert decision.reason.split("; otherwise ")[1:] == ["fixed in advance"] * 2
    assert otherwise(high, Fixed())(given).chosen == ()
    assert otherwise(high, low)({}).chosen == ()


def test_otherwise_with_a_rule_that_needs_the_model() -> None:
    """A step that is accepted, and the pins where none is."""
    model, data = feedforward(2, 4, 4, 3), classified(20)
    candidates = [candidate("1"), candidate("3"), cg.Candidate("0", Gain(4))]

    def straight(_: Any, vector: Tensor) -> Tensor:
        return torch.zeros_like(vector)

    for radius, moved in ((0.1, True), (1000.0, False)):
        first, second = (cg.TrustRegion(radius, curvature=straight, max_tries=1) for _ in range(2))
        rule: Any = then(cg.TopK(1), otherwise(first, cg.TopK(1)))
        decision = solved(model, data, *candidates, rule=rule).decision
        alone = solved(model, data, *candidates, rule=then(cg.TopK(1), second)).decision
        assert len(decision.chosen) == 1
        assert bool(alone.chosen) == bool(decision.values) == moved
        assert decision.evidence["passes"] == pytest.approx(alone.evidence["passes"])
        assert rule.state_dict() == {"1": {"0": second.state_dict()}}


def test_evidence_of_nested_rules_is_kept() -> None:
    def noted(name: str, *chosen: str) -> Any:
        def rule(given: Any, /) -> cg.Decision:
            return cg.Decision(tuple(c for c in chosen if c in given), name, {}, {name: 1})

        return rule

    given = sensitivities(a=0.1, b=0.3)
    inner = otherwise(noted("second"), noted("third", "b"))
    rule: Any = then(noted("first", "a", "b"), inner, noted("last", "b"))
    assert rule(given).evidence == {
        "last": 1,
        "before": [{"first": 1}, {"third": 1, "before": [{"second": 1}]}],
    }
    rule = then(noted("first", "a", "b"), inner)
    assert rule(given).evidence == {
        "third": 1,
        "before": [{"first": 1}, {"before": [{"second": 1}]}],
    }
    rule = then(noted("first", "a", "b"), noted("before", "b"))  # a word that a rule may use too
    assert rule(given).evidence == {"before": [{"first": 1}, {"before": 1}]}


@pytest.mark.parametrize("compose", [then, otherwise])
@pytest.mark.parametrize(
    ("answer", "words"),
    [(None, "not a cg.Decision"), (cg.Decision(("z",)), "candidates are")],
)
def test_a_rule_among_others_that_returns_no_decision(
    compose: Any, answer: Any, words: str
) -> None:
    def broken(_: Any) -> Any:
        return answer

    with refused(cg.RuleError, "broken", words):
        compose(broken, cg.TopK(1))(sensitivities(a=0.1))
    model, data = feedforward(2, 4, 3), classified(20)
    with nothing_left_behind(model), refused(cg.RuleError, "broken", words):
        solved(model, data, candidate(), rule=compose(broken, Asking()))


def test_values_of_candidates_that_were_not_chosen() -> None:
    class Confused(Asking):
        def decide(self, problem: cg.GrowthProblem, solution: cg.Solution, /) -> cg.Decision:
            decision = super().decide(problem, solution)
            return cg.Decision((), values=decision.values)

    model, data = feedforward(2, 4, 3), classified(20)
    with refused(cg.RuleError, "gives values for ('1',)", "chose ()"):
        solved(model, data, candidate(), rule=Confused())


def test_what_a_rule_does_to_the_model_is_undone() -> None:
    """Modes, buffers, gradients and random numbers are put back."""

    class Rude(Asking):
        def decide(self, problem: cg.GrowthProblem, solution: cg.Solution, /) -> cg.Decision:
            torch.rand(3)
            problem.model.eval()
            for parameter in problem.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            return super().decide(problem, solution)

    model, data = feedforward(2, 4, 3), classified(20)
    with nothing_left_behind(model):
        solved(model, data, candidate(), rule=Rude())


# --- a user's own -----------------------------------------------------------------------------


class Least:
    """A rule with a state of its own."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, sensitivities: Mapping[str, cg.Sensitivity], /) -> cg.Decision:
        self.seen = list(sensitivities)
        return cg.Decision((min(sensitivities, key=lambda name: sensitivities[name].value),), "!")


def test_a_users_own_class_and_function() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    candidates = [candidate("3"), candidate("1")]
    rule = Least()
    solution = solved(model, data, *candidates, rule=rule)
    assert rule.seen == ["3", "1"]
    values = {name: s.value for name, s in solution.sensitivities.items()}
    assert solution.decision == cg.Decision((min(values, key=lambda name: values[name]),), "!")

    def precise(given: Mapping[str, cg.Sensitivity]) -> cg.Decision:
        return cg.Decision(tuple(n for n, s in given.items() if s.value > 2 * s.standard_error))

    expected = [n for n, s in solution.sensitivities.items() if s.value > 2 * s.standard_error]
    assert list(solved(model, data, *candidates, rule=precise).decision.chosen) == expected


def test_inserting_nothing_is_an_answer() -> None:
    solution = solved(
        feedforward(2, 4, 3), classified(20), candidate(), rule=lambda _: cg.Decision()
    )
    assert solution.decision.chosen == ()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, ["returned None", "cg.Decision(chosen=("]),
        (("1",), ["returned ('1',)", "not a cg.Decision"]),
        ("1", ["returned '1'", "not a cg.Decision"]),
        (cg.Decision(("2",)), ["'2'", "the candidates are ('1', '3')"]),
        (cg.Decision(("1", "1")), ["at most once"]),
    ],
)
def test_answers_that_are_not_decisions(answer: Any, words: list[str]) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    candidates = [candidate("1"), candidate("3")]
    with nothing_left_behind(model), refused(cg.RuleError, *words):
        solved(model, data, *candidates, rule=lambda _: answer)


def test_dead_candidates_are_never_the_largest() -> None:
    """All units off: no gradient arrives, so every sensitivity is 0 and nothing is inserted."""
    model, data = feedforward(2, 4, 3), classified(20)
    nn.init.constant_(model.get_parameter("0.bias"), -100.0)
    solution = solved(model, data, candidate(), rule=cg.TopK(1))
    assert solution.sensitivities["1"].value == 0.0
    assert solution.decision == cg.Decision((), "no sensitivity above 0")
