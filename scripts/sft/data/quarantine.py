"""quarantine.jsonl: every row that is not used, with its reason, its place and itself."""

from __future__ import annotations

from typing import Any, BinaryIO

from sft.data import strict_json
from sft.data.faults import RowFault
from sft.data.ledger import Ledger
from sft.data.raw import Raw

LONGEST_TEXT = 100_000  # characters of an unreadable row that are kept


def add(out: BinaryIO, ledger: Ledger, raw: Raw, fault: RowFault) -> None:
    """Names the row: in the ledger's counts, and whole in the quarantine."""
    ledger.name(fault.reason, raw.origin, fault.detail)
    entry: dict[str, Any] = {"reason": fault.reason, "detail": fault.detail, "origin": raw.origin}
    try:
        kept = {"text": raw.text[:LONGEST_TEXT]} if raw.text is not None else {"row": raw.value}
        line = strict_json.dumps(entry | kept)
    except (TypeError, ValueError):  # half surrogates, bytes: shown with escapes
        shown = raw.text if raw.text is not None else repr(raw.value)
        entry["detail"] = _printable(fault.detail)
        line = strict_json.dumps(entry | {"text": _printable(shown[:LONGEST_TEXT])})
    out.write(line + b"\n")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
