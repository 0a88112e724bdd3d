"""trl's chat templates, plain and with generation marks, against an oracle that does not use sentinels.

The oracle uses the author's marks as transformers reads them. For the template without marks it subtracts what the
generation prompt already contains (some authors mark their header too).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import pytest
import trl
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from tests.chat.helpers import answer, make_encoder, make_template, system, user

FOLDER = Path(trl.__file__).parent / "chat_templates"
CONTROL = re.compile(
    r"<\|[^|<>\s]*\|?>|<｜[^｜<>]*｜>|<\w+\|>|</?s>|\[/?[A-Z_]+\]|<(?:start|end)_of_\w+>|<end_of_utterance>|</?think>"
)
TOOL = {"type": "function", "function": {"name": "get", "description": "d", "parameters": {
    "type": "object", "properties": {"a": {"type": "string", "description": "x"}}, "required": ["a"]}}}  # fmt: skip


def called(**arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get", "arguments": arguments}}


RESULT = {"role": "tool", "name": "get", "content": "12"}
TALKS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "one": ([user("Hi there"), answer("Hello. Fine?")], None),
    "many": ([user("Hi"), answer("Hello.\n\nYes"), user("and? "), answer("42 \n"), user("x"), answer("y")], None),
    "system": ([system("Be brief."), user("Hi"), answer("Ok"), user("b"), answer("c")], None),
    "think": (
        [user("Hi"), answer("<think>\nhm\n</think>\n\nA"), user("z"), answer("<think>\nso\n</think>\n\nB")],
        None,
    ),
    "thought": ([user("Hi"), answer("Fine", reasoning_content="hm")], None),
    "reason": (
        [user("Hi"), answer("Fine", reasoning_content="hm"), user("z"), answer("B", reasoning_content="so")],
        None,
    ),
    "tool": ([user("w?"), answer("", tool_calls=[called(a="b")]), RESULT, answer("It is 12"), user("k"), answer("by")],
             [TOOL]),
}  # fmt: skip
PLAIN = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
NO_ORACLE = {"deepseek_r1_distill", "deepseekv3", "glm4moe"}  # the text differs, or the generation prompt does
NEVER_REFUSED = re.compile("llama3|qwen|gemma|mistral|phi")


def tokenizer_for(*sources: str) -> Any:
    """Characters and the control tokens of these templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    controls = sorted({token for source in sources for token in CONTROL.findall(source)} | {"<s>", "</s>"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate([*controls, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in controls if "think" not in token])
    backend.add_tokens([token for token in controls if "think" in token])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


class NoAnswerError(Exception):
    """The generation prompt differs from the training text, so the oracle cannot tell prompt from answer."""


def oracle(
    encoder: Any, source: str, talk: list[dict[str, Any]], tools: list[Any] | None, *, beyond: bool
) -> tuple[str, set[int]]:
    """The text, and the characters that the author marks; with `beyond`, those outside every generation prompt."""
    special = dict(encoder.template.special)
    if encoder.template.parts:
        talk = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in talk]
    texts, spans = render_jinja_template(
        [talk], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **special
    )
    text = texts[0]
    marked = {at for start, end in spans[0] for at in range(start, end)}
    for index, turn in enumerate(talk):
        if turn["role"] != "assistant" or not beyond:
            continue
        prompt = render_jinja_template(
            [talk[:index]], tools=tools, chat_template=source, add_generation_prompt=True, **special
        )[0][0]
        if not text.startswith(prompt):
            raise NoAnswerError
        for start, end in spans[0]:
            if start < len(prompt) <= end:
                marked -= set(range(start, len(prompt)))
    return text, marked


def clean(text: str, at: set[int]) -> set[int]:
    """Without white space, and without an end-of-text token at the very end: these may go either way."""
    tail = len(text[: -len("</s>")]) if text.endswith("</s>") else len(text)
    return {index for index in at if not text[index].isspace() and index < tail}


def loss_characters(encoder: Any, row: Any) -> set[int]:
    line = encoder.tokens.lines([row.text])[0]
    assert line.ids == row.input_ids
    return {
        at
        for start, end, label in zip(line.starts, line.ends, row.labels, strict=True)
        for at in range(start, end)
        if label != -100
    }


@pytest.mark.parametrize("name", [name for name in PLAIN if (FOLDER / f"{name}_training.jinja").exists()])
def test_labels_are_the_authors_marks(name: str) -> None:
    plain, marked = ((FOLDER / f"{name}{end}.jinja").read_text(encoding="utf-8") for end in ("", "_training"))
    tokenizer = tokenizer_for(plain, marked)
    compared = 0
    for source in (plain, marked):
        encoder = make_encoder(make_template(source, tokenizer), tokenizer)
        for talk, tools in TALKS.values():
            row = encoder.encode({"messages": talk, "tools": tools})
            try:
                text, marked_at = oracle(encoder, marked, talk, tools, beyond=source is plain)
            except (NoAnswerError, jinja2.TemplateError, TypeError):
                continue
            if row.dropped or text != row.text:
                continue
            compared += 1
            labelled, expected = clean(text, loss_characters(encoder, row)), clean(text, marked_at)
            calls = {at for match in re.finditer(re.escape("<|tool_response>"), text) for at in range(*match.span())}
            extra = labelled - expected
            assert extra <= calls, (text, sorted(extra))  # ends a turn, though its author leaves it unmarked
            assert labelled >= expected, (text, sorted(expected - labelled))
    assert compared or name in NO_ORACLE


@pytest.mark.parametrize("name", PLAIN)
def test_conversations_without_tools_are_never_refused(name: str) -> None:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_for(source)
    encoder = make_encoder(make_template(source, tokenizer), tokenizer)
    for talk in ("one", "many", "think", "reason"):
        row = encoder.encode({"messages": TALKS[talk][0]})
        assert row.dropped is None, (talk, row.dropped)
        assert any(
            token in encoder.stops.ids for token, label in zip(row.input_ids, row.labels, strict=True) if label >= 0
        )
        if NEVER_REFUSED.search(name) and talk in ("one", "many"):
            prompt = encoder.prompt({"messages": TALKS[talk][0]})
            assert row.input_ids[: len(prompt)] == prompt
