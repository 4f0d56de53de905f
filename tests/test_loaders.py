"""A loader is read while its user may be in the middle of it."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CROSS_ENTROPY, candidate, feedforward
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import constrained_growth as cg
from constrained_growth.rules import Trial
from constrained_growth.training import LineSearch, evaluate

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # one core


def make_loader(persistent: bool = True) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(24, 2), torch.randint(3, (24,)))
    return DataLoader(data, batch_size=4, num_workers=1, persistent_workers=persistent)


def solve(model: nn.Module, loader: Any) -> None:
    cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, loader, [candidate("1")]))


def solve_with_a_trial(model: nn.Module, loader: Any) -> None:
    rule = Trial(1, torch.optim.SGD(model.parameters(), lr=0.1))
    cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, loader, [candidate("1")]), rule)


def solve_rebatched(model: nn.Module, loader: Any) -> None:
    solve(model, cg.rebatch(loader, 8))


def insert(model: nn.Module, loader: Any) -> None:
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, [next(iter(make_loader()))], [candidate("1")])
    cg.insert(model, cg.solve(problem), data=loader)


def ask(model: nn.Module, loader: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grower = cg.Grower(model, optimizer, CROSS_ENTROPY, loader, after_insertion=LineSearch(1))
    grower.ask()


def grow(model: nn.Module, loader: Any) -> None:
    sgd = torch.optim.SGD
    cg.grow(model, sgd, CROSS_ENTROPY, make_loader(), epochs=2, data=loader, validation=loader)


def measure(model: nn.Module, loader: Any) -> None:
    evaluate(model, {"loss": CROSS_ENTROPY}, loader)


READERS: list[Callable[[nn.Module, Any], None]] = [
    solve,
    solve_with_a_trial,
    solve_rebatched,
    insert,
    ask,
    grow,
    measure,
]


@pytest.mark.parametrize("at", [0, 3, 5])
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_epoch_under_way_goes_on(read: Callable[[nn.Module, Any], None], at: int) -> None:
    model, loader = feedforward(2, 4, 4, 3), make_loader()
    for _ in range(2):
        seen: list[Tensor] = []
        for number, (inputs, _) in enumerate(loader):
            seen.append(inputs)
            if number == at:
                read(model, loader)
                model = feedforward(2, 4, 4, 3)
        assert torch.equal(torch.cat(seen), loader.dataset.tensors[0])  # type: ignore[attr-defined]


class Augmented(Dataset[Any]):
    """Noise from generators of its own and from global ones."""

    def __init__(self) -> None:
        self.own = [np.random.default_rng(0), random.Random(0), np.random.RandomState(0)]
        self.torch = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        one, two, three = self.own
        noise = torch.rand(2, generator=self.torch) + torch.rand(2) + random.random()
        noise += one.random() + two.random() + three.rand()
        return noise, index % 3


class Pairs:
    """As people write it around a loader of something else."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


WAYS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda loader: loader,
    "wrapped": Pairs,
    "rebatched": lambda loader: cg.rebatch(loader, 4),
}


@pytest.mark.parametrize(("way", "workers"), [*((way, 0) for way in WAYS), ("wrapped", 1)])
def test_the_users_epochs_draw_what_they_would(way: str, workers: int) -> None:
    model = feedforward(2, 4, 3)

    def epochs(looks: bool) -> Tensor:
        for seed in (torch.manual_seed, random.seed):
            seed(0)
        generator = torch.Generator().manual_seed(1)
        options: Any = {"generator": generator, "persistent_workers": workers > 0}
        loader = DataLoader(Augmented(), 4, True, num_workers=workers, **options)
        seen = []
        for _ in range(2):
            for number, (inputs, _) in enumerate(data := WAYS[way](loader)):
                seen.append(inputs)
                if looks and number == 0:
                    with torch.random.fork_rng():
                        solve(model, data)
        return torch.cat(seen)

    assert torch.equal(epochs(True), epochs(False))


def test_workers_that_persist_serve_the_training_itself() -> None:
    """One worker process for all epochs, as with a loop in plain PyTorch."""

    class Counted(DataLoader[Any]):
        begun = 0

        def _get_iterator(self) -> Any:
            type(self).begun += 1
            return super()._get_iterator()

    def pairs() -> Iterator[tuple[Tensor, int]]:
        yield from ((torch.randn(2), number % 3) for number in range(8))

    loader = Counted(list(pairs()), batch_size=4, num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    other = [(torch.randn(8, 2), torch.randint(3, (8,)))]
    cg.grow(feedforward(2, 4, 3), torch.optim.SGD, CROSS_ENTROPY, loader, epochs=4, data=other)
    assert Counted.begun == 1


class Stream(IterableDataset[Any]):
    """Samples without a number of them."""

    def __iter__(self) -> Iterator[Any]:
        x, y = torch.linspace(-1, 1, 48).view(24, 2), torch.arange(24) % 3
        return iter(zip(x, y, strict=True))


@pytest.mark.parametrize("norm", [None, cg.norms.Frobenius()])
def test_a_stream_is_solved_as_its_batches(norm: Any) -> None:
    model, loader = feedforward(2, 4, 3), DataLoader(Stream(), batch_size=5)
    found, expected = (
        cg.solve(cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate("1")]), norm=norm)
        for data in (loader, list(loader))
    )
    assert found.num_batches == 5
    assert found.sensitivities["1"].value == pytest.approx(expected.sensitivities["1"].value)
    assert found.sensitivities["1"].standard_error > 0
