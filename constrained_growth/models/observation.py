"""Running a user's model on a user's data, watching its sites, leaving no trace."""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from constrained_growth.errors import DataError
from constrained_growth.models.distributed import unwrapped
from constrained_growth.models.reading import samplers_of
from constrained_growth.models.sharding import reshard


@contextmanager
def untouched(model: nn.Module, *others: object) -> Iterator[None]:
    """Restore what running a model may change: buffers, modes, gradients, random state.

    Args:
        model: Its buffers (running statistics), train/eval modes and `.grad` are put back.
        *others: Objects whose attribute `generator` (a data loader's, a sampler's) is put back.
    """
    reshard(model)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    generators = [(g, g.get_state()) for other in others for g in generators_of(other)]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    token = _UNTOUCHED.set(True)
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        _UNTOUCHED.reset(token)
        reshard(model)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for generator, state in generators:
            generator.set_state(state)
        for name, (buffer, before) in buffers.items():
            _restore_buffer(model, name, buffer, before)
        for module, training in modes:
            module.training = training
        for parameter, grad in grads:
            parameter.grad = grad


_UNTOUCHED: ContextVar[bool] = ContextVar("_UNTOUCHED", default=False)


def is_untouched() -> bool:
    """Whether a model is run within `untouched`, to be looked at, and not by the user."""
    return _UNTOUCHED.get()


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients on and modules run as written, whatever the caller has switched off or compiled."""
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        torch.clear_autocast_cache()  # it may hold weights that were cast without gradients
    with torch.inference_mode(False), torch.enable_grad(), as_written():
        yield


def eagerly() -> AbstractContextManager[Any]:
    """What `torch.compile` has compiled runs as it is written, so that hooks on it are called."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def as_written() -> Iterator[None]:
    """`eagerly`, and without the fast path that `nn.TransformerEncoder` takes in eval mode.

    On it no submodule is called, tensors are nested, and where there is padding the output is 0.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eagerly():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def full_precision(*devices: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on these devices, where it is on."""
    on = [device.type for device in devices if torch.is_autocast_enabled(device.type)]
    return _without_autocast(set(on)) if on else nullcontext()


@contextmanager
def _without_autocast(kinds: Iterable[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def generators_of(other: object) -> list[torch.Generator]:
    """The generators that a data loader and its samplers draw from."""
    found = [getattr(holder, "generator", None) for holder in (other, *samplers_of(other))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _restore_buffer(model: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    """Put back a buffer, whether it was written to or replaced by another tensor."""
    with torch.no_grad():
        if not torch.equal(buffer, before):
            buffer.copy_(before)
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._buffers[key] = buffer


def call(model: Callable[..., Any], input: object) -> Any:
    """`model(input)`, with a tuple spread as positional and a dict as keyword arguments."""
    model = unwrapped(model)
    if isinstance(input, Mapping):
        return model(**input)
    if isinstance(input, tuple | list):
        return model(*input)
    return model(input)


def checked_loss(loss: object) -> Tensor:
    """The loss, if it is a scalar tensor.

    Raises:
        DataError: It is not.
    """
    if not isinstance(loss, Tensor):
        raise DataError(
            f"loss_fn returned a {type(loss).__name__}, not a scalar tensor; it is called as "
            "loss_fn(model output, target)."
        )
    if loss.dim() != 0:
        raise DataError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not a scalar; use the mean "
            'over the samples (reduction="mean").'
        )
    return loss


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of the parameters of a module."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def device_of(model: nn.Module) -> torch.device | None:
    """Where the model's parameters (or else buffers) are; None if it has neither."""
    tensor = next(tensors_of(model), None)
    return None if tensor is None else tensor.device


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Its parameters, then its buffers."""
    return itertools.chain(model.parameters(), model.buffers())


def moved(value: Any, device: torch.device | None) -> Any:
    """The tensors in a batch on the model's device; everything else as it is."""
    if device is None:
        return _with_tensors(value, lambda tensor: tensor)
    return _with_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def copied(value: Any) -> Any:
    """A batch with tensors of its own, to be held while a loader may write to its own again."""
    return _with_tensors(value, torch.clone)


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _with_tensors(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_with_tensors(item, change) for item in value)
    return value


def batches(data: Iterable[Any], device: torch.device | None) -> Iterator[tuple[Any, Any]]:
    """The `(input, target)` pairs of the data, on the model's device.

    Raises:
        DataError: A batch is not a pair.
    """
    for index, batch in enumerate(data):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise DataError(
                f"data: batch {index} is a {type(batch).__name__}, not an (input, target) pair; "
                "give an iterable of pairs, such as a DataLoader over a TensorDataset(x, y)."
            )
        yield moved(batch[0], device), moved(batch[1], device)


def batch_size(input: object, target: object) -> int:
    """How many samples a batch has: the first dimension of its first tensor.

    Raises:
        DataError: There is no tensor with a first dimension, or it has length 0.
    """
    for tensor in (*_tensors(input), *_tensors(target)):
        if tensor.dim() > 0:
            if tensor.shape[0] == 0:
                raise DataError("data: a batch has no samples (a tensor of first dimension 0).")
            return tensor.shape[0]
    raise DataError(
        "data: a batch holds no tensor with a batch dimension; inputs are a tensor, a tuple or a "
        "dict of tensors whose first dimension counts the samples."
    )


Weight = Callable[[Any, Any], float | Tensor] | None
"""`(input, target) -> number`: how much a batch counts; None for its number of samples."""


def batch_weight(weight: Weight, input: object, target: object) -> float:
    """How much a batch counts in the mean over all of them.

    Raises:
        DataError: The weight is negative or not finite; or the batch has no samples.
    """
    size = batch_size(input, target)
    if weight is None:
        return size
    value = float(weight(input, target))
    if not 0 <= value < math.inf:
        raise DataError(
            f"weight={weight!r} gives {value} for a batch of {size} samples; it is called as "
            "weight(input, target) and says over how many items, 0 or more, the loss of that batch "
            "is the mean."
        )
    return value


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks on modules for a while; PyTorch's own `hook(module, args, kwargs, output)`."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watching(
    modules: Mapping[str, nn.Module], see: Callable[[str, object, object], Tensor | None]
) -> AbstractContextManager[None]:
    """Call `see(name, first input, output)` whenever one of the modules has run.

    What `see` returns, if not None, takes the place of the output.
    """

    def hook_for(name: str) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            return see(name, args[0] if args else next(iter(kwargs.values()), None), output)

        return hook

    return hooked((module, hook_for(name)) for name, module in modules.items())
