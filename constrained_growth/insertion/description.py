"""How to build a block again, as data that JSON can hold, and the block built from it.

Nothing that a description names is called unless a list here, or `blocks.register`, has it; and
nothing is allocated before its size is known, as blocks are built on the meta device first.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from constrained_growth._activations import TanhLU
from constrained_growth._sites.model import parameter_shapes
from constrained_growth.blocks import CopiedBlock
from constrained_growth.errors import RecordError
from constrained_growth.insertion.settings import first_difference, settings

Shapes = Mapping[str, tuple[int, ...]]


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


def built_block(kind: type[nn.Module], arguments: Mapping[str, Any], shapes: Shapes) -> nn.Module:
    """`kind(**arguments)`, if that has these shapes; without drawing random numbers."""
    if arguments.keys() & {"device", "dtype"}:
        raise RecordError("device and dtype are those of the site, and no arguments")
    with torch.random.fork_rng(devices=[]):
        values = {name: _decoded(value, name) for name, value in arguments.items()}
        with torch.device("meta"):
            found = parameter_shapes(kind(**values))
        if found != dict(shapes):
            raise RecordError(f"the arguments give parameters {found}, and not {dict(shapes)}")
        with torch.device("cpu"):
            return kind(**{name: _decoded(value, name) for name, value in arguments.items()})


def built_copy(
    described: Mapping[str, Any], shapes: Shapes, site: nn.Module, model: nn.Module
) -> CopiedBlock:
    """A copy of the module that the description names; of the site where it names none."""
    of = described.get("of")
    original = site if of is None else dict(model.named_modules()).get(of)
    what, copied = "its site" if of is None else f'"{of}"', described["copied"]
    if original is None or original is model or type(original).__qualname__ != copied:
        here = "nothing" if original is None else f"a {type(original).__qualname__}"
        raise RecordError(f"it is a copy of the {copied} at {what}, and here is {here}")
    own = settings(original)
    differing = first_difference(described.get("settings", own), own)  # not in the first versions
    if differing or parameter_shapes(original) != dict(shapes):
        differing = differing or f"{parameter_shapes(original)} for {dict(shapes)}"
        raise RecordError(
            f"it is a copy of the {copied} at {what}, which is another one here: {differing}"
        )
    return CopiedBlock(original, list(described["arguments"]["pinned"]))


def _encoded(value: Any) -> Any:
    """An argument as data; a TypeError for what cannot be built from data."""
    if isinstance(value, nn.Module):
        kind = type(value)
        if _MODULES.get(kind.__name__) is not kind:
            raise TypeError(f"{kind.__qualname__} is no activation of PyTorch")
        arguments = {name: getattr(value, name) for name in _options(kind) if hasattr(value, name)}
        return {"module": kind.__name__, "arguments": _checked_plain(arguments)}
    if isinstance(value, functools.partial):
        arguments = list(_checked_plain(dict(enumerate(value.args))).values())
        options = _checked_plain(value.keywords)
        return {**_encoded(value.func), "arguments": arguments, "options": options}
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
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, np.generic):
        return _encoded(value.item())
    raise TypeError(f"{value!r:.80} is no plain value, and no activation of PyTorch")


def _decoded(value: Any, name: str = "") -> Any:
    """The argument of that name, from data."""
    if name == "norm_layer" and isinstance(value, str):  # as the first versions wrote it
        value = {"class": value}
    if isinstance(value, list):
        return [_decoded(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"module", "arguments"}:
        kind = _MODULES[value["module"]]
        arguments = _checked_plain(value["arguments"])
        if not arguments.keys() <= set(_options(kind)):
            raise RecordError(f"{kind.__name__} is given {sorted(arguments)}")
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(**arguments).parameters())
        if size > _MOST_IN_ACTIVATION:
            raise RecordError(f"{kind.__name__} is given {arguments}, which makes it too large")
        return kind(**arguments)
    for key, allowed in (("class", _CLASSES), ("function", _FUNCTIONS)):
        if value.keys() == {key}:
            return allowed[value[key]]
        if value.keys() == {key, "arguments", "options"}:
            options = _checked_plain(value["options"])
            if options.keys() & {"device", "dtype"}:
                raise RecordError(f"{value[key]} is given {sorted(options)}")
            _checked_plain(dict(enumerate(value["arguments"])))
            return functools.partial(allowed[value[key]], *value["arguments"], **options)
    if value.keys() == {"tuple"}:
        return tuple(_decoded(one) for one in value["tuple"])
    return {key: _decoded(one) for key, one in value.items()}


def _options(kind: type[nn.Module]) -> list[str]:
    """The arguments of an activation that are recorded."""
    return [name for name in inspect.signature(kind).parameters if name not in ("device", "dtype")]


def _checked_plain(values: Mapping[Any, Any]) -> dict[Any, Any]:
    plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in values.items()}
    for name, value in plain.items():
        if not isinstance(value, bool | int | float | str | None):
            raise TypeError(f"{name}={value!r:.80} is no plain value")
    return plain


_MOST_IN_ACTIVATION = 2**16
"""Parameters of an activation; PReLU has one, or one for each channel."""

_MODULES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
        *(nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU),
        *(nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink),
        *(nn.Threshold, nn.Identity, TanhLU),
    )
}
_CLASSES: dict[str, type[nn.Module]] = _MODULES | {
    kind.__name__: kind
    for kind in (
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.RMSNorm),
    )
}
_FUNCTIONS = {
    f"{home}.{name}": getattr(space, name)
    for home, space, names in (
        (
            "torch",
            torch,
            "abs acos acosh asin asinh atan atanh celu cos cosh erf erfc exp exp2 expm1 hardshrink "
            "log log1p neg relu relu_ rrelu selu sigmoid sign sin sinc sinh sqrt square tan tanh",
        ),
        (
            "torch.nn.functional",
            nn.functional,
            "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish "
            "relu relu6 relu_ rrelu selu sigmoid silu softplus softshrink softsign tanh tanhshrink",
        ),
        ("torch.special", torch.special, "erf erfc exp2 expit expm1 log1p ndtr sinc"),
    )
    for name in names.split()
}
"""Functions of one tensor, which do nothing else than to return another one."""
