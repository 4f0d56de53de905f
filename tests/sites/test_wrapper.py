"""A grown site is still the user's module: attributes, elements, names, tracing and scripting."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import choose, classified, feedforward
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth import blocks


def grown(model: nn.Module, *places: tuple[str, nn.Module], x: Tensor | None = None) -> Any:
    """The model with layers inserted, which then do something."""
    x = torch.randn(6, 2) if x is None else x
    data = [(x, torch.randn_like(model(x)))]
    old = {id(p) for p in model.parameters()}
    candidates = [
        cg.Candidate(after, block, name=f"{after} {i}") for i, (after, block) in enumerate(places)
    ]
    problem = cg.GrowthProblem(model, nn.MSELoss(), data, candidates)
    cg.insert(model, cg.solve(problem, choose(*(c.name for c in candidates))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (id(parameter) not in old))
    return model


def mlp(width: int = 4) -> nn.Module:
    return blocks.ResidualMLP(width, 3, torch.tanh)


# --- attributes -------------------------------------------------------------------------------


def test_a_dropout_is_switched_off() -> None:
    model = grown(nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 3)), ("1", mlp()))
    x = torch.randn(6, 2)
    assert not torch.equal(model(x), model(x))
    model[1].p = 0.0
    assert torch.equal(model(x), model(x))
    assert model[1].p == 0.0


def test_weights_are_replaced_tied_and_deleted() -> None:
    model = grown(feedforward(2, 4, 4, 3), ("0", mlp()), ("2", mlp()))
    keys = list(model.state_dict())
    model[2].weight = nn.Parameter(torch.eye(4))
    model[2].bias = None
    assert [key for key in keys if key != "2.base.bias"] == list(model.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(model[2].base(x), x)
    model[0].weight.data.zero_()
    assert not model[0].base.weight.any()
    del model[2].bias
    assert not hasattr(model[2].base, "bias")
    with pytest.raises(AttributeError, match="bias"):
        del model[2].bias


def test_what_is_registered_belongs_to_the_users_module() -> None:
    site = grown(feedforward(2, 4, 3), ("0", mlp()))[0]
    site.register_buffer("seen", torch.zeros(1), persistent=False)
    site.register_parameter("scale", nn.Parameter(torch.ones(4)))
    site.add_module("norm", nn.LayerNorm(4))
    site.register_module("act", nn.Tanh())
    site.note, site.child = "kept", nn.ReLU()
    base = site.base
    assert {"seen"} == set(dict(base.named_buffers()))
    assert {"norm", "act", "child"} == set(dict(base.named_children()))
    assert base.scale is site.scale
    assert vars(base)["note"] == "kept"
    assert {"in_features", "seen", "scale", "norm", "note", "inserted"} <= set(dir(site))
    assert list(dict(site.named_children())) == ["base", "inserted"]


def test_private_attributes_are_written_where_they_are() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return self._scale * x

    model = grown(nn.Sequential(nn.Linear(2, 4), Scaled(), nn.Linear(4, 3)), ("1", mlp()))
    model[1]._scale = 0.0
    assert not model[1].base(torch.ones(4)).any()


def test_a_frozen_normalisation_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    site = grown(model, ("1", mlp()))[1]
    site.training = False
    before = site.running_mean.clone()
    model(torch.randn(6, 2))
    assert torch.equal(site.running_mean, before)
    assert not site.base.training
    model.train()
    assert all(module.training for module in model.modules())


def test_elements_are_reached_and_changed() -> None:
    stage = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    site = grown(nn.Sequential(nn.Linear(2, 4), stage, nn.Linear(4, 3)), ("1", mlp()))[1]
    linear, tanh, last = stage[0], nn.Tanh(), nn.Softplus()
    site[1] = tanh
    site.append(last)
    assert list(stage) == [linear, tanh, last] == list(site)
    assert (len(site), site[-1], last in site, nn.ReLU() in site) == (3, last, True, False)
    assert list(reversed(site)) == [last, tanh, linear]
    del site[0]
    assert list(stage) == [tanh, last]
    assert list(site[1:]) == [last]
    with pytest.raises(TypeError, match="no len"):
        len(grown(feedforward(2, 4, 3), ("0", mlp()))[0])


def test_methods_of_the_wrapper_that_are_set_for_a_while() -> None:
    """As libraries do with every module, in the order of `modules()` or from the inside out."""
    model, x = grown(feedforward(2, 4, 3), ("0", mlp()), ("1", mlp())), torch.randn(6, 2)
    before = model(x)
    for modules in (list(model.modules()), list(model.modules())[::-1]):
        for one in modules:
            one._before = one.forward
            one.forward = lambda *args, one=one: one._before(*args)
        assert torch.equal(model(x), before)
        for one in modules:
            one.forward = one._before
            del one._before
        assert torch.equal(model(x), before)


def test_hooks_of_accelerate_come_and_go() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = grown(feedforward(2, 4, 3), ("0", mlp()), ("1", mlp())), torch.randn(6, 2)
    before = model(x)
    for modules in (list(model.modules()), list(model.modules())[::-1]):
        for one in modules:
            hooks.add_hook_to_module(one, hooks.ModelHook())
        assert torch.equal(model(x), before)
        hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(x), before)


# --- names ------------------------------------------------------------------------------------


class Named(nn.Module):
    """With the names that a wrapper has, and that earlier ones had."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.inserted, self.output = nn.Linear(2, 4), nn.Linear(4, 4), nn.Tanh()
        self.overwritten = True

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inserted(self.base(x)))


def test_no_name_hides_one_of_the_users() -> None:
    model = nn.Sequential(Named(), nn.Linear(4, 3))
    mine, fresh = model[0], copy.deepcopy(model)
    block, data = mlp(), classified(8)
    record = cg.GrowthRecord()
    for number in range(2):
        problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [cg.Candidate("0", block)])
        step = cg.insert(model, cg.solve(problem, cg.TopK(1)))
        record = record + step if number else step
        for name in ("base", "inserted", "output", "overwritten"):
            assert getattr(model[0], name) is getattr(mine, name)
    model[0].base = nn.Linear(2, 4)
    assert model[0]._modules["base_"] is mine
    names = [name for name, _ in model[0].named_children()]
    assert names == ["base_", "inserted_", "inserted2"]
    cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json())).load_state_dict(
        model.state_dict()
    )
    assert torch.equal(fresh(data[0][0]), model(data[0][0]))


def test_a_module_that_copies_itself_does_not_lose_the_layer() -> None:
    class Copying(nn.Linear):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            return Copying(2, 4)

    model = grown(nn.Sequential(Copying(2, 4), nn.Linear(4, 3)), ("0", mlp()))
    assert list(copy.deepcopy(model).state_dict()) == list(model.state_dict())


# --- what looks into a model -------------------------------------------------------------------


def perceptron(activation: nn.Module) -> nn.Sequential:
    sizes = pairwise((2, 4, 4, 3))
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), copy.deepcopy(activation))]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3)
    )


def sequences() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))


vectors, images, texts = (6, 2), (6, 2, 5, 5), (6, 3, 2)  # shapes of inputs
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[], Any]]] = {
    "identity": (
        lambda: perceptron(nn.ReLU()),
        vectors,
        lambda: [
            ("1", blocks.IdentityLinear(4, nn.ReLU())),
            ("3", blocks.IdentityLinear(4, F.relu)),
        ],
    ),
    "shifted": (
        lambda: perceptron(blocks.TanhLU()),
        vectors,
        lambda: [("1", blocks.IdentityLinear(4, blocks.TanhLU()))],
    ),
    "residual": (
        lambda: perceptron(nn.Tanh()),
        vectors,
        lambda: [("0", blocks.ResidualLinear(4, torch.tanh)), ("2", mlp()), ("2", mlp())],
    ),
    "images": (
        convolutional,
        images,
        lambda: [
            ("1", blocks.IdentityConv2d(4, nn.ReLU())),
            ("2", blocks.ResidualConv2d(4, nn.ReLU())),
            ("2", blocks.ResidualConv2d(4, torch.tanh, norm_layer=None)),
            ("0", blocks.ResidualBottleneck2d(4, nn.GELU())),
        ],
    ),
    "sequences": (
        sequences,
        texts,
        lambda: [("0", blocks.TransformerBlock(4, 2)), ("0", blocks.GatedMLP(4, 3))],
    ),
}


def scripted_from_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


LOOKS: list[Callable[[Any, Tensor], Any]] = [
    lambda model, x: torch.fx.symbolic_trace(model),
    lambda model, x: torch.fx.symbolic_trace(torch.fx.symbolic_trace(model)),
    lambda model, x: pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model))),
    lambda model, x: torch.jit.script(model),
    lambda model, x: scripted_from_file(model),
    lambda model, x: torch.jit.trace(model, x),
    lambda model, x: torch.export.export(model, (x,)).module(),
    lambda model, x: torch.compile(model, backend="eager", fullgraph=True),
    lambda model, x: pickle.loads(pickle.dumps(model)),
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_grown_model_is_traced_and_scripted(case: str) -> None:
    make, shape, places = CASES[case]
    x = torch.randn(shape)
    model = grown(make(), *places(), x=x).eval()
    expected, kept = model(x), [(name, id(m)) for name, m in model.named_modules()]
    for look in LOOKS:
        torch.compiler.reset()
        torch.testing.assert_close(look(model, x)(x), expected, rtol=1e-13, atol=1e-13)
    assert [(name, id(m)) for name, m in model.named_modules()] == kept
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_put_in_between_are_scripted_in_their_order() -> None:
    """The wrappers differ in nothing but the order, which TorchScript does not see by itself."""
    model = perceptron(nn.Tanh())
    block = blocks.ResidualLinear(4, torch.tanh)
    grown(model, ("0", block), ("2", block))
    grown(model, ("0", block), ("2.base", block))
    x = torch.randn(6, 2)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-13, atol=1e-13)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        return self.head(y)


def test_outputs_that_are_no_tensor_are_traced() -> None:
    x = torch.randn(texts)
    model = grown(Recurrent(), ("lstm", mlp()), x=x)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_grown_part_is_traced_on_its_own() -> None:
    part = grown(feedforward(2, 4, 3), ("0", mlp()))[0]
    x = torch.randn(6, 2)
    assert torch.equal(torch.fx.symbolic_trace(part)(x), part(x))
