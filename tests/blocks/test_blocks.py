"""Layers that start as the identity."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Gain, label, refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import (
    HasFactors,
    IdentityLinear,
    ResidualLinear,
    ResidualMLP,
    TanhLU,
    has_factors,
    pinned_parameters,
)

RESIDUAL: dict[str, Callable[[int], nn.Module]] = {
    "one weight": lambda n: ResidualLinear(n, torch.tanh),
    "one weight, GELU": lambda n: ResidualLinear(n, nn.GELU()),
    "outer": lambda n: ResidualMLP(n, n + 2, nn.GELU()),
    "outer, ReLU": lambda n: ResidualMLP(n, 1, nn.ReLU, "outer"),
    "outer, sigmoid": lambda n: ResidualMLP(n, 3, nn.Sigmoid(), "outer", inner_init=0.8),
    "outer, sigmoid, nothing inside": lambda n: ResidualMLP(n, 3, nn.Sigmoid(), inner_init=0.0),
    "inner": lambda n: ResidualMLP(n, n + 1, nn.SiLU(), "inner"),
    "inner, 0.8": lambda n: ResidualMLP(n, n, torch.tanh, "inner", inner_init=0.8),
}
IDENTITY: dict[str, tuple[nn.Module, float | None]] = {
    "ReLU": (nn.ReLU(), None),
    "ReLU in place": (nn.ReLU(inplace=True), None),
    "Hardtanh": (nn.Hardtanh(), None),
    "TanhLU": (TanhLU(), None),
    "ELU": (nn.ELU(), 1.0),
}


def identity_block(kind: str, width: int) -> IdentityLinear:
    activation, shift = IDENTITY[kind]
    return IdentityLinear(width, activation, shift=shift)


def on_float64(block: nn.Module) -> Any:
    return block.double()


# --- the identity at the pins -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (4,), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("kind", RESIDUAL)
def test_residual_blocks_are_the_identity_to_the_last_bit(kind: str, shape: tuple) -> None:
    x = torch.randn(shape) * 10.0 ** torch.randint(-200, 200, shape)
    assert torch.equal(on_float64(RESIDUAL[kind](4))(x), x)


@pytest.mark.parametrize("kind", IDENTITY)
def test_identity_blocks_do_nothing_on_the_range_of_their_activation(kind: str) -> None:
    block = on_float64(identity_block(kind, 6))
    x = block.activation(3 * torch.randn(200, 6))  # type: ignore[operator]
    torch.testing.assert_close(block(x), x, rtol=1e-14, atol=1e-14)


def test_shift_of_tanhlu_is_found_and_of_elu_must_be_asked_for() -> None:
    assert IdentityLinear(3, TanhLU()).shift == 0.01
    assert IdentityLinear(3, nn.ELU(), shift=1.0).shift == 1.0
    assert IdentityLinear(3, TanhLU(), shift=0.02).shift == 0.02  # further along the straight part
    with refused(cg.BlockError, "activation=ELU", "shift=1.0", "ResidualMLP"):
        IdentityLinear(3, nn.ELU())


def test_any_idempotent_function_makes_an_identity_layer() -> None:
    block = IdentityLinear(3, lambda x: x.clamp(-2, 1), dtype=torch.float64)
    x = torch.randn(50, 3).clamp(-2, 1)
    assert torch.equal(block(x), x)


def test_shift_enters_the_bias_and_leaves_the_output() -> None:
    block = IdentityLinear(3, TanhLU())
    assert torch.equal(block.weight, torch.eye(3))
    assert block.bias.tolist() == [0.01] * 3
    x = torch.rand(4, 3)
    expected = TanhLU()(x @ block.weight.T + block.bias) - 0.01
    assert torch.equal(block(x), expected)


# --- closed forms -----------------------------------------------------------------------------


def autograd_of_the_block(block: nn.Module, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    pins = pinned_parameters(block)
    grads = torch.autograd.grad(block(x), list(pins.values()), delta)
    return {name: -grad for name, grad in zip(pins, grads, strict=True)}


def from_factors(block: HasFactors, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    found = {}
    for factor in block.factors(x, delta):
        psi, phi = factor.cotangent.flatten(0, -2), factor.features.flatten(0, -2)
        found[factor.weight] = -torch.einsum("ni,nj->ij", psi, phi)
        if factor.bias is not None:
            found[factor.bias] = -psi.sum(0)
    return found


@given(
    kind=st.sampled_from([*RESIDUAL, *IDENTITY]),
    width=st.integers(1, 6),
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_factors_are_the_gradient_of_the_block(
    kind: str, width: int, leading: list[int], seed: int
) -> None:
    torch.manual_seed(seed)
    block = on_float64(RESIDUAL[kind](width) if kind in RESIDUAL else identity_block(kind, width))
    assert has_factors(block)
    x, delta = torch.randn(*leading, width), torch.randn(*leading, width)
    if kind in IDENTITY:
        x = block.activation(x)  # type: ignore[operator]
    expected = autograd_of_the_block(block, x, delta)
    with torch.no_grad():
        found = from_factors(block, x, delta)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_closed_forms_of_the_paper() -> None:
    """Written out sample by sample, for one block of each kind."""
    x, delta = torch.randn(3, 2), torch.randn(3, 2)
    one = from_factors(ResidualLinear(2, torch.tanh), x, delta)
    expected = -sum(torch.outer(d, z) for d, z in zip(delta, x, strict=True))
    torch.testing.assert_close(one["weight"], expected)
    mlp = ResidualMLP(2, 4, torch.tanh)
    hidden = torch.tanh(x @ mlp.inner.weight.T + mlp.inner.bias)
    expected = -sum(torch.outer(d, h) for d, h in zip(delta, hidden, strict=True))
    torch.testing.assert_close(from_factors(mlp, x, delta)["outer.weight"], expected)
    z = x.relu()
    expected = -sum(torch.outer(d * (v > 0), v) for d, v in zip(delta, z, strict=True))
    found = from_factors(IdentityLinear(2, nn.ReLU()), z, delta)
    torch.testing.assert_close(found["weight"], expected)


# --- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "shapes", "pinned"),
    [
        (IdentityLinear(3, nn.ReLU()), {"weight": (3, 3), "bias": (3,)}, ["weight", "bias"]),
        (ResidualLinear(3, torch.tanh), {"weight": (3, 3), "bias": (3,)}, ["weight", "bias"]),
        (
            ResidualMLP(3, 5, nn.ReLU()),
            {"inner.weight": (5, 3), "inner.bias": (5,), "outer.weight": (3, 5)},
            ["outer.weight"],
        ),
        (
            ResidualMLP(3, 5, nn.Tanh(), "inner"),
            {"inner.weight": (5, 3), "inner.bias": (5,), "outer.weight": (3, 5)},
            ["inner.weight", "inner.bias"],
        ),
    ],
    ids=["identity", "one weight", "outer", "inner"],
)
def test_names_shapes_and_pins(block: nn.Module, shapes: dict, pinned: list[str]) -> None:
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == shapes
    assert list(pinned_parameters(block)) == pinned


@pytest.mark.parametrize(("pinned", "free"), [("outer", "inner"), ("inner", "outer")])
def test_inner_init_sets_the_free_factor(pinned: str, free: str) -> None:
    def free_factor(**options: object) -> nn.Linear:
        return getattr(ResidualMLP(3, 5, torch.tanh, pinned, **options), free)  # type: ignore[arg-type]

    shape = (5, 3) if free == "inner" else (3, 5)
    assert torch.equal(free_factor(inner_init=0.8).weight, 0.8 * torch.eye(*shape))
    value = torch.randn(shape, dtype=torch.float32)
    given = free_factor(inner_init=value)
    assert torch.equal(given.weight, value)
    assert given.weight is not value
    assert given.weight.dtype == torch.float32
    assert free_factor(inner_init=value, dtype=torch.float64).weight.dtype == torch.float64
    if free == "inner":
        assert given.bias.tolist() == [0.0] * 5
        assert free_factor(inner_init=0.8).bias.tolist() == [0.0] * 5
    torch.manual_seed(1)
    one = free_factor().weight
    assert (one != 0).all()
    assert not torch.equal(one, free_factor().weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_the_one_asked_for(dtype: torch.dtype) -> None:
    for block in (
        IdentityLinear(2, TanhLU(), dtype=dtype),
        ResidualLinear(2, torch.tanh, dtype=dtype),
        ResidualMLP(2, 3, torch.tanh, dtype=dtype),
    ):
        assert {p.dtype for p in block.parameters()} == {dtype}


@pytest.mark.parametrize("make", [IdentityLinear, lambda w, a: ResidualMLP(w, 2, a)])
def test_a_block_owns_its_activation(make: Callable[[int, nn.Module], nn.Module]) -> None:
    """Shared with the model, it would carry the model's hooks, modes and parameters."""
    activation = nn.ReLU()
    block = make(2, activation)
    assert activation not in set(block.modules())


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "activation",
    [nn.Tanh(), nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.ELU(), nn.LeakyReLU(), torch.tanh],
    ids=label,
)
def test_identity_layer_of_a_bent_activation_is_refused(activation: nn.Module) -> None:
    with refused(cg.BlockError, f"activation={activation!r}", "ResidualMLP(width, hidden"):
        IdentityLinear(4, activation)


def test_message_names_how_far_off_the_identity_is() -> None:
    with refused(cg.BlockError, "no shift s", "off by 0.99"):
        IdentityLinear(4, nn.LeakyReLU())
    with refused(cg.BlockError, "shift=0.5 does not"):
        IdentityLinear(4, nn.ELU(), shift=0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ResidualLinear(4, nn.ReLU()), ["ReLU()", "σ′(0) = 0", "exactly 0", "ResidualMLP"]),
        (
            lambda: ResidualMLP(4, 4, nn.ReLU(), "inner"),
            ["activation=ReLU()", "σ′(0) = 0", 'pinned="outer"'],
        ),
        (lambda: ResidualLinear(4, nn.Sigmoid()), ["Sigmoid()", "σ(0) = 0.5", "ResidualMLP"]),
        (lambda: ResidualMLP(4, 4, torch.cos, "inner"), ["σ(0) = 1", 'pinned="outer"']),
        (lambda: ResidualMLP(4, 4, torch.tanh, inner_init=0.0), ["inner_init", "zero"]),
        (
            lambda: ResidualMLP(4, 4, torch.tanh, inner_init=torch.zeros(4, 4)),
            ["inner_init", "zero"],
        ),
        (lambda: ResidualMLP(4, 4, torch.tanh, "inner", inner_init=0.0), ["inner_init", "zero"]),
    ],
)
def test_dead_or_moving_blocks_are_refused(make: Callable[[], object], words: list[str]) -> None:
    with refused(cg.BlockError, *words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IdentityLinear(0, nn.ReLU()), ["width=0", "positive whole number"]),
        (lambda: ResidualLinear(2.0, torch.tanh), ["width=2.0"]),  # type: ignore[arg-type]
        (lambda: ResidualMLP(2, -1, torch.tanh), ["hidden=-1"]),
        (lambda: ResidualMLP(2, True, torch.tanh), ["hidden=True"]),
        (lambda: ResidualMLP(2, 2, torch.tanh, "both"), ["pinned='both'", '"outer"', '"inner"']),  # type: ignore[arg-type]
        (
            lambda: ResidualMLP(2, 3, torch.tanh, inner_init=torch.ones(2, 3)),
            ["inner_init", "(2, 3)", "(3, 2)"],
        ),
        (
            lambda: ResidualMLP(2, 3, torch.tanh, inner_init="identity"),  # type: ignore[arg-type]
            ["inner_init='identity'", '"random"'],
        ),
        (lambda: ResidualMLP(2, 3, torch.tanh, inner_init=None), ["inner_init=None"]),  # type: ignore[arg-type]
        (lambda: ResidualMLP(2, 3, torch.tanh, inner_init=float("nan")), ["inner_init=nan"]),
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], object], words: list[str]) -> None:
    with refused(cg.BlockError, *words):
        make()


@pytest.mark.parametrize(
    ("pins", "words"),
    [
        (None, ["does not say which", "pinned"]),
        ((), ["does not say which"]),
        ("gain", ["pinned='gain'", "not a tuple"]),
        (("gain", "shift"), ["shift", "it has ('gain', 'scale')"]),
        (3, ["does not say which"]),
    ],
)
def test_pins_of_a_users_block_are_checked(pins: object, words: list[str]) -> None:
    block = Gain(3)
    assert list(pinned_parameters(block)) == ["gain", "scale"]
    block.pinned = pins  # type: ignore[assignment]
    with refused(cg.BlockError, *words):
        pinned_parameters(block)
