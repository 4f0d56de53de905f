"""The arms: rules, each with a norm and a cost, and what they decide about the networks of a task.

Another arm is one more line: `Arm("name", lambda asked: cg.TopK(1), cg.norms.Nuclear())`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import constrained_growth as cg
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
