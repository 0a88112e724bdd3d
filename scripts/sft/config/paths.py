"""Where a path in a configuration points: from the project root, unless it is absolute."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]


def resolve(root: Path, text: str | Path) -> Path:
    """The absolute path that `text` in a config means: an absolute one stays, `~` is the home folder."""
    path = Path(text).expanduser()
    return Path(os.path.normpath(path if path.is_absolute() else root.absolute() / path))


def shipped(root: Path, text: str | Path) -> Path:
    """Like `resolve`, but what the root lacks and sft-play ships (chat_templates, models/demo) is taken from there."""
    path = resolve(root, text)
    own = resolve(PROJECT, text)
    return own if not path.exists() and own.exists() else path


def shown(path: Path, root: Path) -> str:
    """How messages name a file: from the project root when it lies inside, else as it was given."""
    absolute = Path(os.path.normpath(path.absolute()))
    return str(absolute.relative_to(root.absolute())) if absolute.is_relative_to(root.absolute()) else str(path)
