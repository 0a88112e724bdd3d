"""A TensorBoard of our own in the background: started once, reused, and the only one that is ever stopped.

`outputs/tb/.board.json` holds its pid, port and start time; a pid that the system has since given to another process is
recognised by the start time and left alone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from sft import files
from sft.errors import EnvironmentProblem

HOST, START_SECONDS, RECORD = "127.0.0.1", 60, ".board.json"


@dataclass(frozen=True)
class Board:
    """A TensorBoard that we started. created: the process's start time, in seconds since the epoch."""

    pid: int
    port: int
    created: float

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.port}"


def running(logdir: Path) -> Board | None:
    """Ours, if it still runs; the record of one that has ended is removed."""
    path = logdir / RECORD
    try:
        board = Board(**json.loads(path.read_text(encoding="utf-8")))
        if abs(psutil.Process(board.pid).create_time() - board.created) < 1:
            return board
    except (OSError, ValueError, TypeError):
        return None
    except psutil.NoSuchProcess:
        pass
    path.unlink(missing_ok=True)
    return None


def port_in_use(port: int) -> bool:
    """Whether anything listens on the port."""
    with socket.socket() as probe:
        probe.settimeout(0.3)
        return probe.connect_ex((HOST, port)) == 0


def start(logdir: Path, port: int) -> tuple[Board, bool]:
    """Starts TensorBoard on loopback without a GPU, or returns ours that runs. The flag says whether it is new.

    Raises EnvironmentProblem if the port belongs to another program, or it does not come up in 60 seconds.
    """
    logdir.mkdir(parents=True, exist_ok=True)
    if board := running(logdir):
        return board, False
    if port_in_use(port):
        fix = f"choose another: make tensorboard TB_PORT={port + 1}"
        raise EnvironmentProblem(f"port {port} is in use by another program", fix=fix)
    log = logdir / ".board.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", HOST, "--port", str(port)]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    board = Board(process.pid, port, psutil.Process(process.pid).create_time())
    files.write_json(logdir / RECORD, asdict(board))
    for _ in range(START_SECONDS * 5):
        if port_in_use(port):
            return board, True
        if process.poll() is not None:
            break
        time.sleep(0.2)
    stop(logdir)
    raise EnvironmentProblem("TensorBoard did not start", where=str(log), fix=f"read its log: tail {log}")


def stop(logdir: Path) -> Board | None:
    """Ends ours and its children, and no other. Returns what was stopped, or None."""
    board = running(logdir)
    if board is None:
        return None
    process = psutil.Process(board.pid)
    family = [*process.children(recursive=True), process]
    for member in family:
        member.terminate()
    for member in psutil.wait_procs(family, timeout=5)[1]:
        member.kill()
    (logdir / RECORD).unlink(missing_ok=True)
    return board
