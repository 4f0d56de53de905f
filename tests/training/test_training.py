"""The loop, and the two calls in a loop of your own."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    assert_same,
    candidate,
    choose,
    classified,
    feedforward,
    mean_loss,
    nothing_left_behind,
    refused,
    solved,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import constrained_growth as cg
from constrained_growth.rules import Plateau, TrustRegion, When
from constrained_growth.training import NewLayers, count_layers, evaluate

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
LOSS = nn.CrossEntropyLoss()
SITES = [candidate("1"), candidate("3")]


def every(rows: int) -> Callable[[Any], bool]:
    return lambda losses: len(losses) >= rows


def grow(model: nn.Module, data: Any, **options: Any) -> cg.History:
    return cg.grow(model, SGD, LOSS, data, **{"epochs": 6, "candidates": SITES, **options})


def by_hand(
    model: nn.Module, data: Any, epochs: int, grow_after: Mapping[int, Any], norm: Any = None
) -> list[float]:
    """The same in plain PyTorch: train, and after some epochs solve and insert."""
    optimizer, losses = SGD(model.parameters()), []
    for epoch in range(1, epochs + 1):
        total = 0.0
        for input, target in data:
            optimizer.zero_grad()
            loss = LOSS(model(input), target)
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(data))
        if epoch in grow_after:
            solution = solved(model, data, *SITES, rule=grow_after[epoch], norm=norm)
            cg.insert(model, solution, optimizer=optimizer)
    return losses


@pytest.mark.parametrize("norm", [None, cg.norms.Frobenius()], ids=str)
def test_loop_is_the_plain_one_with_solve_and_insert_in_it(norm: Any) -> None:
    data = classified(40, batch=8)
    model, plain = feedforward(2, 4, 4, 3), feedforward(2, 4, 4, 3)
    plain.load_state_dict(model.state_dict())
    history = grow(model, data, norm=norm, when=every(2), max_insertions=2)
    losses = by_hand(plain, data, 6, {2: cg.TopK(1), 4: cg.TopK(1)}, norm)
    assert_same(dict(model.state_dict()), dict(plain.state_dict()))
    assert history.losses == pytest.approx(losses, rel=1e-12)
    assert history.steps == [5, 10, 15, 20, 25, 30]
    assert history.layers == [3, 3, 4, 4, 5, 5]
    assert [(one.epoch, one.step) for one in history.rounds] == [(2, 10), (4, 20)]


def in_other_units(model: nn.Module, scale: float) -> nn.Module:
    """The same function, with what comes out of the first ReLU so many times as large."""
    with torch.no_grad():
        for name, factor in {"0.weight": scale, "0.bias": scale, "2.weight": 1 / scale}.items():
            model.get_parameter(name).mul_(factor)
    return model


@pytest.mark.parametrize("rule", [None, cg.TopK(1), cg.Threshold(relative=1.0)], ids=str)
def test_the_recommended_decision_is_what_solve_gives_without_being_asked(rule: Any) -> None:
    data, model = classified(40, batch=8), feedforward(2, 4, 4, 3)
    grower = cg.Grower(model, SGD(model.parameters()), LOSS, data, rule=rule, candidates=SITES)
    solution = cg.solve(cg.GrowthProblem(model, LOSS, data, SITES), rule)
    one = grower.ask()
    assert one.sensitivities == {n: s.value for n, s in solution.sensitivities.items()}
    assert one.chosen == solution.decision.chosen


@pytest.mark.parametrize(("norm", "moves"), [(None, False), (cg.norms.Frobenius(), True)])
def test_units_of_a_relu_layer_move_the_decision_in_the_norm_of_the_source_alone(
    norm: Any, moves: bool
) -> None:
    data, chosen = classified(40, batch=8), list[Any]()
    for scale in (1e3, 1e-3):
        model = in_other_units(feedforward(2, 4, 4, 3), scale)
        grower = cg.Grower(model, SGD(model.parameters()), LOSS, data, norm=norm, candidates=SITES)
        chosen.append(grower.ask().chosen)
    assert (chosen[0] != chosen[1]) == moves


def test_a_norm_beside_a_solver_is_refused() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(16)
    with nothing_left_behind(model), refused(cg.TrainingError, "norm=Frobenius()", "solver="):
        grow(model, data, norm=cg.norms.Frobenius(), solver=cg.solve)


def test_a_round_says_what_it_rests_on() -> None:
    data, model = classified(40, batch=8), feedforward(2, 4, 4, 3)

    def rule(sensitivities: Any) -> cg.Decision:
        return cg.Decision(("3",), "because", evidence={"predicted": 0.5})

    seen: list[tuple[float, cg.Solution]] = []

    def solver(problem: cg.GrowthProblem, rule: Any) -> cg.Solution:
        seen.append((mean_loss(model, data).item(), cg.solve(problem, rule)))
        return seen[-1][1]

    history = grow(model, data, epochs=2, rule=rule, solver=solver)
    (one,) = history.rounds
    ((loss, solution),) = seen
    assert one.loss == pytest.approx(loss, rel=1e-12)
    assert one.sensitivities == {n: s.value for n, s in solution.sensitivities.items()}
    assert (one.chosen, one.reason, one.evidence) == (("3",), "because", {"predicted": 0.5})
    assert (one.stationarity, one.when, one.sites["3"]) == (solution.stationarity, "NOW", "3")
    assert one.new_parameters == ("3.inserted.weight", "3.inserted.bias")
    assert (one.layers, one.parameters) == (4, sum(p.numel() for p in model.parameters()))


# --- when it asks, and when it ends -----------------------------------------------------------


def test_without_a_schedule_it_asks_after_every_epoch_but_the_last() -> None:
    history = grow(feedforward(2, 4, 4, 3), classified(16), epochs=3)
    assert [one.epoch for one in history.rounds] == [1, 2]


def test_plateau_and_its_never() -> None:
    plateau = Plateau(patience=1, tolerance=0.9, most=1)  # no epoch gains 90 %
    model = feedforward(2, 4, 4, 3)
    history = grow(model, classified(16), when=plateau, epochs=8, patience=None)
    assert [one.epoch for one in history.rounds] == [2]
    assert plateau.over


@pytest.mark.parametrize(("answer", "rounds"), [("NOW", 5), ("LATER", 5), ("NEVER", 1)])
def test_confirming_comes_between_deciding_and_inserting(answer: str, rounds: int) -> None:
    model = feedforward(2, 4, 4, 3)
    history = grow(model, classified(16), confirm=lambda solution: When[answer])
    assert [one.when for one in history.rounds] == [answer] * rounds
    assert len(history.insertions) == (rounds if answer == "NOW" else 0)
    assert len(history.losses) == 6  # a LATER is no reason to stop training


def test_ends_when_nothing_is_worth_inserting() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(16)
    assert len(grow(model, data, rule=choose(), patience=1).losses) == 1
    assert len(grow(model, data, rule=choose(), patience=3).losses) == 3
    assert len(grow(model, data, rule=choose()).losses) == 6
    answers = iter([("1",), (), ("3",), (), ()])
    history = grow(model, data, rule=lambda s: cg.Decision(next(answers)), patience=2)
    assert [one.chosen for one in history.rounds] == [("1",), (), ("3",), (), ()]
    assert len(history.losses) == 5


def test_ends_at_the_target() -> None:
    data = classified(16)
    losses = grow(feedforward(2, 4, 4, 3), data, when=every(99)).losses
    torch.manual_seed(0)
    data = classified(16)
    again = grow(feedforward(2, 4, 4, 3), data, when=every(99), target=losses[3])
    assert again.losses == losses[:4]


def test_target_looks_at_the_validation_loss_if_there_is_one() -> None:
    data, other, model = classified(16), classified(10), feedforward(2, 4, 4, 3)
    history = grow(model, data, validation=other, target=1e9)
    assert len(history.losses) == 1
    assert history.metrics["validation loss"] == [
        pytest.approx(mean_loss(model, other).item(), rel=1e-12)
    ]


def test_a_callback_sees_every_epoch_and_can_end_it() -> None:
    seen: list[int] = []

    def callback(grower: cg.Grower) -> bool:
        seen.append(len(grower.history.losses))
        return len(seen) == 3

    grow(feedforward(2, 4, 4, 3), classified(16), callbacks=[callback])
    assert seen == [1, 2, 3]


def test_a_run_that_a_callback_ended_goes_on_if_it_says_so_no_longer(tmp_path: Path) -> None:
    def run(*callbacks: Any, checkpoint: str = "run") -> cg.History:
        file = tmp_path / checkpoint
        model = feedforward(2, 4, 4, 3)
        return grow(model, classified(16), callbacks=callbacks, checkpoint=file)

    def after_three(grower: cg.Grower) -> bool:
        return len(grower.history.losses) >= 3

    with torch.random.fork_rng():
        assert len(run(after_three).losses) == 3
    with torch.random.fork_rng():
        assert len(run(after_three).losses) == 3
    with torch.random.fork_rng():
        found = run()
    assert len(found.losses) == 6
    assert found.losses == run(checkpoint="another").losses


@pytest.mark.parametrize("most", range(4))
def test_never_more_insertions_than_allowed(most: int) -> None:
    model = feedforward(2, 4, 4, 3)
    history = grow(model, classified(16), rule=cg.TopK(2), max_insertions=most)
    assert sum(len(one.chosen) for one in history.rounds) == most
    assert count_layers(model) == 3 + most
    for one in history.rounds:  # the best of them
        assert one.sensitivities[one.chosen[0]] == max(one.sensitivities.values())


def test_candidates_are_found_anew_each_time() -> None:
    model = feedforward(2, 4, 4, 3, activation=nn.Tanh)
    history = grow(model, classified(16), candidates=None, epochs=4)
    offered = [set(one.sensitivities) for one in history.rounds]
    assert len(offered) == 3
    assert offered[0] == {"1", "3"}
    assert all(names > {"1", "3"} for names in offered[1:])  # and before what was inserted


def test_what_is_to_be_done_after_an_insertion_is_called() -> None:
    calls: list[tuple[str, ...]] = []

    def afterwards(grower: cg.Grower, one: Any) -> None:
        calls.append(one.new_parameters)
        trained = {id(p) for group in grower.optimizer.param_groups for p in group["params"]}
        assert all(id(grower.model.get_parameter(name)) in trained for name in calls[-1])

    grow(feedforward(2, 4, 4, 3), classified(16), max_insertions=1, after_insertion=afterwards)
    assert calls == [calls[0]]
    assert len(calls[0]) == 2


def test_schedulers_are_stepped_after_each_epoch() -> None:
    rates: list[float] = []

    def note(grower: cg.Grower) -> None:
        rates.append(grower.optimizer.param_groups[0]["lr"])

    steps = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    grow(feedforward(2, 4, 4, 3), classified(16), scheduler_factory=steps, callbacks=[note])
    assert rates == [0.1, 0.05, 0.05, 0.025, 0.025, 0.0125]
    flat = functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.99)
    grow(feedforward(2, 4, 4, 3), classified(16), scheduler_factory=flat, callbacks=[note])
    assert rates[-1] == pytest.approx(0.1**6)


# --- a loop of your own ----------------------------------------------------------------------


def test_two_calls_in_a_plain_loop_do_the_same() -> None:
    data, plain = classified(40, batch=8), feedforward(2, 4, 4, 3)
    model = feedforward(2, 4, 4, 3)
    model.load_state_dict(plain.state_dict())
    optimizer = SGD(model.parameters())
    grower = cg.Grower(
        model, optimizer, LOSS, data, candidates=SITES, when=every(2), max_insertions=2
    )
    for _ in range(6):
        for input, target in data:
            optimizer.zero_grad()
            loss = LOSS(model(input), target)
            loss.backward()
            optimizer.step()
            grower.step(loss)
        grower.maybe_grow({"accuracy": 0.5})
    losses = by_hand(plain, data, 6, {2: cg.TopK(1), 4: cg.TopK(1)})
    assert_same(dict(model.state_dict()), dict(plain.state_dict()))
    assert grower.history.losses == pytest.approx(losses, rel=1e-12)
    assert grower.history.metrics == {"accuracy": [0.5] * 6}
    assert len(grower.record.insertions) == 2


def test_a_checkpoint_does_not_compute_what_nobody_has_read() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(40, batch=8)
    grower = cg.Grower(model, SGD(model.parameters()), LOSS, data, candidates=SITES)
    solution = cg.solve(cg.GrowthProblem(model, LOSS, data, SITES))
    one = grower.ask()
    unread = vars(one)["standard_errors"]
    (saved,) = grower.state_dict()["history"]["rounds"]
    assert vars(one)["standard_errors"] is unread
    assert list(saved["standard_errors"]) == ["1", "3"]
    assert all(np.isnan(value) for value in saved["standard_errors"].values())
    expected = {name: s.standard_error for name, s in solution.sensitivities.items()}
    assert one.standard_errors == expected
    state = grower.state_dict()["history"]
    state["rounds"][0]["evidence"]["mine"] = 1  # the state is a copy
    assert "mine" not in one.evidence
    again = cg.History()
    again.load_state_dict(state)
    assert again.rounds[0].standard_errors == expected


@pytest.mark.parametrize(
    ("loss_fn", "batch", "words"),
    [
        (LOSS, (1, 2, 3), ["batch 0 is a tuple of 3", "(x, (y, w))"]),
        (LOSS, {"x": 1}, ["batch 0 is a dict", "(batch, None)"]),
        (nn.MSELoss(reduction="none"), (1, 2), ['reduction="none"', 'reduction="mean"']),
    ],
    ids=["triple", "dict", "no scalar"],
)
def test_data_and_losses_that_can_never_work(loss_fn: Any, batch: Any, words: list[str]) -> None:
    model = feedforward(2, 4, 3)
    with nothing_left_behind(model), refused(cg.DataError, *words):
        cg.Grower(model, SGD(model.parameters()), loss_fn, [batch])


def test_a_row_without_a_step_is_refused() -> None:
    model = feedforward(2, 4, 3)
    grower = cg.Grower(model, SGD(model.parameters()), LOSS, classified(8))
    with nothing_left_behind(model), refused(cg.TrainingError, "grower.step(loss)"):
        grower.maybe_grow()


def test_losses_of_half_precision_are_summed_in_a_larger_one() -> None:
    model = feedforward(2, 4, 3)
    grower = cg.Grower(model, SGD(model.parameters()), LOSS, classified(8), when=every(9))
    for _ in range(1000):
        grower.step(torch.tensor(1.5, dtype=torch.bfloat16))
    grower.maybe_grow()
    assert grower.history.losses == [1.5]


# --- checkpoints ------------------------------------------------------------------------------


def cut_off(parameters: Any, at: int) -> torch.optim.Optimizer:
    """SGD that ends the training before one of its steps, as a power cut would."""
    optimizer, left = SGD(parameters), at

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    optimizer.register_step_pre_hook(count)
    return optimizer


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [3, 14])
def test_taken_up_in_the_middle_of_an_epoch(workers: int, at: int, tmp_path: Path) -> None:
    x, y = torch.randn(40, 2), torch.randint(3, (40,))

    def run(at: int, path: Path | None) -> tuple[nn.Module, cg.History]:
        torch.manual_seed(1)
        loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=workers)
        model = nn.Sequential(*feedforward(2, 4, 4, 3), nn.Dropout(0.2))
        history = cg.grow(
            model,
            functools.partial(cut_off, at=at),
            LOSS,
            loader,
            epochs=4,
            candidates=SITES,
            when=every(2),
            checkpoint=path,
            checkpoint_every=1,
        )
        return model, history

    path = tmp_path / "run.safetensors"
    whole, history = run(0, None)
    with pytest.raises(KeyboardInterrupt):
        run(at, path)
    again, resumed = run(0, path)
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))
    assert resumed.losses == history.losses
    assert resumed.steps == history.steps
    assert [one.sensitivities for one in resumed.rounds] == [
        one.sensitivities for one in history.rounds
    ]


def test_a_finished_run_is_finished(tmp_path: Path) -> None:
    data, path = classified(16), tmp_path / "run"
    fresh = feedforward(2, 4, 4, 3)
    start = {name: value.clone() for name, value in fresh.state_dict().items()}
    history = grow(fresh, data, checkpoint=path, max_insertions=1)
    other = feedforward(2, 4, 4, 3)
    other.load_state_dict(start)
    again = grow(other, data, checkpoint=path, max_insertions=1)
    assert_same(again.state_dict(), history.state_dict())
    assert_same(dict(other.state_dict()), dict(fresh.state_dict()))
    longer = feedforward(2, 4, 4, 3)
    assert len(grow(longer, data, checkpoint=path, max_insertions=1, epochs=8).losses) == 8


def test_rules_and_schedules_that_remember_go_on(tmp_path: Path) -> None:
    data, path = classified(16), tmp_path / "run"
    plateaus = [Plateau(patience=3, tolerance=0.9) for _ in range(2)]
    regions = [TrustRegion(radius=radius) for radius in (1.0, 0.3)]
    for plateau, region in zip(plateaus, regions, strict=True):
        model = feedforward(2, 4, 4, 3)
        grow(model, data, checkpoint=path, when=plateau, rule=region, epochs=6)
    assert plateaus[1].state_dict() == plateaus[0].state_dict() != Plateau().state_dict()
    assert regions[1].state_dict() == regions[0].state_dict()


# --- logging, pictures, tables ----------------------------------------------------------------


def test_a_summary_writer_gets_all_that_was_measured(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        history = grow(feedforward(2, 4, 4, 3), classified(16), writer=writer, max_insertions=2)
    found = EventAccumulator(str(tmp_path)).Reload()
    layers = [(event.step, event.value) for event in found.Scalars("growth/layers")]
    assert layers == [(one.step, one.layers) for one in history.rounds]
    for site in ("1", "3"):
        values = [event.value for event in found.Scalars(f"growth/sensitivity/{site}")]
        assert values == pytest.approx([one.sensitivities[site] for one in history.rounds])
    assert [event.value for event in found.Scalars("growth/inserted")] == [1.0, 1.0]


def test_predictions_of_a_rule_that_tries_its_steps() -> None:
    model, data = feedforward(2, 4, 4, 3, activation=nn.Tanh), classified(40)
    history = grow(model, data, candidates=None, rule=TrustRegion(), max_insertions=1)
    (one,) = history.insertions
    (predicted,), (actual,) = history.predictions()
    assert (predicted, actual) == (one.evidence["predicted"], one.evidence["actual"])
    assert actual > 0.1 * predicted > 0  # or it would not have been accepted


def test_a_metric_that_returns_no_number_is_named() -> None:
    metrics: Any = {"hits": lambda output, target: output.argmax(1) == target}
    with refused(cg.TrainingError, "metrics: 'hits'", "Tensor of shape (16,)", "the mean"):
        evaluate(feedforward(2, 4, 3), metrics, classified(16))


def test_history_as_a_table() -> None:
    metrics = {"accuracy": lambda output, target: (output.argmax(1) == target).double().mean()}
    data = classified(16)
    model = feedforward(2, 4, 4, 3)
    history = grow(model, data, metrics=metrics, when=every(2), max_insertions=1)
    frame = history.to_frame()
    assert list(frame.columns) == ["step", "loss", "accuracy", "layers", "seconds", "inserted"]
    assert list(frame.index) == [1, 2, 3, 4, 5, 6]
    assert [bool(name) for name in frame["inserted"]] == [False, True, False, False, False, False]
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in data) / 16
    assert frame["accuracy"].iloc[-1] == pytest.approx(right)


def test_rows_with_other_metrics_are_filled_up() -> None:
    history = cg.History()
    for metrics in ({"a": 1.0}, {"b": 2.0}):
        history.add(loss=0.0, step=1, layers=1, seconds=0.0, metrics=metrics)
    assert str(history.metrics) == "{'a': [1.0, nan], 'b': [nan, 2.0]}"


def test_progress_bar_says_loss_depth_and_last_decision(capsys: pytest.CaptureFixture[str]) -> None:
    grow(feedforward(2, 4, 4, 3), classified(16), max_insertions=1, progress=True, epochs=3)
    said = capsys.readouterr().err
    assert "loss=" in said
    assert "layers=4" in said
    assert "last=" in said
    grow(feedforward(2, 4, 4, 3), classified(16), epochs=2)
    assert capsys.readouterr().err == ""  # not a terminal


def test_evaluating_leaves_nothing_behind_and_weighs_batches_by_their_size() -> None:
    model = nn.Sequential(*feedforward(2, 4, 3), nn.Dropout(0.5))
    (whole,) = data = classified(10)
    loader = DataLoader(TensorDataset(*whole), batch_size=4, shuffle=True)
    with nothing_left_behind(model):
        found = evaluate(model, {"loss": LOSS}, loader)
    assert found["loss"] == pytest.approx(mean_loss(model.eval(), data).item(), rel=1e-12)


# --- refused ----------------------------------------------------------------------------------


def test_callbacks_may_come_from_a_generator() -> None:
    seen: list[int] = []
    callbacks = (lambda grower: seen.append(grower.num_steps) for _ in range(1))
    grow(feedforward(2, 4, 4, 3), classified(8), epochs=3, callbacks=callbacks)
    assert seen == [1, 2, 3]


def test_empty_data_are_refused() -> None:
    model = feedforward(2, 4, 4, 3)
    with nothing_left_behind(model), refused(cg.DataError, "loader is empty"):
        grow(model, [])
    with refused(cg.DataError, "validation is empty"):
        grow(model, classified(8), validation=[])


def test_history_says_shortly_what_was_decided() -> None:
    history = grow(feedforward(2, 4, 4, 3), classified(16), epochs=3, rule=choose("1"), patience=9)
    first, last = (f"{loss:.3g}" for loss in (history.losses[0], history.losses[-1]))
    rounds = "inserted: ('1',) after row 1, ('1',) after row 2"
    assert repr(history) == f"History(rows: 3, loss {first} to {last}; {rounds})"
    model, rule = feedforward(2, 4, 4, 3), choose()
    history = grow(model, classified(16), epochs=30, rule=rule, patience=None)
    assert repr(history).endswith("nothing after row 5, and 24 decisions more)")
    assert repr(cg.History()) == "History(rows: 0; inserted: nothing)"


def test_numbers_of_numpy() -> None:
    numbers: Any = {"epochs": 2, "max_insertions": 1, "patience": 1, "target": 0.01}
    numpys: Any = {
        name: np.float32(x) if name == "target" else np.int64(x) for name, x in numbers.items()
    }
    found = []
    for given in (numbers, numpys):
        torch.manual_seed(0)
        net = feedforward(2, 4, 3)
        kind: Any = type(given["epochs"])
        warmup = NewLayers(warmup=kind(3))
        history = cg.grow(net, SGD, LOSS, classified(8), after_insertion=warmup, **given)
        found.append(history.losses)
    assert found[0] == found[1]


@pytest.mark.parametrize(("answer", "layers"), [(When.NOW, 1), (When.LATER, 0), (When.NEVER, 0)])
def test_a_schedule_may_answer_in_the_words_of_plateau(answer: When, layers: int) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20, batch=10)
    history = grow(model, data, when=lambda _: answer, max_insertions=1, candidates=SITES)
    assert len(history.insertions) == layers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"when": lambda _: "no"}, ["when=", "returned 'no'", "a When"]),
        ({"when": lambda _: None}, ["when=", "returned None"]),
        ({"confirm": lambda _: True}, ["confirm=", "True", "a When"]),
        ({"solver": lambda problem, rule: None}, ["solver=", "None", "what cg.solve returns"]),
    ],
)
def test_answers_that_are_none_are_refused(options: Any, words: list[str]) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20, batch=10)
    grower = cg.Grower(model, SGD(model.parameters()), LOSS, data, candidates=SITES, **options)
    grower.step(1.0)
    with nothing_left_behind(model), refused(cg.TrainingError, *words):
        grower.maybe_grow()


def test_a_copy_that_is_given_twice_grows_once() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    record = cg.insert(model, solved(model, data, *SITES), averaged=[averaged, averaged])
    assert len(record.insertions) == 1
    averaged.update_parameters(model)
    assert {f"module.{n}" for n, _ in model.named_parameters()} == {
        n for n, _ in averaged.named_parameters()
    }
