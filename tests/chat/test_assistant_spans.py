"""Templates that rewrite, move, trim and hide: regions are right, or the row is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from sft.errors import TemplateError
from tests.chat import words
from tests.chat.helpers import CHATML, answer, encode, in_loss, make_encoder, system, user

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
ONE = [user("Who are you?"), answer("Ann.")]
TWO = [*ONE, user("And now?"), answer("Bob.")]


def regions(source: str, *messages: dict[str, Any], **options: Any) -> list[str]:
    encoder = make_encoder(source, words.tokenizer(eos="<|im_end|>", bos=None), **options)
    row = encode(encoder, *messages)
    assert row.dropped is None, row.dropped
    return in_loss(encoder, row)


def reason(source: str, *messages: dict[str, Any]) -> str:
    encoder = make_encoder(source, words.tokenizer(eos="<|im_end|>", bos=None))
    return str(encode(encoder, *messages).dropped)


def test_the_same_words_in_question_and_answer_are_distinguished() -> None:
    assert regions(CHATML, user("Ann."), answer("Ann."), user("Ann."), answer("Ann.")) == ["Ann.<|im_end|>"] * 2


def test_trimmed_answers_are_in_the_loss_as_they_are_written() -> None:
    trimmed = CHATML.replace("message['content']", "message['content'] | trim")
    assert regions(trimmed, user(" Who\n"), answer("\n\n Ann. \n")) == ["Ann.<|im_end|>"]
    assert regions(CHATML, user("Who"), answer("Ann. \n")) == ["Ann. \n<|im_end|>"]


def test_a_think_block_that_only_the_last_turn_keeps_is_in_the_loss_there() -> None:
    source = (
        LOOP + "{% set c = m.content if loop.last else m.content.split('>')[-1] | trim %}"
        "{{ '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}" + END + ASK
    )
    think = "<s>now</s>Bob."
    assert regions(source, ONE[0], answer(think), user("And"), answer(think)) == [
        "Bob.<|im_end|>",
        "<s>now</s>Bob.<|im_end|>",
    ]


def test_text_of_the_generation_prompt_is_not_in_the_loss() -> None:
    prompt = "<|im_start|>assistant\\n<s>now</s>"
    source = (
        LOOP + "{% if m.role == 'assistant' %}{{ '" + prompt + "' + m.content + '<|im_end|>\\n' }}{% else %}" + TURN
        + "{% endif %}" + END + "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )  # fmt: skip
    assert regions(source, *TWO) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]
    shown = source.replace(
        "{% if add_generation_prompt %}{{ '" + prompt, "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n"
    )
    assert regions(shown, *TWO) == ["<s>now</s>Ann.<|im_end|>", "<s>now</s>Bob.<|im_end|>"]


def test_a_prompt_longer_than_the_training_text_leaves_the_whole_answer_in_the_loss() -> None:
    source = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<s>now' }}")
    assert regions(source, *TWO) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]


def test_an_end_that_is_written_only_between_turns_is_put_behind_the_last_one() -> None:
    source = (
        LOOP + "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% if not loop.last %}{{ '<|im_end|>\\n' }}{% endif %}"
        + END + "{% if add_generation_prompt %}{{ '<|im_end|>\\n<|im_start|>assistant\\n' }}{% endif %}"
    )  # fmt: skip
    assert regions(source, *TWO) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]


def test_an_end_of_text_token_at_the_very_end_is_no_part_of_the_turn() -> None:
    source = LOOP + TURN + END + ASK.replace("{% endif %}", "{% else %}</s>{% endif %}")
    encoder = make_encoder(source, words.tokenizer(eos="<|im_end|>", bos=None))
    assert encode(encoder, *TWO).text.endswith("Bob.<|im_end|>\n</s>")
    assert regions(source, *TWO) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]


def test_a_turn_ended_by_the_next_header_has_that_header_token_in_the_loss() -> None:
    source = (
        LOOP + "{% if m.role == 'user' %}{{ '[INST]\\n' }}{% else %}{{ '[/INST]\\n' }}{% endif %}{{ m.content }}" + END
        + "{% if add_generation_prompt %}{{ '[/INST]\\n' }}{% endif %}"
    )  # fmt: skip
    encoder = make_encoder(source, words.tokenizer(eos="</s>", bos=None))
    assert in_loss(encoder, encode(encoder, *TWO)) == ["Ann.[INST]", "Bob.[INST]"]
    assert words.ID["[INST]"] in encoder.stops.ids


def test_a_template_without_any_end_gets_the_tokenizers_own() -> None:
    source = (
        LOOP + "{{ m.role + ': ' + m.content + '\\n' }}" + END + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoder = make_encoder(source, words.tokenizer())
    row = encode(encoder, *TWO)
    assert in_loss(encoder, row) == [" Ann.</s>", " Bob.</s>"]
    assert row.input_ids[: len(encoder.prompt(TWO))] == encoder.prompt(TWO)  # the first answer ends in the prompt too
    assert words.ID["</s>"] in encoder.prompt(TWO) and encoder.stops.strings == ("\nuser:",)


def test_a_system_text_that_moves_into_the_last_question_moves_no_label() -> None:
    source = (
        "{% set ns = namespace(s='') %}" + LOOP + "{% if m.role == 'system' %}{% set ns.s = m.content %}"
        "{% elif m.role == 'user' %}[INST] {{ (ns.s + '\\n' if loop.revindex0 < 2 else '') + m.content }}"
        "{{ ' [/INST]' }}{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}" + END
    )  # fmt: skip
    assert regions(source, system("Be brief."), *TWO) == [" Ann.<|im_end|>", " Bob.<|im_end|>"]


def test_generation_marks_are_followed_and_lengthened_to_the_end_of_the_turn() -> None:
    marked = (
        LOOP + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}" + END + ASK
    )
    assert regions(marked, *TWO) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]
    wider = marked.replace("{{ '<|im_start|>' + m.role + '\\n' }}", "{{ '<|im_start|>' + m.role }}").replace(
        "{{ m.content }}", "{{ '\\n' + m.content }}"
    )
    assert regions(wider, *TWO) == ["\nAnn.<|im_end|>", "\nBob.<|im_end|>"]


def test_a_template_that_tests_how_words_begin_is_probed_with_sentinels_inside_them() -> None:
    source = LOOP + "{% if m.content.startswith('Who') %}{{ '### ' }}{% endif %}" + TURN + END + ASK
    assert regions(source, *TWO) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]


def test_a_template_whose_text_depends_on_the_words_refuses_the_row() -> None:
    source = (
        LOOP
        + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '\\n' + (m.content | length | string) + '<|im_end|>\\n' }}"
        + END
        + ASK
    )
    with pytest.raises(TemplateError, match=r"no plain conversation|cannot be d"):
        make_encoder(source, words.tokenizer(eos="<|im_end|>", bos=None))


def test_an_answer_that_is_shown_twice_is_refused_with_its_message() -> None:
    source = LOOP + TURN + "{% if m.content == 'Bob.' %}{{ m.content }}{% endif %}" + END + ASK
    assert "changes with the words of message 4" in reason(source, *TWO)
    twice = LOOP + TURN + "{% if m.role == 'assistant' and loop.index > 3 %}{{ m.content }}{% endif %}" + END + ASK
    assert "shows the answer in message 4 2 times" in reason(twice, *TWO)


def test_an_answer_that_is_left_out_is_refused_with_its_message() -> None:
    source = LOOP + "{% if loop.index != 2 or loop.length < 3 %}" + TURN + "{% endif %}" + END + ASK
    assert "does not show the answer in message 2" in reason(source, *TWO)


@pytest.mark.parametrize(
    "source", [LOOP + "{{ m.role }}" + END, LOOP + "{% if m.role == 'user' %}" + TURN + "{% endif %}" + END]
)
def test_a_template_that_never_shows_the_answer_fails_at_once(source: str) -> None:
    with pytest.raises(TemplateError, match="never shows the answer") as caught:
        make_encoder(source, words.tokenizer())
    assert caught.value.exit_code == 2 and caught.value.fix


def test_templates_that_need_content_parts_get_them() -> None:
    source = LOOP + "{{ '<|im_start|>' + m.role + '\\n' + m.content[0].text + '<|im_end|>\\n' }}" + END + ASK
    assert regions(source, *TWO) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in TWO]
    assert regions(source, *parts) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]


def test_tool_calls_are_in_the_loss_and_results_are_not() -> None:
    source = (
        LOOP + "{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '[' + c.function.name + (c.function.arguments | tojson) + ']' }}{% endfor %}{{ '<|im_end|>\\n' }}"
        + END
        + ASK
    )
    call = {"function": {"name": "SYS", "arguments": {"s": "now"}}}
    talk = [ONE[0], answer("", tool_calls=[call]), {"role": "tool", "content": "SYS now"}, answer("Bob.")]
    encoder = make_encoder(source, words.tokenizer(eos="<|im_end|>", bos=None))
    row = encode(encoder, *talk)
    first, second = in_loss(encoder, row)
    assert first.startswith("[SYS") and first.endswith("]<|im_end|>") and second == "Bob.<|im_end|>"
    assert in_loss(encoder, encode(encoder, *talk[:2]))[0] == first


def test_a_conversation_that_begins_with_an_answer_and_answers_in_a_row() -> None:
    assert regions(CHATML, answer("Ann."), user("And"), answer("Bob.")) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]
    assert regions(CHATML, user("Who"), answer("Ann."), answer("Bob.")) == ["Ann.<|im_end|>", "Bob.<|im_end|>"]


@pytest.mark.parametrize("content", ["x\U00100001y", "\U000ffff0"])
def test_words_with_sentinel_characters_are_refused(content: str) -> None:
    assert "private-use" in reason(CHATML, user(content), answer("Ann."))
