"""Every shipped template: its exact text, ids and labels, written by hand."""

from __future__ import annotations

import pytest

from sft.chat.template import template_names
from tests.chat import words
from tests.chat.helpers import ROOT, answer, encode, encoder_for, in_loss, system, user

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and"
    " polite answers to the user's questions."
)
SYSTEM = system("Be brief.")
TURNS = [user("Who are you?"), answer("Ann."), user("And now?"), answer("Bob.")]
WHO, NOW = "Who _ are _ you ?", "And _ now ?"
# name -> text and ids; "_" is a space, "/n" a newline; what is in braces is in the loss
CASES = {
    "plain": (
        "<s>System: Be brief.\nUser: Who are you?\nAssistant: Ann.</s>\nUser: And now?\nAssistant: Bob.</s>\n",
        f"<s> System : _ Be _ brief . /n User : _ {WHO} /n Assistant : {{ _ Ann . </s> }} /n User : _ {NOW} /n"
        " Assistant : { _ Bob . </s> } /n",
    ),
    "chatml": (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
        "Ann.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\nBob.<|im_end|>\n",
        f"<s> <|im_start|> system /n Be _ brief . <|im_end|> /n <|im_start|> user /n {WHO} <|im_end|> /n <|im_start|>"
        f" assistant /n {{ Ann . <|im_end|> }} /n <|im_start|> user /n {NOW} <|im_end|> /n <|im_start|> assistant /n"
        " { Bob . <|im_end|> } /n",
    ),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWho are you? [/INST] Ann. </s><s>[INST] And now? [/INST] Bob. </s>",
        f"<s> [INST] _ << SYS >> /n Be _ brief . /n <</ SYS >> /n/n {WHO} _ [/INST] {{ _ Ann . _ </s> }} <s> [INST] _"
        f" {NOW} _ [/INST] {{ _ Bob . _ </s> }}",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nWho are you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nAnn.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBob.<|eot_id|>",
        "<s> <|start_header_id|> system <|end_header_id|> /n/n Be _ brief . <|eot_id|> <|start_header_id|> user"
        f" <|end_header_id|> /n/n {WHO} <|eot_id|> <|start_header_id|> assistant <|end_header_id|> /n/n"
        f" {{ Ann . <|eot_id|> }} <|start_header_id|> user <|end_header_id|> /n/n {NOW} <|eot_id|> <|start_header_id|>"
        " assistant <|end_header_id|> /n/n { Bob . <|eot_id|> }",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nWho are you?[/INST] Ann.</s>[INST] And now?[/INST] Bob.</s>",
        f"<s> [INST] _ Be _ brief . /n/n {WHO} [/INST] {{ _ Ann . </s> }} [INST] _ {NOW} [/INST] {{ _ Bob . </s> }}",
    ),
    "alpaca": (
        "<s>Be brief.\n\n### Instruction:\nWho are you?\n\n### Response:\nAnn.</s>\n\n### Instruction:\nAnd now?\n\n"
        "### Response:\nBob.</s>\n\n",
        f"<s> Be _ brief . /n/n ### _ Instruction : /n {WHO} /n/n ### _ Response : /n {{ Ann . </s> }} /n/n ### _"
        f" Instruction : /n {NOW} /n/n ### _ Response : /n {{ Bob . </s> }} /n/n",
    ),
    "vicuna": (
        "<s>Be brief. USER: Who are you? ASSISTANT: Ann.</s> USER: And now? ASSISTANT: Bob.</s>",
        f"<s> Be _ brief . _ USER : _ {WHO} _ ASSISTANT : {{ _ Ann . </s> }} _ USER : _ {NOW} _ ASSISTANT :"
        " { _ Bob . </s> }",
    ),
}
CASES["default"] = CASES["plain"]
FIRST = {  # name -> the prompt for one question without a system text
    "plain": "<s>User: Who are you?\nAssistant:",
    "default": "<s>User: Who are you?\nAssistant:",
    "chatml": "<s><|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "llama2": "<s>[INST] Who are you? [/INST]",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Who are you?[/INST]",
    "alpaca": f"<s>{ALPACA}\n\n### Instruction:\nWho are you?\n\n### Response:\n",
    "vicuna": f"<s>{VICUNA} USER: Who are you? ASSISTANT:",
}


def read(written: str) -> tuple[list[int], list[int]]:
    """Hand-written ids and labels: what is in braces is in the loss."""
    tokens: list[int] = []
    labels: list[int] = []
    inside = False
    for word in written.split():
        if word in "{}":
            inside = word == "{"
            continue
        tokens += words.ids(word)
        labels.append(tokens[-1] if inside else -100)
    return tokens, labels


def test_the_cases_cover_every_template_that_can_be_named() -> None:
    assert sorted(CASES) == sorted(FIRST) == template_names(ROOT)


@pytest.mark.parametrize("name", sorted(CASES))
def test_text_ids_and_labels_are_exact(name: str) -> None:
    text, written = CASES[name]
    row = encode(encoder_for(name, words.tokenizer()), SYSTEM, *TURNS)
    assert row.text == text
    assert (row.input_ids, row.labels) == read(written)
    assert (row.truncated_tokens, row.dropped) == (0, None)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_prompt_is_the_training_text_before_the_answer(name: str) -> None:
    encoder = encoder_for(name, words.tokenizer())
    prompt = encoder.prompt([user("Who are you?")])
    assert encoder.spans.layout([user("Who are you?")], prompt=True).text == FIRST[name]
    row = encode(encoder, user("Who are you?"), answer("Ann."))
    assert row.input_ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [-100] * len(prompt)
    assert row.labels[len(prompt)] != -100


@pytest.mark.parametrize("name", sorted(CASES))
def test_labels_of_the_last_answer_of_all_tokens_and_of_weight_zero(name: str) -> None:
    tokenizer = words.tokenizer()
    whole = in_loss(encoder_for(name, tokenizer), encode(encoder_for(name, tokenizer), *TURNS))
    last = encoder_for(name, tokenizer, labels="last_assistant")
    assert in_loss(last, encode(last, *TURNS)) == whole[1:]
    first_silent = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    encoder = encoder_for(name, tokenizer)
    assert in_loss(encoder, encode(encoder, *first_silent)) == whole[1:]
    everything = encoder_for(name, tokenizer, labels="all_tokens")
    row = encode(everything, *TURNS)
    assert row.labels == row.input_ids


@pytest.mark.parametrize("name", sorted(set(CASES) - {"chatml", "llama3"}))
def test_a_tool_message_is_refused_by_a_template_without_tools(name: str) -> None:
    row = encode(encoder_for(name, words.tokenizer()), *TURNS[:2], {"role": "tool", "content": "12"}, TURNS[3])
    assert row.input_ids == [] and "no place for the role tool" in row.dropped
