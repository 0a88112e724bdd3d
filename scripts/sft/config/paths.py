"""Where a path in a configuration points: from the project root, unless it is absolute."""

from __future__ import annotations

import os
from pathlib import Path

from sft.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[3]


def resolve(root: Path, text: str | Path, *, inside: bool = True) -> Path:
    """The absolute path that `text` in a config means: an absolute one stays, `~` is the home folder.

    Raises ConfigError for a relative one that leads out of the project, unless `inside` is false: a config that came
    from elsewhere must not reach what its reader never named.
    """
    path = Path(text).expanduser()
    found = Path(os.path.normpath(path if path.is_absolute() else root.absolute() / path))
    if inside and not path.is_absolute() and not found.is_relative_to(os.path.normpath(root.absolute())):
        raise ConfigError(
            f"the path {text} leads out of the project ({root})", mend=f"if it is meant, write it out: {found}"
        )
    return found


def shipped(root: Path, text: str | Path) -> Path:
    """Like `resolve`, but what the root lacks and sft-play ships (chat_templates, models/demo) is taken from there."""
    path = resolve(root, text)
    own = resolve(PROJECT, text)
    return own if not path.exists() and own.exists() else path


def shown(path: Path, root: Path) -> str:
    """How messages name a file: from the project root when it lies inside, else as it was given."""
    absolute = Path(os.path.normpath(path.absolute()))
    return str(absolute.relative_to(root.absolute())) if absolute.is_relative_to(root.absolute()) else str(path)


def is_model_folder(name: str) -> bool:
    """Whether a model is named by a folder and not by a hub id."""
    return name.startswith((".", "/", "~", "models/")) or name.count("/") > 1 or Path(name).is_dir()


def model_name(name: str) -> str:
    """A hub id as it is; of a folder its last part alone, since a path says nothing elsewhere."""
    return Path(name).name if is_model_folder(name) else name
