"""`advise`: the decision framework, and a config that trains on the demo model without an edit."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import advise as command_file
from sft.config.load import load
from sft.memory.devices import Device
from sft.preflight.advise import UseCase, measure, recommend, yaml_text
from tests.conftest import ROOT

Command = Callable[..., subprocess.CompletedProcess[str]]
BASE = ROOT / "configs" / "config_base.yaml"
DATA_SETS: dict[str, tuple[str, ...]] = {  # of the shared data -> further flags
    "instruct/identity.json": (),
    "instruct/alpaca_en_demo.json": ("--budget", "high", "--task", "complex"),
    "instruct/gsm8k_test.jsonl": ("--form", "strict", "--budget", "medium"),
    "instruct/truthfulqa.csv": ("--user_col", "Question", "--answer_col", "Best Answer"),
    "instruct/wikisql_text.jsonl": (),
    "chat/sharegpt_dummy.json": ("--latency", "tight"),
}


@pytest.mark.parametrize(
    ("case", "expected", "words"),
    [
        (UseCase(20, "simple"), "prompt engineering", "20 examples are too few"),
        (UseCase(49, "moderate"), "few-shot prompting", "4 examples add about 400 tokens"),
        (UseCase(49, "complex", tight=True), "few-shot prompting", "latency matters"),
        (UseCase(5_000, special=True, facts="daily"), "retrieval", "changes daily"),
        (UseCase(5_000, special=True, facts="monthly"), "PEFT", "a low budget"),
        (UseCase(5_000, strict=True, special=True, facts="weekly"), "PEFT", "by retrieval"),
        (UseCase(60), "PEFT", "100 are the least"),
        (UseCase(500, strict=True, budget="medium"), "full SFT", "500 examples are enough"),
        (UseCase(499, strict=True, budget="medium"), "PEFT", "the usual case"),
        (UseCase(300, "complex", budget="high"), "full SFT", "every weight may change"),
        (UseCase(300, "complex", budget="medium"), "PEFT", "the usual case"),
    ],
)
def test_the_decision_framework(case: UseCase, expected: str, words: str) -> None:
    approach, reasons = recommend(case, row_tokens=100)
    assert approach == expected and words in " ".join(reasons)


def test_a_full_fine_tune_that_does_not_fit_becomes_peft_and_says_so() -> None:
    case = UseCase(5_000, "complex", strict=True, budget="high")
    approach, reasons = recommend(case, lambda: "it needs 49.0 GiB, and the card has 8.0")
    assert approach == "PEFT" and "full SFT would be next, but it needs 49.0 GiB" in " ".join(reasons)


@pytest.mark.parametrize(
    ("answers", "form", "strict"),
    [
        ([json.dumps({"a": n}) for n in range(20)], "json", True),
        ([f"SELECT a FROM b WHERE c = {n}" for n in range(20)], "texts that begin with SELECT", True),
        (["positive", "negative"] * 10, "free", True),  # labels
        ([f"word{n} and some more" for n in range(20)], "free", False),
    ],
)
def test_the_form_of_the_answers_is_measured(answers: list[str], form: str, strict: bool) -> None:
    facts = measure([{"user": f"q{n}", "assistant": text} for n, text in enumerate(answers)], {"train": 20}, [], [])
    assert (facts.form[0], facts.strict, facts.exact) == (form, strict, False)


def test_the_yaml_has_every_value_with_its_reason_and_reads_back(tmp_path: Path) -> None:
    chosen = [
        ("model.name", "a: b", "one"),
        ("tuning.lora.r", 8, "two"),
        ("train.learning_rate", 2e-4, "three"),
        ("tuning.mode", "lora", "four"),
        ("data.columns", {"user": "Best, question: #1"}, "five"),
    ]
    text = yaml_text(["A head"], "base.yaml", chosen)
    assert text.startswith("# A head\ninclude: base.yaml\n\nmodel:\n  name: ")
    assert re.findall(r"  # (\w+)$", text, re.MULTILINE) == ["one", "four", "two", "three", "five"]
    read = yaml.safe_load(text)
    assert read["tuning"] == {"mode": "lora", "lora": {"r": 8}}
    assert read["data"]["columns"]["user"] == "Best, question: #1" and read["model"]["name"] == "a: b"


def test_without_rows_the_number_of_examples_is_enough_for_advice(command: Command, tmp_path: Path) -> None:
    done = command(
        "advise", "--config", BASE, "--examples", 30, "--task", "simple", "--yes", "--json", SFT_ROOT=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["approach"], result["config"]) == ("prompt engineering", None)
    assert not (tmp_path / "configs").exists()


def test_what_no_flag_says_is_asked_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["hard", "complex", "", "spec", "w", "", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    args: Any = command_file.parser().parse_args(["--examples", "700"])
    case = command_file.ask(args, None, Device("cuda", "RTX 4060", 8.0))
    assert case == UseCase(700, "complex", False, True, "weekly", False, "low")


def advised_and_trained(command: Command, root: Path, data: Path, *flags: str) -> dict[str, Any]:
    sets = ["--config", str(BASE), "--raw_path", str(data), "--model", "models/demo", "--gpu", "cpu"]
    done = command("advise", *sets, "--yes", "--json", *flags, SFT_ROOT=str(root))
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    path = root / "configs" / "advised.yaml"
    config = load(path, root=root).config
    assert config.model.name == "models/demo" and config.tuning.mode == result["mode"]
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\s+\w+: \S", line)]
    assert len(lines) >= 14 and all("  # " in line for line in lines)
    few = ["--set", "train.max_steps=2 train.eval_strategy=no"]  # less of the same, for the test's time
    done = command("train", "--config", path, *few, "--json", SFT_ROOT=str(root))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    return result


def test_the_advised_config_trains_without_an_edit_and_has_the_values_of_set(command: Command, tmp_path: Path) -> None:
    own = ("--set", "tuning.lora.r=4 train.seed=7")
    result = advised_and_trained(command, tmp_path, ROOT / "data" / "samples" / "faq.jsonl", *own)
    assert result["rows"]["train"] > 0 and result["fits"]
    text = (tmp_path / "configs" / "advised.yaml").read_text(encoding="utf-8")
    assert re.search(r"^    alpha: 8 +# twice", text, re.MULTILINE)
    assert re.search(r"^    r: 4 +# your choice \(--set\)$", text, re.MULTILINE)
    assert re.search(r"^  seed: 7 +# your choice \(--set\)$", text, re.MULTILINE)


@pytest.mark.slow
def test_preference_pairs_are_advised_dpo(command: Command, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n} and {n}?", "chosen": f"{2 * n}.", "rejected": f"{n}."} for n in range(120)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--budget", "high", "--task", "complex", "--form", "strict")
    result = advised_and_trained(command, tmp_path, tmp_path / "pairs.jsonl", *flags)
    assert (result["approach"], result["mode"]) == ("PEFT", "lora")
    assert "compared with the base" in " ".join(result["reasons"])
    assert load(tmp_path / "configs" / "advised.yaml", root=tmp_path).config.train.objective == "dpo"


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA_SETS)
def test_the_config_advised_for_a_shared_data_set_trains_without_an_edit(
    name: str, command: Command, tmp_path: Path, shared: Path
) -> None:
    result = advised_and_trained(command, tmp_path, shared / name, *DATA_SETS[name])
    assert result["mode"] == ("full" if result["approach"] == "full SFT" else "lora")
