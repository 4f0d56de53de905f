"""A training run in one file: written whole or not at all, read without executing anything."""

from constrained_growth.checkpoint.checkpoint import (
    Checkpoint,
    Resumed,
    load,
    restore,
    resume,
    save,
)
from constrained_growth.checkpoint.file import previous

__all__ = [
    "Checkpoint",
    "Resumed",
    "load",
    "previous",
    "restore",
    "resume",
    "save",
]
