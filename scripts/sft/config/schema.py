"""Every key of a configuration: type, limits, default and meaning. docs/CONFIG.md is written from here.

Sections are frozen and strict and take no unknown key; `load` reads files into them, `auto` resolves what is `auto`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Auto = Literal["auto"]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
RENAMED = {"train.evaluation_strategy": "train.eval_strategy"}  # other accepted spellings of a key -> the key


class Section(BaseModel):
    """A frozen mapping that takes no unknown key and no infinite number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )


class ModelSection(Section):
    """Which base model, and how long its rows may be."""

    name: str = Field(
        "Qwen/Qwen2.5-3B-Instruct", min_length=1, description="A hub id, or a folder (an existing folder wins)."
    )
    revision: str | None = Field(None, description="The hub revision (branch, tag or commit); null is the default one.")
    type: Literal["auto", "causal", "seq2seq"] = Field(
        "auto", description="Decoder-only or encoder-decoder; `auto` reads it from the model's config.json."
    )
    max_seq_len: int = Field(
        512, ge=8, description="Longest row in tokens; a longer one is handled by `model.over_length`."
    )
    over_length: Literal["truncate_left", "truncate_right", "drop", "split_turns", "error"] = Field(
        "truncate_left",
        description="A row over `max_seq_len`: cut the oldest prompt tokens (the answer and its end stay), cut the"
        " answer's tail (its end token stays), drop the row and name it, cut a conversation between its turns into rows"
        " that fit, or stop with an error.",
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model; a warning says so.")
    device_map: str = Field("auto", description="`auto`: the GPU where there is one, else the CPU; or `cpu`, `cuda:0`.")
    attn_implementation: str = Field(
        "auto", description="`auto`: rows packed without padding where the hardware can, else `sdpa`; or a name."
    )


class LoraSection(Section):
    """The adapter's shape."""

    r: int = Field(16, ge=1, description="Rank of the adapter's matrices.")
    alpha: int = Field(32, ge=1, description="Scale: the adapter's output is multiplied by alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout in front of the adapter.")
    target_modules: Auto | list[str] = Field(
        "auto", description="`auto`: every linear layer of the model but the head; or a list of module names."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained.")
    use_rslora: bool = Field(False, description="Rank-stabilised LoRA: scale alpha / sqrt(r).")
    use_dora: bool = Field(False, description="Weight-decomposed LoRA (DoRA).")
    modules_to_save: list[str] = Field(
        default_factory=list, description="Modules trained whole and saved with the adapter, e.g. [embed_tokens]."
    )


class TuningSection(Section):
    """How the weights are changed, and with which backend."""

    backend: Literal["bnb", "unsloth"] = Field(
        "bnb", description="`unsloth` falls back to `bnb`, and says why, where it cannot be used."
    )
    mode: Literal["qlora", "lora", "full"] = Field(
        "qlora", description="4-bit base with adapters, 16-bit base with adapters, or every weight."
    )
    lora: LoraSection = Field(default_factory=LoraSection)
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit number format of a QLoRA base.")
    double_quant: bool = Field(True, description="Quantise the quantisation constants too (saves 0.4 bit a weight).")


class SplitSection(Section):
    """Shares of the rows, by a seeded hash of each row's question: appending rows moves none of the old ones."""

    train: float = Field(0.8, ge=0, le=1, description="Share for training.")
    val: float = Field(0.1, ge=0, le=1, description="Share for evaluation while training.")
    test: float = Field(0.1, ge=0, le=1, description="Share that is never trained on or selected by.")
    seed: int = Field(42, description="Another seed, another split.")
    group_by: str | None = Field(
        None, description="Key of raw rows; rows with the same value stay in one split. Null: rows with one question."
    )

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitSection:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train {self.train:g} + val {self.val:g} + test {self.test:g} must be 1, not {total:g}")
        return self


class ColumnsSection(Section):
    """Which columns of a plain table are what; null for absent."""

    system: str | None = Field(None, description="Column of the system text.")
    user: str | None = Field(None, description="Column of the question.")
    assistant: str | None = Field(None, description="Column of the answer.")


class SourceSection(Section):
    """One of several sources of rows."""

    path: str = Field(description="File, folder of files, or hub data set.")
    weight: float = Field(
        1.0, gt=0, le=1000, description="How often each row is trained on: 2 twice, 0.5 half of them."
    )
    limit: int | None = Field(None, ge=1, description="Most rows to take, by the order of their hashes; null is all.")
    hub_config: str | None = Field(None, description="Configuration of a hub data set.")
    hub_split: str = Field("train", description="Split of a hub data set.")


class ContaminationSection(Section):
    """Benchmarks whose rows must not be trained on."""

    against: list[str] = Field(
        default_factory=list, description="Files (or hub data sets) of benchmark rows; rows that hold them are dropped."
    )
    ngram: int = Field(13, ge=4, le=50, description="Words in a row that a row may not share with a benchmark row.")


class ReplaySection(Section):
    """General rows mixed into training, so that the model does not forget what it could."""

    path: str = Field(description="File, folder or hub data set: chat rows, or plain text as {text: ...}.")
    ratio: float = Field(0.1, gt=0, lt=1, description="Share of the mix that is replay.")
    hub_config: str | None = Field(None, description="Configuration of a hub data set.")
    hub_split: str = Field("train", description="Split of a hub data set.")


class DataSection(Section):
    """Where rows come from and where they go."""

    raw_path: str | None = Field(
        None,
        description="File, folder of files or hub data set to process; null is data/raw/raw.jsonl, then"
        " data/raw/raw.json.",
    )
    sources: list[SourceSection] = Field(
        default_factory=list,
        description="Several sources in the place of `raw_path`: [{path: P, weight: 1.0, limit: null}, ...]; also"
        " `hub_config`, `hub_split`. A weight of 2 trains on each row twice, 0.5 on half of them; a limit takes the"
        " first rows by the order of their hashes.",
    )
    format: Literal["auto", "chat", "qa", "prompt", "alpaca", "sharegpt", "messages", "rendered", "text", "columns"] = (
        Field("auto", description="Format of raw rows; `auto` looks at each row. `chat` is {system,user,assistant}.")
    )
    columns: ColumnsSection | None = Field(None, description="Mapping of plain columns, e.g. {user: Question, ...}.")
    hub_config: str | None = Field(None, description="Configuration of a hub data set.")
    hub_split: str = Field("train", description="Split of a hub data set.")
    system_prompt: str | None = Field(None, description="System text for rows that have none.")
    deduplicate: bool = Field(True, description="Drop rows that are exactly equal (the first one stays), and say so.")
    near_duplicates: Literal["off", "report", "drop"] = Field(
        "off",
        description="Rows that are nearly the same: `report` keeps them and puts each cluster into one split, `drop`"
        " keeps the first one; `off` does not look.",
    )
    near_duplicate_threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of the runs of five words from which rows are nearly the same."
    )
    contamination: ContaminationSection = Field(default_factory=ContaminationSection)
    drop: list[Literal["control_characters", "boilerplate", "length_outliers", "script"]] = Field(
        default_factory=list, description="What the ledger reports that is dropped too."
    )
    replay: ReplaySection | None = Field(None, description="General rows mixed into training: {path: P, ratio: 0.1}.")
    max_dropped: float = Field(0.1, ge=0, le=1, description="Share of faulty rows above which process fails.")
    split: SplitSection = Field(default_factory=SplitSection)
    stage: Literal["auto", "processed", "styled", "rendered"] = Field(
        "auto", description="Which rows to train on; `auto`: styled where there are any, else processed."
    )
    processed_dir: str = Field("data/processed", description="Where process writes.")
    styled_dir: str = Field("data/processed_with_style", description="Where style writes.")
    rendered_dir: str = Field("data/rendered", description="Where render writes.")
    train_path: str | None = Field(None, description="Training rows; null follows `stage`.")
    val_path: str | None = Field(
        None, description="Validation rows; null follows `stage`, or is beside `train_path` where that is set."
    )
    test_path: str | None = Field(
        None, description="Test rows; null follows `stage`, or is beside `train_path` where that is set."
    )
    template_path: str = Field(
        "auto",
        description="`auto`: the model's own chat template, else chat_templates/default.jinja; or a name from"
        " chat_templates/ (`llama3`), or a file.",
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the template, e.g. {enable_thinking: false}; same in serving."
    )
    template_date: str = Field(
        "auto",
        description="The date that templates with `strftime_now` print, YYYY-MM-DD. `auto`: the day on which the run"
        " began; resume, eval, infer and export use the same.",
    )
    control_text: Literal["plain", "token"] = Field(
        "plain",
        description="What a control token (`<|im_start|>`) written inside a message becomes: plain text, or the token.",
    )

    @field_validator("drop", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        if isinstance(value, list) and "language" in value:
            raise ValueError("`language` is now `script`: rows in another script than most are dropped")
        return value

    @field_validator("template_date")
    @classmethod
    def _is_auto_or_date(cls, text: str) -> str:
        try:
            return text if text == "auto" else date.fromisoformat(text).isoformat()
        except ValueError:
            raise ValueError(f"{text!r} is not a date: write auto, or year-month-day such as 2026-01-31") from None

    @model_validator(mode="after")
    def _one_way_in(self) -> DataSection:
        if self.raw_path and self.sources:
            raise ValueError("raw_path and sources are both set: name the file among the sources")
        return self


class EvalSection(Section):
    """What is measured, on how many rows."""

    metrics: list[str] = Field(
        default_factory=lambda: ["rougeL", "sari", "exact_match"],
        description="Metrics of generated answers, besides loss, perplexity, length, stop rate and repetition.",
    )
    limit: int | None = Field(None, ge=1, description="Most rows that `eval` scores; null is all.")
    batch_size: int = Field(32, ge=1, description="Answers generated side by side; halved when memory runs out.")
    turns: Literal["last", "all"] = Field(
        "last", description="Of a row with several answers: the last one with its history, or every one."
    )
    shots: int = Field(0, ge=0, description="Training rows shown as earlier turns before each question of `eval`.")
    format: str | None = Field(
        None, description="Regular expression for `format_adherence`; null: the form of the reference."
    )
    train_sample: int = Field(32, ge=0, description="Validation rows answered at each evaluation while training.")
    json_schema: str | None = Field(None, description="JSON schema file that answers must satisfy (`json_valid`).")
    rouge_stemmer: bool = Field(False, description="Stem English words before ROUGE.")


class GenerationSection(Section):
    """How answers are generated, in eval, infer and compare alike."""

    max_new_tokens: int = Field(256, ge=1, description="Longest answer in tokens.")
    do_sample: bool = Field(False, description="False is greedy; true draws with the three settings below.")
    temperature: float = Field(0.7, gt=0, description="Below 1 sharpens, above 1 flattens; used when sampling.")
    top_p: float = Field(0.9, gt=0, le=1, description="Draw from the smallest set with this share of probability.")
    top_k: int = Field(50, ge=0, description="Draw from so many tokens at most; 0 is all.")
    repetition_penalty: float = Field(1.0, gt=0, description="Above 1 makes repeated tokens less likely.")
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer, besides the template's own.")
    seed: int = Field(0, ge=0, description="Seed for sampling.")


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
    """One run: how long, how fast, how large a step, which checkpoints."""

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
    objective: Literal["response"] = Field(
        "response", description="What is minimised; `response`: cross-entropy of the labelled tokens (see `labels`)."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over the vocabulary.")
    labels: Literal["all_assistant", "last_assistant", "all_tokens"] = Field(
        "all_assistant", description="Which tokens are in the loss: every answer, the last answer, or everything."
    )
    effective_batch: Auto | Count = Field(
        "auto",
        description="Rows of one optimizer step over all devices; `auto` is batch_size * grad_accum where both are"
        " set, else 16, or more to be at least batch_size or a multiple of grad_accum.",
    )
    batch_size: Auto | Count = Field(
        "auto",
        description="Most rows in one micro-batch; `auto` sets no limit and is the number of rows at max_seq_len that"
        " was measured to fit on a GPU, the whole step on the CPU, or ceil(effective_batch / grad_accum) where"
        " grad_accum is set.",
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
        description="How layers are computed: `plain`; `liger`, Liger's kernels for norms and MLPs (pip install"
        " liger-kernel, CUDA); `compiled`, torch.compile. Loss and gradients are checked on the model first, and"
        " kernels that change them are an error. `auto` means plain.",
    )
    logits: Literal["chunked", "full"] = Field(
        "chunked", description="`chunked` computes the head on labelled positions in tiles; `full` all at once."
    )
    logits_tile: int = Field(512, ge=16, description="Positions in one tile of the chunked head.")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite: `stop` with the row ids, or `skip` the step."
    )
    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "epoch", description="When to evaluate (`evaluation_strategy` is an accepted spelling)."
    )
    eval_steps: int | None = Field(None, ge=1, description="Steps between evaluations; null takes `save_steps`.")
    save_strategy: Auto | Literal["no", "steps", "epoch"] = Field(
        "auto",
        description="When to write a checkpoint, besides each new best one; `auto` follows `eval_strategy`, or is"
        " `epoch` where that is `no`.",
    )
    save_steps: int = Field(100, ge=1, description="Steps between checkpoints.")
    save_total_limit: int = Field(2, ge=1, description="How many checkpoints stay, besides the best one.")
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
    early_stopping: EarlyStoppingSection = Field(default_factory=EarlyStoppingSection)
    merge_at_end: bool = Field(False, description="Merge the adapter into 16-bit weights when training ends.")


class LoggingSection(Section):
    """What is written while a run goes on."""

    backend: Literal["tensorboard", "none"] = Field("tensorboard", description="`log.jsonl` is written in any case.")
    log_interval: int = Field(10, ge=1, description="Steps between log lines.")
    gpu_stats: bool = Field(True, description="Log GPU memory and utilisation, where there is a GPU.")
    samples: int = Field(3, ge=0, description="Sample answers logged at each evaluation.")


class Config(Section):
    """One run, as merged from its files."""

    experiment: ExperimentSection = Field(default_factory=ExperimentSection)
    model: ModelSection = Field(default_factory=ModelSection)
    tuning: TuningSection = Field(default_factory=TuningSection)
    data: DataSection = Field(default_factory=DataSection)
    train: TrainSection = Field(default_factory=TrainSection)
    eval: EvalSection = Field(default_factory=EvalSection)
    generation: GenerationSection = Field(default_factory=GenerationSection)
    logging: LoggingSection = Field(default_factory=LoggingSection)

    @model_validator(mode="after")
    def _is_consistent(self) -> Config:
        for message, _ in train_conflicts(self.train.model_dump()):
            raise ValueError(message)
        return self


def train_conflicts(train: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Settings of `train` that contradict each other: a message, and the dotted keys that it is about."""
    if train.get("bf16") is True and train.get("fp16") is True:
        yield "train.bf16 and train.fp16 are both true, and a run has one precision", ("train.bf16", "train.fp16")
    names = ("effective_batch", "batch_size", "grad_accum")
    numbers: list[Any] = [train.get(name) for name in names]
    effective, batch, accum = numbers
    whole = all(type(number) is int and number > 0 for number in numbers)
    if whole and accum != math.ceil(effective / batch):  # the last micro-batch of a step may be smaller
        message = f"train.batch_size {batch} * train.grad_accum {accum} is {batch * accum}"
        yield f"{message}, but train.effective_batch is {effective}", tuple(f"train.{name}" for name in names)
