"""A record builds the same block again, whatever its settings, and nothing else."""

import copy
import functools
import json
import pickle
import resource
import runpy
import subprocess
import sys
import textwrap
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import choose, classified, feedforward, nothing_left_behind, refused, solved
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import (
    CopiedBlock,
    GatedMLP,
    IdentityConv2d,
    IdentityLinear,
    ResidualConv2d,
    ResidualMLP,
    TanhLU,
    TransformerBlock,
    register,
)
from constrained_growth.blocks.protocol import REGISTERED

# --- copies of modules that differ in what no parameter shows -------------------------------------


class Mix(nn.Module):
    """x + W₂ f(W₁ x), with f from whatever `how` is."""

    def __init__(self, how: Any, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.how, self.use = how, use

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.use(self.how, self.inner(x)))


def called(how: Any, x: Tensor) -> Tensor:
    return how(x)


def scaled(how: Any, x: Tensor) -> Tensor:
    return (how * x).tanh()


def power(exponent: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.abs() ** exponent


PAIRS: dict[str, tuple[Callable[[Any], nn.Module], Any, Any]] = {
    "number": (lambda how: Mix(how, scaled), 0.5, 2.0),
    "module": (lambda how: Mix(how, called), nn.Sigmoid(), nn.Tanh()),
    "slope": (lambda how: Mix(how, called), nn.LeakyReLU(0.1), nn.LeakyReLU(0.7)),
    "function": (lambda how: Mix(how, called), torch.sin, torch.tanh),
    "lambda": (lambda how: Mix(how, called), lambda x: x.sin(), lambda x: x.cos()),
    "closure": (lambda how: Mix(how, called), power(1.5), power(2.5)),
    "partial": (
        lambda how: Mix(how, called),
        functools.partial(F.leaky_relu, negative_slope=0.1),
        functools.partial(F.leaky_relu, negative_slope=0.4),
    ),
    "tuple": (lambda how: Mix(how, lambda h, x: x.roll(h[0], -1)), (1, 2), (2, 2)),
    "dict": (lambda how: Mix(how, lambda h, x: h["a"] * x), {"a": 0.5}, {"a": 2}),
    "hidden module": (lambda how: Mix(how, lambda h, x: h[0](x)), [nn.ELU()], [nn.ELU(0.3)]),
    "config": (
        lambda how: Mix(how, lambda h, x: (h.scale * x).tanh()),
        types.SimpleNamespace(scale=0.5),
        types.SimpleNamespace(scale=2.0),
    ),
    "tensor": (lambda how: Mix(how, scaled), torch.tensor(0.5), torch.tensor(2.0)),
    "dropout": (lambda how: Mix(nn.Dropout(how), called), 0.1, 0.6),
}


def line(kind: str) -> nn.Sequential:
    make, one, other = PAIRS[kind]
    return nn.Sequential(nn.Linear(2, 4), make(one), make(other), nn.Linear(4, 3))


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def same_function(one: nn.Module, other: nn.Module, x: Tensor) -> bool:
    def run(model: nn.Module) -> Tensor:
        torch.manual_seed(7)
        return model(x)

    return all(torch.equal(run(one.train(m)), run(other.train(m))) for m in (True, False))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *((kind, "a copy of it") for kind in PAIRS),
        *((kind, "same model") for kind in ("number", "tensor")),
        ("number", "pickled solution"),
    ],
)
def test_a_copy_is_rebuilt_from_what_was_copied(kind: str, way: str) -> None:
    model, data = line(kind), classified(20)
    one = cg.Candidate("1", CopiedBlock(model[2], ("outer.weight", "outer.bias")))
    solution = solved(model, data, one, stationarity=False)
    if way == "a copy of it":
        model = copy.deepcopy(model)
    elif way == "pickled solution":
        solution = pickle.loads(pickle.dumps(solution))
    record = cg.insert(model, solution)
    again = cg.replay(line(kind), cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(moved(model).state_dict())
    assert same_function(again, model, data[0][0])


@pytest.mark.parametrize("kind", [k for k in PAIRS if k != "tensor"])
def test_another_module_at_the_place_of_the_copied_one_is_refused(kind: str) -> None:
    model, data = line(kind), classified(20)
    one = cg.Candidate("2", CopiedBlock(model[2], ("outer.weight", "outer.bias")))
    record = cg.insert(model, solved(model, data, one))
    fresh = line(kind)
    fresh[2] = line(kind)[1]
    with nothing_left_behind(fresh), refused(cg.RecordError, '"2"', "Mix", "another one here"):
        cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))


@pytest.mark.parametrize("alone", [True, False])
def test_several_copies_at_one_site(alone: bool) -> None:
    """Elements of the list, or around the site; each is a copy of another module."""

    def make() -> nn.Sequential:
        listed = line("number")
        return listed if alone else nn.Sequential(OrderedDict(zip("abcd", listed, strict=True)))

    model, data = make(), classified(20)
    found = {"first": model[1], "second": model[2], "third": model[1]}
    candidates = [
        cg.Candidate(
            "1" if alone else "b", CopiedBlock(one, ("outer.weight", "outer.bias")), name=name
        )
        for name, one in found.items()
    ]
    record = cg.insert(model, solved(model, data, *candidates, rule=choose(*found)))
    again = cg.replay(make(), cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(moved(model).state_dict())
    assert same_function(again, model, data[0][0])


def test_heads_and_eps_of_a_transformer_layer() -> None:
    def make(heads: int = 4, eps: float = 1e-5) -> nn.Sequential:
        options: dict[str, Any] = {"norm_first": True, "batch_first": True, "dropout": 0.0}
        layer = functools.partial(nn.TransformerEncoderLayer, 8, dim_feedforward=16, **options)
        return nn.Sequential(layer(nhead=2), layer(nhead=heads, layer_norm_eps=eps))

    x = torch.randn(6, 5, 8)
    data = [(x, torch.randn_like(x))]
    for wrong, words in (({"heads": 2}, "head_dim is 2 and 4"), ({"eps": 0.5}, "eps")):
        model = make()
        one = cg.Candidate("0", CopiedBlock(model[1], args=(x,)))
        record = cg.insert(model, solved(model, data, one, loss_fn=F.mse_loss))
        record = cg.GrowthRecord.from_json(record.to_json())
        again = cg.replay(make(), record)
        again.load_state_dict(moved(model).state_dict())
        assert torch.equal(again(x), model(x))
        fresh = make(**wrong)  # type: ignore[arg-type]
        with nothing_left_behind(fresh), refused(cg.RecordError, words):
            cg.replay(fresh, record)


def test_a_module_that_has_changed_since_it_was_copied_has_to_be_given() -> None:
    model, data = line("number"), classified(20)
    block = CopiedBlock(model[2], ("outer.weight", "outer.bias"))
    model[2].how = 3.0  # type: ignore[assignment]
    record = cg.insert(model, solved(model, data, cg.Candidate("1", block)))
    record, fresh = cg.GrowthRecord.from_json(record.to_json()), line("number")
    fresh[2].how = 3.0  # type: ignore[assignment]
    with nothing_left_behind(fresh), refused(cg.RecordError, "exactly like it", "blocks="):
        cg.replay(fresh, record)
    again = cg.replay(fresh, record, blocks={"1": block})
    again.load_state_dict(model.state_dict())
    assert same_function(again, model, data[0][0])


# --- blocks of the library, with other settings than the usual ones -------------------------------

NUMPYS: Any = np.float32(0.7), np.float32(0.3)
WIDTHS: dict[str, Callable[[], nn.Module]] = {
    "slope": lambda: ResidualMLP(4, 3, nn.LeakyReLU(0.7)),
    "beta": lambda: ResidualMLP(4, 3, nn.Softplus(beta=3, threshold=4)),
    "threshold": lambda: ResidualMLP(4, 3, nn.Threshold(0.1, 0.5)),
    "logsigmoid": lambda: ResidualMLP(4, 3, F.logsigmoid),
    "prelu": lambda: ResidualMLP(4, 3, nn.PReLU(init=0.9)),
    "shift": lambda: IdentityLinear(4, TanhLU(0.02), shift=0.05),
    "eps": lambda: GatedMLP(4, 3, nn.GELU("tanh"), eps=0.3),
    "no activation said": lambda: GatedMLP(4, 3),
    "partial": lambda: ResidualMLP(4, 3, functools.partial(F.leaky_relu, negative_slope=0.3)),
    "number of NumPy": lambda: GatedMLP(4, 3, nn.LeakyReLU(NUMPYS[0]), eps=NUMPYS[1]),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "nothing said": lambda: ResidualConv2d(4),
    "groups": lambda: ResidualConv2d(4, norm_layer=functools.partial(nn.GroupNorm, 2, eps=0.3)),
    "momentum": lambda: ResidualConv2d(4, norm_layer=functools.partial(nn.BatchNorm2d, eps=0.1)),
    "shift": lambda: IdentityConv2d(4, TanhLU(0.02), 5, shift=0.05),
}


@pytest.mark.parametrize("kind", WIDTHS)
def test_every_argument_of_a_block_is_rebuilt(kind: str) -> None:
    assert_rebuilt(WIDTHS[kind], lambda: feedforward(2, 4, 3, activation=TanhLU), (2,))


@pytest.mark.parametrize("kind", IMAGES)
def test_every_argument_of_a_block_on_images_is_rebuilt(kind: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 1), TanhLU(0.02), nn.Flatten(), nn.Linear(36, 3))

    assert_rebuilt(IMAGES[kind], make, (2, 3, 3))


def test_heads_of_a_transformer_block_are_rebuilt() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))

    assert_rebuilt(lambda: TransformerBlock(4, 2, 5, nn.ELU(0.3), causal=True), make, (5, 2))


def assert_rebuilt(
    block: Callable[[], nn.Module], make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = make(), torch.randn(6, *shape)
    one = cg.Candidate("1", block())
    record = cg.insert(model, solved(model, [(x, torch.randint(3, (6,)))], one))
    again = cg.replay(make(), cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(moved(model).state_dict())
    assert same_function(again, model, x)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.activation, "negative_slope", torch.tensor(0.5)),
        lambda block: setattr(block.activation, "forward", torch.sin),
        lambda block: block.activation.register_forward_hook(lambda *call: 2 * call[-1]),
    ],
)
def test_a_block_that_its_arguments_do_not_build_has_to_be_given(change: Any) -> None:
    block, model = ResidualMLP(4, 3, nn.LeakyReLU()), feedforward(2, 4, 3)
    change(block)
    record = cg.insert(model, solved(model, classified(20), cg.Candidate("1", block)))
    with refused(cg.RecordError, '"1"', "blocks="):
        cg.replay(feedforward(2, 4, 3), cg.GrowthRecord.from_json(record.to_json()))


# --- blocks of the user's own ---------------------------------------------------------------------


class Narrow(nn.Module):
    pinned = ("up.weight",)

    def __init__(self, sizes: tuple[int, int], activation: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(*sizes), nn.Linear(*sizes[::-1], bias=False)
        self.activation, self.drop = activation, nn.Dropout(drop)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.drop(self.activation(self.down(x))))

    def config(self) -> dict[str, Any]:
        sizes = (self.down.in_features, self.down.out_features)
        return {"sizes": sizes, "activation": self.activation}


def inserted(block: nn.Module) -> tuple[nn.Module, cg.GrowthRecord]:
    model = feedforward(2, 4, 3)
    record = cg.insert(model, solved(model, classified(20), cg.Candidate("1", block)))
    return moved(model), cg.GrowthRecord.from_json(record.to_json())


def test_a_registered_block_is_rebuilt() -> None:
    @register
    class Registered(Narrow):
        pass

    model, record = inserted(Registered((4, 2), nn.ELU(0.3)))
    again = cg.replay(feedforward(2, 4, 3), record)
    again.load_state_dict(model.state_dict())
    assert same_function(again, model, torch.randn(9, 2))


def test_an_unregistered_block_names_the_registration() -> None:
    model, record = inserted(Narrow((4, 2), nn.ELU(0.3)))
    fresh = feedforward(2, 4, 3)
    with nothing_left_behind(fresh), refused(cg.RecordError, "Narrow", "blocks.register"):
        cg.replay(fresh, record)
    again = cg.replay(fresh, record, blocks={"1": Narrow((4, 2), nn.ELU(0.3))})
    again.load_state_dict(model.state_dict())
    assert same_function(again, model, torch.randn(9, 2))


def test_a_config_that_leaves_out_a_setting_is_not_believed() -> None:
    @register
    class Forgetful(Narrow):
        pass

    _, record = inserted(Forgetful((4, 2), nn.ELU(), drop=0.5))
    with refused(cg.RecordError, "config() builds another one", "drop.p", "blocks="):
        cg.replay(feedforward(2, 4, 3), record)


def test_what_cannot_be_registered() -> None:
    class ResidualMLP(Narrow):
        pass

    ResidualMLP.__qualname__ = "ResidualMLP"
    for kind in (nn.ReLU, Narrow((4, 2), nn.ReLU()), Narrow.config):
        with refused(cg.BlockError, "config()"):
            register(kind)  # type: ignore[type-var]
    with refused(cg.BlockError, "ResidualMLP", "taken", "another"):
        register(ResidualMLP)
    assert register(Narrow) is register(Narrow) is Narrow
    REGISTERED.pop("Narrow")


def test_a_registered_block_is_rebuilt_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        textwrap.dedent("""
        import torch
        from torch import nn
        import constrained_growth as cg

        @cg.blocks.register
        class OwnGain(nn.Module):
            pinned = ("log",)

            def __init__(self, width):
                super().__init__()
                self.log = nn.Parameter(torch.zeros(width))

            def forward(self, x):
                return x * self.log.exp()

            def config(self):
                return {"width": len(self.log)}
        """)
    )
    own = runpy.run_path(str(tmp_path / "own.py"), run_name="__main__")["OwnGain"]
    model = feedforward(2, 4, 3)
    record = cg.insert(model, solved(model, classified(20), cg.Candidate("1", own(4))))
    REGISTERED.pop("OwnGain")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import own; from torch import nn\n"
        "model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))\n"
        "own.cg.replay(model, own.cg.GrowthRecord.from_json(sys.stdin.read()))\n"
        "assert type(model.get_submodule('1.inserted')) is own.OwnGain"
    )
    python = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(python, input=record.to_json(), check=True, text=True)


# --- records from somebody else -------------------------------------------------------------------


def hostile(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> str:
    """A record of `ResidualMLP(4, 7, GELU)` after "1", with its block and its shapes changed."""
    model = feedforward(2, 4, 3)
    one = cg.Candidate("1", ResidualMLP(4, 7, nn.GELU()))
    content = json.loads(cg.insert(model, solved(model, classified(20), one)).to_json())
    layer = content["insertions"][0]
    change(layer["block"], layer["parameters"])
    return json.dumps(content)


ACTIVATIONS: list[Any] = [
    *({"function": name} for name in ("torch.set_printoptions", "torch.PyTorchFileWriter")),
    *({"function": name} for name in ("torch.seed", "torch.manual_seed", "torch.load", 3, None)),
    {"module": "MultiheadAttention", "arguments": {"embed_dim": 4, "num_heads": 2}},
    {"module": "Softmax", "arguments": {}},
    {"module": "PReLU", "arguments": {"num_parameters": 10**11}},
    {"module": "PReLU", "arguments": {"device": "meta"}},
    {"module": "PReLU", "arguments": {"dtype": "float32"}},
    {"module": "GELU", "arguments": {"approximate": ["tanh"]}},
    {"module": "LeakyReLU", "arguments": [0.1]},
    {"class": "Linear"},
    {"class": "LayerNorm", "arguments": [10**11], "options": {"device": "meta"}},
    {"class": "LayerNorm", "arguments": [[10**6, 10**6]], "options": {}},
    [],
    {},
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nothing_is_called_but_what_a_list_has(activation: Any) -> None:
    text = hostile(lambda block, _: block["arguments"].update(activation=activation))
    record, fresh, shown = (
        cg.GrowthRecord.from_json(text),
        feedforward(2, 4, 3),
        repr(torch.ones(1) / 3),
    )
    with nothing_left_behind(fresh), refused(cg.RecordError, '"1"'):
        cg.replay(fresh, record)
    assert repr(torch.ones(1) / 3) == shown


def claim(width: int, hidden: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(block: dict[str, Any], shapes: dict[str, Any]) -> None:
        block["arguments"].update(width=width, hidden=hidden)
        shapes |= {"inner.weight": [hidden, width], "inner.bias": [hidden]}
        shapes |= {"outer.weight": [width, hidden]}

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda block, _: block["arguments"].update(width=20_000, hidden=20_000),
        lambda block, _: block["arguments"].update(hidden=10**8),
        lambda block, _: block["arguments"].update(hidden=10**30),
        lambda block, _: block["arguments"].update(hidden=float("inf")),
        lambda block, _: block["arguments"].update(device="cpu"),
        lambda block, _: block["arguments"].update(dtype="float64"),
        lambda block, _: block.update(type="IdentityConv2d", arguments={"channels": 10**5}),
        claim(20_000, 20_000),
        claim(4, 10**8),
        claim(4, 10**4000),
    ],
)
def test_a_record_does_not_fill_the_memory(change: Any) -> None:
    record, fresh = cg.GrowthRecord.from_json(hostile(change)), feedforward(2, 4, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with nothing_left_behind(fresh), refused(cg.RecordError, "record", "blocks="):
        cg.replay(fresh, record)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_large_layer_can_be_given() -> None:
    record, fresh = cg.GrowthRecord.from_json(hostile(claim(4, 2_000_000))), feedforward(2, 4, 3)
    with refused(cg.RecordError, "16,777,216", "blocks={'1': block"):
        cg.replay(fresh, record)
    cg.replay(fresh, record, blocks={"1": ResidualMLP(4, 2_000_000, nn.GELU())})


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["model"].update(a=[float("inf")]),
        lambda content: content["model"].update(a=[1.5]),
        lambda content: content["model"].update(a=[True]),
        lambda content: content["model"].update(a=[-1]),
        lambda content: content["insertions"][0].update(name=["1"]),
        lambda content: content["insertions"][0].update(after={}),
        lambda content: content["insertions"][0].update(overwritten="no"),
        lambda content: content["difference"].update(train=10**400),
    ],
)
def test_values_of_the_wrong_kind(edit: Any) -> None:
    content = json.loads(hostile(lambda *_: None))
    edit(content)
    with refused(cg.RecordError, "no growth record"):
        cg.GrowthRecord.from_json(json.dumps(content))


def test_a_text_that_is_nested_too_deeply() -> None:
    with refused(cg.RecordError, "no growth record"):
        cg.GrowthRecord.from_json('{"version": 2, "model": ' + "[" * 100_000)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.update(of=""),
        lambda block: block.update(of="0"),
        lambda block: block.update(of=["2"]),
        lambda block: block.update(copied="Linear"),
        lambda block: block.pop("copied"),
        lambda block: block.update(arguments={}),
        lambda block: block["arguments"].update(pinned="outer.weight"),
        lambda block: block["arguments"].update(pinned=["nothing"]),
        lambda block: block["arguments"].update(pinned=3),
        lambda block: block.update(settings=3),
        lambda block: block["settings"].update(how="0.25"),
    ],
)
def test_a_damaged_copy(change: Any) -> None:
    model = line("number")
    one = cg.Candidate("1", CopiedBlock(model[2], ("outer.weight", "outer.bias")))
    content = json.loads(cg.insert(model, solved(model, classified(20), one)).to_json())
    change(content["insertions"][0]["block"])
    record, fresh = cg.GrowthRecord.from_json(json.dumps(content)), line("number")
    with nothing_left_behind(fresh), refused(cg.RecordError, '"1"'):
        cg.replay(fresh, record)


@pytest.mark.parametrize("of", ["1", "2"])
def test_a_copy_as_the_first_versions_described_it(of: str) -> None:
    """Without settings, and without the name of its original where that is its site."""
    model = line("number")
    one = cg.Candidate("2", CopiedBlock(model[int(of)], ("outer.weight", "outer.bias")))
    record = cg.insert(model, solved(model, classified(20), one, rule=choose("2")))
    content = json.loads(record.to_json())
    content["version"] = 2
    described = content["insertions"][0]["block"]
    del described["settings"]
    if of == "2":
        del described["of"]
    again = cg.replay(line("number"), cg.GrowthRecord.from_json(json.dumps(content)))
    again.load_state_dict(moved(model).state_dict())
    assert same_function(again, model, torch.randn(9, 2))
