"""Optimizers and learning-rate schedules by their names in the config, from torch, transformers and bitsandbytes.

`create_optimizer` makes the parameter groups (no weight decay on norms and biases) and the optimizer; `Muon` is torch's
with AdamW beside it. `averaged_weights` shows a schedule-free optimizer's result while it is evaluated or saved.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sft.config.schema import TrainSection
from sft.errors import ConfigError, one_line
from sft.model.adapters import head, lora_plus, unwrap

DECAY_RATIO = 0.2  # of the steps, in which `warmup_stable_decay` falls (Hägele et al., 2024: 10 to 20 %)
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


class Muon(torch.optim.Optimizer):
    """torch's Muon for groups with `matrices`, AdamW for the others, as one optimizer.

    A step of Muon has the size that AdamW's has in long training, 0.2 of the rate (`match_rms_adamw`; Liu et al., 2025,
    arXiv 2502.16982), so that one rate and weight decay serve both.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        kinds: dict[bool, Any] = {
            True: partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
            False: torch.optim.AdamW,
        }
        self.parts: dict[bool, Any] = {}
        for matrices, kind in kinds.items():
            if mine := [group for group in groups if group["matrices"] is matrices]:
                self.parts[matrices] = kind(mine, lr=lr)
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for matrices, part in self.parts.items():  # which work on the groups and the state of the whole
            part.param_groups = [group for group in self.param_groups if group["matrices"] is matrices]
            part.state = self.state
            part.step()


def create_optimizer(model: nn.Module, train: TrainSection, lora_plus_ratio: float = 1.0) -> torch.optim.Optimizer:
    """The optimizer that `train.optim` names; no weight decay on biases and norms.

    lora_plus_ratio: rate of the B matrices over that of all others. Raises ConfigError if its library is missing.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    no_decay = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], no_decay))
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [weight for name, weight in trained if name in decayed], "weight_decay": train.weight_decay},
        {"params": [weight for name, weight in trained if name not in decayed], "weight_decay": 0.0},
    ]
    rate = float(train.learning_rate)
    if lora_plus_ratio != 1:
        groups = lora_plus(groups, model, rate, lora_plus_ratio)
    try:
        return _create(train, groups, rate, model)
    except (ValueError, TypeError, ImportError) as error:
        library = " (pip install schedulefree)" if "schedule_free" in train.optim else ""
        raise ConfigError(
            f"train.optim is {train.optim}, which cannot be used: {one_line(error, 300)}{library}",
            where="train.optim",
            fix="--set train.optim=auto",
        ) from error


def _create(train: TrainSection, groups: list[dict[str, Any]], rate: float, model: nn.Module) -> torch.optim.Optimizer:
    name = train.optim
    if name in TORCH:
        return TORCH[name](groups, lr=rate)
    if name == "muon":
        return Muon(_by_matrices(groups, model), rate)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        adafactor: torch.optim.Optimizer = Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
        return adafactor
    if name.startswith("schedule_free_"):
        kinds = {"adamw": "AdamWScheduleFree", "radam": "RAdamScheduleFree", "sgd": "SGDScheduleFree"}
        free: torch.optim.Optimizer = getattr(
            importlib.import_module("schedulefree"), kinds[name.removeprefix("schedule_free_")]
        )(groups, lr=rate)
        return free
    from transformers import Trainer, TrainingArguments

    on_cpu = next(model.parameters()).device.type == "cpu"
    settings = TrainingArguments(optim=name, learning_rate=rate, weight_decay=train.weight_decay, use_cpu=on_cpu)
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(settings, model)  # type: ignore[arg-type]
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    if options.get("optim_bits") == 8 and (manager := getattr(optimizer, "mng", None)) is not None:
        for module in model.modules():  # bitsandbytes: 8-bit states of embeddings are unstable
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _by_matrices(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Each group in two: the matrices of linear layers but the head, which Muon is for, and all else."""
    from transformers.pytorch_utils import Conv1D

    last = head(unwrap(model))
    edges = {id(weight) for weight in last.parameters()} if last is not None else set()
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)} - edges
    parts = (
        {**group, "matrices": kind, "params": [one for one in group["params"] if (id(one) in linear) is kind]}
        for group in groups
        for kind in (True, False)
    )
    return [part for part in parts if part["params"]]


def create_scheduler(optimizer: Any, train: TrainSection, warmup_steps: int, total_steps: int) -> Any:
    """The schedule that `train.lr_scheduler_type` names, from transformers."""
    from transformers import get_scheduler

    name: str = train.lr_scheduler_type
    options: dict[str, Any] = {}
    if name == "warmup_stable_decay":
        steps = math.ceil((DECAY_RATIO if train.decay_ratio is None else train.decay_ratio) * total_steps)
        options = {"num_decay_steps": min(steps, total_steps - warmup_steps), "decay_type": "1-sqrt"}
        options["min_lr_ratio"] = train.min_lr_ratio
    elif train.min_lr_ratio:
        name, options = "cosine_with_min_lr", {"min_lr_rate": train.min_lr_ratio}
    return get_scheduler(name, optimizer, warmup_steps, total_steps, scheduler_specific_kwargs=options)


# -- schedule-free: the weights that are trained are not those that are the result (Defazio et al., 2024)


def begin_training(optimizer: Any) -> None:
    """The weights of training in the place of the averaged ones; after `averaged_weights`, or a resume, to the bit."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if hasattr(inner, "train"):
        inner.train()
        with torch.no_grad():
            for weight, state in inner.state.items():
                if "trained" in state:
                    weight.copy_(state.pop("trained"))


def end_training(optimizer: Any) -> None:
    """The averaged weights, which are the result, in the place of those of training."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if hasattr(inner, "eval"):
        inner.eval()


@contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """The weights to evaluate and to save. Meanwhile the optimizer's state holds a copy of those of training, which a
    checkpoint stores with it, so that a resume continues with the same bits.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for group in inner.param_groups if hasattr(inner, "eval") else []:
        for weight in group["params"]:
            inner.state[weight]["trained"] = weight.detach().clone()
    end_training(optimizer)
    yield
    begin_training(optimizer)
