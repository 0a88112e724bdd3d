"""The written rules behind `auto`: what each value becomes on this machine, for this model and these rows, and why.

`RULES` is the list; a rule sees the values that earlier rules have resolved. An explicit value is never changed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sft.config.schema import PAIRED, PREFERENCES, WITH_REFERENCE, Config
from sft.errors import ConfigError

log = logging.getLogger("sft.config")

EFFECTIVE_BATCH = 16
MAX_MICRO_BATCH_TOKENS = 4096
CPU_MICRO_BATCH_TOKENS = 1024  # 1.25 times as fast as 4096 on a 135M model, in 0.5 GiB less: fewer pages are faulted in
# Full fine-tuning, by the model's nominal size in billions of parameters (decision 0001).
FULL_RATES = {1: 1e-4, 7: 2e-5, 13: 1e-5, 70: 5e-6}
PREFIX_RATE = 3e-2  # the demo after 60 steps: validation loss 2.85 at 3e-3, 2.71 at 1e-2, 2.25 at 3e-2
LOWER_IS_BETTER = ("loss", "perplexity", "repetition", "empty_rate", "wer", "cer", "ter")


@dataclass(frozen=True)
class Facts:
    """What is known about the machine, the model and the rows; None for what is not.

    capability: the GPU's compute capability. parameters: of the base model. train_rows: rows to train on.
    measured_batch: rows at max_seq_len that a micro-batch was measured to hold. bf16_supported: torch's answer,
    which can rule bfloat16 out but not in where the capability is known: torch counts emulation on older cards.
    sharded: the processes of the run share the weights.
    """

    device: Literal["cpu", "cuda"]
    capability: tuple[int, int] | None = None
    parameters: int | None = None
    train_rows: int | None = None
    measured_batch: int | None = None
    seq2seq: bool = False
    bf16_supported: bool | None = None
    sharded: bool = False

    @property
    def has_bf16(self) -> bool:
        if self.device == "cuda" and self.capability is not None:
            return self.ampere and self.bf16_supported is not False
        return self.device == "cpu" or bool(self.bf16_supported)

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
    """A configuration without `auto` in `train`, and the reason of every value that a rule chose."""

    config: Config
    reasons: dict[str, str]


def resolve(config: Config, facts: Facts) -> Resolved:
    """Replaces every `auto` of `train` by the value of its rule; logs explicit values that this machine handles badly.

    data.template_path, tuning.lora.target_modules and the `auto`s of `model` depend on the model and are resolved when
    it is loaded. Raises ConfigError when batch_size, grad_accum and effective_batch contradict each other.
    """
    _check_objective(config)
    reasons = {}
    if config.tuning.adapter == "prefix":
        if config.train.gradient_checkpointing is True:
            what = "prefix tuning (tuning.adapter) puts keys and values in front of each row, which recomputation drops"
            fix = "--set train.gradient_checkpointing=false"
            raise ConfigError(what, where="train.gradient_checkpointing", fix=fix)
        if config.train.merge_at_end:
            what = "a prefix (tuning.adapter) cannot be merged into the weights"
            fix = "--set train.merge_at_end=false, or --set tuning.adapter=lora"
            raise ConfigError(what, where="train.merge_at_end", fix=fix)
    if config.train.bf16 is True and not facts.has_bf16:
        log.warning(f"train.bf16 is true, but {facts.name} has no bfloat16: it is emulated and slow")
    if config.train.fp16 is True and facts.device == "cpu":
        log.warning("train.fp16 is true on the CPU, where it is slow and may overflow: bf16 is better there")
    rate, usual = config.train.learning_rate, _learning_rate(config, facts)[0]
    if rate != "auto" and rate > 50 * usual and "adam" in config.train.optim.replace("auto", "adam"):
        log.warning(f"train.learning_rate {rate:g} is {rate / usual:,.0f} times the usual {usual:g}: it may diverge")
    for name, rule in RULES.items():
        if getattr(config.train, name) in ("auto", None):
            value, reasons[f"train.{name}"] = rule(config, facts)
            config = config.model_copy(update={"train": config.train.model_copy(update={name: value})})
    train = config.train
    if train.objective in PREFERENCES and train.preference.beta == "auto":
        beta, reasons["train.preference.beta"] = (2.0 if train.objective == "simpo" else 0.1), f"for {train.objective}"
        preference = train.preference.model_copy(update={"beta": beta})
        config = config.model_copy(update={"train": train.model_copy(update={"preference": preference})})
    if facts.seq2seq and config.train.fp16 is True and facts.device == "cuda":
        log.warning("fp16 overflows in some encoder-decoder models: --set train.fp16=false if the loss is NaN")
    return Resolved(config, reasons)


def _check_objective(config: Config) -> None:
    """Raises ConfigError if the config's preference objective cannot be used with its other settings."""
    train, tuning, name = config.train, config.tuning, config.train.objective
    if name not in PREFERENCES:
        return
    problem = next(
        (
            (key, f"{key} is {value}, but {name} {why}", fix)
            for applies, key, value, why, fix in (
                (name in WITH_REFERENCE and tuning.mode == "full", "tuning.mode", "full",
                 "compares with the base, which is the model with its adapter off",
                 "--set tuning.mode=lora, or train.objective=orpo or simpo, which need no base"),
                (name in WITH_REFERENCE and tuning.lora.bias != "none", "tuning.lora.bias", tuning.lora.bias,
                 "compares with the base, whose biases would have changed too", "--set tuning.lora.bias=none"),
                (name in WITH_REFERENCE and tuning.lora.init not in ("default", "gaussian"),
                 "tuning.lora.init", tuning.lora.init,
                 "compares with the base, which this start of the adapter changes", "--set tuning.lora.init=default"),
                (name in WITH_REFERENCE and tuning.adapter_path is not None, "tuning.adapter_path", tuning.adapter_path,
                 "compares with the model that training begins from, which is the base with its adapter off",
                 "make merge, and name the merged folder as model.name"),
                (train.labels == "all_tokens", "train.labels", train.labels, "compares answers, not prompts",
                 "--set train.labels=all_assistant"),
                (config.data.weight_field is not None, "data.weight_field", config.data.weight_field, "has no weights",
                 "--set data.weight_field=null"),
                (train.normalize == "rows", "train.normalize", "rows", "has one loss a comparison",
                 "--set train.normalize=tokens"),
                (train.label_smoothing > 0, "train.label_smoothing", train.label_smoothing, "has no smoothing",
                 "--set train.label_smoothing=0"),
                (train.z_loss > 0, "train.z_loss", train.z_loss, "has no z-loss", "--set train.z_loss=0"),
                (isinstance(train.rehearsal.rows, int), "train.rehearsal.rows", train.rehearsal.rows,
                 "compares answers, and rehearsal has none to compare", "--set train.rehearsal.rows=off"),
            )
            if applies
        ),
        None,
    )  # fmt: skip
    if problem:
        raise ConfigError(problem[1], where=problem[0], fix=problem[2])


def _bf16(config: Config, facts: Facts) -> tuple[bool, str]:
    if config.train.fp16 is True:
        return False, "fp16 is on"
    return facts.has_bf16, f"{facts.name} {'has' if facts.has_bf16 else 'has no'} bfloat16"


def _fp16(config: Config, facts: Facts) -> tuple[bool, str]:
    if config.train.bf16:
        return False, "bf16 is on"
    on_gpu = facts.device == "cuda"
    return on_gpu, "16-bit on a GPU without bf16" if on_gpu else "bf16 is off: fp32 on the CPU"


def _learning_rate(config: Config, facts: Facts) -> tuple[float, str]:
    mode, parameters = config.tuning.mode, facts.parameters
    size = "a model of unknown size" if parameters is None else f"{parameters / 1e9:.2f}B parameters"
    if mode == "full":
        # The nearest nominal size by ratio: 7.6B counts as 7B, 14.8B as 13B.
        billions = 7.0 if parameters is None else max(parameters / 1e9, 1e-3)
        nominal = min(FULL_RATES, key=lambda known: abs(math.log(billions / known)))
        return FULL_RATES[nominal], f"full tuning of {size}: the rate of the {nominal}B class"
    if config.tuning.adapter == "prefix":
        return PREFIX_RATE, "prefix tuning: its few numbers need large steps"
    if config.train.objective in PREFERENCES:
        return 2e-5, f"{mode} with {config.train.objective}: a tenth of that of answers"
    if parameters is None:
        return 1e-4, f"{mode} on {size}, which may be 3B or more"
    return (2e-4, f"{mode} on {size}: below 3B") if parameters < 3e9 else (1e-4, f"{mode} on {size}: 3B or more")


def _epochs(config: Config, facts: Facts) -> tuple[float, str]:
    rows = facts.train_rows
    if rows is None:
        return 3.0, "the number of rows is not known"
    if config.train.objective in PREFERENCES:
        return 2.0 if rows < 1_000 else 1.0, f"{rows:,} training rows"
    return 5.0 if rows < 1_000 else 3.0 if rows < 10_000 else 1.0, f"{rows:,} training rows"


Number = int | Literal["auto"]


def batch_plan(
    effective_batch: Number, batch_size: Number, grad_accum: Number, measured: int | None
) -> tuple[int, int, int]:
    """(rows of a step, most rows of a micro-batch, micro-batches of a step), each explicit value unchanged.

    Both parts explicit: their product is the step. An `auto` step has 16 rows, or more where batch_size is larger or to
    be a multiple of grad_accum. `auto` batch_size: ceil(effective / grad_accum), or `measured` rows, evened out over
    the micro-batches. Raises ConfigError if explicit values cannot all hold.
    """
    if isinstance(effective_batch, int):
        effective = effective_batch
    elif isinstance(batch_size, int) and isinstance(grad_accum, int):
        effective = batch_size * grad_accum
    else:
        effective = max(EFFECTIVE_BATCH, batch_size if isinstance(batch_size, int) else 1)
        effective = math.ceil(effective / grad_accum) * grad_accum if isinstance(grad_accum, int) else effective
    if isinstance(batch_size, int):
        rows = batch_size
    else:
        limit = max(1, min(measured or 1, effective))
        rows = math.ceil(effective / (grad_accum if isinstance(grad_accum, int) else math.ceil(effective / limit)))
    micro_batches = math.ceil(effective / rows)
    if grad_accum not in ("auto", micro_batches):
        raise ConfigError(
            f"{effective} rows (train.effective_batch) in micro-batches of {rows} (train.batch_size) are"
            f" {micro_batches} micro-batches, but train.grad_accum is {grad_accum}",
            where="train.grad_accum",
            fix="remove one of the three, so that it follows from the others",
        )
    return effective, rows, micro_batches


def _batch(name: str) -> Callable[[Config, Facts], tuple[int, str]]:
    """The rule of effective_batch, batch_size or grad_accum."""

    def rule(config: Config, facts: Facts) -> tuple[int, str]:
        train, measured, on_cpu = config.train, facts.measured_batch, facts.device == "cpu"
        whole_step = 1 << 30 if on_cpu and measured is None else measured
        effective, rows, count = batch_plan(train.effective_batch, train.batch_size, train.grad_accum, whole_step)
        if name == "effective_batch":
            return effective, "the default" if effective == EFFECTIVE_BATCH else "follows batch_size and grad_accum"
        if name == "grad_accum":
            return count, f"{effective} rows in micro-batches of {rows}"
        if train.grad_accum != "auto":
            return rows, f"{effective} rows in {train.grad_accum} micro-batches"
        if measured is not None:
            return rows, f"{measured} rows at max_seq_len were measured to fit"
        return rows, "the whole step; micro_batch_tokens splits it" if on_cpu else "not measured yet"

    return rule


def _micro_batch_tokens(config: Config, facts: Facts) -> tuple[int, str]:
    rows, length = min(int(config.train.batch_size), int(config.train.effective_batch)), config.model.max_seq_len
    if facts.device == "cpu":
        return min(rows * length, CPU_MICRO_BATCH_TOKENS), "the fastest on a CPU; a longer row is computed alone"
    length *= 2 if config.train.objective in PAIRED else 1
    tokens = max(length, min(rows * length, MAX_MICRO_BATCH_TOKENS))
    return tokens, f"{rows} rows of {length}, at most {MAX_MICRO_BATCH_TOKENS}"


def _greater_is_better(config: Config, facts: Facts) -> tuple[bool, str]:
    name = config.train.metric_for_best_model.removeprefix("eval_").removeprefix("eval/")
    lower = name in LOWER_IS_BETTER or name.endswith(("_loss", "/loss"))
    return not lower, f"{name} is better when {'lower' if lower else 'higher'}"


RULES: dict[str, Callable[[Config, Facts], tuple[Any, str]]] = {
    "bf16": _bf16,
    "fp16": _fp16,
    "tf32": lambda config, facts: (facts.ampere, f"{facts.name} {'has' if facts.ampere else 'has no'} TF32"),
    "gradient_checkpointing": lambda config, facts: (
        (False, "recomputation would drop the prefix") if config.tuning.adapter == "prefix"
        else (True, "saves most activation memory") if facts.device == "cuda"
        else (False, "on CPU, recomputation costs more than it saves")
    ),
    "kernels": lambda config, facts: (
        ("plain", "the processes share the weights") if facts.sharded
        else ("fused", "LoRA layers are faster so on the CPU") if facts.device == "cpu" and config.tuning.mode != "full"
        and config.tuning.adapter == "lora" and not config.tuning.lora.use_dora
        else ("plain", "faster kernels are used only where the config names them")
    ),
    "optim": lambda config, facts: (
        ("adafactor", "as T5 was trained: an encoder-decoder") if facts.seq2seq and not facts.sharded
        else ("adamw_torch_fused" if facts.device == "cuda" else "adamw_torch", f"AdamW on {facts.name}")
    ),
    "learning_rate": _learning_rate,
    "epochs": _epochs,
    "effective_batch": _batch("effective_batch"),
    "batch_size": _batch("batch_size"),
    "grad_accum": _batch("grad_accum"),
    "micro_batch_tokens": _micro_batch_tokens,
    "eval_steps": lambda config, facts: (config.train.save_steps, "follows save_steps"),
    "save_strategy": lambda config, facts: (
        ("epoch", "eval_strategy is no") if config.train.eval_strategy == "no"
        else (config.train.eval_strategy, "follows eval_strategy")
    ),
    "greater_is_better": _greater_is_better,
}  # fmt: skip


def optimizer_state(optim: str) -> tuple[int, int]:
    """(numbers, bytes of each) that the optimizer `train.optim` keeps for every trained weight.

    AdamW and its relatives keep two moments, of a byte each in the 8-bit variants; SGD and Adafactor almost nothing;
    Muon one of each matrix and two of all else, counted as two.
    """
    numbers = {"sgd": 0, "adafactor": 0, "adagrad": 1, "ademamix": 3, "schedule_free_sgd": 1}
    kind = optim.removeprefix("paged_").removesuffix("_8bit").removesuffix("_32bit")
    few = 1 if kind.startswith(("lion", "rmsprop")) else 2
    return numbers.get(kind, few), 1 if "8bit" in optim else 4
