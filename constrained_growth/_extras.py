"""Packages that are not always installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_EXTRAS = {
    "matplotlib": "plot",
    **{name: name for name in ("lightning", "peft", "transformers")},
    **dict.fromkeys(("joblib", "mnist1d", "rich", "sklearn", "typer"), "demo"),
}
_INSTALLED_AS = {name: f"'constrained-growth[{extra}]'" for name, extra in _EXTRAS.items()}
_INSTALLED_AS["pandas"] = "pandas"


@contextmanager
def extra_packages() -> Iterator[None]:
    """Import packages within this context; where one is missing, the error says what to install.

    Raises:
        ModuleNotFoundError: As Python's own, with the command that installs what is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _INSTALLED_AS:
            raise
        fix = f"pip install {_INSTALLED_AS[package]}"
        raise ModuleNotFoundError(f"{package} is missing: {fix}", name=package) from None
