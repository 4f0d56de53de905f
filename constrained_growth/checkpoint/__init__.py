"""A training run in one file, written whole or not at all, read without executing anything."""

from constrained_growth.checkpoint.checkpoints import (
    Checkpoint,
    Resumed,
    load,
    restore,
    resume,
    save,
)
from constrained_growth.checkpoint.files import previous
from constrained_growth.checkpoint.random_states import random_state, set_random_state

__all__ = [
    "Checkpoint",
    "Resumed",
    "load",
    "previous",
    "random_state",
    "restore",
    "resume",
    "save",
    "set_random_state",
]
