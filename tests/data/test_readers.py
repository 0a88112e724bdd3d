"""Files of every kind, whole and broken: their rows, origins and faults."""

from __future__ import annotations

import bz2
import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import openpyxl  # type: ignore[import-untyped,unused-ignore]
import pytest

from sft.config.schema import DataSection
from sft.data import sources
from sft.data.readers import Source, open_source
from sft.errors import DataError


def read(path: Path, **data: Any) -> list[Any]:
    return list(open_source(path, path.parent, str(path), DataSection(**data)).rows())


def values(path: Path) -> list[Any]:
    return [raw.value for raw in read(path)]


def put(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def test_json_lines_carry_their_line_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"a": 1}\r\n\n{"a": 2}')
    assert [(raw.origin, raw.value) for raw in read(path)] == [("a.jsonl:1", {"a": 1}), ("a.jsonl:3", {"a": 2})]


def test_lines_end_at_the_newline_only(tmp_path: Path) -> None:
    strange = "a\u2028b\u2029c\x85d\x0ce"
    escaped = json.dumps({"q": strange}, ensure_ascii=False).replace("\\f", "\f").replace("\f", "\\f")
    path = put(tmp_path / "a.jsonl", escaped + "\n" + '{"q": 2}\n')
    assert values(path) == [{"q": strange}, {"q": 2}]
    assert [raw.origin for raw in read(path)] == ["a.jsonl:1", "a.jsonl:2"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"a": 1', "broken JSON"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"\\uDEAD": 1}', "half a surrogate pair"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested deeper than 128 levels"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested deeper than 128 levels"),
        ('{"a": ' + "7" * 5_000 + "}", "an integer of more than 4,300 digits"),
        ('{"a": 1} {"b": 2}', "broken JSON"),
        ('{"a": "tab\there"}', "broken JSON"),
    ],
)
def test_a_faulty_line_is_one_faulty_row_and_its_neighbours_are_read(tmp_path: Path, line: str, message: str) -> None:
    for name, text in {
        "lines.jsonl": f'{{"ok": 1}}\n{line}\n{{"ok": 2}}\n',
        "array.json": f'[{{"ok": 1}},\n{line},\n{{"ok": 2}}]',
    }.items():
        if name == "array.json" and (message == "broken JSON" or len(line) > 100_000):
            with pytest.raises(DataError, match=r"broken JSON"):  # the next row could begin anywhere
                read(put(tmp_path / name, text))
            continue
        first, bad, last = read(put(tmp_path / name, text))
        assert (first.value, last.value) == ({"ok": 1}, {"ok": 2})
        assert bad.origin == f"{name}:2" and bad.value is None and message in str(bad.fault)
        assert bad.text


def test_a_surrogate_pair_and_a_big_but_possible_integer_are_fine(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude00", "n": ' + "9" * 40 + "}\n")
    assert values(path) == [{"a": "\U0001f600", "n": int("9" * 40)}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "wrapped", ["%s", '{"data": %s}', '{"version": "1", "note": [1, {"x": 2}], "data": %s, "n": 3}']
)
def test_json_arrays_and_objects_around_them(tmp_path: Path, indent: int | None, wrapped: str) -> None:
    rows = [{"q": f'{{["{i}\\', "a": [i, {"b": None}]} for i in range(50)]
    path = put(tmp_path / "a.json", wrapped % json.dumps(rows, indent=indent))
    assert values(path) == rows


def test_origins_in_arrays_are_lines_where_rows_begin_on_their_own_else_indexes(tmp_path: Path) -> None:
    own = put(tmp_path / "own.json", json.dumps([{"a": 1}, {"a": 2}], indent=1))
    assert [raw.origin for raw in read(own)] == ["own.json:2", "own.json:5"]
    one = put(tmp_path / "one.json", json.dumps([{"a": 1}, {"a": 2}]))
    assert [raw.origin for raw in read(one)] == ["one.json[0]", "one.json[1]"]


def test_rows_longer_than_a_block_are_read_across_blocks(tmp_path: Path) -> None:
    rows = [{"i": i, "text": 'é\\"]}' * size} for i, size in enumerate([1, 400_000, 3, 900_000, 5])]
    path = put(tmp_path / "a.json", json.dumps({"data": rows}, ensure_ascii=False))
    assert values(path) == rows
    lines = put(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert values(lines) == rows


@pytest.mark.parametrize(
    "table",
    [
        {"q": ["a", "b"], "n": [1, None]},
        {"q": {"0": "a", "1": "b"}, "n": {"0": 1, "1": None}},
        {"0": {"q": "a", "n": 1}, "1": {"q": "b", "n": None}},
    ],
)
def test_tables_as_pandas_writes_them_are_rows(tmp_path: Path, table: Any) -> None:
    path = put(tmp_path / "a.json", json.dumps(table))
    assert values(path) == [{"q": "a", "n": 1}, {"q": "b", "n": None}]
    for row in ({"q": ["a"], "n": "x"}, {"turns": [{"q": 1}], "n": [2]}, {"q": {"x": 1}, "n": {"y": 2}}):
        assert values(put(tmp_path / "b.json", json.dumps(row, indent=1))) == [row]


def test_pretty_printed_objects_one_after_the_other_are_rows(tmp_path: Path) -> None:
    rows = [{"q": 1, "messages": [{"role": "user"}]}, {"q": 2}]
    path = put(tmp_path / "a.jsonl", "\n".join(json.dumps(row, indent=2) for row in rows))
    assert values(path) == rows


@pytest.mark.parametrize(
    "text, problems",
    [
        ('[{"a": 1},\n{"a": 2}', {2: "the list is not closed"}),
        ('[{"a": 1}\n{"a": 2}]', {2: "a comma is missing before this row"}),
        ('[\n{"a": 1},\n{"a": "x', {3: "a text is not closed"}),
        ('{"data": [{"a": 1}]', {1: "a comma or a closing bracket is missing"}),
        ('[\n{"a": [1, 2,]},\n{"a": 2}\n]', {2: "a comma too many before ]"}),
        ("[{'a': 1}]", {1: "a key in double quotes is missing"}),
        (
            '[\n {\n  "a": 1,\n },\n {\n  "a": 2\n }\n {\n  "a": "he said "hi""\n },\n {\n  "a": 4\n }\n',
            {4: "a comma too many before }", 8: "a comma is missing", 9: "a quote inside a text", 14: "not closed"},
        ),
    ],
)
def test_broken_json_names_the_line_of_every_problem(tmp_path: Path, text: str, problems: dict[int, str]) -> None:
    path = put(tmp_path / "a.json", text)
    with pytest.raises(DataError, match="broken JSON") as caught:
        read(path)
    assert caught.value.where == f"{path}:{min(problems)}"
    shown = caught.value.what.split("\n")
    expected = list(problems.values()) if len(problems) == 1 else [f"line {line}: " for line in problems]
    assert all(want in line for want, line in zip(expected, shown[len(problems) > 1 :], strict=True))
    assert all(problem in caught.value.what for problem in problems.values())


def test_a_comma_behind_the_last_row_is_accepted(tmp_path: Path) -> None:
    assert values(put(tmp_path / "a.json", '[{"a": 1},\n{"a": 2},\n]')) == [{"a": 1}, {"a": 2}]


def test_a_text_of_question_and_answer_lines_has_a_row_for_each_question(tmp_path: Path) -> None:
    text = "Q: Who?\nA: Ann, of course.\nAnd Bob.\n\nQ: Why,\nin short?\nA: Because.\nQ: No answer\nQ: x\nA: y\nA: z\n"
    rows = read(put(tmp_path / "faq.txt", text))
    assert [raw.value for raw in rows] == [
        {"question": "Who?", "answer": "Ann, of course.\nAnd Bob."},
        {"question": "Why,\nin short?", "answer": "Because."},
        None,
        None,
    ]
    assert [raw.origin for raw in rows] == ["faq.txt:1", "faq.txt:5", "faq.txt:8", "faq.txt:9"]
    assert "0 answers" in str(rows[2].fault) and "2 answers" in str(rows[3].fault)
    title = "Our FAQ\n\nq : Who?\na : a: Ann.\n"
    for text in ("Question: Who?\nAnswer: a: Ann.\n", title, "1. Q: Who?\n1. A: a: Ann.\n"):
        assert values(put(tmp_path / "more.txt", text)) == [{"question": "Who?", "answer": "a: Ann."}]


def test_excel_files_are_read_sheet_by_sheet(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    for line in (("Question", "Answer"), (None, None), ("1 + 1?", 2), ("When?", date(2026, 1, 2)), ("a", "b", "c")):
        book.active.append(line)
    book.save(tmp_path / "a.xlsx")
    rows = read(tmp_path / "a.xlsx")
    assert [(raw.origin, raw.value) for raw in rows] == [
        ("a.xlsx:3", {"Question": "1 + 1?", "Answer": 2}),
        ("a.xlsx:4", {"Question": "When?", "Answer": "2026-01-02T00:00:00"}),
        ("a.xlsx:5", None),
    ]
    assert str(rows[-1].fault).startswith("more cells than the header has")
    book.create_sheet("more").append(("Question", "Answer"))
    book["more"].append(("Who?", "Ann"))
    book.save(tmp_path / "a.xlsx")
    assert read(tmp_path / "a.xlsx")[-1].origin == "a.xlsx[more]:2"


def test_a_table_of_one_column_is_recognised(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", 'text\n"Q: one\nA: two"\nthree\n')
    assert values(path) == [{"text": "Q: one\nA: two"}, {"text": "three"}]


@pytest.mark.parametrize("cell", ["x" * 300_000, "line\n" * 60, "x" * 300_000 + "\n,y"])
def test_cells_may_be_larger_than_the_head_used_for_detection(tmp_path: Path, cell: str) -> None:
    path = put(tmp_path / "a.csv", f'question,answer\n"{cell}",yes\nq,a\n')
    assert values(path) == [{"question": cell, "answer": "yes"}, {"question": "q", "answer": "a"}]


@pytest.mark.parametrize("first, second", [("train", "val"), ("test", "train")])
def test_a_second_split_in_one_file_is_refused_and_not_lost(tmp_path: Path, first: str, second: str) -> None:
    path = put(tmp_path / "a.json", json.dumps({first: [{"a": 1}], second: [{"a": 2}], "columns": [{"name": "a"}]}))
    with pytest.raises(DataError, match="more than one list of rows"):
        values(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "cp1252"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_encodings_are_recognised(tmp_path: Path, encoding: str, kind: str) -> None:
    rows = [
        {"question": f"Wie heißt das Café Nr. {i}?", "answer": "„Zur schönen Aussicht“ – sehr hübsch"} for i in range(9)
    ]
    text = {
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "json": json.dumps(rows, ensure_ascii=False, indent=1),
        "csv": "question,answer\r\n" + "".join(f"{row['question']},{row['answer']}\r\n" for row in rows),
    }[kind]
    path = put(tmp_path / f"a.{kind}", text, encoding)
    source = open_source(path, tmp_path)
    assert [raw.value for raw in source.rows()] == rows
    assert bool(source.warnings) == (encoding != "utf-8-sig")


def test_a_few_bytes_that_are_not_utf8_cost_their_rows_only(tmp_path: Path) -> None:
    good = '{"q": "Grüße aus Köln"}\n'.encode()
    path = put(tmp_path / "a.jsonl", good * 3 + b'{"q": "\xff\xfe\x81"}\n' + good)
    assert [raw.fault for raw in read(path)] == [None, None, None, "not UTF-8 at column 8", None]
    table = put(tmp_path / "a.csv", "q,a\nKöln,ja\n".encode() * 1 + b"x,\xff\n" + "schön,ß\n".encode())
    assert [raw.fault for raw in read(table)] == [None, "not UTF-8 at column 3", None]


def test_csv_cells_of_any_size_with_newlines_quotes_and_unicode(tmp_path: Path) -> None:
    big = 'x"' * 200_000 + "\nüber\u2028zwei Zeilen"
    text = 'q,a\r\n"' + big.replace('"', '""') + '",ok\r\nnext,"a, b"\r\n'
    path = put(tmp_path / "a.csv", text)
    assert [(raw.origin, raw.value) for raw in read(path)] == [
        ("a.csv:2", {"q": big, "a": "ok"}),
        ("a.csv:4", {"q": "next", "a": "a, b"}),
    ]


def test_bad_csv_quoting_costs_its_own_row(tmp_path: Path) -> None:
    lines = [
        "q,a",
        "one,1",
        'two,"never closed',
        "three,3",
        '"four" x,4',
        'five,"5\n5"',
        "six",
        "seven,7,7",
        'eight,"8"',
    ]
    rows = read(put(tmp_path / "a.csv", "\n".join(lines) + "\n"))
    assert [raw.value["a"] for raw in rows if raw.value] == ["1", "3", "5\n5", "8"]
    assert [(raw.origin, raw.text) for raw in rows if raw.fault] == [
        ("a.csv:3", 'two,"never closed'),
        ("a.csv:5", '"four" x,4'),
        ("a.csv:8", "six"),
        ("a.csv:9", "seven,7,7"),
    ]


@pytest.mark.parametrize("delimiter", ["\t", ";", "|"])
def test_other_delimiters_are_found(tmp_path: Path, delimiter: str) -> None:
    path = put(tmp_path / "a.tsv", f"q{delimiter}a\nHello, you{delimiter}Hi, me\n")
    assert values(path) == [{"q": "Hello, you", "a": "Hi, me"}]


def test_the_line_that_excel_writes_above_a_table_names_its_delimiter(tmp_path: Path) -> None:
    rows = read(put(tmp_path / "a.csv", "\ufeffsep=;\r\nq;a\r\nHello, you;Hi\r\n"))
    assert [(raw.origin, raw.value) for raw in rows] == [("a.csv:3", {"q": "Hello, you", "a": "Hi"})]


def test_tables_split_into_columns_and_rows_and_rows_of_the_hub_s_viewer(tmp_path: Path) -> None:
    split = {"columns": ["q", "a"], "index": [0, 1], "data": [["x", "y"], ["z", None]]}
    assert values(put(tmp_path / "a.json", json.dumps(split))) == [{"q": "x", "a": "y"}, {"q": "z", "a": None}]
    viewer = {"features": [], "rows": [{"row_idx": 0, "row": {"q": "x"}, "truncated_cells": []}]}
    assert values(put(tmp_path / "b.json", json.dumps(viewer))) == [{"q": "x"}]


def test_a_line_that_is_a_list_of_turns_is_a_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert values(put(tmp_path / "a.jsonl", json.dumps(turns) + "\n" + json.dumps(turns))) == [{"messages": turns}] * 2


def test_a_comment_in_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a comment: JSON has none"):
        read(put(tmp_path / "a.json", '[\n// mine\n{"q": 1}\n]'))


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two columns are called 'q'"):
        read(put(tmp_path / "a.csv", "q,q\n1,2\n"))


def test_parquet_rows_and_a_broken_parquet_file(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"q": f"question {i}", "a": i} for i in range(1_500)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    assert values(path) == rows
    assert read(path)[1_400].origin == "a.parquet[1400]"
    broken = put(tmp_path / "b.parquet", path.read_bytes()[:-30])
    with pytest.raises(DataError, match="the Parquet file is broken"):
        read(broken)


def test_arrow_rows_of_either_form_and_a_broken_file(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = [{"q": f"question {i}", "a": i} for i in range(1_500)]
    table, path = pa.Table.from_pylist(rows), tmp_path / "a.arrow"
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as out:
            out.write_table(table)
        assert values(path) == rows and read(path)[1_400].origin == "a.arrow[1400]"
    broken = put(tmp_path / "b.arrow", path.read_bytes()[:900])
    with pytest.raises(DataError, match="the Arrow file is broken"):
        read(broken)


def test_gzip_is_decompressed_while_reading(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1_000))
    assert values(path) == [{"a": 1}] * 1_000
    with pytest.raises(DataError, match="gzip"):
        read(put(tmp_path / "b.jsonl.gz", path.read_bytes()[:-20]))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.parquet", b"\x89PNG\r\n\x1a\n" + bytes(100), "the file is a PNG picture"),
        ("a.pdf", b"%PDF-1.7\n", "the file is a PDF document"),
        ("README.md", b"# Data\n\nRows, columns, files.\n", "not data: a README or notes; it begins '# Data'"),
        ("README", b"Rows, columns\nmore, and more\n", "not data: a README"),
        ("run.log", b"2026-01-01 10:00:00,123 INFO start\n2026-01-01 10:00:01,456 INFO end\n", "not data: a log"),
        ("out.txt", b"2026-01-01 10:00:00,123 INFO start\n2026-01-01 10:00:01,456 INFO end\n", "not data: neither"),
        ("a.py", b"import os, sys\nprint(1, 2)\n", "not data: program code"),
        ("chat.txt", b"[01.02.26, 10:00:00] Ann: hi\n[01.02.26, 10:00:09] Bob: yo\n", "not data: neither"),
        ("letter.txt", b"Dear Ann, I write, as you said,\nto tell you.\nYours, Bob\n", "not data: neither"),
        ("a.json", b"<!DOCTYPE html><html></html>", "a web page"),
        ("a.csv", b"PK\x03\x04" + bytes(50), "a zip archive"),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "a Git LFS pointer(.|\n)*fix: +git lfs pull",
        ),
        ("a.jsonl.bz2", bz2.compress(b"{}"), "compressed with bzip2(.|\n)*bunzip2 --keep .*a.jsonl.bz2"),
        ("a.tar", bytes(257) + b"ustar" + bytes(200), "a tar archive"),
        ("a.sqlite", b"SQLite format 3\0" + bytes(90), "an SQLite data base"),
        ("a.json", b"", "the file is empty"),
        ("a.jsonl", b"\xef\xbb\xbf \n\n", "the file is empty"),
        ("a.json", bytes(range(256)) * 40, "binary"),
        ("a.csv", b"just a sentence\nand another\n", "neither JSON, nor a table"),
        ("a.json", b"42", "neither JSON, nor a table"),
        ("a.csv", b"question,answer\rq,a\r", "the header cannot be read"),
        ("a.csv", b'question,answer\nq,"a\0b"\nr,s\n', "binary"),
    ],
)
def test_files_without_rows_are_refused_by_kind(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(put(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.parquet", "a.txt"])
def test_the_content_decides_and_a_wrong_name_is_a_warning(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, '{"q": 1}\n{"q": 2}\n')
    source = open_source(path, tmp_path)
    assert [raw.value for raw in source.rows()] == [{"q": 1}, {"q": 2}]
    assert source.warnings == (
        () if name == "a.txt" else (f"{name} is JSON lines despite its name, and is read as such",)
    )


def test_the_first_line_may_be_broken_and_the_file_is_still_json_lines(tmp_path: Path) -> None:
    for broken in ("oops", '{"q": ', "[1, 2]", '"text"'):
        rows = read(put(tmp_path / "a.jsonl", broken + '\n{"q": 1}\n{"q": 2}\n'))
        assert [raw.value for raw in rows][1:] == [{"q": 1}, {"q": 2}]


def test_the_order_in_which_raw_rows_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no raw data"):
        sources.find_sources(DataSection(), tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    put(tmp_path / "data/raw/raw.json", '[{"q": "json"}]')
    assert sources.find_sources(DataSection(), tmp_path)[0].name == "data/raw/raw.json"
    put(tmp_path / "data/raw/raw.jsonl", '{"q": "jsonl"}\n')
    assert sources.find_sources(DataSection(), tmp_path)[0].name == "data/raw/raw.jsonl"
    put(tmp_path / "mine.csv", "q,a\n1,2\n")
    assert sources.find_sources(DataSection(raw_path="mine.csv"), tmp_path)[0].sources[0].path == tmp_path / "mine.csv"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    put(tmp_path / "here/own.jsonl", '{"q": 1}\n')
    assert sources.find_sources(DataSection(raw_path="mine.csv"), tmp_path, "own.jsonl")[0].name == "here/own.jsonl"


def test_a_name_that_is_not_a_file_is_a_hub_data_set_or_an_error(tmp_path: Path) -> None:
    source = open_source(Path("owner/name"), tmp_path, "owner/name", DataSection(hub_config="main", hub_split="test"))
    assert (source.kind, source.path) == ("hub data set, split test", None)
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        list(source.rows())
    assert "owner/name" in str(caught.value.where) and "--raw_path" in str(caught.value.fix)
    with pytest.raises(DataError, match="no such file"):
        open_source(Path("folder/gone.jsonl"), tmp_path, "folder/gone.jsonl", DataSection())


def test_hub_rows_come_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    put(tmp_path / "owner/name/train.jsonl", '{"q": "1"}\n{"q": "2"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))

    def hub(split: str) -> Source:
        return Source("owner/name", hub_split=split)

    assert [(raw.origin, raw.value) for raw in hub("train").rows()] == [
        ("owner/name[0]", {"q": "1"}),
        ("owner/name[1]", {"q": "2"}),
    ]
    with pytest.raises(DataError, match="cannot be"):
        list(hub("validation").rows())


def test_arrays_objects_and_wrapped_rows_are_read_with_their_faults(tmp_path: Path) -> None:
    rows: list[Any] = [{"a": 'é\\"[{', "n": [1, -2.5e3, None, True], "o": {"x": {}}}, {"a": 12}, {"b": "\U0001f600"}]
    bad = '{"a": 1, "a": 2}'
    pieces = [
        json.dumps(rows[0], indent=1),
        bad,
        json.dumps(rows[1], indent=3),
        json.dumps(rows[2], ensure_ascii=False),
    ]
    listed = "[" + " ,\n ".join(pieces) + "\n]\n"
    for text in ("\n" + listed, "\n".join(pieces)):
        raws = list(open_source(put(tmp_path / "a.json", text), tmp_path).rows())
        assert [raw.value for raw in raws] == [rows[0], None, rows[1], rows[2]]
        assert raws[1].text == bad and "given twice" in str(raws[1].fault)
    wrapped = f'{{"v": "1,2", "w": [{{}}], "data": [{", ".join(pieces[:1] + pieces[2:])}], "z": {{"data": []}} }}'
    raws = list(open_source(put(tmp_path / "a.json", wrapped), tmp_path).rows())
    assert [raw.value for raw in raws] == rows


def test_a_fault_inside_an_object_around_rows_is_a_fault_of_all(tmp_path: Path) -> None:
    (raw,) = read(put(tmp_path / "a.json", '{"data": [{"a": 1}, {"a": NaN}]}'))
    assert (raw.origin, raw.fault) == ("a.json:1", "NaN is not JSON")


def test_a_file_that_does_not_exist_gets_a_suggestion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/raw").mkdir(parents=True)
    put(tmp_path / "data/raw/mine.jsonl", "{}")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.jsonl", "data/raw/mein.jsonl"):
        with pytest.raises(DataError) as caught:
            open_source(Path(name), tmp_path)
        assert caught.value.fix == "did you mean data/raw/mine.jsonl?"
