"""`export` and `push` as a user runs them: each form checked, refusals, and a dry run that shows what would go."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from sft import files, runs
from sft.config.schema import Config, ModelSection, TuningSection
from tests.conftest import ROOT
from tests.ship.test_merge import adapter

TOKEN = "hf_" + "testtoken0123456789"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished LoRA run on the demo model, as `train` leaves it."""
    root = tmp_path_factory.mktemp("project")
    config = Config(
        model=ModelSection(name="models/demo", max_seq_len=256),
        tuning=TuningSection(mode="lora"),
        train={"output_dir": "outputs/first"},
        generation={"max_new_tokens": 8},
    )
    for place in (root / "adapters" / "first", root / "outputs" / "first"):
        place.mkdir(parents=True)
    adapter(ROOT / "models" / "demo", root / "adapters" / "first")
    runs.write_resolved(root / "adapters" / "first", config)
    runs.write_resolved(root / "outputs" / "first", config)
    files.write_json(root / "adapters" / "first" / "serving.json", {"system": 'Answer "briefly".'})
    files.point(root / "adapters" / "last", root / "adapters" / "first")
    files.point(root / "outputs" / "last", root / "outputs" / "first")
    (root / "configs").mkdir()
    (root / "configs" / "run_bnb.yaml").write_text("model: {name: models/demo}\n")
    return root


@pytest.mark.slow
def test_an_ollama_folder_is_written_and_would_be_uploaded(project, command):
    done = command("export", "--format", "ollama", "--type", "q8_0", "--json", SFT_ROOT=str(project))
    assert done.returncode == 0, done.stderr
    report, out = json.loads(done.stdout), project / "outputs" / "export" / "first-ollama"
    assert set(report["files"]) == {"Modelfile", "README.md", "first-q8_0.gguf", "parity.json"}
    assert 0 < report["largest_error"] < 0.05
    assert json.loads((out / "parity.json").read_text())["compared"].keys() == {"safetensors", "gguf", "ollama"}
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith('FROM ./first-q8_0.gguf\nTEMPLATE """{{ $last := "" }}{{ range .Messages }}')
    assert '\nPARAMETER stop "<|im_end|>"\n' in modelfile
    assert "\nPARAMETER temperature 0\n" in modelfile
    assert '\nSYSTEM """Answer "briefly"."""\n' in modelfile
    assert len(gguf.GGUFReader(out / "first-q8_0.gguf").tensors) == report["tensors"] == 50
    sent = command("push", "--repo", "lab/first", "--dry-run", "--json", SFT_ROOT=str(project), HF_TOKEN=TOKEN)
    assert sent.returncode == 0, sent.stderr
    would = json.loads(sent.stdout)
    assert would["files"] == {name: (out / name).stat().st_size for name in report["files"]}
    assert (would["address"], would["private"]) == (None, True)
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    refused = command("push", "--repo", "lab/first", SFT_ROOT=str(project), **nobody)
    assert refused.returncode == 2
    assert "the upload was interrupted" in refused.stderr
    assert TOKEN not in refused.stderr + refused.stdout
    (out / "README.md").write_text(f"my token is {TOKEN}\n")
    leaky = command("push", "--repo", "lab/first", "--dry-run", SFT_ROOT=str(project), HF_TOKEN=TOKEN)
    assert leaky.returncode == 2
    assert "README.md seems to contain a token" in leaky.stderr
    assert TOKEN not in leaky.stderr + leaky.stdout + sent.stderr + sent.stdout


def test_a_folder_of_safetensors_is_loaded_again(project, command):
    done = command("export", "--format", "hf", "--type", "bf16", "--json", SFT_ROOT=str(project))
    assert done.returncode == 0, done.stderr
    out = project / "outputs" / "export" / "first-hf"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert "library_name: transformers" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    wrong = command("push", "--repo", "no-owner", "--folder", out, SFT_ROOT=str(project))
    assert wrong.returncode == 2
    assert "'no-owner' is not a repository name" in wrong.stderr
