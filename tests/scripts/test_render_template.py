"""scripts/render_template.py as a user runs it: every split becomes input and target, and trains the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import render_template
from sft.errors import DataError
from tests.chat import words
from tests.chat.helpers import CHATML, ROOT, answer, encode, make_encoder, system, user
from tests.conftest import Result

TALKS = [
    [user("Who are you?"), answer("Ann.")],
    [system("Be brief."), user("Who <|im_end|>?"), answer("Bob.")],
    [user("Who?"), answer("Ann."), user("And now?"), answer("Bob.")],
]


def test_splits_are_rendered_and_train_the_same(command: Callable[..., Result], tmp_path: Path) -> None:
    tokenizer = words.tokenizer(eos="<|im_end|>", bos=None, template=CHATML)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    processed = tmp_path / "data" / "processed"
    processed.mkdir(parents=True)
    lines = [json.dumps({"id": f"r{index}", "messages": talk}) for index, talk in enumerate(TALKS)]
    lines.append(json.dumps({"id": "mute", "messages": [user("Who?")]}))
    (processed / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (processed / "test.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    settings = ("--config", ROOT / "configs" / "run_bnb.yaml", "--set", f"model.name={tmp_path / 'tokenizer'}")
    done = command("render_template", *settings, "--json", SFT_ROOT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "train": {"rows": 3, "refused": {"mute": "it has no answer"}},
        "test": {"rows": 1, "refused": {}},
    }
    rendered = tmp_path / "data" / "rendered" / "train.jsonl"
    rows = [json.loads(line) for line in rendered.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {
        "id": "r0",
        "input": "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
        "target": "Ann.",
    }
    assert rows[1]["plain_spans"] and not (rendered.parent / "val.jsonl").exists()
    encoder = make_encoder(CHATML, tokenizer, labels="last_assistant")
    for row, talk in zip(rows, TALKS, strict=True):
        got, whole = encoder.encode(row), encode(encoder, *talk)
        assert (got.input_ids, got.labels) == (whole.input_ids, whole.labels)
    out = tmp_path / "one.jsonl"
    run(*settings, "--in", processed / "test.jsonl", "--out", out, "--template", "alpaca")
    assert json.loads(out.read_text(encoding="utf-8"))["input"].endswith("### Response:\n")
    with pytest.raises(DataError, match="--in and --out go together"):
        run(*settings, "--in", out)


def run(*args: object) -> None:
    render_template.main(render_template.parser().parse_args([str(arg) for arg in args]))
