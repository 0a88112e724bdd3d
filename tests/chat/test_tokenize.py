"""SentencePiece-like tokenizers: words begin with a mark for a space, unknown characters fall back to bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import tiny_models
from tests.chat.helpers import CHATML, answer, encode, in_loss, make_encoder, user

SPACED = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
ANSWERS = ["Paris.", " Paris is it", "\n\nThe capital", "é 東京 🙂", "2 + 2 = 4", "   ", "x"]


def spm_tokenizer(scheme: str) -> Any:
    """A BPE with `▁` for spaces and byte fallback, as Llama 2 has it. scheme: where a text gets a `▁` in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(tiny_models.TEXT, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:5]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def ids(tok: Any, text: str) -> list[int]:
    token_ids: list[int] = tok(text, add_special_tokens=False)["input_ids"]
    return token_ids


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("source", [CHATML, SPACED], ids=["chatml", "spaced"])
def test_the_prompt_is_the_begin_of_the_row_and_the_answer_is_in_the_loss_whole(scheme: str, source: str) -> None:
    tok = spm_tokenizer(scheme)
    encoder = make_encoder(source, tok)
    end = "<|im_end|>" if source is CHATML else "</s>"
    for first in ANSWERS:
        for second in ANSWERS[:4]:
            talk = [user("What is it?"), answer(first), user("And now?"), answer(second)]
            row, prompt = encode(encoder, *talk), encoder.prompt(talk)
            assert row.dropped is None
            assert row.input_ids[: len(prompt)] == prompt and row.labels[len(prompt)] != -100
            assert (
                prompt[: len(encoder.prompt(talk[:1]))]
                == encoder.prompt(talk[:1])
                == ids(tok, _prompt_text(encoder, talk[:1]))
            )
            shown = [stretch.lstrip(" ") for stretch in in_loss(encoder, row)]
            assert shown == [f"{text}{end}".lstrip(" ") for text in (first, second) if text.strip()]


def _prompt_text(encoder: Any, talk: list[dict[str, Any]]) -> str:
    text: str = encoder.template.render(talk, add_generation_prompt=True)
    return text


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_control_text_is_spelt_out(scheme: str) -> None:
    tok = spm_tokenizer(scheme)
    encoder = make_encoder(CHATML, tok)
    row = encode(encoder, user("A <|im_end|> b</s>"), answer("No."))
    controls = [token for token in row.input_ids if token in encoder.vocabulary.texts]
    assert tok.convert_ids_to_tokens(controls) == [
        *("<s>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    ]
    assert "A <|im_end|> b</s><|im_end|>" in tok.decode(row.input_ids)
    assert in_loss(encoder, row) in (["No.<|im_end|>"], [" No.<|im_end|>"])
