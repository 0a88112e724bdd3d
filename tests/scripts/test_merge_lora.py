"""`merge_lora` as a user runs it: merge what training left, let it answer, refuse another base."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from sft import files, runs
from sft.config.schema import Config, ModelSection, TuningSection
from sft.errors import ModelError
from tests import tiny_models
from tests.conftest import ROOT
from tests.ship.test_merge import adapter


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a base under models/ and a finished LoRA run, as `train` leaves it."""
    tiny_models.tiny_qwen2(tmp_path / "models" / "base")
    config = Config(
        model=ModelSection(name="models/base"),
        tuning=TuningSection(mode="qlora"),
        train={"output_dir": "outputs/first"},
        generation={"max_new_tokens": 8},
    )
    adapter(tmp_path / "models" / "base", tmp_path / "adapters" / "first")
    runs.write_resolved(tmp_path / "adapters" / "first", config)
    (tmp_path / "data" / "processed").mkdir(parents=True)
    rows = [{"id": str(at), "user": f"How many are {at} and 1?", "assistant": str(at + 1)} for at in range(66)]
    for split in ("train", "val"):
        files.write_text(tmp_path / "data/processed" / f"{split}.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run_bnb.yaml").write_text("model: {name: Qwen/Qwen2.5-3B-Instruct}\n")
    files.point(tmp_path / "adapters" / "last", tmp_path / "adapters" / "first")
    return tmp_path


def in_process(monkeypatch, project: Path, *flags: str) -> dict:
    """Runs the command's `main`, which spares a process its imports; errors are raised."""
    monkeypatch.setenv("SFT_ROOT", str(project))
    script = runpy.run_path(str(ROOT / "scripts" / "merge_lora.py"))
    return script["main"](script["parser"]().parse_args(["--config", str(project / "configs/run_bnb.yaml"), *flags]))


def test_the_newest_adapter_is_merged_and_answers(project, command, monkeypatch):
    done = command("merge_lora", "--dtype", "fp32", "--json", SFT_ROOT=str(project))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["out"] == str(project / "outputs" / "merged_fp32")
    assert report["max_logit_difference"] <= 1e-3
    assert report["base"] == "models/base"
    assert (report["trained_on"], report["measured_on"]) == ("nf4", "full precision")
    assert "trained on the nf4 base, but merged into the full-precision one" in " ".join(done.stderr.split())
    assert (report["held_out_rows"], report["held_out_of"]) == (64, 66)
    names = {path.name for path in (project / "outputs" / "merged_fp32").iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "config.resolved.yaml",
    } <= names
    answer = in_process(monkeypatch, project, "--dtype", "fp32", "--test")
    assert (answer["question"], answer["reference"]) == ("How many are 0 and 1?", "1")
    assert answer["source"] == "from data/processed/val.jsonl"
    assert 0 < answer["tokens"] <= 8


def test_a_base_that_is_not_the_adapters_own_is_refused(project, monkeypatch):
    tiny_models.tiny_qwen2(project / "models" / "other", seed=3)
    with pytest.raises(ModelError, match=r"trained on \S*models/base, the model here is \S*models/other"):
        in_process(monkeypatch, project, "--set", "model.name=models/other")
    assert not (project / "outputs" / "merged_fp16").exists()
