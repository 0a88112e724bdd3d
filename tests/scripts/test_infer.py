"""infer.py: a file of questions, a chat through a pipe, and what cannot be answered."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import infer
from sft.errors import SftError
from tests.conftest import ROOT
from tests.generation import tiny_runs

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    root = tiny_runs.project(tmp_path_factory.mktemp("infer-project"), tiny_qwen2)
    tiny_runs.finished_run(root)
    return root


@pytest.fixture
def run(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any] | None]:
    """Runs the command's own main in this process; errors are raised."""

    def call(*flags: str) -> dict[str, Any] | None:
        monkeypatch.setenv("SFT_ROOT", str(project))
        monkeypatch.chdir(tmp_path)
        args = infer.parser().parse_args(list(flags))
        args.config = args.config or infer.console.default_config()
        return infer.main(args)

    return call


def test_a_file_of_questions_is_answered_in_its_order(
    command: Command, run: Callable[..., dict[str, Any] | None], project: Path, tmp_path: Path
) -> None:
    questions = [{"question": f"What is {i}?", "answer": str(i)} for i in (3, 1, 2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    done = command("infer", "--input_file", "q.jsonl", "--output_file", "out/a.jsonl", "--json", SFT_ROOT=str(project))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert [(row["source"], row["reference"]) for row in rows] == [
        (row["question"], row["answer"]) for row in questions
    ]
    assert all("<|im" not in row["prediction"] for row in rows)

    (tmp_path / "q.txt").write_text("What is 3?\n\nWhat is 1?\n")
    adapter = str(project / "adapters" / "last")
    run("--mode", "batch", "--input_file", "q.txt", "--output_file", "a.txt", "--adapters", adapter)
    written = (tmp_path / "a.txt").read_text().split("\n")
    expected = [row["prediction"].strip().replace("\\", "\\\\").replace("\n", "\\n") for row in rows]
    assert written == [expected[0], "", expected[1], ""]


def test_a_chat_through_a_pipe_continues_until_the_end_of_its_input(command: Command, project: Path) -> None:
    lines = "hello\n/nonsense\n/tokens\n/system Be kind.\n/system\nhello\n/markdown\n/save\n"
    done = command("infer", stdin=lines, SFT_ROOT=str(project))
    assert done.returncode == 0, done.stderr
    assert f"system: {tiny_runs.SYSTEM}" in done.stdout
    assert "there is no command /nonsense" in done.stdout
    assert "tokens in 2 turns" in done.stdout
    assert "Markdown needs a terminal" in done.stdout
    saved = json.loads((project / "outputs" / "chat.jsonl").read_text())
    assert [message["role"] for message in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][0]["content"] == "Be kind."
    assert saved["messages"][2]["content"].strip() in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode", "batch"], "needs --input_file and --output_file"),
        (["--input_file", "nowhere.txt", "--output_file", "a.txt"], "no such input file"),
        (["--input_file", "q.jsonl", "--output_file", "a.txt"], "q.jsonl:2"),
        (["--merged", "nowhere"], "there is no model folder nowhere"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_a_model_is_opened(
    flags: list[str], message: str, run: Callable[..., dict[str, Any] | None], tmp_path: Path
) -> None:
    (tmp_path / "q.jsonl").write_text('{"user": "a"}\n{broken\n')
    with pytest.raises(SftError) as error:
        run(*flags)
    assert message in str(error.value) and error.value.exit_code == 2
    assert not (tmp_path / "a.txt").exists()


def test_make_answers_the_shipped_questions_with_the_base(project: Path, tmp_path: Path) -> None:
    make = ["make", "infer-batch", "BASE=1", f"PYTHON={sys.executable}", f"OUTPUT={tmp_path / 'answers.txt'}"]
    outside_make = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    env = {**outside_make, "SFT_ROOT": str(project)}
    done = subprocess.run(make, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 answers in" in done.stdout
    first = done.stdout.splitlines()[0]
    assert re.fullmatch(r"model: .+, the base of .+, the newest finished run \(another one: RUN=.+\)", first), first
    assert len((tmp_path / "answers.txt").read_text().splitlines()) == 4
