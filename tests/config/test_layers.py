"""include < file < --set, and the place of every key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.config.load import (
    Loaded,
    Node,
    Problems,
    Tree,
    dump_config,
    dump_yaml,
    load,
    merge,
    parse,
    plain,
)
from sft.errors import ConfigError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file under the temporary project and returns its path."""

    def put(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return put


def read(path: Path, *sets: str) -> Loaded:
    root = next(parent for parent in path.parents if parent.name.startswith("test_"))
    return load(path, list(sets), root=root)


def test_an_include_is_below_the_file_and_set_is_above_both(write: Write) -> None:
    write("base.yaml", "train:\n  seed: 1\n  epochs: 1\n  save_steps: 7\n")
    loaded = read(write("run.yaml", "include: base.yaml\ntrain:\n  seed: 2\n  epochs: 2\n"), "train.seed=3")
    assert (loaded.config.train.seed, loaded.config.train.epochs, loaded.config.train.save_steps) == (3, 2.0, 7)
    assert loaded.origin("train.seed") == "--set train.seed=3"
    assert loaded.origin("train.epochs") == "run.yaml:4"
    assert loaded.origin("train.save_steps") == "base.yaml:4"
    assert loaded.origin("train.max_steps") is None


def test_is_set_tells_an_explicit_value_from_a_default(write: Write) -> None:
    loaded = read(write("run.yaml", "train:\n  seed: 42\nexperiment:\n"), "eval.limit=3")
    assert loaded.config.train.seed == 42
    assert loaded.is_set("train.seed") and loaded.is_set("eval.limit") and loaded.is_set("train")
    assert not loaded.is_set("train.epochs") and not loaded.is_set("experiment")


def test_lists_replace_whole_and_later_includes_win(write: Write) -> None:
    write("a.yaml", "eval: {metrics: [rougeL, sari]}\ntrain: {seed: 1, save_steps: 5}\n")
    write("b.yaml", "eval: {metrics: [chrf]}\ntrain: {seed: 2}\n")
    config = read(write("run.yaml", "include: [a.yaml, b.yaml]\n")).config
    assert (config.eval.metrics, config.train.seed, config.train.save_steps) == (["chrf"], 2, 5)


def test_an_include_is_looked_for_beside_the_file_then_at_the_root(write: Write) -> None:
    write("configs/base.yaml", "train: {seed: 5}\n")
    write("configs/mine/near.yaml", "train: {save_steps: 6}\n")
    loaded = read(write("configs/mine/run.yaml", "include: [configs/base.yaml, near.yaml]\n"))
    assert (loaded.config.train.seed, loaded.config.train.save_steps) == (5, 6)
    assert loaded.origin("train.seed") == "configs/base.yaml:1"


def test_of_two_files_the_one_beside_the_including_file_is_included(write: Write) -> None:
    write("base.yaml", "train: {seed: 5}\n")
    write("sub/base.yaml", "train: {seed: 6}\n")
    assert read(write("sub/run.yaml", "include: base.yaml\n")).config.train.seed == 6


def test_a_file_may_be_included_by_two_others(write: Write) -> None:
    write("base.yaml", "train: {seed: 5}\n")
    write("a.yaml", "include: base.yaml\n")
    write("b.yaml", "include: base.yaml\n")
    assert read(write("run.yaml", "include: [a.yaml, b.yaml]\n")).config.train.seed == 5


def test_shipped_configurations_can_be_included_from_another_root(write: Write) -> None:
    loaded = read(write("run.yaml", "include: configs/config_base.yaml\n"))
    assert loaded.config.train.warmup_ratio == 0.03 and loaded.is_set("train.warmup_ratio")


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train:\n  # seed: 3\ndata:\n", "include:\n"])
def test_empty_files_and_sections_leave_the_defaults(write: Write, text: str) -> None:
    loaded = read(write("run.yaml", text))
    assert loaded.tree == {} and not loaded.is_set("train")


def test_an_empty_section_does_not_wipe_what_was_included(write: Write) -> None:
    write("base.yaml", "train: {seed: 5}\ndata: {columns: {user: Q}}\n")
    loaded = read(write("run.yaml", "include: base.yaml\ntrain:\ndata: {columns: null}\n"))
    assert loaded.config.train.seed == 5
    assert loaded.config.data.columns is None and loaded.origin("data.columns") == "run.yaml:3"


def test_both_spellings_of_the_evaluation_strategy_work(write: Write) -> None:
    write("base.yaml", "train: {evaluation_strategy: steps}\n")
    assert read(write("a.yaml", "include: base.yaml\n")).config.train.eval_strategy == "steps"
    loaded = read(write("b.yaml", "include: base.yaml\ntrain: {eval_strategy: NO}\n"), "train.evaluation_strategy=no")
    assert loaded.config.train.eval_strategy == "no"
    assert loaded.origin("train.eval_strategy") == "--set train.evaluation_strategy=no"


def test_text_fields_take_numbers_as_they_are_written(write: Write) -> None:
    text = "experiment: {name: 007, tags: [2024, 1.10, NO]}\nmodel: {revision: 1.10}\ndata: {columns: {user: 1}}\n"
    config = read(write("run.yaml", text)).config
    assert (config.experiment.name, config.experiment.tags) == ("007", ["2024", "1.10", "NO"])
    assert config.model.revision == "1.10" and config.data.columns is not None and config.data.columns.user == "1"


def test_numbers_in_scientific_and_plain_notation(write: Write) -> None:
    config = read(
        write("run.yaml", "train: {learning_rate: 2e-4, max_steps: 1e3, epochs: 3, save_steps: 1_000}\n")
    ).config
    assert (config.train.learning_rate, config.train.max_steps) == (0.0002, 1000)
    assert (config.train.epochs, config.train.save_steps) == (3.0, 1000) and type(config.train.epochs) is float


@pytest.mark.parametrize(
    ("item", "section", "key", "value"),
    [
        ("train.learning_rate=2e-4", "train", "learning_rate", 0.0002),
        ("train.bf16=true", "train", "bf16", True),
        ("train.max_steps=null", "train", "max_steps", None),
        ("experiment.name=", "experiment", "name", None),
        ("experiment.name=NO", "experiment", "name", "NO"),
        ("experiment.name=2024", "experiment", "name", "2024"),
        ("experiment.name='a # b'", "experiment", "name", "a # b"),
        ("experiment.description=be brief: no #tags, a=b", "experiment", "description", "be brief: no #tags, a=b"),
        ("experiment.description=*x", "experiment", "description", "*x"),
        ("experiment.tags=[a, 2024, c]", "experiment", "tags", ["a", "2024", "c"]),
        ('generation.stop=["\\n"]', "generation", "stop", ["\n"]),
        ("data.template_options={enable_thinking: false, n: 2e-1}", "data", "template_options",
         {"enable_thinking": False, "n": 0.2}),
    ],
)  # fmt: skip
def test_set_reads_values_like_a_file(write: Write, item: str, section: str, key: str, value: Any) -> None:
    loaded = read(write("run.yaml", ""), item)
    assert getattr(getattr(loaded.config, section), key) == value
    assert str(loaded.origin(f"{section}.{key}")).startswith("--set")


def test_set_may_give_a_whole_section_and_the_last_one_wins(write: Write) -> None:
    loaded = read(write("run.yaml", "train: {seed: 1, save_steps: 9}\n"), "train={seed: 2}", "train.seed=3")
    assert (loaded.config.train.seed, loaded.config.train.save_steps) == (3, 9)


def test_a_resolved_configuration_reads_back_equal(write: Write) -> None:
    config = read(
        write("run.yaml", "experiment: {name: '2e-4', description: NO}\ntrain: {learning_rate: 5e-6}\n")
    ).config
    assert read(write("out/config.resolved.yaml", dump_config(config))).config == config
    with pytest.raises(ConfigError, match=r"unknown key `train\.speed`"):
        read(write("edited.yaml", "train: {speed: 3}"))


def test_the_resolved_configuration_of_an_earlier_version_still_loads() -> None:
    path = Path(__file__).with_name("resolved") / "5f54d53.yaml"  # written by `train` of that commit
    written, config = yaml.safe_load(path.read_text()), load(path, root=path.parent).config.model_dump()
    assert config["logging"]["backends"] == [written["logging"].pop("backend")]
    for section, values in written.items():
        for key, value in values.items():
            loaded = config[section][key]
            assert value == ({name: loaded[name] for name in value} if isinstance(value, dict) else loaded)


# The same examples every time, however busy the machine is.
CALM = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
LEAVES = st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
TREES = st.recursive(
    st.dictionaries(st.sampled_from("abc"), LEAVES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), LEAVES | inner, max_size=3),
    max_leaves=6,
)


def nodes(tree: Any, where: str = "") -> Tree:
    node = parse(dump_yaml(tree), where, Problems())
    return {} if node is None else node.value  # type: ignore[no-any-return]


def merged(*trees: Any) -> Any:
    """What merging means, written independently: every path of the last tree that has it."""
    result: Any = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


@CALM
@given(st.lists(TREES, min_size=1, max_size=4))
def test_merge_in_order(trees: list[Any]) -> None:
    result: Tree = {}
    for tree in trees:
        result = merge(result, nodes(tree))
    assert plain(Node(result, "")) == merged(*trees)


@CALM
@given(TREES, TREES)
def test_every_value_of_the_last_layer_survives_with_its_place(below: Any, above: Any) -> None:
    result = merge(nodes(below, "below"), nodes(above, "above"))

    def check(tree: Any, mapping: Tree) -> None:
        for key, value in tree.items():
            assert mapping[key].where.startswith("above:")
            if isinstance(value, dict):
                check(value, mapping[key].value)

    check(above, result)
    assert merge(result, nodes(above, "above")) == result
