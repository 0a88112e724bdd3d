"""What the processes of one run tell each other; in a single process every function is the identity."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sft.errors import SftError

T = TypeVar("T")
_LOST = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Timed out",
    "timed out",
    "NCCL",
    "Gloo",
    "gloo",
    "recvValue",
)


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number; 0 is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def start() -> None:
    """Brings the processes together, where a launcher has started several."""
    if world() > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def on_rank0(make: Callable[[], T]) -> T:
    """What rank 0 makes of it, on every rank; an SftError is raised on every rank too."""
    made: list[Any] = [None, None]
    if rank() == 0:
        try:
            made[0] = make()
        except SftError as error:
            made[1] = error
    value, fault = all_gather(tuple(made))[0]
    if fault is not None:
        raise fault
    return value  # type: ignore[no-any-return]


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, on every rank; of a tensor on the device that they train on."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def largest(value: int) -> int:
    """The largest value over ranks, on every rank."""
    return max(all_gather(value)) if world() > 1 else value


def all_gather(value: T) -> list[T]:
    """Each rank's value, on every rank."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds up the ranks' gradients: exact however many micro-batches, none included, each rank's share was cut into."""
    if world() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    waiting = [dist.all_reduce(parameter.grad, async_op=True) for parameter in trained]
    for handle in waiting:
        handle.wait()


def lost(error: BaseException) -> bool:
    """Whether it means that another process of the run is gone."""
    said = str(error)
    return world() > 1 and isinstance(error, RuntimeError) and any(text in said for text in _LOST)


def barrier() -> None:
    """Until every rank is here."""
    if world() > 1:
        dist.barrier()
