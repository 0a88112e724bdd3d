"""The whole schema: every key, its type, default and meaning. Defaults live here alone."""

from __future__ import annotations

from pydantic import Field, model_validator

from sft.config.schema.base import Section
from sft.config.schema.data import (
    ColumnsSection,
    ContaminationSection,
    DataSection,
    EvalSection,
    GenerationSection,
    ReplaySection,
    SourceSection,
    SplitSection,
)
from sft.config.schema.model import LoraSection, ModelSection, TuningSection
from sft.config.schema.train import EarlyStoppingSection, ExperimentSection, LoggingSection, TrainSection


class Config(Section):
    """One run, as merged from its files."""

    experiment: ExperimentSection = Field(
        default_factory=ExperimentSection, description="What the run is called in reports."
    )
    model: ModelSection = Field(
        default_factory=ModelSection, description="Which base model, and how long its rows may be."
    )
    tuning: TuningSection = Field(
        default_factory=TuningSection, description="How its weights are changed, and by whose kernels."
    )
    data: DataSection = Field(default_factory=DataSection, description="Where rows come from and where they go.")
    train: TrainSection = Field(
        default_factory=TrainSection, description="How long, how fast, how large a step, what is kept."
    )
    eval: EvalSection = Field(default_factory=EvalSection, description="What is measured, on how many rows.")
    generation: GenerationSection = Field(
        default_factory=GenerationSection, description="How answers are made, in eval, infer and compare alike."
    )
    logging: LoggingSection = Field(default_factory=LoggingSection, description="What is written while a run goes on.")

    @model_validator(mode="after")
    def _one_precision(self) -> Config:
        if self.train.bf16 is True and self.train.fp16 is True:
            raise ValueError("train.bf16 and train.fp16 are both true: choose one, or `auto` for both")
        return self


__all__ = [
    "ColumnsSection",
    "Config",
    "ContaminationSection",
    "DataSection",
    "EarlyStoppingSection",
    "EvalSection",
    "ExperimentSection",
    "GenerationSection",
    "LoggingSection",
    "LoraSection",
    "ModelSection",
    "ReplaySection",
    "Section",
    "SourceSection",
    "SplitSection",
    "TrainSection",
    "TuningSection",
]
