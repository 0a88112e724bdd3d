"""A hub token in the environment, the config and an error appears in no file and no output."""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import eval as evaluate
from sft import console
from sft.errors import ModelError
from tests.training import project


def test_a_token_is_written_nowhere_by_train_eval_check_and_doctor(
    tmp_path: Path,
    tiny_qwen2: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    token = "hf_" + "Qz7" * 11
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", token)
    root = project.make(tmp_path, tiny_qwen2)
    with open(root / "config.yaml", "a", encoding="utf-8") as file:
        file.write(f"experiment: {{description: 'my token is {token}'}}\n")
    project.run(root, "train.max_steps=2")
    evaluated = evaluate.parser().parse_args(["--config", str(root / "config.yaml"), "--limit", "1"])
    evaluate.main(evaluated)

    def fails(_: argparse.Namespace) -> None:
        raise ModelError(f"no access with {token}", where=f"https://x:{token}@hub")

    monkeypatch.setattr("sys.argv", ["train.py", "--set", f"model.revision={token}"])
    with pytest.raises(SystemExit):
        console.run(console.parser("a command"), fails)
    output = "".join(capfd.readouterr())
    for name in ("check", "doctor"):
        done = command(name, "--config", root / "config.yaml")
        output += done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
    assert "my token is" in (root / "outputs/t/config.resolved.yaml").read_text()
    assert "no access with hf_***" in output
    assert token not in output
    written = [path for path in root.rglob("*") if path.is_file() and path != root / "config.yaml"]
    assert len(written) > 30
    assert [path for path in written if token.encode() in path.read_bytes()] == []
    assert "hf_***" in output.partition("## last error")[2]
    assert "HF_TOKEN=(set, not shown)" in output and str(os.environ["HF_TOKEN"]) == token
