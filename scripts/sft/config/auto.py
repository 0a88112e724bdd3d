"""How the rows of one optimizer step are shared out over micro-batches."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sft.config.load import unequal_batches
from sft.config.schema import Config, TrainSection

EFFECTIVE_BATCH = 16


def batch_plan(
    effective_batch: int | Literal["auto"],
    batch_size: int | Literal["auto"],
    grad_accum: int | Literal["auto"],
    measured: int | None,
) -> tuple[int, int, int]:
    """(rows of a step, most rows of a micro-batch, micro-batches of a step), from what is given.

    Both given: their product is the step. grad_accum alone: ceil(effective / grad_accum). batch_size alone: it caps a
    micro-batch. Neither: `measured` rows caps it, evened out over the micro-batches. A part alone that is larger than
    an `auto` step makes the step as large.
    Raises ConfigError when all three are given and unequal.
    """
    if batch_size != "auto" and grad_accum != "auto":
        product = batch_size * grad_accum
        if effective_batch not in ("auto", product):
            raise unequal_batches(int(effective_batch), batch_size, grad_accum, where="the section train")
        return product, batch_size, grad_accum
    given = [part for part in (batch_size, grad_accum) if part != "auto"]
    effective = max([EFFECTIVE_BATCH, *given]) if effective_batch == "auto" else effective_batch
    if grad_accum != "auto":
        batch = math.ceil(effective / grad_accum)
    elif batch_size != "auto":
        batch = min(batch_size, effective)
    else:
        batch = math.ceil(effective / math.ceil(effective / max(1, min(measured or 1, effective))))
    return effective, batch, math.ceil(effective / batch)


def agree(effective: int, batch: int, accum: int) -> bool:
    """Whether three settled numbers fit together, where the last micro-batch of a step may be smaller."""
    return batch * accum == effective or accum == math.ceil(effective / batch)


log = logging.getLogger("sft.config")

MOST_MICRO_TOKENS = 4096
# Full fine-tuning, by the model's nominal size in billions of parameters (guide seed, "guidelines by model size").
FULL_RATES = {1: 1e-4, 7: 2e-5, 13: 1e-5, 70: 5e-6}
ADAPTER_RATE_SMALL, ADAPTER_RATE_LARGE, ADAPTER_LARGE_FROM = 2e-4, 1e-4, 3e9
FALLING = ("loss", "perplexity", "repetition", "empty_rate", "wer", "cer", "ter")


@dataclass(frozen=True)
class Facts:
    """What is known about the machine, the model and the rows; None for what is not.

    capability: the GPU's compute capability. parameters: of the base model. train_rows: rows to train on.
    measured_batch: rows at max_seq_len that a micro-batch was measured to hold. bf16_supported: torch's word,
    which can rule bfloat16 out but not in where the capability is known: torch counts emulation on older cards.
    """

    device: Literal["cpu", "cuda"]
    capability: tuple[int, int] | None = None
    parameters: int | None = None
    train_rows: int | None = None
    measured_batch: int | None = None
    seq2seq: bool = False
    bf16_supported: bool | None = None

    @property
    def has_bf16(self) -> bool:
        if self.device == "cpu":
            return True
        if self.capability is None:
            return bool(self.bf16_supported)
        return self.ampere and self.bf16_supported is not False

    @property
    def ampere(self) -> bool:
        """Compute capability 8.0 and newer."""
        return self.device == "cuda" and self.capability is not None and self.capability >= (8, 0)

    @property
    def name(self) -> str:
        if self.device == "cpu":
            return "the CPU"
        return f"a GPU of compute capability {'.'.join(map(str, self.capability))}" if self.capability else "the GPU"


@dataclass(frozen=True)
class Resolved:
    """A configuration without `auto` in `train`, and the reason of every value that was settled or fixed.

    warnings: what the user asked for and should know more about; they have been logged.
    """

    config: Config
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()


@dataclass
class _Work:
    train: TrainSection
    facts: Facts
    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def settle(self, name: str, value: Any, reason: str) -> None:
        if getattr(self.train, name) != value or type(getattr(self.train, name)) is not type(value):
            self.values[name] = value
            self.reasons[f"train.{name}"] = reason


def resolve(config: Config, facts: Facts) -> Resolved:
    """Settles every `auto` of `train`; an explicit value is never changed.

    data.template_path, tuning.lora.target_modules and the `auto`s of `model` are found in the model itself, later.
    Raises ConfigError when batch_size, grad_accum and effective_batch contradict each other.
    """
    work = _Work(config.train, facts)
    _precision(work)
    _hardware(work)
    _rate(work, config.tuning.mode)
    _epochs(work)
    _batch(work, config.model.max_seq_len)
    _strategies(work)
    _watched_metric(work)
    for warning in work.warnings:
        log.warning(warning)
    settled = config.model_copy(update={"train": config.train.model_copy(update=work.values)})
    return Resolved(settled, work.reasons, tuple(work.warnings))


def _precision(work: _Work) -> None:
    train, facts = work.train, work.facts
    bf16, fp16 = train.bf16, train.fp16
    has = "has" if facts.has_bf16 else "has no"
    if bf16 == "auto":
        wanted = fp16 is not True and facts.has_bf16
        work.settle("bf16", wanted, "fp16 is on" if fp16 is True else f"{facts.name} {has} bfloat16")
        bf16 = wanted
    if fp16 == "auto":
        wanted = bf16 is False and facts.device == "cuda"
        why = "bf16 is on" if bf16 else "16-bit on a GPU without bf16" if wanted else "bf16 is off: fp32 on the CPU"
        work.settle("fp16", wanted, why)
    if train.bf16 is True and not facts.has_bf16:
        work.warnings.append(f"train.bf16 is true, but {facts.name} has no bfloat16: it is emulated and slow")
    if train.fp16 is True and facts.device == "cpu":
        work.warnings.append("train.fp16 is true on the CPU, where it is slow and may overflow: bf16 is the better one")
    elif facts.seq2seq and work.values.get("fp16", train.fp16) is True:
        work.warnings.append("fp16 overflows in some encoder-decoder models: --set train.fp16=false if the loss is NaN")


def _hardware(work: _Work) -> None:
    train, facts = work.train, work.facts
    gpu = facts.device == "cuda"
    if train.tf32 == "auto":
        work.settle("tf32", facts.ampere, f"{facts.name} {'has' if facts.ampere else 'has no'} TF32")
    if train.gradient_checkpointing == "auto":
        why = "saves most of a GPU's activation memory" if gpu else "on the CPU time is dearer than memory"
        work.settle("gradient_checkpointing", gpu, why)
    if train.kernels == "auto":
        work.settle("kernels", "plain", "faster kernels are used only where the config names them")
    if train.optim == "auto":
        work.settle("optim", "adamw_torch_fused" if gpu else "adamw_torch", f"AdamW on {facts.name}")


def _rate(work: _Work, mode: str) -> None:
    if work.train.learning_rate != "auto":
        return
    parameters = work.facts.parameters
    size = "a model of unknown size" if parameters is None else f"{parameters / 1e9:.2f}B parameters"
    if mode == "full":
        # The nearest nominal size by ratio: 7.6B counts as 7B, 14.8B as 13B.
        billions = 7.0 if parameters is None else max(parameters / 1e9, 1e-3)
        nominal = min(FULL_RATES, key=lambda known: abs(math.log(billions / known)))
        work.settle("learning_rate", FULL_RATES[nominal], f"full tuning of {size}: the rate of the {nominal}B class")
        return
    small = parameters is not None and parameters < ADAPTER_LARGE_FROM
    rate = ADAPTER_RATE_SMALL if small else ADAPTER_RATE_LARGE
    work.settle("learning_rate", rate, f"{mode} on {size}: {'below' if small else 'not known to be below'} 3B")
    if parameters is not None and not small:
        work.reasons["train.learning_rate"] = f"{mode} on {size}: 3B or more"


def _epochs(work: _Work) -> None:
    if work.train.epochs != "auto":
        return
    rows = work.facts.train_rows
    epochs = 3.0 if rows is None else 5.0 if rows < 1_000 else 3.0 if rows < 10_000 else 1.0
    why = "the number of rows is not known" if rows is None else f"{rows:,} training rows"
    if work.train.max_steps is not None:
        why += "; max_steps decides anyway"
    work.settle("epochs", epochs, why)


def _batch(work: _Work, max_seq_len: int) -> None:
    train, facts = work.train, work.facts
    measured, asked = facts.measured_batch, (train.effective_batch, train.batch_size, train.grad_accum)
    if facts.device == "cpu" and measured is None:
        measured = 1 << 30
    if "auto" in asked or not agree(*map(int, asked)):
        effective, batch, accum = batch_plan(*asked, measured)
        free = train.batch_size == "auto" and train.grad_accum == "auto"
        work.settle("effective_batch", effective, _why_effective(train, effective))
        work.settle("batch_size", batch, _why_batch(facts) if free else f"{effective} rows in {accum} micro-batches")
        work.settle("grad_accum", accum, f"{effective} rows a step, at most {batch} in a micro-batch")
    else:
        batch = int(asked[1])
    if train.micro_batch_tokens == "auto":
        budget = max(max_seq_len, min(batch * max_seq_len, MOST_MICRO_TOKENS))
        work.settle("micro_batch_tokens", budget, f"{batch} rows of {max_seq_len}, at most {MOST_MICRO_TOKENS}")


def _why_effective(train: TrainSection, effective: int) -> str:
    if train.batch_size != "auto" and train.grad_accum != "auto":
        return "batch_size * grad_accum"
    return "the default" if effective == EFFECTIVE_BATCH else "as large as the part of it that is given"


def _why_batch(facts: Facts) -> str:
    if facts.measured_batch is not None:
        return f"{facts.measured_batch} rows at max_seq_len were measured to fit"
    return "the whole step; micro_batch_tokens cuts it" if facts.device == "cpu" else "not measured on the GPU yet"


def _strategies(work: _Work) -> None:
    train = work.train
    if train.eval_steps is None:
        work.settle("eval_steps", train.save_steps, "follows save_steps")
    if train.save_strategy == "auto":
        without = train.eval_strategy == "no"
        reason = "eval_strategy is no" if without else "follows eval_strategy"
        work.settle("save_strategy", "epoch" if without else train.eval_strategy, reason)


def _watched_metric(work: _Work) -> None:
    if work.train.greater_is_better == "auto":
        name = work.train.metric_for_best_model.removeprefix("eval_").removeprefix("evaluate:").removeprefix("eval/")
        falls = name in FALLING or name.endswith(("_loss", "/loss"))
        work.settle("greater_is_better", not falls, f"{name} is better when {'lower' if falls else 'higher'}")
