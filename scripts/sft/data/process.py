"""From raw rows to the processed folder: every row is checked, then written to its split or to the quarantine."""

from __future__ import annotations

import shutil
from array import array
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.config.load import resolve_path
from sft.config.schema import DataSection
from sft.data import split, store
from sft.data.formats import MAX_KEYS, Formats, make_row, to_line
from sft.data.ledger import DUPLICATE, LEAK, NEAR_DUPLICATE, Ledger
from sft.data.quality import DataProfile, RowStats, check_flags, row_stats
from sft.data.readers import Progress, RawRow
from sft.data.rows import DECODER, Row, RowFault, comparison_text, dump_json, prompt_id
from sft.data.sources import SourcePart, add_replay, find_sources
from sft.errors import DataError

if TYPE_CHECKING:
    from sft.data.contamination import Contamination
    from sft.data.dedup import MinHashIndex

FILES = {"train.jsonl", "val.jsonl", "test.jsonl", "ledger.json", "quarantine.jsonl", "rejected.jsonl"}
MAX_TEXT = 100_000  # characters of an unreadable row in the quarantine
EXAMPLES = 5  # pairs of near duplicates in the ledger


class Rejected(DataError):
    """Too many rows have faults, or none is left; `ledger` accounts for all."""

    def __init__(self, what: str, ledger: Ledger, *, where: str, fix: str) -> None:
        super().__init__(what, where=where, fix=fix)
        self.ledger = ledger


def process(data: DataSection, root: Path, raw_path: str | None = None, on_progress: Progress | None = None) -> Ledger:
    """Processes the sources of `data` into `data.processed_dir` and returns the account of their rows.

    raw_path counts from the working folder. Raises DataError (nothing to read, cannot write) or Rejected.
    """
    parts, target = find_sources(data, root, raw_path), resolve_path(root, data.processed_dir)
    name, kind, encoding = (
        ", ".join(dict.fromkeys(getattr(part, key) for part in parts)) for key in ("name", "kind", "encoding")
    )
    warnings = [line for part in parts for line in part.warnings()]
    ledger = Ledger(name, kind, encoding, max_dropped=data.max_dropped, warnings=warnings)
    with store.replace_dir(target, FILES, "data.processed_dir") as staged:
        checks = RowChecks(data, root)
        fixed = _write_rows(parts, checks, staged, ledger, on_progress)
        keys = ("name", "rows", "taken", "weight", "limit")
        ledger.sources = [{key: getattr(part, key) for key in keys} for part in parts]
        _require_good_rows(ledger, staged, target)
        for name, row_id in split.fill_empty(staged, ledger.splits, data.split, fixed).items():
            ledger.warnings.append(f"{name} had no row by its share: the nearest one was moved to it (id {row_id})")
        ledger.warnings += split.share_warnings(ledger.splits, data.split)
        add_replay(data, root, staged, ledger, checks.check_replay)
        for name in [name for name, count in ledger.splits.items() if count == 0]:
            (staged / f"{name}.jsonl").unlink()
            why = "its share is small, and rows with the same question, or that belong together, stay in one split"
            if ledger.written < split.MIN_ROWS:
                why = f"{ledger.written} rows are too few to split"
            ledger.warnings.append(f"{name} is empty: {why}")
        if not ledger.balanced():
            raise AssertionError("the ledger does not add up")
        files.write_json(staged / "ledger.json", ledger.to_json())
    return ledger


def _write_rows(
    parts: list[SourcePart], checks: RowChecks, staged: Path, ledger: Ledger, on_progress: Progress | None
) -> set[str]:
    """Writes every row to its split or the quarantine; returns the ids of rows that may not change their split."""
    data = checks.data
    formats = Formats(data.format, {role: name for role, name in data.columns if name} if data.columns else None)
    with SplitWriter(staged, ledger, list(split.ranges(data.split))) as writer:
        pending = PendingRows(staged, data) if PendingRows.needed(data) else None
        for raw in (raw for part in parts for raw in part.read(data.split.seed, on_progress)):
            ledger.read += 1
            try:
                row, format = make_row(raw, formats, data.system_prompt)
                line = to_line(row)
                stats = checks.check(row)
            except RowFault as fault:
                writer.quarantine(raw, fault)
                continue
            if pending is not None:
                pending.add(row, line, format, raw, stats)
            else:
                prompt = prompt_id(row)
                writer.write(split.choose_split(prompt, data.split), row, line, format, raw.copies, prompt)
        if pending is not None:
            pending.write_to(writer, checks.profile)
    ledger.reports["leaks"] = writer.count_leaks()
    checks.held_out_prompts = writer.held_out_prompts()
    ledger.reports |= checks.profile.report()
    unread = {key: count for key, count in formats.unread.most_common(MAX_KEYS) if key != data.split.group_by}
    if unread:
        ledger.reports["keys_not_read"] = unread
    if checks.contamination is not None:
        ledger.reports["contamination"] = checks.contamination.report()
    ledger.warnings += _row_warnings(ledger.reports, formats.unread["weight"])
    return writer.fixed


def _row_warnings(reports: dict[str, Any], weighted: int) -> list[str]:
    warnings = []
    if weighted:
        warnings.append(
            f"{weighted:,} rows have a `weight` of their own: it is stored, but training does not use it;"
            " weigh a whole source (data.sources) or a turn (`weight` in messages)"
        )
    near = reports.get("near_duplicates")
    if near and near["pairs"]:
        how = "the first of each stays" if near["mode"] == "drop" else "all stay, each cluster in one split"
        rows = f"{near['rows_in_clusters']:,} rows are near duplicates of another ({near['clusters']:,} clusters)"
        warnings.append(f"{rows}; {how}")
    for name, counts in reports["leaks"].items():
        if leaks := [f"{count:,} ({kind})" for kind, count in counts.items() if count]:
            fix = "keep such rows together: data.near_duplicates=report, or data.split.group_by=KEY"
            warnings.append(f"rows of {name} that also occur in train: {', '.join(leaks)}; {fix}")
    return warnings


def _require_good_rows(ledger: Ledger, staged: Path, target: Path) -> None:
    """Raises Rejected, with the faulty rows in rejected.jsonl, if too many rows are faulty or none is left."""
    if ledger.written and not ledger.too_many_faults:
        return
    rejected = target / "rejected.jsonl"
    with files.atomic_file(rejected) as part:
        shutil.copyfile(staged / "quarantine.jsonl", part)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(ledger.named.items()))
    first = {"origin": ledger.source, "detail": "no rows"}
    if ledger.examples:
        first = ledger.examples[max(ledger.examples, key=lambda reason: ledger.named[reason])][0]
    what = f"{ledger.faults:,} of {ledger.read:,} rows are faulty ({reasons or 'no rows at all'})"
    what += f", more than data.max_dropped={ledger.max_dropped:g} allows" if ledger.written else ": nothing is left"
    fix = "correct them, or raise --set data.max_dropped=SHARE; what was processed before is unchanged"
    if not ledger.written and "the keys are" in first["detail"]:
        fix = "say which column is what: --set data.columns.user=NAME --set data.columns.assistant=NAME"
    fix = f"all are listed in {rejected}, for example: {first['detail']}; {fix}"
    raise Rejected(what, ledger, where=first["origin"], fix=fix)


class RowChecks:
    """What every readable row must pass: not seen before, not of a benchmark, no flag that is to be dropped."""

    def __init__(self, data: DataSection, root: Path) -> None:
        self.data, self.profile = data, DataProfile()
        self.contamination: Contamination | None = None
        self._seen: set[int] = set()
        self.held_out_prompts: set[int] = set()  # of val and test, when all rows are written
        if data.contamination.against:
            from sft.data.contamination import Contamination

            self.contamination = Contamination(data.contamination, root)

    def check(self, row: Row) -> RowStats:
        """Raises RowFault for a row that is not used."""
        key = int(row["id"], 16)
        if self.data.deduplicate and key in self._seen:
            raise RowFault(DUPLICATE, f"the same as an earlier row, id {key:016x}")
        if self.data.deduplicate or self.data.replay:
            self._seen.add(key)
        if self.contamination is not None:
            self.contamination.check(row)
        stats = row_stats(row)
        self.profile.flags.update(stats.flags)  # of dropped rows too
        check_flags(stats, self.data.drop)
        self.profile.add(stats)
        return stats

    def check_replay(self, row: Row) -> None:
        """Raises RowFault for a replay row that is among the rows already, or is of val, test or a benchmark."""
        if int(row["id"], 16) in self._seen:
            raise RowFault(DUPLICATE, "among the rows already")
        if int(prompt_id(row), 16) in self.held_out_prompts:
            raise RowFault(LEAK, "val or test has the same question")
        if self.contamination is not None:
            self.contamination.check(row)


class SplitWriter(ExitStack):
    """The open files of one run of process. fixed: ids of rows that a group or near duplicates hold in their split."""

    def __init__(self, folder: Path, ledger: Ledger, splits: list[str]) -> None:
        super().__init__()
        self.ledger, self.fixed = ledger, set[str]()
        self.near: Counter[str] | None = None  # split -> near duplicates of rows in another; None: not searched
        self._keys = {name: {"exact": array("Q"), "same question": array("Q")} for name in splits}
        ledger.splits = dict.fromkeys(splits, 0)
        names = [*splits, "quarantine"]
        self._files = {name: self.enter_context((folder / f"{name}.jsonl").open("wb")) for name in names}

    def write(self, name: str, row: Row, line: bytes, format: str, copies: int, prompt: str) -> None:
        """One row into its split; into train as often as the weight of its source says."""
        self._files[name].write(line)
        self.ledger.count(row, format, name)
        self._keys[name]["exact"].append(int(row["id"], 16))
        self._keys[name]["same question"].append(int(prompt, 16))
        for number in range(2, copies + 1 if name == "train" else 0):
            copy = {**row, "id": f"{row['id']}-{number}"}
            self._files[name].write(to_line(copy))
            self.ledger.read += 1
            self.ledger.repeated += 1
            self.ledger.count(copy, format, name)

    def count_leaks(self) -> dict[str, dict[str, int | None]]:
        """Held-out split -> kind -> its rows that also occur in train; None if that was not searched."""
        leaks: dict[str, dict[str, int | None]] = {}
        for name, kinds in self._keys.items():
            if name != "train" and kinds["exact"]:
                leaks[name] = {"near": None if self.near is None else self.near[name]}
                for kind, keys in kinds.items():
                    shared = set(keys).intersection(self._keys["train"][kind] if "train" in self._keys else ())
                    leaks[name][kind] = sum(key in shared for key in keys)
        return leaks

    def held_out_prompts(self) -> set[int]:
        """The prompt ids of val and test."""
        return {key for name, keys in self._keys.items() if name != "train" for key in keys["same question"]}

    def quarantine(self, raw: RawRow, fault: RowFault) -> None:
        """One row that is not used: counted in the ledger, and whole in the quarantine with its reason and origin."""
        self.ledger.exclude(fault, raw.origin)
        entry: dict[str, Any] = {"reason": fault.reason, "detail": fault.detail, "origin": raw.origin}
        try:
            content = {"text": raw.text[:MAX_TEXT]} if raw.text is not None else {"row": raw.value}
            line = dump_json(entry | content)
        except (TypeError, ValueError):  # half surrogates, bytes: with escapes
            text = raw.text if raw.text is not None else repr(raw.value)
            escaped = {"detail": fault.detail, "text": text[:MAX_TEXT]}
            escaped = {key: value.encode("utf-8", "backslashreplace").decode() for key, value in escaped.items()}
            line = dump_json(entry | escaped)
        self._files["quarantine"].write(line + b"\n")


class PendingRows:
    """Rows that wait on disk, in order, because their split or their use depends on other rows."""

    def __init__(self, folder: Path, data: DataSection) -> None:
        self.data, self.path = data, folder / "pending.part"
        self._file = self.path.open("wb")
        self._rows: list[tuple[str, int, str | None, RowStats]] = []  # format, copies, group, stats
        self._splits: list[str | None] = []  # of each row that was written, in order; None: not used
        self._index: MinHashIndex | None = None
        if data.near_duplicates != "off":
            from sft.data.dedup import MinHashIndex

            self._index = MinHashIndex(data.near_duplicate_threshold)

    @staticmethod
    def needed(data: DataSection) -> bool:
        """Whether this config makes rows depend on other rows."""
        profiled = {"length_outliers", "script"} & set(data.drop)
        return data.near_duplicates != "off" or data.split.group_by is not None or bool(profiled)

    def add(self, row: Row, line: bytes, format: str, raw: RawRow, stats: RowStats) -> None:
        """The next row."""
        key = self.data.split.group_by
        value = raw.value.get(key) if key is not None else None
        group = None if value is None else dump_json(value, sort_keys=True).decode()
        self._file.write(line)
        self._rows.append((format, raw.copies, group, stats))
        if self._index is not None:
            self._index.add(comparison_text(row))

    def write_to(self, writer: SplitWriter, profile: DataProfile) -> None:
        """Writes every row, or excludes it; then reports. profile: of all these rows."""
        self._file.close()
        pairs = list(self._index.pairs()) if self._index is not None else []
        near: dict[int, list[int]] = {}
        for later, earlier in pairs:
            near.setdefault(later, []).append(earlier)
        ids: list[str] = []
        split_of_key: dict[str, str] = {}  # a group, or a prompt id -> its split
        with self.path.open("rb") as file:
            for number, line in enumerate(file):
                row: Row = DECODER.decode(line.decode("utf-8"))
                ids.append(row["id"])
                format, copies, group, stats = self._rows[number]
                prompt = prompt_id(row)
                key = prompt if group is None else f"group {group}"
                try:
                    profile.check(stats, self.data.drop)
                    name = self._choose(near.get(number, []), split_of_key.get(key), key, ids)
                except RowFault as fault:
                    self._splits.append(None)
                    writer.quarantine(RawRow(row["origin"], row), fault)
                    continue
                split_of_key[key] = name
                self._splits.append(name)
                writer.write(name, row, line, format, copies, prompt)
        self.path.unlink()
        groups = [group if name else None for (_, _, group, _), name in zip(self._rows, self._splits, strict=True)]
        used = [pair for pair in pairs if self._splits[pair[0]] and self._splits[pair[1]]]
        writer.fixed |= {ids[number] for cluster in _clusters(used, groups) for number in cluster}
        self._report(writer, pairs, ids)

    def _choose(self, near: list[int], of_key: str | None, key: str, ids: list[str]) -> str:
        """The split of a row: that of earlier rows that it belongs to, else by the hash of its key."""
        alike = [number for number in near if self._splits[number]]
        if alike and self.data.near_duplicates == "drop":
            raise RowFault(NEAR_DUPLICATE, f"nearly the same as an earlier row, id {ids[alike[0]]}")
        names = {name for name in (of_key, *(self._splits[number] for number in alike)) if name}
        if len(names) > 1:
            examples = ", ".join(sorted({ids[number] for number in alike})[:3])
            raise RowFault(LEAK, f"it belongs to rows of both {' and '.join(sorted(names))} (near: {examples})")
        return names.pop() if names else split.choose_split(key, self.data.split)

    def _report(self, writer: SplitWriter, pairs: list[tuple[int, int]], ids: list[str]) -> None:
        reports, by = writer.ledger.reports, self.data.split.group_by
        if by is not None:
            groups = [group for _, _, group, _ in self._rows if group is not None]
            reports["groups"] = {"by": by, "groups": len(set(groups)), "without": len(self._rows) - len(groups)}
            if not groups:
                writer.ledger.warnings.append(f"no row has the key data.split.group_by={by}")
        if self._index is None:
            return
        splits = [(self._splits[later], self._splits[earlier]) for later, earlier in pairs]
        crossing = [(one, other) for one, other in splits if one and other and (one == "train") != (other == "train")]
        writer.near = Counter(name for pair in crossing for name in pair)
        clusters = _clusters(pairs, [None] * len(self._rows))
        reports["near_duplicates"] = {
            "mode": self.data.near_duplicates,
            "threshold": self.data.near_duplicate_threshold,
            "pairs": len(pairs),
            "clusters": len(clusters),
            "rows_in_clusters": sum(map(len, clusters)),
            "largest_cluster": max(map(len, clusters), default=0),
            "pairs_across_splits": len(crossing),
            "examples": [[ids[later], ids[earlier]] for later, earlier in pairs[:EXAMPLES]],
        }


def _clusters(pairs: list[tuple[int, int]], groups: list[str | None]) -> list[list[int]]:
    """Numbers of rows that belong together by a pair or an equal group, where there is more than one (union-find)."""
    parent = list(range(len(groups)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    first: dict[str, int] = {}
    same_group = [(number, first.setdefault(group, number)) for number, group in enumerate(groups) if group is not None]
    for later, earlier in [*same_group, *pairs]:
        parent[root(later)] = root(earlier)
    clusters: dict[int, list[int]] = {}
    for number in range(len(groups)):
        clusters.setdefault(root(number), []).append(number)
    return [members for members in clusters.values() if len(members) > 1]
