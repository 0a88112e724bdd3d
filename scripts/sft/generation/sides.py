"""The sides of a comparison: the tuned model, its base, and the best constant answer."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft import metrics
from sft.data import records, store
from sft.errors import DataError
from sft.generation import evaluation, serving
from sft.generation.evaluation import Evaluation, Progress, Row
from sft.generation.targets import Target


def evaluate(
    target: Target, wanted: Sequence[str], rows: Sequence[Row], root: Path, on_progress: Progress | None = None
) -> dict[str, Evaluation]:
    """Answers and scores the rows with each wanted side ("tuned", "base").

    With an adapter one load serves both: the base is the same model with the adapter off. on_progress counts the
    answers of all sides together.
    """
    evaluation.wanted(target.config, root)  # names and schema are checked before anything is loaded
    if target.adapter is None and len(wanted) == 2:
        return {
            side: evaluate(target, [side], rows, root, _part(on_progress, at, 2))[side]
            for at, side in enumerate(wanted)
        }
    adapter, merged = (None, None) if wanted == ["base"] else (target.adapter, target.merged)
    served = serving.open_model(target.config, adapter=adapter, merged=merged, root=root)
    found = {}
    for at, side in enumerate(wanted):
        part = _part(on_progress, at, len(wanted))
        if side == "base" and len(wanted) == 2:
            with served.base_only():
                found[side] = evaluation.evaluate(served, rows, target.config, root, part)
        else:
            found[side] = evaluation.evaluate(served, rows, target.config, root, part)
    del served
    gc.collect()
    return found


def _part(on_progress: Progress | None, at: int, sides: int) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(at * total + done, sides * total)


def constant(target: Target, train: Path | None, rows: Sequence[Row]) -> dict[str, Any] | None:
    """What the training answer that suits these rows best would score, said to every question; None without rows."""
    if train is None:
        return None
    try:
        answers = [records.reference(row) for row in store.iter_rows(train)]
    except DataError:
        return None
    best = metrics.best_constant(
        answers, [records.reference(row) for row in rows], stemmer=target.config.eval.rouge_stemmer
    )
    return None if best is None else {"answer": best.answer, **best.scores}
