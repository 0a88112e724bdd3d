"""Bytes and rows that nobody would write: the readers and formats answer with rows, faults or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from sft.config.schema import DataSection
from sft.data.process import Rejected, process
from sft.data.source import find
from sft.errors import DataError

NAMES = st.sampled_from(["a.json", "a.jsonl", "a.csv", "a.parquet", "a.txt", "a.jsonl.gz"])
PIECES = rb"""{"question": "q", "answer": "a"} @ [ @ ] @ { @ } @ , @ " @ \ @ \ud800 @ NaN @ "data": [ @ q,a @ x,"y @
PAR1 @ <html> @ null @ true @ 111111111111111111111111111111""".replace(b"\n", b" ").split(b" @ ")
ODD = [
    b"\n",
    b"\r\n",
    b" ",
    b"\t;|",
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x1f\x8b",
    "\u2028😀".encode(),
]
FILES = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(PIECES + ODD), max_size=30).map(b"".join))
WORDS = """question answer Answer prompt completion instruction input output messages tools conversations role content
from value system history id tags tool_calls type text weight target user assistant name function arguments reasoning"""
KEYS = st.sampled_from(WORDS.split())
TEXTS = st.one_of(
    st.text(max_size=5), st.sampled_from(["user", "gpt", "system", "tool", "function_call", "text", "[]", "{"])
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=15,
)
SHORT = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@seed(20261121)
@SHORT
@given(name=NAMES, content=FILES)
def test_any_bytes_give_rows_or_one_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    try:
        rows = list(find(DataSection(), tmp_path, str(path)).rows())
    except DataError as error:
        assert error.where
    else:
        assert all((raw.fault is None) or raw.text is not None for raw in rows)


@seed(20261121)
@SHORT
@given(rows=st.lists(st.dictionaries(KEYS, VALUES, max_size=5), min_size=1, max_size=6))
def test_any_rows_balance(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        ledger = process(DataSection(max_dropped=1), tmp_path, str(path))
    except Rejected as rejected:
        ledger = rejected.ledger
    assert ledger.read == len(rows) and ledger.balanced()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@seed(20261121)
@SHORT
@given(rows=st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=2, max_size=8))
def test_whatever_is_written_well_comes_back_exactly(tmp_path: Path, kind: str, rows: list[tuple[str, str]]) -> None:
    import csv

    clean = [tuple(text.encode("utf-8", "ignore").decode().replace("\0", "") + "!" for text in row) for row in rows]
    wanted = [{"question": question, "answer": answer} for question, answer in clean]
    path = tmp_path / f"a.{kind}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([("question", "answer"), *clean])
        elif kind == "json":
            json.dump(wanted, file, ensure_ascii=False)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in wanted)
    try:
        assert [raw.value for raw in find(DataSection(), tmp_path, str(path)).rows()] == wanted
    except DataError as error:  # texts of control characters only look like no text at all
        assert "binary" in str(error)
