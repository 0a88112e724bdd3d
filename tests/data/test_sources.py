"""Several files as one source: folders, compressed files, sources with weights and limits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pydantic import ValidationError

from sft.config.schema import DataSection, SourceSection, SplitSection
from sft.data.process import process
from sft.data.sources import find_sources
from sft.errors import DataError

ALL_TRAIN = SplitSection(train=1, val=0, test=0)


def lines(start: int, stop: int) -> bytes:
    return "".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(start, stop)).encode()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def questions(folder: Path, name: str = "train") -> list[str]:
    path = folder / f"data/processed/{name}.jsonl"
    return [json.loads(line)["user"] for line in path.read_bytes().splitlines()] if path.exists() else []


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def sources(root: Path, *entries: dict[str, Any], **data: Any) -> Any:
    sections = [SourceSection(**source) for source in entries]
    return process(DataSection(sources=sections, split=data.pop("split", ALL_TRAIN), **data), root)


def test_zstd_is_decompressed_while_reading_and_a_broken_file_is_an_error(tmp_path: Path) -> None:
    whole = put(tmp_path / "a.jsonl.zst", zstd(lines(0, 900)) + zstd(lines(900, 1_000)))
    assert process(DataSection(split=ALL_TRAIN), tmp_path, str(whole)).read == 1_000
    assert questions(tmp_path) == [f"q{i}" for i in range(1_000)]
    with pytest.raises(DataError, match=r"broken|is truncated|cannot be read"):
        process(DataSection(), tmp_path, str(put(tmp_path / "b.jsonl.zst", whole.read_bytes()[:-20])))


def test_a_folder_of_files_is_read_as_one(tmp_path: Path) -> None:
    put(tmp_path / "in/b.jsonl", lines(0, 2))
    put(tmp_path / "in/a/c.csv", b"question,answer\nq2,a\n")
    put(tmp_path / "in/d.jsonl.gz", gzip.compress(lines(3, 4)))
    put(tmp_path / "in/README.md", b"# not rows")
    put(tmp_path / "in/.hidden.jsonl", lines(9, 10))
    progress: list[tuple[int, int]] = []
    ledger = process(DataSection(split=ALL_TRAIN), tmp_path, str(tmp_path / "in"), lambda *done: progress.append(done))
    assert questions(tmp_path) == ["q2", "q0", "q1", "q3"] and ledger.source == "in"
    assert ledger.example is not None and ledger.example["origin"] == "in/a/c.csv:2"
    assert all(done <= total for done, total in progress)
    assert any("a folder of 3 files" in line for line in ledger.warnings)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file of rows"):
        find_sources(DataSection(), tmp_path, str(tmp_path / "empty"))


def test_sources_are_weighted_and_limited_by_hash(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", lines(0, 100))
    put(tmp_path / "b.jsonl", lines(100, 1_100))
    put(tmp_path / "c.jsonl", lines(2_000, 2_010))
    entries = ({"path": "a.jsonl", "limit": 30}, {"path": "b.jsonl", "weight": 0.25}, {"path": "c.jsonl", "weight": 2})
    ledger = sources(tmp_path, *entries)
    first = questions(tmp_path)
    kept_a, kept_b = [q for q in first if len(q) < 4], [q for q in first if 100 <= int(q[1:]) < 1_100]
    assert len(kept_a) == 30 and kept_a == sorted(kept_a, key=lambda q: int(q[1:])) and kept_a != first[:0]
    assert 200 <= len(kept_b) <= 300
    assert [q for q in first if int(q[1:]) >= 2_000] == [f"q{i}" for i in range(2_000, 2_010) for _ in range(2)]
    assert ledger.read == ledger.written == len(first) and ledger.repeated == 10
    assert [(part["rows"], part["taken"]) for part in ledger.sources] == [(100, 30), (1_000, len(kept_b)), (10, 10)]
    ids = [json.loads(line)["id"] for line in (tmp_path / "data/processed/train.jsonl").read_bytes().splitlines()]
    assert len(set(ids)) == len(ids)
    sources(tmp_path, *entries)
    assert questions(tmp_path) == first
    sources(tmp_path, *entries, split=SplitSection(train=1, val=0, test=0, seed=7))
    assert questions(tmp_path) != first


def test_an_appended_row_does_not_change_the_weighted_choice(tmp_path: Path) -> None:
    put(tmp_path / "b.jsonl", lines(0, 400))
    sources(tmp_path, {"path": "b.jsonl", "weight": 0.5})
    before = questions(tmp_path)
    put(tmp_path / "b.jsonl", lines(0, 500))
    sources(tmp_path, {"path": "b.jsonl", "weight": 0.5})
    assert [q for q in questions(tmp_path) if int(q[1:]) < 400] == before


def test_only_training_rows_are_repeated(tmp_path: Path) -> None:
    put(tmp_path / "b.jsonl", lines(0, 200))
    ledger = sources(tmp_path, {"path": "b.jsonl", "weight": 3}, split=SplitSection())
    train, val = questions(tmp_path), questions(tmp_path, "val")
    assert len(train) == 3 * len(set(train)) and len(val) == len(set(val)) > 0
    assert ledger.balanced() and ledger.read == 200 + 2 * len(set(train))


def test_raw_path_and_sources_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="raw_path and sources are both"):
        DataSection(raw_path="a.jsonl", sources=[SourceSection(path="b.jsonl")])
    with pytest.raises(ValidationError):
        SourceSection(path="a.jsonl", weight=0)


def test_a_folder_names_every_file_that_is_not_rows(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for name, text in {
        "a.jsonl": "%PDF-1.7",
        "b.csv": "just a sentence\nand another\n",
        "c.jsonl": '{"q": 1}\n',
    }.items():
        (tmp_path / "raw" / name).write_text(text)
    with pytest.raises(DataError, match=r"2 of the 3 files cannot be read:\n.*a\.jsonl: .*PDF.*\n.*b\.csv: not data"):
        find_sources(DataSection(), tmp_path, str(tmp_path / "raw"))
