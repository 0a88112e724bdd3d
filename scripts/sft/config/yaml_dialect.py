"""YAML as people mean it, with the line of every key.

PyYAML reads YAML 1.1, where `2e-4` is text and `NO` is false. Here plain scalars follow YAML 1.2: `true` and `false`
are the only booleans, `2e-4`, `1e5` and `1_000` are numbers, dates and `1:30` are text. A key written twice is an
error that names both lines. Aliases are expanded within a bound, so that no small file becomes a large one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from sft.errors import ConfigError, SftError

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


def dump(value: Any) -> str:
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
        return ConfigError("a tab where YAML wants spaces", where=where, mend="indent with spaces")
    if "mapping values" in said:
        mend = 'a text that holds ": " needs quotes; otherwise look at the indentation of this line and the one above'
        return ConfigError("not valid YAML: a second `: ` in one value", where=where, mend=mend)
    if "expected a single document" in str(error):
        return ConfigError("two YAML documents in one file", where=where, mend="remove the `---` between them")
    return ConfigError(f"not valid YAML: {said}", where=where, mend="look at this line and the one above it")


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
            raise ConfigError(what, where=self.place(node), mend="write the values out without `*` and `<<`")
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
            mend = "write the value without it"
            self.problems.append(ConfigError(f"the tag `{node.tag}` is not taken", where=self.place(node), mend=mend))
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
                self.problems.append(ConfigError(what, where=place, mend="remove one of the two lines"))
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
