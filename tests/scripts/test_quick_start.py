"""What the quick start decides, and (slow, in `make test-all`) whole runs on the demo model and on real files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import quick_start
from sft.config.load import load
from sft.errors import DataError
from sft.preflight import advise
from tests.conftest import ROOT

Command = Callable[..., CompletedProcess[str]]
slow = pytest.mark.slow


def empty_project(root: Path) -> Path:
    sample = root / quick_start.SAMPLE
    sample.parent.mkdir(parents=True)
    sample.write_text('{"user": "a", "assistant": "b"}\n')
    return root


def test_without_a_gpu_the_real_model_is_the_default_from_the_hub_or_else_from_the_package_index() -> None:
    from_hub = advise.choices(None, 0.0, [], hub=True, index=True)
    assert [name for name, _ in from_hub] == [quick_start.SMALL, quick_start.DEMO]
    from_index = advise.choices(None, 0.0, [], hub=False, index=True)
    assert [name for name, _ in from_index] == [quick_start.SMALL_PACKAGE, quick_start.DEMO]
    assert "the hub is out of reach" in from_index[0][1]
    alone = advise.choices(None, 0.0, [], hub=False, index=False)
    assert [name for name, _ in alone] == [quick_start.DEMO]
    assert "neither the model hub nor the package index can be reached" in alone[0][1]


def test_each_model_is_offered_with_the_time_that_training_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advise.hub, "cached", lambda name, revision: tmp_path)
    times = {quick_start.SMALL: "about 6 min", quick_start.DEMO: "about 2 min"}
    offers = advise.models_for(None, 0.0, tmp_path, times)
    assert [reason.rpartition("; ")[2] for _, reason in offers] == ["about 6 min", "about 2 min"]


def test_with_a_gpu_the_first_that_fits_is_the_default_and_the_demo_the_last() -> None:
    fitting = ["Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"]
    offers = advise.choices("RTX 4060", 8.0, fitting, hub=True, index=False)
    assert [name for name, _ in offers] == [*fitting, quick_start.SMALL, quick_start.DEMO]
    assert offers[0][1] == "fits RTX 4060 (8 GiB) in 4-bit"
    offline = advise.choices("RTX 4060", 8.0, fitting, hub=False, index=True)
    assert [name for name, _ in offline] == [quick_start.SMALL_PACKAGE, quick_start.DEMO]


def test_the_times_come_from_the_rows_tokens_and_the_speed(tmp_path: Path) -> None:
    raw = tmp_path / "mine.jsonl"
    rows = [{"question": "q" * 33 + str(n), "answer": "a" * 31} for n in range(10)]
    raw.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"image": "x"}]))
    assert quick_start.count_tokens(tmp_path, raw) == (10, round(650 / 3.3) + 200)
    assert quick_start.time_text(10, 5000, 200.0, 1) == "about 80 s on this machine"  # 60 + 0.8 * 5,000 / 200
    assert quick_start.time_text(10, 5000, 200.0, 0) == "about 3 min on this machine"  # auto: 5 epochs
    assert quick_start.time_text(999, 150_000, 100.0, 0).startswith("about 1 h 41 min on this machine, or a part")
    (tmp_path / "table.csv").write_text("Frage eins,Antwort zwei\na,b\n")
    assert quick_start.count_tokens(tmp_path, tmp_path / "table.csv") == (0, 0)
    assert "once your rows are read" in quick_start.time_text(0, 0, 100.0, 0)


def test_the_measured_speed_is_that_of_the_demo_models_training_step_up_to_a_small_factor() -> None:
    description = json.loads((ROOT / quick_start.DEMO / "config.json").read_text())
    deeper = {**description, "num_hidden_layers": 40, "layer_types": ["full_attention"] * 40}
    speeds = [quick_start.cpu_speed(each, bf16=False) for each in (description, deeper)]
    assert 2 < speeds[0] / speeds[1] < 40  # 4 layers against 40, of which 3 are computed


def test_the_folder_for_the_users_file_is_in_a_fresh_clone() -> None:
    tracked = subprocess.run(["git", "ls-files", "data/raw"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("no git here")
    assert tracked.stdout.split() == ["data/raw/.gitkeep"]


def test_an_empty_raw_folder_gets_the_samples_and_says_so(tmp_path: Path) -> None:
    raw, origin = quick_start.raw_data(empty_project(tmp_path))
    assert raw == tmp_path / "data" / "raw" / "raw.jsonl"
    assert raw.read_text() == (tmp_path / quick_start.SAMPLE).read_text()
    assert "was empty" in origin


def test_the_users_own_file_is_taken_and_never_overwritten(tmp_path: Path) -> None:
    own = empty_project(tmp_path) / "data" / "raw" / "mine.csv"
    own.parent.mkdir(parents=True)
    own.write_text("question,answer\na,b\n")
    assert quick_start.raw_data(tmp_path) == (own, "yours")
    assert own.read_text() == "question,answer\na,b\n"
    assert sorted(path.name for path in own.parent.iterdir()) == ["mine.csv"]


def test_several_files_are_not_guessed_between(tmp_path: Path) -> None:
    folder = empty_project(tmp_path) / "data" / "raw"
    folder.mkdir(parents=True)
    for name in ("a.json", "b.json"):
        (folder / name).write_text("[]")
    with pytest.raises(DataError, match=r"several files: a\.json, b\.json"):
        quick_start.raw_data(tmp_path)


def test_edits_of_local_yaml_stay_and_a_new_file_of_data_is_used(command: Command, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("local.yaml*"))
    empty_project(tmp_path)
    local, own = tmp_path / quick_start.LOCAL, tmp_path / "data" / "raw" / "mine.csv"
    own.parent.mkdir(parents=True)
    own.write_text("Frage eins,Antwort zwei\n" + "".join(f"Was ist {n}?,Es ist {n}.\n" for n in range(20)))
    for flags in (("--yes", "--demo"), ("--yes",)):  # the first stops at the columns, and so does the second
        done = command("quick_start", *flags, SFT_ROOT=str(tmp_path))
        assert done.returncode == 2 and "the quick start stopped at: process the data" in done.stderr
        assert "raw_path: data/raw/mine.csv" in local.read_text()
        local.write_text(local.read_text() + "  seed: 7  # mine\n")
    assert local.read_text().count("seed: 7  # mine") == 2
    local.write_text(local.read_text().replace("  seed: 7  # mine\n", "", 1) + "# columns: later\n")
    edited = local.read_text()
    (own.parent / "raw.jsonl").write_bytes((tmp_path / quick_start.SAMPLE).read_bytes())  # the sample gives way
    own.rename(own.with_name("other.csv"))
    assert quick_start.follow_data(tmp_path) == "data/raw/other.csv (yours)"
    assert local.read_text() == edited.replace("mine.csv", "other.csv")
    assert quick_start.earlier_model(tmp_path, demo=True) is not None
    columns = ("--user_col", "Frage eins", "--answer_col", "Antwort zwei")  # as the fix of the failed start says
    assert command("process_data", *columns, SFT_ROOT=str(tmp_path)).returncode == 0
    assert load(local, root=tmp_path).config.data.columns.user == "Frage eins"
    local.write_text(edited.replace("models/demo", "me/other"))
    assert quick_start.earlier_model(tmp_path, demo=True) is None and not local.exists()
    assert len(list(local.parent.glob("local.yaml.*.bak"))) == 1


@pytest.mark.parametrize(
    "name", ["mine.ndjson", "mine.jsonl.gz", "mine.csv.zst", "RAW.JSONL", "Mine.Parquet", "mine.TSV"]
)
def test_the_users_file_is_used_whatever_its_suffix_or_case(tmp_path: Path, name: str) -> None:
    own = empty_project(tmp_path) / "data" / "raw" / name
    own.parent.mkdir(parents=True)
    own.write_text("x")
    assert quick_start.raw_data(tmp_path) == (own, "yours")


def test_of_several_files_the_one_called_raw_is_used(tmp_path: Path) -> None:
    folder = empty_project(tmp_path) / "data" / "raw"
    folder.mkdir(parents=True)
    for name in ("raw.csv", "RAW.jsonl.gz", "other.jsonl"):
        (folder / name).write_text("x")
    assert quick_start.raw_data(tmp_path) == (folder / "RAW.jsonl.gz", "yours")


def test_files_that_cannot_be_read_are_an_error_and_never_replaced_by_the_sample(tmp_path: Path) -> None:
    folder = empty_project(tmp_path) / "data" / "raw"
    folder.mkdir(parents=True)
    (folder / "notes.docx").write_text("x")
    with pytest.raises(DataError, match=r"no file of rows, only: notes\.docx"):
        quick_start.raw_data(tmp_path)


@pytest.mark.parametrize("name", ["my #1: rows.jsonl", "- x.jsonl", "{a}.jsonl", "'quoted'.jsonl", "007.jsonl"])
def test_local_yaml_loads_the_same_path_whatever_characters_it_holds(tmp_path: Path, name: str) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / name).write_text("x")
    quick_start.write_config(tmp_path, "me/yes: #1", tmp_path / "data" / "raw" / name, on_gpu=True)
    config = load(tmp_path / quick_start.LOCAL, root=tmp_path).config
    assert config.data.raw_path == f"data/raw/{name}" and config.model.name == "me/yes: #1"


@pytest.mark.parametrize("ours", [True, False])
def test_the_sample_is_trained_on_for_one_epoch_on_a_cpu_and_other_rows_for_auto(tmp_path: Path, ours: bool) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("local.yaml*"))
    empty_project(tmp_path)
    raw = quick_start.raw_data(tmp_path)[0]
    if not ours:
        raw.write_text('{"user": "mine", "assistant": "b"}\n')
    quick_start.write_config(tmp_path, quick_start.SMALL, raw, on_gpu=False, fp32="faster")
    config = load(tmp_path / quick_start.LOCAL, root=tmp_path).config
    assert (config.train.epochs, config.train.bf16) == (1 if ours else "auto", False)
    assert (config.tuning.mode, config.model.device_map, config.train.output_dir) == (
        "lora",
        "cpu",
        "outputs/quick-start",
    )
    raw.write_text('{"user": "another", "assistant": "b"}\n')  # the sample gives way to the user's rows
    assert quick_start.follow_data(tmp_path) == "data/raw/raw.jsonl (yours)"
    config = load(tmp_path / quick_start.LOCAL, root=tmp_path).config
    assert (config.train.epochs, config.train.bf16) == ("auto", False)


def test_a_model_that_cannot_be_downloaded_is_replaced_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that downloads fails, as with a network that ends after the choice."""
    (tmp_path / "configs").mkdir()
    raw = empty_project(tmp_path) / "data" / "raw" / "raw.jsonl"
    raw.parent.mkdir(parents=True)
    raw.write_text('{"user": "a", "assistant": "b"}\n')
    offers = [(quick_start.SMALL, "the default"), (quick_start.DEMO, "the demo")]
    monkeypatch.setattr(quick_start, "offered_models", lambda root, raw: (offers, False, ""))
    monkeypatch.setattr(quick_start, "in_child", lambda function, *arguments: function(*arguments))
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert quick_start.choose_model(tmp_path, raw, demo=False, interactive=False) == quick_start.DEMO
    warnings = capsys.readouterr().err
    assert (
        f"{quick_start.SMALL} cannot be downloaded (see above): going on with {quick_start.SMALL_PACKAGE}" in warnings
    )
    assert f"going on with {quick_start.DEMO}" in warnings
    assert "include: configs/demo_cpu.yaml" in (tmp_path / quick_start.LOCAL).read_text()


def test_long_training_is_capped_in_local_yaml_but_never_against_the_users_own_number(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("local.yaml*"))
    raw = empty_project(tmp_path) / "data" / "raw" / "raw.jsonl"
    raw.parent.mkdir(parents=True)
    raw.write_text(
        "".join(json.dumps({"user": f"What is {n}?", "assistant": f"It is {n}."}) + "\n" for n in range(100))
    )
    local = tmp_path / quick_start.LOCAL
    quick_start.write_config(tmp_path, quick_start.DEMO, raw, on_gpu=False)
    assert command("process_data", SFT_ROOT=str(tmp_path)).returncode == 0
    written = local.read_text()
    monkeypatch.setattr(quick_start, "in_child", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(quick_start, "cpu_speed", lambda *_, **__: 1e6)
    assert quick_start.say_time(tmp_path, interactive=False)  # on the CPU
    assert quick_start.bounds(tmp_path, on_cpu=True) == ["--limit", "50"]  # rows of the user's own
    assert local.read_text() == written
    shown = capsys.readouterr().out
    steps = int(re.search(r"training: (\d+) steps", shown)[1])  # type: ignore[index]
    assert steps >= 60 and "at 1,000,000 tokens/s" in shown
    tokens = int(re.search(r"steps, ([\d,]+) tokens", shown)[1].replace(",", ""))  # type: ignore[index]
    monkeypatch.setattr(quick_start, "cpu_speed", lambda *_, **__: tokens / 3600)  # an hour
    local.write_text(written + "  epochs: 6\n")
    quick_start.say_time(tmp_path, interactive=False)
    assert load(local, root=tmp_path).config.train.max_steps is None
    local.write_text(written.replace("train:\n", "train:\n  epochs: auto\n"))
    quick_start.say_time(tmp_path, interactive=False)
    capped = load(local, root=tmp_path).config.train
    assert capped.max_steps is not None and "train.max_steps" in capsys.readouterr().out
    quick_start.say_time(tmp_path, interactive=False)  # a second start changes nothing
    assert load(local, root=tmp_path).config.train == capped


def bars(metrics: dict[str, Any]) -> None:
    """What the demo's tuned model must reach on its test split."""
    base, tuned, constant = metrics["base"], metrics["tuned"], metrics["constant"]
    assert metrics["rows"] >= 50
    assert base["exact_match"] <= 0.10 and tuned["exact_match"] >= 0.90
    assert tuned["rougeL"] >= 0.6 and tuned["rougeL"] >= 3 * base["rougeL"]
    assert tuned["rougeL"] >= constant["rougeL"] + 0.3 and constant["exact_match"] <= 0.10
    assert tuned["stop_rate"] >= 0.95


@slow
def test_the_quick_start_ends_with_a_tuned_model_that_passes_the_bars(command: Command, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("local.yaml*"))
    shutil.copytree(ROOT / "data" / "samples", tmp_path / "data" / "samples")
    done = command("quick_start", "--yes", "--demo", SFT_ROOT=str(tmp_path), OMP_NUM_THREADS="2", timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "What to do next" in done.stdout
    assert (tmp_path / "configs" / "local.yaml").exists()
    bars(json.loads((tmp_path / "outputs" / "metrics.json").read_text()))


@slow
def test_ctrl_c_while_the_quick_start_trains_leaves_a_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("local.yaml*"))
    shutil.copytree(ROOT / "data" / "samples", tmp_path / "data" / "samples")
    line = [sys.executable, str(ROOT / "scripts" / "quick_start.py"), "--yes", "--demo"]
    started = subprocess.Popen(
        line, env={**os.environ, "SFT_ROOT": str(tmp_path)}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    log = tmp_path / "outputs" / "quick-start" / "log.jsonl"
    while started.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does: to the quick start and to the training
    output = started.communicate(timeout=120)[0]
    assert started.returncode == 130, output[-2000:]
    assert "Continue with" in output and list((tmp_path / "outputs" / "quick-start").glob("checkpoint-*"))


@slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_holds_its_bars_for_three_seeds(command: Command, tmp_path: Path, seed: int) -> None:
    config = ROOT / "configs" / "demo_cpu.yaml"
    raw = ROOT / "data" / "samples" / "support_desk.jsonl"
    env = {"SFT_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    flags = ("--config", config, "--set", f"train.seed={seed}")
    assert command("process_data", *flags, "--raw_path", raw, **env).returncode == 0
    trained = command("train", *flags, timeout=900, **env)
    assert trained.returncode == 0, trained.stderr[-2000:]
    scored = command("eval", *flags, "--split", "test", "--both", "--json", **env)
    assert scored.returncode == 0, scored.stderr[-2000:]
    bars(json.loads(scored.stdout))


@slow
@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "gsm8k_train.jsonl", "truthfulqa.csv"])
def test_real_files_go_from_raw_rows_to_scores(command: Command, shared: Path, tmp_path: Path, name: str) -> None:
    env = {"SFT_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    flags: list[Any] = ["--config", ROOT / "configs" / "demo_cpu.yaml", "--set", "tuning.mode=qlora"]
    flags += ["--set", "train.max_steps=200", "--set", "train.epochs=100", "--set", "train.eval_strategy=no"]
    flags += ["--set", "logging.log_interval=1"]
    if name == "truthfulqa.csv":
        flags += ["--set", "data.columns.user=Question", "--set", "data.columns.assistant=Best Answer"]
    processed = command("process_data", *flags, "--raw_path", shared / "instruct" / name, "--json", **env)
    assert processed.returncode == 0, processed.stderr
    trained = command("train", *flags, timeout=900, **env)
    assert trained.returncode == 0, trained.stderr[-2000:]
    log = (tmp_path / "outputs" / "demo" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 200
    assert sum(losses[-20:]) <= 0.8 * sum(losses[:20])
    assert command("eval", *flags, "--split", "val", "--limit", "8", **env).returncode == 0
    questions = tmp_path / "in.txt"
    questions.write_text("What is 2 + 2?\nName a colour.\n")
    batch = ("--mode", "batch", "--input_file", questions, "--output_file", tmp_path / "out.txt")
    assert command("infer", *flags, *batch, **env).returncode == 0
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 2
    assert command("merge_lora", *flags, "--out", tmp_path / "merged", "--dtype", "fp16", **env).returncode == 0


@slow
def test_a_broken_data_set_does_not_stop_the_others(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps({"question": f"q {n}", "answer": f"a {n}"}) + "\n" for n in range(20)))
    bad.write_text("not json at all\n")
    done = subprocess.run(
        [str(ROOT / "workflows" / "batch_process.sh"), str(bad), str(good)],
        env={**os.environ, "SFT_ROOT": str(tmp_path), "CONFIG": str(ROOT / "configs" / "demo_cpu.yaml")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "bad: failed at process (exit 2)" in done.stdout and "good: done" in done.stdout
    assert (tmp_path / "outputs" / "batch" / "good" / "train.jsonl").exists()
    assert not (tmp_path / "data").exists()  # `make process` replaces data/processed as a whole
