"""Why a row is not used: the closed list of reasons that the ledger counts, and the exception that carries one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

UNREADABLE = "unreadable"
UNKNOWN_FORMAT = "unknown format"
NOT_TEXT = "not text"
NO_USER_TURN = "no user turn"
EMPTY_ANSWER = "empty answer"
UNKNOWN_ROLE = "unknown role"
OUT_OF_ORDER = "roles out of order"
DUPLICATE = "exact duplicate"
NEAR_DUPLICATE = "near duplicate"
LEAK = "leak into val or test"
CONTAMINATION = "contamination"
DROPS = {  # data.drop's names -> the reason in the ledger
    "control_characters": "control characters",
    "boilerplate": "boilerplate",
    "length_outliers": "length outlier",
    "script": "other script",
}

FAULTS = (UNREADABLE, UNKNOWN_FORMAT, NOT_TEXT, NO_USER_TURN, EMPTY_ANSWER, UNKNOWN_ROLE, OUT_OF_ORDER)
ASKED_FOR = (
    DUPLICATE,
    NEAR_DUPLICATE,
    LEAK,
    CONTAMINATION,
    *DROPS.values(),
)  # dropped because the config asks for it: named and counted, but no fault of the row
REASONS = FAULTS + ASKED_FOR


class RowFault(Exception):
    """One row cannot be used. reason: one of REASONS. detail: what exactly, for the person who reads the quarantine."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


EXAMPLES = 3  # origins kept for each reason
# Rows to train on -> what to expect of a fine-tune (the guide seed's table).
SIZES = (
    (50_000, "large: enough to generalise well; more rows now help less than better ones"),
    (5_000, "medium: solid for instruction tuning"),
    (500, "small: enough for the main patterns of one task"),
    (100, "the least that teaches a pattern: watch for overfitting, and look at the answers yourself"),
    (0, "too few to learn from: expect the model to repeat them; 100 is the least, 500 is better"),
)


@dataclass
class Ledger:
    """What became of the rows. repeated: copies made for the weight of a source. replayed: general
    rows mixed in. Both count as read and written.
    """

    source: str
    kind: str
    encoding: str = "utf-8"
    read: int = 0
    written: int = 0
    named: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    repeated: int = 0
    replayed: int = 0
    max_dropped: float = 0.1
    example: dict[str, Any] | None = None
    reports: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def name(self, reason: str, origin: str, detail: str) -> None:
        """Counts one row that is not written."""
        self.named[reason] = self.named.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"origin": origin, "detail": detail})

    def count(self, record: dict[str, Any], format: str, split: str) -> None:
        """Counts one row that is written."""
        self.written += 1
        self.splits[split] += 1
        self.formats[format] = self.formats.get(format, 0) + 1
        shape = "messages" if "messages" in record else "rendered" if "input" in record else "one turn"
        self.shapes[shape] = self.shapes.get(shape, 0) + 1
        self.example = self.example or record

    @property
    def faults(self) -> int:
        """Rows that are faulty; what was dropped because the config asks for it is not among them."""
        return sum(count for reason, count in self.named.items() if reason in FAULTS)

    @property
    def fault_share(self) -> float:
        """Faults over rows read, 0-1."""
        return self.faults / self.read if self.read else 0.0

    @property
    def too_many_faults(self) -> bool:
        return self.fault_share > self.max_dropped

    def verdict(self) -> str:
        """One sentence on the number of rows to train on."""
        rows = self.splits.get("train", self.written)
        return next(f"{rows:,} rows to train on: {words}" for least, words in SIZES if rows >= least)

    def told(self) -> list[str]:
        """What the reports say to a person, a line each."""
        lines = []
        for part in self.sources if len(self.sources) > 1 else ():
            lines.append(f"{part['name']}: {part['taken']:,} of {part['rows']:,} rows, weight {part['weight']:g}")
        if unread := self.reports.get("keys_not_read"):
            counts = ", ".join(f"{key[:40]} ({count:,} rows)" for key, count in unread.items())
            lines.append(f"keys that training does not use: {counts}")
        if quality := {name: count for name, count in self.reports.get("quality", {}).items() if count}:
            counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in quality.items())
            lines.append(f"rows to look at (dropped only if data.drop names them): {counts}")
        if "contamination" in self.reports:
            files = self.reports["contamination"]["against"]
            lines.append("benchmarks: " + ", ".join(f"{one['name']} {one['hits']:,} rows hit" for one in files))
        if replay := self.reports.get("replay"):
            lines.append(f"replay: {replay['taken']:,} rows of {replay['path']}, {replay['share']:.1%} of the mix")
        if "balance" in self.reports and self.written:
            lines.append(self.reports["balance"])
        return lines

    def balanced(self) -> bool:
        """Whether every row read is either written or named."""
        return self.read == self.written + sum(self.named.values())

    def to_json(self) -> dict[str, Any]:
        """What stands in ledger.json; the same rows give the same text."""
        return {
            "source": self.source,
            "kind": self.kind,
            "encoding": self.encoding,
            "sources": self.sources,
            "rows_read": self.read,
            "rows_repeated": self.repeated,
            "rows_replayed": self.replayed,
            "rows_written": self.written,
            "rows_named": sum(self.named.values()),
            "named": {reason: self.named[reason] for reason in REASONS if reason in self.named},
            "examples": self.examples,
            "faults": self.faults,
            "fault_share": round(self.fault_share, 6),
            "max_dropped": self.max_dropped,
            "accepted": not self.too_many_faults and self.written > 0,
            "formats": self.formats,
            "shapes": self.shapes,
            "splits": self.splits,
            "verdict": self.verdict(),
            **self.reports,
            "said": self.said,
        }
