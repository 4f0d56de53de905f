"""`bench steps`: the same networks with the same new layer, trained on in different ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tqdm import tqdm

from constrained_growth.experiments.decisions.tasks import SUITE, Moment, Task, at_the_moment
from constrained_growth.experiments.ensembles.growth import (
    frobenius,
    insert_layer,
    multipliers,
    new_layer,
)
from constrained_growth.experiments.ensembles.networks import Ensemble, Samples, mean_loss
from constrained_growth.experiments.ensembles.training import Optimizer, Shuffle, train
from constrained_growth.experiments.statistics import LEVEL, Array, mean_difference
from constrained_growth.experiments.tables import interval, titled
from constrained_growth.experiments.timing import described, machine, one_thread

WATCHED = 20
"""The loss is watched for a jump during this many steps."""

OLD = "old"
"""Memory that is 1 for the parameters from before an insertion, and 0 for new ones."""

ORIGIN = "origin"
"""Memory of where every parameter was at the insertion."""


@dataclass(frozen=True)
class Policy:
    """How a network is trained on after an insertion.

    Attributes:
        name: In tables and files.
        about: One line for the reader.
        share: Steps since the insertion, from 0 → share of its step that a new parameter makes.
        decay: Weight decay of all parameters, decoupled: its product with the learning rate and
            the number of steps that follow.
        anchored: Whether new parameters decay towards their initial values, not towards zero.
        against: Name of the policy that it is compared with.
    """

    name: str
    about: str
    share: Callable[[int], float] = lambda step: 1.0
    decay: float = 0.0
    anchored: bool = False
    against: str = "same"


POLICIES = (
    Policy("same", "new layers like their neighbours"),
    Policy("new × 0.3", "learning rate of the new layer", lambda step: 0.3),
    Policy("new × 3", "learning rate of the new layer", lambda step: 3.0),
    Policy("warm-up 20", "of the new layer, over 20 steps", lambda step: min(1.0, (step + 1) / 21)),
    Policy("decay to 0", "weight decay 0.5 / (learning rate · steps)", decay=0.5),
    Policy(
        "decay to identity",
        "the same, in the new layer towards its initial values",
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
        made: A list that gains one entry with each step.
    """

    base: Optimizer
    policy: Policy
    steps: int
    watch: Callable[[Tensor], object]
    made: list[object]

    def step(
        self, parameters: Tensor, gradient: Tensor, memory: dict[str, Tensor], running: Tensor
    ) -> None:
        """One step."""
        before, policy = parameters.clone(), self.policy
        self.base.step(parameters, gradient, memory, running)
        old = memory[OLD]
        share = old + (1 - old) * policy.share(len(self.made))
        anchor = (1 - old) * memory[ORIGIN] if policy.anchored else torch.zeros_like(before)
        parameters.sub_(before).mul_(share).add_(before)
        parameters.sub_(policy.decay / self.steps * (before - anchor) * running)
        self.made.append(self.watch(parameters))


@dataclass(frozen=True)
class Plan:
    """How much is run: which tasks, how many networks of each, processes of one thread each."""

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


def run(
    plan: Plan, seed: int = 0, *, cache: Path | None = None, progress: bool | None = None
) -> dict[str, Any]:
    """Insert a layer where the multipliers are largest, and train on with every policy.

    Args:
        plan: How much.
        seed: Other seeds have other networks.
        cache: Not used.
        progress: Show bars; None (default) only on a terminal.

    Returns:
        The numbers that `--json` writes. For each task and policy: "finals", the mean training
        loss over the last tenth of the epochs, and "jumps", the highest loss on all training data
        in the first steps minus that at the insertion, relative to it (0 if it never is above),
        of each network; their means; and the differences to another policy on the same networks.
    """
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    jobs = [delayed(_follow)(task, seeds, progress, line) for line, task in enumerate(plan.tasks)]
    with one_thread():
        found: Any = Parallel(n_jobs=min(plan.workers, len(jobs)))(jobs)
        here = machine()
    return {
        "tasks": {
            task.name: {p.name: _compared(*each[p.name], *each[p.against]) for p in POLICIES}
            for task, each in zip(plan.tasks, found, strict=True)
        },
        "about": {task.name: task.about for task in plan.tasks},
        "machine": here,
        "seed": seed,
        "networks": plan.networks,
    }


def grown(moment: Moment) -> list[tuple[list[int], Ensemble]]:
    """Every network with a layer at its largest multiplier; networks with the same site together.

    Their memory says which parameters are old, and where all of them were.

    Returns:
        Numbers of the networks, and these networks.
    """
    sites, found = _largest(moment), []
    for site in sorted(set(sites)):
        mine = [i for i, other in enumerate(sites) if other == site]
        begun = moment.trained.take(mine)
        begun = replace(begun, memory={**begun.memory, OLD: torch.ones_like(begun.parameters)})
        layer = new_layer([moment.blocks[i][site] for i in mine])
        after = insert_layer(begun, [site] * len(mine), layer)
        origin = after.parameters.clone()
        found.append((mine, replace(after, memory={**after.memory, ORIGIN: origin})))
    return found


def _follow(
    task: Task, seeds: Sequence[int], progress: bool | None, line: int
) -> dict[str, tuple[Array, Array]]:
    """Final losses and jumps of the networks of a task, policy by policy."""
    quiet = None if progress is None else not progress
    with one_thread(), tqdm(desc=task.name, unit=" epochs", position=line, disable=quiet) as bar:
        moment = at_the_moment(task, seeds, bar.update)
        parts = grown(moment)
        return {policy.name: _followed(moment, parts, policy, bar.update) for policy in POLICIES}


def _compared(final: Array, jump: Array, other_final: Array, other_jump: Array) -> dict[str, Any]:
    scale = float(other_final.mean())
    return {
        "final": float(final.mean()),
        "final_difference": asdict(mean_difference(final / scale, other_final / scale)),
        "jump": float(jump.mean()),
        "jump_difference": asdict(mean_difference(jump, other_jump)),
        "finals": final.tolist(),
        "jumps": jump.tolist(),
    }


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
) -> tuple[Array, Array]:
    task, count = moment.task, len(moment.models)
    final, jump = np.empty(count), np.empty(count)
    for mine, begun in parts:
        data = Samples(moment.data.x[mine], moment.data.y[mine])
        start = mean_loss(begun, data, task.loss)
        seen = [start]

        def watch(parameters: Tensor, data=data, begun=begun, seen=seen) -> None:
            if len(seen) <= WATCHED:
                now = replace(begun, parameters=parameters)
                seen.append(mean_loss(now, data, task.loss))

        per_epoch = -(-data.x.shape[2] // task.batch)
        _, history = train(
            begun,
            data,
            task.after,
            Stepper(task.optimizer, policy, task.after * per_epoch, watch, []),
            loss=task.loss,
            batch=task.batch,
            order=Shuffle([2_000_000 + moment.seeds[i] for i in mine]),
            on_epoch=on_epoch,
        )
        final[mine] = history.loss[-max(1, task.after // 10) :].double().mean(0).numpy()
        highest = torch.stack(seen).amax(0)
        jump[mine] = ((highest - start) / start).double().numpy()
    return final, jump


def tables(found: Mapping[str, Any]) -> RenderableType:
    """The machine, how to read it, a table for each task, and what the policies are."""
    return Group(
        Text(
            f"{described(found['machine'])}; seed {found['seed']}. {found['networks']} networks of "
            "each task.\n"
        ),
        Text(
            "All policies start from the same networks with the same new layer, on the same "
            "batches. Final loss: training loss over the last tenth of the epochs, and its "
            "difference to that of another policy, in percent of it. Jump: the highest loss on all "
            f"training data in the first {WATCHED} steps minus that at the insertion, in percent "
            f"of it. In brackets {LEVEL:.0%} bootstrap intervals of the paired differences; * "
            "where they exclude zero.\n"
        ),
        *(_table(task, found) for task in found["tasks"]),
        *(Text(f"{p.name}: {p.about}; compared with “{p.against}”.") for p in POLICIES),
    )


def _table(task: str, found: Mapping[str, Any]) -> Table:
    headings = "final loss", "difference", "jump", "difference"
    table = titled(f"{task}: {found['about'][task]}", "policy", *headings)
    for name, row in found["tasks"][task].items():
        table.add_row(
            name,
            f"{row['final']:.4g}",
            _percent(**row["final_difference"]),
            f"{100 * row['jump']:.1f} %",
            _percent(**row["jump_difference"]),
        )
    return table


def _percent(value: float, low: float, high: float) -> str:
    clear = low > 0 or high < 0
    return interval(100 * value, 100 * low, 100 * high, "+.1f") + ("*" if clear else " ")
