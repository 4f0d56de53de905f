"""Training on two processes that torchrun starts, and starts again when one of them has died.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 elastic.py FOLDER

For a model sharded by `fully_shard`: a run in which the second process kills itself once, to be
taken up by those that come next, and one in which it does not. In the end the loss of the second
process fails within a decision.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import shard
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import constrained_growth as cg

DEATH = 11
"""The step before which the process dies; there is a checkpoint at every fourth."""


def train(path: Path | None, disturb: Callable[[int], None]) -> dict[str, Any]:
    """A run with two insertions; `disturb(step)` is called before each loss, 0 in a decision."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 2)
    )
    shard(model[2], model)
    x = torch.randn(72, 2)
    data = TensorDataset(x, (x.norm(dim=1) > 1.1).long())
    torch.manual_seed(dist.get_rank())
    loader = DataLoader(data, batch_size=6, sampler=DistributedSampler(data, seed=3))
    steps, deciding = 0, False

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        nonlocal steps
        steps += not deciding
        disturb(0 if deciding else steps)
        return nn.functional.cross_entropy(output, target)

    def proposed(_: nn.Module) -> list[cg.Candidate]:
        nonlocal deciding
        deciding = True
        mlp = functools.partial(cg.blocks.ResidualMLP, 6, 4, nn.Tanh())
        return [cg.Candidate(site, mlp()) for site in ("1", "3")]

    def decided(_: cg.Grower) -> None:
        nonlocal deciding
        deciding = False

    history = cg.grow(
        model,
        lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        loss_fn,
        loader,
        epochs=3,
        candidates=proposed,
        max_insertions=2,
        callbacks=[decided],
        checkpoint=path,
        checkpoint_every=4,
        progress=False,
    )
    weights = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }
    return {"weights": weights, "losses": history.losses, "steps": steps}


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=1000))
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    second = dist.get_rank() == 1

    def keep(name: str, run: dict[str, Any]) -> None:
        if not second:
            torch.save(run, folder / name)
        dist.barrier()

    def die(step: int) -> None:
        died = folder / "died"
        if second and step == DEATH and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def fail(step: int) -> None:
        if second and step == 0:
            raise OSError("disk full")

    keep("taken up", train(folder / "run.safetensors", die))
    keep("whole", train(None, lambda step: None))
    train(None, fail)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
