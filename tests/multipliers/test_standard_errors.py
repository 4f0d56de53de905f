"""Standard errors and agreement, against resamples of the data that are really solved."""

import copy
import gc
import math
import pickle
import statistics
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import CROSS_ENTROPY, Gain, candidate, classified, feedforward, solved
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.norms import (
    CanonicalCorrelations,
    Entrywise1,
    Frobenius,
    KroneckerFisher,
    Nuclear,
    PerParameter,
    Spectral,
)

RESAMPLES = 150
Sample = tuple[Tensor, Tensor]


def largest(multiplier: Mapping[str, Tensor]) -> Tensor:
    """A norm of a user's own."""
    return torch.stack([tensor.abs().max() for tensor in multiplier.values()]).max()


NORMS: list[Any] = [
    CanonicalCorrelations(),
    KroneckerFisher(),
    KroneckerFisher(ord="nuc"),
    Frobenius(),
    PerParameter(),
    Entrywise1(),
    Spectral(),
    Nuclear(),
    largest,
]


class Every:
    """Several norms in one pass: the b-th call has the value of the b-th norm."""

    needs_moments = True

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def __call__(self, multiplier: Mapping[str, Tensor], moments: Mapping[str, Any]) -> float:
        self.values.append(
            [
                float(norm(multiplier, moments) if hasattr(norm, "needs_moments") else norm(multiplier))
                for norm in NORMS
            ]
        )
        return self.values[-1][0]


def untrained() -> tuple[nn.Module, Sample]:
    (pair,) = classified(300)
    return feedforward(2, 4, 4, 3), pair


def trained() -> tuple[nn.Module, Sample]:
    """On classes that can be learnt, and not to the end."""
    model, x = feedforward(2, 4, 4, 3, activation=nn.Tanh), torch.randn(300, 2)
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


def deviations(model: nn.Module, pair: Sample, one: cg.Candidate, **options: Any) -> list[float]:
    """Of each norm among resamples of the samples."""
    every = Every()
    for _ in range(RESAMPLES):
        drawn = torch.randint(len(pair[0]), (len(pair[0]),))
        data = [tuple(t[drawn] for t in pair)]
        problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one], **options)
        cg.solve(problem, norm=every, stationarity=False)
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
            found = solved(model, batches_of(pair, batch), one, norm=norm).sensitivities["1"]
            assert found.standard_error == pytest.approx(deviation, rel=0.25), (norm, batch)
            assert found.standard_error == statistics.stdev(found.replicates)
