"""Wide pins, of which the recommended norm reads a part: groups of samples have that part alone."""

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from helpers import CROSS_ENTROPY
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityConv2d, IdentityLinear, ResidualMLP
from constrained_growth.norms import recommended

WIDE = 300


class Asked:
    """The recommended norm as one of a user's own, for which all of λ is kept by group."""

    needs_moments: ClassVar[bool] = True

    def __init__(self) -> None:
        self.moments: Mapping[str, Any] = {}

    def __call__(self, multiplier: Mapping[str, Tensor], moments: Mapping[str, Any]) -> Tensor:
        self.moments = moments
        return recommended()(multiplier, moments)


class Product(nn.Module):
    """x + tanh(x A) W with a product that is not recorded as an affine map; W = 0 pinned."""

    pinned = ("w",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(width, WIDE))
        self.w = nn.Parameter(torch.zeros(WIDE, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.a) @ self.w


def perceptron(width: int, block: nn.Module, *, penalised: bool = False) -> cg.GrowthProblem:
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 3))
    data = [(torch.randn(5, 3), torch.randint(3, (5,))) for _ in range(8)]

    def slopes(output: Any, target: Tensor) -> Tensor:
        x, y = output
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return CROSS_ENTROPY(y, target) + gradient.square().mean()

    if not penalised:
        return cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("1", block)])
    candidate = cg.Candidate("model.1", block)
    return cg.GrowthProblem(WithInput(model), slopes, data, [candidate])


class WithInput(nn.Module):
    """Returns its input too, which requires gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        return x, self.model(x)


def images(block: nn.Module, channels: int) -> cg.GrowthProblem:
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)
    model = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), *pooled)
    data = [(torch.randn(4, 1, 5, 5), torch.randint(3, (4,))) for _ in range(8)]
    return cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("1", block)])


def gpt() -> cg.GrowthProblem:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 12, "n_inner": WIDE, "n_layer": 2, "n_head": 2, "n_positions": 8}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    tokens = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drop, **tokens))
    rows = [torch.randint(11, (3, 8)) for _ in range(8)]
    data = [({"input_ids": row, "labels": row}, None) for row in rows]
    found = cg.find_candidates(model, data[0][0])
    return cg.GrowthProblem(model, lambda output, _: output.loss, data, found)


class Normalised(nn.Module):
    """A residual block that ends in a norm of whole images, with a scale for each entry."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.LayerNorm([channels, size, size])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(torch.relu(self.conv(x)))


def normalised() -> cg.GrowthProblem:
    body = nn.Conv2d(1, 4, 3, padding=1), Normalised(4, 18), Normalised(4, 18)
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(4 * 18 * 18, 3))
    data = [(torch.randn(4, 1, 18, 18), torch.randint(3, (4,))) for _ in range(8)]
    found = cg.find_candidates(model, data[0][0])
    return cg.GrowthProblem(model, CROSS_ENTROPY, data, found)


class Scaled(nn.Module):
    """x + γ ⊙ tanh(x) with a γ of two sides, pinned at zero, behind a sequence in front."""

    pinned = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(2, WIDE))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.tanh(x).repeat(1, 1, WIDE // x.shape[-1]).unsqueeze(-2).expand(-1, -1, 2, -1)
        return x + (wide * self.scale).sum(-2).unflatten(-1, (-1, x.shape[-1])).sum(-2)


class Sequence(nn.Module):
    """Its activations have the sequence in front."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.site, self.head = nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.site(self.front(x.transpose(0, 1))).mean(0))


def sequence() -> cg.GrowthProblem:
    data = [(torch.randn(4, 7, 3), torch.randint(3, (4,))) for _ in range(8)]
    return cg.GrowthProblem(Sequence(), CROSS_ENTROPY, data, [cg.Candidate("site", Scaled())])


ELEMENTWISE = "a norm of images", "a scale of two sides"
"""Of these there is no part: all of λ is kept."""

PROBLEMS = {
    "identity layer": lambda: perceptron(WIDE, IdentityLinear(WIDE, nn.ReLU())),
    "residual layer": lambda: perceptron(6, ResidualMLP(6, WIDE, torch.tanh)),
    "a product of a user": lambda: perceptron(6, Product(6)),
    "in the graph": lambda: perceptron(6, ResidualMLP(6, WIDE, torch.tanh), penalised=True),
    "identity convolution": lambda: images(IdentityConv2d(32, nn.ReLU()), 32),
    "its patches": lambda: images(IdentityConv2d(30, nn.ReLU()), 30),
    "transposed": gpt,
    "a norm of images": normalised,
    "a scale of two sides": sequence,
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_part_that_a_norm_reads_is_enough_for_it(kind: str) -> None:
    torch.set_default_dtype(torch.float32)  # with fewer bytes there are as many groups of all of λ
    problem = PROBLEMS[kind]()
    part, whole = cg.solve(problem), cg.solve(problem, norm=Asked())
    pins = [t for multiplier in part.multipliers.values() for t in multiplier.values()]
    assert any(max(t.flatten(1).shape) > 256 for t in pins if t.dim() > 1)
    for name, sensitivity in part.sensitivities.items():
        other = whole.sensitivities[name]
        assert sensitivity.value == pytest.approx(other.value, rel=1e-5)
        assert len(sensitivity.replicates) > 1
        assert sensitivity.replicates == pytest.approx(other.replicates, rel=1e-3)
        assert sensitivity.variance == pytest.approx(other.variance, rel=1e-4, nan_ok=True)
        for key, value in part.multipliers[name].items():
            torch.testing.assert_close(value, whole.multipliers[name][key])


@pytest.mark.parametrize("norm", [None, cg.norms.Frobenius()], ids=["recommended", "Frobenius"])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_sensitivities_alone(kind: str, norm: Any) -> None:
    problem = PROBLEMS[kind]()
    whole = cg.solve(problem, norm=norm)
    alone = cg.solve(problem, norm=norm, multipliers=False)
    assert not alone.multipliers
    assert alone.decision == whole.decision
    assert alone.agreement == pytest.approx(whole.agreement, abs=0.1)
    for name, sensitivity in alone.sensitivities.items():
        other = whole.sensitivities[name]
        assert sensitivity.value == pytest.approx(other.value, rel=1e-7)
        assert sensitivity.num_parameters == other.num_parameters
        count = len(sensitivity.replicates)
        assert count > 1
        others = [one.cross_fitted for one in (sensitivity, other) if one.cross_fitted is not None]
        assert len(others) == 2
        assert others[0].slope == pytest.approx(others[1].slope)
        assert others[0].effect_size == pytest.approx(others[1].effect_size)
        if norm is None:
            assert sensitivity.replicates == pytest.approx(other.replicates, rel=1e-6)
            assert math.isnan(sensitivity.variance) == (kind not in ELEMENTWISE)
        else:  # made at once, perhaps of fewer draws
            assert sensitivity.variance == pytest.approx(other.variance, nan_ok=True)
            assert sensitivity.standard_error == pytest.approx(other.standard_error, rel=0.5)


def test_whoever_needs_the_multipliers_says_so() -> None:
    problem = perceptron(6, ResidualMLP(6, WIDE, torch.tanh))
    with pytest.raises(cg.RuleError, match="multipliers=False: rule=TrustRegion"):
        cg.solve(problem, cg.rules.TrustRegion(), multipliers=False)
    with pytest.raises(cg.RuleError, match="or validation asks for λ itself"):
        cg.solve(problem, validation=problem.data, multipliers=False)
    solution = cg.solve(problem, multipliers=False)
    with pytest.raises(cg.CandidateError, match="does not keep it"):
        solution.dual_value(problem.constraints[0])


def test_cross_fitted_slopes_are_those_along_the_part() -> None:
    """Sample by sample, by autograd through the layer at its pins."""
    problem = perceptron(6, ResidualMLP(6, WIDE, torch.tanh))
    samples = [(x[None], y[None]) for batch in problem.data for x, y in zip(*batch, strict=True)]
    problem = cg.GrowthProblem(problem.model, CROSS_ENTROPY, samples, problem.candidates)
    cg.solve(problem, norm=(asked := Asked()))
    columns = asked.moments["outer.weight"].columns
    assert len(columns) == 256
    found = cg.solve(problem).sensitivities["1"].cross_fitted
    grown: Any = copy.deepcopy(problem.model)
    block: Any = copy.deepcopy(problem.candidates[0].block)
    grown[1] = nn.Sequential(grown[1], block)
    gradients = []
    for x, y in samples:
        (gradient,) = torch.autograd.grad(CROSS_ENTROPY(grown(x), y), [block.outer.weight])
        gradients.append(gradient[:, columns].flatten())
    rows = torch.stack(gradients)
    others = (rows.sum(0) - rows) / (len(rows) - 1)
    slopes = -(rows * others).sum(1) / others.norm(dim=1)
    assert found is not None
    assert found.slope == pytest.approx(float(slopes.mean()))
    deviation = float(slopes.std())
    assert found.standard_error == pytest.approx(deviation / math.sqrt(len(slopes)))
