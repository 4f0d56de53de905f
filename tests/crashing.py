"""A training run to be killed, and a process that begins it again and again.

As a script it reads lines "checkpoint log call" and forks a training process for each, so that
torch is imported once. It answers with the process's number, and after an empty line with its exit
code; until then the number is not reused, even if the process has ended.
"""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import constrained_growth as cg
from constrained_growth import checkpoint as checkpoints

STEPS = 40


def train(path: Path | None, log: Path) -> nn.Module:
    """Train, or go on training; each step's loss goes to the log, bit for bit.

    Everything that has a state of its own takes part: Dropout and BatchNorm, a shuffling loader,
    noise from Python and NumPy, AdamW, a schedule, three insertions of randomly drawn blocks.
    """
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    random.seed(4)
    np.random.seed(5)  # noqa: NPY002
    x = torch.randn(100, 2)
    data = TensorDataset(x, (x.norm(dim=1) > 1.1).long())
    loader = DataLoader(
        data, batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    model = nn.Sequential(
        nn.Linear(2, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.1), nn.Linear(6, 6), nn.Tanh()
    ).append(nn.Linear(6, 2))
    cross_entropy = nn.CrossEntropyLoss()
    step = 0 if path is None or not path.exists() else checkpoints.load(path).step
    deciding = False
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal step
        loss = cross_entropy(output, target)
        if deciding:
            return loss
        loss = loss * (1 + 0.01 * random.random() + 0.01 * np.random.rand())  # noqa: NPY002
        step += 1
        os.write(file, f"{step} {loss.item().hex()}\n".encode())
        return loss

    def second(losses: Sequence[float]) -> bool:
        nonlocal deciding
        deciding = len(losses) >= 2
        return deciding

    def decided(grower: cg.Grower) -> None:
        nonlocal deciding
        deciding = False

    cg.grow(
        model,
        lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        loss_fn,
        loader,
        epochs=STEPS // 5,
        when=second,
        max_insertions=3,
        scheduler_factory=lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.9),
        callbacks=[decided],
        checkpoint=path,
        checkpoint_every=2,
        progress=False,
    )
    os.close(file)
    return model


def die_at(call: int) -> None:
    """Make this process kill itself at the given call among those that write checkpoints."""
    calls = 0

    def counted(function: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls < call:
                return function(*args, **kwargs)
            if half:  # of the file is on the disk by then
                function(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            return os.kill(os.getpid(), signal.SIGKILL)

        return inner

    writer: Any = safetensors.torch
    writer.serialize_file = counted(writer.serialize_file, half=True)
    for name in ("fsync", "link", "replace"):
        setattr(os, name, counted(getattr(os, name)))


def serve() -> None:
    """Train in a new process for each line; `call` 0 for one that does not kill itself.

    tqdm's own lock is a semaphore that all forked processes share, and stays locked for all of
    them when one is killed that holds it; its thread may hold it in the moment of a fork.
    """
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    train(None, Path(os.devnull))  # so that all that is imported at first use is there
    while line := sys.stdin.readline():
        path, log, call = line.split()
        child = os.fork()
        if child == 0:
            if int(call):
                die_at(int(call))
            try:
                train(Path(path), Path(log))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
