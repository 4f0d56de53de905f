"""Conformance checks: every defect is found in a block made to have it, and no other block."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Gain, label, nothing_left_behind, refused
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth import blocks
from constrained_growth.blocks import AffineFactors, TanhLU
from constrained_growth.testing import check_block

VECTORS, SEQUENCES, IMAGES = (5, 4), (3, 6, 4), (3, 4, 5, 5)

OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "identity": (lambda: blocks.IdentityLinear(4, nn.ReLU()), VECTORS),
    "identity, shifted": (lambda: blocks.IdentityLinear(4, TanhLU()), SEQUENCES),
    "one weight": (lambda: blocks.ResidualLinear(4, torch.tanh), VECTORS),
    "outer": (lambda: blocks.ResidualMLP(4, 3, nn.GELU()), SEQUENCES),
    "inner": (lambda: blocks.ResidualMLP(4, 3, nn.SiLU(), "inner"), VECTORS),
    "outer, PReLU": (lambda: blocks.ResidualMLP(4, 3, nn.PReLU()), VECTORS),
    "convolution": (lambda: blocks.ResidualConv2d(4, nn.ReLU()), IMAGES),
    "convolution, weight": (lambda: blocks.ResidualConv2d(4, nn.ReLU(), pinned="weight"), IMAGES),
    "convolution, plain": (
        lambda: blocks.ResidualConv2d(4, nn.GELU(), 3, 5, norm_layer=None),
        IMAGES,
    ),
    "bottleneck": (lambda: blocks.ResidualBottleneck2d(4, nn.ReLU()), IMAGES),
    "bottleneck, plain": (
        lambda: blocks.ResidualBottleneck2d(4, torch.tanh, 2, norm_layer=None),
        IMAGES,
    ),
    "identity convolution": (lambda: blocks.IdentityConv2d(4, nn.ReLU()), IMAGES),
    "identity convolution, shifted": (lambda: blocks.IdentityConv2d(4, TanhLU(), 1), IMAGES),
    "transformer": (lambda: blocks.TransformerBlock(4, 2), SEQUENCES),
    "transformer, causal": (lambda: blocks.TransformerBlock(4, 1, causal=True), SEQUENCES),
    "gated": (lambda: blocks.GatedMLP(4, 5), SEQUENCES),
    "gated, vectors": (lambda: blocks.GatedMLP(4, 5), VECTORS),
    "a user's": (lambda: Gain(4), VECTORS),
    "copied": (
        lambda: blocks.CopiedBlock(
            nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True, norm_first=True)
        ),
        SEQUENCES,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OWN)
def test_all_own_blocks_conform(kind: str, dtype: torch.dtype) -> None:
    make, shape = OWN[kind]
    block = make().to(dtype)
    x = torch.randn(shape, dtype=dtype)
    if "identity" in kind:
        x = block.activation(x)  # type: ignore[operator]
    before = x.clone()
    with nothing_left_behind(block):
        check_block(block, x)
    assert torch.equal(x, before)


# --- defects ------------------------------------------------------------------------------------


class Sound(nn.Module):
    """x + W₂ tanh(W₁x), W₂ = 0 pinned: what the blocks with a defect are made from."""

    pinned: Any = ("outer.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.outer = nn.Linear(3, 4, bias=False)
        nn.init.zeros_(self.outer.weight)

    def hidden(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.hidden(x))


class WithFactors(Sound):
    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors, ...]:
        return (AffineFactors("outer.weight", None, delta, self.hidden(x)),)


@pytest.mark.parametrize("make", [Sound, WithFactors], ids=label)
def test_the_blocks_without_a_defect_conform(make: Callable[[], nn.Module]) -> None:
    check_block(make(), torch.randn(VECTORS))


class Widened(Sound):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x], -1)


class Untensored(Sound):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x),)  # type: ignore[return-value]


class Rounded(Sound):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).half()


class Raising(Sound):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of order")


class Moving(Sound):
    def __init__(self) -> None:
        super().__init__()
        nn.init.ones_(self.outer.weight)


class DroppingOut(Sound):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Boasting(Sound):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()

    def exact_after(self, site: nn.Module) -> bool:
        return True


class OneSize(Sound):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(5, 4, dtype=x.dtype)


class InPlace(Sound):
    def forward(self, x: Tensor) -> Tensor:
        x += self.outer(self.hidden(x))
        return x


class Counting(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Renewing(Sound):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.inner.bias.add_(1)
        return super().forward(x)


class Random(Sound):
    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) * torch.rand(())


class Twice(Sound):
    pinned = ("outer.weight", "outer.weight")


class Frozen(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.outer.weight.requires_grad_(False)


class Unused(Sound):
    pinned = ("outer.weight", "spare")

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(3))


class BothPinned(Sound):
    pinned = ("outer.weight", "inner.weight", "inner.bias")

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)


class DeadReLU(Sound):
    """The trap of one weight and a ReLU, whose derivative at 0 is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(x[:, :3]).relu()


class Detaching(Sound):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class WrongFactors(WithFactors):
    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors, ...]:
        return (AffineFactors("outer.weight", None, delta, self.inner(x)),)


class MissingFactors(WithFactors):
    pinned = ("outer.weight", "shift")

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


class MisshapenFactors(WithFactors):
    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors, ...]:
        return (AffineFactors("outer.weight", None, delta, x),)


class FewerFactors(WithFactors):
    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors, ...]:
        return (AffineFactors("outer.weight", None, delta[1:], self.hidden(x)[1:]),)


class MixingFactors(WithFactors):
    """Right as a sum, since a permutation of the samples is in both factors."""

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors, ...]:
        return (AffineFactors("outer.weight", None, delta.flip(0), self.hidden(x).flip(0)),)


class MixingSamples(WithFactors):
    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x - x.mean(0))


class Uncopyable(Sound):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("there is only one of me")


class Sharing(Sound):
    def __deepcopy__(self, memo: object) -> nn.Module:
        other = type(self)()
        other.outer.weight = self.outer.weight
        other.inner = self.inner
        return other


class Hidden(Sound):
    """With a tensor that no state dict knows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.randn(3, 4)

    def hidden(self, x: Tensor) -> Tensor:
        return (x @ self.rows.T.to(x)).tanh()


class Forgetful(Sound):
    """With a random buffer that the state dict leaves out: another one in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def __deepcopy__(self, memo: object) -> nn.Module:
        other = type(self)()
        other.load_state_dict(self.state_dict())
        other.scale = torch.tensor(random.random())
        return other

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.outer(self.hidden(x))


class Unpicklable(Sound):
    def __init__(self) -> None:
        super().__init__()
        self.activation = lambda x: x.tanh()


class Configured(Sound):
    def config(self) -> dict[str, Any]:
        return {"width": 4}


class OtherConfig(Sound):
    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(4, hidden)
        self.outer = nn.Linear(hidden, 4, bias=False)
        nn.init.zeros_(self.outer.weight)

    def config(self) -> dict[str, Any]:
        return {"hidden": 2}


class ForgettingConfig(Sound):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (super().forward(x) - x)

    def config(self) -> dict[str, Any]:
        return {}


class OneDtype(Sound):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


DEFECTS: dict[Callable[[], nn.Module], list[str]] = {
    Widened: ["turns (5, 4)", "into ((5, 8)", "train mode", "eval mode"],
    Untensored: ["into tuple"],
    Rounded: ["torch.float16"],
    Raising: ["RuntimeError: out of order"],
    Moving: ["not the identity at its pins", "train mode", "eval mode"],
    DroppingOut: ["in train mode it is not the identity"],
    Boasting: ["exact_after says", "random numbers"],
    OneSize: ["of one sample alone it makes the shape (5, 4)"],
    InPlace: ["changes x in place"],
    Counting: ["in eval mode a forward pass changes ('calls',)"],
    Renewing: ["in train mode a forward pass changes ('inner.bias',)"],
    Random: ["two passes give different multipliers of 'outer.weight'"],
    Twice: ["names a parameter twice"],
    Frozen: ["('outer.weight',) have requires_grad=False"],
    Unused: ["'spare' is exactly 0", "does not enter the output"],
    BothPinned: ["'outer.weight' is exactly 0", "'inner.bias' is exactly 0", "only one factor"],
    DeadReLU: ["'outer.weight' is exactly 0", "ReLU at 0"],
    Detaching: ["no gradient passes"],
    WrongFactors: ["'outer.weight' that autograd gives"],
    MissingFactors: ["gives ('outer.weight',)", "('outer.weight', 'shift')"],
    MisshapenFactors: ["do not multiply to its shape (4, 3)"],
    FewerFactors: ["the factors of 'outer.weight' are of 4 samples, and x has 5"],
    MixingFactors: ["and not for each"],
    MixingSamples: ["and not for each", "mixes samples"],
    Uncopyable: ["cannot be copied", "there is only one of me"],
    Sharing: ["shares parameters"],
    Hidden: ["the tensor 'rows' is neither a parameter nor a buffer"],
    Forgetful: ["with its state dict loaded into a copy"],
    Unpicklable: ["pickled", "local object"],
    Configured: ["config", "TypeError"],
    OtherConfig: ["config() builds parameters", "(2, 4)"],
    OneDtype: ["moved by .to(torch.float32) it gives torch.float64"],
}


@pytest.mark.parametrize("make", DEFECTS, ids=label)
def test_every_defect_is_named(make: Callable[[], nn.Module]) -> None:
    with refused(cg.BlockError, f"block={make.__name__}", *DEFECTS[make]):
        check_block(make(), torch.randn(VECTORS))


def test_a_config_that_forgets_an_argument() -> None:
    check_block(ForgettingConfig(), torch.randn(VECTORS))
    with refused(cg.BlockError, "config() builds another block", "scale is 2.0 and 1.0"):
        check_block(ForgettingConfig(2.0), torch.randn(VECTORS))


def test_all_defects_are_named_at_once() -> None:
    class Bad(Counting, Frozen, Hidden):
        pass

    with refused(cg.BlockError, "'calls'", "requires_grad=False", "'rows'"):
        check_block(Bad(), torch.randn(VECTORS))


def test_a_block_that_is_the_identity_on_other_values_only() -> None:
    block = blocks.IdentityLinear(4, nn.ReLU())
    check_block(block, torch.randn(VECTORS).relu())
    with refused(cg.BlockError, "in eval mode it is not the identity at its pins"):
        check_block(block, torch.randn(VECTORS))


@pytest.mark.parametrize("pins", [None, (), "gain", ("nothing",)])
def test_pins_come_first(pins: Any) -> None:
    block = Gain(4)
    block.pinned = pins
    with refused(cg.BlockError, "pinned"):
        check_block(block, torch.randn(VECTORS))


@pytest.mark.parametrize("x", [3, torch.randn(4), torch.randn(1, 4), torch.ones(5, 4).int()])
def test_examples_that_are_none(x: Any) -> None:
    with refused(cg.BlockError, "x:", "at least two samples"):
        check_block(Gain(4), x)


def test_nothing_is_left_behind_by_a_refusal() -> None:
    block = Counting()
    with nothing_left_behind(block), refused(cg.BlockError, "calls"):
        check_block(block, torch.zeros(VECTORS))


# --- blocks that take context -------------------------------------------------------------------


class Masked(Sound):
    takes_context = True

    def forward(self, x: Tensor, mask: Tensor, *, scale: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.outer(self.hidden(x)) * mask * scale


def test_context_is_passed_on() -> None:
    mask, scale = torch.tensor([[1], [0], [1], [1], [0]]), torch.tensor(2.0)
    check_block(Masked(), torch.randn(VECTORS), mask, scale=scale)
    with refused(cg.BlockError, "is exactly 0"):
        check_block(Masked(), torch.randn(VECTORS), 0 * mask, scale=scale)


class Gated(nn.Module):
    """x + γ ⊙ tanh x + b + tanh(x) M, M as a matrix from left to right."""

    pinned = ("gate", "bias", "mix")

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.mix = nn.Parameter(torch.zeros(width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x)
        return x + self.gate * h + self.bias + h @ self.mix


class GatedInClosedForm(Gated):
    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors, ...]:
        h = torch.tanh(x)
        return (
            AffineFactors("gate", "bias", cotangent=delta, features=h, elementwise=True),
            AffineFactors("mix", None, cotangent=delta, features=h, transposed=True),
        )


class GatedTheWrongWay(GatedInClosedForm):
    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors, ...]:
        gate, mix = super().factors(x, delta)
        return gate, replace(mix, transposed=False)


def test_elementwise_and_transposed_maps() -> None:
    for shape in ((9, 4), (9, 3, 4)):
        check_block(GatedInClosedForm(4), torch.randn(shape))
        with refused(cg.BlockError, "factors", "'mix'", "autograd"):
            check_block(GatedTheWrongWay(4), torch.randn(shape))
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    data = [(torch.randn(20, 2), torch.randint(3, (20,))) for _ in range(2)]
    candidates = [
        cg.Candidate("1", kind(4), name=kind.__name__) for kind in (Gated, GatedInClosedForm)
    ]
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)
    solution = cg.solve(problem, cg.TopK(1))
    plain, closed = solution.multipliers.values()
    for name, value in plain.items():
        torch.testing.assert_close(closed[name], value)
    # sample by sample, by autograd
    block = Gated(4)
    grown = nn.Sequential(model[0], model[1], block, model[2])
    rows = []
    for x, answer in (pair for batch in data for pair in zip(*batch, strict=True)):
        loss = nn.functional.cross_entropy(grown(x[None]), answer[None])
        grads = torch.autograd.grad(loss, list(block.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    exact = float(torch.stack(rows).var(0).sum()) / len(rows)
    found = solution.sensitivities["GatedInClosedForm"].variance
    assert found == pytest.approx(exact, rel=1e-9)
