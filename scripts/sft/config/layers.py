"""Layers of settings: include < file < --set. Mappings merge, lists replace whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sft.config import paths, yaml_dialect
from sft.config.fields import aliases, table
from sft.config.yaml_dialect import Node
from sft.errors import ConfigError, SftError

Mapping = dict[str, Node]
MOST_FILES = 100


@dataclass
class _Reading:
    root: Path
    problems: list[SftError]
    files: list[Path] = field(default_factory=list)


def read(path: Path, sets: Sequence[str], root: Path, problems: list[SftError]) -> tuple[Mapping, list[Path]]:
    """The merged settings of `path`, its includes and `sets`, and the files that were read, includes first.

    What is wrong but leaves the rest readable goes to `problems`; a file that cannot be read at all raises ConfigError.
    """
    reading = _Reading(root, problems)
    if not path.is_file():
        raise _no_file(path, root)
    merged = _file(path, (), reading)
    for item in sets:
        merged = merge(merged, _set(item, problems))
    return merged, reading.files


def merge(base: Mapping, over: Mapping) -> Mapping:
    """`over` laid on `base`: mappings merge key by key, anything else replaces."""
    merged = dict(base)
    for key, node in over.items():
        below = merged.get(key)
        both = below is not None and isinstance(below.value, dict) and isinstance(node.value, dict)
        merged[key] = Node(merge(below.value, node.value), node.where) if below and both else node
    return merged


def parse_file(path: Path, name: str, problems: list[SftError]) -> Mapping:
    """One file's own mapping, `include` still in it; an empty file is an empty mapping."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{name}:{raw.count(bytes([10]), 0, error.start) + 1}"
        raise ConfigError("not UTF-8 text, so not a configuration", where=where) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=name) from None
    node = yaml_dialect.parse(text, name, problems)
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        what = "a configuration is a mapping of keys (`train:` and so on) at its top level"
        raise ConfigError(what, where=node.where, mend="see configs/config_base.yaml for the form")
    return node.value


def _file(path: Path, chain: tuple[Path, ...], reading: _Reading) -> Mapping:
    name = paths.shown(path, reading.root)
    own = parse_file(path, name, reading.problems)
    merged: Mapping = {}
    for text, where in _includes(own.pop("include", None), reading.problems):
        found = _find(text, where, path, reading)
        here = (*chain, path.resolve())
        if found is None:
            continue
        if found.resolve() in here:
            links = [*here[here.index(found.resolve()) :], found]
            shown = " -> ".join(paths.shown(link, reading.root) for link in links)
            mend = "remove one of these includes"
            reading.problems.append(ConfigError(f"the includes go in a circle: {shown}", where=where, mend=mend))
        elif len(reading.files) >= MOST_FILES:
            raise ConfigError(f"more than {MOST_FILES} files are included", where=where)
        else:
            merged = merge(merged, _file(found, here, reading))
    reading.files.append(path)
    return merge(merged, _tidy(own, "", reading.problems))


def _includes(node: Node | None, problems: list[SftError]) -> list[tuple[str, str]]:
    """The paths that a file includes, each with the place that says so."""
    if node is None or node.value is None:
        return []
    entries = node.value if isinstance(node.value, list) else [node]
    for entry in entries:
        if not isinstance(entry.value, str) or not entry.value:
            problems.append(ConfigError("`include` takes a path or a list of paths", where=entry.where))
    return [(entry.value, entry.where) for entry in entries if isinstance(entry.value, str) and entry.value]


def _find(text: str, where: str, includer: Path, reading: _Reading) -> Path | None:
    beside = includer.parent / Path(text).expanduser()
    at_root = paths.resolve(reading.root, text, inside=False)
    hits = [path for path in (beside, at_root) if path.is_file()]
    if len(hits) == 2 and not hits[0].samefile(hits[1]):
        what = f"`include: {text}` means two files: {beside} and {at_root}"
        mend = "write an absolute path, or rename one of them"
        reading.problems.append(ConfigError(what, where=where, mend=mend))
        return None
    if hits:
        return hits[0]
    ours = paths.shipped(reading.root, text)
    if ours.is_file():
        return ours
    what = f"the included file `{text}` was not found: neither {beside} nor {at_root}"
    reading.problems.append(ConfigError(what, where=where, mend="correct the path, or remove the line"))
    return None


def _no_file(path: Path, root: Path) -> ConfigError:
    if path.is_dir():
        return ConfigError(f"{path} is a folder, not a configuration file", mend="name the YAML file inside it")
    known = sorted(paths.shown(found, root) for found in (root / "configs").glob("**/*.yaml"))
    mend = f"choose one: {', '.join(known)}" if known else "name one with --config FILE"
    return ConfigError(f"the configuration file {path} was not found", mend=mend)


def _tidy(mapping: Mapping, prefix: str, problems: list[SftError]) -> Mapping:
    """Other spellings become the key's own name, and an empty section (all its lines commented out) says nothing."""
    tidied: Mapping = {}
    for key, node in mapping.items():
        dotted = aliases().get(prefix + key, prefix + key)
        name = dotted.removeprefix(prefix)
        known = table().get(dotted)
        if name in tidied:
            what = f"`{prefix}{key}` and `{dotted}` are two spellings of one key, and both are given"
            what += f": {tidied[name].where} and {node.where}"
            problems.append(ConfigError(what, where=node.where, mend="remove one of them"))
            continue
        if known and known.section and node.value is None and not known.nullable:
            continue
        inside = bool(known and known.section) and isinstance(node.value, dict)
        tidied[name] = Node(_tidy(node.value, dotted + ".", problems), node.where) if inside else node
    return tidied


def _set(item: str, problems: list[SftError]) -> Mapping:
    """The mapping that `--set a.b=value` stands for, {} when it has no such form.

    A value that opens with a bracket or a quote is read as YAML; anything else is one plain scalar as it stands, so
    that `--set data.system_prompt=Be brief: no #tags` needs no quotes.
    """
    dotted, equals, text = item.partition("=")
    where = f"--set {item if len(item) <= 80 else item[:77] + '...'}"
    keys, text = [key.strip() for key in dotted.split(".")], text.strip()
    mend = "write it as --set train.epochs=3"
    if not equals or not all(keys) or any(" " in key for key in keys):
        problems.append(ConfigError(f"`{item}` is not of the form key=value", where=where, mend=mend))
        return {}
    if keys == ["include"]:
        problems.append(ConfigError("`include` works in files only", where=where, mend="use --config FILE"))
        return {}
    try:
        node = _set_value(text, where, problems)
    except ConfigError as error:
        problems.append(ConfigError(f"the value of `{dotted}` is {error.what}", where=where, mend=mend))
        return {}
    for key in reversed(keys):
        node = Node({key: node}, where)
    return _tidy(node.value, "", problems)


def _set_value(text: str, where: str, problems: list[SftError]) -> Node:
    if not text.startswith(("[", "{", '"', "'")):
        return Node(yaml_dialect.scalar(text), where, text)
    found: list[SftError] = []
    node = yaml_dialect.parse(text, where, found)
    for error in found:
        problems.append(ConfigError(error.what.replace(f": {where}:1 and {where}:1", ""), where=where))
    return _placed(node, where) if node else Node(None, where)


def _placed(node: Node, where: str) -> Node:
    """The same values, all standing at `where`."""
    if isinstance(node.value, dict):
        return Node({key: _placed(child, where) for key, child in node.value.items()}, where)
    if isinstance(node.value, list):
        return Node([_placed(child, where) for child in node.value], where)
    return Node(node.value, where, node.raw)
