"""`check` as a user runs it: a line for everything, and exit 2 where a run could not start."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from sft.preflight import checks


@pytest.fixture
def project(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """A project that is ready to train."""
    shutil.copytree(tiny_qwen2, tmp_path / "models" / "base")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run_bnb.yaml").write_text("model:\n  name: models/base\ntuning:\n  mode: lora\n")
    (tmp_path / "data" / "processed").mkdir(parents=True)
    for split, rows in (("train", 8), ("val", 2), ("test", 2)):
        lines = [json.dumps({"user": f"{split} {n}?", "assistant": f"{n}."}) for n in range(rows)]
        (tmp_path / "data" / "processed" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def findings(project: Path, *sets: str, config: str = "run_bnb.yaml") -> dict[str, checks.Finding]:
    context = checks.CheckContext(project, project / "configs" / config, list(sets), free_port())
    return {finding.name: finding for finding in checks.run(context)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_project_that_is_ready_passes(project, command):
    done = command("check", "--port", free_port(), "--json", SFT_ROOT=str(project))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    levels = {finding["name"]: finding["level"] for finding in result["findings"]}
    assert result["ok"]
    assert set(levels) >= {"system", "python", "packages", "config", "data", "model", "template", "disk", "memory"}
    assert {levels[name] for name in ("config", "data", "model", "template", "outputs")} == {"ok"}


def test_every_mistake_is_a_line_with_its_fix_and_exit_2(project, command):
    (project / "configs" / "run_bnb.yaml").write_text("model:\n  nam: models/base\ntrain:\n  epochs: many\n")
    done = command("check", "--json", SFT_ROOT=str(project))
    assert done.returncode == 2
    result = json.loads(done.stdout)
    errors = [finding for finding in result["findings"] if finding["level"] == "error"]
    assert [finding["name"] for finding in errors] == ["config", "config"]
    assert "run_bnb.yaml:2" in errors[0]["message"]
    assert "run_bnb.yaml:4" in errors[1]["message"]
    assert "Traceback" not in done.stderr


def test_rows_are_counted(project):
    assert findings(project)["data"].message == "processed rows: train 8, val 2, test 2"


def test_raw_rows_that_are_not_processed_yet_are_a_warning(project):
    shutil.rmtree(project / "data" / "processed")
    (project / "data" / "raw").mkdir()
    (project / "data" / "raw" / "raw.jsonl").write_text('{"question": "a?", "answer": "b"}\n')
    finding = findings(project)["data"]
    assert (finding.level, finding.fix) == ("warning", "make process")
    (project / "data" / "raw" / "raw.jsonl").unlink()
    assert findings(project)["data"].level == "error"


def test_an_invalid_row_is_an_error_with_its_line(project):
    path = project / "data" / "processed" / "train.jsonl"
    path.write_text('{"question": 1}\n' + path.read_text())
    finding = findings(project)["data"]
    assert finding.level == "error"
    assert "train.jsonl:1" in finding.message


def test_missing_or_incomplete_models_are_errors(project):
    gone = findings(project, "model.name=nobody/nothing")["model"]
    assert (gone.level, gone.fix) == ("error", "make download-model")
    weights = project / "models" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "truncated" in findings(project)["model"].message


def test_a_template_that_never_shows_the_answer_is_an_error(project):
    (project / "t.jinja").write_text("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    finding = findings(project, "data.template_path=t.jinja")["template"]
    assert (finding.level, "never shows" in finding.message or "no answer" in finding.message) == ("error", True)
    (project / "t.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    finding = findings(project, "data.template_path=t.jinja")["template"]
    assert finding.level == "error"
    assert "2" in finding.message


def test_a_template_of_the_kit_is_found_from_any_project(project):
    assert findings(project, "data.template_path=chatml")["template"].level == "ok"


def test_a_port_in_use_is_a_warning(project):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        context = checks.CheckContext(project, project / "configs" / "run_bnb.yaml", [], port)
        finding = {finding.name: finding for finding in checks.run(context)}["tensorboard"]
    assert (finding.level, finding.fix) == ("warning", f"another port: TB_PORT={port + 1}")


def test_an_outputs_folder_that_is_a_file_is_an_error(project):
    (project / "outputs").write_text("in the way")
    assert findings(project)["outputs"].level == "error"


def test_a_disk_too_small_is_an_error(project):
    finding = findings(project, "tuning.mode=full", "train.save_total_limit=1000000000")["disk"]
    assert finding.level == "error"
    assert "save_total_limit" in str(finding.fix)
