"""The system text that a tuned model was trained with, so that chat and batches give it again without being told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from sft.config.schema import Config
from sft.data import records, store
from sft.errors import ModelError, SftError

SERVING = "serving.json"


def expected(config: Config, folder: Path | None, root: Path) -> str | None:
    """The system text that answers expect: the one that all training rows shared, else `data.system_prompt`, else None.

    Read from serving.json beside the adapter or model; where there is none, from the training rows if they are here.
    """
    for place in (folder, folder.parent if folder else None):
        path = place / SERVING if place else None
        if path is not None and path.is_file():
            try:
                said = json.loads(path.read_text(encoding="utf-8")).get("system")
            except (ValueError, AttributeError):
                raise ModelError(f"{path} is not a JSON object", mend="delete it, or train again") from None
            return said if isinstance(said, str) and said else config.data.system_prompt
    if folder is None:
        return config.data.system_prompt
    try:
        shared = shared_by(store.iter_rows(store.paths(config.data, root).train))
    except (SftError, OSError):
        shared = None
    return shared or config.data.system_prompt


def shared_by(rows: Iterable[records.Row]) -> str | None:
    """The system text that every one of the rows has, letter by letter; None where they differ or have none."""
    found: str | None = None
    for row in rows:
        if records.is_rendered(row):
            return None
        turns = records.messages(row)
        text = turns[0].get("content") if turns and turns[0]["role"] == "system" else None
        if not isinstance(text, str) or (found is not None and text != found):
            return None
        found = text
    return found
