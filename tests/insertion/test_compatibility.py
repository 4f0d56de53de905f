"""Hooks, tied weights, copies and wrappers of a model still work after an insertion."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    assert_same,
    candidate,
    classified,
    feedforward,
    mean_loss,
    nothing_left_behind,
    refused,
)
from stacks import Residual, Stack, both, copied, mlp, plan, steps
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import constrained_growth as cg
from constrained_growth.blocks import ResidualLinear

# --- names ------------------------------------------------------------------------------------


def test_keys_of_the_state_dict() -> None:
    """As documented: below a site `base.` and `inserted.`, in a list one number more."""
    model, data = Stack(), classified(12)
    before = model.state_dict()
    cg.insert(model, both(model, data))
    after = model.state_dict()
    for key, value in before.items():
        new = key.replace("stem.", "stem.base.").replace("blocks.1.", "blocks.2.")
        assert after.pop(new).data_ptr() == value.data_ptr()
    blocks = {f"blocks.1.{name}" for name, _ in Residual().named_parameters()}
    assert set(after) == blocks | {
        f"stem.inserted.{name}" for name, _ in mlp("stem").block.named_parameters()
    }


# --- in the model -----------------------------------------------------------------------------


def test_hooks_on_the_site_fire_once_with_what_they_saw_before() -> None:
    model, data = feedforward(2, 4, 3), classified(12)
    x, seen, place = data[0][0], [], []
    model[1].register_forward_hook(lambda m, args, out: seen.append(out.detach().clone()))
    model(x)
    cg.insert(model, plan(model, data, mlp("1")))
    model[1].register_forward_hook(lambda m, args, out: place.append(out.detach().clone()))
    seen_before = list(seen)
    with torch.no_grad():
        model.get_parameter("1.inserted.outer.weight").fill_(1.0)
    model(x)
    assert len(seen) == len(seen_before) + 1  # what looks at the function does not hide its runs
    assert torch.equal(seen[-1], seen[0])
    assert len(place) == 1
    assert not torch.allclose(place[0], seen[0])


def test_hooks_that_change_the_output_go_on_changing_it() -> None:
    model, data = feedforward(2, 4, 3), classified(12)
    model[0].register_forward_hook(lambda *call: call[-1] * 2)
    model[1].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    before = model(data[0][0])
    cg.insert(model, plan(model, data, mlp("0"), mlp("1")))
    assert torch.equal(model(data[0][0]), before)


class Tied(nn.Module):
    """The head is the transposed embedding, and two layers are one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(3, 4), nn.Linear(4, 3, bias=False)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight, self.two.weight = self.embedding.weight, self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.embedding(x)).tanh()))


@pytest.mark.parametrize("site", ["embedding", "one", "two"])
def test_tied_weights_stay_tied(site: str) -> None:
    model, fresh = Tied(), Tied()
    data = [(torch.randint(3, (9,)), torch.randint(3, (9,)))]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    record = cg.insert(model, plan(model, data, mlp(site)), optimizer=optimizer)
    again = cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))
    steps(model, data, optimizer)
    again.load_state_dict(model.state_dict())
    for one in (model, again):
        for names in (("head", "embedding"), ("two", "one")):
            first, second = (one.get_submodule(name) for name in names)
            assert first.weight is second.weight
    assert torch.equal(again(data[0][0]), model(data[0][0]))


@pytest.mark.parametrize("everything", [True, False])
def test_frozen_neighbours_stay_frozen_and_the_new_layers_train(everything: bool) -> None:
    """Also a copy of a frozen block; they join the optimizer of what is trained."""
    model, data = Stack(), classified(20)
    for part in (model.stem, model.blocks):
        part.requires_grad_(False)
    trained = model.parameters() if everything else model.head.parameters()
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    frozen = copy.deepcopy(model.state_dict())
    old = {id(p) for p in model.parameters()}
    record = cg.insert(model, both(model, data), optimizer=optimizer)
    new = [p for p in model.parameters() if id(p) not in old]
    assert all(p.requires_grad for p in new)
    before = [p.detach().clone() for p in new]
    steps(model, data, optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(new, before, strict=True))
    for name, parameter in model.named_parameters():
        if id(parameter) in old and not name.startswith("head"):
            key = name.replace("stem.base.", "stem.").replace("blocks.2.", "blocks.1.")
            assert torch.equal(parameter, frozen[key])
            assert not parameter.requires_grad
    assert len(record.insertions) == 2


@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["weight", "spectral"],
)
def test_parametrized_sites(wrap: Callable[[nn.Module], nn.Module]) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(wrap(nn.Linear(2, 4)), nn.Tanh(), wrap(nn.Linear(4, 3)))

    model, fresh, data = make(), make(), classified(20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = copy.deepcopy(model)
    record = cg.insert(model, plan(model, data, mlp("0"), mlp("1")), optimizer=optimizer)
    assert record.difference == {"train": 0.0, "eval": 0.0}
    assert torch.equal(model(data[0][0]), kept(data[0][0]))
    steps(model, data, optimizer)
    again = cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(data[0][0]), model.eval()(data[0][0]))


def through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "passed", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v)), through_torch_save]
)
def test_model_and_optimizer_are_copied_together(passed: Callable[[Any], Any]) -> None:
    model, data = Stack(), classified(20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    steps(model, data, optimizer)
    record = cg.insert(model, both(model, data), optimizer=optimizer)
    twin, twins, same = passed((model, optimizer, record))
    assert same == record
    steps(model, data, optimizer)
    steps(twin, data, twins)
    assert_same(twin.state_dict(), model.state_dict())


# --- around the model -------------------------------------------------------------------------


def test_compiled_model_runs_the_new_layer() -> None:
    torch.compiler.reset()
    model, data = feedforward(2, 4, 3), classified(12)
    compiled = torch.compile(model, backend="eager")
    x = data[0][0]
    before = compiled(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    solution = plan(compiled, data, candidate("_orig_mod.1"))  # type: ignore[arg-type]
    cg.insert(compiled, solution, optimizer=optimizer)  # type: ignore[arg-type]
    torch.testing.assert_close(compiled(x), before, rtol=1e-14, atol=1e-14)
    steps(compiled, data, optimizer)  # type: ignore[arg-type]
    assert torch.allclose(compiled(x), model(x))
    with torch.no_grad():
        model.get_parameter("1.inserted.bias").add_(1.0)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)
    torch.compiler.reset()


def test_wrapper_of_several_processes_needs_rewrap() -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, data = feedforward(2, 4, 3), classified(12)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        solution = plan(ddp, data, candidate("module.1"))
        with pytest.warns(UserWarning, match="cg.rewrap"):
            cg.insert(ddp, solution, optimizer=optimizer)
        steps(DistributedDataParallel(ddp.module), data, optimizer)
        assert not torch.equal(model.get_parameter("1.inserted.weight"), torch.eye(4))
    finally:
        torch.distributed.destroy_process_group()


def test_module_that_cannot_be_exchanged_is_refused() -> None:
    class FullyShardedDataParallel(nn.Sequential):
        """By the name of PyTorch's own, which needs several processes."""

    model = nn.Sequential(FullyShardedDataParallel(*feedforward(2, 4, 3)))
    data = classified(12)
    solution = plan(model, data, candidate("0.1"))
    with nothing_left_behind(model), refused(cg.CandidateError, "no module can be exchanged"):
        cg.insert(model, solution)


def test_data_parallel_model() -> None:
    model, data = nn.DataParallel(feedforward(2, 4, 3)), classified(12)
    before = mean_loss(model, data).item()
    cg.insert(model, plan(model, data, cg.Candidate("module.0", ResidualLinear(4, torch.tanh))))
    assert mean_loss(model, data).item() == before
    assert "module.0.inserted.weight" in model.state_dict()


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (nn.DataParallel, "module."),
        (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
        (
            lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
            "_orig_mod.module.",
        ),
    ],
)
def test_record_of_a_wrapped_model_replays_without_the_wrapper(
    wrap: Callable[[Any], Any], names: str
) -> None:
    torch.compiler.reset()
    model, data = Stack(), classified(12)
    wrapped = wrap(model)
    solution = plan(wrapped, data, mlp(f"{names}stem"), copied(wrapped, f"{names}blocks.0", "one"))
    record = cg.GrowthRecord.from_json(cg.insert(wrapped, solution).to_json())
    for fresh, trained in ((Stack(), model), (wrap(Stack()), wrapped)):
        again = cg.replay(fresh, record)
        again.load_state_dict(trained.state_dict())
        assert torch.equal(again(data[0][0]), model(data[0][0]))
    torch.compiler.reset()
