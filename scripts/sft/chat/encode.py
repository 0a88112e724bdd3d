"""Rows as rendered text, `{"input", "target"}`: made from conversations, read back as the template ends them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sft.chat import loss_mask, template_probe
from sft.chat.assistant_spans import Spans
from sft.chat.loss_mask import IGNORED, NO_LABEL, OVER_LENGTH, OverLength, fit
from sft.chat.loss_mask import Row as Labelled
from sft.chat.sentinels import Layout, Plan, Region, Tools
from sft.chat.template import ChatTemplate, Refused, load_template
from sft.chat.template import Message as template_Message
from sft.chat.template_probe import Facts, Stops, learn
from sft.chat.tokenize import Line, Tokens, Vocabulary
from sft.config.schema import Config
from sft.data import rows as records
from sft.data.messages import normalize_messages
from sft.data.rows import Message, RowFault
from sft.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Row = dict[str, Any]


def rendered_layout(row: Row, facts: Facts) -> Layout:
    """The text of a rendered row: as the template would end it, unless it ends so already."""
    source, target = str(row["input"]), str(row["target"])
    turn, shown = facts.turn, len(target)
    tail, end, missing = turn.tail, turn.end, None if turn.end.strip() else turn.middle_end.strip()
    if any(target.rstrip().endswith(ending.strip()) for ending in facts.ends):
        tail, end, missing, shown = "", "", None, len(target.rstrip())
    start = len(source) - (len(turn.space) if turn.space and source.endswith(turn.space) else 0)
    region = Region(0, start, len(source) + shown + len(end), missing, asked=len(source))
    return Layout(source + target + tail, [region], spans(row), len(source))


def source(row: Row) -> Layout:
    """The text that a rendered row asks with."""
    text = str(row["input"])
    return Layout(text, fakes=[fake for fake in spans(row) if fake[1] <= len(text)])


def spans(row: Row) -> list[tuple[int, int]]:
    """Where control tokens stand in the row's words, which are plain text there."""
    return [(int(start), int(end)) for start, end in row.get("plain_spans") or []]


def split(found: Layout, facts: Facts) -> Row:
    """A conversation's `input`, up to where the model begins to write its last answer, its `target` without the end
    that the template always writes, and `plain_spans`. Raises Refused with the reason.
    """
    if not found.regions:
        raise Refused("there is no answer in it")
    region, turn, text = found.regions[-1], facts.turn, found.text
    usual = region.end + len(turn.tail) - len(turn.end)
    if text[region.end - len(turn.end) :] == turn.tail and usual == len(text):
        target = text[region.cut : region.end - len(turn.end)]
    elif any(text[: region.end].endswith(ending.strip()) for ending in facts.ends):
        target = text[region.cut :]
    else:
        raise Refused("its last answer ends otherwise than answers do, so it cannot be told as input and target")
    made: Row = {"input": text[: region.cut], "target": target}
    return {**made, "plain_spans": [list(fake) for fake in found.fakes]} if found.fakes else made


def cut(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[list[Message]]:
    """The pieces of a conversation, in order. One exchange that does not fit by itself is a piece all the same."""
    head, exchanges = _exchanges(messages)
    pieces: list[list[Message]] = []
    while exchanges:
        low, high = 1, len(exchanges)  # how many of them fit: at least `low`, at most `high`
        while low < high:
            middle = (low + high + 1) // 2
            if fits(_joined(head, exchanges[:middle])):
                low = middle
            else:
                high = middle - 1
        pieces.append(_joined(head, exchanges[:low]))
        exchanges = exchanges[low:]
    return pieces


def _exchanges(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system messages that a conversation begins with, and its exchanges."""
    first = next((k for k, message in enumerate(messages) if message.get("role") != "system"), len(messages))
    made: list[list[Message]] = []
    answered = True  # a new exchange begins with a user's message behind an answer
    for message in messages[first:]:
        if answered and (message.get("role") == "user" or not made):
            made.append([])
        made[-1].append(message)
        answered = message.get("role") == "assistant"
    return messages[:first], made


def _joined(head: list[Message], exchanges: list[list[Message]]) -> list[Message]:
    return [*head, *(message for exchange in exchanges for message in exchange)]


_ID = re.compile(r"[A-Za-z0-9]{9}")


def fixed(messages: list[Message]) -> list[Message]:
    """The messages in the plainest form, as many as before; equal to what was given where nothing can be done."""
    made: list[Message] = []
    waiting: list[tuple[str, str]] = []  # calls without a result yet: the id they had, the id they have
    for index, message in enumerate(map(_read, messages)):
        if isinstance(calls := message.get("tool_calls"), list) and all(isinstance(call, dict) for call in calls):
            ids = [_id(call, index, at) for at, call in enumerate(calls)]
            message["tool_calls"] = [{**call, "id": new} for call, new in zip(calls, ids, strict=True)]
            waiting = [(str(call.get("id")), new) for call, new in zip(calls, ids, strict=True)]
        elif message.get("role") == "tool" and waiting:
            asked = str(message.get("tool_call_id"))
            at = next((at for at, (old, _) in enumerate(waiting) if old == asked), 0)
            message["tool_call_id"] = waiting.pop(at)[1]
        made.append(message)
    return made


def without_system(messages: list[Message]) -> list[Message]:
    """The messages with the system text before the first question's words, as Gemma 3 and Mistral write it."""
    if [message.get("role") for message in messages[:2]] != ["system", "user"]:
        return messages
    texts = [message.get("content") for message in messages[:2]]
    if not all(isinstance(text, str) for text in texts):
        return messages
    return [{**messages[1], "content": "\n\n".join(map(str, texts))}, *messages[2:]]


def _read(message: Message) -> Message:
    """A message with its content as text: parts as the data room reads them, reasoning and calls in their own keys."""
    if message.get("content") is None:
        return {**message, "content": ""}
    if not isinstance(message["content"], list):
        return dict(message)
    try:
        (read,) = normalize_messages([message], "messages")
    except RowFault:
        return dict(message)
    return {**message, **read, "role": message["role"]}


def _id(call: dict[str, Any], message: int, at: int) -> str:
    if _ID.fullmatch(str(call.get("id"))):
        return str(call["id"])
    told = repr((call.get("id"), message, at, call.get("function", call)))
    return hashlib.blake2b(told.encode(errors="surrogatepass"), digest_size=8).hexdigest()[:9]


log = logging.getLogger("sft.chat")
Kind = Literal["causal", "seq2seq"]
_ASKS = (
    "asks otherwise than it shows: the prompt for row {row} is not the text before its last answer (a think block, as a"
    " rule; data.template_options may set it)"
)
_REFUSES = (
    "refuses row {row} as it stands: parts of text are joined, absent texts are empty, and tool calls get ids as it"
    " wants them"
)
_NO_SYSTEM = "takes no system text: that of row {row} stands before its first question"
_LEAVES_OUT = (
    "leaves out tool calls: row {row} is learnt without them, and a turn that is nothing else as an empty answer; take"
    " a template that writes them"
)


@dataclass
class Encoded:
    """One row as it is trained on.

    input_ids, labels: equally long (causal), or source and target (seq2seq); labels are -100 where no loss is taken.
    truncated_tokens: tokens cut for length. dropped: None, or why the row is not trained on. text: as rendered.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    truncated_tokens: int = 0
    dropped: str | None = None
    text: str = ""


class Encoder:
    """Encodes rows for a decoder-only model."""

    kind: Kind = "causal"

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        over_length: OverLength,
        labels: loss_mask.Which,
        eos_ids: Iterable[int] = (),
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.max_seq_len, self.over_length, self.which = max_seq_len, over_length, labels
        self.vocabulary = Vocabulary(tokenizer, words=template.control_text)
        self.warned: set[str] = set()
        self.stops = self._learn(eos_ids)

    def _learn(self, eos_ids: Iterable[int]) -> Stops:
        """What the template does, from probes; returns what ends an answer."""
        self.tokens = Tokens(self.tokenizer, self.vocabulary)
        self.facts = learn(self.template, self.vocabulary)
        self.spans = Spans(self.template, self.vocabulary, self.facts.turn)
        self.adds_end = not self.facts.turn.end.strip()
        if self.adds_end and not self.facts.turn.middle_end.strip() and self.tokenizer.eos_token_id is None:
            raise TemplateError(
                "neither the template nor the tokenizer has an end token, so answers would never stop",
                where=self.template.name,
                fix="take another template: --set data.template_path=chatml",
            )
        return template_probe.find(self.facts, self.tokens, self.vocabulary, self.tokenizer, eos_ids)

    # --- training rows

    def encode(self, row: Row) -> Encoded:
        """One row. Raises TemplateError for a template out of bounds, DataError under `over_length: error`."""
        return self.encode_batch([row])[0]

    def encode_batch(self, rows: list[Row]) -> list[Encoded]:
        """Many rows, tokenised together."""
        plans = [self._plan(row) for row in rows]
        texts = [] if self.tokens.walks else [plan.layout.text for plan in plans if isinstance(plan, Plan)]
        lines = iter(self.tokens.lines(texts))
        return [self._finish(plan, next(lines, None)) if isinstance(plan, Plan) else plan for plan in plans]

    def encode_pieces(self, row: Row) -> list[Encoded]:
        """All that a row is trained on as: itself, or under `split_turns` pieces that fit, if it is too long.

        Every answer is learnt in one piece alone, and every piece begins with the row's system text. A single exchange
        that is too long is cut as under `truncate_left`.
        """
        splits = self.over_length == "split_turns" and self.which != "last_assistant" and not records.is_rendered(row)
        made = self.encode(row)
        if not splits or fits(made):
            return [made]
        same = {"id": made.id, "tools": records.tools(row)}
        found = cut(records.messages(row), lambda part: fits(self.encode({**same, "messages": part})))
        return [self.encode({**same, "messages": part}) for part in found] if len(found) > 1 else [made]

    def _plan(self, row: Row) -> Plan | Encoded:
        name = records.row_id(row)
        if records.is_rendered(row):
            return Plan(name, rendered_layout(row, self.facts), [])
        try:
            messages = records.messages(row)
            layout = self._layout(name, messages, records.tools(row))
        except Refused as refused:
            return Encoded(name, [], [], dropped=f"template: {refused}")
        if layout.regions and layout.prompt_ends is None and messages[-1].get("role") == "assistant":
            self._warn_once(name, _ASKS)
        if layout.left_out:
            self._warn_once(name, _LEAVES_OUT)
        return Plan(name, layout, messages)

    def split(self, row: Row) -> Row:
        """The rendered form of a row: `input` up to where the model begins to write its last answer, `target` without
        the end that the template always writes, and `plain_spans` (characters) for control tokens inside its words.

        Training on it gives the ids that training on the row itself gives. Raises Refused with the reason.
        """
        found = self._layout(records.row_id(row), records.messages(row), records.tools(row))
        return split(found, self.facts)

    def _layout(self, name: str, messages: list[template_Message], tools: Tools, *, prompt: bool = False) -> Layout:
        """The proven layout of a conversation; of the same in another form where the template refuses this one."""
        try:
            return self.spans.layout(messages, tools, prompt=prompt)
        except Refused as refused:
            plain = fixed(messages)
            for told in (plain,) if self.facts.system else (plain, without_system(plain)):
                try:
                    found = self.spans.layout(told, tools, prompt=prompt)
                except Refused:
                    continue
                moved = len(messages) - len(told)
                found.regions = [replace(region, message=region.message + moved) for region in found.regions]
                self._warn_once(name, _NO_SYSTEM if moved else _REFUSES)
                return found
            raise refused

    def _finish(self, plan: Plan, line: Line | None) -> Encoded:
        layout = plan.layout
        text = layout.text
        try:
            row = self._labelled(layout, line or self.tokens.lines([text])[0], plan.messages)
        except Refused as refused:
            return Encoded(plan.id, [], [], dropped=f"template: {refused}", text=text)
        fitted, dropped = fit(row, self.max_seq_len, self.over_length, plan.id, self.tokenizer.bos_token_id)
        if dropped is None and all(label == IGNORED for label in fitted.labels):
            dropped = NO_LABEL
        return Encoded(plan.id, fitted.ids, fitted.labels, len(row.ids) - len(fitted.ids), dropped, text)

    def _labelled(self, layout: Layout, line: Line, messages: list[template_Message]) -> Labelled:
        cuts = [region.cut for region in layout.regions]
        cuts += [region.end for region in layout.regions if region.missing is not None]
        line = self.tokens.fixed(line, layout.text, sorted(cuts), layout.fakes)
        ends = {region: self._end_ids(region) for region in layout.regions if region.missing is not None}
        return loss_mask.label(line, layout.regions, ends, self.which, messages)

    def _end_ids(self, region: Region) -> list[int]:
        return self.tokens.ids(region.missing) if region.missing else [int(self.tokenizer.eos_token_id)]

    # --- serving

    def prompt(self, row: Row | list[template_Message]) -> list[int]:
        """The token ids that generation starts from: a row without its last answer, or the messages as they are.

        The ids are those that training showed before that answer. Raises TemplateError where the template refuses.
        """
        messages: list[template_Message] = []
        try:
            if isinstance(row, dict) and records.is_rendered(row):
                layout = source(row)
            else:
                messages, tools = records.prompt_messages(row)
                layout = self._layout("of the prompt", messages, tools, prompt=True)
            return self._labelled(layout, self.tokens.lines([layout.text])[0], messages).ids
        except Refused as refused:
            raise TemplateError(f"no prompt can be made: {refused}", where=self.template.name) from None

    def _warn_once(self, row: str, said: str) -> None:
        if said not in self.warned:
            self.warned.add(said)
            log.warning(f"{self.template.name} {said.format(row=row)}. docs/TEMPLATES.md")


def fits(made: Encoded) -> bool:
    """Whether a row needed no cut for length."""
    return not made.truncated_tokens and made.dropped != OVER_LENGTH


def encoder_for(
    config: Config, tokenizer: PreTrainedTokenizerBase, kind: Kind, root: Path, *, eos_ids: Iterable[int] = ()
) -> Encoder:
    """The encoder that a config means: the one way for training, serving, preview, checks and export.

    eos_ids: the end tokens of the model's generation_config. `Encoder.template` is the template. Raises TemplateError
    where the template is not there, shows no answer, or its labels cannot be proven.
    """
    from sft.chat.seq2seq import Seq2SeqEncoder

    return (Encoder if kind == "causal" else Seq2SeqEncoder)(
        load_template(config.data, tokenizer, root),
        tokenizer,
        max_seq_len=config.model.max_seq_len,
        over_length=config.model.over_length,
        labels=config.train.labels,
        eos_ids=eos_ids,
    )
