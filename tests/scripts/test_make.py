"""make as a user types it: its variables, a stop, `make resume`, RUN=."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.runs import read_log
from tests.conftest import ROOT
from tests.training import project


def start(root: Path, *words: str) -> subprocess.Popen[str]:
    """`make WORDS` with this Python, on the project in `root`, in a process group of its own as in a terminal."""
    return subprocess.Popen(
        ["make", "-C", str(ROOT), "--no-print-directory", *words, f"PYTHON={sys.executable}"],
        env={**os.environ, "SFT_ROOT": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def make(root: Path, *words: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    running = start(root, *words)
    output, errors = running.communicate(timeout=200)
    return running.returncode, output + errors


def test_ctrl_c_ends_make_quietly_and_resume_continues_that_run_with_its_own_settings(
    tmp_path: Path, tiny_qwen2: Path
) -> None:
    root = project.make(tmp_path, tiny_qwen2)
    sets = "train.eval_strategy=no train.save_strategy=no experiment.description=two words train.max_steps=60"
    running = start(root, "train", f"CONFIG={root / 'config.yaml'}", f"SET={sets}")
    log, until = root / "outputs/t/log.jsonl", time.monotonic() + 120
    while not read_log(log) and time.monotonic() < until and running.poll() is None:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGINT, errors  # which a shell shows as 130
    assert output.startswith("config: config.yaml with train.eval_strategy=no, train.save_strategy=no, experiment.")
    assert "make:" not in errors and "error:" not in errors
    assert f'Continue with: make train CONFIG={root / "config.yaml"} SET="{sets}" PYTHON=' in errors

    code, output = make(root, "resume", "SET=train.max_steps=61")
    assert code == 2 and "total_steps: was 60, is 61" in output
    assert 'RESUME="never")' in output and 'ALLOW="total_steps"' in output and " --" not in output.partition("fix:")[2]

    code, output = make(root, "resume")
    assert code == 0 and output.startswith("config: outputs/t/config.yaml\nresuming outputs/t at checkpoint-"), output
    assert "split differently" not in output and read_log(log)[-1]["step"] == 60

    code, output = make(root, "resume")
    assert code == 2 and "there is no unfinished run to resume" in output and "fix:   make train" in output
    assert [path.name for path in (root / "outputs").iterdir() if path.name[0] == "t" and path.name != "tb"] == ["t"]

    code, output = make(root, "eval", "RUN=tt")
    assert code == 2 and "there is no run called tt" in output and "did you mean t?" in output


@pytest.mark.parametrize(("ignored", "code", "line"), [(False, -signal.SIGINT, False), (True, 2, True)])
def test_a_stop_interrupts_make_unless_it_ignores_interrupts(
    tmp_path: Path, ignored: bool, code: int, line: bool
) -> None:
    stopped = tmp_path / "python"
    stopped.write_text("#!/bin/sh\nexit 130\n")
    stopped.chmod(0o755)
    shell = ("trap '' INT; " if ignored else "") + f"exec make -C {ROOT} train PYTHON={stopped}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, "Error 130" in done.stderr) == (code, line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["infer", "RESUME=never"], "RESUME= works in: train "),
        (["eval", "ALLOW=total_steps"], "ALLOW= works in: train "),
        (["full-pipeline", "ARGS=--dry-run"], "ARGS= does not work in full-pipeline"),
        (["train", "EPOCHS=3"], 'Set a config key with SET="key=value"'),
    ],
)
def test_a_variable_that_a_target_does_not_use_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    code, output = make(tmp_path, *words)
    assert code == 2 and message in output


def test_settings_of_the_command_line_reach_the_scripts_whole(tmp_path: Path) -> None:
    code, output = make(tmp_path, "-n", "process", "CONFIG=my file.yaml", "USER_COL=Best Question", "ARGS=--json")
    assert code == 0 and '--config "$CONFIG"' in output and '--user_col "$USER_COL"' in output and "--json" in output
