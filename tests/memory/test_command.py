"""The train command and the planner: what cannot fit is refused before weights are looked into; what ran is learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import plan as plan_command
import train as command
from sft.errors import EnvironmentProblem
from sft.memory import plan
from sft.training import measured
from tests.training import project


@pytest.fixture
def root(tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    return project.make(tmp_path, tiny_qwen2)


def test_a_run_leaves_its_speed_for_the_next_plan(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.run(root)
    assert plan.read(root) == []  # seconds of steps say nothing of a device
    monkeypatch.setattr(measured, "ENOUGH", 0.0)
    summary = project.run(root, "train.eval_strategy=no", "train.load_best_model_at_end=false")
    (ran,) = plan.read(root)
    assert (ran.gpu, ran.stage, ran.allocated_gib) == ("cpu", "run", None)
    assert ran.tokens_per_second == summary["tokens_per_second"]
    line = ["--config", str(root / "config.yaml"), "--gpu", "cpu"]
    time = plan_command.main(plan_command.build_parser().parse_args(line))["time"]
    assert time["speed"] == "measured here: 1 earlier run of this model"
    assert time["tokens_per_second"] == pytest.approx(ran.tokens_per_second, rel=0.5)
    assert "measured here: 1 earlier run of this model" in capsys.readouterr().out


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
