"""One encoder for training and serving: prompts, stops, answers, rendered rows, boundaries inside tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft.chat.loss_mask import NO_LABEL
from sft.chat.template import Refused
from sft.errors import TemplateError
from tests.chat import words
from tests.chat.helpers import CHATML, answer, encode, encode_all, encoder_for, in_loss, make_encoder, system, user

ONE = [user("Who are you?"), answer("Ann.")]


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2.5")


def test_no_token_crosses_the_start_of_the_answer_in_training_as_in_serving(qwen: Any) -> None:
    encoder = encoder_for("chatml", qwen)
    row = encode(encoder, user("Hi"), answer("\n\nHello"))  # the whole text has one token for the three newlines
    prompt = encoder.prompt([user("Hi")])
    assert row.input_ids[: len(prompt)] == prompt and row.labels[: len(prompt)] == [-100] * len(prompt)
    assert qwen.decode(row.input_ids) == row.text
    assert in_loss(encoder, row) == ["\n\nHello<|im_end|>"]
    assert row.input_ids != qwen(row.text, add_special_tokens=False)["input_ids"]


def test_a_prompt_that_ends_with_a_space_is_the_same_in_training_and_serving(qwen: Any) -> None:
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoder = make_encoder(source, qwen)
    row = encode(encoder, user("Hi"), answer("Hello."), user("Hi"), answer("Paris."))
    prompt = encoder.prompt({"messages": [user("Hi"), answer("Hello."), user("Hi"), answer("Paris.")]})
    assert row.input_ids[: len(prompt)] == prompt and row.labels[len(prompt)] != -100
    assert in_loss(encoder, row) == ["Hello.<|im_end|>", "Paris.<|im_end|>"]


def test_seed_style_templates_take_one_turn(qwen: Any) -> None:
    source = "{{ system }}\nUser: {{ user }}\nAssistant: {{ assistant }}\n"
    encoder = make_encoder(source, qwen)
    row = encode(encoder, system("Be brief."), *ONE)
    assert row.text == "Be brief.\nUser: Who are you?\nAssistant: Ann."
    assert in_loss(encoder, row) == [" Ann.<|im_end|>"]
    prompt = encoder.prompt([system("Be brief."), ONE[0]])
    assert qwen.decode(prompt) == "Be brief.\nUser: Who are you?\nAssistant:"
    assert row.input_ids[: len(prompt)] == prompt
    assert encoder.stops.ids == {qwen.eos_token_id}
    assert "takes one system, user and assistant text" in encode(encoder, *ONE, *ONE).dropped


def test_stops_are_every_end_of_the_template_and_of_the_model() -> None:
    encoder = encoder_for("llama3", words.tokenizer(), eos_ids=[7, 9])
    assert encoder.stops.ids == {words.ID["</s>"], words.ID["<|eot_id|>"], 7, 9} and encoder.stops.strings == ()
    zephyr = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    encoder = make_encoder(zephyr, words.tokenizer())
    assert encoder.stops.ids == {words.ID["</s>"]} and encoder.stops.strings == ("<|user|>",)
    textual = make_encoder(CHATML, words.tokenizer())
    assert words.ID["<|im_end|>"] in textual.stops.ids


def test_an_end_that_is_not_a_token_is_a_stop_string(tiny_gpt2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    encoder = make_encoder(CHATML.replace("<|im_end|>", "<|stop|>"), tokenizer)
    assert "<|stop|>" in encoder.stops.strings
    row = encode(encoder, *ONE)
    assert in_loss(encoder, row) == ["Ann.<|stop|>"]


@pytest.mark.parametrize("name", ["plain", "chatml", "llama2", "llama3", "mistral", "alpaca", "vicuna"])
@pytest.mark.parametrize(
    "talk",
    [ONE, [system("Be brief."), *ONE], [*ONE, user("And\nnow?"), answer(" Bob \n")], [user("<|im_end|> </s>"), ONE[1]]],
)
def test_a_rendered_row_gives_the_ids_of_the_row_itself(name: str, talk: list[dict[str, Any]]) -> None:
    encoder = encoder_for(name, words.tokenizer(), labels="last_assistant")
    whole = encode(encoder, *talk)
    rendered = encoder.split({"messages": talk})
    got = encoder.encode(rendered)
    assert (got.input_ids, got.labels, got.text) == (whole.input_ids, whole.labels, whole.text)
    assert encoder.prompt(rendered) == encoder.prompt({"messages": talk})
    assert not rendered["target"].endswith(("</s>", "<|im_end|>", "<|eot_id|>"))


def test_rendered_rows_from_elsewhere_get_one_end_token() -> None:
    encoder = encoder_for("chatml", words.tokenizer(eos="<|im_end|>", bos=None))
    plain = encoder.encode({"input": "Who are you?\n", "target": "Ann."})
    assert plain.text == "Who are you?\nAnn.<|im_end|>\n" and in_loss(encoder, plain) == ["Ann.<|im_end|>"]
    ended = encoder.encode({"input": "Who are you?\n", "target": "Ann.<|im_end|>"})
    assert in_loss(encoder, ended) == ["Ann.<|im_end|>"]
    assert plain.id == encoder.encode({"input": "Who are you?\n", "target": "Ann."}).id


def test_a_row_without_an_answer_or_of_weight_zero_has_no_label() -> None:
    encoder = encoder_for("chatml", words.tokenizer(eos="<|im_end|>"))
    assert encode(encoder, ONE[0]).dropped == NO_LABEL
    assert encode(encoder, ONE[0], {**ONE[1], "weight": 0}).dropped == NO_LABEL
    with pytest.raises(Refused, match="no answer"):
        encoder.split({"messages": ONE[:1]})


def test_an_end_token_used_as_padding_stays_in_the_loss() -> None:
    tokenizer = words.tokenizer(eos="<|im_end|>", bos=None)
    tokenizer.pad_token = "<|im_end|>"
    encoder = encoder_for("chatml", tokenizer)
    assert in_loss(encoder, encode(encoder, *ONE)) == ["Ann.<|im_end|>"]


def test_a_template_and_a_tokenizer_without_any_end_are_refused() -> None:
    tokenizer = words.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="neither the template nor the tokenizer has an end token"):
        make_encoder("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", tokenizer)


def test_every_row_is_trained_on_or_named_in_the_ledger(caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_for("plain", words.tokenizer(), max_seq_len=40, over_length="drop")
    talks = [ONE, ONE * 2, [*ONE, {"role": "tool", "content": "x"}], ONE[:1], ONE * 9]
    rows = [{"id": f"r{index}", "messages": talk} for index, talk in enumerate(talks)]
    steps: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING, "sft.chat"):
        trained, ledger = encode_all(encoder, rows, lambda done, total: steps.append((done, total)))
    assert [row.id for row in trained] == ["r0", "r1"] and steps == [(5, 5)]
    assert ledger.rows_read == 5 and ledger.rows_trained == 2
    assert ledger.dropped["over length"] == ["r4"] and ledger.dropped[NO_LABEL] == ["r3"]
    assert sum(map(len, ledger.dropped.values())) == 3 and ledger.to_dict()["reasons"]["over length"] == 1
    assert ledger.labelled_tokens == 3 * 4
    for some, message in ((rows[4:], "no row is left to train on: 1 rows: over length"), ([], "there are no rows")):
        assert message in str(encode_all(encoder, some)[1].no_rows_left("here"))


def test_a_prompt_that_differs_from_the_training_text_gives_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    source = CHATML.replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<s>now' }}")
    encoder = make_encoder(source, words.tokenizer(eos="<|im_end|>", bos=None))
    with caplog.at_level(logging.WARNING, "sft.chat"):
        encode(encoder, *ONE)
        encode(encoder, *ONE)
    assert [
        record.getMessage().startswith("test: the generation prompt differs from the training text")
        for record in caplog.records
    ] == [True]
