"""The benchmark of growing: counted operations, runs and statistics."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import constrained_growth as cg
from constrained_growth.blocks import TransformerBlock
from constrained_growth.experiments import figures
from constrained_growth.experiments.commands import app
from constrained_growth.experiments.data import (
    digits,
    mnist1d,
    parted,
    random_windows,
    text,
    windows,
)
from constrained_growth.experiments.growth import benchmark, tasks
from constrained_growth.experiments.growth.benchmark import Plan, run, tables
from constrained_growth.experiments.growth.counting import MultiplyAdds, of_training_step
from constrained_growth.experiments.growth.runs import ARMS, train
from constrained_growth.experiments.growth.tasks import TASKS, GrowthTask, ResidualConv1d
from constrained_growth.experiments.statistics import first_at_most, saving, smoothed
from constrained_growth.testing import check_block

TINY = [replace(task, big=3, small=1, steps=6, row=1, wait=1) for task in TASKS]
ARM = {arm.name: arm for arm in ARMS}
GROWING = ("sensitivity", "random", "first", "middle", "last")


@pytest.fixture(autouse=True)
def _single_precision_and_few_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the benchmarks run, but for the number of samples."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(tasks, "images", digits)
    monkeypatch.setattr(tasks, "mnist1d", lambda seed, num_samples: mnist1d(seed, num_samples=500))


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


@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_of_convolutions_cost_as_much_as_the_convolution_each(groups: int) -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    products = 2 * 8 * 25 * (8 // groups) * 9  # samples, channels, positions, inputs of each
    assert counted(lambda: layer(x)) == products
    assert counted(lambda: layer(x).sum().backward()) == 3 * products


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
    train, held_out = parted(text("english"))
    assert len(train) + len(held_out) > 400_000
    assert " statement" in "".join(chr(32 + n) for n in train[:50_000].tolist())
    x, y = windows(train, torch.tensor([0, 5]), 7)
    assert torch.equal(x[1], train[5:12])
    assert torch.equal(y[1], train[6:13])
    one, other = (random_windows(train, 3, 5, seed) for seed in (4, 4))
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
    some = (
        ARM if task is TINY[0] else {n: ARM[n] for n in ("sensitivity", "random", "big", "small")}
    )
    traces = {name: train(task, arm, 3, 0.003) for name, arm in some.items()}
    again = train(task, ARM["sensitivity"], 3, 0.003)
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
        if name != "… at plateaus":  # of which there are as many as there are
            assert len(trace.sites) == (2 if name in GROWING else 0)
        assert (trace.decisions > 0) == bool(trace.sites)
        assert all(math.isfinite(loss) for loss in (*trace.loss, trace.training_loss))
        assert 0 <= trace.accuracy < 1
    # the first row is the same everywhere but in the big network, and inserting does not move it
    firsts = {trace.loss[0] for name, trace in traces.items() if name != "big"}
    assert max(firsts) - min(firsts) < 1e-5
    assert traces["random"].decisions < traces["sensitivity"].decisions


def test_charged_for_the_decision_is_the_pass_and_the_look_at_the_output() -> None:
    """The pass over the data that decide, counted apart; and of the model and its average four
    forward passes of a batch each."""
    task = replace(TINY[0], big=2, steps=3)
    found = {name: train(task, ARM[name], 0, 0.0) for name in ("sensitivity", "last")}
    material, loss_fn = task.material(0), nn.CrossEntropyLoss()
    torch.manual_seed(0)
    small = task.network(1)
    inputs, _ = material.deciding[0]
    looks = 4 * sum(counted(lambda n=n: task.network(n)(inputs)) for n in (1, 2))
    assert found["last"].decisions == looks

    def decide() -> cg.Solution:
        problem = cg.GrowthProblem(small, loss_fn, material.deciding, task.candidates(small))
        return cg.solve(problem, stationarity=False)

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
    plan, few = Plan(TINY[:1], seeds=2, rates=[0.01], workers=1), ("random", "big", "small")
    found = run(plan, 5, arms=[ARM[name] for name in few])
    (arms,) = found["tasks"].values()
    assert tuple(arms) == few
    for name, entry in arms.items():
        for key in ("multiply_adds", "seconds", "final_loss"):
            assert len(entry[key]) == 2
        assert all(math.isfinite(loss) for loss in entry["final_loss"])
        for index in range(2):
            trace = found["curves"]["images"][name][index]
            target = arms["big"]["final_loss"][index]
            row = first_at_most(trace["loss"], target)
            expected = None if row is None else trace["multiply_adds"][row]
            assert entry["multiply_adds"][index] == expected
            assert (entry["seconds"][index] is None) == (row is None)
    assert None not in arms["big"]["multiply_adds"]
    assert found["against_big"]["images"]["big"]["saved"]["value"] == 0
    assert tables(found) is not None
    drawn = {str(line.get_label()): line for line in figures.growth(found).axes[0].get_lines()}
    assert list(drawn) == list(arms)
    ends = [np.asarray(line.get_ydata())[-1] for line in drawn.values()]
    finals = [np.median(entry["final_loss"]) for entry in arms.values()]
    assert ends == pytest.approx(finals, rel=0.2)


def test_runs_are_kept_in_a_folder_and_not_made_again(tmp_path: Any) -> None:
    plan = Plan(TINY[:1], seeds=1, rates=[0.01], workers=1)
    arms = [ARM["big"], ARM["small"]]
    first = run(plan, arms=arms, cache=tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    assert run(plan, arms=arms, cache=tmp_path) == first
    other = replace(plan, rates=[0.02])
    run(other, arms=arms, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_the_rate_of_an_arm_is_the_one_with_which_it_ends_lowest_on_other_seeds(
    tmp_path: Path,
) -> None:
    rates, arms = (1e-5, 0.01), [ARM["big"]]
    found = run(Plan(TINY[1:2], 1, rates, workers=1), arms=arms, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    ends = [smoothed(train(TINY[1], ARM["big"], 1000, rate).loss)[-1] for rate in rates]
    assert found["learning_rates"] == {"mnist1d": {"big": rates[int(np.argmin(ends))]}}
    (kept,) = found["curves"]["mnist1d"]["big"]
    assert kept["loss"] == train(TINY[1], ARM["big"], 0, rates[int(np.argmin(ends))]).loss


def test_plans_without_seeds_or_without_the_big_network_are_refused() -> None:
    with pytest.raises(cg.DataError, match="seeds=0"):
        run(Plan(TINY[:1], seeds=0))
    with pytest.raises(cg.DataError, match="'big'"):
        run(Plan(TINY[:1], seeds=1), arms=[ARM["small"]])


def test_the_command_writes_numbers_tables_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "QUICK", Plan(TINY[:1], seeds=1, rates=[0.01], workers=1))
    out, file = tmp_path / "out", tmp_path / "growth.json"
    arguments = ["bench", "growth", "--quick", "--json", str(file), "--out", str(out)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    assert list(json.loads(file.read_text())["tasks"]) == [TINY[0].name]
    assert TINY[0].name in ran.output
    assert (out / "constrained-growth-bench-growth-quick-0.png").stat().st_size > 0


def test_unknown_tasks_are_refused() -> None:
    runner = CliRunner()
    refused = runner.invoke(app, ["bench", "growth", "--task", "nowhere"])
    assert refused.exit_code == 2
    assert "nowhere" in refused.output
