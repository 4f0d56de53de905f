"""One training run that grows, or does not: its loss against multiply-adds and seconds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from constrained_growth.experiments.growth.counting import MultiplyAdds, of_training_step
from constrained_growth.experiments.growth.tasks import Batch, GrowthTask
from constrained_growth.norms import KroneckerFisher, MomentNorm
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Fixed, Random, Rule, TopK
from constrained_growth.solution import Norm, Solution
from constrained_growth.solve import solve
from constrained_growth.training.grower import Grower
from constrained_growth.training.loop import evaluate


@dataclass(frozen=True)
class Arm:
    """A way to come to a big network.

    Attributes:
        name: In tables and files.
        rule: Seed → where the next layer goes; None for a network that does not grow.
        begins_big: Whether it has all its layers from the start.
        looks: Whether the rule looks at sensitivities. Where it does not, the pass that computes
            them is not charged.
    """

    name: str
    rule: Callable[[int], Rule] | None
    begins_big: bool = False
    looks: bool = False


LOSS = nn.CrossEntropyLoss()

CLIP = 1.0
"""Longer gradients are shortened to this, in every arm: big networks fail at times without."""

BIG = "big"
"""The arm that others are compared with."""


def _largest(seed: int) -> Rule:
    return TopK(1)


def _random(seed: int) -> Rule:
    return Random(seed=seed)


def _last(seed: int) -> Rule:
    return Fixed(-1)


ARMS = (
    Arm("sensitivity", _largest, looks=True),
    Arm("random", _random),
    Arm("fixed", _last),
    Arm(BIG, None, begins_big=True),
    Arm("small", None),
)


@dataclass(frozen=True)
class Trace:
    """What a run recorded, row by row.

    Attributes:
        multiply_adds: Spent until then, decisions included.
        seconds: Taken until then, looking at the loss not included.
        loss: On the training data that are looked at.
        held_out: The loss on data not trained on, at the end.
        sites: Where layers were inserted, in their order.
        decisions: Multiply-adds of deciding and inserting, of the sum.
    """

    multiply_adds: tuple[int, ...]
    seconds: tuple[float, ...]
    loss: tuple[float, ...]
    held_out: float
    sites: tuple[str, ...]
    decisions: int


NORM = KroneckerFisher(damping=0.03)
"""How large a multiplier is: as was recommended when the published figures were made."""


def run(task: GrowthTask, arm: Arm, seed: int, *, norm: Norm | MomentNorm = NORM) -> Trace:
    """Train until as much is spent as in the whole run of the big network.

    Initial values, data and the order of the batches are those of the seed, in every arm. All
    looks at the loss are left out of multiply-adds and seconds.

    Args:
        task: The task.
        arm: Whether and where the network grows.
        seed: Of everything random.
        norm: How large a multiplier is.
    """
    material = task.material(seed)
    example = next(material.stream(seed))
    model = _network(task, seed, task.big if arm.begins_big else task.small)
    budget = task.steps * of_training_step(_network(task, seed, task.big), LOSS, example)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.lr)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (task.warmup + 1)))
    meter = _Meter(norm)
    grower = Grower(
        model,
        optimizer,
        LOSS,
        material.deciding,
        rule=arm.rule(seed) if arm.rule else TopK(1),
        when=lambda losses: len(losses) >= task.wait,
        candidates=task.candidates,
        max_insertions=task.big - task.small if arm.rule else 0,
        solver=meter.solve,
    )
    stream = material.stream(seed)
    each = of_training_step(model, LOSS, example)
    spent, took, decisions = 0, 0.0, 0
    rows: list[tuple[int, float, float]] = []
    while spent < budget:
        began = time.perf_counter()
        for batch in itertools.islice(stream, task.row):
            _step(grower, batch)
            scheduler.step()
        due = grower.observe()
        spent, took = spent + task.row * each, took + time.perf_counter() - began
        if due:
            cost, seconds = meter.of_asking(grower, pays_for_looking=arm.looks)
            spent, took, decisions = spent + cost, took + seconds, decisions + cost
            each = of_training_step(model, LOSS, example)
        rows.append((spent, took, _loss(model, material.looking)))
    multiply_adds, seconds, losses = zip(*rows, strict=True)
    sites = tuple(layer.name for layer in grower.record.insertions)
    return Trace(multiply_adds, seconds, losses, _loss(model, material.held_out), sites, decisions)


class _Meter:
    """Measures decisions, and how much of them was spent before the rule had its answer."""

    def __init__(self, norm: Norm | MomentNorm) -> None:
        self._norm = norm
        self._counter = MultiplyAdds()
        self._looking: tuple[int, float] = (0, 0.0)

    def of_asking(self, grower: Grower, *, pays_for_looking: bool) -> tuple[int, float]:
        """Let it ask; multiply-adds and seconds of that."""
        began = time.perf_counter()
        self._counter = MultiplyAdds()
        with self._counter:
            grower.ask()
        looked, solved = self._looking
        if pays_for_looking:
            return self._counter.total, time.perf_counter() - began
        return self._counter.total - looked, time.perf_counter() - solved

    def solve(self, problem: GrowthProblem, rule: Rule) -> Solution:
        """As `solve`, and note what was spent until then."""
        found = solve(problem, rule, norm=self._norm, stationarity=False)
        self._looking = self._counter.total, time.perf_counter()
        return found


def _step(grower: Grower, batch: Batch) -> None:
    grower.optimizer.zero_grad()
    loss = LOSS(grower.model(batch[0]), batch[1])
    loss.backward()
    nn.utils.clip_grad_norm_(grower.model.parameters(), CLIP)
    grower.optimizer.step()
    grower.step(loss)


def _network(task: GrowthTask, seed: int, blocks: int) -> nn.Module:
    torch.manual_seed(seed)
    return task.network(blocks)


def _loss(model: nn.Module, data: Sequence[Batch]) -> float:
    return evaluate(model, {"loss": LOSS}, data)["loss"]
