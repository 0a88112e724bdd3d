"""Fetches a model from the hub into its cache: what is wanted, is there room, and what the hub's refusals mean."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import credentials
from sft.errors import EnvironmentProblem, ModelError, SftError
from sft.model import files, resume
from sft.model.network import offline, reachable

if TYPE_CHECKING:
    from sft.config.schema import ModelSection

log = logging.getLogger("sft.model")
_SMALL = (".json", ".jinja", ".model", ".txt", ".tiktoken")


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
        log.info(f"fetching {name}: {wanted.bytes / 1e6:,.0f} MB in {len(wanted.names)} files into the hub's cache")
        for file in wanted.names:
            if file.endswith(".safetensors"):
                resume.fetch(name, wanted.commit, file, token)
        folder = snapshot_download(name, revision=wanted.commit, allow_patterns=wanted.names, token=token)
        _remember_branch(section, wanted.commit)
        return Path(folder)
    except SftError:
        raise
    except Exception as error:
        raise _said(section, error) from None


def peek(section: ModelSection, root: Path, *, timeout: float) -> Listing:
    """What would be fetched, asked of the hub. Raises ModelError: not found, gated, no safetensors, no answer."""
    try:
        return _list(section, credentials.find(root)[0], weights=True, timeout=timeout)
    except ModelError:
        raise
    except Exception as error:
        raise _said(section, error) from None


def _list(section: ModelSection, token: str | None, *, weights: bool, timeout: float = 20) -> Listing:
    from huggingface_hub import HfApi

    info = HfApi(token=token).model_info(section.name, revision=section.revision, files_metadata=True, timeout=timeout)
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or [] if "/" not in item.rfilename}
    small = [name for name in sizes if name.endswith(_SMALL) or (section.trust_remote_code and name.endswith(".py"))]
    heavy = [name for name in sizes if name.endswith(".safetensors") and name.startswith("model")]
    if files.INDEX in sizes:
        heavy = [name for name in heavy if name != files.SINGLE]
    elif files.SINGLE in sizes:
        heavy = [files.SINGLE]
    if weights and not heavy:
        raise ModelError(
            f"{section.name} has no safetensors weights on the hub; pickled ones are never fetched",
            where="model.name",
            mend="choose a repository with model.safetensors; or, if you trust it, fetch it by hand into a folder"
            f" (hf download {section.name} --local-dir models/NAME) and make safetensors of it:"
            " python scripts/download_model.py --model models/NAME --allow-pickle",
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
    said = credentials.redact(" ".join(str(error).split()))[:300]
    return ModelError(
        f"fetching {name} failed: {type(error).__name__}: {said}",
        where="model.name",
        mend="run the same command again: what has arrived is kept",
    )
