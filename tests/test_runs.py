"""Which run and checkpoint `train` resumes, run names, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sft import files, runs
from sft.errors import ConfigError, RunError, Stopped


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(f"weights of step {step}")
    files.write_manifest(path)
    return path


def finished(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / runs.FINISHED).write_text("{}")


def test_the_first_run_takes_the_name_of_its_folder(tmp_path: Path) -> None:
    opened = runs.open_run("outputs/chat", tmp_path, "auto")
    assert opened.run == runs.Run(
        "chat", tmp_path / "outputs/chat", tmp_path / "adapters/chat", tmp_path / "outputs/tb/chat"
    )
    assert (opened.checkpoint, opened.message) == (None, "a new run: outputs/chat")
    assert list(tmp_path.iterdir()) == []


def test_auto_resumes_the_newest_unfinished_run_at_its_newest_checkpoint(tmp_path: Path) -> None:
    finished(tmp_path / "outputs/chat")
    finished(tmp_path / "outputs/chat-2")
    for step in (20, 100, 30):
        checkpoint(tmp_path / "outputs/chat-10", step)
    opened = runs.open_run("outputs/chat", tmp_path, "auto")
    assert opened.checkpoint == tmp_path / "outputs/chat-10/checkpoint-100"
    assert opened.message == "resuming outputs/chat-10 at checkpoint-100"


def test_a_place_that_cannot_hold_a_run_is_refused_at_once(tmp_path: Path) -> None:
    runs.check_place("outputs/chat", tmp_path)
    (tmp_path / "outputs").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot be written to .*is a file"):
        runs.check_place("outputs/chat", tmp_path)


def test_auto_gives_a_new_name_when_the_newest_run_is_finished(tmp_path: Path) -> None:
    finished(tmp_path / "outputs/chat")
    opened = runs.open_run("outputs/chat", tmp_path, "auto")
    assert (opened.run.name, opened.checkpoint) == ("chat-2", None)
    assert opened.message == "chat is finished, so this is a new run: outputs/chat-2"


def test_auto_starts_a_run_without_checkpoints_again_in_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "outputs/chat").mkdir(parents=True)
    (tmp_path / "outputs/chat/log.jsonl").touch()
    opened = runs.open_run("outputs/chat", tmp_path, "auto")
    assert (opened.run.name, opened.checkpoint) == ("chat", None)
    assert "no checkpoint yet: it starts again at step 0" in opened.message


def test_never_takes_the_next_free_name(tmp_path: Path) -> None:
    checkpoint(tmp_path / "outputs/chat", 5)
    (tmp_path / "outputs/chat-3").mkdir()
    assert runs.open_run("outputs/chat", tmp_path, "never").run.name == "chat-4"
    assert runs.open_run("outputs/other", tmp_path, "never").run.name == "other"


def test_a_run_of_another_name_is_no_member_of_the_series(tmp_path: Path) -> None:
    finished(tmp_path / "outputs/chat")
    checkpoint(tmp_path / "outputs/chat-model", 5)
    (tmp_path / "outputs/chat-7").write_text("a file")
    assert runs.open_run("outputs/chat", tmp_path, "auto").run.name == "chat-2"


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.unlink(), "weights is missing"),
        (lambda path: path.write_text("w"), "weights has 1 bytes, not 17"),
        (lambda path: path.write_text("weights of step 3"), "weights has changed"),
        (lambda path: (path.parent / files.MANIFEST).unlink(), "manifest.json is missing"),
        (lambda path: (path.parent / files.MANIFEST).write_text('{"files": '), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path: Path, harm, reason: str) -> None:
    first = checkpoint(tmp_path / "outputs/chat", 1)
    harm(checkpoint(tmp_path / "outputs/chat", 2) / "weights")
    opened = runs.open_run("outputs/chat", tmp_path, "auto")
    assert opened.checkpoint == first
    assert f"skipped checkpoint-2: {reason}" in opened.message


def test_checkpoints_that_are_all_damaged_are_an_error_and_no_restart(tmp_path: Path) -> None:
    (checkpoint(tmp_path / "outputs/chat", 1) / "weights").unlink()
    with pytest.raises(RunError, match="all checkpoints of chat are damaged: checkpoint-1: weights is missing"):
        runs.open_run("outputs/chat", tmp_path, "auto")


def test_a_path_names_a_run_or_a_checkpoint_and_must_be_there(tmp_path: Path) -> None:
    one, two = checkpoint(tmp_path / "outputs/chat", 1), checkpoint(tmp_path / "outputs/chat", 2)
    assert runs.open_run("outputs/x", tmp_path, str(one)).checkpoint == one
    opened = runs.open_run("outputs/x", tmp_path, str(tmp_path / "outputs/chat"))
    assert (opened.run.name, opened.checkpoint) == ("chat", two)
    with pytest.raises(RunError, match=r"there is no run or checkpoint folder .*outputs/nowhere"):
        runs.open_run("outputs/x", tmp_path, "outputs/nowhere")
    finished(tmp_path / "outputs/chat")
    with pytest.raises(RunError, match="chat is finished"):
        runs.open_run("outputs/x", tmp_path, str(one))


def test_a_run_may_not_have_a_reserved_name(tmp_path: Path) -> None:
    for name in ("outputs/tb", "outputs/last"):
        with pytest.raises(ConfigError):
            runs.open_run(name, tmp_path, "auto")


def test_links_point_to_the_newest_run_and_move(tmp_path: Path) -> None:
    for name, adapter in (("a", True), ("b", False)):
        run = runs.at(tmp_path / "outputs" / name, tmp_path)
        run.folder.mkdir(parents=True)
        if adapter:
            run.adapter_dir.mkdir(parents=True)
        runs.point_last(run, tmp_path)
    assert runs.last_run(tmp_path).name == "b"
    assert (tmp_path / "adapters/last").readlink() == Path("a")


def test_no_finished_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run has finished yet"):
        runs.last_run(tmp_path)


def test_running_lists_the_runs_whose_lock_is_held(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / runs.LOCK).touch()
    with files.lock(tmp_path / "outputs/b" / runs.LOCK, "b"):
        assert [run.name for run in runs.running(tmp_path)] == ["b"]
    assert runs.running(tmp_path) == []


def test_the_newest_unfinished_run_is_found_whatever_its_config(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no unfinished run to resume"):
        runs.unfinished(tmp_path)
    for age, name in enumerate(("new", "done", "old")):
        folder = tmp_path / "outputs" / name
        checkpoint(folder, 3)
        for file in (runs.RESOLVED, "log.jsonl"):
            (folder / file).touch()
            os.utime(folder / file, (1_000_000 - age, 1_000_000 - age))
    merged = tmp_path / "outputs/merged_fp16"  # weights that `make merge` left, newer than any run
    merged.mkdir()
    for file in (runs.RESOLVED, "config.json", "merge.json"):
        (merged / file).touch()
    with pytest.raises(ConfigError):
        runs.check_place("outputs/merged_fp16", tmp_path)
    with pytest.raises(RunError, match="there is no run called merged_fp16"):
        runs.named("merged_fp16", tmp_path)
    finished(tmp_path / "outputs/done")
    assert [run.name for run in runs.newest_first(tmp_path)] == ["new", "done", "old"]
    assert runs.unfinished(tmp_path).name == "new"
    finished(tmp_path / "outputs/new")
    assert runs.unfinished(tmp_path).name == "old"
    with pytest.raises(RunError, match="there is no run called nww") as raised:
        runs.named("nww", tmp_path)
    assert raised.value.fix == "did you mean new?"


def test_newest_never_starts_a_run(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(RunError, match="no run of outputs/chat is unfinished"):
            runs.open_run("outputs/chat", tmp_path, "newest")
        finished(tmp_path / "outputs/chat")
    newest = checkpoint(tmp_path / "outputs/chat-2", 3)
    assert runs.open_run("outputs/chat", tmp_path, "newest").checkpoint == newest


@pytest.mark.parametrize("output_dir", [".", "data", ".."])
def test_a_folder_that_holds_other_things_is_no_place_for_a_run(tmp_path: Path, output_dir: str) -> None:
    (tmp_path / "data/raw").mkdir(parents=True)
    with pytest.raises(ConfigError):
        runs.check_place(output_dir, tmp_path)
    checkpoint(tmp_path / "outputs/chat", 3)
    runs.check_place("outputs/chat", tmp_path)


def test_status_json_says_how_the_work_on_a_run_ended(tmp_path: Path) -> None:
    run = runs.at(tmp_path / "outputs" / "chat", tmp_path)
    run.folder.mkdir(parents=True)

    def status() -> dict[str, object]:
        return files.read_json(run.folder / runs.STATUS)

    with pytest.raises(Stopped), runs.reporting(run, "tiny"):
        assert (status()["phase"], status()["pid"], status()["model"]) == ("starting", os.getpid(), "tiny")
        runs.update_status(run.folder, phase="training", step=3)
        raise Stopped("Stopped at step 3 of 9, with a checkpoint.")
    assert (status()["phase"], status()["step"]) == ("stopped", 3)
    with pytest.raises(ValueError), runs.reporting(run, "tiny"):
        raise ValueError("a row is wrong")
    assert (status()["phase"], status()["error"]) == ("failed", "a row is wrong")
    with runs.reporting(run, "tiny"):
        finished(run.folder)
    assert (status()["phase"], status()["error"]) == ("completed", None)


def test_a_disk_that_refuses_the_status_stops_no_run(tmp_path: Path) -> None:
    runs.update_status(tmp_path / "missing", phase="training")
    assert not (tmp_path / "missing").exists()
