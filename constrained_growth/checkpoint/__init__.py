"""A training run in one file, written whole or not at all, read without executing anything."""

from constrained_growth.checkpoint.files import previous
from constrained_growth.checkpoint.loading import Checkpoint, load
from constrained_growth.checkpoint.random_states import random_state, set_random_state
from constrained_growth.checkpoint.resuming import Resumed, restore, resume
from constrained_growth.checkpoint.saving import save

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
