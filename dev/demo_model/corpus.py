"""The demo model's pre-training text: short chats that teach copying, reading a turn and stopping, and no more.

Every chat is drawn from a seed. Letters come with questions about their fields; tables, lists and sentences are looked
up, repeated and joined. No name of the shipped samples occurs: their words are skipped when names are invented, their
order numbers when numbers are drawn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from demo_model import words
from demo_model.samples import FIRST_NAMES, LAST_NAMES, MONTHS, WEEKDAYS, is_order_number

Message = dict[str, str]

RESERVED = frozenset(word.lower() for word in FIRST_NAMES + LAST_NAMES)
SEPARATORS = {"commas": ", ", "dashes": " - ", "semicolons": "; ", "slashes": " / ", "new lines": "\n", "bars": " | "}


def invented_word(rng: random.Random) -> str:
    """A word of one to three syllables that nobody has seen before, so that it can only be copied."""
    while True:
        syllables = rng.choices((1, 2, 3), weights=(3, 5, 2))[0]
        word = "".join(rng.choice(words.ONSETS) + rng.choice(words.NUCLEI) for _ in range(syllables))
        word += rng.choice(words.CODAS) if rng.random() < 0.7 else rng.choice(words.ENDINGS)
        if word not in RESERVED:
            return word


def full_name(rng: random.Random) -> str:
    """A given name and a surname, most of them invented."""
    first = rng.choice(words.GIVEN) if rng.random() < 0.35 else invented_word(rng).capitalize()
    return f"{first} {invented_word(rng).capitalize()}"


def number(rng: random.Random) -> str:
    """A number of two to seven digits; the samples' order numbers are left out."""
    while True:
        value = rng.randint(1, 9) * 10 ** (size := rng.choice((1, 2, 3, 4, 4, 4, 5, 6))) + rng.randrange(10**size)
        if not (size == 4 and is_order_number(value)):
            return str(value)


def thing(rng: random.Random) -> str:
    """Two words such as `golden saddle`; one in four is invented."""
    first = invented_word(rng) if rng.random() < 0.25 else rng.choice(words.QUALITIES)
    second = invented_word(rng) if rng.random() < 0.25 else rng.choice(words.NOUNS)
    return f"{first} {second}"


def _place(rng: random.Random) -> str:
    return invented_word(rng).capitalize() + (f" {rng.choice(words.PLACES)}" if rng.random() < 0.3 else "")


def _day(rng: random.Random) -> str:
    return f"{rng.choice(WEEKDAYS)}" if rng.random() < 0.4 else f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"


@dataclass(frozen=True)
class Letter:
    """A letter and the questions about it."""

    text: str
    fields: dict[str, str]


def letter(rng: random.Random) -> Letter:
    """One letter; the name is at its head, in its middle or at its foot."""
    aim = rng.choice(tuple(words.INTENTS))
    fields = {
        "name": full_name(rng),
        "thing": thing(rng),
        "number": number(rng),
        "place": _place(rng),
        "day": _day(rng),
    }
    for spare, keep in (("number", 0.85), ("place", 0.4), ("day", 0.4)):
        if rng.random() > keep:
            del fields[spare]
    body = [rng.choice(words.INTENTS[aim]).format(**fields)]
    body += [rng.choice(words.FIELD_LINES[key]).format(**fields) for key in fields if key in words.FIELD_LINES]
    body += [_noise(rng) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    rng.shuffle(body)
    name_at = rng.random()
    if name_at < 0.15:
        lines = [f"{key.capitalize()}: {value}" for key, value in fields.items() if key != "thing"]
        rng.shuffle(lines)
        text = "\n".join([*lines, f"Text: {rng.choice(words.INTENTS[aim]).format(**fields)}"])
    elif name_at < 0.5:
        body.insert(rng.choice((0, 0, len(body))), rng.choice(words.NAME_LINES).format(**fields))
        text = _framed(rng, body, "")
    else:
        text = _framed(rng, body, fields["name"])
    return Letter(text, {**fields, "aim": aim})


def _noise(rng: random.Random) -> str:
    return rng.choice(words.NOISE).format(
        other=full_name(rng).split()[0], small=rng.randint(2, 99), elsewhere=_place(rng), phone=f"0{number(rng)}"
    )


def _framed(rng: random.Random, body: list[str], foot: str) -> str:
    gap = rng.choice(("\n\n", "\n", " "))
    opening, closing = rng.choice(words.OPENINGS), rng.choice(words.SIGN_OFFS)
    foot = "\n".join(part for part in (closing, foot) if part) if gap != " " else f"{closing} {foot}".strip()
    return gap.join(part for part in (opening, " ".join(body), foot) if part)


def _question(rng: random.Random, field: str) -> str:
    return rng.choice(words.QUESTIONS[field])


def _chat(rng: random.Random, *turns: str) -> list[Message]:
    """Turns of user and assistant by turns; a system message before one in three."""
    roles = ("user", "assistant")
    chat = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]
    system = [{"role": "system", "content": rng.choice(words.SYSTEMS)}] if rng.random() < 0.35 else []
    return system + chat


def _ask_one(rng: random.Random) -> list[Message]:
    read = letter(rng)
    field = rng.choice(tuple(read.fields))
    parts = [read.text, _question(rng, field)]
    if rng.random() < 0.3:
        parts.reverse()
    return _chat(rng, "\n\n".join(parts), read.fields[field])


def _ask_many(rng: random.Random) -> list[Message]:
    read = letter(rng)
    turns = [read.text, words.UNASKED]
    for field in rng.sample(tuple(read.fields), min(len(read.fields), rng.randint(2, 4))):
        turns += [_question(rng, field), read.fields[field]]
    return _chat(rng, *turns)


def _unasked(rng: random.Random) -> list[Message]:
    return _chat(rng, letter(rng).text, words.UNASKED)


def _ask_several(rng: random.Random) -> list[Message]:
    """Several fields in one answer, in the order of the question: the step from a copied word to a copied line."""
    read = letter(rng)
    fields = rng.sample(tuple(read.fields), min(len(read.fields), rng.randint(2, 5)))
    if rng.random() < 0.15:
        task, answer = "as JSON", json.dumps({field: read.fields[field] for field in fields}, ensure_ascii=False)
    else:
        kind = rng.choice(tuple(kind for kind in SEPARATORS if kind != "bars"))
        task, answer = f"with {kind}", SEPARATORS[kind].join(read.fields[field] for field in fields)
    parts = [read.text, f"Give {', '.join(fields)} {task}."]
    if rng.random() < 0.3:
        parts.reverse()
    return _chat(rng, "\n\n".join(parts), answer)


def _any_words(rng: random.Random, least: int, most: int) -> list[str]:
    makers: tuple[Callable[[random.Random], str], ...] = (invented_word, number, full_name, thing)
    plain = [rng.choice(words.WORDS) for _ in range(rng.randint(least, most))]
    return [rng.choice(makers)(rng) if rng.random() < 0.5 else word for word in plain]


def _look_up(rng: random.Random) -> list[Message]:
    keys = list(dict.fromkeys(_any_words(rng, 3, 6)))
    values = [_any_words(rng, 1, 1)[0] for _ in keys]
    mark = rng.choice((": ", " = ", " - ", " is "))
    table = "\n".join(f"{key}{mark}{value}" for key, value in zip(keys, values, strict=True))
    turns = [f"{table}\n\nWhat is {keys[(target := rng.randrange(len(keys)))]}?", values[target]]
    for target in rng.sample(range(len(keys)), rng.randint(0, 2)):
        turns += [f"And {keys[target]}?", values[target]]
    return _chat(rng, *turns)


def _repeat(rng: random.Random) -> list[Message]:
    text = letter(rng).text.split("\n")[-1] if rng.random() < 0.3 else " ".join(_any_words(rng, 2, 8))
    return _chat(rng, rng.choice(("Repeat: ", "Copy this: ", "Say again: ", "Echo\n")) + text, text)


def _list(rng: random.Random) -> list[Message]:
    """Words to be joined with another separator, or one word to be picked out."""
    items = _any_words(rng, 2, 6)
    source, target = rng.sample(tuple(SEPARATORS), 2)
    row = SEPARATORS[source].join(items)
    task = rng.choice(("join", "join", "first", "last", "reverse"))
    task, answer = {
        "join": (f"Write with {target}", SEPARATORS[target].join(items)),
        "first": ("Which comes first", items[0]),
        "last": ("Which comes last", items[-1]),
        "reverse": (f"From last to first with {target}", SEPARATORS[target].join(reversed(items))),
    }[task]
    return _chat(rng, f"{task}: {row}", answer)


def _small_talk(rng: random.Random) -> list[Message]:
    return _chat(rng, *(turn for pair in rng.sample(words.SMALL_TALK, rng.randint(1, 3)) for turn in pair))


TASKS: dict[Callable[[random.Random], list[Message]], int] = {
    _ask_one: 18,
    _ask_many: 16,
    _ask_several: 28,
    _unasked: 6,
    _look_up: 10,
    _repeat: 10,
    _list: 10,
    _small_talk: 2,
}
# The end of training leaves out the tables, which so small a model hardly learns and whose loss drowns the rest.
SETTLING_TASKS = {**TASKS, _ask_several: 48, _look_up: 0}


def chats(seed: int, settling: bool = False) -> Iterator[list[Message]]:
    """Chats without end, the same for the same seed; `settling` draws them in the end's proportions."""
    rng = random.Random(seed)
    weights = SETTLING_TASKS if settling else TASKS
    while True:
        yield rng.choices(tuple(weights), weights=tuple(weights.values()))[0](rng)
