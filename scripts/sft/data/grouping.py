"""Splits by groups: rows that are nearly the same, or share a key, never stand on both sides of a split.

Rows are placed in their order: a row joins the split of the earlier rows it belongs to, else its own hash tells. So a
row appended to the file moves no earlier one; if it belongs to rows of two splits, so that it would give rows of one
away to the other, it is kept out (`leak into val or test`).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config.schema import DataSection
from sft.data import records, split
from sft.data.faults import LEAK, NEAR_DUPLICATE, RowFault
from sft.data.quality import Look, Profile
from sft.data.raw import Raw
from sft.data.strict_json import DECODER, sorted_dumps
from sft.data.writer import Writer

if TYPE_CHECKING:
    from sft.data.near import Index

EXAMPLES = 5  # pairs of near duplicates shown in the ledger


def wanted(data: DataSection) -> bool:
    """Whether a row's fate depends on other rows."""
    outliers = {"length_outliers", "language"} & set(data.drop)
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
            from sft.data.near import Index

            self._index = Index(data.near_duplicate_threshold)
        self._homes: list[str | None] = []
        self._of_key: dict[str, str] = {}  # a group, or what is asked -> its split

    def add(self, record: records.Row, line: bytes, format: str, copies: int, group: str | None, look: Look) -> None:
        """The next row."""
        self._looks.append(look)
        self._file.write(line)
        self._rows.append((format, copies, group))
        if self._index is not None:
            from sft.data.words import text_of

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
                record: records.Row = DECODER.decode(line.decode("utf-8"))
                ids.append(record["id"])
                format, copies, group = self._rows[number]
                prompt = records.prompt_id(record)
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
