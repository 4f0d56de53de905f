"""Reading no more data than a decision needs.

The multipliers of the batches are exchangeable when these come in random order, so what was read
says how far the sensitivities on all data may be (`statistics.SquaredSizes`), and the decision is
settled once nothing within that reach would change it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from constrained_growth._multipliers.one_pass import Measurement, MultiplierPass
from constrained_growth.errors import RuleError
from constrained_growth.solution import Decision, Sensitivity
from constrained_growth.statistics import SquaredSizes, slope_of_square, square_on_all

Function = Callable[[Mapping[str, Tensor]], Tensor | float]


@dataclass(frozen=True)
class AdaptiveSampling:
    """Read batches in random order until the rule's decision is settled; at most all of them.

    After 10, 15, 23, 35, … batches (each `growth` times the one before) it is computed how far
    the sensitivities *on all data* may be from those of what was read. The decision is settled
    when the rule decides alike in the worst cases: for each chosen candidate and each that is
    not, with what speaks most against the one and for the other; and for each candidate against
    a bar. The looks share the probability 1 − confidence of being wrong (`spent`), and so do the
    comparisons of a look.

    That is sound for rules that compare sensitivities with each other (also per cost) or with a
    bar, such as `TopK` and `Threshold`. For others it is a check in many likely places. A rule
    has to be pure, since it is asked often: 16 times for each comparison. What it reads besides
    `value` and `baseline` (such as `standard_error`) is that of the part that was read.

    A list of batches is read in a random permutation. A DataLoader has to shuffle; anything else
    that can be iterated is taken to be in random order. Batches may be as they like inside: the
    limits come from the differences between them, so that small batches settle a decision with
    less data. Without a length (`len(data)`) the data are taken to be endless, which is
    cautious.

    Beside the sums of the pass, two more tensors of the size of the multiplier are kept for each
    candidate (and, with the stationarity, of the size of the gradient).

    Attributes:
        confidence: With at least this probability the decision is that on all data. This takes
            means over batches for normal, which holds better for many batches than for few, and
            worse where few samples have most of the gradient.
        growth: How much further to read until the next look.
        seed: Of the permutation.

    Raises:
        RuleError: Confidence or growth is out of range.

    Source:
        Wald, *Sequential Analysis*, 1947; optional stopping with a spent error: Lan and DeMets,
        *Discrete sequential boundaries for clinical trials*, Biometrika 70, 1983; choosing while
        reading: Maron and Moore, *Hoeffding races*, 1993.
    """

    confidence: float = 0.95
    growth: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise RuleError(
                f"confidence={self.confidence!r} of AdaptiveSampling must lie between 0 and 1, "
                "such as 0.95."
            )
        if not 1 < self.growth < math.inf:
            raise RuleError(
                f"growth={self.growth!r} of AdaptiveSampling must be above 1, such as 1.5."
            )

    def looks(self) -> Iterator[int]:
        """After how many batches to look.

        Example:
            >>> list(itertools.islice(AdaptiveSampling().looks(), 6))
            [10, 15, 23, 35, 53, 80]
        """
        count = 10
        while True:
            yield count
            count = math.ceil(self.growth * count)

    def spent(self, look: int, fraction: float | None) -> float:
        """With what probability one of the first looks may be wrong.

        (1 − confidence) √f once the fraction f of the data has been read; where that is not known
        (1 − confidence) k/(k + 1) after k looks.

        Args:
            look: k = 1, 2, ….
            fraction: f, or None.
        """
        share = look / (look + 1) if fraction is None else math.sqrt(fraction)
        return (1 - self.confidence) * share


@dataclass(frozen=True)
class Reach:
    """How far the sensitivities on all data may be from those of what was read.

    Attributes:
        sizes: Of the candidates' sensitivities, then of the baseline if there is one.
        names: The candidates.
        has_baseline: Whether there is.
        level: How often a decision that is called settled may be wrong.
        fraction: Share of the batches that was read, or None if it is not known.
    """

    sizes: SquaredSizes
    names: tuple[str, ...]
    has_baseline: bool
    level: float
    fraction: float | None

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Candidate → limits of its sensitivity on all data, which hold for all together."""
        level = self.level / (2 * len(self.names))
        return {name: self.sizes.limits(i, level) for i, name in enumerate(self.names)}

    def scenarios(
        self, sensitivities: Mapping[str, Sensitivity], chosen: Collection[str]
    ) -> Iterator[Mapping[str, Sensitivity]]:
        """The sensitivities as they might be on all data, to the disadvantage of a decision.

        Far off is each candidate that was chosen together with each that was not, and each alone
        or, if there is a baseline, with it. That many comparisons share the level.

        Args:
            sensitivities: Of what was read.
            chosen: The decision.
        """
        place = {name: index for index, name in enumerate(self.names)}
        others = sorted(
            (n for n in place if n not in chosen), key=lambda n: -sensitivities[n].value
        )
        comparisons = [(place[a], place[b]) for a, b in itertools.product(chosen, others)]
        bar = (len(place),) if self.has_baseline else ()
        comparisons += [(index, *bar) for index in place.values()]
        for indices in comparisons:
            for sizes in self.sizes.extremes(indices, self.level / len(comparisons)).tolist():
                yield {
                    name: replace(
                        s, value=sizes[place[name]], baseline=sizes[-1] if bar else s.baseline
                    )
                    for name, s in sensitivities.items()
                }


def is_settled(
    decide: Callable[[Mapping[str, Sensitivity]], Decision],
    sensitivities: Mapping[str, Sensitivity],
    reach: Reach,
) -> bool:
    """Whether the rule chooses the same candidates in all scenarios.

    Args:
        decide: The rule.
        sensitivities: As estimated.
        reach: How far they may be from those on all data.
    """
    chosen = set(decide(sensitivities).chosen)
    return all(
        set(decide(scenario).chosen) == chosen
        for scenario in reach.scenarios(sensitivities, [n for n in sensitivities if n in chosen])
    )


def read_until(
    running: MultiplierPass,
    pairs: Iterable[tuple[Any, Any]],
    sampling: AdaptiveSampling,
    norm: Function,
    baseline: Function | None,
    enough: Callable[[Measurement, Reach], bool],
    total: int | None,
) -> tuple[Measurement, Reach | None]:
    """Read batches into a pass until it is enough.

    Args:
        running: The pass, which is watching.
        pairs: `(input, target)` in random order, on the device.
        sampling: When to look, and how sure to be.
        norm: Of the multipliers; differentiable by autograd.
        baseline: The same of the gradients, or None for no baseline.
        enough: Asked at each look.
        total: How many batches there are, or None.

    Returns:
        What was measured, and how far from it all data may be: None when all of them were read.

    Raises:
        RuleError: The norm cannot be differentiated.
    """
    watch = _Watch(running, norm, baseline)
    stops = itertools.chain(_WARM_UP, sampling.looks())
    last, stop, look, spent = 0, next(stops), 1 - len(_WARM_UP), 0.0
    for count, pair in enumerate(pairs, start=1):
        running.add(*pair)
        if (count - last) % math.ceil((stop - last) / _UNITS) == 0 or count == stop:
            watch.note()
        if count < stop or count == total:
            continue
        if look >= 1:
            fraction = None if total is None else count / total
            before, spent = spent, sampling.spent(look, fraction)
            found, reach = running.measurement(), watch.reach(spent - before, fraction)
            if reach is not None and enough(found, reach):
                return found, reach
        watch.turn()
        last, stop, look = count, next(stops), look + 1
    return running.measurement(), None


_WARM_UP = (2, 4, 6)
"""After so many batches there is a direction to watch, and too little was seen to look."""

_UNITS = 64
"""At most so many units are told apart between two looks."""


class _Watch:
    """Follows norms of means by projections on their slopes, turned at each look."""

    def __init__(self, running: MultiplierPass, norm: Function, baseline: Function | None) -> None:
        self._running = running
        self._names = tuple(running.totals()[0])
        self._has_baseline = baseline is not None
        self._functions = [norm] * len(self._names) + ([] if baseline is None else [baseline])
        self._first: list[dict[str, Tensor]] = []
        self._num_first = 0
        self._slopes: list[dict[str, Tensor]] = []
        self._before: Tensor | None = None
        self._samples = 0
        self._projections: list[list[Tensor]] = []
        self._sizes: list[list[int]] = []

    def turn(self) -> None:
        """From here on, project on the slopes at the means so far."""
        self._num_first = self._samples = self._running.num_samples
        self._first = [_scaled(total, 1 / self._samples) for total in self._totals()]
        pairs = zip(self._functions, self._first, strict=True)
        self._slopes = [slope_of_square(function, mean) for function, mean in pairs]
        self._before = self._projected()
        self._projections = [*self._projections[1 - _GROUPS :], []]
        self._sizes = [*self._sizes[1 - _GROUPS :], []]

    def note(self) -> None:
        """A unit has come in: what was read since the last one."""
        if self._before is None:
            return
        size = self._running.num_samples - self._samples
        self._samples += size
        now = self._projected()
        self._projections[-1].append((now - self._before) / size)
        self._sizes[-1].append(size)
        self._before = now

    def reach(self, level: float, fraction: float | None) -> Reach | None:
        """How far all data may be from what was noted; None before that can be said."""
        n, first = self._samples, self._num_first
        second, share = n - first, fraction or 0.0
        values = []
        for function, before, total in zip(
            self._functions, self._first, self._totals(), strict=True
        ):
            whole = _scaled(total, 1 / n)
            after = {name: (total[name] - first * before[name]) / second for name in total}
            squares = [float(function(mean)) ** 2 for mean in (whole, before, after)]
            values.append(square_on_all(*squares, sizes=(first, second), fraction=share))
        q = [torch.stack(group).cpu().numpy() for group in self._projections]
        unseen = [v != 0 and not any(g[:, i].any() for g in q) for i, v in enumerate(values)]
        of_mean = max(0.0, (1 / first + 1 / second) / 4 - share / n)
        units = [np.array(group, dtype=float) for group in self._sizes]
        sizes = SquaredSizes.of(values, q, units, of_mean)
        if any(unseen) or sizes.degrees < _MIN_DEGREES or not np.isfinite(sizes.covariance).all():
            return None
        return Reach(sizes, self._names, self._has_baseline, level, fraction)

    def _totals(self) -> list[Mapping[str, Tensor]]:
        totals, gradients = self._running.totals()
        return [*(totals[name] for name in self._names), *[gradients] * self._has_baseline]

    def _projected(self) -> Tensor:
        """⟨slope, sum so far⟩ of all, in float64 and on the device of the first."""
        products = []
        for slope, total in zip(self._slopes, self._totals(), strict=True):
            parts = [torch.sum(slope[k] * total[k], dtype=torch.float64) for k in slope]
            products.append(torch.stack(parts).sum())
        return torch.stack([product.to(products[0].device) for product in products])


_GROUPS = 2
"""Projections on the slopes of so many looks are kept; older slopes are too noisy."""

_MIN_DEGREES = 4
"""With fewer degrees of freedom nothing is said."""


def _scaled(total: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: value * factor for name, value in total.items()}
