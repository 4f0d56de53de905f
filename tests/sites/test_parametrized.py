"""Parametrised, normalised and pruned weights of grown sites, before the growth and after it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import choose, classified, solved
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import constrained_growth as cg
from constrained_growth import blocks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Lower(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tril()


def plain() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def grown(model: nn.Module) -> cg.GrowthRecord:
    """A layer inserted after "2", which then does something."""
    one = cg.Candidate("2", blocks.ResidualMLP(4, 3, torch.tanh))
    record = cg.insert(model, solved(model, classified(8), one, rule=choose("2")))
    with torch.no_grad():
        for parameter in model.get_submodule("2.inserted").parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return record


def remove(name: str) -> Callable[[Any], Any]:
    return lambda site: parametrize.remove_parametrizations(site, name)


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "weight_norm": (parametrizations.weight_norm, remove("weight")),
    "spectral_norm": (parametrizations.spectral_norm, remove("weight")),
    "orthogonal": (parametrizations.orthogonal, remove("weight")),
    "a parametrisation": (
        lambda site: parametrize.register_parametrization(site, "weight", Lower()),
        remove("weight"),
    ),
    "of the bias": (
        lambda site: parametrize.register_parametrization(site, "bias", nn.Tanh()),
        remove("bias"),
    ),
    "pruning": (
        lambda site: prune.l1_unstructured(site, "weight", 0.5),
        lambda site: prune.remove(site, "weight"),
    ),
    "pruning twice": (
        lambda site: [prune.ln_structured(site, "weight", 0.3, 2, dim) for dim in (0, 1)],
        lambda site: prune.remove(site, "weight"),
    ),
    "old weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_grown_site_is_changed_as_the_module_was(case: str, when: str) -> None:
    """The weights are those of a plain module treated alike, and so is the way back."""
    change, undo = CHANGES[case]
    model, other = plain(), plain()
    steps = [lambda: change(model[2]), lambda: grown(model)]
    for step in steps if when == "before" else reversed(steps):
        torch.manual_seed(1)
        step()
    torch.manual_seed(1)
    change(other[2])
    if when == "before":
        other.load_state_dict(  # the passes of the growth have moved some buffers
            {name.replace("2.base.", "2."): t for name, t in model.state_dict().items()},
            strict=False,
        )
    model.eval()
    other.eval()
    x = classified(8)[0][0]

    def check() -> None:
        expected = other[2](other[1](other[0](x)))
        found = model(x)
        assert torch.equal(model[2].base.weight, other[2].weight)
        assert torch.equal(model[2].weight, other[2].weight)
        assert torch.equal(found, model[4](torch.tanh(model[2].inserted(expected))))

    check()
    names = [name.replace("2.", "2.base.") for name in other.state_dict() if name[0] == "2"]
    assert names == [name for name in model.state_dict() if name.startswith("2.base.")]
    model[2].base.weight.sum().backward()
    other[2].weight.sum().backward()
    gradients = {name: p.grad for name, p in other[2].named_parameters()}
    for name, parameter in model[2].base.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])
    undo(model[2])
    undo(other[2])
    check()
    assert type(model[2].base) is nn.Linear
    assert dict(model[2].base.named_parameters()).keys() == {"weight", "bias"}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_site_is_replayed_loaded_and_copied(case: str, when: str) -> None:
    change, _ = CHANGES[case]
    model, fresh = plain(), plain()
    if when == "before":
        change(model[2])
        change(fresh[2])
    record = grown(model)
    cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))
    if when == "after":
        change(model[2])
        change(fresh[2])
    model.eval()
    x = classified(8)[0][0]
    with torch.no_grad():
        expected = model(x)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.eval()(x), expected)
        assert torch.equal(copy.deepcopy(model)(x), expected)


def test_a_site_is_parametrised_again() -> None:
    """Both of what was there before the growth and of another tensor; other sites stay plain."""
    model = plain()
    parametrize.register_parametrization(model[2], "weight", Lower())
    grown(model)
    parametrize.register_parametrization(model[2], "weight", nn.Tanh())
    parametrize.register_parametrization(model[2], "bias", nn.Tanh())
    original = model[2].base.parametrizations.weight.original
    assert torch.equal(model[2].base.weight, original.tril().tanh())
    assert torch.equal(model[2].bias, model[2].base.parametrizations.bias.original.tanh())
    assert not hasattr(type(model[2]), "weight")
    other = plain()
    grown(other)
    other[2].bias = None
    assert other[2].bias is None
    remove("weight")(model[2])
    assert parametrize.is_parametrized(model[2].base, "bias")
    assert not parametrize.is_parametrized(model[2].base, "weight")


def test_pruned_sites_grow_and_roll_back() -> None:
    """The hook that prunes moves with the site, and back again."""
    model = plain()
    prune.l1_unstructured(model[2], "weight", 0.5)
    site = model[2]
    hooks = dict(site._forward_pre_hooks)

    class Broken(blocks.ResidualMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.training + 1.0

    one = cg.Candidate("2", Broken(4, 3, torch.tanh))
    with pytest.raises(cg.GrowthError):
        cg.insert(model, solved(model, classified(8), one, rule=choose("2")))
    assert model[2] is site
    assert dict(site._forward_pre_hooks) == hooks
    grown(model)
    prune.l1_unstructured(model[2], "weight", 0.5)
    assert int((model[2].base.weight == 0).sum()) == 12
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(classified(8)[0][0]).square().sum().backward()
        optimizer.step()
    model(classified(8)[0][0])
    assert int((model[2].base.weight == 0).sum()) == 12


def test_parameters_are_found_by_name_and_listed_once() -> None:
    model = plain()
    grown(model)
    site = model[2]
    assert "weight" in site._parameters
    assert "weight" not in site._buffers
    assert site._parameters["weight"] is site._parameters.get("weight") is site.base.weight
    assert site._parameters.get("other") is None
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert [name for name in names if name.startswith("2.base")] == ["2.base.weight", "2.base.bias"]
    assert "2.weight" not in names
    site._parameters["bias"] = nn.Parameter(torch.ones(4))
    assert torch.equal(site.base.bias, torch.ones(4))
    assert site._parameters.pop("bias") is not None
    assert "bias" not in site.base._parameters
    assert not isinstance(site, nn.Linear)
    again: Any = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(again[2]) is type(site)
    assert again[2]._parameters["weight"] is again[2].base.weight is not site.base.weight


# --- methods that return the module itself -------------------------------------------------------


class Fluent(nn.Sequential):
    def frozen(self) -> "Fluent":
        return self.requires_grad_(False)


def test_what_returns_the_users_module_returns_the_grown_site() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 4), Fluent(nn.Linear(4, 4)), nn.Linear(4, 3))
    one = cg.Candidate("1", blocks.ResidualMLP(4, 3, torch.tanh))
    cg.insert(model, solved(model, classified(8), one, rule=choose("1")))
    site, keys = model[1], len(model.state_dict())
    model[1] = model[1].append(nn.Tanh())
    model[1] = model[1].extend(nn.Sequential(nn.Softplus()))
    model[1] = model[1].insert(0, nn.Sigmoid())
    model[1] += nn.Sequential(nn.ReLU())
    model[1] *= 2
    model[1] = model[1].frozen()
    assert model[1] is site
    kinds = [nn.Sigmoid, nn.Linear, nn.Tanh, nn.Softplus, nn.ReLU]
    assert [type(module) for module in site.base] == 2 * kinds
    assert not any(p.requires_grad for p in site.base.parameters())
    assert len(model.state_dict()) == keys + 2  # the same linear layer under another name
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = model[1] + nn.Sequential()
    with pytest.raises(TypeError, match="unsupported operand"):
        model[0] += 1
