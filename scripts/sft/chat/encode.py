"""The encoder: rows to token ids, labels, prompts and stops, the same for train, eval, infer, preview and export."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sft.chat.assistant_spans import AssistantSpans
from sft.chat.loss_mask import IGNORED, NO_LABEL, OVER_LENGTH, InLoss, LabelledRow, OverLength, fit_length, mask_loss
from sft.chat.sentinels import Layout, Region
from sft.chat.template import ChatTemplate, Message, Refused, Tools, load_template
from sft.chat.template_probe import Stops, find_stops, probe_template
from sft.chat.tokenize import Line, Tokens, Vocabulary
from sft.config.schema import PAIRED, PREFERENCES, Config
from sft.data import rows as records
from sft.data.messages import normalize_messages
from sft.data.rows import RowFault
from sft.errors import ConfigError, DataError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("sft.chat")
Row = dict[str, Any]
Kind = Literal["causal", "seq2seq"]
NO_WEIGHT = "its weight is 0"
_PROMPT_DIFFERS = (
    "the generation prompt differs from the training text for row {row} (usually a <think> block;"
    " data.template_options may set it)"
)
_PLAINER = (
    "the template refuses row {row} as it is; it is rendered in a plainer form: text parts joined, missing texts empty,"
    " new ids for tool calls"
)
_NO_SYSTEM = "the template accepts no system text: in row {row} it is put before the first question"


@dataclass
class Encoded:
    """One row as it is trained on.

    input_ids, labels: equally long (causal), or source and target (seq2seq); labels are -100 where no loss is taken.
    truncated_tokens: tokens cut for length. dropped: None, or why the row is not trained on. text: as rendered.
    weights: how much each label counts, None where each counts 1. row_weight: the row's own, None if it has none.
    chosen: of a preference pair, how many of its tokens are those of the chosen side, which the rejected one follows.
    rating: of a rated answer, 1 or -1; its `chosen` tokens are followed by another row's answer to the same prompt.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    truncated_tokens: int = 0
    dropped: str | None = None
    text: str = ""
    weights: list[float] | None = None
    row_weight: float | None = None
    chosen: int = 0
    rating: int = 0

    @property
    def fits(self) -> bool:
        """Whether the row needed no cut for length."""
        return not self.truncated_tokens and self.dropped != OVER_LENGTH


class Encoder:
    """Encodes rows for a decoder-only model. Raises TemplateError if labels cannot be derived for the template.

    eos_ids: the end tokens of the model's generation_config. weight_field: key of a row's weight (`data.weight_field`).
    pairs: training rows are preference pairs, of which both
    answers are trained on. rated: training rows are answers that are rated good or bad; of a pair, both.
    """

    kind: Kind = "causal"

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_len: int,
        over_length: OverLength,
        labels: InLoss,
        eos_ids: Iterable[int] = (),
        weight_field: str | None = None,
        pairs: bool = False,
        rated: bool = False,
    ) -> None:
        self.template, self.tokenizer, self.weight_field = template, tokenizer, weight_field
        self.pairs, self.rated = pairs, rated
        self.max_seq_len, self.over_length, self.in_loss = max_seq_len, over_length, labels
        self.vocabulary = Vocabulary(tokenizer, control_text=template.control_text)
        self.warnings: dict[str, str] = {}  # kind -> text, as logged
        self.stops = self._prepare(eos_ids)

    def _prepare(self, eos_ids: Iterable[int]) -> Stops:
        """Probes the template; returns what ends an answer."""
        self.tokens = Tokens(self.tokenizer, self.vocabulary)
        self.traits = probe_template(self.template, self.vocabulary)
        self.spans = AssistantSpans(self.template, self.vocabulary, self.traits.turn)
        turn = self.traits.turn
        if not (turn.end.strip() or turn.middle_end.strip()) and self.tokenizer.eos_token_id is None:
            what = "neither the template nor the tokenizer has an end token, so answers would never stop"
            fix = "use another template: --set data.template_path=chatml"
            raise TemplateError(what, where=self.template.name, fix=fix)
        return find_stops(self.traits, self.tokens, self.vocabulary, self.tokenizer, eos_ids)

    # --- training rows

    def encode(self, row: Row) -> Encoded:
        """One row. Raises TemplateError for a template past its limits, DataError under `over_length: error`."""
        return self.encode_batch([row])[0]

    def encode_batch(self, rows: list[Row]) -> list[Encoded]:
        """Many rows, tokenised together."""
        layouts = [self._layout_of_row(row) for row in rows]
        lines = iter(self.tokens.lines([layout.text for layout in layouts if isinstance(layout, Layout)]))
        return [
            self._encoded(row, layout, next(lines)) if isinstance(layout, Layout) else layout
            for row, layout in zip(rows, layouts, strict=True)
        ]

    def encode_pieces(self, rows: list[Row]) -> list[list[Encoded]]:
        """What each row is trained on as: itself, or pieces that fit if it is too long and `split_turns` is set; of a
        preference pair both sides as one.

        Every answer is in the loss of exactly one piece, and every piece begins with the row's system text.
        """
        if self.pairs:
            both = self.encode_batch([side for row in rows for side in self.sides(row)])
            return [[_joined(*pair)] for pair in zip(both[::2], both[1::2], strict=True)]
        if self.rated:
            return self._rated(rows)
        if bad := next(filter(records.is_bad, rows), None):
            what = "this answer is rated as bad, and train.objective would teach it"
            fix = "--set train.objective=kto, or process the rows again without it"
            raise DataError(what, where=str(bad.get("origin", records.row_id(bad))), fix=fix)
        splits = self.over_length == "split_turns" and self.in_loss != "last_assistant"
        pairs = zip(rows, self.encode_batch(rows), strict=True)
        return [
            self._pieces(row, whole) if splits and not whole.fits and not records.is_rendered(row) else [whole]
            for row, whole in pairs
        ]

    def _rated(self, rows: list[Row]) -> list[list[Encoded]]:
        """Each answer with its rating and, behind it, the answer to its prompt of the row half of `rows` away."""
        answers = [answer for row in rows for answer in self._answers(row)]
        prompts = [answer["messages"][: answer["prompt"]] for answer in answers]
        others = [answers[(at + max(1, len(answers) // 2)) % len(answers)] for at in range(len(answers))]
        mixed = [
            {**answer, "messages": [*prompt, *other["messages"][other["prompt"] :]]}
            for answer, prompt, other in zip(answers, prompts, others, strict=True)
        ]
        whole = self.encode_batch([row for both in zip(answers, mixed, strict=True) for row in both])
        pieces = iter(
            replace(_joined(own, other), dropped=own.dropped or other.dropped, rating=1 if answer["good"] else -1)
            for answer, own, other in zip(answers, whole[::2], whole[1::2], strict=True)
        )
        return [[next(pieces) for _ in range(2 if records.is_pair(row) else 1)] for row in rows]

    def _answers(self, row: Row) -> list[Row]:
        """The answers of a row: `messages`, of which the first `prompt` are its prompt, and whether it is `good`."""
        if records.is_pair(row):
            prompt = len(records.prompt_of_pair(row))
            both = zip(records.sides(row), (True, False), strict=True)
            return [{**side, "prompt": prompt, "good": good} for side, good in both]
        if not isinstance(row.get("label"), bool) or records.is_rendered(row):
            what = "train.objective is kto, and this row does not say whether its answer is good"
            fix = "process rows with a `label` (true or false) again, with train.objective=kto in the config"
            raise DataError(what, where=str(row.get("origin", records.row_id(row))), fix=fix)
        turns = records.messages(row)
        context = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns[:-1]]
        answer = {"id": records.row_id(row), "messages": [*context, turns[-1]], "tools": records.tools(row)}
        return [{**answer, "prompt": len(context), "good": row["label"]}]

    def sides(self, row: Row) -> tuple[Row, Row]:
        """The chosen and the rejected side of a pair, as rows. Raises DataError for a row with one answer."""
        if not records.is_pair(row):
            what = "train.objective compares two answers, and this row has one"
            fix = "train on pairs of `chosen` and `rejected`, or --set train.objective=response"
            raise DataError(what, where=str(row.get("origin", records.row_id(row))), fix=fix)
        return records.sides(row)

    def _pieces(self, row: Row, whole: Encoded) -> list[Encoded]:
        shared: Row = {"id": whole.id, "tools": records.tools(row)}
        if self.weight_field:
            shared[self.weight_field] = whole.row_weight
        chats = split_long_chat(records.messages(row), lambda chat: self.encode({**shared, "messages": chat}).fits)
        return [self.encode({**shared, "messages": chat}) for chat in chats] if len(chats) > 1 else [whole]

    def _layout_of_row(self, row: Row) -> Layout | Encoded:
        """The row's text and regions, or what a row that the template refuses becomes."""
        name = records.row_id(row)
        if records.is_rendered(row):
            return self._rendered_layout(row)
        try:
            messages = records.messages(row)
            layout = self._layout(name, messages, records.tools(row))
        except Refused as refused:
            return Encoded(name, [], [], dropped=f"template: {refused}")
        if layout.regions and not layout.prompt_shown and messages[-1].get("role") == "assistant":
            self._warn(name, _PROMPT_DIFFERS)
        return layout

    def _layout(self, name: str, messages: list[Message], tools: Tools, *, prompt: bool = False) -> Layout:
        """The proven layout of a conversation; of its plainest form where the template refuses this one."""
        messages = [_as_text(one) if isinstance(one.get("content"), list) else one for one in messages]
        try:
            return self.spans.layout(messages, tools, prompt=prompt)
        except Refused as refused:
            plain = plain_messages(messages)
            for form in (plain, system_in_question(plain)):
                try:
                    layout = self.spans.layout(form, tools, prompt=prompt)
                except Refused:
                    continue
                moved = len(messages) - len(form)
                layout.regions = [replace(region, message=region.message + moved) for region in layout.regions]
                self._warn(name, _NO_SYSTEM if moved else _PLAINER)
                return layout
            raise refused

    def _encoded(self, row: Row, layout: Layout, line: Line) -> Encoded:
        name, messages = records.row_id(row), [] if records.is_rendered(row) else records.messages(row)
        try:
            whole = self._labelled(layout, line, messages)
        except Refused as refused:
            return Encoded(name, [], [], dropped=f"template: {refused}", text=layout.text)
        fitted, dropped = fit_length(whole, self.max_seq_len, self.over_length, name, self.tokenizer.bos_token_id)
        if dropped is None and all(label == IGNORED for label in fitted.labels):
            dropped = NO_LABEL
        encoded = Encoded(name, fitted.ids, fitted.labels, len(whole.ids) - len(fitted.ids), dropped, layout.text)
        return self._weighted(row, encoded, fitted.weights)

    def _weighted(self, row: Row, encoded: Encoded, weights: list[float]) -> Encoded:
        """The row with the weights of its labels times its own; dropped if that is 0. Raises DataError."""
        if self.weight_field and row.get(self.weight_field) is not None:
            try:
                encoded.row_weight = records.to_weight(row[self.weight_field], self.weight_field)
            except RowFault as fault:
                where = str(row.get("origin") or f"row {encoded.id}")
                raise DataError(fault.detail, where=where, fix="correct that row, then make process") from None
            weights = [weight * encoded.row_weight for weight in weights]
            if encoded.row_weight == 0 and encoded.dropped is None:
                encoded.dropped = NO_WEIGHT
        if any(weight != 1 and label != IGNORED for weight, label in zip(weights, encoded.labels, strict=True)):
            encoded.weights = weights
        return encoded

    def _labelled(self, layout: Layout, line: Line, messages: list[Message]) -> LabelledRow:
        """The tokens of a layout, with a boundary wherever the model begins to write or an end token is appended."""
        ends: dict[Region, list[int]] = {}
        for region in layout.regions:
            if region.missing_end is not None:
                end = region.missing_end
                ends[region] = self.tokens.ids(end) if end else [int(self.tokenizer.eos_token_id)]
        cuts = sorted([region.boundary for region in layout.regions] + [region.end for region in ends])
        line = self.tokens.retokenise(line, layout.text, cuts, layout.plain_spans)
        return mask_loss(line, layout.regions, ends, self.in_loss, messages)

    # --- rendered rows: {"input", "target", "plain_spans"?}

    def split(self, row: Row) -> Row:
        """The rendered form of a row: `input` up to where the model begins to write its last answer, `target` without
        the end that the template always writes, and `plain_spans` (characters) for control tokens inside its words.

        Training on it gives the ids that training on the row itself gives. Raises Refused with the reason.
        """
        layout = self._layout(records.row_id(row), messages := records.messages(row), records.tools(row))
        if not layout.regions:
            raise Refused("it has no answer")
        if messages[-1].get("weight", 1) != 1:
            raise Refused("its last answer has a weight of its own, which no rendered row has")
        region, turn, text = layout.regions[-1], self.traits.turn, layout.text
        end = region.end - len(turn.end)
        if text[end:] == turn.tail:
            target = text[region.boundary : end]
        elif any(text[: region.end].endswith(ending.strip()) for ending in self.traits.ends):
            target = text[region.boundary :]
        else:
            raise Refused("its last answer has an unusual end, so it cannot be written as input and target")
        rendered: Row = {"input": text[: region.boundary], "target": target}
        if layout.plain_spans:
            rendered["plain_spans"] = [list(span) for span in layout.plain_spans]
        return rendered

    def _rendered_layout(self, row: Row) -> Layout:
        """The text of a rendered row, ended as the template ends turns unless it ends so already."""
        source, target, turn = str(row["input"]), str(row["target"]), self.traits.turn
        if any(target.rstrip().endswith(ending.strip()) for ending in self.traits.ends):
            tail, end, missing = "", len(source) + len(target.rstrip()), None
        else:
            tail, end = turn.tail, len(source) + len(target) + len(turn.end)
            missing = None if turn.end.strip() else turn.middle_end.strip()
        start = len(source) - (len(turn.space) if turn.space and source.endswith(turn.space) else 0)
        region = Region(0, start, end, missing, prompt_end=len(source))
        return Layout(source + target + tail, [region], _plain_spans(row), prompt_shown=True)

    # --- serving

    def prompt(self, row: Row | list[Message]) -> list[int]:
        """The token ids that generation starts from: a row without its last answer, or the messages as they are.

        The ids are those that training showed before that answer. Raises TemplateError if the template refuses.
        """
        messages: list[Message] = []
        try:
            if isinstance(row, dict) and records.is_rendered(row):
                text = str(row["input"])
                layout = Layout(text, plain_spans=[span for span in _plain_spans(row) if span[1] <= len(text)])
            else:
                messages, tools = records.prompt_messages(row)
                layout = self._layout("of the prompt", messages, tools, prompt=True)
            return self._labelled(layout, self.tokens.lines([layout.text])[0], messages).ids
        except Refused as refused:
            raise TemplateError(f"no prompt can be rendered: {refused}", where=self.template.name) from None

    def _warn(self, row: str, kind: str) -> None:
        self.warn_once(kind, f"{self.template.name}: {kind.format(row=row)}. docs/TEMPLATES.md")

    def warn_once(self, kind: str, text: str) -> None:
        """Logs a warning unless there was one of its kind."""
        if kind not in self.warnings:
            self.warnings[kind] = text
            log.warning("%s", text)


def _joined(chosen: Encoded, rejected: Encoded) -> Encoded:
    """Both sides of a pair as one row; dropped if one of them is."""
    return Encoded(
        chosen.id,
        chosen.input_ids + rejected.input_ids,
        chosen.labels + rejected.labels,
        chosen.truncated_tokens + rejected.truncated_tokens,
        chosen.dropped or rejected.dropped,
        chosen.text,
        chosen=len(chosen.input_ids),
    )


def _plain_spans(row: Row) -> list[tuple[int, int]]:
    return [(int(start), int(end)) for start, end in row.get("plain_spans") or []]


def split_long_chat(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[list[Message]]:
    """A conversation cut between its exchanges into pieces that fit, in order, each with the system messages in front;
    one exchange that does not fit by itself is a piece too.
    """
    first = next((k for k, message in enumerate(messages) if message.get("role") != "system"), len(messages))
    exchanges: list[list[Message]] = []
    answered = True  # a new exchange begins with a user's message behind an answer
    for message in messages[first:]:
        if answered and (message.get("role") == "user" or not exchanges):
            exchanges.append([])
        exchanges[-1].append(message)
        answered = message.get("role") == "assistant"

    def joined(count: int) -> list[Message]:
        return [*messages[:first], *(message for exchange in exchanges[:count] for message in exchange)]

    pieces: list[list[Message]] = []
    while exchanges:
        low, high = 1, len(exchanges)  # how many of them fit, by bisection
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(joined(middle)) else (low, middle - 1)
        pieces.append(joined(low))
        exchanges = exchanges[low:]
    return pieces


def plain_messages(messages: list[Message]) -> list[Message]:
    """As many messages in the plainest form: no content is None, and calls have ids of nine letters and digits
    (Mistral takes no others), which their results repeat.
    """
    plain: list[Message] = []
    waiting: list[str] = []  # ids of calls without a result yet
    for index, turn in enumerate(messages):
        message = {**turn, "content": turn.get("content") or ""}
        if isinstance(calls := message.get("tool_calls"), list) and all(isinstance(call, dict) for call in calls):
            waiting = [_call_id(call.get("id") or f"{index} {at}") for at, call in enumerate(calls)]
            message["tool_calls"] = [{**call, "id": new} for call, new in zip(calls, waiting, strict=True)]
        elif message.get("role") == "tool" and waiting:
            known = _call_id(message.get("tool_call_id"))
            message["tool_call_id"] = waiting.pop(waiting.index(known) if known in waiting else 0)
        plain.append(message)
    return plain


def _call_id(old: Any) -> str:
    if re.fullmatch(r"[A-Za-z0-9]{9}", str(old)):
        return str(old)
    return hashlib.blake2b(str(old).encode(errors="surrogatepass"), digest_size=8).hexdigest()[:9]


def system_in_question(messages: list[Message]) -> list[Message]:
    """The messages with the system text before the first question's words, as Gemma 3 and Mistral write it."""
    texts = [message.get("content") for message in messages[:2]]
    if [message.get("role") for message in messages[:2]] != ["system", "user"]:
        return messages
    if not all(isinstance(text, str) for text in texts):
        return messages
    return [{**messages[1], "content": "\n\n".join(map(str, texts))}, *messages[2:]]


def _as_text(message: Message) -> Message:
    """A message with its content as text: parts joined, reasoning and calls among them in their own keys."""
    try:
        (plain,) = normalize_messages([message], "messages")
    except RowFault:
        return message
    return {**message, **plain, "role": message["role"]}


def build_encoder(
    config: Config, tokenizer: PreTrainedTokenizerBase, kind: Kind, root: Path, *, eos_ids: Iterable[int] = ()
) -> Encoder:
    """The encoder for a config and its tokenizer; see `generation.encoder.load_encoder`. Raises TemplateError."""
    from sft.chat.seq2seq import Seq2SeqEncoder

    if config.train.objective in PREFERENCES and kind == "seq2seq":
        what = f"train.objective is {config.train.objective}, but {config.model.name} is an encoder-decoder"
        raise ConfigError(what, where="train.objective", fix="--set train.objective=response, or a decoder-only model")
    return (Encoder if kind == "causal" else Seq2SeqEncoder)(
        load_template(config.data, tokenizer, root),
        tokenizer,
        max_seq_len=config.model.max_seq_len,
        over_length=config.model.over_length,
        labels=config.train.labels,
        eos_ids=eos_ids,
        weight_field=config.data.weight_field,
        pairs=config.train.objective in PAIRED,
        rated=config.train.objective == "kto",
    )
