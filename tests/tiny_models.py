"""Tiny models with random weights and tokenizers trained on a few lines: every family that the tests train."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? It is Paris.",
    "You are a helpful assistant. Please answer in one short sentence. 2 + 2 = 4, 17 - 9 = 8.",
    "Name: Mara Olsen; order 48213; the kettle arrived broken and she wants her money back!",
] * 4


def byte_level_tokenizer(folder: Path, *, vocab: int = 400, template: str | None = CHATML) -> None:
    """A byte-level BPE with ChatML tokens, written as Qwen2 tokenizers are."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator(TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(tok.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    fast = Qwen2TokenizerFast(
        vocab=state["vocab"],
        merges=merges,
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def tiny_qwen2(folder: Path, *, seed: int = 0, template: str | None = CHATML, **overrides: object) -> Path:
    """A Qwen2 of 2 layers, hidden 64, about 100k parameters."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    byte_level_tokenizer(folder, template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": (len(tokenizer) + 31) // 32 * 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": True,
    }
    Qwen2ForCausalLM(Qwen2Config(**{**settings, **overrides})).save_pretrained(folder)
    return folder


def tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """A GPT-2 (Conv1D layers, no chat template of its own)."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    byte_level_tokenizer(folder, template=None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=(len(tokenizer) + 31) // 32 * 32,
        n_positions=512,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def tiny_t5(folder: Path, *, seed: int = 0) -> Path:
    """A T5 of 2 + 2 layers with a unigram tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tok.train_from_iterator(TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    vocab = [tuple(pair) for pair in json.loads(tok.to_str())["model"]["vocab"]]
    fast = T5TokenizerFast(vocab=vocab, extra_ids=0, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=(len(fast) + 31) // 32 * 32,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=fast.pad_token_id,
        pad_token_id=fast.pad_token_id,
        eos_token_id=fast.eos_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
