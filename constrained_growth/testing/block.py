"""Conformance checks for your own block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from constrained_growth._sites.context import Context, takes_context
from constrained_growth._sites.model import parameter_shapes
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.blocks import change, pinned_parameters
from constrained_growth.candidates import Candidate
from constrained_growth.errors import BlockError, RecordError
from constrained_growth.insertion import GrowthRecord, insert, replay
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Decision
from constrained_growth.solve import solve
from constrained_growth.testing.case import Case, by_sample, differ, listed, said, tried


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
            f"x: {shown} is no example of what arrives at a site; give a floating-point tensor of "
            "shape (samples, ...) with at least two samples."
        )
    with untouched(block), differentiable():
        try:
            case = Case(copy.deepcopy(block), x.detach().clone(), Context(args, kwargs))
        except Exception as error:
            raise BlockError(
                f"block={type(block).__name__} cannot be copied ({said(error)}); what is "
                "inserted is a copy, so copy.deepcopy(block) has to work."
            ) from error
        problems = list(tried(_keeps_shape, case))
        if not problems:  # or the others would only fail for the same reason
            problems = [problem for check in _CHECKS for problem in tried(check, case)]
    if problems:
        raise BlockError(
            f"block={type(block).__name__} does not do what is relied on:{listed(problems)}"
        )


def _mode(training: bool) -> str:
    return f"in {'train' if training else 'eval'} mode"


def _keeps_shape(case: Case) -> Iterator[str]:
    """The shape and dtype stay."""
    for training in (True, False):
        y = case.call(case.fresh(training=training))
        got = (tuple(y.shape), y.dtype) if isinstance(y, Tensor) else type(y).__name__
        if got != (tuple(case.x.shape), case.x.dtype):
            yield (
                f"{_mode(training)} it turns {tuple(case.x.shape)}, {case.x.dtype} into {got}; "
                "what it returns has to be a tensor like x."
            )


def _is_the_identity(case: Case) -> Iterator[str]:
    """The identity at the pins."""
    for training in (True, False):
        moved = float(change(case.x, case.call(case.fresh(training=training)).detach()))
        if not moved <= 1:
            yield (
                f"{_mode(training)} it is not the identity at its pins: it moves x by {moved:.2g} "
                "times what rounding may do. The pinned parameters have to be at the values where "
                "it does nothing when the block is made."
            )


def _says_where_it_is_exact(case: Case) -> Iterator[str]:
    """`exact_after` says no more than is true."""
    exact_after = getattr(case.block, "exact_after", None)
    if not callable(exact_after) or exact_after(nn.Identity()) is not True or not case.other_x_fits:
        return
    x = 3 * torch.randn_like(case.x)
    if not float(change(x, case.call(case.fresh(), x).detach())) <= 1:
        yield (
            "exact_after says that it is the identity on all that an nn.Identity gives, and it "
            "moves random numbers; let exact_after return True only for modules after which the "
            "block does nothing, or leave it out."
        )


def _takes_any_number_of_samples(case: Case) -> Iterator[str]:
    """One sample alone."""
    x = case.x[:1]
    if case.other_x_fits and (y := case.call(case.fresh(), x)).shape != x.shape:
        yield f"of one sample alone it makes the shape {tuple(y.shape)}, not {tuple(x.shape)}."


def _leaves_things_alone(case: Case) -> Iterator[str]:
    """A forward pass writes to nothing."""
    for training in (True, False):
        block, x = case.fresh(training=training), case.x.clone()
        before, version = copy.deepcopy(block.state_dict()), x._version
        with torch.no_grad():
            case.call(block, x)
        if x._version != version:
            yield f"{_mode(training)} it changes x in place; write y = x + ..., not x += ..."
        parameters = dict(block.named_parameters())
        written = [
            name
            for name, value in block.state_dict().items()
            if (name in parameters or not training)  # BatchNorm writes to buffers in train mode
            and not torch.allclose(value, before[name], rtol=0, atol=0, equal_nan=True)
        ]
        if written:
            yield f"{_mode(training)} a forward pass changes {tuple(written)}."


def _gives_the_same_twice(case: Case) -> Iterator[str]:
    """The same twice in eval mode."""
    block, delta = case.fresh(), case.cotangent()
    first, second = (case.multipliers(block, delta, seed=seed) for seed in (0, 1))
    for name, value in first.items():
        again = second[name]
        if value is not None and again is not None and not torch.equal(value, again):
            yield (
                f"in eval mode two passes give different multipliers of {name!r}: it draws random "
                "numbers, or keeps something between calls."
            )


def _can_be_loosened(case: Case) -> Iterator[str]:
    """The gradient passes, and no pin is dead."""
    pins = pinned_parameters(case.block)
    if len({id(parameter) for parameter in pins.values()}) < len(case.block.pinned):  # type: ignore[arg-type]
        yield f"pinned={case.block.pinned} names a parameter twice."
    frozen = tuple(name for name, parameter in pins.items() if not parameter.requires_grad)
    if frozen:
        yield f"{frozen} have requires_grad=False, so they would stay at their pins for ever."
    delta = case.cotangent()
    found = [case.multipliers(case.fresh(training=t), delta) for t in (True, False)]
    for name in pins:
        values = [multipliers[name] for multipliers in found]
        if all(value is None for value in values):
            yield f"the pinned parameter {name!r} does not enter the output at all."
        elif not any(value is not None and bool(value.any()) for value in values):
            yield (
                f"the multiplier of {name!r} is exactly 0: it is dead. Either what it is "
                "multiplied with is zero too (pin only one factor of a product), or its derivative "
                "is 0 by autograd's convention, as that of ReLU at 0."
            )
    x = case.x.clone().requires_grad_()
    y = case.call(case.fresh(), x.view_as(x))
    through = y.requires_grad and torch.autograd.grad(y, x, delta, allow_unused=True)[0]
    if not isinstance(through, Tensor) or not bool(through.any()):
        yield "no gradient passes through it: what comes before it in the model could not learn."


def _has_the_factors_it_says(case: Case) -> Iterator[str]:
    """`factors` are the multipliers."""
    if not callable(getattr(case.block, "factors", None)) or takes_context(case.block):
        return
    x, delta = case.x, case.cotangent()
    block: Any = case.fresh()
    with torch.no_grad():
        rows = by_sample(list(block.factors(x, delta)), len(x))
    pins = pinned_parameters(block)
    if rows.keys() != pins.keys():
        yield (
            f"factors(x, delta) gives {tuple(rows)} and the pinned parameters are {tuple(pins)}; "
            "it has to give each of them, and no other."
        )
        return
    whole = case.multipliers(block, delta)
    samples = [replace(case, x=row) for row in x.split(1)]
    singles = [c.multipliers(block, d) for c, d in zip(samples, delta.split(1), strict=True)]
    for name, parameter in pins.items():
        if rows[name].numel() != len(x) * parameter.numel():
            yield f"the factors of {name!r} do not multiply to its shape {tuple(parameter.shape)}."
            continue
        each = rows[name].view(len(x), *parameter.shape)
        values = [single[name] for single in singles]
        expected = [torch.zeros_like(parameter) if v is None else v for v in values]
        if differ(each.sum(0), whole[name]):
            yield f"factors(x, delta) does not give the multiplier of {name!r} that autograd gives."
        elif differ(each, torch.stack(expected)):
            yield (
                f"factors(x, delta) gives the multiplier of {name!r} for all samples together and "
                "not for each: the block mixes samples, or the samples do not come first in the "
                "factors. Without factors it is differentiated as a whole, which is right then."
            )


def _survives(case: Case) -> Iterator[str]:
    """Copied and restored from its state dict, it is the same."""
    original = case.perturbed()
    y = case.call(original)
    copied = copy.deepcopy(original)
    memory = {p.data_ptr() for p in original.parameters() if p.numel()}
    shared = memory & {p.data_ptr() for p in copied.parameters()}
    if shared or not torch.equal(case.call(copied), y):
        yield "copy.deepcopy(block) shares parameters with the block, or computes something else."
    restored = case.fresh()
    restored.load_state_dict(original.state_dict())
    if not torch.equal(case.call(restored), y):
        yield (
            "with its state dict loaded into a copy it computes something else: what it computes "
            "with has to be a parameter or a persistent buffer."
        )
    for name, module in case.block.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield (
                    f"the tensor {f'{name}.{key}'.lstrip('.')!r} is neither a parameter nor a "
                    "buffer, so .to(device) and state_dict() pass it by; use nn.Parameter or "
                    "register_buffer."
                )


def _can_be_pickled(case: Case) -> Iterator[str]:
    """Pickled and read again (torch.save of a model does that), it is the same."""
    original = case.perturbed()
    again = pickle.loads(pickle.dumps(original))
    if not torch.equal(case.call(again), case.call(original)):
        yield "pickled and read again it computes something else."


def _can_be_built_from_its_config(case: Case) -> Iterator[str]:
    """`type(block)(**block.config())` is the same architecture."""
    config = getattr(case.block, "config", None)
    if not callable(config):
        return
    built = type(case.block)(**config())  # type: ignore[arg-type]
    found, expected = parameter_shapes(built), parameter_shapes(case.block)
    if found != expected:
        yield f"config() builds parameters {found} and the block has {expected}."
    elif tuple(built.pinned) != tuple(case.block.pinned):  # type: ignore[arg-type]
        yield f"config() builds a block with pinned={built.pinned}, not {case.block.pinned}."


def _can_be_moved(case: Case) -> Iterator[str]:
    """Moved to another precision or device, it is the identity there."""
    other = torch.float32 if case.x.dtype == torch.float64 else torch.float64
    coarser = torch.float32 if other == torch.float32 else case.x.dtype
    targets: list[Any] = [other, *(["cuda"] if torch.cuda.is_available() else [])]
    for target in targets:

        def moved(value: Tensor, target: Any = target) -> Tensor:
            keeps = isinstance(target, torch.dtype) and not value.is_floating_point()
            return value if keeps else value.to(target)

        context = (case.context.args, dict(case.context.kwargs))
        x, (args, kwargs) = moved(case.x), tree_map_only(Tensor, moved, context)
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

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.site = _Site(case.x)
        self._context = case.context

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x, *self._context.args, **self._context.kwargs)


def _works_in_a_model(case: Case) -> Iterator[str]:
    """`solve`, `insert` and `replay`."""
    model, delta = _Host(case).eval(), case.cotangent()
    problem = GrowthProblem(
        model,
        lambda output, target: (output * target).sum(),
        [(case.x, delta)],
        [Candidate("site", case.fresh(), name="block")],
    )
    solution = solve(problem, lambda _: Decision(("block",)), stationarity=False)
    expected = case.multipliers(case.fresh(), delta)
    for name, value in solution.multipliers["block"].items():
        if differ(value, expected[name]):
            yield f"in a model solve gives another multiplier of {name!r} than autograd."
    record = GrowthRecord.from_json(insert(model, solution).to_json())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
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
    _says_where_it_is_exact,
    _takes_any_number_of_samples,
    _leaves_things_alone,
    _gives_the_same_twice,
    _can_be_loosened,
    _has_the_factors_it_says,
    _survives,
    _can_be_pickled,
    _can_be_built_from_its_config,
    _can_be_moved,
    _works_in_a_model,
)
