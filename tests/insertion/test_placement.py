"""A copied block becomes the next element of its list only where that is the same network."""

import copy
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

        def forward(self, x: Tensor) -> Tensor:
            if len(self.blocks) > 3 or type(self.blocks[0]) is not Residual:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Failing(3)
    solution = plan(model, classified(12), copied(model, "blocks.0"))
    with nothing_left_behind(model), pytest.raises(KeyboardInterrupt):
        cg.insert(model, solution)
