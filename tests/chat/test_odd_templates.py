"""Templates that do otherwise than most, as models ship them: what is in the loss is written out by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import trl

from tests.chat.making import answer, encoded, encoder, in_loss, user
from tests.chat.test_trl_templates import RESULT, TOOL, called, tokenizer_for

ALWAYS_ASKS = (
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
WANTS_TOOLS = (
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


def made_of(source: str) -> Any:
    controls = "<|start|> <|eot|> <|sep|> <|user|> <|model|> <|end|> <|assistant|> <|tool|> <|tools|> <|call|>"
    return encoder(source, tokenizer_for(source, controls))


def test_a_prompt_that_is_written_unasked_is_no_end_of_a_turn() -> None:
    made = made_of(ALWAYS_ASKS)
    row = encoded(made, user("a"), answer("b"), user("c"), answer(" d "))
    assert row.text.endswith("d<|eot|><|start|>assistant<|sep|>")
    assert in_loss(made, row) == ["b<|eot|>", "d<|eot|>"]
    assert row.input_ids == made.tokens.ids(row.text)
    assert made.stops.ids == {*made.tokens.ids("<|eot|>"), made.tokenizer.eos_token_id}
    assert made.prompt([user("a")]) == made.tokens.ids("<s><|start|>user<|sep|>a<|eot|><|start|>assistant<|sep|>")


def test_the_end_that_stands_only_at_the_very_end_ends_every_answer() -> None:
    made = made_of(ENDS_ONCE)
    assert in_loss(made, encoded(made, user("a"), answer("b"), user("c"), answer("d"))) == ["b</s>", "d</s>"]


def test_a_token_that_the_mark_lies_inside_of_is_in_the_loss() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, "ASSISTANT:": 2, " Ann": 3, "USER:": 4, " who": 5, " ": 6}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    row = encoded(encoder(SPACE_MARKED, tokenizer), user("who"), answer("Ann"))
    assert (row.input_ids, row.labels) == ([4, 5, 0, 3, 1], [-100, -100, -100, 3, 1])


def test_a_call_that_is_left_out_is_said_and_words_are_still_in_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    made = made_of(NO_CALLS)
    talk = [user("w?"), answer("Let me see", tool_calls=[called(a="b")]), RESULT, answer("12")]
    with caplog.at_level(logging.WARNING, "sft.chat"):
        row = encoded(made, *talk)
    assert in_loss(made, row) == ["Let me see<|end|>", "12<|end|>"]
    assert "leaves out tool calls" in caplog.text


@pytest.mark.parametrize("content", [{"content": ""}, {"content": "", "reasoning_content": "hm"}])
def test_a_turn_that_is_nothing_but_a_left_out_call_is_an_empty_answer(content: dict[str, str]) -> None:
    made = made_of(NO_CALLS)
    silent = {"role": "assistant", "tool_calls": [called(a="b")], **content}
    assert in_loss(made, encoded(made, user("w?"), silent, RESULT, answer("12"))) == ["<|end|>", "12<|end|>"]
    alone = made.encode({"messages": [user("w?"), silent]})
    assert (alone.dropped, set(alone.labels)) == ("no label left", {-100})


def test_system_text_that_a_template_refuses_stands_before_the_question(caplog: pytest.LogCaptureFixture) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    made = made_of(refuses + NO_CALLS)
    talk = [user("a"), {**answer("b"), "weight": 0}, user("c"), answer("d")]
    with caplog.at_level(logging.WARNING, "sft.chat"):
        row = encoded(made, {"role": "system", "content": "S"}, *talk)
    assert row.text == encoded(made, user("S\n\na"), *talk[1:]).text
    assert in_loss(made, row) == ["d<|end|>"]
    assert made.prompt([{"role": "system", "content": "S"}, user("a")]) == made.prompt([user("S\n\na")])
    assert "takes no system text" in caplog.text


def test_an_absent_text_is_empty_where_a_template_cannot_do_without() -> None:
    source = NO_CALLS.replace("m.content", "(m.content + '')")
    made = made_of(source)
    silent = {"role": "assistant", "content": None, "tool_calls": [called(a="b")]}
    assert in_loss(made, encoded(made, user("w?"), silent, RESULT, answer("12"))) == ["<|end|>", "12<|end|>"]


def test_parts_of_reasoning_and_calls_are_read_where_a_template_does_not_take_them() -> None:
    source = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    made = encoder(source, tokenizer_for(source))
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "12"}]
    read = answer("12", reasoning_content="hm")
    assert (
        encoded(made, user("w?"), {"role": "assistant", "content": parts}).text == encoded(made, user("w?"), read).text
    )


def test_a_conversation_may_begin_with_an_answer() -> None:
    first = "{% for m in messages %}{{ ('<s>' if loop.first else '') + '<|start|>' + m.role + '<|sep|>' + m.content }}"
    made = made_of(first + "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|sep|>{% endif %}")
    row = encoded(made, answer("hi"), user("a"), answer("b"))
    assert in_loss(made, row) == ["hi<|end|>", "b<|end|>"]


def test_a_template_that_wants_tools_is_in_the_loss_with_some() -> None:
    made = made_of(WANTS_TOOLS)
    row = encoded(made, user("w?"), answer("", tool_calls=[called(a="b")]), RESULT, answer("12"), tools=[TOOL])
    assert in_loss(made, row) == ['<|call|>get{"a": "b"}<|end|>', "12<|end|>"]
    assert "TypeError" in str(encoded(made, user("a"), answer("b")).dropped)


def test_a_call_that_is_written_otherwise_at_the_end_ends_at_the_turns_end() -> None:
    made = made_of(LATER_CALLS_DIFFER)
    row = encoded(made, user("w?"), answer("", tool_calls=[called(a="b")]), RESULT, answer("12"))
    assert in_loss(made, row) == ['<|call|>get{"a": "b"} id<|end|>', "12<|end|>"]
    row = encoded(made, user("w?"), answer("", tool_calls=[called(a="b")]))
    assert in_loss(made, row) == ['<|call|>get{"a": "b"}<|end|>']


def test_words_that_stand_behind_the_result_of_their_call_are_in_the_loss_there() -> None:
    source = (Path(trl.__file__).parent / "chat_templates" / "gemma4.jinja").read_text(encoding="utf-8")
    made = encoder(source, tokenizer_for(source))
    talk = [user("w?"), answer("Let me see", tool_calls=[called(a="b")]), {**RESULT, "content": "12 C"}]
    row = encoded(made, *talk, user("k"), answer("by"), tools=[TOOL])
    call, words, last = in_loss(made, row)
    assert call.startswith("<|tool_call>call:get") and call.endswith("<tool_call|><|tool_response>")
    assert (words, last) == ("Let me see<turn|>", "by<turn|>")
    silenced = [*talk[:1], {**talk[1], "weight": 0}, talk[2], user("k"), answer("by")]
    assert in_loss(made, encoded(made, *silenced, tools=[TOOL])) == ["by<turn|>"]


def test_calls_get_ids_where_the_template_refuses_those_they_have() -> None:
    made = made_of(NINE_LETTERS)
    fine = encoded(made, user("w?"), answer("", tool_calls=[{**called(a="b"), "id": "call00001"}]))
    assert in_loss(made, fine) == ["<|call|>getcall00001<|end|>"]
    calls = [{**called(a="b"), "id": "call_long_1"}, {**called(a="c"), "id": "call_long_2"}]
    results = [{**RESULT, "tool_call_id": "call_long_2"}, {**RESULT, "tool_call_id": "call_long_1"}]
    talk = [user("w?"), answer("", tool_calls=calls), *results, answer("12")]
    row = encoded(made, *talk)
    written, last = in_loss(made, row)
    first, second = written.removesuffix("<|end|>").split("<|call|>get")[1:]
    assert last == "12<|end|>" and first != second and len(first) == len(second) == 9
    assert f"<|tool|>12{second}<|end|><|tool|>12{first}<|end|>" in row.text
    assert row.input_ids[: len(made.prompt(talk))] == made.prompt(talk)


def test_parts_of_text_are_joined_where_the_template_takes_text_alone() -> None:
    made = made_of(NINE_LETTERS)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    assert in_loss(made, encoded(made, user("w?"), {"role": "assistant", "content": parts})) == ["ab<|end|>"]
    odd = encoded(made, user("w?"), {"role": "assistant", "content": [{"type": "image", "url": "x"}]})
    assert "TypeError" in str(odd.dropped)
