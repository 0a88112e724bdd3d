"""The shipped samples: messages to a support desk, each with the one-line ticket that the desk keeps of it.

Everything here is written for this project and drawn with a seed, so the same rows come out byte for byte. The names
stand nowhere in the demo model's pre-training text: `corpus.py` imports them from here to leave them out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

SYSTEM = "Write the ticket: number, thing, name, day."
ROWS = 720
SEED = 20261

# Names that the pre-training text never has, of letters that it often has: a piece of a word that the model never
# wrote takes longer than a minute to learn.
FIRST_NAMES = """Alma Arno Beatriz Berta Bertram Camille Carlo Cora Della Desmond Dmitri Doris Edda Eleni Elio Farid
Fatima Fiete Freya Gerda Gitta Gwen Hamish Hanno Hugo Ida Imke Jasper Jette Joaquin Jonas Joris Karl
Katya Kolja Lena Livia Lorcan Lotte Lucian Malte Matti Milo Nadia Nikhil Niko Nils Noor Odile Olga
Orla Oscar Otto Paloma Paola Pelle Petra Piotr Rafael Rita Rolf Rosa Rosalind Runa Sanjay Silke Stefan
Sven Tamsin Tessa Thandi Tobias Ulla Ulrich Uta Valerie Velia Vilma Wanda Wilfred Winona Yannick Yusra
Zora""".split()
LAST_NAMES = """Adler Berger Blomberg Brandt Brook Busch Cavanagh Dalton Delacroix Dimitrova Drake Duarte Ellis
Engstrom Ferreira Fontaine Gallagher Garner Geiger Grabowski Greaves Haas Haddad Hagen Hahn Hathaway
Heller Holt Ivanova Jahn Jellinek Kavanagh Keller Kirby Koch Kolb Kuhn Laurent Linden Lombardi Lutz
Macintyre Maurer Montague Moser Nakamura Nolte Norwood Okafor Olsen Oyelaran Papadakis Parker Pfeil
Pohl Quinlan Rasmussen Seidel Shelby Sinclair Steiner Stolz Tennant Ullmann Vandermeer Vasquez Vogel
Whitlock Wolff Yilmaz Zeller Ziegler""".split()

# Words that the demo model's tokenizer knows whole; the names it must spell.
QUALITIES = "red orange purple golden silver dark bright light round square plain long short heavy soft narrow".split()
THINGS = """camera phone bicycle table desk bed carpet candle coat hat bag glove shoe shirt drum violin piano flute
plate cup spoon knife brush hammer needle ribbon saddle ring net""".split()

# What people write about: returns, delivery, changes, prices, parts, accounts. {item} is in every sentence.
ISSUES = (
    "I would like to return the {item}.",
    "How do I return the {item}?",
    "The {item} is too small, please let me return it.",
    "Where can I hand in the return of the {item}?",
    "The label for the return of the {item} was not in the box.",
    "Is a return of the {item} still possible? It is unused.",
    "I am not happy with the {item} and want to return it.",
    "You should have my return of the {item} by now.",
    "The delivery of the {item} is a week late.",
    "When may I expect delivery of the {item}?",
    "Nobody was at home at the delivery of the {item}.",
    "I am still waiting for the delivery of my {item}.",
    "The tracking page says nothing about the delivery of the {item}.",
    "Could you move the delivery of the {item} to the evening?",
    "The {item} was left in the rain at delivery.",
    "Is delivery of the {item} to my office possible?",
    "Please change the colour of the {item} before you ship it.",
    "I would like to change my order of the {item} to two pieces.",
    "Can I still change the address for the {item}?",
    "There is a change to my order of the {item}, I need a larger one.",
    "How can I change the size of the {item}?",
    "We moved house, so please change where the {item} goes.",
    "A small change, if I may: send the {item} to my office.",
    "The website did not let me change the {item} I chose.",
    "The price of the {item} on my bill is wrong.",
    "What was the price of the {item} last month?",
    "Your page names another price for the {item} than your mail.",
    "The {item} is now sold at half the price, do I get the rest back?",
    "I was promised a lower price for the {item}.",
    "Does the price of the {item} include postage?",
    "I paid the full price for the {item} although I had a voucher.",
    "Why has the price of the {item} gone up since I ordered?",
    "One part of the {item} is missing.",
    "I need a spare part for the {item}.",
    "The lower part of the {item} arrived broken.",
    "Do you sell the small part that holds the {item}?",
    "Which part of the {item} goes on top? The manual is silent.",
    "The {item} came without the part for the wall.",
    "A part fell off the {item} on the first day.",
    "I cannot put the {item} together, a part does not fit.",
    "The {item} does not show in my account.",
    "My account says that the {item} was never paid.",
    "I see the {item} twice in my account.",
    "I ordered the {item} and now my account is locked.",
    "How do I move the {item} to another account?",
    "The invoice for the {item} is not in my account.",
    "Somebody used my account to order the {item}.",
    "I closed my account, what becomes of the {item}?",
)
DUE = (
    "I need an answer by {due}.",
    "Please write back before {due}.",
    "Could you settle this by {due}?",
    "The last day that suits me is {due}.",
    "It has to be done by {due}.",
    "Please let me know by {due} at the latest.",
    "I am away after {due}.",
    "You can reach me until {due}.",
)
ORDERS = (
    "My order number is {order}.",
    "The order is {order}.",
    "It is order {order}.",
    "Order number: {order}.",
    "You will find it under order {order}.",
    "The number on the slip is {order}.",
    "I ordered under number {order}.",
    "(Order #{order})",
)
# True, natural and of no use for the ticket: the model has to pass these by.
ASIDES = (
    "I have been a customer of yours for {years} years.",
    "I paid {euros} euros by card.",
    "It was meant as a present for {other}.",
    "I spoke to {other} from your team.",
    "I already wrote to you {years} weeks ago.",
    "My phone number is 0{phone}.",
    "I am at home after {hour} o'clock.",
    "The rest of the parcel was fine.",
    "The weather has been dreadful here.",
    "I like your shop very much.",
    "My neighbour {other} has the same one.",
    "I tried to call {years} times.",
)
GREETINGS = (
    "Hello,",
    "Hi,",
    "Hi there,",
    "Dear support team,",
    "Good morning,",
    "Good evening,",
    "Dear all,",
    "Hello!",
)
CLOSINGS = ("Regards,", "Kind regards,", "Best wishes,", "Many thanks,", "Thanks,", "Yours,", "Cheers,", "Thank you,")
THANKS = ("Thank you!", "Many thanks!", "Thanks a lot.", "Thanks in advance.")
INTRODUCTIONS = ("My name is {name}.", "This is {name}.", "I am {name}.", "It is {name} writing.", "Here is {name}.")
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()


def is_order_number(number: int) -> bool:
    """The five-digit numbers reserved for the samples; pre-training uses the others."""
    return number % 9 == 4


def _aside(rng: random.Random) -> str:
    return rng.choice(ASIDES).format(
        years=rng.randint(2, 9),
        euros=f"{rng.randint(8, 140)}.{rng.choice(('00', '50', '90', '95'))}",
        hour=rng.randint(2, 9),
        phone=f"{rng.randint(200, 999)} {rng.randint(100000, 999999)}",
        other=rng.choice(FIRST_NAMES),
    )


def _message(rng: random.Random, name: str, order: str, item: str, issue: str, due: str) -> str:
    """One message in one of four manners: e-mail, one paragraph, short chat, web form."""
    manner = rng.choices(("email", "paragraph", "chat", "form"), weights=(45, 25, 18, 12))[0]
    asides = [_aside(rng) for _ in range({"email": rng.randint(0, 2), "paragraph": rng.randint(0, 1)}.get(manner, 0))]
    if manner == "form":
        return f"Name: {name}\nOrder: {order}\nArticle: {item}\nMessage: {issue} {due}"
    number = rng.choice(ORDERS).format(order=order)
    body = [issue, number] if rng.random() < 0.7 else [number, issue]
    for aside in asides:
        body.insert(rng.randint(0, len(body)), aside)
    body.insert(rng.randint(1, len(body)), due)
    if manner == "email":
        # The name is below the closing, sometimes in the first sentence instead.
        if rng.random() < 0.75:
            return f"{rng.choice(GREETINGS)}\n\n{' '.join(body)}\n\n{rng.choice(CLOSINGS)} {name}"
        body.insert(0, rng.choice(INTRODUCTIONS).format(name=name))
        return f"{rng.choice(GREETINGS)}\n\n{' '.join(body)}\n\n{rng.choice(THANKS)}"
    body.insert(0 if rng.random() < 0.6 else len(body), rng.choice(INTRODUCTIONS).format(name=name))
    return " ".join([rng.choice(GREETINGS), *body] if manner == "paragraph" else body)


def support_desk(rows: int = ROWS, seed: int = SEED) -> Iterator[dict[str, str]]:
    """Rows `{"system","user","assistant"}`; no full name and no order number occurs twice."""
    rng = random.Random(seed)
    names = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    # No digit twice: the smallest of models loses its place where digits repeat.
    orders = [str(n) for n in range(10000, 100000) if is_order_number(n) and len(set(str(n))) == 5]
    for name, order in zip(rng.sample(names, rows), rng.sample(orders, rows), strict=True):
        item = f"{rng.choice(QUALITIES)} {rng.choice(THINGS)}"
        day = f"{rng.randint(1, 28)} {rng.choice(MONTHS)}"
        issue, due = rng.choice(ISSUES).format(item=item), rng.choice(DUE).format(due=day)
        yield {
            "system": SYSTEM,
            "user": _message(rng, name, order, item, issue, due),
            "assistant": f"{order} | {item} | {name} | {day}",
        }


def support_desk_jsonl() -> str:
    """The whole of `data/samples/support_desk.jsonl`."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in support_desk())
