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
from sft.errors import SftError
from sft.memory.devices import plain

FILE = ".cache/planner/calibration.jsonl"
KEPT = 500  # records; older ones are dropped
LEAST = 0.5  # GiB: in smaller runs cuBLAS's workspaces, 17 MiB (64 on a Hopper), speak louder than the model's tensors
log = logging.getLogger("sft.memory")


@dataclass(frozen=True)
class Record:
    """One measured run or rehearsal, of this process on one device. GiB = 2^30 bytes.

    gpu: as the driver names it (a plan's shorter name finds it too), or `cpu`. family: `model_type` of config.json.
    micro_batch_tokens: of the largest micro-batch that ran. allocated_gib, reserved_gib: torch's highest, in a training
    step (of a `run`: in all of it). context_gib: what the process held beside them, None where nobody looked.
    planned_gib: what the planner says of the same. tokens_per_second: real ones, of one device. flops_per_token: of
    `memory.speed`, for the share of the card's speed.
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
    allocated, less 1. records: how many; family: whether all are of that family. flops: achieved operations a second,
    and of what runs, in words.
    """

    records: int
    family: bool
    drift: float | None
    slack: float | None
    context_gib: float | None
    flops: float | None
    flops_of: str = ""


def record(root: Path, entry: Record) -> None:
    """Adds a record. A disk that refuses is said and forgiven: a run is not lost for its calibration."""
    path = root / FILE
    entry = Record(**{**asdict(entry), "when": entry.when or time.strftime("%Y-%m-%dT%H:%M:%S")})
    try:
        lines = [json.dumps(asdict(each)) for each in [*read(root)[-KEPT + 1 :], entry]]
        files.write_text(path, "\n".join(lines) + "\n")
    except (OSError, SftError) as error:
        log.warning("the run's measured memory and speed could not be kept for the planner: %s", error)


def read(root: Path) -> list[Record]:
    """Every record that can be read, oldest first; a spoilt line is passed over, and that is said."""
    known = {each.name for each in fields(Record)}
    try:
        lines = (root / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
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


def lookup(root: Path, gpu: str, family: str, model: str = "") -> Residual | None:
    """What was measured on this GPU (or `cpu`): of this family where there are records of it, else of all; the speed of
    this very model where it ran here. None where nothing is.
    """
    here = [each for each in read(root) if plain(each.gpu) == plain(gpu)]
    same = [each for each in here if each.family == family]
    chosen = same or here
    if not chosen:
        return None
    achieved, whose = _speed(here, family, model)
    large = [each for each in chosen if (each.allocated_gib or 0.0) >= LEAST]
    return Residual(
        records=len(chosen),
        family=bool(same),
        drift=_middle([a / p for e in large if (a := e.allocated_gib) and (p := e.planned_gib)]),
        slack=_middle([r / a - 1 for e in large if (r := e.reserved_gib) and (a := e.allocated_gib)]),
        context_gib=_middle([e.context_gib for e in chosen if e.context_gib is not None]),
        flops=achieved,
        flops_of=whose,
    )


def _speed(here: Sequence[Record], family: str, model: str) -> tuple[float | None, str]:
    """Operations a second, and of what: of whole runs before rehearsals, of the nearest model that ran."""
    timed = [(e, s * f) for e in here if (s := e.tokens_per_second) and (f := e.flops_per_token)]
    timed = [one for one in timed if one[0].stage == "run"] or timed
    for whose, of in (
        ("this model", [done for e, done in timed if e.model == model]),
        (f"{family} models", [done for e, done in timed if e.family == family]),
        ("other models", [done for _, done in timed]),
    ):
        if of:
            return median(of), f"{len(of)} earlier {'run' if len(of) == 1 else 'runs'} of {whose}"
    return None, ""


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None
