"""torch.jit.script of grown models: several arguments, tuples, attributes that the parent reads."""

import io
import pickle
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
from helpers import choose, refused
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth import blocks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def grown(model: nn.Module, x: Tensor, *sites: tuple[str, int | str | None]) -> Any:
    """The model with layers inserted, which then do something."""
    data = [(x, torch.randn_like(model(x)))]
    old = {id(p) for p in model.parameters()}
    candidates = [
        cg.Candidate(after, blocks.ResidualMLP(4, 5, torch.tanh), name=f"{i}", output=output)
        for i, (after, output) in enumerate(sites)
    ]
    problem = cg.GrowthProblem(model, nn.MSELoss(), data, candidates)
    cg.insert(model, cg.solve(problem, choose(*(c.name for c in candidates))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (id(parameter) not in old))
    return model.eval()


class Parent(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(4, 3)


class First(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x)[0])


class WithState(Parent):
    def forward(self, x: Tensor) -> Tensor:
        state = torch.ones(1, x.size(0), 4, dtype=x.dtype)
        y, (h, _) = self.part(x, (state, state))
        return self.head(y) + h.sum()


class Attention(Parent):
    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.part(x, x, x, need_weights=False)
        return self.head(y)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, y: Tensor, mask: Optional[Tensor] = None, scale: float = 2.0) -> Tensor:  # noqa: UP045
        y = scale * self.linear(y)
        return y if mask is None else y * mask


class Masking(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x, x > 0) + self.part(x, scale=0.5))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y.argmax(-1), y


class UsesTwo(Parent):
    def forward(self, x: Tensor) -> Tensor:
        index, y = self.part(x)
        return self.head(y * index.unsqueeze(-1))


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.BatchNorm1d(4)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) / self.fc.in_features + self.fc.bias
        for layer in self.layers:
            x = layer(x)
        return self.head(x * self.layers[0].weight.sum())  # type: ignore[operator]


sequences, vectors = (5, 3, 4), (6, 4)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[tuple[str, Any]]]] = {
    "GRU": (lambda: First(nn.GRU(4, 4)), sequences, [("part", 0), ("part", None)]),
    "LSTM": (
        lambda: WithState(nn.LSTM(4, 4, batch_first=True)),
        sequences,
        [("part", None)],
    ),
    "attention": (
        lambda: Attention(nn.MultiheadAttention(4, 2)),
        sequences,
        [("part", None)],
    ),
    "a mask": (lambda: Masking(Masked()), vectors, [("part", None), ("part", None)]),
    "the second of two": (lambda: UsesTwo(Two()), vectors, [("part", 1), ("part", -1)]),
    "attributes": (Reading, vectors, [("fc", None), ("layers.0", None), ("layers.1", None)]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_grown_model_is_scripted(case: str) -> None:
    make, shape, sites = CASES[case]
    x = torch.randn(shape)
    model = grown(make(), x, *sites)
    expected, keys = model(x), list(model.state_dict())
    modules = [(name, id(module)) for name, module in model.named_modules()]
    torch.jit.script(model)
    scripted = torch.jit.script(model)  # once more
    torch.testing.assert_close(scripted(x), expected, rtol=1e-13, atol=1e-13)
    assert list(scripted.state_dict()) == keys
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(model(x), expected)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert list(model.state_dict()) == keys


class Scaled(blocks.ResidualLinear):
    """Takes the other arguments of its site."""

    takes_context = True

    def forward(self, x: Tensor, mask: Optional[Tensor] = None, scale: float = 2.0) -> Tensor:  # noqa: UP045
        y = scale * torch.tanh(x @ self.weight.T + self.bias)
        return x + y if mask is None else x + y * mask


def test_a_layer_that_takes_the_other_arguments() -> None:
    x = torch.randn(vectors)
    model: Any = Masking(Masked())
    problem = cg.GrowthProblem(
        model, nn.MSELoss(), [(x, torch.randn(6, 3))], [cg.Candidate("part", Scaled(4, torch.tanh))]
    )
    cg.insert(model, cg.solve(problem, choose("part")))
    with torch.no_grad():
        model.part.inserted.weight.normal_()
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-13, atol=1e-13)
    model.part.base.register_forward_pre_hook(lambda _, args: args)
    with refused(cg.CandidateError, "torch.jit.script", "Masked", "hooks", "torch.export"):
        torch.jit.script(model)


def test_gradients_of_a_scripted_model() -> None:
    x = torch.randn(vectors)
    model = grown(Reading(), x, ("fc", None))
    torch.jit.script(model)(x).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_a_scripted_model_grows_again() -> None:
    x = torch.randn(vectors)
    model = grown(Masking(Masked()), x, ("part", None))
    torch.jit.script(model)
    grown(model, x, ("part", None))
    assert [name for name, _ in model.part.named_children()] == ["base", "inserted", "inserted2"]
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-13, atol=1e-13)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.linear(x)}


class UsesNamed(Parent):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x)["a"])


def test_outputs_that_torchscript_cannot_take_apart_are_refused() -> None:
    x = torch.randn(vectors)
    model = grown(UsesNamed(Named()), x, ("part", "a"))
    expected = model(x)
    with refused(cg.CandidateError, "torch.jit.script", "Named", "Dict", "torch.export"):
        torch.jit.script(model)
    assert torch.equal(model(x), expected)


def test_an_index_before_the_tensor_is_no_site_in_torchscript() -> None:
    """Python takes the first floating-point tensor; the compiled model would take the index."""
    x = torch.randn(vectors)
    scripted = torch.jit.script(grown(UsesTwo(Two()), x, ("part", None)))
    with pytest.raises(torch.jit.Error, match="a layer after this expects that"):
        scripted(x)


class Inner(nn.Module):
    buffer: Tensor
    scale: float

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), 2.0
        self.register_buffer("buffer", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    @torch.jit.export
    def method(self, x: Tensor) -> Tensor:
        return x.sin()


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part: Any = Inner()
        self.head = nn.Linear(4, 3)


class ReadsBuffer(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x) + self.part.buffer)


class ReadsAttribute(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x) * self.part.scale)


class ReadsSubmodule(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x) + self.part.linear(x))


class ReadsMethod(Reads):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x) + self.part.method(x))


@pytest.mark.parametrize("make", [ReadsBuffer, ReadsAttribute, ReadsSubmodule, ReadsMethod])
def test_what_a_scripted_parent_cannot_read_is_said(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(6, 4)
    torch.jit.script(make())
    with pytest.raises(RuntimeError, match="a layer was inserted after this module"):
        torch.jit.script(grown(make(), x, ("part", None)))


class Mixing(nn.Module):
    """Takes a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        y = torch.tanh(self.fc(x))
        return x + (y if mask is None else y * mask)


class MixingTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:  # noqa: UP045
        y = torch.tanh(self.fc(x))
        return x + (y if mask is None else y * mask), y


class Indexing(nn.Module):
    """Names the elements of its list, so that copies stand around their sites."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([kind(), kind()]), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x.dtype)
        return self.head(self.layers[1](self.layers[0](x, mask), mask))


class IndexingTwice(Indexing):
    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0).to(x.dtype)
        return self.head(self.layers[1](self.layers[0](x, mask)[0], mask)[0])


@pytest.mark.parametrize(
    ("kind", "part"), [(Indexing, Mixing), (IndexingTwice, MixingTwice)], ids=["tensor", "tuple"]
)
def test_copies_around_their_sites_are_scripted(kind: Any, part: type[nn.Module]) -> None:
    model, x = kind(part), torch.randn(vectors)
    torch.jit.script(model)
    problem = cg.GrowthProblem(
        model, nn.MSELoss(), [(x, torch.randn(6, 3))], cg.find_candidates(model, x)
    )
    record = cg.insert(model, cg.solve(problem, choose("layers.0", "layers.1")))
    assert {one.placement for one in record.insertions} == {"wrapped"}
    with torch.no_grad():
        for _, parameter in record.new_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected, keys = model(x), list(model.state_dict())
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(model(x), expected)
    assert list(scripted.state_dict()) == list(model.state_dict()) == keys
    pickle.loads(pickle.dumps(model))
