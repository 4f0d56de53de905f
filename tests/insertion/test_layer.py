"""A copied block becomes the next element of its list; other layers wrap their site."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import choose, classified, mean_loss, nothing_left_behind, refused, solved
from stacks import Residual, Stack, copied, mlp
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import CopiedBlock, ResidualLinear, ResidualMLP


class Backwards(nn.Sequential):
    """A sequence with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        for block in reversed(self):
            input = block(input)
        return input


def sequential(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 4), *blocks, nn.Linear(4, 3))


def grown(model: nn.Module, *candidates: cg.Candidate, **options: Any) -> cg.GrowthRecord:
    """All of them put in, the output the same to the last bit, the record replayed from JSON."""
    names = [one.name for one in candidates]
    x, fresh = torch.randn(6, 2), copy.deepcopy(model)
    before = model(x)
    solution = solved(model, classified(12), *candidates, rule=choose(*names))
    record = cg.insert(model, solution, **options)
    assert torch.equal(model(x), before)
    assert record.difference == {"train": 0.0, "eval": 0.0}
    again = cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))
    assert torch.equal(again(x), before)  # at the pins
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert list(again.state_dict()) == list(model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert not torch.equal(model(x), before)
    return record


def test_a_copy_becomes_the_next_element() -> None:
    model = Stack(3)
    old = list(model.blocks)
    (layer,) = grown(model, copied(model, "blocks.1")).insertions
    assert (layer.after, layer.placement) == ("blocks.1", "sibling")
    first, second, new, third = model.blocks
    assert [first, second, third] == old
    assert type(new) is Residual
    assert list(model.state_dict()) == list(Stack(4).state_dict())


def test_in_a_sequence_too() -> None:
    model = sequential(Residual(), Residual())
    grown(model, copied(model, "1"))
    assert [type(module) for module in model] == [nn.Linear, *[Residual] * 3, nn.Linear]


def test_several_copies_name_their_sites_as_they_then_are() -> None:
    model = Stack(3)
    old = list(model.blocks)
    record = grown(model, *(copied(model, f"blocks.{i}") for i in range(3)))
    assert [layer.after for layer in record.insertions] == ["blocks.0", "blocks.2", "blocks.4"]
    assert list(model.blocks)[::2] == old


def test_copies_and_other_layers_in_one_list() -> None:
    model = Stack(3)
    candidates = [mlp("blocks.2"), copied(model, "blocks.0"), mlp("blocks.0.act"), mlp("stem")]
    candidates += [copied(model, "blocks.2"), mlp("blocks.0"), copied(model, "blocks.1")]
    record = grown(model, *candidates)
    assert len(model.blocks) == 6
    placements = {layer.name: layer.placement for layer in record.insertions}
    assert placements["mlp blocks.0"] == "wrapped"
    assert placements["blocks.0"] == "sibling"


@pytest.mark.parametrize("order", ["wsw", "sww", "wws", "sws", "ssw", "wss"])
def test_layers_at_one_site_run_in_the_order_of_the_problem(order: str) -> None:
    model = Stack(3)
    candidates = [
        copied(model, "blocks.1", f"{i}{kind}") if kind == "s" else mlp("blocks.1", f"{i}{kind}")
        for i, kind in enumerate(order)
    ]
    ran: list[str] = []
    old = set(model.blocks)
    grown(model, *candidates)
    for module in model.modules():
        if module not in old and isinstance(module, Residual | ResidualMLP):
            kind = "s" if isinstance(module, Residual) else "w"
            module.register_forward_hook(lambda *_, kind=kind: ran.append(kind))
    model(torch.randn(2, 2))
    assert "".join(ran) == order


def test_a_copy_is_of_its_neighbour_before_others_were_put_into_it() -> None:
    model = Stack(3)
    grown(model, mlp("blocks.1.act"), mlp("blocks.1.inner"), copied(model, "blocks.1"))
    assert type(model.get_submodule("blocks.1.act.base")) is nn.Tanh
    assert type(model.blocks[2].act) is nn.Tanh


class Stages(nn.Module):
    """Lists in a list, each stage residual as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.stages = nn.ModuleList(Stage() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Residual(), Residual())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_nested_lists_grow_from_the_outside_in() -> None:
    model = Stages()
    pins = ("layers.0.outer.weight", "layers.0.outer.bias")
    pins += ("layers.1.outer.weight", "layers.1.outer.bias")
    stage = cg.Candidate("stages.0", CopiedBlock(model.stages[0], pins))
    record = grown(model, copied(model, "stages.0.layers.1"), stage, mlp("stages.1.layers.0"))
    assert [len(stage.layers) for stage in model.stages] == [3, 2, 2]  # type: ignore[arg-type]
    assert [layer.after for layer in record.insertions] == [
        "stages.0",
        "stages.0.layers.1",
        "stages.2.layers.0",
    ]


def test_round_after_round() -> None:
    model, data, x = Stack(3), classified(12), torch.randn(6, 2)
    fresh, record = copy.deepcopy(model), cg.GrowthRecord()
    for after in ("blocks.0", "blocks.1", "blocks.1.act", "blocks.1", "blocks.3"):
        one = mlp(after) if after.endswith("act") else copied(model, after)
        step = cg.insert(model, solved(model, data, one, rule=choose(one.name)))
        record = record + step if record.insertions else step
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    again = cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    assert len(model.blocks) == 7


def named() -> nn.Module:
    return nn.Sequential(
        OrderedDict(stem=nn.Linear(2, 4), block=Residual(), head=nn.Linear(4, 3)),
    )


def aliased() -> nn.Module:
    model = Stack(3)
    model.last = model.blocks[2]
    return model


@pytest.mark.parametrize(
    ("make", "after"),
    [
        (named, "block"),
        (lambda: sequential(Backwards(Residual(), Residual())), "1.0"),
        (aliased, "blocks.2"),
        (lambda: nn.Sequential(nn.Linear(2, 4), nn.ModuleDict({"a": Residual()})["a"]), "1"),
    ],
    ids=["names", "a forward of its own", "a second name", "a plain sequence"],
)
def test_layers_are_wrapped_around_sites_outside_plain_lists(
    make: Callable[[], Any], after: str
) -> None:
    model = make()
    (layer,) = grown(model, copied(model, after)).insertions
    expected = "sibling" if after == "1" else "wrapped"
    assert layer.placement == expected
    assert hasattr(model.get_submodule(after), "inserted") is (expected == "wrapped")


def test_standalone_form_with_other_parameters_is_refused() -> None:
    class Detached(ResidualLinear):
        def standalone(self) -> nn.Module:
            return nn.Linear(4, 4)

    model = Stack(3)
    one, data = cg.Candidate("blocks.0", Detached(4, torch.tanh)), classified(12)
    with nothing_left_behind(model), refused(cg.BlockError, "standalone()", "pinned"):
        solved(model, data, one)


def test_new_elements_join_the_groups_of_their_counterparts() -> None:
    """Also where the last matrix before it is in another group."""
    model = Stack(3)
    groups = [
        {"params": [p for n, p in model.named_parameters() if kind in n], "lr": rate}
        for kind, rate in {"norm": 0.1, "inner": 0.2, "outer": 0.3, "stem": 0.4}.items()
    ]
    optimizer = torch.optim.SGD(groups)
    grown(model, copied(model, "blocks.1"), optimizer=optimizer)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.blocks[2].named_parameters():
        expected = {"norm": 0.1, "inner": 0.2, "outer": 0.3}[name.split(".")[0]]
        assert rates[id(parameter)] == expected


def test_records_of_copies_are_checked() -> None:
    model = Stack(3)
    record = grown(model, copied(model, "blocks.1"))
    text = cg.GrowthRecord.from_json(record.to_json())
    other = Stack(3)
    other.blocks[1] = nn.Identity()
    with nothing_left_behind(other), refused(cg.RecordError, "Residual", "Identity"):
        cg.replay(other, text, strict=False)
    flat = nn.Module()
    flat.blocks = nn.ModuleDict({"0": Residual(), "1": Residual()})
    with nothing_left_behind(flat), refused(cg.RecordError, "no element of an nn.ModuleList"):
        cg.replay(flat, text, strict=False)
    again = cg.replay(Stack(3), text, blocks={"blocks.1": CopiedBlock(Residual())})
    assert type(again.get_submodule("blocks.2")) is Residual


def test_a_copy_of_another_module_of_the_model() -> None:
    """The record says of which, by the name it has when the layer is put in."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    def make(last: nn.Module) -> nn.Sequential:
        return nn.Sequential(Wide(), Residual(), last, nn.Linear(4, 3))

    model, data = make(Residual()), classified(12)
    both = [cg.Candidate(str(i), CopiedBlock(model[2]), name=f"after {i}") for i in (0, 2)]
    record = cg.insert(model, solved(model, data, *both, rule=cg.TopK(2)))
    assert [layer.block.get("of") for layer in record.insertions] == ["2", "3"]
    text = cg.GrowthRecord.from_json(record.to_json())
    again = cg.replay(make(Residual()), text)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(data[0][0]), model(data[0][0]))
    other = make(Residual())
    other[2] = nn.Tanh()
    with nothing_left_behind(other), refused(cg.RecordError, '"2"', "Residual", "Tanh"):
        cg.replay(other, text, strict=False)


def test_a_copy_of_something_else_has_to_be_given() -> None:
    class Other(Residual):
        pass

    model, fresh, data = Stack(3), Stack(3), classified(12)
    one = cg.Candidate("blocks.1", CopiedBlock(Other()))
    record = cg.insert(model, solved(model, data, one))
    text = cg.GrowthRecord.from_json(record.to_json())
    with nothing_left_behind(fresh), refused(cg.RecordError, "CopiedBlock", "blocks="):
        cg.replay(fresh, text)
    again = cg.replay(fresh, text, blocks={"blocks.1": CopiedBlock(Other())})
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(data[0][0]), model(data[0][0]))


# --- several layers at one site -----------------------------------------------------------------


def pinned_gradients(model: nn.Module, data: Any, layer: nn.Module) -> dict[str, Tensor]:
    names: Any = layer.pinned
    grads = torch.autograd.grad(mean_loss(model, data), [layer.get_parameter(n) for n in names])
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("after", ["stem", "stem.base", "stem.inserted", "stem.inserted2"])
def test_one_more_layer_renames_nothing(after: str) -> None:
    """It comes right after its site, and its gradient there is −λ."""
    model, data = Stack(2), classified(12)
    grown(model, mlp("stem", "one"), mlp("stem", "two"))
    kept = dict(model.named_modules())
    order = [name for name, _ in model.stem.named_children()]
    solution = solved(model, data, mlp(after), rule=choose(f"mlp {after}"))
    (layer,) = cg.insert(model, solution).insertions
    assert layer.placement == "joined"
    now = dict(model.named_modules())
    assert all(now[name] is module for name, module in kept.items())
    new = model.get_submodule("stem.inserted3")
    order.insert(order.index(after[5:] or "inserted2") + 1, "inserted3")
    assert [name for name, _ in model.stem.named_children()] == order
    for name, grad in pinned_gradients(model, data, new).items():
        torch.testing.assert_close(solution.multipliers[f"mlp {after}"][name], -grad)


def test_many_rounds_at_one_site() -> None:
    """Four calls deep each, Python could not recurse; the state dict of a replay fits."""
    model, data, depth = Stack(1), classified(6), 250
    fresh, x = copy.deepcopy(model), data[0][0]
    block, record = ResidualLinear(4, torch.tanh), cg.GrowthRecord()
    for sites in (["stem"] * depth, ["stem", "stem.base", "stem.inserted"]):
        candidates = [cg.Candidate(s, block, name=f"{s} {i}") for i, s in enumerate(sites)]
        rule = choose(*(one.name for one in candidates))
        step = cg.insert(model, solved(model, data, *candidates, rule=rule))
        record = record + step if record.insertions else step
        with torch.no_grad():
            for parameter in model.stem.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
    again = cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(again(x), model(x))
    names = [name for name, _ in model.stem.named_children()]
    assert names[:4] == ["base", "inserted252", "inserted", "inserted253"]
    assert names[-1] == "inserted251"


def test_a_layer_stays_behind_a_hook_on_the_grown_site() -> None:
    """λ was measured behind it, so the layer goes around the wrapper."""
    model, data = Stack(1), classified(12)
    grown(model, mlp("stem"))
    model.stem.register_forward_hook(lambda *call: 2 * call[-1])
    solution = solved(model, data, mlp("stem"), rule=choose("mlp stem"))
    (layer,) = cg.insert(model, solution).insertions
    assert layer.placement == "wrapped"
    new = model.get_submodule("stem.inserted")
    for name, grad in pinned_gradients(model, data, new).items():
        torch.testing.assert_close(solution.multipliers["mlp stem"][name], -grad)


class Shifted(ResidualLinear):
    """Reads what else its site was called with, if anything."""

    takes_context = True

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return super().forward(x) if shift is None else super().forward(x + shift) - shift


class Shifting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = Plus(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x, x.new_ones(4)))


class Plus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 4)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.linear(x) + shift


@pytest.mark.parametrize("after", ["stem", "stem.base", "stem.inserted"])
@pytest.mark.parametrize("first", [Shifted, ResidualLinear])
def test_a_layer_gets_the_arguments_that_its_site_got(after: str, first: Any) -> None:
    """An inserted layer without context hands none on to the one after it."""
    model, data = Shifting(), classified(12)
    one = cg.Candidate("stem", first(4, torch.tanh))
    cg.insert(model, solved(model, data, one, rule=choose("stem")))
    other = cg.Candidate(after, Shifted(4, torch.tanh))
    solution = solved(model, data, other, rule=choose(after))
    old = set(model.modules())
    cg.insert(model, solution)
    (new,) = (m for m in model.modules() if isinstance(m, Shifted) and m not in old)
    for name, grad in pinned_gradients(model, data, new).items():
        torch.testing.assert_close(solution.multipliers[after][name], -grad)


@pytest.mark.parametrize("again", ["stem", "stem.base", "stem.inserted"])
def test_a_layer_gets_the_arguments_that_hooks_on_its_site_changed(again: str) -> None:
    model, data = Shifting(), classified(12)
    model.stem.register_forward_pre_hook(lambda _, args: (args[0], 3 * args[1]))
    for number, after in enumerate(("stem", again)):
        one = cg.Candidate(after, Shifted(4, torch.tanh), name=str(number))
        solution = solved(model, data, one, rule=choose(one.name))
        old = set(model.modules())
        cg.insert(model, solution)
        (new,) = (m for m in model.modules() if isinstance(m, Shifted) and m not in old)
        for name, grad in pinned_gradients(model, data, new).items():
            torch.testing.assert_close(solution.multipliers[one.name][name], -grad)


def test_a_record_of_an_earlier_version_replays_as_it_was_made() -> None:
    """Second layers at one site stood around the wrapper then."""
    entry = """{"name": "a", "after": "0", "block": {"type": "ResidualLinear", "arguments":
        {"width": 4, "activation": {"function": "torch.tanh"}}}, "parameters":
        {"weight": [4, 4], "bias": [4]}, "overwritten": false, "placement": "wrapped"}"""
    text = f'{{"version": 2, "insertions": [{entry}, {entry}], "model": {{}}}}'
    model = cg.replay(sequential(), cg.GrowthRecord.from_json(text), strict=False)
    assert [name.removesuffix(".weight") for name in model.state_dict() if "weight" in name] == [
        "0.base.base",
        "0.base.inserted",
        "0.inserted",
        "1",
    ]


def test_a_layer_that_joined_others_needs_them() -> None:
    model, data = Stack(1), classified(12)
    grown(model, mlp("stem"))
    record = cg.insert(model, solved(model, data, mlp("stem"), rule=choose("mlp stem")))
    fresh = Stack(1)
    with nothing_left_behind(fresh), refused(cg.RecordError, "joined", '"stem"', "all rounds"):
        cg.replay(fresh, record, strict=False)
