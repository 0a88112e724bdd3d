"""Reads a run's settings: YAML files that include each other, then --set; every mistake is named with its line.

A file becomes a tree of nodes, each with its place. Trees are merged in order (includes, the file, --set) and validated
by the schema; all problems are collected and raised as one ConfigError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sft.config.reference import Field, table
from sft.config.schema import RENAMED, Config
from sft.errors import ConfigError, SftError, nearest, one_line

PROJECT = Path(__file__).resolve().parents[3]
MAX_NODES = 20_000


class Problems(list[SftError]):
    """Every mistake of a configuration, so that all are shown at once."""

    def add(self, what: str, where: str | None, fix: str | None = None) -> None:
        self.append(ConfigError(what, where=where, fix=fix))

    def raise_all(self, path: Path) -> None:
        """Raises one error with all problems, in the order of files and lines; nothing if there are none."""

        def position(problem: SftError) -> tuple[bool, list[str | int]]:
            parts = re.split(r"(\d+)", problem.where or "")
            return parts[0].startswith("--set"), [int(part) if part.isdigit() else part for part in parts]

        ordered = sorted({(problem.what, problem.where): problem for problem in self}.values(), key=position)
        if len(ordered) == 1:
            raise ordered[0]
        if ordered:
            raise ConfigError(f"{len(ordered)} mistakes in the settings of {path}:", problems=ordered)


# --- paths


def resolve_path(root: Path, text: str | Path, *, inside: bool = True) -> Path:
    """The absolute path that `text` in a config means: relative to `root`; an absolute one stays, `~` is home.

    Raises ConfigError for a relative one that leaves the project, unless `inside` is false: a config from elsewhere
    must not reach files that its reader never named.
    """
    path = Path(text).expanduser()
    resolved = Path(os.path.normpath(root.absolute() / path))
    if inside and not path.is_absolute() and not resolved.is_relative_to(os.path.normpath(root.absolute())):
        raise ConfigError(
            f"the path {text} leads out of the project ({root})", fix=f"if it is meant, write it out: {resolved}"
        )
    return resolved


def shipped(root: Path, text: str | Path) -> Path:
    """Like `resolve_path`, but a file that `root` lacks and sft-play ships (chat_templates, models/demo) is ours."""
    path = resolve_path(root, text)
    own = resolve_path(PROJECT, text)
    return own if not path.exists() and own.exists() else path


def display_path(path: Path, root: Path) -> str:
    """How messages name a file: from the project root where it lies inside, else as it is."""
    absolute = Path(os.path.normpath(path.absolute()))
    return str(absolute.relative_to(root.absolute())) if absolute.is_relative_to(root.absolute()) else str(path)


def is_model_folder(name: str) -> bool:
    """Whether a model is named by a folder, a GGUF file or a package, and not by a hub id."""
    local = name.startswith((".", "/", "~", "models/", "pypi:")) or name.lower().endswith(".gguf")
    return local or name.count("/") > 1 or Path(name).is_dir()


def model_name(name: str) -> str:
    """A hub id unchanged; of a folder only the last part, since its path means nothing on another machine."""
    return Path(name).name if is_model_folder(name) else name


# --- our YAML dialect: YAML 1.2's numbers, booleans and null; everything else is text


@dataclass(frozen=True)
class Node:
    """A value and its place; a mapping holds nodes by key, a list holds nodes.

    where: "file:line" or "--set ...". raw: the text of a plain scalar (`007`, `1.10`), for keys that take text.
    """

    value: Any
    where: str
    raw: str | None = None


Tree = dict[str, Node]

_CONSTANTS = {"": None, "~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.title(), word.upper())
}
_PLAIN, _CORE = "!plain", "tag:yaml.org,2002:"


def scalar(text: str) -> Any:
    """What a plain scalar means: null, a boolean, a decimal number, or the text itself. `1e5` is a whole number."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    try:
        value = int(text) if re.fullmatch(r"[-+]?[\d_]+", text) else float(text)
    except ValueError:
        return text
    if not re.fullmatch(r"[-+.\deE_]+", text):  # float() also reads inf and nan
        return text
    return int(value) if "." not in text and abs(value) < 2**53 and value == int(value) else value


def plain(node: Node, key: str = "") -> Any:
    """The value of the dotted `key` without its places; numbers are as they were written where the key takes text."""
    if isinstance(node.value, dict):
        return {name: plain(child, f"{key}.{name}".lstrip(".")) for name, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child, f"{key}[]") for child in node.value]
    field, is_number = table().get(key.removesuffix("[]")), isinstance(node.value, int | float)
    return node.raw if field and field.text and is_number and not isinstance(node.value, bool) else node.value


class _Loader(yaml.SafeLoader):
    """Marks plain scalars and leaves it to `scalar` what they mean."""

    yaml_implicit_resolvers = {None: [(_PLAIN, re.compile(""))]}  # type: ignore[assignment, list-item] # noqa: RUF012


def parse(text: str, name: str, problems: Problems, prefix: str = "") -> Node | None:
    """Reads one YAML document; None when it is empty.

    name: the file in messages. prefix: the dotted section that the text belongs to. Duplicate keys and unusual tags are
    added to `problems`. Raises ConfigError with file:line when the text is not YAML at all.
    """
    count = 0

    def place(node: yaml.Node) -> str:
        return name if name.startswith("--set") else f"{name}:{node.start_mark.line + 1}"

    def read(node: yaml.Node, prefix: str) -> Node:
        nonlocal count
        count += 1
        if count > MAX_NODES:
            raise ConfigError("its aliases expand to too many values", where=place(node), fix="write the values out")
        if isinstance(node, yaml.MappingNode):
            return Node(mapping(node, prefix), place(node))
        if isinstance(node, yaml.SequenceNode):
            return Node([read(child, prefix) for child in node.value], place(node))
        if node.tag == _PLAIN:
            return Node(scalar(node.value), place(node), node.value)
        if node.tag != f"{_CORE}str":
            problems.add(f"the tag `{node.tag}` is not supported", place(node), "write the value without it")
        return Node(node.value, place(node))

    def mapping(node: yaml.MappingNode, prefix: str) -> Tree:
        tree = Tree()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                problems.add("a key must be a plain word", place(key_node))
                continue
            key = RENAMED.get(prefix + key_node.value, prefix + key_node.value)
            own, value = key.removeprefix(prefix), read(value_node, f"{key}.")
            if own in tree:
                what = f"the key `{key}` is set twice: {tree[own].where} and {place(key_node)}"
                problems.add(what, place(key_node), "remove one of the two lines")
            elif value.value is not None or not _is_section(key):
                tree[own] = Node(value.value, place(key_node), value.raw)
        return tree

    try:
        root = _Loader(text).get_single_node()  # type: ignore[no-untyped-call]
        return None if root is None else read(root, prefix)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "context", None) or error
        where = f"{name}:{mark.line + 1}" if mark else name
        fix = "look at this line and the one above it"
        raise ConfigError(f"not valid YAML: {one_line(what)}", where=where, fix=fix) from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=name) from None


def _is_section(key: str) -> bool:
    """Whether a key without a value is a section whose lines are all commented out, which changes nothing."""
    field = table().get(key)
    return bool(field and field.section and not field.nullable)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or `scalar` would read as something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Double quotes also for the rarer line breaks, which PyYAML would fold."""
    quoted = not isinstance(scalar(text), str) or any(mark in text for mark in "\x85\u2028\u2029\r")
    return dumper.represent_scalar(f"{_CORE}str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """YAML text that `parse` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- layers: include < the file < --set


def merge(base: Tree, over: Tree) -> Tree:
    """`over` on top of `base`: mappings merge key by key, anything else replaces."""
    merged = dict(base)
    for key, node in over.items():
        below = merged.get(key)
        both = below is not None and isinstance(below.value, dict) and isinstance(node.value, dict)
        merged[key] = Node(merge(below.value, node.value), node.where) if below and both else node
    return merged


def read(path: Path, root: Path, problems: Problems, chain: tuple[Path, ...] = ()) -> Tree:
    """The merged tree of `path` and what it includes. chain: the files that include it, outermost first."""
    own = parse_file(path, display_path(path, root), problems)
    merged, chain, include = Tree(), (*chain, path.resolve()), own.pop("include", Node([], ""))
    for entry in include.value if isinstance(include.value, list) else [include] if include.value is not None else []:
        if not isinstance(entry.value, str) or not entry.value:
            problems.add("`include` takes a path or a list of paths", entry.where)
            continue
        places = (path.parent / Path(entry.value).expanduser(), resolve_path(root, entry.value, inside=False))
        included = next((place for place in (*places, shipped(root, entry.value)) if place.is_file()), None)
        if included is None:
            what = f"the included file `{entry.value}` was not found beside this file or in {root}"
            problems.add(what, entry.where, "correct the path, or remove the line")
        elif included.resolve() in chain:
            links = [*chain[chain.index(included.resolve()) :], included]
            shown = " -> ".join(display_path(link, root) for link in links)
            problems.add(f"the includes form a cycle: {shown}", entry.where, "remove one of these includes")
        else:
            merged = merge(merged, read(included, root, problems, chain))
    return merge(merged, own)


def parse_file(path: Path, name: str, problems: Problems) -> Tree:
    """One file's own tree, `include` still in it; an empty file is an empty tree."""
    try:
        data = path.read_bytes()
        node = parse(data.decode("utf-8-sig"), name, problems)
    except UnicodeDecodeError as error:
        where = f"{name}:{data.count(bytes([10]), 0, error.start) + 1}"
        raise ConfigError("not UTF-8 text, so not a configuration", where=where) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=name) from None
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        what = "a configuration is a mapping of keys (`train:` and so on) at its top level"
        raise ConfigError(what, where=node.where, fix="see configs/config_base.yaml for the form")
    return node.value


def parse_set(item: str, problems: Problems) -> Tree:
    """The tree of one `--set a.b=value`, {} if it has no such form.

    A value that starts with a bracket or a quote is YAML; anything else is one plain scalar as it is, so that
    `--set data.system_prompt=Be brief: no #tags` needs no quotes.
    """
    dotted, equals, text = item.partition("=")
    where, fix = f"--set {item if len(item) <= 80 else item[:77] + '...'}", "write it as --set train.epochs=3"
    dotted, text = ".".join(part.strip() for part in dotted.split(".")), text.strip()
    key = RENAMED.get(dotted, dotted)
    if not equals or not all(key.split(".")) or " " in key:
        problems.add(f"`{item}` is not of the form key=value", where, fix)
        return {}
    if key == "include":
        problems.add("`include` works in files only", where, "use --config FILE")
        return {}
    node: Node | None = Node(scalar(text), where, text)
    if text.startswith(("[", "{", '"', "'")):
        try:
            node = parse(text, where, problems, f"{key}.")
        except ConfigError as error:
            problems.add(f"the value of `{dotted}` is {error.what}", where, fix)
            return {}
    if node is None or (node.value is None and _is_section(key)):
        return {}
    for part in reversed(key.split(".")):
        node = Node({part: node}, where)
    return dict(node.value)


# --- validation


def validate(tree: Tree, problems: Problems) -> Config | None:
    """The Config, or None with every mistake added to `problems`."""
    try:
        return Config.model_validate(plain(Node(tree, "")), strict=True)
    except ValidationError as error:
        entries = error.errors(include_url=False, include_context=False)
    located: dict[str, tuple[Node, Any]] = {}
    for entry in entries:  # pydantic reports every member of a union; one problem for each value is enough
        item, node = _locate(tree, entry["loc"])
        located.setdefault(item, (node, entry))
    for item, (node, entry) in located.items():
        if not any(other.startswith(item + "[") for other in located):
            problems.append(_problem(item, node, entry))
    return None


def find(tree: Tree, key: str) -> Node | None:
    """The node of a dotted key."""
    node: Node | None = Node(tree, "")
    for part in key.split("."):
        node = node.value.get(part) if node and isinstance(node.value, dict) else None
    return node


def _locate(tree: Tree, location: tuple[int | str, ...]) -> tuple[str, Node]:
    """The dotted key or item (`key[0].name`) and its node; the names of union members in `location` are skipped."""
    node, item = Node(tree, ""), ""
    for part in location:
        if isinstance(node.value, dict) and part in node.value:
            node, item = node.value[part], f"{item}.{part}".lstrip(".")
        elif isinstance(node.value, list) and isinstance(part, int):
            node, item = node.value[part], f"{item}[{part}]"
    return item, node


def _problem(item: str, node: Node, entry: Any) -> ConfigError:
    """One of pydantic's errors with the key, its place and what to write instead."""
    key, kind = re.sub(r"\[\d+\]", "[]", item), entry["type"]
    field = table().get(key.removesuffix("[]"))
    page = f"see `{field.key}` in docs/CONFIG.md" if field else "see docs/CONFIG.md for every key"
    if kind == "value_error":
        what, _, fix = entry["msg"].removeprefix("Value error, ").partition(" fix: ")
        if not item:  # keys of several sections that contradict each other: the message names them
            named = {name: find(node.value, name) for name in re.findall(r"[a-z]\w*(?:\.\w+)+", what)}
            places = ", ".join(f"{child.where} ({name})" for name, child in named.items() if child)
            return ConfigError(what, where=places or None, fix=fix or "change one of them")
        what = f"`{item}`: {what}"
        if not isinstance(node.value, dict):
            return ConfigError(what, where=node.where, fix=page)
        keys = {name: child for name, child in node.value.items() if re.search(rf"\b{re.escape(name)}\b", what)}
        places = ", ".join(f"{child.where} ({item}.{name})" for name, child in keys.items())
        return ConfigError(what, where=places or node.where, fix="change one, or remove it to take its default")
    if field is None or kind == "extra_forbidden":
        return ConfigError(f"unknown key `{item}`", where=node.where, fix=_did_you_mean(key) or page)
    if kind == "missing":
        return ConfigError(f"`{item}`: `{entry['loc'][-1]}` is missing", where=node.where, fix=page)
    expected = field.expected
    if item.endswith("]"):  # of a list
        expected = "a mapping" if "mappings" in expected else f"one of {expected}" if "`" in expected else "text"
    return ConfigError(f"`{item}`: expected {expected}, not {_shown(node)}", where=node.where, fix=_fix(field, node))


def _shown(node: Node) -> str:
    value = node.value
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool) or value is None:
        return "null" if value is None else f"`{str(value).lower()}`"
    return f"the text {value[:60]!r}" if isinstance(value, str) else str(node.raw or value)[:60]


def _fix(field: Field, node: Node) -> str:
    if field.section and node.value is not None:
        names = [key.removeprefix(f"{field.key}.") for key in table() if key.startswith(f"{field.key}.")]
        return f"its keys are {', '.join(name for name in names if '.' not in name)}, each on an indented line"
    if isinstance(node.value, str) and (close := nearest(node.value.lower(), field.choices)):
        return f"did you mean `{close}`?"
    return f"the default is `{field.key.rpartition('.')[2]}: {field.shown_default}`"


OTHER_TRAINERS = {  # our key -> its names in TRL, transformers, Axolotl and LLaMA-Factory
    "model.name": ("base_model", "model_name", "model_name_or_path"),
    "model.max_seq_len": ("max_seq_length", "max_length", "sequence_len", "cutoff_len"),
    "tuning.lora.r": ("lora_r", "lora_rank"),
    "tuning.lora.alpha": ("lora_alpha",),
    "tuning.lora.dropout": ("lora_dropout",),
    "tuning.lora.target_modules": ("lora_target", "lora_target_modules"),
    "tuning.mode": ("load_in_4bit", "adapter", "finetuning_type"),
    "train.learning_rate": ("lr",),
    "train.epochs": ("num_epochs", "num_train_epochs"),
    "train.batch_size": ("per_device_train_batch_size", "micro_batch_size"),
    "train.grad_accum": ("gradient_accumulation_steps",),
    "train.lr_scheduler_type": ("lr_scheduler",),
    "train.bf16": ("mixed_precision",),
    "train.optim": ("optimizer",),
    "logging.log_interval": ("logging_steps",),
    "logging.backend": ("report_to",),
    "data.raw_path": ("dataset", "datasets"),
}


def _did_you_mean(key: str) -> str | None:
    """The likeliest keys: the same name in another section, another trainer's name for it, then a similar name."""
    section, _, name = key.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in table()}
    siblings = [last for known, last in names.items() if known.rpartition(".")[0] == section]
    hits = [known for known, last in names.items() if last == name]
    hits = hits or [known for known, others in OTHER_TRAINERS.items() if name in others]
    if not hits and (close := nearest(name, siblings)):
        hits = [f"{section}.{close}".lstrip(".")]
    if not hits and (close := nearest(name, names.values(), 0.7)):
        hits = [known for known, last in names.items() if last == close]
    hits.sort(key=lambda known: (known.split(".")[0] != section.split(".")[0], not known.startswith("train.")))
    return f"did you mean {' or '.join(f'`{hit}`' for hit in hits[:2])}?" if hits else None


# --- what commands call


@dataclass(frozen=True)
class Loaded:
    """A configuration and the merged tree that it came from."""

    config: Config
    tree: Tree

    def origin(self, key: str) -> str | None:
        """The "file:line" or "--set ..." that sets `key`, or begins to set a section; None for a default."""
        node = find(self.tree, key)
        return node.where if node else None

    def is_set(self, key: str) -> bool:
        """Whether a file or --set sets `key` (or, for a section, a key in it)."""
        return find(self.tree, key) is not None


def load(path: Path | str, sets: Sequence[str] = (), *, root: Path) -> Loaded:
    """The validated configuration of `path`, which counts from the working folder.

    sets: the `key=value` texts of --set. root: the project folder, where includes are also looked for.
    Raises ConfigError with every mistake, each with its place.
    """
    path, problems = Path(path), Problems()
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a configuration file", fix="name the YAML file inside it")
    if not path.is_file():
        known = sorted(display_path(each, root) for each in (root / "configs").glob("**/*.yaml"))
        fix = f"choose one: {', '.join(known)}" if known else "name one with --config FILE"
        raise ConfigError(f"the configuration file {path} was not found", fix=fix)
    tree = read(path, root, problems)
    for item in sets:
        tree = merge(tree, parse_set(item, problems))
    config = validate(tree, problems)
    problems.raise_all(path)
    assert config is not None
    return Loaded(config, tree)


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `load` reads back."""
    return dump_yaml(config.model_dump())
