"""Styles over rows of every shape, the strict reader, and which files a stage means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.config.schema import DataSection
from sft.data import store, style
from sft.data.process import process
from sft.errors import DataError


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return path


def make_processed(root: Path, count: int = 40, word: str = "q") -> None:
    process(
        DataSection(),
        root,
        str(write(root / "raw.jsonl", *({"question": f"{word}{i}", "answer": "a"} for i in range(count)))),
    )


@pytest.mark.parametrize(
    "mode, none, some",
    [("replace", "S", "S"), ("prepend", "S", "S\n\nold"), ("append", "S", "old\n\nS"), ("fill", "S", "old")],
)
def test_modes_on_short_rows_and_on_messages(mode: str, none: str, some: str) -> None:
    for system, expected in (("", none), ("old", some)):
        short = {"id": "1", "origin": "o", "system": system, "user": "u", "assistant": "a", "tags": 1}
        styled_row = style.apply_style(short, "S", mode)
        assert styled_row == {**short, "system": expected} and list(styled_row) == list(short)
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        head = [{"role": "system", "content": system}] if system else []
        row = {"id": "1", "messages": head + turns, "tools": [{}]}
        assert style.apply_style(row, "S", mode) == {
            **row,
            "messages": [{"role": "system", "content": expected}, *turns],
        }


def test_presets_expand_to_texts_and_misspelt_ones_are_errors() -> None:
    assert style.style_text("concise") == style.PRESETS["concise"]
    assert set(style.PRESETS) == {"concise", "json", "step-by-step", "structured"}
    assert style.style_text("Be brief.") == "Be brief."
    for wrong in ("concize", "step by step", "funny", ""):
        with pytest.raises(DataError) as caught:
            style.style_text(wrong)
        assert "presets: concise, json, step-by-step, structured" in str(caught.value.fix)


def test_styled_rows_are_used_until_their_source_changes(tmp_path: Path) -> None:
    data = DataSection()
    make_processed(tmp_path)
    assert store.resolve_stage(data, tmp_path).name == "processed"
    counts = style.style_folder(data, tmp_path, "S", "replace")
    stage = store.resolve_stage(data, tmp_path)
    assert (stage.name, stage.train) == ("styled", tmp_path / "data/processed_with_style/train.jsonl")
    assert {row["system"] for row in store.read_rows(stage.train)} == {"S"}
    plain = store.read_rows(tmp_path / "data/processed/train.jsonl")
    assert [row["id"] for row in store.read_rows(stage.train)] == [row["id"] for row in plain]
    assert counts == {
        "train": len(plain),
        "val": len(store.read_rows(stage.val or "")),
        "test": len(store.read_rows(stage.test or "")),
    }
    make_processed(tmp_path, word="other")
    for name in ("auto", "styled"):
        with pytest.raises(
            DataError, match=r"stale: train\.jsonl was styled before the processed rows changed"
        ) as caught:
            store.resolve_stage(DataSection(stage=name), tmp_path)
        assert "make style" in str(caught.value.fix) and "--set data.stage=processed" in str(caught.value.fix)
    assert store.resolve_stage(DataSection(stage="processed"), tmp_path).name == "processed"
    style.style_folder(data, tmp_path, "S", "replace")
    assert store.resolve_stage(data, tmp_path).name == "styled"


def test_a_styled_folder_that_is_incomplete_or_has_no_source_record_is_stale(tmp_path: Path) -> None:
    make_processed(tmp_path)
    processed, styled = tmp_path / "data/processed", tmp_path / "data/processed_with_style"
    style.style_file(processed / "train.jsonl", styled / "train.jsonl", "S", "fill")
    with pytest.raises(DataError, match=r"stale: val\.jsonl"):
        store.resolve_stage(DataSection(), tmp_path)
    for name in ("val", "test"):
        style.style_file(processed / f"{name}.jsonl", styled / f"{name}.jsonl", "S", "fill")
    assert store.resolve_stage(DataSection(), tmp_path).name == "styled"
    (styled / "source.json").write_text("{broken")
    with pytest.raises(DataError, match="stale: train"):
        store.resolve_stage(DataSection(), tmp_path)


def test_rendered_rows_are_used_only_by_name_and_are_not_styled(tmp_path: Path) -> None:
    make_processed(tmp_path)
    rendered = write(tmp_path / "data/rendered/train.jsonl", {"input": "i", "target": "t"})
    assert store.resolve_stage(DataSection(), tmp_path).name == "processed"
    stage = store.resolve_stage(DataSection(stage="rendered"), tmp_path)
    assert (stage.train, stage.val, stage.test) == (rendered, None, None)
    with pytest.raises(DataError, match="rendered rows have no system text"):
        style.style_file(rendered, tmp_path / "out.jsonl", "S", "fill")
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_stages_name_the_command(tmp_path: Path) -> None:
    for name, command in {"auto": "make process", "styled": "make style", "rendered": "make render"}.items():
        with pytest.raises(DataError) as caught:
            store.resolve_stage(DataSection(stage=name), tmp_path)
        assert str(caught.value.fix).startswith(command)
    with pytest.raises(DataError, match="no processed rows"):
        style.style_folder(DataSection(), tmp_path, "S", "fill")


def test_train_path_wins_and_the_files_beside_it_are_used(tmp_path: Path) -> None:
    make_processed(tmp_path)
    row = {"user": "u", "assistant": "a"}
    train, val = write(tmp_path / "mine/train.jsonl", row), write(tmp_path / "mine/val.jsonl", row)
    stage = store.resolve_stage(DataSection(train_path="mine/train.jsonl"), tmp_path)
    assert (stage.name, stage.train, stage.val, stage.test) == ("given", train, val, None)
    other = store.resolve_stage(DataSection(train_path=str(train), test_path="mine/val.jsonl"), tmp_path)
    assert other.test == val
    assert store.resolve_stage(DataSection(val_path="mine/val.jsonl"), tmp_path).val == val
    for key in ("train_path", "val_path"):
        paths = {"train_path": str(train), key: "gone.jsonl"}
        with pytest.raises(DataError, match=f"data.{key} does not exist"):
            store.resolve_stage(DataSection(**paths), tmp_path)


@pytest.mark.parametrize("key", ["val_path", "test_path"])
def test_a_mistyped_val_or_test_path_is_an_error(tmp_path: Path, key: str) -> None:
    make_processed(tmp_path)
    with pytest.raises(DataError, match=f"data.{key} does not exist") as caught:
        store.resolve_stage(DataSection(**{key: "vall.jsonl"}), tmp_path)
    assert caught.value.where == str(tmp_path / "vall.jsonl")


def test_stored_rows_of_three_shapes_have_ids_and_origins(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path = write(
        tmp_path / "a.jsonl",
        {"id": "mine", "origin": "x:7", "system": None, "user": "u\u2028v", "assistant": "a"},
        {"messages": turns, "note": 1},
        {"input": "i", "target": "t"},
    )
    rows = store.read_rows(path)
    assert rows[0]["id"] == "mine" and all(len(row["id"]) == 16 for row in rows[1:])
    assert [row["origin"] for row in rows] == ["x:7", "a.jsonl:2", "a.jsonl:3"]
    assert rows[1]["note"] == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "broken JSON"),
        ('{"user": "u", "assistant": NaN}', "NaN"),
        ('{"user": "u", "user": "v", "assistant": "a"}', "given twice"),
        ('{"user": "u", "assistant": "\\udc00"}', "surrogate"),
        ('{"question": "q", "answer": "a"}', "not a processed row"),
        ('{"user": "u"}', "not a processed row"),
        ('{"user": "u", "assistant": 3}', "assistant is not text"),
        ('{"messages": []}', "messages is not a list of turns"),
        ('{"messages": [{"content": "u"}]}', "messages is not a list of turns"),
        ("7", "not a processed row"),
    ],
)
def test_the_reader_stops_at_the_first_bad_line_and_names_it(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"user": "u", "assistant": "a"}, line)
    with pytest.raises(DataError, match=message) as caught:
        store.read_rows(path)
    assert caught.value.where == f"{path}:2" and "make process" in str(caught.value.fix)


def test_the_reader_names_what_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file") as caught:
        store.read_rows(tmp_path / "gone.jsonl")
    assert "make process" in str(caught.value.fix)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="empty"):
        store.read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "a.csv").write_text("user,assistant\nu,a\n")
    with pytest.raises(DataError, match="not a file of JSON lines"):
        store.read_rows(tmp_path / "a.csv")


def test_style_never_writes_over_its_own_source(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"user": "u", "assistant": "a"})
    with pytest.raises(DataError, match="the same file"):
        style.style_file(path, path, "S", "fill")
    with pytest.raises(DataError, match="one folder"):
        make_processed(tmp_path)
        style.style_folder(DataSection(styled_dir="data/processed"), tmp_path, "S", "fill")
