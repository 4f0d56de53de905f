"""The model gains the layer; its function is unchanged."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    candidate,
    choose,
    classified,
    feedforward,
    label,
    mean_loss,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualLinear, ResidualMLP, TanhLU

RESIDUAL: dict[str, Callable[[int], nn.Module]] = {
    "one weight": lambda n: ResidualLinear(n, torch.tanh),
    "outer": lambda n: ResidualMLP(n, n + 1, nn.GELU()),
    "inner": lambda n: ResidualMLP(n, 3, nn.SiLU(), "inner"),
    "a user's own": Gain,
}


def inserted(
    model: nn.Module, data: Any, *candidates: cg.Candidate, **options: Any
) -> cg.GrowthRecord:
    """All of the candidates, put in."""
    names = [one.name for one in candidates]
    return cg.insert(model, solved(model, data, *candidates, rule=choose(*names)), **options)


def output(model: nn.Module, data: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in data])


def assert_learns(model: nn.Module, after: str, data: Any) -> None:
    """The data pass through the layer: its pinned parameters get gradients and matter."""
    block = model.get_submodule(after)
    pins = [block.get_parameter(name) for name in block.pinned]  # type: ignore[union-attr]
    before = mean_loss(model, data)
    grads = torch.autograd.grad(before, pins)
    assert any(bool(grad.any()) for grad in grads)
    with torch.no_grad():
        for pin, grad in zip(pins, grads, strict=True):
            pin -= 1e-3 * grad
    assert mean_loss(model, data).item() < before.item()


# --- the function stays -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", RESIDUAL)
def test_residual_blocks_preserve_the_function_to_the_last_bit(kind: str) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(30, batch=12)
    before = output(model, data)
    inserted(model, data, *(cg.Candidate(str(site), RESIDUAL[kind](4)) for site in range(4)))
    assert torch.equal(output(model, data), before)
    for site in range(4):
        assert_learns(model, f"{site}.inserted", data)


@pytest.mark.parametrize("activation", [nn.ReLU(), TanhLU(), nn.Hardtanh()], ids=label)
def test_identity_layers_preserve_the_function_to_rounding(activation: nn.Module) -> None:
    model = feedforward(2, 4, 3, activation=lambda: activation)
    data = classified(30, batch=12)
    before = output(model, data)
    inserted(model, data, candidate(block=IdentityLinear(4, activation)))
    torch.testing.assert_close(output(model, data), before, rtol=1e-14, atol=1e-14)
    assert_learns(model, "1.inserted", data)


def test_elu_with_its_shift() -> None:
    model = feedforward(2, 4, 3, activation=nn.ELU)
    data = classified(30)
    before = output(model, data)
    inserted(model, data, candidate(block=IdentityLinear(4, nn.ELU(), shift=1.0)))
    torch.testing.assert_close(output(model, data), before, rtol=1e-14, atol=1e-14)


def test_old_gradients_stay_too() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    names = dict(model.named_parameters())
    before = torch.autograd.grad(mean_loss(model, data), list(names.values()))
    inserted(model, data, candidate(), candidate("0", block=RESIDUAL["outer"](4)))
    after = torch.autograd.grad(mean_loss(model, data), list(names.values()))
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_inserting_nothing_leaves_the_model_untouched() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    optimizer = torch.optim.Adam(model.parameters())
    solution = solved(model, data, candidate(), rule=cg.Threshold(absolute=1e9))
    with nothing_left_behind(model):
        record = cg.insert(model, solution, optimizer=optimizer)
    assert record.insertions == ()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in model.parameters()
    ]


def test_old_parameters_are_the_same_objects_and_random_state_stays() -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    old = dict(model.named_parameters())
    solution = solved(model, data, candidate(block=RESIDUAL["outer"](4)))
    state = torch.get_rng_state()
    cg.insert(model, solution)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.get_parameter("0.weight") is old["0.weight"]
    assert model.get_parameter("2.bias") is old["2.bias"]


@pytest.mark.parametrize("training", [True, False])
def test_layer_takes_the_mode_of_its_site(training: bool) -> None:
    model, data = feedforward(2, 4, 3).train(training), classified(30)
    inserted(model, data, candidate())
    assert all(module.training is training for module in model.modules())


def test_candidates_are_copied_and_can_be_used_again() -> None:
    model, data, one = feedforward(2, 4, 3), classified(30), candidate()
    solution = solved(model, data, one)
    twin = copy.deepcopy(model)
    cg.insert(model, solution)
    cg.insert(twin, solution)
    first, second = (m.get_submodule("1.inserted") for m in (model, twin))
    assert len({id(one.block), id(first), id(second)}) == 3
    with torch.no_grad():
        first.get_parameter("weight").zero_()
    assert torch.equal(second.get_parameter("weight"), torch.eye(4))
    assert torch.equal(one.block.get_parameter("weight"), torch.eye(4))


# --- anywhere in a model ------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class Nested(nn.Module):
    """Modules in attributes, lists, dicts and sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 4)
        self.block = Block()
        self.many = nn.ModuleList(Block() for _ in range(2))
        self.named = nn.ModuleDict({"a": Block(), "b": nn.Tanh()})
        self.sequence = nn.Sequential(Block(), nn.Sequential(Block(), nn.Tanh()))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        for module in self.many:
            x = module(x)
        for key in self.named:
            x = self.named[key](x)
        return self.head(self.sequence(x))


SITES = ["stem", "block", "block.act", "block.linear", "many.0", "many.1.act", "named.a", "named.b"]
SITES += ["sequence", "sequence.0", "sequence.1", "sequence.1.0.act", "sequence.1.1"]


@pytest.mark.parametrize("site", SITES)
def test_any_place_in_a_model(site: str) -> None:
    model, data = Nested(), classified(20)
    names = [name for name, _ in model.named_modules()]
    before = output(model, data)
    (layer,) = inserted(model, data, cg.Candidate(site, RESIDUAL["outer"](4))).insertions
    assert layer.after == site
    assert torch.equal(output(model, data), before)
    assert_learns(model, f"{site}.inserted", data)
    kept = {name for name in names if name != site and not name.startswith(f"{site}.")}
    assert kept <= {name for name, _ in model.named_modules()}


@pytest.mark.parametrize("sites", [["block", "block.act"], ["block.act", "block"], SITES])
def test_sites_within_one_another(sites: list[str]) -> None:
    model, data = Nested(), classified(20)
    before, fresh = output(model, data), copy.deepcopy(model)
    record = inserted(model, data, *(cg.Candidate(s, RESIDUAL["outer"](4)) for s in sites))
    assert torch.equal(output(model, data), before)
    new = [m for m in model.modules() if isinstance(m, ResidualMLP)]
    assert len(new) == len(sites)
    again = cg.replay(fresh, record)
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for one in (model, again):
            for parameter in one.parameters():
                parameter.add_(0.01)
    assert torch.equal(output(again, data), output(model, data))
    grads = torch.autograd.grad(mean_loss(model, data), [b.outer.weight for b in new])
    assert all(bool(grad.any()) for grad in grads)


def test_several_layers_at_one_site_stand_in_the_order_of_the_problem() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    candidates = [candidate(block=IdentityLinear(4, nn.ReLU()), name="first")]
    candidates += [cg.Candidate("1", RESIDUAL["outer"](4), name="second")]
    before = output(model, data)
    solution = solved(model, data, *candidates, rule=choose("second", "first"))
    record = cg.insert(model, solution)
    assert [layer.name for layer in record.insertions] == ["first", "second"]
    torch.testing.assert_close(output(model, data), before, rtol=1e-14, atol=1e-14)
    passed = [m for m in model[1].modules() if isinstance(m, IdentityLinear | ResidualMLP)]  # type: ignore[union-attr]
    seen: list[str] = []
    for module in passed:
        module.register_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    output(model, data)
    assert seen == ["IdentityLinear", "ResidualMLP"]


def test_module_that_has_two_names() -> None:
    """The layer is where the forward pass goes, whichever name the candidate has."""

    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()
            self.net = nn.Sequential(nn.Linear(2, 4), self.act, nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    for site in ("act", "net.1"):
        model, data = Alias(), classified(20)
        fresh = copy.deepcopy(model)
        record = inserted(model, data, candidate(site))
        assert model.act is model.net[1]
        assert_learns(model, f"{site}.inserted", data)
        again = cg.replay(fresh, record)
        again.load_state_dict(model.state_dict())
        assert torch.equal(output(again, data), output(model, data))


@pytest.mark.parametrize("kind", ["identity", *RESIDUAL])
def test_site_whose_tensor_is_overwritten_later(kind: str) -> None:
    """The new layer may need its own output to go backward."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)
            self.positive = Positive()

        def forward(self, x: Tensor) -> Tensor:
            x = self.positive(self.first(x))
            x *= 2
            return self.last(x.tanh())

    model, data = Overwrites(), classified(20)
    block = RESIDUAL.get(kind, lambda n: IdentityLinear(n, nn.ReLU()))(4)
    before, fresh = output(model, data), copy.deepcopy(model)
    record = inserted(model, data, cg.Candidate("positive", block))
    torch.testing.assert_close(output(model, data), before, rtol=1e-14, atol=1e-14)
    again = cg.replay(
        fresh, cg.GrowthRecord.from_json(record.to_json()), blocks={"positive": block}
    )
    for one in (model, again):
        assert_learns(one, "positive.inserted", data)


class Positive(nn.Module):
    """|x|, of which backward needs no output."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


# --- round after round --------------------------------------------------------------------------


def test_rounds_of_growing_and_training() -> None:
    model, data = feedforward(2, 4, 3), classified(40, batch=16)
    fresh = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    record = cg.GrowthRecord()
    for number in range(4):
        for x, y in data:
            optimizer.zero_grad()
            CROSS_ENTROPY(model(x), y).backward()
            optimizer.step()
        before = mean_loss(model, data).item()
        sites = ["0", "1", "1.inserted", "1.base"][: 2 if number == 0 else 4]
        candidates = [cg.Candidate(site, RESIDUAL["outer"](4)) for site in sites]
        step = inserted(model, data, candidates[-1 - number % 2], optimizer=optimizer)
        assert mean_loss(model, data).item() == before
        record = step if number == 0 else record + step
    again = cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(again, data), output(model, data))


def test_second_round_measures_the_grown_model() -> None:
    model, data = feedforward(2, 4, 3), classified(40)
    inserted(model, data, candidate())
    solution = solved(model, data, candidate(), candidate("1.inserted"), candidate("1.base"))
    names = list(solution.multipliers)
    assert names == ["1", "1.inserted", "1.base"]
    one, other = (solution.multipliers[name]["weight"] for name in ("1", "1.inserted"))
    assert torch.equal(one, other)  # the same tensor under two names


# --- copies and files ---------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("passed", [copy.deepcopy, through_pickle, through_torch_save])
def test_grown_models_can_be_copied(passed: Callable[[nn.Module], nn.Module]) -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    inserted(model, data, candidate(), cg.Candidate("0", RESIDUAL["outer"](4)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    twin = passed(model)
    assert torch.equal(output(twin, data), output(model, data))
    with torch.no_grad():
        twin.get_parameter("1.inserted.weight").zero_()
    assert model.get_parameter("1.inserted.weight").any()


def test_state_dict_loads_with_weights_only() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    fresh = copy.deepcopy(model)
    record = inserted(model, data, candidate())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = cg.replay(fresh, record)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(output(again, data), output(model, data))


def test_attributes_of_the_site_are_still_there() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    inserted(model, data, cg.Candidate("0", RESIDUAL["outer"](4)))
    site: Any = model[0]
    assert (site.in_features, site.out_features) == (2, 4)
    assert site.weight is site.base.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = site.no_such_thing


# --- refusals -----------------------------------------------------------------------------------


def test_another_model_is_refused_before_anything_changes() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    solution = solved(model, data, candidate("1"), candidate("3"), rule=choose("1", "3"))
    other = feedforward(2, 4, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with nothing_left_behind(other), refused(cg.CandidateError, 'no submodule "3"', '"3"'):
        cg.insert(other, solution, optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 4


def test_decision_about_other_candidates_is_refused() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    solution = solved(model, data, candidate())
    other = replace(solution, decision=cg.Decision(("7",)))
    with nothing_left_behind(model), refused(cg.CandidateError, '"7"', "('1',)"):
        cg.insert(model, other)


def test_decision_made_by_hand() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    solution = solved(model, data, candidate("1"), candidate("3"), rule=choose())
    record = cg.insert(model, replace(solution, decision=cg.Decision(chosen=("3",))))
    assert [layer.after for layer in record.insertions] == ["3"]


def test_record_in_the_same_process_rebuilds_blocks_of_the_users_own() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    fresh = copy.deepcopy(model)
    block = cg.blocks.IdentityLinear(4, lambda x: x.clamp(min=0.0))
    record = cg.insert(model, solved(model, data, cg.Candidate("1", block)))
    cg.replay(fresh, record).load_state_dict(model.state_dict())
    assert torch.equal(fresh(data[0][0]), model(data[0][0]))
    with pytest.raises(cg.RecordError, match="blocks="):
        cg.replay(feedforward(2, 4, 3), cg.GrowthRecord.from_json(record.to_json()))


def test_the_same_solution_is_not_inserted_twice() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [candidate()])
    solution = cg.solve(problem)
    cg.insert(model, solution)
    with pytest.raises(cg.CandidateError, match="new problem"):
        cg.insert(model, solution)
    with pytest.raises(cg.CandidateError, match=r"make a new cg\.GrowthProblem"):
        cg.solve(problem)


def test_a_container_that_got_a_layer_is_still_one() -> None:
    stage = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model, data = nn.Sequential(nn.Linear(2, 4), stage, nn.Linear(4, 3)), classified(20)
    cg.insert(model, solved(model, data, candidate()))
    grown: Any = model[1]
    assert len(grown) == 2
    assert grown[0] is stage[0]
    assert list(grown) == list(stage)
    assert bool(grown)


def test_candidates_of_a_grown_model_are_each_tensor_once() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    cg.insert(model, solved(model, data, candidate()))
    names = [found.after for found in cg.find_candidates(model, data[0][0])]
    assert names == ["1.base", "1", "3"]


def test_grown_sites_are_no_repeating_blocks() -> None:
    """Two wrappers in one list do not make it a stack, and further layers offer no more places."""
    model, data = feedforward(2, 4, 4, 3), classified(20)
    for _ in range(2):
        two = [candidate("1"), candidate("3")]
        cg.insert(model, solved(model, data, *two, rule=choose("1", "3")))
        names = [found.after for found in cg.find_candidates(model, data[0][0])]
        assert names == ["1.base", "1", "3.base", "3"]


def test_other_objects_than_solution_and_record_are_refused() -> None:
    with pytest.raises(cg.CandidateError, match=r"not what cg\.solve returns"):
        cg.insert(feedforward(2, 4, 3), None)  # type: ignore[arg-type]
    with pytest.raises(cg.RecordError, match="from_json"):
        cg.replay(feedforward(2, 4, 3), "{}")  # type: ignore[arg-type]
