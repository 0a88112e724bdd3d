"""The plan as an answer: suggestions, phases, plans of many models, and the check before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import train as command
from sft.config.schema import Config
from sft.errors import ConfigError, EnvironmentProblem, ModelError
from sft.memory import plan, report
from sft.memory.devices import Device
from sft.model.files import ModelFiles
from sft.model.hardware import Hardware
from sft.model.hub import find
from tests.memory.cases import changed, description
from tests.training import project

MIB = 2**20


def test_combined_suggestions_name_every_setting_once_and_savings_match_their_own_plans() -> None:
    model = {**description("qwen2"), "hidden_size": 512, "vocab_size": 50000}
    base = Config()
    base = changed(base, tuning=changed(base.tuning, lora=changed(base.tuning.lora, r=256)))
    device = Device("cuda", "a card", 0.7)
    full_plan = plan.make_plan(base, model, device)
    assert not full_plan.fits
    settings = {suggestion.setting: suggestion for suggestion in full_plan.suggestions}
    assert set(settings) >= {"train.optim=adamw_8bit", "model.max_seq_len=128"}
    assert full_plan.combination is not None
    keys = [setting.split("=")[0] for setting in full_plan.combination.settings]
    assert len(set(keys)) == len(keys)
    paged = changed(base, train=changed(base.train, optim="paged_adamw_8bit"))
    paged_plan = plan.make_plan(paged, model, device, suggest=False)
    saved = full_plan.training.peak - paged_plan.training.peak
    assert settings["train.optim=paged_adamw_8bit"].saves_gib == pytest.approx(saved, abs=1e-3)
    assert "optimizer" not in paged_plan.training.parts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "of-our-own", "auto_map": {"AutoModelForCausalLM": "ours.Ours"}}, "without code of their own"),
        ({"hidden_size": "256"}, "expected int"),
        ({"hidden_size": -5}, "cannot build"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored quantised (gptq)"),
    ],
)
def test_a_model_that_cannot_be_planned_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        plan.make_plan(Config(), {**description("qwen2"), **changes}, Device("cuda", "a card", 8))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "length", "most"),
    [
        ("Qwen/Qwen2.5-3B-Instruct", 512, 6.5),
        pytest.param("Qwen/Qwen2.5-7B-Instruct", 2048, 22, marks=pytest.mark.slow),
    ],
)
def test_qwens_3b_at_512_and_7b_at_2048_fit_their_cards(name: str, length: int, most: float) -> None:
    base = Config()
    config = changed(base, model=changed(base.model, max_seq_len=length))
    card_plan = plan.make_plan(config, report.shipped_models()[name], Device("cuda", "a card", most))
    assert card_plan.fits
    assert most / 4 < card_plan.training.allocated < card_plan.peak <= most


# ---- plans of many models


def test_models_are_listed_smallest_first_and_no_logger_stays_silent(tiny_t5: Path, tiny_qwen2: Path) -> None:
    logger = logging.getLogger("sft.config")
    logger.setLevel(logging.INFO)
    base = Config()
    config = changed(base, model=changed(base.model, max_seq_len=64))
    names = [str(tiny_t5), "no/such/folder/here", str(tiny_qwen2)]
    results = report.plan_models(names, config, Device("cuda", "a card", 8), tiny_t5.parent, lambda *_: None)
    assert logger.level == logging.INFO
    assert list(results)[-1] == "no/such/folder/here" and "error" in results["no/such/folder/here"]
    sizes = [result["billions"] for result in results.values() if "billions" in result]
    assert len(sizes) == 2 and sizes == sorted(sizes)


def test_model_names_come_from_arguments_files_or_the_shipped_list(tmp_path: Path) -> None:
    listed = tmp_path / "models.txt"
    listed.write_text("a/model  # the first\n\nb/model\n")
    assert report.model_names([str(listed), "c/model"]) == ["a/model", "b/model", "c/model"]
    assert "Qwen/Qwen2.5-3B-Instruct" in report.model_names([])
    listed.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="no model name"):
        report.model_names([str(listed)])


# ---- the check before training


def machine(free: int) -> Hardware:
    return Hardware("cpu", "a small machine", None, free, free, bf16=True, count=1)


@pytest.fixture
def files(tiny_qwen2: Path) -> ModelFiles:
    return find(changed(Config().model, name=str(tiny_qwen2)), tiny_qwen2)


def full(files: ModelFiles) -> Config:
    config = Config()
    tuning = changed(config.tuning, mode="full")
    model = changed(config.model, name=files.name, max_seq_len=1024)
    train = changed(config.train, micro_batch_tokens=4096)
    return changed(config, tuning=tuning, model=model, train=train, eval=changed(config.eval, batch_size=2))


def test_a_run_that_cannot_fit_is_refused_with_suggestions_unless_forced(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    small = machine(530 * MIB)  # Python and torch alone are presumed to take 768
    with pytest.raises(EnvironmentProblem, match="does not fit") as caught:
        plan.memory_check(full(files), files, small, longest=1024)
    message = str(caught.value)
    assert "train.micro_batch_tokens=1024 saves" in message
    assert "train.gradient_checkpointing=true" in message
    assert "--force" in message
    plan.memory_check(full(files), files, small, longest=1024, force=True)
    assert "starts anyway" in caplog.text


def test_a_run_far_from_the_limit_is_not_traced(files: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "make_plan", None)  # calling it would be an error
    plan.memory_check(full(files), files, machine(64 * 1024 * MIB), longest=1024)


def test_a_model_that_cannot_be_traced_passes_with_a_warning(
    files: ModelFiles, caplog: pytest.LogCaptureFixture
) -> None:
    strange = ModelFiles(files.path, files.name, None, {"model_type": "never-heard-of"}, files.kind)
    plan.memory_check(full(files), strange, machine(530 * MIB), longest=64)
    assert "cannot be planned" in caplog.text


@pytest.mark.slow
def test_train_refuses_what_cannot_fit_before_weights_are_loaded(
    tmp_path: Path, tiny_qwen2: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    root = project.make(tmp_path, tiny_qwen2)
    model = root / "huge"
    model.mkdir()
    for path in tiny_qwen2.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 200}
    (model / "config.json").write_text(json.dumps({**config, "layer_types": ["full_attention"] * 200}))
    line = ["--config", str(root / "config.yaml"), "--set", f"model.name={model}"]
    with pytest.raises(EnvironmentProblem, match="does not fit") as caught:
        command.main(command.build_parser().parse_args(line))
    assert caught.value.exit_code == 2
    assert "tuning.mode=qlora saves" in str(caught.value)
    assert not (root / "outputs").exists()
    forced = command.main(command.build_parser().parse_args([*line, "--force", "--dry-run"]))
    assert forced is not None
    assert forced["model"] == str(model)
    assert "starts anyway" in caplog.text
