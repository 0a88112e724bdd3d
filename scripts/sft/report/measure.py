"""The sides of a comparison, each asked the same rows and the same general questions, greedily; one model at a time."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.config.schema import Config
from sft.data import records
from sft.errors import ModelError
from sft.generation import evaluation, serving
from sft.generation.engine import Kind
from sft.generation.evaluation import Evaluation
from sft.generation.questions import answers
from sft.generation.serving import Served
from sft.generation.targets import Target
from sft.metrics import text
from sft.report.general import passes

Row = dict[str, Any]
Values = dict[str, list[float]]
Progress = Callable[[int, int], None]
ROW_LOSS = "row_loss"  # of a row: mean over its labelled tokens (`loss` in metrics.json weighs every token alike)
OF_ANSWERS = ("stop_rate", "repetition", "empty_rate", "length_tokens")


@dataclass(frozen=True)
class Side:
    """What one side answered and what each row is worth: `{metric: [a value a row]}`; nan where a row has none."""

    name: str
    kind: Kind
    samples: list[Row]
    values: Values
    general: list[Row]
    general_values: Values


def sides(
    targets: Sequence[Target], rows: Sequence[Row], general: Sequence[Row], root: Path, on_progress: Progress | None
) -> list[Side]:
    """The base first, then each target. Raises ModelError where they are not of one base."""
    check_one_base(targets)
    parts = (len(targets) + 1) * 2 * (len(rows) + len(general))
    count = _Count(on_progress, parts)
    found: list[Side] = []
    base: Side | None = None
    for name, target in zip(names(targets), targets, strict=True):
        config = greedy(target.config)
        served = serving.open_model(config, adapter=target.adapter, merged=target.merged, root=root)
        found.append(_measure(served, name, rows, general, config, root, count))
        if base is None and target.adapter is not None:
            with served.base_only():
                base = _measure(served, "base", rows, general, config, root, count)
        del served
        gc.collect()
    if base is None:
        config = greedy(targets[0].config)
        base = _measure(serving.open_model(config, root=root), "base", rows, general, config, root, count)
    return [base, *found]


def check_one_base(targets: Sequence[Target]) -> None:
    """Raises ModelError where the targets were tuned from different models."""
    bases = dict.fromkeys((target.config.model.name, target.config.model.revision) for target in targets)
    if len(bases) > 1:
        told = " and ".join(f"{name}{f' ({revision})' if revision else ''}" for name, revision in bases)
        raise ModelError(f"the adapters have different bases: {told}", mend="compare those of one base at a time")


def names(targets: Sequence[Target]) -> list[str]:
    """A name for each target, no two alike."""
    made: list[str] = []
    for target in targets:
        name, number = target.name, 1
        while name in [*made, "base"]:
            number += 1
            name = f"{target.name} ({number})"
        made.append(name)
    return made


def greedy(config: Config) -> Config:
    """The config with answers that are not drawn."""
    return config.model_copy(update={"generation": config.generation.model_copy(update={"do_sample": False})})


class _Count:
    """One bar over all answers and all losses of all sides."""

    def __init__(self, on_progress: Progress | None, total: int) -> None:
        self.on_progress, self.total, self.before = on_progress, total, 0

    def part(self, amount: int) -> Progress:
        """The progress of the next part, which counts for `amount` whatever its own total is."""
        before, self.before = self.before, self.before + amount

        def within(done: int, total: int) -> None:
            if self.on_progress is not None:
                self.on_progress(before + done * amount // total, self.total)

        return within


def _measure(
    served: Served, name: str, rows: Sequence[Row], general: Sequence[Row], config: Config, root: Path, count: _Count
) -> Side:
    answered = evaluation.evaluate(served, rows, config, root, count.part(len(rows)))
    of_rows = _losses(served, rows, config, count.part(len(rows)))
    values = _values(answered) | {ROW_LOSS: of_rows if config.eval.turns == "last" else _beside(rows, of_rows)}
    if not general:
        return Side(name, served.kind, answered.samples, values, [], {})
    asked = evaluation.evaluate(served, general, _plain(config), root, count.part(len(general)))
    pairs = zip(asked.samples, general, strict=True)
    checked = [passes(sample["prediction"], row.get("check", {})) for sample, row in pairs]
    of_general = {ROW_LOSS: _losses(served, general, config, count.part(len(general))), "passed": checked}
    return Side(name, served.kind, answered.samples, values, asked.samples, of_general)


def _plain(config: Config) -> Config:
    """The config for the general questions: no examples in front, no schema, hardly a metric."""
    plain = {"metrics": ["token_f1"], "json_schema": None, "shots": 0, "format": None, "turns": "last"}
    return config.model_copy(update={"eval": config.eval.model_copy(update=plain)})


def _beside(rows: Sequence[Row], losses: Sequence[float]) -> list[float]:
    """A value an answer, where every answer of a row is asked for: the row's loss beside the last, else nan."""
    made: list[float] = []
    for row, loss in zip(rows, losses, strict=True):
        earlier = 0 if records.is_rendered(row) else len(answers(row)) - 1
        made += [*[math.nan] * earlier, loss]
    return made


def _values(answered: Evaluation) -> Values:
    samples = answered.samples
    names = samples[0]["scores"] if samples else ()
    return {name: [float(one["scores"][name]) for one in samples] for name in names} | {
        "stop_rate": [float(one["stopped"]) for one in samples],
        "repetition": [text.repetition(one["prediction"]) for one in samples],
        "empty_rate": [text.empty(one["prediction"]) for one in samples],
        "length_tokens": [float(one["tokens"]) for one in samples],
    }


def _losses(served: Served, rows: Sequence[Row], config: Config, on_progress: Progress) -> list[float]:
    """Each row's mean loss over its labelled tokens; nan where it has none (too long, no label left)."""
    found = []
    for done, row in enumerate(rows, start=1):
        kept = served.encoder.encode(row).dropped is None
        found.append(evaluation.losses(served, [row], config)["loss"] if kept else math.nan)
        on_progress(done, len(rows))
    return found
