"""Is there a hub to ask, and may it be asked."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sft import files
from sft.config import load
from sft.errors import ModelError, SftError, one_line, register_secret
from sft.model import files as model_files
from sft.model.files import INDEX, ModelFiles, has_weights

if TYPE_CHECKING:
    from sft.config.schema import ModelSection


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


TOKEN_NAMES = ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def find_token(root: Path) -> tuple[str | None, str]:
    """The hub token and where it comes from ("" without one): the environment, `.env` at `root`, `hf auth login`.

    It is for the hub client alone; `errors.redact` keeps it out of everything that is printed or written.
    """
    places = {name: os.environ.get(name, "").strip() for name in TOKEN_NAMES}
    if not any(places.values()) and (root / ".env").is_file():
        from dotenv import dotenv_values

        values = dotenv_values(root / ".env")
        places = {f".env ({name})": (values.get(name) or "").strip() for name in TOKEN_NAMES}
    if not any(places.values()):
        from huggingface_hub import get_token

        places = {"hf auth login": get_token() or ""}
    for place, token in places.items():
        if token:
            register_secret(token)
            return token, place
    return None, ""


def install_token(root: Path) -> str:
    """Gives the token to all libraries of this process (HF_TOKEN); returns where it comes from, "" without one."""
    token, place = find_token(root)
    if token and place != "hf auth login":
        os.environ.setdefault("HF_TOKEN", token)
    return place


def fetch(repository: str, commit: str, name: str, token: str | None) -> None:
    """Puts the file's bytes under their hash into the cache; `snapshot_download` then finds and links them.

    Raises what the hub client raises, and ModelError where the bytes that came are not the hub's.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    if isinstance(try_to_load_from_cache(repository, name, revision=commit), str):
        return
    url = hf_hub_url(repository, name, revision=commit)
    known = get_hf_file_metadata(url, token=token)
    if known.etag is None or known.size is None:
        return
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model") / "blobs"
    blob, part = folder / known.etag, folder / f"{known.etag}.part"
    headers = build_hf_headers(token=token)
    if urlsplit(known.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)
    with files.lock(folder / f"{known.etag}.part.lock", f"the download of {name}"):
        if blob.exists():
            return
        if part.exists() and part.stat().st_size > known.size:
            part.unlink()
        with open(part, "ab") as file:
            http_get(
                known.location,
                file,
                resume_size=file.tell(),
                headers=headers,
                expected_size=known.size,
                displayed_filename=name,
            )
        if len(known.etag) == 64 and files.sha256(part) != known.etag:
            part.unlink()
            raise ModelError(f"{name} of {repository} arrived damaged", fix="run the same command again")
        part.replace(blob)


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
    from huggingface_hub import constants, snapshot_download

    name = section.name
    if offline():
        raise ModelError(
            f"{name} is not in the hub's cache, and HF_HUB_OFFLINE forbids fetching it",
            where="model.name",
            fix=f"with a network: HF_HUB_OFFLINE=0 make download-model MODEL={name}; or give a folder",
        )
    if not reachable(5.0):
        raise ModelError(
            f"{name} is not in the hub's cache, and the hub does not answer",
            where="model.name",
            fix="fix the network, or give a folder (the shipped demo model: --set model.name=models/demo)",
        )
    token, _ = find_token(root)
    try:
        wanted = _list(section, token, weights=weights)
        files.require_free(
            Path(constants.HF_HUB_CACHE),
            int(wanted.bytes * 1.02),
            name,
            fix="free space there, or set HF_HOME to a larger disk",
        )
        log.info(f"fetching {name}: {wanted.bytes / 1e6:,.0f} MB in {len(wanted.names)} files into the hub's cache")
        for file in wanted.names:
            if file.endswith(".safetensors"):
                fetch(name, wanted.commit, file, token)
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
        return _list(section, find_token(root)[0], weights=True, timeout=timeout)
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
    if model_files.INDEX in sizes:
        heavy = [name for name in heavy if name != model_files.SINGLE]
    elif model_files.SINGLE in sizes:
        heavy = [model_files.SINGLE]
    if weights and not heavy:
        raise ModelError(
            f"{section.name} has no safetensors weights on the hub; pickled ones are never fetched",
            where="model.name",
            fix="choose a repository with model.safetensors; or, if you trust it, fetch it by hand into a folder"
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
            "fix model.name; for a private model run: hf auth login",
        ),
    ]
    for family, what, fix in cases:
        if isinstance(error, family):
            return ModelError(what, where="model.name", fix=fix)
    said = one_line(error)
    return ModelError(
        f"fetching {name} failed: {type(error).__name__}: {said}",
        where="model.name",
        fix="run the same command again: what has arrived is kept",
    )


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
                model_files.weight_files(folder, section.name)  # says what is missing
            folder = download(section, root, weights=weights)
        revision = folder.name
    config = model_files.read_config(folder, section.name)
    found = ModelFiles(
        path=folder,
        name=section.name,
        revision=revision,
        config=config,
        kind=model_files.kind_of(config, section.type, name=section.name),
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
    for candidate in (load.resolve_path(root, str(text)), load.shipped(root, str(text))):
        if candidate.is_dir():
            return candidate
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"the model folder {name} is not there",
            where=str(load.resolve_path(root, str(text))),
            fix="fix model.name: a folder (counted from the project root), or a hub id (Qwen/Qwen2.5-3B-Instruct)",
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
            fix="fix model.name: a folder, or a hub id such as Qwen/Qwen2.5-3B-Instruct",
        ) from None
    return Path(path).parent if isinstance(path, str) else None


def _whole(folder: Path, name: str) -> bool:
    try:
        return bool(model_files.weight_files(folder, name))
    except ModelError:
        return False


def convert(folder: Path, name: str) -> list[Path]:
    """Writes model*.safetensors beside pytorch_model*.bin and returns what it wrote; nothing where they are there.

    Read with weights_only=True, which builds tensors and runs no other code of the file. Raises ModelError where there
    is nothing to convert or a file holds more than tensors.
    """
    if has_weights(folder):
        return []
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise ModelError(f"{name} has no weights at all", where=str(folder), fix="name a folder with model weights")
    log.warning("--allow-pickle: reading %s, tensors alone", ", ".join(path.name for path in pickles))
    made: list[Path] = []
    where: dict[str, str] = {}
    for path in pickles:
        target = folder / path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        tensors = _tensors(path)
        where |= dict.fromkeys(tensors, target.name)
        with files.atomic_file(target) as staged:
            _save(tensors, staged)
        made.append(target)
    if len(made) > 1:
        size = sum(path.stat().st_size for path in made)
        files.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
    return made


def _tensors(path: Path) -> dict[str, Any]:
    import pickle

    import torch

    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            f"{path.name} holds more than tensors, or is cut short: {' '.join(str(error).split())[:160]}",
            where=str(path),
            fix="take a repository with model.safetensors",
        ) from None
    if not isinstance(read, dict) or not all(isinstance(value, torch.Tensor) for value in read.values()):
        raise ModelError(f"{path.name} is no table of tensors", where=str(path), fix="take another copy of the model")
    return {name: tensor.contiguous().clone() for name, tensor in read.items()}


def _save(tensors: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
