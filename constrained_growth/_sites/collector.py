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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from constrained_growth._sites.context import NO_CONTEXT, Context, context_of, detached
from constrained_growth._sites.outputs import Which, tensor_at, with_tensor
from constrained_growth._sites.site import Site
from constrained_growth._sites.untouched import full_precision
from constrained_growth.errors import CandidateError


@dataclass(frozen=True)
class Use:
    """One run of the module at a site: x, δ = ∂L/∂x and its further arguments, all detached."""

    x: Tensor
    delta: Tensor
    context: Context = NO_CONTEXT


See = Callable[[Tensor, Context], Tensor | None]
"""`see(x, context)`: what takes the place of x, or None to leave it."""

Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""PyTorch's `hook(module, args, kwargs, output)`."""


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Forward hooks on modules, removed at the end, also after an error halfway.

    They come after all others, also after those that a library adds when the model runs first.
    """
    handles = []

    def last(handle: RemovableHandle) -> Callable[[Any, Any], None]:
        return lambda module, _: module._forward_hooks.move_to_end(handle.id)

    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
            # just before each run, since Transformers adds hooks in the first one
            handles.append(module.register_forward_pre_hook(last(handles[-1])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def collecting(
    sites: Iterable[tuple[str, nn.Module, Which, See]],
) -> AbstractContextManager[None]:
    """Call `see(x, context)` whenever a module has run; what it returns takes the place of x.

    A site here is a name for errors, the module, which tensor of its output is x, and `see`.
    """
    return hooked(
        (module, functools.partial(replaced, after, which, see))
        for after, module, which, see in sites
    )


def replaced(
    after: str,
    which: Which,
    see: See,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """The output of `module(*args, **kwargs)` with what `see` returns in the place of its x."""
    x = output if which is None and isinstance(output, Tensor) else tensor_at(after, output, which)
    y = see(x, context_of(module, args, kwargs))
    if y is None or y is x:
        return output  # itself, as not every structure can be made again
    return y if x is output else with_tensor(output, which, y)


def alias_of(x: Tensor, *, overwritten: bool) -> Tensor:
    """X again, as a node of its own in the graph, which always requires gradients."""
    # without a graph x may be the user's own input, written over when it has been read
    x = x if x.requires_grad else x.detach().clone().requires_grad_()
    # autograd rewrites the history of a view that is changed in place, and its gradient is lost
    return x.clone() if overwritten else x.view_as(x)


transformed = is_functorch_wrapped_tensor
"""Whether x lives inside a transform of `torch.func`, such as `vmap` or `jvp`."""

Take = Callable[[int, list[Use], Any], None]
"""`take(index, uses, batch)`: δ has arrived at all uses of a site; the batch is as in `begin`."""


@dataclass(eq=False)
class Forward:
    """One forward pass that is watched; the first three fields are as in `Collector.begin`."""

    batch: Any
    take: Take
    keeps: bool
    # what backward delivers meanwhile, to a model that differentiates in forward, is not ∂L/∂x
    running: bool = True
    seen: Counter[int] = field(default_factory=Counter)  # how often each site's module has run
    waiting: dict[int, list[Use]] = field(default_factory=dict)  # until δ is at all uses of a site

    def arrive(self, index: int, context: Context, here: list[Tensor], delta: Tensor) -> None:
        """δ has arrived at one use of a site."""
        if self.running:
            return
        waiting = self.waiting.setdefault(index, [])
        # popped, since the hook that holds `here` lives as long as the graph; and with
        # create_graph=True δ has a graph of its own, which would be kept too
        waiting.append(Use(here[0] if self.keeps else here.pop(), delta.detach(), context))
        if len(waiting) == self.seen[index]:
            self._pass_on(index)

    def settle(self) -> None:
        """Take what waits for other uses of its site, through which backward has not come."""
        for index in list(self.waiting):
            self._pass_on(index)

    def _pass_on(self, index: int) -> None:
        uses = self.waiting.pop(index)
        if not self.keeps:  # `backward` has seen to the modes
            self.take(index, uses, self.batch)
            return
        # within the user's own backward pass, which may be under autocast or create a graph
        with torch.inference_mode(False), torch.no_grad(), full_precision(uses[0].x.device):
            self.take(index, uses, self.batch)


class Collector:
    """x at some sites in forward, δ in backward.

    In forward it calls `inspect(index, x, context, alias)`, without an alias where gradients are
    switched off.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        inspect: Callable[[int, Tensor, Context, Tensor | None], None] | None = None,
    ) -> None:
        self._sites, self._inspect = sites, inspect
        self._now: Forward | None = None
        # into the graph, whose hooks lead back here; so they are let go before anything else is
        self._edges: list[Asked] = []
        self._versions: list[tuple[int, Tensor, int]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model for a while."""
        with collecting(
            (site.after, site.module, site.output, functools.partial(self._see, index))
            for index, site in enumerate(self._sites)
        ):
            try:
                yield
            finally:
                self._let_go()
                self._now = None

    def _let_go(self) -> None:
        self._edges, self._versions = [], []

    def begin(self, take: Take, batch: Any = None, *, keeps: bool = False) -> Forward:
        """Get ready for the forward pass of a batch: `take(index, uses, batch)` is told of δ.

        `keeps`: x is kept as long as the graph is, as the user may run backward again.
        """
        self._let_go()
        self._now = Forward(batch, take, keeps)
        return self._now

    def end(self) -> None:
        """The forward pass is over, and backward may run parts of it again (checkpointing)."""
        if self._now is not None:
            self._now.running = False

    def backward(self, loss: Tensor, leaves: Sequence[Tensor] = ()) -> Sequence[Tensor | None]:
        """One backward pass down to the sites and to some leaves, whose gradients it returns."""
        self.end()
        forward = self._now
        assert forward is not None
        # an alias that is a view loses its δ when it is written to, without an error; only where
        # that was seen on the first batch is it a copy
        for index, alias, version in self._versions:
            site = self._sites[index]
            if alias._version != version and not site.overwritten:
                raise CandidateError(
                    f'after="{site.after}": the tensor there is changed in place in a later batch '
                    "and not in the first one; put a batch in front in which it is changed."
                )
        edges = asked_for(loss, self._edges)
        inputs: list[Any] = [*(edge for edge, _ in edges), *leaves]
        waiting = [arrive for _, arrive in edges]
        self._let_go()
        grads: Sequence[Tensor | None] = ()
        # PyTorch advises against backward under autocast
        with torch.no_grad(), full_precision(*{site.device for site in self._sites}):
            if inputs:
                grads = torch.autograd.grad(loss, inputs, allow_unused=True)
            # `grads` goes on with those of the leaves; without `arrive` a hook has taken δ
            for arrive, delta in zip(waiting, grads, strict=False):
                if arrive is not None and delta is not None:
                    arrive(delta)
            forward.settle()
        self._now = None
        return grads[len(waiting) :]

    def _see(self, index: int, x: Tensor, context: Context) -> Tensor | None:
        forward, site, alias = self._now, self._sites[index], None
        running = forward is not None and forward.running
        if transformed(x):
            forward = None  # x is of no use outside the transform, nor has it a δ
        if torch.is_grad_enabled() and forward is not None and x.is_floating_point():
            # δ is taken before the alias: hooks of the user's on that change what goes on from it
            before = alias_of(x, overwritten=False)
            alias = alias_of(before, overwritten=site.overwritten)
            kept = detached(context) if site.needs_context else NO_CONTEXT
            # without a graph x may be a buffer that is written over before δ arrives
            here = [x.detach() if x.requires_grad else x.detach().clone()]
            arrive = functools.partial(forward.arrive, index, kept, here)
            streams = forward.keeps or not running or x.nbytes > _SMALL
            if streams:
                before.register_hook(arrive)
            # what backward runs again is the same use; with checkpoint(use_reentrant=True) it is
            # the only one in which gradients are on
            forward.seen[index] += running or not forward.seen[index]
            if running and not forward.keeps:
                self._edges.append((get_gradient_edge(before), None if streams else arrive))
                self._versions.append((index, alias, alias._version))
        if running and self._inspect is not None:
            self._inspect(index, x, context, alias)
        return alias


def count_of_nodes() -> int:
    """How many nodes autograd has made in this thread, which costs nothing to ask."""
    autograd: Any = torch.autograd  # which has it under a private name only
    return autograd._get_sequence_nr()


Asked = tuple[GradientEdge, Callable[[Tensor], None] | None]
"""Where δ arrives, and who takes it when backward is over; None where a hook takes it at once."""


def asked_for(loss: Tensor, edges: Sequence[Asked]) -> list[Asked]:
    """The edges for which backward is asked: those without a hook, and of the others the first.

    Backward passes the others on its way. It would keep the δ of all that it is asked for.
    """
    hooked_nodes = {edge.node for edge, arrive in edges if arrive is None}
    above: dict[Any, bool] = {}  # node → whether a hooked one comes before it in the forward pass
    for node in inputs_first(loss.grad_fn if hooked_nodes else None):
        above[node] = any(n in hooked_nodes or above[n] for n in inputs_of(node))
    return [one for one in edges if one[1] is not None or not above.get(one[0].node, True)]


def inputs_of(node: Any) -> list[Any]:
    """The nodes of autograd's graph whose results an operation takes."""
    return [before for before, _ in node.next_functions if before is not None]


def inputs_first(root: Any) -> Iterator[Any]:
    """All nodes of a graph, each after its inputs; none without a root."""
    done: set[Any] = set()
    waiting = [(root, False)] if root is not None else []
    while waiting:
        node, inputs_done = waiting.pop()
        if node in done:
            continue
        if inputs_done:
            done.add(node)
            yield node
        else:
            waiting += [(node, True), *((before, False) for before in inputs_of(node))]


_SMALL = 2**18
"""Bytes of x up to which δ is taken when backward is over. A hook takes it at once, so that x can
go, and costs time in Python that counts only where the tensors are small."""
