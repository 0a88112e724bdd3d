"""Answers to a fixed sample of validation rows at each evaluation: their metrics, and a few of them as text."""

from __future__ import annotations

import logging
from typing import Any

from sft import metrics
from sft.chat.encode import Encoder
from sft.config.schema import Config
from sft.generation import engine
from sft.training import ranks
from sft.training.rows import Question

log = logging.getLogger("sft.training")


class Answers:
    """Called with the model, gives `{metric: value}`; `samples` is the last answers' text, for TensorBoard."""

    def __init__(self, config: Config, tokenizer: Any, encoder: Encoder, questions: list[Question], kind: str) -> None:
        self.config, self.tokenizer, self.encoder, self.questions, self.kind = (
            config,
            tokenizer,
            encoder,
            questions,
            kind,
        )
        self.samples: str | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        mine = list(enumerate(self.questions))[ranks.rank() :: ranks.world()]
        answers = engine.generate(
            model,
            self.tokenizer,
            [question.prompt for _, question in mine],
            self.config.generation,
            self.encoder.stops,
            batch_size=self.config.eval.batch_size,
            kind=self.kind,
            max_len=self.config.model.max_seq_len,
        )
        told = {index: (answer.text, answer.stopped) for (index, _), answer in zip(mine, answers, strict=True)}
        found = {index: value for share in ranks.everywhere(told) for index, value in share.items()}
        texts = [found[index][0] for index in range(len(self.questions))]
        self.samples = self._as_text(texts)
        values = metrics.score(
            [name for name in self.config.eval.metrics if not name.startswith("evaluate:")],
            texts,
            [question.reference for question in self.questions],
            [question.source for question in self.questions],
            stemmer=self.config.eval.rouge_stemmer,
        )
        stopped = sum(found[index][1] for index in found) / len(found)
        return {**values, "stop_rate": stopped}

    def _as_text(self, texts: list[str]) -> str:
        shown = list(zip(self.questions, texts, strict=True))[: self.config.logging.samples]
        return "\n\n---\n\n".join(
            f"**question**\n\n{_quoted(question.source)}\n\n**answer**\n\n{_quoted(text)}\n\n**reference**\n\n"
            f"{_quoted(question.reference)}"
            for question, text in shown
        )


def _quoted(text: str) -> str:
    return "\n".join("> " + line for line in text.split("\n"))
