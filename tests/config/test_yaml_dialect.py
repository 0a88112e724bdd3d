"""Our YAML dialect, and every mistake with its line."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.config import load
from sft.config.load import plain, scalar
from sft.errors import ConfigError


def read(text: str) -> Any:
    problems = load.Problems()
    node = load.parse(text, "x.yaml", problems)
    assert not problems, [str(problem) for problem in problems]
    return None if node is None else plain(node)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 0.0002),
        ("1e5", 100000),
        ("1E+3", 1000),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("-7", -7),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("NO", "NO"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("2026-11-21", "2026-11-21"),
        ("1:30", "1:30"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1__0", "1__0"),
        ("3 epochs", "3 epochs"),
        (".inf", ".inf"),
        ("nan", "nan"),
        ("0x10", "0x10"),
        ("v1.2.3", "v1.2.3"),
    ],
)
def test_plain_scalars_become_the_obvious_types(text: str, value: Any) -> None:
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)
    assert read(f"key: {text}") == {"key": value}


def test_a_number_of_five_thousand_digits_does_not_crash() -> None:
    assert scalar("1" * 5000) == "1" * 5000
    assert scalar("1e999999") == math.inf


def test_quotes_keep_text() -> None:
    assert read("a: '3'\nb: \"true\"\nc: !!str 5") == {"a": "3", "b": "true", "c": "5"}


def test_keys_are_text_as_written() -> None:
    assert read("1: a\nNO: b\ntrue: c\n2e-4: d") == {"1": "a", "NO": "b", "true": "c", "2e-4": "d"}


def test_anchors_work() -> None:
    assert read("a: &a {x: 1, y: 2}\nc: *a") == {"a": {"x": 1, "y": 2}, "c": {"x": 1, "y": 2}}


def test_every_value_knows_its_line() -> None:
    node = load.parse("a:\n  b: 1\n\n  c:\n    - x\n    - y\n", "f.yaml", load.Problems())
    assert node is not None
    assert node.value["a"].where == "f.yaml:1"
    assert node.value["a"].value["b"].where == "f.yaml:2"
    assert node.value["a"].value["c"].where == "f.yaml:4"
    assert [item.where for item in node.value["a"].value["c"].value] == ["f.yaml:5", "f.yaml:6"]


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_file_is_an_empty_mapping(text: str) -> None:
    assert read(text) is None


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: 1\n\tb: 2\n", "x.yaml:2", "not valid YAML: found character '\\t' that cannot start any token"),
        ("a:\n  b: 1\n c: 2\n", "x.yaml:3", "not valid YAML: expected <block end>, but found '<block mapping start>'"),
        ("a: [1, 2\nb: 3\n", "x.yaml:2", "not valid YAML: expected ',' or ']', but got ':'"),
        ("a: b: c\n", "x.yaml:1", "not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2", "not valid YAML: but found another document"),
        ("a: *nowhere\n", "x.yaml:1", "not valid YAML: found undefined alias 'nowhere'"),
        ("a: 'open\nb: 2\n", "x.yaml:3", "not valid YAML: found unexpected end of stream"),
    ],
)
def test_what_is_not_yaml_is_an_error_with_its_line(text: str, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(text)
    assert (raised.value.where, raised.value.what) == (where, what)


def test_a_key_written_twice_names_both_lines() -> None:
    problems = load.Problems()
    load.parse("train:\n  seed: 1\n  epochs: 2\n  seed: 3\ntrain: {}\n", "x.yaml", problems)
    assert [(problem.what, problem.where) for problem in problems] == [
        ("the key `train.seed` is set twice: x.yaml:2 and x.yaml:4", "x.yaml:4"),
        ("the key `train` is set twice: x.yaml:1 and x.yaml:5", "x.yaml:5"),
    ]


def test_tags_of_python_objects_are_refused() -> None:
    problems = load.Problems()
    load.parse("a: !!python/name:os.system x\nb: !mine 1\n? [1, 2]\n: 3\n", "x.yaml", problems)
    assert [problem.where for problem in problems] == ["x.yaml:1", "x.yaml:2", "x.yaml:3"]


def test_exponential_aliases_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="its aliases expand to too many values"):
        read("\n".join(lines))


def test_a_recursive_anchor_is_refused() -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        read("a: &a [*a]")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        read("a: " + "[" * 5_000 + "]" * 5_000)


# The same examples every time, however busy the machine is.
CALM = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@CALM
@given(st.dictionaries(st.text(max_size=6), VALUES, max_size=4))
def test_what_is_dumped_reads_back_the_same(value: dict[str, Any]) -> None:
    assert read(load.dump_yaml(value)) == value


@CALM
@given(
    st.sampled_from(
        ["NO", "yes", "2e-4", "1e5", "1_000", "null", "~", "", "true", "007", "1:30", "=", "<<", "0x1f", ".inf"]
    )
)
def test_a_text_that_looks_like_something_else_survives_a_dump(text: str) -> None:
    assert read(load.dump_yaml({"key": text, text: [text]})) == {"key": text, text: [text]}
