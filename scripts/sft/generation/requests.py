"""Requests that are answered as they arrive, each by a model that it names: what `infer --mode requests` runs.

A request joins the batch of its model at the next token. One base is in memory, its adapters beside each other on it;
a request for another base waits until the answers before it are done. A line in is a JSON object:

    {"id": "1", "model": "my-run", "messages": [...], "tools": [...], "settings": {"max_new_tokens": 64}}
    {"id": "2", "model": "base", "prompt": "Once upon a time"}         a text or token ids, without a template
    {"cancel": "1"}

`model` is a run, `RUN:base` (its base, with the same template and system text), or `base`. Lines out: {"id", "text"}
for every piece, then {"id", "done": {finish, prompt_tokens, completion_tokens, tool_calls}};
or {"id", "error", "status"}.
"""

from __future__ import annotations

import gc
import json
import logging
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sft import runs
from sft.config.schema import GenerationSection
from sft.data import messages as turns
from sft.data.rows import RowFault
from sft.errors import DataError, EnvironmentProblem, ModelError, SftError, one_line
from sft.generation import decode, load
from sft.generation.decode import Decoder, DecodingSequence, choose_tokens, rows_in_memory, seeds
from sft.generation.encoder import load_encoder
from sft.generation.engine import LoadedModel
from sft.generation.stop import IncrementalText, StopCriteria
from sft.model import adapters
from sft.step.step import out_of_memory, release_memory

log = logging.getLogger("sft.generation")
MOST_ROWS = 32  # answers side by side
MOST_ADAPTERS = 8  # in memory
TURN = 4  # tokens
CALLS = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
Send = Callable[[dict[str, Any]], None]


@dataclass(eq=False, kw_only=True)
class Request(DecodingSequence):
    """A request's prompt and its answer so far. settings: those that choose tokens. ends: what ends the answer.

    calls_tools: the answer may be calls of tools; it is sent whole then, without the text of its calls.
    """

    id: Any
    settings: GenerationSection
    ends: StopCriteria
    calls_tools: bool = False
    sent: int = 0  # characters

    def restart(self) -> None:
        super().restart()
        self.text = IncrementalText(self.ends.tokenizer)

    def append(self, token: int, stop: StopCriteria) -> None:
        super().append(token, self.ends)
        if not self.done:
            self.text.add(token)

    def report(self, send: Send) -> None:
        """Sends the text that is certain by now, and at the end how it ended."""
        if not self.done:
            if not self.calls_tools:
                self._send(send, self.text.text[: len(self.text.text) - self.ends.held_back(self.text.text)])
            return
        answer = self.ends.answer(self.tokens)
        text, calls = tool_calls(answer.text) if self.calls_tools else (answer.text, [])
        self._send(send, text)
        finish = "tool_calls" if calls else "stop" if answer.stopped or answer.looped else "length"
        usage = {"prompt_tokens": len(self.prompt), "completion_tokens": answer.tokens}
        send({"id": self.id, "done": {"finish": finish, **usage, "tool_calls": calls}})

    def _send(self, send: Send, certain: str) -> None:
        if len(certain) > self.sent:
            send({"id": self.id, "text": certain[self.sent :]})
            self.sent = len(certain)


def tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """An answer's text without its calls, and the calls: in <tool_call> tags, or the whole text is their JSON."""
    tagged = CALLS.findall(text)
    written = tagged or ([text] if text.lstrip()[:1] in ("{", "[") else [])
    try:
        calls = [call for each in written for call in turns.normalize_tool_calls(each, "the answer")]
    except RowFault:
        return text, []  # not a call: the client sees what the model wrote
    return (CALLS.sub("", text).strip() if tagged else "") if calls else text, calls


class RunningBatch(Decoder):
    """A decoder that takes in new requests between two tokens; each has settings and ends of its own."""

    def __init__(self, loaded: LoadedModel) -> None:
        ends = StopCriteria(loaded.tokenizer, loaded.encoder.stops)
        super().__init__(loaded.model, [], GenerationSection(), ends, rows=0, device=torch.device(loaded.device))
        self.requests: list[Request] = []  # that wait or are being answered
        self.most_rows = MOST_ROWS

    def add(self, request: Request) -> None:
        self.requests.append(request)
        self.waiting.append(request)

    def advance(self) -> list[Request]:
        """The next token of waiting requests that have space, else of all others; returns those that got one.

        When memory runs out, all begin again (with the same draws), half as many side by side. Raises what the model
        raises, EnvironmentProblem when not even one answer fits into memory.
        """
        before = self.requests
        try:
            new = self._make_space()
            self._append(*(self._admit(new) if new else self._step()))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self.most_rows = min(self.cache.rows, len(before)) // 2
            if not self.most_rows:
                fix = "a smaller max_tokens, a shorter prompt, or a smaller model"
                raise EnvironmentProblem("there is not enough memory for a single answer", fix=fix) from None
            log.warning("out of memory: continuing with %d answers in a batch", self.most_rows)
            self.clear()
            for request in before:
                request.restart()
                self.add(request)
            release_memory()
            return []
        self.requests = [request for request in before if not request.done]
        return [request for request in before if request.done or request in self.active]

    def cancel(self, id_: Any) -> None:
        """Ends a request without a word."""
        for request in self.requests:
            request.done = request.done or request.id == id_
        self.requests = [request for request in self.requests if not request.done]
        self.waiting = deque(request for request in self.waiting if not request.done)
        self._remove_done()

    def clear(self) -> None:
        """Forgets all requests and frees the cache."""
        self.requests, self.active = [], []
        self.waiting.clear()
        self.cache = decode.KVCache(len(self.cache.layers), 0, 0)
        self.starts = self.starts[:0]

    def _make_space(self) -> int:
        """How many waiting requests can join now; the cache has rows and columns for them, the longest comes first."""
        cache, new, columns = self.cache, list[DecodingSequence](), self.cache.columns
        for request in self.waiting:
            rows = len(self.active) + len(new) + 1
            wide = max(columns, len(request.prompt) + request.max_tokens + decode.SPARE_COLUMNS)
            grows = rows > cache.rows or wide > cache.columns
            if rows > self.most_rows or (grows and rows > 1 and rows > rows_in_memory(self.base, wide, self.device)):
                break
            new.append(request)
            columns = wide
        if not new:
            return 0
        if len(self.active) + len(new) > cache.rows or columns > cache.columns:
            self._grow(max(len(self.active) + len(new), cache.rows), columns)
        for _ in new:
            self.waiting.popleft()
        new.sort(key=lambda request: len(request.prompt))
        self.waiting.extendleft(new)
        longest = len(new[-1].prompt)
        if self.active and longest > cache.at:
            self._shift(cache.at - longest)
        return len(new)

    def _grow(self, rows: int, columns: int) -> None:
        self.cache.grow(rows, columns)
        self.columns = torch.arange(columns, device=self.device)
        starts, self.starts = self.starts, torch.zeros(rows, 1, dtype=torch.long, device=self.device)
        self.starts[: len(starts)] = starts

    def _choose(self, advanced: Sequence[DecodingSequence], logits: Tensor) -> list[int]:
        tokens, requests = [0] * len(advanced), [one for one in advanced if isinstance(one, Request)]
        left = list(range(len(requests)))
        while left:  # rows of the same settings together
            settings = requests[left[0]].settings
            same = [row for row in left if requests[row].settings == settings]
            left = [row for row in left if row not in same]
            chosen = choose_tokens(logits[same], [requests[row] for row in same], settings, self.stop.ids)
            for row, token in zip(same, chosen, strict=True):
                tokens[row] = token
        return tokens


@dataclass(frozen=True)
class Source:
    """What a model's name means: settings, and an adapter or merged weights (neither: the base alone).

    base: a text that is equal for equal bases. version: when the adapter was written.
    """

    target: load.Target
    adapter: Path | None
    merged: Path | None
    base: str
    version: int


@dataclass(eq=False)
class Served:
    """A model in memory with its running answers. adapter: its name on the base, None for the base alone."""

    source: Source
    loaded: LoadedModel
    adapter: str | None
    system: str | None

    def __post_init__(self) -> None:
        self.batch = RunningBatch(self.loaded)

    def request(self, entry: dict[str, Any]) -> Request:
        """The request of a line, ready to be answered. Raises DataError, RowFault, TemplateError, ValidationError."""
        defaults = self.source.target.config.generation
        settings = GenerationSection.model_validate(defaults.model_dump() | (entry.get("settings") or {}))
        loaded, tools = self.loaded, turns.normalize_tools(entry.get("tools"))
        ids = self._prompt(entry, tools)
        most, context = settings.max_new_tokens, loaded.context_length()
        if context is not None:
            if len(ids) >= context:
                what = f"the prompt has {len(ids):,} tokens, and the model reads {context:,}"
                raise DataError(what, fix="shorten the conversation")
            most = min(most, context - len(ids))
        (seed,) = seeds([ids], settings.seed)
        penalised = frozenset[int]() if loaded.kind == "seq2seq" else frozenset(ids)
        ends = StopCriteria(loaded.tokenizer, loaded.encoder.stops, settings.stop, loops=settings.stop_loops)
        return Request(
            0, ids or [loaded.pad_id()], most, seed, penalised, id=entry.get("id"), ends=ends, calls_tools=bool(tools),
            settings=settings.model_copy(update={"seed": 0, "max_new_tokens": 1, "stop": []}),
        )  # fmt: skip

    def _prompt(self, entry: dict[str, Any], tools: list[dict[str, Any]]) -> list[int]:
        prompt = entry.get("prompt")
        if isinstance(prompt, str):
            return list(self.loaded.tokenizer(prompt)["input_ids"])
        if isinstance(prompt, list):
            if not all(isinstance(token, int) and 0 <= token < len(self.loaded.tokenizer) for token in prompt):
                raise DataError(f"token ids are whole numbers from 0 to {len(self.loaded.tokenizer) - 1:,}")
            return prompt
        messages = turns.normalize_messages(entry.get("messages"), "messages")
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise DataError("the last message is not a question", where="messages", fix="end with a user message")
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return self.loaded.encoder.prompt({"messages": messages} | ({"tools": tools} if tools else {}))


class Models:
    """The base in memory and the models served from it. config, sets: as on the command line."""

    def __init__(self, config: Path, sets: Sequence[str], *, is_default: bool, root: Path) -> None:
        self.config, self.sets, self.is_default, self.root = config, sets, is_default, root
        self.base: LoadedModel | None = None  # with all adapters
        self.opened = 0
        self.served: dict[str, Served] = {}
        self.active: Served | None = None

    @property
    def busy(self) -> list[Served]:
        """Those that are answering."""
        return [served for served in self.served.values() if served.batch.requests]

    def open(self, name: str) -> Served | None:
        """The model of that name; None if it cannot be opened while others are answering."""
        source, served = self._source(name), self.served.get(name)
        same_base = self.served and next(iter(self.served.values())).source.base == source.base
        if served and same_base and served.source.version == source.version:
            served.source = source  # the generation settings of today
            return served
        if served and same_base and served.batch.requests:
            return None  # trained again since then
        if self.base is None or not same_base or (source.adapter and self.opened >= MOST_ADAPTERS):
            if self.busy:
                return None
            self.base, self.active, self.opened = None, None, 0
            self.served.clear()
            gc.collect()
            release_memory()
            self.base = load.open_model(source.target.config, merged=source.merged, root=self.root, low_memory="4bit")
        served = self.served[name] = self._serve(name, source, self.base)
        return served

    def _source(self, name: str) -> Source:
        run_name, _, side = name.partition(":")
        chosen: dict[str, Any] = {"base": True}
        if name != "base":
            if side not in ("", "base"):
                raise ModelError(f"there is no model {name}", fix=f"{run_name}, or {run_name}:base")
            run = runs.named(run_name, self.root)
            has_model = run.model_dir.is_dir()
            chosen = {"merged": run.model_dir} if has_model else {"adapters": run.adapter_dir}
        target = load.resolve_model(self.config, self.sets, is_default=self.is_default, root=self.root, **chosen)
        alone = name == "base" or side == "base"
        adapter, merged = (None, None) if alone else (target.adapter, target.merged)
        own = merged or (adapter if adapter and not adapters.shares_base(adapter) else None)
        config = target.config
        weights = [config.model.model_dump(exclude={"max_seq_len", "over_length"}), str(own), own and _written(own)]
        if config.tuning.mode == "qlora" and merged is None:
            weights.append(config.tuning.model_dump(include={"quant_type", "double_quant"}))
        return Source(target, adapter, merged, json.dumps(weights), _written(adapter) if adapter else 0)

    def _serve(self, name: str, source: Source, base: LoadedModel) -> Served:
        """A model on the base in memory, to which its adapter is added."""
        adapter, encoder = None, base.encoder
        if source.adapter:
            self.opened, self.active = self.opened + 1, None
            adapter = f"adapter_{self.opened}"
            base = self.base = replace(base, model=adapters.load(base.model, source.adapter, name=adapter))
        if source.merged is None:
            folder = source.adapter
            saved = folder if folder and (folder / "tokenizer_config.json").is_file() else None
            encoder = load_encoder(source.target.config, self.root, tokenizer=saved)
        loaded = replace(base, encoder=encoder, tokenizer=encoder.tokenizer, name=name)
        return Served(source, loaded, adapter, load.system_text(source.target.config, source.target.folder, self.root))

    def activate(self, served: Served) -> None:
        """Switches the base to the adapter of `served`, or all of its adapters off."""
        model: Any = self.base and self.base.model
        if served is not self.active and hasattr(model, "peft_config") and not adapters.has_prefix(model):
            if served.adapter is None:
                model.base_model.disable_adapter_layers()
            else:
                model.base_model.enable_adapter_layers()
                model.set_adapter(served.adapter, inference_mode=True)
        self.active = served


def _written(folder: Path) -> int:
    """When the weights in a folder were written, in ns."""
    return max((path.stat().st_mtime_ns for path in folder.glob("*.safetensors")), default=0)


def serve(lines: Iterable[str], send: Send, models: Models) -> dict[str, Any]:
    """Answers requests until the lines end and all are answered. Returns how many there were."""
    inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            inbox.put(line)
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    waiting, count, more = deque[dict[str, Any]](), 0, True
    while more or waiting or models.busy:
        try:
            line = inbox.get(block=more and not waiting and not models.busy)
        except queue.Empty:
            while waiting and _admit(waiting[0], models, send):
                waiting.popleft()
            _advance(models, send)
            continue
        more = line is not None
        entry = _entry(line, send) if line and line.strip() else {}
        if "cancel" in entry:
            waiting = deque(each for each in waiting if each.get("id") != entry["cancel"])
            for served in models.busy:
                served.batch.cancel(entry["cancel"])
        elif entry:
            waiting.append(entry)
            count += 1
    return {"requests": count}


def _entry(line: str, send: Send) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(entry := json.loads(line), dict):
            return entry
    _refuse(None, DataError("a line is not a JSON object", where=line[:80].strip()), send)
    return {}


def _admit(entry: dict[str, Any], models: Models, send: Send) -> bool:
    """Puts a request into its model's batch; False if it has to wait until other answers are done."""
    try:
        served = models.open(str(entry.get("model")))
        if served is None:
            return False
        request = served.request(entry)
        if served.loaded.kind == "causal" and decode.supports(served.loaded.model):
            served.batch.add(request)
        else:
            models.activate(served)
            served.loaded.complete(request, request.settings, request.ends)
            request.report(send)
    except Exception as error:
        _refuse(entry.get("id"), error, send)
    return True


def _advance(models: Models, send: Send) -> None:
    """Gives every batch its next token, or TURN where several models answer: a switch takes as long as a token."""
    busy = models.busy
    for served in busy:
        models.activate(served)
        try:
            for _ in range(TURN if len(busy) > 1 else 1):
                for request in served.batch.advance() if served.batch.requests else []:
                    request.report(send)
        except Exception as error:
            for request in served.batch.requests:
                _refuse(request.id, error, send)
            served.batch.clear()


def _refuse(id_: Any, error: Exception, send: Send) -> None:
    """Sends what went wrong, with the status that HTTP has for it."""
    status = 400
    if isinstance(error, EnvironmentProblem):
        status = 503
    elif not isinstance(error, SftError | RowFault | ValidationError):
        log.exception("a request failed", exc_info=error)
        status = 500
    entry = error.entry() if isinstance(error, SftError) else {"error": one_line(error), "where": None, "fix": None}
    send({"id": id_, "error": entry, "status": status})
