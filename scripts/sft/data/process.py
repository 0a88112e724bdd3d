"""Raw rows to processed ones: read, told apart, checked, deduplicated, split, written, in one pass and little memory.

All files of the folder change together, and only when the run is good: data/processed/{train,val,test}.jsonl,
ledger.json, quarantine.jsonl. A run with too many faults leaves them alone and writes rejected.jsonl.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sft import files
from sft.config.paths import resolve
from sft.config.schema import DataSection
from sft.data import folder, grouping, quality, records, replay, rows, split
from sft.data.faults import DUPLICATE, LEAK, RowFault
from sft.data.formats import MOST_KEYS
from sft.data.ledger import Ledger
from sft.data.lines import Progress
from sft.data.mix import Mix, find
from sft.data.writer import Leaks, Writer
from sft.errors import DataError

if TYPE_CHECKING:
    from sft.data.contamination import Contamination

OURS = {"train.jsonl", "val.jsonl", "test.jsonl", "ledger.json", "quarantine.jsonl", "rejected.jsonl"}


class Rejected(DataError):
    """Too many faulty rows, or none left; `ledger` tells of all."""

    def __init__(self, what: str, ledger: Ledger, *, where: str, mend: str) -> None:
        super().__init__(what, where=where, mend=mend)
        self.ledger = ledger


def process(data: DataSection, root: Path, raw_path: str | None = None, on_progress: Progress | None = None) -> Ledger:
    """Processes one source into `data.processed_dir` and returns the account of its rows.

    raw_path counts from the working folder. Raises DataError (nothing to read, cannot write) or Rejected.
    """
    mix = find(data, root, raw_path)
    target = resolve(root, data.processed_dir)
    ledger = Ledger(mix.name, mix.kind, mix.encoding, max_dropped=data.max_dropped, said=list(mix.said))
    with folder.replaced(target, OURS, "data.processed_dir") as staged:
        checks = Checks(data, root)
        bound = _write_rows(mix, checks, staged, ledger, on_progress)
        ledger.sources = mix.account()
        _judge(ledger, staged, target)
        for name, row_id in split.fill_empty(staged, ledger.splits, data.split, bound).items():
            ledger.said.append(
                f"{name} had no row by its share of so few: the nearest one was moved to it (id {row_id})"
            )
        ledger.said += split.uneven(ledger.splits, data.split)
        replay.mix_in(data, root, staged, ledger, checks.replayable)
        _finish(ledger, staged)
    return ledger


class Checks:
    """What a readable row must pass: not seen before, of no benchmark, without the marks that are dropped."""

    def __init__(self, data: DataSection, root: Path) -> None:
        self.data, self.profile = data, quality.Profile()
        self.contamination: Contamination | None = None
        self.leaks = Leaks()
        self._asked: set[int] | None = None
        self._seen: set[int] = set()
        if data.contamination.against:
            from sft.data import contamination

            self.contamination = contamination.load(data.contamination, root)

    def check(self, record: records.Row) -> quality.Look:
        """Raises RowFault for a row that is not used."""
        key = int(record["id"], 16)
        if self.data.deduplicate and key in self._seen:
            raise RowFault(DUPLICATE, f"the same as an earlier row, id {key:016x}")
        if self.data.deduplicate:
            self._seen.add(key)
        if self.contamination is not None:
            self.contamination.check(record)
        look = quality.look(record)
        self.profile.flags.update(look.flags)  # the dropped are counted too
        quality.drop_flags(look, self.data.drop)
        self.profile.add(look)
        return look

    def replayable(self, record: records.Row) -> None:
        """Raises RowFault for a replay row that is there already, asks what val or test asks, or is a benchmark's."""
        if int(record["id"], 16) in self._seen:
            raise RowFault(DUPLICATE, "among the rows already")
        if self._asked is None:
            self._asked = self.leaks.asked()
        if int(records.prompt_id(record), 16) in self._asked:
            raise RowFault(LEAK, "val or test asks the same")
        if self.contamination is not None:
            self.contamination.check(record)


def _write_rows(mix: Mix, checks: Checks, staged: Path, ledger: Ledger, on_progress: Progress | None) -> set[str]:
    """Writes every row to its split or the quarantine; returns the ids of rows that must stay where they are."""
    data = checks.data
    formats = rows.formats(data)
    with Writer(staged, ledger, list(split.ranges(data.split)), checks.leaks) as writer:
        held = grouping.Held(staged, data) if grouping.wanted(data) else None
        for raw in mix.rows(data.split.seed, on_progress):
            ledger.read += 1
            try:
                record, format = rows.record(raw, formats, data.system_prompt)
                line = rows.line(record)
                look = checks.check(record)
            except RowFault as fault:
                writer.quarantine(raw, fault)
                continue
            if held is None:
                prompt = records.prompt_id(record)
                writer.write(split.choose(prompt, data.split), record, line, format, raw.copies, prompt)
            else:
                held.add(record, line, format, raw.copies, grouping.group_of(raw, data.split.group_by), look)
        if held is not None:
            held.place(writer, checks.profile)
        ledger.reports["leaks"] = checks.leaks.count()
    ledger.reports |= checks.profile.report()
    if unread := {key: rows for key, rows in formats.unread.most_common(MOST_KEYS) if key != data.split.group_by}:
        ledger.reports["keys_not_read"] = unread
    if checks.contamination is not None:
        ledger.reports["contamination"] = checks.contamination.report()
    ledger.said += [*grouping.summary(ledger.reports), *_leaks_said(ledger.reports["leaks"])]
    return writer.bound


def _leaks_said(leaks: dict[str, dict[str, int | None]]) -> list[str]:
    told = []
    for name, counts in leaks.items():
        words = [f"{count:,} ({kind})" for kind, count in counts.items() if count]
        if words:
            mend = "keep such rows together: data.near_duplicates=report, or data.split.group_by=KEY"
            told.append(f"rows of {name} that training rows give away: {', '.join(words)}; {mend}")
    return told


def _judge(ledger: Ledger, staged: Path, target: Path) -> None:
    """Raises Rejected, with the faulty rows left in rejected.jsonl, when this is not data to train on."""
    if ledger.written and not ledger.too_many_faults:
        return
    rejected = target / "rejected.jsonl"
    with files.atomic_file(rejected) as part:
        shutil.copyfile(staged / "quarantine.jsonl", part)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.named.items()))
    worst = next(iter(sorted(ledger.examples, key=lambda reason: -ledger.named[reason])), None)
    first = ledger.examples[worst][0] if worst else {"origin": ledger.source, "detail": "no rows"}
    what = f"{ledger.faults:,} of {ledger.read:,} rows are faulty ({reasons or 'no rows at all'})"
    if ledger.written:
        what += f", more than data.max_dropped={ledger.max_dropped:g} allows"
    else:
        what += ": nothing is left"
    mend = f"all are listed in {rejected}, for example: {first['detail']}; "
    if not ledger.written and "the keys are" in first["detail"]:
        mend += "say which column is what: --set data.columns.user=NAME --set data.columns.assistant=NAME"
    else:
        mend += "mend them, or raise --set data.max_dropped=SHARE; what was processed before is unchanged"
    raise Rejected(what, ledger, where=first["origin"], mend=mend)


def _finish(ledger: Ledger, staged: Path) -> None:
    """Says what a person must know, drops files without rows, writes the ledger."""
    for name, count in ledger.splits.items():
        if count == 0:
            (staged / f"{name}.jsonl").unlink()
            why = f"{ledger.written} rows are too few to split"
            if ledger.written >= split.FEWEST:
                why = "its share is small, and rows that ask the same, or belong together, stay in one split"
            ledger.said.append(f"{name} is empty: {why}")
    if not ledger.balanced():
        raise AssertionError("the ledger does not add up")
    files.write_json(staged / "ledger.json", ledger.to_json())
