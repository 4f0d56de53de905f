"""Would another layer help this network, where, and what would it buy?

Imagine every insertable layer already present, its virtual parameters pinned to zero by
constraints. The Lagrange multipliers of these constraints are the answer, and cost one backward
pass.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

_FUNCTIONS = ("monitor", "solve")
"""Functions in modules of the same name."""

if TYPE_CHECKING:
    from constrained_growth._public import *
    from constrained_growth._public import __all__ as __all__

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        """A module of the library, or a public name, imported when it is first used.

        So the command line can show its help without torch, which takes seconds to import.
        """
        module = f"{__name__}.{name}"
        if name == "__version__":
            value = importlib.import_module("importlib.metadata").version("constrained-growth")
        elif name not in _FUNCTIONS and importlib.util.find_spec(module):
            return importlib.import_module(module)
        else:
            public = importlib.import_module(f"{__name__}._public")
            if name != "__all__" and name not in public.__all__:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            value = getattr(public, name)
        return globals().setdefault(name, value)

    def __dir__() -> list[str]:
        """The public names alone, not the modules that hold them."""
        return [*__getattr__("__all__"), "__version__"]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets an imported module on its package, where it would hide the function.
        if name not in _FUNCTIONS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
