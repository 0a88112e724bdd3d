"""Communication between the processes of one run; with a single process every function is the identity."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sft.config.schema import Config
from sft.errors import ConfigError, EnvironmentProblem, RunError, SftError, one_line
from sft.model import shard, zero
from sft.model.adapters import unwrap
from sft.step.optimizer import create_optimizer
from sft.step.step import compute_dtype

T = TypeVar("T")
BUCKET_BYTES = 25 * 2**20  # of gradients that are reduced together, about, as DistributedDataParallel does
LOST = "another process of this run has ended"
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

    from sft.training.loggers import flat

    try:
        PartialState(cpu=not torch.cuda.is_available())
    except (ValueError, RuntimeError) as error:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        raise EnvironmentProblem(
            f"the {world()} processes of this run do not meet: {one_line(error)}",
            where=", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names),
            fix="make train-multi NPROC=2, or another launcher that sets these variables",
        ) from error
    of_ranks = all_gather({**flat(settings or {}), "ACCELERATE_USE_FSDP": _is_set("ACCELERATE_USE_FSDP")})
    for other, values in enumerate(of_ranks):
        if differing := [key for key in {**of_ranks[0], **values} if of_ranks[0].get(key) != values.get(key)]:
            key = differing[0]
            raise ConfigError(
                f"rank {other} has another config than rank 0: {key} is {values.get(key)}, not {of_ranks[0].get(key)}",
                where=", ".join(differing),
                fix="start every process with the same config and the same --set",
            )


def sharding() -> Any:
    """accelerate's settings where the launcher chose FSDP or DeepSpeed, None for a copy of the model on each rank.

    Raises EnvironmentProblem for FSDP 1, and what a config of ours decides.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed_settings()
    if world() == 1 or not _is_set("ACCELERATE_USE_FSDP"):
        return None
    from accelerate import FullyShardedDataParallelPlugin

    where, wrong = "fsdp_config in the accelerate config", ""
    try:
        settings = FullyShardedDataParallelPlugin()
    except ValueError as error:
        raise EnvironmentProblem(one_line(error), where=where, fix="see env/accelerate_fsdp_2.yaml") from error
    if settings.fsdp_version != 2:
        wrong = "fsdp_version: 2"
    elif settings.activation_checkpointing:
        wrong = "fsdp_activation_checkpointing: false, and train.gradient_checkpointing as you want it"
    elif settings.transformer_cls_names_to_wrap or "SIZE" in os.environ.get("FSDP_AUTO_WRAP_POLICY", ""):
        wrong = "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, which takes the model's own layers"
    elif _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        wrong = "fsdp_cpu_ram_efficient_loading: false, as the ranks of a machine load one after another"
    if wrong:
        raise EnvironmentProblem("this setting of FSDP is not supported", where=where, fix=wrong)
    return settings


def require_deepspeed() -> None:
    """Raises EnvironmentProblem where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise EnvironmentProblem(
            "DeepSpeed is not installed", where="--shard deepspeed", fix="pip install deepspeed, or --shard fsdp"
        )


def _deepspeed_settings() -> Any:
    """accelerate's DeepSpeedPlugin, of which the engine takes `zero_optimization`."""
    require_deepspeed()
    from accelerate import DeepSpeedPlugin

    where, fix, wrong = "deepspeed_config in the accelerate config", "see env/accelerate_deepspeed_2.yaml", ""
    try:
        settings = DeepSpeedPlugin()
    except ValueError as error:
        raise EnvironmentProblem(one_line(error), where=where, fix=fix) from error
    zero, others = settings.deepspeed_config["zero_optimization"], {"zero_optimization", "steps_per_print"}
    if world() == 1:
        wrong, where, fix = "one process shares nothing", "num_processes in the accelerate config", "num_processes: 2"
    elif settings.zero_stage not in (2, 3):
        wrong = f"zero_stage {settings.zero_stage}: only 2 and 3 are supported"
    elif any((zero.get(f"offload_{part}") or {}).get("device") == "nvme" for part in ("optimizer", "param")):
        wrong = "offload to nvme is not supported"
    elif ours := [k for k, v in settings.deepspeed_config.items() if k not in others and v not in ("auto", 1)]:
        wrong = f"{', '.join(ours)}: the config of the run decides this"
    if wrong:
        raise EnvironmentProblem(f"DeepSpeed: {wrong}", where=where, fix=fix)
    return settings


def zero_stage() -> int | None:
    """2 or 3 where the launcher chose DeepSpeed: the processes share optimizer states and gradients, or weights too."""
    stage: int | None = getattr(sharding(), "zero_stage", None)
    return stage


def sharding_name() -> str:
    """How the processes share a run, for its fingerprint; DeepSpeed's checkpoints fit one number of ranks alone."""
    if stage := zero_stage():
        return f"DeepSpeed ZeRO-{stage} on {world()} ranks"
    return "fsdp" if sharding() else "off"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def what_is_shared() -> Literal["ddp", "zero2", "fsdp"] | None:
    """By the processes: nothing, gradients and optimizer states, or the weights too; None where parts are offloaded,
    and for DeepSpeed.
    """
    settings = sharding()
    if settings is not None and (_is_set("FSDP_OFFLOAD_PARAMS") or zero_stage()):
        return None
    return "ddp" if settings is None else "fsdp" if settings.reshard_after_forward else "zero2"


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Where ranks share the weights, the ranks of a machine do the block one after another: each first loads the whole
    model into the machine's memory, which then holds it once.
    """
    if sharding() is None or zero_stage():  # DeepSpeed shards in all processes at once
        yield
        return
    _mesh()  # all ranks make it together
    mine = int(os.environ.get("LOCAL_RANK", "0"))
    for turn in range(largest_number(mine) + 1):
        if turn == mine:
            yield
        dist.barrier()


@functools.cache
def _mesh() -> DeviceMesh:
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world(),))


def shard_model(model: Any, config: Config) -> None:
    """Shards the model over all ranks where the launcher chose that."""
    settings = sharding()
    if zero_stage():
        optimizer = create_optimizer(model, config.train, config.tuning.lora.lora_plus_ratio)
        zero_settings, max_norm = settings.deepspeed_config["zero_optimization"], config.train.max_grad_norm or 0.0
        vars(unwrap(model))["zero_engine"] = zero.Engine(model, optimizer, zero_settings, max_norm=max_norm)
    elif settings is not None:
        dtype = compute_dtype(config.train)
        offload = _is_set("FSDP_OFFLOAD_PARAMS")
        shard.shard(model, _mesh(), dtype=dtype, reshard=settings.reshard_after_forward, offload=offload)


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
