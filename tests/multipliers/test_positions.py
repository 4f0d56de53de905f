"""Second moments where samples have many positions, and the loss may reach few of them."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import CROSS_ENTROPY
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import AffineFactors
from constrained_growth.norms import SecondMoments, recommended

WIDTH, POSITIONS, SAMPLES = 10, 16, 512


class Recurrent(nn.Module):
    """A GRU behind a layer; the loss reads one position of its output, or the mean of all."""

    def __init__(self, read: Callable[[Tensor], Tensor], *, sequence_first: bool) -> None:
        super().__init__()
        self.front, self.site = nn.Linear(6, WIDTH), nn.Tanh()
        self.run, self.head = nn.GRU(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.read, self.sequence_first = read, sequence_first

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_first:
            y, _ = self.run(self.site(self.front(x.transpose(0, 1))))
        else:
            y, _ = self.run(self.site(self.front(x)).transpose(0, 1))
        return self.head(self.read(y))


def exact_value(
    model: nn.Module, site: str, block: Any, data: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """The recommended norm of λ, with all rows of φ and ψ of all samples."""
    factors, seen = list[AffineFactors](), list[Tensor]()
    hook = model.get_submodule(site).register_forward_hook(lambda *given: seen.append(given[2]))
    for x, y in data:
        loss = CROSS_ENTROPY(model(x), y) * len(x)
        x = seen.pop()
        (delta,) = torch.autograd.grad(loss, x)
        factors += block.factors(x.detach(), delta)
    hook.remove()
    samples, factor = sum(len(x) for x, _ in data), factors[0]
    features = torch.cat([one.features.flatten(0, -2) for one in factors])
    cotangents = torch.cat([one.cotangent.flatten(0, -2) for one in factors])
    moments = SecondMoments(
        features.T @ features / len(features),
        cotangents.T @ cotangents / samples,
        factor.bias,
        same_units=factor.same_units,
        mean=features.mean(0),
    )
    weight = (-cotangents.T @ features / samples).view_as(block.get_parameter(factor.weight))
    multiplier = {factor.weight: weight}
    if factor.bias is not None:
        multiplier[factor.bias] = -cotangents.sum(0) / samples
    return float(recommended()(multiplier, {factor.weight: moments}).detach())


READS = {
    "first": lambda y: y[0],
    "middle": lambda y: y[7],
    "last": lambda y: y[-1],
    "mean": lambda y: y.mean(0),
}


@pytest.mark.parametrize("batch", [8, 16, 64, 512])
@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("read", READS)
def test_values_are_those_of_all_positions(read: str, sequence_first: bool, batch: int) -> None:
    model = Recurrent(READS[read], sequence_first=sequence_first)
    x, y = torch.randn(SAMPLES, POSITIONS, 6), torch.randint(3, (SAMPLES,))
    data = list(zip(x.split(batch), y.split(batch), strict=True))
    block = cg.blocks.ResidualMLP(WIDTH, 6, torch.tanh)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("site", block)])
    (sensitivity,) = cg.solve(problem).sensitivities.values()
    assert sensitivity.value == pytest.approx(exact_value(model, "site", block, data), rel=0.08)


class Pixel(nn.Module):
    """One pixel of an image; without one, the mean."""

    def __init__(self, place: tuple[int, int] | None) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if self.place is None else x[:, :, self.place[0], self.place[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # products, and patches
@pytest.mark.parametrize("place", [(0, 0), (6, 6), None])
def test_values_are_those_of_all_pixels(place: tuple[int, int] | None, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    read = Pixel(place), nn.Linear(8, 3)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), *read)
    data = [(torch.randn(64, 1, 13, 13), torch.randint(3, (64,))) for _ in range(8)]
    block = cg.blocks.IdentityConv2d(8, nn.ReLU())
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("1", block)])
    (sensitivity,) = cg.solve(problem).sensitivities.values()
    assert sensitivity.value == pytest.approx(exact_value(model, "1", block, data), rel=0.08)


class Turned(nn.Module):
    """A residual layer that has the sequence in front inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.outer = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        h, _ = self.attention(h, h, h, need_weights=False)
        return x + self.outer(h).transpose(0, 1)


class First(nn.Module):
    """Reads the first position."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def test_as_many_positions_as_samples_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(6, 8), Turned(), Turned(), First(), nn.Linear(8, 3))
    x, y = torch.randn(10, 5, 6), torch.randint(3, (10,))
    found = []
    for batch in (5, 10):
        data = list(zip(x.split(batch), y.split(batch), strict=True))
        some = cg.find_candidates(model, data[0][0])
        problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, some)
        found.append(cg.solve(problem).sensitivities)
    for name, one in found[0].items():
        assert one.variance == pytest.approx(found[1][name].variance)
        assert one.value == pytest.approx(found[1][name].value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_cotangents_in_half_precision(dtype: torch.dtype) -> None:
    """Their squares are below what half precision holds."""
    torch.set_default_dtype(torch.float32)
    model = Recurrent(READS["last"], sequence_first=False)
    x, y = torch.randn(SAMPLES, POSITIONS, 6), torch.randint(3, (SAMPLES,))
    block = cg.blocks.ResidualMLP(WIDTH, 6, torch.tanh)

    def value(kind: torch.dtype) -> float:
        own, layer = copy.deepcopy(model).to(kind), copy.deepcopy(block).to(kind)
        data = [(one.to(kind), two) for one, two in zip(x.split(64), y.split(64), strict=True)]

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return 1e-2 * CROSS_ENTROPY(output, target)

        problem = cg.GrowthProblem(own, loss, data, [cg.Candidate("site", layer)])
        return cg.solve(problem).sensitivities["site"].value

    assert value(dtype) == pytest.approx(value(torch.float32), rel=0.1)
