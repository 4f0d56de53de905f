"""What torch.jit.script compiles for a module with inserted layers.

TorchScript has no variable arguments, and no structures but types that it knows. So a `forward` is
written for each module, with the signature of the user's module.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.jit import _script

from constrained_growth._sites.context import takes_context
from constrained_growth._sites.outputs import Which
from constrained_growth.errors import CandidateError

Path = tuple[tuple[int, int], ...]
"""The way to a tensor in nested tuples: in each, which of how many."""


def is_scripting() -> bool:
    """Whether torch.jit.script is at work."""
    return not getattr(_script, "_TOPLEVEL", True)


def scriptable_forward(
    base: Any, base_name: str, layers: Sequence[tuple[str, nn.Module, Which, bool]]
) -> Any:
    """The `forward` of a wrapper, as torch.jit.script takes it.

    Args:
        base: The user's module.
        base_name: Its name in the wrapper.
        layers: Name, layer, site in the output and whether it is overwritten, in their order.
    """
    from torch._jit_internal import _get_overloaded_methods  # private, and only needed here
    from torch._sources import SourceContext
    from torch.jit import _recursive, frontend

    original = getattr(base.forward, "original_method", base.forward)  # of a wrapper inside
    overloads = _get_overloaded_methods(original, type(base)) or ()
    declared = overloads[0] if overloads else original  # the first is the one for tensors
    stub: Any = _recursive.make_stub(declared, "forward")
    compiled: Any = _recursive.create_script_module(base, _recursive.infer_methods_to_compile)._c
    schema = compiled._get_method("forward__0" if overloads else "forward").schema

    signature = inspect.signature(getattr(declared, "__func__", declared))
    this, *others = signature.parameters.values()
    arguments = [f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in others]
    y = "y"
    while y in signature.parameters:
        y += "_"
    lines = [f"{y} = {this.name}.{base_name}({', '.join(arguments)})"]
    for name, layer, which, overwritten in layers:
        rest = "".join(f", {one}" for one in arguments[1:] if takes_context(layer))
        word = "if"
        for path in _paths(base, schema.returns[0].type, which):
            x = y + "".join(f"[{i}]" for i, _ in path)
            call = f"{this.name}.{name}({x}{rest})" + ".clone()" * overwritten
            line = f"{y} = {_rebuilt(y, path, call)}"
            if which is None and path:
                lines += [f"{word} {x}.is_floating_point():", f" {line}"]
                word = "elif"
            else:
                lines.append(line)
        if word == "elif":
            lines += ["else:", " assert False, 'the output has no floating-point tensor'"]
    lines = [f"def forward({', '.join(signature.parameters)}):", *lines, f"return {y}"]
    text = "\n ".join(lines)
    context = SourceContext(text, "forward with inserted layers", 1, 0, True, "forward")
    tree: Any = ast.parse(text).body[0]
    written = frontend.build_def(context, tree, None, "forward", "RecursiveScriptModule")
    written = torch._C._replace_overloaded_method_decl(stub.def_.decl(), written, "forward")  # type: ignore[attr-defined]
    return _recursive.ScriptMethodStub(stub.resolution_callback, written, original)


def _paths(base: nn.Module, kind: Any, which: Which) -> list[Path]:
    """Where the tensor of a site may be in an output of this type: the first floating-point one."""
    found, _ = _tensors(kind)
    if which is not None:
        count = len(kind.elements()) if _is_tuple(kind) else 0
        found = [((i, count),) for i in range(count) if which in (i, i - count)]
    if not found:
        raise CandidateError(
            f"torch.jit.script: after a {type(base).__name__}, whose output is a "
            f"{kind.annotation_str} in TorchScript, an inserted layer cannot find its tensor there;"
            " only a tensor or a plain tuple will do. Use torch.jit.trace or torch.export."
        )
    return found


def _tensors(kind: Any) -> tuple[list[Path], bool]:
    """The tensors in nested tuples, as far as the type tells; and whether it tells all."""
    if kind.annotation_str == "Tensor":
        return [()], True
    found: list[Path] = []
    if not _is_tuple(kind):
        return found, kind.annotation_str in ("int", "float", "bool", "str", "NoneType")
    for i, part in enumerate(kind.elements()):
        inside, told = _tensors(part)
        found += [((i, len(kind.elements())), *path) for path in inside]
        if not told:
            return found, False
    return found, True


def _is_tuple(kind: Any) -> bool:
    return kind.annotation_str.startswith("Tuple[")


def _rebuilt(y: str, path: Path, x: str) -> str:
    """The output with x in it, as an expression."""
    if not path:
        return x
    (here, count), *rest = path
    parts = [f"{y}[{i}]" for i in range(count)]
    parts[here] = _rebuilt(parts[here], tuple(rest), x)
    return f"({', '.join(parts)},)"
