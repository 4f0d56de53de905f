"""Every proposal for every kind of program can be solved for and inserted, and its λ is right."""

import copy
from collections.abc import Callable
from typing import Any

import programs
import pytest
import torch
from helpers import choose, nothing_left_behind
from torch import Tensor, nn

import constrained_growth as cg

PROGRAMS: list[tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = [
    (lambda: programs.Plain(3), programs.vectors),
    (lambda: programs.UNet(3, 3), programs.vectors),
    (lambda: programs.Zipped(2, 3), programs.vectors),
    (lambda: programs.Enumerated(3), programs.vectors),
    (lambda: programs.Indexed(3), programs.vectors),
    (lambda: programs.Collected(2), programs.vectors),
    (lambda: programs.Scaled(3), programs.vectors),
    (lambda: programs.Supervised(2), programs.vectors),
    (programs.Dense, programs.images),
    (programs.ImageUNet, programs.images),
    (programs.Diffusion, programs.vectors),
    (programs.Stages, programs.images),
    (lambda: programs.Stages(1), programs.signals),
    (lambda: programs.Stages(3), programs.volumes),
    (lambda: programs.Recurrent(nn.LSTM), programs.tokens),
    (lambda: programs.Recurrent(nn.GRU, last=True), programs.tokens),
    (programs.VAE, programs.images),
    (programs.Siamese, programs.vectors),
    (programs.Experts, programs.vectors),
    (lambda: programs.Scalar(lambda y: y.mT), programs.vectors),
    (programs.Frozen, programs.vectors),
    (programs.feature_pyramid, programs.images),
    (programs.temporal, programs.signals),
    (programs.bag, programs.tokens),
]


def loss_of(output: Any, target: Tensor) -> Tensor:
    """Of all tensors in an output."""
    every = output if isinstance(output, list | tuple) else [output]
    terms = [(one * torch.linspace(0.5, 1, one.shape[-1])).tanh().mean() for one in every]
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("make", "input"), PROGRAMS)
def test_every_proposal_can_be_inserted(make: Any, input: Any) -> None:
    model, x = make(), input()
    with nothing_left_behind(model):
        found = cg.find_candidates(model, x)
    data = [(x, torch.zeros(len(x)))]
    torch.manual_seed(0)
    problem = cg.GrowthProblem(model, loss_of, data, found)
    for one in found:
        assert sum(p.numel() for p in one.block.parameters()) <= sum(
            p.numel() for p in model.parameters()
        )
        solution = cg.solve(problem, choose(one.name))
        grown = copy.deepcopy(model)
        old = {id(p) for p in grown.parameters()}
        record = cg.insert(grown, solution)
        assert record.difference["train"] < 1e-12
        new = {name: p for name, p in grown.named_parameters() if id(p) not in old}
        torch.manual_seed(0)
        loss = loss_of(grown(x), data[0][1])
        grads = dict(zip(new, torch.autograd.grad(loss, list(new.values())), strict=True))
        for pin, value in solution.multipliers[one.name].items():
            end = pin.removeprefix("module.")
            name = min((n for n in new if f".{n}".endswith(f".{end}")), key=len)
            torch.testing.assert_close(value, -grads[name], rtol=0, atol=1e-9)
