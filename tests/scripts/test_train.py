"""`python scripts/train.py` as a user runs it: stopped and resumed, its exit codes, several processes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from sft import files
from sft.runs import read_log
from tests.conftest import ROOT
from tests.training import project


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_resumes(
    tmp_path: Path, tiny_qwen2: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    root = project.make(tmp_path, tiny_qwen2, mode="qlora")
    many = ["--config", "config.yaml", "--set", "train.eval_strategy=no", "--set", "train.save_strategy=no"]
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *many, "--set", "train.max_steps=3000"],
        cwd=root,
        env={**os.environ, "SFT_ROOT": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log, until = root / "outputs/t/log.jsonl", time.monotonic() + 120
    while not read_log(log) and time.monotonic() < until and running.poll() is None:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "stopping after this step, with a checkpoint" in errors
    assert "Stopped at step" in errors and "Traceback" not in errors and "error:" not in errors
    assert f"Continue with: python {ROOT / 'scripts/train.py'} {shlex.join(many)}" in errors
    assert re.search(r"step 1/3000  loss \d\.\d{4}  [\d,]+ tokens/s  [\d:]+ left", output)
    (checkpoint,) = (root / "outputs/t").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])

    refused = command("train", *many, cwd=root, SFT_ROOT=str(root))
    assert refused.returncode == 2
    assert "total_steps: was 3000, is 6" in refused.stderr and "Traceback" not in refused.stderr

    args = [*many, "--set", f"train.max_steps={step + 4}", "--allow-change", "total_steps", "--json"]
    result = command("train", *args, "--allow-change", "warmup_steps", cwd=root, SFT_ROOT=str(root))
    assert result.returncode == 0, result.stderr
    assert f"resuming outputs/t at checkpoint-{step}" in result.stderr
    assert f"step {step + 1}/{step + 4}  loss" in result.stderr and f"step {step + 4}/{step + 4}  loss" in result.stderr
    assert json.loads(result.stdout)["steps"] == step + 4
    steps = [entry["step"] for entry in read_log(log)]
    assert steps == sorted(set(steps)) and steps[-1] == step + 4


@pytest.mark.slow
def test_closing_the_terminal_stops_with_a_checkpoint(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = project.make(tmp_path, tiny_qwen2)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", "config.yaml"]
    sets = ["--set", "train.max_steps=3000", "--set", "train.eval_strategy=no", "--set", "train.save_strategy=no"]
    child, terminal = pty.fork()
    if not child:
        os.chdir(root)
        os.environ.update(SFT_ROOT=str(root), OMP_NUM_THREADS="1")
        os.execv(command[0], [*command, *sets])
    log, until = root / "outputs/t/log.jsonl", time.monotonic() + 200
    os.set_blocking(terminal, False)
    while not read_log(log) and time.monotonic() < until:
        time.sleep(0.1)
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    (checkpoint,) = (root / "outputs/t").glob("checkpoint-*")
    assert files.manifest_problem(checkpoint) is None


PATH = os.environ.get("PYTHONPATH", "")
DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed"
)


def torchrun(root: Path, count: int, **how: str) -> subprocess.Popen[str]:
    """Launches `count` processes whose output goes into one pipe; with `shard` through accelerate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", f"--master_port={port}"]
    settings = ["--config", "config.yaml", *how.get("sets", "").split()]
    if shard := how.get("shard"):
        launcher, settings = [], [*settings, "--nproc", str(count), "--shard", shard]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "scripts" / "train.py"), *settings],
        cwd=root,
        env={**os.environ, "SFT_ROOT": str(root), "OMP_NUM_THREADS": "1", "PYTHONPATH": how.get("path", PATH)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_with_one_checkpoint(tmp_path: Path, tiny_qwen2: Path) -> None:
    root = project.make(tmp_path, tiny_qwen2)
    sets = "--set train.eval_strategy=no --set train.save_strategy=no --set train.max_steps=3000"
    launch = torchrun(root, 2, sets=sets, shard="fsdp")
    log, until = root / "outputs/t/log.jsonl", time.monotonic() + 120
    while not read_log(log) and time.monotonic() < until and launch.poll() is None:
        time.sleep(0.1)
    os.killpg(launch.pid, signal.SIGINT)
    output = launch.communicate(timeout=60)[0]
    assert launch.returncode == 130 and output.count("Stopped at step") == 1 and "error:" not in output, output
    (checkpoint,) = (root / "outputs/t").glob("checkpoint-*")
    assert files.manifest_problem(checkpoint) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", ["", "fsdp", pytest.param("deepspeed", marks=DEEPSPEED)])
def test_a_killed_rank_ends_the_launch_and_the_next_one_resumes_bit_for_bit(
    shard: str, tmp_path: Path, tiny_qwen2: Path
) -> None:
    import psutil

    sets = "--set eval.train_sample=0 --set train.save_steps=2 --set train.save_strategy=steps --set train.max_steps=30"
    sets += " --set train.eval_strategy=no"
    adapters = {}
    for name in ("straight", "broken"):
        root = project.make(tmp_path / name, tiny_qwen2)
        launch = torchrun(root, 2, sets=sets, shard=shard)
        if name == "broken":
            until = time.monotonic() + 200
            while not (root / "outputs/t/checkpoint-4").is_dir() and time.monotonic() < until:
                time.sleep(0.05)
            ranks = [one for one in psutil.Process(launch.pid).children(recursive=True) if "RANK" in one.environ()]
            next(one for one in ranks if one.environ()["RANK"] == "1").kill()
            output = launch.communicate(timeout=200)[0]
            assert launch.returncode != 0 and not (root / "outputs/t/finished.json").exists(), output
            assert "this is a bug in sft-play, not your mistake" not in output, output
            if shard:
                assert "rank 1 ended with exit code -9, and so all did: Signal 9" in output, output
                assert f"fix:   python {ROOT / 'scripts/train.py'} --config config.yaml {sets} --nproc 2" in output, (
                    output
                )
            alone = torchrun(root, 1, sets=sets)
            output = alone.communicate(timeout=200)[0]
            assert alone.returncode != 0 and "world_size: was 2, is 1" in output, output
            assert f"train.py --run t --nproc 2 --shard {shard or 'ddp'}; or start a new run" in output, output
            launch = torchrun(root, 2, sets=sets, shard=shard)
        output = launch.communicate(timeout=280)[0]
        assert launch.returncode == 0, output
        assert ("resuming outputs/t at checkpoint-" in output) == (name == "broken")
        adapters[name] = load_file(root / "adapters/t/adapter_model.safetensors")
    assert all(bool((adapters["broken"][key] == one).all()) for key, one in adapters["straight"].items())


NOT_FINITE = "Ω"  # of the text of a row whose loss is made NaN
MAKES_NAN = """
import os
if os.environ.get("RANK"):
    import torch
    real = torch.nn.functional.embedding
    def embedding(ids, *args, **more):
        return real(ids, *args, **more) * (float("nan") if (ids == {token}).any() else 1)
    torch.nn.functional.embedding = embedding
"""
OUT_OF_MEMORY = """
import os, pathlib
if os.environ.get("RANK") == "1":
    import torch
    marker, real, calls = pathlib.Path(__file__).with_name("injected"), torch.nn.functional.embedding, [0]
    def embedding(*args, **more):
        calls[0] += torch.is_grad_enabled()
        if calls[0] == 5 and not marker.exists():
            marker.touch()
            raise torch.OutOfMemoryError("out of memory: injected")
        return real(*args, **more)
    torch.nn.functional.embedding = embedding
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["fsdp", pytest.param("deepspeed", marks=DEEPSPEED)])
def test_where_memory_runs_out_on_a_rank_that_shares_the_weights_all_go_on_in_smaller_micro_batches(
    shard: str, tmp_path: Path, tiny_qwen2: Path
) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(OUT_OF_MEMORY)
    root = project.make(tmp_path / "p", tiny_qwen2)
    path = os.pathsep.join(filter(None, (str(tmp_path / "path"), PATH)))
    launch = torchrun(root, 2, sets="--set eval.train_sample=0", shard=shard, path=path)
    output = launch.communicate(timeout=280)[0]
    assert (tmp_path / "path" / "injected").exists() and launch.returncode == 0, output
    assert "all processes start again from the newest checkpoint with --set train.micro_batch_tokens=" in output
    assert output.count("t is finished") == 1 and [step for step, _ in project.losses(root, "t")][-1] == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["lora", "full", "kto", "lora fsdp", "full fsdp", "qlora fsdp", "kto fsdp"]
    + [pytest.param(f"{case} deepspeed", marks=DEEPSPEED) for case in ("full", "kto", "dpo")],
)
def test_two_processes_give_the_result_of_one(case: str, tmp_path: Path, tiny_qwen2: Path) -> None:
    case, _, shard = case.partition(" ")
    general = tmp_path / "general.jsonl"
    general.write_text("".join(f'{{"user": "{n} + 1?", "assistant": "{n + 1}"}}\n' for n in range(5)))
    sets = "--set tuning.lora.dropout=0.0 --set train.normalize=rows --set train.z_loss=1e-3"
    sets += " --set data.weight_field=grade"
    if case == "lora":  # with rehearsed rows, and merged
        sets += f" --set train.rehearsal.rows=5 --set train.rehearsal.path={general} --set train.merge_at_end=true"
    pairs = case in ("kto", "dpo")
    more = ["train/rewards/margins", "eval/rewards/margins"] if pairs else []
    skips = case == "full" and shard != "deepspeed"  # whose engine cannot leave out a step
    if skips:
        sets = "--set train.learning_rate=1e-3 --set train.on_nan=skip"
        token = AutoTokenizer.from_pretrained(tiny_qwen2)(NOT_FINITE)["input_ids"][-1]
        (tmp_path / "sitecustomize.py").write_text(MAKES_NAN.format(token=token))
        if not shard:  # with elastic weight consolidation
            sets += f" --set train.ewc.strength=1e3 --set train.ewc.path={general}"
            more.append("train/ewc_penalty")
    elif pairs:
        sets = f"--set tuning.lora.dropout=0.0 --set train.objective={case}"
    path = os.pathsep.join(filter(None, (str(tmp_path), PATH)))
    for name, count in (("one", 1), ("two", 2)):
        root = project.make(tmp_path / name, tiny_qwen2, mode="lora" if pairs else case)
        if pairs:
            project.as_pairs(root)
        elif skips:
            rows = root / "data/processed/train.jsonl"
            rows.write_text(rows.read_text().replace('"system": ""', f'"system": "{NOT_FINITE}"', 1))
        launch = torchrun(root, count, sets=sets, shard=shard if count > 1 else "", path=path)
        output = launch.communicate(timeout=280)[0]
        assert launch.returncode == 0 and output.count("t is finished") == 1, output
    for key in ("train/loss", "eval/loss", "train/grad_norm", *more):
        one, two = (project.losses(tmp_path / name, "t", key) for name in ("one", "two"))
        assert [step for step, _ in one] == [step for step, _ in two] != []
        assert all(abs(a - b) < 1e-4 for (_, a), (_, b) in zip(one, two, strict=True))
    skipped = [
        files.read_json(tmp_path / name / "outputs/t/ledger.json").get("skipped_windows") for name in ("one", "two")
    ]
    assert (skipped[0] is not None) == skips
    assert [sorted(step["rows"]) for step in skipped[0] or []] == [sorted(step["rows"]) for step in skipped[1] or []]
    for folder in ("adapters/t", "outputs/t/model", "outputs/t/merged"):  # the same files, with the same tensors
        one, two = ({path.name: path for path in (tmp_path / name / folder).glob("*")} for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            if name.endswith(".safetensors"):
                tensors, others = load_file(one[name]), load_file(two[name])
                assert {key: (t.shape, t.dtype) for key, t in tensors.items()} == {
                    key: (t.shape, t.dtype) for key, t in others.items()
                }
                assert all(float((others[key].float() - t.float()).abs().max()) < 1e-3 for key, t in tensors.items())
    if case == "lora":
        assert (tmp_path / "two/outputs/t/merged/model.safetensors").is_file()


@pytest.mark.slow
def test_two_machines_train_one_run(tmp_path: Path, tiny_qwen2: Path) -> None:
    """env/torchrun.sh twice, as on two machines that see one folder."""
    root = project.make(tmp_path, tiny_qwen2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "NODES": "2",
        "GPUS": "1",
        "PORT": str(port),
        "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
    }
    machines = [
        subprocess.Popen(
            [ROOT / "env/torchrun.sh", "--config", root / "config.yaml", "--set", "train.max_steps=4"],
            env={**os.environ, **settings, "NODE": str(number), "SFT_ROOT": str(root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (0, 1)
    ]
    first, second = (machine.communicate(timeout=280)[0] for machine in machines)
    assert [machine.returncode for machine in machines] == [0, 0], first + second
    assert "t is finished" in first and "t is finished" not in second
    assert files.read_json(root / "outputs/t/backend.json")["world_size"] == 2
