"""The record of what was inserted, its JSON text, and the same architecture again."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Gain,
    candidate,
    choose,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP
from constrained_growth.insertion import InsertedLayer

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": lambda: IdentityLinear(4, nn.ReLU()),
    "ReLU in place": lambda: IdentityLinear(4, nn.ReLU(inplace=True)),
    "torch.relu": lambda: IdentityLinear(4, torch.relu),
    "one weight, ELU": lambda: ResidualLinear(4, nn.ELU(alpha=0.5)),
    "outer": lambda: ResidualMLP(4, 7, nn.GELU("tanh")),
    "outer, 0.8": lambda: ResidualMLP(4, 4, F.silu, inner_init=0.8),
    "inner": lambda: ResidualMLP(4, 2, nn.LeakyReLU(0.2), "inner"),
}


def grown(*blocks: nn.Module, after: str = "1") -> tuple[nn.Module, cg.GrowthRecord]:
    """A model with layers inserted, all of its parameters moved."""
    model = feedforward(2, 4, 4, 3)
    candidates = [cg.Candidate(after, block, name=str(i)) for i, block in enumerate(blocks)]
    rule = choose(*(one.name for one in candidates))
    record = cg.insert(model, solved(model, classified(20), *candidates, rule=rule))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model, record


def through_json(record: cg.GrowthRecord) -> cg.GrowthRecord:
    return cg.GrowthRecord.from_json(record.to_json())


def assert_same_function(one: nn.Module, other: nn.Module) -> None:
    x = torch.randn(50, 2)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("kind", BLOCKS)
def test_replayed_model_loads_the_state_and_is_the_same(kind: str) -> None:
    model, record = grown(BLOCKS[kind]())
    record = through_json(record)
    fresh = feedforward(2, 4, 4, 3)
    old = dict(fresh.named_parameters())
    state = torch.get_rng_state()
    again = cg.replay(fresh, record)
    assert torch.equal(torch.get_rng_state(), state)
    assert again is fresh
    assert again.get_parameter("0.weight") is old["0.weight"]
    again.load_state_dict(model.state_dict())
    assert_same_function(again, model)
    assert repr(again) == repr(model)


@pytest.mark.parametrize("kind", BLOCKS)
def test_replay_starts_at_the_identity(kind: str) -> None:
    _, record = grown(BLOCKS[kind]())
    fresh = feedforward(2, 4, 4, 3, activation=nn.ReLU)
    plain = copy.deepcopy(fresh)
    x = torch.rand(20, 2)
    torch.testing.assert_close(cg.replay(fresh, record)(x), plain(x), rtol=1e-14, atol=1e-14)


def test_json_round_trip() -> None:
    _, record = grown(*(make() for make in BLOCKS.values()))
    assert through_json(record) == record
    content = json.loads(record.to_json())
    assert content["insertions"][0]["after"] == "1"
    assert content["model"] == {
        name: list(p.shape) for name, p in feedforward(2, 4, 4, 3).named_parameters()
    }


def test_empty_record_changes_nothing() -> None:
    model = feedforward(2, 4, 3)
    record = cg.insert(model, solved(model, classified(20), candidate(), rule=choose()))
    with nothing_left_behind(model):
        assert cg.replay(model, through_json(record)) is model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_takes_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    _, record = grown(*(make() for make in BLOCKS.values()))
    again = cg.replay(feedforward(2, 4, 4, 3).to(dtype), record)
    assert {p.dtype for p in again.parameters()} == {dtype}


@pytest.mark.parametrize("training", [True, False])
def test_layer_takes_the_mode_of_its_site(training: bool) -> None:
    _, record = grown(BLOCKS["outer"]())
    again = cg.replay(feedforward(2, 4, 4, 3).train(training), record)
    assert all(module.training is training for module in again.modules())


def test_sites_inside_an_inserted_layer() -> None:
    model, first = grown(ResidualMLP(4, 4, nn.GELU()))
    one = cg.Candidate("1.inserted.inner", ResidualLinear(4, torch.tanh))
    second = cg.insert(model, solved(model, classified(20), one))
    again = cg.replay(feedforward(2, 4, 4, 3), through_json(first + second))
    again.load_state_dict(model.state_dict())
    assert_same_function(again, model)


# --- blocks and activations of the user's own -------------------------------------------------


def test_a_users_own_block_has_to_be_given() -> None:
    model, record = grown(BLOCKS["outer"](), Gain(4))
    record, given, fresh = through_json(record), Gain(4), feedforward(2, 4, 4, 3)
    with (
        nothing_left_behind(fresh),
        refused(cg.RecordError, '"1"', "'Gain'", "blocks={'1': block}"),
    ):
        cg.replay(fresh, record)
    again = cg.replay(fresh, record, blocks={"1": given})
    again.load_state_dict(model.state_dict())
    assert_same_function(again, model)
    assert given not in set(again.modules())


def own_activation(x: Tensor) -> Tensor:
    return x.clamp(min=0)


@pytest.mark.parametrize("activation", [own_activation, lambda x: x.clamp(min=0)])
def test_a_users_own_activation_has_to_be_given(activation: Any) -> None:
    model, record = grown(IdentityLinear(4, activation))
    fresh = feedforward(2, 4, 4, 3)
    with nothing_left_behind(fresh), refused(cg.RecordError, "IdentityLinear", "blocks="):
        cg.replay(fresh, through_json(record))
    again = cg.replay(fresh, record, blocks={"0": IdentityLinear(4, activation)})
    again.load_state_dict(model.state_dict())
    assert_same_function(again, model)


def test_a_block_of_another_shape_is_refused() -> None:
    _, record = grown(Gain(4))
    fresh = feedforward(2, 4, 4, 3)
    with nothing_left_behind(fresh), refused(cg.RecordError, '"0"', "(5,)", "(4,)"):
        cg.replay(fresh, record, blocks={"0": Gain(5)})


# --- models that do not fit -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fresh", "words"),
    [
        (lambda: feedforward(2, 5, 4, 3), ["0.bias is (5,) and (4,)"]),
        (lambda: feedforward(2, 4, 3), ["does not fit", "as it was before it was grown"]),
        (lambda: grown(BLOCKS["outer"]())[0], ["does not fit", "as it was before it was grown"]),
        (lambda: nn.Identity(), ["does not fit", "None"]),
    ],
)
def test_unfit_model_is_refused_and_left_untouched(fresh: Any, words: list[str]) -> None:
    _, record = grown(BLOCKS["outer"]())
    model = fresh()
    with nothing_left_behind(model), refused(cg.RecordError, *words):
        cg.replay(model, through_json(record))


def test_missing_site_is_found_before_anything_stays_changed() -> None:
    """Also one that only the second insertion asks for, on a model of another head."""
    model = feedforward(2, 4, 4, 3)
    candidates = [candidate("1"), candidate("3"), cg.Candidate("1", Gain(4), name="more")]
    solution = solved(model, classified(20), *candidates, rule=choose("1", "3", "more"))
    record = cg.insert(model, solution)
    other = feedforward(2, 4, 3)
    with nothing_left_behind(other), refused(cg.RecordError, 'no submodule "3"', 'layer "3"'):
        cg.replay(other, record, strict=False, blocks={"more": Gain(4)})
    longer = cg.replay(feedforward(2, 4, 4, 4, 7), record, strict=False, blocks={"more": Gain(4)})
    assert longer(torch.randn(5, 2)).shape == (5, 7)


# --- texts that are no record -----------------------------------------------------------------


def damaged(change: Callable[[dict[str, Any]], Any]) -> str:
    content = json.loads(grown(BLOCKS["outer"]())[1].to_json())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "{}",
        '{"version": 1}',
        '{"version": 1, "insertions": []}',
        '{"version": 1, "insertions": 3, "model": {}}',
        '{"version": 1, "insertions": ["a"], "model": {}}',
        '{"version": 1, "insertions": [{"name": "a"}], "model": {}}',
        '{"version": 1, "insertions": [], "model": {"a": "b"}}',
        '{"version": 1, "insertions": [], "model": []}',
        '{"version": 2, "insertions": [], "model": {}, "difference": {"train": "little"}}',
        '{"version": 2, "insertions": [], "model": {}, "difference": 3}',
        '{"version": 2, "insertions": [], "model": {}, "evidence": 3}',
    ],
)
def test_text_that_is_no_record(text: str) -> None:
    with refused(cg.RecordError, "no growth record", "to_json()"):
        cg.GrowthRecord.from_json(text)


def test_text_that_is_no_text() -> None:
    with refused(cg.RecordError, "no growth record"):
        cg.GrowthRecord.from_json(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ['{"version": 4}', '{"version": 99, "insertions": {}}'])
def test_text_of_another_version(text: str) -> None:
    with refused(cg.RecordError, "version", "this library reads 1 to 3"):
        cg.GrowthRecord.from_json(text)


def test_the_version_that_is_written() -> None:
    """The third has layers that joined others, and settings of copies; all three are read."""
    record = cg.GrowthRecord(
        (InsertedLayer("a", "1", {"type": "Own", "arguments": None}, {}, placement="joined"),)
    )
    text = record.to_json()
    assert json.loads(text)["version"] == 3
    assert cg.GrowthRecord.from_json(text) == record
    for version in (1, 2):
        earlier = text.replace('"version": 3', f'"version": {version}')
        assert cg.GrowthRecord.from_json(earlier) == record


def test_text_of_the_first_version() -> None:
    """As it was written before layers had a placement, and before differences were measured."""
    text = """{"version": 1, "insertions": [{"name": "a", "after": "1", "block": {"type":
    "ResidualLinear", "arguments": {"width": 4, "activation": {"function": "torch.tanh"}}},
    "parameters": {"weight": [4, 4], "bias": [4]}, "overwritten": false}], "model": {}}"""
    record = cg.GrowthRecord.from_json(text)
    (layer,) = record.insertions
    assert (layer.placement, layer.output, record.difference) == ("wrapped", None, {})
    model = cg.replay(feedforward(2, 4, 3), record, strict=False)
    assert isinstance(model.get_submodule("1.inserted"), ResidualLinear)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(type="Linear"),
        lambda b: b.update(type=["ResidualMLP"]),
        lambda b: b.pop("type"),
        lambda b: b.update(arguments=3),
        lambda b: b["arguments"].pop("activation"),
        lambda b: b["arguments"].update(activation="GELU"),
        lambda b: b["arguments"].update(activation={"module": "Linear", "arguments": {}}),
        lambda b: b["arguments"].update(activation={"module": ["GELU"], "arguments": {}}),
        lambda b: b["arguments"].update(activation={"module": "GELU", "arguments": {"x": 1}}),
        lambda b: b["arguments"].update(activation={"function": "os.system"}),
        lambda b: b["arguments"].update(activation={"function": "torch.no_such_thing"}),
        lambda b: b["arguments"].update(activation={"function": 3}),
        lambda b: b["arguments"].update(width=-4),
        lambda b: b["arguments"].update(width="4"),
        lambda b: b["arguments"].update(width=5),
        lambda b: b["arguments"].update(hidden=None),
        lambda b: b["arguments"].update(colour="red"),
        lambda b: b["arguments"].update(pinned="both"),
    ],
)
def test_damaged_block_is_refused_and_the_model_left_untouched(
    change: Callable[[dict[str, Any]], Any],
) -> None:
    text = damaged(lambda content: change(content["insertions"][0]["block"]))
    record, model = cg.GrowthRecord.from_json(text), feedforward(2, 4, 4, 3)
    with nothing_left_behind(model), refused(cg.GrowthError):
        cg.replay(model, record)


@pytest.mark.parametrize("entry", [{"placement": "elsewhere"}, {"output": [0]}])
def test_damaged_place_is_refused(entry: dict[str, Any]) -> None:
    text = damaged(lambda content: content["insertions"][0].update(entry))
    with refused(cg.RecordError, "no growth record", next(iter(entry))):
        cg.GrowthRecord.from_json(text)


def test_rounds_add_up() -> None:
    one = cg.GrowthRecord(difference={"train": 0.0, "eval": 2.0}, evidence=({"gain": 1.0},))
    two = cg.GrowthRecord(difference={"train": 1.0}, evidence=({"gain": 2.0},))
    both = one + two
    assert both.difference == {"train": 1.0, "eval": 2.0}
    assert [round["gain"] for round in both.evidence] == [1.0, 2.0]
    assert through_json(both) == both


def test_evidence_that_json_cannot_hold() -> None:
    with refused(cg.RecordError, "evidence", "JSON"):
        cg.GrowthRecord(evidence=({"gain": torch.zeros(2)},)).to_json()


def test_damaged_shapes_are_refused() -> None:
    def change(content: dict[str, Any]) -> None:
        content["insertions"][0]["parameters"]["inner.weight"] = [1, 1]

    record, model = cg.GrowthRecord.from_json(damaged(change)), feedforward(2, 4, 4, 3)
    with nothing_left_behind(model), refused(cg.RecordError, "(1, 1)", "(7, 4)"):
        cg.replay(model, record)
