"""Builders of templates, encoders and messages for the chat tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.chat.dataset import Progress, RunLedger, encode_rows
from sft.chat.encode import Encoded, Encoder
from sft.chat.seq2seq import Seq2SeqEncoder
from sft.chat.template import ChatTemplate, load_template
from sft.config.schema import DataSection

ROOT = Path(__file__).resolve().parents[2]
CHATML = (ROOT / "chat_templates" / "chatml.jinja").read_text(encoding="utf-8")


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def make_template(source: str, tokenizer: Any, **options: Any) -> ChatTemplate:
    special = {key: text for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    return ChatTemplate("test", source, special, **options)


def make_encoder(source: str | ChatTemplate, tokenizer: Any, **options: Any) -> Encoder:
    template = source if isinstance(source, ChatTemplate) else make_template(source, tokenizer)
    settings: dict[str, Any] = {"max_seq_len": 100_000, "over_length": "drop", "labels": "all_assistant", **options}
    kind = {"causal": Encoder, "seq2seq": Seq2SeqEncoder}[settings.pop("kind", "causal")]
    return kind(template, tokenizer, **settings)


def encoder_for(name: str, tokenizer: Any, **options: Any) -> Encoder:
    """The encoder with the template that `data.template_path: name` selects."""
    return make_encoder(load_template(DataSection(template_path=name), tokenizer, ROOT), tokenizer, **options)


def encode_all(encoder: Encoder, rows: list[Any], progress: Progress | None = None) -> tuple[list[Encoded], RunLedger]:
    """The rows that can be trained on, in order, and the ledger."""
    ledger = RunLedger()
    return [encoded for _, encoded in encode_rows(encoder, rows, ledger, len(rows), progress)], ledger


def in_loss(encoder: Encoder, encoded: Any) -> list[str]:
    """The labelled spans of a row, decoded."""
    spans: list[list[int]] = []
    inside = False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label != -100:
            assert label == token
            if not inside:
                spans.append([])
            spans[-1].append(token)
        inside = label != -100
    decode = encoder.tokenizer.decode
    return [str(decode(span, skip_special_tokens=False, clean_up_tokenization_spaces=False)) for span in spans]


def encode(encoder: Encoder, *messages: dict[str, Any], tools: list[Any] | None = None) -> Any:
    return encoder.encode({"messages": list(messages), **({"tools": tools} if tools else {})})
