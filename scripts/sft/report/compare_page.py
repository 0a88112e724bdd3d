"""The comparison's page: the verdict in plain words, the numbers behind it, and every answer side by side."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from sft.metrics.scoring import greater_is_better
from sft.report import html
from sft.report.html import Cell, Chart

# rows shown; characters before folding, and for which words are diffed
MAX_ROWS, FOLDED_AFTER, MAX_DIFF = 1_000, 700, 4_000
ARROWS = {True: " ↑", False: " ↓"}  # higher is better, lower is better
FINDINGS = {"same": "equal in every row", "unclear": "no clear difference"}
COLUMNS = ["metric", "base", "tuned", "difference", "95 % interval", "won / tied / lost", "finding"]


def page(result: Mapping[str, Any], answers: Sequence[dict[str, Any]], curves: Mapping[str, Any], yaml: str) -> str:
    """The whole page. result: compare.json. answers: one entry a row. curves: of the run's log. yaml: its settings."""
    compared = result["comparisons"]
    names = [one["name"] for one in compared]
    return html.render(
        "compare.html.j2",
        f"{', '.join(names)} against its base ({result['base']})",
        result=result,
        names=names,
        metric_tables=[
            (f"{one['name']} against the base", *difference_table(one["metrics"], sound=one["sound"]))
            for one in compared
        ],
        general_tables=[_general_table(one["name"], one["general"]) for one in compared if one.get("general")],
        judged=[(one, *difference_table(one["judge"]["aspects"])) for one in compared if one.get("judge")],
        means=[_means(name, sides) for name, sides in result["sides"].items()],
        questions=[_question_row(entry, names) for entry in result["general"]],
        answers={
            "columns": ["row", "question", "reference", "base", *names]
            + [f"{name} is" if len(names) > 1 else "tuned is" for name in names]
            + [f"{result['first_metric']} change{f', {name}' if len(names) > 1 else ''}" for name in names],
            "rows": [_answer_row(entry, compared) for entry in answers[:MAX_ROWS]],
            "choices": [4 + len(names) + index for index in range(len(names))],
        },
        hidden_rows=len(answers) > MAX_ROWS,
        curves=_curve_charts(curves),
        data=result["data"],
        settings={**result["generation"], **result["hardware"], **result["versions"], "measured": result["at"]},
        yaml=yaml,
    )


def _means(name: str, sides: Mapping[str, Mapping[str, float]]) -> Chart:
    """One metric of all sides, each with its interval."""
    rows = [[side, entry["value"], entry["low"], entry["high"]] for side, entry in sides.items()]
    values, intervals = [row[1] for row in rows], [row[2:] for row in rows]
    svg = html.bars(list(sides), values, "", f"{name} of each model with its interval", intervals=intervals)  # type: ignore[arg-type]
    return Chart(svg, name, ["model", "mean", "from", "to"], rows)


def directed(metric: str) -> str:
    """The metric's name with an arrow in its good direction; lengths have none."""
    return metric if metric.startswith("length") else metric + ARROWS[greater_is_better(metric)]


def difference_table(
    metrics: Mapping[str, Mapping[str, Any]], *, sound: bool = True
) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of paired differences. sound: whether `better` may be green."""
    rows: list[list[object]] = []
    for name, entry in metrics.items():
        finding = entry["finding"]
        won: Cell = Cell(f"{entry['wins']} / {entry['ties']} / {entry['losses']}", entry["wins"], "n")
        word = FINDINGS.get(finding, finding)
        if finding == "differs":  # a length: neither direction is better
            word, won = "longer" if entry["difference"] > 0 else "shorter", Cell("", -1, "n")
        rows.append([
            directed(name),
            float(entry["base"]),
            float(entry["tuned"]),
            Cell(f"{entry['difference']:+.4f}", entry["difference"], "n"),
            Cell(f"{entry['low']:+.4f} to {entry['high']:+.4f}", entry["low"], "n"),
            won,
            Cell(word, word, {"better": "good" if sound else "", "worse": "bad"}.get(finding, "")),
        ])  # fmt: skip
    return COLUMNS, rows


def _general_table(name: str, general: Mapping[str, Any]) -> tuple[str, list[str], list[list[object]]]:
    checks = {"checks passed": general["passed"]} if general["passed"] else {}
    caption = f"{name}, {general['rows']} questions"
    return caption, *difference_table({"row_loss": general["row_loss"], **checks})


def _question_row(entry: Mapping[str, Any], names: Sequence[str]) -> list[object]:
    """A general question with the answers of all sides, marked by its check where it has one."""
    row: list[object] = [entry["kind"], _folded(entry["prompt"])]
    for side in ("base", *names):
        answer, passed = entry["answers"][side], entry["passed"][side]
        if passed is None:
            row.append(Cell(_folded(answer), answer, "answer"))
        else:
            mark = Markup('<span class="good">✓ passes</span>' if passed else '<span class="bad">✗ fails</span>')
            row.append(Cell(mark + "\n" + _folded(answer), passed, "answer"))
    return row


def _answer_row(entry: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> list[object]:
    """A held-out row: question, reference, the base's answer and each tuned answer with the changed words marked.

    `better` is green where the answer ended by itself and scores more than the best constant answer does on average.
    """
    names = [one["name"] for one in compared]
    marked = [mark_changes(entry["base"], entry["answers"][name]) for name in names]
    base = marked[0][0] if len(names) == 1 else escape(entry["base"])
    row: list[object] = [
        Cell(str(entry["id"])[:8], str(entry["id"])),
        Cell(_folded(entry["prompt"]), kind="answer question"),
        Cell(_folded(entry["reference"]), kind="answer"),
        Cell(base, kind="answer"),
    ]
    for name, (_, answer) in zip(names, marked, strict=True):
        note = "" if entry["stopped"][name] else Markup(" <small>[did not stop]</small>")
        row.append(Cell(answer + note, kind="answer"))
    changes = [entry["changes"][name] for name in names]
    for name, change, baseline in zip(names, changes, (one.get("constant_baseline") for one in compared), strict=True):
        word, kind = ("equal", "") if abs(change) < 1e-9 else ("better", "good") if change > 0 else ("worse", "bad")
        above = baseline is None or (entry["scores"][name][baseline["metric"]] or 0) > baseline["constant"]
        row.append(Cell(word, word, kind if kind == "bad" or (above and entry["stopped"][name]) else ""))
    return row + [Cell(f"{change:+.3f}", change, "n") for change in changes]


def _folded(text: str) -> Markup:
    """The text, folded behind its beginning if it is long."""
    if len(text) <= FOLDED_AFTER:
        return escape(text)
    return Markup("<details><summary>{} …</summary>{}</details>").format(text[:160], text)


def mark_changes(base: str, tuned: str) -> tuple[Markup, Markup]:
    """Both answers as HTML, the words that the other one lacks marked."""
    if max(len(base), len(tuned)) > MAX_DIFF:
        return escape(base), escape(tuned)
    left, right = (re.findall(r"\S+\s*|\s+", text) for text in (base, tuned))
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in left], [word.strip() for word in right], autojunk=False
    )
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, a, b, c, d in matcher.get_opcodes():
        for out, tag, words in ((marked[0], "del", left[a:b]), (marked[1], "ins", right[c:d])):
            text = escape("".join(words))
            out.append(text if kind == "equal" or not text.strip() else Markup(f"<{tag}>{text}</{tag}>"))
    return Markup("").join(marked[0]), Markup("").join(marked[1])


def _curve_charts(curves: Mapping[str, Any]) -> list[Chart]:
    """Charts of the run's curves: losses together, every validation metric by itself."""
    groups = {"Loss": ["train/loss", "eval/loss"], "Learning rate": ["train/lr"], "Gradient norm": ["train/grad_norm"]}
    shown = {"eval/loss", "eval/seconds", "eval/perplexity"}
    groups |= {name: [name] for name in curves if name.startswith("eval/") and name not in shown}
    charts = []
    for title, names in groups.items():
        if series := {name: curves[name] for name in names if name in curves}:
            rows = [[name, step, float(value)] for name, points in series.items() for step, value in points]
            axis = title.lower() if "/" not in title else title
            svg = html.curves(series, axis, f"{title} over the steps of training")
            charts.append(Chart(svg, title, ["curve", "step", "value"], rows))
    return charts
