"""The measurement of decisions: plain loops, made-up outcomes with known answers, simulation."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import refused
from scipy import stats
from torch import nn
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.decisions import outcomes as module
from constrained_growth.experiments.decisions import tasks as suite
from constrained_growth.experiments.decisions.arms import ARMS, Arm, trial_of, trial_passes
from constrained_growth.experiments.decisions.outcomes import (
    Moment,
    Task,
    at_the_moment,
    decisions,
    family,
    key,
    outcomes,
    plain_optimizer,
)
from constrained_growth.experiments.decisions.study import (
    MORE,
    Decided,
    Plan,
    paired_regrets,
    run,
)
from constrained_growth.experiments.decisions.tasks import SUITE
from constrained_growth.experiments.ensembles.networks import cross_entropy, forward, sites_of
from constrained_growth.experiments.ensembles.training import SGD, Adam, Shuffle, train
from constrained_growth.experiments.networks import feedforward
from constrained_growth.experiments.statistics import (
    Yardstick,
    best_loss,
    estimate,
    resampled_regret,
)
from constrained_growth.rules import Fixed, TopK, Trial, TrustRegion

CROSS_ENTROPY = nn.CrossEntropyLoss()
CHEAP = [arm for arm in ARMS if not arm.name.startswith("trial")]


def begin(seed: int) -> tuple[nn.Sequential, tuple[torch.Tensor, torch.Tensor], int]:
    model = feedforward((2, 4, 4, 4, 3))
    centres, y = torch.randn(3, 2), torch.arange(30) % 3
    return model, (centres[y] + 0.5 * torch.randn(30, 2), y), seed % 3


def layer(width: int) -> nn.Module:
    return IdentityLinear(width, nn.ReLU())


MOMENTUM = SGD(0.1, 0.9)


def tiny(optimizer: SGD | Adam = MOMENTUM, **changes: Any) -> Task:
    settings: dict[str, Any] = {"batch": 10, "before": 4, "after": 10, "group": "half 0"} | changes
    return Task("tiny", "three blobs", begin, layer, optimizer, **settings)


def plan(**changes: Any) -> Plan:
    tasks = [tiny(batch=30), replace(tiny(Adam(0.01), batch=30), name="other", group="half 1")]
    made = Plan(tasks, networks=2, runs=2, family=family, arms=ARMS, chunk=2, workers=1)
    return replace(made, **changes)


def decided(moment: Moment, *arms: Arm, losses: Any = None) -> dict[str, Decided]:
    known = np.zeros((4, len(moment.models), 2, 1 + MORE)) if losses is None else losses
    rehearsal = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    return decisions(moment, arms, known, rehearsal[:, : len(moment.models)])


def candidates(moment: Moment, network: int) -> list[cg.Candidate]:
    names = [name for name, _ in sites_of(moment.models[network])]
    blocks = copy.deepcopy(moment.blocks[network])
    return [cg.Candidate(name, block) for name, block in zip(names, blocks, strict=True)]


def plainly(moment: Moment, network: int, rule: Any, order: int, more: int = 0) -> float:
    """Insert and train on as a user would, and the final loss."""
    task, model = moment.task, copy.deepcopy(moment.models[network])
    memory = {name: flat[network] for name, flat in moment.trained.memory.items()}
    optimizer = plain_optimizer(task.optimizer, model, memory)
    x, y = moment.plain[network]
    problem = cg.GrowthProblem(model, task.loss_fn, [(x, y)], candidates(moment, network))
    norm = cg.norms.Frobenius()  # that of an arm without another
    cg.insert(model, cg.solve(problem, rule, norm=norm), optimizer=optimizer)
    losses = []
    for epoch in range(task.before, task.before + task.after + more):
        batches = []
        for rows in Shuffle([order])(epoch, len(x))[0].split(task.batch):
            optimizer.zero_grad()
            loss = task.loss_fn(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            batches.append(loss.item())
        losses.append(np.mean(batches))
    return float(np.mean(losses[-task.after // 10 :]))


# --- what becomes of networks ----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD(0.1, 0.9), Adam(0.01)], ids=repr)
def test_outcomes_are_those_of_plain_networks_that_were_really_grown(optimizer: SGD | Adam) -> None:
    moment = at_the_moment(tiny(optimizer), [7, 8])
    found = outcomes(moment, runs=2)
    assert found.shape == (4, 2, 2, 1 + MORE)
    orders = [1_007_000, 1_008_001]
    for network, of in ((0, 0), (1, 1)):
        order = orders[network]
        expected = plainly(moment, network, Fixed(), order)
        assert found[-1, network, of, 0] == pytest.approx(expected, rel=1e-9)
        for site in range(3):
            more = (0, 1, MORE)[site]
            expected = plainly(moment, network, Fixed(site), order, more)
            assert found[site, network, of, more] == pytest.approx(expected, rel=1e-9)


def test_layers_that_start_elsewhere_are_trained_on_from_there() -> None:
    moment = at_the_moment(tiny(), [7, 8])
    arm = Arm("steps", lambda asked: TrustRegion(0.1))
    losses = outcomes(moment, runs=1)
    chosen = decided(moment, arm, losses=losses)["steps"]
    for network in range(2):
        expected = plainly(moment, network, TrustRegion(0.1), 1_007_000 + 1_000 * network)
        assert chosen.losses[network, 0] == pytest.approx(expected, rel=1e-9)
    at_pin = losses[chosen.sites, range(2), 0]
    assert not np.allclose(chosen.losses, at_pin, rtol=1e-4)


def test_the_moment_is_that_of_plain_training_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    moment = at_the_moment(tiny(Adam(0.01)), [5])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    model, (x, y), _ = begin(5)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for epoch in range(4):
        for rows in Shuffle([5])(epoch, 30)[0].split(10):
            optimizer.zero_grad()
            CROSS_ENTROPY(model(x[rows]), y[rows]).backward()
            optimizer.step()
    for ours, expected in zip(moment.models[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_planted_site_is_where_a_block_of_the_teacher_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, make = list[nn.Module](), suite.trained_block

    def recorded(width: int, scale: float) -> nn.Module:
        made.append(make(width, scale))
        return made[-1]

    monkeypatch.setattr(suite, "trained_block", recorded)
    (task,) = (task for task in SUITE if task.name == "planted")
    for seed in range(4):
        made.clear()
        student, (x, y), site = task.begin(seed)
        assert site is not None
        (missing,) = (b for b in made if all(b is not kept for kept in student))
        after = int(sites_of(student)[site][0])
        layers = [*list(student)[: after + 1], missing, *list(student)[after + 1 :]]
        output = nn.Sequential(*layers)(x)
        torch.testing.assert_close((output - output.mean(0)) / output.std(0), y)
        assert CROSS_ENTROPY(student(x), y) != CROSS_ENTROPY(output, y)


# --- regret -----------------------------------------------------------------------------------


def test_regret_of_outcomes_made_up() -> None:
    inserted = np.zeros((3, 2, 4)) + np.array([[0.0, 5.0], [1.0, 3.0], [2.0, 4.0]])[:, :, None]
    against = Yardstick.of(inserted)
    assert against.best.tolist() == [0.0, 3.0]
    assert against.mean.tolist() == [1.0, 4.0]
    losses = {0.0: [0, 3], 1.0: [1, 4], 2.0: [2, 5], 0.5: [0, 4], -1.0: [-2, 3]}
    for regret, loss in losses.items():
        found = resampled_regret(np.array(loss, dtype=float), against, seed=0, draws=50)
        assert found[0] == regret
    assert estimate(resampled_regret(against.best, against, 0, 50)).high == 0.0
    assert estimate(resampled_regret(against.mean, against, 0, 50)).low == 1.0


def test_pure_noise_gives_no_best_site() -> None:
    inserted = np.random.default_rng(1).normal(size=(5, 4000, 4))
    found = Yardstick.of(inserted)
    naive = inserted.mean(2).min(0) - inserted.mean(axis=(0, 2))
    assert naive.mean() < -0.5  # what luck looks like
    assert abs(found.signal) < 3


def test_a_clear_best_site_is_not_biased() -> None:
    draw = np.random.default_rng(2)
    truth = np.array([0.0, 3.0, 3.0])[:, None, None]
    found = best_loss(truth + 0.3 * draw.normal(size=(3, 4000, 4)))
    assert abs(found.mean()) < 3 * found.std() / np.sqrt(len(found))


def benchmark(draw: np.random.Generator, networks: int) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of networks whose sites differ, and a rule that finds the best half of the time."""
    sites = draw.gamma(2.0, size=(4, networks, 1))
    knows = draw.random(networks) < 0.5
    picked = np.where(knows, sites[..., 0].argmin(0), draw.integers(4, size=networks))
    inserted = sites + 0.2 * draw.normal(size=(4, networks, 6))
    return inserted[picked, np.arange(networks)].mean(1), inserted


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(3)
    loss, inserted = benchmark(draw, 20_000)
    truth = resampled_regret(loss, Yardstick.of(inserted), 0, draws=1)[0]
    assert truth == pytest.approx(0.5, abs=0.03)
    held = 0
    for _ in range(200):
        loss, inserted = benchmark(draw, 24)
        found = estimate(resampled_regret(loss, Yardstick.of(inserted), 0, draws=400))
        held += found.low <= truth <= found.high
    assert 0.86 <= held / 200 <= 0.99


def test_interval_is_that_of_scipy() -> None:
    loss, inserted = benchmark(np.random.default_rng(4), 30)
    against = Yardstick.of(inserted)
    ours = estimate(resampled_regret(loss, against, 0, draws=20_000))
    theirs = stats.bootstrap(
        (loss - against.best, against.mean - against.best),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        random_state=np.random.default_rng(5),  # type: ignore[call-arg]  # in every SciPy
    ).confidence_interval
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.02)


# --- what the arms decide ---------------------------------------------------------------------


def test_arms_choose_what_the_library_says() -> None:
    moment = at_the_moment(tiny(), [7, 8, 9])
    found = decided(moment, *CHEAP)
    sites = {name: arm.sites.tolist() for name, arm in found.items()}
    assert sites["first site"] == sites["most parameters"] == [0, 0, 0]
    assert sites["last site"] == [2, 2, 2]
    assert sites["nothing"] == [-1, -1, -1]
    assert sites["full training of each"] == [1, 0, 2]
    assert found["full training of each"].passes.tolist() == [30.0] * 3
    for network in range(3):
        problem = cg.GrowthProblem(
            copy.deepcopy(moment.models[network]),
            CROSS_ENTROPY,
            [moment.plain[network]],
            candidates(moment, network),
        )
        for arm in CHEAP[:5]:
            sizes = [s.value for s in cg.solve(problem, norm=arm.norm).sensitivities.values()]
            assert found[arm.name].sites[network] == np.argmax(sizes)
            assert found[arm.name].passes[network] == 1.0
        decision = cg.solve(problem, TrustRegion()).decision
        names = [c.name for c in problem.candidates]
        expected = names.index(decision.chosen[0]) if decision.chosen else -1
        assert found["trust region"].sites[network] == expected
        assert found["trust region"].passes[network] == 1 + decision.evidence["passes"]


def test_trials_train_as_the_network_was_trained_and_keep_to_their_budget() -> None:
    moment, asked_of = at_the_moment(tiny(Adam(0.01)), [7]), []

    def watched(asked: Any) -> Trial:
        asked_of.append(trial_of(20.0, asked))
        return asked_of[-1]

    spent = decided(moment, Arm("trial", watched, in_batches=True))["trial"].passes[0] - 1
    (trial,) = asked_of
    assert spent == pytest.approx(trial_passes(3, trial.steps, 1 / 3))
    assert spent <= 20 < trial_passes(3, trial.steps + 1, 1 / 3)


def test_trials_start_from_the_state_of_the_optimizer() -> None:
    task = replace(tiny(Adam(0.01)), batch=30)  # all samples: their order does not matter
    moment, found = at_the_moment(task, [7]), []

    def told(asked: Any) -> Any:
        trial = Trial(20, asked.optimizer)

        def rule(problem: cg.GrowthProblem, solution: cg.Solution) -> cg.Decision:
            found.append(trial.decide(problem, solution))
            return found[-1]

        return SimpleNamespace(decide=rule)

    decided(moment, Arm("trial", told, in_batches=True))
    (decision,) = found
    on, _ = train(moment.trained, moment.data, 20, task.optimizer)
    output, _ = forward(on.model, on.parameters, moment.data.x)
    expected = cross_entropy(output, moment.data.y).item()
    assert decision.evidence["losses"]["(nothing)"] == pytest.approx(expected, rel=1e-9)


def test_arms_are_refused_that_choose_several_layers() -> None:
    moment = at_the_moment(tiny(), [7])
    with refused(cg.GrowthError, "several", "then(rule, TopK(1))"):
        decided(moment, Arm("several", lambda asked: TopK(2)))


def one_step() -> Any:
    return cg.rules.then(TopK(1), TrustRegion(0.1, max_products=3))


def test_at_equal_cost_what_a_decision_leaves_is_spent_on_training() -> None:
    costs = {"free": 0.0, "one": 1.0, "three": 3.25, "all": MORE, "too much": MORE + 0.5}
    arms = [Arm(name, lambda asked: Fixed(1), passes=cost) for name, cost in costs.items()]
    arms.append(Arm("step", lambda asked: one_step()))
    found = run(plan(tasks=[tiny()], arms=arms))
    details, equal = found["details"]["tiny"], found["equal_cost"]
    moment = at_the_moment(tiny(), [0, 1])
    known = outcomes(moment, 2)
    assert np.array(details["losses"])[..., 0].tolist() == known[..., 0].tolist()
    against = Yardstick.of(known[:-1, ..., 0])
    for name, more in (("free", MORE), ("one", MORE - 1), ("three", MORE - 4), ("all", 0)):
        expected = known[1, :, :, more].mean(1)
        regret = estimate(resampled_regret(expected, against, seed=1_000))
        value = {"regret": regret.value, "interval": [regret.low, regret.high]}
        assert equal["tasks"]["tiny"][name] == value
        assert equal["mean"][name] == value
    assert equal["tasks"]["tiny"]["all"]["regret"] == found["tasks"]["tiny"]["all"]["regret"]
    assert "too much" not in equal["tasks"]["tiny"]
    assert "too much" not in equal["mean"]
    moved = details["rules"]["step"]
    left = int(MORE - moved["passes"][0])
    assert 0 < left < MORE - 1
    losses = [
        np.mean([plainly(moment, n, one_step(), 1_000_000 + 1_000 * n + k, left) for k in (0, 1)])
        for n in (0, 1)
    ]
    assert moved["passes"][0] == moved["passes"][1]
    regret = resampled_regret(np.array(losses), against, seed=0)[0]
    assert equal["tasks"]["tiny"]["step"]["regret"] == pytest.approx(regret, rel=1e-6)


# --- all of it --------------------------------------------------------------------------------


PAIR = ("last site", "nothing")


def test_pairs_are_compared_on_the_same_networks() -> None:
    networks = np.arange(6.0)
    against = [Yardstick(best=networks, mean=networks + 0.5)]
    worse = {"a": [networks + 0.5], "b": [networks + 0.3 + 0.01 * (networks % 2)]}
    found = paired_regrets(against, worse)
    value, low, high = found["a"]["b"]
    # the difference is 0.2 or 0.19 of the half that the mean site is above the best
    assert value == pytest.approx(0.39)
    assert 0.38 <= low < value < high <= 0.40
    assert found["b"] == {}


def test_command_writes_what_was_promised(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(suite, "QUICK", plan())
    file = tmp_path / "decisions.json"
    arguments = ["bench", "decisions", "--quick", "--json", str(file), "--out", str(tmp_path)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    first = json.loads(file.read_text())
    assert list(first["tasks"]) == ["tiny", "other"]
    for rules in first["tasks"].values():
        assert list(rules) == [arm.name for arm in ARMS]
        for row in rules.values():
            assert list(row) == [
                "regret",
                "interval",
                "planted_rate",
                "loss",
                "loss_not_inserting",
                "cost_passes",
            ]
            low, high = row["interval"]
            assert low <= row["regret"] <= high
        assert rules["nothing"]["loss"] == rules["nothing"]["loss_not_inserting"]
        assert rules["first site"]["planted_rate"] == 0.5  # seeds 0 and 1
        assert rules["nothing"]["planted_rate"] == 0.0
    means = first["means"]["all"]["last site"]["regret"]
    assert means == pytest.approx(
        np.mean([rules["last site"]["regret"] for rules in first["tasks"].values()])
    )
    for group, arms in first["means"].items():
        (last, nothing), pairs = (arms[a]["regret"] for a in PAIR), first["paired"][group]
        difference, low, high = pairs[PAIR[0]][PAIR[1]]
        assert low <= difference <= high
        assert difference == pytest.approx(last - nothing, abs=1e-3)  # rounded in the file
        assert PAIR[0] not in pairs[PAIR[1]]
    assert first["groups"]["half 1"] == ["other"]
    equal = first["equal_cost"]
    assert equal["tasks"]["tiny"].keys() >= equal["mean"].keys() >= {"first site", "nothing"}
    assert "full training of each" not in equal["mean"]
    table = (tmp_path / "constrained-growth-bench-decisions-quick-0.txt").read_text()
    assert "Kronecker-Fisher 0.1" in table
    assert "Mean regret over tasks" in table

    monkeypatch.setattr(module, "outcomes", None)  # everything is there already
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert json.loads(file.read_text()) == first


def test_an_interrupted_run_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    made, make, short = list[str](), module.outcomes, plan(arms=CHEAP[:2])
    whole = run(short)

    def dies(moment: Moment, *rest: Any) -> Any:
        made.append(moment.task.name)
        if made == ["tiny", "other"]:
            raise KeyboardInterrupt
        return make(moment, *rest)

    monkeypatch.setattr(module, "outcomes", dies)
    with pytest.raises(KeyboardInterrupt):
        run(short, cache=tmp_path)
    resumed = run(short, cache=tmp_path)
    assert made == ["tiny", "other", "other"]
    assert resumed == whole
    again = run(replace(short, chunk=1))  # other networks change one by rounding only
    losses = (np.array(found["details"]["tiny"]["losses"]) for found in (again, whole))
    np.testing.assert_allclose(*losses, rtol=1e-9)
    assert run(short, 1)["details"]["tiny"]["losses"] != whole["details"]["tiny"]["losses"]


def test_another_setting_has_another_file() -> None:
    task = tiny()
    others = [
        key(task, [1, 3], 2),
        key(task, [1, 2], 3),
        key(tiny(SGD(0.2, 0.9)), [1, 2], 2),
        key(tiny(after=21), [1, 2], 2),
        key(replace(task, begin=lambda seed: begin(seed + 1)[:1] + begin(seed)[1:]), [1, 2], 2),
        key(replace(task, block=lambda w: ResidualLinear(w, nn.Tanh())), [1, 2], 2),
    ]
    assert len({key(task, [1, 2], 2), *others}) == 1 + len(others)
    assert key(tiny(), [1, 2], 2) == key(task, [1, 2], 2)


def test_what_makes_no_sense_is_refused() -> None:
    with refused(cg.GrowthError, "runs=1"):
        run(plan(runs=1))
    with refused(cg.GrowthError, "twice"):
        run(plan(arms=[Arm("twice", lambda asked: TopK(1))] * 2))
    ran = CliRunner().invoke(app, ["bench", "decisions", "--quick", "--task", "nonesuch"])
    assert ran.exit_code == 2
    assert "spirals-4x2" in ran.output
