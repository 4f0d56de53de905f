"""Parameters that a forward pass writes to are what they were, and λ is that of the first pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from helpers import (
    CROSS_ENTROPY,
    assert_multipliers,
    autograd_multipliers,
    candidate,
    nothing_left_behind,
    refused,
)
from torch import Tensor, nn

import constrained_growth as cg


class Net(nn.Module):
    """Embeds tokens, and writes to its parameters before it does anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)
        self.act = nn.Tanh()
        self.written = False

    def write(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        self.write()
        return self.out(self.act(self.embedding(ids).mean(1)))


class MaxNorm(Net):
    """PyTorch renormalises the rows that are used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, max_norm=0.5)


class Rescaled(Net):
    """Once in eval mode, as RWKV does; and back in train mode."""

    def write(self) -> None:
        if self.written == self.training:
            with torch.no_grad():
                self.out.weight.mul_(2.0 if self.training else 0.5)
            self.written = not self.training


class InTrainMode(Net):
    """A codebook in `nn.Parameter`, written to through `.data`: no version counter tells."""

    def write(self) -> None:
        if self.training:
            self.embedding.weight.data.lerp_(torch.ones(7, 4), 0.1)


class Renewed(Net):
    """The constraint of EEGNet: other memory each time."""

    def write(self) -> None:
        self.out.weight.data = torch.renorm(self.out.weight.data, 2, 0, 0.3)


class AllAtOnce(Net):
    """By an operation on a list, and by one with `out=`."""

    def write(self) -> None:
        with torch.no_grad():
            torch._foreach_mul_([self.out.weight, self.out.bias], 0.9)  # type: ignore
            torch.add(self.embedding.weight, 0.1, out=self.embedding.weight)


def residual() -> cg.Candidate:
    return candidate("act", block=cg.blocks.ResidualMLP(4, 5, torch.tanh))


def data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(7, (5, 3)), torch.randint(3, (5,))) for _ in range(3)]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("make", [MaxNorm, Rescaled, InTrainMode, Renewed, AllAtOnce])
def test_nothing_that_was_written_to_stays_changed(make: Callable[[], Net], train: bool) -> None:
    batches, model, one = data(), make().train(train), residual()
    with nothing_left_behind(model):
        cg.find_candidates(model, batches[0][0])
    with nothing_left_behind(model):
        problem = cg.GrowthProblem(model, CROSS_ENTROPY, batches[:1], [one])
    with nothing_left_behind(model):
        cg.GrowthProblem(model, CROSS_ENTROPY, batches[:1], [one])
    with nothing_left_behind(model):
        solution = cg.solve(problem)
    exact = autograd_multipliers(model, batches[:1], one)
    assert solution.multipliers["act"].keys() == exact.keys()
    assert_multipliers(solution, "act", exact)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cg.insert(model, cg.solve(problem, cg.Fixed("act")))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not model.written


@pytest.mark.parametrize("make", [MaxNorm, AllAtOnce])
def test_also_of_a_loss_and_after_an_error(make: Callable[[], Net]) -> None:
    teacher, model, batches, one = make(), Net(), data(), residual()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        assert len(target) == 5 or not strict
        ids = torch.stack([target, target], dim=1)
        return (output - teacher(ids)).square().mean()

    strict = False
    with nothing_left_behind(teacher):
        problem = cg.GrowthProblem(model, loss_fn, batches, [one])
        cg.solve(problem)
        strict, batches[1] = True, (batches[1][0][:4], batches[1][1][:4])
        with pytest.raises(AssertionError):
            cg.solve(problem)


@pytest.mark.parametrize("train", [True, False])
def test_rwkv_of_transformers(train: bool) -> None:
    """In eval mode it divides by the number of a layer, which is another one in a longer model."""
    options: dict[str, Any] = {
        "vocab_size": 9,
        "hidden_size": 4,
        "num_hidden_layers": 3,
        "rescale_every": 1,
    }
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**options, use_cache=False))
    model = model.double().train(train)
    ids = torch.randint(9, (2, 4))
    batches = [({"input_ids": ids, "labels": ids}, None)]
    with nothing_left_behind(model):
        proposed = cg.find_candidates(model, batches[0][0])
    refusal = refused(cg.CandidateError, "another network", "rwkv.blocks.0")
    with nothing_left_behind(model), nullcontext() if train else refusal:
        cg.solve(cg.GrowthProblem(model, lambda output, _: output.loss, batches, proposed))
