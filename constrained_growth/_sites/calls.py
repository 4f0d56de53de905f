"""Uses of a module that a layer around it would not see.

A layer takes the place of its site in the modules that have it as a child. Whoever holds the module
itself (a list of Python's, a bound method, a variable of the loss) goes on without the layer. A
twin tells: an object of the same class with the same attributes, in the place of the site for a
while. Whoever runs the module and not its twin has not got it from the model.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from constrained_growth._sites.collector import hooked
from constrained_growth._sites.model import owners_of
from constrained_growth._sites.site import Site
from constrained_growth._sites.snapshot import has_slots
from constrained_growth.errors import CandidateError

_Script = torch.jit.ScriptModule


@dataclass
class Calls:
    """What happened while a model and its loss were watched.

    Attributes:
        forward: How often `forward` ran at each site: hooks do not see `module.forward(x)`.
        past: Modules at sites that were run, with gradients, but not as children of the model's.
    """

    forward: Counter[nn.Module] = field(default_factory=Counter)
    past: set[nn.Module] = field(default_factory=set)

    def refuse(self, site: Site, runs: int) -> None:
        """Refuse a site, whose hooks have run so many times, if a layer there is passed by."""
        if self.forward[site.module] > runs > 0:
            raise CandidateError(
                f'after="{site.after}": its forward() is called directly too, past all hooks; '
                "call the module itself, module(x), or choose another submodule."
            )
        if site.module in self.past:
            raise CandidateError(
                f'after="{site.after}": this module is also run by someone who has not got it from '
                "the model: a plain list or attribute that holds it beside the model's own, a "
                "bound method that was kept, a variable of the loss. A layer there would be passed "
                "by. Keep modules in nn.ModuleList, let the loss call "
                f"model.{site.after}(x), or choose another submodule."
            )


@contextmanager
def watched_calls(model: nn.Module, sites: Sequence[Site]) -> Iterator[Calls]:
    """Watch how the modules at some sites are run, for a while."""
    calls = Calls()
    modules = {site.module for site in sites if not isinstance(site.module, _Script)}
    # a library may have set methods on a module; a twin has no slots; what is compiled in place
    # runs the module itself
    running = {module for module in modules if "forward" not in vars(module)}
    alike = [m for m in modules if m._compiled_call_impl is None and not has_slots(m)]
    twins = {module: _twin(module) for module in alike}
    places = [
        (owner._modules, key, module)
        for module in twins
        for owner, key in owners_of(model, module)
        if not isinstance(owner, _Script)
    ]

    def see(module: nn.Module, *_: Any) -> None:
        if torch.is_grad_enabled() and module in twins:
            calls.past.add(module)

    def forward(module: nn.Module) -> Callable[..., Any]:
        @functools.wraps(module.forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.forward[module] += 1
            return type(module).forward(module, *args, **kwargs)

        return counted

    try:
        for module in running:
            vars(module)["forward"] = forward(module)
        for children, key, module in places:
            children[key] = twins[module]
        with hooked((module, see) for module in twins):
            yield calls
    finally:
        for children, key, module in places:
            children[key] = module
        for module in running:
            vars(module).pop("forward", None)


def _twin(module: nn.Module) -> nn.Module:
    twin = object.__new__(type(module))
    object.__setattr__(twin, "__dict__", vars(module))
    return twin
