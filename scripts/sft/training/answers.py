"""Answers to a fixed sample of validation rows at each evaluation: their metrics, and a few of them as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.chat.encode import Encoder
from sft.config.schema import Config
from sft.generation import engine, evaluate
from sft.generation.evaluate import Question
from sft.generation.stop import Answer
from sft.model.files import Kind
from sft.training import distributed


class Answers:
    """Called with the model, gives `{metric: value}` as `eval` does; `samples` is the last answers, as Markdown."""

    def __init__(
        self, config: Config, root: Path, tokenizer: Any, encoder: Encoder, questions: list[Question], kind: Kind
    ) -> None:
        self.config, self.root, self.kind = config, root, kind
        self.tokenizer, self.encoder, self.questions = tokenizer, encoder, questions
        self.samples: str | None = None

    def __call__(self, model: Any) -> dict[str, float]:
        mine = range(distributed.rank(), len(self.questions), distributed.world())
        made = engine.generate(
            model,
            self.tokenizer,
            [self.questions[index].ids for index in mine],
            self.config.generation,
            self.encoder.stops,
            batch_size=self.config.eval.batch_size,
            kind=self.kind,
        )
        shares = distributed.all_gather(dict(zip(mine, made, strict=True)))
        found = {index: answer for share in shares for index, answer in share.items()}
        answers = [found[index] for index in range(len(self.questions))]
        self.samples = self._as_text(answers)
        return evaluate.score_answers(self.questions, answers, self.config, self.root).metrics

    def _as_text(self, answers: Sequence[Answer]) -> str:
        shown = list(zip(self.questions, answers, strict=True))[: self.config.logging.samples]
        return "\n\n---\n\n".join(
            f"**question**\n\n{_quoted(question.source)}\n\n**answer**\n\n{_quoted(answer.text)}\n\n**reference**\n\n"
            f"{_quoted(question.reference)}"
            for question, answer in shown
        )


def _quoted(text: str) -> str:
    return "\n".join("> " + line for line in text.split("\n"))
