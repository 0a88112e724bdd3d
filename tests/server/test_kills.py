"""kill -9 of the server and of the job at random: no job is lost, none runs twice, the weights are the clean run's."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from safetensors.torch import load_file

from sft.server.access import PREFIX
from tests.conftest import ROOT
from tests.training import project

ROUNDS = int(os.environ.get("SFT_KILLS", "12"))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Server:
    """`python scripts/serve.py` of a project, started again after it was killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "serve.py"), "--port", "0"], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **ENVIRONMENT, "SFT_ROOT": str(self.root)},
        )  # fmt: skip
        assert self.process.stdout
        address = self.process.stdout.readline().split()[0].rstrip("/")
        self.client = httpx.Client(base_url=address + PREFIX, timeout=120)

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()

    def job(self, name: str) -> dict[str, object]:
        return dict(self.client.get(f"/jobs/{name}").json())

    def resume(self, name: str) -> None:
        answer = self.client.post(f"/jobs/{name}/resume")
        assert answer.status_code == 200, answer.text


def processes(job: str) -> list[int]:
    """The pids of the job's processes, by their environment; only leaders of a group."""
    pids = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SFT_JOB", "").startswith(f"{job}.") and os.getpgid(process.pid) == process.pid:
                pids.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return pids


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_at_random_lose_no_job_and_change_no_weight(
    tmp_path: Path, tiny_qwen2: Path, request: pytest.FixtureRequest
) -> None:
    steps = 30 * ROUNDS  # so that they train until the last kill
    root = project.make(tmp_path, tiny_qwen2)
    (root / "configs").mkdir()
    (root / "config.yaml").rename(root / "configs" / "run_bnb.yaml")
    settings = {"train.max_steps": steps, "train.eval_strategy": "no", "train.save_strategy": "steps"}
    settings |= {"train.save_steps": 2, "train.save_total_limit": 2}
    body = {"config_path": "configs/run_bnb.yaml", "overrides": settings, "force": True}
    draw, server, killed = random.Random(int(os.environ.get("SFT_SEED", "0"))), Server(root), {"server": 0, "job": 0}
    request.addfinalizer(server.kill)
    jobs = [server.client.post("/train", json=body).json()["job_id"] for _ in range(2)]
    while sum(killed.values()) < ROUNDS:
        time.sleep(draw.uniform(0.0, 15.0))
        for job in jobs:
            assert len(processes(job)) <= 1, "a job runs twice"
        side = draw.choice(["server", "job", "both"])
        running = [pid for job in jobs for pid in processes(job)]
        if side != "server":
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                killed["job"] += 1
        if side != "job":
            server.kill()
            killed["server"] += 1
            server.start()
        for job in jobs:
            status = server.job(job)
            assert status["status"] in ("queued", "running", "failed", "completed"), status
            if status["status"] == "failed":
                assert "its process died" in str(status["error"]), status
                server.resume(job)
    assert min(killed.values()) > ROUNDS // 5, killed
    end = time.monotonic() + 900
    while any(server.job(job)["status"] != "completed" for job in jobs):
        assert time.monotonic() < end
        for job in jobs:
            if server.job(job)["status"] == "failed":
                server.resume(job)
        time.sleep(0.5)
    assert [server.job(job)["run"] for job in jobs] == ["t", "t-2"]
    server.kill()
    print(f"{killed} in {steps} steps")
    assert sorted(path.name for path in (root / "adapters").iterdir()) == ["last", "t", "t-2"]
    clean = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(root / "configs" / "run_bnb.yaml")]
        + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        + ["--set", "train.output_dir=outputs/clean"],
        env={**os.environ, **ENVIRONMENT, "SFT_ROOT": str(root)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "clean is finished" in clean.stdout
    expected = load_file(root / "adapters" / "clean" / "adapter_model.safetensors")
    for name in ("t", "t-2"):
        weights = load_file(root / "adapters" / name / "adapter_model.safetensors")
        assert all(weights[key].equal(expected[key]) for key in expected) and set(weights) == set(expected), name
