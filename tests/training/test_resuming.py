"""A stopped run goes on with all it had, or is refused in words before anything has changed."""

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_same,
    candidate,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
)
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import constrained_growth as cg
from constrained_growth.checkpoint import load, previous, save
from constrained_growth.training import NewLayers

SITES = [candidate("1"), candidate("3")]
SGD = functools.partial(torch.optim.SGD, lr=0.1)


def grow(model: nn.Module, loader: Any, path: Path | None, **options: Any) -> cg.History:
    given: dict[str, Any] = {"optimizer_factory": SGD, "epochs": 3, "candidates": SITES, **options}
    given |= {"checkpoint": path, "checkpoint_every": 1, "max_insertions": 2}
    return cg.grow(model, loss_fn=CROSS_ENTROPY, loader=loader, **given)


class Dying(list[Any]):
    """Batches of a run that dies before its step number `left`."""

    def __init__(self, data: Any, left: int) -> None:
        super().__init__(data)
        self.left = left

    def __iter__(self) -> Iterator[Any]:
        for batch in list.__iter__(self):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield batch


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


class Muon(torch.optim.SGD):
    """Orthogonal steps are beside the point: one of two optimizers, with a state."""


def two_optimizers(parameters: Any) -> list[torch.optim.Optimizer]:
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    return [Muon(matrices, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=0.01)]


def two_schedulers(optimizers: Any) -> list[Any]:
    return [ExponentialLR(optimizers[0], 0.5), ReduceLROnPlateau(optimizers[1], patience=0)]


@pytest.mark.parametrize(("at", "policy"), [(2, False), (5, True), (9, False), (11, True)])
def test_several_optimizers_and_averages_go_on_bit_for_bit(
    at: int, policy: bool, tmp_path: Path
) -> None:
    data, path = classified(40, batch=10), tmp_path / "run"
    options: dict[str, Any] = {"optimizer_factory": two_optimizers, "data": data}
    options["scheduler_factory"] = two_schedulers

    def run(path: Path | None, at: int = 0) -> tuple[Any, ...]:
        torch.manual_seed(3)
        model = feedforward(2, 4, 4, 3)
        averages = [ema(model), copy.deepcopy(model)]
        found: list[Any] = []

        def update(grower: cg.Grower) -> None:
            averages[0].update_parameters(grower.model)  # type: ignore[operator]
            found[:] = [one.state_dict() for one in grower.optimizers]

        more = {**options, "averaged": averages, "callbacks": [update]}
        if policy:
            more["after_insertion"] = NewLayers(warmup=5)
        if at:
            with pytest.raises(KeyboardInterrupt):
                grow(model, Dying(data, at), path, **more)
            return ()
        history = grow(model, data, path, **more)
        states = [dict(one.state_dict()) for one in (model, *averages)]
        return (history.losses, *states, found)

    whole = run(None)
    run(path, at)
    assert_same(run(path), whole)
    assert len(whole[2]) == len(whole[1]) + 1  # the number of models that were averaged
    assert list(whole[3]) == list(whole[1])


@pytest.mark.parametrize("at", [3, 4])
def test_workers_that_persist(at: int, tmp_path: Path) -> None:
    """They draw a number when they start, in a resumed run as in its first epoch."""
    pairs = TensorDataset(torch.randn(16, 2), torch.randint(3, (16,)))
    data = classified(8)

    def run(path: Path | None, at: int = 99) -> cg.History:
        options: dict[str, Any] = {"num_workers": 1, "persistent_workers": True, "shuffle": True}
        steps: list[float] = []

        def loss_fn(output: Any, target: Any) -> Any:
            steps.append(0.0)
            if len(steps) > at:
                raise KeyboardInterrupt
            return CROSS_ENTROPY(output, target)

        torch.manual_seed(3)
        given: dict[str, Any] = {"epochs": 3, "data": data, "max_insertions": 0, "checkpoint": path}
        loader = DataLoader(pairs, batch_size=8, **options)
        return cg.grow(feedforward(2, 4, 3), SGD, loss_fn, loader, checkpoint_every=1, **given)

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", at)
    assert run(tmp_path / "run").losses == whole.losses


def stopped(path: Path, data: Any, at: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        grow(feedforward(2, 4, 4, 3), Dying(data, at), path, **{"data": data, **options})


def refused_as_it_was(path: Path, data: Any, *words: str, **options: Any) -> None:
    model = feedforward(2, 4, 4, 3)
    with nothing_left_behind(model), refused(cg.GrowthError, *words):
        grow(model, data, path, **options)


# --- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shorter_loader(size: int, tmp_path: Path) -> None:
    data, path = classified(40, batch=8), tmp_path / "run"
    stopped(path, data, 4)
    refused_as_it_was(path, data[:size], f"loader has {size} batches", "4 steps")


def test_shorter_loader_that_does_not_say_how_long_it_is(tmp_path: Path) -> None:
    class Stream:
        def __init__(self, batches: Any) -> None:
            self.batches = batches

        def __iter__(self) -> Iterator[Any]:
            return iter(self.batches)

    data, path = classified(40, batch=8), tmp_path / "run"
    stopped(path, data, 4)
    with refused(cg.CheckpointError, "loader has 2 batches", "4 steps"):
        grow(feedforward(2, 4, 4, 3), Stream(data[:2]), path)


def test_loader_that_was_all_read(tmp_path: Path) -> None:
    """Stopped after the last step of an epoch: nothing is left of it, and the next one begins."""
    data, path = classified(40, batch=8), tmp_path / "run"
    stopped(path, data, 5)
    history = grow(feedforward(2, 4, 4, 3), data, path)
    assert history.steps == [5, 10, 15]


def test_only_the_checkpoint_before_is_there(tmp_path: Path) -> None:
    data, path = classified(20, batch=10), tmp_path / "run"
    grow(feedforward(2, 4, 4, 3), data, path)
    os.remove(path)
    refused_as_it_was(path, data, "does not exist", str(previous(path)))
    os.replace(previous(path), path)
    assert len(grow(feedforward(2, 4, 4, 3), data, path).losses) == 3
    os.remove(path)
    os.remove(previous(path))
    assert len(grow(feedforward(2, 4, 4, 3), data, path).losses) == 3


@pytest.mark.parametrize(
    "extra", [None, 5, {}, {"epoch": "1", "done": 0, "stopped": 0, "start": 0}]
)
def test_checkpoint_that_is_none_of_grow(extra: Any, tmp_path: Path) -> None:
    data, model = classified(8), feedforward(2, 4, 4, 3)
    optimizer = SGD(model.parameters())
    path = save(tmp_path / "run", model, optimizer=optimizer, extra=extra)
    refused_as_it_was(path, data, "no run of grow")


@pytest.mark.parametrize("state", [5, {}, {"parts": {}}, {"parts": 3}])
def test_state_that_is_none_of_a_grower(state: Any) -> None:
    model = feedforward(2, 4, 3)
    grower = cg.Grower(model, SGD(model.parameters()), CROSS_ENTROPY, classified(8))
    with refused(cg.CheckpointError, "state"):
        grower.load_state_dict(state)


class InTurn:
    """A rule that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, sensitivities: Any) -> cg.Decision:
        self.calls += 1
        names = list(sensitivities)
        return cg.Decision((names[self.calls % len(names)],))


class Remembered(InTurn):
    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def test_rule_that_forgets_is_said(tmp_path: Path) -> None:
    data = classified(8)
    with pytest.warns(UserWarning, match=r"rule=.*InTurn.* has no state_dict"):
        grow(feedforward(2, 4, 4, 3), data, tmp_path / "forgets", rule=InTurn())
    grow(feedforward(2, 4, 4, 3), data, None, rule=InTurn())  # never to be resumed
    path = tmp_path / "keeps"
    grow(feedforward(2, 4, 4, 3), data, path, rule=Remembered(), epochs=2)
    rule = Remembered()
    grow(feedforward(2, 4, 4, 3), data, path, rule=rule, epochs=4)
    assert rule.calls == 2


def test_the_state_of_a_norm_is_kept(tmp_path: Path) -> None:
    class Fading:
        """A norm that counts its calls, each one for less."""

        calls = 0

        def __call__(self, multiplier: Any) -> float:
            self.calls += 1
            return 0.5**self.calls * float(cg.norms.Frobenius()(multiplier))

        def state_dict(self) -> dict[str, int]:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    data, path, norms = classified(8), tmp_path / "run", [Fading(), Fading()]
    for norm, epochs in zip(norms, (2, 4), strict=True):
        grow(feedforward(2, 4, 4, 3), data, path, norm=norm, epochs=epochs)
    assert norms[1].calls > norms[0].calls > 0
    refused_as_it_was(path, data, "norm", "state_dict", norm=cg.norms.Frobenius(), epochs=5)


@pytest.mark.parametrize(("had", "has"), [(Remembered(), InTurn()), (InTurn(), Remembered())])
@pytest.mark.filterwarnings("ignore:rule=")
def test_state_of_another_rule(had: Any, has: Any, tmp_path: Path) -> None:
    data, path = classified(8), tmp_path / "run"
    grow(feedforward(2, 4, 4, 3), data, path, rule=had)
    refused_as_it_was(path, data, "rule", "state_dict", rule=has, epochs=5)


def test_other_numbers_of_optimizers_averages_and_schedulers(tmp_path: Path) -> None:
    data, path, model = classified(20, batch=10), tmp_path / "run", feedforward(2, 4, 4, 3)
    given: dict[str, Any] = {"optimizer_factory": two_optimizers}
    given["scheduler_factory"] = two_schedulers
    grow(model, data, path, averaged=ema(model), **given)
    assert len(load(path).optimizer) == 2
    assert len(load(path).averaged) == 1
    other = feedforward(2, 4, 4, 3)
    alone = {"optimizer_factory": SGD, "scheduler_factory": None}
    one = {"scheduler_factory": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)}
    three = {"scheduler_factory": lambda given: [*two_schedulers(given), two_schedulers(given)[0]]}
    for options, word in (
        ({**alone, "averaged": ema(other)}, "scheduler_factory=None"),
        ({**alone, **one, "averaged": ema(other)}, "optimizer: 1 to restore"),
        ({**given, "averaged": [ema(other), ema(other)]}, "averaged"),
        ({**given, "averaged": ()}, "averaged"),
        ({**given, **three, "averaged": ema(other)}, "scheduler"),
    ):
        with nothing_left_behind(other), refused(cg.CheckpointError, word):
            grow(other, data, path, **options)


@pytest.mark.parametrize(("first", "then", "layers"), [(3, 1, 3), (1, 3, 3), (0, 2, 2), (2, 2, 2)])
def test_the_limit_is_that_of_the_run_that_goes_on(
    first: int, then: int, layers: int, tmp_path: Path
) -> None:
    data, start = classified(20, batch=10), feedforward(2, 4, 4, 3)
    given: dict[str, Any] = {"loss_fn": CROSS_ENTROPY, "loader": data, "candidates": SITES}
    given |= {"optimizer_factory": SGD, "checkpoint": tmp_path / "run"}
    cg.grow(copy.deepcopy(start), epochs=4, max_insertions=first, **given)
    model = copy.deepcopy(start)
    history = cg.grow(model, epochs=9, max_insertions=then, rule=cg.TopK(2), **given)
    assert sum(len(one.chosen) for one in history.insertions) == layers


def test_schedulers_of_another_kind_are_refused(tmp_path: Path) -> None:
    data, model = classified(20, batch=10), feedforward(2, 4, 4, 3)
    step = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2)
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=5)
    grow(copy.deepcopy(model), data, tmp_path / "run", scheduler_factory=step)
    for factory, words in (
        (None, ["scheduler_factory=None", "has a scheduler"]),
        (cosine, ["scheduler=CosineAnnealingLR", "T_max"]),
        (lambda optimizer: [step(optimizer)], ["scheduler is a list", "single"]),
    ):
        with nothing_left_behind(model), refused(cg.CheckpointError, *words):
            grow(model, data, tmp_path / "run", scheduler_factory=factory, epochs=5)


def test_a_state_that_is_refused_leaves_the_grower_as_it_was(tmp_path: Path) -> None:
    def grower(model: nn.Module) -> cg.Grower:
        optimizer = SGD(model.parameters())
        return cg.Grower(model, optimizer, CROSS_ENTROPY, classified(8), candidates=SITES)

    one, other = grower(feedforward(2, 4, 4, 3)), grower(feedforward(2, 4, 4, 3))
    one.step(1.0)
    one.maybe_grow()
    with refused(cg.GrowthError):  # its model has not grown
        other.load_state_dict(one.state_dict())
    assert (other.num_steps, other.history, len(other.record.insertions)) == (0, cg.History(), 0)
