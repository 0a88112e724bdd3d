"""Every mistake a user can make: exit 2, one clear message, no traceback, and all files as they were."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import ROOT

Command = Callable[..., CompletedProcess[str]]
ROW = '{"user": "What is 2 + 2?", "assistant": "4"}\n'


@pytest.fixture
def project(tmp_path: Path, tiny_qwen2: Path) -> Path:
    """A project with a config, a model and processed rows."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text(
        f"model: {{name: {tiny_qwen2}, max_seq_len: 64}}\ntuning: {{mode: lora}}\ntrain: {{output_dir: outputs/run}}\n"
    )
    for split in ("train", "val", "test"):
        path = tmp_path / "data" / "processed" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROW)
    return tmp_path


def fingerprint(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def refused(done: CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("error:") == 1
    for part in parts:
        assert part in done.stderr, f"{part!r} not in:\n{done.stderr}"


CONFIGS = {
    "unknown key": ("train:\n  learning_rat: 1e-4\n", [":2", "train.learning_rat", "learning_rate"]),
    "wrong type": ("train:\n  epochs: many\n", [":2", "train.epochs", "many"]),
    "duplicate key": ("train:\n  seed: 1\n  seed: 2\n", [":3", ":2", "seed"]),
    "missing include": ("include: configs/nowhere.yaml\n", ["nowhere.yaml", ":1"]),
    "include cycle": ("include: mine.yaml\n", ["mine.yaml"]),
    "both precisions": ("train:\n  bf16: true\n  fp16: true\n", ["bf16", "fp16"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_config_is_refused_with_its_line(command: Command, project: Path, name: str) -> None:
    text, parts = CONFIGS[name]
    mine = project / "configs" / "mine.yaml"
    mine.write_text(text)
    raw = project / "raw.jsonl"
    raw.write_text(ROW)
    before = fingerprint(project)
    refused(command("process_data", "--config", mine, "--raw_path", raw, SFT_ROOT=str(project)), *parts)
    assert fingerprint(project) == before


FILES = {
    "missing": (None, "raw.jsonl"),
    "empty": (b"", "empty"),
    "not what its name says": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(64), "raw.jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_data_file_is_refused_and_the_old_rows_stay(command: Command, project: Path, name: str) -> None:
    content, parts = FILES[name]
    raw = project / "raw.jsonl"
    if content is not None:
        raw.write_bytes(content)
    before = fingerprint(project)
    config = project / "configs" / "run.yaml"
    refused(command("process_data", "--config", config, "--raw_path", raw, SFT_ROOT=str(project)), parts)
    assert fingerprint(project) == before


def test_faulty_rows_are_quarantined_and_counted(command: Command, project: Path) -> None:
    good = "".join(json.dumps({"user": f"q {n}", "assistant": f"a {n}"}) + "\n" for n in range(40))
    raw = project / "raw.jsonl"
    raw.write_text(good + '{"user": "no answer", "assistant": ""}\n{"user": "broken\n')
    done = command(
        "process_data", "--config", project / "configs" / "run.yaml", "--raw_path", raw, SFT_ROOT=str(project)
    )
    assert done.returncode == 0, done.stderr
    lines = (project / "data" / "processed" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"].rpartition(":")[2] for line in lines] == ["41", "42"]
    ledger = json.loads((project / "data" / "processed" / "ledger.json").read_text())
    assert ledger["rows_read"] == 42 and ledger["rows_written"] == 40


def dry(command: Command, project: Path, *sets: str) -> CompletedProcess[str]:
    flags = [flag for pair in sets for flag in ("--set", pair)]
    return command("train", "--config", project / "configs" / "run.yaml", *flags, SFT_ROOT=str(project))


def test_a_template_with_a_syntax_error_is_refused_with_its_line(command: Command, project: Path) -> None:
    path = project / "bad.jinja"
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}\n")
    before = fingerprint(project)
    refused(dry(command, project, "data.template_path=bad.jinja"), "bad.jinja", ":2")
    assert fingerprint(project) == before


def test_a_template_that_never_shows_the_answer_is_refused(command: Command, project: Path) -> None:
    path = project / "mute.jinja"
    path.write_text("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    before = fingerprint(project)
    refused(dry(command, project, "data.template_path=mute.jinja"), "mute.jinja")
    assert fingerprint(project) == before


def test_a_model_that_is_not_here_is_refused_offline(command: Command, project: Path) -> None:
    before = fingerprint(project)
    refused(dry(command, project, "model.name=nobody/nothing"), "nobody/nothing")
    assert fingerprint(project) == before


def test_an_encoder_cannot_be_tuned_to_answer(command: Command, project: Path) -> None:
    encoder = project / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    before = fingerprint(project)
    refused(dry(command, project, "model.name=encoder", "tuning.mode=qlora"), "encoder")
    assert fingerprint(project) == before


def test_an_output_folder_that_cannot_be_made_is_refused(command: Command, project: Path) -> None:
    (project / "outputs").write_text("a file where the folder should be")
    before = fingerprint(project)
    refused(dry(command, project), "outputs")
    assert fingerprint(project) == before


def test_an_adapter_for_another_base_is_refused(command: Command, project: Path, tiny_gpt2: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).save_pretrained(
        project / "foreign"
    )
    before = fingerprint(project)
    config = project / "configs" / "run.yaml"
    done = command("infer", "--config", config, "--adapters", project / "foreign", stdin="hi\n", SFT_ROOT=str(project))
    refused(done, "foreign")
    assert fingerprint(project) == before


def test_make_refuses_a_variable_that_it_does_not_know() -> None:
    alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # as from a shell

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "-n", *words], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)

    done = make("train", "SEED=3")
    assert done.returncode == 2 and "SEED= is not a variable of this kit" in done.stderr and not done.stdout
    assert make("plan", "GPU=8GiB", "SET=train.seed=3").returncode == 0
