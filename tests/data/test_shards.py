"""What a path, a hub data set or a URL of the config names: found, cached, and refused with a reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest

from sft.config.schema import DataSection
from sft.data import shards, sources, store
from sft.errors import DataError, EnvironmentProblem

LINE = '{"user": "Who are you?", "assistant": "Ann."}\n'


def put(path: Path, text: str = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def stage(root: Path, **data: Any) -> store.Stage:
    return store.resolve_stage(DataSection(**data), root)


def test_a_folder_of_splits_has_its_training_and_held_out_rows(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        put(tmp_path / "set" / name / "rows.jsonl")
    expected = tuple(tmp_path / "set" / name for name in ("train", "validation", "test"))
    for path in ("set", "set/train"):  # as `DatasetDict.save_to_disk` writes it
        found = stage(tmp_path, train_path=path)
        assert (found.train, found.val, found.test) == expected


def test_files_of_several_splits_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    put(tmp_path / "set/train-00000-of-00001.jsonl")
    put(tmp_path / "set/test-00000-of-00001.jsonl")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        store.read_rows(stage(tmp_path, train_path="set").train)
    put(tmp_path / "processed/train.jsonl")
    put(tmp_path / "processed/quarantine.jsonl")
    with pytest.raises(DataError, match=r"several splits \(others, train\)"):
        store.read_rows(tmp_path / "processed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no rows"):
        store.read_rows(tmp_path / "empty")


def test_a_url_is_copied_once_and_a_file_url_never(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe(
        {"/bucket/train.jsonl": LINE.encode(), "/bucket/many/a.jsonl": LINE.encode() * 2, "/bucket/many/x": b""}
    )
    one = stage(tmp_path, train_path="memory://bucket/train.jsonl", val_path="memory://bucket/many")
    assert one.train.name == "train.jsonl" and len(store.read_rows(one.train)) == 1
    assert one.val is not None and len(store.read_rows(one.val)) == 2
    raw = sources.open_part("memory://bucket/many", Path("unused"), tmp_path, DataSection())
    assert [row.value["user"] for row in raw.rows_of_all()] == ["Who are you?"] * 2  # make process RAW=
    memory.rm("/bucket", recursive=True)
    with caplog.at_level(logging.INFO, "sft"):
        assert stage(tmp_path, train_path="memory://bucket/train.jsonl").train == one.train
    assert "memory://bucket/train.jsonl: the copy of 20" in caplog.text
    here = put(tmp_path / "here.jsonl")
    assert stage(tmp_path, train_path=f"file://{here}").train == here
    with pytest.raises(DataError, match="the URL cannot be opened") as raised:
        stage(tmp_path, train_path="memory://user:secret@bucket/gone.jsonl")
    assert "secret" not in str(raised.value)
    with pytest.raises((DataError, EnvironmentProblem)) as unknown:
        stage(tmp_path, train_path="nothing://bucket/rows.jsonl")
    assert "nothing" in str(unknown.value)


def test_a_hub_data_set_is_read_where_the_library_caches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    source = put(tmp_path / "rows.jsonl", LINE * 5)
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:  # the hub itself cannot be reached here
        asked.append((name, config, split))
        place, part = str(tmp_path / "hub"), split.replace("validation", "train")
        return load("json", data_files=str(source), split=part, cache_dir=place)

    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, rows in (("owner/name", 5), ("owner/name:train[:2]", 2)):
        found = stage(tmp_path, train_path=name, val_path="owner/name")
        read = store.read_rows(found.train)
        assert len(read) == rows and read[0]["user"] == "Who are you?"
    assert asked[:3] == [
        ("owner/name", None, "train"),
        ("owner/name", None, "validation"),
        ("owner/name", None, "train[:2]"),
    ]
    links = [path for path in (tmp_path / shards.FOLDER).rglob("*.arrow") if path.is_symlink()]
    assert links and all(tmp_path / "hub" in path.resolve().parents for path in links)  # not copied
