"""Run a user's model and leave everything as it was."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import samplers_of
from constrained_growth._random_state import random_state, set_random_state
from constrained_growth._sharding import reshard


@contextmanager
def untouched(model: nn.Module, *others: object) -> Iterator[None]:
    """Restore what running a model may change: buffers, train/eval modes, `.grad`, random state.

    So are the generators of the `others`, such as a data loader.
    """
    reshard(model)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    generators = [(g, g.get_state()) for other in others for g in generators_of(other)]
    state = random_state()
    token = _UNTOUCHED.set(True)
    try:
        yield
    finally:
        _UNTOUCHED.reset(token)
        reshard(model)
        set_random_state(state)
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
    stack = ExitStack()
    for kind in {device.type for device in devices}:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


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
