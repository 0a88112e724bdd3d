"""Uploads an export and its model card to the model hub; a dry run lists the files. No token is ever shown."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from sft import runs
from sft.errors import ModelError, RunError, redact
from sft.files import read_json
from sft.model.hub import find_token, offline
from sft.ship import EXPORT_REPORT, MERGE_REPORT, PARITY

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_SENT = (EXPORT_REPORT, MERGE_REPORT, runs.RESOLVED)  # they hold paths of this machine
_TEXT_BYTES = 1 << 22  # smaller files are searched for tokens
_FIXES = {  # by HTTP status
    401: "the token is not valid, or has no right to write: create another (HF_TOKEN=..., or hf auth login),",
    403: "the token may not write there: push to a repository of your own, or give it the right,",
    404: "check that the name before the slash is your account or an organisation that you belong to,",
}
_SIGNED_URL = re.compile(r"(\bhttps?://[^\s?]+)\?[^\s'\"]+")  # its query lets anyone write to the store


@dataclass(frozen=True)
class Push:
    """What was sent, or would be: the repository, bytes by file, and the address once it is there."""

    repo: str
    private: bool
    files: dict[str, int]
    dry_run: bool
    address: str | None


def push(folder: Path, repo: str, root: Path, *, private: bool, dry_run: bool) -> Push:
    """Uploads the export in `folder` to the model repository `repo`, which is created if need be.

    Raises RunError (no export, no certificate, a token in a file), ModelError (a bad name, no token, the hub refuses).
    """
    token, _ = find_token(root)
    sizes = _files_to_send(folder, repo)
    if dry_run:
        return Push(repo, private, sizes, True, None)
    if offline():
        raise ModelError("the hub is switched off (HF_HUB_OFFLINE)", fix="HF_HUB_OFFLINE=0")
    if not token:
        fix = "export HF_TOKEN=..., or hf auth login; it needs the right to write"
        raise ModelError("pushing needs a token of the hub", fix=fix)
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        is_private = bool(hub.model_info(repo).private)
        if is_private or not private:
            patterns = [glob.escape(name) for name in sizes]
            hub.upload_folder(
                repo_id=repo, folder_path=folder, allow_patterns=patterns, commit_message="sft-play export"
            )
    except Exception as error:  # httpx's, the hub's, xet's, and whatever the threads of an upload wrap them in
        raise upload_error(error, repo) from None
    if private and not is_private:
        what = f"{repo} exists already and is public; nothing was sent"
        raise RunError(what, where=repo, fix="make it private in its settings on the hub, or push with --public")
    return Push(repo, is_private, sizes, False, f"{hub.endpoint}/{repo}")


def upload_error(error: BaseException, repo: str) -> ModelError:
    """The error of a failed upload: its innermost reason without the token, and what to do about its HTTP status."""
    wrapper = str(error) if isinstance(error, RuntimeError) else ""  # "Error while uploading FILE to the Hub."
    while error.__cause__ is not None and not hasattr(error, "server_message"):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = redact(" ".join(" ".join(dict.fromkeys((wrapper, str(error)))).split()))
    reason = _SIGNED_URL.sub(r"\1", reason)[:300] or type(error).__name__
    again = "then push again: files that have arrived are not sent twice"
    if status is None:
        return ModelError(f"the upload was interrupted: {reason}", where=repo, fix=f"check the network, {again}")
    return ModelError(f"the hub refused: {reason}", where=repo, fix=f"{_FIXES.get(status, 'see its reason,')} {again}")


def _files_to_send(folder: Path, repo: str) -> dict[str, int]:
    """Bytes by file. Raises ModelError (a bad name), RunError (no export, no certificate, a token in a file)."""
    if not _REPOSITORY.fullmatch(repo):
        raise ModelError(f"{repo!r} is not a repository name", where="--repo", fix="make push REPO=name/model (--repo)")
    if not (folder / EXPORT_REPORT).is_file() or not (folder / PARITY).is_file():
        fix = "make export FORMAT=hf (or gguf, ollama)"
        raise RunError(f"there is no export in {folder}", where=str(folder), fix=fix)
    if read_json(folder / PARITY).get("equal") is not True:
        raise RunError(f"{PARITY} in {folder} certifies nothing", where=str(folder / PARITY), fix="make export again")
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in _NOT_SENT]
    for path in paths:
        text = path.read_bytes().decode("utf-8", "ignore") if path.stat().st_size < _TEXT_BYTES else ""
        if redact(text) != text:
            fix = "remove it, then push again"
            raise RunError(f"{path.name} seems to contain a token of the hub", where=str(path), fix=fix)
    return {path.name: path.stat().st_size for path in paths}


def newest_export(root: Path) -> Path:
    """The folder of the last export. Raises RunError if there is none."""
    place = root / "outputs" / "export"
    reports = sorted(place.glob(f"*/{EXPORT_REPORT}"), key=lambda path: path.stat().st_mtime)
    if not reports:
        raise RunError("nothing has been exported yet", where=str(place), fix="make export FORMAT=hf")
    return reports[-1].parent
