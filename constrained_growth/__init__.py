"""Would another layer help this network, where, and what would it buy?

Imagine every insertable layer already present, its virtual parameters pinned to zero by
constraints. The Lagrange multipliers of these constraints are the answer, and cost one backward
pass.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from constrained_growth._public import *
    from constrained_growth._public import __all__ as __all__

    __version__: str
else:

    def __getattr__(name: str) -> Any:
        """A module, or a public name: with the first of these all are imported.

        So the command line can show its help without torch, which takes seconds to import.
        """
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("constrained-growth")
        module = f"{__name__}.{name}"
        if importlib.util.find_spec(module):
            return importlib.import_module(module)  # which is set here, and not asked for again
        public = importlib.import_module(f"{__name__}._public")
        globals().update({known: getattr(public, known) for known in (*public.__all__, "__all__")})
        if name in globals():
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """The public names alone, not the modules that hold them."""
        return [*__getattr__("__all__"), "__version__"]
