"""Finds a model's files: in a folder, in the hub's cache, or on the hub, from where they are downloaded once.

Only safetensors, JSON, templates and tokenizer files are downloaded, never pickles. It also looks up the hub's token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft import files
from sft.config import load
from sft.errors import ModelError, one_line, register_secret
from sft.model.files import INDEX, SINGLE, ModelFiles, kind_of, read_config, weight_files

if TYPE_CHECKING:
    from sft.config.schema import ModelSection

log = logging.getLogger("sft.model")
TOKEN_NAMES = ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_FOLDER_OR_ID = "fix model.name: a folder (counted from the project root), or a hub id (Qwen/Qwen2.5-3B-Instruct)"


def find(section: ModelSection, root: Path, *, weights: bool = True) -> ModelFiles:
    """The model's files, downloaded if need be. With `weights` false, config and tokenizer are enough.

    A complete model in the cache is used without a request to the hub. Raises ModelError: not found, gated, offline
    and not in the cache, incomplete, no safetensors, no text generator.
    """
    folder, revision = local_folder(section.name, root), section.revision
    if folder is None:
        folder = cached(section.name, revision)
        if folder is not None and weights and not offline():
            try:
                weight_files(folder, section.name)
            except ModelError:
                folder = None
        folder = folder or download(section, root, weights=weights)
        revision = folder.name
    config = read_config(folder, section.name)
    kind = kind_of(config, section.type, name=section.name)
    model_files = ModelFiles(path=folder, name=section.name, revision=revision, config=config, kind=kind)
    if weights:
        _ = model_files.weights
    return model_files


def local_folder(name: str, root: Path) -> Path | None:
    """The folder that `name` means, or None if it can only be a hub id.

    Counted from the project root, then from what the kit ships. Raises ModelError if it can only be a folder that
    does not exist.
    """
    path = str(Path(name).expanduser())
    for candidate in (load.resolve_path(root, path), load.shipped(root, path)):
        if candidate.is_dir():
            return candidate
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"the model folder {name} does not exist", where=str(load.resolve_path(root, path)), fix=_FOLDER_OR_ID
        )
    return None


def cached(name: str, revision: str | None) -> Path | None:
    """The snapshot folder of a hub model in the cache, complete or not; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        raise ModelError(
            f"{name!r} is neither an existing folder nor a hub id", where="model.name", fix=_FOLDER_OR_ID
        ) from None
    return Path(path).parent if isinstance(path, str) else None


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def reachable(timeout: float = 2.0) -> bool:
    """Whether the hub answers within `timeout` seconds, name lookup included; false when HF_HUB_OFFLINE is set."""
    answers: list[bool] = []

    def head() -> None:
        import httpx
        from huggingface_hub import constants

        with contextlib.suppress(Exception):  # no proxy, no route, no certificate: all mean no
            answers.append(httpx.head(constants.ENDPOINT, timeout=timeout).status_code < 500)

    if offline():
        return False
    thread = threading.Thread(target=head, daemon=True)
    thread.start()
    thread.join(timeout)
    return any(answers)


def find_token(root: Path) -> tuple[str | None, str]:
    """The hub token and where it comes from ("" without one): the environment, `.env` at `root`, `hf auth login`.

    It is only for the hub client; `errors.redact` keeps it out of everything that is printed or written.
    """
    from dotenv import dotenv_values
    from huggingface_hub import get_token

    in_file = dotenv_values(root / ".env")
    tokens = {name: os.environ.get(name) for name in TOKEN_NAMES}
    tokens |= {f".env ({name})": in_file.get(name) for name in TOKEN_NAMES}
    for place, token in [*tokens.items(), ("hf auth login", get_token())]:
        if token := (token or "").strip():
            register_secret(token)
            return token, place
    return None, ""


def install_token(root: Path) -> str:
    """Gives the token to all libraries of this process (HF_TOKEN); returns where it comes from, "" without one."""
    token, place = find_token(root)
    if token and place != "hf auth login":
        os.environ.setdefault("HF_TOKEN", token)
    return place


@dataclass(frozen=True)
class Listing:
    """The files to download of a hub repository at one commit, and their size together."""

    commit: str
    names: list[str]
    bytes: int


def download(section: ModelSection, root: Path, *, weights: bool = True) -> Path:
    """Downloads what is missing of a hub model into the hub's cache and returns its folder.

    Raises ModelError (not found, gated, no safetensors, no network) and EnvironmentProblem (the disk is too small).
    """
    from huggingface_hub import constants, snapshot_download

    name = section.name
    if offline():
        raise ModelError(
            f"{name} is not in the hub's cache, and HF_HUB_OFFLINE forbids downloading it",
            where="model.name",
            fix=f"with a network: HF_HUB_OFFLINE=0 make download-model MODEL={name}; or name a folder",
        )
    if not reachable(5.0):
        raise ModelError(
            f"{name} is not in the hub's cache, and the hub does not answer",
            where="model.name",
            fix="fix the network, or name a folder (the shipped demo model: --set model.name=models/demo)",
        )
    listing = list_files(section, root, weights=weights)
    cache, needed = Path(constants.HF_HUB_CACHE), int(listing.bytes * 1.02)
    files.require_free(cache, needed, name, fix="free space there, or set HF_HOME to a larger disk")
    log.info(f"downloading {name}: {listing.bytes / 1e6:,.0f} MB in {len(listing.names)} files to the hub's cache")
    install_token(root)
    try:  # by the branch's name, so that it is found by it when offline
        return Path(snapshot_download(name, revision=section.revision, allow_patterns=listing.names))
    except Exception as error:
        raise _as_model_error(section, error) from None


def list_files(section: ModelSection, root: Path, *, weights: bool = True, timeout: float = 20) -> Listing:
    """What would be downloaded, by asking the hub. Raises ModelError: not found, gated, no safetensors, no answer."""
    from huggingface_hub import HfApi

    api = HfApi(token=find_token(root)[0])
    try:
        info = api.model_info(section.name, revision=section.revision, files_metadata=True, timeout=timeout)
    except Exception as error:
        raise _as_model_error(section, error) from None
    sizes = {item.rfilename: item.size or 0 for item in info.siblings or [] if "/" not in item.rfilename}
    code = (".py",) if section.trust_remote_code else ()
    small = [name for name in sizes if name.endswith(SMALL_FILES + code)]
    large = [name for name in sizes if name.endswith(".safetensors") and name.startswith("model")]
    if INDEX in sizes:
        large = [name for name in large if name != SINGLE]
    elif SINGLE in sizes:
        large = [SINGLE]
    if weights and not large:
        raise ModelError(
            f"{section.name} has no safetensors weights on the hub; pickled ones are never downloaded",
            where="model.name",
            fix="choose a repository with model.safetensors; or, if you trust it, download it into a folder"
            f" (hf download {section.name} --local-dir models/NAME) and convert it:"
            " python scripts/download_model.py --model models/NAME --allow-pickle",
        )
    names = sorted(small + (large if weights else []))
    return Listing(info.sha or "main", names, sum(sizes[name] for name in names))


def _as_model_error(section: ModelSection, error: Exception) -> ModelError:
    """The hub client's error as ours, with its fix; never with a token in it."""
    from huggingface_hub import constants, errors

    name = section.name
    page = f"{constants.ENDPOINT}/{name}"
    what = f"downloading {name} failed: {type(error).__name__}: {one_line(error)}"
    fix = "run the same command again: files that are complete are not downloaded again"
    if isinstance(error, errors.GatedRepoError):
        what = f"{name} is gated: its owners want you to accept their terms first"
        fix = f"accept them at {page}, then run: hf auth login (or set HF_TOKEN)"
    elif isinstance(error, errors.RevisionNotFoundError):
        what = f"{name} has no revision {section.revision!r}"
        fix = f"look at {page}/commits/main, or remove model.revision"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"{name} is neither a folder here nor a model on the hub (or it is private)"
        fix = "fix model.name; for a private model run: hf auth login"
    return ModelError(what, where="model.name", fix=fix)
