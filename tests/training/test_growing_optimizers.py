"""Optimizers, schedules and averages go on when the model gains layers."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_same,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
)
from stacks import Stack, both, copied, homes, mlp, plan, steps
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import constrained_growth as cg
from constrained_growth.training import NewLayers

pytestmark = pytest.mark.filterwarnings("ignore:optimizer=Lion counts the steps of a group")

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


# --- in a loop --------------------------------------------------------------------------------


def trained_by(grower: cg.Grower, data: Any, rounds: int = 2) -> None:
    for _ in range(rounds):
        steps(grower.model, data, *grower.optimizers, count=1)
        grower.step(1.0)
        grower.maybe_grow()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="an older torch")
@pytest.mark.parametrize("kind", [list, tuple])
def test_grower_with_several_optimizers_is_insert_with_them(kind: Any) -> None:
    data, found = classified(20, batch=8), []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = Stack()
        optimizers = kind(muon_and_adamw(model))
        if by_hand:
            steps(model, data, *optimizers, count=1)
            cg.insert(model, plan(model, data, mlp("blocks.0")), optimizer=optimizers)
            steps(model, data, *optimizers, count=1)
        else:
            candidates = [mlp("blocks.0")]
            options: dict[str, Any] = {"candidates": candidates, "max_insertions": 1}
            grower = cg.Grower(model, optimizers, CROSS_ENTROPY, data, **options)
            assert grower.optimizers == tuple(optimizers)
            trained_by(grower, data)
        assert len(homes(*optimizers)) == len(list(model.parameters()))
        found.append(dict(model.state_dict()))
    assert_same(found[0], found[1])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="an older torch")
def test_warm_up_with_several_optimizers_counts_the_steps_of_each_parameter() -> None:
    model, data = Stack(), classified(20)
    optimizers = muon_and_adamw(model)
    policy = NewLayers(warmup=4)
    options: dict[str, Any] = {"candidates": [mlp("blocks.0")], "after_insertion": policy}
    grower = cg.Grower(model, optimizers, CROSS_ENTROPY, data, max_insertions=1, **options)
    trained_by(grower, data, rounds=3)
    ages = {name: age for name, (age, _) in policy.state_dict().items()}
    assert set(ages) == set(grower.history.rounds[0].new_parameters)
    assert set(ages.values()) == {2}
    assert len({id(homes(*optimizers)[id(model.get_parameter(name))]) for name in ages}) == 2


def test_error_after_an_insertion_leaves_optimizers_and_averages_as_they_were() -> None:
    model, data = Stack(), classified(12)
    half = len(list(model.parameters())) // 2
    parameters = list(model.parameters())
    optimizers = [torch.optim.Adam(parameters[:half]), torch.optim.SGD(parameters[half:])]
    average = ema(model)

    def lost(values: Any) -> cg.Solution:
        solution = cg.solve(*values)
        blocks = {n: replace(c, block=Broken(c.block)) for n, c in solution.candidates.items()}
        return replace(solution, candidates=blocks)

    class Broken(nn.Module):
        pinned = ("block.outer.weight",)

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + 1

    options: dict[str, Any] = {"candidates": [mlp("blocks.0")], "averaged": [average]}
    options["solver"] = lambda *values: lost(values)
    grower = cg.Grower(model, optimizers, CROSS_ENTROPY, data, **options)
    groups = [[id(p) for p in one.param_groups[0]["params"]] for one in optimizers]
    modules = [id(module) for module in average.modules()]
    with nothing_left_behind(model), refused(cg.BlockError):
        grower.ask()
    assert groups == [[id(p) for p in one.param_groups[0]["params"]] for one in optimizers]
    assert modules == [id(module) for module in average.modules()]


@pytest.mark.parametrize("several", [False, True])
def test_averages_grow_with_the_model(several: bool) -> None:
    model, data = Stack(), classified(20, batch=8)
    average = ema(model)
    given = [average, copy.deepcopy(model)] if several else average
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    candidates = [copied(model, "blocks.0"), mlp("stem")]
    options: dict[str, Any] = {"candidates": candidates, "rule": cg.TopK(2)}
    grower = cg.Grower(model, optimizer, CROSS_ENTROPY, data, averaged=given, **options)
    trained_by(grower, data, rounds=1)
    for one in given if isinstance(given, list) else [given]:
        inner = one.module if isinstance(one, AveragedModel) else one
        assert_same(dict(inner.state_dict()), dict(model.state_dict()))
    history = cg.grow(
        model, lambda p: torch.optim.SGD(p, lr=0.0), CROSS_ENTROPY, data, epochs=3, averaged=given
    )
    assert history.insertions
    average.update_parameters(model)
    assert_same(dict(average.module.state_dict()), dict(model.state_dict()))


# --- optimizers that count the steps of a group -----------------------------------------------


class GroupAdam(Optimizer):
    """Adam as Apex has it: the step count is that of the group."""

    def __init__(self, params: Any, key: str = "step", count: Any = 0) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.key = key
        for group in self.param_groups:
            group[key] = count

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group[self.key] = group[self.key] + 1
            t = float(group[self.key])
            for p in (p for p in group["params"] if p.grad is not None):
                m, v = (self.state[p].setdefault(key, torch.zeros_like(p)) for key in "mv")
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad**2, 0.001)
                p.sub_(group["lr"] * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))


@pytest.mark.parametrize("key", ["step", "k", "t", "num_steps", "seen_so_far"])
@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.tensor(0.0)])
def test_count_of_a_group_is_said(key: str, count: Any) -> None:
    model, data = Stack(), classified(12)
    optimizer = GroupAdam(model.parameters(), key, count)
    steps(model, data, optimizer)
    solution = both(model, data)
    with pytest.warns(UserWarning, match=rf"GroupAdam counts the steps of a group, {key}=3"):
        cg.insert(model, solution, optimizer=optimizer)


def test_group_with_a_count_of_its_own_takes_the_steps_that_are_right() -> None:
    """What the warning says to do: the first step of Adam is as large as the learning rate."""
    model, data = Stack(), classified(12)
    optimizer = GroupAdam(model.parameters())
    steps(model, data, optimizer, count=300)
    with pytest.warns(UserWarning, match="record.new_parameters"):
        record = cg.insert(model, plan(model, data, mlp("stem")), optimizer=optimizer)
    (group,), new = optimizer.param_groups, dict(record.new_parameters(model))
    group["params"] = [p for n, p in model.named_parameters() if n not in new]
    optimizer.add_param_group({**group, "params": list(new.values()), "step": 0})
    before = {name: p.detach().clone() for name, p in new.items()}
    steps(model, data, optimizer, count=1)
    moved = max((p - before[name]).abs().max().item() for name, p in new.items())
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_no_word_where_nothing_is_counted_in_the_group() -> None:
    """No step yet, a count of each parameter, a setting that is only named so."""
    for make in (
        lambda p: GroupAdam(p),
        lambda p: torch.optim.Adam([{"params": list(p), "step": 7}]),
        lambda p: torch.optim.SGD([{"params": [q], "layer": i} for i, q in enumerate(p)], lr=2),
        lambda p: torch.optim.ASGD(p),
    ):
        model, data = Stack(), classified(12)
        optimizer = make(model.parameters())
        if not isinstance(optimizer, GroupAdam):
            steps(model, data, optimizer)
        cg.insert(model, both(model, data), optimizer=optimizer)


@pytest.mark.parametrize(
    "made",
    [
        lambda parameters: torch.optim.LBFGS(parameters),
        lambda parameters: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
        lambda parameters: [torch.optim.SGD(parameters, lr=0.1), "adam"],
        lambda parameters: [],
        lambda parameters: None,
        lambda parameters: "adam",
    ],
    ids=["LBFGS", "of another model", "one is none", "no optimizers", "None", "a name"],
)
def test_optimizers_that_cannot_grow(made: Any) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(8)
    with nothing_left_behind(model), refused(cg.GrowthError, "optimizer"):
        cg.grow(model, made, CROSS_ENTROPY, data, epochs=2)
    with nothing_left_behind(model), refused(cg.GrowthError, "optimizer"):
        cg.Grower(model, made(list(model.parameters())), CROSS_ENTROPY, data)
