"""Several processes for a test: they meet in a file, and all end when one of them fails."""

import multiprocessing
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import start_processes

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others: longer than any busy machine takes, unless it hangs."""


# torch is imported once, by a server from which the processes are forked before anything runs
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.fsdp", "constrained_growth.training"]
)


def together(work: Callable[..., None], folder: Path, *args: Any, processes: int = 2) -> None:
    """Call `work(number, *args)` in processes of one group, with an environment as by torchrun.

    Args:
        work: Can be imported.
        folder: Where they meet.
        *args: Can be pickled.
        processes: How many.
    """
    arguments = work, str(folder / "meeting"), processes, args
    start_processes(_fork, arguments, 1, start_method="forkserver")


def _fork(_: int, *arguments: Any) -> None:
    """In a process that has imported what the work needs, before anything runs."""
    start_processes(_begin, arguments, arguments[2], start_method="fork")


def _begin(
    number: int, work: Callable[..., None], meeting: str, processes: int, args: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    places = {"RANK": number, "LOCAL_RANK": number}
    places |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in places.items()})
    dist.init_process_group(
        "gloo", f"file://{meeting}", PATIENCE, rank=number, world_size=processes
    )
    work(number, *args)
    dist.barrier()
    dist.destroy_process_group()


def shard(*modules: nn.Module, **options: Any) -> None:
    """Call `fully_shard` on each, on the CPU also where there is another device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in modules:
        fully_shard(module, **{"mesh": mesh, **options})
