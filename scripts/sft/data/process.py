"""What process writes: the splits, the quarantine, and the counts that go with each row."""

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
from sft.data import quality, readers, rows, sources, split, store
from sft.data import rows as records
from sft.data import rows as rows_module
from sft.data.formats import MOST_KEYS
from sft.data.ledger import DUPLICATE, LEAK, NEAR_DUPLICATE, Ledger, RowFault
from sft.data.quality import Look, Profile
from sft.data.readers import DECODER, Progress, Raw, sorted_dumps
from sft.data.sources import Mix, find
from sft.errors import DataError

if TYPE_CHECKING:
    from sft.data.dedup import Index
if TYPE_CHECKING:
    from sft.data.contamination import Contamination


LONGEST_TEXT = 100_000  # characters of an unreadable row that are kept
FEW = 10_000  # rows below which a split may come out empty, so that one must know which rows cannot be moved


class Leaks:
    """Counts rows of val and test that training rows give away: the same row, or the same question."""

    def __init__(self) -> None:
        self._trained = {"exact": array("Q"), "same question": array("Q")}
        self._held: dict[str, dict[str, list[int]]] = {"exact": {}, "same question": {}}
        self.near: Counter[str] | None = None  # split -> rows nearly the same as one of another; None: not looked for

    def note(self, split: str, record: rows.Row, prompt: str) -> None:
        """The next row that is written. prompt: its `records.prompt_id`."""
        for kind, key in (("exact", int(record["id"], 16)), ("same question", int(prompt, 16))):
            if split == "train":
                self._trained[kind].append(key)
            else:
                self._held[kind].setdefault(split, []).append(key)

    def asked(self) -> set[int]:
        """The prompts of val and test."""
        return {key for keys in self._held["same question"].values() for key in keys}

    def count(self) -> dict[str, dict[str, int | None]]:
        """Split -> kind -> rows of it that training gives away; None where that was not looked for."""
        made: dict[str, dict[str, int | None]] = {}
        for kind, held in self._held.items():
            wanted = {key for keys in held.values() for key in keys}
            given_away = {key for key in self._trained[kind] if key in wanted} if wanted else set()
            for name, keys in held.items():
                made.setdefault(name, {})[kind] = sum(key in given_away for key in keys)
                made[name]["near"] = None if self.near is None else self.near[name]
        return made


class Writer(ExitStack):
    """Open files of one run of process. bound: ids of rows that may not be moved to another split."""

    def __init__(self, folder: Path, ledger: Ledger, splits: list[str], leaks: Leaks) -> None:
        super().__init__()
        self.ledger, self.leaks = ledger, leaks
        self.bound = set[str]()
        self._first: dict[str, str] = {}  # prompt -> id of its first row
        ledger.splits = dict.fromkeys(splits, 0)
        files = [*splits, "quarantine"]
        self._outs = {name: self.enter_context((folder / f"{name}.jsonl").open("wb")) for name in files}

    def write(self, split: str, record: rows.Row, line: bytes, format: str, copies: int, prompt: str) -> None:
        """One row into its split, and into training as often as its source's weight says."""
        self._outs[split].write(line)
        self.ledger.count(record, format, split)
        self.leaks.note(split, record, prompt)
        if self.ledger.written < FEW and self._first.setdefault(prompt, record["id"]) != record["id"]:
            self.bound |= {record["id"], self._first[prompt]}
        if split != "train" or copies == 1:
            return
        for number in range(2, copies + 1):
            again = {**record, "id": f"{record['id']}-{number}"}
            self._outs[split].write(rows.line(again))
            self.ledger.read += 1
            self.ledger.repeated += 1
            self.ledger.count(again, format, split)
            if self.ledger.written < FEW:
                self.bound |= {record["id"], again["id"]}

    def quarantine(self, raw: Raw, fault: RowFault) -> None:
        """One row that is not used: counted in the ledger, and whole in the quarantine with its reason and place."""
        self.ledger.name(fault.reason, raw.origin, fault.detail)
        entry: dict[str, Any] = {"reason": fault.reason, "detail": fault.detail, "origin": raw.origin}
        try:
            kept = {"text": raw.text[:LONGEST_TEXT]} if raw.text is not None else {"row": raw.value}
            line = readers.dumps(entry | kept)
        except (TypeError, ValueError):  # half surrogates, bytes: shown with escapes
            shown = raw.text if raw.text is not None else repr(raw.value)
            told = {"detail": _printable(fault.detail), "text": _printable(shown[:LONGEST_TEXT])}
            line = readers.dumps(entry | told)
        self._outs["quarantine"].write(line + b"\n")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


EXAMPLES = 5  # pairs of near duplicates shown in the ledger


def wanted(data: DataSection) -> bool:
    """Whether a row's fate depends on other rows."""
    outliers = {"length_outliers", "script"} & set(data.drop)
    return data.near_duplicates != "off" or data.split.group_by is not None or bool(outliers)


def group_of(raw: Raw, key: str | None) -> str | None:
    """The row's value under the key that rows are grouped by; None where it has none."""
    value = raw.value.get(key) if key is not None else None
    return None if value is None else sorted_dumps(value).decode()


class Held:
    """Rows that wait on disk, in their order, until all are known; then `place` writes each where it belongs."""

    def __init__(self, folder: Path, data: DataSection) -> None:
        self.data, self.path = data, folder / "waiting.part"
        self._file = self.path.open("wb")
        self._rows: list[tuple[str, int, str | None]] = []  # format, copies, group
        self._looks: list[Look] = []
        self._index: Index | None = None
        if data.near_duplicates != "off":
            from sft.data.dedup import Index

            self._index = Index(data.near_duplicate_threshold)
        self._homes: list[str | None] = []
        self._of_key: dict[str, str] = {}  # a group, or what is asked -> its split

    def add(self, record: rows.Row, line: bytes, format: str, copies: int, group: str | None, look: Look) -> None:
        """The next row."""
        self._looks.append(look)
        self._file.write(line)
        self._rows.append((format, copies, group))
        if self._index is not None:
            from sft.data.dedup import text_of

            self._index.add(text_of(record))

    def place(self, writer: Writer, profile: Profile) -> None:
        """Writes all rows, or names them; then tells in the ledger what was found. profile: of all these rows."""
        self._file.close()
        pairs = list(self._index.pairs()) if self._index is not None else []
        near: dict[int, list[int]] = {}
        for later, earlier in pairs:
            near.setdefault(later, []).append(earlier)
        ids: list[str] = []
        with self.path.open("rb") as waiting:
            for number, line in enumerate(waiting):
                record: rows.Row = DECODER.decode(line.decode("utf-8"))
                ids.append(record["id"])
                format, copies, group = self._rows[number]
                prompt = rows.prompt_id(record)
                try:
                    profile.check(self._looks[number], self.data.drop)
                    home = self._home(near.get(number, []), prompt if group is None else f"group {group}", ids)
                except RowFault as fault:
                    self._homes.append(None)
                    writer.quarantine(Raw(record["origin"], record), fault)
                    continue
                self._homes.append(home)
                writer.write(home, record, line, format, copies, prompt)
        self.path.unlink()
        self._tell(writer, pairs, ids)

    def _home(self, near: list[int], key: str, ids: list[str]) -> str:
        alike = [number for number in near if self._homes[number]]
        if alike and self.data.near_duplicates == "drop":
            raise RowFault(NEAR_DUPLICATE, f"nearly the same as an earlier row, id {ids[alike[0]]}")
        homes = {home for number in alike if (home := self._homes[number])}
        if key in self._of_key:
            homes.add(self._of_key[key])
        if len(homes) > 1:
            shown = ", ".join(sorted({ids[number] for number in alike})[:3])
            raise RowFault(LEAK, f"it bridges {' and '.join(sorted(homes))}: it is like rows of both (near: {shown})")
        home = homes.pop() if homes else split.choose(key, self.data.split)
        self._of_key[key] = home
        return home

    def _tell(self, writer: Writer, pairs: list[tuple[int, int]], ids: list[str]) -> None:
        clusters = self._clusters([pair for pair in pairs if self._homes[pair[0]] and self._homes[pair[1]]])
        writer.bound |= {ids[number] for cluster in clusters for number in cluster}
        reports = writer.ledger.reports
        if self.data.split.group_by is not None:
            lonely = sum(group is None for _, _, group in self._rows)
            groups = len({group for _, _, group in self._rows if group is not None})
            reports["groups"] = {"by": self.data.split.group_by, "groups": groups, "without": lonely}
            if lonely == len(self._rows):
                writer.ledger.said.append(f"no row has the key data.split.group_by={self.data.split.group_by}")
        if self._index is None:
            return
        homes = [(self._homes[later], self._homes[earlier]) for later, earlier in pairs]
        crossing = [(one, other) for one, other in homes if one and other and (one == "train") != (other == "train")]
        writer.leaks.near = Counter(home for pair in crossing for home in pair)
        near_clusters = self._clusters(pairs, groups=False)
        reports["near_duplicates"] = {
            "mode": self.data.near_duplicates,
            "threshold": self.data.near_duplicate_threshold,
            "pairs": len(pairs),
            "clusters": len(near_clusters),
            "rows_in_clusters": sum(map(len, near_clusters)),
            "largest_cluster": max(map(len, near_clusters), default=0),
            "pairs_across_splits": len(crossing),
            "examples": [[ids[later], ids[earlier]] for later, earlier in pairs[:EXAMPLES]],
        }

    def _clusters(self, pairs: list[tuple[int, int]], *, groups: bool = True) -> list[list[int]]:
        """Numbers of rows that belong together, where there is more than one."""
        parent = list(range(len(self._rows)))

        def root(number: int) -> int:
            while parent[number] != number:
                parent[number] = number = parent[parent[number]]
            return number

        first: dict[str, int] = {}
        for number, (_, _, group) in enumerate(self._rows if groups else ()):
            if group is not None and self._homes[number]:
                parent[root(number)] = root(first.setdefault(group, number))
        for later, earlier in pairs:
            parent[root(later)] = root(earlier)
        made: dict[int, list[int]] = {}
        for number in range(len(self._rows)):
            made.setdefault(root(number), []).append(number)
        return [members for members in made.values() if len(members) > 1]


def summary(reports: dict[str, Any]) -> list[str]:
    """What a person is told of it."""
    found = reports.get("near_duplicates")
    if not found or not found["pairs"]:
        return []
    how = "; each first row stays" if found["mode"] == "drop" else "; all stay, each cluster in one split"
    alike = f"{found['rows_in_clusters']:,} rows are nearly the same as another ({found['clusters']:,} clusters)"
    return [alike + how]


OURS = {"train.jsonl", "val.jsonl", "test.jsonl", "ledger.json", "quarantine.jsonl", "rejected.jsonl"}


class Rejected(DataError):
    """Too many faulty rows, or none left; `ledger` tells of all."""

    def __init__(self, what: str, ledger: Ledger, *, where: str, fix: str) -> None:
        super().__init__(what, where=where, fix=fix)
        self.ledger = ledger


def process(data: DataSection, root: Path, raw_path: str | None = None, on_progress: Progress | None = None) -> Ledger:
    """Processes one source into `data.processed_dir` and returns the account of its rows.

    raw_path counts from the working folder. Raises DataError (nothing to read, cannot write) or Rejected.
    """
    mix = find(data, root, raw_path)
    target = resolve_path(root, data.processed_dir)
    ledger = Ledger(mix.name, mix.kind, mix.encoding, max_dropped=data.max_dropped, said=list(mix.said))
    with store.replaced(target, OURS, "data.processed_dir") as staged:
        checks = Checks(data, root)
        bound = _write_rows(mix, checks, staged, ledger, on_progress)
        ledger.sources = mix.account()
        _judge(ledger, staged, target)
        for name, row_id in split.fill_empty(staged, ledger.splits, data.split, bound).items():
            ledger.said.append(
                f"{name} had no row by its share of so few: the nearest one was moved to it (id {row_id})"
            )
        ledger.said += split.uneven(ledger.splits, data.split)
        sources.mix_in(data, root, staged, ledger, checks.replayable)
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
        if self.data.deduplicate or self.data.replay:
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
    formats = rows_module.formats(data)
    with Writer(staged, ledger, list(split.ranges(data.split)), checks.leaks) as writer:
        held = Held(staged, data) if wanted(data) else None
        for raw in mix.rows(data.split.seed, on_progress):
            ledger.read += 1
            try:
                record, format = rows_module.record(raw, formats, data.system_prompt)
                line = rows_module.line(record)
                look = checks.check(record)
            except RowFault as fault:
                writer.quarantine(raw, fault)
                continue
            if held is None:
                prompt = records.prompt_id(record)
                writer.write(split.choose(prompt, data.split), record, line, format, raw.copies, prompt)
            else:
                held.add(record, line, format, raw.copies, group_of(raw, data.split.group_by), look)
        if held is not None:
            held.place(writer, checks.profile)
        ledger.reports["leaks"] = checks.leaks.count()
    ledger.reports |= checks.profile.report()
    if unread := {
        key: rows_module for key, rows_module in formats.unread.most_common(MOST_KEYS) if key != data.split.group_by
    }:
        ledger.reports["keys_not_read"] = unread
    if weighted := formats.unread["weight"]:
        ledger.said.append(
            f"{weighted:,} rows have a `weight` of their own: it is stored, but training does not use it;"
            " weigh a whole source (data.sources) or a turn (`weight` in messages)"
        )
    if checks.contamination is not None:
        ledger.reports["contamination"] = checks.contamination.report()
    ledger.said += [*summary(ledger.reports), *_leaks_said(ledger.reports["leaks"])]
    return writer.bound


def _leaks_said(leaks: dict[str, dict[str, int | None]]) -> list[str]:
    told = []
    for name, counts in leaks.items():
        words = [f"{count:,} ({kind})" for kind, count in counts.items() if count]
        if words:
            fix = "keep such rows together: data.near_duplicates=report, or data.split.group_by=KEY"
            told.append(f"rows of {name} that training rows give away: {', '.join(words)}; {fix}")
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
    fix = f"all are listed in {rejected}, for example: {first['detail']}; "
    if not ledger.written and "the keys are" in first["detail"]:
        fix += "say which column is what: --set data.columns.user=NAME --set data.columns.assistant=NAME"
    else:
        fix += "fix them, or raise --set data.max_dropped=SHARE; what was processed before is unchanged"
    raise Rejected(what, ledger, where=first["origin"], fix=fix)


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
