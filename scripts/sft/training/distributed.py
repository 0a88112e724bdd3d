"""Communication between the processes of one run; with a single process every function is the identity."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sft.errors import RunError, SftError, one_line

T = TypeVar("T")
BUCKET_BYTES = 25 * 2**20  # of gradients that are reduced together, about, as DistributedDataParallel does
_LOST_PEER = "closed by peer|reset by peer|Broken pipe|Timed out|timed out|NCCL|Gloo|gloo|recvValue".split("|")


def world() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process; 0 is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def start() -> None:
    """Connects the processes where a launcher has started several."""
    if world() > 1 and not dist.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def on_rank0(function: Callable[[], T]) -> T:
    """Calls `function` on rank 0 and returns its result on every rank.

    An exception is raised on every rank, so that none waits for a process that has ended: the same SftError, or a
    RunError that names any other exception of rank 0.
    """
    if world() == 1:
        return function()
    result: list[Any] = [None, None]
    raised: Exception | None = None
    if rank() == 0:
        try:
            result[0] = function()
        except SftError as error:
            raised = result[1] = error
        except Exception as error:
            raised = error
            result[1] = RunError(f"the first process failed ({type(error).__name__}: {one_line(error)})")
    dist.broadcast_object_list(result)
    if raised is not None:
        raise raised
    if result[1] is not None:
        raise result[1]
    return result[0]  # type: ignore[no-any-return]


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place; `values` must be on the device that is trained on."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def largest(values: Sequence[int], device: torch.device | str = "cpu") -> list[int]:
    """The largest of each value over ranks. device: the one that is trained on."""
    if world() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.long, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return [int(value) for value in shared.tolist()]


def all_gather(value: T) -> list[T]:
    """The value of each rank, in order of rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Adds up the gradients of all ranks, in buckets.

    Done once a step, after the backward passes: ranks may have run different numbers of micro-batches, or none.
    """
    if world() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    ends = itertools.accumulate(gradient.nbytes for gradient in gradients)
    for _, bucket in itertools.groupby(
        zip(gradients, ends, strict=True), key=lambda pair: (pair[0].dtype, pair[1] // BUCKET_BYTES)
    ):
        together = [gradient for gradient, _ in bucket]
        flat = torch.nn.utils.parameters_to_vector(together)
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, together)


def is_lost_peer(error: BaseException) -> bool:
    """Whether the error means that another process of the run has ended."""
    return world() > 1 and isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER)
