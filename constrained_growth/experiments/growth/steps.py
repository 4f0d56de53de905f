"""`bench steps`: the same networks with the same new layer, trained on in different ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from constrained_growth.experiments.decisions.statistics import Estimate, mean_difference
from constrained_growth.experiments.decisions.tasks import SUITE, Moment, Task, at_the_moment
from constrained_growth.experiments.ensembles.growth import (
    frobenius,
    insert_layer,
    multipliers,
    new_layer,
)
from constrained_growth.experiments.ensembles.networks import Ensemble, Samples, mean_loss
from constrained_growth.experiments.ensembles.training import Shuffle, train
from constrained_growth.experiments.growth.step_policies import (
    OLD,
    ORIGIN,
    POLICIES,
    Policy,
    Stepper,
    searched,
)
from constrained_growth.experiments.timing import Machine, one_thread

Array = NDArray[np.float64]

WATCHED = 20
"""The loss is watched for a jump for so many steps."""


@dataclass(frozen=True)
class Plan:
    """How much is run.

    Attributes:
        tasks: Networks at the moment of an insertion, and how they are trained.
        networks: How many of each.
        workers: Processes, one thread each.
    """

    tasks: Sequence[Task]
    networks: int
    workers: int = 2


_NAMES = (
    "spirals-4x2",
    "spirals-6x4",
    "digits-8x5",
    "digits-8x5-adam",
    "mnist1d-residual",
    "mnist1d-bottleneck",
    "friedman",
)

FULL = Plan([task for task in SUITE if task.name in _NAMES], networks=20)

QUICK = Plan(
    [
        replace(task, before=10, after=10)
        for task in SUITE
        if task.name in ("spirals-4x2", "spirals-4x4-adam")
    ],
    networks=4,
    workers=1,
)


@dataclass(frozen=True)
class Followed:
    """What became of the networks of a task under a policy.

    Attributes:
        final: Training loss, the mean over the last tenth of the epochs, shape (networks,).
        jump: By how much the loss on all training data was above that at the insertion at most,
            in the first steps, relative to it; 0 where it was not; shape (networks,).
    """

    final: Array
    jump: Array


@dataclass(frozen=True)
class Verdict:
    """A policy against another one on the same networks.

    Attributes:
        final: Mean final loss.
        final_difference: To the other policy, relative to its mean final loss.
        jump: Mean jump.
        jump_difference: To the other policy.
    """

    final: float
    final_difference: Estimate
    jump: float
    jump_difference: Estimate


@dataclass(frozen=True)
class StepBenchmark:
    """All that `bench steps` found.

    Attributes:
        machine: Where.
        seed: The networks are numbers seed · networks, … of an endless row.
        plan: How much was run.
        followed: Task → policy → what became of the networks.
        verdicts: Task → policy → how it compares.
    """

    machine: Machine
    seed: int
    plan: Plan
    followed: Mapping[str, Mapping[str, Followed]]
    verdicts: Mapping[str, Mapping[str, Verdict]]


def run_steps(
    plan: Plan,
    seed: int = 0,
    *,
    policies: Sequence[Policy] = POLICIES,
    progress: bool | None = None,
) -> StepBenchmark:
    """Insert a layer where the multipliers are largest, and train on with every policy.

    Args:
        plan: How much.
        seed: Other seeds have other networks.
        policies: Those to compare, and those that they are compared with.
        progress: Show bars; None (default) only on a terminal.
    """
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    jobs = [
        delayed(follow)(task, seeds, policies, progress, line)
        for line, task in enumerate(plan.tasks)
    ]
    with one_thread():
        found: Any = Parallel(n_jobs=min(plan.workers, len(jobs)))(jobs)
        machine = Machine.here()
    followed = {task.name: each for task, each in zip(plan.tasks, found, strict=True)}
    verdicts = {
        task: {p.name: verdict(each[p.name], each[p.against]) for p in policies if p.name in each}
        for task, each in followed.items()
    }
    return StepBenchmark(machine, seed, plan, followed, verdicts)


def follow(
    task: Task,
    seeds: Sequence[int],
    policies: Sequence[Policy],
    progress: bool | None = None,
    line: int = 0,
) -> dict[str, Followed]:
    """What becomes of the networks of a task, policy by policy.

    Args:
        task: The task.
        seeds: Of the networks.
        policies: The policies; those that make no difference with its optimizer are left out.
        progress: As for `run_steps`.
        line: Where the bar is on the screen.
    """
    quiet = None if progress is None else not progress
    used = [policy for policy in policies if policy.matters(task.optimizer)]
    with one_thread(), tqdm(desc=task.name, unit=" epochs", position=line, disable=quiet) as bar:
        moment = at_the_moment(task, seeds, bar.update)
        parts = grown(moment)
        return {policy.name: _followed(moment, parts, policy, bar.update) for policy in used}


def grown(moment: Moment) -> list[tuple[list[int], Ensemble]]:
    """Every network with a layer at its largest multiplier; networks of one site together.

    Their memory says which parameters are old, and where all of them were.

    Returns:
        Numbers of the networks, and these networks.
    """
    sites = _largest(moment)
    found = []
    for site in sorted(set(sites)):
        mine = [i for i, other in enumerate(sites) if other == site]
        begun = moment.trained.take(mine)
        begun = replace(begun, memory={**begun.memory, OLD: torch.ones_like(begun.parameters)})
        layer = new_layer([moment.blocks[i][site] for i in mine])
        after = insert_layer(begun, [site] * len(mine), layer)
        origin = after.parameters.clone()
        found.append((mine, replace(after, memory={**after.memory, ORIGIN: origin})))
    return found


def verdict(followed: Followed, other: Followed) -> Verdict:
    """How a policy compares with another one on the same networks."""
    scale = float(other.final.mean())
    return Verdict(
        float(followed.final.mean()),
        mean_difference(followed.final / scale, other.final / scale, 0),
        float(followed.jump.mean()),
        mean_difference(followed.jump, other.jump, 0),
    )


def _largest(moment: Moment) -> list[int]:
    """For each network the site with the largest ‖λ‖_F, as the source chooses."""
    columns = []
    for site in range(len(moment.blocks[0])):
        layer = new_layer([blocks[site] for blocks in moment.blocks])
        found = multipliers(moment.trained, moment.data, layer, moment.task.loss, sites=[site])
        columns.append(frobenius(found))
    return torch.cat(columns, 1).argmax(1).tolist()


def _followed(
    moment: Moment,
    parts: Sequence[tuple[list[int], Ensemble]],
    policy: Policy,
    on_epoch: Callable[[], object],
) -> Followed:
    task, count = moment.task, len(moment.models)
    final, jump = np.empty(count), np.empty(count)
    for mine, begun in parts:
        data = Samples(moment.data.x[mine], moment.data.y[mine])
        start = mean_loss(begun, data, task.loss)
        seen = [start]
        begun = replace(begun, memory=policy.begin(begun.memory))

        def watch(parameters: Tensor, data=data, begun=begun, seen=seen) -> None:
            if len(seen) <= WATCHED:
                now = replace(begun, parameters=parameters)
                seen.append(mean_loss(now, data, task.loss))

        per_epoch = -(-data.x.shape[2] // task.batch)
        stepper = Stepper(task.optimizer, policy, task.after * per_epoch, watch, [])
        if policy.searched:
            begun = searched(begun, data, stepper, policy.searched, task.loss)
            del seen[1:]  # the whole steps, which were not taken
            seen.append(mean_loss(begun, data, task.loss))
        _, history = train(
            begun,
            data,
            task.after,
            stepper,
            loss=task.loss,
            batch=task.batch,
            order=Shuffle([2_000_000 + moment.seeds[i] for i in mine]),
            on_epoch=on_epoch,
        )
        final[mine] = history.loss[-max(1, task.after // 10) :].double().mean(0).numpy()
        highest = torch.stack(seen).amax(0)
        jump[mine] = ((highest - start) / start).double().numpy()
    return Followed(final, jump)
