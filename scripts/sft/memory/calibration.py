"""What runs on this machine really took, and what the planner learns from it for the next one.

A record is a line of `.cache/planner/calibration.jsonl` under the project's root (git-ignored). Three things are learnt
of a GPU, as medians of its records, those of the same model family alone where there are any: how far the trace was off
(`drift`), what the allocator held beyond the tensors (`slack`), and what the process held beyond that (`context_gib`).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median

from sft import files

FILE = ".cache/planner/calibration.jsonl"
KEPT = 500  # records; older ones are dropped
log = logging.getLogger("sft.memory")


@dataclass(frozen=True)
class Record:
    """One measured run or rehearsal, of this process on one device. GiB = 2^30 bytes.

    gpu: as the driver names it, or `cpu`. family: `model_type` of config.json. micro_batch_tokens: of the largest
    micro-batch that ran. allocated_gib, reserved_gib: torch's highest, in a training step. context_gib: what the
    process held beside them, None where nobody looked. planned_gib: `Plan.estimate.allocated` for the same step.
    tokens_per_second: real ones. flops_per_token: of `memory.speed`, for the share of the card's speed.
    """

    gpu: str
    family: str
    model: str
    mode: str
    micro_batch_tokens: int
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    context_gib: float | None = None
    planned_gib: float | None = None
    tokens_per_second: float | None = None
    flops_per_token: float | None = None
    stage: str = "run"
    versions: dict[str, str] = field(default_factory=dict)
    when: str = ""


@dataclass(frozen=True)
class Residual:
    """What records say of a GPU; None where they do not. drift: measured over traced bytes. slack: reserved over
    allocated, less 1. flops: achieved operations a second. records: how many; family: whether all are of that family.
    """

    records: int
    family: bool
    drift: float | None
    slack: float | None
    context_gib: float | None
    flops: float | None


def record(root: Path, entry: Record) -> None:
    """Adds a record. A disk that refuses is said and forgiven: a run is not lost for its calibration."""
    path = root / FILE
    entry = Record(**{**asdict(entry), "when": entry.when or time.strftime("%Y-%m-%dT%H:%M:%S")})
    try:
        lines = [json.dumps(asdict(each)) for each in [*read(root)[-KEPT + 1 :], entry]]
        files.write_text(path, "\n".join(lines) + "\n")
    except OSError as error:
        log.warning("the run's measured memory and speed could not be kept for the planner: %s", error)


def read(root: Path) -> list[Record]:
    """Every record that can be read, oldest first; a spoilt line is passed over, and that is said."""
    known = {each.name for each in fields(Record)}
    try:
        lines = (root / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found, spoilt = list[Record](), 0
    for line in lines:
        try:
            found.append(Record(**{key: value for key, value in json.loads(line).items() if key in known}))
        except (ValueError, TypeError, AttributeError):
            spoilt += 1
    if spoilt:
        log.warning("%d lines of %s cannot be read and are passed over", spoilt, root / FILE)
    return found


def lookup(root: Path, gpu: str, family: str) -> Residual | None:
    """What was measured on this GPU: of this family where there are records of it, else of all; None where none is."""
    here = [each for each in read(root) if each.gpu == gpu]
    same = [each for each in here if each.family == family]
    chosen = same or here
    if not chosen:
        return None
    return Residual(
        records=len(chosen),
        family=bool(same),
        drift=_middle([a / p for e in chosen if (a := e.allocated_gib) and (p := e.planned_gib)]),
        slack=_middle([r / a - 1 for e in chosen if (r := e.reserved_gib) and (a := e.allocated_gib)]),
        context_gib=_middle([e.context_gib for e in chosen if e.context_gib is not None]),
        flops=_middle([s * f for e in chosen if (s := e.tokens_per_second) and (f := e.flops_per_token)]),
    )


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None
