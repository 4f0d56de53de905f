"""Packages that are not always installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_EXTRAS = {
    "matplotlib": "plot",
    "lightning": "lightning",
    "transformers": "transformers",
    **dict.fromkeys(("joblib", "mnist1d", "rich", "sklearn", "typer"), "demo"),
}


@contextmanager
def extra_packages() -> Iterator[None]:
    """Import packages within this context; where one is missing, the error names its extra.

    Raises:
        ModuleNotFoundError: As Python's own, with the command that installs what is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        fix = f"pip install 'constrained-growth[{_EXTRAS[package]}]'"
        raise ModuleNotFoundError(f"{package} is missing: {fix}", name=package) from None
