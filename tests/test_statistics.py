"""Debiased squares, standard errors and intervals: exact, by enumeration and by simulation."""

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Gain,
    autograd_multipliers,
    candidate,
    classified,
    feedforward,
    refused,
    solved,
    squared_norm,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import AffineFactors
from constrained_growth.norms import (
    Entrywise1,
    Frobenius,
    KroneckerFisher,
    Norm,
    Nuclear,
    PerParameter,
    Spectral,
    lipschitz,
)
from constrained_growth.statistics import interval

SIMPLE = [Frobenius(), PerParameter(), Entrywise1(), Spectral(), Nuclear()]


def allowed(probability: float, trials: int) -> float:
    """The largest share of failures that `probability` explains, at 4 standard deviations."""
    return probability + 4 * math.sqrt(probability * (1 - probability) / trials)


def named(vector: Tensor) -> dict[str, Tensor]:
    """The first twelve numbers as a weight, the others as a bias."""
    return {"weight": vector[:12].view(3, 4), "bias": vector[12:]}


# --- the scale of the standard error ------------------------------------------------------------


@given(st.integers(0, 2**16), st.sampled_from(SIMPLE))
def test_a_norm_is_at_most_so_many_times_the_frobenius_norm(seed: int, norm: Norm) -> None:
    torch.manual_seed(seed)
    multiplier = named(torch.randn(15).double() ** 3)
    bound = lipschitz(norm, multiplier) * math.sqrt(squared_norm(multiplier.values()))
    assert float(norm(multiplier)) <= bound * (1 + 1e-12)


FLAT = named(torch.ones(15, dtype=torch.float64))
ROUND = {
    "weight": torch.eye(3, 4, dtype=torch.float64),
    "bias": torch.tensor([0.6, 0.8, 0.0]).double(),
}
SINGLE = {"weight": FLAT["weight"], "bias": 0 * FLAT["bias"]}


@pytest.mark.parametrize(
    ("norm", "multiplier"),
    [
        (Frobenius(), FLAT),
        (PerParameter(), FLAT),
        (Entrywise1(), FLAT),
        (Spectral(), SINGLE),
        (Nuclear(), ROUND),
    ],
)
def test_and_there_is_a_multiplier_for_which_it_is(
    norm: Norm, multiplier: Mapping[str, Tensor]
) -> None:
    bound = lipschitz(norm, multiplier) * math.sqrt(squared_norm(multiplier.values()))
    assert float(norm(multiplier)) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("norm", SIMPLE)
def test_error_bound_is_on_the_scale_of_the_norm(norm: Norm) -> None:
    model, data = feedforward(2, 4, 3), classified(30, batch=8)
    plain = solved(model, data, candidate()).sensitivities["1"]
    found = solved(model, data, candidate(), norm=norm)
    scaled = found.sensitivities["1"]
    factor = lipschitz(norm, found.multipliers["1"])
    assert scaled.error_bound == pytest.approx(factor * plain.error_bound, rel=1e-12)
    assert scaled.variance == plain.variance == pytest.approx(plain.error_bound**2)
    assert scaled.debiased_square == pytest.approx(plain.value**2 - plain.variance)


@pytest.mark.parametrize("norm", [KroneckerFisher(), lambda m: float(m["weight"].abs().max())])
def test_interval_of_a_norm_of_unknown_scale_rests_on_the_standard_error(norm: Norm) -> None:
    found = solved(feedforward(2, 4, 3), classified(30), candidate(), norm=norm)
    sensitivity = found.sensitivities["1"]
    assert math.isnan(sensitivity.error_bound)
    half = 1.959964 * sensitivity.standard_error
    expected = max(0.0, sensitivity.value - half), sensitivity.value + half
    assert interval(sensitivity) == pytest.approx(expected, rel=1e-6)
    assert sensitivity.variance > 0


def test_interval_is_everything_where_nothing_is_known() -> None:
    assert interval(cg.Sensitivity(1.0)) == (0.0, math.inf)


def test_error_bound_of_a_function_of_ones_own_is_of_first_order() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    plain = solved(model, data, candidate()).sensitivities["1"]
    squared = solved(model, data, candidate(), norm=lambda m: m["weight"].square().sum())
    slope = 2 * float(squared.multipliers["1"]["weight"].norm())  # of ‖λ_W‖²
    error = squared.sensitivities["1"].error_bound
    assert error == pytest.approx(slope * plain.error_bound, rel=1e-12)


def test_a_norm_of_ones_own_may_know_its_scale() -> None:
    class Largest:
        def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([tensor.abs().max() for tensor in multiplier.values()]).max()

        def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
            return 1.0

    model, data = feedforward(2, 4, 3), classified(30)
    plain, own = (
        solved(model, data, candidate(), norm=norm).sensitivities["1"]
        for norm in (Frobenius(), Largest())
    )
    assert own.error_bound == plain.error_bound


# --- standard errors of a convolution -----------------------------------------------------------


class Convolution(nn.Module):
    """x + conv(x) with the kernel pinned at 0: a pinned affine map of unfolded patches."""

    pinned = ("weight", "bias")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels * 9))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.conv2d(x, self.weight.view(-1, x.shape[1], 3, 3), self.bias, padding=1)

    def factors(self, x: Tensor, delta: Tensor) -> list[AffineFactors]:
        patches = F.unfold(x, 3, padding=1).mT  # (samples, positions, channels · 9)
        return [AffineFactors("weight", "bias", delta.flatten(2).mT, patches)]


@pytest.mark.parametrize("side", [2, 5])
@pytest.mark.parametrize("batch", [13, 4])
def test_standard_error_of_a_convolution_is_that_of_the_samples(side: int, batch: int) -> None:
    """With fewer and with more positions than make the Gram matrices worth while."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(13, 1, side, side), torch.randint(3, (13,))
    model(x)
    one = cg.Candidate("1", Convolution(2))
    solution = solved(model, list(zip(x.split(batch), y.split(batch), strict=True)), one)
    samples = torch.stack(
        [
            torch.cat([v.flatten() for v in autograd_multipliers(model, [pair], one).values()])
            for pair in zip(x.split(1), y.split(1), strict=True)
        ]
    )
    found = solution.sensitivities["1"]
    assert found.value == pytest.approx(samples.mean(0).norm().item(), rel=1e-9)
    assert found.variance == pytest.approx(samples.var(0).sum().item() / 13, rel=1e-9)


# --- the debiased square ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
def test_debiased_square_is_unbiased(size: int) -> None:
    """Over all subsets of the data of one size it is, on average, that of all data."""
    model, ((x, y),) = feedforward(2, 4, 3), classified(6)
    whole = solved(model, [(x, y)], candidate()).sensitivities["1"]
    parts = [
        solved(model, [(x[list(some)], y[list(some)])], candidate()).sensitivities["1"]
        for some in itertools.combinations(range(6), size)
    ]
    mean = sum(part.debiased_square for part in parts) / len(parts)
    assert mean == pytest.approx(whole.debiased_square, rel=1e-9)
    biased = sum(part.value**2 for part in parts) / len(parts)
    assert biased - whole.value**2 == pytest.approx((6 / size - 1) * whole.variance, rel=1e-9)


def test_debiased_square_is_unknown_where_the_variance_is() -> None:
    found = solved(feedforward(2, 4, 3), classified(20), candidate(block=Gain(4)))
    sensitivity = found.sensitivities["1"]
    assert math.isnan(sensitivity.debiased_square)


# --- coverage of the interval from tr Cov --------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("length", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("directions", [1, 3, 60])
def test_interval_covers_whatever_the_covariance(
    directions: int, length: float, confidence: float
) -> None:
    """λ̂ ~ N(λ, C) with tr C = 1 spread over some directions, λ along the first."""
    trials = 2000
    noise = torch.randn(trials, directions) / math.sqrt(directions)
    noise[:, 0] += length
    misses = 0
    for value in noise.norm(dim=1).tolist():
        found = cg.Sensitivity(value, 1.0, variance=1.0, debiased_square=value**2 - 1)
        low, high = interval(found, confidence)
        misses += not low <= length <= high
    assert misses / trials <= allowed(1 - confidence, trials)
    if directions == 1 and length == 10:  # nothing given away there
        assert misses / trials == pytest.approx(1 - confidence, abs=allowed(0.05, trials) - 0.05)


def test_interval_covers_on_a_network() -> None:
    """Samples drawn with replacement from a population whose λ is known."""
    model, trials = feedforward(2, 4, 3), 80
    (x, y), *_ = classified(500)
    truth = solved(model, [(x, y)], candidate()).sensitivities["1"].value
    misses = 0
    for _ in range(trials):
        drawn = torch.randint(500, (60,))
        found = solved(model, [(x[drawn], y[drawn])], candidate(), stationarity=False)
        low, high = interval(found.sensitivities["1"])
        misses += not low <= truth <= high
    assert misses / trials <= allowed(0.05, trials)


@pytest.mark.parametrize("confidence", [0.5, 1.0, math.nan, -1.0])
def test_confidence_out_of_range(confidence: float) -> None:
    with refused(cg.RuleError, f"confidence={confidence}", "[0.79, 1)"):
        interval(cg.Sensitivity(1.0, 0.1), confidence)
