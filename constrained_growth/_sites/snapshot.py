"""What a model and a loss keep from call to call, and putting it back.

`reached` walks from the model and the loss to all that they hold: modules, tensors, containers and
generators, through attributes, hooks, closures and the globals that a function names. `restoring`
notes what these are like, and makes the same objects so again. Parameters are too large to be
copied each time: a dispatch mode sees in the first run which of them are written to.
"""

from __future__ import annotations

import copy
import functools
import operator
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from constrained_growth._random_state import GENERATORS, set_state, state_of

T = TypeVar("T")

_DEPTH = 3
"""How many objects lie on the way to one: a loss, its metric, and what that holds. An object that
holds everything, as a trainer does, would lead to the data set."""

_PLAIN = {type(None), bool, int, float, str}
_CONTAINERS = {dict, OrderedDict, defaultdict, Counter, list, set, deque}
_OTHERS = {*sys.stdlib_module_names, "torch", "numpy", "constrained_growth"}

_UNSET: Any = object()

_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]
"""A module's dicts of hooks. What runs adds some, as Transformers does in a first pass, which are
taken off again; none is put back, as a monitor that looks on takes its own off and on."""


_WRITTEN = WeakTensorKeyDictionary()
"""Parameters that were seen to be written to by a forward pass, as of `nn.Embedding(max_norm=)`.
Copies of all would be too dear for every pass, and seeing what writes is too slow."""


@contextmanager
def restoring(*roots: object, first: bool = False, notes: bool = False) -> Iterator[None]:
    """Put back what some modules, functions and objects hold: attributes, containers and tensors.

    Found are those that a module, the hooks on it, a function (a bound method, a `partial`, a
    closure, with the globals it names) or an object of the user's leads to. At the end they are
    the same objects with the same values: parameters if they were seen to be written to when the
    model ran for the `first` time, `notes` if asked for.
    """
    found = list(reached(*roots, notes=notes))
    tensors = [value for value in found if isinstance(value, Tensor)]
    # of any other tensor `.grad` warns, and requires_grad cannot be set
    leaves = [(leaf, leaf.grad, leaf.requires_grad) for leaf in tensors if leaf.is_leaf]
    parameters = [t for t in tensors if type(t) is nn.Parameter and t.layout is torch.strided]
    memory = [(parameter, parameter.data) for parameter in parameters]
    changing = (t for t in tensors if not isinstance(t, nn.Parameter) or t in _WRITTEN)
    values = [(t, t.detach().clone()) for t in changing]
    arrays = [(a, a.copy()) for a in found if type(a) is np.ndarray and a.flags.writeable]
    watching = [m for m in _get_current_dispatch_mode_stack() if isinstance(m, _Writes)]
    writes = watching[0] if watching else _Writes(parameters if first else ())
    outer, writes.start = writes.start, len(writes.before)
    containers = [(value, value.copy()) for value in found if type(value) in _CONTAINERS]
    slots = [(value, *pair) for value in found for pair in _in_slots(value)]
    modes = [(value, value.training) for value in found if isinstance(value, nn.Module)]
    hooks = [(some, set(some)) for module, _ in modes for some in _hooks_of(module)]
    generators = [(g, state_of(g)) for g in found if isinstance(g, GENERATORS)]
    try:
        with writes if first and not watching else ExitStack():
            yield
    finally:
        # in this order: which objects hang where, the memory of parameters, the values in it
        for container, before in containers:
            now, then = _held(container), _held(before)
            if len(now) != len(then) or not all(map(operator.is_, now, then)):
                fill = container.extend if hasattr(container, "extend") else container.update
                container.clear()
                fill(before)
        for value, slot, before in slots:
            if before is not _UNSET:
                slot.__set__(value, before)
            elif hasattr(value, slot.__name__):
                slot.__delete__(value)
        for some, keys in hooks:
            for key in some.keys() - keys:
                if not _is_of_others(getattr(some[key], "__module__", "torch")):
                    del some[key]
        for module, training in modes:  # a script module keeps it elsewhere
            if module.training != training:
                module.training = training
        for generator, state in generators:
            set_state(generator, state)
        for parameter, data in memory:  # `parameter.data = …`, where a constraint renews it
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
        for array, before in arrays:
            array[...] = before
        with torch.no_grad():
            for tensor, before in (*values, *writes.before[writes.start :]):
                if tensor.shape != before.shape:  # observers of a quantisation resize their buffers
                    tensor.resize_(before.shape)
                # by `data`, which has a version counter of its own: a graph of the user's that has
                # saved the tensor finds the values that it has saved
                tensor.data.copy_(before)
        del writes.before[writes.start :]
        writes.start = outer
        for leaf, grad, requires_grad in leaves:
            leaf.grad = grad
            if leaf.requires_grad != requires_grad:
                leaf.requires_grad_(requires_grad)


class _Writes(TorchDispatchMode):
    """Parameters and their values before they were first written to since a `start`.

    Version counters do not tell: what writes to `parameter.data` leaves that of the parameter.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation imports torch._dynamo, which takes seconds

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.before: list[tuple[nn.Parameter, Tensor]] = []
        self.start = 0  # in `before`
        self._parameters: dict[int | None, list[nn.Parameter]] = {}  # by their memory
        for parameter in parameters:
            place = parameter.untyped_storage().data_ptr()
            self._parameters.setdefault(place, []).append(parameter)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        schema, kwargs = getattr(func, "_schema", None), kwargs or {}
        for index, argument in enumerate(schema.arguments if schema and schema.is_mutable else ()):
            written = argument.alias_info is not None and argument.alias_info.is_write
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(given) if written else ():
                plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
                place = tensor.untyped_storage().data_ptr() if plain else None
                for parameter in self._parameters.get(place, ()):
                    if all(parameter is not known for known, _ in self.before[self.start :]):
                        self.before.append((parameter, parameter.detach().clone()))
                        _WRITTEN[parameter] = True
        return func(*args, **kwargs)


def reached(*roots: object, notes: bool = False) -> Iterator[Any]:
    """The modules, tensors, arrays, containers, generators and objects reached from some objects.

    A container counts as an attribute of an object. One that a function or a hook writes to is a
    note that the user takes, and only what is in it counts, unless `notes` are asked for: then it
    does too, also where a module's own `forward` writes to it.
    """
    waiting: list[tuple[Any, int, bool]] = [(root, _DEPTH, False) for root in roots]
    known: set[int] = set()
    while waiting:
        value, depth, owned = waiting.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        inside: Iterable[Any] = ()
        if type(value) in _CONTAINERS:
            if owned or notes:
                yield value
            inside = value.values() if isinstance(value, dict) else value
        elif isinstance(value, Tensor | GENERATORS) or type(value) is np.ndarray:
            yield value
        elif isinstance(value, nn.Module):
            yield value
            hooks = _hooks_of(value)
            known.update(map(id, hooks))  # or they would be put back as containers of the module
            waiting += [(hook, depth, False) for some in hooks for hook in some.values()]
            inside = (vars(value), *value.buffers(recurse=False), *_slot_values(value))
            owned = True
            forward = getattr(type(value), "forward", None)  # a proxy of a module has none
            if notes and _is_of_the_user(forward):
                waiting.append((forward, depth, False))
        elif isinstance(value, tuple):
            inside = value
        elif isinstance(value, types.MethodType):
            inside = value.__self__, value.__func__
        elif isinstance(value, functools.partial):
            inside = value.func, value.args, value.keywords
        elif isinstance(value, types.FunctionType) and depth > 0:
            inside, depth, owned = _names_in(value), depth - 1, False
        elif depth > 0 and _is_state(value):
            yield value  # for its slots
            inside = (getattr(value, "__dict__", None), *_slot_values(value))
            depth, owned = depth - 1, True
        waiting += [(item, depth, owned) for item in inside if type(item) not in _PLAIN]


def _in_slots(value: object) -> list[tuple[Any, Any]]:
    """The attributes that `__slots__` declare: descriptor and value, or `_UNSET`."""
    kinds = [kind for kind in type(value).__mro__ if "__slots__" in vars(kind)]
    found = [slot for kind in kinds for slot in vars(kind).values()]
    slots: list[Any] = [slot for slot in found if isinstance(slot, types.MemberDescriptorType)]
    return [(slot, getattr(value, slot.__name__, _UNSET)) for slot in slots]


def has_slots(value: object) -> bool:
    """Whether `__slots__` declare attributes of it."""
    return bool(_in_slots(value))


def _slot_values(value: object) -> list[Any]:
    return [inside for _, inside in _in_slots(value)]


def _hooks_of(module: nn.Module) -> list[dict[Any, Any]]:
    state = vars(module)
    return [state[name] for name in _HOOKS if name in state]


def deepcopied(value: T, memo: Mapping[int, Any] | None = None) -> T:
    """`copy.deepcopy`, also of a module that keeps tensors with a graph, such as activations."""
    # `copy.deepcopy` refuses tensors with a graph; a copy needs only their values
    kept = [t for t in reached(value) if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(value, {**(memo or {}), **{id(t): t.detach().clone() for t in kept}})


def without_hooks(module: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy without the hooks on its runs, which belong to the original."""
    names = [name for name in _HOOKS if name.startswith(("_forward_", "_backward_"))]
    states = [vars(part) for part in module.modules()]
    none = {id(state[name]): OrderedDict() for state in states for name in names if name in state}
    return deepcopied(module, {**none, **(memo or {})})


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
        and (hasattr(value, "__dict__") or has_slots(value))
        and not _is_of_others(type(value).__module__)
        and not any(kind.__module__.partition(".")[0] == "torch" for kind in kinds)
    )


def _is_of_the_user(function: Any) -> bool:
    """Whether it is no function of an installed package."""
    file = getattr(getattr(function, "__code__", None), "co_filename", "site-packages")
    return not any(place in file for place in ("site-packages", "dist-packages"))


def _is_of_others(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in _OTHERS


def _held(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else [*container]
