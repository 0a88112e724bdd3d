"""For every shipped template and any conversation: what is in the loss is exactly the answers and their end tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft.chat.encode import Encoder
from tests import tiny_models
from tests.chat.helpers import encoder_for, in_loss

ENDS = {"llama3": "<|eot_id|>"}
TRIMS = {"plain", "default", "llama2", "llama3", "mistral", "alpaca", "vicuna"}
SPACED = {"plain", "default", "llama2", "mistral", "vicuna"}
CONTROL_LIKE = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "\n",
    "\n\n",
    " ",
    "</think>",
    "### Response:\n",
    "User:",
]
text = st.lists(
    st.one_of(st.sampled_from(CONTROL_LIKE), st.text(st.characters(codec="utf-8", max_codepoint=0xEFFFF), max_size=9)),
    max_size=6,
).map("".join)
words = text.filter(lambda written: bool(written.strip()))
talks = st.tuples(st.one_of(st.none(), words), st.lists(st.tuples(words, words), min_size=1, max_size=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_models.byte_level_tokenizer(path, template=None)
    return path


@cache
def loaded_encoder(name: str, folder: Path) -> Encoder:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    more = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": more, "bos_token": "<s>"})
    return encoder_for(name, tokenizer)


@pytest.mark.parametrize("name", ["alpaca", "chatml", "default", "llama2", "llama3", "mistral", "plain", "vicuna"])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=talks)
def test_the_loss_covers_exactly_the_answers_and_their_ends(name: str, folder: Path, talk: Any) -> None:
    import unicodedata

    encoder = loaded_encoder(name, folder)
    opening, turns = talk
    messages = [{"role": "system", "content": opening}] if opening else []
    for question, reply in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    row = encoder.encode({"messages": messages})
    assert row.dropped is None
    end = ENDS.get(name, "<|im_end|>")
    shown = [reply.strip() if name in TRIMS else reply for _, reply in turns]
    space, gap = " " if name in SPACED else "", " " if name == "llama2" else ""
    expected = [unicodedata.normalize("NFC", f"{space}{reply}{gap}{end}") for reply in shown]
    assert in_loss(encoder, row) == expected
    prompt = encoder.prompt({"messages": messages})
    assert row.input_ids[: len(prompt)] == prompt and row.labels[len(prompt)] != -100
    ends = {encoder.tokenizer.convert_tokens_to_ids(end)}
    turn_ends = sum(token in ends for token in row.input_ids)
    assert turn_ends == len(turns) if name not in ("chatml", "llama3") else turn_ends == len(messages)
