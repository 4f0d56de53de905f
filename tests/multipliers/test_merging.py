"""Batches that run through the model together: as alone, and only where that is exact."""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth._multipliers import one_pass
from constrained_growth._multipliers.merging import in_groups, joined, treats_samples_alone

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
        self._seen = SimpleNamespace(sizes=[])  # a list would be something that the model keeps

    @property
    def sizes(self) -> list[int]:
        return self._seen.sizes

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
    """The first batch, two of its samples, two others, and all other batches together."""
    first, *others = (len(x) for x, _ in data)
    assert model.sizes == [first, 2, 2, sum(others)]


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
    assert model.sizes == [8, 2, 2, 26]


class Named(nn.Module):
    """Called by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(2, 3), nn.Linear(3, 3), nn.Tanh()
        self.seen = SimpleNamespace(sizes=[])

    def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
        self.seen.sizes.append(len(x))
        return self.b(self.act(self.a(x)) * scale)


def test_inputs_of_several_tensors() -> None:
    torch.manual_seed(3)
    data = [({"x": x, "scale": torch.rand(len(x), 1)}, y) for x, y in classes(8, 8, 3, 8, 8)]
    model = Named()
    block = cg.blocks.ResidualMLP(3, 2, torch.tanh)
    here = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [cg.Candidate("act", block)])
    expected = alone(here)
    model.seen.sizes.clear()
    assert_same(together(here), expected)
    assert model.seen.sizes == [8, 2, 2, 27]


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
    ("make", "tried"),
    [(lambda: nn.BatchNorm1d(3), []), (lambda: nn.Dropout(0.3), []), (AcrossSamples, [2])],
)
def test_models_that_mix_samples_run_batch_by_batch(
    make: Callable[[], nn.Module], tried: list[int]
) -> None:
    torch.manual_seed(5)
    data = classes(8, 8, 8, 8)
    model = Counted(nn.Sequential(*mlp(), make()))
    here = problem(model, data)
    model.sizes.clear()
    cg.solve(here, progress=False)
    assert model.sizes == [8, *tried, 8, 8, 8]


class OverTheLargest(nn.Module):
    """Every sample is divided by the largest number of all."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().max()


def test_what_depends_on_one_sample_of_all() -> None:
    """Whichever it is."""
    for seed in range(12):
        torch.manual_seed(seed)
        model, x = OverTheLargest(), torch.randn(8, 2)
        assert not treats_samples_alone(model, x, None, model(x))


class Halves(nn.Module):
    """Each sample of the first half of a batch is mixed with one of the second."""

    def forward(self, x: Tensor) -> Tensor:
        one, other = x.chunk(2)
        return torch.cat([one - other, one + other])


class Room(nn.Module):
    """As with experts, which take half of the samples at most, the first that come."""

    def forward(self, x: Tensor) -> Tensor:
        mine = x[:, :1] > 0
        return torch.where(mine & (mine.cumsum(0) > len(x) // 2), 0.0, x)


def test_what_depends_on_how_many_came_before() -> None:
    """Also where there was room enough."""
    x = torch.tensor([1.0, -1, -1, -1, 1, 1, 1, -1])[:, None]
    assert torch.equal(Room()(x), x)
    assert not treats_samples_alone(Room(), x, None, x)


class Pairs(nn.Module):
    """Samples that follow each other are mixed."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([some - some.mean(0) for some in x.split(2)])


class Carried(nn.Module):
    """The state at the end of a batch is that at the beginning of the next."""

    state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before = 0 if self.state is None or self.state.shape != x.shape else self.state
        self.state = torch.tanh(x + before).detach()
        return torch.tanh(x + before)


class Later(nn.Module):
    """Something else, after some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x if self.count < 3 else 2 * x


class Bank(nn.Module):
    """What came earlier, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.bank: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.bank.append(x.detach().mean(0))
        return x if len(self.bank) < 3 else x - torch.stack(self.bank).mean(0)


def spectral() -> nn.Module:
    """Which improves its singular vectors whenever it runs."""
    return nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "make", [Pairs, Halves, Carried, Later, Bank, spectral, lambda: nn.Dropout(1e-9)]
)
def test_what_is_kept_or_drawn_is_as_batch_by_batch(make: Callable[[], nn.Module]) -> None:
    """Also not changed by a run more than there are batches."""
    measured = []
    for way in (alone, together):
        torch.manual_seed(6)
        model = Counted(nn.Sequential(*mlp(), make()))
        here = problem(model, classes(8, 6, 8, 8, 8))
        model.sizes.clear()
        torch.manual_seed(7)
        measured.append(way(here))
    assert_same(*measured)
    assert model.sizes[-4:] == [6, 8, 8, 8]


def test_a_loss_of_what_was_inside_the_model() -> None:
    """By an attribute, or by a hook."""

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.spread = x.var()
            return x

    torch.manual_seed(8)
    inside, seen = Inside(), []

    def by_attribute(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target) + inside.spread

    def by_hook(output: Tensor, target: Tensor) -> Tensor:
        inner = torch.cat(seen)
        seen.clear()
        return nn.functional.cross_entropy(output, target) + inner.var()

    data = classes(8, 7, 8, 8)
    here = problem(nn.Sequential(*mlp(), inside), data, by_attribute)
    assert_same(together(here), alone(here))
    model = mlp()
    model[2].register_forward_hook(lambda module, args, output: seen.append(output))
    here = problem(model, data, by_hook)
    assert_same(together(here), alone(here))


def test_a_loss_with_derivatives_in_it() -> None:
    def slopes(output: Tensor, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return (slope.square().sum(1) + output.square().sum(1)).mean()

    torch.manual_seed(9)
    data = [(x.requires_grad_(), x) for x, _ in classes(8, 7, 8, 8)]
    model = Counted(mlp())
    here = problem(model, data, slopes)
    expected = alone(here)
    model.sizes.clear()
    assert_same(together(here), expected)
    assert_merged(model, data)


def test_a_model_that_refuses_many_samples_runs_batch_by_batch() -> None:
    class AtMost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) <= 8
            return x

    torch.manual_seed(10)
    model = Counted(nn.Sequential(*mlp(), AtMost()))
    here = problem(model, classes(8, 7, 8, 8))
    expected = alone(here)
    model.sizes.clear()
    assert_same(together(here), expected)
    assert model.sizes == [8, 2, 2, 23, 7, 8, 8]


def test_sites_whose_first_dimension_is_only_as_long() -> None:
    """Time first inside the model, with as many steps as the batch has samples."""

    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.act(self.a(x.transpose(0, 1))).transpose(0, 1))

    torch.manual_seed(11)
    data = [(torch.randn(8, 8, 2), torch.randn(8, 8, 3)) for _ in range(4)]
    block = cg.blocks.ResidualMLP(3, 2, torch.tanh)
    here = cg.GrowthProblem(TimeFirst(), nn.MSELoss(), data, [cg.Candidate("act", block)])
    assert_same(together(here), alone(here))


def test_data_that_fills_the_same_memory_again() -> None:
    class Refilled:
        batches = classes(8, 8, 8, 8)

        def __iter__(self) -> Iterator[Any]:
            x, target = torch.empty(8, 2), torch.empty(8, dtype=torch.int64)
            for new_x, new_target in self.batches:
                yield x.copy_(new_x), target.copy_(new_target)

    torch.manual_seed(12)
    here = problem(mlp(), Refilled())  # type: ignore[arg-type]
    assert_same(together(here), alone(here))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_outputs_without_gradients_stay_alone(kind: torch.dtype) -> None:
    x = torch.zeros(8, 2, dtype=kind)
    assert not treats_samples_alone(nn.Identity(), x, None, x)


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


def test_one_at_a_time_if_asked() -> None:
    torch.manual_seed(8)
    model = Counted(mlp())
    here = problem(model, classes(8, 8, 8, 8))
    model.sizes.clear()
    alone, merged = (cg.solve(here, merge=merge, progress=False) for merge in (False, True))
    assert model.sizes[:4] == [8, 8, 8, 8]
    assert 24 in model.sizes[4:]
    for pin in here.constraints:
        torch.testing.assert_close(alone.dual_value(pin), merged.dual_value(pin))


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
    assert [len(group) for group in in_groups(pairs, 99)] == [2, 1, 2, 1]
    assert [len(group) for group in in_groups([], 99)] == []


def test_groups_have_room_for_large_batches() -> None:
    """However small the first one was."""
    sizes = (1, 1, 4, 1, 2, 2, 2, 9, 1)
    pairs = [(torch.zeros(n, 3), 0) for n in sizes]
    groups = [[len(x) for x, _ in group] for group in in_groups(pairs, 12)]
    assert groups == [[1, 1], [4], [1, 2], [2, 2], [9], [1]]


def test_joining_keeps_the_structure() -> None:
    first, second = ((torch.ones(1, 2), [torch.zeros(1)]), (torch.zeros(2, 2), [torch.ones(2)]))
    whole = joined([first, second])
    assert torch.equal(whole[0], torch.tensor([[1.0, 1], [0, 0], [0, 0]]))
    assert torch.equal(whole[1][0], torch.tensor([0.0, 1, 1]))
    assert joined([first]) is first
