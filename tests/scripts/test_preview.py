"""scripts/preview.py as a user runs it: JSON lines, the terminal, the page; a tokenizer folder will do as a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset

import preview
from sft.errors import SftError
from tests.chat import words
from tests.chat.helpers import CHATML, ROOT, answer, user
from tests.conftest import Result

CONFIG = ROOT / "configs" / "run_bnb.yaml"
ROWS = [
    {"id": "one", "system": "", "user": "Who are you?", "assistant": "Ann."},
    {"id": "two", "messages": [user("And now?"), answer("Bob."), user("Who <|im_end|>?"), answer("Ann & Bob.")]},
    {"id": "three", "user": "Who " * 30, "assistant": "Ann."},
    {"id": "four", "user": "Who?", "assistant": "Ann. " * 30},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, a tokenizer of its own template, and nothing else."""
    path = tmp_path_factory.mktemp("preview")
    words.folder(path / "tokenizer", eos="<|im_end|>", bos=None, template=CHATML)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (path / "bad.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}", encoding="utf-8")
    (path / "mute.jinja").write_text("{% for m in messages %}{{ m.role }}{% endfor %}", encoding="utf-8")
    return path


def preview_args(place: Path, *more: object) -> tuple[object, ...]:
    return (
        *("--config", CONFIG, "--set", f"model.name={place / 'tokenizer'}", "--set", "model.max_seq_len=39"),
        *("--in", place / "rows.jsonl"),
        *more,
    )


def run(*args: object) -> None:
    preview.main(preview.parser().parse_args([str(arg) for arg in args]))


def test_a_json_line_for_every_row(command: Callable[..., Result], place: Path) -> None:
    done = command("preview", *preview_args(place, "--limit", 0, "--json"))
    assert done.returncode == 0, done.stderr
    one, two, three, four = (json.loads(line) for line in done.stdout.splitlines())
    asking = words.ids("<|im_start|> user /n Who _ are _ you ? <|im_end|> /n <|im_start|> assistant /n")
    labelled = words.ids("Ann . <|im_end|>")
    assert one == {
        "id": "one",
        "text": "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\nAnn.<|im_end|>\n",
        "input_ids": [*asking, *labelled, *words.ids("/n")],
        "labels": [-100] * len(asking) + labelled + [-100],
        "truncated_tokens": 0,
        "dropped": None,
    }
    assert two["id"] == "two" and two["input_ids"].count(words.ID["<|im_end|>"]) == 4 and two["truncated_tokens"] == 1
    assert three["truncated_tokens"] == 33 and len(three["input_ids"]) == 39 and three["dropped"] is None
    assert four["dropped"] == "over length"


def test_rows_that_come_as_tokens(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = words.ids("Who ? <|im_end|>")
    Dataset.from_list([{"input_ids": ids, "labels": [-100, *ids[1:]]}] * 3).save_to_disk(tmp_path / "tokens")
    (file,) = (tmp_path / "tokens").glob("*.arrow")
    run(*preview_args(place, "--in", tmp_path / "tokens", "--limit", 1))
    assert f"row {file.name}[0]: 3 tokens, 2 in the loss" in (shown := capsys.readouterr().out)
    assert "?<|im_end|>⟧" in shown and shown.count("⟦") == 2  # the legend has one
    run(*preview_args(place, "--in", tmp_path / "tokens", "--id", f"{file.name}[2]", "--json"))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["id"], line["input_ids"], line["labels"]) == (f"{file.name}[2]", ids, [-100, *ids[1:]])


def test_the_terminal_and_the_page(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*preview_args(place, "--id", "two"))
    shown = capsys.readouterr().out
    assert "row two: 39 tokens, 10 in the loss, 1 cut for length" in shown
    assert "in the loss: ⟦...⟧, cut: ⟪...⟫" in shown
    assert "⟪<|im_start|>⟫user" in shown and "assistant\n⟦Ann <unk> Bob.<|im_end|>⟧" in shown
    page = tmp_path / "page.html"
    run(*preview_args(place, "--html", page, "--limit", 2))
    html = page.read_text(encoding="utf-8")
    assert "row one" in html and "row four" in html and "row two" not in html  # the shortest and the longest
    assert f'<span class="t labelled special" data-t="{words.ID["<|im_end|>"]} &#39;&lt;|im_end|&gt;&#39;">' in html
    assert ">\n</span>" in html and "http" not in html.replace("http-equiv", "")
    assert 'class="dropped"' in html


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--set", "data.template_path={place}/bad.jinja"), "bad.jinja:2: {{{{ m.content }}"),
        (("--template", "{place}/mute.jinja"), "never shows the answer"),
        (("--template", "lama3"), "did you mean llama3?"),
        (("--id", "seven"), "no row's id begins with seven"),
    ],
)
def test_what_a_user_can_fix_is_an_error_with_its_place(place: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(SftError) as caught:
        run(*preview_args(place, *(part.format(place=place) for part in more)))
    assert caught.value.exit_code == 2 and message.format() in str(caught.value)
