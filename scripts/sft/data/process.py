"""From raw rows to the processed folder: every row is checked, then written to its split or to the quarantine.

Rows that pass the checks wait on disk until all are read, since the split of one may depend on others; so few of their
facts are in memory (`Pending`).
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from sft import files
from sft.config.load import display_path, resolve_path
from sft.config.schema import DataSection
from sft.data import split, store
from sft.data.formats import MAX_KEYS, Formats, guess_columns, make_row, to_line
from sft.data.ledger import FEW_FAULTS, Ledger
from sft.data.quality import DataProfile, check_flags, row_stats
from sft.data.readers import KIND_NAMES, Progress, RawRow
from sft.data.rows import DECODER, Row, RowFault, comparison_text, dump_json, prompt_id, shape
from sft.data.sources import SourcePart, add_replay, find_sources
from sft.errors import DataError

if TYPE_CHECKING:
    from sft.data.contamination import Contamination
    from sft.data.dedup import NearDuplicates

FILES = {"train.jsonl", "val.jsonl", "test.jsonl", "ledger.json", "quarantine.jsonl", "rejected.jsonl"}
MAX_TEXT = 100_000  # characters of an unreadable row in the quarantine
EXAMPLES = 5  # pairs of near duplicates in the ledger
PENDING = "pending.part"
Pairs = list[tuple[int, int]]  # numbers of near duplicates, the later row first
Places = list[str | RowFault]  # the split of each row, or why it is not used


class Pending(NamedTuple):
    """A row that passed the checks. id, prompt: as integers. group: its value under data.split.group_by, as JSON."""

    id: int
    prompt: int
    group: str | None
    format: str
    shape: str
    copies: int
    size: int
    script: str


class Rejected(DataError):
    """Too many rows have faults, or none is left; `ledger` accounts for all.

    table: a row whose columns are not known but could be mapped (data.columns); details: which they may be.
    """

    def __init__(self, what: str, ledger: Ledger, table: Row | None, *, where: str, fix: str) -> None:
        super().__init__(what, where=where, fix=fix)
        self.ledger, self.table = ledger, table
        self.details = {"columns": guess_columns(table)} if table else {}


def process(
    data: DataSection,
    root: Path,
    raw_path: str | None = None,
    on_progress: Progress | None = None,
    *,
    rated: bool = False,
) -> Ledger:
    """Processes the sources of `data` into `data.processed_dir` and returns the account of their rows.

    raw_path counts from the working folder. rated: rows say whether their answer is good (KTO).
    Raises DataError (nothing to read, cannot write) or Rejected.
    """
    parts, target = find_sources(data, root, raw_path), resolve_path(root, data.processed_dir)
    name, kind, encoding = (
        ", ".join(dict.fromkeys(getattr(part, key) for part in parts)) for key in ("name", "kind", "encoding")
    )
    few = 0 if "max_dropped" in data.model_fields_set else FEW_FAULTS
    ledger = Ledger(name, kind, encoding, max_dropped=data.max_dropped, few_faults=few)
    ledger.splits = dict.fromkeys(split.ranges(data.split), 0)
    with store.replace_dir(target, FILES, "data.processed_dir") as staged:
        checks = RowChecks(data, root, rated=rated)
        with (staged / "quarantine.jsonl").open("wb") as quarantine:
            rows = _read(parts, checks, staged / PENDING, quarantine, ledger, on_progress)
            ledger.warnings = [line for part in parts for line in part.warnings()]
            pairs = list(checks.near.pairs()) if checks.near is not None else []
            places = _choose_splits(rows, pairs, checks.profile, data)
            moved = split.fill_empty(places, [row.prompt for row in rows], _fixed(rows, pairs, places), data.split)
            _write(rows, places, staged, quarantine, ledger)
        ledger.sources = [part.to_json() for part in parts]
        ledger.reports |= _reports(rows, pairs, places, checks)
        _require_good_rows(ledger, staged, target, root, checks.formats.table, raw_path)
        ledger.warnings += _row_warnings(ledger, checks)
        ledger.warnings += [f"{name} would be empty with so few rows: one row was moved to it" for name in moved]
        held_out = {row.prompt for row, place in zip(rows, places, strict=True) if place in ("val", "test")}
        ledger.warnings += split.share_warnings(ledger.splits, data.split)
        add_replay(data, root, staged, ledger, lambda row: checks.check_replay(row, held_out))
        for name in [name for name, count in ledger.splits.items() if count == 0]:
            (staged / f"{name}.jsonl").unlink()
        if not ledger.balanced():
            raise AssertionError("the ledger does not add up")
        files.write_json(staged / "ledger.json", ledger.to_json())
    return ledger


class RowChecks:
    """What every readable row must pass: not seen before, not of a benchmark, no flag that is to be dropped."""

    def __init__(self, data: DataSection, root: Path, *, rated: bool = False) -> None:
        self.data, self.profile = data, DataProfile()
        columns = {role: name for role, name in data.columns if name} if data.columns else None
        self.formats = Formats(data.format, columns, rated=rated, weight_field=data.weight_field)
        self.contamination: Contamination | None = None
        self.near: NearDuplicates | None = None
        self._seen: set[int] = set()
        self.placeholder = ""  # origin of the first row with a placeholder
        if data.contamination.against:
            from sft.data.contamination import Contamination

            self.contamination = Contamination(data.contamination, root)
        if data.near_duplicates != "off":
            from sft.data.dedup import NearDuplicates

            self.near = NearDuplicates(data.near_duplicate_threshold)

    def check(self, row: Row, format: str, raw: RawRow) -> Pending:
        """Raises RowFault for a row that is not used."""
        key, by = int(row["id"], 16), self.data.split.group_by
        if self.data.deduplicate and key in self._seen:
            raise RowFault("exact duplicate", f"the same as an earlier row, id {key:016x}")
        if self.data.deduplicate or self.data.replay:
            self._seen.add(key)
        if self.contamination is not None:
            self.contamination.check(row)
        stats = row_stats(row)
        self.profile.flags.update(stats.flags)  # of dropped rows too
        if "placeholders" in stats.flags:
            self.placeholder = self.placeholder or row["origin"]
        check_flags(stats, self.data.drop)
        self.profile.add(stats)
        if self.near is not None:
            self.near.add(comparison_text(row))
        value = raw.value.get(by) if by is not None else None
        group = None if value is None else dump_json(value, sort_keys=True).decode()
        prompt = int(prompt_id(row), 16)
        return Pending(key, prompt, group, format, shape(row), raw.copies, stats.size, stats.script)

    def check_replay(self, row: Row, held_out: set[int]) -> None:
        """Raises RowFault for a replay row that is among the rows already, or is of val, test or a benchmark."""
        if int(row["id"], 16) in self._seen:
            raise RowFault("exact duplicate", "among the rows already")
        if int(prompt_id(row), 16) in held_out:
            raise RowFault("leak into val or test", "val or test has the same question")
        if self.contamination is not None:
            self.contamination.check(row)


def _read(
    parts: list[SourcePart],
    checks: RowChecks,
    path: Path,
    quarantine: BinaryIO,
    ledger: Ledger,
    on_progress: Progress | None,
) -> list[Pending]:
    """Reads and checks every row: those that pass wait in the file at `path`, the others go to the quarantine."""
    rows: list[Pending] = []
    with path.open("wb") as waiting:
        for raw in (raw for part in parts for raw in part.read(checks.data.split.seed, on_progress)):
            ledger.read += 1
            try:
                row, format = make_row(raw, checks.formats, checks.data.system_prompt)
                line = to_line(row)
                rows.append(checks.check(row, format, raw))
                waiting.write(line)
            except RowFault as fault:
                _exclude(raw, fault, quarantine, ledger)
    return rows


def _exclude(raw: RawRow, fault: RowFault, quarantine: BinaryIO, ledger: Ledger) -> None:
    """One row that is not used: counted in the ledger, and whole in the quarantine with its reason and origin."""
    ledger.exclude(fault, raw.origin)
    entry: dict[str, Any] = {"reason": fault.reason, "detail": fault.detail, "origin": raw.origin}
    content = {"row": raw.value} if raw.fault is None else {"text": (raw.text or "")[:MAX_TEXT]}
    try:
        line = dump_json(entry | content)
    except (TypeError, ValueError):  # half surrogates, bytes: with escapes
        text = raw.text if raw.text is not None else repr(raw.value)
        escaped = {"detail": fault.detail, "text": text[:MAX_TEXT]}
        escaped = {key: value.encode("utf-8", "backslashreplace").decode() for key, value in escaped.items()}
        line = dump_json(entry | escaped)
    quarantine.write(line + b"\n")


def _choose_splits(rows: list[Pending], pairs: Pairs, profile: DataProfile, data: DataSection) -> Places:
    """Each row goes to the split of the earlier rows that it belongs to, else by the hash of its key."""
    near: dict[int, list[int]] = {}
    for later, earlier in pairs:
        near.setdefault(later, []).append(earlier)
    places: Places = []
    split_of_key: dict[str, str] = {}
    for number, row in enumerate(rows):
        key = f"{row.prompt:016x}" if row.group is None else f"group {row.group}"
        alike = [(rows[other], place) for other in near.get(number, ()) if isinstance(place := places[other], str)]
        names = {place for _, place in alike} | ({split_of_key[key]} if key in split_of_key else set())
        try:
            profile.check(row.size, row.script, data.drop)
            if alike and data.near_duplicates == "drop":
                raise RowFault("near duplicate", f"nearly the same as an earlier row, id {alike[0][0].id:016x}")
            if len(names) > 1:
                examples = ", ".join(sorted(f"{other.id:016x}" for other, _ in alike)[:3])
                both = " and ".join(sorted(names))
                raise RowFault("leak into val or test", f"it belongs to rows of both {both} (near: {examples})")
        except RowFault as fault:
            places.append(fault)
            continue
        name = names.pop() if names else split.choose_split(key, data.split)
        places.append(name)
        if pairs:  # without near duplicates, equal keys have the same hash
            split_of_key[key] = name
    return places


def _fixed(rows: list[Pending], pairs: Pairs, places: Places) -> set[int]:
    """Numbers of the rows that belong to others, by their group or as near duplicates, and so may not move alone."""
    groups = Counter(row.group for row, place in zip(rows, places, strict=True) if isinstance(place, str))
    used = [pair for pair in pairs if all(isinstance(places[number], str) for number in pair)]
    grouped = (number for number, row in enumerate(rows) if row.group is not None and groups[row.group] > 1)
    return {*grouped, *(number for pair in used for number in pair)}


def _write(rows: list[Pending], places: Places, staged: Path, quarantine: BinaryIO, ledger: Ledger) -> None:
    """Writes every waiting row to its split, into train as often as the weight of its source says, or excludes it."""
    with ExitStack() as stack:
        out = {name: stack.enter_context((staged / f"{name}.jsonl").open("wb")) for name in ledger.splits}
        lines = stack.enter_context((staged / PENDING).open("rb"))
        for line, facts, place in zip(lines, rows, places, strict=True):
            if isinstance(place, RowFault):
                row = DECODER.decode(line.decode())
                _exclude(RawRow(row["origin"], row), place, quarantine, ledger)
                continue
            ledger.example = ledger.example or DECODER.decode(line.decode())
            out[place].write(line)
            ledger.count(facts.format, facts.shape, place)
            for number in range(2, facts.copies + 1 if place == "train" else 0):
                row = DECODER.decode(line.decode())
                out[place].write(to_line({**row, "id": f"{row['id']}-{number}"}))
                ledger.read += 1
                ledger.repeated += 1
                ledger.count(facts.format, facts.shape, place)
    (staged / PENDING).unlink()


def _reports(rows: list[Pending], pairs: Pairs, places: Places, checks: RowChecks) -> dict[str, Any]:
    """What the ledger says of the rows as a whole."""
    data, by = checks.data, checks.data.split.group_by
    leaks = {}
    in_train = [row for row, place in zip(rows, places, strict=True) if place == "train"]
    ids, prompts = {row.id for row in in_train}, {row.prompt for row in in_train}
    for name in ("val", "test"):
        if held_out := [row for row, place in zip(rows, places, strict=True) if place == name]:
            leaks[name] = {
                "exact": sum(row.id in ids for row in held_out),
                "same question": sum(row.prompt in prompts for row in held_out),
                "near": None if checks.near is None else 0,  # they share a split
            }
    reports: dict[str, Any] = {"leaks": leaks, **checks.profile.report()}
    if unread := {key: count for key, count in checks.formats.unread.most_common(MAX_KEYS) if key != by}:
        reports["keys_not_read"] = unread
    if checks.contamination is not None:
        reports["contamination"] = checks.contamination.report()
    if by is not None:
        groups = [row.group for row in rows if row.group is not None]
        reports["groups"] = {"by": by, "groups": len(set(groups)), "without": len(rows) - len(groups)}
    if checks.near is not None:
        reports["near_duplicates"] = {
            "mode": data.near_duplicates,
            "threshold": data.near_duplicate_threshold,
            "pairs": len(pairs),
            "rows_in_clusters": len({number for pair in pairs for number in pair}),
            "examples": [[f"{rows[number].id:016x}" for number in pair] for pair in pairs[:EXAMPLES]],
        }
    return reports


def _row_warnings(ledger: Ledger, checks: RowChecks) -> list[str]:
    warnings, reports, by = list[str](), ledger.reports, checks.data.split.group_by
    if "placeholders" not in checks.data.drop and (unfilled := reports["quality"]["placeholders"]):
        warnings.append(
            f"{unfilled:,} rows hold a placeholder such as {{{{name}}}} (the first: {checks.placeholder}), which the"
            " model would write as it is: fill it in, or leave these rows out: --set data.drop=[placeholders]"
        )
    if weighted := checks.formats.unread["weight"]:
        warnings.append(
            f"{weighted:,} rows have a `weight` of their own, which training does not use;"
            " to use it: --set data.weight_field=weight, in `process` and in training"
        )
    if (field := checks.data.weight_field) and not checks.formats.weighted:
        warnings.append(f"no row has the key data.weight_field={field}")
    if checks.formats.cut:
        warnings.append(f"{checks.formats.cut:,} rows ended with an empty turn: it was left out")
    if by is not None and not reports["groups"]["groups"]:
        warnings.append(f"no row has the key data.split.group_by={by}")
    near = reports.get("near_duplicates")
    if near and near["pairs"]:
        how = "the first of each stays" if near["mode"] == "drop" else "all stay, similar ones in one split"
        warnings.append(f"{near['rows_in_clusters']:,} rows are near duplicates of another; {how}")
    for name, counts in reports["leaks"].items():
        if leaks := [f"{count:,} ({kind})" for kind, count in counts.items() if count]:
            fix = "keep such rows together: data.near_duplicates=report, or data.split.group_by=KEY"
            warnings.append(f"rows of {name} that also occur in train: {', '.join(leaks)}; {fix}")
    if plain := ledger.formats.get("rendered"):
        warnings.append(
            f"{plain:,} rows of `input` and `target` are trained on as they are, without the chat template; for"
            " questions and answers: --user_col input --answer_col target"
        )
    if bad := ledger.named["marked as bad"]:
        warnings.append(f"{bad:,} rows with bad answers are left out; train.objective=kto learns from them too")
    return warnings


def _require_good_rows(
    ledger: Ledger, staged: Path, target: Path, root: Path, table: Row | None, raw_path: str | None
) -> None:
    """Raises Rejected, with the faulty rows in rejected.jsonl, if too many rows are faulty or none is left."""
    if ledger.accepted:
        return
    if not ledger.read:
        below = ", below its header" if ledger.kind in (KIND_NAMES["csv"], KIND_NAMES["xlsx"]) else ""
        raise DataError("the file has no rows", where=ledger.source, fix=f"put rows into it{below}")
    rejected = target / "rejected.jsonl"
    with files.atomic_file(rejected) as part:
        shutil.copyfile(staged / "quarantine.jsonl", part)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.named.items()))
    most = max(ledger.examples, key=lambda reason: ledger.named[reason], default="")
    where = ledger.examples[most][0]["origin"] if most else ledger.source
    what = f"{ledger.faults:,} of {ledger.read:,} rows are faulty ({reasons})"
    what += f", more than data.max_dropped={ledger.max_dropped:g} allows" if ledger.written else ": nothing is left"
    columns = guess_columns(table) if table and not ledger.written and ledger.read > 1 else None
    raw = f" RAW={shlex.quote(raw_path)}" if raw_path else ""
    is_row = columns is not None and any(re.search(r"\s.*[.?!]$|.{60}", key) for key in columns)  # and no header
    if not ledger.faults:
        what = f"all {ledger.read:,} rows are left out ({reasons})"
        fix = "change data.drop, data.contamination or data.deduplicate, which leave them out"
    elif columns:
        user, answer = (shlex.quote(column) for column in columns)
        fix = f"say which columns hold question and answer: make process{raw} USER_COL={user} ANSWER_COL={answer}"
        if is_row:
            above = "if line 1 is a row, write names above it, such as question and answer"
            fix = f"{above}; if it names the columns, {fix}"
    elif most == "preference pair":
        fix = "write each row as `prompt`, `chosen` and `rejected`, whose answers differ"
    elif ledger.written and ledger.fault_share <= 0.5:
        share = math.ceil(ledger.fault_share * 100) / 100
        fix = f"correct them, or leave them out: make process{raw} SET=data.max_dropped={share:g}"
    elif ledger.read == 1:
        fix = "save the list of the rows as a file of its own: docs/DATA.md shows every format"
    else:
        fix = "correct them: docs/DATA.md shows every format"
    where += f" (all of them: {display_path(rejected, root)})"
    raise Rejected(what, ledger, table if columns and not is_row else None, where=where, fix=fix)
