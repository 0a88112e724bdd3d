"""The comparison's page: the verdict in plain words, the figures behind it, and every answer side by side."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sft.report import html
from sft.report.html import Cell, Html, Section, code, details, facts, figure, figures, heading, table, text
from sft.report.html import page as whole_page
from sft.report.html import verdict as finding

MOST_ROWS, LONG, LONGEST_DIFF = 1_000, 700, 4_000  # rows shown; characters before folding, and that are still compared
TONES: dict[str, Any] = {"better": "good", "worse": "bad", "mixed": "bad", "forgotten": "bad", "none": "good"}
WORDS = {"same": "equal in every row", "unclear": "no clear difference"}


def page(result: Mapping[str, Any], answers: Sequence[dict[str, Any]], curves: Mapping[str, Any], yaml: str) -> str:
    """The whole file. result: compare.json. answers: a row each. yaml: the run's settings."""
    compared = result["comparisons"]
    parts = [
        Section("", [part for one in compared for part in verdicts(one)]),
        Section("Metrics", metrics(result)),
        Section("General questions", general(result) if any("general" in one for one in compared) else []),
        Section("Judge", [part for one in compared if one.get("judge") for part in judge(one)]),
        Section("Answers", side_by_side(result, answers)),
        Section("Training", training(result, curves)),
        Section("Data", data(result["data"])),
        Section("Settings", settings(result, yaml)),
    ]
    title = f"{', '.join(one['name'] for one in compared)} against its base ({result['base']})"
    return whole_page(title, [part for part in parts if part.parts])


def verdicts(one: Mapping[str, Any]) -> list[Html]:
    """What came of one tuned side."""
    told = one["verdict"]
    made = [finding(told["headline"], told["words"], TONES.get(told["finding"], "even"))]
    if found := one.get("general"):
        made.append(finding(found["headline"], found["words"], TONES.get(found["level"], "even")))
    if found := one.get("parrot"):
        made.append(finding(found["headline"], found["words"], "even" if found["good"] else "bad"))
    stops = one["stopping"]
    return [*made, finding(stops["headline"], "", "even" if stops["good"] else "bad")]


def metrics(result: Mapping[str, Any]) -> list[Html]:
    """A small drawing for each metric, and a table for each tuned side."""
    made = [figures(_means(name, sides) for name, sides in result["sides"].items())]
    for one in result["comparisons"]:
        made.append(table(*differences(one["metrics"]), caption=f"{one['name']} against the base", cards=True))
    made.append(text(
        f"Means over rows; intervals hold 95 % of {result['bootstrap']['draws']:,} bootstrap draws of the rows (seed "
        f"{result['bootstrap']['seed']}). Won, tied, lost: rows in which the tuned answer is better, equal, worse. Of "
        "many metrics one in twenty may seem to differ by chance.", soft=True))  # fmt: skip
    return made


def _means(name: str, sides: Mapping[str, Mapping[str, float]]) -> Html:
    rows = [[side, one["value"], one["low"], one["high"]] for side, one in sides.items()]
    values, spread = [one["value"] for one in sides.values()], [(one["low"], one["high"]) for one in sides.values()]
    svg = html.means(list(sides), values, spread, f"{name} of each side with its interval")
    return figure(svg, name, "", ["side", "mean", "from", "to"], rows)


def differences(found: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[object]]]:
    columns = ["metric", "base", "tuned", "difference", "95 % interval", "won / tied / lost", "finding"]
    rows: list[list[object]] = []
    for name, one in found.items():
        word = WORDS.get(one["finding"], one["finding"])
        kind = {"better": "good", "worse": "bad"}.get(one["finding"], "")
        interval = Cell(f"{one['low']:+.4f} to {one['high']:+.4f}", one["low"], "n")
        shift = Cell(f"{one['difference']:+.4f}", one["difference"], "n")
        won = Cell(f"{one['wins']} / {one['ties']} / {one['losses']}", one["wins"], "n")
        if one["finding"] == "differs":
            word, won = "longer" if one["difference"] > 0 else "shorter", Cell("", -1, "n")
        rows.append([name, float(one["base"]), float(one["tuned"]), shift, interval, won, Cell(word, word, kind)])
    return columns, rows


def general(result: Mapping[str, Any]) -> list[Html]:
    """What was asked beside the task, and how the answers changed."""
    made = []
    for one in result["comparisons"]:
        found = one["general"]
        measured = {"row_loss": found["row_loss"], **({"checks that hold": found["passed"]} if found["passed"] else {})}
        made.append(table(*differences(measured), caption=f"{one['name']}, {found['rows']} questions", cards=True))
    names = [one["name"] for one in result["comparisons"]]
    rows = [
        [one["kind"], _folded(one["prompt"])]
        + [_checked(one["answers"][side], one["passed"][side]) for side in ("base", *names)]
        for one in result["general"]
    ]
    asked = table(["kind", "question", "base", *names], rows, search="Find", choices=[0], cards=True)
    return [*made, details("the questions and answers", asked)]


def _checked(answer: str, passed: float | None) -> Cell:
    if passed is None:
        return Cell(_folded(answer), answer, "answer")
    mark = '<span class="good">✓ passes</span>' if passed else '<span class="bad">✗ fails</span>'
    return Cell(Html(f"{mark}\n{_folded(answer)}"), passed, "answer")


def judge(one: Mapping[str, Any]) -> list[Html]:
    """The marks of the judge model."""
    found = one["judge"]
    if not found["rows"]:
        return [text(f"The judge gave no marks: {found['problem']}")]
    agree = f"both orders favoured the same answer in {found['orders_agree']:.0%} of them."
    words = f"{found['model']} marked {found['rows']:,} rows from 1 to 10, each in both orders; {agree}"
    if found["unjudged"]:
        words += f" {found['unjudged']:,} rows could not be judged ({found['problem']})."
    return [text(words), table(*differences(found["aspects"]), caption=f"{one['name']} against the base", cards=True)]


def side_by_side(result: Mapping[str, Any], answers: Sequence[dict[str, Any]]) -> list[Html]:
    """Every answer, with what differs from the base's marked."""
    names, first = [one["name"] for one in result["comparisons"]], result["first_metric"]
    columns = ["row", "question", "reference", "base", *names]
    columns += [f"{name} is" if len(names) > 1 else "tuned is" for name in names]
    columns += [f"{first} change" if len(names) == 1 else f"{first} change, {name}" for name in names]
    rows = [_answer_row(one, names) for one in answers[:MOST_ROWS]]
    choices = [4 + len(names) + at for at in range(len(names))]
    made = [text(Html(f"Words that the base alone says are <del>marked so</del>, words that it does not say "
                      f"<ins>so</ins>; better and worse by {escape(first)}."), soft=True)]  # fmt: skip
    if len(answers) > MOST_ROWS:
        made.append(text(f"The first {MOST_ROWS:,} of {len(answers):,} rows; all of them are in answers.jsonl."))
    return [*made, table(columns, rows, search="Find rows with", choices=choices, cards=True)]


def _answer_row(one: Mapping[str, Any], names: Sequence[str]) -> list[object]:
    base, tuned = one["base"], [one["answers"][name] for name in names]
    marked = [marks(base, answer) for answer in tuned]
    shown_base = marked[0][0] if len(tuned) == 1 else Html(escape(base))
    changes = [one["changes"][name] for name in names]
    return [
        Cell(str(one["id"])[:8], str(one["id"])),
        Cell(_folded(one["prompt"]), kind="answer asked"),
        Cell(_folded(one["reference"]), kind="answer"),
        Cell(shown_base, kind="answer"),
        *(Cell(Html(mine + ("" if stopped else " <small>[did not stop]</small>")), kind="answer")
          for (_, mine), stopped in zip(marked, (one["stopped"][name] for name in names), strict=True)),
        *(_result(change) for change in changes),
        *(Cell(f"{change:+.3f}", change, "n") for change in changes),
    ]  # fmt: skip


def _result(change: float) -> Cell:
    if abs(change) < 1e-9:
        return Cell("equal", "equal")
    return Cell("better", "better", "good") if change > 0 else Cell("worse", "worse", "bad")


def _folded(words: str) -> Html:
    if len(words) <= LONG:
        return Html(escape(words))
    return details(words[:160] + " …", Html(escape(words)))


def marks(base: str, tuned: str) -> tuple[Html, Html]:
    """Both answers as HTML, the words that the other one has not got marked."""
    if max(len(base), len(tuned)) > LONGEST_DIFF:
        return Html(escape(base)), Html(escape(tuned))
    one, other = (re.findall(r"\S+\s*|\s+", words) for words in (base, tuned))
    keys = [[word.strip() for word in words] for words in (one, other)]
    left, right = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        gone, new = escape("".join(one[a:b])), escape("".join(other[c:d]))
        left.append(gone if kind == "equal" or not gone.strip() else f"<del>{gone}</del>")
        right.append(new if kind == "equal" or not new.strip() else f"<ins>{new}</ins>")
    return Html("".join(left)), Html("".join(right))


def training(result: Mapping[str, Any], curves: Mapping[str, Any]) -> list[Html]:
    """The curves of the run and its summary."""
    groups = {"Loss": ["train/loss", "eval/loss"], "Learning rate": ["train/lr"], "Gradient norm": ["train/grad_norm"]}
    told = {"eval/loss", "eval/seconds", "eval/perplexity"}
    groups |= {name: [name] for name in curves if name.startswith("eval/") and name not in told}
    drawn = []
    for title, names in groups.items():
        if series := {name: curves[name] for name in names if name in curves}:
            rows = [[name, step, float(value)] for name, points in series.items() for step, value in points]
            label = title.lower() if "/" not in title else title
            svg = html.curves(series, label, f"{title} over the steps of training")
            drawn.append(figure(svg, title, "", ["curve", "step", "value"], rows))
    made = [figures(drawn)] if drawn else []
    if done := {name: _plain(value) for name, value in result["training"].items() if value is not None}:
        made.append(facts(done))
    return made


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def data(ledgers: Mapping[str, Any]) -> list[Html]:
    """Where the rows came from and what became of them."""
    made: list[Html] = []
    if found := ledgers.get("processed"):
        made.append(heading("make process"))
        rows = [["rows read", found["rows_read"]], *list(found.get("named", {}).items())]
        rows += [["rows written", found["rows_written"]], *list(found.get("splits", {}).items())]
        made.append(table(["", "rows"], rows, caption=str(found.get("verdict", ""))))
    for split in ("train", "val"):
        if one := ledgers.get("run", {}).get(split):
            told = {name.replace("_", " "): _plain(value) for name, value in one.items() if name != "dropped"}
            made += [heading(f"The run's {split} rows"), facts(told)]
    return made


def settings(result: Mapping[str, Any], yaml: str) -> list[Html]:
    """How the answers were made, on what, and the run's own settings."""
    made = [facts({**result["generation"], **result["hardware"], **result["versions"], "measured": result["at"]})]
    return [*made, *([details("config.resolved.yaml", code(yaml))] if yaml else [])]
