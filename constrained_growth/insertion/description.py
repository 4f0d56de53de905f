"""How to build a block again, as data that JSON can hold, and the block built from it.

Nothing that a description names is called unless a list here, or `blocks.register`, has it; and
nothing is allocated before its size is known, as blocks are built on the meta device first.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Set
from enum import Enum
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from constrained_growth._activations import TanhLU
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.blocks import CopiedBlock
from constrained_growth.errors import RecordError


def described_block(block: nn.Module, site: nn.Module, model: nn.Module) -> dict[str, Any]:
    """How to rebuild a block that is about to be inserted after a site of the model.

    Its `arguments` are None where it cannot be rebuilt exactly, and `reason` says why.
    """
    kind = type(block)
    try:
        if isinstance(block, CopiedBlock):
            return _described_copy(block, site, model)
        if not callable(getattr(block, "config", None)):
            raise TypeError("its class has no method config()")
        if any(m._forward_hooks or m._forward_pre_hooks for m in block.modules()):
            raise TypeError("it has hooks")
        arguments = {name: _encoded(value) for name, value in block.config().items()}  # type: ignore[operator]
        like = next(block.parameters())
        # tried here, where the block is: a record that cannot be replayed is found out too late
        rebuilt = built_block(kind, arguments, parameter_shapes(block)).to(like.device, like.dtype)
        differing = first_difference(settings(block, deep=True), settings(rebuilt, deep=True))
        if differing:
            raise TypeError(f"config() builds another one: {differing}")
    except Exception as error:
        return {"type": kind.__qualname__, "arguments": None, "reason": str(error)[:200]}
    return {"type": kind.__qualname__, "arguments": arguments}


def _described_copy(block: CopiedBlock, site: nn.Module, model: nn.Module) -> dict[str, Any]:
    """The copied class, `of` which module, its pins and settings."""
    copied = block.module
    shapes, names = parameter_shapes(copied), {m: name for name, m in model.named_modules()}

    def is_alike(module: nn.Module, deep: bool) -> bool:
        """Whether a copy of it is the same; `deep` where it need not be what was copied."""
        return (
            type(module) is type(copied)
            and parameter_shapes(module) == shapes
            and not first_difference(settings(copied, deep), settings(module, deep))
        )

    # what was copied itself, if it is still what it was; two layers may look alike and differ
    original = block.original.module
    if original is None or original not in names or not is_alike(original, deep=False):
        original = next((m for m in (site, *names) if is_alike(m, deep=True)), None)
    if original is None:
        raise TypeError("no module of the model is what was copied, or exactly like it")
    pinned = [name.removeprefix("module.") for name in block.pinned]
    return {
        "type": CopiedBlock.__qualname__,
        "copied": type(copied).__qualname__,
        "of": names[original],
        "arguments": {"pinned": pinned},
        "settings": settings(copied),
    }


def built_block(
    kind: type[nn.Module], arguments: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> nn.Module:
    """`kind(**arguments)`, if that has these shapes; without drawing random numbers."""
    if arguments.keys() & _NO_ARGUMENTS:
        raise RecordError("device and dtype are those of the site, and no arguments")

    def build(device: str) -> nn.Module:
        with torch.device("cpu"):  # on which blocks try their activations
            decoded = {name: _decoded(value, name) for name, value in arguments.items()}
        with torch.device(device):
            return kind(**decoded)

    with torch.random.fork_rng(devices=[]):
        found = parameter_shapes(build("meta"))
        if found != dict(shapes):
            raise RecordError(f"the arguments give parameters {found}, and not {dict(shapes)}")
        return build("cpu")


def built_copy(described: Mapping[str, Any], site: nn.Module, model: nn.Module) -> CopiedBlock:
    """A copy of the module that the description names; of the site where it names none."""
    of, copied = described.get("of"), described["copied"]
    original = site if of is None else dict(model.named_modules()).get(of)
    what = f"it is a copy of the {copied} at " + ("its site" if of is None else f'"{of}"')
    if original is None or original is model or type(original).__qualname__ != copied:
        here = "nothing" if original is None else f"a {type(original).__qualname__}"
        raise RecordError(f"{what}, and here is {here}")
    own = settings(original)
    differing = first_difference(described.get("settings", own), own)  # not in the first versions
    if differing:
        raise RecordError(f"{what}, which is another one here: {differing}")
    return CopiedBlock(original, list(described["arguments"]["pinned"]))


def _encoded(value: Any) -> Any:
    """An argument as data; a TypeError for what cannot be built from data."""
    if isinstance(value, nn.Module):
        kind = type(value)
        if _MODULES.get(kind.__name__) is not kind:
            raise TypeError(f"{kind.__qualname__} is no activation of PyTorch")
        names = [n for n in inspect.signature(kind).parameters if n not in _NO_ARGUMENTS]
        arguments = {name: getattr(value, name) for name in names if hasattr(value, name)}
        return {"module": kind.__name__, "arguments": _plain(arguments)}
    if isinstance(value, functools.partial):
        arguments = list(_plain(dict(enumerate(value.args))).values())
        return {**_encoded(value.func), "arguments": arguments, "options": _plain(value.keywords)}
    if isinstance(value, type) and _CLASSES.get(value.__name__) is value:
        return {"class": value.__name__}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(one) for one in value]}
    if isinstance(value, list):
        return [_encoded(one) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _encoded(one) for key, one in value.items()}
    name = next((name for name, one in _FUNCTIONS.items() if one is value), None)
    if name is not None:
        return {"function": name}
    return _plain({"an argument": value})["an argument"]


def _decoded(value: Any, name: str = "") -> Any:
    """The argument of that name, from data."""
    if name == "norm_layer" and isinstance(value, str):  # as the first versions wrote it
        return _CLASSES[value]
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"module", "arguments"}:
        kind, arguments = _MODULES[value["module"]], _plain(value["arguments"])
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(**arguments).parameters())
        if size > _MOST_IN_ACTIVATION:
            raise RecordError(f"{kind.__name__} is given {arguments}, which makes it too large")
        return kind(**arguments)
    for key, allowed in (("class", _CLASSES), ("function", _FUNCTIONS)):
        if value.keys() == {key}:
            return allowed[value[key]]
        if value.keys() == {key, "arguments", "options"}:
            arguments = _plain(dict(enumerate(value["arguments"]))).values()
            return functools.partial(allowed[value[key]], *arguments, **_plain(value["options"]))
    if value.keys() == {"tuple"}:
        return tuple(_decoded(one) for one in value["tuple"])
    return {key: _decoded(one) for key, one in value.items()}


def _plain(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """The arguments of an activation or a class, if they are numbers, text, True, False or None."""
    plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in values.items()}
    for name, value in plain.items():
        if name in _NO_ARGUMENTS or not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"{name}={value!r:.80} is no plain value, and no activation of PyTorch")
    return plain


_NO_ARGUMENTS = {"device", "dtype"}
_MOST_IN_ACTIVATION = 2**16
"""Parameters of an activation; PReLU has one, or one for each channel."""

_ACTIVATIONS = (
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish "
    "PReLU ReLU ReLU6 RReLU SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink "
    "Threshold"
)
_NORMALIZATIONS = (
    "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm GroupNorm "
    "InstanceNorm1d InstanceNorm2d InstanceNorm3d LayerNorm RMSNorm"
)
_MODULES: dict[str, type[nn.Module]] = {
    "TanhLU": TanhLU,
    **{name: getattr(nn, name) for name in _ACTIVATIONS.split()},
}
_CLASSES = {**_MODULES, **{name: getattr(nn, name) for name in _NORMALIZATIONS.split()}}
_FUNCTIONS = {
    f"{space.__name__}.{name}": getattr(space, name)
    for space, names in {
        torch: "abs acos acosh asin asinh atan atanh celu cos cosh erf erfc exp exp2 expm1 "
        "hardshrink log log1p neg relu relu_ rrelu selu sigmoid sign sin sinc sinh sqrt square "
        "tan tanh",
        nn.functional: "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu "
        "logsigmoid mish relu relu6 relu_ rrelu selu sigmoid silu softplus softshrink softsign "
        "tanh tanhshrink",
        torch.special: "erf erfc exp2 expit expm1 log1p ndtr sinc",
    }.items()
    for name in names.split()
}
"""Functions of one tensor, which do nothing else than to return another one."""


def settings(
    module: nn.Module, deep: bool = False, inside: tuple[object, ...] = ()
) -> dict[str, str]:
    """Name → value, as text, of what makes a module, but for parameters and how it runs just now.

    `deep` is for modules of one process that have to be alike in everything: it adds tensors, which
    may be left from the last pass, and the numbers of layers, which change as the model grows.
    `inside` are the objects on the way to the module, so that a circle of them ends.
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
            is_setting = name not in INTERNAL and (deep or name not in LAYER_NUMBERS)
            if is_setting and value is not None and (deep or not isinstance(value, Tensor)):
                found[prefix + name] = _text(value, deep, (*inside, module, part))
    return {name: _short(text) for name, text in found.items()}


def first_difference(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """The first entry in which two tables differ, in words; "" if there is none."""
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return f"{name} is {one.get(name)} and {other.get(name)}"
    return ""


INTERNAL = frozenset(vars(nn.Module())) | {
    "_is_hf_initialized",  # of Transformers, as are the others
    *("gradient_checkpointing", "_gradient_checkpointing_func"),
}
LAYER_NUMBERS = frozenset({"layer_idx", "layer_id", "layer_number", "layer_index", "layer_num"})
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
    if isinstance(value, Set):  # whose order differs from process to process
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


_CALLABLES = (functools.partial, FunctionType, MethodType, CodeType)
_OPEN = (nn.Module, Mapping, Set, list, tuple, *_CALLABLES)
"""What is described with all that it holds; another object only down to the objects in it."""


def _values(tensor: Tensor) -> str:
    """A digest of the values of a tensor."""
    if tensor.is_meta:
        return ""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f" {hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16]}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:32]}"
