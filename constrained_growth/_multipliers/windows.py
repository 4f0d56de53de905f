"""The sums of a window of training, taken in as the user's backward passes deliver them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from constrained_growth._multipliers.grouping import Member, Site, grouped, stacked
from constrained_growth._multipliers.tallies import Estimate, Squares, accumulation_dtype
from constrained_growth._multipliers.uses import Use
from constrained_growth._sites.context import Context
from constrained_growth._sites.untouched import full_precision
from constrained_growth.errors import DataError


@dataclass(eq=False, slots=True)
class Batch:
    """A forward pass that is watched.

    Attributes:
        size: How many samples.
        scale: What its loss will be multiplied with.
        arrived: At which sites δ has arrived.
        pairs: Site → (x, δ) that wait to be worked off.
        uses: Site whose module runs several times → what has arrived of its uses.
    """

    size: int
    scale: float
    arrived: set[int] = field(default_factory=set)
    pairs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    uses: dict[int, list[Use]] = field(default_factory=dict)


class Window:
    """The sums of one window.

    Small tensors wait, up to `_ROOM` bytes, so that several batches and all candidates of one
    kind are worked off in one stroke; large ones are worked off as backward delivers them.

    Args:
        sites: The sites, with the blocks to sum up for.
        moments: Also the second moments that some norms need.
        skips: Leave out what is not finite.

    Attributes:
        samples: For each site, how many samples count.
        batches: For each site, how many batches.
    """

    def __init__(self, sites: Sequence[Site], *, moments: bool, skips: bool) -> None:
        waits = 2 * sum(site.bytes for site in sites) <= _ROOM
        self._squares: dict[torch.device, Squares] = {}
        self.grouped = grouped(sites, self._squares, joint=waits, moments=moments)
        members = [member for group in self.grouped for member in group]
        self._here = [[m for m in members if m.site == index] for index in range(len(sites))]
        self._closed = [all(member.closed for member in here) for here in self._here]
        self._waits = waits
        self._names = [site.after for site in sites]
        self._shared = [site.shared for site in sites]
        self._using: list[Batch] = []
        self._waiting: list[Batch] = []
        self._bytes = 0
        self._skips = skips
        self._size = 0
        self.samples = [0] * len(sites)
        self.batches = [0] * len(sites)

    def receive(
        self, index: int, x: Tensor, context: Context, batch: Batch, delta: Tensor | None
    ) -> None:
        """Take δ at a site, to be worked off at once or later."""
        if delta is None:
            return
        if torch.is_grad_enabled():  # backward(create_graph=True)
            with torch.no_grad():
                self.receive(index, x, context, batch, delta.detach())
            return
        if self._skips and not bool(delta.isfinite().all()):
            return
        if batch.scale != 1.0:  # in a precision where what is small stays
            dtype = accumulation_dtype(delta.dtype)
            x, delta = x.to(dtype), delta.to(dtype) / batch.scale
        if index not in batch.arrived:
            batch.arrived.add(index)
            self.samples[index] += batch.size
            self.batches[index] += 1
        if self._shared[index]:  # whose uses count as one, when all have arrived
            if not batch.uses:
                self._using.append(batch)
            batch.uses.setdefault(index, []).append(Use(x, delta, context))
        else:
            with full_precision(x.device):
                self._take(index, Use(x, delta, context), batch)

    def _take(self, index: int, use: Use, batch: Batch) -> None:
        """Take in one use at a site, to be worked off at once or later."""
        by_sample = use.x.dim() > 1 and use.x.shape[0] == batch.size
        if not (by_sample and self._closed[index]):
            self._add(index, [use], batch.size)
        elif self._waits:
            self._keep(index, use.x, use.delta, batch)
        else:
            self._settle(batch.size)
            for member in self._here[index]:
                member.tally.add_samples(use.x, use.delta, batch.size)

    def _add(self, index: int, uses: Sequence[Use], size: int) -> None:
        """Work off what one batch has brought to a site, for each of its candidates."""
        by_sample = all(use.x.dim() > 1 and use.x.shape[0] == size for use in uses)
        self._settle(size)
        for member in self._here[index]:
            if by_sample and member.closed:
                member.tally.add_uses(uses, size)
            else:
                member.tally.add_batch(member.index, uses, size)

    def make_room(self) -> None:
        """Work off what waits if another batch of the kind would be too much."""
        if self._using:
            with plainly(*self._squares):
                self._work_off_uses()
        count = len(self._waiting)
        if self._bytes * (count + 1) > _ROOM * count:
            with plainly(*self._squares):
                self._work_off()

    def estimates(self) -> dict[str, Estimate]:
        """Candidate → what is known of it, over the samples that count at its site.

        Raises:
            DataError: None do.
        """
        with plainly(*self._squares):
            self._work_off_uses()
            self._work_off()
            self._settle(0)
            return self._estimates()

    def _estimates(self) -> dict[str, Estimate]:
        silent = [n for n, count in zip(self._names, self.samples, strict=True) if count == 0]
        if silent:
            raise DataError(
                f"after={silent}: no backward pass has arrived there since the window began; call "
                "the problem's own model within the context, and backward() on its loss."
            )
        return {m.name: self._estimate(m) for group in self.grouped for m in group}

    def _estimate(self, member: Member) -> Estimate:
        count = self.samples[member.site]
        means, squares = member.tally.means(count)
        spread = float(member.tally.squares[member.index] - count * squares[member.index])
        return member.tally.estimate(member.index, means, spread, count)

    def _keep(self, index: int, x: Tensor, delta: Tensor, batch: Batch) -> None:
        if index in batch.pairs:  # a second backward pass through the same graph
            self._work_off()
        if not batch.pairs:
            self._waiting.append(batch)
        batch.pairs[index] = x, delta
        self._bytes += x.nbytes + delta.nbytes

    def _work_off_uses(self) -> None:
        using, self._using = self._using, []
        for batch in using:
            for index, uses in batch.uses.items():
                self._add(index, uses, batch.size)
            batch.uses.clear()

    def _settle(self, size: int) -> None:
        """Put together the squares that were noted, where a batch of another size comes."""
        if size != self._size:
            for squares in self._squares.values():
                squares.settle(self._size)
            self._size = size

    def _work_off(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        alike: dict[Hashable, list[Batch]] = {}
        for batch in waiting:
            shapes = tuple((index, x.shape) for index, (x, _) in batch.pairs.items())
            alike.setdefault((batch.size, frozenset(shapes)), []).append(batch)
        for batches in alike.values():
            self._settle(batches[0].size)
            pairs = {i: [batch.pairs[i] for batch in batches] for i in batches[0].pairs}
            for group in self.grouped:
                self._stroke(group, pairs, batches[0].size)
        for batch in waiting:
            batch.pairs.clear()

    def _stroke(self, group: Sequence[Member], arrived: Mapping[int, _Pairs], size: int) -> None:
        """Work off a group of candidates; at the sites where there is nothing, δ is zero."""
        here = [arrived.get(member.site) for member in group]
        for like in {pairs[0][0].shape: pairs for pairs in here if pairs}.values():
            shape = like[0][0].shape
            nothing = [(torch.zeros_like(x), torch.zeros_like(delta)) for x, delta in like]
            fits = [pairs if pairs and pairs[0][0].shape == shape else nothing for pairs in here]
            x, delta = (
                stacked([pair[i] for pairs in fits for pair in pairs], len(group)) for i in (0, 1)
            )
            group[0].tally.add_samples(x, delta, size)


@contextmanager
def plainly(*devices: torch.device) -> Iterator[None]:
    """Without a graph or autocast, and with tensors that may be changed later."""
    with torch.inference_mode(False), torch.no_grad(), full_precision(*devices):
        yield


_Pairs = list[tuple[Tensor, Tensor]]
"""(x, δ) of several batches at one site."""

_ROOM = 2**20
"""Bytes of (x, δ) that may wait for the next forward pass."""
