"""Sites in outputs that are no tensor: tuples, named tuples, dicts, dataclasses, nested ones."""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import CROSS_ENTROPY, Gain, classified, nothing_left_behind, refused, solved
from standing import assert_served
from torch import Tensor, nn

import constrained_growth as cg


class Both(NamedTuple):
    first: Tensor
    second: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    first: Tensor
    second: Tensor


@dataclasses.dataclass
class Ordered(OrderedDict[str, Any]):
    """A dataclass that is an ordered dict too, as the outputs of Transformers are."""

    first: Tensor | None = None
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


class Plain:
    """An object that is no structure Python knows of."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second


class Giving(nn.Module):
    """A layer, a module that gives out two tensors in some form, and a layer that uses both."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any], unpack: Callable[[Any], Any]) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(2, 4), nn.Linear(8, 3)
        self.pair, self.unpack = Pair(pack), unpack

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.unpack(self.pair(self.into(x)))
        return self.out(torch.cat([first, second], -1))


class Pair(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x.tanh(), x.sin())


def by_name(output: Any) -> tuple[Tensor, Tensor]:
    return output.first, output.second


FORMS: dict[str, tuple[Any, Any, Any, Any]] = {
    # pack, unpack, which tensor is the second, how a tensor takes its place
    "tuple": (lambda a, b: (a, b), lambda o: o, 1, lambda o, t: (o[0], t)),
    "from the end": (lambda a, b: (a, b), lambda o: o, -1, lambda o, t: (o[0], t)),
    "list": (lambda a, b: [a, b], lambda o: o, 1, lambda o, t: [o[0], t]),
    "named tuple": (Both, by_name, "second", lambda o, t: Both(o.first, t)),
    "dict": (
        lambda a, b: {"first": a, "second": b},
        lambda o: (o["first"], o["second"]),
        "second",
        lambda o, t: {"first": o["first"], "second": t},
    ),
    "frozen dataclass": (Frozen, by_name, "second", lambda o, t: Frozen(o.first, t)),
    "by number": (Frozen, by_name, 1, lambda o, t: Frozen(o.first, t)),
    "dict with attributes": (
        lambda a, b: Ordered(first=a, hidden=b),
        lambda o: (o.first, o["hidden"]),
        "hidden",
        lambda o, t: Ordered(first=o.first, hidden=t),
    ),
    "key that is a number": (
        lambda a, b: {0: b, "first": a},
        lambda o: (o["first"], o[0]),
        0,
        lambda o, t: {0: t, "first": o["first"]},
    ),
    "type of PyTorch's": (
        lambda a, b: torch.stack([a, b]).max(0),
        lambda o: (o.values.sin(), o.values),
        "values",
        lambda o, t: type(o)((t, o.indices)),
    ),
    "object": (Plain, by_name, "second", lambda o, t: Plain(o.first, t)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_tensor_that_the_user_picks(form: str, frozen: bool) -> None:
    pack, unpack, which, put = FORMS[form]
    model, data = Giving(pack, unpack).requires_grad_(not frozen), classified(20, batch=7)
    for block in (Gain(4), cg.blocks.ResidualMLP(4, 3, torch.tanh)):
        one = cg.Candidate("pair", block, output=which)
        second: Callable[[Any], Tensor] = lambda output: unpack(output)[1]  # noqa: E731
        assert_served(model, data, one, lambda o, b, a, k: put(o, b(second(o))))  # noqa: B023


@pytest.mark.parametrize(
    ("pack", "unpack", "put"),
    [
        (lambda a, b: (a, b), lambda o: o, lambda o, b: (b(o[0]), o[1])),
        (
            lambda a, b: {"ids": b.long(), "rest": (None, [a]), "b": b},
            lambda o: (o["rest"][1][0], o["b"]),
            lambda o, b: {**o, "rest": (None, [b(o["rest"][1][0])])},
        ),
    ],
)
def test_the_first_floating_point_tensor_unless_told_otherwise(
    pack: Any, unpack: Any, put: Any
) -> None:
    model, data = Giving(pack, unpack), classified(20, batch=7)
    assert_served(model, data, cg.Candidate("pair", Gain(4)), lambda o, b, a, k: put(o, b))


def test_a_recurrent_layer_gives_a_tuple() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.out = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            sequence, (hidden, _) = self.cells(x)
            return self.out(sequence[:, 0] + hidden[0])

    data = [(torch.randn(6, 5, 2), torch.randint(3, (6,))) for _ in range(2)]
    one = cg.Candidate("cells", cg.blocks.ResidualMLP(4, 3, torch.tanh))
    assert_served(Recurrent(), data, one, lambda o, b, a, k: (b(o[0]), o[1]))


def test_two_tensors_of_one_output_are_two_sites() -> None:
    model, data = Giving(lambda a, b: (a, b), lambda o: o), classified(20, batch=7)
    both = [cg.Candidate("pair", Gain(4), name=f"of {i}", output=i) for i in (0, 1)]
    together = solved(model, data, *both)
    for one in both:
        alone = solved(model, data, one)
        for key, value in alone.multipliers[one.name].items():
            torch.testing.assert_close(together.multipliers[one.name][key], value)
    assert not torch.equal(
        together.multipliers["of 0"]["gain"], together.multipliers["of 1"]["gain"]
    )


def test_a_part_that_is_overwritten_later() -> None:
    class Overwriting(Giving):
        def forward(self, x: Tensor) -> Tensor:
            first, second = self.pair(self.into(x))
            return self.out(torch.cat([first, second.mul_(2)], -1))

    model, data = Overwriting(lambda a, b: (a, b), lambda o: o), classified(20, batch=7)
    one = cg.Candidate("pair", cg.blocks.ResidualMLP(4, 3, torch.tanh), output=1)
    assert_served(model, data, one, lambda o, b, a, k: (o[0], b(o[1]).clone()))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (2, ["output=2", "nothing", "tuple", "[0, 1]"]),
        ("x", ["output='x'", "nothing"]),
        (1, ["output=1", "a NoneType"]),
        (True, ["output=True", "neither an index"]),
        (1.5, ["output=1.5", "neither an index"]),
    ],
)
def test_outputs_that_are_not_there(output: Any, words: list[str]) -> None:
    model, data = Giving(lambda a, b: (a, None), lambda o: (o[0], o[0])), classified(5)
    with nothing_left_behind(model), refused(cg.CandidateError, "pair", *words):
        one = cg.Candidate("pair", Gain(4), output=output)
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])


def test_a_tensor_has_no_parts() -> None:
    model = Giving(lambda a, b: (a, b), lambda o: o)
    with refused(cg.CandidateError, 'after="into"', "output=0", "tensor itself"):
        one = cg.Candidate("into", Gain(4), output=0)
        cg.GrowthProblem(model, CROSS_ENTROPY, classified(5), [one])


def test_a_structure_that_cannot_be_made_again_is_refused() -> None:
    class Sealed(tuple[Tensor, ...]):
        def __new__(cls, secret: str, items: Any) -> "Sealed":
            return super().__new__(cls, items)

    model, data = Giving(lambda a, b: Sealed("", (a, b)), lambda o: o), classified(5)
    with nothing_left_behind(model), refused(cg.CandidateError, "Sealed", "made again"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("pair", Gain(4))])
