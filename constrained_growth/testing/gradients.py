"""What the gradient of a block is, and what it says that it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from constrained_growth._sites.context import takes_context
from constrained_growth.blocks import pinned_parameters
from constrained_growth.testing.case import (
    Case,
    autograd_multipliers,
    by_sample,
    cotangent,
    differ,
    or_zero,
    perturbed,
)


def can_be_loosened(case: Case) -> Iterator[str]:
    """The gradient passes, and no pin is dead."""
    pins = pinned_parameters(case.block)
    if len({id(parameter) for parameter in pins.values()}) < len(case.block.pinned):  # type: ignore[arg-type]
        yield f"pinned={case.block.pinned} names a parameter twice."
    frozen = tuple(name for name, parameter in pins.items() if not parameter.requires_grad)
    if frozen:
        yield f"{frozen} have requires_grad=False, so they would stay at their pins for ever."
    delta = cotangent(case)
    found = [autograd_multipliers(case, case.fresh(training=t), delta) for t in (True, False)]
    for name in pins:
        values = [multipliers[name] for multipliers in found]
        if all(value is None for value in values):
            yield f"the pinned parameter {name!r} does not enter the output at all."
        elif not any(value is not None and bool(value.any()) for value in values):
            yield (
                f"the multiplier of {name!r} is exactly 0: it is dead. Either what it is "
                "multiplied with is zero too (pin only one factor of a product), or its derivative "
                "is 0 by autograd's convention, as that of ReLU at 0."
            )
    x = case.x.clone().requires_grad_()
    y = case.call(case.fresh(), x.view_as(x))
    through = y.requires_grad and torch.autograd.grad(y, x, delta, allow_unused=True)[0]
    if not isinstance(through, Tensor) or not bool(through.any()):
        yield "no gradient passes through it: what comes before it in the model could not learn."


def has_the_factors_it_says(case: Case) -> Iterator[str]:
    """`factors` are the multipliers."""
    if not callable(getattr(case.block, "factors", None)) or takes_context(case.block):
        return
    x, delta = case.x, cotangent(case)
    block: Any = case.fresh()
    with torch.no_grad():
        rows = by_sample(list(block.factors(x, delta)), len(x))
    pins = pinned_parameters(block)
    missing, extra = pins.keys() - rows.keys(), rows.keys() - pins.keys()
    if missing or extra:
        yield (
            f"factors(x, delta) gives {tuple(rows)} and the pinned parameters are {tuple(pins)}; "
            "it has to give each of them, and no other."
        )
        return
    whole = autograd_multipliers(case, block, delta)
    singles = [
        autograd_multipliers(replace(case, x=x[n : n + 1]), block, delta[n : n + 1])
        for n in range(len(x))
    ]
    for name, parameter in pins.items():
        if rows[name].numel() != len(x) * parameter.numel():
            yield f"the factors of {name!r} do not multiply to its shape {tuple(parameter.shape)}."
            continue
        each = rows[name].view(len(x), *parameter.shape)
        if differ(each.sum(0), or_zero(whole[name], parameter)):
            yield f"factors(x, delta) does not give the multiplier of {name!r} that autograd gives."
        elif differ(each, torch.stack([or_zero(one[name], parameter) for one in singles])):
            yield (
                f"factors(x, delta) gives the multiplier of {name!r} for all samples together and "
                "not for each: the block mixes samples, or the samples do not come first in the "
                "factors. Without factors it is differentiated as a whole, which is right then."
            )


def has_the_joint_factors_it_says(case: Case) -> Iterator[str]:
    """`joint_factors` are the factors of each."""
    if not callable(getattr(case.block, "joint_factors", None)) or takes_context(case.block):
        return
    blocks: list[Any] = [case.fresh(), perturbed(case.fresh(), but=pinned_parameters(case.block))]
    if not callable(getattr(blocks[0], "joint_kind", None)):
        yield "it has joint_factors and no joint_kind(), which says what can be taken together."
        return
    if blocks[0].joint_kind() != blocks[1].joint_kind():
        return
    x = torch.stack([case.x, case.x.flip(0)])
    delta = torch.stack([cotangent(case), 2 * cotangent(case)])
    with torch.no_grad():
        joint = list(blocks[0].joint_factors(blocks, x, delta))
        for index, block in enumerate(blocks):
            expected = by_sample(list(block.factors(x[index], delta[index])), len(case.x))
            picked = [
                replace(f, cotangent=f.cotangent[index], features=f.features[index]) for f in joint
            ]
            found = by_sample(picked, len(case.x))
            wrong = [n for n in expected if n not in found or differ(found[n], expected[n])]
            if wrong or found.keys() != expected.keys():
                yield f"joint_factors are not the factors of every block, for {tuple(wrong)}."
                return
