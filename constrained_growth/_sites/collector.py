"""The one way of seeing, and of replacing, a tensor in a user's model.

A *site* is the tensor that a module returns (or one of them): what a layer inserted after that
module reads and replaces. Whoever looks at a site does it here:

1. A forward hook on the module takes the tensor x out of the output, and with it the other
   arguments of the call. The hook comes after the user's own, which may have replaced the output.
2. It calls `see(x, context)`. What that returns takes the place of x in the output: an alias of x,
   to observe; what a block makes of x, to let the block stand there. The rest of the model goes
   on with it.
3. Whatever else holds x (a hook of the user's, an attribute that the module keeps, a second
   output computed from the first, the input of an in-place activation) goes on holding x itself.

An inserted layer changes what the module *returns* and nothing else. So ∂L/∂alias counts exactly
the paths to the loss that such a layer will change, and ∂L/∂x would count the others too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from constrained_growth._sites.context import NO_CONTEXT, Context, context_of, detached
from constrained_growth._sites.outputs import Which, tensor_at, with_tensor
from constrained_growth._sites.site import Site
from constrained_growth._sites.untouched import full_precision
from constrained_growth.errors import CandidateError


@dataclass(frozen=True)
class Use:
    """What one run of the module at a site brings.

    Attributes:
        x: The tensor at the site, detached.
        delta: δ = ∂L/∂x of the mean loss of the batch, same shape.
        context: What else the module was called with, detached.
    """

    x: Tensor
    delta: Tensor
    context: Context = NO_CONTEXT


See = Callable[[Tensor, Context], Tensor | None]
"""`see(x, context)`: what takes the place of x, or None to leave it."""

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""PyTorch's `hook(module, args, kwargs, output)`."""


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Forward hooks on modules, removed at the end, also after an error halfway."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def collecting(sites: Iterable[tuple[str, nn.Module, Which, See]]) -> Iterator[None]:
    """Call `see(x, context)` whenever a module has run; what it returns takes the place of x.

    Args:
        sites: A name for errors, the module, which tensor of its output is meant (as in
            `Candidate`), and `see`.
    """

    def hook_for(after: str, which: Which, see: See) -> Hook:
        return lambda module, args, kwargs, output: replaced(
            after, module, args, kwargs, output, which, see
        )

    with hooked((m, hook_for(after, which, see)) for after, m, which, see in sites):
        yield


def replaced(
    after: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    which: Which,
    see: See,
) -> Any:
    """The output of `module(*args, **kwargs)` with what `see` returns in the place of its x."""
    x = output if which is None and isinstance(output, Tensor) else tensor_at(after, output, which)
    y = see(x, context_of(module, args, kwargs))
    if y is None or y is x:
        return output
    return y if x is output else with_tensor(output, which, y)


def alias(x: Tensor, *, overwritten: bool = False) -> Tensor:
    """A tensor of the same values that autograd tells from x; it always requires gradients.

    Args:
        x: The tensor at a site. Where it requires no gradients (all before it is frozen), a leaf
            takes its place.
        overwritten: Whether the model will change it in place. Then the alias is a copy: autograd
            rewrites the history of a view that is changed in place, and the gradient with respect
            to what the view was would be lost.
    """
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    return x.clone() if overwritten else x.view_as(x)


@dataclass(frozen=True)
class Seen:
    """One run of the module at a site, δ still to come; with the version counters as they were."""

    x: Tensor
    x_version: int
    context: Context
    alias: Tensor
    version: int
    edge: GradientEdge


class Collector:
    """x at some sites in forward, δ in backward.

    Args:
        sites: The sites.
        inspect: Called with each site and what is there, also where no gradient passes.

    Attributes:
        seen: For each site what it brought in this forward pass.
    """

    def __init__(
        self, sites: Sequence[Site], inspect: Callable[[Site, Tensor], None] | None = None
    ) -> None:
        self._sites = sites
        self._inspect = inspect
        self.seen: list[list[Seen]] = [[] for _ in sites]
        self._recording = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model for a while."""
        with collecting(
            (site.after, site.module, site.output, functools.partial(self._see, index))
            for index, site in enumerate(self._sites)
        ):
            yield

    def begin(self) -> None:
        """Get ready for the forward pass of a batch, and for its loss."""
        self.seen = [[] for _ in self._sites]
        self._recording = True

    def backward(
        self, loss: Tensor, leaves: Sequence[Tensor] = ()
    ) -> tuple[list[list[Use]], Sequence[Tensor | None]]:
        """One backward pass down to the sites and to some leaves.

        Returns:
            For each site its uses in this batch, those on which the loss depends; and the
            gradients of the leaves.

        Raises:
            CandidateError: A site was changed in place of which this was not known.
        """
        self._recording = False  # what backward runs again (checkpointing) is not looked at
        seen, self.seen = self.seen, [[] for _ in self._sites]
        self._check_versions(seen)
        edges = [one.edge for here in seen for one in here]
        grads: Sequence[Tensor | None] = [None] * (len(edges) + len(leaves))
        if loss.requires_grad and (edges or leaves):
            devices = {site.device for site in self._sites}
            with full_precision(*devices):  # PyTorch advises against backward under autocast too
                grads = torch.autograd.grad(loss, [*edges, *leaves], allow_unused=True)
        deltas = iter(grads)
        uses = [
            [Use(o.x, delta, o.context) for o in here if (delta := next(deltas)) is not None]
            for here in seen
        ]
        return uses, grads[len(edges) :]

    def changed_in_place(self) -> tuple[list[bool], bool]:
        """After forward: at which sites the model changed what it was given, or the tensor itself.

        Returns:
            For each site, whether the alias was changed; and whether some x was, which is not the
            alias where that is a copy.
        """
        aliases = [any(one.alias._version != one.version for one in here) for here in self.seen]
        originals = any(one.x._version != one.x_version for here in self.seen for one in here)
        return aliases, originals

    def _see(self, index: int, x: Tensor, context: Context) -> Tensor | None:
        site = self._sites[index]
        if self._recording and self._inspect is not None:
            self._inspect(site, x)
        if not torch.is_grad_enabled():  # no gradient passes here, as the user wants it
            return None
        y = alias(x, overwritten=site.overwritten)
        if self._recording:
            context = detached(context) if site.needs_context else NO_CONTEXT
            # where no gradient is required x may be the user's own input, written over when read
            x = x.detach() if x.requires_grad else x.detach().clone()
            edge = get_gradient_edge(y)
            self.seen[index].append(Seen(x, x._version, context, y, y._version, edge))
        return y

    def _check_versions(self, seen: Sequence[Sequence[Seen]]) -> None:
        for site, here in zip(self._sites, seen, strict=True):
            if not site.overwritten and any(one.alias._version != one.version for one in here):
                raise CandidateError(
                    f'after="{site.after}": the tensor there is changed in place in a later batch '
                    "and not in the first one; put a batch in front in which it is changed."
                )
