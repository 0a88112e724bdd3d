"""What the quick start decides, without running it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft import guide
from sft.errors import DataError


def project(root: Path) -> Path:
    sample = root / guide.SAMPLE
    sample.parent.mkdir(parents=True)
    sample.write_text('{"user": "a", "assistant": "b"}\n')
    return root


def test_without_a_gpu_or_a_hub_the_demo_model_is_the_only_offer() -> None:
    assert [c.name for c in guide.choices(None, 0.0, False, [])] == [guide.DEMO]
    offline = guide.choices("RTX 4060", 8.0, False, ["Qwen/Qwen2.5-3B-Instruct"])
    assert [c.name for c in offline] == [guide.DEMO]
    assert "cannot be reached" in offline[0].reason


def test_with_a_gpu_the_first_that_fits_is_the_default_and_the_demo_the_last() -> None:
    offers = guide.choices("RTX 4060", 8.0, True, ["Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"])
    assert [c.name for c in offers] == ["Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", guide.DEMO]
    assert offers[0].reason == "fits RTX 4060 (8 GiB) in 4-bit"


def test_an_empty_raw_folder_gets_the_samples_and_it_is_said(tmp_path: Path) -> None:
    raw, word = guide.raw_data(project(tmp_path))
    assert raw == tmp_path / "data" / "raw" / "raw.jsonl"
    assert raw.read_text() == (tmp_path / guide.SAMPLE).read_text()
    assert "was empty" in word


def test_the_users_own_file_is_taken_and_never_overwritten(tmp_path: Path) -> None:
    own = project(tmp_path) / "data" / "raw" / "mine.csv"
    own.parent.mkdir(parents=True)
    own.write_text("question,answer\na,b\n")
    assert guide.raw_data(tmp_path) == (own, "yours")
    assert own.read_text() == "question,answer\na,b\n"
    assert sorted(path.name for path in own.parent.iterdir()) == ["mine.csv"]


@pytest.mark.parametrize(
    "name", ["mine.ndjson", "rows.jsonl.gz", "rows.csv.zst", "MINE.JSONL", "Raw.Json", "mine.parquet", "rows.gz"]
)
def test_a_file_that_the_readers_know_is_used_and_not_the_sample(tmp_path: Path, name: str) -> None:
    own = project(tmp_path) / "data" / "raw" / name
    own.parent.mkdir(parents=True)
    own.write_text("the quick start does not look inside")
    assert guide.raw_data(tmp_path) == (own, "yours")
    assert [path.name for path in own.parent.iterdir()] == [name]


def test_of_several_files_the_one_called_raw_is_used(tmp_path: Path) -> None:
    folder = project(tmp_path) / "data" / "raw"
    folder.mkdir(parents=True)
    for name in ("raw.csv", "RAW.jsonl.gz", "other.jsonl"):
        (folder / name).write_text("x")
    assert guide.raw_data(tmp_path) == (folder / "RAW.jsonl.gz", "yours")


def test_several_files_are_not_guessed_between(tmp_path: Path) -> None:
    folder = project(tmp_path) / "data" / "raw"
    folder.mkdir(parents=True)
    for name in ("a.json", "b.json"):
        (folder / name).write_text("[]")
    with pytest.raises(DataError, match=r"several files: a\.json, b\.json"):
        guide.raw_data(tmp_path)


def test_the_choice_is_written_down_and_an_edited_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    raw = tmp_path / "data" / "raw" / "raw.jsonl"
    demo = guide.Choice(guide.DEMO, "as asked")
    assert guide.write_local(tmp_path, demo, raw) is None
    local = tmp_path / guide.LOCAL
    assert "include: configs/demo_cpu.yaml" in local.read_text()
    assert "raw_path: data/raw/raw.jsonl" in local.read_text()
    assert guide.write_local(tmp_path, demo, raw) is None, "the same choice again keeps no copy"
    local.write_text(local.read_text() + "  seed: 7\n")
    kept = guide.write_local(tmp_path, demo, raw)
    assert kept is not None and kept.read_text().endswith("  seed: 7\n")
