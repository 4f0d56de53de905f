"""The demonstration: a trained network meets other images, and is asked where a layer would help.

A small residual network has learnt digits. Then the images change, say bright becomes dark, and few
of them are at hand, so that of the old weights only those of the last layer train on. A layer is
inserted where the default decision says, and for comparison at every other place and nowhere. The
network is asked about images as it knows them too, where no layer is needed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth._later import with_fields
from constrained_growth.blocks import ResidualConv2d
from constrained_growth.errors import DataError
from constrained_growth.experiments.data import digits
from constrained_growth.experiments.jobs import in_parallel
from constrained_growth.experiments.training import (
    Data,
    Training,
    frozen_part,
    learn,
    mean_loss,
    passed_through,
)

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda images: -images,
    "rotated": lambda images: images.rot90(1, (1, 2)),
    "mirrored": lambda images: images.flip(2),
}
"""What happens to images (samples, 8, 8), whose mean is 0."""

KEPT = "no layer"

Numbers = dict[str, Any]
"""What `--json` writes."""


@dataclass(frozen=True)
class Setting:
    """The network, and how long it trains on the digits and on what they become, with Adam.

    In the last third of all steps the learning rate falls linearly to zero.
    """

    channels: int = 8
    blocks: int = 4
    batch: int = 64
    learning_rate: float = 0.005
    steps_before: int = 250
    steps_after: int = 100
    every: int = 10
    """Steps between two measurements of the loss on test images."""


def run_demo(
    change: str = "inverted",
    seed: int = 0,
    runs: int = 10,
    *,
    setting: Setting | None = None,
    workers: int = 2,
) -> Numbers:
    """Show several networks, from seeds `seed`, `seed` + 1, …, what the images became.

    Returns:
        Under "runs", for every seed the table of places, the decision, and losses on test images,
        in nats: of each way to go on after 0, `every`, 2 `every`, … steps, and those of the same
        network that goes on with images as it knows them. Under "median" which of the runs to show:
        the one whose gain by the layer is the median, of two the lower.

    Raises:
        DataError: There is no change of that name.
    """
    if change not in CHANGES:
        raise DataError(f"change={change!r} is none of {', '.join(CHANGES)}.")
    setting = setting or Setting()
    jobs = [(change, one, setting) for one in range(seed, seed + runs)]
    found = in_parallel(_run, jobs, workers, desc="networks", unit="network")
    order = sorted(range(runs), key=lambda index: gain(found[index]))
    return {
        "change": change,
        "setting": asdict(setting),
        "runs": found,
        "median": order[(runs - 1) // 2],
    }


def gain(run: Numbers) -> float:
    """By how much the decision lowered the loss on test images, in nats, compared with no layer."""
    at_end = {name: losses[-1] for name, losses in run["losses"].items()}
    return at_end[KEPT] - at_end[run["chosen"] or KEPT]


def _run(change: str, seed: int, setting: Setting) -> Numbers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        split = digits(seed, dtype=torch.get_default_dtype())
        known, fresh = len(split.x_train) // 2, len(split.x_train) * 5 // 6
        learnt, asked, judging = (
            (split.x_train[part], split.y_train[part])
            for part in (slice(known), slice(known, fresh), slice(fresh, None))
        )
        test = split.x_test, split.y_test
        model = network(setting)
        _train(model, learnt, setting, setting.steps_before, seed)
        model.requires_grad_(False)
        model[-1].requires_grad_(True)
        candidates = proposals(model, setting)
        again = _grow(model, candidates, asked, judging, test, setting, seed)
        x_asked, x_judging, x_test = (
            CHANGES[change](x.unflatten(1, (8, 8))).flatten(1)
            for x in (asked[0], judging[0], test[0])
        )
        others = (x_asked, asked[1]), (x_judging, judging[1]), (x_test, test[1])
        found = _grow(model, candidates, *others, setting, seed, everywhere=True)
        accuracy = (model(test[0]).argmax(1) == test[1]).double().mean().item()
        return {"seed": seed, "accuracy": accuracy, **found, "known_images": again}


def network(setting: Setting) -> nn.Sequential:
    """Residual convolutions between a stem and a linear layer."""
    width = setting.channels
    body = [_block(setting) for _ in range(setting.blocks)]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU()),
        *body,
        nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(4 * width, 10),
    )


def proposals(model: nn.Sequential, setting: Setting) -> list[cg.Candidate]:
    """One more residual block after the stem and after every block."""
    sites = range(1, len(model) - 2)
    return [
        cg.Candidate(str(site), _block(setting), name=f"after block {k}" if k else "after the stem")
        for k, site in enumerate(sites)
    ]


def _block(setting: Setting) -> ResidualConv2d:
    block = ResidualConv2d(setting.channels, nn.ReLU, norm_layer=None)
    nn.init.kaiming_normal_(block.get_parameter("convs.0.weight"), nonlinearity="relu")
    return block


def _grow(
    model: nn.Sequential,
    candidates: list[cg.Candidate],
    data: Data,
    judging: Data,
    test: Data,
    setting: Setting,
    seed: int,
    *,
    everywhere: bool = False,
) -> Numbers:
    """Ask where a layer would help, and really insert it at the first place or at every one."""
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), [data], candidates)
    solution = cg.solve(problem, validation=[judging])
    sizes = {name: s.value for name, s in solution.sensitivities.items()}
    best = max(sizes, key=sizes.__getitem__)
    losses: dict[str, list[float]] = {}
    for name in (KEPT, *(sizes if everywhere else [best])):
        grown = copy.deepcopy(model)
        if name != KEPT:
            cg.insert(grown, with_fields(solution, decision=cg.Decision((name,), "to compare")))
        losses[name] = _train(grown, data, setting, setting.steps_after, seed, test)
    held_out = solution.sensitivities[best].held_out
    assert held_out is not None
    found = {
        "chosen": next(iter(solution.decision.chosen), None),
        "best": best,
        "reason": solution.decision.reason,
        "pvalue": held_out.pvalue,
        "effect_size": held_out.effect_size,
        "losses": losses,
    }
    if everywhere:
        found["places"] = [
            {
                "name": name,
                "sensitivity": s.value,
                "standard_error": s.standard_error,
                "site": s.site,
                "added": s.num_new_parameters,
            }
            for name, s in solution.sensitivities.items()
        ]
        found["agreement"] = cg.statistics.agreement(solution.sensitivities, cg.TopK(1))
    return found


def _train(
    model: nn.Sequential,
    data: Data,
    setting: Setting,
    steps: int,
    seed: int,
    test: Data | None = None,
) -> list[float]:
    """Losses on the test images after 0, `every`, … steps of what requires gradients."""
    frozen, model = frozen_part(model)
    data, test = passed_through(frozen, data), test and passed_through(frozen, test)
    losses, step = [], itertools.count()

    def measure() -> None:
        if test is not None and next(step) % setting.every == 0:
            losses.append(mean_loss(model, *test))

    measure()
    training = Training(steps, setting.batch, setting.learning_rate)
    learn(model, data, training, seed, measure, lambda done: min(1.0, 3 * (steps - done) / steps))
    return losses
