"""The parts of the demo model: its recipe, tokenizer, initial weights, and the folder they are saved to."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging

from demo_model.corpus import Message, chats

PAD, TURN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTEXT_TOKENS = 2048


@dataclass(frozen=True)
class Recipe:
    """What is built. Widths are multiples of 64: NF4 blocks and llama.cpp's 32-wide ones divide them."""

    steps: int = 3300
    seed: int = 7
    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 448
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    tokenizer_chats: int = 12_000
    muon_rate: float = 0.02
    adamw_rate: float = 0.003

    @property
    def settling_from(self) -> int:
        """First step of the second, shorter decay of the rate, after 26 of 33 parts."""
        return self.steps - self.steps * 7 // 33


def train_tokenizer(recipe: Recipe) -> Qwen2Tokenizer:
    """A byte-level BPE inside Qwen2's own normaliser and splitter, as AutoTokenizer will rebuild it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shell = Qwen2Tokenizer().backend_tokenizer
    raw = Tokenizer(models.BPE())
    raw.normalizer, raw.pre_tokenizer, raw.decoder = shell.normalizer, shell.pre_tokenizer, shell.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, TURN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    read = itertools.islice(chats(recipe.seed), recipe.tokenizer_chats)
    raw.train_from_iterator((m["role"] + "\n" + m["content"] for chat in read for m in chat), trainer)
    trained = json.loads(raw.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[TURN],
        model_max_length=CONTEXT_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def render(chat: list[Message]) -> list[tuple[str, bool]]:
    """The chat template's text in pieces; True marks what the assistant says, its end token included."""
    pieces = []
    for message in chat:
        answer = message["role"] == "assistant"
        pieces += [(f"{TURN}{message['role']}\n", False), (f"{message['content']}{END}", answer), ("\n", False)]
    return pieces


def new_model(recipe: Recipe, vocab_size: int) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights; the token embedding serves as output layer too, to stay under 8 MB."""
    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Weights in fp32, the tokenizer with its template, and greedy decoding that stops at either end token."""
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[2, 0], pad_token_id=0)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def figures(recipe: Recipe, model: Qwen2ForCausalLM) -> dict[str, object]:
    """What was built, when and with which versions."""
    return {
        "recipe": asdict(recipe),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "date": date.today().isoformat(),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }
