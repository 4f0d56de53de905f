"""Short real trainings of every candidate, and of the model without a new layer."""

import copy
import functools
import itertools
import json
from typing import Any

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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import constrained_growth as cg
from constrained_growth.blocks import ResidualMLP
from constrained_growth.rules import Trial

NOTHING = "(nothing)"
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
    last = decision.evidence["losses"]
    assert last == rungs[-1]["losses"]
    assert set(last) == ({best, NOTHING} if eta == 3 else set(first))
    best = min(last, key=lambda name: last[name])
    assert decision.chosen == (() if best == NOTHING else (best,))
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
                decided(Trial(7, optimizer, eta=float("inf")), model, data, twins) for _ in range(2)
            )
        assert one.evidence == two.evidence
        losses = one.evidence["losses"]
        assert losses["a"] == losses["b"] != losses[NOTHING]  # same batches, same Dropout
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
    assert "inserting nothing" in decision.reason
    harmed = decision.evidence["losses"]["1"]
    assert harmed is None or harmed > decision.evidence["losses"][NOTHING]


def test_the_seed_orders_a_list_of_batches() -> None:
    """One epoch each: every batch once, in an order that the seed decides."""
    model, data = feedforward(2, 4, 3), classified(30, batch=6)
    inputs = [x for x, _ in data]
    orders = []
    for seed in (0, 1, 1):
        seen: list[int] = []

        def noted(module: nn.Module, args: Any, seen: list[int] = seen) -> None:
            seen += [i for i, x in enumerate(inputs) if torch.equal(x, args[0])]

        handle = model.register_forward_pre_hook(noted)  # type: ignore[arg-type]
        problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate()])
        solution = cg.solve(problem)
        seen.clear()
        Trial(5, SGD, seed=seed, data=classified(7)).decide(problem, solution)
        handle.remove()
        orders.append(seen[::2])
        assert seen[::2] == seen[1::2]  # the candidate's and that without a new layer
        assert sorted(seen[::2]) == list(range(5))
    assert orders[0] != orders[1] == orders[2]


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


@pytest.mark.parametrize(
    ("number", "steps", "eta", "rungs"),
    [
        (1, 90, 3.0, [(90, 1)]),
        (7, 80, 2.0, [(20, 7), (40, 3), (80, 1)]),
        (9, 9, 3.0, [(1, 9), (3, 3), (9, 1)]),
        (5, 30, 10.0, [(3, 5), (30, 1)]),
        (5, 1, 3.0, [(1, 5), (1, 1)]),
        (4, 6, float("inf"), [(6, 4)]),
    ],
)
def test_halving_leaves_one(
    number: int, steps: int, eta: float, rungs: list[tuple[int, int]]
) -> None:
    """After how many steps the losses of how many candidates are compared."""
    torch.manual_seed(2)
    several = [cg.Candidate("1", ResidualMLP(4, 1 + i, torch.tanh), f"c{i}") for i in range(number)]
    decision = decided(Trial(steps, SGD, eta=eta), feedforward(2, 4, 3), classified(6), several)
    found = decision.evidence["rungs"]
    assert [(rung["steps"], len(rung["losses"]) - 1) for rung in found] == rungs
    for before, after in itertools.pairwise(found):
        left = set(after["losses"]) - {NOTHING}
        out = set(before["losses"]) - left - {NOTHING}
        assert max(before["losses"][n] for n in left) <= min(before["losses"][n] for n in out)


def test_weights_and_batches_of_weight_zero() -> None:
    """Labels count, not samples; a batch without labels has no mean loss and is left out."""
    model, data = feedforward(2, 4, 3), classified(30, batch=6)
    data[1][1][:4] = -100
    data[3][1][:] = -100

    class InOrder:
        def __iter__(self) -> Any:
            return iter(data)

    problem = cg.GrowthProblem(
        model, CROSS_ENTROPY, InOrder(), [candidate()], weight=lambda i, t: (t != -100).sum()
    )
    losses = cg.solve(problem, rule=Trial(8, SGD)).decision.evidence["losses"]
    labelled = data[:3] + data[4:]
    twin = copy.deepcopy(model)
    trained(twin, SGD(twin.parameters()), labelled, 8)
    x, y = (torch.cat(part) for part in zip(*labelled, strict=True))
    assert losses[NOTHING] == pytest.approx(CROSS_ENTROPY(twin(x), y).item(), rel=1e-12)
    with nothing_left_behind(model), refused(cg.DataError, "data=list", "no batches"):
        cg.solve(problem, rule=Trial(1, SGD, data=[]))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"eta": 1.0}, "eta=1.0"),
        ({"optimizer": "SGD"}, "optimizer='SGD'"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], word: str) -> None:
    with refused(cg.RuleError, word):
        Trial(**{"steps": 3, "optimizer": SGD, **options})


def test_the_optimizer_of_another_model() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    other = SGD(feedforward(2, 4, 3).parameters())
    with nothing_left_behind(model), refused(cg.RuleError, "optimizer of Trial"):
        decided(Trial(3, other), model, data, [candidate()])
