"""Snapshots of random states: the global ones of Python, NumPy, torch and CUDA, and generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

GENERATORS: Any = torch.Generator | random.Random | np.random.Generator | np.random.RandomState


def state_of(generator: Any) -> Any:
    """The state of a generator of one of these types."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    python = isinstance(generator, random.Random)
    return generator.getstate() if python else generator.get_state()


def set_state(generator: Any, state: Any) -> None:
    """Put a generator back into a state of its own."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def seed(number: int) -> None:
    """Seed PyTorch's random numbers.

    `torch.manual_seed` would also seed each device at its first use, when the state that the user
    asked for may long have been put back.
    """
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def random_state() -> dict[str, Any]:
    """The global random states, in types that JSON and safetensors can hold."""
    algorithm, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (algorithm, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        # Asking CUDA for its states initialises it, which takes seconds and GPU memory.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states of `random_state`; CUDA's only where there are as many devices."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def drawing(number: int | None) -> Iterator[None]:
    """Draw from a seed within, and go on as before afterwards; None: as without this."""
    before = random_state()
    if number is not None:
        numpy = np.random.RandomState(number).get_state(legacy=False)["state"]
        generators = random.Random(number), ("MT19937", numpy["key"], numpy["pos"])
        set_random_state({**before, "python": generators[0].getstate(), "numpy": generators[1]})
        seed(number)
    try:
        yield
    finally:
        set_random_state(before)
