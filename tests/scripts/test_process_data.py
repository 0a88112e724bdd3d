"""process_data as a user runs it: exit codes, one message, JSON alone on stdout, nothing half written."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

CONFIG = str(ROOT / "configs/config_base.yaml")
Run = Callable[..., Any]


@pytest.fixture
def process(command: Run, tmp_path: Path) -> Run:
    def run(*args: object) -> Any:
        return command("process_data", "--config", CONFIG, *args, SFT_ROOT=str(tmp_path), HF_HUB_OFFLINE="1")

    return run


def test_default_raw_file_to_splits_with_a_table_and_an_example(process: Run, tmp_path: Path) -> None:
    (tmp_path / "data/raw").mkdir(parents=True)
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(60)]
    lines = [json.dumps(row) for row in rows] + ['{"question": "cut', json.dumps(rows[0])]
    (tmp_path / "data/raw/raw.jsonl").write_text("\n".join(lines))
    done = process()
    assert done.returncode == 0, done.stderr
    for message in (
        "formats: qa (60)",
        '"user": "q0"',
        "rows read",
        "unreadable",
        "exact duplicate",
        "1.6% faulty",
    ):
        assert message in done.stdout
    assert "data/raw/raw.jsonl:61: broken JSON" in done.stdout and "too few to learn from" in done.stdout
    as_json = process("--json", "--format", "qa")
    ledger = json.loads(as_json.stdout)
    assert ledger == json.loads((tmp_path / "data/processed/ledger.json").read_text())
    assert (ledger["rows_read"], ledger["rows_written"], ledger["named"]) == (
        62,
        60,
        {"unreadable": 1, "exact duplicate": 1},
    )
    assert "rows read" in as_json.stderr


def test_a_csv_with_a_mapping_of_columns(process: Run, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "\ufeffType,Question,Best Answer\n" + "".join(f"x,Why {i}?,Because.\n" for i in range(9))
    )
    sets = ("--set", "data.columns.user=Question", "--set", "data.columns.assistant=Best Answer")
    done = process("--raw_path", "t.csv", *sets, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["formats"] == {"columns": 9}
    assert process("--raw_path", "t.csv", "--user_col", "question", "--answer_col", "best answer").returncode == 0
    without = process("--raw_path", "t.csv")
    assert without.returncode == 2
    assert "make process RAW=t.csv USER_COL=Question ANSWER_COL='Best Answer'" in without.stderr


def test_on_a_terminal_the_columns_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        "Frage,Die Antwort,Quelle\n" + "".join(f"Was {i}?,Das ist {i}.,web\n" for i in range(9))
    )
    local = tmp_path / "configs" / "local.yaml"
    local.parent.mkdir()
    local.write_text("data:\n  raw_path: t.csv  # mine\n  max_dropped: 0.2\n")
    env = {**os.environ, "SFT_ROOT": str(tmp_path)}
    script = [sys.executable, str(ROOT / "scripts/process_data.py")]
    master, slave = pty.openpty()
    with subprocess.Popen(script, stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, env=env) as child:
        os.close(slave)
        os.write(master, b"\n2\n")
        shown = b""
        with contextlib.suppress(OSError):
            while piece := os.read(master, 4096):
                shown += piece
    os.close(master)
    assert child.returncode == 0, shown.decode()
    assert "Enter for Frage" in shown.decode() and "USER_COL=Frage ANSWER_COL='Die Antwort'" in shown.decode()
    row = json.loads((tmp_path / "data/processed/train.jsonl").read_text().splitlines()[0])
    assert row["user"].startswith("Was") and row["assistant"].startswith("Das")
    columns = '  columns: {"user": "Frage", "assistant": "Die Antwort"}\n'
    assert local.read_text() == f"data:\n  raw_path: t.csv  # mine\n{columns}  max_dropped: 0.2\n"
    again = subprocess.run(script, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr
    named = [*script, "--user_col", "Frage", "--answer_col", "Quelle"]  # as the fix without a terminal says
    assert subprocess.run(named, cwd=tmp_path, env=env, capture_output=True, check=False).returncode == 0
    assert local.read_text().count("columns:") == 1 and '"assistant": "Quelle"' in local.read_text()


def test_text_of_questions_and_answers_is_read(process: Run, tmp_path: Path) -> None:
    (tmp_path / "faq.txt").write_text("".join(f"Q: Why {i}?\nA: Because, of course.\n\n" for i in range(9)))
    done = process("--raw_path", "faq.txt", "--json")
    assert done.returncode == 0, done.stderr
    ledger = json.loads(done.stdout)
    assert ledger["formats"] == {"qa": 9} and ledger["rows_read"] == 9


@pytest.mark.parametrize(
    "name, content, message",
    [
        (None, "", "no raw data"),
        ("a.parquet", "\x89PNG\r\n\x1a\n" + "x" * 50, "a PNG picture"),
        ("a.jsonl", '{"q": 1}\n' * 3, "nothing is left"),
        ("README.md", "# Rows\n\nThey are here, there, and there.\n", "not data: a README or notes"),
        ("a.json", '[\n{"q": 1,},\n{"q": 2}\n{"q": 3}\n]', "line 4: a comma is missing before this row"),
    ],
)
def test_what_a_user_can_fix_is_exit_2_and_one_message(
    process: Run, tmp_path: Path, name: str | None, content: str, message: str
) -> None:
    before = tmp_path / "data/processed/train.jsonl"
    before.parent.mkdir(parents=True)
    before.write_text("before")
    if name:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    done = process(*(["--raw_path", name] if name else []))
    assert done.returncode == 2 and message in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert before.read_text() == "before"


def test_a_name_that_leaves_out_data_raw_or_is_misspelt_gets_a_suggestion(process: Run, tmp_path: Path) -> None:
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/mine.jsonl").write_text("{}")
    assert "did you mean data/raw/mine.jsonl?" in process("--raw_path", "data/raw/mein.jsonl").stderr
