"""Raw rows to processed ones: read, told apart, checked, deduplicated, split, written, in one pass and little memory.

All files of the folder change together, and only when the run is good: data/processed/{train,val,test}.jsonl,
ledger.json, quarantine.jsonl. A run with too many faults leaves them alone and writes rejected.jsonl.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from sft import files
from sft.config.paths import resolve
from sft.config.schema import DataSection
from sft.data import conversation, folder, records, split, strict_json
from sft.data.faults import DUPLICATE, EMPTY_ANSWER, NO_USER_TURN, NOT_TEXT, UNREADABLE, RowFault
from sft.data.formats import Formats
from sft.data.ledger import Ledger
from sft.data.lines import Progress
from sft.data.raw import Raw
from sft.data.source import Source, find
from sft.errors import DataError

OURS = {"train.jsonl", "val.jsonl", "test.jsonl", "ledger.json", "quarantine.jsonl", "rejected.jsonl"}
LONGEST_TEXT = 100_000  # characters of an unreadable row kept in the quarantine
KEPT = ("tags", "tag", "weight")


class Rejected(DataError):
    """Too many faulty rows, or none left; `ledger` tells of all."""

    def __init__(self, what: str, ledger: Ledger, *, where: str, mend: str) -> None:
        super().__init__(what, where=where, mend=mend)
        self.ledger = ledger


def process(data: DataSection, root: Path, raw_path: str | None = None, on_progress: Progress | None = None) -> Ledger:
    """Processes one source into `data.processed_dir` and returns the account of its rows.

    raw_path counts from the working folder. Raises DataError (nothing to read, cannot write) or Rejected.
    """
    source = find(data, root, raw_path)
    target = resolve(root, data.processed_dir)
    ledger = Ledger(source.name, source.kind, source.found.encoding if source.found else "utf-8")
    ledger.max_dropped = data.max_dropped
    ledger.said += source.found.said if source.found else []
    with folder.replaced(target, OURS, "data.processed_dir") as staged:
        _write_rows(source, data, staged, ledger, on_progress)
        _judge(ledger, staged, target)
        _finish(ledger, data, staged)
    return ledger


def _write_rows(source: Source, data: DataSection, staged: Path, ledger: Ledger, on_progress: Progress | None) -> None:
    columns = {role: name for role, name in data.columns if name} if data.columns else None
    formats = Formats(data.format, columns)
    taken = split.ranges(data.split)
    ledger.splits = dict.fromkeys(taken, 0)
    seen: set[int] = set()
    with ExitStack() as open_files:
        outs = {name: open_files.enter_context((staged / f"{name}.jsonl").open("wb")) for name in taken}
        quarantine = open_files.enter_context((staged / "quarantine.jsonl").open("wb"))
        for raw in source.rows(on_progress):
            ledger.read += 1
            try:
                record, format = _record(raw, formats, data.system_prompt)
                line = _line(record)
                if data.deduplicate:
                    _check_new(int(record["id"], 16), seen)
            except RowFault as fault:
                _quarantine(quarantine, ledger, raw, fault)
                continue
            name = split.choose(record["id"], data.split)
            outs[name].write(line)
            _count(ledger, record, format, name)


def _check_new(key: int, seen: set[int]) -> None:
    if key in seen:
        raise RowFault(DUPLICATE, f"the same as an earlier row, id {key:016x}")
    seen.add(key)


def _count(ledger: Ledger, record: records.Row, format: str, name: str) -> None:
    ledger.written += 1
    ledger.splits[name] += 1
    ledger.formats[format] = ledger.formats.get(format, 0) + 1
    shape = next((shape for shape in ("messages", "input") if shape in record), "one turn")
    shape = "rendered" if shape == "input" else shape
    ledger.shapes[shape] = ledger.shapes.get(shape, 0) + 1
    ledger.example = ledger.example or record


def _record(raw: Raw, formats: Formats, system_prompt: str | None) -> tuple[records.Row, str]:
    """The stored row and the format it came in."""
    if raw.fault is not None:
        raise RowFault(UNREADABLE, raw.fault)
    parsed = formats.parse(raw.value)
    extra = {key: raw.value[key] for key in KEPT if raw.value.get(key) is not None}
    if raw.value.get("id") is not None:
        extra["source_id"] = raw.value["id"]
    if parsed.references:
        extra["references"] = list(parsed.references)
    try:
        if parsed.pair:
            _check_pair(*parsed.pair)
            return records.rendered_record(*parsed.pair, origin=raw.origin, **extra), parsed.format
        messages = parsed.messages
        if system_prompt and messages and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        conversation.check(messages)
        return records.to_record(messages, parsed.tools, origin=raw.origin, **extra), parsed.format
    except TypeError as error:
        raise RowFault(NOT_TEXT, str(error)) from None


def _check_pair(source: str, target: str) -> None:
    if not source.strip():
        raise RowFault(NO_USER_TURN, "input is empty")
    if not target.strip():
        raise RowFault(EMPTY_ANSWER, "target is empty")


def _line(record: records.Row) -> bytes:
    try:
        return strict_json.dumps(record) + b"\n"
    except (TypeError, ValueError) as error:
        raise RowFault(NOT_TEXT, str(error)) from None


def _quarantine(out: BinaryIO, ledger: Ledger, raw: Raw, fault: RowFault) -> None:
    """Names the row: in the ledger's counts, and whole in quarantine.jsonl."""
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


def _finish(ledger: Ledger, data: DataSection, staged: Path) -> None:
    """Fills empty splits, says what a person must know, drops files without rows, writes the ledger."""
    for name, row_id in split.fill_empty(staged, ledger.splits, data.split).items():
        ledger.said.append(f"{name} had no row by its share of so few: the nearest one was moved to it (id {row_id})")
    for name, count in ledger.splits.items():
        if count == 0:
            (staged / f"{name}.jsonl").unlink()
            ledger.said.append(f"{name} is empty: {ledger.written} rows are too few to split")
    if not ledger.balanced():
        raise AssertionError("the ledger does not add up")
    files.write_json(staged / "ledger.json", ledger.to_json())
