"""Standard errors and agreement, against resamples of the data that are really solved."""

import copy
import gc
import math
import pickle
import statistics
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from helpers import CROSS_ENTROPY, Gain, candidate, classified, feedforward, label, solved
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.norms import (
    Entrywise1,
    Frobenius,
    KroneckerFisher,
    Nuclear,
    PerParameter,
    Spectral,
    needs_moments,
    recommended,
)

RESAMPLES = 150
Sample = tuple[Tensor, Tensor]


def largest(multiplier: Mapping[str, Tensor]) -> Tensor:
    """A norm of a user's own."""
    return torch.stack([tensor.abs().max() for tensor in multiplier.values()]).max()


NORMS: list[Any] = [
    recommended(),
    KroneckerFisher(),
    Frobenius(),
    PerParameter(),
    Entrywise1(),
    Spectral(),
    Nuclear(),
    largest,
]


class Every:
    """Several norms in one pass: the b-th call has the value of the b-th norm."""

    needs_moments: ClassVar[bool] = True

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def __call__(self, multiplier: Mapping[str, Tensor], moments: Mapping[str, Any]) -> float:
        self.values.append(
            [
                float(norm(multiplier, moments) if needs_moments(norm) else norm(multiplier))
                for norm in NORMS
            ]
        )
        return self.values[-1][0]


def untrained() -> tuple[nn.Module, Sample]:
    (pair,) = classified(300)
    return feedforward(2, 4, 4, 3), pair


def trained() -> tuple[nn.Module, Sample]:
    """On classes that can be learnt, and not to the end."""
    model, x = feedforward(2, 4, 4, 3), torch.randn(300, 2)
    y = (x[:, 0] > 0).long() + (x[:, 1] + 0.5 * torch.randn(300) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        CROSS_ENTROPY(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def of_positions() -> tuple[nn.Module, Sample]:
    """A sequence for each sample."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return model, (torch.randn(200, 3, 2), torch.randint(3, (200,)))


def batches_of(pair: Sample, batch: int) -> list[Any]:
    return list(zip(*(t.split(batch) for t in pair), strict=True))


class Drawn:
    """So many samples, drawn with replacement, each time others; in one batch."""

    def __init__(self, pair: Sample, size: int) -> None:
        self.pair, self.size, self.turn = pair, size, 0

    def draw(self) -> list[Any]:
        draw = torch.Generator().manual_seed(self.turn)
        drawn = torch.randint(len(self.pair[0]), (self.size,), generator=draw)
        return [tuple(t[drawn] for t in self.pair)]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter(self.draw())


class Chosen:
    """Some of the batches, each time others, so that one problem serves many samples."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.turn = batches, torch.arange(len(batches))

    def __len__(self) -> int:
        return len(self.turn)

    def __iter__(self) -> Any:
        return (self.batches[index] for index in self.turn)


def deviations(model: nn.Module, pair: Sample, one: cg.Candidate, **options: Any) -> list[float]:
    """Of each norm among resamples of the samples."""
    every, data = Every(), Drawn(pair, len(pair[0]))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one], **options)
    for data.turn in range(RESAMPLES):
        cg.solve(problem, norm=every, stationarity=False, progress=False)
    return [statistics.stdev(values) for values in zip(*every.values, strict=True)]


@pytest.mark.parametrize("network", [untrained, trained, of_positions])
def test_standard_errors_are_those_of_resamples(
    network: Callable[[], tuple[nn.Module, Sample]],
) -> None:
    """In one batch, and in several of which the last one is smaller."""
    model, pair = network()
    one = candidate("1")
    expected = deviations(model, pair, one)
    for norm, deviation in zip(NORMS, expected, strict=True):
        for batch in (len(pair[0]), 64):
            data = batches_of(pair, batch)
            found = solved(model, data, one, norm=norm, stationarity=False).sensitivities["1"]
            assert found.standard_error == pytest.approx(deviation, rel=0.25), (norm, batch)
            assert found.standard_error == statistics.stdev(found.replicates)


def test_standard_error_of_weighted_batches() -> None:
    """Batches of different weights, against resamples of whole batches."""
    model, pair, one = feedforward(2, 4, 3), classified(320)[0], candidate("1")
    data = Chosen(batches_of(pair, 8))

    def weight(input: Tensor, target: Tensor) -> float:
        return 1.0 + float(target[0])

    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one], weight=weight)

    def found() -> cg.Sensitivity:
        return cg.solve(problem, norm=Frobenius(), stationarity=False).sensitivities["1"]

    expected, values = found().standard_error, []
    for draw in torch.randint(len(data), (RESAMPLES, len(data))):
        data.turn = draw
        values.append(found().value)
    assert expected == pytest.approx(statistics.stdev(values), rel=0.25)


class InFront(nn.Module):
    """(samples, positions, width) as (positions, samples, width), or back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


@pytest.mark.parametrize("block", [cg.blocks.IdentityLinear(4, nn.ReLU()), Gain(4)], ids=label)
def test_standard_errors_where_samples_are_not_told_apart(block: nn.Module) -> None:
    """From the batches, or not known where there is only one."""
    model = nn.Sequential(
        nn.Linear(2, 4), InFront(), nn.ReLU(), InFront(), nn.Flatten(), nn.Linear(12, 3)
    )
    pair, one = (torch.randn(200, 3, 2), torch.randint(3, (200,))), cg.Candidate("2", block)
    alone = solved(model, [pair], one, norm=None).sensitivities["2"]
    assert math.isfinite(alone.value)
    assert alone.value > 0
    assert math.isnan(alone.variance)
    assert math.isnan(alone.standard_error)
    assert alone.replicates == ()
    data = Chosen(batches_of(pair, 5))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    expected, values = cg.solve(problem, stationarity=False).sensitivities["2"].standard_error, []
    for draw in torch.randint(len(data), (60, len(data))):
        data.turn = draw
        values.append(cg.solve(problem, stationarity=False).sensitivities["2"].value)
    assert expected == pytest.approx(statistics.stdev(values), rel=0.3)


def test_one_sample_has_no_standard_error() -> None:
    found = solved(feedforward(2, 4, 3), classified(1), candidate()).sensitivities["1"]
    assert found.replicates == ()
    assert math.isnan(found.standard_error)


# --- agreement ----------------------------------------------------------------------------------


def test_agreement_is_how_often_the_decision_comes_again() -> None:
    """Many samples of a population, and what each of them says of the others."""
    torch.manual_seed(8)
    model, (population,) = feedforward(2, 4, 4, 3), classified(4000)
    data = Drawn(population, 100)
    candidates = [candidate("1"), candidate("3")]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
    chosen, said = [], []
    for data.turn in range(60):
        solution = cg.solve(problem, stationarity=False, progress=False)
        chosen.append(solution.decision.chosen)
        if data.turn % 3 == 0:
            said.append(solution.agreement)
    often = max(chosen.count(names) for names in chosen) / len(chosen)
    assert 0.6 <= often <= 0.95
    assert statistics.mean(said) == pytest.approx(often, abs=0.15)


def test_agreement_of_rules_that_ask_more_is_not_known() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(50)
    one, other = candidate("1"), candidate("3")
    assert 0 < solved(model, data, one, other).agreement <= 1
    assert solved(model, data, one, other, rule=cg.Fixed("1")).agreement == 1
    assert math.isnan(solved(model, data, one, other, rule=cg.TrustRegion(0.1)).agreement)
    assert math.isnan(solved(model, classified(1), one, other).agreement)


# --- fields that are made when they are first read ----------------------------------------------


def test_solutions_are_copied_and_compared_and_pickled() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(50)
    made = [solved(model, data, candidate("1"), candidate("3")) for _ in range(3)]
    first, second, third = (solution.sensitivities["1"] for solution in made)
    second = pickle.loads(pickle.dumps(second))
    third = copy.deepcopy(third)
    assert first == second == third
    assert first.replicates == second.replicates == third.replicates
    assert (first.standard_error, len(first.replicates)) == (second.standard_error, 200)
    whole = pickle.loads(pickle.dumps(made[1]))
    assert whole.agreement == made[0].agreement == copy.deepcopy(made[2]).agreement
    assert "±" in repr(first)


def test_nothing_is_kept_alive_by_what_is_read_later() -> None:
    """No cycle: without a garbage collection all is gone with the solution."""
    model, data = feedforward(2, 4, 4, 3), classified(50)
    for read in (False, True):
        solution = solved(model, data, candidate("1"), candidate("3"))
        references = [weakref.ref(solution), weakref.ref(solution.sensitivities["1"])]
        references += [weakref.ref(t) for t in solution.multipliers["1"].values()]
        if read:
            assert solution.agreement > 0
        gc.disable()
        try:
            del solution
            assert [reference() for reference in references] == [None] * len(references)
        finally:
            gc.enable()
