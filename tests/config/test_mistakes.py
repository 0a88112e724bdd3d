"""Every mistake at once, each with file, line, key, what was expected and the nearest name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.config.load import load
from sft.errors import ConfigError
from tests.conftest import ROOT

Mistakes = Callable[..., list[tuple[str, str | None, str | None]]]


@pytest.fixture
def mistakes(tmp_path: Path) -> Mistakes:
    """The problems of a configuration of these files: (what, where, fix) of each mistake."""

    def of(text: str, *sets: str, **others: str) -> list[tuple[str, str | None, str | None]]:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        for name, content in others.items():
            (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError) as raised:
            load(tmp_path / "run.yaml", list(sets), root=tmp_path)
        problems = raised.value.problems or [raised.value]
        assert all(str(problem) in str(raised.value) for problem in problems)
        return [(problem.what, problem.where, problem.fix) for problem in problems]

    return of


@pytest.mark.parametrize(
    ("line", "key", "fix"),
    [
        ("train: {lerning_rate: 1}", "train.lerning_rate", "did you mean `train.learning_rate`?"),
        ("model: {batch_size: 1}", "model.batch_size", "did you mean `train.batch_size` or `eval.batch_size`?"),
        ("learning_rate: 1", "learning_rate", "did you mean `train.learning_rate`?"),
        ("trian: {seed: 1}", "trian", "did you mean `train`?"),
        ("model: {max_seq_length: 1}", "model.max_seq_length", "did you mean `model.max_seq_len`?"),
        ("train: {lora: {r: 3}}", "train.lora", "did you mean `tuning.lora`?"),
        ("tuning: {lora: {rnk: 3, dropuot: 0}}", "tuning.lora.dropuot", "did you mean `tuning.lora.dropout`?"),
        ("train: {num_train_epochs: 1}", "train.num_train_epochs", "did you mean `train.epochs`?"),
        (
            "train: {per_device_train_batch_size: 1}",
            "train.per_device_train_batch_size",
            "did you mean `train.batch_size`?",
        ),
        ("train: {xyzzy: 1}", "train.xyzzy", "see docs/CONFIG.md for every key"),
    ],
)
def test_an_unknown_key_names_the_nearest(mistakes: Mistakes, line: str, key: str, fix: str) -> None:
    assert (f"unknown key `{key}`", "run.yaml:2", fix) in mistakes(f"# a comment\n{line}\n")


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("train: {save_steps: many}", "`train.save_steps`: expected a whole number (at least 1), not the text 'many'",
         "the default is `save_steps: 100`"),
        ("train: {save_steps: '3'}", "`train.save_steps`: expected a whole number (at least 1), not the text '3'",
         "the default is `save_steps: 100`"),
        ("train: {save_steps: 2.5}", "`train.save_steps`: expected a whole number (at least 1), not 2.5",
         "the default is `save_steps: 100`"),
        ("train: {save_steps: true}", "`train.save_steps`: expected a whole number (at least 1), not `true`",
         "the default is `save_steps: 100`"),
        ("train: {save_steps: 0}", "`train.save_steps`: expected a whole number (at least 1), not 0",
         "the default is `save_steps: 100`"),
        ("train: {save_steps: null}", "`train.save_steps`: expected a whole number (at least 1), not null",
         "the default is `save_steps: 100`"),
        ("train: {epochs: fast}", "`train.epochs`: expected `auto` or a number (above 0), not the text 'fast'",
         "the default is `epochs: auto`"),
        ("train: {learning_rate: 5}", "`train.learning_rate`: expected `auto` or a number (above 0, at most 1), not 5",
         "the default is `learning_rate: auto`"),
        ("train: {learning_rate: .inf}",
         "`train.learning_rate`: expected `auto` or a number (above 0, at most 1), not the text '.inf'",
         "the default is `learning_rate: auto`"),
        ("train: {bf16: yes}", "`train.bf16`: expected `auto` or `true` or `false`, not the text 'yes'",
         "the default is `bf16: auto`"),
        ("train: {merge_at_end: OFF}", "`train.merge_at_end`: expected `true` or `false`, not the text 'OFF'",
         "the default is `merge_at_end: false`"),
        ("tuning: {mode: qlra}", "`tuning.mode`: expected one of `qlora`, `lora`, `full`, not the text 'qlra'",
         "did you mean `qlora`?"),
        ("train: {eval_strategy: false}", "`train.eval_strategy`: expected one of `no`, `steps`, `epoch`, not `false`",
         "the default is `eval_strategy: epoch`"),
        ("eval: {metrics: rougeL}", "`eval.metrics`: expected a list of texts, not the text 'rougeL'",
         "the default is `metrics: [rougeL, sari, exact_match]`"),
        ("experiment: {tags: [a, {b: c}]}", "`experiment.tags[1]`: expected text, not a mapping",
         "the default is `tags: []`"),
        ("model: {name: true}", "`model.name`: expected text (not empty), not `true`",
         "the default is `name: Qwen/Qwen2.5-3B-Instruct`"),
        ("model: {name: ''}", "`model.name`: expected text (not empty), not the text ''",
         "the default is `name: Qwen/Qwen2.5-3B-Instruct`"),
        ("tuning: {lora: 8}", "`tuning.lora`: expected a mapping of keys, not 8",
         "its keys are r, alpha, dropout, target_modules, layers_to_transform, rank_pattern, alpha_pattern, init,"
         " lora_plus_ratio, bias, use_rslora, use_dora, modules_to_save, each on an indented line"),
        ("data: {columns: 5}", "`data.columns`: expected a mapping of keys or null, not 5",
         "its keys are system, user, assistant, each on an indented line"),
        ("data: {sources: [{path: a, weigth: 2}]}", "unknown key `data.sources[0].weigth`",
         "did you mean `data.sources[].weight`?"),
        ("data: {sources: [{path: a, weight: -1}]}",
         "`data.sources[0].weight`: expected a number (above 0, at most 1000), not -1",
         "the default is `weight: 1.0`"),
        ("data: {sources: [{weight: 1}]}", "`data.sources[0]`: `path` is missing",
         "see `data.sources` in docs/CONFIG.md"),
        ("data: {sources: [x.jsonl]}", "`data.sources[0]`: expected a mapping, not the text 'x.jsonl'",
         "the default is `sources: []`"),
        ("include: 5", "`include` takes a path or a list of paths", None),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_was_expected(mistakes: Mistakes, line: str, what: str, fix: str | None) -> None:
    assert mistakes(f"# a comment\n\n{line}\n") == [(what, "run.yaml:3", fix)]


def test_shares_that_are_not_1_name_the_lines_that_set_them(mistakes: Mistakes) -> None:
    [(what, where, _)] = mistakes("data:\n  split:\n    train: 0.9\n    val: 0.2\n")
    assert what == "`data.split`: train 0.9 + val 0.2 + test 0.1 must be 1, not 1.2"
    assert where == "run.yaml:3 (data.split.train), run.yaml:4 (data.split.val)"


def test_a_duplicate_key_names_both_lines(mistakes: Mistakes) -> None:
    assert mistakes("train:\n  seed: 1\n  epochs: 2\n  seed: 1\n") == [
        ("the key `train.seed` is set twice: run.yaml:2 and run.yaml:4", "run.yaml:4", "remove one of the two lines")
    ]


def test_a_missing_include_names_who_included_it(mistakes: Mistakes, tmp_path: Path) -> None:
    assert mistakes("# one\ninclude: nowhere/base.yaml\n") == [
        (
            f"the included file `nowhere/base.yaml` was not found beside this file or in {tmp_path}",
            "run.yaml:2",
            "correct the path, or remove the line",
        )
    ]


def test_an_include_cycle_prints_its_chain(mistakes: Mistakes) -> None:
    problems = mistakes("include: a.yaml\n", a="train: {seed: 1}\ninclude:\n  - b.yaml\n", b="include: run.yaml\n")
    chain = "run.yaml -> a.yaml -> b.yaml -> run.yaml"
    assert problems == [(f"the includes form a cycle: {chain}", "b.yaml:1", "remove one of these includes")]


def test_a_file_that_includes_itself_is_a_cycle(mistakes: Mistakes) -> None:
    assert mistakes("include: run.yaml\n")[0][0] == "the includes form a cycle: run.yaml -> run.yaml"


def test_both_precisions_name_both_places(mistakes: Mistakes) -> None:
    problems = mistakes("include: base.yaml\ntrain:\n  fp16: true\n", base="train:\n  bf16: true\n")
    what = "`train`: bf16 and fp16 are both true, and a run has one precision"
    where = "base.yaml:2 (train.bf16), run.yaml:3 (train.fp16)"
    assert problems == [(what, where, "change one, or remove it to take its default")]


def test_both_spellings_in_one_file_are_a_key_given_twice(mistakes: Mistakes) -> None:
    problems = mistakes("train:\n  eval_strategy: steps\n  evaluation_strategy: steps\n")
    what = "the key `train.eval_strategy` is set twice: run.yaml:2 and run.yaml:3"
    assert problems == [(what, "run.yaml:3", "remove one of the two lines")]


def test_three_batch_numbers_that_contradict_each_other(mistakes: Mistakes) -> None:
    problems = mistakes("train:\n  effective_batch: 16\n  batch_size: 2\n", "train.grad_accum=4")
    places = (
        "run.yaml:2 (train.effective_batch)",
        "run.yaml:3 (train.batch_size)",
        "--set train.grad_accum=4 (train.grad_accum)",
    )
    what = "`train`: batch_size 2 * grad_accum 4 is 8, but effective_batch is 16"
    assert problems == [(what, ", ".join(places), "change one, or remove it to take its default")]


def test_an_optimizer_is_one_of_a_list(mistakes: Mistakes) -> None:
    [(what, where, fix)] = mistakes("train: {optim: adamw_9bit}\n")
    assert what.startswith("`train.optim`: expected `auto` or one of `adamw_torch`, ")
    assert what.endswith("not the text 'adamw_9bit'") and where == "run.yaml:1" and fix == "did you mean `adamw_8bit`?"


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ("train.epochs", "`train.epochs` is not of the form key=value"),
        ("=3", "`=3` is not of the form key=value"),
        ("train..epochs=3", "`train..epochs=3` is not of the form key=value"),
        ("train epochs=3", "`train epochs=3` is not of the form key=value"),
        ("include=base.yaml", "`include` works in files only"),
        ("experiment.tags=[a", "the value of `experiment.tags` is not valid YAML: expected ',' or ']', but got"
         " '<stream end>'"),
        ("train.bf16=on", "`train.bf16`: expected `auto` or `true` or `false`, not the text 'on'"),
        ("train.sede=3", "unknown key `train.sede`"),
        ("train.seed.x=3", "`train.seed`: expected a whole number (at least 0), not a mapping"),
        ("train=3", "`train`: expected a mapping of keys, not 3"),
        ("eval={limit: 1, limit: 2}", "the key `eval.limit` is set twice: --set eval={limit: 1, limit: 2} and --set"
         " eval={limit: 1, limit: 2}"),
    ],
)  # fmt: skip
def test_a_bad_set_is_named(mistakes: Mistakes, item: str, what: str) -> None:
    assert [(message, where) for message, where, _ in mistakes("", item)] == [(what, f"--set {item}")]


def test_all_mistakes_are_listed_at_once_by_line(mistakes: Mistakes) -> None:
    problems = mistakes(
        "train:\n  seed: x\n  sped: 1\n  seed: 3\ninclude: gone.yaml\nmodel: 3\neval:\n  limit: 0\n",
        "logging.samples=-1",
        "x",
    )
    assert [(what.split(":")[0].split(" beside ")[0], where) for what, where, _ in problems] == [
        ("`train.seed`", "run.yaml:2"),
        ("unknown key `train.sped`", "run.yaml:3"),
        ("the key `train.seed` is set twice", "run.yaml:4"),
        ("the included file `gone.yaml` was not found", "run.yaml:5"),
        ("`model`", "run.yaml:6"),
        ("`eval.limit`", "run.yaml:8"),
        ("`logging.samples`", "--set logging.samples=-1"),
        ("`x` is not of the form key=value", "--set x"),
    ]


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        (b"- a\n- b\n", "a configuration is a mapping of keys (`train:` and so on) at its top level", "run.yaml:1"),
        (b"\n3\n", "a configuration is a mapping of keys (`train:` and so on) at its top level", "run.yaml:2"),
        (b"train:\n  seed: \xff\xfe\n", "not UTF-8 text, so not a configuration", "run.yaml:2"),
        (b"train:\n\tseed: 1\n", "not valid YAML: found character '\\t' that cannot start any token", "run.yaml:2"),
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path: Path, content: bytes, what: str, where: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "run.yaml", root=tmp_path)
    assert (raised.value.what, raised.value.where) == (what, where)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbftrain: {seed: 3}\r\n")
    assert load(tmp_path / "run.yaml", root=tmp_path).config.train.seed == 3


def test_a_missing_configuration_lists_the_existing_ones(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").touch()
    with pytest.raises(ConfigError, match=r"gone\.yaml was not found") as raised:
        load(tmp_path / "gone.yaml", root=tmp_path)
    assert raised.value.fix == "choose one: configs/mine.yaml"
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path / "configs", root=tmp_path)


COMMAND = """
import sys
from pathlib import Path
from sft import console

def main(args):
    from sft.config.load import load
    return {"seed": load(args.config, args.set, root=Path.cwd()).config.train.seed}

console.run(console.parser("a command"), main)
"""


def test_a_command_ends_with_2_and_every_mistake_also_as_json(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: {sede: 1}\neval: 3\n", encoding="utf-8")
    line = [sys.executable, "-c", COMMAND, "--config", "run.yaml", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    output = json.loads(done.stdout)
    assert done.returncode == 2 and output["error"] == "2 mistakes in the settings of run.yaml:"
    assert [(problem["error"], problem["where"]) for problem in output["problems"]] == [
        ("unknown key `train.sede`", "run.yaml:1"),
        ("`eval`: expected a mapping of keys, not 3", "run.yaml:2"),
    ]
    assert done.stderr.startswith("error: 2 mistakes in the settings of run.yaml:\nunknown key `train.sede`\n")
    assert (
        "  where: run.yaml:1\n  fix:   did you mean `train.seed`?\n" in done.stderr and "Traceback" not in done.stderr
    )
