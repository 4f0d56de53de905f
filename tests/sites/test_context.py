"""Blocks that are called with what the module at their site was called with."""

import copy
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_multipliers,
    assert_same,
    choose,
    nothing_left_behind,
    refused,
    solved,
    state_of,
)
from standing import assert_served
from torch import Tensor, nn

import constrained_growth as cg


class Attention(nn.Module):
    """A residual layer that looks at other positions through a mask and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, mask: Tensor, extras: dict[str, Tensor] | None = None, *, scale: Any = 1.0
    ) -> Tensor:
        scale = scale * (1.0 if extras is None else extras["scale"])
        return x + attended(self.mix(x), mask, scale)


def attended(x: Tensor, mask: Tensor, scale: Any) -> Tensor:
    weights = (scale * x @ x.mT).masked_fill(~mask[:, None, :], -torch.inf).softmax(-1)
    return weights @ x


class Attending(nn.Module):
    """A block of the same signature, pinned where its branch ends."""

    takes_context = True
    pinned = ("out.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(
        self, x: Tensor, mask: Tensor, extras: dict[str, Tensor] | None = None, *, scale: Any = 1.0
    ) -> Tensor:
        scale = scale * (1.0 if extras is None else extras["scale"])
        return x + self.out(attended(self.mix(x), mask, scale))


class Reader(nn.Module):
    """Layers called in one of several ways, with a scale that is learnt."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.into, self.out = way, nn.Linear(2, 4), nn.Linear(4, 3)
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.into(x)
        for layer in self.layers:
            h = self.run(layer, h, mask)
        return self.out((h * mask[..., None]).sum(1))

    def run(self, layer: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
        if self.way == "positions":
            return layer(h, mask, {"scale": self.scale})
        if self.way == "keywords":
            return layer(h, mask=mask, scale=self.scale)
        return layer(mask=mask, scale=self.scale, x=h)


def padded(lengths: list[int]) -> Any:
    """Sequences of several lengths with what is to be masked, in batches of two."""
    longest = max(lengths)
    x, target = torch.randn(len(lengths), longest, 2), torch.randint(3, (len(lengths),))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return [((x[i : i + 2], mask[i : i + 2]), target[i : i + 2]) for i in range(0, len(x), 2)]


def with_context(output: Tensor, block: nn.Module, args: Any, kwargs: Any) -> Tensor:
    rest = {name: value for name, value in kwargs.items() if name != "x"}
    return block(output, *args[1:], **rest)


WAYS = ("positions", "keywords", "all by keyword")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_block_sees_the_mask_that_its_site_saw(way: str, frozen: bool) -> None:
    model, data = Reader(way).requires_grad_(not frozen), padded([3, 5, 2, 4, 1])
    for site in ("layers.0", "layers.1"):
        solution = assert_served(model, data, cg.Candidate(site, Attending()), with_context)
    other = [((x, torch.ones_like(mask)), y) for (x, mask), y in data]
    unmasked = solved(model, other, cg.Candidate("layers.1", Attending()))
    assert unmasked.sensitivities["layers.1"].value != pytest.approx(
        solution.sensitivities["layers.1"].value
    )


def test_blocks_with_and_without_context_share_a_site() -> None:
    model, data = Reader("keywords"), padded([3, 5, 2, 4])
    plain = cg.Candidate("layers.0", cg.blocks.ResidualMLP(4, 3, torch.tanh), name="plain")
    seeing = cg.Candidate("layers.0", Attending(), name="seeing")
    together = solved(model, data, plain, seeing)
    for one in (plain, seeing):
        assert_multipliers(together, one.name, solved(model, data, one).multipliers[one.name])


def test_the_arguments_are_kept_and_nothing_else_is_touched() -> None:
    model, data = Reader("positions"), padded([3, 5, 2, 4])
    before = copy.deepcopy(data)
    one = cg.Candidate("layers.0", Attending())
    with nothing_left_behind(model):
        solved(model, data, one)
    assert_same(data, before)


def test_a_grown_model_hands_the_arguments_on() -> None:
    model, data = Reader("all by keyword"), padded([3, 5, 2, 4])
    one = cg.Candidate("layers.0", Attending())
    before = model(*data[0][0])
    cg.insert(model, solved(model, data, one, rule=choose("layers.0")))
    assert torch.equal(model(*data[0][0]), before)
    assert_served(model, data, cg.Candidate("layers.0", Attending()), with_context)
    assert_served(model, data, cg.Candidate("layers.0.base", Attending()), with_context)


def test_a_closed_form_does_not_know_the_context() -> None:
    class Claiming(Attending):
        def factors(self, x: Tensor, delta: Tensor) -> Any:
            raise AssertionError

    assert_served(
        Reader("keywords"), padded([3, 5]), cg.Candidate("layers.0", Claiming()), with_context
    )


def test_a_block_that_cannot_take_the_context() -> None:
    class Narrow(Attending):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x + self.out(self.mix(x))

    model, data = Reader("positions"), padded([3, 5])
    one = cg.Candidate("layers.0", Narrow())
    with nothing_left_behind(model), refused(cg.BlockError, "Narrow", "layers.0", "positional"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])


class Noisy(Attending):
    """A block that draws random numbers when it runs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return x + self.out(nn.functional.dropout(self.mix(x), 0.5, self.training))


def test_a_monitor_measures_with_context_and_training_stays_the_same() -> None:
    model, data = Reader("keywords"), padded([3, 5, 2, 4])
    twin = copy.deepcopy(model)
    candidates = [cg.Candidate("layers.1", block(), name=block.__name__) for block in BLOCKS]
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, candidates)
    expected = cg.solve(problem).multipliers["Attending"]
    state = torch.get_rng_state()
    with cg.monitor(problem) as monitor:
        for input, target in data:
            CROSS_ENTROPY(model(*input), target).backward()
    found = monitor.multipliers()
    for key, value in expected.items():
        torch.testing.assert_close(found["Attending"][key], value, rtol=0, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    for input, target in data:
        CROSS_ENTROPY(twin(*input), target).backward()
    assert_same(state_of(model)["grads"], state_of(twin)["grads"])


BLOCKS: tuple[type[nn.Module], ...] = (Attending, Noisy)
