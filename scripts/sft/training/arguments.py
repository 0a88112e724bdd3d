"""The trainer's own arguments, made from the plan; all that we do ourselves is switched off in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft.config.schema import TrainSection
from sft.runs import Run
from sft.training.plan import Plan

if TYPE_CHECKING:
    from transformers import TrainingArguments


def make(train: TrainSection, plan: Plan, run: Run, *, device: str) -> TrainingArguments:
    """TrainingArguments for one window a step.

    bf16 is not passed on: the recipe computes under autocast itself, whatever part of the model is called; fp16 is,
    because the loss scaler comes with it.
    """
    from transformers import TrainingArguments

    cuda = device.startswith("cuda")
    args = TrainingArguments(
        output_dir=str(run.folder),
        max_steps=plan.total_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=float(train.learning_rate),
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=plan.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=train.optim,
        seed=train.seed,
        data_seed=train.seed,
        fp16=train.fp16 is True,
        tf32=bool(train.tf32) if cuda else None,
        use_cpu=not cuda,
        metric_for_best_model=plan.watched,
        greater_is_better=plan.greater_is_better if plan.watched else None,
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
