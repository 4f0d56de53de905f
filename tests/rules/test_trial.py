"""Short real trainings of every candidate, and of nothing."""

import copy
import functools
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_same,
    candidate,
    classified,
    feedforward,
    mean_loss,
    nothing_left_behind,
    refused,
    splice,
)
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import constrained_growth as cg
from constrained_growth.blocks import ResidualMLP
from constrained_growth.rules.trial import NOTHING, Losses, Trial, compared, kept, lengths

SGD = functools.partial(torch.optim.SGD, lr=0.3, momentum=0.9)


def decided(
    rule: Trial, model: nn.Module, data: Any, candidates: Any, loss: Any = CROSS_ENTROPY
) -> cg.Decision:
    return cg.solve(cg.GrowthProblem(model, loss, data, candidates), rule=rule).decision


def trained(model: nn.Module, optimizer: Any, data: list[Any], steps: int) -> float:
    """An ordinary loop over the batches in their order, and the loss afterwards."""
    for input, target in itertools.islice(itertools.cycle(data), steps):
        optimizer.zero_grad()
        CROSS_ENTROPY(model(input), target).backward()
        optimizer.step()
    return mean_loss(model, data).item()


def several() -> list[cg.Candidate]:
    return [
        candidate("1", 4),
        candidate("3", 4),
        cg.Candidate("1", ResidualMLP(4, 5, torch.tanh), "mlp"),
        cg.Candidate("0", ResidualMLP(4, 2, torch.tanh), "early"),
    ]


class Wild(nn.Module):
    """The identity, until the first step makes a mess of it."""

    pinned = ("gain",)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 1e3 * self.gain)


@pytest.mark.parametrize("eta", [3.0, float("inf")])
def test_losses_are_those_of_networks_that_were_really_grown_and_trained(eta: float) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(30)
    candidates = several()
    rule = Trial(9, SGD, eta=eta)
    with nothing_left_behind(model):
        decision = decided(rule, model, data, candidates)
    rungs = decision.evidence["rungs"]
    assert [rung["steps"] for rung in rungs] == ([3, 9] if eta == 3 else [9])
    for rung in rungs:
        for name, loss in rung["losses"].items():
            grown = copy.deepcopy(model)
            for one in candidates:
                if one.name == name:
                    grown = splice(model, one.after, one.block)
            expected = trained(grown, SGD(grown.parameters()), data, rung["steps"])
            assert loss == pytest.approx(expected, rel=1e-12)
    first = rungs[0]["losses"]
    best = min((n for n in first if n != NOTHING), key=lambda n: first[n])
    assert decision.evidence["winner"] in ([best] if eta == 3 else list(first))
    gain = rungs[-1]["losses"][NOTHING] - rungs[-1]["losses"][decision.evidence["winner"]]
    assert decision.evidence["gain"] == pytest.approx(gain)
    assert json.loads(json.dumps(decision.evidence)) == decision.evidence
    assert decision.values == {}


@pytest.mark.parametrize("kind", [SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_trials_go_on_from_the_state_of_the_optimizer(kind: Any) -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    optimizer = kind(model.parameters(), lr=0.05)
    trained(model, optimizer, data, 5)
    optimizer.param_groups[0]["lr"] = 0.02
    before = copy.deepcopy(optimizer.state_dict())
    one = candidate()
    with nothing_left_behind(model):
        losses = decided(Trial(4, optimizer), model, data, [one]).evidence["losses"]
    assert_same(optimizer.state_dict(), before)

    twin, memory = copy.deepcopy((model, optimizer))
    assert losses[NOTHING] == pytest.approx(trained(twin, memory, data, 4), rel=1e-12)
    twin, memory = copy.deepcopy((model, optimizer))
    layer = copy.deepcopy(one.block)
    twin.insert(2, layer)
    memory.add_param_group({"params": list(layer.parameters()), "lr": 0.02})
    assert losses["1"] == pytest.approx(trained(twin, memory, data, 4), rel=1e-12)


def test_nothing_is_changed_and_the_next_trial_is_the_same() -> None:
    """Shuffled loader, Dropout, BatchNorm, momentum: all as before, to the last bit."""
    model = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3)
    )
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 2), torch.randint(3, (40,))
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = copy.deepcopy(optimizer.state_dict())
    twins = [cg.Candidate("2", ResidualMLP(4, 3, torch.tanh), name) for name in "ab"]
    twins[1].block.load_state_dict(twins[0].block.state_dict())
    for mode in (True, False):
        model.train(mode)
        with nothing_left_behind(model, generator):
            one, two = (
                decided(Trial(7, optimizer, eta=float("inf"), repeats=2), model, data, twins)
                for _ in range(2)
            )
        assert one.evidence == two.evidence
        losses = one.evidence["losses"]
        assert losses["a"] == losses["b"] != losses[NOTHING]  # same batches, same Dropout
        assert one.evidence["standard_error"] > 0
    assert_same(optimizer.state_dict(), before)


def test_a_model_in_eval_mode_is_trained_in_training_mode_and_compared_in_its_own() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.9), nn.Tanh(), nn.Linear(4, 3)).eval()
    data = classified(30)
    losses = decided(Trial(3, SGD), model, data, [cg.Candidate("2", Wild())]).evidence["losses"]
    without = copy.deepcopy(model)
    assert losses[NOTHING] != pytest.approx(trained(without, SGD(without.parameters()), data, 3))
    grown = copy.deepcopy(model)
    optimizer = SGD(grown.parameters())
    with torch.random.fork_rng():
        grown.train()
        trained(grown, optimizer, data, 3)
    assert losses[NOTHING] == pytest.approx(mean_loss(grown.eval(), data).item(), rel=1e-12)


def test_inserting_nothing_wins_where_the_candidate_does_harm() -> None:
    model, data = feedforward(2, 4, 3), classified(30, batch=10)
    decision = decided(Trial(5, SGD), model, data, [cg.Candidate("1", Wild())])
    assert decision.chosen == ()
    assert "inserting nothing is better" in decision.reason
    assert decision.evidence["winner"] == "1"
    assert decision.evidence["gain"] is None or decision.evidence["gain"] < 0


def test_a_gain_within_the_noise_is_none() -> None:
    """A huge margin makes everything noise; none at all takes whatever is lower."""
    model, data = feedforward(2, 4, 4, 3), classified(30, batch=10)
    candidates = several()
    sure, unsure = (
        decided(Trial(30, SGD, margin=margin), model, data, candidates) for margin in (0.0, 1e9)
    )
    assert sure.evidence == unsure.evidence
    assert sure.evidence["gain"] > 0
    assert sure.chosen == (sure.evidence["winner"],)
    assert unsure.chosen == ()
    assert "no better than inserting nothing" in unsure.reason


def test_another_order_in_each_repeat() -> None:
    model, data = feedforward(2, 4, 3), classified(30, batch=6)
    rules = [Trial(6, SGD, repeats=repeats, seed=2) for repeats in (1, 3, 3)]
    one, three, again = (decided(rule, model, data, [candidate()]).evidence for rule in rules)
    assert three == again
    assert one["losses"] != three["losses"]
    assert three["passes"] == pytest.approx(3 * one["passes"])


def test_the_cost_is_counted_in_gradient_passes() -> None:
    """Two contestants, 6 steps of a fifth of the data, and two evaluations of a third each."""
    model, data = feedforward(2, 4, 3), classified(30, batch=6)
    passes = decided(Trial(6, SGD), model, data, [candidate()]).evidence["passes"]
    assert passes == pytest.approx(2 * (6 / 5 + 1 / 3))
    held_out = classified(60)
    rule = Trial(6, SGD, data=held_out)
    evidence = decided(rule, model, data, [candidate()]).evidence
    assert evidence["passes"] == pytest.approx(2 * (6 / 5 + 2 / 3))
    assert evidence["losses"] != passes


def test_standard_errors_are_of_paired_differences() -> None:
    ours, theirs = torch.rand(4, 5).numpy(), torch.rand(4, 5).numpy()
    weights = np.full(5, 1 / 5)
    found = compared(Losses(ours, weights), Losses(theirs, weights))
    assert found.gain == pytest.approx(float((theirs - ours).mean()))
    assert found.error == pytest.approx(float(stats.sem((theirs - ours).mean(1))))
    found = compared(Losses(ours[:1], weights), Losses(theirs[:1], weights))
    assert found.error == pytest.approx(float(stats.sem((theirs - ours)[0])))
    alone = compared(Losses(ours[:1, :1], weights[:1] * 5), Losses(theirs[:1, :1], weights[:1] * 5))
    assert np.isnan(alone.error)


@pytest.mark.parametrize(("number", "eta"), [(1, 3.0), (7, 2.0), (9, 3.0), (12, 1.2), (5, 10.0)])
def test_halving_leaves_one(number: int, eta: float) -> None:
    looks = lengths(number, 10**6, eta)
    assert looks[-1] == 10**6
    left = number
    for _ in looks[:-1]:
        left = kept(left, eta)
    assert left == 1
    assert lengths(number, 1, eta) == [1]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"eta": 1.0}, "eta=1.0"),
        ({"repeats": 0}, "repeats=0"),
        ({"margin": -1.0}, "margin=-1.0"),
        ({"optimizer": "SGD"}, "optimizer='SGD'"),
    ],
)
def test_trials_that_make_no_sense(options: dict[str, Any], word: str) -> None:
    with refused(cg.RuleError, word, "Trial"):
        Trial(**{"steps": 3, "optimizer": SGD, **options})


def test_the_optimizer_of_another_model() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    other = SGD(feedforward(2, 4, 3).parameters())
    with nothing_left_behind(model), refused(cg.RuleError, "optimizer of Trial"):
        decided(Trial(3, other), model, data, [candidate()])
