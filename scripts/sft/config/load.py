"""Reads a run's configuration: its file, what that includes, and --set; with the place that gave each key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sft.config import layers, verdict, yaml_dialect
from sft.config.fields import table
from sft.config.layers import Mapping
from sft.config.schema import Config
from sft.errors import ConfigError, SftError


@dataclass(frozen=True)
class Loaded:
    """A configuration and where it came from.

    origin: dotted key -> "file:line", "--set" or "default". files: every file that was read, includes first.
    """

    config: Config
    origin: dict[str, str]
    files: list[Path]
    path: Path

    def given(self, key: str) -> bool:
        """Whether a file or --set says something about `key` (or, for a section, about a key in it)."""
        below = [origin for known, origin in self.origin.items() if known == key or known.startswith(key + ".")]
        if not below:
            raise KeyError(key)
        return any(origin != "default" for origin in below)


def load(path: Path | str, sets: Sequence[str] = (), *, root: Path) -> Loaded:
    """The validated configuration of `path`, which counts from the working folder.

    sets: `key=value` texts of --set. root: the project folder, where includes are also looked for.
    Raises ConfigError with every mistake that was found, each with its place.
    """
    path, problems = Path(path), list[SftError]()
    tree, files = layers.read(path, sets, root, problems)
    config = verdict.judge(tree, problems)
    if problems or config is None:
        raise verdict.together(problems, path)
    return Loaded(config, origins(tree), files, path)


def origins(tree: Mapping) -> dict[str, str]:
    """For every key but the sections: the place that gave it, or "default"."""
    found: dict[str, str] = {}
    for key, field in table().items():
        node = verdict.find(tree, key)
        if field.section and (not field.nullable or node is None or isinstance(node.value, dict)):
            continue
        found[key] = "default" if node is None else "--set" if node.where.startswith("--set") else node.where
    return found


def dump(config: Config) -> str:
    """The whole configuration as YAML that `read_resolved` reads back."""
    return yaml_dialect.dump(config.model_dump())


def read_resolved(path: Path | str) -> Config:
    """A run's own `config.resolved.yaml`; nothing is included and nothing is left to --set.

    Raises ConfigError when it is missing or has been edited into something else.
    """
    path, problems = Path(path), list[SftError]()
    if not path.is_file():
        raise ConfigError(f"{path} was not found, so it is not known how this was trained", where=str(path.parent))
    config = verdict.judge(layers.parse_file(path, str(path), problems), problems, settled=True)
    if problems or config is None:
        raise verdict.together(problems, path)
    return config
