"""Convolutions that start as the identity."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    assert_multipliers,
    autograd_multipliers,
    choose,
    label,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import (
    IdentityConv2d,
    ResidualBottleneck2d,
    ResidualConv2d,
    TanhLU,
    has_factors,
    pinned_parameters,
)
from constrained_growth.blocks.convolved import patches_of

NORMED: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: ResidualConv2d(4, nn.ReLU()),
    "BatchNorm, 5 hidden, 1 × 1": lambda: ResidualConv2d(4, torch.tanh, 5, 1),
    "BatchNorm, last weight": lambda: ResidualConv2d(4, nn.GELU(), pinned="weight"),
    "GroupNorm": lambda: ResidualConv2d(
        4, nn.SiLU(), norm_layer=functools.partial(nn.GroupNorm, 2)
    ),
    "bottleneck": lambda: ResidualBottleneck2d(4, nn.ReLU, 3),
    "bottleneck, last weight": lambda: ResidualBottleneck2d(4, nn.ReLU(), pinned="weight"),
}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: ResidualConv2d(4, nn.ReLU(), norm_layer=None),
    "plain, 3 hidden, 5 × 5": lambda: ResidualConv2d(4, nn.Sigmoid(), 3, 5, norm_layer=None),
    "plain bottleneck": lambda: ResidualBottleneck2d(4, torch.tanh, 2, norm_layer=None),
}
IDENTITY: dict[str, tuple[nn.Module, int, float | None]] = {
    "ReLU": (nn.ReLU(), 3, None),
    "ReLU in place, 5 × 5": (nn.ReLU(inplace=True), 5, None),
    "Hardtanh, 1 × 1": (nn.Hardtanh(), 1, None),
    "TanhLU": (TanhLU(), 3, None),
    "ELU": (nn.ELU(), 3, 1.0),
}


def identity_block(kind: str) -> IdentityConv2d:
    activation, size, shift = IDENTITY[kind]
    return IdentityConv2d(4, activation, size, shift=shift)


RESIDUAL = NORMED | PLAIN
ALL = RESIDUAL | {f"identity, {kind}": functools.partial(identity_block, kind) for kind in IDENTITY}


def images(*, after: Callable[[], nn.Module] = nn.ReLU, training: bool = True) -> nn.Module:
    """A ConvNet whose submodule "1" gives 4 channels."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        after(),
        nn.Conv2d(4, 3, 2),
        nn.Flatten(),
        nn.Linear(36, 3),
    )
    return model.train(training)


def classified_images(*sizes: int, height: int = 4, width: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 2, height, width), torch.randint(3, (n,))) for n in sizes]


def activation_of(kind: str) -> Callable[[], nn.Module]:
    name = kind.removeprefix("identity, ")
    return (lambda: IDENTITY[name][0]) if name in IDENTITY else nn.Tanh


# --- the identity at the pins -------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", RESIDUAL)
def test_residual_convolutions_are_the_identity_to_the_last_bit(kind: str, training: bool) -> None:
    block = RESIDUAL[kind]().train(training)
    for size in (3, 8):  # also on other data than that whose statistics are in the buffers
        x = 100 * torch.randn(size, 4, 5, 6) - 30
        assert torch.equal(block(x), x)


@pytest.mark.parametrize("kind", IDENTITY)
def test_identity_convolutions_do_nothing_on_the_range_of_their_activation(kind: str) -> None:
    block = identity_block(kind)
    x = block.activation(3 * torch.randn(5, 4, 6, 7))
    torch.testing.assert_close(block(x), x, rtol=1e-14, atol=1e-14)


def test_an_identity_convolution_is_the_convolution_by_its_weight() -> None:
    block = IdentityConv2d(3, nn.ReLU())
    middle = torch.zeros(3, 3, 3, 3)
    for channel in range(3):
        middle[channel, channel, 1, 1] = 1
    assert torch.equal(block.weight, middle)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(2, 3, 5, 4)
    expected = nn.functional.conv2d(x, block.weight, block.bias, padding="same").relu()
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    assert list(block.state_dict()) == ["weight", "bias"]


def test_a_moved_residual_convolution_is_the_stack_it_says() -> None:
    block = ResidualBottleneck2d(4, nn.ReLU(), 3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter))
    convs, norms = block.convs, block.norms
    layers = [convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.ReLU(), convs[2], norms[2]]
    x = torch.randn(3, 4, 5, 5)
    expected = x + nn.Sequential(*layers)(x)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


# --- multipliers --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ALL)
def test_multipliers_are_the_gradient_with_the_block_in_the_model(
    kind: str, training: bool
) -> None:
    model = images(after=activation_of(kind), training=training)
    data = classified_images(5, 5, 3)
    one = cg.Candidate("1", ALL[kind]().train(training))
    with nothing_left_behind(model), nothing_left_behind(one.block):
        solution = solved(model, data, one)
    assert solution.sensitivities["1"].value > 1e-6
    assert_multipliers(solution, "1", autograd_multipliers(model, data, one))


CLOSED_FORM = [*PLAIN, *(kind for kind in ALL if kind.startswith("identity"))]


@pytest.mark.parametrize("kind", CLOSED_FORM)
def test_factors_of_large_images_come_in_parts(kind: str) -> None:
    """Their patches would fill the memory; the parts add up to the gradient of the block."""
    block: Any = ALL[kind]()
    x, delta = torch.randn(3, 4, 200, 120).relu(), torch.randn(3, 4, 200, 120)
    parts = list(block.factors(x, delta))
    assert (len(parts) > 1) == ("1 × 1" not in kind and "bottleneck" not in kind)
    pins = pinned_parameters(block)
    grads = dict(zip(pins, torch.autograd.grad(block(x), list(pins.values()), delta), strict=True))
    for name, grad in grads.items():
        found = [
            p.cotangent.sum((0, 1)) if name == p.bias else _product(p.cotangent, p.features)
            for p in parts
        ]
        total = torch.stack(found).sum(0).view_as(grad)
        torch.testing.assert_close(total, grad, rtol=1e-9, atol=1e-7)


def _product(psi: Tensor, phi: Tensor) -> Tensor:
    return torch.einsum("npi,npj->ij", psi, phi)


def standard_error(model: nn.Module, data: list[Any], one: cg.Candidate) -> float:
    """√tr Cov(λ) from the gradient of each sample."""
    rows = [
        torch.cat([t.flatten() for t in autograd_multipliers(model, [single], one).values()])
        for x, y in data
        for single in zip(x.split(1), y.split(1), strict=True)
    ]
    return (torch.stack(rows).var(0).sum() / len(rows)).sqrt().item()


@pytest.mark.parametrize("kind", CLOSED_FORM)
def test_standard_errors_are_those_of_single_samples(kind: str) -> None:
    model, data = images(after=activation_of(kind)), classified_images(6, 6)
    one = cg.Candidate("1", ALL[kind]())
    assert has_factors(one.block)
    solution = solved(model, data, one)
    assert_multipliers(solution, "1", autograd_multipliers(model, data, one))
    error = standard_error(model, data, one)
    assert solution.sensitivities["1"].variance ** 0.5 == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("kind", NORMED)
def test_with_normalisation_there_is_no_closed_form(kind: str) -> None:
    """BatchNorm mixes the samples of a batch, so a single sample has no multiplier."""
    assert not has_factors(NORMED[kind]())


def test_second_moments_of_patches() -> None:
    model, data = images(), classified_images(6, 6)
    one = cg.Candidate("1", IdentityConv2d(4, nn.ReLU()))
    solution = solved(model, data, one, norm=cg.norms.KroneckerFisher())
    assert solution.sensitivities["1"].value > 0


# --- insertion and records ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_inserted_recorded_and_replayed(kind: str) -> None:
    model, data = images(after=activation_of(kind)), classified_images(6)
    before = model(data[0][0])
    record = cg.insert(model, solved(model, data, cg.Candidate("1", ALL[kind]()), rule=choose("1")))
    torch.testing.assert_close(model(data[0][0]), before, rtol=0, atol=1e-13)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    record = cg.GrowthRecord.from_json(record.to_json())
    again = cg.replay(images(after=activation_of(kind)), record)
    again.load_state_dict(model.state_dict())
    for training in (True, False):
        x = torch.randn(5, 2, 4, 5)
        assert torch.equal(again.train(training)(x), model.train(training)(x))
    assert repr(again) == repr(model)


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "pinned", "shapes"),
    [
        (
            ResidualConv2d(4, nn.ReLU(), 3),
            ("norms.1.weight", "norms.1.bias"),
            {"convs.0.weight": (3, 4, 3, 3), "convs.1.weight": (4, 3, 3, 3)}
            | {"norms.0.weight": (3,), "norms.0.bias": (3,)}
            | {"norms.1.weight": (4,), "norms.1.bias": (4,)},
        ),
        (
            ResidualConv2d(4, nn.ReLU(), 3, pinned="weight"),
            ("convs.1.weight", "convs.1.bias"),
            {"convs.0.weight": (3, 4, 3, 3), "norms.0.weight": (3,), "norms.0.bias": (3,)}
            | {"convs.1.weight": (4, 3, 3, 3), "convs.1.bias": (4,)},
        ),
        (
            ResidualConv2d(4, nn.ReLU(), kernel_size=1, norm_layer=None),
            ("convs.1.weight", "convs.1.bias"),
            {"convs.0.weight": (4, 4, 1, 1), "convs.0.bias": (4,)}
            | {"convs.1.weight": (4, 4, 1, 1), "convs.1.bias": (4,)},
        ),
        (
            ResidualBottleneck2d(8, nn.ReLU(), norm_layer=None),
            ("convs.2.weight", "convs.2.bias"),
            {"convs.0.weight": (2, 8, 1, 1), "convs.0.bias": (2,)}
            | {"convs.1.weight": (2, 2, 3, 3), "convs.1.bias": (2,)}
            | {"convs.2.weight": (8, 2, 1, 1), "convs.2.bias": (8,)},
        ),
        (
            IdentityConv2d(3, nn.ReLU(), 5),
            ("weight", "bias"),
            {"weight": (3, 3, 5, 5), "bias": (3,)},
        ),
    ],
    ids=["gamma", "weight", "plain", "bottleneck", "identity"],
)
def test_names_shapes_and_pins(block: nn.Module, pinned: tuple[str, ...], shapes: dict) -> None:
    assert {name: tuple(p.shape) for name, p in block.named_parameters()} == shapes
    assert tuple(pinned_parameters(block)) == pinned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [ResidualConv2d, ResidualBottleneck2d, IdentityConv2d], ids=label)
def test_dtype_is_the_one_asked_for(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    block = make(4, nn.ReLU(), dtype=dtype)
    assert {p.dtype for p in block.parameters()} == {dtype}
    x = torch.randn(2, 4, 5, 5, dtype=dtype).relu()
    assert torch.equal(block(x), x)
    meta = make(4, nn.ReLU(), device="meta")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IdentityConv2d(4, nn.GELU()), ["GELU", "ResidualConv2d(channels", "norm_layer"]),
        (lambda: IdentityConv2d(4, nn.ReLU(), 4), ["kernel_size=4", "5"]),
        (lambda: IdentityConv2d(0, nn.ReLU()), ["channels=0"]),
        (lambda: ResidualConv2d(4, nn.ReLU(), kernel_size=2), ["kernel_size=2", "odd", "3"]),
        (lambda: ResidualConv2d(4, nn.ReLU(), 0), ["hidden=0"]),
        (lambda: ResidualConv2d(4.0, nn.ReLU()), ["channels=4.0"]),  # type: ignore[arg-type]
        (
            lambda: ResidualConv2d(4, nn.ReLU(), pinned="beta"),  # type: ignore[arg-type]
            ["pinned='beta'", '"gamma"', '"weight"'],
        ),
        (
            lambda: ResidualConv2d(4, nn.ReLU(), norm_layer=None, pinned="gamma"),
            ['pinned="gamma"', 'pinned="weight"'],
        ),
        (
            lambda: ResidualConv2d(4, nn.ReLU(), norm_layer=nn.InstanceNorm2d),
            ["InstanceNorm2d", "no `weight`", "nn.BatchNorm2d"],
        ),
        (
            lambda: ResidualConv2d(4, nn.ReLU(), norm_layer="batch"),  # type: ignore[arg-type]
            ["norm_layer='batch'", "nn.BatchNorm2d"],
        ),
        (lambda: ResidualBottleneck2d(4, nn.Softmax(-1)), ["Softmax", "elementwise"]),
    ],
)
def test_invalid_arguments_are_refused(make: Callable[[], object], words: list[str]) -> None:
    with refused(cg.BlockError, *words):
        make()


@pytest.mark.parametrize(
    "block", [ResidualConv2d(5, nn.ReLU()), IdentityConv2d(5, nn.ReLU())], ids=label
)
def test_a_site_of_other_channels_is_refused(block: nn.Module) -> None:
    with refused(cg.BlockError, "(samples, 5, height, width)", "(6, 4, 4, 5)"):
        solved(images(), classified_images(6), cg.Candidate("1", block))


@pytest.mark.parametrize("block", [ResidualConv2d(4, nn.ReLU()), IdentityConv2d(4, nn.ReLU())])
def test_a_tensor_that_is_no_batch_of_images_is_refused(block: nn.Module) -> None:
    """Of three dimensions it would be taken for one image, with the samples for channels."""
    with refused(cg.BlockError, "(samples, 4, height, width)", "(4, 4, 5)"):
        block(torch.rand(4, 4, 5))


def test_an_identity_convolution_after_another_activation_is_refused() -> None:
    model, one = images(after=nn.Tanh), cg.Candidate("1", IdentityConv2d(4, nn.ReLU()))
    data = classified_images(6)
    with nothing_left_behind(model), refused(cg.BlockError, "not the identity at its pins"):
        solved(model, data, one)


class Pyramid(nn.Module):
    """One convolution, used on an image and on a smaller one."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = self.features(x), self.features(x[..., ::2, ::2])
        return self.head(both[0].mean((2, 3)) + both[1].amax((2, 3)))


@pytest.mark.parametrize("height", [4, 180], ids=["at once", "in parts"])
@pytest.mark.parametrize("kind", ["identity, ReLU", "plain, 3 hidden, 5 × 5", "BatchNorm"])
def test_a_site_used_at_two_sizes(kind: str, height: int) -> None:
    """Where the patches of large images come in other parts at each use."""
    model, data = Pyramid(), classified_images(3, 3, height=height, width=100)
    one = cg.Candidate("features", ALL[kind]())
    solution = solved(model, data, one)
    assert_multipliers(solution, "features", autograd_multipliers(model, data, one))
    if has_factors(one.block):
        error = standard_error(model, data, one)
        found = solution.sensitivities["features"].variance ** 0.5
        assert found == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 2)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_patches_are_those_of_unfold(kernel, padding, dilation, stride):
    images = torch.randn(2, 3, 9, 8).transpose(2, 3)  # not contiguous
    expected = nn.functional.unfold(images, kernel, dilation, padding, stride)
    assert torch.equal(patches_of(images, kernel, dilation, padding, stride), expected)
