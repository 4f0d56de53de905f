"""The settings of a module: all that makes it what it is, but for what a state dict holds."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Set
from enum import Enum
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def settings(
    module: nn.Module, deep: bool = False, inside: tuple[object, ...] = ()
) -> dict[str, str]:
    """Name → value, as text, of the attributes of a module and of those inside it.

    With them are their classes and the shapes of their buffers. Left out is what is None, and what
    only says how a module runs just now. `deep` is for modules of one process that have to be alike
    in everything: it adds tensors, which may be left from the last pass, and the numbers of layers,
    which change as the model grows. `inside` are the objects on the way to the module, so that a
    circle of them ends.
    """
    found: dict[str, str] = {}
    for owner, part in module.named_modules(remove_duplicate=False):
        prefix = f"{owner}." if owner else ""
        found[owner or "class"] = type(part).__qualname__
        for name, buffer in part._buffers.items():
            if buffer is not None:
                lasts = name not in part._non_persistent_buffers_set
                value = _values(buffer) if deep and not lasts else ""
                found[prefix + name] = f"buffer {tuple(buffer.shape)}{value}"
        for name, value in vars(part).items():
            is_setting = name not in _INTERNAL and (deep or name not in _NUMBERS)
            if is_setting and value is not None and (deep or not isinstance(value, Tensor)):
                found[prefix + name] = _text(value, deep, (*inside, module, part))
    return {name: _short(text) for name, text in found.items()}


def first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The first entry in which two settings differ, in words; "" if there is none."""
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name)} and {other.get(name)}"
    return ""


_INTERNAL = frozenset(vars(nn.Module())) | {
    "_is_hf_initialized",  # of Transformers, as are the next two
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
}
_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "layer_num"})
"""By which the layers of Transformers know their place in the cache; insertion renumbers them."""


def _text(value: Any, deep: bool, inside: tuple[object, ...]) -> str:
    """A value as text that is the same in every process."""
    if any(value is one for one in inside):
        return "itself"

    def shown(one: Any) -> str:
        return _text(one, deep, (*inside, value))

    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return shown(value.tolist())
    if isinstance(value, bool | int | float | complex | str | bytes | None | torch.dtype):
        return repr(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{shown(k)}: {shown(v)}' for k, v in value.items())}}}"
    if isinstance(value, Set):
        return f"{{{', '.join(sorted(map(shown, value)))}}}"
    if isinstance(value, list | tuple):
        return f"{'[' if isinstance(value, list) else '('}{', '.join(map(shown, value))}]"
    if isinstance(value, nn.Module):
        return repr(settings(value, deep, inside))
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}{_values(value) if deep else ''}"
    if isinstance(value, functools.partial):
        return f"partial{shown((value.func, value.args, value.keywords))}"
    if isinstance(value, MethodType):
        return shown((value.__func__, value.__self__))
    if isinstance(value, CodeType):
        return shown((value.co_code, value.co_names, value.co_consts))
    name = getattr(value, "__qualname__", None)
    if isinstance(value, FunctionType) and "<" in value.__qualname__:  # a lambda, or a closure
        contents = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{name} {shown((value.__code__, value.__defaults__, contents))}"
    if name is not None:  # another function, or a class
        return f"{value.__module__}.{name}" if deep else name
    kind = type(value).__qualname__
    others = [one for one in inside if not isinstance(one, _OPEN)]
    if others or hasattr(value, "save_pretrained") or not hasattr(value, "__dict__"):
        return kind  # the configs of Transformers change as a model trains, grows and is saved
    return f"{kind} {shown(vars(value))}"


_OPEN = (
    nn.Module,
    Mapping,
    Set,
    list,
    tuple,
    functools.partial,
    FunctionType,
    MethodType,
    CodeType,
)
"""What is described with all that it holds; another object only down to the objects in it."""


def _values(tensor: Tensor) -> str:
    """A digest of the values of a tensor."""
    if tensor.is_meta:
        return ""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f" {hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:32]}"
