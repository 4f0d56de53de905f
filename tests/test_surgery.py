"""What people have around a model goes on working when a layer is inserted into it."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_same,
    candidate,
    choose,
    classified,
    feedforward,
    mean_loss,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import constrained_growth as cg
from constrained_growth.blocks import CopiedBlock, ResidualLinear, ResidualMLP
from constrained_growth.inserted import Inserted


class Residual(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(self.norm(x)).tanh())


class Stack(nn.Module):
    """A stem, a list of residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp(after: str) -> cg.Candidate:
    return cg.Candidate(after, ResidualMLP(4, 3, nn.GELU()))


def copied(model: nn.Module, after: str) -> cg.Candidate:
    return cg.Candidate(after, CopiedBlock(model.get_submodule(after)), name=f"copy of {after}")


def plan(model: nn.Module, data: Any, *candidates: cg.Candidate) -> cg.Solution:
    return solved(model, data, *candidates, rule=choose(*(one.name for one in candidates)))


def both(model: nn.Module, data: Any) -> cg.Solution:
    """A layer around the stem, and one more in the list."""
    return plan(model, data, mlp("stem"), copied(model, "blocks.0"))


def steps(model: nn.Module, data: Any, *optimizers: Optimizer, count: int = 3) -> None:
    for _ in range(count):
        for x, y in data:
            for one in optimizers:
                one.zero_grad()
            CROSS_ENTROPY(model(x), y).backward()
            for one in optimizers:
                one.step()


def homes(*optimizers: Optimizer) -> dict[int, Optimizer]:
    return {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}


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


# --- optimizers -------------------------------------------------------------------------------


class Lion(Optimizer):
    """Somebody's own, with a state for each parameter and a setting that changes as it runs."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.9, "taken": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["taken"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    momentum = state.setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["beta"])
                    p.data.sub_(group["lr"] * momentum.sign())


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Adadelta": torch.optim.Adadelta,
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,
    "Adafactor": torch.optim.Adafactor,
    "Lion": Lion,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_next_step_of_old_parameters_is_that_without_the_layer(name: str) -> None:
    model, data = Stack(), classified(20, batch=8)
    optimizer = OPTIMIZERS[name](model.named_parameters())
    steps(model, data, optimizer)
    twin, twins = copy.deepcopy((model, optimizer))
    old = dict(zip(twin.parameters(), list(model.parameters()), strict=True))
    cg.insert(model, both(model, data), optimizer=optimizer)
    assert len(homes(optimizer)) == len(list(model.parameters()))
    steps(model, data[:1], optimizer, count=1)
    steps(twin, data[:1], twins, count=1)
    for parameter, other in old.items():
        torch.testing.assert_close(other, parameter, rtol=0, atol=1e-15)
        assert_same(dict(optimizer.state[other]).keys(), dict(twins.state[parameter]).keys())
    steps(model, data, optimizer)
    assert all(bool(optimizer.state[p]) for p in model.parameters())


def muon_and_adamw(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    """Hidden matrices here, everything else there."""
    named = dict(model.named_parameters())
    hidden = [n for n, p in named.items() if n.startswith("blocks.") and p.dim() == 2]
    muon = torch.optim.Muon([named[n] for n in hidden])  # type: ignore[attr-defined]
    return muon, torch.optim.AdamW([p for n, p in named.items() if n not in hidden], lr=0.01)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="an older torch")
def test_several_optimizers_take_what_they_can() -> None:
    model, data = Stack(), classified(20, batch=8)
    muon, adamw = muon_and_adamw(model)
    steps(model, data, muon, adamw)
    before = {id(p): copy.deepcopy(dict(o.state[p])) for o in (muon, adamw) for p in o.state}
    old = list(model.parameters())
    cg.insert(model, both(model, data), optimizer=[muon, adamw])
    for parameter in old:
        found = dict(homes(muon, adamw)[id(parameter)].state[parameter])
        assert_same(found, before[id(parameter)])
    for name, parameter in model.named_parameters():
        expected = muon if name.startswith("blocks.") and parameter.dim() == 2 else adamw
        assert homes(muon, adamw)[id(parameter)] is expected, name
    values = copy.deepcopy(dict(model.named_parameters()))
    steps(model, data, muon, adamw)
    assert not any(torch.equal(p, values[name]) for name, p in model.named_parameters())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="an older torch")
def test_a_kernel_does_not_go_to_the_optimizer_of_matrices() -> None:
    class Kernel(nn.Module):
        pinned = ("weight",)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + x @ self.weight[..., 0]

    model, data = Stack(), classified(20)
    muon, adamw = muon_and_adamw(model)
    solution = plan(model, data, cg.Candidate("blocks.1", Kernel()))
    cg.insert(model, solution, optimizer=(muon, adamw))
    new = model.get_parameter("blocks.1.inserted.weight")
    assert homes(muon, adamw)[id(new)] is adamw
    other = Stack()
    muon, _ = muon_and_adamw(other)
    solution = plan(other, data, cg.Candidate("blocks.1", Kernel()))
    with nothing_left_behind(other), refused(cg.OptimizerError, "Muon", "optimizer=[one, other]"):
        cg.insert(other, solution, optimizer=muon)


def test_sparse_optimizer_is_given_nothing_dense() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x).tanh())

    model = Words()
    data = [(torch.randint(5, (8,)), torch.randint(3, (8,)))]
    sparse = torch.optim.SparseAdam(model.embedding.parameters())
    adam = torch.optim.Adam(model.head.parameters())
    solution = plan(model, data, mlp("embedding"))
    with nothing_left_behind(model), refused(cg.OptimizerError, "SparseAdam", "sparse gradients"):
        cg.insert(model, solution, optimizer=sparse)
    cg.insert(model, solution, optimizer=[sparse, adam])
    steps(model, data, sparse, adam)
    assert len(adam.state) == 5


@pytest.mark.parametrize("given", ["adam", 3, [None], {"a": 1}])
def test_what_is_no_optimizer(given: Any) -> None:
    model, data = Stack(), classified(12)
    solution = both(model, data)
    with nothing_left_behind(model), refused(cg.OptimizerError, "optimizer=", "Optimizer"):
        cg.insert(model, solution, optimizer=given)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda n: 0.9**n, lambda n: 0.5**n]),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.3, 0.1], total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, patience=0, min_lr=[0.0, 0.01]
    ),
    "warm-up, then decay": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_go_on(name: str) -> None:
    """The learning rates are those of a run without the layer, also of one that is resumed."""

    def run(grow: bool, resume: bool) -> list[Any]:
        torch.manual_seed(0)
        model, data, rates = Stack(), classified(12), []
        groups = [{"params": list(m.parameters())} for m in (model.stem, model.blocks)]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        schedule = SCHEDULERS[name](optimizer)
        for step in range(8):
            if grow and step == 4:
                cg.insert(model, both(model, data), optimizer=optimizer)
            if resume and step == 5:
                state = copy.deepcopy(schedule.state_dict())
                schedule = SCHEDULERS[name](optimizer)
                schedule.load_state_dict(state)
            steps(model, data, optimizer, count=1)
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append([group["lr"] for group in optimizer.param_groups])
        return rates

    assert run(True, False) == run(False, False)
    assert run(True, True) == run(False, True)


# --- averages ---------------------------------------------------------------------------------


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


@pytest.mark.parametrize("make", [ema, AveragedModel], ids=["exponential", "equal weights"])
def test_an_average_is_that_of_a_network_that_had_the_layer_all_along(
    make: Callable[[nn.Module], AveragedModel],
) -> None:
    model, data = Stack(), classified(20, batch=8)
    optimizer, averaged = torch.optim.SGD(model.parameters(), lr=0.1), make(model)
    history = []
    for _ in range(3):
        steps(model, data, optimizer, count=1)
        averaged.update_parameters(model)
        history.append(copy.deepcopy(model))
    x = data[0][0]
    expected = averaged(x)
    solution = both(model, data)
    cg.insert(model, solution, optimizer=optimizer, averaged=averaged)
    assert torch.equal(averaged(x), expected)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in averaged.parameters()}
    assert not shared

    reference = None  # the same average, made of models that always had the layers
    for old in history:
        cg.insert(old, solution)
        reference = reference or make(old)
        reference.update_parameters(old)
    for _ in range(2):
        steps(model, data, optimizer, count=1)
        averaged.update_parameters(model)
        assert reference is not None
        reference.update_parameters(model)
    for name, value in reference.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(averaged.state_dict()[name], value, rtol=1e-13, atol=1e-15)


def test_an_average_in_another_precision_and_a_teacher() -> None:
    model, data = Stack(), classified(12)
    precise, teacher = ema(copy.deepcopy(model).float()), copy.deepcopy(model).eval()
    cg.insert(model, both(model, data), averaged=[precise, teacher])
    assert {p.dtype for p in precise.module.parameters()} == {torch.float32}
    assert list(teacher.state_dict()) == list(model.state_dict())
    assert not any(module.training for module in teacher.modules())


def test_averages_that_do_not_fit() -> None:
    model, data = Stack(), classified(12)
    solution = both(model, data)
    for given, words in (
        (feedforward(2, 4, 3), "by name and shape"),
        (model, "shares"),
        (3, "averaged=3"),
    ):
        with nothing_left_behind(model), refused(cg.CandidateError, "averaged", words):
            cg.insert(model, solution, averaged=given)  # type: ignore[arg-type]


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


def test_wrapper_of_several_processes_is_to_be_made_anew() -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, data = feedforward(2, 4, 3), classified(12)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        solution = plan(ddp, data, candidate("module.1"))
        with pytest.warns(UserWarning, match="make the wrapper anew"):
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
    assert isinstance(model.module[0], Inserted)
