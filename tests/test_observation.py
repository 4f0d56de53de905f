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
