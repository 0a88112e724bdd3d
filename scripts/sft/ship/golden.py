"""Conversations whose ids every exported form must get right: systems, several turns, think blocks, tools, odd text."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _talk(name: str, *turns: tuple[str, str], tools: list[Any] | None = None) -> Row:
    row: Row = {"id": f"golden-{name}", "messages": [{"role": role, "content": text} for role, text in turns]}
    return {**row, "tools": tools} if tools else row


ROWS: tuple[Row, ...] = (
    _talk("plain", ("user", "What is the capital of France?"), ("assistant", "Paris.")),
    _talk(
        "system",
        ("system", "You answer in one word."),
        ("user", "What is the capital of France?"),
        ("assistant", "Paris"),
    ),
    _talk(
        "turns",
        ("system", "Be brief."),
        ("user", "Name a colour."),
        ("assistant", "Blue."),
        ("user", "Another one?"),
        ("assistant", "Red, then."),
        ("user", "And a number?"),
        ("assistant", "7"),
    ),
    _talk(
        "think",
        ("user", "17 - 9?"),
        ("assistant", "<think>\n17 minus 9 leaves 8.\n</think>\n\n8"),
        ("user", "And twice that?"),
        ("assistant", "<think>\nTwice 8 is 16.\n</think>\n\n16"),
    ),
    _talk(
        "text",
        ("user", "Ein Käse für Zoë, 東京 и Привет 🙂: 3 × €19.95?\n\n\tdef f(x):\n    return x  # twice  two"),
        ("assistant", '{"a": [1, 2.5e-3], "b": null}\n\n- one\n- two'),
    ),
    _talk("digits", ("user", "Order 1234567, due 2024-07-31, I'm sure it's HE'S."), ("assistant", "0048213")),
    _talk("tools", ("user", "Weather in Oslo?"), ("assistant", "I would have to look."), tools=[_WEATHER]),
)
