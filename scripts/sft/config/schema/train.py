"""The sections `experiment`, `train` and `logging`: one run."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, Field

from sft.config.schema.base import Auto, Count, Positive, Section


class ExperimentSection(Section):
    """What the run is called in reports."""

    name: str | None = Field(None, description="A title; null takes the run's name.")
    description: str = Field("", description="A sentence for the report and the model card.")
    tags: list[str] = Field(default_factory=list, description="Words to find the run by.")


class EarlyStoppingSection(Section):
    """When to stop before the end."""

    enabled: Literal["overfitting"] | bool = Field(
        "overfitting",
        description="`true` stops when the watched metric no longer improves; `overfitting` only if evaluation loss has"
        " also risen by `min_delta` above its best while training loss fell, 0.1 apart.",
    )
    patience: int = Field(3, ge=1, description="Evaluations without improvement before stopping.")
    min_delta: float = Field(0.01, ge=0, description="An improvement smaller than this does not count.")


class TrainSection(Section):
    """One run: how long, how fast, how large a step, what is kept."""

    output_dir: str = Field(
        "outputs/run", min_length=1, description="The run's folder; its last part is the run's name."
    )
    seed: int = Field(42, ge=0, description="Seeds the order of rows, adapters and dropout.")
    epochs: Auto | Positive = Field(
        "auto", description="Passes over the data; `auto`: 5 below 1,000 rows, 3 below 10,000, else 1."
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps, whatever `epochs` says.")
    learning_rate: Auto | Positive = Field(
        "auto",
        description="Peak rate; `auto`: adapters 2e-4 below 3B parameters, else 1e-4; full by the nearest size of 1B"
        " 1e-4, 7B 2e-5, 13B 1e-5, 70B 5e-6.",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the rate falls after warm-up."
    )
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    warmup_steps: int | None = Field(None, ge=0, description="Warm-up in steps; wins over `warmup_ratio`.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 switches it off.")
    optim: str = Field(
        "auto", description="`auto`: fused AdamW on a GPU, torch AdamW on the CPU; or a transformers optimizer name."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over the vocabulary.")
    labels: Literal["all_assistant", "last_assistant", "all_tokens"] = Field(
        "all_assistant", description="Which tokens are learnt: every answer, the last answer, or everything."
    )
    effective_batch: Auto | Count = Field(
        "auto",
        description="Rows of one optimizer step over all devices; `auto` is batch_size * grad_accum where both are"
        " given, else 16 (or more, where one of them alone is more).",
    )
    batch_size: Auto | Count = Field(
        "auto",
        description="Most rows (at max_seq_len) in one micro-batch; `auto` is measured on a GPU and the whole step on"
        " the CPU, or ceil(effective_batch / grad_accum) where grad_accum is given.",
    )
    grad_accum: Auto | Count = Field("auto", description="Micro-batches a step; `auto` follows from the other two.")
    micro_batch_tokens: Auto | Count = Field(
        "auto",
        description="Token budget of a micro-batch; `auto` is batch_size * max_seq_len, at most 4096 (but one row).",
    )
    bf16: Auto | bool = Field(
        "auto",
        description="bfloat16; `auto`: where the hardware has it (compute capability >= 8.0, or the CPU) and fp16 is"
        " not true. Both false is fp32.",
    )
    fp16: Auto | bool = Field("auto", description="float16 with loss scaling; `auto`: on a GPU without bfloat16.")
    tf32: Auto | bool = Field("auto", description="TF32 matrix products on Ampere and newer; `auto` is on there.")
    gradient_checkpointing: Auto | bool = Field(
        "auto", description="Recompute activations in the backward pass; `auto`: on a GPU, off on the CPU."
    )
    activation_offload: bool = Field(
        False,
        description="What the backward pass needs waits in the machine's memory, with checkpointing best: less of the"
        " GPU's, more time. Nothing on the CPU.",
    )
    kernels: Auto | Literal["plain", "liger", "compiled"] = Field(
        "auto",
        description="How layers are computed: plainly, by Liger's kernels (where installed, on CUDA), or by"
        " torch.compile; proven equal before it is used. `auto`: the fastest that the rehearsal on a GPU measures,"
        " compiled only in runs of half an hour and more; plain on the CPU.",
    )
    logits: Literal["chunked", "full"] = Field(
        "chunked", description="`chunked` computes the head on labelled positions in tiles; `full` all at once."
    )
    logits_tile: int = Field(512, ge=16, description="Positions in one tile of the chunked head.")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite: `stop` with the row ids, or `skip` the step."
    )
    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "epoch",
        validation_alias=AliasChoices("eval_strategy", "evaluation_strategy"),
        description="When to evaluate (`evaluation_strategy` is an accepted spelling).",
    )
    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations; null takes `save_steps`.")
    save_strategy: Literal["no", "steps", "epoch"] = Field(
        "epoch", description="When to write a checkpoint; mended to `eval_strategy` where the best one is to be loaded."
    )
    save_steps: int = Field(
        100, ge=1, description="Steps between checkpoints; raised to a multiple of `eval_steps` with the best kept."
    )
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept, besides the best one.")
    load_best_model_at_end: bool = Field(True, description="End with the best checkpoint, not the last one.")
    metric_for_best_model: str = Field(
        "loss", description="`loss`, or any metric of `eval.metrics`, measured on the validation sample."
    )
    min_stop_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="A checkpoint whose sample answers stop less often than this is never the best one.",
    )
    greater_is_better: Auto | bool = Field("auto", description="`auto`: false for losses and perplexity, else true.")
    early_stopping: EarlyStoppingSection = Field(default_factory=EarlyStoppingSection, description="When to stop.")
    merge_at_end: bool = Field(False, description="Merge the adapter into 16-bit weights when training ends.")


class LoggingSection(Section):
    """What is written while a run goes on."""

    backend: Literal["tensorboard", "none"] = Field("tensorboard", description="`log.jsonl` is written in any case.")
    log_interval: int = Field(10, ge=1, description="Steps between log lines.")
    gpu_stats: bool = Field(True, description="Log GPU memory and utilisation, where there is a GPU.")
    samples: int = Field(3, ge=0, description="Sample answers logged at each evaluation.")
