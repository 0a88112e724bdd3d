"""How many steps a run takes, at which of them it logs, evaluates and saves, and what the trainer is told of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sft.config.schema import Config, TrainSection
from sft.errors import ConfigError
from sft.metrics import check_names
from sft.runs import Run

if TYPE_CHECKING:
    from transformers import TrainingArguments

_OF_ANSWERS = ("format_adherence", "stop_rate", "repetition", "empty_rate", "length_words", "length_tokens")
Cadence = Literal["no", "steps", "epoch"]


@dataclass(frozen=True)
class Plan:
    """The steps of one run. watched: the metric that chooses the best checkpoint, None for the last one."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    log_every: int
    evaluate: Cadence
    eval_steps: int
    save: Cadence
    save_steps: int
    watched: str | None
    greater_is_better: bool
    load_best: bool
    notes: tuple[str, ...] = ()
    min_stop_rate: float = 0.0

    def due(self, cadence: Cadence, every: int, step: int) -> bool:
        """Whether something of this cadence happens after `step`; the last step always counts."""
        if cadence == "no":
            return False
        if step >= self.total_steps:
            return True
        return step % (every if cadence == "steps" else self.steps_per_epoch) == 0

    def arguments(self, train: TrainSection, run: Run, *, device: str) -> TrainingArguments:
        """The trainer's own arguments, for one window a step; all that we do ourselves is switched off in it.

        bf16 is not passed on: the step computes under autocast itself, whatever part of the model is called; fp16 is,
        because the loss scaler comes with it.
        """
        from transformers import TrainingArguments

        cuda = device.startswith("cuda")
        args = TrainingArguments(
            output_dir=str(run.folder),
            max_steps=self.total_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            learning_rate=float(train.learning_rate),
            lr_scheduler_type=train.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            optim=train.optim,
            seed=train.seed,
            data_seed=train.seed,
            fp16=train.fp16 is True,
            tf32=bool(train.tf32) if cuda else None,
            use_cpu=not cuda,
            metric_for_best_model=self.watched,
            greater_is_better=self.greater_is_better if self.watched else None,
            eval_strategy="no",
            save_strategy="steps",
            logging_strategy="no",
            load_best_model_at_end=False,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to=[],
            remove_unused_columns=False,
            log_level="error",
            ddp_find_unused_parameters=False,
        )
        if args.parallel_mode.value == "not_distributed":
            args._n_gpu = min(1, args.n_gpu)  # one process, one GPU: more are used through `accelerate launch`
        return args


def make(config: Config, rows: int, *, validation: bool) -> Plan:
    """The plan for `rows` training rows; every other value comes from the resolved config. Raises ConfigError."""
    train, notes = config.train, []
    per_epoch = math.ceil(rows / int(train.effective_batch))
    total = train.max_steps or max(1, math.ceil(float(train.epochs) * per_epoch))
    warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * total)
    evaluate: Cadence = train.eval_strategy
    if evaluate != "no" and not validation:
        notes.append("no evaluation while training: there are no validation rows")
        evaluate = "no"
    watched = _watched(config) if evaluate != "no" else None
    assert train.save_strategy != "auto", "config.auto resolves it"
    load_best = train.load_best_model_at_end and evaluate != "no"
    if train.load_best_model_at_end and not load_best:
        notes.append("the last checkpoint is the result: without evaluation there is no best one")
    if train.early_stopping.enabled is True and evaluate == "no":
        raise ConfigError(
            "train.early_stopping needs an evaluation while training, and there is none",
            where="train.early_stopping.enabled",
            fix="--set train.eval_strategy=epoch with validation rows, or switch early stopping off",
        )
    return Plan(
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        log_every=config.logging.log_interval,
        evaluate=evaluate,
        eval_steps=train.eval_steps or train.save_steps,
        save=train.save_strategy,
        save_steps=train.save_steps,
        watched=watched,
        min_stop_rate=train.min_stop_rate if watched is not None else 0.0,
        greater_is_better=bool(train.greater_is_better),
        load_best=load_best,
        notes=tuple(notes),
    )


def _watched(config: Config) -> str:
    name = config.train.metric_for_best_model.removeprefix("eval_").removeprefix("eval/")
    known = ["loss", "perplexity", *check_names(config.eval.metrics), *_OF_ANSWERS]
    known += ["json_schema"] if config.eval.json_schema else []
    if name not in known:
        raise ConfigError(
            f"train.metric_for_best_model is {name!r}, which is not measured while training",
            where="train.metric_for_best_model",
            fix=f"one of {', '.join(known)}; or add {name} to eval.metrics",
        )
    gated = config.train.min_stop_rate > 0
    if (gated or name not in {"loss", "perplexity"}) and config.eval.train_sample == 0:
        told = f"min_stop_rate is {config.train.min_stop_rate}" if gated else f"metric_for_best_model is {name!r}"
        raise ConfigError(
            f"train.{told}, but eval.train_sample is 0, so no answers are made",
            where="eval.train_sample",
            fix="--set eval.train_sample=32",
        )
    return name
