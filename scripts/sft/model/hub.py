"""Finds a model by its name: an existing folder wins over a hub id; a hub model is taken from the cache or fetched.

What is in the cache whole is used as it is, without asking the hub: a run needs no network after one download, and the
model under it does not move. `make download-model` fetches what is newer. Only safetensors, JSON, templates and
tokenizer files are ever fetched; no pickles.
"""

from __future__ import annotations

import logging
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config import paths
from sft.errors import EnvironmentProblem, ModelError
from sft.model import credentials, files, kinds
from sft.model.files import ModelFiles

if TYPE_CHECKING:
    from sft.config.schema import ModelSection

log = logging.getLogger("sft.model")
_SMALL = (".json", ".jinja", ".model", ".txt", ".tiktoken")
__all__ = ["Listing", "ModelFiles", "download", "find", "local_folder", "offline", "reachable"]


def find(section: ModelSection, root: Path, *, weights: bool = True) -> ModelFiles:
    """The model's files, fetched if need be. With `weights` false, config and tokenizer are enough.

    Raises ModelError: not found, gated, offline without a cache, incomplete, no safetensors, no text generator.
    """
    folder = local_folder(section.name, root)
    revision = section.revision
    if folder is None:
        folder = cached(section.name, revision)
        if folder is None or (weights and not _whole(folder, section.name)):
            if folder is not None and offline():
                files.weight_files(folder, section.name)  # says what is missing
            folder = download(section, root, weights=weights)
        revision = folder.name
    config = files.read_config(folder, section.name)
    found = ModelFiles(
        path=folder,
        name=section.name,
        revision=revision,
        config=config,
        kind=kinds.kind_of(config, section.type, name=section.name),
    )
    if weights:
        _ = found.weights
    return found


def local_folder(name: str, root: Path) -> Path | None:
    """The folder that `name` means, or None where it can only be a hub id.

    Counted from the project root, then from what the kit ships. Raises ModelError where it can only be a folder and is
    not there.
    """
    text = Path(name).expanduser()
    for candidate in (paths.resolve(root, str(text)), paths.shipped(root, str(text))):
        if candidate.is_dir():
            return candidate
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"the model folder {name} is not there",
            where=str(paths.resolve(root, str(text))),
            mend="mend model.name: a folder (counted from the project root), or a hub id (Qwen/Qwen2.5-3B-Instruct)",
        )
    return None


def cached(name: str, revision: str | None) -> Path | None:
    """The snapshot folder of a hub model in the cache, whole or not; None where it was never fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        raise ModelError(
            f"{name!r} is neither an existing folder nor a hub id",
            where="model.name",
            mend="mend model.name: a folder, or a hub id such as Qwen/Qwen2.5-3B-Instruct",
        ) from None
    return Path(path).parent if isinstance(path, str) else None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def reachable(timeout: float = 2.0) -> bool:
    """Whether the hub answers within `timeout` seconds, name lookup included; false when HF_HUB_OFFLINE is set."""
    if offline():
        return False
    answers: list[bool] = []

    def ask() -> None:
        import httpx
        from huggingface_hub import constants

        try:
            answers.append(httpx.head(constants.ENDPOINT, timeout=timeout).status_code < 500)
        except Exception:  # no proxy, no route, no certificate: all mean no
            answers.append(False)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(timeout)
    return bool(answers and answers[0])


@dataclass(frozen=True)
class Listing:
    """What of a hub repository is wanted: its commit, file names, and their bytes."""

    commit: str
    names: list[str]
    bytes: int


def download(section: ModelSection, root: Path, *, weights: bool = True) -> Path:
    """Fetches what is missing of a hub model into the hub's cache and returns its folder; takes up a broken download.

    Raises ModelError (not found, gated, no safetensors, no network) and EnvironmentProblem (the disk is too small).
    """
    from huggingface_hub import snapshot_download

    name = section.name
    if offline():
        raise ModelError(
            f"{name} is not in the hub's cache, and HF_HUB_OFFLINE forbids fetching it",
            where="model.name",
            mend=f"with a network: HF_HUB_OFFLINE=0 make download-model MODEL={name}; or give a folder",
        )
    if not reachable(5.0):
        raise ModelError(
            f"{name} is not in the hub's cache, and the hub does not answer",
            where="model.name",
            mend="mend the network, or give a folder (the shipped demo model: --set model.name=models/demo)",
        )
    token, _ = credentials.find(root)
    try:
        wanted = _list(section, token, weights=weights)
        _room(name, wanted.bytes)
        log.info(f"fetching {name}: {wanted.bytes / 1e9:.2f} GB in {len(wanted.names)} files into the hub's cache")
        folder = snapshot_download(name, revision=wanted.commit, allow_patterns=wanted.names, token=token)
        _remember_branch(section, wanted.commit)
        return Path(folder)
    except (ModelError, EnvironmentProblem):
        raise
    except Exception as error:
        raise _said(section, error) from None


def _list(section: ModelSection, token: str | None, *, weights: bool) -> Listing:
    from huggingface_hub import HfApi

    info = HfApi(token=token).model_info(section.name, revision=section.revision, files_metadata=True, timeout=20)
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or [] if "/" not in item.rfilename}
    small = [name for name in sizes if name.endswith(_SMALL) or (section.trust_remote_code and name.endswith(".py"))]
    heavy = [name for name in sizes if name.endswith(".safetensors") and name.startswith("model")]
    if files.INDEX in sizes:
        heavy = [name for name in heavy if name != files.SINGLE]
    elif files.SINGLE in sizes:
        heavy = [files.SINGLE]
    if weights and not heavy:
        raise ModelError(
            f"{section.name} has no safetensors weights on the hub; pickled ones are never loaded",
            where="model.name",
            mend="choose a repository with model.safetensors",
        )
    names = sorted(small + (heavy if weights else []))
    return Listing(info.sha or "main", names, sum(sizes[name] for name in names))


def _remember_branch(section: ModelSection, commit: str) -> None:
    """Notes in the cache which commit the branch stood at, so that it is found offline by the branch's name."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    branch = section.revision or constants.DEFAULT_REVISION
    if branch == commit:
        return
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=section.name, repo_type="model") / "refs" / branch
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit, encoding="utf-8")


def _room(name: str, needed: int) -> None:
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed * 1.02 > free:
        raise EnvironmentProblem(
            f"{name} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free",
            where=str(place),
            mend="make room there, or set HF_HOME to a larger disk",
        )


def _whole(folder: Path, name: str) -> bool:
    try:
        return bool(files.weight_files(folder, name))
    except ModelError:
        return False


def _said(section: ModelSection, error: Exception) -> ModelError:
    """The hub client's error in our words, with what to do; never with a token in it."""
    from huggingface_hub import constants, errors

    name = section.name
    page = f"{constants.ENDPOINT}/{name}"
    cases: list[tuple[Any, str, str]] = [
        (
            errors.GatedRepoError,
            f"{name} is gated: its owners ask you to agree to something first",
            f"agree at {page}, then run: hf auth login (or set HF_TOKEN)",
        ),
        (
            errors.RevisionNotFoundError,
            f"{name} has no revision {section.revision!r}",
            f"look at {page}/commits/main, or leave model.revision away",
        ),
        (
            errors.RepositoryNotFoundError,
            f"{name} is neither a folder here nor a model on the hub (or it is private)",
            "mend model.name; for a private model run: hf auth login",
        ),
    ]
    for family, what, mend in cases:
        if isinstance(error, family):
            return ModelError(what, where="model.name", mend=mend)
    said = credentials.redact(" ".join(str(error).split())[:300])
    return ModelError(
        f"fetching {name} failed: {type(error).__name__}: {said}",
        where="model.name",
        mend="run the same command again: what has arrived is kept",
    )
