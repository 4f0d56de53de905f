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

from constrained_growth._sites.context import takes_context
from constrained_growth._sites.outputs import Which
from constrained_growth.errors import CandidateError


def is_scripting() -> bool:
    """Whether torch.jit.script is at work."""
    # torch.jit.script sets this private flag to False while it runs; there is no public one
    return not vars(torch.jit._script).get("_TOPLEVEL", True)  # type: ignore[attr-defined]


def unreadable() -> None:
    """In the place of an attribute, which no scripted module can read then."""


def _refuse() -> None:
    raise CandidateError(
        "a layer was inserted after this module, and TorchScript can read nothing of it then but "
        "its parameters and constants; use torch.jit.trace or torch.export."
    )


vars(unreadable)["__prepare_scriptable__"] = _refuse  # PyTorch asks it, and shows the error


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

    def returned(module: Any, overload: str = "") -> Any:
        """The type of what a module returns."""
        compiled: Any = _recursive.create_script_module(module, _recursive.infer_methods_to_compile)
        return compiled._c._get_method(f"forward{overload}").schema.returns[0].type

    if base._forward_pre_hooks and any(takes_context(layer) for _, layer, *_ in layers):
        raise CandidateError(
            f"torch.jit.script: hooks on a {type(base).__name__} may change the arguments that an "
            "inserted layer gets too; use torch.jit.trace or torch.export."
        )
    original = getattr(base.forward, "original_method", base.forward)  # of a wrapper inside
    overloads = _get_overloaded_methods(original, type(base)) or ()
    declared = overloads[0] if overloads else original  # the first is the one for tensors
    stub: Any = _recursive.make_stub(declared, "forward")
    kind = returned(base, "__0" if overloads else "")

    signature = inspect.signature(getattr(declared, "__func__", declared))
    this, *others = signature.parameters.values()
    arguments = [f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in others]
    y = "y" + "_" * max(map(len, signature.parameters))  # no name of theirs
    lines = [f"{y} = {this.name}.{base_name}({', '.join(arguments)})"]
    for name, layer, which, overwritten in layers:
        place, parts = _place(base, kind, which, y)
        if which is None and place != y:
            lines.append(f"assert {place}.is_floating_point(), 'a layer after this expects that'")
        rest = arguments[1:] if takes_context(layer) else []
        call = f"{this.name}.{name}({', '.join([place, *rest])})"
        call, _ = _place(layer, returned(layer), None, call)  # a copy may return a tuple
        call += ".clone()" * overwritten
        parts = [call if part == place else part for part in parts]
        lines.append(f"{y} = " + (call if place == y else f"({', '.join(parts)},)"))
    text = f"def forward({', '.join(signature.parameters)}):\n "
    text += "\n ".join([*lines, f"return {y}"])
    context = SourceContext(text, "forward with inserted layers", 1, 0, True, "forward")
    tree: Any = ast.parse(text).body[0]
    written: Any = frontend.build_def(context, tree, None, "forward", "RecursiveScriptModule")
    # the text above has no types; the user's declaration has
    written = torch._C._replace_overloaded_method_decl(stub.def_.decl(), written, "forward")
    return _recursive.ScriptMethodStub(stub.resolution_callback, written, original)


def _place(base: nn.Module, kind: Any, which: Which, y: str) -> tuple[str, list[str]]:
    """The tensor of a site in an output y of this type, and the elements of y, as expressions."""
    if kind.annotation_str == "Tensor" and which is None:
        return y, []
    types = [one.annotation_str for one in kind.containedTypes()]
    i: Any = {None: 0, **{n - len(types): n for n in range(len(types))}}.get(which, which)
    is_tuple = kind.annotation_str.startswith("Tuple[")
    if not is_tuple or dict(enumerate(types)).get(i) != "Tensor":
        raise CandidateError(
            f"torch.jit.script: after a {type(base).__name__}, which returns a "
            f"{kind.annotation_str}, an inserted layer cannot find its tensor in TorchScript, but "
            "only in a tensor or a tuple of tensors. Use torch.jit.trace or torch.export."
        )
    return f"{y}[{i}]", [f"{y}[{n}]" for n in range(len(types))]
