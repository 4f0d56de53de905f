"""What a `Grower` takes by name, handed on by `grow` and the callbacks."""

from __future__ import annotations

import difflib
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from constrained_growth.errors import TrainingError
from constrained_growth.training.arguments import check_decisions
from constrained_growth.training.grower import Grower

OPTIONS = tuple(field.name for field in fields(Grower) if field.kw_only)


def checked_options(
    callback: str, loss_fn: object, data: object, options: dict[str, Any]
) -> dict[str, Any]:
    """Options of a `Grower` that a callback was given for it; what is wrong is refused."""
    for name, value in options.items():
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, 1)
            hint = f"did you mean {near[0]}=?" if near else f"the options are {', '.join(OPTIONS)}."
            raise TrainingError(f"{callback}: {name}={value!r:.80} is not an option; {hint}")
    defaults = {field.name: field.default for field in fields(Grower) if field.kw_only}
    check_decisions(SimpleNamespace(loss_fn=loss_fn, data=data, **{**defaults, **options}))
    return options
