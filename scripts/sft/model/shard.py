"""Weights that the processes of a run share: each holds a part and gathers a layer while it is computed.

torch's `fully_shard` (FSDP2) does it; here is which modules it wraps, and how whole tensors go in and come out. Where
DeepSpeed does it (`zero.Engine`), the same functions ask its engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from sft.config.schema import Config
from sft.errors import ConfigError
from sft.model.adapters import unwrap

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sft.model.zero import Engine


def shard(
    model: Any, mesh: DeviceMesh, *, dtype: torch.dtype = torch.float32, reshard: bool = True, offload: bool = False
) -> None:
    """Shards every layer of the transformers model (`_no_split_modules`), then what is left of it, over `mesh` [ranks].

    Gradients are the sums over ranks, in fp32. dtype: the type that is computed in; layers are gathered in it where it
    is a 16-bit one, and each rank's part keeps its own. reshard: a layer's other parts are freed after its forward pass
    and gathered again for the backward pass (ZeRO-3), else after the backward pass (ZeRO-2). offload: this rank's
    parts, with their gradients and optimizer states, stay in the machine's memory.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    base: Any = unwrap(model)
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    how: dict[str, Any] = {"mesh": mesh, "offload_policy": policy}
    if dtype != torch.float32:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = set(base._no_split_modules or ())
    for module in list(base.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, reshard_after_forward=reshard, **how)
    fully_shard(base, **how)
    for module in base.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction


def require_shardable(config: Config, backend: str, optimizers: Collection[str], *, deepspeed: bool = False) -> None:
    """Raises ConfigError for settings that are not supported where processes share the weights.

    config: resolved. optimizers: those that work on parts of weights. deepspeed: its engine does, which has taken the
    step before the loop could drop it.
    """
    train = config.train
    supported = {
        "tuning.adapter": (config.tuning.adapter == "lora", "lora"),
        "tuning.backend": (backend == "bnb", "bnb"),
        "train.ewc.strength": (not train.ewc.strength, "0"),
        "train.fp16": (train.fp16 is not True, "false"),
        "train.kernels": (train.kernels == "plain", "plain"),
        "train.activation_offload": (not train.activation_offload, "false"),
        "train.optim": (train.optim in optimizers, "adamw_torch"),
        "train.on_nan": (train.on_nan != "skip" or not deepspeed, "stop"),
    }
    if wrong := [(key, value) for key, (is_supported, value) in supported.items() if not is_supported]:
        engine, why = ("DeepSpeed", "") if deepspeed else ("FSDP", ": this needs whole weights")
        raise ConfigError(
            f"with {engine} {', '.join(key for key, _ in wrong)} cannot be as it is set{why}",
            where=", ".join(key for key, _ in wrong),
            fix=" ".join(f"--set {key}={value}" for key, value in wrong) + ", or DDP",
        )


def is_sharded(model: Any) -> bool:
    """Whether `shard` was called on the model, so that its forward and backward passes are collective."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(unwrap(model), FSDPModule) or engine_of(model) is not None


def engine_of(model: Any) -> Engine | None:
    """DeepSpeed's engine where it trains the model."""
    return vars(unwrap(model)).get("zero_engine")


def compute(model: Any, losses: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`losses()`, a forward pass of the model and its losses, in DeepSpeed's engine where it trains the model."""
    engine = engine_of(model)
    return losses() if engine is None else engine.forward(losses)


def release(model: Any) -> None:
    """Frees the weights that stay whole after a forward pass without a backward pass; `parameters` are parts again."""
    from torch.distributed.fsdp import FSDPModule

    for module in unwrap(model).modules():  # with `reshard` off, layers stay whole too
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_state(model: Any) -> dict[str, torch.Tensor] | None:
    """The state in whole tensors (of an adapter the trained ones) on rank 0, elsewhere empty. All ranks call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not is_sharded(model):
        return None
    is_adapter = hasattr(model, "peft_config")
    if (engine := engine_of(model)) is not None:
        return engine.whole_state(trained_only=is_adapter)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=is_adapter)
    state: dict[str, Any] = dict(get_model_state_dict(model, options=options))
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(weight): name for name, weight in reversed(named.items())}
    for name in state.keys() & named.keys():  # tied weights are one tensor again
        state[name] = state.get(first[id(named[name])], state[name])
    return state


@contextlib.contextmanager
def loading_whole(model: Any) -> Any:
    """Within the block whole tensors can be copied into sharded weights: each rank takes its part."""
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication() if is_sharded(model) else contextlib.nullcontext():
        yield
