"""Run a user's model and leave everything as it was."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from constrained_growth._random_state import GENERATORS, random_state, set_random_state
from constrained_growth._sharding import reshard
from constrained_growth._sites.snapshot import restoring


@contextmanager
def untouched(model: nn.Module, *others: object, first: bool = False) -> Iterator[None]:
    """Restore what running a model may change.

    That is buffers, other tensors, attributes, train and eval modes and `.grad` of the model and
    of what a loss among the `others` leads to; the global random states; and the generators that
    data among them draw from. Parameters too, if they are written to where the model runs for the
    `first` time, or were then. Where no loss is run, also the notes that forward passes and hooks
    take in lists or dicts: the loss may read them, and clear them.
    """
    reshard(model)  # whole parameters that a pass has left would be taken for the model's own
    state = random_state()
    token = _UNTOUCHED.set(True)
    generators = [generator for other in others for generator in _drawn_from(other)]
    functions = [other for other in others if callable(other)]
    with restoring(model, *functions, *generators, first=first, notes=not functions):
        try:
            yield
        finally:
            _UNTOUCHED.reset(token)
            reshard(model)
            set_random_state(state)


_UNTOUCHED: ContextVar[bool] = ContextVar("_UNTOUCHED", default=False)


def is_untouched() -> bool:
    """Whether a model is run within `untouched`, to be looked at, and not by the user."""
    return _UNTOUCHED.get()


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients on and modules run as written, whatever the caller has switched off or compiled."""
    if any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")):
        torch.clear_autocast_cache()  # it may hold weights that were cast without gradients
    # on the fast path of nn.TransformerEncoder in eval mode no submodule is called, tensors are
    # nested, and where there is padding the output is 0
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), eagerly():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def eagerly() -> AbstractContextManager[Any]:
    """What `torch.compile` has compiled runs as it is written, so that hooks on it are called."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def full_precision(*devices: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on these devices, where it is on."""
    stack = ExitStack()
    for kind in {device.type for device in devices}:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def generators_of(other: object) -> list[torch.Generator]:
    """The generators that a data loader and its samplers draw from, those within them too."""
    found: dict[int, torch.Generator] = {}
    holders = [other]
    for holder in holders:
        if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
            found[id(generator)] = generator
        within = (getattr(holder, name, None) for name in ("batch_sampler", "sampler"))
        holders += [sampler for sampler in within if sampler is not None]
    return list(found.values())


def _drawn_from(data: object) -> Iterator[Any]:
    """The generators that data draw from: those of a loader and its samplers, and of a data set.

    They are looked for in the attributes of objects and in short lists: one of transforms, say.
    """
    waiting: list[tuple[Any, int]] = [(data, _DEPTH)]
    known = set[int]()
    while waiting:
        value, depth = waiting.pop()
        if id(value) in known or depth == 0 or isinstance(value, torch.Tensor | nn.Module | type):
            continue
        known.add(id(value))
        if isinstance(value, GENERATORS):
            yield value
        elif type(value) in (list, tuple):  # a user's own may read a file for each item
            waiting += [(item, depth) for item in (value if len(value) < _SHORT else ())]
        else:
            state = getattr(value, "__dict__", {})
            # workers have generators of their own
            waiting += [(item, depth - 1) for key, item in state.items() if key != "_iterator"]


_DEPTH = 6
"""How many objects lie on the way to a generator: a loader, its data set, its transforms, …"""

_SHORT = 100


@contextmanager
def drawing_apart(layers: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Make layers leave the random state as they found it, and count how often each runs."""
    runs: Counter[nn.Module] = Counter()
    states: list[Any] = []  # a stack: an inserted layer may run within another one

    def enter(module: nn.Module, _: Any) -> None:
        states.append(random_state())
        runs[module] += 1

    def leave(*_: Any) -> None:
        set_random_state(states.pop())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(enter))
            hooks.enter_context(layer.register_forward_hook(leave))
        yield runs
