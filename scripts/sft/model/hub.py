"""Finds a model by its name: an existing folder wins over a hub id; a hub model is taken from the cache or fetched.

What is in the cache whole is used as it is, without asking the hub: a run needs no network after one download, and the
model under it does not move. `make download-model` fetches what is newer. Only safetensors, JSON, templates and
tokenizer files are ever fetched; no pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sft.config import paths
from sft.errors import ModelError
from sft.model import files, kinds
from sft.model.fetching import Listing, download, peek
from sft.model.files import ModelFiles
from sft.model.network import offline, reachable

if TYPE_CHECKING:
    from sft.config.schema import ModelSection

__all__ = ["Listing", "ModelFiles", "cached", "download", "find", "local_folder", "offline", "peek", "reachable"]


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


def _whole(folder: Path, name: str) -> bool:
    try:
        return bool(files.weight_files(folder, name))
    except ModelError:
        return False
