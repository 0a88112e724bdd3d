"""Where a path in a configuration points: from the project root, unless it is absolute."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sft.config.reference import Field, aliases, table
from sft.config.schema import Config
from sft.errors import ConfigError, SftError

PROJECT = Path(__file__).resolve().parents[3]


def resolve_path(root: Path, text: str | Path, *, inside: bool = True) -> Path:
    """The absolute path that `text` in a config means: an absolute one stays, `~` is the home folder.

    Raises ConfigError for a relative one that leads out of the project, unless `inside` is false: a config that came
    from elsewhere must not reach what its reader never named.
    """
    path = Path(text).expanduser()
    found = Path(os.path.normpath(path if path.is_absolute() else root.absolute() / path))
    if inside and not path.is_absolute() and not found.is_relative_to(os.path.normpath(root.absolute())):
        raise ConfigError(
            f"the path {text} leads out of the project ({root})", fix=f"if it is meant, write it out: {found}"
        )
    return found


def shipped(root: Path, text: str | Path) -> Path:
    """Like `resolve`, but what the root lacks and sft-play ships (chat_templates, models/demo) is taken from there."""
    path = resolve_path(root, text)
    own = resolve_path(PROJECT, text)
    return own if not path.exists() and own.exists() else path


def display_path(path: Path, root: Path) -> str:
    """How messages name a file: from the project root when it lies inside, else as it was given."""
    absolute = Path(os.path.normpath(path.absolute()))
    return str(absolute.relative_to(root.absolute())) if absolute.is_relative_to(root.absolute()) else str(path)


def is_model_folder(name: str) -> bool:
    """Whether a model is named by a folder and not by a hub id."""
    return name.startswith((".", "/", "~", "models/")) or name.count("/") > 1 or Path(name).is_dir()


def model_name(name: str) -> str:
    """A hub id as it is; of a folder its last part alone, since a path says nothing elsewhere."""
    return Path(name).name if is_model_folder(name) else name


MOST_BYTES = 256 * 1024
MOST_NODES = 20_000
DEEPEST = 40

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?\d+(_\d+)*|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\d+(_\d+)*(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PLAIN = "!plain"
_CORE = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Node:
    """A value and where it stands; a mapping holds nodes by key, a list holds nodes.

    raw: the text of a plain scalar (`007`, `1.10`), which a text field takes in place of the number.
    """

    value: Any
    where: str
    raw: str | None = None


def plain(node: Node) -> Any:
    """The value without its places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def scalar(text: str) -> Any:
    """What a plain scalar means: null, true/false, a number, or the text as it stands."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        digits = text.replace("_", "")
        return int(digits, 0) if digits[:2] in ("0x", "0o") else int(digits) if len(digits) < 400 else float(digits)
    if _FLOAT.fullmatch(text):
        return _number(text.replace("_", "").lower())
    return text


def _number(text: str) -> float | int:
    """A float; `1e5`, which people write for a count, is the whole number."""
    if text.lstrip("+-").startswith((".inf", ".nan")):
        return float(text.replace(".", ""))
    value = float(text)
    whole = "e" in text and "." not in text and abs(value) < 2**53 and value == int(value)
    return int(value) if whole else value


class _Loader(yaml.SafeLoader):
    """Marks plain scalars as such and resolves nothing itself."""

    yaml_implicit_resolvers = {None: [(_PLAIN, re.compile(""))]}  # type: ignore[assignment, list-item] # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes a text that either YAML 1.1 or this dialect would read as something else."""


for _tag, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(_CORE + _tag, re.compile(rf"(?:{_pattern.pattern})\Z"), None)  # type: ignore[no-untyped-call]


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """PyYAML would fold these rarer line breaks; in double quotes they are escaped."""
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029\r") else None
    return dumper.represent_scalar(_CORE + "str", text, style=style)


_Dumper.add_representer(str, _text)


def dump_yaml(value: Any) -> str:
    """YAML text that `parse` reads back to the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse(text: str, name: str, problems: list[SftError]) -> Node | None:
    """Reads one YAML document; None when it is empty.

    name: what to call the file in messages. Duplicate keys and unusual tags are added to `problems`.
    Raises ConfigError with file:line when the text is not YAML at all.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"too long for a configuration ({len(text):,} characters)", where=name)
    try:
        root = _Loader(text).get_single_node()  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, name) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"a character that YAML does not take: {text[error.position]!r}", where=f"{name}:{line}"
        ) from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=name) from None
    return None if root is None else _Reader(name, problems).read(root, 0, "")


def _syntax_error(error: yaml.MarkedYAMLError, name: str) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    where = f"{name}:{mark.line + 1}" if mark else name
    said = " ".join(str(error.problem or error.context).split())
    if "'\\t'" in said:
        return ConfigError("a tab where YAML wants spaces", where=where, fix="indent with spaces")
    if "mapping values" in said:
        fix = 'a text that holds ": " needs quotes; otherwise look at the indentation of this line and the one above'
        return ConfigError("not valid YAML: a second `: ` in one value", where=where, fix=fix)
    if "expected a single document" in str(error):
        return ConfigError("two YAML documents in one file", where=where, fix="remove the `---` between them")
    return ConfigError(f"not valid YAML: {said}", where=where, fix="look at this line and the one above it")


class _Reader:
    """Turns PyYAML's nodes into ours, within the bounds."""

    def __init__(self, name: str, problems: list[SftError]) -> None:
        self.name, self.problems, self.seen = name, problems, 0

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def read(self, node: yaml.Node, depth: int, key: str) -> Node:
        self.seen += 1
        if self.seen > MOST_NODES or depth > DEEPEST:
            what = "nested too deeply" if depth > DEEPEST else "its aliases expand to too many values"
            raise ConfigError(what, where=self.place(node), fix="write the values out without `*` and `<<`")
        if isinstance(node, yaml.MappingNode):
            return Node(self.mapping(node, depth, key), self.place(node))
        if isinstance(node, yaml.SequenceNode):
            return Node([self.read(child, depth + 1, key) for child in node.value], self.place(node))
        return self.scalar(node)

    def scalar(self, node: yaml.Node) -> Node:
        if node.tag == _PLAIN:
            return Node(scalar(node.value), self.place(node), node.value)
        kind = node.tag.removeprefix(_CORE)
        if kind in ("int", "float", "bool", "null"):
            return Node(scalar(node.value), self.place(node), node.value)
        if kind != "str":
            fix = "write the value without it"
            self.problems.append(ConfigError(f"the tag `{node.tag}` is not taken", where=self.place(node), fix=fix))
        return Node(node.value, self.place(node))

    def mapping(self, node: yaml.MappingNode, depth: int, path: str) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(ConfigError("a key must be a plain word", where=place))
            elif key_node.tag == _PLAIN and key_node.value == "<<":
                self.merge(value_node, merged, depth, path)
            elif key_node.value in own:
                what = f"the key `{path}{key_node.value}` stands twice: {own[key_node.value].where} and {place}"
                self.problems.append(ConfigError(what, where=place, fix="remove one of the two lines"))
            else:
                value = self.read(value_node, depth + 1, f"{path}{key_node.value}.")
                own[key_node.value] = Node(value.value, place, value.raw)
        return {**merged, **own}

    def merge(self, node: yaml.Node, into: dict[str, Node], depth: int, path: str) -> None:
        """`<<: *anchor` or a list of them; the first one that has a key wins, as the YAML merge type says."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                self.problems.append(ConfigError("`<<` takes a mapping or a list of them", where=self.place(source)))
                continue
            for key, value in self.read(source, depth + 1, path).value.items():
                into.setdefault(key, value)


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
    node = parse(text, name, problems)
    if node is None or node.value is None:
        return {}
    if not isinstance(node.value, dict):
        what = "a configuration is a mapping of keys (`train:` and so on) at its top level"
        raise ConfigError(what, where=node.where, fix="see configs/config_base.yaml for the form")
    return node.value


def _file(path: Path, chain: tuple[Path, ...], reading: _Reading) -> Mapping:
    name = display_path(path, reading.root)
    own = parse_file(path, name, reading.problems)
    merged: Mapping = {}
    for text, where in _includes(own.pop("include", None), reading.problems):
        found = _find(text, where, path, reading)
        here = (*chain, path.resolve())
        if found is None:
            continue
        if found.resolve() in here:
            links = [*here[here.index(found.resolve()) :], found]
            shown = " -> ".join(display_path(link, reading.root) for link in links)
            fix = "remove one of these includes"
            reading.problems.append(ConfigError(f"the includes go in a circle: {shown}", where=where, fix=fix))
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
    at_root = resolve_path(reading.root, text, inside=False)
    hits = [path for path in (beside, at_root) if path.is_file()]
    if len(hits) == 2 and not hits[0].samefile(hits[1]):
        what = f"`include: {text}` means two files: {beside} and {at_root}"
        fix = "write an absolute path, or rename one of them"
        reading.problems.append(ConfigError(what, where=where, fix=fix))
        return None
    if hits:
        return hits[0]
    ours = shipped(reading.root, text)
    if ours.is_file():
        return ours
    what = f"the included file `{text}` was not found: neither {beside} nor {at_root}"
    reading.problems.append(ConfigError(what, where=where, fix="correct the path, or remove the line"))
    return None


def _no_file(path: Path, root: Path) -> ConfigError:
    if path.is_dir():
        return ConfigError(f"{path} is a folder, not a configuration file", fix="name the YAML file inside it")
    known = sorted(display_path(found, root) for found in (root / "configs").glob("**/*.yaml"))
    fix = f"choose one: {', '.join(known)}" if known else "name one with --config FILE"
    return ConfigError(f"the configuration file {path} was not found", fix=fix)


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
            problems.append(ConfigError(what, where=node.where, fix="remove one of them"))
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
    fix = "write it as --set train.epochs=3"
    if not equals or not all(keys) or any(" " in key for key in keys):
        problems.append(ConfigError(f"`{item}` is not of the form key=value", where=where, fix=fix))
        return {}
    if keys == ["include"]:
        problems.append(ConfigError("`include` works in files only", where=where, fix="use --config FILE"))
        return {}
    try:
        node = _set_value(text, where, problems)
    except ConfigError as error:
        problems.append(ConfigError(f"the value of `{dotted}` is {error.what}", where=where, fix=fix))
        return {}
    for key in reversed(keys):
        node = Node({key: node}, where)
    return _tidy(node.value, "", problems)


def _set_value(text: str, where: str, problems: list[SftError]) -> Node:
    if not text.startswith(("[", "{", '"', "'")):
        return Node(scalar(text), where, text)
    found: list[SftError] = []
    node = parse(text, where, found)
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


# What other trainers call our keys; their users write these first.
ELSEWHERE = {
    "base_model": "model.name",
    "model_name": "model.name",
    "model_name_or_path": "model.name",
    "max_seq_length": "model.max_seq_len",
    "max_length": "model.max_seq_len",
    "sequence_len": "model.max_seq_len",
    "cutoff_len": "model.max_seq_len",
    "lora_r": "tuning.lora.r",
    "lora_rank": "tuning.lora.r",
    "lora_alpha": "tuning.lora.alpha",
    "lora_dropout": "tuning.lora.dropout",
    "lora_target": "tuning.lora.target_modules",
    "load_in_4bit": "tuning.mode",
    "adapter": "tuning.mode",
    "lr": "train.learning_rate",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accum",
    "lr_scheduler": "train.lr_scheduler_type",
    "mixed_precision": "train.bf16",
    "optimizer": "train.optim",
    "logging_steps": "logging.log_interval",
    "report_to": "logging.backend",
    "dataset": "data.raw_path",
}


def judge(tree: Mapping, problems: list[SftError], *, settled: bool = False) -> Config | None:
    """The Config, or None with every mistake added to `problems`.

    settled: the settings are a run's own resolved ones, where the last micro-batch of a step may be smaller.
    """
    across = _precisions(tree) + ([] if settled else _batches(tree))
    problems += across
    try:
        return Config.model_validate(_values(tree, ""), strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    problems += _told(tree, [one for one in found if one["loc"] or not across])
    return None


def together(problems: Iterable[SftError], path: object) -> ConfigError:
    """One error that says them all, in the order of files and lines."""
    unique = {(problem.what, problem.where): problem for problem in problems}
    ordered = sorted(unique.values(), key=lambda problem: _order(problem.where or ""))
    if len(ordered) == 1:
        return ConfigError(ordered[0].what, where=ordered[0].where, fix=ordered[0].fix)
    return ConfigError(f"{len(ordered)} mistakes in the settings of {path}:", problems=ordered)


def _order(where: str) -> tuple[bool, str, int]:
    name, _, line = where.rpartition(":")
    return (where.startswith("--set"), name, int(line)) if line.isdigit() else (where.startswith("--set"), where, 0)


def _values(mapping: Mapping, prefix: str) -> dict[str, Any]:
    """Plain values for the schema; where it takes text alone, a number is taken as it was written."""
    values: dict[str, Any] = {}
    for key, node in mapping.items():
        field = table().get(prefix + key)
        if field and field.section and isinstance(node.value, dict):
            values[key] = _values(node.value, f"{prefix}{key}.")
        elif field and field.texts and isinstance(node.value, list):
            values[key] = [_as_text(item) for item in node.value]
        else:
            values[key] = _as_text(node) if field and field.text else plain(node)
    return values


def _as_text(node: Node) -> Any:
    number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
    return node.raw if number and node.raw is not None else plain(node)


def find(tree: Mapping, key: str) -> Node | None:
    """The node at a dotted key."""
    node: Node | None = Node(tree, "")
    for part in key.split("."):
        node = node.value.get(part) if node and isinstance(node.value, dict) else None
    return node


def _precisions(tree: Mapping) -> list[SftError]:
    bf16, fp16 = find(tree, "train.bf16"), find(tree, "train.fp16")
    if not (bf16 and fp16 and bf16.value is True and fp16.value is True):
        return []
    what = f"`train.bf16` ({bf16.where}) and `train.fp16` ({fp16.where}) are both true, and a run has one precision"
    fix = "remove both lines (`auto` picks what the hardware has), or set one of them to false"
    return [ConfigError(what, where=fp16.where, fix=fix)]


def _batches(tree: Mapping) -> list[SftError]:
    nodes = {name: find(tree, f"train.{name}") for name in ("effective_batch", "batch_size", "grad_accum")}
    given = {name: node for name, node in nodes.items() if node and type(node.value) is int}
    if len(given) < 3 or given["batch_size"].value * given["grad_accum"].value == given["effective_batch"].value:
        return []
    where = "; ".join(f"train.{name} {node.where}" for name, node in given.items())
    return [unequal_batches(*(node.value for node in given.values()), where=where)]


def unequal_batches(effective: int, batch: int, accum: int, *, where: str) -> ConfigError:
    """Three batch numbers that contradict each other."""
    what = f"train.batch_size {batch} * train.grad_accum {accum} is {batch * accum},"
    what += f" but train.effective_batch is {effective}"
    return ConfigError(what, where=where, fix="remove one of the three: it follows from the other two")


def _told(tree: Mapping, found: list[Any]) -> list[SftError]:
    """pydantic's errors in our words, one a key."""
    placed: dict[str, tuple[str, Node | None, Any]] = {}
    for one in found:
        key, item, node = _locate(tree, one["loc"])
        placed.setdefault(item, (key, node, one))
    told = []
    for item, (key, node, one) in placed.items():
        if not any(other.startswith(item + "[") for other in placed):
            told.append(_tell(key, item, node, one))
    return told


def _locate(tree: Mapping, loc: tuple[int | str, ...]) -> tuple[str, str, Node | None]:
    """The key, the item in it and its node; what pydantic adds to a path for members of a union is passed over."""
    node, keys, index = Node(tree, ""), [], ""
    for part in loc:
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[part]
            if index:
                index += f".{part}"
            else:
                keys.append(str(part))
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            index += f"[{part}]"
    key = ".".join(keys)
    return key, key + index, node if keys else None


def _tell(key: str, item: str, node: Node | None, one: Any) -> SftError:
    where = node.where if node else None
    field = table().get(key)
    if one["type"] == "value_error":
        said = str(one["msg"]).removeprefix("Value error, ")
        return ConfigError(f"`{key}`: {said}" if key else said, where=where, fix="see its row in docs/CONFIG.md")
    if field is None:
        return ConfigError(f"unknown key `{key}`", where=where, fix=nearest(key) or "see docs/CONFIG.md for every key")
    if one["type"] == "missing" and item == key and field.section:
        return ConfigError(f"`{key}`: `{one['loc'][-1]}` is missing", where=where, fix=_fix(field, node))
    if item != key and field.expected == "a list of mappings":
        return _in_list(item, where, node, one)
    expected = "text" if item != key else field.expected
    what = f"`{item}`: expected {expected}, not {_shown(node)}"
    return ConfigError(what, where=where, fix=_fix(field, node))


def _in_list(item: str, where: str | None, node: Node | None, one: Any) -> SftError:
    """A mistake inside one mapping of a list of mappings."""
    fix = f"see the row of `{item.partition('[')[0]}` in docs/CONFIG.md"
    if one["type"] == "extra_forbidden":
        return ConfigError(f"unknown key `{item}`", where=where, fix=fix)
    if one["type"] == "missing":
        return ConfigError(f"`{item}`: `{one['loc'][-1]}` is missing", where=where, fix=fix)
    if one["type"] == "model_type":
        return ConfigError(f"`{item}`: expected a mapping of keys, not {_shown(node)}", where=where, fix=fix)
    wanted = str(one["msg"]).removeprefix("Input ")
    return ConfigError(f"`{item}`: {wanted}, not {_shown(node)}", where=where, fix=fix)


def _shown(node: Node | None) -> str:
    value = plain(node) if node else None
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool) or value is None:
        return "null" if value is None else f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    return str(node.raw if node and node.raw else value)[:60]


def _fix(field: Field, node: Node | None) -> str:
    name, value = field.key.rpartition(".")[2], node.value if node else None
    if value is None:
        shown = "" if field.section else f" ({field.shown_default})"
        return f"remove the line to take the default{shown}"
    if isinstance(value, str):
        meant = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}.get(
            value.lower()
        )
        if meant and "`true`" in field.expected:
            return f"write `{name}: {meant}`"
        if node and node.raw is None and isinstance(scalar(value), int | float) and "number" in field.expected:
            return f"remove the quotes: `{name}: {value}`"
        if close := difflib.get_close_matches(value.lower(), field.choices, 1, 0.6):
            return f"did you mean `{close[0]}`?"
    if isinstance(value, str | int | float) and "a list of texts" in field.expected:
        return f"write it as a list: `{name}: [{node.raw if node and node.raw else value}]`"
    if isinstance(value, bool | int | float) and field.text:
        return f'put it in quotes: `{name}: "{node.raw if node else value}"`'
    if field.section:
        keys = [
            key for key in table() if key.startswith(field.key + ".") and key.count(".") == field.key.count(".") + 1
        ]
        return f"its keys are {', '.join(key.rpartition('.')[2] for key in keys)}, each on an indented line of its own"
    return f"the default is `{name}: {field.shown_default}`"


def nearest(key: str) -> str | None:
    """The likeliest key that was meant: the same name in another section, then a similar one."""
    section, _, name = key.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in [*table(), *aliases()]}
    here = [known for known in names if known.rpartition(".")[0] == section]
    hits = [known for known in names if names[known] == name]
    hits += [ELSEWHERE[name]] if name in ELSEWHERE else []
    if not hits and (close := difflib.get_close_matches(name, [names[known] for known in here], 1, 0.6)):
        hits = [known for known in here if names[known] == close[0]]
    if not hits and (close := difflib.get_close_matches(name, list(names.values()), 1, 0.7)):
        hits = [known for known in names if names[known] == close[0]]
    hits.sort(key=lambda known: (known.split(".")[0] != section.split(".")[0], not known.startswith("train.")))
    shown = " or ".join(f"`{hit}`" for hit in hits[:2])
    return f"did you mean {shown}?" if hits else None


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
    tree, files = read(path, sets, root, problems)
    config = judge(tree, problems)
    if problems or config is None:
        raise together(problems, path)
    return Loaded(config, origins(tree), files, path)


def origins(tree: Mapping) -> dict[str, str]:
    """For every key but the sections: the place that gave it, or "default"."""
    found: dict[str, str] = {}
    for key, entry in table().items():
        node = find(tree, key)
        if entry.section and (not entry.nullable or node is None or isinstance(node.value, dict)):
            continue
        found[key] = "default" if node is None else "--set" if node.where.startswith("--set") else node.where
    return found


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `read_resolved` reads back."""
    return dump_yaml(config.model_dump())


def read_resolved(path: Path | str) -> Config:
    """A run's own `config.resolved.yaml`; nothing is included and nothing is left to --set.

    Raises ConfigError when it is missing or has been edited into something else.
    """
    path, problems = Path(path), list[SftError]()
    if not path.is_file():
        raise ConfigError(f"{path} was not found, so it is not known how this was trained", where=str(path.parent))
    config = judge(parse_file(path, str(path), problems), problems, settled=True)
    if problems or config is None:
        raise together(problems, path)
    return config
