"""Whether a block survives being copied, stored and moved."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from constrained_growth._sites.context import Context
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.blocks import change
from constrained_growth.testing.case import Case, perturbed


def survives(case: Case) -> Iterator[str]:
    """Copied and restored from its state dict, it is the same."""
    original = perturbed(case.fresh())
    y = case.call(original)
    copied = copy.deepcopy(original)
    shared = {p.data_ptr() for p in original.parameters()} & {
        p.data_ptr() for p in copied.parameters() if p.numel()
    }
    if shared or not torch.equal(case.call(copied), y):
        yield "copy.deepcopy(block) shares parameters with the block, or computes something else."
    restored = case.fresh()
    restored.load_state_dict(original.state_dict())
    if not torch.equal(case.call(restored), y):
        yield (
            "with its state dict loaded into a copy it computes something else: what it computes "
            "with has to be a parameter or a persistent buffer."
        )
    for name, module in case.block.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield (
                    f"the tensor {f'{name}.{key}'.lstrip('.')!r} is neither a parameter nor a "
                    "buffer, so .to(device) and state_dict() pass it by; use nn.Parameter or "
                    "register_buffer."
                )


def can_be_pickled(case: Case) -> Iterator[str]:
    """Pickled and read again (torch.save of a model does that), it is the same."""
    original = perturbed(case.fresh())
    again = pickle.loads(pickle.dumps(original))
    if not torch.equal(case.call(again), case.call(original)):
        yield "pickled and read again it computes something else."


def can_be_built_from_its_config(case: Case) -> Iterator[str]:
    """`type(block)(**block.config())` is the same architecture."""
    config = getattr(case.block, "config", None)
    if not callable(config):
        return
    built = type(case.block)(**config())  # type: ignore[arg-type]
    if parameter_shapes(built) != parameter_shapes(case.block):
        yield (
            f"config() builds parameters {parameter_shapes(built)} and the block has "
            f"{parameter_shapes(case.block)}."
        )
    elif tuple(built.pinned) != tuple(case.block.pinned):  # type: ignore[arg-type]
        yield f"config() builds a block with pinned={built.pinned}, not {case.block.pinned}."


def can_be_moved(case: Case) -> Iterator[str]:
    """Moved to another precision or device, it is the identity there."""
    other = torch.float32 if case.x.dtype == torch.float64 else torch.float64
    coarser = torch.float32 if other == torch.float32 else case.x.dtype
    targets: list[Any] = [other, *(["cuda"] if torch.cuda.is_available() else [])]
    for target in targets:
        x = case.x.to(target)
        bring = functools.partial(_brought, target=target)
        args, kwargs = tree_map_only(Tensor, bring, (case.context.args, dict(case.context.kwargs)))
        there = replace(case, x=x, context=Context(args, kwargs))
        y = there.call(case.fresh().to(target))
        if y.dtype != x.dtype or y.device != x.device:
            yield f"moved by .to({target}) it gives {y.dtype} on {y.device}, from {x.dtype}."
        elif not float(change(x.to(coarser), y.detach().to(coarser))) <= 1:
            yield f"moved by .to({target}) it is no longer the identity at its pins."


def _brought(value: Tensor, target: Any) -> Tensor:
    keeps = isinstance(target, torch.dtype) and not value.is_floating_point()
    return value if keeps else value.to(target)
