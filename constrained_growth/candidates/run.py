"""What each module of a model did in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import moved
from constrained_growth._sites.collector import hooked, transformed
from constrained_growth._sites.context import NO_CONTEXT, Context, context_of, detached
from constrained_growth._sites.model import call, device_of, owners_of
from constrained_growth._sites.outputs import tensor_in
from constrained_growth._sites.placement import undoing
from constrained_growth._sites.untouched import untouched
from constrained_growth._sites.wrapper import WithInsertedLayer
from constrained_growth.blocks.protocol import change
from constrained_growth.errors import CandidateError, GrowthError


@dataclass
class Run:
    """What one module did in the forward pass, the last time that it ran."""

    module: nn.Module
    count: int = 0  # how many times it ran
    x: Tensor | None = None  # the first argument, if it is a tensor
    context: Context = NO_CONTEXT  # the other arguments
    y: Tensor | None = None  # the tensor in its output
    version: int = 0  # the version counter of y when it came out
    on_channels: bool = False  # whether dimension 1 of y counts channels, as after a convolution
    differentiable: bool = True  # whether gradients were on, and no transform of torch.func

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the input."""
        return self.x is not None and self.y is not None and self.x.shape == self.y.shape

    @property
    def is_composite(self) -> bool:
        """Whether it has children and parameters."""
        has_children = next(self.module.children(), None) is not None
        return has_children and next(self.module.parameters(), None) is not None


def runs_of(model: nn.Module, example_input: object) -> dict[str, Run]:
    """Run the model once; name → run of its modules, in the order they finished.

    Raises:
        CandidateError: The model fails on the example.
    """
    names = {module: name for name, module in model.named_modules()}
    runs: dict[str, Run] = {}
    layouts: dict[int, bool] = {}
    kept: list[Tensor | None] = []  # or ids would be used again
    on_channels = False

    def see(
        module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        nonlocal on_channels
        run = runs.setdefault(names[module], Run(module))
        first = args[0] if args else next(iter(kwargs.values()), None)
        run.count += 1
        run.x = first if isinstance(first, Tensor) else None
        run.context = detached(context_of(module, args, kwargs))
        try:
            run.y = tensor_in(output)
        except CandidateError:
            run.y = None
        run.version = 0 if run.y is None else run.y._version
        in_transform = run.y is not None and transformed(run.y)
        run.differentiable = torch.is_grad_enabled() and not in_transform
        if isinstance(module, nn.GroupNorm) or type(module).__module__ in _ON_CHANNELS:
            on_channels = True
        elif isinstance(module, _ON_LAST_DIMENSION):
            on_channels = False
        elif run.keeps_shape:
            on_channels = layouts.get(id(run.x), on_channels)
        run.on_channels = on_channels and run.y is not None and run.y.dim() > 2
        layouts[id(run.y)] = on_channels
        kept.extend((run.x, run.y))

    with hooked((module, see) for module in names):
        try:
            call(model, moved(example_input, device_of(model)))
        except GrowthError:
            raise
        except Exception as error:
            of_batch = isinstance(example_input, tuple | list) and len(example_input) == 2
            batch = ", or batch[0] where this is a batch (input, target)" if of_batch else ""
            raise CandidateError(
                f"example_input={type(example_input).__name__}: {type(model).__name__} fails on it "
                f"({type(error).__name__}: {error}); give one input as in the data: a tensor, a "
                f"tuple, or a dict of keyword arguments{batch}."
            ) from error
    return runs


def unwrappable(
    model: nn.Module, example_input: object, names: Sequence[str], last: Tensor | None
) -> list[str]:
    """Those of the modules in whose place no other module can stand: the output would not be last.

    As where the program asks `isinstance(layer, Attention)`.
    """

    def runs_as_before(some: Sequence[str]) -> bool:
        modules = [model.get_submodule(name) for name in some]
        try:
            with undoing([model], always=True), untouched(model):
                for module in modules:
                    wrapper = WithInsertedLayer(module)
                    for owner, key in owners_of(model, module):
                        owner._modules[key] = wrapper
                output = call(model, moved(example_input, device_of(model)))
                y = None if last is None else tensor_in(output)
        except Exception:
            return False
        if last is None or y is None or not bool(last.isfinite().all()):
            return True
        return y.shape == last.shape and bool(change(last.detach(), y.detach()) <= 1)

    if runs_as_before(names):
        return []
    return [name for name in names if not runs_as_before([name])]


def is_same(y: Tensor, last: Tensor) -> bool:
    """Whether one tensor is the other but for its shape: a view of it, or a copy."""
    if y is last or (_storage(y) is not None and _storage(y) == _storage(last)):
        return True
    if y.numel() != last.numel() or y.layout is not last.layout or y.device != last.device:
        return False
    # by values, whatever their order: a transposed copy has another storage
    ordered = [one.detach().flatten().sort().values for one in (y, last)]
    return torch.equal(ordered[0].to(last.dtype), ordered[1])


def _storage(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # sparse, or inside a transform
        return None


_ON_CHANNELS = (nn.Conv2d.__module__, nn.BatchNorm2d.__module__, nn.InstanceNorm2d.__module__)
_ON_LAST_DIMENSION = (
    nn.Linear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.RNNBase,
    nn.MultiheadAttention,
)
