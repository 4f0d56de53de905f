"""Random nested models and random insertions."""

import copy
import io
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    assert_same,
    choose,
    nothing_left_behind,
    refused,
    solved,
)
from hypothesis import assume, given, settings
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import constrained_growth as cg
from constrained_growth.blocks import (
    CopiedBlock,
    IdentityConv2d,
    IdentityLinear,
    ResidualBottleneck2d,
    ResidualConv2d,
    ResidualLinear,
    ResidualMLP,
)

WIDTH = 4


# --- models ---------------------------------------------------------------------------------


class Chain(nn.Module):
    """Modules of a list, one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.many = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.many:
            x = module(x)
        return x


class Named(nn.Module):
    """Modules of a dict, one after the other."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.named = nn.ModuleDict({"abcdefgh"[i]: module for i, module in enumerate(modules)})

    def forward(self, x: Tensor) -> Tensor:
        for key in self.named:
            x = self.named[key](x)
        return x


class Around(nn.Module):
    """x + f(x), with f of several modules; another parameter scales it."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.branch, self.scale = nn.Sequential(*modules), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.branch(x)


class Residual(nn.Module):
    """x + W₂ tanh(W₁ x), of linear maps or of convolutions."""

    def __init__(self, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.inner, self.act, self.outer = inner, nn.Tanh(), outer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.act(self.inner(x)))


class Kernel(nn.Module):
    """x + a convolution of x, its kernel pinned at zero: a user's own."""

    pinned = ("weight",)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.conv2d(x, self.weight, padding=1)


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def conv() -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


LEAVES: dict[str, dict[str, Any]] = {
    "vectors": {
        "linear": linear,
        "relu": nn.ReLU,
        "relu in place": lambda: nn.Sequential(linear(), nn.ReLU(inplace=True)),
        "gelu": nn.GELU,
        "norm": lambda: nn.LayerNorm(WIDTH),
        "batch norm": lambda: nn.BatchNorm1d(WIDTH),
        "dropout": lambda: nn.Dropout(0.3),
        "residual": lambda: Residual(linear(), linear()),
    },
    "images": {
        "conv": conv,
        "relu": nn.ReLU,
        "batch norm": lambda: nn.BatchNorm2d(WIDTH),
        "dropout": lambda: nn.Dropout2d(0.3),
        "residual": lambda: Residual(conv(), conv()),
    },
}
INNER = {"sequence": nn.Sequential, "list": Chain, "dict": Named, "residual": Around}
ENDS: dict[str, Any] = {
    "vectors": (lambda: nn.Linear(2, WIDTH), lambda: nn.Linear(WIDTH, 3)),
    "images": (
        lambda: nn.Conv2d(2, WIDTH, 3, padding=1),
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3)),
    ),
}


def trees(kind: str) -> st.SearchStrategy[Any]:
    """A leaf's name, or the name of a container and what is in it."""
    leaves = st.sampled_from(sorted(LEAVES[kind]))
    return st.recursive(
        leaves,
        lambda inner: st.tuples(
            st.sampled_from(sorted(INNER)), st.lists(inner, min_size=1, max_size=3)
        ),
        max_leaves=7,
    )


def built(tree: Any, kind: str) -> nn.Module:
    if isinstance(tree, str):
        return LEAVES[kind][tree]()
    name, inner = tree
    return INNER[name](*(built(one, kind) for one in inner))


BLOCKS: dict[str, dict[str, Any]] = {
    "vectors": {
        "outer": lambda: ResidualMLP(WIDTH, 3, nn.GELU()),
        "inner": lambda: ResidualMLP(WIDTH, 3, nn.SiLU(), "inner"),
        "one weight": lambda: ResidualLinear(WIDTH, torch.tanh),
        "gain": lambda: Gain(WIDTH),
    },
    "images": {
        "kernel": lambda: Kernel(WIDTH),
        "residual": lambda: ResidualConv2d(WIDTH, nn.ReLU()),
        "bottleneck": lambda: ResidualBottleneck2d(WIDTH, nn.ReLU(), 2),
    },
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, list[Any], list[cg.Candidate]]:
    """A model in one of its modes, with gradients from before; data; candidates."""
    kind = draw(st.sampled_from(sorted(LEAVES)))
    tree = draw(trees(kind))
    torch.default_generator.manual_seed(draw(st.integers(0, 99)))
    first, last = ENDS[kind]
    model = nn.Sequential(first(), built(tree, kind), last())
    shape = (2,) if kind == "vectors" else (2, 5, 5)
    data = [(torch.randn(n, *shape), torch.randint(3, (n,))) for n in (5, 4)]
    model.train(draw(st.booleans()))
    CROSS_ENTROPY(model(data[0][0]), data[0][1]).backward()
    sites = [
        name
        for name, module in model.named_modules()
        if name
        and not name.startswith("2")
        and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    candidates = []
    for i in range(draw(st.integers(1, 4))):
        after = draw(st.sampled_from(sites))
        site = model.get_submodule(after)
        choices = dict(BLOCKS[kind])
        if type(site) is nn.ReLU and not site.inplace and kind == "vectors":
            choices["identity"] = lambda: IdentityLinear(WIDTH, nn.ReLU())
        if type(site) is nn.ReLU and kind == "images":
            choices["identity"] = lambda: IdentityConv2d(WIDTH, nn.ReLU())
        if isinstance(site, Residual):
            names = [f"outer.{name}" for name, _ in site.outer.named_parameters()]
            choices = {"copy": lambda site=site, names=names: CopiedBlock(site, names)}
        block = choices[draw(st.sampled_from(sorted(choices)))]()
        candidates.append(cg.Candidate(after, block, name=f"{i}: {after}"))
    return model, data, candidates


def seeded(model: nn.Module, data: list[Any]) -> list[Tensor]:
    """The outputs, with the same random numbers each time and buffers as they were."""
    twin = copy.deepcopy(model)
    torch.default_generator.manual_seed(7)
    with torch.no_grad():
        return [twin(x.clone()) for x, _ in data]


def planned(model: nn.Module, data: list[Any], candidates: list[cg.Candidate]) -> cg.Solution:
    return solved(model, data, *candidates, rule=choose(*(one.name for one in candidates)))


# --- what holds for all of them ---------------------------------------------------------------


@settings(max_examples=20)
@given(cases())
def test_solving_leaves_no_trace(case: Any) -> None:
    model, data, candidates = case
    seen: list[int] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(0))
    with nothing_left_behind(model):
        problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
        cg.solve(problem)
    for one in candidates:
        with nothing_left_behind(one.block):
            cg.solve(problem)


@settings(max_examples=30)
@given(cases())
def test_insertions_keep_the_function_and_can_be_repeated(case: Any) -> None:
    model, data, candidates = case
    fresh, before = copy.deepcopy(model), seeded(model, data)
    tensors = [*model.parameters(), *model.buffers()]
    values = copy.deepcopy([(t.detach(), t.grad) for t in tensors])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    average = AveragedModel(model)
    solution = planned(model, data, candidates)
    state = torch.get_rng_state()
    modes = {module: module.training for module in model.modules()}
    record = cg.insert(model, solution, optimizer=optimizer, averaged=average)

    assert torch.equal(torch.get_rng_state(), state)
    for module, training in modes.items():
        assert module.training is training
    exact = not any(isinstance(one.block, IdentityLinear | IdentityConv2d) for one in candidates)
    for one, other in zip(seeded(model, data), before, strict=True):
        torch.testing.assert_close(
            one, other, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-13
        )
    assert set(record.difference) == {"train", "eval"}
    assert max(record.difference.values()) < (1e-300 if exact else 1e-12)

    kept = {id(t) for t in [*model.parameters(), *model.buffers()]}
    assert kept >= {id(t) for t in tensors}  # the same objects …
    assert_same([(t.detach(), t.grad) for t in tensors], values)  # … and values
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert listed == [id(p) for p in model.parameters()]
    assert list(average.module.state_dict()) == list(model.state_dict())
    average.update_parameters(model)

    text = record.to_json()
    read = cg.GrowthRecord.from_json(text)
    assert read.to_json() == text
    assert read == record
    own = {one.name: one.block for one in candidates if isinstance(one.block, Gain | Kernel)}
    again = cg.replay(fresh, read, blocks=own)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_same(again.state_dict(), model.state_dict())
    assert_same(seeded(again, data), seeded(model, data))
    assert repr(again) == repr(model)


def broken(block: nn.Module, how: str) -> nn.Module:
    """A copy that fails where it is used, or moves what passes."""
    block = copy.deepcopy(block)
    inside = block.module if isinstance(block, CopiedBlock) else block
    forward = type(inside).forward

    def changed(self: nn.Module, x: Tensor) -> Tensor:
        if how == "fails":
            raise RuntimeError("broken on purpose")
        return 1.5 * forward(self, x) + 0.1

    inside.__class__ = type("Broken", (type(inside),), {"forward": changed})
    return block


@settings(max_examples=20)
@given(cases(), st.sampled_from(["fails", "moves"]), st.data())
def test_a_failed_insertion_leaves_everything_as_it_was(case: Any, how: str, data_: Any) -> None:
    model, data, candidates = case
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)
    average = AveragedModel(model)
    solution = planned(model, data, candidates)
    name = data_.draw(st.sampled_from(sorted(solution.candidates)))
    plan = solution.candidates[name]
    bad = {**solution.candidates, name: replace(plan, block=broken(plan.block, how))}
    other = replace(solution, candidates=bad)
    before = seeded(model, data)
    if how == "moves":  # not where a ReLU behind it is dead, say
        twin = copy.deepcopy(model)
        cg.insert(twin, other, data=())
        assume(not torch.allclose(seeded(twin, data)[0], before[0], rtol=1e-9))
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    states = copy.deepcopy([dict(optimizer.state[p]) for p in model.parameters()])
    with (
        nothing_left_behind(model),
        nothing_left_behind(average),
        refused(cg.BlockError, "Nothing was changed"),
    ):
        cg.insert(model, other, optimizer=optimizer, averaged=average)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert_same([dict(optimizer.state[p]) for p in model.parameters()], states)
    assert_same(seeded(model, data), before)
    cg.insert(model, solution, optimizer=optimizer, averaged=average)  # the good one still fits
