"""Batches that run through the model together: as alone, and only where that is exact."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.multipliers import one_pass
from constrained_growth.multipliers.merging import in_groups, joined, treats_samples_alone

Data = list[tuple[Any, Any]]


def mlp(width: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    )


def problem(model: nn.Module, data: Data, loss_fn: Any = None, **more: Any) -> cg.GrowthProblem:
    candidates = [
        cg.Candidate(after=after, block=cg.blocks.ResidualMLP(3, 2, torch.tanh))
        for after in ("1", "3")
    ]
    return cg.GrowthProblem(model, loss_fn or nn.CrossEntropyLoss(), data, candidates, **more)


def classes(*sizes: int) -> Data:
    return [(torch.randn(n, 2), torch.randint(3, (n,))) for n in sizes]


class Counted(nn.Module):
    """How many samples came at a time."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        for name, module in model.named_children():
            self.add_module(name, module)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        for module in self.children():
            x = module(x)
        return x


def alone(problem: cg.GrowthProblem, **options: Any) -> one_pass.Measurement:
    """The same pass, one batch at a time."""
    running = one_pass.MultiplierPass(
        problem.model,
        problem.loss_fn,
        problem.sites,
        gradients=True,
        moments=True,
        weight=problem.weight,
    )
    with running.watching():
        for pair in problem.data:
            running.add(*pair)
    return running.measurement(last=True)


def together(problem: cg.GrowthProblem) -> one_pass.Measurement:
    return one_pass.measure(
        problem.model,
        problem.loss_fn,
        problem.data,
        problem.sites,
        gradients=True,
        moments=True,
        progress=False,
        weight=problem.weight,
    )


def assert_same(one: one_pass.Measurement, other: one_pass.Measurement) -> None:
    assert_close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
    assert (one.num_samples, one.num_batches) == (other.num_samples, other.num_batches)
    assert one.loss == pytest.approx(other.loss, rel=1e-13)
    assert one.gradients is not None
    assert other.gradients is not None
    for name, gradient in one.gradients.items():
        assert_close(gradient, other.gradients[name])
    for name, found in one.estimates.items():
        expected = other.estimates[name]
        assert found.variance == pytest.approx(expected.variance, rel=1e-9)
        for key, value in found.multiplier.items():
            assert_close(value, expected.multiplier[key])
        for key, moment in found.moments.items():
            assert_close(moment.features, expected.moments[key].features)
            assert_close(moment.cotangents, expected.moments[key].cotangents)


def assert_merged(model: Counted, data: Data) -> None:
    """In fewer runs than there are batches, one of them a part of the first batch."""
    first = len(data[0][0])
    assert model.sizes[:2] == [first, first // 2 - first // 4]
    assert len(model.sizes) < len(data)
    assert sum(model.sizes) == sum(len(x) for x, _ in data) + model.sizes[1]


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=4, max_size=12), seed=st.integers(0, 99))
def test_batches_together_give_what_they_give_alone(sizes: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    data = classes(8, *sizes)
    model = Counted(mlp())
    here = problem(model, data)
    expected = alone(here)
    model.sizes.clear()
    assert_same(together(here), expected)
    assert_merged(model, data)


def without_some(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, ignore_index=0)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target, weight=torch.tensor([1.0, 2.0, 5.0]))


def in_place(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.clamp_(-99.0, 99.0), target)


@pytest.mark.parametrize(
    "loss_fn",
    [
        weighted,
        without_some,
        in_place,
        lambda output, target: (output.mean(0) - target.double().mean()).square().sum(),
    ],
)
def test_the_loss_is_that_of_each_batch(loss_fn: Any) -> None:
    """Also where the mean of all is not the mean of the batches' means."""
    torch.manual_seed(1)
    data = classes(8, 7, 8, 5, 8, 8)
    model = Counted(mlp())
    here = problem(model, data, loss_fn)
    expected = alone(here)
    model.sizes.clear()
    assert_same(together(here), expected)
    assert_merged(model, data)


def test_weights_are_those_of_each_batch() -> None:
    torch.manual_seed(2)
    data = classes(8, 6, 5, 8, 7)
    data.insert(1, (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)))  # of weight 0
    model = Counted(mlp())
    here = problem(model, data, without_some, weight=lambda _, target: (target != 0).sum())
    expected = alone(here)
    model.sizes.clear()
    assert_same(together(here), expected)
    assert len(model.sizes) < len(data) - 1


class Named(nn.Module):
    """Called by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(2, 3), nn.Linear(3, 3), nn.Tanh()

    def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)) * scale)


def test_inputs_of_several_tensors() -> None:
    torch.manual_seed(3)
    data = [({"x": x, "scale": torch.rand(len(x), 1)}, y) for x, y in classes(8, 8, 3, 8, 8)]
    model = Named()
    calls = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["x"])), with_kwargs=True
    )
    block = cg.blocks.ResidualMLP(3, 2, torch.tanh)
    here = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [cg.Candidate("act", block)])
    expected = alone(here)
    calls.clear()
    assert_same(together(here), expected)
    assert calls == [8, 2, 27]


class AcrossSamples(nn.Module):
    """Every sample looks at all others."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Recurrent(nn.Module):
    """Time first: what looks like samples are steps in time."""

    def __init__(self, *, backward: bool) -> None:
        super().__init__()
        self.rnn, self.backward = nn.RNN(2, 3), backward

    def forward(self, x: Tensor) -> Tensor:
        x = x.flip(0) if self.backward else x
        y, _ = self.rnn(x)
        return y.flip(0) if self.backward else y


class Lengths(nn.Module):
    """Another function for every number of samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x * len(x)


@pytest.mark.parametrize(
    ("make", "is_alone"),
    [
        (mlp, True),
        (lambda: nn.Sequential(mlp(), nn.BatchNorm1d(3)).eval(), True),
        (lambda: nn.Sequential(mlp(), nn.Dropout(0.5)).eval(), True),
        (lambda: nn.Sequential(mlp(), nn.BatchNorm1d(3)), False),
        (lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), False),
        (lambda: nn.Sequential(mlp(), AcrossSamples()), False),
        (lambda: nn.Sequential(mlp(), Lengths()), False),
        (lambda: Recurrent(backward=False), False),
        (lambda: Recurrent(backward=True), False),
    ],
)
def test_who_treats_samples_alone(make: Callable[[], nn.Module], is_alone: bool) -> None:
    torch.manual_seed(4)
    model = make()
    x = torch.randn(8, 2)
    output = model(x)
    state = torch.get_rng_state()
    assert treats_samples_alone(model, x, None, output) is is_alone
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("input", "output"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2)),  # too few to have a middle
        (torch.zeros(8, 2), torch.zeros(())),
        (torch.zeros(8, 2), torch.zeros(4, 2)),
        (torch.zeros(8, 2), {"logits": torch.zeros(8, 2)}),
        ((torch.zeros(8, 2), torch.zeros(2)), torch.zeros(8, 2)),
        ((torch.zeros(8, 2), "word"), torch.zeros(8, 2)),
    ],
)
def test_what_is_not_of_samples_stays_alone(input: Any, output: Any) -> None:
    assert not treats_samples_alone(nn.Identity(), input, None, output)


@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm1d(3), lambda: nn.Dropout(0.3), AcrossSamples]
)
def test_models_that_mix_samples_run_batch_by_batch(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(5)
    data = classes(8, 8, 8, 8)
    model = Counted(nn.Sequential(*mlp(), make()))
    here = problem(model, data)
    model.sizes.clear()
    cg.solve(here, progress=False)
    assert model.sizes == [8, 2, 8, 8, 8]


def test_blocks_without_a_closed_form_need_the_batches() -> None:
    """The variance is then that between batches."""

    class Scale(nn.Module):
        pinned = ("weight",)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    torch.manual_seed(6)
    data = classes(8, 8, 8, 8)
    model = Counted(mlp())
    here = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [cg.Candidate("1", Scale())])
    model.sizes.clear()
    cg.solve(here, progress=False)
    assert model.sizes == [8, 8, 8, 8]


def test_a_single_batch_runs_once() -> None:
    torch.manual_seed(7)
    model = Counted(mlp())
    here = problem(model, classes(8))
    model.sizes.clear()
    cg.solve(here, progress=False)
    assert model.sizes == [8]


def test_groups_end_where_shapes_change() -> None:
    wide = torch.zeros(2, 5)
    pairs = [(torch.zeros(2, 3), 0)] * 2 + [(wide, 0)] + [(wide.float(), 0)] * 2 + [("word", wide)]
    assert [len(group) for group in in_groups(pairs, 9)] == [2, 1, 2, 1]
    assert [len(group) for group in in_groups([], 9)] == []


def test_joining_keeps_the_structure() -> None:
    first, second = ((torch.ones(1, 2), [torch.zeros(1)]), (torch.zeros(2, 2), [torch.ones(2)]))
    whole = joined([first, second])
    assert torch.equal(whole[0], torch.tensor([[1.0, 1], [0, 0], [0, 0]]))
    assert torch.equal(whole[1][0], torch.tensor([0.0, 1, 1]))
    assert joined([first]) is first
