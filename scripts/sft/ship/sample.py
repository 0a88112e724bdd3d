"""A few held-out rows as a model sees them: the run's own validation rows, else rows that are shipped with the kit."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.chat.encode import Encoded, Encoder
from sft.config import paths
from sft.config.schema import Config
from sft.data import store
from sft.errors import DataError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("sft.ship")
ROOM = 1 << 27  # bytes of float32 logits that a sample may have
ROWS = 64
_SHIPPED = "data/samples/support_desk.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Encoded rows. source: the file that they came from. of: the rows in it. kind: causal or seq2seq."""

    source: str
    rows: list[Encoded]
    of: int
    kind: str = "causal"

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row for which there are logits."""
        return [len(row.labels) for row in self.rows]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def batch(self, config: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs, padded at the right (which changes nothing to the left of it in a causal model)."""
        if self.kind == "causal":
            ids = [row.input_ids for row in self.rows]
            return {"input_ids": _padded(ids, 0), "attention_mask": _padded([[1] * len(row) for row in ids], 0)}
        start = int(config.get("decoder_start_token_id") or config.get("pad_token_id") or 0)
        source = [row.input_ids for row in self.rows]
        target = [[start, *(max(token, 0) for token in row.labels[:-1])] for row in self.rows]
        mask = _padded([[1] * len(row) for row in source], 0)
        return {"input_ids": _padded(source, 0), "attention_mask": mask, "decoder_input_ids": _padded(target, 0)}

    def loss(self, logits: list[torch.Tensor]) -> float:
        """Mean loss on the labelled tokens, nats; logits [tokens, vocabulary] of each row."""
        import torch

        total, count = 0.0, 0
        for row, found in zip(self.rows, logits, strict=True):
            wanted = torch.tensor(row.labels[self.kind == "causal" :])
            lost = torch.nn.functional.cross_entropy(found[: len(wanted)], wanted, ignore_index=-100, reduction="sum")
            total, count = total + float(lost), count + int((wanted != -100).sum())
        return total / max(1, count)


def take(encoder: Encoder, config: Config, root: Path, vocabulary: int) -> Sample:
    """At most ROWS rows with logits in ROOM bytes: from the run's validation file, else from the shipped samples.

    vocabulary: rows of the head. Rows past their room lose their beginning.
    """
    room = max(8, ROOM // (4 * vocabulary))
    for source, rows in _sources(config, root):
        encoded = [row for row in encoder.encode_batch(rows[:ROWS]) if row.dropped is None]
        encoded = sorted((_shortened(row, room, encoder.kind) for row in encoded), key=lambda row: len(row.labels))
        longest = 0
        for count in range(len(encoded), 0, -1):
            longest = len(encoded[count - 1].labels)
            if longest * count <= room:
                return Sample(source, encoded[:count], len(rows), encoder.kind)
    raise DataError("no held-out row fits the model's template", where=_SHIPPED, mend="make process, then try again")


def run_rows(config: Config, root: Path) -> tuple[str, list[Row]] | None:
    """The run's validation file and its rows, else those of its training file; None where its data is gone.

    A file outside the project is named without its folder, since what is exported may be pushed.
    """
    try:
        stage = store.paths(config.data, root)
        for path in (stage.val, stage.train):
            if path is not None and (rows := store.read_rows(path)):
                shown = paths.shown(path, root)
                return path.name if Path(shown).is_absolute() else shown, rows
    except DataError as error:
        log.warning(f"the run's own rows are not there: {error.what}")
    return None


def shipped_rows(root: Path, limit: int | None = ROWS) -> list[Row]:
    """Rows of the sample that comes with the kit; None: all."""
    path = paths.shipped(root, _SHIPPED)
    lines = path.read_text(encoding="utf-8").splitlines()[:limit] if path.is_file() else []
    return [json.loads(line) for line in lines]


def _sources(config: Config, root: Path) -> list[tuple[str, list[Row]]]:
    own = run_rows(config, root)
    return [*([own] if own else []), (_SHIPPED, shipped_rows(root, None))]


def _shortened(row: Encoded, room: int, kind: str) -> Encoded:
    if len(row.labels) <= room:
        return row
    if kind == "seq2seq":
        return Encoded(row.id, row.input_ids, row.labels[:room])
    return Encoded(row.id, row.input_ids[-room:], row.labels[-room:])


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    import torch

    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
