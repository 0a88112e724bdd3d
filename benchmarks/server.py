"""What the server costs: how fast it answers while a job trains on the same cores, and what followers cost the job.

    python benchmarks/server.py --runs 1000 --requests 2000 --followers 50

Makes a project with that many runs in a temporary folder, starts `make serve` and a training of the demo model in it,
asks for jobs one request after the other, then counts the training's steps in windows with and without followers of
its log, in turns. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "/api/v1/sft"


def make_project(root: Path, runs: int) -> None:
    """`runs` finished runs as folders, and rows and a config for the demo model."""
    for index in range(runs):
        folder = root / "outputs" / f"old-{index}"
        folder.mkdir(parents=True)
        (folder / "config.resolved.yaml").write_text("model: {name: models/demo}\n")
        (folder / "lock").write_text("")
        (folder / "finished.json").write_text('{"steps": 100}')
        status = {"phase": "completed", "step": 100, "total_steps": 100, "metrics": {"train/loss": 1.0}}
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "log.jsonl").write_text("".join(f'{{"step": {n}, "train/loss": 1.0}}\n' for n in range(100)))
    (root / "configs").mkdir()
    for name in ("config_base.yaml", "demo_cpu.yaml", "run_bnb.yaml"):
        (root / "configs" / name).write_text((ROOT / "configs" / name).read_text())
    for name in ("models", "chat_templates", "data"):
        (root / name).mkdir()
    (root / "models" / "demo").symlink_to(ROOT / "models" / "demo")
    (root / "data" / "samples").symlink_to(ROOT / "data" / "samples")


@contextmanager
def server(root: Path) -> Iterator[tuple[int, str]]:
    """(pid, address) of a server of the project, during the block."""
    command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "SFT_ROOT": str(root)})
    try:
        assert process.stdout
        yield process.pid, process.stdout.readline().split()[0].rstrip("/")
    finally:
        process.terminate()
        process.wait()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def latencies(client: httpx.Client, path: str, count: int) -> dict[str, float]:
    """Milliseconds of `count` requests, one after the other, a few milliseconds apart."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        client.get(path).raise_for_status()
        times.append((time.perf_counter() - start) * 1e3)
        time.sleep(0.005)
    return {"p50": statistics.median(times), "p99": percentile(times, 0.99), "max": max(times)}


def follow(address: str, path: str, ended: threading.Event) -> None:
    with suppress(httpx.HTTPError), httpx.stream("GET", address + path, timeout=None) as answer:
        for _ in answer.iter_raw():
            if ended.is_set():
                return


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def steps_per_second(client: httpx.Client, job: str, seconds: float) -> float:
    first = client.get(f"{PREFIX}/jobs/{job}").json()
    time.sleep(seconds)
    last = client.get(f"{PREFIX}/jobs/{job}").json()
    passed = datetime.fromisoformat(last["updated_at"]) - datetime.fromisoformat(first["updated_at"])
    return float(last["current_step"] - first["current_step"]) / passed.total_seconds()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--runs", type=int, default=1000)
    flags.add_argument("--requests", type=int, default=2000)
    flags.add_argument("--followers", type=int, default=50)
    flags.add_argument("--seconds", type=float, default=15.0, help="of one window (default 15)")
    flags.add_argument("--windows", type=int, default=4, help="with followers, and as many without (default 4)")
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_project(root, args.runs)
        with server(root) as (pid, address), httpx.Client(base_url=address, timeout=120) as client:
            rows = (ROOT / "data" / "samples" / "support_desk.jsonl").read_bytes()
            data = client.post(f"{PREFIX}/data", params={"name": "rows.jsonl"}, content=rows).raise_for_status().json()
            overrides = {
                **data["overrides"],
                "train.epochs": 1000,
                "train.eval_strategy": "no",
                "train.save_strategy": "no",
            }
            body = {"config_path": "configs/demo_cpu.yaml", "overrides": overrides, "force": True}
            job = client.post(f"{PREFIX}/train", json=body).raise_for_status().json()["job_id"]
            while (now := client.get(f"{PREFIX}/jobs/{job}").json())["current_step"] < 5:
                assert now["status"] in ("queued", "running"), now
                time.sleep(0.5)
            result: dict[str, object] = {"runs": args.runs, "cores": os.cpu_count()}
            for name, path in {"job": f"/jobs/{job}", "old run": "/jobs/old-7", "jobs": "/jobs"}.items():
                result[f"GET {name}, ms"] = latencies(client, PREFIX + path, args.requests if name != "jobs" else 100)
            speeds: dict[str, list[float]] = {"without": [], "with": []}
            spent: dict[str, list[float]] = {"without": [], "with": []}
            for index in range(2 * args.windows):  # in turns, the first of a pair alternating: ABBA
                side = "with" if (index % 4) in (1, 2) else "without"
                ended = threading.Event()
                if side == "with":
                    for _ in range(args.followers):
                        threading.Thread(
                            target=follow, args=(address, f"{PREFIX}/jobs/{job}/logs", ended), daemon=True
                        ).start()
                    time.sleep(2)
                before = cpu_seconds(pid)
                speeds[side].append(steps_per_second(client, job, args.seconds))
                spent[side].append((cpu_seconds(pid) - before) / args.seconds)
                ended.set()
                if side == "with":
                    time.sleep(20)  # until each has seen the next comment, and left
            result["followers"] = args.followers
            result["steps/s"] = speeds
            result["server's share of a core"] = spent
            change = statistics.median(speeds["with"]) / statistics.median(speeds["without"]) - 1
            result["change of the training's speed"] = change
            client.delete(f"{PREFIX}/jobs/{job}", params={"at_once": True})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
