"""What blocks find out about an activation by calling it."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import label, refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP, TanhLU


def half_idempotent(x: Tensor) -> Tensor:
    """A user's own idempotent function."""
    return x.clamp(-1, 1)


def straight_from_three(x: Tensor) -> Tensor:
    """Range [2, ∞), straight from 3 on: the shift has to be 1."""
    return torch.where(x >= 3, x, 2 + (x.clamp(min=1, max=3) - 1) ** 2 / 4)


IDEMPOTENT = [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Identity(), torch.relu, half_idempotent]
BENT = [nn.Tanh(), nn.Sigmoid(), nn.LeakyReLU(), nn.LeakyReLU(0.5), nn.PReLU(), torch.sin]


def refusal(activation: Any) -> str:
    with pytest.raises(cg.BlockError) as caught:
        IdentityLinear(1, activation)
    return str(caught.value)


def proposed_shift(activation: Any) -> float:
    """The shift that is taken, or proposed because it is too large to take unasked."""
    try:
        return IdentityLinear(1, activation).shift
    except cg.BlockError as error:
        found = re.search(r"pass shift=(\S+) if", str(error))
        return float(found.group(1)) if found else float("nan")


# --- the shift of an identity layer -------------------------------------------------------------


@pytest.mark.parametrize("activation", IDEMPOTENT, ids=label)
def test_idempotent_functions_need_no_shift(activation: nn.Module) -> None:
    assert IdentityLinear(1, activation).shift == 0.0


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Softplus(), nn.Mish()], ids=label)
def test_shift_of_smooth_functions_lies_where_they_are_straight_to_rounding(
    activation: nn.Module,
) -> None:
    shift = proposed_shift(activation)
    assert shift > 5
    block = IdentityLinear(1, activation, shift=shift)
    x = activation(torch.linspace(-40, 40, 10_001))[:, None]
    torch.testing.assert_close(block(x), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", BENT, ids=label)
def test_other_functions_have_no_shift(activation: nn.Module) -> None:
    assert "no shift s" in refusal(activation)


@pytest.mark.parametrize(
    ("activation", "shift"),
    [
        (TanhLU(), 0.01),
        (TanhLU(0.05), 0.05),
        (TanhLU(0.3), 0.3),
        (TanhLU(1.0), 1.0),
        (straight_from_three, 1.0),
        (nn.ELU(), 1.0),
        (nn.ELU(alpha=1.0, inplace=True), 1.0),
    ],
    ids=label,
)
def test_shift_is_found_exactly(activation: nn.Module, shift: float) -> None:
    assert proposed_shift(activation) == shift


@pytest.mark.parametrize(
    ("activation", "error"),
    [
        (nn.Tanh(), lambda y: (torch.tanh(y) - y).abs()),
        (nn.LeakyReLU(0.01), lambda y: (0.01 * y - y).abs() * (y < 0)),
    ],
    ids=label,
)
def test_a_refusal_says_how_far_off_the_identity_is(activation: nn.Module, error: Any) -> None:
    y = activation(torch.linspace(-64e4, 64e4, 200_001))
    expected = (error(y) / y.abs().clamp(min=1)).max().item()
    assert f"at s = 0 it is off by {expected:.2g})" in refusal(activation)


# --- TanhLU ---------------------------------------------------------------------------------------


@given(st.floats(-50, 50), st.floats(0.001, 2.0))
def test_tanhlu_is_its_formula_and_smooth(x: float, eps: float) -> None:
    point = torch.tensor(x, requires_grad=True)
    value = TanhLU(eps)(point)
    expected = x if x >= eps else eps * (torch.tanh(torch.tensor((x - eps) / eps)) + 1).item()
    assert value.item() == expected
    (slope,) = torch.autograd.grad(value, point)
    below = 1 - torch.tanh(torch.tensor((x - eps) / eps)).item() ** 2
    assert slope.item() == pytest.approx(1.0 if x >= eps else below, abs=1e-12)


def test_tanhlu_keeps_gradients_finite_far_below() -> None:
    x = torch.tensor([-1e300, -1e3, 1e300], requires_grad=True)
    (slope,) = torch.autograd.grad(TanhLU()(x).sum(), x)
    assert slope.tolist() == [0.0, 0.0, 1.0]


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "slope"),
    [(nn.Tanh(), 1.0), (nn.GELU(), 0.5), (nn.SiLU(), 0.5), (torch.sin, 1.0), (nn.ELU(), 1.0)],
    ids=label,
)
def test_slope_at_zero(activation: nn.Module, slope: float) -> None:
    (factor,) = ResidualLinear(1, activation).factors(torch.randn(2, 1), torch.ones(2, 1))
    assert factor.cotangent.flatten().tolist() == pytest.approx([slope] * 2, abs=1e-15)


@pytest.mark.parametrize(
    ("activation", "words"),
    [(nn.ReLU(), "σ′(0) = 0"), (nn.Sigmoid(), "σ(0) = 0.5"), (torch.cos, "σ(0) = 1")],
    ids=label,
)
def test_value_and_slope_at_zero_that_do_not_fit(activation: nn.Module, words: str) -> None:
    with refused(cg.BlockError, words):
        ResidualLinear(1, activation)


@pytest.mark.parametrize("activation", [nn.ReLU(), torch.relu, F.relu, nn.ReLU(inplace=True)])
def test_the_short_cut_for_relu_is_autograd(activation: nn.Module) -> None:
    x, delta = torch.randn(5, 7), torch.randn(5, 7)
    x[0, 0] = 0.0
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.clamp_min(leaf, 0), leaf, delta)
    expected[0, 0] = 0.0  # autograd's convention for ReLU at its kink
    before = x.clone()
    (factor,) = IdentityLinear(7, activation).factors(x, delta)
    assert torch.equal(factor.cotangent, expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", [TanhLU(1.0), nn.ELU(inplace=True), straight_from_three])
def test_derivative_is_that_of_finite_differences(activation: nn.Module) -> None:
    x, delta, h = torch.randn(50, 1), torch.randn(50, 1), 1e-6
    expected = delta * (activation(x + 1 + h) - activation(x + 1 - h)) / (2 * h)
    with torch.no_grad():
        (factor,) = IdentityLinear(1, activation, shift=1.0).factors(x, delta)
    torch.testing.assert_close(factor.cotangent, expected, rtol=0, atol=1e-8)
    assert not factor.cotangent.requires_grad


# --- what is no activation, and no traces -------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "words"),
    [
        ("relu", ["activation='relu'", "cannot be called", "nn.ReLU()"]),
        (None, ["activation=None", "cannot be called"]),
        (lambda x: x.sum(), ["not elementwise"]),
        (lambda x: None, ["not elementwise"]),
        (lambda x: x @ x, ["fails on a float64 tensor"]),
    ],
)
def test_what_is_no_activation_is_refused(activation: Any, words: list[str]) -> None:
    with refused(cg.BlockError, *words):
        ResidualMLP(2, 2, activation)


def test_looking_at_an_activation_leaves_no_trace() -> None:
    activation = nn.PReLU(dtype=torch.float32)
    weight = activation.weight
    state = torch.get_rng_state()
    ResidualLinear(2, activation)
    refusal(activation)
    assert activation.weight is weight
    assert weight.dtype == torch.float32
    assert weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shift", [math.nan, math.inf, -math.inf])
def test_a_shift_is_a_finite_number(shift: float) -> None:
    with refused(cg.BlockError, f"shift={shift:g}", "not a number"):
        IdentityLinear(2, nn.ReLU(), shift=shift)
