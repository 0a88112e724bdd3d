"""The queue: order, pause, resume, and what is left of it when the server or a job is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft import runs
from sft.errors import RunError
from sft.server import jobs
from sft.server.jobs import Conflict, NotFound, Queue
from tests.server import quick
from tests.server.quick import wait_for


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    quick.install(tmp_path, monkeypatch)
    queue = Queue(tmp_path)
    yield queue
    for view in queue.views(100):
        if view["status"] == "running":
            queue.stop(view["job_id"], "stopped", at_once=True)
    queue.close()


def train(queue: Queue, name: str = "chat", steps: int = 3, **settings: str) -> str:
    config = " ".join(f"{key}={value}" for key, value in {"steps": steps, **settings}.items())
    return queue.add("train", ["--resume", "auto"], name=name, config=config)


def is_(queue: Queue, name: str, state: str) -> bool:
    queue.tick()
    return bool(queue.view(name)["status"] == state)


def at_step(queue: Queue, name: str, step: int) -> bool:
    queue.tick()
    return bool(queue.view(name)["current_step"] >= step)


def starts(queue: Queue, run: str) -> list[str]:
    return (queue.root / "outputs" / run / "started.txt").read_text().split()


def test_jobs_run_one_after_the_other_in_runs_of_their_own(queue: Queue) -> None:
    first, second = train(queue), train(queue)
    queue.tick()
    assert [queue.view(name)["status"] for name in (first, second)] == ["running", "queued"]
    wait_for(lambda: is_(queue, second, "completed"))
    views = [queue.view(name) for name in (first, second)]
    assert [view["run"] for view in views] == ["chat", "chat-2"]
    assert [(view["status"], view["progress"], view["current_step"]) for view in views] == [("completed", 1.0, 3)] * 2
    assert starts(queue, "chat") == [f"{first}.1"] and queue.view("chat-2")["job_id"] == second
    assert queue.log_path(first).read_text().split() == ["step", "1", "step", "2", "step", "3"]


def test_a_paused_job_lets_the_next_one_start_and_goes_on_where_it_was(queue: Queue) -> None:
    first, second = train(queue, steps=40), train(queue, steps=40)
    wait_for(lambda: at_step(queue, first, 2))
    queue.stop(first, "paused")
    wait_for(lambda: is_(queue, first, "paused"))
    wait_for(lambda: at_step(queue, second, 1))
    queue.stop(second, "stopped")
    wait_for(lambda: is_(queue, second, "stopped"))  # its run is chat-2: newer than the one that goes on
    step = queue.view(first)["current_step"]
    assert 2 <= step < 40
    assert queue.resume(first) == first
    wait_for(lambda: is_(queue, first, "completed"))
    log = (queue.root / "outputs/chat/log.jsonl").read_text().splitlines()
    assert len(log) == 40
    assert starts(queue, "chat") == [f"{first}.1", f"{first}.2"]
    with pytest.raises(Conflict, match="completed"):
        queue.stop(first, "stopped")
    with pytest.raises(Conflict, match="completed"):
        queue.resume(first)


def test_a_job_that_died_is_failed_with_the_signal_and_one_that_was_refused_with_its_error(queue: Queue) -> None:
    died, refused = train(queue, steps=200), train(queue, "other", fail="early")
    wait_for(lambda: at_step(queue, died, 1))
    job = queue.find(died)
    assert job and job.pid
    os.kill(job.pid, signal.SIGKILL)
    wait_for(lambda: is_(queue, died, "failed"))
    assert "signal 9" in queue.view(died)["error"]["error"] and "resume" in queue.view(died)["error"]["fix"]
    wait_for(lambda: is_(queue, refused, "failed"))
    assert queue.view(refused)["error"] == {"error": "no rows", "where": "data", "fix": "make process"}
    assert not (queue.root / "outputs/other").exists()


def test_a_name_that_a_job_did_not_use_is_free_for_the_next_one(queue: Queue) -> None:
    first, second = train(queue, fail="early"), train(queue)
    wait_for(lambda: is_(queue, second, "completed"))
    assert (queue.view(first)["run"], queue.view(second)["run"]) == (None, "chat")
    queue.resume(first)
    queue.tick()
    assert queue.view(first)["run"] == "chat-2"


def test_a_queued_job_is_stopped_without_starting(queue: Queue) -> None:
    first, second = train(queue, steps=200), train(queue)
    queue.tick()
    queue.stop(second, "stopped")
    queue.stop(first, "stopped", at_once=True)
    wait_for(lambda: is_(queue, first, "stopped"))
    view = queue.view(second)
    assert (view["status"], view["run"], view["name"]) == ("stopped", None, "chat")


def killed(queue: Queue) -> Queue:
    """The queue of a server that starts after `queue`'s was killed: nothing was closed in order."""
    queue.database.close()
    queue.reader.close()
    queue._own.close()
    return Queue(queue.root)


def test_a_running_job_is_found_again_after_the_server_was_killed(queue: Queue) -> None:
    first, second = train(queue, steps=60), train(queue)
    wait_for(lambda: at_step(queue, first, 1))
    processes = queue.processes
    after = killed(queue)
    try:
        after.tick()
        assert [after.view(name)["status"] for name in (first, second)] == ["running", "queued"]
        for process in processes.values():
            process.wait()  # whose parent is this test
        wait_for(lambda: is_(after, second, "completed"))
        assert after.view(first)["status"] == "completed"
        assert [len(starts(after, run)) for run in ("chat", "chat-2")] == [1, 1]
    finally:
        after.close()
        queue.__init__(queue.root)  # type: ignore[misc]  # for the fixture to close


@pytest.mark.parametrize("moment", ["before the process", "before its pid was noted"])
def test_a_job_is_neither_lost_nor_run_twice_when_the_server_dies_while_starting_it(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Killed(BaseException):
        pass

    def dies(*args: object, **keys: object) -> None:
        raise Killed

    job = train(queue, steps=30)
    with monkeypatch.context() as patch:
        if moment == "before the process":
            patch.setattr(jobs.subprocess, "Popen", dies)
        else:
            patch.setattr(jobs.psutil, "Process", dies)
        with pytest.raises(Killed):
            queue.tick()
    after = killed(queue)
    try:
        if moment == "before its pid was noted":
            wait_for(lambda: at_step(after, job, 1))
            after.stop(job, "paused")  # the process is found by its environment
            queue.processes[job].wait()
            wait_for(lambda: is_(after, job, "paused"))
            after.resume(job)
        wait_for(lambda: is_(after, job, "completed"))
        assert after.view(job)["run"] == "chat" and not (queue.root / "outputs/chat-2").exists()
        assert len((queue.root / "outputs/chat/log.jsonl").read_text().splitlines()) == 30
    finally:
        after.close()
        queue.__init__(queue.root)  # type: ignore[misc]


def test_a_second_server_of_a_project_is_refused(queue: Queue) -> None:
    queue.note_address("http://127.0.0.1:8000/")
    with pytest.raises(RunError, match=r"another server of this project is running at http://127\.0\.0\.1:8000/"):
        Queue(queue.root)


def test_runs_of_commands_show_up_are_waited_for_and_can_be_stopped_and_resumed(queue: Queue) -> None:
    config = queue.root / "config.yaml"
    config.write_text("steps=100")
    command = [sys.executable, str(jobs.SCRIPTS / "train.py"), "--config", str(config)]
    process = subprocess.Popen(
        [*command, "--set", "train.output_dir=outputs/mine"], env={**os.environ, "SFT_ROOT": str(queue.root)}
    )
    wait_for(lambda: (queue.root / "outputs/mine" / runs.STATUS).exists() and at_step(queue, "mine", 1))
    waiting = train(queue)
    queue.tick()
    assert [(view["job_id"], view["status"]) for view in queue.views(10)] in (
        [(waiting, "queued"), ("mine", "running")],
        [("mine", "running"), (waiting, "queued")],
    )
    queue.stop("mine", "paused")
    assert process.wait() == 143
    assert is_(queue, "mine", "paused")
    wait_for(lambda: is_(queue, waiting, "completed"))
    (queue.root / "outputs/mine" / runs.SETTINGS).write_text("steps=100")
    resumed = queue.resume("mine")
    wait_for(lambda: is_(queue, resumed, "completed"))
    assert queue.view("mine")["job_id"] == resumed and starts(queue, "mine")[-1] == f"{resumed}.1"
    merged = queue.root / "outputs/merged_fp16"
    merged.mkdir()
    for name in (runs.RESOLVED, runs.MODEL_CONFIG):
        (merged / name).write_text("{}")
    assert {view["run"] for view in queue.views(10)} == {"mine", "chat"}
    for name in ("nothing", "merged_fp16"):
        with pytest.raises(NotFound):
            queue.view(name)


def test_a_command_that_goes_on_with_a_stopped_job_is_what_the_job_shows(queue: Queue) -> None:
    job = train(queue, steps=100)
    wait_for(lambda: at_step(queue, job, 1))
    queue.stop(job, "stopped")
    wait_for(lambda: is_(queue, job, "stopped"))
    config = queue.folder(job) / "config.yaml"
    command = [sys.executable, str(jobs.SCRIPTS / "train.py"), "--config", str(config), "--resume", "outputs/chat"]
    process = subprocess.Popen(command, cwd=queue.root, env={**os.environ, "SFT_ROOT": str(queue.root)})
    wait_for(lambda: is_(queue, job, "running"))
    with pytest.raises(Conflict, match="running"):
        queue.resume(job)
    assert process.wait() == 0
    assert is_(queue, job, "completed")
    with pytest.raises(Conflict, match="finished"):
        queue.resume(job)


def test_a_gpu_has_one_job_at_a_time(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "gpus", lambda: ["0", "1"])
    names = [train(queue, f"r{index}", steps=20) for index in range(3)]
    queue.tick()
    assert [job.gpu for name in names if (job := queue.find(name))] == ["0", "1", None]
    wait_for(lambda: is_(queue, names[2], "completed"))
