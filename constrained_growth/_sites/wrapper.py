"""The module that stands in a model where layers were inserted."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import nn

from constrained_growth._sites.context import NO_CONTEXT, arguments, context_of, takes_context
from constrained_growth._sites.outputs import Which, tensor_at, with_tensor
from constrained_growth._sites.scripting import is_scripting, scriptable_forward, unreadable

# a trace by torch.fx calls them, whatever it is that comes out
torch.fx.wrap("tensor_at")
torch.fx.wrap("with_tensor")


class _Found(dict[str, Any]):
    """The parameters or buffers of the user's module: found by name, but not listed.

    PyTorch's tools look them up in the wrapper; a list of all has each once, below its owner.
    """

    def __init__(self, wrapper: WithInsertedLayer, kind: str) -> None:
        super().__init__()
        self.wrapper, self.kind = wrapper, kind

    def _there(self) -> dict[str, Any]:
        return getattr(user_module(self.wrapper), self.kind)

    def __contains__(self, name: object) -> bool:
        return name in self._there()

    def __getitem__(self, name: str) -> Any:
        return self._there()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._there()[name] = value

    def __delitem__(self, name: str) -> None:
        del self._there()[name]

    get: Any = MutableMapping.get  # a dict's own looks inside it
    pop: Any = MutableMapping.pop


class _UserClass(type):
    """What a wrapper gives as its class: one derived from it, or written on it, is the user's.

    PyTorch's parametrizations derive a class, assign it, and set properties on it. It is no
    subclass of the user's class: whoever replaces each nn.Linear would drop the inserted layers.
    """

    user: type

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        first = bases[0]
        if not isinstance(first, _UserClass):
            return super().__new__(cls, name, bases, namespace)
        name = name.replace(first.__name__, first.user.__name__)
        return type(name, (first.user,), {"__module__": first.user.__module__, **namespace})

    @property
    def __bases__(cls) -> tuple[type, ...]:  # type: ignore[override]
        return cls.user.__bases__

    def __setattr__(cls, name: str, value: Any) -> None:
        setattr(cls.user, name, value)

    def __delattr__(cls, name: str) -> None:
        delattr(cls.user, name)


class WithInsertedLayer(nn.Module):
    """A module followed by inserted layers: x ↦ inserted(base(x)).

    It takes the place of the user's module in the model, under the same name. Its children are in
    the order in which they run: first `base`, the user's module, then the layers. They are called
    `inserted`, `inserted2`, … in the order of their insertion, so one more layer anywhere changes
    no name. A name that the user's module has itself gets an underscore at its end.

    Attributes, elements and registrations are those of the user's module, for reading, writing
    and deleting (`model.fc.weight = embedding.weight`). Hooks on it stay on it: they see the
    output that the layers receive. A layer with a true attribute `takes_context` is called with
    the arguments of the user's module, its own input in place of the first one.
    """

    __constants__ = ("_grown_layers",)  # or torch.jit takes any order of the same layers as one

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        name = _free_name(base, "base")
        vars(self).update(training=base.training, _grown_base=name, _grown_layers=())
        self._modules[name] = base
        for kind in ("_parameters", "_buffers"):
            vars(self)[kind] = _Found(self, kind)

    @property
    def __class__(self) -> Any:  # what isinstance and parametrizations ask, and type() does not
        if "_grown_base" not in vars(self):  # being copied
            return type(self)
        user = type(without_inserted(self))
        return _UserClass("WithInsertedLayer", (WithInsertedLayer,), {"user": user})

    @__class__.setter
    def __class__(self, value: Any) -> None:
        without_inserted(self).__class__ = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        # anything but a function `__newobj__`, with which pickle compares `__class__`
        return object.__new__, (WithInsertedLayer,), {**vars(self)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the user's module, the layers applied to its tensors."""
        base = user_module(self)
        if base._forward_pre_hooks and any(map(takes_context, inserted_layers(self).values())):
            output, args, kwargs = _called(base, *args, **kwargs)
        else:
            output = base(*args, **kwargs)
        for name, which, overwritten in self._grown_layers:
            layer: Any = self._modules[name]
            x = tensor_at(type(base).__name__, output, which)
            context = context_of(base, args, kwargs) if takes_context(layer) else NO_CONTEXT
            positional, named = arguments(layer, x, context)
            y = layer(*positional, **named)
            y = y.clone() if overwritten else y  # its backward pass may need y
            output = with_tensor(output, which, y)
        return output

    # torch.fx takes the arguments of what a function wraps, and no variable ones
    forward.__signature__ = inspect.signature(lambda *args, **kwargs: None)
    forward.__wrapped__ = lambda self, input: None  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> Any:
        object.__dict__["__class__"].__set__(self, _Scriptable)
        self.__dict__ = _Attributes(vars(self))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # its __deepcopy__, say, would leave out the layers
            if name.startswith("__") or name in _MACHINERY or "_grown_base" not in vars(self):
                raise
            return self._own(getattr(user_module(self), name))

    def _own(self, value: Any) -> Any:
        """The wrapper in place of the user's module, also where a method returns that."""
        base = user_module(self)
        if not inspect.ismethod(value) or value.__self__ is not base:
            return self if value is base else value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> Any:
            return self._own(value(*args, **kwargs))

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":  # each has its own, and some set it without calling train()
            user_module(self).training = value
        bound_to = getattr(value, "__self__", None)
        if name == "forward" and bound_to is user_module(self):
            user_module(self).forward = value  # a library restores it
        elif (
            name in _MACHINERY
            or name in vars(self)
            or name in self._modules
            or bound_to is self  # a library keeps the wrapper's method before it sets another
            or (name.startswith("_") and not hasattr(self, name))
        ):
            super().__setattr__(name, value)
        else:
            setattr(user_module(self), name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self) or name in self._modules:
            super().__delattr__(name)
        else:
            delattr(user_module(self), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(user_module(self))})


def _called(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    """The output of a module, and its arguments as hooks on it have changed them."""
    given: list[Any] = []

    def see(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given[:] = args, kwargs

    handle = module.register_forward_hook(see, with_kwargs=True, prepend=True)
    try:
        return module(*args, **kwargs), *given
    finally:
        handle.remove()


class _Attributes(dict[str, Any]):
    """The attributes of a wrapper, for torch.jit.script with those that the parent may read.

    They are what does not change: the parameters and constants of the user's module. If it reads
    another one, PyTorch's error says why.
    """

    def items(self) -> Any:
        if not is_scripting():
            return super().items()
        base = without_inserted(self["_modules"][self["_grown_base"]])
        names = [name for name in getattr(base, "__constants__", ()) if hasattr(base, name)]
        theirs = {name: getattr(base, name) for name in (*names, *base._parameters)}
        public = {name for name in dir(base) if not name.startswith("_")} - _MACHINERY
        others = dict.fromkeys(public, unreadable)
        return {**others, **theirs, **dict(super().items())}.items()


class _Forward:
    """The method `forward`, or what torch.jit.script compiles in its place."""

    def __get__(self, wrapper: Any, owner: Any) -> Any:
        if wrapper is None or not is_scripting():
            return vars(WithInsertedLayer)["forward"].__get__(wrapper, owner)
        layers = [(name, wrapper._modules[name], *where) for name, *where in wrapper._grown_layers]
        return scriptable_forward(user_module(wrapper), wrapper._grown_base, layers)


class _Scriptable(WithInsertedLayer):
    """What a wrapper becomes once torch.jit.script comes across it."""

    forward = _Forward()  # type: ignore[assignment]

    def __dir__(self) -> list[str]:
        # it compiles what it finds, so nothing of the user's module
        return list(nn.Module.__dir__(self)) if is_scripting() else super().__dir__()


def _pass_on(name: str, function: Callable[..., Any]) -> None:
    """Define a method that `__getattr__` does not catch, as it is there, or is the class's."""
    # Python looks up len(x) and x[i] on the type, and nn.Module has register_buffer itself

    def method(self: WithInsertedLayer, *args: Any, **kwargs: Any) -> Any:
        return self._own(function(user_module(self), *args, **kwargs))

    setattr(WithInsertedLayer, name, method)


for _function in (len, bool, iter, reversed):
    _pass_on(f"__{_function.__name__}__", _function)
for _name in ("__contains__", "__getitem__", "__setitem__", "__delitem__"):
    _pass_on(_name, getattr(operator, _name))
for _name in ("__iadd__", "__imul__"):
    _pass_on(_name, lambda base, x, _name=_name: getattr(base, _name, lambda _: NotImplemented)(x))
for _name in (
    *("register_parameter", "register_buffer", "add_module"),
    *("_register_state_dict_hook", "_register_load_state_dict_pre_hook"),
):
    _pass_on(_name, lambda base, *args, _name=_name, **kw: getattr(base, _name)(*args, **kw))

_MACHINERY = {*dir(nn.Module), *vars(nn.Module()), "_hf_hook", "_old_forward"}
"""Attributes by which PyTorch, and Accelerate, run each module; the wrapper has its own."""


def user_module(wrapper: WithInsertedLayer) -> Any:
    """The module that a wrapper has taken the place of."""
    return wrapper._modules[wrapper._grown_base]


def without_inserted(module: nn.Module) -> nn.Module:
    """The user's module, where a wrapper has taken its place; any other module itself."""
    while isinstance(module, WithInsertedLayer):
        module = user_module(module)
    return module


def take_hooks(wrapper: WithInsertedLayer) -> None:
    """Move hooks by which PyTorch prunes or normalises weights to the wrapper, where it looks."""
    hooks = user_module(wrapper)._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if any(kind.__module__.startswith("torch.nn.utils.") for kind in type(hook).__mro__):
            wrapper._forward_pre_hooks[key] = hooks.pop(key)


def inserted_layers(wrapper: WithInsertedLayer) -> dict[str, nn.Module]:
    """Name → layer of the layers in a wrapper, in the order in which they run."""
    return {name: wrapper.get_submodule(name) for name, _, _ in wrapper._grown_layers}


def is_inserted(name: str, model: nn.Module) -> bool:
    """Whether a module of the model, given by its name, is an inserted layer or a part of one."""
    parts = name.split(".")
    owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    return any(
        isinstance(owner, WithInsertedLayer) and part in inserted_layers(owner)
        for owner, part in zip(owners, parts, strict=True)
    )


def add_layer(
    wrapper: WithInsertedLayer,
    previous: nn.Module,
    layer: nn.Module,
    output: Which = None,
    overwritten: bool = False,
) -> None:
    """Add a layer to a wrapper, right after one of its children or, given itself, at the end."""
    names, layers = list(wrapper._modules), list(wrapper._grown_layers)
    place = len(layers)
    if previous is not wrapper:
        place = next(i for i, name in enumerate(names) if wrapper._modules[name] is previous)
        output = layers[place - 1][1] if place else output  # where that layer found its tensor
    number = str(len(names)) if layers else ""
    name = _free_name(user_module(wrapper), f"inserted{number}")
    layers.insert(place, (name, output, overwritten))
    wrapper._grown_layers = tuple(layers)
    after = {key: wrapper._modules.pop(key) for key in names[place + 1 :]}
    wrapper._modules.update({name: layer, **after})


def _free_name(base: nn.Module, name: str) -> str:
    """The name, with underscores where the user's module has an attribute of that name."""
    taken = () if isinstance(base, WithInsertedLayer) else dir(base)
    while name in taken:
        name += "_"
    return name
