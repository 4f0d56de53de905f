"""Check on one input, in train and in eval mode, that an insertion preserves the function.

The same outputs are computed before and after, from the same random state and with the inserted
layers drawing apart, and compared entry by entry up to rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import batches, copied, moved
from constrained_growth._sharding import is_sharded
from constrained_growth._sites.model import call, coarsest_epsilon, device_of
from constrained_growth._sites.untouched import differentiable, drawing_apart, untouched
from constrained_growth._structure import entries
from constrained_growth.errors import BlockError, DataError

Outputs = Mapping[str, Mapping[tuple[Any, ...], Tensor]]
""""train" or "eval" → path → tensor of the output in that mode; the model's own mode first."""


def first_input(data: Iterable[Any], model: nn.Module) -> object | None:
    """The input of the first `(input, target)` batch, on the model's device; None without one."""
    with untouched(model, data):
        return next((input for input, _ in batches(data, device_of(model))), None)


def outputs_of(model: nn.Module, example: object, *, optional: bool = False) -> Outputs:
    """The outputs in the model's own mode and in the other one, from the present random state.

    A model that fails in its own mode is an error, or, where `optional`, not checked.
    """
    own = model.training
    found: dict[str, Mapping[tuple[Any, ...], Tensor]] = {}
    # all processes must run a sharded model equally often, and it may fail in the other mode
    modes = (own,) if is_sharded(model) else (own, not own)
    for training in modes if example is not None else ():
        try:
            found["train" if training else "eval"] = _output(model, example, training)
        except Exception as error:
            if training is not own:
                continue  # as BatchNorm does on one sample
            if optional:
                return {}
            raise DataError(
                f"model={type(model).__name__} fails on the input of the first batch ({error}); "
                "give another to check the insertion on: insert(..., data=[(input, target)])."
            ) from error
    return found


def check_preserved(
    model: nn.Module,
    example: object,
    before: Outputs,
    inserted: Mapping[str, nn.Module],
    sites: Mapping[str, nn.Module],
) -> dict[str, float]:
    """The largest difference of the outputs in each mode; an error if it exceeds rounding.

    That is 1000 ε (at most 1/16) of the largest entry, where ε is the coarsest machine precision
    among parameters, outputs, autocast and float32 products. Only the mode the model is in decides,
    since some blocks are exact in one mode. Random numbers that the inserted layers (name → layer)
    draw do not count. A layer around one of the `sites` (of the same names) must run as often as
    that, which may be idle here; the others, elements of lists, must run.
    """
    differences: dict[str, float] = {}
    runs: Counter[nn.Module] = Counter()

    def count(site: nn.Module, *_: Any) -> None:
        runs[site] += 1

    for mode, output in before.items():
        try:
            with ExitStack() as hooks:
                for site in {*sites.values()}:
                    hooks.enter_context(site.register_forward_hook(count))
                of_layers = hooks.enter_context(drawing_apart(inserted.values()))
                grown = {mode: _output(model, example, mode == "train")}
            runs.update(of_layers)
        except Exception as error:
            raise BlockError(
                f"the model fails in {mode} mode with the layers {tuple(inserted)} inserted: "
                f"{type(error).__name__}: {error}. Nothing was changed."
            ) from error
        found = _differences(model, {mode: output}, grown)
        if found:
            differences[mode] = max(difference for difference, _ in found.values())
        beyond = {key: pair for key, pair in found.items() if not pair[0] <= pair[1]}  # or NaN
        if beyond and mode == next(iter(before)):
            difference, allowed = max(beyond.values())
            raise BlockError(
                f"with the layers {tuple(inserted)} inserted the output moves by {difference:.3g} "
                f"in {mode} mode, more than rounding ({allowed:.3g}){_entries(beyond)}: a block is "
                "not the identity there, or the model is not a function of its input, or returns "
                "something of each layer (a loss of routers). Nothing was changed; "
                "insert(..., data=()) skips this check."
            )
    bypassed = [name for name, site in sites.items() if runs[site] > runs[inserted[name]]]
    if bypassed:
        raise BlockError(
            f"the layers {bypassed} would not run where their sites do: the model calls the module "
            "at the site by a reference of its own, such as a plain list, tuple or dict of "
            "modules, and the layer stands under the name that the module has in the model. "
            "Nothing was changed. Call it by that name, self.name(x), or keep modules in an "
            "nn.ModuleList or nn.ModuleDict alone."
        )
    missing = [name for name in inserted if name not in sites and not runs[inserted[name]]]
    if missing and before:
        raise BlockError(
            f"the layers {missing} would never be reached in the forward pass (the model may index "
            "a list by fixed numbers). Nothing was changed. Choose another site or block."
        )
    return differences


def disagreement(model: nn.Module, one: Outputs, other: Outputs, *, growing: bool) -> str:
    """Where two networks give other outputs, but for rounding; "" if nowhere.

    `growing`: sequences of another length in the output, with an entry per layer, do not count.
    """
    found = _differences(model, one, other)
    beyond = {key: pair for key, pair in found.items() if not pair[0] <= pair[1]}
    if beyond:
        return f"the output differs{_entries(beyond)}"
    same_keys = all(one[mode].keys() == other.get(mode, {}).keys() for mode in one)
    if one.keys() != other.keys() or not (same_keys or (growing and found)):
        return "the output has other entries"
    return ""


def _differences(
    model: nn.Module, one: Outputs, other: Outputs
) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Mode and path of each tensor that both have → the difference, and what rounding allows."""
    pairs = {
        (mode, *key): (y, other[mode][key])
        for mode in one.keys() & other.keys()
        for key, y in one[mode].items()
        if key in other[mode] and y.numel()
    }
    epsilon = coarsest_epsilon([*model.parameters(), *(y for y, _ in pairs.values())])
    return {key: (_difference(*pair), _allowed(pair[0], epsilon)) for key, pair in pairs.items()}


def _entries(paths: Iterable[tuple[Any, ...]]) -> str:
    """The outermost keys of the paths, in words."""
    names = ", ".join(sorted({f'"{path[1]}"' for path in paths if len(path) > 1}))
    return f", in {names}" if names else ""


def _output(model: nn.Module, example: object, training: bool) -> dict[tuple[Any, ...], Tensor]:
    """Copies of the tensors in the output in one mode; model and input stay as they were."""
    # a model may differentiate in its forward pass
    with untouched(model, first=True), differentiable():
        try:
            if training != model.training:  # else single modules may be in the other mode
                model.train(training)
            # a copy, as the model may write to its input, and it runs on it several times
            return _tensors(call(model, moved(copied(example), device_of(model))))
        finally:
            torch.clear_autocast_cache()  # the values of the new layers may change next


def _tensors(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Tensor]:
    """Path → copy of each floating-point tensor in an output."""
    if isinstance(value, Tensor):
        counts = value.is_floating_point() or value.is_complex()
        return {path: value.detach().clone()} if counts and value.layout is torch.strided else {}
    # a sequence that grows, with an entry per layer, shares no path with the one before
    size = (len(value),) if isinstance(value, tuple | list) else ()
    found: dict[tuple[Any, ...], Tensor] = {}
    for key, item in entries(value):
        found |= _tensors(item, (*path, (key, *size) if size else key))
    return found


def _difference(before: Tensor, after: Tensor) -> float:
    """Largest difference of an entry; equal infinities and NaN at the same places are none."""
    if before.shape != after.shape:
        return math.inf
    same = (before == after) | (before.isnan() & after.isnan())
    return float((before - after).abs().masked_fill(same, 0.0).nan_to_num(math.inf).max())


def _allowed(before: Tensor, epsilon: float) -> float:
    sizes = before.abs()
    largest = float(sizes.masked_fill(~sizes.isfinite(), 0.0).max())
    scale = max(largest, 1.0) if before.numel() == 1 else largest  # a loss may be near zero
    return min(1e3 * epsilon, 1 / 16) * scale  # 1000 ε of bfloat16 would be 8 times the output
