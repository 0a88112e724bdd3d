"""The commands as functions: the shipped notebook from its first cell to its last, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sft
from sft.errors import ConfigError, RunError
from tests.conftest import ROOT
from tests.training import project


def test_importing_sft_imports_nothing_else() -> None:
    code = "import sys, sft; print([name for name in sys.modules if name.startswith('sft.') or name == 'torch'])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("configs", "models", "data/samples", "chat_templates"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    notebook = json.loads(Path("notebook.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert sum('"train.max_steps": 60' in cell for cell in cells) == 1
    names: dict[str, Any] = {}
    for cell in cells:
        exec(cell.replace('"train.max_steps": 60', '"train.max_steps": 4'), names)
    assert names["ledger"]["splits"]["train"] > 100 and names["plan"]["fits"]
    assert names["summary"]["steps"] == 4 and names["summary"]["run"] == "notebook"
    assert names["scores"]["rows"] == 8 and names["scores"]["run"] == "notebook"
    assert (tmp_path / "adapters/notebook/adapter_config.json").is_file()
    assert len(capsys.readouterr().out.splitlines()) > 20


def test_mistakes_are_errors_that_say_what_to_do(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(project.make(tmp_path, tiny_qwen2)))
    config = sft.load_config(tmp_path / "config.yaml", {"train.max_steps": 2, "generation.stop": ["END"]})
    assert config.config.train.max_steps == 2 and config.config.generation.stop == ["END"]
    with pytest.raises(ConfigError, match="learning_rate"):
        sft.load_config(tmp_path / "config.yaml", {"train.learning_rat": 1})
    with pytest.raises(RunError, match="no run called t has finished yet"):
        sft.evaluate(config)
    with pytest.raises(TypeError, match="eval: unrecognized arguments: --limt"):
        sft.evaluate(config, run="t", limt=3)
    with pytest.raises(TypeError, match="did you mean export"):
        sft.run_command("exprot", config)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sft.trian
