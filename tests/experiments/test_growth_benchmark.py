"""The benchmarks of growing: counted operations, runs, statistics, and policies for ensembles."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from constrained_growth.experiments.growth.statistics import first_at_most, saving, smoothed
from constrained_growth.experiments.growth.step_policies import OLD, ORIGIN, Policy, Stepper
from constrained_growth.experiments.growth.text import python_help, random_windows, windows
from torch import nn
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.blocks import TransformerBlock
from constrained_growth.errors import DataError
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.decisions.tasks import SUITE, at_the_moment
from constrained_growth.experiments.ensembles.networks import ensemble, mean_loss, samples
from constrained_growth.experiments.ensembles.training import SGD, Adam, Shuffle, train
from constrained_growth.experiments.growth import figures, report, step_policies, steps_report
from constrained_growth.experiments.growth import steps as step_study
from constrained_growth.experiments.growth.benchmark import Plan, run_growth
from constrained_growth.experiments.growth.counting import MultiplyAdds, of_training_step
from constrained_growth.experiments.growth.runs import ARMS, run
from constrained_growth.experiments.growth.tasks import TASKS, GrowthTask, ResidualConv1d
from constrained_growth.testing import check_block
from constrained_growth.training import steps

TINY = [replace(task, big=3, small=1, steps=6, row=1, wait=1) for task in TASKS]
ARM = {arm.name: arm for arm in ARMS}


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    """As the benchmarks run."""
    torch.set_default_dtype(torch.float32)


def counted(work: Callable[[], object]) -> int:
    with MultiplyAdds() as counter:
        work()
    return counter.total


def test_products_convolutions_and_decompositions_are_counted() -> None:
    a, b, v = torch.ones(3, 4), torch.ones(4, 5), torch.ones(4)
    assert counted(lambda: a @ b) == 3 * 4 * 5
    assert counted(lambda: a @ v) == 3 * 4
    assert counted(lambda: v @ v) == 4
    convolution, image = nn.Conv2d(2, 5, 3, padding=1), torch.ones(7, 2, 6, 4)
    assert counted(lambda: convolution(image)) == 7 * 6 * 4 * 5 * 2 * 9
    assert counted(lambda: torch.linalg.eigh(torch.eye(6))) == 9 * 6**3 // 2
    assert counted(lambda: torch.linalg.svd(torch.eye(4))) == (4 + 8 + 9) * 4**3 // 2
    assert counted(lambda: a.relu() + 1) == 0


def test_attention_is_counted_forwards_and_backwards() -> None:
    samples, positions, width = 3, 8, 16
    block = TransformerBlock(width, 2, causal=True)
    x = torch.randn(samples, positions, width, requires_grad=True)
    projections = samples * positions * 12 * width**2
    products = samples * 2 * positions**2 * width  # QKᵀ and AV; the flash kernel makes QKᵀ again
    assert counted(lambda: block(x)) == projections + products
    both = counted(lambda: block(x).sum().backward())
    assert both == 3 * projections + products + 5 * products // 2


def test_a_training_step_is_forward_and_backward_and_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(4, 5), torch.randint(3, (4,))
    # the first layer has no gradient with respect to its input
    expected = 4 * (3 * (5 * 7 + 7 * 3) - 5 * 7)
    assert of_training_step(model, nn.CrossEntropyLoss(), batch) == expected
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_text_is_english_and_pieces_are_followed_by_their_next_characters() -> None:
    text = python_help()
    assert len(text.train) + len(text.held_out) > 400_000
    whole = "".join(text.alphabet[i] for i in text.train[:50_000].tolist())
    assert " statement" in whole
    x, y = windows(text.train, torch.tensor([0, 5]), 7)
    assert torch.equal(x[1], text.train[5:12])
    assert torch.equal(y[1], text.train[6:13])
    one, other = (random_windows(text.train, 3, 5, seed) for seed in (4, 4))
    for _ in range(2):
        assert torch.equal(next(one)[0], next(other)[0])


def test_the_block_for_curves_passes_the_checks_for_blocks_of_users() -> None:
    torch.set_default_dtype(torch.float64)
    check_block(ResidualConv1d(3, 5), torch.randn(6, 3, 9))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_grown_network_is_as_large_as_the_big_one(task: GrowthTask) -> None:
    torch.manual_seed(0)
    material, loss_fn = task.material(0), nn.CrossEntropyLoss()
    batch = next(material.stream(0))
    model = task.network(1)
    for _ in range(2):
        problem = cg.GrowthProblem(model, loss_fn, [batch], task.candidates(model))
        before = model(batch[0])
        cg.insert(model, cg.solve(problem, cg.Fixed(0)))
        torch.testing.assert_close(model(batch[0]), before)
    big = task.network(3)
    assert of_training_step(model, loss_fn, batch) == of_training_step(big, loss_fn, batch)
    assert len(task.candidates(model)) == len(task.candidates(big)) == 4


@pytest.mark.parametrize("task", TINY, ids=lambda task: task.name)
def test_a_run_spends_what_the_big_one_does_and_is_the_same_again(task: GrowthTask) -> None:
    traces = {name: run(task, arm, 3) for name, arm in ARM.items()}
    again = run(task, ARM["sensitivity"], 3)
    assert replace(again, seconds=()) == replace(traces["sensitivity"], seconds=())
    example = next(task.material(3).stream(3))
    small, big = (
        of_training_step(task.network(n), nn.CrossEntropyLoss(), example)
        for n in (task.small, task.big)
    )
    rows = task.steps // task.row
    assert traces["big"].multiply_adds == tuple(task.row * big * (i + 1) for i in range(rows))
    assert traces["small"].multiply_adds[0] == task.row * small
    for name, trace in traces.items():
        assert trace.multiply_adds[-2] < task.steps * big <= trace.multiply_adds[-1]
        assert len(trace.sites) == (2 if name in ("sensitivity", "random", "fixed") else 0)
        assert (trace.decisions > 0) == bool(trace.sites)
        assert all(math.isfinite(loss) for loss in (*trace.loss, trace.held_out))
    # the first row is the same everywhere but in the big network, and inserting does not move it
    firsts = {traces[name].loss[0] for name in ("sensitivity", "random", "fixed", "small")}
    assert max(firsts) - min(firsts) < 1e-5
    assert traces["random"].decisions < traces["sensitivity"].decisions


def test_charged_for_the_decision_is_the_pass_and_the_look_at_the_output() -> None:
    """The pass over the data that decide, counted apart; and four forward passes of a batch."""
    task = replace(TINY[0], big=2, lr=0.0, steps=3)
    found = {name: run(task, ARM[name], 0) for name in ("sensitivity", "fixed")}
    material, loss_fn = task.material(0), nn.CrossEntropyLoss()
    torch.manual_seed(0)
    small = task.network(1)
    inputs, _ = material.deciding[0]
    looks = 2 * sum(counted(lambda n=n: task.network(n)(inputs)) for n in (1, 2))
    assert found["fixed"].decisions == looks

    def decide() -> cg.Solution:
        problem = cg.GrowthProblem(small, loss_fn, material.deciding, task.candidates(small))
        return cg.solve(problem, norm=cg.norms.KroneckerFisher(0.1), stationarity=False)

    assert found["sensitivity"].decisions == looks + counted(decide)


def test_smoothing_and_the_first_row_at_a_loss() -> None:
    loss = [5.0, 4.0, 3.0, 1.0, 2.0, 2.0]
    np.testing.assert_allclose(smoothed(loss, 3), [5, 4.5, 4, 8 / 3, 2, 5 / 3])
    np.testing.assert_allclose(smoothed(loss), [5, 4.5, 4, 3.25, 3, 2.4])
    assert first_at_most(loss, 3.0) == 4
    assert first_at_most(loss, 1.5) is None


def test_the_saving_is_a_median_and_what_is_not_reached_costs_more_than_anything() -> None:
    costs, others = [1.0, 2.0, 3.0, 4.0, 5.0], [10.0] * 5
    found = saving(costs, others)
    assert found.value == pytest.approx(0.7)
    assert found.low < 0.7 < found.high
    assert saving([1.0, None, None], [1.0] * 3).value == -math.inf
    worst = saving([2.0, 2.0, 2.0, None], [10.0] * 4)
    assert worst.value == pytest.approx(0.8)
    assert worst.low == -math.inf


def test_the_file_has_an_entry_for_each_seed_and_null_where_the_target_was_missed() -> None:
    plan = Plan(TINY[:1], seeds=3, workers=1)
    found = run_growth(plan, 5, progress=False)
    content = json.loads(report.to_json(found, "constrained-growth bench growth"))
    (arms,) = content["tasks"].values()
    assert set(arms) == set(ARM)
    for name, entry in arms.items():
        for key in ("multiply_adds", "seconds", "final_loss"):
            assert len(entry[key]) == 3
        assert all(math.isfinite(loss) for loss in entry["final_loss"])
        for index in range(3):
            trace = found.outcomes[TINY[0].name][name].traces[index]
            target = arms["big"]["final_loss"][index]
            row = first_at_most(trace.loss, target)
            expected = None if row is None else trace.multiply_adds[row]
            assert entry["multiply_adds"][index] == expected
            assert (entry["seconds"][index] is None) == (row is None)
    assert None not in arms["big"]["multiply_adds"]
    assert content["against_big"]["digits"]["big"]["saved"]["value"] == 0
    assert report.tables(found) is not None
    drawn = {str(line.get_label()): line for line in figures.picture(found).axes[0].get_lines()}
    assert list(drawn) == list(arms)
    ends = [np.asarray(line.get_ydata())[-1] for line in drawn.values()]
    finals = [np.median(entry["final_loss"]) for entry in arms.values()]
    assert ends == pytest.approx(finals, rel=0.2)


def test_runs_are_kept_in_a_folder_and_not_made_again(tmp_path: Any) -> None:
    plan = Plan(TINY[:1], seeds=1, workers=1)
    arms = [ARM["big"], ARM["small"]]
    first = run_growth(plan, arms=arms, cache=tmp_path, progress=False)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    assert run_growth(plan, arms=arms, cache=tmp_path, progress=False) == first
    other = replace(plan, tasks=[replace(TINY[0], lr=2 * TINY[0].lr)])
    run_growth(other, arms=arms, cache=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 4


def test_plans_without_seeds_or_without_the_big_network_are_refused() -> None:
    with pytest.raises(DataError, match="seeds=0"):
        run_growth(Plan(TINY[:1], seeds=0))
    with pytest.raises(DataError, match="'big'"):
        run_growth(Plan(TINY[:1], seeds=1), arms=[ARM["small"]])


def test_the_commands_are_there_and_name_unknown_tasks() -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["bench", "steps", "--help"]).exit_code == 0
    refused = runner.invoke(app, ["bench", "growth", "--task", "nowhere"])
    assert refused.exit_code == 2
    assert "nowhere" in refused.output


def moment(name: str) -> Any:
    (task,) = (task for task in SUITE if task.name == name)
    return at_the_moment(replace(task, before=3, after=4), range(3))


def stepped(policy: Policy, name: str = "spirals-4x4-adam") -> Any:
    """The networks that grew at one site, before and after three steps."""
    at = moment(name)
    rows, begun = step_study.grown(at)[0]
    data = samples([at.plain[i][0] for i in rows], [at.plain[i][1] for i in rows])
    begun = replace(begun, memory=policy.begin(begun.memory))
    stepper = Stepper(at.task.optimizer, policy, 10, lambda _: None, [])
    after, _ = train(begun, data, 3, stepper, loss=at.task.loss)
    return at, begun, data, after


@pytest.mark.parametrize("name", ["spirals-4x2", "spirals-4x4-adam"])
def test_the_policy_that_changes_nothing_trains_as_the_optimizer_does(name: str) -> None:
    at, begun, data, after = stepped(Policy("same", ""), name)
    plain, _ = train(begun, data, 3, at.task.optimizer, loss=at.task.loss)
    torch.testing.assert_close(after.parameters, plain.parameters, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["spirals-4x2", "spirals-4x4-adam"])
def test_a_share_is_a_learning_rate_of_the_new_parameters_alone(name: str) -> None:
    at, begun, data, after = stepped(Policy("", "", lambda step: 0.3), name)
    lr = at.task.optimizer.lr * (1 - 0.7 * (begun.memory[OLD] == 0).float())
    plain, _ = train(begun, data, 3, replace(at.task.optimizer, lr=lr), loss=at.task.loss)
    torch.testing.assert_close(after.parameters, plain.parameters, rtol=1e-5, atol=1e-6)
    new = begun.memory[OLD] == 0
    assert new.sum(1).tolist() == [4 * 4 + 4] * len(begun)
    still = stepped(Policy("", "", lambda step: 0.0), name)[3]
    assert torch.equal(still.parameters[new], begun.parameters[new])


def test_decay_goes_to_zero_or_to_where_a_new_parameter_began() -> None:
    """Against the recursion p ← p − (decay / steps)(p − anchor) with an optimizer that is still."""
    for anchored in (False, True):
        policy = Policy("", "", decay=0.5, anchored=anchored)
        at = moment("spirals-4x2")
        _, begun = step_study.grown(at)[0]
        anchor = torch.zeros_like(begun.parameters)
        if anchored:
            new = begun.memory[OLD] == 0
            anchor[new] = begun.memory[ORIGIN][new]
        begun = replace(begun, parameters=begun.parameters + 1)
        stepper = Stepper(SGD(0.0), policy, 10, lambda _: None, [])
        p, memory = begun.parameters.clone(), dict(begun.memory)
        for _ in range(4):
            stepper.step(p, torch.zeros_like(p), memory, torch.ones(len(p), 1))
        expected = anchor + (begun.parameters - anchor) * (1 - 0.05) ** 4
        torch.testing.assert_close(p, expected)


def test_memory_forgotten_is_a_new_optimizer_and_an_old_count_only_changes_new_parameters() -> None:
    policies = {policy.name: policy for policy in step_policies.POLICIES}
    at, begun, data, after = stepped(policies["all forgotten"])
    fresh, _ = train(replace(begun, memory={}), data, 3, at.task.optimizer, loss=at.task.loss)
    torch.testing.assert_close(after.parameters, fresh.parameters, rtol=1e-5, atol=1e-6)
    _, begun, *_ = stepped(policies["old count"])
    assert len(begun.memory["steps"].unique()) == 1
    assert float(begun.memory["steps"].min()) > 0
    assert not policies["old count"].matters(SGD(0.1, 0.9))
    assert policies["old count"].matters(Adam(0.1))
    assert not policies["all forgotten"].matters(SGD(0.1))


def test_the_line_search_of_ensembles_is_that_of_the_library() -> None:
    """Two networks with learning rates that are too large, one after the other by `LineSearch`."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    data = [(torch.randn(20, 2), torch.randint(3, (20,))) for _ in range(2)]
    begun = ensemble(models)
    stacked = samples([x for x, _ in data], [y for _, y in data], 3)
    loss = SUITE[0].loss
    found = step_policies.searched(begun, stacked, SGD(20.0, 0.5), 3, loss)
    for index, (model, batch) in enumerate(zip(models, data, strict=True)):
        optimizer = torch.optim.SGD(model.parameters(), lr=20.0, momentum=0.5)
        grower = cg.Grower(model, optimizer, nn.CrossEntropyLoss(), [batch])
        shares = steps.LineSearch(3)(grower, None)  # type: ignore[arg-type]
        assert min(shares) < 1
        ours = nn.utils.parameters_to_vector(model.parameters()).detach()
        torch.testing.assert_close(found.parameters[index], ours)
    assert bool((mean_loss(found, stacked, loss) < mean_loss(begun, stacked, loss)).all())


def test_the_benchmark_of_steps_compares_the_same_networks() -> None:
    tasks = [replace(t, before=3, after=4) for t in SUITE if t.name in ("spirals-4x2", "friedman")]
    plan = step_study.Plan(tasks, networks=3, workers=1)
    found = step_study.run_steps(plan, progress=False)
    for task, verdicts in found.verdicts.items():
        assert verdicts["same"].final_difference.value == 0
        still = found.followed[task]["new × 0"]
        assert (still.final != found.followed[task]["same"].final).all()
        assert ("all forgotten" in verdicts) == (task == "friedman")
        searched = found.followed[task]["line search"]
        assert (searched.jump >= 0).all()
    content = json.loads(steps_report.to_json(found, ""))
    assert len(content["tasks"]["friedman"]["same"]["finals"]) == 3
    assert steps_report.tables(found) is not None


def test_a_policy_without_a_layer_that_moves_is_a_network_that_did_not_grow() -> None:
    at = moment("spirals-4x2")
    policies = [p for p in step_policies.POLICIES if p.name == "new × 0"]
    found = step_study.follow(at.task, range(3), policies, progress=False)["new × 0"]
    orders = Shuffle([2_000_000 + seed for seed in range(3)])
    _, history = train(at.trained, at.data, 4, at.task.optimizer, batch=at.task.batch, order=orders)
    np.testing.assert_allclose(found.final, history.loss[-1].numpy(), rtol=1e-5)
