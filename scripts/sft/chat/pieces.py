"""A conversation that is too long, cut between its turns: `model.over_length: split_turns`.

A piece is the system text and some of the exchanges that follow each other (a question, and all up to the next one), as
many as fit. Every assistant turn is in one piece alone.
"""

from __future__ import annotations

from collections.abc import Callable

from sft.data.conversation import Message


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
