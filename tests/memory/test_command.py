"""The train command and the planner: what cannot fit is refused before weights are looked into; what ran is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train as command
from sft.errors import EnvironmentProblem
from tests.training import project


@pytest.fixture
def root(tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    return project.make(tmp_path, tiny_qwen2)


@pytest.mark.slow
def test_train_refuses_what_cannot_fit_before_weights_are_loaded(
    root: Path, tiny_qwen2: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = root / "huge"
    model.mkdir()
    for path in tiny_qwen2.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    said = json.loads((model / "config.json").read_text())
    said |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200}
    (model / "config.json").write_text(json.dumps({**said, "layer_types": ["full_attention"] * 200}))
    line = ["--config", str(root / "config.yaml"), "--set", f"model.name={model}"]
    with pytest.raises(EnvironmentProblem, match="does not fit") as caught:
        command.main(command.build_parser().parse_args(line))
    assert caught.value.exit_code == 2
    assert "tuning.mode=qlora saves" in str(caught.value)
    assert not (root / "outputs").exists()
    forced = command.main(command.build_parser().parse_args([*line, "--force", "--dry-run"]))
    assert forced is not None
    assert forced["model"] == str(model)
    assert "tried all the same" in caplog.text
