"""Every proposal for every kind of program can be solved for and inserted, and its λ is right."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import programs
import pytest
import torch
from helpers import choose, nothing_left_behind, refused
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
    solved = cg.solve(cg.GrowthProblem(model, loss_of, data, found), choose())
    for one in found:
        assert sum(p.numel() for p in one.block.parameters()) <= sum(
            p.numel() for p in model.parameters()
        )
        solution = replace(solved, decision=cg.Decision((one.name,)))
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


RECURRENT = [nn.LSTM, nn.GRU, nn.RNN]
UNSERVED = [
    (programs.bare_temporal, programs.signals),
    (programs.Cells, programs.vectors),
    (lambda: programs.Stages(3), programs.volumes),
    (programs.temporal, programs.signals),
    (lambda: programs.Recurrent(nn.LSTM), programs.tokens),
]


@pytest.mark.parametrize(("make", "input"), UNSERVED)
def test_every_leaf_gets_a_proposal_or_a_reason(make: Any, input: Any) -> None:
    model = make()
    try:
        found = cg.find_candidates(model, input())
        told = f"{found}"
        owners = {*found.skipped, *(one.after for one in found)}
    except cg.CandidateError as error:
        told = f"{error}"
        owners = {line.strip().partition(":")[0] for line in told.splitlines()[1:]}
    for name, module in model.named_modules():
        if next(module.children(), None) is None and next(module.parameters(), None) is not None:
            inside = any(name.startswith(f"{owner}.") for owner in owners)
            assert inside or name in owners, told


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_modules_are_sites(kind: Any) -> None:
    (found,) = cg.find_candidates(programs.Recurrent(kind), programs.tokens())
    assert (found.after, type(found.block)) == ("recurrent", cg.blocks.ResidualMLP)


def test_stages_of_one_block_each_are_a_stack() -> None:
    found = cg.find_candidates(programs.Stages(), programs.images())
    assert [(one.after, type(one.block).__name__) for one in found] == [
        ("layer1.0", "CopiedBlock"),
        ("layer2.0", "ResidualConv2d"),
        ("layer3.0", "ResidualConv2d"),
    ]


SHAPES: list[Callable[[Tensor], Tensor]] = [
    lambda y: y[:, 0],
    lambda y: y[..., 1:],
    lambda y: y.mT,
    lambda y: y.mT.contiguous(),
    lambda y: y.squeeze(0)[None],
    lambda y: y.flatten(),
    lambda y: y.clone().unsqueeze(1),
    lambda y: y.float(),
    lambda y: y,
]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_the_output_but_for_its_shape_is_no_site(shape: Any) -> None:
    found = cg.find_candidates(programs.Scalar(shape), programs.vectors())
    assert [one.after for one in found] == ["body"]
    assert found.skipped["head"] == "its output is that of the model"


def test_sites_of_which_the_program_asks_the_class() -> None:
    found = cg.find_candidates(programs.Diffusion(), programs.vectors())
    assert [one.after for one in found] == ["blocks.0.1", "blocks.1.1"]
    assert "class" in found.skipped["blocks.0.0"]


def test_blocks_are_no_larger_than_the_model_unless_asked_for() -> None:
    model, x = programs.VAE(), programs.images()
    found = {one.after: one.block for one in cg.find_candidates(model, x)}
    assert isinstance(found["decoder.1"], cg.blocks.ResidualMLP)
    most = cg.find_candidates(model, x, max_parameters=10**6)
    assert isinstance(most[-1].block, cg.blocks.IdentityLinear)
    assert "20,880" in f"{most}"
    few = cg.find_candidates(model, x, max_parameters=200)
    assert [one.after for one in few] == ["encoder.1"]
    assert "20,880" in few.skipped["decoder.1"]


@pytest.mark.parametrize("seed", range(8))
def test_dropout_of_channels_is_no_activation(seed: int) -> None:
    """It takes no vectors, and by chance passes for a function of single numbers."""
    torch.manual_seed(seed)
    model, x = programs.feature_pyramid(), programs.images()
    one = cg.Candidate("3", cg.blocks.IdentityConv2d(4, nn.ReLU()))
    data = [(x, torch.zeros(len(x)))]
    solution = cg.solve(cg.GrowthProblem(model, loss_of, data, [one]))
    assert solution.sensitivities["3"].value > 0


def test_arguments_are_checked_at_once() -> None:
    model, x = programs.VAE(), programs.images()
    for wrong in (None, "model", programs.VAE):
        with refused(cg.CandidateError, "model=", "nn.Module"):
            cg.find_candidates(wrong, x)  # type: ignore[arg-type]
    for wrong in (0, 1.5, "9", True):
        with refused(cg.CandidateError, "max_parameters=", "positive whole number"):
            cg.find_candidates(model, x, max_parameters=wrong)  # type: ignore[arg-type]
    for wrong in (None, "image", torch.zeros(2, 3)):
        with nothing_left_behind(model), refused(cg.CandidateError, "example_input", "VAE fails"):
            cg.find_candidates(model, wrong)
    for options in ({"name": 5}, {"wrapped": "yes"}, {"output": 1.5}):
        with refused(cg.CandidateError, next(iter(options))):
            cg.Candidate("0", nn.ReLU(), **options)  # type: ignore[arg-type]
