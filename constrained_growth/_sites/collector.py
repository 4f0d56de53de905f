"""Forward hooks on the modules of a user's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Forward hooks on modules for a while; PyTorch's own `hook(module, args, kwargs, output)`."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watching(
    modules: Mapping[str, nn.Module], see: Callable[[str, object, object], Tensor | None]
) -> AbstractContextManager[None]:
    """Call `see(name, first input, output)` whenever one of the modules has run.

    What `see` returns, if not None, takes the place of the output.
    """

    def hook_for(name: str) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            return see(name, args[0] if args else next(iter(kwargs.values()), None), output)

        return hook

    return hooked((module, hook_for(name)) for name, module in modules.items())
