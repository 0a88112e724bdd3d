"""A TensorBoard of our own in the background: started once, reused, and the only one that is ever stopped.

`outputs/tb/.board.json` holds its pid, port and start time; a pid that the system has given to another process since
is recognised by the start time and left alone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from sft import files
from sft.errors import EnvironmentProblem

HOST = "127.0.0.1"
START_SECONDS = 60


@dataclass(frozen=True)
class Board:
    """A TensorBoard that we started: its process and its address."""

    pid: int
    port: int
    created: float

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.port}"


def record(logdir: Path) -> Path:
    """The file that remembers our TensorBoard."""
    return logdir / ".board.json"


def running(logdir: Path) -> Board | None:
    """Ours, if it still runs; a record of one that is gone is removed."""
    path = record(logdir)
    try:
        board = Board(**json.loads(path.read_text(encoding="utf-8")))
        alive = abs(psutil.Process(board.pid).create_time() - board.created) < 1
    except (OSError, ValueError, TypeError):
        return None
    except psutil.NoSuchProcess:
        alive = False
    if alive:
        return board
    path.unlink(missing_ok=True)
    return None


def answers(port: int) -> bool:
    """Whether anything listens on the port."""
    with socket.socket() as probe:
        probe.settimeout(0.3)
        return probe.connect_ex((HOST, port)) == 0


def start(logdir: Path, port: int) -> tuple[Board, bool]:
    """Starts TensorBoard on loopback without a GPU, or takes ours that runs. Returns it and whether it is new.

    Raises EnvironmentProblem if the port belongs to somebody else, or it does not come up in 60 seconds.
    """
    logdir.mkdir(parents=True, exist_ok=True)
    if board := running(logdir):
        return board, False
    if answers(port):
        raise EnvironmentProblem(
            f"port {port} is in use by another program", fix=f"choose another: make tensorboard TB_PORT={port + 1}"
        )
    log = logdir / ".board.log"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", HOST, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    board = Board(process.pid, port, psutil.Process(process.pid).create_time())
    files.write_json(record(logdir), board.__dict__)
    for _ in range(START_SECONDS * 5):
        if answers(port):
            return board, True
        if process.poll() is not None:
            break
        time.sleep(0.2)
    stop(logdir)
    raise EnvironmentProblem("TensorBoard did not start", where=str(log), fix=f"read its log: tail {log}")


def stop(logdir: Path) -> Board | None:
    """Ends ours and its children, and nobody else's. Returns what was stopped, or None."""
    board = running(logdir)
    if board is None:
        return None
    process = psutil.Process(board.pid)
    family = [*process.children(recursive=True), process]
    for member in family:
        member.terminate()
    for member in psutil.wait_procs(family, timeout=5)[1]:
        member.kill()
    record(logdir).unlink(missing_ok=True)
    return board


def event_files(logdir: Path) -> list[Path]:
    """Every event file under the folder."""
    return sorted(logdir.rglob("events.out.tfevents.*"))
