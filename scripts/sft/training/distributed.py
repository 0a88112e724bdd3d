"""Communication between the processes of one run; with a single process every function is the identity."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from sft.errors import ConfigError, EnvironmentProblem, RunError, SftError, one_line
from sft.model import shard

T = TypeVar("T")
BUCKET_BYTES = 25 * 2**20  # of gradients that are reduced together, about, as DistributedDataParallel does
_LOST_PEER = "closed by peer|reset by peer|Broken pipe|Timed out|timed out|NCCL|Gloo|gloo|recvValue".split("|")


def world() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process; 0 is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def start(settings: Mapping[str, Any] | None = None) -> None:
    """Connects the processes where a launcher has started several. settings: those of the run.

    Raises EnvironmentProblem if they do not meet, ConfigError on every rank if their settings differ.
    """
    if world() == 1 or dist.is_initialized():
        return
    from accelerate import PartialState

    try:
        PartialState(cpu=not torch.cuda.is_available())
    except (ValueError, RuntimeError) as error:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        raise EnvironmentProblem(
            f"the {world()} processes of this run do not meet: {one_line(error)}",
            where=", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names),
            fix="make train-multi NPROC=2, or another launcher that sets these variables",
        ) from error
    of_ranks = all_gather({**_flat(settings or {}), "ACCELERATE_USE_FSDP": _is_set("ACCELERATE_USE_FSDP")})
    for other, found in enumerate(of_ranks):
        if differing := [key for key in {**of_ranks[0], **found} if of_ranks[0].get(key) != found.get(key)]:
            key = differing[0]
            raise ConfigError(
                f"rank {other} has another config than rank 0: {key} is {found.get(key)}, not {of_ranks[0].get(key)}",
                where=", ".join(differing),
                fix="start every process with the same config and the same --set",
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    pairs = ((f"{prefix}{key}", value) for key, value in settings.items())
    return {
        name: leaf
        for key, value in pairs
        for name, leaf in (_flat(value, f"{key}.") if isinstance(value, Mapping) else {key: value}).items()
    }


def sharding() -> Any:
    """accelerate's `fsdp_config` where the launcher chose FSDP, None for a copy of the model on each rank.

    Raises EnvironmentProblem for DeepSpeed, FSDP 1, and settings that the config of a run has.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise EnvironmentProblem(
            "DeepSpeed is not supported: FSDP2 shards the same states (ZeRO-3, or ZeRO-2 with"
            " fsdp_reshard_after_forward: false) and belongs to torch",
            where="the accelerate config",
            fix="make train-multi SHARD=fsdp",
        )
    if world() == 1 or not _is_set("ACCELERATE_USE_FSDP"):
        return None
    from accelerate import FullyShardedDataParallelPlugin

    try:
        settings = FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise EnvironmentProblem(
            one_line(error), where="fsdp_config in the accelerate config", fix="see env/accelerate_fsdp_2.yaml"
        ) from error
    wrong = {"fsdp_version: 2": settings.fsdp_version != 2}
    wrong["fsdp_activation_checkpointing: false (train.gradient_checkpointing does it)"] = (
        settings.activation_checkpointing
    )
    wrong["fsdp_cpu_ram_efficient_loading: false"] = _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING")
    if missing := [setting for setting, is_wrong in wrong.items() if is_wrong]:
        raise EnvironmentProblem(
            f"FSDP is used with {', '.join(missing)}", where="fsdp_config in the accelerate config", fix="set that"
        )
    return settings


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def what_is_shared() -> Literal["ddp", "zero2", "fsdp"]:
    """By the processes: nothing, gradients and optimizer states, or the weights too."""
    settings = sharding()
    return "ddp" if settings is None else "fsdp" if settings.reshard_after_forward else "zero2"


def shard_model(model: Any, dtype: torch.dtype) -> None:
    """Shards the model, which computes in `dtype`, over all ranks where the launcher chose that."""
    from torch.distributed.device_mesh import init_device_mesh

    if (settings := sharding()) is not None:
        mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world(),))
        offload = _is_set("FSDP_OFFLOAD_PARAMS")
        shard.shard(model, mesh, dtype=dtype, reshard=settings.reshard_after_forward, offload=offload)


def on_rank0(function: Callable[[], T], *, together: bool = False) -> T:
    """Calls `function` on rank 0 and returns its result on every rank.

    together: every rank calls it, as the forward passes in it are collective; rank 0's result counts.
    An exception is raised on every rank, so that none waits for a process that has ended: the same SftError, or a
    RunError that names any other exception of rank 0.
    """
    if world() == 1:
        return function()
    result: list[Any] = [None, None]
    raised: Exception | None = None
    if rank() == 0 or together:
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


def largest_number(value: int) -> int:
    """The largest of a number over ranks, for `StepConfig.lockstep`."""
    return largest([value], "cuda" if torch.cuda.is_available() else "cpu")[0]


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
