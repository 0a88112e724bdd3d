"""The plan in words and tables, and how long the run would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.config.schema import Config
from sft.memory import shapes, speed
from sft.memory.plan import Plan

CHARACTERS_A_TOKEN = 4.0  # of English text, roughly
Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Duration:
    """tokens_per_second: computed ones, by formula. tokens: of the whole run, None where no rows are prepared.
    speed: what of the device was counted on, in words.
    """

    flops_per_token: float
    tokens_per_second: float
    tokens: int | None
    speed: str

    @property
    def seconds(self) -> float | None:
        """For all epochs."""
        return None if self.tokens is None else self.tokens / self.tokens_per_second

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "seconds": self.seconds}


def duration(made: Plan, config: Config, description: Mapping[str, Any], root: Path) -> Duration | None:
    """How fast the run would go, None where nothing is known of the device. Rows are read from the prepared file."""
    known = speed.rate(made.device, *((made.slack.flops, made.slack.flops_of) if made.slack else (None,)))
    if known is None:
        return None
    counted = shapes.count(description, config.tuning, name=config.model.name)
    rows, tokens = _prepared(config, root)
    length = tokens / rows if rows else config.model.max_seq_len
    work = speed.operations(counted, made.config.tuning, made.config.train, length=length)
    epochs = float(made.config.train.epochs)
    return Duration(work, known[0] / work, int(tokens * epochs) if rows else None, known[1])


def _prepared(config: Config, root: Path) -> tuple[int, float]:
    """(rows, tokens) of the prepared training file, by its size; (0, 0) where there is none."""
    given = config.data.train_path or f"{config.data.processed_dir}/train.jsonl"
    path = root / given
    if not path.is_file():
        return 0, 0.0
    with path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    return rows, min(path.stat().st_size / CHARACTERS_A_TOKEN, float(rows * config.model.max_seq_len))


def tables(made: Plan) -> list[Table]:
    """Where the memory goes, every phase, and (where it does not fit) what would help."""
    needed = made.estimate
    rows: list[tuple[Any, ...]] = [(name, f"{size:.2f}") for name, size in needed.parts.items()]
    rows += [("allocated in a training step", f"{needed.allocated:.2f}")]
    found: list[Table] = [
        (f"{made.config.model.name}, {made.config.tuning.mode} ({made.method})", ("part", "GiB"), rows)
    ]
    phases = [
        (name, f"{one.peak:.2f}" if one.peak else "", _gib(one.ram), _gib(one.disk), one.note)
        for name, one in made.phases.items()
    ]
    found.append(("phases, with context and slack", ("phase", "GiB", "RAM", "disk", "of"), phases))
    if made.remedies:
        lines = [
            (r.setting, f"{r.saves_gib:.2f}", r.costs, _percent(r.slower), "yes" if r.fits else "no")
            for r in made.remedies
        ]
        found.append(("what would help", ("--set", "saves GiB", "costs", "time", "enough alone"), lines))
    return found


def lines(made: Plan, took: Duration | None) -> list[str]:
    """The answer in sentences."""
    train, device = made.config.train, made.device
    said = [
        f"{'fits' if made.fits else 'does NOT fit'} {device.name} ({device.gib:.1f} GiB):"
        f" {made.estimate.peak:.2f} GiB in {made.worst} (slack and context {made.slack.source if made.slack else ''})",
        f"a step: {train.effective_batch} rows, {train.batch_size} of {made.config.model.max_seq_len} tokens at a time"
        f" (micro-batches of at most {train.micro_batch_tokens} tokens)",
    ]
    if made.sixteen_bit_experts:
        said.append(
            f"{made.sixteen_bit_experts / 1e9:.2f}e9 weights of experts stay in 16 bit: transformers keeps them as one"
            " tensor, and bitsandbytes quantises linear layers alone (attention and shared experts here)"
        )
    if device.kind == "cuda" and made.card:
        said.append(f"the smallest card that would do: {made.card}")
    if took is not None:
        time = "" if took.seconds is None else f", {_time(took.seconds)} for all epochs of the prepared rows (roughly)"
        said.append(f"about {took.tokens_per_second:,.0f} tokens/s{time} ({took.speed})")
    if made.together is not None:
        how = "fits with" if made.together.fits else "does not fit even with"
        settings = " ".join(f"--set {setting}" for setting in made.together.settings)
        said.append(f"{how} {settings or 'any remedy'} ({made.together.peak_gib:.2f} GiB)")
    return said


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size:.1f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"+{share:.0%}" if share else "same"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"
