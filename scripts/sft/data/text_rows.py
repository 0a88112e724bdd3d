"""`{"text": ...}` rows: a conversation that a template was put around before, read back into its turns.

A template is told by its marks, those of control tokens first, since they are the least likely to be plain words. What
stands before the first turn is the system text, or (over questions and answers) the material that is asked about.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sft.data.conversation import ROLES, Message
from sft.data.faults import UNKNOWN_FORMAT, RowFault

BEGINS = re.compile(r"^(?:\s|<\|begin_of_text\|>|<\|endoftext\|>|<s>|<bos>|\[gMASK\]|<sop>)+")
ENDS = re.compile(r"(?:\s|<\|end_of_text\|>|<\|endoftext\|>|<\|eot_id\|>|<\|im_end\|>|</s>|<eos>)+$")
LLAMA2_SYSTEM = re.compile(r"<<SYS>>\s*(.*?)\s*<</SYS>>\s*(.*)", re.DOTALL)
OPENINGS = ("below is an instruction that describes a task", "a chat between a curious ")  # no system text of its own
MATERIAL = "material"  # what stands before the first turn belongs to the question


class Style(NamedTuple):
    """turn: a pattern whose group is the role's name, at the start of each turn. end: what ends a turn (cut off).

    head: what stands before the first turn: `system`, MATERIAL, or "" where nothing may stand there.
    """

    name: str
    turn: re.Pattern[str]
    end: re.Pattern[str] | None
    head: str


WORDS = {
    "instruction": "user", "input": "input", "response": "assistant", "question": "user", "answer": "assistant",
    "q": "user", "a": "assistant",
}  # fmt: skip
STYLES = tuple(
    Style(name, re.compile(turn), re.compile(end) if end else None, head)
    for name, turn, end, head in (
        ("chatml", r"<\|im_start\|>\s*(\w+)[ \t]*\n", r"<\|im_end\|>", ""),
        ("llama3", r"<\|start_header_id\|>\s*(\w+)\s*<\|end_header_id\|>(?:\n\n)?",
         r"<\|e(?:ot_id|om_id|nd_of_text)\|>", ""),
        ("gemma", r"<start_of_turn>(\w+)\n", r"<end_of_turn>", ""),
        ("phi3", r"<\|(system|user|assistant)\|>[ \t]*\n?", r"<\|end\|>|</s>", ""),
        ("guanaco", r"###\s*(System|Human|Assistant)\s*:[ \t]*", r"</s>", "system"),
        ("alpaca", r"(?:^|\n)###\s*(Instruction|Input|Response|Question|Answer|System|Human|User|Assistant)\s*:[ \t]*",
         r"</s>|<\|endoftext\|>", "system"),
        ("vicuna", r"(?:^|(?<=\s)|(?<=</s>))(SYSTEM|USER|ASSISTANT):[ \t]*", r"</s>", "system"),
        ("plain", r"(?:^|\n|</s>)[ \t]*(System|User|Human|Assistant|Bot|AI)[ \t]*:[ \t]*",
         r"</s>|<\|endoftext\|>", "system"),
        ("question and answer", r"(?:^|\n)[ \t]*(Question|Answer|Q|A)[ \t]*:[ \t]*", None, MATERIAL),
    )
)  # fmt: skip
EXACT = {"chatml", "llama3", "gemma"}  # their turns are written as they are; the others' are set in white space
NAMES = ("llama2", *(style.name for style in STYLES))


def parse(text: str) -> tuple[str, list[Message]]:
    """The template's name and the turns. Raises RowFault (unknown format) for a text that no known template holds."""
    text = BEGINS.sub("", text)
    if "[INST]" in text and (turns := _llama2(text)):
        return "llama2", turns
    for style in STYLES:
        marks = list(style.turn.finditer(text))
        roles = [_role(mark.group(1)) for mark in marks]
        if marks and "assistant" in roles and ("user" in roles or style.name in EXACT):
            return style.name, _turns(style, text, marks)
    shown = text.strip()[:60]
    what = f"a text without a template that is known here ({', '.join(NAMES)}): it begins {shown!r}"
    raise RowFault(UNKNOWN_FORMAT, f"{what}; plain text can be mixed in with data.replay.path")


def _role(name: str) -> str:
    name = name.lower()
    return WORDS.get(name) or ROLES.get(name) or name


def _turns(style: Style, text: str, marks: list[re.Match[str]]) -> list[Message]:
    bounds = [*(mark.start() for mark in marks[1:]), len(text)]
    head = text[: marks[0].start()].strip()
    if head and not style.head:
        raise RowFault(UNKNOWN_FORMAT, f"text before the first turn of the {style.name} template: {head[:60]!r}")
    made: list[Message] = []
    for mark, bound in zip(marks, bounds, strict=True):
        role, content = _role(mark.group(1)), _content(style, text[mark.end() : bound])
        if role == "input" and made and made[-1]["role"] == "user":
            made[-1]["content"] += f"\n\n{content}" if content else ""
        else:
            made.append({"role": "user" if role == "input" else role, "content": content})
    if made[-1]["role"] == "user" and not made[-1]["content"]:
        made.pop()
    if not head or head.lower().startswith(OPENINGS):
        return made
    if style.head == MATERIAL:
        return [{**made[0], "content": f"{head}\n\n{made[0]['content']}"}, *made[1:]]
    return [{"role": "system", "content": head}, *made]


def _content(style: Style, text: str) -> str:
    end = style.end.search(text) if style.end else None
    rest = ENDS.sub("", BEGINS.sub("", text[end.end() :])).strip() if end else ""
    if rest:
        raise RowFault(UNKNOWN_FORMAT, f"text between the turns of the {style.name} template: {rest[:60]!r}")
    said = text[: end.start()] if end else ENDS.sub("", text)
    return said if style.name in EXACT else said.strip()


def _llama2(text: str) -> list[Message]:
    """`<s>[INST] <<SYS>> system <</SYS>> question [/INST] answer </s>`, and as Mistral writes it; [] if not that."""
    made: list[Message] = []
    head, *rounds = text.split("[INST]")
    if head.strip():
        return []
    for number, turn in enumerate(rounds):
        asked, closed, answer = turn.partition("[/INST]")
        if not closed:
            return []
        system = LLAMA2_SYSTEM.match(asked.strip()) if number == 0 else None
        if system:
            made.append({"role": "system", "content": system.group(1)})
            asked = system.group(2)
        made.append({"role": "user", "content": asked.strip()})
        answer = re.sub(r"(?:\s|</s>|<s>)+$", "", answer).strip()
        if answer or number + 1 < len(rounds):
            made.append({"role": "assistant", "content": answer})
    return made
