"""What a user's surroundings may hold: samplers, modes of autograd, shared modules, bad data."""

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_multipliers,
    autograd_multipliers,
    candidate,
    classified,
    feedforward,
    solved,
)
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import constrained_growth as cg


def test_generator_of_a_batch_sampler_is_put_back() -> None:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(20, 2), torch.randint(3, (20,)))
    sampler = BatchSampler(RandomSampler(data, generator=generator), 6, False)
    before = generator.get_state()
    solved(feedforward(2, 4, 3), DataLoader(data, batch_sampler=sampler), candidate())
    assert torch.equal(generator.get_state(), before)


def test_gradients_are_on_inside_inference_mode() -> None:
    model, data, one = feedforward(2, 4, 3), classified(10), candidate()
    expected = solved(model, data, one).multipliers["1"]["weight"]
    with torch.inference_mode():
        found = solved(model, data, one).multipliers["1"]["weight"]
    assert torch.equal(found, expected)


def test_infinite_data_behind_a_bounded_activation_is_noticed() -> None:
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(10)
    data[0][0][0, 0] = torch.inf
    with pytest.raises(cg.DataError, match="NaN or Inf"):
        solved(model, data, cg.Candidate("1", cg.blocks.ResidualLinear(4, torch.tanh)))


class Sharing(nn.Module):
    """A block that calls a module of the model."""

    pinned = ("w",)

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.w = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w * self.activation(x)


def test_block_that_shares_a_module_with_the_model() -> None:
    model, data = feedforward(2, 4, 3, activation=nn.Tanh), classified(20, batch=7)
    one = cg.Candidate("1", Sharing(model.get_submodule("1")))
    assert_multipliers(solved(model, data, one), "1", autograd_multipliers(model, data, one))


def test_first_batch_without_samples() -> None:
    empty = [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))]
    with pytest.raises(cg.DataError, match="no samples"):
        cg.GrowthProblem(feedforward(2, 4, 3), CROSS_ENTROPY, empty, [candidate()])


def test_norm_that_the_layers_in_place_do_not_have() -> None:
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 3))
    solution = solved(model, classified(10), candidate(), norm=lambda m: m["bias"].norm())
    assert solution.sensitivities["1"].baseline is None
    assert solution.sensitivities["1"].value == float(solution.multipliers["1"]["bias"].norm())


def test_softmax_is_no_elementwise_activation() -> None:
    with pytest.raises(cg.BlockError, match="not elementwise"):
        cg.blocks.ResidualMLP(4, 4, nn.Softmax(dim=-1))


def test_block_that_moves_a_later_batch_is_found_out() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in (model.get_parameter("0.weight"), model.get_parameter("0.bias")):
            parameter.fill_(float(parameter.dim() - 1))
    data = classified(20, batch=10)
    data = [(data[0][0].abs(), data[0][1]), (-data[1][0].abs(), data[1][1])]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("0")])
    with pytest.raises(cg.BlockError, match="not on a later one"):
        cg.solve(problem)


def test_sites_that_eval_mode_passes_by_are_refused() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randn(6, 3, 4), torch.randint(3, (6,)))]
    inside = cg.Candidate("0.linear1", cg.blocks.ResidualMLP(8, 4, torch.tanh))
    with pytest.raises(cg.CandidateError, match="encoder layer itself"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [inside])
    whole = cg.Candidate("0", cg.blocks.ResidualMLP(4, 4, torch.tanh))
    assert solved(model, data, whole).sensitivities["0"].value > 0


class Dropping(nn.Module):
    """A block that computes something else in train mode."""

    pinned = ("w",)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w * (2 * x if self.training else x)


@pytest.mark.parametrize("training", [True, False])
def test_block_is_measured_in_the_mode_of_its_site(training: bool) -> None:
    model, data = feedforward(2, 4, 3).train(training), classified(20)
    block = Dropping().train(not training)
    one = cg.Candidate("1", block)
    value = solved(model, data, one).multipliers["1"]["w"]
    model.get_submodule("1").register_forward_hook(lambda _m, _x, y: inserted(y))
    inserted = Dropping().train(training)
    CROSS_ENTROPY(model(data[0][0]), data[0][1]).backward()
    assert inserted.w.grad is not None
    torch.testing.assert_close(value, -inserted.w.grad, atol=1e-14, rtol=0)
    assert block.training is not training


class Clipping(nn.Module):
    """A block without a closed form that is the identity on small numbers only."""

    pinned = ("w",)

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x.clamp(-10, 10)


def test_own_block_that_moves_a_later_batch_is_found_out() -> None:
    model, data = feedforward(2, 4, 3), classified(20, batch=10)
    one = cg.Candidate("0", Clipping())
    assert solved(model, data, one).decision.chosen == ("0",)
    data[1] = (1000 * data[1][0], data[1][1])
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])
    with pytest.raises(cg.BlockError, match="not on a later one"):
        cg.solve(problem)
