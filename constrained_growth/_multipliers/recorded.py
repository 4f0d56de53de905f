"""The affine maps of a block's pins, found by running it: features φ and cotangents ψ.

A block without a closed form of its own still uses each pinned parameter in some operation. Where
that is one of PyTorch's affine maps (a linear layer, a convolution, the scale and shift of a
normalisation, a product with a scale), its input gives φ, and a probe e = 0 is added to its output:
ψ is the derivative of ⟨block(x), δ⟩ by e. This is seen at the operations, not at the modules, since
attention takes its output projection past the module that holds it.

Most pins are zero. Then the output of their map is zero, and so is its derivative by φ, whatever
the rest of the block: neither is computed. Of a pre-norm transformer block that leaves the forward
pass without its output projections, and nothing of the backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from constrained_growth._multipliers.closed_form import at_pins
from constrained_growth._sites.collector import Use
from constrained_growth.blocks import AffineFactors, pinned_parameters
from constrained_growth.blocks.convolved import patches_of


@dataclass(frozen=True)
class _Map:
    """An operation as an affine map: φ, and what brings the channels of its output to the end."""

    weight: str
    bias: str | None
    features: Tensor
    rows: Callable[[Tensor], Tensor] = lambda y: y
    elementwise: bool = False
    transposed: bool = False
    parameters: tuple[object, ...] = ()  # if it is zero as soon as these are (None: it has none)


def zeros_of(block: nn.Module) -> frozenset[str]:
    """The pins that are zero. It asks for numbers, which makes a GPU wait."""
    return frozenset(n for n, p in pinned_parameters(block).items() if not bool(p.any()))


def recorded_factors(
    block: nn.Module, use: Use, *directions: Tensor, zeros: Collection[str] = ()
) -> tuple[Tensor, list[list[AffineFactors]]] | None:
    """The block's output, and for each direction δ there the factors of its pins.

    None if some pin is used in another way, or in maps of several kinds. The first dimension of φ
    and ψ is that of the operation, which need not count samples. `zeros` are pins known to be zero.
    """
    pins = {name: p.detach() for name, p in pinned_parameters(block).items()}
    recorder = _Recorder(pins, zeros)
    with recorder:
        y = at_pins(block, pins, use.x, use.context)
    kinds = {(one.weight, one.bias, one.elementwise, one.transposed) for one, _ in recorder.maps}
    seen = [name for weight, bias, *_ in kinds for name in (weight, bias) if name is not None]
    if recorder.unknown or sorted(seen) != sorted(pins):
        return None
    probes = [probe for _, probe in recorder.maps]
    found = []
    for place, direction in enumerate(directions, start=1):
        psi: Sequence[Tensor] = [torch.zeros_like(probe) for probe in probes]
        if y.requires_grad:
            psi = torch.autograd.grad(
                y,
                probes,
                direction.to(y.dtype),
                retain_graph=place < len(directions),
                allow_unused=True,
                materialize_grads=True,
            )
        found.append([_factors(one, p) for (one, _), p in zip(recorder.maps, psi, strict=True)])
    return y.detach(), found


def _factors(one: _Map, psi: Tensor) -> AffineFactors:
    return AffineFactors(
        one.weight, one.bias, one.rows(psi), one.features, one.elementwise, one.transposed
    )


class _Recorder(TorchFunctionMode):
    """Sees each operation that takes a pinned parameter."""

    def __init__(self, pins: Mapping[str, Tensor], zeros: Collection[str]) -> None:
        super().__init__()
        self._names = {id(pin): name for name, pin in pins.items()}
        self._zeros = zeros
        self.maps: list[tuple[_Map, Tensor]] = []  # with their probes
        self.unknown = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(self.name(value) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        find = _OPERATIONS.get(func)
        found = None if find is None else find(self.name, func, args, kwargs)
        if found is not None:
            return self._noted(found, func, *args, **kwargs)
        y = func(*args, **kwargs)
        self.unknown |= isinstance(y, Tensor)  # unless it only asked for a shape, say
        return y

    def name(self, value: object) -> str | None:
        """The pin that a value is."""
        return self._names.get(id(value))

    def _noted(self, found: _Map, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the operation, with a probe."""
        if found.parameters and all(p is None or self._is_zero(p) for p in found.parameters):
            y = None
            shape = func(*_without_values(args), **_without_values(kwargs))
        else:
            y = shape = func(*args, **kwargs)
        probe = torch.zeros_like(shape, device=found.features.device).requires_grad_()
        self.maps.append((found, probe))
        # not the probe itself, which nothing may change in place
        return probe.clone() if y is None else y + probe

    def _is_zero(self, parameter: object) -> bool:
        return self.name(parameter) in self._zeros

    def _attention(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """With 1 in the place of the output projection, whose input is φ."""
        given = dict(zip(_ATTENTION, args, strict=False)) | dict(kwargs)
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        others = [value for key, value in given.items() if not key.startswith("out_proj")]
        if self.name(weight) is None or any(self.name(value) for value in others):
            self.unknown = True
            return F.multi_head_attention_forward(**given)
        one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        given |= {"out_proj_weight": one, "out_proj_bias": None}
        features, attention = F.multi_head_attention_forward(**given)
        found = _Map(
            self.name(weight) or "", self.name(bias), features.detach(), parameters=(weight, bias)
        )
        return self._noted(found, F.linear, features, weight, bias), attention


def _without_values(arguments: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to("meta"), arguments)


_ATTENTION = tuple(inspect.signature(F.multi_head_attention_forward).parameters)

Name = Callable[[object], str | None]


def _linear(name: Name, func: Any, args: Any, kwargs: Any) -> _Map | None:
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, bias = given["input"], name(given["weight"]), name(given.get("bias"))
    if weight is not None:
        parameters = given["weight"], given.get("bias")
        return _Map(weight, bias, x.detach(), parameters=parameters)
    return None if bias is None else _shift(bias, func(x, given["weight"]))


def _shift(bias: str, y: Tensor, rows: Callable[[Tensor], Tensor] = lambda y: y) -> _Map:
    """A pinned bias of a weight that is not pinned: a scale of 1."""
    return _Map(bias, None, torch.ones_like(rows(y.detach())), rows, elementwise=True)


def _addmm(name: Name, func: Any, args: Any, kwargs: Any) -> _Map | None:
    if len(args) != 3 or kwargs or name(args[2]) is None:
        return None
    features, parameters = args[1].detach(), (args[2], args[0])
    return _Map(
        name(args[2]) or "", name(args[0]), features, transposed=True, parameters=parameters
    )


def _convolution(name: Name, func: Any, args: Any, kwargs: Any) -> _Map | None:
    keys = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(keys, args, strict=False)) | kwargs
    x, kernel, padding = given["input"].detach(), given["weight"], given.get("padding", 0)
    plain = given.get("groups", 1) == 1 and not isinstance(padding, str)
    if name(kernel) is None or not plain or x.dim() != kernel.dim():
        return None

    def sizes(value: Any, in_front: int) -> tuple[int, ...]:  # a signal is an image of height 1
        every = (value,) * (x.dim() - 2) if isinstance(value, int) else tuple(value)
        return (in_front,) * (4 - x.dim()) + every

    patches = patches_of(
        x.unsqueeze(2) if x.dim() == 3 else x,
        sizes(kernel.shape[2:], 1),
        sizes(given.get("dilation", 1), 1),
        sizes(padding, 0),
        sizes(given.get("stride", 1), 1),
    )
    return _Map(
        name(kernel) or "",
        name(given.get("bias")),
        patches.mT,
        lambda y: y.flatten(2).mT,
        parameters=(kernel, given.get("bias")),
    )


def _normalisation(func: Any, *, channels: int) -> tuple[Any, Any]:
    """γ ⊙ x̂ + β: without γ and β the operation gives x̂, its channels at the end or in place 1."""
    keys = tuple(inspect.signature(func).parameters)

    def found(name: Name, func: Any, args: Any, kwargs: Any) -> _Map | None:
        given = dict(zip(keys, args, strict=False)) | kwargs
        weight, bias = name(given.get("weight")), name(given.get("bias"))
        plain = {key: value for key, value in given.items() if key not in ("weight", "bias")}
        for key in ("running_mean", "running_var"):  # which would be updated twice
            plain[key] = plain[key].clone() if plain.get(key) is not None else None
        normal = func(**{key: value for key, value in plain.items() if key in keys}).detach()
        ends = len(given["normalized_shape"]) if "normalized_shape" in given else 1

        def rows(y: Tensor) -> Tensor:
            return y.movedim(1, -1) if channels == 1 else y.flatten(-ends)

        if weight is not None:
            parameters = given["weight"], given.get("bias")
            return _Map(weight, bias, rows(normal), rows, elementwise=True, parameters=parameters)
        return None if bias is None else _shift(bias, normal, rows)

    return func, found


def _product(name: Name, func: Any, args: Any, kwargs: Any) -> _Map | None:
    """A scale times a tensor, by broadcasting."""
    if len(args) != 2 or kwargs or not all(isinstance(value, Tensor) for value in args):
        return None
    scale, x = args if name(args[0]) is not None else reversed(args)
    own = [d for d in range(-scale.dim(), 0) if scale.shape[d] > 1]
    if name(x) is not None or scale.dim() > x.dim() or any(x.shape[d] == 1 for d in own):
        return None

    def rows(y: Tensor) -> Tensor:
        y = y.movedim(own, [*range(-len(own), 0)])
        return y.flatten(-len(own)) if own else y.unsqueeze(-1)

    features = rows(x.detach())
    return _Map(name(scale) or "", None, features, rows, elementwise=True, parameters=(scale,))


_OPERATIONS: dict[Any, Callable[[Name, Any, Any, Any], _Map | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.conv1d: _convolution,
    F.conv2d: _convolution,
    torch.mul: _product,
    Tensor.mul: _product,
    Tensor.__mul__: _product,
    Tensor.__rmul__: _product,
    **dict(
        [
            _normalisation(F.batch_norm, channels=1),
            _normalisation(F.group_norm, channels=1),
            _normalisation(F.layer_norm, channels=-1),
            _normalisation(F.rms_norm, channels=-1),
        ]
    ),
}
