"""How much of the data a decision needs, and how often it is that on all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from tqdm import tqdm

import constrained_growth as cg
from constrained_growth.experiments.data import Split, digits, mnist1d, two_spirals
from constrained_growth.experiments.demo import LOSS, network, proposals

RATE, MOMENTUM, TRAINING_BATCH = 0.05, 0.9, 64
AGREEMENT, MEDIAN, CLEAR = 0.95, 0.2, 0.9
"""The targets: how often to agree, and what part to read where second/first is below `CLEAR`."""

RULES: dict[str, cg.DecisionRule] = {
    "largest": cg.TopK(1),
    "above the mean gradient": cg.Threshold(relative=1.0, max_insertions=1),
}


@dataclass(frozen=True)
class Case:
    """A network in training, to be asked where a layer would help.

    Attributes:
        name: Of the data set.
        data: Makes it.
        hidden: Widths of the hidden ReLU layers; the candidates are those of `proposals`.
        steps: How many steps of SGD it was trained.
        batch: Samples in a batch that is read to decide.
    """

    name: str
    data: Callable[[], Split]
    hidden: tuple[int, ...]
    steps: int
    batch: int


def _spirals() -> Split:
    return two_spirals(points_per_class=10_000)


def _mnist1d() -> Split:
    return mnist1d(num_samples=20_000)


CASES = (
    Case("digits", digits, (16, 16, 16), 50, 4),
    Case("digits", digits, (16, 16, 16), 200, 4),
    Case("spirals", _spirals, (8, 8, 8), 20, 16),
    Case("spirals", _spirals, (8, 8, 8), 100, 16),
    Case("mnist1d", _mnist1d, (32, 32, 32), 250, 16),
    Case("mnist1d", _mnist1d, (32, 32, 32), 1000, 16),
)


@dataclass(frozen=True)
class Reading:
    """How one rule fared on one case.

    Attributes:
        data: Name of the data set.
        steps: Of training.
        rule: Its name in `RULES`.
        samples: In the whole data.
        loss: On the whole data, in nats.
        sensitivities: On the whole data, largest first.
        chosen: On the whole data.
        seeds: How many random orders were tried.
        agreed: In how many the decision was the same.
        fractions: What part was read in each.
    """

    data: str
    steps: int
    rule: str
    samples: int
    loss: float
    sensitivities: tuple[float, ...]
    chosen: tuple[str, ...]
    seeds: int
    agreed: int
    fractions: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The second largest sensitivity over the largest."""
        return self.sensitivities[1] / self.sensitivities[0]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of the parts that were read."""
        low, median, high = np.quantile(self.fractions, [0.25, 0.5, 0.75]).tolist()
        return low, median, high

    @property
    def agrees(self) -> bool:
        """Whether the decision was that on all data often enough."""
        return self.agreed >= AGREEMENT * self.seeds

    @property
    def is_short(self) -> bool | None:
        """Whether little was read; None where nobody asked for it: the first two are close."""
        if self.rule != "largest" or self.ratio > CLEAR:
            return None
        return self.quartiles[1] < MEDIAN


@dataclass(frozen=True)
class SamplingBenchmark:
    """All readings; `to_json` writes them."""

    confidence: float
    readings: tuple[Reading, ...]

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self), indent=2)


def run_sampling(
    seeds: int = 100, *, cases: Sequence[Case] = CASES, confidence: float = 0.95, seed: int = 0
) -> SamplingBenchmark:
    """Decide on all data once, then by adaptive sampling from many random orders.

    Args:
        seeds: How many orders; each also deals the samples into batches anew.
        cases: Which networks.
        confidence: Of `AdaptiveSampling`.
        seed: Of the initial weights, the candidates' free weights and the training.

    Returns:
        The result. It depends on the arguments alone; the caller's random state is left alone.
    """
    readings = []
    for case in tqdm(cases, desc="networks", leave=False, disable=None):
        split = case.data()
        model, candidates = _trained(case, split, seed)
        x, y = split.x_train, split.y_train
        for name, rule in RULES.items():
            ask = partial(_asked, model, candidates, rule, stationarity=name != "largest")
            whole = ask([(x, y)])
            orders = tqdm(range(seeds), desc=name, leave=False, disable=None)
            parts = [
                ask(_dealt(x, y, case.batch, order), cg.AdaptiveSampling(confidence, seed=order))
                for order in orders
            ]
            values = sorted((s.value for s in whole.sensitivities.values()), reverse=True)
            readings.append(
                Reading(
                    data=case.name,
                    steps=case.steps,
                    rule=name,
                    samples=len(x),
                    loss=whole.loss,
                    sensitivities=tuple(values),
                    chosen=whole.decision.chosen,
                    seeds=seeds,
                    agreed=sum(p.decision.chosen == whole.decision.chosen for p in parts),
                    fractions=tuple(part.data_fraction or 0.0 for part in parts),
                )
            )
    return SamplingBenchmark(confidence, tuple(readings))


def _trained(case: Case, split: Split, seed: int) -> tuple[nn.Sequential, tuple[cg.Candidate, ...]]:
    widths, dtype = (split.num_features, *case.hidden, split.num_classes), split.x_train.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(widths, he_init=True, dtype=dtype)
        candidates = proposals(case.hidden, dtype=dtype)
        drawn = torch.randint(len(split.x_train), (case.steps, TRAINING_BATCH))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for index in drawn:
        optimizer.zero_grad()
        LOSS(model(split.x_train[index]), split.y_train[index]).backward()
        optimizer.step()
    return model, candidates


def _asked(
    model: nn.Module,
    candidates: Sequence[cg.Candidate],
    rule: cg.DecisionRule,
    data: list[tuple[Tensor, Tensor]],
    sampling: cg.AdaptiveSampling | None = None,
    *,
    stationarity: bool,
) -> cg.Solution:
    problem = cg.GrowthProblem(model, LOSS, data, candidates)
    return cg.solve(problem, rule, stationarity=stationarity, sampling=sampling)


def _dealt(x: Tensor, y: Tensor, batch: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[index], y[index]) for index in order.split(batch)]


def table(found: SamplingBenchmark) -> RenderableType:
    """The readings and the targets, as a reader on a terminal sees them."""
    seeds = found.readings[0].seeds
    columns = ("data", "samples", "steps", "rule", "2nd/1st", "agreed", "read: median (quartiles)")
    shown = Table(*columns, title=f"confidence {found.confidence}, {seeds} random orders")
    for r in found.readings:
        low, median, high = r.quartiles
        part = f"{median:.0%} ({low:.0%}, {high:.0%})"
        agreed = f"{r.agreed}/{r.seeds}"
        shown.add_row(r.data, f"{r.samples}", f"{r.steps}", r.rule, f"{r.ratio:.2f}", agreed, part)
    clear = [r for r in found.readings if r.is_short is not None]
    missed = [f"{r.data}, {r.steps} steps" for r in clear if not r.is_short]
    return Group(
        shown,
        Text(
            f"Agreement ≥ {AGREEMENT:.0%}: met in {sum(r.agrees for r in found.readings)} of "
            f"{len(found.readings)} rows.\nMedian < {MEDIAN:.0%} for the largest where 2nd/1st ≤ "
            f"{CLEAR}: met in {len(clear) - len(missed)} of {len(clear)} rows"
            + (f"; missed in {'; '.join(missed)}." if missed else ".")
        ),
    )
