"""Rows for encoder-decoder models (T5-like): a source and a target, each ended as the tokenizer ends texts.

Such models usually have no chat template. Then the source is the system text, a newline and the question; in longer
conversations every earlier turn is a line that begins with `User: ` or `Assistant: `. A template that is named, or that
came with the model, is rendered up to the answer instead. The target is only the answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sft.chat.encode import Encoded, Encoder, Row
from sft.chat.loss_mask import NO_LABEL, OVER_LENGTH
from sft.chat.template import Message, Refused
from sft.chat.template_probe import Stops
from sft.data import rows as records
from sft.errors import DataError, TemplateError

_SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}


class Seq2SeqEncoder(Encoder):
    """Encodes rows for an encoder-decoder model: input_ids are the source, labels the target, all of it in the loss."""

    kind = "seq2seq"

    def _prepare(self, eos_ids: Iterable[int]) -> Stops:
        if self.over_length == "split_turns":
            self.over_length = "truncate_left"  # a row is one turn
        if self.tokenizer.eos_token_id is None:
            raise TemplateError("the tokenizer has no end token", where=str(self.tokenizer.name_or_path))
        return Stops(frozenset({int(self.tokenizer.eos_token_id), *map(int, eos_ids)}), ())

    def encode_batch(self, rows: list[Row]) -> list[Encoded]:
        return [self._encode(row) for row in rows]

    def _encode(self, row: Row) -> Encoded:
        name, limit, policy = records.row_id(row), self.max_seq_len, self.over_length
        try:
            source = self._source(row)
        except Refused as refused:
            return Encoded(name, [], [], dropped=f"template: {refused}")
        target = records.reference(row).strip()
        ids, labels, cut = self._ids(source), self._ids(target), 0
        weight = row["messages"][-1].get("weight", 1) if row.get("messages") else 1
        if not target or weight == 0:
            return Encoded(name, ids, [], dropped=NO_LABEL, text=source)
        if records.is_rendered(row) and not source.strip():
            # Plain text (replay): its first half is the source, the rest the target, as in prefix language modelling,
            # Raffel et al. 2020 (T5), section 3.2.1.
            words, end = labels[:-1], labels[-1:]
            cut = max(0, len(words) - 2 * (limit - 1)) if policy.startswith("truncate") else 0
            middle = cut + (len(words) - cut) // 2
            ids, labels = words[cut:middle] + end, words[middle:] + end
        longest, dropped = max(len(ids), len(labels)), None
        if longest > limit and policy == "error":
            what = f"row {name} has {len(ids):,} + {len(labels):,} tokens, more than model.max_seq_len {limit:,} a side"
            fix = f"--set model.max_seq_len={longest}, or another model.over_length"
            raise DataError(what, where=f"row {name}", fix=fix)
        if longest > limit and (policy == "drop" or (policy == "truncate_left" and len(labels) > limit)):
            dropped = OVER_LENGTH
        elif longest > limit:  # a target that is cut keeps its end; a source is cut from its begin (`truncate_left`)
            cut += max(0, len(ids) - limit) + max(0, len(labels) - limit)
            labels = labels if len(labels) <= limit else [*labels[: limit - 1], labels[-1]]
            short = ids[-limit:] if policy == "truncate_left" else [*ids[: limit - 1], ids[-1]]
            ids = ids if len(ids) <= limit else short
        encoded = Encoded(name, ids, labels, cut, dropped, f"{source}\n{target}")
        return self._weighted(row, encoded, [weight] * len(labels))

    def _source(self, row: Row | list[Message]) -> str:
        if isinstance(row, dict) and records.is_rendered(row):
            return str(row["input"])
        messages, tools = records.prompt_messages(row)
        if self.template.origin != "default":
            return self.template.render(messages, tools=tools, add_generation_prompt=True)
        if tools:
            raise Refused("a plain source has no place for tools: name a template that has")
        turns = [message for message in messages if message.get("role") != "system"]
        system = [str(message["content"]) for message in messages if message.get("role") == "system"]
        if len(turns) == 1:
            return "\n".join([*system, str(turns[0]["content"])])
        lines = [f"{_SPEAKERS.get(str(turn.get('role')), 'User')}: {turn['content']}" for turn in turns]
        return "\n".join([*system, *lines])

    def split(self, row: Row) -> Row:
        """The rendered form of a row: its source and its answer."""
        return {"input": self._source(row), "target": records.reference(row).strip()}

    def _ids(self, text: str) -> list[int]:
        """A text as the tokenizer ends it, its end token last; control tokens inside the text are plain text."""
        plain = self.vocabulary.control_text == "plain" and bool(getattr(self.tokenizer, "is_fast", False))
        options: dict[str, Any] = {"split_special_tokens": True} if plain and self.template.origin == "default" else {}
        ids: list[int] = list(self.tokenizer(text, add_special_tokens=True, truncation=False, **options)["input_ids"])
        end = int(self.tokenizer.eos_token_id)
        return ids if ids[-1:] == [end] else [*ids, end]

    def prompt(self, row: Row | list[Message]) -> list[int]:
        """The source ids, cut as in training where they are too many."""
        try:
            ids = self._ids(self._source(row))
        except Refused as refused:
            raise TemplateError(f"no prompt can be rendered: {refused}", where=self.template.name) from None
        return ids[-self.max_seq_len :] if self.over_length == "truncate_left" else ids
