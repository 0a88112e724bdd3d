"""`export` and `push` as a user runs them: each form checked, refusals, and a dry run that shows what would go."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from sft import files, runs
from sft.config.schema import Config, ModelSection, TuningSection
from sft.ship import gguf as ship_gguf
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
    report, out = json.loads(done.stdout), project / "outputs" / "export" / "first-ollama-q8_0"
    assert set(report["files"]) == {"Modelfile", "README.md", "first-q8_0.gguf", "parity.json"}
    assert 0 < report["largest_error"] < 0.05
    assert json.loads((out / "parity.json").read_text())["compared"].keys() == {"safetensors", "gguf", "ollama"}
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith('FROM ./first-q8_0.gguf\nTEMPLATE """{{ $last := "" }}{{ range .Messages }}')
    assert '\nPARAMETER stop "<|im_end|>"\n' in modelfile
    assert "\nPARAMETER temperature 0\n" in modelfile
    assert "\nPARAMETER num_ctx 2048\nPARAMETER num_predict 2048\n" in modelfile  # no answer is cut at 8 tokens
    assert "ollama create first -f Modelfile" in (out / "README.md").read_text()
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
    out = project / "outputs" / "export" / "first-hf-bf16"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "`demo` with a LoRA adapter (r 16, alpha 32) merged into its weights" in card and "adapter for" not in card
    run_code(card, out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    wrong = command("push", "--repo", "no-owner", "--folder", out, SFT_ROOT=str(project))
    assert wrong.returncode == 2
    assert "'no-owner' is not a repository name" in wrong.stderr


def run_code(card: str, folder: Path) -> None:
    """Runs the Python of a model card, as a reader would."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code.replace("THIS_FOLDER", str(folder)), {})


def exported(project: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    """Runs the command's `main`, which spares a process its imports."""
    monkeypatch.setenv("SFT_ROOT", str(project))
    script = runpy.run_path(str(ROOT / "scripts" / "export.py"))
    return script["main"](script["parser"]().parse_args(["--config", str(project / "configs/run_bnb.yaml"), *flags]))


def test_without_llama_cpp_a_k_quant_is_f16_and_the_command_that_quantises_it(project, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    report = exported(project, monkeypatch, "--type", "q4_k_m")
    assert (report["type"], report["llama_cpp"], report["loss"]) == ("f16", None, None)
    out, printed = project / "outputs" / "export" / "first-gguf", capfd.readouterr()
    assert "llama-cpp-python is not installed: the weights are f16" in " ".join(printed.err.split())
    shown = "outputs/export/first-gguf/first"
    assert f"llama-quantize {shown}-f16.gguf {shown}-q4_k_m.gguf Q4_K_M\n" in printed.out
    assert "not measured: pip install llama-cpp-python" in printed.out
    card = (out / "README.md").read_text()
    assert "as a GGUF file (first-f16.gguf)" in card and "llama-server -m first-f16.gguf --jinja" in card
    assert exported(project, monkeypatch, "--type", "q8_0")["out"] == f"{out}-q8_0"
    assert (out / "first-f16.gguf").is_file()  # another type does not replace it


@pytest.mark.parametrize(("kind", "expected"), [
    ("q4_k_m", "cd {out} && ollama create first --quantize q4_K_M -f Modelfile\n"),
    ("q6_k", "llama-quantize {out}/first-f16.gguf {out}/first-q6_k.gguf Q6_K"
     " && sed -i s/-f16.gguf/-q6_k.gguf/ {out}/Modelfile\n"),
])  # fmt: skip
def test_for_ollama_the_command_that_quantises_is_ollamas_where_it_makes_that_type(
    project, monkeypatch, capfd, kind, expected
):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # as if it were not installed
    exported(project, monkeypatch, "--format", "ollama", "--type", kind)
    assert expected.format(out="outputs/export/first-ollama") in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q8_0", *ship_gguf.K_QUANTS])
def test_llama_cpp_gives_the_token_ids_and_what_quantising_costs_is_measured(project, monkeypatch, kind):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    report = exported(project, monkeypatch, "--type", kind)
    path = Path(report["out"]) / f"first-{kind}.gguf"
    assert set(report["files"]) == {path.name, "README.md", "parity.json"}
    assert (report["llama_cpp"], report["parity"]["equal"]) == (llama_cpp.__version__, True)
    loss = report["loss"]
    change = abs(loss["llama_cpp"] - loss["model"]) / loss["model"]
    assert change < 1e-3 if kind == "f16" else 0 < change < 0.2
    kinds = {tensor.tensor_type.name[0] for tensor in gguf.GGUFReader(path).tensors}
    assert ("Q" in kinds) == (kind != "f16")
