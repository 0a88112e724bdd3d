"""Which template a run takes: the model's own, a named one, a file, and the fallback."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sft.chat import template
from sft.chat.template import load_template
from sft.config.schema import DataSection
from sft.errors import TemplateError
from tests.chat import words
from tests.chat.helpers import CHATML, ROOT, answer, encode, in_loss, make_encoder, user

LOOP = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"


def test_auto_takes_the_models_own_and_else_the_default() -> None:
    own = load_template(DataSection(), words.tokenizer(template=CHATML), ROOT)
    assert (own.origin, own.source) == ("own", CHATML)
    default = load_template(DataSection(), words.tokenizer(), ROOT)
    assert (default.origin, default.name) == ("default", "chat_templates/default.jinja")


def test_a_model_with_two_templates_uses_the_one_for_tools_where_a_row_has_tools() -> None:
    tokenizer = words.tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ messages | length }} tools"}
    own = load_template(DataSection(), tokenizer, ROOT)
    assert own.render([user("a")], tools=[{"name": "f"}]) == "1 tools"
    assert own.render([user("a")]).startswith("<s><|im_start|>user")


def test_names_files_and_options(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("\ufeff" + LOOP + "{{ mood }}", encoding="utf-8")
    data = DataSection(template_path="mine.jinja", template_options={"mood": "calm"})
    template_file = load_template(data, words.tokenizer(bos=None), tmp_path)
    assert template_file.render([user("a")]) == "user: a\ncalm"
    assert load_template(DataSection(template_path="llama3"), words.tokenizer(), tmp_path).name.endswith("llama3.jinja")


def test_a_missing_template_names_the_nearest() -> None:
    with pytest.raises(TemplateError, match="'lama3' does not exist") as caught:
        load_template(DataSection(template_path="lama3"), words.tokenizer(), ROOT)
    assert caught.value.fix is not None and caught.value.fix.startswith("did you mean llama3? names: alpaca,")
    with pytest.raises(TemplateError, match="does not exist"):
        load_template(DataSection(template_path="a/b.jinja"), words.tokenizer(), ROOT)


def test_without_a_default_rows_are_written_plainly_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(template, "shipped", lambda root, text: root / text)
    with caplog.at_level(logging.WARNING, "sft.chat"):
        fallback = load_template(DataSection(), words.tokenizer(), tmp_path)
    assert "System: / User: / Assistant:" in caplog.text
    encoder = make_encoder(fallback, words.tokenizer())
    row = encode(encoder, user("Who"), answer("Ann."))
    assert row.text == "<s>User: Who\nAssistant: Ann." and in_loss(encoder, row) == [" Ann.</s>"]


def test_every_row_has_one_begin_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tokenizers import processors

    tokenizer = words.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.ID["<s>"])]
    )
    (tmp_path / "turn.jinja").write_text("User: {{ user }}\nAssistant: {{ assistant }}")
    (tmp_path / "loop.jinja").write_text(LOOP)
    for name in ("turn.jinja", "plain", "chatml", "llama2", "llama3", "mistral", "alpaca", "vicuna"):
        encoder = make_encoder(load_template(DataSection(template_path=name), tokenizer, tmp_path), tokenizer)
        row = encode(encoder, user("Who"), answer("Ann."))
        assert row.input_ids[0] == words.ID["<s>"] and row.input_ids.count(words.ID["<s>"]) == 1, name
    with caplog.at_level(logging.WARNING, "sft.chat"):
        load_template(DataSection(template_path="loop.jinja"), tokenizer, tmp_path)
    assert "start the template with {{ bos_token }}" in caplog.text


def test_a_tokenizer_that_encodes_to_nothing_still_loads_a_template(tmp_path: Path) -> None:
    tokenizer = words.tokenizer()
    tokenizer.encode = lambda *_args, **_kwargs: []  # type: ignore[method-assign]
    (tmp_path / "loop.jinja").write_text(LOOP)
    assert load_template(DataSection(template_path="loop.jinja"), tokenizer, tmp_path).source == LOOP
