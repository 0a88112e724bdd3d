"""TensorBoard in the background: started once, reused, only ours is stopped."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import psutil

Command = Callable[..., CompletedProcess[str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_tensorboard_is_started_reused_and_stopped(command: Command, tmp_path: Path) -> None:
    port = free_port()
    try:
        first = command("tb", "start", "--port", port, "--json", SFT_ROOT=str(tmp_path))
        assert first.returncode == 0, first.stderr
        started = json.loads(first.stdout)
        assert started["started"] and started["port"] == port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=10) as answer:
            assert answer.status == 200
        listening = {c.laddr.ip for c in psutil.Process(started["pid"]).net_connections() if c.status == "LISTEN"}
        assert listening <= {"127.0.0.1", "::1"}, "reachable from outside"
        again = json.loads(command("tb", "start", "--port", port, "--json", SFT_ROOT=str(tmp_path)).stdout)
        assert again == {"pid": started["pid"], "port": port, "started": False}
    finally:
        stopped = command("tb", "stop", "--json", SFT_ROOT=str(tmp_path))
    assert json.loads(stopped.stdout) == {"stopped": started["pid"]}
    assert not psutil.pid_exists(started["pid"]) or psutil.Process(started["pid"]).status() == "zombie"


def test_a_port_in_use_is_reported_and_the_other_program_keeps_running(command: Command, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = command("tb", "start", "--port", port, SFT_ROOT=str(tmp_path))
        assert done.returncode == 2
        assert f"port {port} is in use" in done.stderr and "TB_PORT=" in done.stderr
        assert "Traceback" not in done.stderr
        assert command("tb", "stop", SFT_ROOT=str(tmp_path)).returncode == 0
        assert not (tmp_path / "outputs" / "tb" / ".board.json").exists()


def test_a_recycled_pid_is_left_alone(command: Command, tmp_path: Path) -> None:
    record = tmp_path / "outputs" / "tb" / ".board.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"pid": psutil.Process().pid, "port": 1, "created": 5.0}))
    done = command("tb", "stop", "--json", SFT_ROOT=str(tmp_path))
    assert json.loads(done.stdout) == {"stopped": None}


def test_clean_asks_and_spares_the_raw_data(command: Command, tmp_path: Path) -> None:
    raw, adapter = tmp_path / "data" / "raw" / "raw.jsonl", tmp_path / "adapters" / "run" / "adapter_config.json"
    for path in (raw, adapter):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    refused = command("clean", stdin="", SFT_ROOT=str(tmp_path))
    assert refused.returncode == 2 and "FORCE=1" in refused.stderr and adapter.exists()
    done = command("clean", "--force", SFT_ROOT=str(tmp_path))
    assert done.returncode == 0 and raw.exists() and not adapter.exists()
