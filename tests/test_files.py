"""Folders are replaced atomically, also on file systems that cannot exchange two names."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from sft import files
from sft.errors import EnvironmentProblem, RunError


class NoSwap(files.Disk):
    """A file system without RENAME_EXCHANGE, which may refuse the nth rename too."""

    def __init__(self, refused: int = 0) -> None:
        self.refused, self.renames = refused, 0

    def swap(self, one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(one))

    def rename(self, path: Path, target: Path) -> None:
        self.renames += 1
        if self.renames == self.refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        super().rename(path, target)


def change(target: Path, text: str) -> None:
    with files.atomic_folder(target) as staged:
        files.put(staged / "file", text)


@pytest.mark.parametrize("disk", [files.Disk(), NoSwap()], ids=["swapped", "renamed twice"])
def test_a_folder_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: files.Disk) -> None:
    monkeypatch.setattr(files, "disk", disk)
    for text in ("old", "new"):
        change(tmp_path / "folder", text)
        assert (tmp_path / "folder/file").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("refused", [1, 2])
def test_the_old_folder_stays_when_the_new_one_cannot_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    change(tmp_path / "folder", "old")
    monkeypatch.setattr(files, "disk", NoSwap(refused))
    with pytest.raises(EnvironmentProblem, match="folder could not be written"):
        change(tmp_path / "folder", "new")
    assert (tmp_path / "folder/file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_of_the_caller_is_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), files.atomic_folder(tmp_path / "folder"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_damage_to_the_manifest_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1" * 1234)
    files.write_manifest(tmp_path)
    assert files.manifest_problem(tmp_path) is None
    path = tmp_path / files.MANIFEST
    whole = path.read_bytes()
    for at in range(0, 8 * len(whole), 5):  # every bit position of a byte comes up
        harmed = bytearray(whole)
        harmed[at // 8] ^= 1 << at % 8
        path.write_bytes(harmed)
        assert (files.manifest_problem(tmp_path) or "").startswith(files.MANIFEST)


def test_checking_whether_a_lock_is_held_never_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    held, stop, failures = [], threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            files.is_locked(path)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    for _ in range(300):
        try:
            with files.lock(path, "the run"):
                held.append(files.is_locked(path))
        except RunError as error:
            failures.append(error)
    stop.set()
    for looker in lookers:
        looker.join()
    assert not failures and held == [True] * 300
    assert not files.is_locked(path)


def test_free_space_is_checked_on_the_disk_that_would_hold_the_folder(tmp_path: Path) -> None:
    files.require_free(tmp_path / "not/yet/there", 1, "a run", fix="x")
    with pytest.raises(EnvironmentProblem, match=r"a run needs about 1,048,576.00 GiB on .* are free \(weights"):
        files.require_free(tmp_path / "not/yet/there", 2**50, "a run", fix="free space", items="weights")
