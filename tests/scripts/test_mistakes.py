"""Every mistake a user can make: exit 2, one clear message, no traceback, and all files as they were."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from sft.errors import SftError
from tests.conftest import ROOT

Command = Callable[..., CompletedProcess[str]]
Refused = Callable[..., None]
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


@pytest.fixture
def refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a command in this process: it must end with an error that names every one of `parts`, and write nothing."""

    def check(name: str, flags: list[object], *parts: str) -> None:
        monkeypatch.setenv("SFT_ROOT", str(project))
        before, module = fingerprint(project), importlib.import_module(name)
        parser = getattr(module, "build_parser", None) or module.parser
        arguments = parser().parse_args([*map(str, flags)])
        with pytest.raises(SftError) as raised:
            module.main(arguments)
        assert raised.value.exit_code == 2
        assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)
        assert fingerprint(project) == before

    return check


CONFIGS = {
    "unknown key": ("train:\n  learning_rat: 1e-4\n", [":2", "train.learning_rat", "learning_rate"]),
    "wrong type": ("train:\n  epochs: many\n", [":2", "train.epochs", "many"]),
    "duplicate key": ("train:\n  seed: 1\n  seed: 2\n", [":3", ":2", "seed"]),
    "missing include": ("include: configs/nowhere.yaml\n", ["nowhere.yaml", ":1"]),
    "include cycle": ("include: mine.yaml\n", ["mine.yaml"]),
    "both precisions": ("train:\n  bf16: true\n  fp16: true\n", ["bf16", "fp16"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_config_is_refused_with_its_line(refused: Refused, project: Path, name: str) -> None:
    text, parts = CONFIGS[name]
    mine = project / "configs" / "mine.yaml"
    mine.write_text(text)
    (project / "raw.jsonl").write_text(ROW)
    refused("process_data", ["--config", mine, "--raw_path", project / "raw.jsonl"], *parts)


def test_a_command_ends_with_2_one_error_and_no_traceback(command: Command, project: Path) -> None:
    mine = project / "configs" / "mine.yaml"
    mine.write_text(CONFIGS["unknown key"][0])
    done = command("process_data", "--config", mine, SFT_ROOT=str(project))
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr + done.stdout


FILES = {
    "missing": (None, "raw.jsonl"),
    "empty": (b"", "empty"),
    "not what its name says": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(64), "raw.jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_data_file_is_refused_and_the_old_rows_stay(refused: Refused, project: Path, name: str) -> None:
    content, part = FILES[name]
    raw = project / "raw.jsonl"
    if content is not None:
        raw.write_bytes(content)
    refused("process_data", ["--config", project / "configs" / "run.yaml", "--raw_path", raw], part)


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


def train_with(project: Path, *sets: str) -> list[object]:
    return ["--config", project / "configs" / "run.yaml", *(flag for pair in sets for flag in ("--set", pair))]


def test_a_template_with_a_syntax_error_is_refused_with_its_line(refused: Refused, project: Path) -> None:
    (project / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}\n")
    refused("train", train_with(project, "data.template_path=bad.jinja"), "bad.jinja", ":2")


def test_a_template_that_never_shows_the_answer_is_refused(refused: Refused, project: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    (project / "mute.jinja").write_text(template)
    refused("train", train_with(project, "data.template_path=mute.jinja"), "mute.jinja")


def test_a_model_that_is_not_here_is_refused_offline(refused: Refused, project: Path) -> None:
    refused("train", train_with(project, "model.name=nobody/nothing"), "nobody/nothing")


def test_an_encoder_cannot_be_tuned_to_answer(refused: Refused, project: Path) -> None:
    encoder = project / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]}))
    refused("train", train_with(project, "model.name=encoder", "tuning.mode=qlora"), "encoder")


def test_an_output_folder_that_cannot_be_created_is_refused(refused: Refused, project: Path) -> None:
    (project / "outputs").write_text("a file where the folder should be")
    refused("train", train_with(project), "outputs")


def test_an_adapter_for_another_base_is_refused(refused: Refused, project: Path, tiny_gpt2: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    settings = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(model, settings).save_pretrained(project / "foreign")
    refused("infer", [*train_with(project), "--adapters", project / "foreign"], "foreign")


def test_make_refuses_a_variable_that_it_does_not_know() -> None:
    alone = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # as from a shell

    def make(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "-n", *words], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)

    done = make("train", "SEED=3")
    assert done.returncode == 2 and "SEED= is not a variable of this kit" in done.stderr and not done.stdout
    assert make("plan", "GPU=8GiB", "SET=train.seed=3").returncode == 0
