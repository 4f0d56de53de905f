"""The arms: rules, each with a norm and a cost, and what they decide about the networks of a task.

Another arm is one more line: `Arm("name", lambda asked: cg.TopK(1), cg.norms.Nuclear())`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import constrained_growth as cg
from constrained_growth.blocks import pinned_parameters
from constrained_growth.experiments.decisions.tasks import Moment
from constrained_growth.experiments.ensembles.networks import sites_of
from constrained_growth.experiments.ensembles.training import SGD, Adam, Optimizer
from constrained_growth.experiments.statistics import Array
from constrained_growth.norms import (
    Entrywise1,
    Frobenius,
    KroneckerFisher,
    Nuclear,
    recommended,
)
from constrained_growth.rules import Rule, needs_model, rule_for


@dataclass(frozen=True)
class Asked:
    """A network about which a rule is asked."""

    seed: int
    candidates: tuple[str, ...]  # in the order of the sites
    optimizer: torch.optim.Optimizer  # that trains it, with its state
    batch: int
    samples: int  # to train on
    full: tuple[Array, float] | None = None  # final loss at each site in a run of its own, passes


@dataclass(frozen=True)
class Arm:
    """A rule to be judged, made anew for every network, and the norm of the multipliers.

    A decision costs `passes` gradient passes over the data (1 for the multipliers, 0 where they are
    not used) and what it reports as `evidence["passes"]`. With `in_batches` the problem has the
    batches of training, in random order; otherwise all data in one batch, which is faster.
    """

    name: str
    rule: Callable[[Asked], Rule]
    norm: Any = field(default_factory=Frobenius)
    passes: float = 1.0
    in_batches: bool = False


@dataclass(frozen=True)
class Choices:
    """What an arm decided about each network: the site (−1 for nothing), and what that cost.

    `blocks` are the layers as they would start at each site: at the pins, or moved by the decision.
    """

    sites: list[int] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    blocks: list[Sequence[nn.Module]] = field(default_factory=list)


def choices(
    moment: Moment,
    arms: Sequence[Arm],
    rehearsal: Array,
    on_network: Callable[[], object] = lambda: None,
) -> dict[str, Choices]:
    """Ask the library about every network, once for each arm; name of an arm → its decisions."""
    decided = {arm.name: Choices() for arm in arms}
    for i, blocks in enumerate(moment.blocks):
        model, (x, y) = moment.models[i], moment.plain[i]
        memory = {name: flat[i] for name, flat in moment.trained.memory.items()}
        optimizer = plain_optimizer(moment.task.optimizer, model, memory)
        names = tuple(name for name, _ in sites_of(model))
        full = rehearsal[:, i], float(moment.task.after * len(names))
        asked = Asked(moment.seeds[i], names, optimizer, moment.task.batch, len(x), full)
        candidates = [cg.Candidate(*pair) for pair in zip(names, blocks, strict=True)]
        problems = {
            in_batches: cg.GrowthProblem(model, moment.task.loss_fn, data, candidates)
            for in_batches, data in ((False, [(x, y)]), (True, _loader(x, y, moment.task.batch)))
        }
        solved: dict[bool, dict[str, cg.Solution]] = {False: {}, True: {}}
        for arm in arms:
            in_batches = arm.in_batches
            site, decision = decide(arm, asked, problems[in_batches], solved[in_batches])
            mine = decided[arm.name]
            mine.sites.append(site)
            mine.passes.append(arm.passes + float(decision.evidence.get("passes", 0.0)))
            mine.blocks.append(_started(decision, asked.candidates, blocks))
        on_network()
    return decided


def decide(
    arm: Arm, asked: Asked, problem: cg.GrowthProblem, solved: dict[str, cg.Solution]
) -> tuple[int, cg.Decision]:
    """Ask the library for a decision; its site, −1 for nothing.

    What the norms of this problem gave is kept in `solved`, for other rules of sensitivities alone.
    """
    rule, name = arm.rule(asked), repr(arm.norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        if needs_model(rule):
            decision = cg.solve(problem, rule, norm=arm.norm).decision
        else:
            if name not in solved:
                solved[name] = cg.solve(problem, cg.Fixed(), norm=arm.norm, stationarity=False)
            decision = rule(solved[name].sensitivities)
    if len(decision.chosen) > 1:
        raise cg.RuleError(
            f'arm "{arm.name}" chose {decision.chosen}; the outcome of inserting several layers '
            "at once is not known here. Compose it with TopK(1): then(rule, TopK(1))."
        )
    return asked.candidates.index(decision.chosen[0]) if decision.chosen else -1, decision


def plain_optimizer(
    optimizer: Optimizer, model: nn.Module, memory: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """PyTorch's optimizer of a plain network, with its state in an ensemble as (parameters,)."""
    parameters = list(model.parameters())
    parts = {
        name: [
            part.reshape(p.shape).clone()
            for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        for name, flat in memory.items()
    }
    if isinstance(optimizer, SGD):
        made = torch.optim.SGD(parameters, optimizer.lr, optimizer.momentum)
        names = {"momentum_buffer": "momentum"}
    elif isinstance(optimizer, Adam):
        made = torch.optim.Adam(parameters, optimizer.lr, optimizer.betas, optimizer.eps)
        names = {"step": "steps", "exp_avg": "mean", "exp_avg_sq": "square"}
    else:
        raise cg.RuleError(f"optimizer={optimizer!r} has no plain form; give SGD or Adam.")
    for index, parameter in enumerate(parameters):
        state = {name: parts[ours][index] for name, ours in names.items() if ours in parts}
        if "step" in state:
            state["step"] = state["step"].flatten()[0]
        if state:
            made.state[parameter] = state
    return made


def trial_of(passes: float, asked: Asked) -> cg.rules.Trial:
    """The longest `Trial` that costs at most this many gradient passes, evaluations included."""
    share = asked.batch / asked.samples
    steps = 1
    while trial_passes(len(asked.candidates), steps + 1, share) <= passes:
        steps += 1
    return cg.rules.Trial(steps, asked.optimizer)


def trial_passes(sites: int, steps: int, share: float) -> float:
    """Cost of a successive halving by thirds with this many steps, inserting nothing among them.

    A batch holds a `share` of the data; the last batch counts as a whole one.
    """
    left, spent, done = [sites], 0.0, 0
    while left[-1] > 1:
        left.append(max(1, left[-1] // 3))
    lengths = sorted({max(1, round(steps / 3**k)) for k in range(len(left))})
    for count, length in zip(left, lengths, strict=False):
        spent += (count + 1) * ((length - done) * share + 1 / 3)  # a forward pass is a third
        done = length
    return spent


def rehearsed(asked: Asked) -> Rule:
    """One full training for each site, and the best of them."""
    if asked.full is None:
        raise cg.RuleError("no full training of each site is known of this network.")
    losses, passes = asked.full
    best, evidence = asked.candidates[int(losses.argmin())], {"passes": passes}
    return lambda _: cg.Decision((best,), "lowest final loss of one run", evidence=evidence)


def most_parameters(sensitivities: Mapping[str, cg.Sensitivity], /) -> cg.Decision:
    """The candidate with the most new parameters, the first of them on a tie."""
    best = max(sensitivities, key=lambda name: sensitivities[name].num_new_parameters)
    return cg.Decision((best,), "most parameters")


CONTROLS: tuple[Arm, ...] = (
    Arm("random", lambda asked: cg.Random(seed=asked.seed), passes=0.0),
    Arm("first site", lambda asked: cg.Fixed(0), passes=0.0),
    Arm("last site", lambda asked: cg.Fixed(-1), passes=0.0),
    Arm("most parameters", lambda asked: most_parameters, passes=0.0),
    Arm("nothing", lambda asked: cg.Fixed(), passes=0.0),
)
"""What a rule has to beat."""

SIZES: tuple[Arm, ...] = (
    Arm("Frobenius", lambda asked: cg.TopK(1), Frobenius()),
    Arm("entrywise 1", lambda asked: cg.TopK(1), Entrywise1()),
    Arm("nuclear", lambda asked: cg.TopK(1), Nuclear()),
    Arm("Kronecker-Fisher 0.1", lambda asked: cg.TopK(1), KroneckerFisher(0.1)),
    Arm("Kronecker-Fisher nuclear 0.1", lambda asked: cg.TopK(1), KroneckerFisher(0.1, ord="nuc")),
    Arm("Kronecker-Fisher nuclear 0.3", lambda asked: cg.TopK(1), recommended()),
)
"""The largest multiplier in one norm or another."""

ARMS: tuple[Arm, ...] = (
    *SIZES,
    Arm("trust region", lambda asked: cg.TrustRegion()),
    Arm(
        "rule_for(optimizer)",
        lambda asked: rule_for(asked.optimizer),
        recommended(),
        in_batches=True,
    ),
    Arm(
        "rule_for(optimizer, step=True)",
        lambda asked: rule_for(asked.optimizer, step=True),
        recommended(),
        in_batches=True,
    ),
    Arm("trial, 20 passes in all", lambda asked: trial_of(20.0, asked), in_batches=True),
    Arm("full training of each", rehearsed, passes=0.0),
    *CONTROLS,
)
"""All that is judged by default."""


def _loader(x: Tensor, y: Tensor, batch: int) -> DataLoader:
    """Batches in a new random order every time, each cut out of the tensors at once."""
    data = TensorDataset(x, y)
    batches = BatchSampler(RandomSampler(data), batch, drop_last=False)
    return DataLoader(data, sampler=batches, batch_size=None)


def _started(
    decision: cg.Decision, candidates: Sequence[str], blocks: Sequence[nn.Module]
) -> Sequence[nn.Module]:
    """The same layers, or with the chosen one moved from its pins as decided."""
    if not any(decision.values.values()):
        return blocks
    moved = list(blocks)
    for name, values in decision.values.items():
        index = candidates.index(name)
        moved[index] = copy.deepcopy(blocks[index])
        pins = pinned_parameters(moved[index])
        with torch.no_grad():
            for parameter, value in values.items():
                pins[parameter].add_(value)
    return moved
