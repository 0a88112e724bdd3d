"""Padding that hides no end token, and tokenizers that change text."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from sft.errors import ModelError
from sft.model.tokenizer import choose_pad, load_tokenizer, round_trip_problem
from tests import tiny_models


def test_a_tokenizer_with_its_own_pad_token_keeps_it(tiny_qwen2):
    assert load_tokenizer(tiny_qwen2).pad_token == "<|endoftext|>"


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_a_missing_pad_token_or_one_equal_to_the_end_token_is_replaced(tiny_qwen2, pad):
    tokenizer = load_tokenizer(tiny_qwen2)
    tokenizer.pad_token = pad
    assert choose_pad(tokenizer) == "<|endoftext|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_dedicated_pad_token_comes_first_and_one_beyond_the_embedding_never(tiny_qwen2):
    tokenizer = load_tokenizer(tiny_qwen2)
    rows = len(tokenizer)
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|finetune_right_pad_id|>"]})
    assert choose_pad(tokenizer, rows) == "<|endoftext|>"
    tokenizer.pad_token = None
    assert choose_pad(tokenizer) == "<|finetune_right_pad_id|>"


def test_without_a_free_token_the_end_token_is_used_for_padding(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[])))
    bare.eos_token = "</s>"
    assert choose_pad(bare) == "</s>"
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ModelError, match="neither an end token nor a pad token"):
        choose_pad(bare)


@pytest.mark.parametrize("name", ["qwen2.5", "minimind"])
def test_real_tokenizers_load_from_their_files_alone(shared, name):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert round_trip_problem(tokenizer) is None


def test_a_tokenizer_that_loses_text_is_reported(shared, tiny_qwen2):
    assert round_trip_problem(load_tokenizer(tiny_qwen2)) is None
    assert "the tokenizer changes text" in str(round_trip_problem(load_tokenizer(shared / "tokenizers" / "t5-small")))


def test_a_tokenizer_that_transformers_rebuilds_is_loaded_as_its_file_says(tmp_path, caplog):
    """A tokenizer with another splitting pattern beside a config.json of Qwen2: rebuilt by the model type."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = tiny_models.tiny_qwen2(tmp_path / "m")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S|\s"
    (folder / "tokenizer.json").write_text(json.dumps(state))
    text = "Order 48213: the lazy dog"
    filed = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    rebuilt = AutoTokenizer.from_pretrained(folder)
    assert rebuilt.encode(text) != filed
    with caplog.at_level("WARNING"):
        logging.getLogger("sft").propagate = True
        tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(text) == filed
    assert "transformers rebuilt it" in caplog.text and "loaded as its file says" in caplog.text
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.chat_template == rebuilt.chat_template
    assert round_trip_problem(tokenizer) is None


def test_a_folder_without_tokenizer_files_is_named(tiny_qwen2, tmp_path):
    shutil.copy(tiny_qwen2 / "config.json", tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer files"):
        load_tokenizer(tmp_path)
