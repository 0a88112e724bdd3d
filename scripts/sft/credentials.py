"""The hub token: where it may come from, and how it is kept out of everything that is written.

Order: HF_TOKEN, HUGGINGFACE_HUB_TOKEN, the file `.env` at the project root, `hf auth login`. It is never shown.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

NAMES = ("HF_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SHAPE = re.compile(r"\bhf_[A-Za-z0-9]{8,}\b")
_seen: set[str] = set()


def find(root: Path) -> tuple[str | None, str]:
    """The token and the name of the place it was found in ("" without one); the token is for the hub client alone."""
    for name in NAMES:
        if value := os.environ.get(name, "").strip():
            return _remember(value), name
    dotenv = root / ".env"
    if dotenv.is_file():
        from dotenv import dotenv_values

        values = dotenv_values(dotenv)
        for name in NAMES:
            if value := (values.get(name) or "").strip():
                return _remember(value), f".env ({name})"
    from huggingface_hub import get_token

    logged_in = get_token()
    return (_remember(logged_in), "hf auth login") if logged_in else (None, "")


def install(root: Path) -> str:
    """Hands the token to every library of this process through HF_TOKEN; returns where it came from, "" without one."""
    token, place = find(root)
    if token and place != "hf auth login":
        os.environ.setdefault("HF_TOKEN", token)
    return place


def redact(text: str) -> str:
    """`text` with every hub token in it replaced, the ones seen here and anything of their shape."""
    for token in sorted(_seen, key=len, reverse=True):
        text = text.replace(token, "hf_***")
    return _SHAPE.sub("hf_***", text)


def _remember(token: str) -> str:
    if len(token) >= 8:
        _seen.add(token)
    return token
