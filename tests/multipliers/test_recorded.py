"""Blocks without a closed form: each operation that takes a pin, sample by sample.

The references stand a block in the network and differentiate the loss of one sample after another.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CROSS_ENTROPY, assert_multipliers, autograd_multipliers, mean_loss
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import CopiedBlock

SAMPLES = 7


class Branch(nn.Module):
    """x + op(x), with zero in the place of the pinned parameters of op."""

    def __init__(self, op: nn.Module, *pinned: str) -> None:
        super().__init__()
        self.op = op
        named = pinned or tuple(name for name, _ in op.named_parameters())
        self.pinned = tuple(f"op.{name}" for name in named)
        with torch.no_grad():
            for name in named:
                op.get_parameter(name).zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.op(x)


class Function(nn.Module):
    """A function of x and of parameters of given shapes."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.pins = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.pins)


class Across(nn.Module):
    """An encoder layer that has the sequence in front, between two transpositions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


def vectors() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(SAMPLES, 2)


def sequences() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
    return model, torch.randn(SAMPLES, 5, 2)


def signals() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))
    return model, torch.randn(SAMPLES, 1, 8)


def images() -> tuple[nn.Module, Tensor]:
    conv = nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)), torch.randn(
        SAMPLES, 1, 6, 6
    )


def trained_images() -> tuple[nn.Module, Tensor]:
    """Not in training mode."""
    model, x = images()
    return model.eval(), x


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)


class Twice(nn.Linear):
    """One linear layer, used twice."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + super().forward(input.sin())


class Shift(nn.Linear):
    """Only its bias."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - F.linear(input, self.weight)


class Bottom(nn.Module):
    """Branches one after the other, each summed up in place; in front of it a pin that is not 0."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), first))
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.pinned = ("scale", "inner.weight", "inner.bias", "outer.weight", "outer.bias")
        with torch.no_grad():
            for name in self.pinned[1:]:
                self.get_parameter(name).zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.sin())
        y += x * self.scale
        z = self.outer(y.cos())
        z += y
        return z


def folded(conv: nn.Module) -> nn.Module:
    """A convolution with a stride, and back to the old size."""
    return nn.Sequential(conv, nn.Upsample(scale_factor=2))


Setting = tuple[nn.Module, Tensor]
CASES: dict[str, tuple[Callable[[], Setting], Callable[[], nn.Module]]] = {
    "copied encoder layer": (sequences, lambda: CopiedBlock(encoder_layer())),
    "copied encoder layer, sequence in front": (
        sequences,
        lambda: CopiedBlock(Across(), args=[torch.randn(2, 5, 4)]),
    ),
    "branches that are summed up in place": (sequences, lambda: Bottom(1.0)),
    "linear": (vectors, lambda: Branch(nn.Linear(4, 4))),
    "linear of positions": (sequences, lambda: Branch(nn.Linear(4, 4))),
    "bias alone": (sequences, lambda: Branch(Shift(4, 4), "bias")),
    "twice": (sequences, lambda: Branch(Twice(4, 4))),
    "Conv1D of GPT-2": (
        sequences,
        lambda: Branch(
            Function(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view_as(x), (4, 4), (4,))
        ),
    ),
    "conv1d": (signals, lambda: Branch(nn.Conv1d(4, 4, 5, padding=4, dilation=2))),
    "conv2d": (images, lambda: Branch(nn.Conv2d(4, 4, (3, 1), padding=(1, 0), bias=False))),
    "conv2d with a stride": (
        images,
        lambda: Branch(folded(nn.Conv2d(4, 4, 3, stride=2, padding=2, dilation=2))),
    ),
    "layer norm": (sequences, lambda: Branch(nn.LayerNorm(4))),
    "layer norm of two dimensions": (sequences, lambda: Branch(nn.LayerNorm([5, 4]))),
    "RMS norm": (sequences, lambda: Branch(nn.RMSNorm(4))),
    "group norm": (images, lambda: Branch(nn.GroupNorm(2, 4))),
    "batch norm in use": (trained_images, lambda: Branch(nn.BatchNorm2d(4)).eval()),
    "layer scale": (sequences, lambda: Branch(Function(lambda x, s: s * x.sin(), (4,)))),
    "layer scale of an image": (
        images,
        lambda: Branch(Function(lambda x, s: x.sin() * s, (4, 1, 1))),
    ),
    "gate": (sequences, lambda: Branch(Function(lambda x, s: x.sin() * s, ()))),
    "gate with a dimension": (vectors, lambda: Branch(Function(lambda x, s: s * x.sin(), (1,)))),
}


def labelled(x: Tensor, batch: int) -> list[Any]:
    y = torch.randint(3, (len(x),))
    return list(zip(x.split(batch), y.split(batch), strict=True))


def flat(multiplier: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in multiplier.values()])


def assert_by_sample(
    solution: cg.Solution,
    name: str,
    samples: Tensor,
    found: dict[str, Tensor],
    precision: float = 1e-12,
) -> None:
    """λ is the mean of the samples, and its variance that of a mean of them."""
    torch.testing.assert_close(flat(found), samples.mean(0), rtol=0, atol=precision)
    sensitivity = solution.sensitivities[name]
    variance = samples.var(0).sum().item() / len(samples)
    assert sensitivity.variance == pytest.approx(variance, rel=1e4 * precision)
    assert math.isfinite(sensitivity.value)
    assert math.isfinite(sensitivity.standard_error)


@pytest.mark.parametrize("batch", [SAMPLES, 3])
@pytest.mark.parametrize("case", CASES)
def test_multipliers_sample_by_sample(case: str, batch: int) -> None:
    setting, block = CASES[case]
    model, x = setting()
    data, one = labelled(x, batch), cg.Candidate("1", block())
    samples = [
        flat(autograd_multipliers(model, [pair], one))
        for input, target in data
        for pair in zip(input.split(1), target.split(1), strict=True)
    ]
    solution = cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, data, [one]))
    assert_by_sample(solution, "1", torch.stack(samples), dict(solution.multipliers["1"]))
    found = solution.sensitivities["1"]
    assert found.value > 0
    assert found.standard_error > 0


class ResNetBlock(nn.Module):
    """x + BN(conv(ReLU(BN(conv(x)))))."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.two(F.relu(self.bn1(self.one(x)))))


TOGETHER: dict[str, tuple[Callable[[], Setting], Callable[[], nn.Module]]] = {
    "batch norm in training": (images, lambda: Branch(nn.BatchNorm2d(4))),
    "batch norm of vectors": (vectors, lambda: Branch(nn.BatchNorm1d(4))),
    "copied residual block": (images, lambda: CopiedBlock(ResNetBlock())),
    "linear and batch norm": (
        vectors,
        lambda: Branch(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "1.weight", "1.bias"),
    ),
    "a product of matrices": (
        sequences,
        lambda: Branch(Function(lambda x, w: torch.einsum("...i,oi->...o", x, w), (4, 4))),
    ),
    "a weight that is made of the pin": (
        vectors,
        lambda: Branch(Function(lambda x, w: F.linear(x, w.tanh()), (4, 4))),
    ),
    "a pin in two kinds of operations": (
        vectors,
        lambda: Branch(Function(lambda x, w: F.linear(x, w) + x @ w, (4, 4))),
    ),
    "grouped convolution": (images, lambda: Branch(nn.Conv2d(4, 4, 3, padding=1, groups=2))),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_samples_that_are_not_told_apart(case: str) -> None:
    """Samples that share their statistics, and operations that are none of ours."""
    setting, block = TOGETHER[case]
    model, x = setting()
    data, one = labelled(x, 4), cg.Candidate("1", block())
    before = copy.deepcopy(one.block.state_dict())
    solution = cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, data, [one]))
    assert_multipliers(solution, "1", autograd_multipliers(model, data, one), atol=1e-12)
    value = solution.sensitivities["1"].value
    assert math.isfinite(value)
    assert value > 0
    for name, tensor in one.block.state_dict().items():
        assert torch.equal(tensor, before[name])


# --- models of Transformers ---------------------------------------------------------------------

TINY = {"vocab_size": 11, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
LLAMA = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def token_loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), target.flatten())


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_copied_layers_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.set_default_dtype(torch.float64)
    options = TINY | (GPT2 | {"attn_pdrop": 0.0} if kind == "GPT2" else LLAMA)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(
        config
    ).double()
    tokens = torch.randint(11, (5, 6))
    data = [({"input_ids": part}, part.roll(-1, 1)) for part in tokens.split(3)]
    candidates = cg.find_candidates(model, data[0][0])
    problem = cg.GrowthProblem(model, token_loss, data, candidates)
    precision = 1e-12 if kind == "GPT2" else 1e-8  # Llama computes its norms in float32
    for candidate in candidates:
        name = candidate.name
        solution = cg.solve(problem, cg.Fixed(name))
        grown, pins = copy.deepcopy(model), solution.multipliers[name]
        old = {id(p) for p in grown.parameters()}
        cg.insert(grown, solution)
        new = {n: p for n, p in grown.named_parameters() if id(p) not in old}
        ends = [key.removeprefix("module.") for key in pins]
        own = [new[min((n for n in new if n.endswith(end)), key=len)] for end in ends]
        samples = []
        for part in tokens.split(1):
            loss = mean_loss(grown, [({"input_ids": part}, part.roll(-1, 1))], token_loss)
            grads = torch.autograd.grad(loss, own)
            samples.append(-torch.cat([g.flatten() for g in grads]))
        assert_by_sample(solution, name, torch.stack(samples), dict(pins), precision)
