"""What a model and a loss keep from call to call, and putting it back."""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_DEPTH = 3
"""How many objects lie on the way to one: a loss, its metric, and what that holds. An object that
holds everything, as a trainer does, would lead to the data set."""

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)
_OTHERS = {*sys.stdlib_module_names, "torch", "numpy", "constrained_growth"}

_HOOKS = ("_forward_", "_backward_")
"""How a module's dicts of hooks are called. A monitor that looks on takes its own off and on; those
that the model adds to itself as it runs, such as Transformers in its first pass, are taken off."""


class Snapshot:
    """What is held by some modules, functions and objects: attributes, containers and tensors.

    Found are those that a module, the hooks on it, a function (a bound method, a `partial`, a
    closure, with the globals it names) or an object of the user's leads to.
    """

    def __init__(self, *roots: object) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._leaves: list[tuple[Tensor, Tensor | None, bool]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._hooks: list[tuple[dict[int, Any], set[int]]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        for value in reached(*roots):
            if type(value) in _CONTAINERS:
                self._containers.append((value, value.copy()))
            elif isinstance(value, Tensor):
                if value.is_leaf:
                    self._leaves.append((value, value.grad, value.requires_grad))
                if not isinstance(value, nn.Parameter):
                    self._tensors.append((value, value.detach().clone()))
            elif isinstance(value, nn.Module):
                self._modes.append((value, value.training))
                self._hooks += [(hooks, {*hooks}) for hooks in _hooks_of(value)]
            elif isinstance(value, torch.Generator):
                self._generators.append((value, value.get_state()))

    def put_back(self) -> None:
        """All is again what it was, the same objects with the same values."""
        for container, before in self._containers:
            if not _same_items(container, before):
                fill = container.extend if hasattr(container, "extend") else container.update
                container.clear()
                fill(before)
        for hooks, known in self._hooks:
            for key in hooks.keys() - known:
                if callable(hooks[key]) and not _is_of_others(hooks[key].__module__):
                    del hooks[key]
        for module, training in self._modes:  # a script module keeps it elsewhere
            if module.training != training:
                module.training = training
        for generator, state in self._generators:
            generator.set_state(state)
        for tensor, values in self._tensors:
            _put_back(tensor, values)
        for leaf, grad, requires_grad in self._leaves:
            leaf.grad = grad
            if leaf.requires_grad != requires_grad:
                leaf.requires_grad_(requires_grad)


def reached(*roots: object) -> Iterator[Any]:
    """The modules, tensors, containers and generators that are reached from some objects.

    A container counts as an attribute of an object. One that a function or a hook writes to is a
    note that the user takes, and only what is in it counts.
    """
    waiting: list[tuple[Any, int, bool]] = [(root, _DEPTH, False) for root in roots]
    known: set[int] = set()
    while waiting:
        value, depth, owned = waiting.pop()
        if value is None or isinstance(value, str | int | float) or id(value) in known:
            continue
        known.add(id(value))
        inside: list[Any] = []
        if type(value) in _CONTAINERS:
            if owned:
                yield value
            inside = [*(value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield value
            for hooks in _hooks_of(value):
                known.add(id(hooks))
                waiting += ((hook, depth, False) for hook in hooks.values())
            inside, owned = [vars(value), *value.buffers(recurse=False)], True
        elif isinstance(value, tuple):
            inside = [*value]
        elif isinstance(value, types.MethodType):
            inside = [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            inside = [value.func, value.args, value.keywords]
        elif isinstance(value, types.FunctionType) and depth > 0:
            inside, depth, owned = [*_names_in(value)], depth - 1, False
        elif isinstance(value, torch.Generator):
            yield value
        elif depth > 0 and _is_state(value):
            inside, depth, owned = [vars(value)], depth - 1, True
        waiting += ((item, depth, owned) for item in inside)


def _hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    found = (hooks for name, hooks in vars(module).items() if name.startswith(_HOOKS))
    return [hooks for hooks in found if isinstance(hooks, dict)]


def deepcopied(value: T, memo: Mapping[int, Any] | None = None) -> T:
    """`copy.deepcopy`, also of a module that keeps tensors with a graph, such as activations."""
    kept = [t for t in reached(value) if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(value, {**(memo or {}), **{id(t): t.detach().clone() for t in kept}})


def _names_in(function: types.FunctionType) -> Iterator[Any]:
    """What the names in a user's function stand for: cells, defaults and globals."""
    if _is_of_others(function.__module__):
        return
    yield from (function.__defaults__, function.__kwdefaults__)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # not filled yet
            yield cell.cell_contents
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names = code.co_names
        yield from (function.__globals__[n] for n in names if n in function.__globals__)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _is_state(value: object) -> bool:
    """Whether it is an object of the user's, and no class, module or part of a library."""
    kinds = [kind for kind in type(value).__mro__ if kind.__module__ not in ("builtins", "typing")]
    return (
        not isinstance(value, type)
        and hasattr(value, "__dict__")
        and not _is_of_others(type(value).__module__)
        and not any(kind.__module__.partition(".")[0] == "torch" for kind in kinds)
    )


def _is_of_others(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in _OTHERS


def _same_items(container: Any, before: Any) -> bool:
    if isinstance(container, set):
        return container == before
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), before.items(), strict=True)
        return all(one[0] == other[0] and one[1] is other[1] for one, other in pairs)
    return all(one is other for one, other in zip(container, before, strict=True))


def _put_back(tensor: Tensor, before: Tensor) -> None:
    """The values and the shape of a tensor, if they have changed."""
    with torch.no_grad():
        if tensor.shape != before.shape:
            tensor.resize_(before.shape)
        if tensor.layout is not torch.strided or not torch.equal(tensor, before):
            tensor.copy_(before)
