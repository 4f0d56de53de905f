"""`solve(..., validation=)`: slopes against finite differences of a really inserted layer."""

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import ResidualMLP
from constrained_growth.rules import Generalizes, then
from constrained_growth.solution import HeldOut

LOSS = nn.CrossEntropyLoss()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))


def candidates() -> list[cg.Candidate]:
    return [
        cg.Candidate("1", ResidualMLP(5, 4, torch.tanh)),
        cg.Candidate("3", ResidualMLP(5, 3, torch.tanh)),
        cg.Candidate("3", Bent(5), name="bent"),
        cg.Candidate("1", Bent(), name="scalar"),
    ]


class Bent(nn.Module):
    """x + sin(v ⊙ x), without a closed form."""

    pinned = ("v",)

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.v * x)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3), torch.randint(3, (n,))) for n in sizes]


def mean_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        total = sum(len(y) * float(LOSS(model(x), y)) for x, y in data)
    return total / sum(len(y) for _, y in data)


@pytest.mark.parametrize("name", ["1", "3", "bent", "scalar"])
def test_slope_is_that_of_the_held_out_loss_along_the_step(name: str) -> None:
    model, held_out = network(), batches(7, 4, 6)
    problem = cg.GrowthProblem(model, LOSS, batches(8, 5), candidates())
    solution = cg.solve(problem, cg.Fixed(name), validation=held_out)
    multiplier = solution.multipliers[name]
    size = math.sqrt(sum(float(t.square().sum()) for t in multiplier.values()))
    losses, step = [], 1e-5
    for sign in (1, -1):
        grown = copy.deepcopy(model)
        new = cg.insert(grown, solution).new_parameters(grown)
        pins = {name: p for name, p in new if name.endswith(tuple(multiplier))}
        assert len(pins) == len(multiplier)
        with torch.no_grad():
            for key, value in multiplier.items():
                (pin,) = (p for name, p in pins.items() if name.endswith(key))
                pin += sign * step / size * value
        losses.append(mean_loss(grown, held_out))
    found = solution.sensitivities[name].held_out
    assert found is not None
    assert found.slope == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6)


def test_standard_error_and_p_are_those_of_single_samples() -> None:
    model = network()
    problem = cg.GrowthProblem(model, LOSS, batches(60), candidates()[:1])
    held_out = batches(*[1] * 12)
    solution = cg.solve(problem, validation=held_out)
    found = solution.sensitivities["1"].held_out
    assert found is not None
    alone = [
        cg.solve(problem, validation=[batch, batch]).sensitivities["1"].held_out
        for batch in held_out
    ]
    slopes = np.array([one.slope for one in alone if one is not None])
    assert found.slope == pytest.approx(slopes.mean())
    assert found.standard_error == pytest.approx(slopes.std(ddof=1) / math.sqrt(12))
    _, expected = stats.ttest_1samp(slopes, 0.0, alternative="less")
    assert found.pvalue == pytest.approx(expected)
    assert found.effect_size == pytest.approx(-slopes.mean() / slopes.std(ddof=1))


def test_on_the_training_data_the_slope_is_minus_the_size() -> None:
    model, data = network(), batches(20, 30)
    problem = cg.GrowthProblem(model, LOSS, data, candidates())
    solution = cg.solve(problem, norm=cg.norms.Frobenius(), validation=data)
    for sensitivity in solution.sensitivities.values():
        assert sensitivity.held_out is not None
        assert sensitivity.held_out.slope == pytest.approx(-sensitivity.value)


def test_cross_fitted_slopes_are_those_of_one_batch_along_the_others() -> None:
    """Batches of one sample, each left out of the data and held out instead."""
    model, some = network(), candidates()
    data = batches(*[1] * 9)
    solution = cg.solve(cg.GrowthProblem(model, LOSS, data, some), validation=batches(5))
    for name, sensitivity in solution.sensitivities.items():
        found, slopes = sensitivity.cross_fitted, []
        for i, batch in enumerate(data):
            problem = cg.GrowthProblem(model, LOSS, data[:i] + data[i + 1 :], some)
            alone = cg.solve(problem, cg.TopK(1), validation=[batch]).sensitivities[name].held_out
            assert alone is not None
            slopes.append(alone.slope)
        assert found is not None
        assert found.slope == pytest.approx(np.mean(slopes))
        assert found.standard_error == pytest.approx(np.std(slopes, ddof=1) / 3)
        assert found.effect_size == pytest.approx(-np.mean(slopes) / np.std(slopes, ddof=1))


def test_without_other_data_the_training_samples_judge_each_other() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 1)
    nn.init.normal_(head.weight)
    model, block = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), head), ResidualMLP(6, 6, torch.tanh)
    x = torch.randn(400, 3)
    lacking = copy.deepcopy(block)
    nn.init.normal_(lacking.outer.weight, std=0.3)
    with torch.no_grad():
        noise, signal = model(x) + torch.randn(400, 1), head(lacking(model[:2](x)))
    chosen = [
        cg.solve(
            cg.GrowthProblem(model, nn.MSELoss(), [(x, y)], [cg.Candidate("1", block)]),
            then(cg.TopK(1), Generalizes()),
        ).decision.chosen
        for y in (noise, signal)
    ]
    assert chosen == [(), ("1",)]


@pytest.mark.parametrize("noise", [True, False])
def test_a_grower_asks_other_data_by_its_solver(noise: bool) -> None:
    torch.manual_seed(0)
    teacher, model = network(), network()
    x, y = torch.randn(600, 3), torch.randint(3, (600,))
    if not noise:
        with torch.no_grad():
            y = (5 * teacher(x)).argmax(1)
    data, held_out = [(x[:300], y[:300])], [(x[300:], y[300:])]
    grower = cg.Grower(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        LOSS,
        data,
        candidates=candidates(),
        solver=partial(cg.solve, validation=held_out),
    )
    grower.step(1.0)
    grower.maybe_grow()
    assert len(grower.record.insertions) == (0 if noise else 1)


def test_weights_count() -> None:
    model, (one, other) = network(), batches(6, 9)

    def weighted(model: nn.Module, data: list[Any], weight: Any = None) -> float:
        problem = cg.GrowthProblem(model, LOSS, first, some, weight=weight)
        found = cg.solve(problem, validation=data).sensitivities["1"].held_out
        assert found is not None
        return found.slope

    first, some = batches(10), candidates()[:1]
    alone = [weighted(model, [batch, batch]) for batch in (one, other)]
    both = weighted(model, [one, other], lambda x, y: 1.0 if len(y) == 6 else 3.0)
    assert both == pytest.approx((alone[0] + 3 * alone[1]) / 4)


def test_noise_is_not_inserted_and_a_real_gain_is() -> None:
    """Labels that have nothing to do with the inputs, and a teacher with the layer that lacks."""
    inserted = []
    for seed in range(20):
        torch.manual_seed(seed)
        head = nn.Linear(6, 1)
        nn.init.normal_(head.weight)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), head)
        block = ResidualMLP(6, 6, torch.tanh)
        x = torch.randn(400, 3)
        with torch.no_grad():
            noise = model(x) + torch.randn(400, 1)
            lacking = copy.deepcopy(block)
            nn.init.normal_(lacking.outer.weight, std=0.3)
            signal = head(lacking(model[:2](x))) + 0.1 * torch.randn(400, 1)
        row = []
        for y in (noise, signal):
            problem = cg.GrowthProblem(
                model, nn.MSELoss(), [(x[:200], y[:200])], [cg.Candidate("1", block)]
            )
            solution = cg.solve(problem, validation=[(x[200:], y[200:])])
            row.append(len(solution.decision.chosen))
        inserted.append(row)
    noise_rate, signal_rate = np.mean(inserted, 0)
    assert noise_rate <= 0.2  # 5 % in the mean; more than 4 of 20 with a probability of 0.3 %
    assert signal_rate >= 0.95


def test_the_model_stays_as_it_is_and_the_rule_says_why() -> None:
    model, data = network(), batches(20, 30)
    problem = cg.GrowthProblem(model, LOSS, data, candidates())
    state = copy.deepcopy(model.state_dict())
    solution = cg.solve(problem, validation=batches(9))
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert "on other samples 1 of 1 lower the loss clearly" in solution.decision.reason
    assert "pvalues" in solution.decision.evidence
    with pytest.raises(cg.DataError, match="validation=list_iterator"):
        cg.solve(problem, validation=iter(data))
    with pytest.raises(cg.RuleError, match="level=1"):
        Generalizes(1.0)


def test_an_effect_has_to_be_significant_and_of_a_size() -> None:
    given = {
        name: cg.Sensitivity(1.0, held_out=HeldOut(-1.0, 0.1, pvalue, size))
        for name, pvalue, size in (("both", 1e-3, 0.5), ("small", 1e-9, 0.2), ("noise", 0.2, 0.9))
    }
    assert Generalizes()(given).chosen == ("both",)
    assert Generalizes(effect_size=0)(given).chosen == ("both", "small")
    assert Generalizes(level=0.5)(given).chosen == ("both", "noise")


def test_held_out_data_that_say_nothing_are_refused() -> None:
    problem = cg.GrowthProblem(network(), LOSS, batches(20), candidates())
    with pytest.raises(cg.DataError, match="validation yields no batches"):
        cg.solve(problem, validation=[])
    with pytest.raises(cg.DataError, match="validation has a loss of nan"):
        cg.solve(problem, validation=[(torch.full((5, 3), math.nan), torch.zeros(5).long())])
    with pytest.raises(cg.RuleError, match="several samples"):
        cg.solve(problem, validation=batches(1))
    found = cg.solve(problem, cg.TopK(1), validation=batches(1)).sensitivities["1"].held_out
    assert found is not None
    assert math.isnan(found.standard_error)


def test_the_decision_with_validation_says_how_often_it_would_be_the_same() -> None:
    """By hand: bootstrap samples on which the same place is the largest, its test as it was."""
    for clear in (True, False):
        train, held_out = ([(x, x.argmax(1)) for x, _ in batches(*[8] * n)] for n in (4, 20))
        if not clear:
            held_out = batches(8, 8)  # their labels are noise
        problem = cg.GrowthProblem(network(), LOSS, train, candidates()[:2])
        solution = cg.solve(problem, then(cg.TopK(1), Generalizes()), validation=held_out)
        assert bool(solution.decision.chosen) is clear
        found = solution.sensitivities.values()
        draws = np.array([s.value + np.array(s.replicates) - np.mean(s.replicates) for s in found])
        best = np.array([s.value for s in found]).argmax()
        same = (draws.clip(min=0).argmax(0) == best).mean()
        assert 0 < same < 1
        assert solution.agreement == pytest.approx(same if clear else 1.0)
