"""A full disk, a read-only folder, a clock set back: each is reported and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import process_data
from sft import files, runs
from sft.config.load import load
from sft.config.schema import Config
from sft.errors import EnvironmentProblem, RunError, SftError
from sft.model import hub
from sft.model.files import ModelFiles
from sft.preflight import disk_space
from tests.conftest import ROOT
from tests.training import project


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk, and not everywhere")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """A file that takes all the space of the disk but `leave` bytes."""
    ballast = place / "ballast"
    with open(ballast, "wb") as file:
        file.write(b"\0" * max(0, os.statvfs(place).f_bavail * os.statvfs(place).f_frsize - leave))
    return ballast


class FillsUp(files.Disk):
    """A disk that is filled just before the named file is written; the system itself then reports ENOSPC."""

    def __init__(self, place: Path, name: str) -> None:
        self.place, self.name = place, name

    def write(self, path: Path, content: files.Content) -> None:
        if self.name in str(path) and not (self.place / "ballast").exists():
            fill(self.place, 4096)
        super().write(path, content)


def settings_of(root: Path, *sets: str) -> tuple[Config, ModelFiles]:
    """The project's config with these settings, and its model's files."""
    config = load(root / "config.yaml", sets, root=root).config
    return config, hub.find(config.model, root)


@pytest.mark.parametrize(
    ("name", "resumes_from"),
    [
        ("checkpoint-4", "checkpoint-2"),
        pytest.param("checkpoint-2", "the start of the run", marks=pytest.mark.slow),
        pytest.param("tokenizer", "", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_while_training_loses_nothing(
    small_disk: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, name: str, resumes_from: str, tmp_path: Path
) -> None:
    sets = ("eval.train_sample=0", "train.save_total_limit=1")
    monkeypatch.setattr("sft.preflight.disk_space.LOGS", 0)
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    project.run(project.make(tmp_path, tiny_qwen2), *sets)
    required = sum(disk_space.parts(*settings_of(tmp_path, *sets)).values())
    written = files.size(tmp_path / "outputs") + files.size(tmp_path / "adapters")
    assert written < required < 4 * written + 3 * 2**20  # a MiB of state a checkpoint
    root = project.make(small_disk, tiny_qwen2)
    monkeypatch.setenv("SFT_ROOT", str(root))
    with monkeypatch.context() as patch:
        patch.setattr(files, "disk", FillsUp(root, name if name != "tokenizer" else "adapters/.t"))
        with pytest.raises(EnvironmentProblem) as caught:
            project.run(root, *sets)
    output = str(caught.value)
    assert "could not be written" in output and "MiB are free" in output and "fix:" in output
    assert resumes_from in output
    (root / "ballast").unlink()
    project.run(root, *sets)
    one, other = (path / "adapters/t/adapter_model.safetensors" for path in (root, tmp_path))
    assert files.sha256(one) == files.sha256(other)


def test_a_run_that_will_not_fit_is_refused_before_weights_are_loaded(
    small_disk: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(small_disk))
    monkeypatch.setattr("sft.model.load.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(EnvironmentProblem, match=r"needs about .* MiB on that disk, .* are free \(checkpoints "):
        project.run(project.make(small_disk, tiny_qwen2))
    assert not (small_disk / "outputs").exists()


@pytest.mark.parametrize("leave", [0, 8192, 200_000])
def test_process_on_a_full_disk_leaves_the_earlier_rows(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, leave: int
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(small_disk))
    (small_disk / "config.yaml").write_text("model: {name: models/demo}\n")
    raw = small_disk / "raw.jsonl"
    line = ["--config", str(small_disk / "config.yaml"), "--raw_path", str(raw), "--json"]
    args = process_data.build_parser().parse_args(line)
    draw = random.Random(1)

    def rows(count: int) -> str:
        texts = [f"{draw.random()} {draw.random()} {draw.random()}" for _ in range(count)]
        return "".join(json.dumps({"question": f"what is {one}?", "answer": f"it is {one}"}) + "\n" for one in texts)

    raw.write_text(rows(50))
    process_data.main(args)
    processed = small_disk / "data/processed"
    before = {path.name: files.sha256(path) for path in processed.iterdir()}
    raw.write_text(rows(2000))
    fill(small_disk, leave)
    with pytest.raises(SftError) as caught:
        process_data.main(args)
    assert "No space left" in str(caught.value) and caught.value.fix
    assert {path.name: files.sha256(path) for path in processed.iterdir()} == before
    assert not list(processed.parent.glob(".*"))


def test_a_write_error_inside_a_library_is_reported_too(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        for write in (
            lambda path: torch.save(torch.zeros(100_000), path),
            lambda path: save_file({"a": torch.zeros(100_000)}, path),
            lambda path: path.write_bytes(b"0" * 400_000),
        ):
            with (
                pytest.raises(EnvironmentProblem, match=r"m could not be written .*: more than .* are free"),
                files.atomic_folder(tmp_path / "m") as staged,
            ):
                files.put(staged / "weights", write)
            assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def as_ordinary_user(do: Callable[[], None]) -> tuple[int, str]:
    """Runs `do` in a fork as nobody, for whom permissions count; its exit code and the error that it raised."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        code = 0
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            do()
        except SftError as error:
            code = error.exit_code
            os.write(write, str(error).encode())
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        output = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


def test_a_read_only_folder_is_refused_to_an_ordinary_user(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    outputs.chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(folder.stat().st_mode | 0o055)
    code, message = as_ordinary_user(lambda: runs.check_place("outputs/a", tmp_path))
    assert code == 2 and "cannot be written to" in message and "is read-only" in message and "fix:" in message


def test_a_lock_left_by_a_killed_process_is_free_and_a_living_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from pathlib import Path
from sft import files
with files.lock(Path({str(path)!r}), "t"):
    print("held", flush=True)
    signal.pause()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=rf"in use by another process \(pid {holder.pid}, since 20\d\d-"):
        files.lock(path, "t").__enter__()
    holder.kill()
    holder.wait()
    with files.lock(path, "t"):
        assert path.read_text().startswith(f"pid {os.getpid()}, since ")


def test_leftovers_of_killed_commands_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".a.{dead.pid}.part", f".b.{dead.pid}.gone", f".c.{os.getppid()}.part", ".other"):
        (tmp_path / name).mkdir()
    old = tmp_path / f".model.{dead.pid}.old"
    old.mkdir()
    (old / "weights").write_text("of before")
    files.write_manifest(old)
    files.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".c.{os.getppid()}.part", ".other", "model"]
    assert files.manifest_problem(tmp_path / "model") is None


def test_the_next_write_of_a_file_or_a_link_removes_leftovers_of_a_killed_one(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".rows.jsonl.{dead.pid}.part").write_text("half a r")
    (tmp_path / f".last.{dead.pid}.part").symlink_to("elsewhere")
    (tmp_path / f".other.{dead.pid}.part").write_text("not theirs")
    files.write_text(tmp_path / "rows.jsonl", "whole")
    files.point(tmp_path / "last", tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".other.{dead.pid}.part", "last", "rows.jsonl"]


def test_a_clock_set_back_breaks_nothing(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFT_ROOT", str(tmp_path))
    root, real = project.make(tmp_path, tiny_qwen2), time.time
    started = SimpleNamespace(calls=0)

    def backwards() -> float:
        started.calls += 1
        return real() - 7200.0 * started.calls

    monkeypatch.setattr(time, "time", backwards)
    summary: dict[str, Any] = project.run(root, "train.max_steps=4", "eval.train_sample=0")
    assert summary["steps"] == 4 and 0 < summary["seconds"] < 600 and summary["tokens_per_second"] > 0
    assert started.calls and not re.search(r"-\d+:|-[\d,]+ tok", capsys.readouterr().out)
