"""Copies of residual blocks: which parameters are pinned, what is refused, and λ."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_multipliers,
    autograd_multipliers,
    choose,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.blocks import CopiedBlock

Make = Callable[[], nn.Module]


class Mix(nn.Module):
    """x + scale ⊙ W₂ σ(W₁ x), the scale left out if it is None; a norm on the sum if asked for."""

    def __init__(
        self, width: int, scale: float | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 5), nn.Linear(5, width)
        self.scale = None if scale is None else nn.Parameter(torch.full((width,), scale))
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(self.inner(x).tanh())
        return self.norm(x + (y if self.scale is None else self.scale * y))


class Parallel(nn.Module):
    """A gate and a routed sum in one branch, another branch beside it, and a tuple out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.route = nn.Linear(width, 1, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.other = nn.Linear(width, width)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, str]:
        seen = x if shift is None else x + shift - shift
        routed = self.route(x).sigmoid() * self.value(seen)
        return x + (self.other(x).tanh() + routed), "more"


class Conv(nn.Module):
    """A ResNet block: relu(x + BN(conv(relu(BN(conv(x)))))), in place as in torchvision."""

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(
        4, 2, 6, **{"batch_first": True, "norm_first": True, "dropout": 0.0, **options}
    )


def pins(module: nn.Module, **options: Any) -> set[str]:
    return {name.removeprefix("module.") for name in CopiedBlock(module, **options).pinned}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Mix(4), {"outer.weight", "outer.bias"}),
        (lambda: Mix(4, 0.3), {"scale"}),
        (lambda: Parallel(4), {"value.weight", "other.weight", "other.bias"}),
        (lambda: Conv(3), {"bn2.weight", "bn2.bias"}),
        (
            lambda: nn.Sequential(Mix(4), Mix(4)),
            {f"{i}.outer.{k}" for i in "01" for k in ("weight", "bias")},
        ),
        (
            encoder_layer,
            {f"{k}.{p}" for k in ("self_attn.out_proj", "linear2") for p in ("weight", "bias")},
        ),
        (lambda: encoder_layer(bias=False), {"self_attn.out_proj.weight", "linear2.weight"}),
    ],
)
def test_pins_are_found_where_the_branches_end(make: Make, expected: set[str]) -> None:
    module = make()
    for mode in (True, False):
        before = {name: value.clone() for name, value in module.train(mode).state_dict().items()}
        with nothing_left_behind(module):
            assert pins(module) == expected
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_names_and_examples_give_the_same_pins() -> None:
    module = Parallel(4)
    x, shift = torch.randn(2, 4), torch.randn(2, 4)
    expected = pins(module)
    assert pins(module, args=(x, shift)) == pins(module, args=(x,), kwargs={"shift": shift})
    assert pins(module, args=(x, shift)) == expected == pins(module, pinned=sorted(expected))


@pytest.mark.parametrize("make", [lambda: Mix(4, 0.3), lambda: Parallel(4), encoder_layer])
def test_a_copy_does_nothing_and_is_trained_apart(make: Make) -> None:
    module = make()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    handle = module.register_forward_hook(lambda *_: 1 / 0)
    block = CopiedBlock(module.train())
    handle.remove()
    x = torch.randn(3, 5, 4)
    assert torch.equal(block(x), x)
    assert block.exact_after(nn.Identity())
    assert all(parameter.requires_grad for parameter in block.parameters())
    assert block.training
    plain = block.standalone()
    assert type(plain) is type(module)
    free = set(dict(plain.named_parameters())) - {n.removeprefix("module.") for n in block.pinned}
    for name in free:
        assert torch.equal(plain.get_parameter(name), module.get_parameter(name))
        assert plain.get_parameter(name) is not module.get_parameter(name)


def test_a_block_that_ends_in_a_relu_is_the_identity_where_x_is_not_negative() -> None:
    block = CopiedBlock(Conv(3).train())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(block(x.abs()), x.abs())
    assert not block.exact_after(nn.ReLU())
    model = nn.Sequential(nn.Conv2d(2, 3, 1), Conv(3), nn.Flatten(), nn.Linear(3 * 16, 3))
    data = [(torch.randn(4, 2, 4, 4), torch.randint(3, (4,))) for _ in range(2)]
    with refused(cg.BlockError, "identity"):
        solved(model, data, cg.Candidate("0", block))
    solution = solved(model, data, cg.Candidate("1", block), rule=choose("1"))
    with torch.no_grad():
        before = model(data[0][0])
    record = cg.insert(model, solution)
    assert type(model[2]) is Conv
    assert record.insertions[0].placement == "sibling"
    with torch.no_grad():
        assert torch.equal(model(data[0][0]), before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: encoder_layer(norm_first=False), ("post-norm", "norm2.weight", "ResidualMLP")),
        (lambda: Mix(4, norm=nn.LayerNorm(4)), ("post-norm", "norm.weight")),
        (lambda: Mix(4, norm=nn.Tanh()), ("not the identity", "outer.weight")),
        (lambda: nn.Linear(4, 4), ("weight", "ResidualMLP")),
        (lambda: nn.Linear(4, 3), ("shape", "pinned=")),
        (lambda: Conv(3, stride=2), ("shape",)),
        (nn.ReLU, ("no parameters",)),
    ],
)
def test_what_cannot_be_the_identity_is_refused(make: Make, words: tuple[str, ...]) -> None:
    module = make()
    with nothing_left_behind(module), refused(cg.BlockError, *words):
        CopiedBlock(module)


def test_two_zero_factors_are_refused() -> None:
    module = Mix(4, 0.3)
    for parameter in module.outer.parameters():
        nn.init.zeros_(parameter)
    with refused(cg.BlockError, "scale", "vanish", "non-zero"):
        CopiedBlock(module)


def test_bad_arguments() -> None:
    with refused(cg.BlockError, "nn.Module"):
        CopiedBlock(torch.tanh)  # type: ignore[arg-type]
    with refused(cg.BlockError, "string"):
        CopiedBlock(Mix(4), "outer.weight")
    with refused(cg.BlockError, "outer.wait"):
        CopiedBlock(Mix(4), ("outer.wait",))
    with refused(cg.BlockError, "args", "tensor"):
        CopiedBlock(Mix(4), args=("x",))


class Net(nn.Module):
    """Layers that are called with a mask, by keyword or in place, and return a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Masked(), Masked()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x, mask=mask)
        return self.head(x.mean(1))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = encoder_layer()

    def forward(self, x: Tensor, *, mask: Tensor) -> tuple[Tensor, None]:
        return self.layer(x, src_key_padding_mask=mask), None


def test_multipliers_with_a_mask_are_those_of_an_inserted_layer() -> None:
    model = Net()
    data = []
    for size in (3, 2):
        mask = torch.zeros(size, 5, dtype=torch.bool)
        mask[0, 3:] = True
        data.append(((torch.randn(size, 5, 4), mask), torch.randint(3, (size,))))
    x, mask = data[0][0]
    blocks = [CopiedBlock(layer, args=(x,), kwargs={"mask": mask}) for layer in model.layers]
    candidates = [cg.Candidate(f"layers.{i}", block) for i, block in enumerate(blocks)]
    solution = solved(model, data, *candidates, rule=choose("layers.0"))
    for index, candidate in enumerate(candidates):
        grown = copy.deepcopy(model)
        layer: Any = copy.deepcopy(blocks[index]).standalone()
        grown.layers.insert(index + 1, layer)
        pinned = {n: layer.get_parameter(n.removeprefix("module.")) for n in blocks[index].pinned}
        losses = [len(y) * CROSS_ENTROPY(grown(*input), y) for input, y in data]
        grads = torch.autograd.grad(torch.stack(losses).sum() / 5, list(pinned.values()))
        expected = {n: -grad for n, grad in zip(pinned, grads, strict=True)}
        assert_multipliers(solution, candidate.name, expected)
    before = model(x, mask)
    cg.insert(model, solution)
    assert len(model.layers) == 3
    assert torch.equal(model(x, mask), before)


def test_multipliers_around_a_site_that_is_no_element_of_a_list() -> None:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(2, 4))
    model.add_module("mix", Mix(4, 0.5))
    model.add_module("head", nn.Linear(4, 3))
    data = [(torch.randn(6, 2), torch.randint(3, (6,))) for _ in range(2)]
    candidate = cg.Candidate("mix", CopiedBlock(model.get_submodule("mix")))
    solution = solved(model, data, candidate, rule=choose("mix"))
    assert_multipliers(solution, "mix", autograd_multipliers(model, data, candidate))
    before = model(data[0][0])
    record = cg.insert(model, solution)
    assert record.insertions[0].placement == "wrapped"
    assert torch.equal(model(data[0][0]), before)


# --- copies that share memory until they are inserted ---------------------------------------------


class Normed(nn.Module):
    """x + W₂ tanh(BN(W₁ x)) ⊙ a constant."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 6), nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mask", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.norm(self.inner(x)).tanh() * self.mask)


def storages(*modules: nn.Module) -> dict[int, int]:
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    places = (tensor.untyped_storage() for tensor in tensors)
    return {place.data_ptr(): place.nbytes() for place in places}


def normed_model() -> tuple[nn.Sequential, list[Any]]:
    model = nn.Sequential(nn.Linear(2, 4), Normed(), Normed(), nn.Linear(4, 3))
    return model, [(torch.randn(9, 2), torch.randint(3, (9,))) for _ in range(2)]


def trained(model: nn.Module, data: list[Any]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for x, y in data:
        optimizer.zero_grad()
        CROSS_ENTROPY(model(x), y).backward()
        optimizer.step()


def test_candidates_take_no_memory() -> None:
    """But for the pins of one; nor do the blocks of a solution, the model in the other mode."""
    model = nn.Sequential(nn.Linear(2, 64), *(Mix(64, 0.1) for _ in range(12)), nn.Linear(64, 3))
    data = [(torch.randn(3, 2), torch.randint(3, (3,)))]
    found = cg.find_candidates(model, data[0][0])
    solution = solved(model.eval(), data, *found)
    assert len(found) == 12
    pins = sum(p.nbytes for p in cg.blocks.pinned_parameters(found[0].block).values())
    for blocks in ([c.block for c in found], [c.block for c in solution.candidates.values()]):
        here, there = storages(*blocks), storages(model)
        assert sum(size for place, size in here.items() if place not in there) <= pins


@pytest.mark.parametrize("frozen", [False, True])
def test_a_shared_block_leaves_the_model_alone(frozen: bool) -> None:
    model, data = normed_model()
    model.requires_grad_(not frozen)
    state, x = copy.deepcopy(model.state_dict()), torch.randn(5, 4)
    with nothing_left_behind(model):
        block = cg.find_candidates(model, data[0][0])[0].block
        block.train()(x).sum().backward()
        for use in (copy.deepcopy(block).train(), block.standalone().train()):  # type: ignore
            assert not storages(use).keys() & storages(model).keys()
            assert all(parameter.requires_grad for parameter in use.parameters())
            torch.optim.SGD(use.parameters(), lr=1.0).step()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("when", ["solved", "inserted"])
def test_a_shared_block_has_the_values_of_its_original(when: str, mode: bool) -> None:
    """Also of one that is trained on: λ is the gradient of what stands in the model then."""
    model, data = normed_model()
    found = cg.find_candidates(model, data[0][0])
    trained(model, data)
    model.train(mode)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, found)
    solution = cg.solve(problem, choose("2"))
    if when == "inserted":
        trained(model, data)
    cg.insert(model, solution)
    assert not storages(model[2]).keys() & storages(model[3]).keys()
    free = [n for n, _ in model[3].named_parameters() if not n.startswith("outer")]
    assert all(torch.equal(model[3].get_parameter(n), model[2].get_parameter(n)) for n in free)
    if when == "solved":
        loss = sum(len(y) * CROSS_ENTROPY(model(x), y) for x, y in data) / 18
        loss.backward()  # type: ignore[union-attr]
        expected = {
            name: -model[3].get_parameter(name.removeprefix("module.")).grad  # type: ignore
            for name in solution.candidates["2"].block.pinned  # type: ignore[union-attr]
        }
        assert_multipliers(solution, "2", expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_blocks_in_another_precision(dtype: torch.dtype) -> None:
    model, data = normed_model()
    found = cg.find_candidates(model, data[0][0])
    model.to(dtype)
    data = [(x.to(dtype), y) for x, y in data]
    cg.insert(model, solved(model, data, *found, rule=choose("1", "2")))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert len(storages(model)) == sum(1 for _ in (*model.parameters(), *model.buffers()))


def test_every_rule_takes_shared_blocks() -> None:
    model, data = normed_model()
    found = cg.find_candidates(model, data[0][0])
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for rule in (cg.TrustRegion(0.1), cg.Budget(1000), cg.rules.rule_for(sgd)):
        with nothing_left_behind(model):
            decision = solved(model, data, *found, rule=rule).decision
        assert decision.chosen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pins_are_found_in_half_precision(dtype: torch.dtype) -> None:
    """A thousand rounding errors of bfloat16 are larger than x: everything was the identity."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    expected = CopiedBlock(layer.float()).pinned
    block = CopiedBlock(layer.to(dtype))
    assert block.pinned == expected
    x = torch.randn(2, 3, 8).to(dtype)
    assert torch.equal(block(x), x)
