"""Sends an export to the hub, model card included; a dry run tells what would go. The token is never shown."""

from __future__ import annotations

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path

from sft import runs
from sft.errors import ModelError, RunError, redact
from sft.model.hub import find_token, offline
from sft.ship import EXPORT_REPORT, MERGE_REPORT, PARITY

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_STAYS = (EXPORT_REPORT, MERGE_REPORT, runs.RESOLVED)  # they hold paths of this machine
_FIXS = {
    401: "the token is not valid, or has no right to write: make another (HF_TOKEN=..., or hf auth login),",
    403: "the token may not write there: push to a name of your own, or give it the right,",
    404: "is the name before the slash that of your account, or of an organisation that you are in?",
}
_SIGNED = re.compile(r"(\bhttps?://[^\s?]+)\?[^\s'\"]+")  # whoever has a store's address whole may write to it


@dataclass(frozen=True)
class Push:
    """What goes, or would go: the repository, each file with its bytes, and its address once it is there."""

    repo: str
    private: bool
    files: dict[str, int]
    dry_run: bool
    address: str | None


def push(folder: Path, repo: str, root: Path, *, private: bool, dry_run: bool) -> Push:
    """Uploads the export in `folder` to the model repository `repo`, which is made if need be.

    Raises RunError (no export, no certificate, a token in a file), ModelError (a bad name, no token, the hub refuses).
    """
    token, _ = find_token(root)
    listed = _listed(folder, repo)
    if dry_run:
        return Push(repo, private, listed, True, None)
    if offline() or not token:
        raise ModelError(
            "the hub is switched off (HF_HUB_OFFLINE)" if offline() else "pushing needs a token of the hub",
            fix="HF_HUB_OFFLINE=0"
            if offline()
            else "export HF_TOKEN=..., or hf auth login; it needs the right to write",
        )
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        hidden = bool(hub.model_info(repo).private)
        if hidden or not private:
            hub.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=[glob.escape(name) for name in listed],
                commit_message="sft-play export",
            )
    except Exception as error:  # httpx's, the hub's, xet's, and whatever the threads of an upload wrap them in
        raise _failed(error, repo) from None
    if private and not hidden:
        raise RunError(
            f"{repo} is there already, and everybody can see it; nothing was sent",
            where=repo,
            fix="make it private in its settings on the hub, or push with --public",
        )
    return Push(repo, hidden, listed, False, f"{hub.endpoint}/{repo}")


def _failed(error: BaseException, repo: str) -> ModelError:
    """What a failed upload means: the innermost reason, without the token, and what to do about its status."""
    wrapped = str(error) if isinstance(error, RuntimeError) else ""  # "Error while uploading FILE to the Hub."
    while error.__cause__ is not None and not hasattr(error, "server_message"):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = redact(" ".join(" ".join(dict.fromkeys((wrapped, str(error)))).split()))
    said = _SIGNED.sub(r"\1", said)[:300] or type(error).__name__
    again = "then push again: files that have arrived are not sent twice"
    if status is None:
        return ModelError(f"the upload broke off: {said}", where=repo, fix=f"does the network reach the hub? {again}")
    return ModelError(f"the hub refused: {said}", where=repo, fix=f"{_FIXS.get(status, 'see what it says,')} {again}")


def _listed(folder: Path, repo: str) -> dict[str, int]:
    """The files that go. Raises RunError, ModelError."""
    if not _NAME.fullmatch(repo):
        raise ModelError(f"{repo!r} is no repository's name", where="--repo", fix="make push REPO=name/model (--repo)")
    if not (folder / EXPORT_REPORT).is_file() or not (folder / PARITY).is_file():
        raise RunError(
            f"there is no export in {folder}", where=str(folder), fix="make export FORMAT=hf (or gguf, ollama)"
        )
    try:
        equal = json.loads((folder / PARITY).read_text(encoding="utf-8"))["equal"] is True
    except (ValueError, KeyError, TypeError):
        equal = False
    if not equal:
        raise RunError(f"{PARITY} in {folder} certifies nothing", where=str(folder / PARITY), fix="make export again")
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in _STAYS}
    for name, path in found.items():
        text = path.read_bytes().decode("utf-8", "ignore") if path.stat().st_size < 1 << 22 else ""
        if redact(text) != text:
            raise RunError(
                f"{name} seems to hold a token of the hub", where=str(path), fix="take it out, then push again"
            )
    return {name: path.stat().st_size for name, path in found.items()}


def newest(root: Path) -> Path:
    """The export that was made last. Raises RunError where there is none."""
    made = sorted((root / "outputs" / "export").glob(f"*/{EXPORT_REPORT}"), key=lambda path: path.stat().st_mtime)
    if not made:
        raise RunError("nothing was exported yet", where=str(root / "outputs" / "export"), fix="make export FORMAT=hf")
    return made[-1].parent
