"""Formats of raw rows: one table with the keys of each, the rows that it fits, and how it is read into turns."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from sft.data.messages import (
    ROLES,
    SPEAKER_KEYS,
    check_turns,
    normalize_messages,
    normalize_tool_calls,
    normalize_tools,
    to_text,
)
from sft.data.readers import RawRow
from sft.data.rows import Message, Row, RowFault, dump_json, parse_json, row_id, to_weight
from sft.errors import DataError, nearest

Names = dict[str, str]  # plain spelling of a key (`best_answer`) -> the key in the row (`Best Answer`)
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "systeminstruction")
QUESTIONS = ("question", "query", "problem", "instruction")
ANSWERS = ("answer", "answers", "response", "solution", "output")
COMPLETIONS = ("completion", "response", "answer", "output")
INPUTS = ("input", "context")
PASSAGES = ("context", "passage")
OUTPUTS = ("output", "response")
TURNS = ("messages", "conversations", "conversation")
# turns if they have roles, see _turns_key
LISTS = ("dialog", "dialogue", "utterances", "turns", "chat_messages", "contents", "data")
TOOLS = ("tools", "functions")
USERS = ("user", "human")
ASSISTANTS = ("assistant", "gpt", "bot")
ASKING = (*USERS, "prompt", *QUESTIONS)
ANSWERING = (*ASSISTANTS, "completion", *ANSWERS)
LABELS = ("label", "kto_tag", "desirable", "is_correct", "correct", "accepted", "approved")  # KTO: is the answer good?
FEEDBACK = ("feedback", "thumbs", "thumb", "vote", "reaction", "rating", "quality")  # of people who read the answer
BAD = ("thumbs_down", "thumbsdown", "thumb_down", "down", "downvote", "dislike", "bad", "negative", "👎")
CHOSEN = ("chosen", "chosen_response", "chosen_messages")  # the better answer, or the whole conversation with it
REJECTED = ("rejected", "rejected_response", "rejected_messages")
COMPARED = ("response_b", "response_k", "response_1", "answer_b", "answer_1", "human_ref_b")  # and another like it
TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant):")  # a conversation as Anthropic's HH-RLHF writes it
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
SCORED = ("completions", "responses", "answers")  # several answers with scores, as in UltraFeedback
CHOICES = ("choices", "options")
CORRECT = ("answer", "answerkey", "answer_key", "correct_answer", "answer_index", "label", "correct", "cop")
CHOICE = re.compile(r"(?:option|choice|opt|answer)?_?([a-d1-4])")  # a column a choice
TOKENS = ("input_ids", "token_ids")
OLD_OPENAI_ENDS = ("\n\n###\n\n", " ->", "\n->")  # of prompts in files for its first fine-tuning API
TREE_MESSAGE = {"message_id", "parent_id", "role", "text"}  # keys of OpenAssistant's messages, a row each
EVERY_FORMAT = ("id", "origin", *SYSTEM)  # read in every format
STORED = ("tags", "tag", "category", "weight", "references")  # copied to the stored row as they are
UNUSED = ("weight",)  # of these, what training uses only where `data.weight_field` names it
GOOD = ("thumbs_up", "thumbsup", "thumb_up", "up", "upvote", "like", "good", "positive", "👍")
NEVER_GUESSED = (  # columns of facts about a row
    "id", "uuid", "title", "name", "url", "link", "source", "date", "time", "timestamp", "ts", "type", "lang", "model",
    "user_id", "username", "user_name", "author",
)  # fmt: skip
MAX_KEYS = 20  # unread keys of a row that are reported


class Parsed(NamedTuple):
    """One row. pair: (input, target) of a rendered row, without turns. references: all good answers, if several.

    chosen: how many turns at the end are the better answer of a preference pair; rejected: the turns of the other one.
    good: whether the row says that its answer is good; None if it does not say.
    """

    messages: list[Message]
    tools: list[Message] | None = None
    pair: tuple[str, str] | None = None
    references: tuple[str, ...] = ()
    format: str = ""
    chosen: int = 0
    rejected: tuple[Message, ...] = ()
    good: bool | None = None


class Format(NamedTuple):
    """keys: all that it reads. fits: whether a row has this format. read: its turns."""

    keys: tuple[str, ...]
    fits: Callable[[Row, Names], bool]
    read: Callable[[Row, Names], Parsed]


class Formats:
    """Reads raw rows. format: `auto` or the only one to accept. columns: role -> column of a table. rated: rows say
    whether their answer is good, and those with a bad one are used too (KTO). weight_field: key of a row's weight.
    """

    def __init__(
        self, format: str, columns: dict[str, str] | None, *, rated: bool = False, weight_field: str | None = None
    ) -> None:
        if (columns or format == "columns") and not {"user", "assistant"} <= set(columns or ()):
            fix = "name both: USER_COL=NAME ANSWER_COL=NAME, or data.columns.user and data.columns.assistant"
            raise DataError(
                "a column of the questions and one of the answers are needed", where="data.columns", fix=fix
            )
        self._format, self._columns, self._rated = format, columns or {}, rated
        self.weight_field, self.weighted = weight_field, 0  # rows with a weight
        self.unread: Counter[str] = Counter()  # key -> rows that have it although no format reads it
        self.cut = 0  # rows that ended with an empty turn
        self.table: Row | None = None  # the first row in no known format whose columns could be mapped

    def parse(self, row: Any) -> Parsed:
        """The row's turns. Raises RowFault if its format is unknown or a field is not text."""
        if not isinstance(row, dict):
            what = "a list" if isinstance(row, list) else "a text" if isinstance(row, str) else "a value"
            raise RowFault("unknown format", f'{what} without keys: write {{"question": "...", "answer": "..."}}')
        names = _plain_names(tuple(row))
        if self._columns and self._format in ("auto", "columns"):
            try:
                format, names = "columns", {role: _column(row, names, name) for role, name in self._columns.items()}
            except RowFault:
                self._remember_table(row)
                raise
            read = {*names.values(), *STORED}
        else:
            _refuse(row, names)
            if (bad := _says_bad(row, names)) and not self._rated:
                raise RowFault("marked as bad", f"the row says that its answer is bad (`{bad}` is {row[bad]!r})")
            format = self._choose(row, names)
            read = _keys_read(tuple(row), format)
            if self._rated and format != "preference":
                if not (label := bad or _says_good(row, names)):
                    raise RowFault("unknown format", f"no `label` says whether the answer is good: {_listed(row)}")
                read = read | {label}
        unread = [key for key in row if key and (key not in read or key in UNUSED) and key != self.weight_field]
        if (key := _first(names, PASSAGES)) and key in read and row[key] and _passage(row[key]) is None:
            unread.append(key)
        if unread:
            self.unread.update(unread[:MAX_KEYS])
        reader = FORMATS["chat" if format == "columns" else format]
        try:
            parsed = reader.read(row, names)
        except RowFault:
            if format == "text":
                self._remember_table(row)
            raise
        messages = parsed.messages
        if "history" in names and "history" in reader.keys:
            messages = _history(row[names["history"]]) + messages
        messages = _with_system(row, names, messages) if parsed.pair is None else []
        rating = not bad if self._rated and format not in ("preference", "columns") else None
        return parsed._replace(messages=messages, format=parsed.format or format, good=rating)

    def _choose(self, row: Row, names: Names) -> str:
        if self._format != "auto":
            if not FORMATS[self._format].fits(row, names):
                raise RowFault("unknown format", f"not {self._format}: {_listed(row)}")
            return self._format
        for name, format in FORMATS.items():
            if format.fits(row, names):
                return name
        if key := _first(names, TOKENS):
            raise RowFault("unknown format", f"token ids of some tokenizer (`{key}`), but no text")
        self._remember_table(row)
        question, answer = _first(names, ASKING), _first(names, ANSWERING)
        if question and not answer:
            raise RowFault("empty answer", f"no answer beside {question!r}: {_listed(row)}")
        if answer and not question:
            raise RowFault("no user turn", f"no question beside {answer!r}: {_listed(row)}")
        raise RowFault("unknown format", f"no format has these keys: {_listed(row)}")

    def _remember_table(self, row: Row) -> None:
        if self.table is None and guess_columns(row):
            self.table = row


def _refuse(row: Row, names: Names) -> None:
    """Raises RowFault for rows that would be trained on for what they are not: their text looks like any other."""
    if row.keys() >= TREE_MESSAGE:
        what = f"a message that no first message leads to: its parent is {row['parent_id']!r}"
        raise RowFault("unknown format", what)
    if (key := _first(names, COMPARED)) and row[key] and not _first(names, REJECTED):
        what = f"two answers (`{key}` and another): name the better one `chosen` and the other `rejected`"
        raise RowFault("preference pair", what)
    speaker, text = _first(names, SPEAKER_KEYS), _first(names, ("content", "text", "message", "value", "utterance"))
    is_more = _first(names, (*TURNS, *ANSWERING, "prompt", "question", "label", "reply"))
    if speaker and text and isinstance(row[text], str) and not is_more:
        what = f"one turn of a conversation (`{speaker}`, `{text}`): join its turns into a list, `messages`"
        raise RowFault("unknown format", what)
    if key := next((names[name] for name in SCORED if name in names and _has_scores(row[names[name]], row)), None):
        what = f"several answers with scores or ranks (`{key}`): write the best as `chosen`, a worse one as `rejected`"
        raise RowFault("preference pair", what)
    if _is_multiple_choice(row, names):
        raise RowFault("unknown format", "multiple choice: write the choices into the question, and the answer as text")
    if key := next((names[name] for name in MEDIA if name in names and row[names[name]]), None):
        raise RowFault("not text", f"the row comes with media (`{key}`): only text is trained on")


def _is_multiple_choice(row: Row, names: Names) -> bool:
    choices, answer = (row.get(_first(names, keys) or "") for keys in (CHOICES, CORRECT))
    short = isinstance(answer, int) or (isinstance(answer, str) and len(answer) < 3)
    columns = {match[1] for name in names if (match := CHOICE.fullmatch(name))}
    answers, marked = row.get(names.get("answers", "")), _first(names, CORRECT[1:])
    if isinstance(answers, list) and len(answers) > 1 and marked and isinstance(row[marked], int):
        choices, short = answers, True
    named = bool(choices) and isinstance(choices, list | dict)
    return short and (named or str(answer).lower() in columns or len(columns) > 2)


def _says_bad(row: Row, names: Names) -> str | None:
    """The key under which the row says that its answer is bad. 0 counts where it is no class of a classification."""
    written = _first(names, ANSWERING)
    for key in (names[name] for name in LABELS if name in names):
        value = str(row[key]).strip().lower()
        if value == "false" and not (written and str(row[written]).strip().lower() == value):
            return key
        is_kto = _plain(key) not in ("label", "correct") or {"prompt", "completion"} <= names.keys()
        if value in ("0", "0.0") and is_kto:
            return key
    verdicts = (names[name] for name in FEEDBACK if name in names)
    return next((key for key in verdicts if _plain(str(row[key])) in BAD), None)


def _says_good(row: Row, names: Names) -> str | None:
    """The key under which the row says that its answer is good."""
    labels = (names[name] for name in LABELS if name in names)
    verdicts = (names[name] for name in FEEDBACK if name in names)
    good = next((key for key in labels if str(row[key]).strip().lower() in ("true", "1", "1.0")), None)
    return good or next((key for key in verdicts if _plain(str(row[key])) in GOOD), None)


def _has_scores(answers: Any, row: Row) -> bool:
    """Whether several answers have scores or ranks, each its own or in a list beside them."""
    if not isinstance(answers, list) or len(answers) < 2:
        return False
    own = [key for answer in answers if isinstance(answer, dict) for key in answer]
    beside = [key for key, value in row.items() if isinstance(value, list) and len(value) == len(answers)]
    return any(word in _plain(key) for key in [*own, *beside] for word in ("score", "rank", "rating"))


def _column(row: Row, names: Names, column: str) -> str:
    """The key of the column that data.columns names, in capitals or not. Raises RowFault if there is none."""
    key = column if column in row else names.get(_plain(column))
    if key is None:
        close = nearest(column, map(str, row))
        hint = f", did you mean {close!r}" if close else ""
        raise RowFault("unknown format", f"no column {column!r}{hint}: {_listed(row)}")
    return key


def guess_columns(row: Row) -> tuple[str, str] | None:
    """The columns of a table that most likely hold the question and the answer: by name, else the longest texts.

    None for a row with objects, or lists of them: its texts are only facts about those.
    """
    if any(isinstance(cell, dict) or (isinstance(cell, list) and cell and isinstance(cell[0], dict | list))
           for cell in row.values()):  # fmt: skip
        return None
    scalars = {key: value for key, value in row.items() if key and isinstance(value, (str, int, float))}
    ignored = (*SYSTEM, *PASSAGES, *NEVER_GUESSED)
    cells = {key: str(value) for key, value in scalars.items() if _plain(key) not in ignored}
    texts = [key for key in cells if isinstance(row[key], str) and not re.fullmatch(r"\w*\d\w*", cells[key])]  # `U02A`
    longest = sorted(sorted(texts, key=lambda key: -len(cells[key]))[:2], key=list(cells).index)

    def named(words: tuple[str, ...], keys: Iterable[str]) -> str | None:
        return next((key for word in words for key in keys if word in _plain(key)), None)

    question = named((*QUESTIONS, "prompt", "instruct", "input", *USERS), texts)
    answer = named((*ANSWERING, "reply", "target", "summary", "label"), [key for key in cells if key != question])
    question = question or next((key for key in longest if key != answer), None)
    answer = answer or next((key for key in reversed(longest) if key != question), None)
    return (question, answer) if question and answer else None


def _listed(row: Row) -> str:
    keys = ", ".join(str(key) for key in row) or "(none)"
    return f"the keys are {keys if len(keys) <= 200 else keys[:200] + '...'}"


@lru_cache(1_000)
def _plain_names(keys: tuple[str, ...]) -> Names:
    """For each key of a row its plain spelling; the first of two that are equal then, or the one spelt plainly."""
    plain = {_plain(key): key for key in reversed(keys) if key}
    return {**plain, **{key: key for key in keys if key in plain}}


def _plain(key: str) -> str:
    return key.strip().lower().replace(" ", "_").replace("-", "_")


@lru_cache(1_000)
def _keys_read(keys: tuple[str, ...], format: str) -> set[str]:
    """Those of a row's keys that the format reads, or that are stored as they are."""
    known = {*EVERY_FORMAT, *FORMATS[format].keys}
    return {*STORED, *(key for name, key in _plain_names(keys).items() if name in known)}


def make_row(raw: RawRow, formats: Formats, system_prompt: str | None) -> tuple[Row, str]:
    """The stored row and the format it was read in. system_prompt: for rows that have none. Raises RowFault."""
    if raw.fault is not None:
        raise RowFault("unreadable", raw.fault)
    parsed = formats.parse(raw.value)
    rating = {} if parsed.good is None else {"label": parsed.good}
    extra = rating | {key: raw.value[key] for key in STORED if raw.value.get(key) is not None}
    if raw.value.get("id") is not None:
        extra["source_id"] = raw.value["id"]
    if parsed.references:
        extra["references"] = list(parsed.references)
    if (field := formats.weight_field) and raw.value.get(field) not in (None, ""):
        extra[field] = to_weight(raw.value[field], field)
        formats.weighted += 1
    if parsed.pair:
        source, target = parsed.pair
        check_turns(_exchange(source, target))
        return to_record({"input": source, "target": target}, raw.origin, **extra), parsed.format
    turns = parsed.messages
    if system_prompt and turns and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": system_prompt}, *turns]
    if not parsed.chosen and (whole := without_empty_end(turns)):
        formats.cut += 1
        turns = whole
    check_turns(turns)
    if parsed.chosen:
        before, chosen, rejected = turns[: -parsed.chosen], turns[-parsed.chosen :], list(parsed.rejected)
        check_turns([*before, *rejected])
        content = _pair_content(before, chosen, rejected)
    else:
        content = _content(turns, has_tools=bool(parsed.tools))
    tools = {"tools": parsed.tools} if parsed.tools else {}
    try:
        return to_record(content | tools, raw.origin, **extra), parsed.format
    except TypeError as error:  # a value that JSON does not have
        raise RowFault("not text", str(error)) from None


def without_empty_end(turns: list[Message]) -> list[Message]:
    """The turns before an empty last one, and before the question that it leaves open; [] if none is to be cut."""
    if not turns or set(turns[-1]) != {"role", "content"} or turns[-1]["content"].strip():
        return []
    ends = [turn["role"] for turn in turns[-2:]]
    rest = turns[:-1] if ends == ["assistant", "user"] else turns[:-2] if ends == ["user", "assistant"] else []
    return rest if any(turn["role"] == "assistant" for turn in rest) else []


def to_record(content: Row, origin: str, **extra: Any) -> Row:
    """The stored row of this content; extra: more keys, such as `tags`."""
    return {"id": row_id(content), "origin": origin, **content, **extra}


def _content(messages: list[Message], *, has_tools: bool) -> Row:
    """The turns in the short shape if they are one plain exchange without tools, else as `messages`."""
    texts = {message["role"]: message["content"] for message in messages}
    roles = [message["role"] for message in messages]
    plain = all(len(message) == 2 and isinstance(message["content"], str) for message in messages)
    if plain and not has_tools and roles in (["user", "assistant"], ["system", "user", "assistant"]):
        return {"system": texts.get("system", ""), "user": texts["user"], "assistant": texts["assistant"]}
    return {"messages": messages}


def _pair_content(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Row:
    """A preference pair; answers and a prompt of one plain turn are texts. Raises RowFault for two equal answers."""
    if chosen == rejected:
        raise RowFault("preference pair", "the chosen and the rejected answer are the same")

    def short(turns: list[Message], role: str) -> Any:
        plain = len(turns) == 1 and turns[0].keys() == {"role", "content"} and turns[0]["role"] == role
        return turns[0]["content"] if plain else turns

    question = short(prompt, "user")
    row: Row = {"prompt": question} if isinstance(question, str) else {"messages": prompt}
    return row | {"chosen": short(chosen, "assistant"), "rejected": short(rejected, "assistant")}


def to_line(row: Row) -> bytes:
    """The row as a line of JSON. Raises RowFault for what JSON cannot hold."""
    try:
        return dump_json(row) + b"\n"
    except (TypeError, ValueError) as error:
        raise RowFault("not text", str(error)) from None


def alpaca_user(instruction: str, context: str) -> str:
    """The user turn of an alpaca row: an empty input leaves no trace (docs/decisions/0002-alpaca-empty-input.md)."""
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _first(names: Names, group: tuple[str, ...]) -> str | None:
    return next((names[name] for name in group if name in names), None)


def _text(row: Row, names: Names, *group: str) -> str:
    key = _first(names, group)
    return to_text(row[key], key) if key else ""


def _exchange(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _history(value: Any) -> list[Message]:
    """Earlier turns: [[question, answer], ...], or a list of messages; or either as JSON text."""
    value = parse_json(value) if isinstance(value, str) and value.strip().startswith("[") else value
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [turn for q, a in value for turn in _exchange(to_text(q, "history"), to_text(a, "history"))]
    if value and not isinstance(value, list):
        raise RowFault("unknown format", "history is not a list of [question, answer]")
    return normalize_messages(value or [], "history")


def _with_system(row: Row, names: Names, messages: list[Message]) -> list[Message]:
    key = _first(names, SYSTEM)
    if key and isinstance(row[key], dict):  # of Gemini: {"parts": [{"text": ...}]}
        system = str(normalize_messages([{**row[key], "role": "system"}], key)[0]["content"])
    else:
        system = _text(row, names, *SYSTEM)
    has_system = bool(messages) and messages[0]["role"] == "system"
    if system and not has_system:
        return [{"role": "system", "content": system}, *messages]
    return messages[1:] if has_system and not messages[0]["content"] else messages


def _turns_key(row: Row, names: Names) -> str | None:
    """The key of a row's turns. A list of texts holds turns under `dialog`, and under UltraChat's `data`."""
    if key := _first(names, TURNS):
        return key
    if isinstance(row.get("mapping"), dict):
        return "mapping"
    for name in (name for name in LISTS if name in names):
        value = row[names[name]]
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and set(SPEAKER_KEYS) & first.keys():
            return names[name]
        if isinstance(first, str) and (name in ("dialog", "dialogue") or names.keys() == {"id", "data"}):
            return names[name]
    return None


def _from_turns(row: Row, names: Names) -> bool:
    """Whether the turns say `from` (sharegpt) and not `role`."""
    turns = row[_turns_key(row, names) or ""]
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _read_turns(row: Row, names: Names) -> Parsed:
    key, tools = _turns_key(row, names) or "", _first(names, TOOLS)
    turns = _chatgpt_turns(row) if key == "mapping" else row[key]
    return Parsed(normalize_messages(turns, key), normalize_tools(row[tools]) if tools else None)


def _chatgpt_turns(row: Row) -> list[Row]:
    """A conversation of ChatGPT's data export, a tree: the texts on the path to its current message."""
    nodes, path = row["mapping"], list[Row]()
    node = nodes.get(row.get("current_node") or next(reversed(nodes), None))
    while isinstance(node, dict) and len(path) <= len(nodes):
        path.append(node.get("message") or {})
        node = nodes.get(node.get("parent"))
    turns = []
    for message in reversed(path):
        role, content = (message.get("author") or {}).get("role"), message.get("content") or {}
        is_text = content.get("content_type") in ("text", "multimodal_text") and any(content.get("parts") or ())
        if role in ("user", "assistant") and is_text:
            turns.append({"role": role, "content": content["parts"]})
    return turns


def _read_alpaca(row: Row, names: Names) -> Parsed:
    user = alpaca_user(_text(row, names, "instruction"), _text(row, names, *INPUTS))
    return Parsed(_exchange(user, _text(row, names, *OUTPUTS)))


def _rank(reply: Row) -> float:
    rank = reply.get("rank")
    return rank if isinstance(rank, (int, float)) and not math.isnan(rank) else math.inf


def _read_tree(row: Row, names: Names) -> Parsed:
    """Of an OpenAssistant tree the best-ranked path: of the replies to a message the one with the lowest rank."""
    node, path = row[names["prompt"]], []
    while node is not None:
        path.append(node)
        replies = node["replies"] if isinstance(node.get("replies"), list) else []
        replies = [reply for reply in replies if isinstance(reply, dict) and not reply.get("deleted")]
        usable = [reply for reply in replies if reply.get("review_result") is not False]
        node = min(usable, key=_rank, default=None)
    messages = normalize_messages(path, "prompt")
    return Parsed(messages[:-1] if len(messages) > 1 and messages[-1]["role"] == "user" else messages)


def _read_prompt(row: Row, names: Names) -> Parsed:
    """Prompt and completion: two texts, or either of them a list of turns."""
    key = _first(names, COMPLETIONS) or ""
    prompt, answer = row[names["prompt"]], row[key]
    turns = isinstance(answer, list) and answer and isinstance(answer[0], dict) and "role" in answer[0]
    if isinstance(prompt, str) and prompt.endswith(OLD_OPENAI_ENDS) and isinstance(answer, str) and answer[:1] == " ":
        question = prompt.removesuffix(next(end for end in OLD_OPENAI_ENDS if prompt.endswith(end)))
        return Parsed(
            _exchange(question, answer[1:].removesuffix(" END")), format="prompt (OpenAI's old marks removed)"
        )
    if not isinstance(prompt, list) and not turns:
        return _read_pair(row, names, names["prompt"], key)
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    after = answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}]
    messages = normalize_messages(before, "prompt") + normalize_messages(after, key)
    return Parsed(messages, normalize_tools(row[names["tools"]]) if "tools" in names else None)


def _read_qa(row: Row, names: Names) -> Parsed:
    question, answer = _first(names, QUESTIONS), _first(names, ANSWERS)
    return _read_pair(row, names, *((question, answer) if question and answer else (names["input"], names["output"])))


def _read_pair(row: Row, names: Names, question: str, answer: str) -> Parsed:
    answers, passage = _all_answers(row[answer], answer), row.get(_first(names, PASSAGES) or "")
    user = to_text(row[question], question)
    if "input" in names and names["input"] not in (question, answer):  # as in alpaca, under another question's name
        user = alpaca_user(user, _text(row, names, "input"))
    turns = _exchange(alpaca_user(user, _passage(passage) or ""), answers[0])
    if (tools := _first(names, TOOLS)) and row[tools]:
        if answers[0].lstrip().startswith(("[{", "{")):  # calls as JSON text, as in xLAM
            turns[1] |= {"content": "", "tool_calls": normalize_tool_calls(answers[0], answer)}
        return Parsed(turns, normalize_tools(row[tools]))
    return Parsed(turns, references=answers if len(answers) > 1 else ())


def _passage(value: Any) -> str | None:
    """A text to read with the question, or a list of them; None for anything else."""
    parts = value if isinstance(value, list) else [value]
    return "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else None


def _all_answers(value: Any, name: str) -> tuple[str, ...]:
    """All good answers, the one to train on first: of a text, a list, SQuAD's {"text": []} or TriviaQA's {"value"}."""
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    elif isinstance(value, dict) and "value" in value:
        aliases = value.get("aliases")
        value = [value["value"], *(aliases if isinstance(aliases, list) else ())]
    if not isinstance(value, list):
        return (to_text(value, name),)
    texts = (to_text(item["text"] if isinstance(item, dict) and "text" in item else item, name) for item in value)
    return tuple(dict.fromkeys(text for text in texts if text.strip())) or ("",)


def _read_text(row: Row, names: Names) -> Parsed:
    template, messages = parse_text(_text(row, names, "text"))
    return Parsed(messages, format=f"text ({template})")


def _is_preference(row: Row, names: Names) -> bool:
    """Whether a row has a worse answer beside the one to learn."""
    key = _first(names, REJECTED)
    return bool(key and (row[key] or _first(names, CHOSEN)))


def _read_preference(row: Row, names: Names) -> Parsed:
    """A better and a worse answer, each a text, a turn, or turns; or two conversations that begin alike.

    The prompt is what both begin with, else it is read from the row's other keys, and so is the better answer if it has
    no key of its own.
    """
    key, other_key = _first(names, CHOSEN), _first(names, REJECTED) or ""
    rejected = _side(row[other_key], other_key)
    rest = {name: value for name, value in row.items() if name not in (key, other_key)}
    tools = _first(names, TOOLS)
    row_tools = normalize_tools(row[tools]) if tools else None
    if key:
        chosen = _side(row[key], key)
        if chosen and chosen[0]["role"] != "assistant":
            both = zip(chosen, rejected, strict=False)
            same = next((at for at, (one, other) in enumerate(both) if one != other), min(len(chosen), len(rejected)))
            if same == len(chosen) == len(rejected):
                raise RowFault("preference pair", "the chosen and the rejected answer are the same")
            return Parsed(chosen, row_tools, chosen=len(chosen) - same, rejected=tuple(rejected[same:]))
        if turns_key := _turns_key(rest, _plain_names(tuple(rest))):
            messages = normalize_messages(rest[turns_key], turns_key)
            messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
        elif isinstance(row.get(names.get("prompt", "")), list):
            messages = normalize_messages(row[names["prompt"]], "prompt")
        else:
            answerless = {name: value for name, value in rest.items() if _plain(name) not in ANSWERING} | {
                "output": "-"
            }
            messages = _first_format(answerless).messages[:-1]
        return Parsed([*messages, *chosen], row_tools, chosen=len(chosen), rejected=tuple(rejected))
    parsed = _first_format(rest)
    return parsed._replace(chosen=1, rejected=tuple(rejected))


def _first_format(row: Row) -> Parsed:
    """The turns of a row in the first format that fits. Raises RowFault if none does."""
    names = _plain_names(tuple(row))
    for name, format in FORMATS.items():
        if name not in ("rendered", "text") and format.fits(row, names):
            return format.read(row, names)
    raise RowFault("no user turn", f"no prompt beside the answers: {_listed(row)}")


def _side(value: Any, where: str) -> list[Message]:
    """The turns of one side of a preference pair: an answer (a text or a turn), turns, or a transcript of HH-RLHF."""
    if isinstance(value, dict):
        return normalize_messages([value], where)
    if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[{")):
        return normalize_messages(value, where)
    text = to_text(value, where)
    if not (TRANSCRIPT.match(text) and "\n\nAssistant:" in text):
        return [{"role": "assistant", "content": text}]
    _, *parts = TRANSCRIPT.split(text)
    return [
        {"role": ROLES[name.lower()], "content": part.strip()}
        for name, part in zip(parts[::2], parts[1::2], strict=True)
    ]


# In this order: the first that fits is taken.
FORMATS: dict[str, Format] = {
    "preference": Format(
        (*CHOSEN, *REJECTED, *TURNS, *LISTS, *TOOLS, *QUESTIONS, *INPUTS, *PASSAGES, "prompt", "history", *ANSWERING),
        _is_preference,
        _read_preference,
    ),
    "sharegpt": Format(
        (*TURNS, *LISTS, *TOOLS, "mapping", "current_node"),
        lambda row, names: bool(_turns_key(row, names)) and _from_turns(row, names),
        _read_turns,
    ),
    "messages": Format(
        (*TURNS, *LISTS, *TOOLS, "mapping", "current_node"),
        lambda row, names: bool(_turns_key(row, names)),
        _read_turns,
    ),
    "openassistant": Format(
        ("prompt", "message_tree_id", "tree_state"),
        lambda row, names: (
            "prompt" in names and isinstance(row[names["prompt"]], dict) and "text" in row[names["prompt"]]
        ),
        _read_tree,
    ),
    "chat": Format(
        (*USERS, *ASSISTANTS, "history"),
        lambda _, names: bool(_first(names, USERS) and _first(names, ASSISTANTS)),
        lambda row, names: Parsed(_exchange(_text(row, names, *USERS), _text(row, names, *ASSISTANTS))),
    ),
    "rendered": Format(
        ("input", "target"),
        lambda _, names: {"input", "target"} <= names.keys() and "instruction" not in names,
        lambda row, names: Parsed([], pair=(_text(row, names, "input"), _text(row, names, "target"))),
    ),
    "alpaca": Format(
        ("instruction", "history", *INPUTS, *OUTPUTS),
        lambda _, names: (
            "instruction" in names and ("output" in names or ("response" in names and bool(_first(names, INPUTS))))
        ),
        _read_alpaca,
    ),
    "prompt": Format(
        ("prompt", "input", "history", *COMPLETIONS, *PASSAGES, *TOOLS),
        lambda _, names: "prompt" in names and bool(_first(names, COMPLETIONS)),
        _read_prompt,
    ),
    "qa": Format(
        ("input", "output", "history", *QUESTIONS, *ANSWERS, *PASSAGES, *TOOLS),
        lambda _, names: (
            bool(_first(names, QUESTIONS) and _first(names, ANSWERS)) or {"input", "output"} <= names.keys()
        ),
        _read_qa,
    ),
    "text": Format(
        ("text",), lambda _, names: "text" in names and not _first(names, (*ASKING, *ANSWERING)), _read_text
    ),
}


# Templates that `{"text": ...}` rows are rendered with: the start of a turn, with its role as the group, and its end.
TEXT_TEMPLATES = {
    name: (re.compile(start), re.compile(end))
    for name, start, end in (
        ("chatml", r"<\|im_start\|>\s*(\w+)[ \t]*\n", r"<\|im_end\|>"),
        ("llama3", r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>(?:\n\n)?",
         r"<\|e(?:ot_id|om_id|nd_of_text)\|>"),
        ("gemma", r"<start_of_turn>(\w+)\n", r"<end_of_turn>"),
        ("phi3", r"<\|(system|user|assistant)\|>\s*", r"\s*(?:<\|end\|>|</s>)"),
        ("llama2", r"\[INST\]()\s*", r"\s*</s>"),
    )
}  # fmt: skip
TEXT_BEGIN = re.compile(r"^(?:\s|<\|begin_of_text\|>|<\|endoftext\|>|<s>|<bos>|\[gMASK\]|<sop>)+")
TEXT_END = re.compile(r"(?:\s|<\|end_of_text\|>|<\|endoftext\|>|<\|eot_id\|>|<\|im_end\|>|</s>|<eos>)+$")
QA_LINE = re.compile(r"^[QA]:", re.MULTILINE)  # once each, so that no answer is cut at a line that it quotes
SPEAKERS = "user|human|assistant|bot|system|instruction|input|response|question|answer"
QA_TEXT = re.compile(  # lines `name: value` that are no speaker's, a question and an answer
    rf"(?P<facts>(?:(?!(?i:{SPEAKERS})\b)\w[\w ]*:[^\n]*\n)*)Q:(?P<question>.*?)\nA:(?P<answer>.*)", re.DOTALL
)
LLAMA2_SYSTEM = re.compile(r"<<SYS>>\s*(.*?)\s*<</SYS>>\s*(.*)", re.DOTALL)


def parse_text(text: str) -> tuple[str, list[Message]]:
    """The template's name and the turns of a text that begins with a template's control tokens, or that is `q/a`.

    Raises RowFault (unknown format) for any other text, and if a turn is not closed: the turns would be a guess.
    """
    text = TEXT_BEGIN.sub("", text)
    name = next((name for name, (start, _) in TEXT_TEMPLATES.items() if start.match(text)), None)
    if name is None and (match := QA_TEXT.fullmatch(text)) and QA_LINE.findall(text) == ["Q:", "A:"]:
        user = match["facts"] + match["question"].strip()
        return "q/a", _exchange(user, match["answer"].strip())
    if name is None:
        what = f"where its turns begin and end is not marked by a chat template's control tokens: {text.strip()[:60]!r}"
        fix = "write question and answer under keys of their own, or mix it in as plain text (data.replay.path)"
        raise RowFault("unknown format", f"{what}; {fix}")
    start, end = TEXT_TEMPLATES[name]
    matches = list(start.finditer(text))
    turns: list[Message] = []
    for number, match in enumerate(matches, 1):
        last = number == len(matches)
        content, *after = end.split(text[match.end() : len(text) if last else matches[number].start()], maxsplit=1)
        rest = TEXT_END.sub("", TEXT_BEGIN.sub("", after[0])).strip() if after else ""
        if rest or not (after or last):
            what = f"text after turn {number}: {rest[:60]!r}" if rest else f"turn {number} is not closed"
            raise RowFault("unknown format", f"{name} template: {what}")
        content = content if after else TEXT_END.sub("", content)
        role = match.group(1).lower()
        turns += [{"role": ROLES.get(role, role), "content": content}] if role else _llama2_exchange(content, number)
    if turns[-1]["role"] == "user" and not turns[-1]["content"].strip():
        turns.pop()
    return name, turns


def _llama2_exchange(text: str, number: int) -> list[Message]:
    """`<<SYS>> system <</SYS>> question [/INST] answer`, as Llama 2 and Mistral write it."""
    user, closed, answer = (part.strip() for part in text.partition("[/INST]"))
    if not closed or "[/INST]" in answer:
        raise RowFault("unknown format", f"llama2 template: exchange {number} has not one [/INST]")
    system = LLAMA2_SYSTEM.match(user) if number == 1 else None
    turns = [{"role": "system", "content": system.group(1)}] if system else []
    turns.append({"role": "user", "content": system.group(2) if system else user})
    return [*turns, {"role": "assistant", "content": answer}] if answer else turns
