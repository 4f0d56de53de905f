"""What the steps after an insertion are worth: policies for an ensemble, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from constrained_growth.experiments.ensembles.networks import (
    Ensemble,
    Loss,
    Samples,
    gradient,
    mean_loss,
)
from constrained_growth.experiments.ensembles.training import Adam, Optimizer

OLD = "old"
"""Memory that is 1 for the parameters that were there before an insertion, and 0 for new ones."""

ORIGIN = "origin"
"""Memory of where every parameter was at the insertion."""


@dataclass(frozen=True)
class Policy:
    """How a network is trained on after an insertion.

    Attributes:
        name: In tables and files.
        about: One line for the reader.
        share: Steps since the insertion, from 0 → share of its step that a new parameter makes.
        all_share: Share of their steps that all parameters make.
        decay: Weight decay of all parameters, decoupled, as its product with the learning rate
            and the number of steps that follow.
        anchored: Whether that of the new parameters is towards where they began.
        begin: What is done to the memory of the optimizer.
        searched: How many steps with a line search on all data come first.
        against: Name of the policy that it is compared with.
        matters: Whether the policy makes a difference at all with this optimizer.
    """

    name: str
    about: str
    share: Callable[[int], float] = lambda step: 1.0
    all_share: float = 1.0
    decay: float = 0.0
    anchored: bool = False
    begin: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    searched: int = 0
    against: str = "same"
    matters: Callable[[Optimizer], bool] = lambda optimizer: True


def _forgotten(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Only what the policies themselves remember."""
    return {key: value for key, value in memory.items() if key in (OLD, ORIGIN)}


def _old_count(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New parameters with the step count of the old ones, as if their zero moments were real."""
    count = memory["steps"].amax(1, keepdim=True).expand_as(memory["steps"])
    return {**memory, "steps": count.clone()}


def _remembers(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, Adam) or bool(getattr(optimizer, "momentum", 0))


def _warm_up(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / (steps + 1))


def _times(factor: float) -> Callable[[int], float]:
    return lambda step: factor


POLICIES = (
    Policy("same", "new layers like their neighbours"),
    Policy(
        "new × 0", "the new layer stays where it is, as if nothing had been inserted", _times(0.0)
    ),
    Policy("new × 0.1", "learning rate of the new layer", _times(0.1)),
    Policy("new × 0.3", "learning rate of the new layer", _times(0.3)),
    Policy("new × 3", "learning rate of the new layer", _times(3.0)),
    Policy("all × 0.7", "learning rate of all layers", all_share=0.7),
    Policy("warm-up 20", "of the new layer, over 20 steps", _warm_up(20)),
    Policy("warm-up 100", "of the new layer, over 100 steps", _warm_up(100)),
    Policy(
        "all forgotten",
        "the optimizer begins anew, as if it were made for the grown network",
        begin=_forgotten,
        matters=_remembers,
    ),
    Policy(
        "old count",
        "Adam's new moments, with the old number of steps",
        begin=_old_count,
        matters=lambda optimizer: isinstance(optimizer, Adam),
    ),
    Policy("line search", "5 steps on all data with a line search come first", searched=5),
    Policy("decay to 0", "weight decay 0.5 / (learning rate · steps)", decay=0.5),
    Policy(
        "decay to identity",
        "the same, in the new layer towards where it began",
        decay=0.5,
        anchored=True,
        against="decay to 0",
    ),
)


@dataclass(frozen=True)
class Stepper:
    """An optimizer of an ensemble with a policy for the new parameters.

    Attributes:
        base: The optimizer.
        policy: The policy.
        steps: How many steps follow, for the weight decay.
        watch: Called with the parameters after each step.
        ages: How many steps were made; grows.
    """

    base: Optimizer
    policy: Policy
    steps: int
    watch: Callable[[Tensor], None]
    ages: list[int]

    def step(
        self, parameters: Tensor, gradient: Tensor, memory: dict[str, Tensor], running: Tensor
    ) -> None:
        """One step."""
        before, policy = parameters.clone(), self.policy
        self.base.step(parameters, gradient, memory, running)
        old = memory[OLD]
        share = policy.all_share * (old + (1 - old) * policy.share(len(self.ages)))
        anchor = (1 - old) * memory[ORIGIN] if policy.anchored else torch.zeros_like(before)
        parameters.sub_(before).mul_(share).add_(before)
        parameters.sub_(policy.decay / self.steps * (before - anchor) * running)
        self.ages.append(len(self.ages))
        self.watch(parameters)


def searched(
    begun: Ensemble,
    data: Samples,
    optimizer: Optimizer,
    steps: int,
    loss: Loss,
    *,
    shrink: float = 0.5,
    sufficient: float = 1e-4,
    halvings: int = 20,
) -> Ensemble:
    """Steps on all data, shortened for each replica until its loss falls, as by `LineSearch`.

    Args:
        begun: The replicas; not changed.
        data: All data.
        optimizer: Makes the whole steps.
        steps: How many.
        loss: Mean loss of each replica.
        shrink: β.
        sufficient: c of Armijo's condition.
        halvings: How often at most.
    """
    parameters, memory = begun.parameters.clone(), {k: v.clone() for k, v in begun.memory.items()}
    running = torch.ones(len(begun), 1, dtype=parameters.dtype)
    for _ in range(steps):
        before = parameters.clone()
        value, slope = gradient(begun.stack, parameters, data, loss)
        optimizer.step(parameters, slope, memory, running)
        moved = parameters - before
        descent = (slope * moved).sum(1).clamp(max=0)
        share, bad = torch.ones_like(value), torch.ones_like(value, dtype=torch.bool)
        for tried in range(halvings):
            if tried:
                share = torch.where(bad, share * shrink, share)
            there = replace(begun, parameters=before + share.unsqueeze(1) * moved)
            bad = ~(mean_loss(there, data, loss) <= value + sufficient * share * descent)
            if not bad.any():
                break
        share = torch.where(bad, torch.zeros_like(share), share)
        parameters = before + share.unsqueeze(1) * moved
    return replace(begun, parameters=parameters, memory=memory)
