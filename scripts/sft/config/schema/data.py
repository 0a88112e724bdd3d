"""The sections `data`, `eval` and `generation`: rows in, answers out."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sft.config.schema.base import Section


class SplitSection(Section):
    """Shares of the rows, by a seeded hash of what each row asks: appending rows moves none of the old ones."""

    train: float = Field(0.8, ge=0, le=1, description="Share for training.")
    val: float = Field(0.1, ge=0, le=1, description="Share for evaluation while training.")
    test: float = Field(0.1, ge=0, le=1, description="Share that is never trained on or selected by.")
    seed: int = Field(42, description="Another seed, another split.")
    group_by: str | None = Field(
        None, description="Key of raw rows; rows with the same value stay in one split. Null: rows that ask the same."
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
    contamination: ContaminationSection = Field(
        default_factory=ContaminationSection, description="Benchmarks to keep out of training."
    )
    drop: list[Literal["control_characters", "boilerplate", "length_outliers", "language"]] = Field(
        default_factory=list, description="What the ledger reports that is dropped too."
    )
    replay: ReplaySection | None = Field(None, description="General rows mixed into training: {path: P, ratio: 0.1}.")
    max_dropped: float = Field(0.1, ge=0, le=1, description="Share of faulty rows above which process fails.")
    split: SplitSection = Field(default_factory=SplitSection, description="Shares of the splits.")
    stage: Literal["auto", "processed", "styled", "rendered"] = Field(
        "auto", description="Which rows to train on; `auto`: styled where there are any, else processed."
    )
    processed_dir: str = Field("data/processed", description="Where process writes.")
    styled_dir: str = Field("data/processed_with_style", description="Where style writes.")
    rendered_dir: str = Field("data/rendered", description="Where render writes.")
    train_path: str | None = Field(None, description="Training rows; null follows `stage`.")
    val_path: str | None = Field(
        None, description="Validation rows; null follows `stage`, or stands beside `train_path` where that is given."
    )
    test_path: str | None = Field(
        None, description="Test rows; null follows `stage`, or stands beside `train_path` where that is given."
    )
    template_path: str = Field(
        "auto",
        description="`auto`: the model's own chat template, else chat_templates/default.jinja; or a name from"
        " chat_templates/ (`llama3`), or a file.",
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the template, e.g. {enable_thinking: false}; same in serving."
    )
    control_text: Literal["plain", "token"] = Field(
        "plain",
        description="What a control token (`<|im_start|>`) written inside a message becomes: plain text, or the token.",
    )

    @model_validator(mode="after")
    def _one_way_in(self) -> DataSection:
        if self.raw_path and self.sources:
            raise ValueError("raw_path and sources are both given: name the file among the sources")
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
        "last", description="Of a row with several answers: the last given its history, or every one."
    )
    shots: int = Field(0, ge=0, description="Training rows shown as earlier turns before each question of `eval`.")
    format: str | None = Field(
        None, description="Regular expression for `format_adherence`; null: the form of the reference."
    )
    train_sample: int = Field(32, ge=0, description="Validation rows answered at each evaluation while training.")
    json_schema: str | None = Field(None, description="JSON schema file that answers must satisfy (`json_valid`).")
    rouge_stemmer: bool = Field(False, description="Stem English words before ROUGE.")


class GenerationSection(Section):
    """How answers are made, in eval, infer and compare alike."""

    max_new_tokens: int = Field(256, ge=1, description="Longest answer in tokens.")
    do_sample: bool = Field(False, description="False is greedy; true draws with the three settings below.")
    temperature: float = Field(0.7, gt=0, description="Below 1 sharpens, above 1 flattens; used when sampling.")
    top_p: float = Field(0.9, gt=0, le=1, description="Draw from the smallest set with this share of probability.")
    top_k: int = Field(50, ge=0, description="Draw from so many tokens at most; 0 is all.")
    repetition_penalty: float = Field(1.0, gt=0, description="Above 1 makes repeated tokens less likely.")
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer, besides the template's own.")
    seed: int = Field(0, ge=0, description="Seed for sampling.")
