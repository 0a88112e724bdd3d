"""What TensorBoard and log.jsonl hold, before and after a resume."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from sft import runs
from sft.config.load import load
from sft.config.schema import Config
from sft.errors import ConfigError, EnvironmentProblem
from sft.training import loggers
from tests.training import project


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def write(tmp_path: Path, after: int, steps: range, offset: float) -> None:
    logger = loggers.Loggers(tmp_path / "log.jsonl", tmp_path / "tb", after_step=after)
    for step in steps:
        logger.entry(step, {"eval_loss": step + offset})
    logger.close(steps[-1], {}, {})


def test_a_resumed_run_leaves_one_curve_without_overlap(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6), 0.0)
    write(tmp_path, 3, range(4, 7), 0.5)  # resumed at checkpoint-3
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert scalars(tmp_path / "tb", "eval/loss") == expected
    assert [(entry["step"], entry["eval/loss"]) for entry in runs.read_log(tmp_path / "log.jsonl")] == expected


def test_an_incomplete_line_of_a_crash_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/lo', encoding="utf-8")
    assert runs.read_log(path) == [{"step": 1, "train/loss": 2.0}]
    loggers.Loggers(path, after_step=5).entry(3, {"eval_loss": 1.0})
    assert [entry["step"] for entry in runs.read_log(path)] == [1, 3]


def test_a_disk_that_refuses_tensorboards_last_file_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr(SummaryWriter, "add_hparams", refuse)
    logger = loggers.Loggers(tmp_path / "log.jsonl", tmp_path / "tb")
    logger.close(7, {"rows": 1}, {"hparam/loss": 1.0})
    assert "TensorBoard's curves end at step 7 (no space left on the device)" in caplog.text


def test_entries_are_logged_under_their_public_names() -> None:
    logs = {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0, "eval_rougeL": 0.5, "epoch": 1, "other": 3}
    assert loggers.public_names(logs) == {
        "train/loss": 1.0,
        "train/lr": 0.1,
        "train/grad_norm": 2.0,
        "train/epoch": 1.0,
        "eval/rougeL": 0.5,
    }


def test_log_jsonl_is_valid_json_where_a_number_is_not_finite(tmp_path: Path) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    path = tmp_path / "log.jsonl"
    loggers.Loggers(path).entry(1, {"grad_norm": float("inf"), "eval_loss": 2.0, "eval_x": float("nan")})
    (line,) = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "train/grad_norm": None,
        "eval/loss": 2.0,
        "eval/x": None,
    }


def wandb_steps(root: Path, tag: str) -> list[int]:
    """Steps of the offline runs' records, in files of framed protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for path in sorted(root.glob("outputs/wandb/offline-run-*/*.wandb")):
        data, offset, message = path.read_bytes(), 7, b""
        while offset + 7 <= len(data):
            length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
            message += data[offset + 7 : offset + 7 + length]
            offset += 7 + length
            if kind in (1, 4):  # a whole message, or the last part of one
                items = {"".join(item.nested_key) or item.key: item for item in Record.FromString(message).history.item}
                steps += [int(items["_step"].value_json)] if tag in items else []
                message = b""
    return steps


def mlflow_steps(root: Path, tag: str) -> list[int]:
    import yaml

    (run,) = (yaml.safe_load(path.read_text()) for path in root.glob("outputs/mlflow/*/*/meta.yaml"))
    lines = next(root.glob(f"outputs/mlflow/*/{run['run_id']}/metrics/{tag}")).read_text(encoding="utf-8").splitlines()
    return [int(line.split()[2]) for line in lines]


def trackio_steps(root: Path, tag: str) -> list[int]:
    import sqlite3

    with sqlite3.connect(root / "outputs" / "trackio" / "sft-play.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    return [step for _, step, metrics in rows if tag in json.loads(metrics)]


STEPS_OF = {"wandb": wandb_steps, "mlflow": mlflow_steps, "trackio": trackio_steps}


@pytest.mark.parametrize("name", STEPS_OF)
def test_a_resumed_run_continues_its_local_run_of_every_tracker(
    name: str,
    tmp_path: Path,
    tiny_qwen2: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if find_spec(name) is None or (name == "mlflow" and find_spec("sqlalchemy")):
        pytest.skip(f"{name} is not installed (mlflow: as mlflow-skinny, which writes plain files)")
    root = project.make(tmp_path, tiny_qwen2)
    sets = ["--set", "train.max_steps=4", "--set", f"logging.backends=[tensorboard,{name}]"]
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for _ in range(2):
        done = command("train", "--config", "config.yaml", *sets, "--json", cwd=root, SFT_ROOT=str(root))
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["steps"] == 4
        (root / "outputs" / "t" / "finished.json").unlink()
        shutil.rmtree(root / "outputs" / "t" / "checkpoint-4")
    assert f"{name}: the same run as before" in done.stderr
    logged = {entry["step"] for entry in runs.read_log(root / "outputs" / "t" / "log.jsonl") if "eval/loss" in entry}
    assert sorted(set(STEPS_OF[name](root, "eval/loss"))) == sorted(logged) == [2, 4]
    assert len(STEPS_OF[name](root, "train/loss")) <= 4  # steps 1, 2, 4; the last one may come twice


def test_a_tracker_that_is_not_installed_is_an_error_that_says_how_to_install_it() -> None:
    with pytest.raises(EnvironmentProblem, match="no_such_tracker is not installed") as caught:
        loggers.require_installed(["tensorboard", "no_such_tracker"])
    assert caught.value.fix and "pip install no_such_tracker" in caught.value.fix


def test_a_tracker_that_fails_in_the_middle_ends_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def log(self, *_: object, **__: object) -> None:
            raise OSError("no space left on the device")

    trackers = loggers.Trackers(["wandb"], runs.at(tmp_path / "outputs" / "t", tmp_path), Config())
    trackers.started, trackers.records, trackers._last = {"wandb": Full()}, {"wandb": {}}, {"wandb": -1}
    logger = loggers.Loggers(tmp_path / "log.jsonl", trackers=trackers)
    logger.entry(1, {"eval_loss": 1.0})
    logger.entry(2, {"eval_loss": 2.0})
    assert caplog.text.count("wandb ends at step 1 (no space left on the device)") == 1
    assert [entry["eval/loss"] for entry in runs.read_log(tmp_path / "log.jsonl")] == [1.0, 2.0]


def test_other_spellings_of_the_backends(tmp_path: Path) -> None:
    base = Path(__file__).parents[2] / "configs" / "config_base.yaml"
    for text, expected in {
        "logging.backend=none": [],
        "logging.backend=tensorboard": ["tensorboard"],
        "logging.backends=tensorboard,mlflow": ["tensorboard", "mlflow"],
        "logging.backends=[wandb]": ["wandb"],
        "logging.backends=[]": [],
    }.items():
        assert load(base, [text], root=tmp_path).config.logging.backends == expected
    with pytest.raises(ConfigError, match=r"logging\.backends"):
        load(base, ["logging.backends=wandbb"], root=tmp_path)
