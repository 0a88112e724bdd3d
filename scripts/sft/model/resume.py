"""Fetches one large file of a hub repository into the hub's cache, from the byte where a broken download stopped.

huggingface_hub (1.33) starts a file anew in every process; with shards of 4 GB that is the whole evening. What is
fetched here lies in the cache as the library itself puts it there, and its SHA-256 is checked against the hub's.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from sft import files as disk
from sft.errors import ModelError


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
    with disk.lock(folder / f"{known.etag}.part.lock", f"the download of {name}"):
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
        if len(known.etag) == 64 and disk.sha256(part) != known.etag:
            part.unlink()
            raise ModelError(f"{name} of {repository} arrived damaged", mend="run the same command again")
        part.replace(blob)
