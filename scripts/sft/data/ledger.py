"""The account of a run of process: every row read is written, or excluded for one reason of a closed list."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sft.data.rows import FAULTS, FILTERS, Filter, RowFault

DROPS: dict[str, Filter] = {  # a name in data.drop -> the reason in the ledger
    "control_characters": "control characters",
    "placeholders": "placeholder",
    "boilerplate": "boilerplate",
    "length_outliers": "length outlier",
    "script": "other script",
}
EXAMPLES = 3  # of each reason
FEW_FAULTS = 3  # accepted in any file with more good rows, unless data.max_dropped is set
# Training rows -> what to expect of a fine-tune on them.
SIZES = (
    (50_000, "large: enough to generalise well; more rows now help less than better ones"),
    (5_000, "medium: solid for instruction tuning"),
    (500, "small: enough for the main patterns of one task"),
    (100, "the least that teaches a pattern: watch for overfitting, and read the answers yourself"),
    (0, "too few to learn from: expect the model to repeat them; 100 is the least, 500 is better"),
)


@dataclass
class Ledger:
    """What became of the rows. named: reason -> rows excluded for it. repeated: copies for the weight of a source.

    replayed: general rows mixed in. Both count as read and written. warnings: for the user.
    """

    source: str
    kind: str
    encoding: str = "utf-8"
    read: int = 0
    named: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    splits: dict[str, int] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    repeated: int = 0
    replayed: int = 0
    max_dropped: float = 0.1
    few_faults: int = 0  # how many are accepted whatever their share
    example: dict[str, Any] | None = None
    reports: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def exclude(self, fault: RowFault, origin: str) -> None:
        """Counts one row that is not written."""
        self.named[fault.reason] += 1
        examples = self.examples.setdefault(fault.reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"origin": origin, "detail": fault.detail})

    def count(self, format: str, shape: str, split: str) -> None:
        """Counts one row that is written."""
        self.splits[split] += 1
        self.formats[format] += 1
        self.shapes[shape] += 1

    @property
    def written(self) -> int:
        return self.formats.total()

    @property
    def faults(self) -> int:
        """Rows with a fault; rows that the config filters out are not among them."""
        return sum(self.named[reason] for reason in FAULTS)

    @property
    def fault_share(self) -> float:
        """Faults over rows read, 0-1."""
        return self.faults / self.read if self.read else 0.0

    @property
    def accepted(self) -> bool:
        few = self.faults <= self.few_faults and self.faults < self.written
        return self.written > 0 and (few or self.fault_share <= self.max_dropped)

    def verdict(self) -> str:
        """One sentence on the number of training rows."""
        rows = self.splits.get("train", self.written)
        return next(f"{rows:,} rows to train on: {words}" for least, words in SIZES if rows >= least)

    def report_lines(self) -> list[str]:
        """The reports for the user, a line each."""
        lines = []
        for part in self.sources if len(self.sources) > 1 else ():
            lines.append(f"{part['name']}: {part['taken']:,} of {part['rows']:,} rows, weight {part['weight']:g}")
        if unused := self.reports.get("keys_not_read"):
            counts = ", ".join(f"{key[:40]} ({count:,} rows)" for key, count in unused.items())
            lines.append(f"keys that training does not use: {counts}")
        if pairs := self.shapes.get("preference pair"):
            lines.append(
                f"{pairs:,} preference pairs: train.objective dpo, ipo, orpo, simpo and kto use both answers,"
                " response the chosen one alone"
            )
        if quality := {name: count for name, count in self.reports.get("quality", {}).items() if count}:
            counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in quality.items())
            lines.append(f"rows to look at (dropped only if data.drop names them): {counts}")
        if contamination := self.reports.get("contamination"):
            hits = ", ".join(f"{file['name']} {file['hits']:,} rows" for file in contamination["against"])
            lines.append(f"benchmarks whose rows were left out: {hits}")
        if replay := self.reports.get("replay"):
            lines.append(f"replay: {replay['taken']:,} rows of {replay['path']}, {replay['share']:.1%} of the mix")
        return [*lines, self.reports["balance"]] if self.written else lines

    def balanced(self) -> bool:
        """Whether every row read is either written or excluded."""
        return self.read == self.written + sum(self.named.values())

    def to_json(self) -> dict[str, Any]:
        """The content of ledger.json; the same rows give the same text."""
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
            "named": {reason: self.named[reason] for reason in (*FAULTS, *FILTERS) if reason in self.named},
            "examples": self.examples,
            "faults": self.faults,
            "fault_share": round(self.fault_share, 6),
            "max_dropped": self.max_dropped,
            "accepted": self.accepted,
            "formats": self.formats,
            "shapes": self.shapes,
            "splits": self.splits,
            "verdict": self.verdict(),
            **self.reports,
            "warnings": self.warnings,
        }
