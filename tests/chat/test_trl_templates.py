"""trl's chat templates, plain and with generation marks, against an oracle that does not use our proof.

The oracle takes the author's marks from transformers; for the template without marks it takes away what the generation
prompt already says (some authors mark their header too).
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

from tests.chat.making import answer, encoder, system, template, user

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
NO_ORACLE = {"deepseek_r1_distill", "deepseekv3", "glm4moe"}  # never the same text, or never the text that is asked
NEVER_REFUSED = re.compile("llama3|qwen|gemma|mistral|phi")


def tokenizer_for(*sources: str) -> Any:
    """Characters and the control tokens of these templates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    controls = sorted({found for source in sources for found in CONTROL.findall(source)} | {"<s>", "</s>"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: index for index, token in enumerate([*controls, *letters])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([token for token in controls if "think" not in token])
    made.add_tokens([token for token in controls if "think" in token])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


class NoAnswerError(Exception):
    """The template the generation prompt differs, so the oracle cannot tell what is asked from what is in the loss."""


def oracle(
    made: Any, source: str, talk: list[dict[str, Any]], tools: list[Any] | None, *, beyond: bool
) -> tuple[str, set[int]]:
    """The text, and the characters that the author marks; with `beyond`, those that no generation prompt says."""
    special = dict(made.template.special)
    if made.template.parts:
        talk = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in talk]
    texts, spans = render_jinja_template(
        [talk], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **special
    )
    text = texts[0]
    marked = {at for start, end in spans[0] for at in range(start, end)}
    for index, turn in enumerate(talk):
        if turn["role"] != "assistant" or not beyond:
            continue
        asked = render_jinja_template(
            [talk[:index]], tools=tools, chat_template=source, add_generation_prompt=True, **special
        )[0][0]
        if not text.startswith(asked):
            raise NoAnswerError
        for start, end in spans[0]:
            if start < len(asked) <= end:
                marked -= set(range(start, len(asked)))
    return text, marked


def clean(text: str, at: set[int]) -> set[int]:
    """Without white space, and without an end-of-text token at the very end: these may go either way."""
    tail = len(text[: -len("</s>")]) if text.endswith("</s>") else len(text)
    return {index for index in at if not text[index].isspace() and index < tail}


def loss_characters(made: Any, row: Any) -> set[int]:
    line = made.tokens.lines([row.text])[0]
    assert line.ids == row.input_ids
    return {
        at
        for start, end, label in zip(line.starts, line.ends, row.labels, strict=True)
        for at in range(start, end)
        if label != -100
    }


@pytest.mark.parametrize("name", [name for name in PLAIN if (FOLDER / f"{name}_training.jinja").exists()])
def test_labels_are_what_the_author_marks(name: str) -> None:
    plain, marked = ((FOLDER / f"{name}{end}.jinja").read_text(encoding="utf-8") for end in ("", "_training"))
    tokenizer = tokenizer_for(plain, marked)
    compared = 0
    for source in (plain, marked):
        made = encoder(template(source, tokenizer), tokenizer)
        for talk, tools in TALKS.values():
            row = made.encode({"messages": talk, "tools": tools})
            try:
                text, wanted = oracle(made, marked, talk, tools, beyond=source is plain)
            except (NoAnswerError, jinja2.TemplateError, TypeError):
                continue
            if row.dropped or text != row.text:
                continue
            compared += 1
            got, wanted = clean(text, loss_characters(made, row)), clean(text, wanted)
            calls = {at for found in re.finditer(re.escape("<|tool_response>"), text) for at in range(*found.span())}
            assert got - wanted <= calls, (text, sorted(got - wanted))  # ends a turn, though its author leaves it out
            assert got >= wanted, (text, sorted(wanted - got))
    assert compared or name in NO_ORACLE


@pytest.mark.parametrize("name", PLAIN)
def test_plain_talk_is_never_refused(name: str) -> None:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_for(source)
    made = encoder(template(source, tokenizer), tokenizer)
    for talk in ("one", "many", "think", "reason"):
        row = made.encode({"messages": TALKS[talk][0]})
        assert row.dropped is None, (talk, row.dropped)
        assert any(
            token in made.stops.ids for token, label in zip(row.input_ids, row.labels, strict=True) if label >= 0
        )
        if NEVER_REFUSED.search(name) and talk in ("one", "many"):
            prompt = made.prompt({"messages": TALKS[talk][0]})
            assert row.input_ids[: len(prompt)] == prompt
