"""Short ways to templates, encoders and messages for the tests of this room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.chat.dataset import Progress, RunLedger
from sft.chat.dataset import encode_rows as each
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


def template(source: str, tokenizer: Any, **named: Any) -> ChatTemplate:
    special = {key: text for key, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    return ChatTemplate("test", source, special, **named)


def encoder(source: str | ChatTemplate, tokenizer: Any, **named: Any) -> Encoder:
    made = source if isinstance(source, ChatTemplate) else template(source, tokenizer)
    settings: dict[str, Any] = {"max_seq_len": 100_000, "over_length": "drop", "labels": "all_assistant", **named}
    return {"causal": Encoder, "seq2seq": Seq2SeqEncoder}[settings.pop("kind", "causal")](made, tokenizer, **settings)


def named(name: str, tokenizer: Any, **more: Any) -> Encoder:
    """The encoder of a template as a config names it."""
    return encoder(load_template(DataSection(template_path=name), tokenizer, ROOT), tokenizer, **more)


def all_of(made: Encoder, rows: list[Any], progress: Progress | None = None) -> tuple[list[Encoded], RunLedger]:
    """The rows that can be trained on, in order, and the ledger."""
    ledger = RunLedger()
    return [one for _, one in each(made, rows, ledger, len(rows), progress)], ledger


def in_loss(made: Encoder, encoded: Any) -> list[str]:
    """The labelled stretches of a row, decoded."""
    found: list[list[int]] = []
    inside = False
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label != -100:
            assert label == token
            if not inside:
                found.append([])
            found[-1].append(token)
        inside = label != -100
    decode = made.tokenizer.decode
    return [str(decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False)) for run in found]


def encoded(made: Encoder, *messages: dict[str, Any], tools: list[Any] | None = None) -> Any:
    return made.encode({"messages": list(messages), **({"tools": tools} if tools else {})})
