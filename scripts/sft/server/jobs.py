"""The server's queue. A job is a command of the kit in a process group of its own, and goes on when the server ends.

On disk: a row in outputs/.server/queue.sqlite (what to run, what was requested since); outputs/.server/<job>/ with its
config.yaml, log.txt, result.json (what --json prints) and lock; and of a training the run's folder, whose status.json
is the truth. The job's process inherits the lock, so it is held exactly as long as the job runs: a server that was
killed between starting a process and noting it neither loses the job nor starts it twice.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from sft import files, runs
from sft.errors import EnvironmentProblem, RunError, SftError
from sft.runs import Run

SCRIPTS = Path(__file__).resolve().parents[2]
SCRIPT = {  # kind of a job -> its command
    "train": "train", "merge": "merge_lora", "export": "export", "evaluate": "eval", "report": "compare"
}  # fmt: skip
ENDED = ("paused", "completed", "failed", "stopped")
SECONDS_PER_TICK = 0.5
NICER = 5  # than the server is a job, so that the server answers while it computes
COMMAND_SECONDS = 600.0  # for a command whose answer a client waits for
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  number INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, kind TEXT NOT NULL, args TEXT NOT NULL, name TEXT, run TEXT,
  state TEXT NOT NULL, requested TEXT, attempts INTEGER NOT NULL DEFAULT 0, pid INTEGER, process_created REAL, gpu TEXT,
  error TEXT, created REAL NOT NULL, updated REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_state ON jobs (state);
CREATE INDEX IF NOT EXISTS by_run ON jobs (run);
"""
log = logging.getLogger("sft.server")


class NotFound(RunError):
    """There is no such job, run or file."""


class Conflict(RunError):
    """The job's present state does not allow it."""


@dataclass(frozen=True)
class Job:
    """A row of the queue.

    args: of its command. name: of a training that starts a new run, which is then `run`, with a number where the name
    is in use. requested: `paused` or `stopped` once requested. error: its three parts.
    """

    number: int
    id: str
    kind: str
    args: list[str]
    name: str | None
    run: str | None
    state: str
    requested: str | None
    attempts: int
    pid: int | None
    process_created: float | None
    gpu: str | None
    error: dict[str, Any] | None
    created: float
    updated: float

    @property
    def token(self) -> str:
        """Names one start of the job: in its process's SFT_JOB and in the run's status.json."""
        return f"{self.id}.{self.attempts}"


class Queue:
    """The jobs of a project. `run` is the thread that starts and ends them; every other method may be called beside it.

    before_training: called before a training starts. Raises RunError if another server has the project.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before_training: Callable[[], object] = lambda: None
        self.home = root / "outputs" / ".server"
        files.make_folder(self.home)
        self._own = open(self.home / "server.lock", "a+", encoding="utf-8")  # noqa: SIM115  # held as long as this object is
        try:
            files.take_lock(self._own)
        except BlockingIOError:
            self._own.seek(0)
            what = f"another server of this project is running {self._own.read()}".strip()
            raise RunError(what, where=str(root), fix="use that one, or stop it (Ctrl-C)") from None
        self.mutex, self.reading = threading.RLock(), threading.Lock()  # so that looking waits for no start
        self.wake, self.closed = threading.Event(), threading.Event()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.database, self.reader = (
            sqlite3.connect(self.home / "queue.sqlite", check_same_thread=False, isolation_level=None) for _ in range(2)
        )
        self.reader.row_factory = sqlite3.Row
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("PRAGMA synchronous=FULL")  # a job that was accepted survives a power cut
        with suppress(sqlite3.OperationalError):  # no table, or one that has the new name already
            self.database.execute("ALTER TABLE jobs RENAME COLUMN wanted TO requested")
        self.database.executescript(_SCHEMA)

    def note_address(self, url: str) -> None:
        """Leaves where this server answers for whoever starts another one."""
        self._own.truncate(0)
        self._own.write(f"at {url}")
        self._own.flush()

    def close(self) -> None:
        """Ends the thread; the jobs go on."""
        self.closed.set()
        self.wake.set()
        with self.mutex, self.reading:
            self.database.close()
            self.reader.close()
            self._own.close()

    # -- the table

    def _rows(self, condition: str = "1", *values: object) -> list[Job]:
        with self.reading:
            rows = self.reader.execute(f"SELECT * FROM jobs WHERE {condition}", values).fetchall()
        return [
            Job(**{**dict(row), "args": json.loads(row["args"]), "error": json.loads(row["error"] or "null")})
            for row in rows
        ]

    def _set(self, job: Job, **values: Any) -> None:
        values |= {"updated": time.time()}
        if "error" in values:
            values["error"] = json.dumps(values["error"])
        with self.mutex:
            self.database.execute(
                f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in values)} WHERE number = ?",
                (*values.values(), job.number),
            )

    def folder(self, job_id: str) -> Path:
        """Where a job's own files lie."""
        return self.home / job_id

    def find(self, name: str) -> Job | None:
        """The job with this id, or the newest training of the run with this name."""
        by_run = "kind = 'train' AND run = ? ORDER BY number DESC LIMIT 1"
        jobs = self._rows("id = ?", name) or self._rows(by_run, name)
        return jobs[0] if jobs else None

    # -- requests

    def add(
        self,
        kind: str,
        args: Sequence[str],
        *,
        name: str | None = None,
        run: str | None = None,
        config: str | None = None,
    ) -> str:
        """Queues a job and returns its id. config: YAML that becomes its own config file, whatever changes later.

        name: of a new run; run: the run that it works on.
        """
        job_id = f"sft-{secrets.token_hex(4)}"
        files.make_folder(self.folder(job_id))
        args = list(args)
        if config is not None:
            path = self.folder(job_id) / "config.yaml"
            files.write_text(path, config)
            args = ["--config", str(path), *args]
        now = time.time()
        with self.mutex:
            self.database.execute(
                "INSERT INTO jobs (id, kind, args, name, run, state, created, updated)"
                " VALUES (?, ?, ?, ?, ?, 'queued', ?, ?)",
                (job_id, kind, json.dumps(args), name, run, now, now),
            )
        self.wake.set()
        return job_id

    def stop(self, name: str, requested: str, *, at_once: bool = False) -> None:
        """Has a job end with a checkpoint, as `paused` or as `stopped`. at_once: kill it. Raises NotFound, Conflict."""
        with self.mutex:
            job = self.find(name)
            if job is None or (job.state in ENDED and self._continued(job)):
                self._stop_run(self.outside_run(job.run if job and job.run else name), at_once)
            elif job.state == "queued" or (job.state == "paused" and requested == "stopped"):
                self._set(job, state=requested, requested=requested)
            elif job.state != "running":
                raise Conflict(f"{name} is {job.state}", where=name, fix="GET /api/v1/sft/jobs lists what is running")
            else:
                self._set(job, requested=requested)
                _signal(job.pid or _find_process(job.token), job.process_created, at_once)
        self.wake.set()

    def is_running(self, run: str) -> bool:
        """Whether a job that trains this run is queued or running, or a command trains it."""
        busy = self._rows("kind = 'train' AND run = ? AND state IN ('queued', 'running')", run)
        return bool(busy) or _held(self.root / "outputs" / run / runs.LOCK)

    def _stop_run(self, run: Run, at_once: bool) -> None:
        status = files.read_json(run.folder / runs.STATUS)
        if not _held(run.folder / runs.LOCK) or not isinstance(status.get("pid"), int):
            raise Conflict(f"{run.name} is not running", where=run.name, fix="GET /api/v1/sft/jobs")
        _signal(status["pid"], None, at_once)

    def resume(self, name: str) -> str:
        """Queues a paused, stopped or failed job again, or a run that `make train` left. Returns the job's id."""
        with self.mutex:
            job = self.find(name)
            if job is not None and job.state not in ("paused", "stopped", "failed"):
                fix = "start a new one" if job.state == "completed" else "wait for its end, or pause it first"
                raise Conflict(f"{name} is {job.state}", where=name, fix=fix)
            if job is None or (job.kind == "train" and job.run):
                run = self.outside_run(name) if job is None else self._run(job)
                if run.finished or self.is_running(run.name):
                    what = f"{name} is {'finished' if run.finished else 'running'}"
                    raise Conflict(what, where=name, fix="resume works for a run that was stopped or has failed")
                if job is None:
                    return self.add("train", ["--config", str(run.settings), "--resume", str(run.folder)], run=run.name)
            self._set(job, state="queued", requested=None, error=None)
        self.wake.set()
        return job.id

    def _run(self, job: Job) -> Run:
        return runs.at(self.root / "outputs" / str(job.run), self.root)

    def _continued(self, job: Job) -> bool:
        """Whether a command, and not the job, worked on the job's run last."""
        owner = files.read_json(self._run(job).folder / runs.STATUS) if job.kind == "train" and job.run else {}
        return bool(owner) and not str(owner.get("job")).startswith(f"{job.id}.")

    # -- starting and ending

    def run(self) -> None:
        """Until `close`: notes which jobs have ended, and starts the next where a device is free."""
        while not self.closed.is_set():
            try:
                self.tick()
            except sqlite3.ProgrammingError:  # closed meanwhile
                return
            except (SftError, OSError, sqlite3.Error) as error:  # a full disk: the queue goes on when there is space
                log.warning("the queue: %s", error)
            self.wake.wait(SECONDS_PER_TICK)
            self.wake.clear()

    def tick(self) -> None:
        """One look at every running job, and at the first ones in the queue."""
        with self.mutex:
            for job in self._rows("state = 'running'"):
                if job.id in self.processes:
                    self.processes[job.id].poll()
                if not _held(self.folder(job.id) / "lock"):
                    self._end(job)
        while (queued := self._rows("state = 'queued' ORDER BY number LIMIT 1")) and (device := self._free_device()):
            if queued[0].kind == "train":
                self.before_training()
            with self.mutex:
                for job in self._rows("id = ? AND state = 'queued'", queued[0].id):
                    try:
                        self._start(job, device)
                    except SftError as error:
                        self._set(job, state="failed", error=error.entry())

    def _free_device(self) -> str | None:
        running = self._rows("state = 'running'")
        busy, own = {job.gpu for job in running}, {job.run for job in running}
        devices = gpus() or ["cpu"]
        for run in runs.running(self.root):
            if run.name not in own:  # of a command: it uses the GPUs that its environment names, else the first
                named = files.read_json(run.folder / runs.STATUS).get("gpu")
                busy |= set(str(named).split(",") if named else devices[:1])
        return next((device for device in devices if device not in busy), None)

    def _start(self, job: Job, device: str) -> None:
        folder, args, run = self.folder(job.id), job.args, job.run
        if job.name:
            run = run or runs.open_run(f"outputs/{job.name}", self.root, "never").run.name
            files.make_folder(self.root / "outputs" / run)  # the name is used from now on
            args = [*args, "--set", f"train.output_dir=outputs/{run}"]
        if job.name or (job.kind == "train" and job.attempts):  # this run, where it stopped: `auto` takes the newest
            at = args.index("--resume")
            args = [*args[:at], "--resume", f"outputs/{run}", *args[at + 2 :]]
        self._set(job, state="running", run=run, attempts=job.attempts + 1, gpu=device, pid=None, error=None)
        job = self._rows("id = ?", job.id)[0]
        environment = {**os.environ, "SFT_JOB": job.token, "SFT_ROOT": str(self.root), "PYTHONUNBUFFERED": "1"}
        if device != "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = device
        with (
            open(folder / "lock", "a+", encoding="utf-8") as lock,
            open(folder / "log.txt", "ab") as log_file,
            open(folder / "result.json", "wb") as result,
        ):
            files.take_lock(lock)
            process = subprocess.Popen(
                [sys.executable, str(SCRIPTS / f"{SCRIPT[job.kind]}.py"), *args, "--json"],
                cwd=self.root, env=environment, stdin=subprocess.DEVNULL, stdout=result, stderr=log_file,
                start_new_session=True, pass_fds=[lock.fileno()],
            )  # fmt: skip
        self.processes[job.id] = process
        with suppress(psutil.Error):
            leader = psutil.Process(process.pid)
            leader.nice(min(19, os.nice(0) + NICER))
            with suppress(OSError):  # Linux may weigh sessions instead of processes, and this is one of its own
                Path(f"/proc/{process.pid}/autogroup").write_text(str(NICER), encoding="utf-8")
            self._set(job, pid=process.pid, process_created=leader.create_time())

    def _end(self, job: Job) -> None:
        """Notes how a job ended whose process is gone."""
        process = self.processes.pop(job.id, None)
        code = process.wait() if process else None
        run = self.root / "outputs" / (job.run or "")
        status = files.read_json(run / runs.STATUS) if job.kind == "train" and job.run else {}
        started = status.get("job") == job.token
        if job.name and job.run:
            with suppress(OSError):  # a run with files in it
                run.rmdir()
                self._set(job, run=None)  # another job may take the name
        result = files.read_json(self.folder(job.id) / "result.json")
        if (result and "error" not in result) or (started and (run / runs.FINISHED).is_file()):
            return self._set(job, state="completed")
        if job.requested or (started and status.get("phase") == "stopped"):
            return self._set(job, state=job.requested or "paused")
        if "error" in result:
            return self._set(job, state="failed", error={key: result.get(key) for key in ("error", "where", "fix")})
        if job.pid is None and not started:  # the server was killed before it could start it
            return self._set(job, state="queued", attempts=job.attempts - 1)
        how = (
            f"signal {-code}"
            if code and code < 0
            else f"exit code {code}"
            if code
            else "killed, or the machine stopped"
        )
        where, fix = str(self.folder(job.id) / "log.txt"), f"POST /api/v1/sft/jobs/{job.id}/resume"
        return self._set(job, state="failed", error={"error": f"its process died ({how})", "where": where, "fix": fix})

    # -- what clients see

    def outside_run(self, name: str) -> Run:
        """The run of that name under outputs/, started by whomever. Raises NotFound."""
        run = runs.at(self.root / "outputs" / name, self.root)
        is_run = (run.folder / runs.RESOLVED).is_file() and not (run.folder / runs.MODEL_CONFIG).exists()
        if Path(name).name != name or not is_run:
            fix = "GET /api/v1/sft/jobs lists them"
            raise NotFound(f"there is no job or run called {name}", where="job_id", fix=fix)
        return run

    def view(self, name: str) -> dict[str, Any]:
        """A job, or a run, as clients see it, with what its command printed. Raises NotFound."""
        job = self.find(name)
        result = files.read_json(self.folder(job.id) / "result.json") if job and job.state == "completed" else None
        return {**(self._view(job) if job else self._view_run(self.outside_run(name))), "result": result}

    def views(self, limit: int) -> list[dict[str, Any]]:
        """The newest jobs, and the runs that commands started, the last changed first."""
        jobs = self._rows("1 ORDER BY number DESC LIMIT ?", limit)
        with self.reading:
            own = {row["run"] for row in self.reader.execute("SELECT DISTINCT run FROM jobs WHERE kind = 'train'")}
        changed: list[tuple[float, Job | Run]] = [(job.updated, job) for job in jobs]
        with suppress(FileNotFoundError), os.scandir(self.root / "outputs") as entries:
            for entry in entries:
                for name in (runs.STATUS, runs.RESOLVED):
                    if entry.name in own or entry.is_symlink() or Path(entry.path, runs.MODEL_CONFIG).exists():
                        break
                    with suppress(OSError):
                        at = Path(entry.path, name).stat().st_mtime
                        changed.append((at, runs.at(Path(entry.path), self.root)))
                        break
        changed.sort(key=lambda each: each[0], reverse=True)
        return [self._view(each) if isinstance(each, Job) else self._view_run(each) for _, each in changed[:limit]]

    def _view(self, job: Job) -> dict[str, Any]:
        if job.state in ENDED and self._continued(job):
            return {**self._view_run(self._run(job)), "job_id": job.id}
        status = files.read_json(self._run(job).folder / runs.STATUS) if job.kind == "train" and job.run else {}
        own = status if status.get("job") == job.token or job.state != "running" else {}
        return {
            **_figures(own, job.state), "job_id": job.id, "kind": job.kind, "run": job.run, "name": job.name,
            "status": job.state, "requested": job.requested, "error": job.error, "created_at": job.created,
            "updated_at": max(job.updated, own.get("updated") or 0),
        }  # fmt: skip

    def _view_run(self, run: Run) -> dict[str, Any]:
        status, error = files.read_json(run.folder / runs.STATUS), None
        if _held(run.folder / runs.LOCK):
            state = "running"
        elif run.finished:
            state = "completed"
        elif not status or status.get("phase") == "stopped":
            state = "paused"
        else:
            what = status.get("error") or f"its process died ({status.get('phase')})"
            state, error = "failed", {"error": what, "where": run.name, "fix": f"make resume RUN={run.name}"}
        if not status and run.finished:  # of a run before there was a status.json
            summary = files.read_json(run.folder / runs.FINISHED)
            status = {"step": summary.get("steps"), "total_steps": summary.get("steps")}
        stat = run.folder.stat()
        return {
            **_figures(status, state), "job_id": run.name, "kind": "train", "run": run.name, "status": state,
            "requested": None, "error": error, "created_at": stat.st_ctime,
            "updated_at": status.get("updated") or stat.st_mtime,
        }  # fmt: skip

    def log_path(self, name: str) -> Path:
        """What a job logs; of a run that a command started, its figures."""
        job = self.find(name)
        return self.folder(job.id) / "log.txt" if job else self.outside_run(name).folder / "log.jsonl"


def _figures(status: dict[str, Any], state: str) -> dict[str, Any]:
    step, total = int(status.get("step") or 0), int(status.get("total_steps") or 0)
    running = state == "running"
    return {
        "phase": status.get("phase") if running else None,
        "progress": 1.0 if state == "completed" else min(1.0, step / total) if total else 0.0,
        "current_step": step,
        "model": status.get("model"),
        "total_steps": total,
        "metrics": {name: value for name, value in (status.get("metrics") or {}).items() if value is not None},
        "tokens_per_second": status.get("tokens_per_second"),
        "seconds_left": status.get("seconds_left") if running else None,
    }


def _held(path: Path) -> bool:
    """Whether a process holds this lock file."""
    try:
        return files.is_locked(path)
    except FileNotFoundError:
        return False


def _find_process(token: str) -> int | None:
    """The leader of the group that was started as `token`, by its environment: its pid was never noted."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("SFT_JOB") == token and os.getpgid(process.pid) == process.pid:
                return process.pid
    return None


def _signal(pid: int | None, created: float | None, at_once: bool) -> None:
    """SIGTERM, with which a training stops after its step; at once: SIGKILL for the whole group."""
    with suppress(psutil.Error, ProcessLookupError, PermissionError):
        if pid is None or (created is not None and abs(psutil.Process(pid).create_time() - created) > 2):
            return
        if at_once and os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL if at_once else signal.SIGTERM)


@cache
def gpus() -> list[str]:
    """The GPUs that may be used, by CUDA's names for them; none without one."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    import pynvml

    try:
        pynvml.nvmlInit()
        return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def run_command(root: Path, name: str, *args: str, lines: bool = False) -> Any:
    """What `python scripts/NAME.py ARGS --json` prints: one value, or of `lines` a list of them.

    Raises SftError with the command's own error, EnvironmentProblem after COMMAND_SECONDS.
    """
    try:
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / f"{name}.py"), *args, "--json"], cwd=root, stdin=subprocess.DEVNULL,
            env={**os.environ, "SFT_ROOT": str(root)}, capture_output=True, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        what = f"{name} took more than {COMMAND_SECONDS:.0f} s"
        raise EnvironmentProblem(what, fix=f"run it yourself: python scripts/{name}.py") from None
    printed = [json.loads(line) for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
    if done.returncode == 0:
        return printed if lines else printed[0] if printed else {}
    entry = printed[-1] if printed and isinstance(printed[-1], dict) else {}
    text = done.stderr.decode("utf-8", "replace").strip().removeprefix("error: ")
    problems = [
        SftError(each["error"], where=each.get("where"), fix=each.get("fix")) for each in entry.get("problems", [])
    ]
    what = entry.get("error") or text.splitlines()[-1] if text or entry else f"{name} ended with {done.returncode}"
    error = SftError(what, where=entry.get("where"), fix=entry.get("fix"), problems=problems)
    error.details = {key: value for key, value in entry.items() if key not in ("error", "where", "fix", "problems")}
    raise error
