"""The same samples in batches of another size."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from helpers import CROSS_ENTROPY, Gain, candidate, classified, feedforward, refused
from hypothesis import given
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import constrained_growth as cg


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), size=st.integers(1, 30))
def test_the_samples_stay_in_their_order(sizes: list[int], size: int) -> None:
    numbers = torch.arange(sum(sizes))
    data = [({"x": part.double(), "pair": (part, 2 * part)}, part) for part in numbers.split(sizes)]
    found = cg.rebatch(data, size)
    for _ in range(2):  # as often as the data can
        batches = list(found)
        lengths = [len(target) for _, target in batches]
        assert all(length == size for length in lengths[:-1])
        assert 0 < lengths[-1] <= size
        for input, target in batches:
            assert torch.equal(input["x"], target.double())
            assert torch.equal(input["pair"][1], 2 * target)
        assert torch.equal(torch.cat([target for _, target in batches]), numbers)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), size=st.integers(1, 20))
def test_a_solution_is_that_of_the_same_samples(sizes: list[int], size: int) -> None:
    model = feedforward(2, 4, 3, activation=nn.Tanh)
    x, y = classified(sum(sizes))[0]
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    pair = [
        cg.Candidate("1", cg.blocks.ResidualMLP(4, 3, torch.tanh)),
        cg.Candidate("1", Gain(4), name="own"),
    ]
    expected = cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, data, pair))
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, cg.rebatch(data, size), pair)
    found = cg.solve(problem)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert found.stationarity == pytest.approx(expected.stationarity, rel=1e-10)
    assert found.num_samples == expected.num_samples
    assert found.num_batches == -(-expected.num_samples // size)
    for name, multiplier in expected.multipliers.items():
        for key, value in multiplier.items():
            torch.testing.assert_close(found.multipliers[name][key], value)
    variance = expected.sensitivities["1"].variance
    assert found.sensitivities["1"].variance == pytest.approx(variance, rel=1e-9, nan_ok=True)


def test_a_loader_with_inputs_by_keyword() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = feedforward(2, 4, 3)

        def forward(self, *, points: Tensor) -> Tensor:
            return self.net(points)

    class Pairs:
        def __iter__(self) -> Iterator[Any]:
            x, y = classified(20)[0]
            return (({"points": a}, b) for a, b in DataLoader(TensorDataset(x, y), batch_size=6))

    problem = cg.GrowthProblem(
        Keywords(), CROSS_ENTROPY, cg.rebatch(Pairs(), 15), [candidate("net.1")]
    )
    found = cg.solve(problem)
    assert (found.num_samples, found.num_batches) == (20, 2)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3", None])
def test_sizes_that_make_no_sense(size: Any) -> None:
    with refused(cg.DataError, f"size={size!r}", "positive whole number"):
        cg.rebatch(classified(4), size)


class Labelled(NamedTuple):
    label: str


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([(torch.ones(2, 3), torch.ones(2)), (torch.ones(2, 4), torch.ones(2))], ["joined"]),
        (
            [({"a": torch.ones(2)}, torch.ones(2)), ({"b": torch.ones(2)}, torch.ones(2))],
            ["joined"],
        ),
        ([(torch.ones(2, 3), torch.ones(()))] * 2, ["batches"]),
        ([(torch.ones(2, 3), Labelled("x"))] * 2, ["batches"]),
        ([torch.ones(2, 3)], ["pair"]),
    ],
)
def test_batches_that_cannot_be_joined(batches: list[Any], words: list[str]) -> None:
    with refused(cg.DataError, *words):
        list(cg.rebatch(batches, 3))
