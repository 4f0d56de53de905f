"""What a model and a loss keep from call to call is what it was, whatever was asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_multipliers,
    autograd_multipliers,
    classified,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import constrained_growth as cg


def residual() -> nn.Module:
    return cg.blocks.ResidualMLP(6, 5, torch.tanh)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))


# --- a loss ---------------------------------------------------------------------------------------


class Centre(nn.Module):
    """A running centre in a buffer, one in a plain attribute, and what else a module may keep."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.full((3,), 0.5, dtype=torch.float64))
        self.plain = torch.ones(3, dtype=torch.float64)
        self.count, self.latest = 0, [0.0]
        self.array, self.random = np.zeros(3), np.random.default_rng(0)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.centre.lerp_(output.detach().mean(0), 0.1)
        self.plain = 0.9 * self.plain + 0.1 * self.centre
        self.count += 1
        self.latest.append(float(output.detach().sum()))
        self.array += self.random.random(3)
        shifted = self.norm(output) - self.centre - self.plain
        return cross_entropy(shifted, target)

    def state(self) -> list[Any]:
        tensors = [self.centre, self.plain, *self.norm.buffers()]
        own = [self.array.tolist(), self.random.bit_generator.state]
        return [self.count, list(self.latest), *own, *(tensor.tolist() for tensor in tensors)]


class Meter:
    """A metric that is no module."""

    def __init__(self) -> None:
        self.sums, self.count = torch.zeros(3, dtype=torch.float64), 0

    def update(self, output: Tensor) -> None:
        self.sums += output.detach().sum(0)
        self.count += len(output)


class Trainer:
    """An object with a method for a loss."""

    def __init__(self, centre: Centre, meter: Meter) -> None:
        self.centre, self.meters = centre, {"sums": meter}

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        self.meters["sums"].update(output)
        return self.centre(output, target)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output, target)


@dataclass(slots=True)
class Slots:
    """A loss whose attributes are in slots, of which one is filled by its first call."""

    centre: Centre
    meter: Meter
    last: Tensor = field(init=False)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.meter.update(output)
        self.centre, self.last = copy.deepcopy(self.centre), output.detach()
        return self.centre(output, target)


def closure(centre: Centre, meter: Meter) -> Callable[..., Tensor]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        meter.update(output)
        return centre(output, target)

    return lambda output, target: loss(output, target)


def with_two(centre: Centre, output: Tensor, target: Tensor, *, meter: Meter) -> Tensor:
    meter.update(output)
    return centre(output, target)


def with_globals(output: Tensor, target: Tensor) -> Tensor:
    METER.update(output)
    return GLOBAL(output, target)


GLOBAL, METER = Centre(), Meter()

LOSSES: dict[str, Callable[[Centre, Meter], Any]] = {
    "module": lambda centre, meter: centre,
    "bound method": lambda centre, meter: Trainer(centre, meter).loss,
    "object": Trainer,
    "slots": Slots,
    "partial": lambda centre, meter: partial(with_two, centre, meter=meter),
    "closure": closure,
    "globals": lambda centre, meter: with_globals,
}


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("fails", [False, True])
def test_what_a_loss_keeps_is_put_back(kind: str, fails: bool) -> None:
    centre, meter = (GLOBAL, METER) if kind == "globals" else (Centre(), Meter())
    loss_fn = LOSSES[kind](centre, meter)
    before = centre.state(), meter.sums.tolist(), meter.count
    data: list[Any] = classified(16, batch=8)
    if fails:
        data[1] = (data[1][0], data[1][1] + 7)
    problem = cg.GrowthProblem(net(), loss_fn, data, [cg.Candidate("1", residual())])
    assert (centre.state(), meter.sums.tolist(), meter.count) == before
    if fails:
        with pytest.raises(IndexError):
            cg.solve(problem)
    else:
        cg.solve(problem)
    assert (centre.state(), meter.sums.tolist(), meter.count) == before
    if isinstance(loss_fn, Slots):
        assert loss_fn.centre is centre
        assert not hasattr(loss_fn, "last")


def test_a_generator_and_gradients_of_the_loss_are_put_back() -> None:
    critic, generator = nn.Linear(3, 1).requires_grad_(False), torch.Generator().manual_seed(3)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        critic.requires_grad_(True)
        noise = torch.randn(output.shape, generator=generator)
        critic(output.detach() + noise).mean().backward()
        return cross_entropy(output, target) + critic(output).square().mean()

    state = generator.get_state()
    solved(net(), classified(8), cg.Candidate("1", residual()), loss_fn=loss_fn)
    assert torch.equal(generator.get_state(), state)
    assert all(p.grad is None and not p.requires_grad for p in critic.parameters())


def test_notes_that_a_function_takes_are_the_users() -> None:
    seen: list[int] = []

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        seen.append(len(output))
        return cross_entropy(output, target)

    solved(net(), classified(8), cg.Candidate("1", residual()), loss_fn=loss_fn)
    assert set(seen) == {8}


# --- a model --------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Carries its state on from batch to batch."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.cell, self.act, self.out = nn.GRUCell(2, 6), nn.ReLU(), nn.Linear(6, 3)
        self.h, self.in_place, self.steps = torch.zeros(8, 6), in_place, {"count": 0}

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, self.h.clone())
        if self.in_place:
            self.h.copy_(h.detach())
        else:
            self.h = h.detach()
        self.steps["count"] += 1
        return self.out(self.act(h))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_state_is_carried_through_the_pass_and_put_back(in_place: bool) -> None:
    model, data = Recurrent(in_place), classified(24, batch=8)
    cells = [
        cg.Candidate("act", residual(), name="residual"),
        cg.Candidate("act", cg.blocks.IdentityLinear(6, nn.ReLU()), name="identity"),
    ]
    h = model.h
    solution = solved(model, data, *cells, rule=cg.TopK(2))
    assert model.h is h
    assert not bool(h.any())
    assert model.steps == {"count": 0}
    for one in cells:
        expected = autograd_multipliers(model, data, one)
        assert_multipliers(solution, one.name, expected, atol=1e-12)
    model.h.fill_(0.1)
    cg.insert(model, solution)  # it is still a function of its input and of this state
    assert torch.equal(model.h, torch.full((8, 6), 0.1))


def test_a_state_with_its_graph_is_refused() -> None:
    class Undetached(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            self.h = self.cell(x, self.h)
            return self.out(self.act(self.h))

    model = Undetached(False)
    h = model.h
    with refused(cg.CandidateError, "keeps state from batch to batch", "detach"):
        solved(model, classified(24, batch=8), cg.Candidate("act", residual()))
    assert model.h is h


class Keeping(nn.Module):
    """Keeps activations, in attributes and in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.every: list[Tensor] = []
        self.named: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.linear(x).tanh()
        self.every.append(self.hidden)
        self.named["pair"] = (x, self.hidden)
        return x + 0.5 * self.hidden


def keeping() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 6), Keeping(), Keeping(), nn.Linear(6, 3))


def test_kept_activations_go_again() -> None:
    model, data = keeping(), classified(16, batch=8)
    found = cg.find_candidates(model, data[0][0])
    solution = solved(model, data, *found)
    assert not hasattr(model[1], "hidden")
    assert (model[1].every, model[1].named) == ([], {})
    copy.deepcopy(model)
    cg.insert(model, solution)
    copy.deepcopy(model)


def test_kept_activations_of_a_training_step_are_no_obstacle() -> None:
    model, data = keeping(), classified(16, batch=8)
    CROSS_ENTROPY(model(data[0][0]), data[0][1]).backward()
    block: Any = model[1]
    hidden, value = block.hidden, block.hidden.detach().clone()
    blocks = [cg.blocks.CopiedBlock(model[1], pinned=("linear.weight", "linear.bias")), residual()]
    cells = [cg.Candidate("1", blocks[0]), cg.Candidate("2", blocks[1])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trial = cg.rules.Trial(2, optimizer)
    solved(model, data, *cells, rule=trial)
    solution = solved(model, data, *cells, rule=cg.TopK(2))
    assert block.hidden is hidden
    assert torch.equal(hidden, value)
    assert len(block.every) == 1
    cg.insert(model, solution, optimizer=optimizer)
    CROSS_ENTROPY(model(data[0][0]), data[0][1]).backward()


class Hooking(nn.Sequential):
    """Puts hooks on its layers when it runs first, as Transformers does to collect outputs."""

    hooked = False

    def forward(self, input: Tensor) -> Tensor:
        if not self.hooked:
            self[0].register_forward_hook(lambda _, __, output: output.mul(1.5))  # type: ignore
            self.hooked = True
        return super().forward(input)


@pytest.mark.parametrize("ran", [True, False])
def test_hooks_that_a_model_adds_as_it_runs_go_again(ran: bool) -> None:
    model, data = Hooking(*net()), classified(5)
    if ran:
        model(data[0][0])
    with nothing_left_behind(model):
        found = cg.find_candidates(model, data[0][0])
        solution = solved(model, data, *found)
    assert_multipliers(solution, "1", autograd_multipliers(model, data, found[0]))
    cg.insert(model, solution)
    assert len(model[0]._forward_hooks) == ran


class Counting(nn.Sequential):
    """Changes in eval mode what its backward pass needs."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        result = output.exp()
        return result if self.training else result.mul_(2)


def test_a_loss_without_a_gradient_in_one_mode() -> None:
    model, data = Counting(*net()), classified(5)
    blocks = [cg.Candidate("1", residual())]
    cg.GrowthProblem(model, CROSS_ENTROPY, data, blocks)
    with nothing_left_behind(model.eval()), refused(cg.DataError, "in eval mode", "the other mode"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, blocks)


class Installing(nn.Linear):
    """At its first call it installs a hook, and notes that it has."""

    def forward(self, input: Tensor) -> Tensor:
        if not hasattr(self, "installed"):
            self.installed = self.register_forward_hook(lambda *_: None)
        return super().forward(input)


def test_hooks_that_a_model_installs_when_it_runs_are_taken_off() -> None:
    model = nn.Sequential(Installing(2, 6), nn.Tanh(), nn.Linear(6, 3))
    solved(model, classified(8), cg.Candidate("1", residual()))
    assert not model[0]._forward_hooks
    assert not hasattr(model[0], "installed")


def test_a_graph_of_the_users_goes_on_over_a_solve() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    data = [(torch.randn(8, 2), torch.randint(3, (8,))) for _ in range(2)]
    loss = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
    before = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    block = cg.blocks.IdentityLinear(4, nn.ReLU())
    cg.solve(cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [cg.Candidate("2", block)]))
    after = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
