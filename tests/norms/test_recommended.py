"""The recommended norm: what it does not depend on, and that every block has a size in it."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import CROSS_ENTROPY, Gain, candidate, classified, feedforward, solved
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.norms import Frobenius, KroneckerFisher, SecondMoments, recommended

# --- through solve --------------------------------------------------------------------------------


def identity_layers() -> tuple[nn.Module, Any, list[cg.Candidate]]:
    model = feedforward(2, 6, 5, 3)
    return model, classified(60), [candidate("1", 6), candidate("3", 5)]


def residual_layers() -> tuple[nn.Module, Any, list[cg.Candidate]]:
    """Blocks between two layers of a ReLU network."""
    model = feedforward(2, 6, 5, 3)
    blocks = [cg.blocks.ResidualMLP(width, 4, nn.ReLU()) for width in (6, 5)]
    return model, classified(60), [cg.Candidate(s, b) for s, b in zip("13", blocks, strict=True)]


def convolutions() -> tuple[nn.Module, Any, list[cg.Candidate]]:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 25, 3),
    )
    blocks = [cg.blocks.IdentityConv2d(channels, nn.ReLU()) for channels in (4, 3)]
    data = [(torch.randn(30, 1, 5, 5), torch.randint(3, (30,)))]
    return model, data, [cg.Candidate(s, b) for s, b in zip("13", blocks, strict=True)]


def rescale(model: nn.Module) -> list[Tensor]:
    """Each unit of every ReLU layer by a factor of its own: times s in front, 1/s behind."""
    layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]  # type: ignore[union-attr]
    every = []
    with torch.no_grad():
        for before, after in pairwise(layers):
            factors = torch.exp(torch.randn(len(before.weight)))
            before.weight.mul_(factors.view(-1, *[1] * (before.weight.dim() - 1)))
            before.get_parameter("bias").mul_(factors)
            each = after.weight.shape[1] // len(factors)  # pixels of a channel that were flattened
            spread = factors.repeat_interleave(each)
            after.weight.div_(spread.view(-1, *[1] * (after.weight.dim() - 2)))
            every.append(factors)
    return every


@pytest.mark.parametrize("network", [identity_layers, convolutions])
def test_units_of_a_relu_layer_change_nothing(
    network: Callable[[], tuple[nn.Module, Any, list[cg.Candidate]]],
) -> None:
    model, data, candidates = network()
    before = cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates))
    plain = solved(model, data, *candidates)
    rescale(model)
    after = cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates))
    assert after.loss == pytest.approx(before.loss, rel=1e-9)
    assert after.decision.chosen == before.decision.chosen
    assert after.agreement == before.agreement
    for name, one in before.sensitivities.items():
        other = after.sensitivities[name]
        assert other.value == pytest.approx(one.value, rel=1e-8)
        assert other.standard_error == pytest.approx(one.standard_error, rel=1e-6)
        changed = solved(model, data, *candidates).sensitivities[name].value  # Frobenius
        assert changed != pytest.approx(plain.sensitivities[name].value, rel=0.05)


@pytest.mark.parametrize("network", [identity_layers, residual_layers, convolutions])
def test_units_of_the_loss_change_no_decision(
    network: Callable[[], tuple[nn.Module, Any, list[cg.Candidate]]],
) -> None:
    model, data, candidates = network()
    found = [
        cg.solve(cg.GrowthProblem(model, lambda y, t: f * CROSS_ENTROPY(y, t), data, candidates))  # noqa: B023
        for f in (1.0, 1e-3)
    ]
    assert found[0].decision.chosen == found[1].decision.chosen
    for name, one in found[0].sensitivities.items():
        assert found[1].sensitivities[name].value == pytest.approx(one.value, rel=1e-8)
        assert one.value > 0


def test_rows_that_are_read_stand_for_all() -> None:
    """Of long data not all rows are read, and each position of a sequence has its turn."""
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randn(900, 6, 2) * torch.linspace(0.0, 2.0, 6)[:, None]
    y = (x.sum((1, 2)) > 0).long()
    seen: dict[str, Any] = {}

    def kept(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["phi"] = output
        return output

    handle = model[1].register_forward_hook(kept)
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
    (psi,) = torch.autograd.grad(loss, seen["phi"])
    handle.remove()
    # at the pins W = 1 and φ > 0, so that the derivative of the ReLU is 1 there and 0 elsewhere
    phi, psi = seen["phi"].detach(), psi * (seen["phi"] > 0)
    moments = SecondMoments.of(phi, psi, "bias")
    multiplier = {"weight": -torch.einsum("nto,nti->oi", psi, phi) / 900}
    multiplier["bias"] = -psi.sum(1).mean(0)
    expected = float(recommended()(multiplier, {"weight": replace(moments, same_units=True)}))
    for batch in (900, 90, 7):
        data = list(zip(x.split(batch), y.split(batch), strict=True))
        found = solved(model, data, candidate("1"), norm=None).sensitivities["1"]
        assert found.value == pytest.approx(expected, rel=0.15)


# --- every block, every way -----------------------------------------------------------------------


class Raw(nn.Module):
    """A user's block whose pins are in no affine map."""

    pinned = ("cube", "matrix")

    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Parameter(torch.zeros(4))
        self.matrix = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.cube * x**3) + x.tanh() @ torch.matrix_exp(self.matrix) - x.tanh()


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "identity": lambda: cg.blocks.IdentityLinear(4, nn.ReLU()),
    "residual": lambda: cg.blocks.ResidualLinear(4, torch.tanh),
    "outer": lambda: cg.blocks.ResidualMLP(4, 5, nn.Tanh()),
    "inner": lambda: cg.blocks.ResidualMLP(4, 5, nn.Tanh(), pinned="inner"),
    "gated": lambda: cg.blocks.GatedMLP(4, 6),
    "gain": lambda: Gain(4),
    "raw": Raw,
}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_has_a_size(block: str) -> None:
    model, data = feedforward(2, 4, 3), classified(50, batch=8)
    one = cg.Candidate("1", BLOCKS[block]())
    plain = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    weighted = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one], weight=lambda x, y: 2.5)
    with cg.monitor(plain) as monitor:
        for input, target in data:
            CROSS_ENTROPY(model(input), target).backward()
    for found in (cg.solve(plain), cg.solve(weighted), monitor.solution()):
        sensitivity = found.sensitivities["1"]
        assert isinstance(sensitivity.norm, KroneckerFisher)
        for number in (sensitivity.value, sensitivity.standard_error):
            assert math.isfinite(number)
            assert number > 0


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (lambda: cg.blocks.IdentityConv2d(4, nn.ReLU()), (4, 6, 6)),
        (lambda: cg.blocks.ResidualConv2d(4, nn.ReLU()), (4, 6, 6)),
        (lambda: cg.blocks.ResidualBottleneck2d(4, nn.ReLU(), 2), (4, 6, 6)),
        (lambda: cg.blocks.TransformerBlock(4, 2, 6), (5, 4)),
    ],
)
def test_blocks_of_images_and_sequences_have_a_size(
    block: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(math.prod(shape), 3))
    data = [(torch.randn(20, *shape), torch.randint(3, (20,)))]
    found = solved(model, data, cg.Candidate("0", block()), norm=None).sensitivities["0"]
    for number in (found.value, found.standard_error):
        assert math.isfinite(number)
        assert number > 0


@pytest.mark.parametrize("block", ["residual", "outer", "gain", "raw"])
def test_in_graph_it_is_of_the_same_features_and_cotangents(block: str) -> None:
    """A loss with a derivative of the output by the input."""
    model, one = feedforward(2, 4, 4, 1, activation=nn.Tanh), cg.Candidate("1", BLOCKS[block]())

    class Physics(nn.Module):
        """Output and its derivative by the input."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                x = x.clone().requires_grad_()
                y = self.net(x)
                return y, torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    def loss(output: Any, target: Tensor) -> Tensor:
        return (output[0] - target).square().mean() + output[1].square().mean()

    data = [(torch.randn(8, 2), torch.randn(8, 1)) for _ in range(6)]
    problem = cg.GrowthProblem(
        Physics(model), loss, data, [cg.Candidate("net.1", one.block), candidate_of("net.3")]
    )
    solution = cg.solve(problem)
    assert solution.method.name == "IN_GRAPH"
    for sensitivity in solution.sensitivities.values():
        assert math.isfinite(sensitivity.value)
        assert sensitivity.value > 0
        assert sensitivity.standard_error > 0


def candidate_of(after: str) -> cg.Candidate:
    return cg.Candidate(after, cg.blocks.ResidualMLP(4, 3, nn.Tanh()))


def test_the_recommended_norm_is_the_default_and_frobenius_a_line_away() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate()])
    given = cg.norms.recommended()
    assert cg.solve(problem).sensitivities["1"] == cg.solve(problem, norm=given).sensitivities["1"]
    assert cg.solve(problem, norm=Frobenius()).sensitivities["1"].norm == Frobenius()
