"""What every command prints: redacted results, errors with every problem, the right exit code."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft import console
from sft.errors import ConfigError, SftError, nearest, one_line
from tests.conftest import ROOT

TOKEN = "hf_" + "AbcDef0123456789"
Run = Callable[[Callable[[argparse.Namespace], Any]], tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path) -> Run:
    """Runs a command with --json in this process: its exit code, stdout and stderr."""
    monkeypatch.setattr(console, "_json_mode", False)
    monkeypatch.setattr(console, "show_logs", lambda: None)  # would stay for the tests after this one
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["command", "--json"])

    def command(main: Callable[[argparse.Namespace], Any]) -> tuple[int, str, str]:
        code = 0
        try:
            console.run(console.parser("a command"), main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return command


def test_json_results_are_redacted(run: Run) -> None:
    def main(args: argparse.Namespace) -> dict[str, str]:
        console.emit({"row": TOKEN})
        console.say(TOKEN)
        return {"token": TOKEN}

    code, out, err = run(main)
    assert code == 0 and TOKEN not in out + err
    assert [json.loads(line) for line in out.splitlines()] == [{"row": "hf_***"}, {"token": "hf_***"}]


def test_json_errors_hold_every_problem(run: Run) -> None:
    def main(args: argparse.Namespace) -> None:
        problems: list[SftError] = [ConfigError("one", where="a:1"), ConfigError(f"two {TOKEN}", fix="three")]
        raise ConfigError("2 errors:", problems=problems)

    code, out, err = run(main)
    first = {"error": "one", "where": "a:1", "fix": None}
    second = {"error": "two hf_***", "where": None, "fix": "three"}
    assert code == 2
    assert json.loads(out) == {"error": "2 errors:", "where": None, "fix": None, "problems": [first, second]}
    assert err.startswith("error: 2 errors:\none\n  where: a:1\n")


def test_a_bug_ends_with_1_and_its_traceback_in_a_file(run: Run, tmp_path) -> None:
    def main(args: argparse.Namespace) -> None:
        raise ZeroDivisionError(f"{TOKEN}\n  twice")

    code, out, err = run(main)
    assert (code, out) == (1, "") and "unexpected ZeroDivisionError: hf_*** twice" in err
    saved = (tmp_path / "outputs" / "last_error.txt").read_text()
    assert "Traceback" in saved and TOKEN not in saved


def test_the_text_of_an_error_fits_on_one_line_without_secrets() -> None:
    assert one_line(ValueError(f"a\n  b {TOKEN}"), 12) == "a b hf_***"
    assert one_line("x" * 10, 4) == "xxxx"


@pytest.mark.parametrize(
    ("fix", "typed"),
    [
        ("--set train.epochs=3", 'SET="train.epochs=3"'),
        ("a new run (--resume never), or --set a.b=1 --set c.d='x y', or not",
         'a new run (RESUME="never"), or SET="a.b=1 c.d=x y", or not'),
        ("accept it: --allow-change one --allow-change two", 'accept it: ALLOW="one two"'),
        ("python scripts/eval.py --base", "python scripts/eval.py --base"),
        ("--gpu", "GPU="),
        ('did you mean --gpu "RTX 4050 Laptop"? or --to trl', 'did you mean GPU="RTX 4050 Laptop"? or TO="trl"'),
    ],
)  # fmt: skip
def test_a_fix_is_what_can_be_typed_after_make(monkeypatch: pytest.MonkeyPatch, fix: str, typed: str) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/python")
    assert console.as_typed(fix) == fix
    monkeypatch.setenv("SFT_MAKE", "train")
    assert console.as_typed(fix) == typed
    monkeypatch.setattr(sys, "executable", str(Path.cwd() / ".venv/bin/python"))
    assert console.as_typed(fix) == typed.replace("python ", ".venv/bin/python ")


def test_several_settings_fit_into_one_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "train.epochs=2 data.system_prompt=Be brief, a=b  eval.metrics=[a, b]"
    monkeypatch.setattr(sys, "argv", ["command", "--json", "--set", text, "--set", "train.seed=1"])
    code, out, _ = run(lambda args: args.set)
    expected = ["train.epochs=2", "data.system_prompt=Be brief, a=b", "eval.metrics=[a, b]", "train.seed=1"]
    assert code == 0 and json.loads(out) == expected


def test_run_names_the_settings_and_the_adapter_of_a_run(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def main(args: argparse.Namespace) -> list[str]:
        return [args.config, str(args.adapters)]

    make_parser = console.parser

    def with_adapters(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", "--json", *flags])
        parser = make_parser("a command")
        parser.add_argument("--adapters")
        monkeypatch.setattr(console, "parser", lambda *_: parser)
        return run(main)

    folder = tmp_path / "outputs/mine"
    folder.mkdir(parents=True)
    (folder / "config.resolved.yaml").touch()
    assert "the run mine has not finished" in with_adapters("--run", "mine")[1]
    (tmp_path / "adapters/mine").mkdir(parents=True)
    code, out, _ = with_adapters("--run", "mine")
    assert code == 0 and json.loads(out) == [str(folder / "config.resolved.yaml"), str(tmp_path / "adapters/mine")]
    code, out, _ = with_adapters("--run", "mine", "--config", "x.yaml")
    assert code == 2 and "cannot be combined" in out


def test_the_nearest_name() -> None:
    assert nearest("lerning_rate", ["epochs", "learning_rate"]) == "learning_rate"
    assert nearest("xyzzy", ["epochs"]) is None


def test_progress_on_a_pipe_is_a_line_now_and_then_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 10.0, 40.0, 50.0, 120.0])
    monkeypatch.setattr("sft.console.time.monotonic", lambda: next(clock))
    with console.progress("answering") as advance:
        for done in (1, 2, 3, 4):
            advance(done, 100)
    assert capsys.readouterr().err == "answering 2%, 33 min left\nanswering 4%, 48 min left\n"
    assert [console.duration(seconds) for seconds in (7, 150, 7800)] == ["7 s", "2 min", "2 h 10 min"]


def test_threads_do_not_spin_for_long_unless_the_user_chose_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    console.quiet_libraries()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("PASSIVE", "1000")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    console.quiet_libraries()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE" and "GOMP_SPINCOUNT" not in os.environ


def test_matrix_products_of_ever_new_shapes_do_not_fill_the_memory() -> None:
    """oneDNN compiles a kernel for each shape and stores it: rows of other lengths in every step are other shapes."""
    code = """
import ctypes
from sft import console
console.quiet_libraries()
import torch
libc = ctypes.CDLL(None)
Counts = type("Counts", (ctypes.Structure,), {"_fields_": [(str(i), ctypes.c_size_t) for i in range(10)]})
libc.mallinfo2.restype = Counts
rows, matrix = torch.ones(300, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
used = []
for length in range(1, 301):
    rows[:length] @ matrix
    used.append(getattr(libc.mallinfo2(), "7"))
print((used[-1] - used[149]) / 2**20)
"""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("glibc older than 2.33 does not count its blocks")
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    environment |= {"PYTHONPATH": str(ROOT / "scripts"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8  # MiB; 80 with torch's default


@pytest.mark.parametrize(("terminal", "lines"), [(True, 2), (False, 1)])
def test_a_long_line_is_wrapped_between_words_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool, lines: int
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    text = "  kernels         plain         the default: no library is needed"
    console.say(text, wrap=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines and all(len(line) <= 40 for line in printed) == terminal
    assert " ".join(" ".join(printed).split()) == " ".join(text.split())


def test_the_command_that_continues_repeats_what_make_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/train.py"])
    monkeypatch.setenv("SFT_MAKE", "train")
    monkeypatch.setenv("MAKEFLAGS", r" -- SET=data.system_prompt=Don't\ guess CONFIG=configs/mine.yaml")
    expected = """make train CONFIG=configs/mine.yaml SET="data.system_prompt=Don't guess\""""
    assert console.continue_command("mine") == expected
