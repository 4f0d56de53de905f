"""Conformance checks for your own block."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from constrained_growth._multipliers.closed_form import differentiated
from constrained_growth._random_state import seed as set_seed
from constrained_growth._sites.collector import Use
from constrained_growth._sites.context import Context, arguments, takes_context
from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth._solve import solve
from constrained_growth.blocks import has_factors, pinned_parameters
from constrained_growth.blocks.protocol import change
from constrained_growth.candidates import Candidate
from constrained_growth.errors import BlockError, RecordError
from constrained_growth.insertion import GrowthRecord, insert, replay
from constrained_growth.insertion.description import first_difference, settings
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Decision

T = TypeVar("T")

_MODES = ("train", "eval")


def check_block(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Check everything that the library relies on in a block, on an example input of its site.

    The block names its pins, and is the identity there in train and eval mode, for any number of
    samples, without writing to x, to its parameters or, in eval mode, to its buffers. Gradients
    pass, no pin is dead, and in eval mode two passes agree. Its `factors`, where it has them, are
    the gradients of the whole batch and of every single sample. It can be copied, pickled,
    restored from its state dict, built again from its `config()` where it has one, and moved to
    other precisions and devices. In a model, `solve` gives the λ that autograd gives, `insert`
    keeps the function, and the record can be replayed.

    Args:
        block: The block, with its pins at the values where it does nothing. It is left as it is.
        x: What arrives at a site, shape (samples, ...) with at least two samples, on the block's
            device and in its precision. For a block that is the identity only on certain values
            (after a ReLU, say) an example of these, for any other random numbers.
        *args: What else the module at the site is called with, for a block that
            `takes_context`.
        **kwargs: The same, by name.

    Raises:
        BlockError: Lists everything that is wrong with the block, and what to do about it.

    Example:
        >>> import torch
        >>> from constrained_growth.blocks import ResidualMLP
        >>> check_block(ResidualMLP(4, 8, nn.GELU()), torch.randn(5, 4))
    """
    pinned_parameters(block)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) < 2:
        shown = f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else repr(x)
        raise BlockError(
            f"x: {shown} is no floating-point tensor (samples, ...) with at least two samples."
        )
    name = f"block={type(block).__name__}"
    with untouched(block), differentiable():
        try:
            set_seed(0)
            x, delta = x.detach().clone(), torch.randn_like(x)
            case = _Case(copy.deepcopy(block), x, delta, Context(args, kwargs))
        except Exception as error:
            raise BlockError(f"{name} cannot be copied by copy.deepcopy: {error}.") from error
        problems = list(tried(_keeps_shape, case))
        if not problems:  # or the others would only fail for the same reason
            problems = [problem for check in _CHECKS for problem in tried(check, case)]
    if problems:
        raise BlockError(f"{name} does not do what is relied on:{listed(problems)}")


@dataclass(frozen=True)
class _Case:
    """A block to try on x and δ = ∂L/∂x, with what else the module at its site is called with."""

    block: nn.Module
    x: Tensor
    delta: Tensor
    context: Context

    def fresh(self, mode: str = "eval") -> nn.Module:
        """A copy of the block in a mode, with differentiable pins."""
        copied = copy.deepcopy(self.block).train(mode == "train")
        for parameter in pinned_parameters(copied).values():
            parameter.requires_grad_()
        return copied

    def call(self, block: nn.Module, x: Tensor | None = None) -> Tensor:
        args, kwargs = arguments(block, self.x if x is None else x, self.context)
        set_seed(0)
        return block(*args, **kwargs)

    def multipliers(self, block: nn.Module, seed: int = 0) -> dict[str, Tensor]:
        """−∂⟨δ, block(x)⟩ by autograd."""
        set_seed(seed)
        return differentiated(block, Use(self.x, self.delta, self.context), [self.delta])[1][0]


@torch.no_grad()
def _perturb(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))


def _keeps_shape(case: _Case) -> Iterator[str]:
    """The shape and dtype stay."""
    for mode in _MODES:
        y = case.call(case.fresh(mode))
        got = (tuple(y.shape), y.dtype) if isinstance(y, Tensor) else type(y).__name__
        if got != (tuple(case.x.shape), case.x.dtype):
            yield f"in {mode} mode it turns {tuple(case.x.shape)}, {case.x.dtype} into {got}."


def _is_the_identity(case: _Case) -> Iterator[str]:
    """The identity at the pins, for one sample alone too, and where `exact_after` says so."""
    for mode in _MODES:
        moved = float(change(case.x, case.call(case.fresh(mode)).detach()))
        if not moved <= 1:
            yield (
                f"in {mode} mode it is not the identity at its pins: it moves x by {moved:.2g} "
                "times what rounding may do. A new block has to do nothing."
            )
    if takes_context(case.block) and (case.context.args or case.context.kwargs):
        return  # the context may fit no other x
    x = case.x[:1]
    if (y := case.call(case.fresh(), x)).shape != x.shape:
        yield f"of one sample alone it makes the shape {tuple(y.shape)}, not {tuple(x.shape)}."
    exact_after = getattr(case.block, "exact_after", None)
    if callable(exact_after) and exact_after(nn.Identity()) is True:
        x = 3 * torch.randn_like(case.x)
        if not change(x, case.call(case.fresh(), x).detach()) <= 1:
            yield (
                "exact_after says that it is the identity after an nn.Identity, and it moves "
                "random numbers; return True only for modules after which the block does nothing."
            )


def _leaves_things_alone(case: _Case) -> Iterator[str]:
    """A forward pass writes to nothing."""
    for mode in _MODES:
        block, x = case.fresh(mode), case.x.clone()
        before, version = copy.deepcopy(block.state_dict()), x._version
        with torch.no_grad():
            case.call(block, x)
        if x._version != version:
            yield f"in {mode} mode it changes x in place; write y = x + ..., not x += ..."
        # BatchNorm writes to buffers in train mode
        watched = dict(block.named_parameters()) if mode == "train" else before
        after = block.state_dict()
        written = tuple(
            n for n in watched if not after[n].allclose(before[n], 0, 0, equal_nan=True)
        )
        if written:
            yield f"in {mode} mode a forward pass changes {written}."


def _gives_the_same_twice(case: _Case) -> Iterator[str]:
    """The same twice in eval mode."""
    block = case.fresh()
    first, second = case.multipliers(block, 0), case.multipliers(block, 1)
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            yield f"in eval mode two passes give different multipliers of {name!r}: is it random?"


def _can_be_loosened(case: _Case) -> Iterator[str]:
    """The gradient passes, and no pin is dead."""
    pins = pinned_parameters(case.block)
    if len({id(parameter) for parameter in pins.values()}) < len(case.block.pinned):  # type: ignore[arg-type]
        yield f"pinned={case.block.pinned} names a parameter twice."
    frozen = tuple(name for name, parameter in pins.items() if not parameter.requires_grad)
    if frozen:
        yield f"{frozen} have requires_grad=False, so they would stay at their pins for ever."
    found = [case.multipliers(case.fresh(mode)) for mode in _MODES]
    for name in pins:
        if not any(multipliers[name].any() for multipliers in found):
            yield (
                f"the multiplier of {name!r} is exactly 0: it is dead. It does not enter the "
                "output, or what it is multiplied with is zero too (pin only one factor of a "
                "product), or its derivative is 0 by autograd's convention, as that of ReLU at 0."
            )
    x = case.x.clone().requires_grad_()
    y = case.call(case.fresh(), x.view_as(x))
    through = y.requires_grad and torch.autograd.grad(y, x, case.delta, allow_unused=True)[0]
    if not isinstance(through, Tensor) or not bool(through.any()):
        yield "no gradient passes through it: what comes before it in the model could not learn."


def _has_the_factors_it_says(case: _Case) -> Iterator[str]:
    """`factors` are the multipliers."""
    if not has_factors(case.block):
        return
    block: Any = case.fresh()
    parts: dict[str, list[Tensor]] = {}  # λ_n of the samples, which may come a few at a time
    with torch.no_grad():
        for f in block.factors(case.x, case.delta):
            shape = "nio" if f.transposed else "noi"
            formula = "n...o,n...o->no" if f.elementwise else f"n...o,n...i->{shape}"
            rows = -torch.einsum(formula, f.cotangent, f.features)
            parts.setdefault(f.weight, []).append(rows)
            if f.bias is not None:
                parts.setdefault(f.bias, []).append(-torch.einsum("n...o->no", f.cotangent))
    pins = pinned_parameters(block)
    if parts.keys() != pins.keys():
        yield f"factors(x, delta) gives {tuple(parts)}, and the pins are {tuple(pins)}."
        return
    pairs = zip(case.x.split(1), case.delta.split(1), strict=True)
    singles = [replace(case, x=x, delta=delta).multipliers(block) for x, delta in pairs]
    whole = case.multipliers(block)
    for name, parameter in pins.items():
        each = torch.cat(parts[name])
        if len(each) != len(case.x):
            yield f"the factors of {name!r} are of {len(each)} samples, and x has {len(case.x)}."
            continue
        if each[0].numel() != parameter.numel():
            yield f"the factors of {name!r} do not multiply to its shape {tuple(parameter.shape)}."
            continue
        each = each.view(len(each), *parameter.shape)
        if _differ(each.sum(0), whole[name]):
            yield f"factors(x, delta) does not give the multiplier of {name!r} that autograd gives."
        elif _differ(each, torch.stack([single[name] for single in singles])):
            yield (
                f"factors(x, delta) gives the multiplier of {name!r} for all samples and not for "
                "each. If the block mixes samples, leave out factors; else put the samples first."
            )


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Whether they differ by more than rounding may do."""
    tolerance = 1e4 * torch.finfo(expected.dtype).eps * (float(expected.abs().max()) or 1.0)
    return not float((found.to(expected) - expected).abs().max()) <= tolerance


def _survives(case: _Case) -> Iterator[str]:
    """Copied, restored from its state dict, and pickled (as by torch.save), it is the same."""
    original = case.fresh()
    _perturb(original)
    y = case.call(original)
    copied = copy.deepcopy(original)
    memory = {p.data_ptr() for p in original.parameters() if p.numel()}
    shared = memory & {p.data_ptr() for p in copied.parameters()}
    if shared or not torch.equal(case.call(copied), y):
        yield "copy.deepcopy(block) shares parameters with the block, or computes something else."
    restored = case.fresh()
    restored.load_state_dict(original.state_dict())
    if not torch.equal(case.call(restored), y):
        yield "with its state dict loaded into a copy it differs; make its buffers persistent."
    for name, module in case.block.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield (
                    f"the tensor {f'{name}.{key}'.lstrip('.')!r} is neither a parameter nor a "
                    "buffer, so .to(device) and state_dict() pass it by."
                )
    if not torch.equal(case.call(pickle.loads(pickle.dumps(original))), y):
        yield "pickled and read again it computes something else."


def _can_be_built_from_its_config(case: _Case) -> Iterator[str]:
    """`type(block)(**block.config())` is the same architecture."""
    block: Any = case.block
    if not callable(getattr(block, "config", None)):
        return
    built = type(block)(**block.config())
    found, expected = parameter_shapes(built), parameter_shapes(block)
    if found != expected:
        yield f"config() builds parameters {found} and the block has {expected}."
    elif tuple(built.pinned) != tuple(block.pinned):
        yield f"config() builds a block with pinned={built.pinned}, not {block.pinned}."
    else:
        like = next(block.parameters())
        built = built.to(like.device, like.dtype).train(block.training)
        differing = first_difference(settings(block, deep=True), settings(built, deep=True))
        if differing:
            yield f"config() builds another block: {differing}."


def _can_be_moved(case: _Case) -> Iterator[str]:
    """Moved to another precision or device, it is the identity there."""
    other = torch.float32 if case.x.dtype == torch.float64 else torch.float64
    coarser = torch.float32 if other == torch.float32 else case.x.dtype
    for target in [other, *(["cuda"] if torch.cuda.is_available() else [])]:

        def moved(value: Tensor, target: Any = target) -> Tensor:
            keeps = isinstance(target, torch.dtype) and not value.is_floating_point()
            return value if keeps else value.to(target)

        everything = (case.x, case.context.args, dict(case.context.kwargs))
        x, args, kwargs = tree_map_only(Tensor, moved, everything)
        there = replace(case, x=x, context=Context(args, kwargs))
        y = there.call(case.fresh().to(target))
        if y.dtype != x.dtype or y.device != x.device:
            yield f"moved by .to({target}) it gives {y.dtype} on {y.device}, from {x.dtype}."
        elif not float(change(x.to(coarser), y.detach().to(coarser))) <= 1:
            yield f"moved by .to({target}) it is no longer the identity at its pins."


class _Site(nn.Module):
    """x times a parameter that is 1, whatever else it is called with."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(like.new_ones(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x * self.scale


class _Host(nn.Module):
    """A model with one site, which it calls with the context of the case."""

    def __init__(self, case: _Case) -> None:
        super().__init__()
        self.site, self._context = _Site(case.x), case.context

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x, *self._context.args, **self._context.kwargs)


def _works_in_a_model(case: _Case) -> Iterator[str]:
    """`solve`, `insert` and `replay`."""
    model = _Host(case).eval()
    with warnings.catch_warnings():  # a BatchNorm in the block has seen no data
        warnings.simplefilter("ignore", UserWarning)
        problem = GrowthProblem(
            model,
            lambda output, target: (output * target).sum(),
            [(case.x, case.delta)],
            [Candidate("site", case.fresh(), name="block")],
        )
    solution = solve(problem, lambda _: Decision(("block",)), stationarity=False)
    expected = case.multipliers(case.fresh())
    for name, value in solution.multipliers["block"].items():
        if _differ(value, expected[name]):
            yield f"in a model solve gives another multiplier of {name!r} than autograd."
    record = GrowthRecord.from_json(insert(model, solution).to_json())
    _perturb(model)
    again = _Host(case).eval()
    try:
        replay(again, record)
    except RecordError:  # a record cannot build a user's own block: it has to be given
        replay(again, record, blocks={"block": case.fresh()})
    again.load_state_dict(model.state_dict())
    if not torch.equal(again(case.x), model(case.x)):
        yield "a model replayed from the record, with the state dict loaded, is not the same."


_CHECKS = (
    _is_the_identity,
    _leaves_things_alone,
    _gives_the_same_twice,
    _can_be_loosened,
    _has_the_factors_it_says,
    _survives,
    _can_be_built_from_its_config,
    _can_be_moved,
    _works_in_a_model,
)


def tried(
    check: Callable[[T], Iterator[str]],
    case: T,
    shown: str = "",
    clear: tuple[type[Exception], ...] = (),
) -> Iterator[str]:
    """What a check finds; an error inside it is a finding too, a clear one in its own words."""
    try:
        yield from check(case)
    except clear as error:
        yield str(error)
    except Exception as error:
        what = (check.__doc__ or "").rstrip(".")
        yield f"it fails where this is tried: {what}{shown} ({type(error).__name__}: {error})."


def listed(problems: Collection[str]) -> str:
    """One line each, without repetitions."""
    return "".join(f"\n  * {problem}" for problem in dict.fromkeys(problems))
