"""A copied block becomes the next element of its list only where that is the same network."""

import copy
from collections.abc import Callable
from typing import Any

import programs
import pytest
import torch
from helpers import classified, label, nothing_left_behind, solved
from stacks import Residual, Stack, copied, plan
from torch import Tensor, nn

import constrained_growth as cg


class Stateful(programs.Lists):
    """In train mode it goes through the list, in eval mode through the first two blocks."""

    def run(self, x: Tensor, blocks: Any) -> Tensor:
        for block in blocks if self.training else blocks[:2]:
            x = block(x)
        return x


def last(output: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output if isinstance(output, Tensor) else output[-1], target)


WRAPPED = [
    (programs.UNet, (3, 3), "lists.0.2"),
    (programs.UNet, (3, 3), "lists.1.0"),
    (programs.Zipped, (2, 3), "lists.0.0"),
    (programs.Zipped, (2, 3), "lists.1.1"),  # the next element would not be reached
    (programs.Enumerated, (3,), "lists.0.0"),
    (programs.Enumerated, (3,), "lists.0.1"),  # where the output does not move, but λ would
    (programs.Indexed, (3,), "lists.0.0"),
    (programs.Indexed, (3,), "lists.0.2"),
    (programs.Collected, (2,), "lists.0.0"),
    (programs.Scaled, (3,), "lists.0.1"),
    (programs.Supervised, (2,), "lists.0.1"),
    (programs.Reversed, (2,), "lists.0.1"),
    (Stateful, (3,), "lists.0.0"),
]
SIBLING = [
    (programs.Plain, (3,), "lists.0.2"),
    (programs.Enumerated, (3,), "lists.0.2"),
]


@pytest.mark.parametrize(("make", "depths", "after"), [*WRAPPED, *SIBLING], ids=label)
def test_where_a_copy_goes(make: Any, depths: tuple[int, ...], after: str) -> None:
    model, data = make(*depths), classified(12)
    fresh, x = copy.deepcopy(model), data[0][0]
    solution = solved(model, data, copied(model, after), loss_fn=last, rule=cg.TopK(1))
    record = cg.insert(model, solution)
    (layer,) = record.insertions
    expected = "wrapped" if (make, depths, after) in WRAPPED else "sibling"
    assert layer.placement == expected
    assert record.difference == {"train": 0.0, "eval": 0.0}
    again = cg.replay(fresh, cg.GrowthRecord.from_json(record.to_json()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(first(again(x)), first(model(x)))


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_several_copies_at_once() -> None:
    """What is the same network for one layer alone may not be so together with others."""
    model, data = programs.UNet(2, 2), classified(12)
    candidates = [copied(model, f"lists.{i}.{j}") for i in (0, 1) for j in (0, 1)]
    record = cg.insert(model, plan(model, data, *candidates))
    places = {layer.name: layer.placement for layer in record.insertions}
    assert places["lists.1.0"] == "wrapped"
    assert record.difference == {"train": 0.0, "eval": 0.0}


class Keeping(Residual):
    """Keeps a term of the loss."""

    def forward(self, x: Tensor) -> Tensor:
        self.term = x.square().mean()
        return super().forward(x)


class Dropped(Stack):
    """Leaves each block out now and then."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if torch.rand(()) < 0.8 else x
        return self.head(x)


def stack(make: type[Stack], *blocks: nn.Module) -> Stack:
    model = make(0)
    model.blocks.extend(blocks)
    return model


LOSSES: dict[str, Callable[[Any], Any]] = {
    "terms that blocks keep": lambda blocks: sum(
        getattr(b, "term", torch.zeros(())) for b in blocks
    ),
    "a mean over the list": lambda blocks: torch.stack(
        [b.inner.weight.norm() for b in blocks]
    ).mean(),
    "the depth": lambda blocks: torch.tensor(float(len(blocks))),
    "the second of the list": lambda blocks: blocks[1](torch.ones(1, 4)).sin().sum(),
    "nothing": lambda blocks: torch.zeros(()),
}
NEXT: dict[str, list[str]] = {  # the candidates that are the next element all the same
    "terms that blocks keep": ["a plain one"],
    # none where the loss runs the second of the list: around its site the layer is in that too
    "nothing": ["a plain one", "a keeping one"],
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_reads_the_list_sees_the_same_list(kind: str) -> None:
    """For each candidate of a site: blocks differ in what a loss reads of them."""
    torch.manual_seed(0)
    model, data = stack(Stack, Residual(), Keeping(), Residual()), classified(12)

    def loss_of(model: Stack) -> Callable[..., Tensor]:
        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            return last(output, target) + 0.1 * LOSSES[kind](model.blocks)

        return loss_fn

    blocks = {"a plain one": model.blocks[0], "a keeping one": model.blocks[1]}
    candidates = [
        cg.Candidate("blocks.1", cg.blocks.CopiedBlock(block), name=name)
        for name, block in blocks.items()
    ]
    solution = solved(model, data, *candidates, loss_fn=loss_of(model))
    for name in blocks:
        grown = copy.deepcopy(model)
        chosen = cg.Solution(**{**vars(solution), "decision": cg.Decision((name,))})
        record = cg.insert(grown, chosen)
        (layer,) = record.insertions
        assert layer.placement == ("sibling" if name in NEXT.get(kind, ()) else "wrapped")
        new = dict(record.new_parameters(grown))
        prefix = "blocks.2" if layer.placement == "sibling" else "blocks.1.inserted.module"
        pins = [new[f"{prefix}.outer.{key}"] for key in ("weight", "bias")]
        loss = loss_of(grown)(grown(data[0][0]), data[0][1])
        torch.testing.assert_close(loss.item(), solution.loss)
        for key, grad in zip(("weight", "bias"), torch.autograd.grad(loss, pins), strict=True):
            found = solution.multipliers[name][f"module.outer.{key}"]
            torch.testing.assert_close(found, -grad, rtol=1e-9, atol=1e-12)


def test_a_list_of_which_elements_are_left_out_at_random() -> None:
    """Around its site the copy is left out with it; one pass may show no difference."""
    torch.manual_seed(0)  # with which no block is left out
    model = stack(Dropped, *(Residual() for _ in range(2)))
    solution = plan(model, classified(12), copied(model, "blocks.0"))
    assert solution.candidates["blocks.0"].wrapped


def test_a_candidate_asks_for_the_layer_around_its_site() -> None:
    model, data = Stack(3), classified(12)
    block = cg.blocks.CopiedBlock(model.blocks[0])
    candidates = [
        cg.Candidate("blocks.0", block, wrapped=True),
        cg.Candidate("blocks.1", block),
    ]
    record = cg.insert(model, plan(model, data, *candidates))
    assert [layer.placement for layer in record.insertions] == ["wrapped", "sibling"]
    assert len(model.blocks) == 4


def test_looking_for_the_place_leaves_no_trace() -> None:
    class Failing(Stack):
        """It runs with three blocks or four, until it is to be grown."""

        to_be_grown = False

        def forward(self, x: Tensor) -> Tensor:
            if self.to_be_grown and (len(self.blocks) > 3 or type(self.blocks[0]) is not Residual):
                raise KeyboardInterrupt
            return super().forward(x)

    model = Failing(3)
    solution = plan(model, classified(12), copied(model, "blocks.0"))
    model.to_be_grown = True
    with nothing_left_behind(model), pytest.raises(KeyboardInterrupt):
        cg.insert(model, solution)
