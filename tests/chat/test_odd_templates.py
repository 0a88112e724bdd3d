"""Unusual templates, as models ship them: the expected spans are written by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trl

from tests.chat.helpers import answer, encode, in_loss, make_encoder, user
from tests.chat.test_trl_templates import RESULT, TOOL, called, tokenizer_for

ALWAYS_PROMPTS = (
    "{% for m in messages %}{{ bos_token if loop.first }}<|start|>{{ m.role }}<|sep|>{{ m.content | trim }}<|eot|>"
    "{% endfor %}<|start|>assistant<|sep|>"
)
ENDS_ONCE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|model|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% else %}{{ eos_token }}{% endif %}"
)
SPACE_MARKED = (
    "{% for m in messages %}{{ m.role.upper() }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
NO_CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NEEDS_TOOLS = (
    "<|tools|>{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NINE_LETTERS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ '' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids of nine') }}{% endif %}<|call|>{{ c.function.name }}"
    "{{ c.id }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LATER_CALLS_DIFFER = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<|call|>"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% if not loop.last or not m == messages[-1] %} id"
    "{% endif %}{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def encoder_of(source: str) -> Any:
    controls = "<|start|> <|eot|> <|sep|> <|user|> <|model|> <|end|> <|assistant|> <|tool|> <|tools|> <|call|>"
    return make_encoder(source, tokenizer_for(source, controls))


def test_a_generation_prompt_at_the_end_of_every_text_is_not_an_end_of_turn() -> None:
    encoder = encoder_of(ALWAYS_PROMPTS)
    row = encode(encoder, user("a"), answer("b"), user("c"), answer(" d "))
    assert row.text.endswith("d<|eot|><|start|>assistant<|sep|>")
    assert in_loss(encoder, row) == ["b<|eot|>", "d<|eot|>"]
    assert row.input_ids == encoder.tokens.ids(row.text)
    assert encoder.stops.ids == {*encoder.tokens.ids("<|eot|>"), encoder.tokenizer.eos_token_id}
    assert encoder.prompt([user("a")]) == encoder.tokens.ids("<s><|start|>user<|sep|>a<|eot|><|start|>assistant<|sep|>")


def test_an_end_token_written_only_at_the_end_of_the_text_ends_every_answer() -> None:
    encoder = encoder_of(ENDS_ONCE)
    assert in_loss(encoder, encode(encoder, user("a"), answer("b"), user("c"), answer("d"))) == ["b</s>", "d</s>"]


def test_a_token_that_contains_the_start_of_the_mark_is_in_the_loss() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "ASSISTANT:": 2, " Ann": 3, "USER:": 4, " who": 5, " ": 6}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    row = encode(make_encoder(SPACE_MARKED, tokenizer), user("who"), answer("Ann"))
    assert (row.input_ids, row.labels) == ([4, 5, 0, 3, 1], [-100, -100, -100, 3, 1])


@pytest.mark.parametrize("content", ["", "Let me see"])
def test_a_row_whose_call_the_template_leaves_out_is_refused_by_name(content: str) -> None:
    encoder = encoder_of(NO_CALLS)
    row = encode(encoder, user("w?"), answer(content, tool_calls=[called(a="b")]), RESULT, answer("12"))
    assert "the template leaves out tool calls: name one that writes them" in str(row.dropped)


def test_system_text_that_a_template_refuses_goes_before_the_question(caplog: pytest.LogCaptureFixture) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    encoder = encoder_of(refuses + NO_CALLS)
    talk = [user("a"), {**answer("b"), "weight": 0}, user("c"), answer("d")]
    with caplog.at_level(logging.WARNING, "sft.chat"):
        row = encode(encoder, {"role": "system", "content": "S"}, *talk)
    assert row.text == encode(encoder, user("S\n\na"), *talk[1:]).text
    assert in_loss(encoder, row) == ["d<|end|>"]
    assert encoder.prompt([{"role": "system", "content": "S"}, user("a")]) == encoder.prompt([user("S\n\na")])
    assert "accepts no system text" in caplog.text


def test_content_none_becomes_empty_where_a_template_needs_a_string() -> None:
    encoder = encoder_of(NEEDS_TOOLS.replace("{{ m.content }}", "{{ m.content + '' }}"))
    silent = {"role": "assistant", "content": None, "tool_calls": [called(a="b")]}
    row = encode(encoder, user("w?"), silent, RESULT, answer("12"), tools=[TOOL])
    assert in_loss(encoder, row) == ['<|call|>get{"a": "b"}<|end|>', "12<|end|>"]


def test_reasoning_parts_become_reasoning_content_where_a_template_takes_no_parts() -> None:
    source = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    encoder = make_encoder(source, tokenizer_for(source))
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "12"}]
    read = answer("12", reasoning_content="hm")
    assert (
        encode(encoder, user("w?"), {"role": "assistant", "content": parts}).text
        == encode(encoder, user("w?"), read).text
    )


def test_a_conversation_may_begin_with_an_answer() -> None:
    first = "{% for m in messages %}{{ ('<s>' if loop.first else '') + '<|start|>' + m.role + '<|sep|>' + m.content }}"
    encoder = encoder_of(
        first + "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|sep|>{% endif %}"
    )
    row = encode(encoder, answer("hi"), user("a"), answer("b"))
    assert in_loss(encoder, row) == ["hi<|end|>", "b<|end|>"]


def test_a_template_that_fails_without_tools_works_for_rows_with_tools() -> None:
    encoder = encoder_of(NEEDS_TOOLS)
    row = encode(encoder, user("w?"), answer("", tool_calls=[called(a="b")]), RESULT, answer("12"), tools=[TOOL])
    assert in_loss(encoder, row) == ['<|call|>get{"a": "b"}<|end|>', "12<|end|>"]
    assert "TypeError" in str(encode(encoder, user("a"), answer("b")).dropped)


def test_a_call_rendered_differently_in_the_last_turn_is_refused() -> None:
    encoder = encoder_of(LATER_CALLS_DIFFER)
    talk = [user("w?"), answer("", tool_calls=[called(a="b")]), RESULT, answer("12")]
    for row in (encode(encoder, *talk), encode(encoder, *talk[:2])):
        assert "where the turn of message 2 ends cannot be determined" in str(row.dropped)


def test_words_rendered_after_the_result_of_their_call_are_in_the_loss() -> None:
    source = (Path(trl.__file__).parent / "chat_templates" / "gemma4.jinja").read_text(encoding="utf-8")
    encoder = make_encoder(source, tokenizer_for(source))
    talk = [user("w?"), answer("Let me see", tool_calls=[called(a="b")]), {**RESULT, "content": "12 C"}]
    row = encode(encoder, *talk, user("k"), answer("by"), tools=[TOOL])
    call, words, last = in_loss(encoder, row)
    assert call.startswith("<|tool_call>call:get") and call.endswith("<tool_call|><|tool_response>")
    assert (words, last) == ("Let me see<turn|>", "by<turn|>")
    silenced = [*talk[:1], {**talk[1], "weight": 0}, talk[2], user("k"), answer("by")]
    assert in_loss(encoder, encode(encoder, *silenced, tools=[TOOL])) == ["by<turn|>"]


def test_calls_get_new_ids_where_the_template_refuses_theirs() -> None:
    encoder = encoder_of(NINE_LETTERS)
    fine = encode(encoder, user("w?"), answer("", tool_calls=[{**called(a="b"), "id": "call00001"}]))
    assert in_loss(encoder, fine) == ["<|call|>getcall00001<|end|>"]
    calls = [{**called(a="b"), "id": "call_long_1"}, {**called(a="c"), "id": "call_long_2"}]
    results = [{**RESULT, "tool_call_id": "call_long_2"}, {**RESULT, "tool_call_id": "call_long_1"}]
    talk = [user("w?"), answer("", tool_calls=calls), *results, answer("12")]
    row = encode(encoder, *talk)
    written, last = in_loss(encoder, row)
    first, second = written.removesuffix("<|end|>").split("<|call|>get")[1:]
    assert last == "12<|end|>" and first != second and len(first) == len(second) == 9
    assert f"<|tool|>12{second}<|end|><|tool|>12{first}<|end|>" in row.text
    assert row.input_ids[: len(encoder.prompt(talk))] == encoder.prompt(talk)


def test_text_parts_are_joined_where_the_template_takes_only_strings() -> None:
    encoder = encoder_of(NINE_LETTERS)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    assert in_loss(encoder, encode(encoder, user("w?"), {"role": "assistant", "content": parts})) == ["ab<|end|>"]
    odd = encode(encoder, user("w?"), {"role": "assistant", "content": [{"type": "image", "url": "x"}]})
    assert "TypeError" in str(odd.dropped)
