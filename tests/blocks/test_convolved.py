"""Convolutions in single precision, whose patches are mostly not written out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth._multipliers.groups import gives_products
from constrained_growth.blocks import IdentityConv2d, ResidualConv2d
from constrained_growth.blocks.convolved import Convolved


def convolved(size: int, samples: int = 5) -> Convolved:
    images = torch.randn(samples, 8, 7, 9).transpose(2, 3)  # not contiguous
    psi = torch.randn(samples, 16, 9, 7)
    return Convolved("weight", None, psi.float(), images.float(), size)


def unfolded(factors: Convolved) -> Tensor:
    """(samples, positions, features), in double precision."""
    size = factors.size
    return nn.functional.unfold(factors.images.double(), size, padding=size // 2).mT


@pytest.mark.parametrize("size", [3, 5])
def test_products_are_those_with_patches(size: int) -> None:
    factors = convolved(size)
    assert gives_products(factors) == torch.backends.mkldnn.is_available()
    expected = factors.cotangent.double().flatten(2) @ unfolded(factors)
    found = torch.cat([*factors.products()])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_many_products_come_in_parts() -> None:
    factors = convolved(3, 1000)
    assert [len(some) for some in factors.products()] == [512, 488]


@pytest.mark.parametrize("columns", [None, torch.tensor([0, 3, 71, 40])])
@pytest.mark.parametrize("size", [1, 3, 11])
def test_rows_are_patches_at_some_positions(size: int, columns: Tensor | None) -> None:
    factors = convolved(size)
    columns = None if columns is None else columns % (8 * size**2)
    positions = torch.randint(63, (5, 4))
    expected = torch.stack([p[i] for p, i in zip(unfolded(factors), positions, strict=True)])
    expected = expected if columns is None else expected[..., columns]
    assert torch.equal(factors.rows(positions, columns).double(), expected)


@pytest.mark.parametrize("side", [5, 12], ids=["all rows", "some rows"])
@pytest.mark.parametrize("batch", [21, 10])
def test_single_precision_is_double_precision_but_for_rounding(side: int, batch: int) -> None:
    """There the patches are written out, and λ and its standard error compared with autograd's."""
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(21, 2, side + 2, side + 2), torch.randint(3, (21,))
    model(x)
    blocks = IdentityConv2d(8, nn.ReLU()), ResidualConv2d(8, nn.ReLU(), norm_layer=None)
    candidates = [cg.Candidate("1", block, name=f"{i}") for i, block in enumerate(blocks)]

    def solved(dtype: torch.dtype) -> Any:
        data = list(zip(x.to(dtype).split(batch), y.split(batch), strict=True))
        network = copy.deepcopy(model).to(dtype)
        return cg.solve(cg.GrowthProblem(network, nn.CrossEntropyLoss(), data, candidates))

    single, double = solved(torch.float32), solved(torch.float64)
    for name, expected in double.sensitivities.items():
        found = single.sensitivities[name]
        assert found.value == pytest.approx(expected.value, rel=1e-4)
        assert found.variance == pytest.approx(expected.variance, rel=1e-4)
        assert found.replicates == pytest.approx(expected.replicates, rel=1e-3)
        for key, value in double.multipliers[name].items():
            there = single.multipliers[name][key].double()
            torch.testing.assert_close(there, value, rtol=1e-4, atol=1e-6)
