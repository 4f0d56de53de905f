"""Batches arrive at the model as the loader made them, and count their samples."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_same, refused, solved
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader

import constrained_growth as cg


class Scene(NamedTuple):
    position: Tensor
    colour: Tensor


@dataclass(frozen=True)
class Graph:
    nodes: Tensor
    edges: list[Tensor]
    name: str = "graph"


class Encoding(UserDict[str, Any]):
    """A mapping whose items are attributes too, as those of tokenizers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Taking(nn.Module):
    """A model that insists on the type of its input and reads it by `read`."""

    def __init__(self, kind: type, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.kind, self.read = kind, read
        self.first, self.act, self.last = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)

    def forward(self, batch: Any) -> Tensor:
        assert type(batch) is self.kind
        return self.last(self.act(self.first(self.read(batch))))


class Spread(Taking):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        return self.last(self.act(self.first(a * b)))


def pair(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3), torch.randn(n, 3)


def encoding(n: int) -> Encoding:
    return Encoding(dict(zip("ab", pair(n), strict=True)))


def nested(n: int) -> Scene:
    position, colour = pair(n)
    return Scene(position, [{"colour": (colour,)}])  # type: ignore[arg-type]


KINDS: dict[str, tuple[Callable[[int], Any], type, Callable[[Any], Tensor]]] = {
    "named tuple": (lambda n: Scene(*pair(n)), Scene, lambda s: s.position * s.colour),
    "nested": (nested, Scene, lambda s: s.position * s.colour[0]["colour"][0]),
    "list": (lambda n: list(pair(n)), list, lambda items: items[0] * items[1]),
    "dataclass": (
        lambda n: Graph(pair(n)[0], [pair(n)[1]]),
        Graph,
        lambda graph: graph.nodes * graph.edges[0] * len(graph.name),
    ),
    "mapping": (encoding, Encoding, lambda batch: batch.a * batch.b),
    "dict": (lambda n: dict(encoding(n)), dict, lambda batch: batch["a"] * batch["b"]),
}


def blocks() -> list[cg.Candidate]:
    return [cg.Candidate("act", cg.blocks.ResidualMLP(5, 4, torch.tanh))]


def check(model: Any, data: list[Any], sizes: list[int]) -> None:
    """λ is that of the layer really inserted, and the batches are left alone."""
    before = copy.deepcopy(data)
    solution = solved(model, data, *blocks(), loss_fn=mse_loss)
    assert_same([list(parts(x)) for x, _ in data], [list(parts(x)) for x, _ in before])
    assert solution.num_samples == sum(sizes)
    record = cg.insert(model, solution)
    assert max(record.difference.values()) == 0
    takes_two = isinstance(model, Spread)
    outputs = (
        [model(**x) if isinstance(x, Mapping) else model(*x) for x, _ in data]
        if takes_two
        else [model(x) for x, _ in data]
    )
    losses = [n * mse_loss(y, t) for n, y, (_, t) in zip(sizes, outputs, data, strict=True)]
    weight = model.get_parameter("act.inserted.outer.weight")
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum() / sum(sizes), weight)
    torch.testing.assert_close(solution.multipliers["act"]["outer.weight"], -gradient)


def parts(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Graph):
        yield from (value.nodes, *value.edges)
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from parts(item)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_batch_arrives_as_what_it_is(kind: str) -> None:
    make, type_, read = KINDS[kind]
    data = [(make(n), torch.randn(n, 2)) for n in (6, 3)]
    check(Taking(type_, read), data, [6, 3])


@pytest.mark.parametrize("kind", ["list", "mapping", "dict"])
def test_items_are_spread_where_forward_takes_them_alone(kind: str) -> None:
    data = [(KINDS[kind][0](n), torch.randn(n, 2)) for n in (6, 3)]
    check(Spread(list, lambda batch: batch), data, [6, 3])


def test_a_loader_makes_lists_of_tuples() -> None:
    torch.manual_seed(0)
    samples = [((torch.randn(3), torch.randn(3)), torch.randn(2)) for _ in range(9)]
    loader = DataLoader(samples, batch_size=6)  # type: ignore[arg-type]
    assert type(next(iter(loader))[0]) is list
    check(Spread(list, lambda batch: batch), list(loader), [6, 3])


class Tagger(Taking):
    def __init__(self) -> None:
        super().__init__(PackedSequence, lambda packed: self.rnn(packed)[0].data)
        self.rnn = nn.GRU(3, 3)


def test_a_packed_sequence_has_as_many_samples_as_sequences() -> None:
    lengths = [(5, 3, 2), (4, 1)]
    data = [
        (pack_sequence([torch.randn(n, 3) for n in some]), torch.randn(sum(some), 2))
        for some in lengths
    ]
    check(Tagger(), data, [3, 2])


def test_batches_that_are_moved_keep_their_types() -> None:
    model = Taking(Scene, lambda s: s.position.double() * s.colour).to("cpu")
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    data = [(Scene(*pair(4)), torch.randn(4, 2))]
    solved(model, data, *blocks(), loss_fn=mse_loss)
    assert all(one is data[0][0] for one in seen)  # it is where it has to be


def test_a_jagged_tensor_at_a_site_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    ragged = [torch.randn(n, 3) for n in (2, 4)]
    x = torch.nested.nested_tensor(ragged, layout=torch.jagged)
    candidate = cg.Candidate("1", cg.blocks.ResidualMLP(5, 4, torch.tanh))
    with refused(cg.CandidateError, 'after="1"', "nested", "pad"):
        solved(model, [(x, torch.randn(6, 2))], candidate, loss_fn=lambda o, t: o.values().mean())
