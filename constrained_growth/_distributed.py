"""Several processes, each with a shard of the data, and one answer for all of them.

Only sums and counts are added up, never norms. Every function here is collective: each process
of the group calls it, in the same order. Without an initialised `torch.distributed`, or with
one process, they do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from constrained_growth.errors import DataError, GrowthError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


def several(group: ProcessGroup | None) -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def rank(group: ProcessGroup | None) -> int:
    """The number of this process in the group; 0 without others."""
    return dist.get_rank(group) if several(group) else 0


def num_processes(group: ProcessGroup | None) -> int:
    """How many there are in the group; 1 without others."""
    return dist.get_world_size(group) if several(group) else 1


def everywhere(
    work: Callable[[], T], group: ProcessGroup | None, *, collective: bool = False
) -> list[T]:
    """Do some work on every process and give the results, by rank, to all of them.

    An error on one process is an error on all (elsewhere a GrowthError, of its class if it is
    one), so that no process waits for one that gave up. The work makes no collective calls but
    through this function, unless it is `collective`, as with a sharded model. Then an error is
    raised at once: the others wait in the middle of the model, where they cannot be told.
    """
    if not several(group):
        return [work()]
    result, error = work() if collective else None, None
    if not collective:
        try:
            result = work()
        except Exception as caught:
            if getattr(caught, _TOLD, False):
                raise  # from within: the others have heard of it there
            error = caught
    kind = type(error) if isinstance(error, GrowthError) else GrowthError
    # as text, since an error need not be picklable
    said = None if error is None else (kind, f"{type(error).__name__}: {error}")
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, said), group=group)
    if error is not None:
        setattr(error, _TOLD, True)
        raise error
    for number, (_, said) in enumerate(outcomes):
        if said is not None:
            kind, message = said
            failure = kind(f"process {number} of the group failed with {message}")
            setattr(failure, _TOLD, True)
            raise failure
    return [result for result, _ in outcomes]


_TOLD = "_constrained_growth_told_everywhere"
"""Attribute of an error that all processes have heard of."""


def in_step(items: Iterable[T], group: ProcessGroup | None) -> Iterator[tuple[T, bool]]:
    """The items of each process, on all processes equally many: (item, True).

    A process that has no more items repeats its last one: (item, False).
    """
    iterator, kept, first = iter(items), [], True
    here = rank(group)

    def advance() -> bool:
        for item in iterator:
            kept[:] = [item]
            return True
        return False

    while any(going := everywhere(advance, group)):
        if first and not all(going):
            raise DataError(
                f"data: the processes {[i for i, one in enumerate(going) if not one]} of the group "
                "have no batches; a sharded model runs on all processes at once, so give each "
                "at least one batch."
            )
        first = False
        yield kept[0], bool(going[here])


def add_up(tensors: Iterable[Tensor], group: ProcessGroup | None) -> None:
    """Sum each of the tensors over the processes, in place."""
    for tensor in tensors if several(group) else ():
        whole = tensor.contiguous()  # the backends take no other
        dist.all_reduce(whole, group=group)
        if whole is not tensor:
            tensor.copy_(whole)


def take_from_first(tensors: Iterable[Tensor], group: ProcessGroup | None) -> None:
    """Give the tensors the values they have on the first process of the group, in place."""
    if several(group):
        for tensor in tensors:
            dist.broadcast(tensor, group=group, group_src=0)


def unwrapped(model: Callable[..., Any]) -> Callable[..., Any]:
    """The module inside a DistributedDataParallel, whose own forward waits for the others.

    It would wait in vain where one process has more batches than another.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
