"""The constrained problem: min L(θ, v) subject to v = 0 for every candidate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.blocks import has_joint_factors, pinned_parameters
from constrained_growth.candidates import Candidate
from constrained_growth.errors import BlockError, CandidateError, DataError
from constrained_growth.multipliers import checked_loss
from constrained_growth.observation import (
    Visit,
    batch_size,
    batches,
    call,
    device_of,
    differentiable,
    untouched,
    watching,
)
from constrained_growth.recording import Site
from constrained_growth.solution import Constraint
from constrained_growth.tallies import block_multipliers


class GrowthProblem:
    """A model, a loss, data, and the layers that could be inserted, all pinned to nothing.

        min over θ, v of L(θ, v)   subject to   v_c = 0 for every candidate c

    L is the mean of the loss over all samples of the data, θ the model's parameters, v_c the
    deviation of the pinned parameters of candidate c from the values at which its block is the
    identity. Making a problem runs the model once, on the first batch, and checks everything
    there is to check; it changes nothing.

    Args:
        model: Any `nn.Module`. It is measured in the mode (train or eval) it is in: Dropout and
            BatchNorm then act as they do there, and buffers and random state are put back.
        loss_fn: `loss_fn(output, target)`, a scalar tensor that is the mean over the samples of
            a batch. For a model that returns its own loss, take it from the output:
            `lambda output, target: output.loss`.
        data: An iterable of `(input, target)` that can be iterated more than once: a DataLoader,
            a list of batches. An input may be a tensor, a tuple (spread as arguments) or a dict
            (spread as keyword arguments); its first dimension counts the samples. Batches are
            moved to the model's device.
        candidates: `Candidate`s with unique names; several may share a site.

    Attributes:
        model, loss_fn, data, candidates: As given (the candidates as a tuple).
        constraints: The pins, one `Constraint` for each pinned parameter.

    Raises:
        CandidateError: No candidates, a repeated name, an unknown site, or a site that is not
            reached exactly once, is no floating-point tensor, or does not bear on the loss.
        BlockError: A block does not fit its site, is not the identity on the data, or has
            multipliers that vanish identically.
        DataError: The data is empty, one-shot or malformed, or the loss is not a finite scalar.

    Example:
        >>> import torch
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> problem.constraints[0]
        Constraint(candidate='1', parameter='weight', shape=(4, 4))
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Iterable[Any],
        candidates: Sequence[Candidate],
    ) -> None:
        _check_arguments(model, loss_fn, data)
        self.model = model
        self.loss_fn = loss_fn
        self.data = data
        self.candidates = _checked_candidates(candidates)
        modules = _site_modules(model, self.candidates)
        with untouched(model, data), differentiable():
            self.sites = _probe(model, loss_fn, data, self.candidates, modules)
        self.constraints = tuple(
            Constraint(candidate.name, name, tuple(parameter.shape))
            for candidate in self.candidates
            for name, parameter in pinned_parameters(candidate.block).items()
        )

    def __repr__(self) -> str:
        names = ", ".join(candidate.name for candidate in self.candidates)
        return f"GrowthProblem({type(self.model).__name__}, candidates: {names})"


def _check_arguments(model: object, loss_fn: object, data: object) -> None:
    if not isinstance(model, nn.Module):
        raise CandidateError(f"model={model!r} is not an nn.Module.")
    if not callable(loss_fn):
        raise DataError(
            f"loss_fn={loss_fn!r} cannot be called; give a function (output, target) -> scalar "
            "tensor, such as nn.CrossEntropyLoss()."
        )
    if not isinstance(data, Iterable):
        raise DataError(
            f"data={type(data).__name__} is not iterable; give (input, target) batches, such as a "
            "DataLoader or a list."
        )
    if isinstance(data, Iterator):
        raise DataError(
            f"data={type(data).__name__} is a one-shot iterator; give an iterable that can be "
            "iterated more than once, such as a DataLoader or list(data)."
        )
    if isinstance(data, Tensor | Mapping | str):
        raise DataError(
            f"data={type(data).__name__} is not an iterable of batches; give [(input, target)]."
        )


def _checked_candidates(candidates: object) -> tuple[Candidate, ...]:
    if isinstance(candidates, Candidate):
        raise CandidateError("candidates is a single Candidate; give a list: [candidate].")
    if not isinstance(candidates, Iterable) or isinstance(candidates, str | Mapping):
        raise CandidateError(f"candidates={candidates!r} is not a sequence of cg.Candidate.")
    found = tuple(candidates)
    if not found:
        raise CandidateError("candidates is empty; give some, or cg.find_candidates(model, input).")
    names = set()
    for candidate in found:
        if not isinstance(candidate, Candidate):
            raise CandidateError(f"candidates: {candidate!r} is not a cg.Candidate.")
        if candidate.name in names:
            raise CandidateError(
                f'candidates: the name "{candidate.name}" occurs twice; give candidates that '
                "share a site names of their own: cg.Candidate(after=..., block=..., name=...)."
            )
        names.add(candidate.name)
    return found


def _site_modules(model: nn.Module, candidates: Sequence[Candidate]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for candidate in candidates:
        if candidate.after not in modules or not candidate.after:
            known = ", ".join(name for name in list(modules)[1:13])
            raise CandidateError(
                f'after="{candidate.after}" of candidate "{candidate.name}" is no submodule of '
                f"{type(model).__name__}; its submodules are {known}"
                f"{', …' if len(modules) > 13 else ''}."
            )
        found[candidate.after] = modules[candidate.after]
    return found


def _probe(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    candidates: Sequence[Candidate],
    modules: Mapping[str, nn.Module],
) -> tuple[Site, ...]:
    """Run the first batch and look at every site."""
    first = next(batches(data, device_of(model)), None)
    if first is None:
        raise DataError("data yields no batches; give at least one (input, target) pair.")
    seen: dict[str, Visit] = {}
    xs: dict[str, Tensor] = {}

    def see(name: str, _: object, output: object) -> Tensor | None:
        visit = seen.setdefault(name, Visit())
        visit.count += 1
        visit.output = output
        if visit.count > 1 or not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        # an identity in the graph makes every site a tensor of its own, also for frozen models
        probe = output if output.requires_grad else output.detach().requires_grad_()
        xs[name] = probe.clone()
        visit.output = xs[name].detach().clone()
        visit.version = xs[name]._version
        return xs[name]

    batch_size(*first)
    with watching(modules, see):
        output = call(model, first[0])
    for name in modules:
        _check_visit(name, seen.get(name, Visit()))
    loss = checked_loss(loss_fn(output, first[1]))
    if not bool(torch.isfinite(loss)):
        raise DataError(
            f"loss_fn gives {loss.item()} on the first batch; look for NaN or Inf in the data, the "
            "model's parameters, or the loss."
        )
    written = {name: x._version != seen[name].version for name, x in xs.items()}
    anchors = _anchors(loss, xs)
    sites = []
    for name, module in modules.items():
        x = seen[name].output
        assert isinstance(x, Tensor)
        here = [candidate for candidate in candidates if candidate.after == name]
        blocks = {candidate.name: _fitted(candidate, x, model) for candidate in here}
        pinned = [p for block in blocks.values() for p in pinned_parameters(block).values()]
        sites.append(
            Site(
                after=name,
                module=module,
                blocks=blocks,
                kinds={key: _kind(block, x.shape) for key, block in blocks.items()},
                shape=tuple(x.shape),
                device=x.device,
                bytes=x.nbytes,
                pinned_bytes=sum(parameter.nbytes for parameter in pinned),
                overwritten=written[name],
                anchor=name in anchors,
            )
        )
    return tuple(sites)


def _check_visit(name: str, visit: Visit) -> None:
    output = visit.output
    if visit.count == 0:
        problem = "is never reached in the forward pass"
    elif visit.count > 1:
        problem = f"is reached {visit.count} times in one forward pass, and a site exactly once"
    elif not isinstance(output, Tensor):
        problem = f"returns a {type(output).__name__}, and a site is a tensor"
    elif not output.is_floating_point():
        problem = f"returns a {output.dtype} tensor, and a site carries floating-point numbers"
    elif not bool(torch.isfinite(output).all()):
        raise DataError(
            f'the output of "{name}" holds NaN or Inf on the first batch; look at the data and the '
            "model's parameters."
        )
    else:
        return
    raise CandidateError(f'after="{name}" {problem}; choose another submodule.')


def _anchors(loss: Tensor, xs: Mapping[str, Tensor]) -> set[str]:
    """Sites to ask backward for, so that it passes all the others on its way.

    Raises:
        CandidateError: The loss does not depend on some site.
    """
    passed: set[str] = set()
    handles = [x.register_hook(lambda _, name=name: passed.add(name)) for name, x in xs.items()]
    anchors: set[str] = set()
    for name, x in xs.items():
        if name in passed:
            continue
        grads = (
            torch.autograd.grad(loss, [x], allow_unused=True, retain_graph=True)
            if loss.requires_grad
            else (None,)
        )
        if grads[0] is None:
            raise CandidateError(
                f'after="{name}": the loss does not depend on the output of this module, so no '
                "layer there could change it; choose another submodule."
            )
        anchors.add(name)
    for handle in handles:
        handle.remove()
    return anchors


def _fitted(candidate: Candidate, x: Tensor, model: nn.Module) -> nn.Module:
    """The candidate's block on the site's device and dtype, checked on the data there."""
    block = candidate.block
    pinned_parameters(block)
    shares = not set(block.modules()).isdisjoint(model.modules())  # whose hooks are the site's
    if shares or any(p.device != x.device or p.dtype != x.dtype for p in block.parameters()):
        block = copy.deepcopy(block).to(device=x.device, dtype=x.dtype)
    where = f'block={type(block).__name__} of candidate "{candidate.name}"'
    try:
        with untouched(block), torch.no_grad():
            y = block(x.clone())
    except Exception as error:
        raise BlockError(
            f"{where} fails on the tensor of shape {tuple(x.shape)} at its site: {error}; check "
            "its width."
        ) from error
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise BlockError(
            f"{where} turns the shape {tuple(x.shape)} at its site into {got}; the width must "
            "match."
        )
    moved = (y - x).abs().max().item() if x.numel() else 0.0
    allowed = 1e3 * torch.finfo(x.dtype).eps * max(1.0, x.abs().max().item())
    if not moved <= allowed:
        raise BlockError(
            f"{where} is not the identity at its pins on the data: it moves the tensor at its "
            f"site by up to {moved:.2g}. An identity layer stands right after its own activation; "
            "elsewhere use ResidualMLP(width, hidden, activation)."
        )
    _refuse_dead(block, x, where)
    return block


def _kind(block: nn.Module, shape: torch.Size) -> Hashable:
    """What blocks that can be worked off together have in common, or None."""
    if not has_joint_factors(block):
        return None
    return type(block), shape, block.joint_kind()  # type: ignore[operator]


def _refuse_dead(block: nn.Module, x: Tensor, where: str) -> None:
    """Refuse a block whose multipliers are 0 whatever arrives."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    with untouched(block):
        multipliers = block_multipliers(block, draw(), draw())
    if not any(bool(value.any()) for value in multipliers.values()):
        raise BlockError(
            f"{where} has multipliers that vanish identically (both factors of a product are zero, "
            "or σ′(0) = 0 by autograd's convention): it could never be chosen. Give its free "
            'factor a non-zero value, or use ResidualMLP(width, hidden, activation, "outer").'
        )
