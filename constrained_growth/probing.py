"""A look at the sites of a model: what is there on the first batch, and which blocks fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from constrained_growth.blocks import has_joint_factors, moves, pinned_parameters
from constrained_growth.candidates import Candidate
from constrained_growth.distributed import everywhere, several, take_from_first
from constrained_growth.errors import BlockError, CandidateError, DataError
from constrained_growth.multipliers import checked_loss
from constrained_growth.observation import (
    Visit,
    batch_size,
    batches,
    call,
    device_of,
    full_precision,
    tensors_of,
    untouched,
    watching,
)
from constrained_growth.recording import Site
from constrained_growth.tallies import block_multipliers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class _Facts:
    """What a site is like, for the processes that cannot see for themselves.

    Attributes:
        shape, bytes: Of the tensor there on the first batch.
        dtype: What a block there has to be in.
        overwritten, anchor: As in `Site`.
    """

    shape: tuple[int, ...]
    bytes: int
    dtype: torch.dtype
    overwritten: bool
    anchor: bool


def look_at_sites(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    candidates: Sequence[Candidate],
    modules: Mapping[str, nn.Module],
    group: ProcessGroup | None,
) -> tuple[tuple[Site, ...], object]:
    """The sites, the same on all processes, with the blocks that fit there; and the first input.

    Args:
        model: Run once on the first batch, with gradients on (`differentiable`).
        loss_fn: `loss_fn(output, target)`.
        data: `(input, target)` pairs; on some processes there may be none.
        candidates: What could stand at the sites.
        modules: Qualified name → module, of the sites.
        group: The processes that have a shard of the data each.

    Raises:
        DataError, CandidateError, BlockError: As `GrowthProblem` says.
    """
    xs: dict[str, Tensor] = {}
    examples: list[object] = []

    def look() -> tuple[object, dict[str, _Facts] | None]:
        layout = [_layout(candidate) for candidate in candidates]
        first = next(batches(data, device_of(model)), None)
        if first is None:
            return layout, None
        examples.append(first[0])
        seen, facts = _probe(model, loss_fn, first, modules)
        xs.update(seen)
        return layout, facts

    found = everywhere(look, group)
    if any(layout != found[0][0] for layout, _ in found):
        raise CandidateError(
            f"candidates={[candidate.name for candidate in candidates]} are not the same on all "
            "processes of the group; give each the same candidates in the same order."
        )
    facts = next((facts for _, facts in found if facts is not None), None)
    if facts is None:
        raise DataError("data yields no batches; give at least one (input, target) pair.")
    devices = {name: _site_device(module, model, xs.get(name)) for name, module in modules.items()}
    blocks = {
        c.name: _brought(c, devices[c.after], facts[c.after].dtype, model) for c in candidates
    }
    if several(group):
        blocks = {name: copy.deepcopy(block) for name, block in blocks.items()}
        take_from_first([t.detach() for b in blocks.values() for t in tensors_of(b)], group)

    def check() -> None:
        for candidate in candidates:
            if candidate.after in xs:
                _check_fit(candidate.name, blocks[candidate.name], xs[candidate.after])

    everywhere(check, group)
    sites = tuple(
        _site(
            name,
            module,
            facts[name],
            devices[name],
            {
                candidate.name: blocks[candidate.name]
                for candidate in candidates
                if candidate.after == name
            },
        )
        for name, module in modules.items()
    )
    return sites, next(iter(examples), None)


def _site(
    name: str,
    module: nn.Module,
    facts: _Facts,
    device: torch.device,
    blocks: Mapping[str, nn.Module],
) -> Site:
    pinned = [p for block in blocks.values() for p in pinned_parameters(block).values()]
    return Site(
        after=name,
        module=module,
        blocks=blocks,
        unsure=tuple(key for key, block in blocks.items() if not _exact_after(block, module)),
        kinds={key: _kind(block, facts.shape) for key, block in blocks.items()},
        shape=facts.shape,
        device=device,
        bytes=facts.bytes,
        pinned_bytes=sum(parameter.nbytes for parameter in pinned),
        overwritten=facts.overwritten,
        anchor=facts.anchor,
    )


def _site_device(module: nn.Module, model: nn.Module, x: Tensor | None) -> torch.device:
    found = device_of(module) or device_of(model) if x is None else x.device
    return found or torch.device("cpu")


def _layout(candidate: Candidate) -> tuple[str, str, list[torch.Size]]:
    """What has to be the same on all processes."""
    return candidate.name, candidate.after, [t.shape for t in tensors_of(candidate.block)]


def _probe(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    first: tuple[Any, Any],
    modules: Mapping[str, nn.Module],
) -> tuple[dict[str, Tensor], dict[str, _Facts]]:
    """Run the first batch and look at every site: the tensors there, and what they are like."""
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
        visit.autocast = torch.is_autocast_enabled(output.device.type)
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
    facts = {
        name: _Facts(
            shape=tuple(x.shape),
            bytes=x.nbytes,
            dtype=_parameter_dtype(model, x.dtype) if seen[name].autocast else x.dtype,
            overwritten=written[name],
            anchor=name in anchors,
        )
        for name, x in xs.items()
    }
    return {name: v.output for name, v in seen.items() if isinstance(v.output, Tensor)}, facts


def _parameter_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """What the parameters of the model are in, whatever autocast makes of them on the way."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


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


def _brought(
    candidate: Candidate, device: torch.device, dtype: torch.dtype, model: nn.Module
) -> nn.Module:
    """The candidate's block, or a copy, on a device, in a dtype and in the mode of its site."""
    block = candidate.block
    pinned_parameters(block)
    shares = not set(block.modules()).isdisjoint(model.modules())  # whose hooks are the site's
    training = model.get_submodule(candidate.after).training
    other_mode = any(module.training != training for module in block.modules())
    moved = any(p.device != device or p.dtype != dtype for p in block.parameters())
    if shares or other_mode or moved:
        block = copy.deepcopy(block).to(device=device, dtype=dtype).train(training)
    return block


def _check_fit(name: str, block: nn.Module, x: Tensor) -> None:
    """Try a block on the tensor at its site, in the block's own precision."""
    x = x.to(next(block.parameters()).dtype)
    with full_precision(x.device), torch.no_grad():
        _check_identity(block, x, f'block={type(block).__name__} of candidate "{name}"')


def _check_identity(block: nn.Module, x: Tensor, where: str) -> None:
    try:
        moved = float(moves(block, x))
    except BlockError:
        raise
    except Exception as error:
        raise BlockError(
            f"{where} fails on the tensor of shape {tuple(x.shape)} at its site: {error}; the "
            f"width there is {x.shape[-1]}, so make the block with width={x.shape[-1]}."
        ) from error
    if moved > 1:
        raise BlockError(
            f"{where} is not the identity at its pins on the data: it moves the tensor at its "
            f"site by {moved:.2g} times what rounding may do. An identity layer stands right "
            "after its own activation; elsewhere use ResidualMLP(width, hidden, activation)."
        )
    _refuse_dead(block, x, where)


def _exact_after(block: nn.Module, module: nn.Module) -> bool:
    """Whether a block says that it is the identity on all that a module can give."""
    exact_after = getattr(block, "exact_after", None)
    return callable(exact_after) and bool(exact_after(module))


def _kind(block: nn.Module, shape: tuple[int, ...]) -> Hashable:
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
