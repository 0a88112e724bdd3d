"""Random bytes and rows, and the properties that must hold for them; for minutes at a time: make fuzz, or

    python -m tests.data.fuzz 300        seconds; prints each new seed, stops at the first that fails

`test_fuzz.py` runs the same checks briefly, on fixed seeds.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from sft.config.schema import DataSection, SplitSection
from sft.data.process import Rejected, process
from sft.data.readers import open_source
from sft.errors import DataError

NAMES = st.sampled_from(
    ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet", "a.txt", "a.jsonl.gz", "a.json.zst", "a", "README"]
)
PIECES = rb"""{"question": "q", "answer": "a"} @ [ @ ] @ { @ } @ , @ " @ \ @ \ud800 @ NaN @ "data": [ @ q,a @ x,"y @
PAR1 @ <html> @ null @ true @ 111111111111111111111111111111 @ question,answer @ "a ""b"" c" @ {"data": [ @ {"x": 1} @
-Infinity @ 1e999 @ {"a": 1, "a": 2} @ [[[[[[[[[[[[[[[[[[[[ @ \u0000 @ : @ {"text": "User: a
@ Q: a @ A: b @ Question: c @ }, @ ],""".replace(b"\n", b" ").split(b" @ ")
ODD = [
    b"\n", b"\r\n", b"\r", b" ", b"\t;|", b"\0", b"\xff", b"\xc3", b"\xe4hnlich", b"\xef\xbb\xbf", b"\xff\xfe",
    b"\xfe\xff", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", "\u2028\u0085😀".encode(), "ü".encode("utf-16-le"), b"\xed\xa0\x80",
]  # fmt: skip
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
FILES = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(PIECES + ODD), max_size=30).map(b"".join))
WORDS = """question answer Answer answers prompt completion instruction input output context response messages tools
conversations functions role content from value system history id tags tool_calls type text weight target user assistant
name function arguments reasoning references aliases human label rejected images choices message_id parent_id replies
rank role""".split()
MARKS = """<|im_start|>user <|im_start|>assistant <|im_end|> <s>[INST] [/INST] </s> <<SYS>> <</SYS>> USER: ASSISTANT:
User: Assistant: Q: A: <start_of_turn>user <start_of_turn>model <end_of_turn> <|user|> <|assistant|> <|end|> <|eot_id|>
<|start_header_id|>user<|end_header_id|> hello""".split()
CONVERSED = st.lists(st.sampled_from([*MARKS, "\n", " ", "### Instruction:", "### Response:"]), max_size=12).map(
    "".join
)
TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        ["user", "gpt", "system", "tool", "function_call", "text", "[]", "{", '{"name": "f"}', "[" * 2_000]
    ),
    CONVERSED,
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
KEYS = st.one_of(st.sampled_from(WORDS), st.text(max_size=3))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=15,
)
TURNS = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "tool_calls", "weight", "name"]), VALUES, max_size=4
    )
)
TREE = ["text", "role", "rank", "replies", "deleted"]
TREE_VALUES = st.one_of(st.none(), st.sampled_from(["a", "b", "prompter", "assistant"]), VALUES)
ROWS = st.lists(
    st.one_of(
        st.dictionaries(KEYS, VALUES, max_size=5),
        st.fixed_dictionaries({"messages": TURNS}),
        st.fixed_dictionaries({"prompt": st.dictionaries(st.sampled_from(TREE), VALUES)}),
        st.fixed_dictionaries(dict.fromkeys(("message_id", "parent_id", "role", "text"), TREE_VALUES)),
        st.fixed_dictionaries({"text": CONVERSED}),
    ),
    min_size=1,
    max_size=8,
)
OPTIONS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "near_duplicates": st.sampled_from(["report", "drop"]),
        "deduplicate": st.just(False),
        "system_prompt": st.just("Be brief."),
        "drop": st.lists(st.sampled_from(["control_characters", "boilerplate", "length_outliers", "script"])),
        "format": st.sampled_from(["messages", "sharegpt", "alpaca", "qa", "prompt", "text", "chat", "rendered"]),
        "split": st.builds(SplitSection, seed=st.integers(0, 9), group_by=st.sampled_from([None, "id", "text"])),
    },
)
BOUNDED = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def any_bytes_give_rows_or_one_error(folder: Path, name: str, content: bytes) -> None:
    """Rows or faults with their text, or one DataError that says where; and processing counts all of them."""
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") and len(content) % 2 else content)
    try:
        rows = list(open_source(path, folder).rows())
    except DataError as error:
        assert error.where
        return
    assert all((raw.fault is None) or raw.text is not None for raw in rows)
    _balances(DataSection(max_dropped=1), folder, path, len(rows))


def any_rows_balance(folder: Path, rows: list[dict[str, Any]], options: dict[str, Any], encoding: str) -> None:
    """Rows in = rows out + rows named, whatever the rows, the options and the encoding are."""
    path = folder / "a.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=encoding == "cp1252") + "\n" for row in rows)
    path.write_text(lines, encoding=encoding, errors="backslashreplace", newline="\n")
    joined = any(row.keys() >= {"message_id", "parent_id", "role", "text"} for row in rows)  # to trees
    counted = encoding != "cp1252" and not joined
    _balances(DataSection(max_dropped=1, **options), folder, path, len(rows) if counted else None)


def _balances(data: DataSection, folder: Path, path: Path, rows: int | None) -> None:
    try:
        ledger = process(data, folder, str(path))
    except Rejected as rejected:
        ledger = rejected.ledger
    except DataError as error:
        assert error.where
        return
    assert ledger.balanced() and (rows is None or ledger.read == rows)
    if ledger.written:
        out = folder / "data/processed"
        counted = {name: _lines(out / f"{name}.jsonl") for name in ("train", "val", "test", "quarantine")}
        assert counted.pop("quarantine") == sum(ledger.named.values()) and sum(counted.values()) == ledger.written


def _lines(path: Path) -> int:
    return sum(json.loads(line) is not None for line in path.open("rb")) if path.exists() else 0


def what_is_written_well_comes_back(folder: Path, kind: str, rows: list[tuple[str, str]]) -> None:
    """Every text survives JSON lines, JSON and CSV exactly."""
    clean = [tuple(text.encode("utf-8", "ignore").decode().replace("\0", "") + "!" for text in row) for row in rows]
    expected = [{"question": question, "answer": answer} for question, answer in clean]
    path = folder / f"a.{kind}"
    with path.open("w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("question", "answer"), *clean])
        elif kind == "json":
            json.dump(expected, file, ensure_ascii=False)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in expected)
    try:
        assert [raw.value for raw in open_source(path, folder).rows()] == expected
    except DataError as error:  # texts of control characters only look like no text at all
        assert "binary" in str(error)


PAIRS = st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=2, max_size=8)
CHECKS: dict[Callable[..., None], dict[str, st.SearchStrategy[Any]]] = {
    any_bytes_give_rows_or_one_error: {"name": NAMES, "content": FILES},
    any_rows_balance: {"rows": ROWS, "options": OPTIONS, "encoding": ENCODINGS},
    what_is_written_well_comes_back: {"kind": st.sampled_from(["jsonl", "json", "csv"]), "rows": PAIRS},
}


def check(function: Callable[..., None], number: int, examples: int) -> None:
    """Runs one check on this many examples from the seed `number`; raises the shrunk failure."""

    @seed(number)
    @settings(BOUNDED, max_examples=examples)
    @given(**CHECKS[function])
    def run(**drawn: Any) -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            function(folder, **drawn)
        finally:
            shutil.rmtree(folder)

    run()


def main(seconds: float) -> None:
    """Draws new seeds until the time is over."""
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for function in CHECKS:
            number = random.SystemRandom().getrandbits(32)
            sys.stdout.write(f"{function.__name__} seed {number}\n")
            check(function, number, 300)
        rounds += 1
    sys.stdout.write(f"{rounds * 300 * len(CHECKS):,} examples in {seconds:g} s, no crash\n")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 300)
