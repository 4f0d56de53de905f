"""The arms: rules, each with a norm and a cost, and what they decide about the networks of a task.

Another arm is one more line: `Arm("name", lambda asked: cg.TopK(1), cg.norms.Nuclear())`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from constrained_growth.blocks import pinned_parameters
from constrained_growth.candidates.candidate import Candidate
from constrained_growth.curvature import FORWARD_PASSES
from constrained_growth.errors import RuleError
from constrained_growth.experiments.decisions.tasks import Moment, Task, sites_of
from constrained_growth.experiments.ensembles.training import SGD, Adam, Optimizer
from constrained_growth.norms import (
    Entrywise1,
    Frobenius,
    KroneckerFisher,
    MomentNorm,
    Norm,
    Nuclear,
    PerParameter,
    Spectral,
)
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import (
    Fixed,
    Random,
    Rule,
    Threshold,
    TopK,
    Trial,
    TrustRegion,
    rule_for,
    then,
)
from constrained_growth.rules.trial import kept, lengths
from constrained_growth.solution import Decision, Sensitivity
from constrained_growth.solve import solve

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Asked:
    """One network about which a rule is asked.

    Attributes:
        task: Its task.
        seed: Its seed.
        model: The network.
        optimizer: That has trained it, with its state.
        candidates: Their names, in the order of the sites.
        samples: How many there are to train on.
        rehearsal: The final losses of one full training for each site, in an order of the data
            of their own.
    """

    task: Task
    seed: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    candidates: tuple[str, ...]
    samples: int
    rehearsal: Array


@dataclass(frozen=True)
class Arm:
    """A rule to be judged.

    Attributes:
        name: In tables and files.
        rule: Makes it, anew for every network, so that nothing is remembered.
        norm: How large a multiplier is.
        passes: What the question costs beside what a decision reports as `evidence["passes"]`,
            in gradient passes over the data: 1 for the multipliers, 0 where nobody looks at them.
        in_batches: Whether the problem has the batches of training, in random order, or all of
            the data in one batch, which is the same loss and faster.
    """

    name: str
    rule: Callable[[Asked], Rule]
    norm: Norm | MomentNorm = field(default_factory=Frobenius)
    passes: float = 1.0
    in_batches: bool = False


@dataclass(frozen=True)
class Choices:
    """What an arm decided about each network.

    Attributes:
        sites: Number of the site, −1 for inserting nothing; shape (networks,).
        passes: What that cost, shape (networks,).
        blocks: For each network, the layer as it would start at each site, if any starts
            elsewhere than at its pins; else None.
    """

    sites: NDArray[np.int64]
    passes: Array
    blocks: Sequence[Sequence[nn.Module]] | None = None


def choices(
    moment: Moment,
    arms: Sequence[Arm],
    rehearsal: Array,
    on_network: Callable[[], object] = lambda: None,
) -> dict[str, Choices]:
    """Ask the library about every network, once for each arm.

    Args:
        moment: The networks.
        arms: The rules.
        rehearsal: Final losses of a full training for each site, shape (sites, networks).
        on_network: Called after every network.

    Returns:
        Name of an arm → what it decided.

    Raises:
        RuleError: A rule chose more than one candidate.
    """
    decided: dict[str, list[tuple[int, float, list[nn.Module] | None]]] = {a.name: [] for a in arms}
    for i in range(len(moment.models)):
        asked = _asked(moment, i, rehearsal[:, i])
        candidates = [
            Candidate(name, block)
            for name, block in zip(asked.candidates, moment.blocks[i], strict=True)
        ]
        x, y = moment.plain[i]
        problems = {
            in_batches: GrowthProblem(asked.model, moment.task.loss_fn, data, candidates)
            for in_batches, data in ((False, [(x, y)]), (True, _loader(x, y, moment.task.batch)))
        }
        for arm in arms:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(asked.seed)
                problem = problems[arm.in_batches]
                decision = solve(problem, arm.rule(asked), norm=arm.norm).decision
            decided[arm.name].append(
                (
                    _site(arm, decision, asked.candidates),
                    arm.passes + float(decision.evidence.get("passes", 0.0)),
                    _started(decision, asked.candidates, moment.blocks[i]),
                )
            )
        on_network()
    return {name: _choices(each, moment.blocks) for name, each in decided.items()}


def plain_optimizer(
    optimizer: Optimizer, model: nn.Module, memory: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """PyTorch's optimizer in the state in which an ensemble has left one of its replicas.

    Args:
        optimizer: `SGD` or `Adam`.
        model: The replica as a plain network.
        memory: What is remembered of it, each of shape (parameters,).

    Raises:
        RuleError: It is another optimizer.
    """
    parameters = list(model.parameters())
    parts = {
        name: [
            part.reshape(p.shape).clone()
            for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        for name, flat in memory.items()
    }
    if isinstance(optimizer, SGD):
        made = torch.optim.SGD(parameters, float(optimizer.lr), optimizer.momentum)
        names = {"momentum_buffer": "momentum"}
    elif isinstance(optimizer, Adam):
        made = torch.optim.Adam(parameters, float(optimizer.lr), optimizer.betas, optimizer.eps)
        names = {"step": "steps", "exp_avg": "mean", "exp_avg_sq": "square"}
    else:
        raise RuleError(f"optimizer={optimizer!r} has no plain form; give SGD or Adam.")
    for index, parameter in enumerate(parameters):
        state = {name: parts[ours][index] for name, ours in names.items() if ours in parts}
        if "step" in state:
            state["step"] = state["step"].flatten()[0]
        if state:
            made.state[parameter] = state
    return made


def trial_of(
    passes: float, asked: Asked, margin: float = 2.0, *, sites: int | None = None
) -> Trial:
    """As many steps as so many gradient passes pay for, of all trials and evaluations together."""
    sites, eta = sites or len(asked.candidates), 3.0
    steps = 1
    while trial_passes(sites, steps + 1, eta, asked.task.batch / asked.samples) <= passes:
        steps += 1
    return Trial(steps, asked.optimizer, eta, margin=margin)


def trial_passes(sites: int, steps: int, eta: float, share: float) -> float:
    """What successive halving costs, inserting nothing among the trials, in gradient passes.

    Args:
        sites: How many candidates there are.
        steps: Of the last ones.
        eta: By which factor fewer go on.
        share: Of the data in a batch, the last one counted as a whole one.
    """
    spent, done, left = 0.0, 0, sites
    for length in lengths(sites, steps, eta):
        spent += (left + 1) * ((length - done) * share + FORWARD_PASSES)
        done, left = length, kept(left, eta)
    return spent


def epochs_of_trial(epochs: int, asked: Asked) -> Trial:
    """Every candidate trained for so many epochs."""
    return Trial(epochs * math.ceil(asked.samples / asked.task.batch), asked.optimizer, math.inf)


def rehearsed(asked: Asked) -> Rule:
    """One full training for each site, and the best of them."""

    def rule(sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        best = asked.candidates[int(asked.rehearsal.argmin())]
        passes = asked.task.after * len(asked.candidates)
        return Decision((best,), "lowest final loss of one run", evidence={"passes": passes})

    return rule


def most_parameters(sensitivities: Mapping[str, Sensitivity], /) -> Decision:
    """The candidate with the most new parameters, the first of them on a tie."""
    best = max(sensitivities, key=lambda name: sensitivities[name].num_new_parameters)
    return Decision((best,), "most parameters")


CONTROLS: tuple[Arm, ...] = (
    Arm("random", lambda asked: Random(seed=asked.seed), passes=0.0),
    Arm("first site", lambda asked: Fixed(0), passes=0.0),
    Arm("last site", lambda asked: Fixed(-1), passes=0.0),
    Arm("most parameters", lambda asked: most_parameters, passes=0.0),
    Arm("nothing", lambda asked: Fixed(), passes=0.0),
)
"""What a rule has to beat; the largest Frobenius norm is one of `ARMS`."""

ARMS: tuple[Arm, ...] = (
    Arm("Frobenius", lambda asked: TopK(1), Frobenius()),
    Arm("per parameter", lambda asked: TopK(1), PerParameter()),
    Arm("entrywise 1", lambda asked: TopK(1), Entrywise1()),
    Arm("spectral", lambda asked: TopK(1), Spectral()),
    Arm("nuclear", lambda asked: TopK(1), Nuclear()),
    Arm("Kronecker-Fisher 0.03", lambda asked: TopK(1), KroneckerFisher(0.03)),
    Arm("Kronecker-Fisher 0.1", lambda asked: TopK(1), KroneckerFisher(0.1)),
    Arm("Kronecker-Fisher 0.3", lambda asked: TopK(1), KroneckerFisher(0.3)),
    Arm("Kronecker-Fisher nuclear 0.03", lambda asked: TopK(1), KroneckerFisher(0.03, ord="nuc")),
    Arm("Kronecker-Fisher nuclear 0.1", lambda asked: TopK(1), KroneckerFisher(0.1, ord="nuc")),
    Arm("Kronecker-Fisher nuclear 0.3", lambda asked: TopK(1), KroneckerFisher(0.3, ord="nuc")),
    Arm("threshold", lambda asked: Threshold(relative=1.0, max_insertions=1)),
    Arm("trust region", lambda asked: TrustRegion()),
    Arm("trust region, joint", lambda asked: TrustRegion(joint=True)),
    Arm(
        "shortlist, then joint",
        lambda asked: then(TopK(2), TrustRegion(joint=True)),
        KroneckerFisher(ord="nuc"),
    ),
    Arm(
        "shortlist, then trial",
        lambda asked: then(TopK(2), trial_of(20.0, asked, 0.0, sites=2)),
        KroneckerFisher(ord="nuc"),
        in_batches=True,
    ),
    Arm(
        "rule_for(optimizer)",
        lambda asked: rule_for(asked.optimizer),
        KroneckerFisher(ord="nuc"),
        in_batches=True,
    ),
    Arm(
        "rule_for(optimizer, step=True)",
        lambda asked: rule_for(asked.optimizer, step=True),
        KroneckerFisher(ord="nuc"),
        in_batches=True,
    ),
    Arm("trial, 20 passes in all", lambda asked: trial_of(20.0, asked), in_batches=True),
    Arm("trial, 20 passes, no margin", lambda asked: trial_of(20.0, asked, 0.0), in_batches=True),
    Arm("trial, 20 epochs each", lambda asked: epochs_of_trial(20, asked), in_batches=True),
    Arm("full training of each", rehearsed, passes=0.0),
    *CONTROLS,
)
"""All that is judged by default."""


def _asked(moment: Moment, i: int, rehearsal: Array) -> Asked:
    model = moment.models[i]
    memory = {name: flat[i] for name, flat in moment.trained.memory.items()}
    return Asked(
        moment.task,
        moment.seeds[i],
        model,
        plain_optimizer(moment.task.optimizer, model, memory),
        tuple(name for name, _ in sites_of(model)),
        len(moment.plain[i][0]),
        rehearsal,
    )


def _loader(x: Tensor, y: Tensor, batch: int) -> DataLoader:
    """Batches in a new random order every time, each cut out of the tensors at once."""
    data = TensorDataset(x, y)
    batches = BatchSampler(RandomSampler(data), batch, drop_last=False)
    return DataLoader(data, sampler=batches, batch_size=None)


def _site(arm: Arm, decision: Decision, candidates: Sequence[str]) -> int:
    if len(decision.chosen) > 1:
        raise RuleError(
            f'arm "{arm.name}" chose {decision.chosen}; what becomes of several layers at once is '
            "not known here. Compose it with TopK(1): then(rule, TopK(1))."
        )
    return candidates.index(decision.chosen[0]) if decision.chosen else -1


def _started(
    decision: Decision, candidates: Sequence[str], blocks: Sequence[nn.Module]
) -> list[nn.Module] | None:
    """The layers, the chosen one moved from its pins as decided; None where it is not moved."""
    if not any(decision.values.values()):
        return None
    moved = list(blocks)
    for name, values in decision.values.items():
        index = candidates.index(name)
        moved[index] = copy.deepcopy(blocks[index])
        pins = pinned_parameters(moved[index])
        with torch.no_grad():
            for parameter, value in values.items():
                pins[parameter].add_(value)
    return moved


def _choices(
    decided: Sequence[tuple[int, float, list[nn.Module] | None]],
    blocks: Sequence[Sequence[nn.Module]],
) -> Choices:
    sites = np.array([site for site, _, _ in decided])
    passes = np.array([spent for _, spent, _ in decided])
    if all(moved is None for *_, moved in decided):
        return Choices(sites, passes)
    started = [
        mine if moved is None else moved for (*_, moved), mine in zip(decided, blocks, strict=True)
    ]
    return Choices(sites, passes, started)
