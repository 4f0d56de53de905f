"""Collecting x and δ = ∂L/∂x at the sites of a model as it runs forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from constrained_growth._distributed import add_up, everywhere
from constrained_growth._multipliers.grouping import STROKE, Member, Site, grouped, stacked
from constrained_growth._multipliers.tallies import Counts, Estimate, Squares
from constrained_growth._multipliers.uses import Use
from constrained_growth._sites.context import NO_CONTEXT, Context, context_of, detached
from constrained_growth._sites.outputs import tensor_at, with_tensor
from constrained_growth._sites.untouched import full_precision
from constrained_growth.blocks import change, has_factors, moves
from constrained_growth.errors import BlockError, CandidateError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Recorder:
    """Notes (x, δ) at the sites and hands them to the tallies.

    Where the tensors of a batch are small, (x, δ) of some batches wait to be worked off
    together, the candidates of one kind in one stroke; large ones are worked off and dropped as
    backward delivers them. What waits takes half the room of the multipliers (an ordinary pass
    spends as much as these on the gradient of θ), or 1 MiB.

    Args:
        sites: The sites, from `GrowthProblem`.
        moments: Whether to collect second moments for norms that need them.
    """

    def __init__(self, sites: Sequence[Site], *, moments: bool = False) -> None:
        self._sites = sites
        self._batch_bytes = 2 * sum(site.bytes for site in sites)
        self._room = max(_SMALL, sum(site.pinned_bytes for site in sites) // 2)
        shared = any(site.shared for site in sites)
        many = all(site.shape[:1] >= (_MANY,) for site in sites)
        large = many and self._batch_bytes >= STROKE * len(sites)
        self._streams = self._batch_bytes > self._room or shared or large
        self._squares: dict[torch.device, Squares] = {}
        self._groups = grouped(sites, self._squares, joint=not self._streams, moments=moments)
        self._here = [
            [m for g in self._groups for m in g if m.site == i] for i in range(len(sites))
        ]
        self._closed = [all(member.closed for member in here) for here in self._here]
        self._xs: list[Tensor | None] = [None] * len(sites)
        self._inputs: list[Tensor | GradientEdge | None] = [None] * len(sites)
        self._contexts: list[Context] = [NO_CONTEXT] * len(sites)
        self._uses: list[tuple[int, Tensor, Context, Tensor | GradientEdge]] = []
        self._forward = False
        self._counts = True
        self._pending: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sites]
        self._pending_bytes = 0
        self._shapes: list[torch.Size] = []
        self._moved: dict[str, Tensor] = {}
        self._size = 0

    def hooks(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Modules and their forward hooks."""
        sites = enumerate(self._sites)
        return [(site.module, functools.partial(self._see, index)) for index, site in sites]

    def mergeable(self, size: int) -> int:
        """How many batches of `size` samples may be run through the model as one.

        More than one only where all that is known of a multiplier is a sum over samples. Their
        (x, δ) then take no more than the multipliers do (as much as an ordinary pass spends on
        the gradient of θ), or 4 MiB.
        """
        by_sample = all(len(s.shape) > 1 and s.shape[0] == size for s in self._sites)
        if self._streams or not all(self._closed) or not by_sample:
            return 1
        return max(1, max(2 * self._room, _MERGED) // max(self._batch_bytes, 1))

    def begin(self, size: int, *, counts: bool = True) -> None:
        """Get ready for a batch of `size` samples, of which nothing is kept unless it counts."""
        self._counts = counts
        if size != self._size:
            self.flush()
        self._size = size
        self._xs = [None] * len(self._sites)  # of a forward pass that has failed
        self._forward = True

    def check_samples(self) -> None:
        """Ask that all sites were reached in forward, and hold something for each sample.

        Raises:
            CandidateError: Otherwise.
        """
        size = self._size
        if not all(x is not None and x.dim() > 1 and len(x) == size for x in self._xs):
            self._complain(lambda x: x is None or x.dim() < 2 or x.shape[0] != size)

    def backward(self, loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """One backward pass down to the sites (and parameters, whose gradients it returns).

        Raises:
            CandidateError: A site was not reached, or the loss does not depend on it.
        """
        if not loss.requires_grad or any(x is None for x in self._xs):
            self._complain(lambda x: x is None or not loss.requires_grad)
        self._forward = False  # what backward runs again (checkpointing) is not looked at
        inputs: list[Any] = [edge for edge in self._inputs if edge is not None]
        inputs += [use[-1] for use in self._uses]
        with full_precision(*self._squares):  # PyTorch advises against backward under autocast too
            grads = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)
            self._inputs = [None] * len(self._sites)
            if self._uses:
                self._receive_uses(grads[len(inputs) - len(self._uses) : len(inputs)])
            if not self._streams:
                self._receive_all(grads)
        if any(x is not None for x in self._xs):
            self._complain(lambda x: x is not None)
        if self._streams or self._pending_bytes + self._batch_bytes > self._room:
            self.flush()
        return grads[len(inputs) :]

    def _receive_all(self, deltas: Sequence[Tensor | None]) -> None:
        """Take δ at all sites, to be worked off later where that can be."""
        size = self._size
        if not self._counts:
            self._xs = [None] * len(self._sites)
            return
        shapes = [x.shape for x in self._xs if x is not None]
        if shapes != self._shapes:
            self.flush()
        self._shapes = shapes
        with torch.no_grad():
            for index, pending in enumerate(self._pending):
                x, delta = self._xs[index], deltas[index]
                if x is None or delta is None:
                    continue
                if self._closed[index] and x.dim() > 1 and x.shape[0] == size:
                    pending.append((x, delta))
                    self._pending_bytes += x.nbytes + delta.nbytes
                    self._xs[index] = None
                else:
                    self._receive(index, delta)

    def flush(self) -> None:
        """Work off whatever is pending."""
        with full_precision(*self._squares), torch.no_grad():
            if self._pending_bytes:
                for group in self._groups:
                    self._work_off(group)
                self._pending = [[] for _ in self._sites]
                self._pending_bytes = 0
            for squares in self._squares.values():
                squares.settle(self._size)

    def reduce(self, group: ProcessGroup | None) -> None:
        """Sum over the processes of a group, which all call this."""
        tallies = [members[0].tally for members in self._groups]

        def count() -> list[Counts]:
            self.flush()
            return [tally.counts() for tally in tallies]

        counts = everywhere(count, group)
        sums = [t for i, tally in enumerate(tallies) for t in tally.join([c[i] for c in counts])]
        add_up([*sums, *(squares.values for squares in self._squares.values())], group)

    def totals(self) -> dict[str, dict[str, Tensor]]:
        """Candidate → Σ n_b λ_b as it stands, not a copy."""
        self.flush()
        return {m.name: m.tally.total(m.index) for group in self._groups for m in group}

    def estimates(self, num_samples: int, *, last: bool = False) -> dict[str, Estimate]:
        """Candidate → what is known of it, from `num_samples` samples.

        With `last` nothing comes after this, and the sums become the means in place.
        """
        self._refuse_moving()
        self.flush()
        means = [group[0].tally.means(num_samples, last=last) for group in self._groups]
        spreads = [
            (group[0].tally.squares - num_samples * squares)
            for group, (_, squares) in zip(self._groups, means, strict=True)
        ]
        listed = iter(torch.cat([spread.cpu() for spread in spreads]).tolist())
        return {
            member.name: member.tally.estimate(member.index, mean, next(listed), num_samples)
            for group, (mean, _) in zip(self._groups, means, strict=True)
            for member in group
        }

    def _see(
        self, index: int, module: nn.Module, args: Any, kwargs: Any, output: object
    ) -> object | None:
        """Note x at a site in the forward pass; what it returns takes the place of the output."""
        site = self._sites[index]
        y = output if isinstance(output, Tensor) else tensor_at(site.after, output, site.output)
        x = y.detach()
        replaced = site.copied or not y.requires_grad
        if replaced:  # the model goes on with a copy that is part of the graph and not a view
            y = (y if y.requires_grad else x.requires_grad_()).clone()
            x = x.detach()
        if self._forward:
            self._note(index, x, y, context_of(module, args, kwargs) if site.context else None)
        if not replaced:
            return None
        return y if isinstance(output, Tensor) else with_tensor(output, site.output, y)

    def _note(self, index: int, x: Tensor, y: Tensor, context: Context | None) -> None:
        """Keep x until δ arrives, which comes through y."""
        site = self._sites[index]
        if self._xs[index] is not None and not site.shared:
            raise CandidateError(
                f'after="{site.after}" is reached several times in a later batch and once in the '
                "first one; put a batch in front in which it is reached several times."
            )
        self._xs[index] = x
        for name in site.unsure:
            if has_factors(site.blocks[name]):
                self._try(name, site.blocks[name], x)
        edge = get_gradient_edge(y) if site.overwritten else y
        context = NO_CONTEXT if context is None else detached(context)
        if site.shared:
            self._uses.append((index, x, context, edge))
            return
        self._contexts[index] = context
        if self._streams:
            y.register_hook(functools.partial(self._receive, index))
        if site.anchor or not self._streams:
            self._inputs[index] = edge

    def _try(self, name: str, block: nn.Module, x: Tensor) -> None:
        """Try a block with a closed form on x; others show what they do as they are measured."""
        with full_precision(x.device), torch.no_grad():
            self._note_change(name, moves(block, x.to(next(block.parameters()).dtype)))

    def _note_change(self, name: str, moved: Tensor) -> None:
        """Note by how much a block changes x, to be judged when the data is read."""
        moved = moved.double()
        self._moved[name] = torch.maximum(self._moved.get(name, moved), moved)

    def _refuse_moving(self) -> None:
        for name, moved in self._moved.items():
            if float(moved) > 1:
                raise BlockError(
                    f'the block of candidate "{name}" is the identity on the first batch and not '
                    "on a later one. An identity layer stands right after its own activation; "
                    "elsewhere use ResidualMLP(width, hidden, activation)."
                )

    def _receive(self, index: int, delta: Tensor | None) -> None:
        """Take δ at a site and work it off at once."""
        x = self._xs[index]
        if x is None or delta is None:
            return
        self._xs[index] = None
        context, self._contexts[index] = self._contexts[index], NO_CONTEXT
        if not self._counts:
            return
        if x.dim() > 1 and x.shape[0] == self._size and self._closed[index]:
            for member in self._here[index]:
                member.tally.add_samples(x, delta, self._size)
        else:
            self._add(index, [Use(x, delta, context)])

    def _receive_uses(self, deltas: Sequence[Tensor | None]) -> None:
        """Take δ at the sites that are used several times; a use may be of no consequence."""
        uses: dict[int, list[Use]] = {}
        for (index, x, context, _), delta in zip(self._uses, deltas, strict=True):
            if delta is not None:
                uses.setdefault(index, []).append(Use(x, delta, context))
        self._uses = []
        with torch.no_grad():
            for index, here in uses.items():
                self._xs[index] = None
                if self._counts:
                    self._add(index, here)

    def _add(self, index: int, uses: Sequence[Use]) -> None:
        """Work off what one batch has brought to a site, for each of its candidates."""
        by_sample = all(use.x.dim() > 1 and use.x.shape[0] == self._size for use in uses)
        for member in self._here[index]:
            if member.closed and by_sample:
                member.tally.add_uses(uses, self._size)
                continue
            ys = member.tally.add_batch(member.index, uses, self._size)
            if not member.closed and member.name in self._sites[index].unsure:
                for use, y in zip(uses, ys, strict=True):
                    self._note_change(member.name, change(use.x.to(y.dtype), y))

    def _work_off(self, group: Sequence[Member]) -> None:
        """Work off what is pending for the members of a group, if it can be done in one stroke."""
        pending = [self._pending[member.site] for member in group]
        if not any(pending):
            return
        alike = len({x.shape for pairs in pending for x, _ in pairs}) == 1
        if not alike or len({len(pairs) for pairs in pending}) > 1:
            for member, pairs in zip(group, pending, strict=True):
                for x, delta in pairs:
                    member.tally.add_batch(member.index, [Use(x, delta)], self._size)
            return
        x, delta = (
            stacked([pair[i] for pairs in pending for pair in pairs], len(group)) for i in (0, 1)
        )
        group[0].tally.add_samples(x, delta, self._size)

    def refuse_unreached(self) -> None:
        """Say that the loss of one of the batches that ran together does not depend on the model.

        Raises:
            CandidateError: Always.
        """
        self._xs = [None] * len(self._sites)
        self._complain(lambda x: True)

    def _complain(self, is_bad: Callable[[Tensor | None], bool]) -> None:
        bad = [s.after for s, x in zip(self._sites, self._xs, strict=True) if is_bad(x)]
        raise CandidateError(
            f"after={bad}: some batch did not reach these sites in forward, or its loss does not "
            "depend on them; choose sites that every batch passes."
        )


_MANY = 512
"""Samples that make good use of the machine in a product; with more at a time nothing is gained."""

_SMALL = 2**20
"""Bytes of (x, δ) that may always wait."""

_MERGED = 2**22
"""Bytes of (x, δ) of batches that may be run through the model as one."""
