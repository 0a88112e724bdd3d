"""DeepSpeed's ZeRO in the place of FSDP2: its engine runs the backward pass, the reduction and the optimizer's step.

With ZeRO-2 processes share gradients and optimizer states, with ZeRO-3 the weights too: each module gathers its own.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.errors import EnvironmentProblem, one_line

BUCKET = 20_000_000  # numbers that are reduced or gathered together; DeepSpeed's own 5e8 would take 2 GB of each GPU
TAG = "zero"


class _Call(nn.Module):
    """The module that the engine runs: calls what computes the losses, so that the head's matrix is gathered for it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


class Engine:
    """DeepSpeed's engine with the methods of accelerate's Accelerator that the training loop uses.

    model: on the device for ZeRO-2, on the CPU for ZeRO-3, which moves each weight to the GPU in parts. optimizer: of
    torch, on the model's weights. zero: DeepSpeed's `zero_optimization`. max_norm: gradients are clipped to it, 0: not.
    Raises EnvironmentProblem for a version that is too old.
    """

    scaler, optimizer_step_was_skipped = None, False

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, zero: Mapping[str, Any], *, max_norm: float
    ) -> None:
        self.model, self.optimizer, self.ranks = model, optimizer, torch.distributed.get_world_size()
        self.shares_weights = zero["stage"] == 3
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # counted by DeepSpeed alone
            "managed_gradient_accumulation": False,  # any number of backward passes before a step
            "gradient_clipping": max_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET, **zero},
        }
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
            import deepspeed

            if not hasattr(deepspeed.DeepSpeedEngine, "managed_gradient_accumulation"):
                what = f"DeepSpeed {deepspeed.__version__} fixes the number of micro-batches a step"
                raise EnvironmentProblem(what, where="--shard deepspeed", fix="pip install 'deepspeed>=0.19.8'")
            for handler in logging.getLogger("DeepSpeed").handlers:
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(sys.stderr)
            if self.shares_weights:
                device = deepspeed.get_accelerator().current_device_name()
                for buffer in model.buffers():
                    buffer.data = buffer.data.to(device)
                for weight in model.parameters():
                    if (state := getattr(weight, "quant_state", None)) is not None:
                        state.to(device)
                deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            self.engine: Any = deepspeed.initialize(model=_Call(model), optimizer=optimizer, config=settings)[0]

    def forward(self, losses: Callable[[], Tensor]) -> Tensor:
        """`losses()` inside of the engine's forward pass, which would turn autocast off, with a warning."""
        device = self.engine.device.type
        autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

        def compute() -> Tensor:
            with autocast:
                return losses()

        with torch.autocast(device, enabled=False):
            return self.engine(compute)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients; DeepSpeed takes means over ranks, where the loop takes sums."""
        self.engine.backward(loss * self.ranks)

    def clip_grad_norm_(self, _: Iterable[Tensor], __: float) -> float:
        """The norm of the gradients over all ranks; the weights are updated already, unless it is not finite."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def whole_state(self, *, trained_only: bool) -> dict[str, Tensor] | None:
        """As `shard.whole_state`: one weight after another is gathered. None where every rank has them all."""
        if not self.shares_weights:
            return None
        import deepspeed

        state: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}  # tied weights stay one tensor
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if tensor.requires_grad or not trained_only:
                with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
                    if torch.distributed.get_rank() == 0:
                        if id(tensor) not in copies:
                            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
                        state[name] = copies[id(tensor)]
        return state

    def save(self, folder: Path) -> None:
        """Every rank writes its part of the trained weights and of the optimizer's state. Raises EnvironmentProblem."""
        try:
            self.engine.save_checkpoint(str(folder), TAG, save_latest=False, exclude_frozen_parameters=True)
        except (OSError, RuntimeError) as error:
            fix = "free disk space and run the same command: it resumes from the newest checkpoint"
            raise EnvironmentProblem(one_line(error, 200), where=str(folder), fix=fix) from error

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, on as many ranks."""
        self.engine.load_checkpoint(str(folder), TAG, load_module_strict=False, load_lr_scheduler_states=False)
