"""One training run that grows, or does not: its loss against multiply-adds and seconds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import constrained_growth as cg
from constrained_growth.experiments.growth.counting import MultiplyAdds, of_training_step
from constrained_growth.experiments.growth.tasks import Batch, GrowthTask
from constrained_growth.rules import Plateau, Rule
from constrained_growth.training import evaluate


@dataclass(frozen=True)
class Arm:
    """A way to a big network.

    `rule` maps a seed to the rule for the next layer, None for a network that does not grow. If
    the rule does not use sensitivities (`looks`), the pass that computes them is free. Layers come
    after fixed times, or where the training loss has stopped falling (`at_plateaus`).
    """

    name: str
    rule: Callable[[int], Rule] | None
    begins_big: bool = False
    looks: bool = False
    at_plateaus: bool = False


LOSS = nn.CrossEntropyLoss()

CLIP = 1.0
"""Gradients are clipped to this norm in every arm; without, big networks sometimes diverge."""

AVERAGE = 0.99
"""How much of the moving average of the weights stays in a step, in every arm."""

BIG = "big"
"""The arm with which the others are compared."""

ARMS = (
    Arm("sensitivity", lambda seed: cg.TopK(1), looks=True),
    Arm("… at plateaus", lambda seed: cg.TopK(1), looks=True, at_plateaus=True),
    Arm("random", lambda seed: cg.Random(seed=seed)),
    Arm("first", lambda seed: cg.Fixed(0)),
    Arm("middle", lambda seed: cg.rules.Placed("middle", 1)),
    Arm("last", lambda seed: cg.Fixed(-1)),
    Arm(BIG, None, begins_big=True),
    Arm("small", None),
)
"""As all blocks are alike, grown networks end with the architecture of the big one; and with one
block at the start there is no place between old blocks to interleave."""


@dataclass(frozen=True)
class Trace:
    """What a run recorded, row by row: what was spent until then, and the loss.

    The loss is that on data not trained on, `training_loss` that at the end on training data,
    `accuracy` the share of classes (characters) that are right then, on data not trained on.
    `decisions` are the multiply-adds of deciding and inserting, at `sites`.
    """

    multiply_adds: tuple[int, ...]
    seconds: tuple[float, ...]
    loss: tuple[float, ...]
    training_loss: float
    accuracy: float
    sites: tuple[str, ...]
    decisions: int


def train(task: GrowthTask, arm: Arm, seed: int, lr: float) -> Trace:
    """Train until as much is spent as in the whole run of the big network.

    Initial values, data and the order of the batches are those of the seed, in every arm.
    The learning rate rises linearly over the first `warmup` steps. The loss is that of a moving
    average of the weights, so that no schedule has to know when a run ends. Measuring it counts
    neither as multiply-adds nor as seconds.
    """
    material = task.material(seed)
    example = next(material.stream(seed))
    model = _network(task, seed, task.big if arm.begins_big else task.small)
    budget = task.steps * of_training_step(_network(task, seed, task.big), LOSS, example)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (task.warmup + 1)))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    meter = _Meter()
    grower = cg.Grower(
        model,
        optimizer,
        LOSS,
        material.deciding,
        rule=arm.rule(seed) if arm.rule else None,
        when=Plateau() if arm.at_plateaus else lambda losses: len(losses) >= task.wait,
        candidates=task.candidates,
        max_insertions=task.big - task.small if arm.rule else 0,
        solver=meter.solve,
        averaged=averaged,
    )
    stream = material.stream(seed)
    each = of_training_step(model, LOSS, example)
    spent, took, decisions = 0, 0.0, 0
    rows: list[tuple[int, float, float]] = []
    while spent < budget:
        began = time.perf_counter()
        for batch in itertools.islice(stream, task.row):
            _step(grower, batch)
            averaged.update_parameters(model)
            scheduler.step()
        due = grower.observe()
        spent, took = spent + task.row * each, took + time.perf_counter() - began
        if due:
            cost, seconds = meter.of_asking(grower, pays_for_looking=arm.looks)
            spent, took, decisions = spent + cost, took + seconds, decisions + cost
            each = of_training_step(model, LOSS, example)
        rows.append((spent, took, _measured(averaged, material.held_out)["loss"]))
    multiply_adds, seconds, losses = zip(*rows, strict=True)
    sites = tuple(layer.name for layer in grower.record.insertions)
    training = _measured(averaged, material.training)["loss"]
    accuracy = _measured(averaged, material.held_out)["accuracy"]
    return Trace(multiply_adds, seconds, losses, training, accuracy, sites, decisions)


class _Meter:
    """Measures what decisions cost, and how much of that the sensitivities cost."""

    def __init__(self) -> None:
        self._counter = MultiplyAdds()
        self._looking: tuple[int, float] = (0, 0.0)

    def of_asking(self, grower: cg.Grower, *, pays_for_looking: bool) -> tuple[int, float]:
        """Let it ask; returns multiply-adds and seconds."""
        began = time.perf_counter()
        self._counter = MultiplyAdds()
        with self._counter:
            grower.ask()
        looked, solved = self._looking
        if pays_for_looking:
            return self._counter.total, time.perf_counter() - began
        return self._counter.total - looked, time.perf_counter() - solved

    def solve(self, problem: cg.GrowthProblem, rule: Rule | None) -> cg.Solution:
        """As `cg.solve`; notes what has been spent until then."""
        found = cg.solve(problem, rule, stationarity=False)
        self._looking = self._counter.total, time.perf_counter()
        return found


def _step(grower: cg.Grower, batch: Batch) -> None:
    grower.optimizer.zero_grad()
    loss = LOSS(grower.model(batch[0]), batch[1])
    loss.backward()
    nn.utils.clip_grad_norm_(grower.model.parameters(), CLIP)
    grower.optimizer.step()
    grower.step(loss)


def _network(task: GrowthTask, seed: int, blocks: int) -> nn.Module:
    torch.manual_seed(seed)
    return task.network(blocks)


def _measured(model: nn.Module, data: Sequence[Batch]) -> dict[str, float]:
    return evaluate(model, {"loss": LOSS, "accuracy": _accuracy}, data)


def _accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).to(output.dtype).mean()
