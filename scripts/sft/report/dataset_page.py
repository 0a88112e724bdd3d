"""The data report's page: findings first, then what rows are like, then those that were left out."""

from __future__ import annotations

from typing import Any

from sft.report import figures as drawing
from sft.report.page import Cell, Html, Section, bullets, details, facts, figure, figures, heading, number, table, text
from sft.report.page import code as shown_code
from sft.report.page import page as whole_page
from sft.report.page import verdict as finding

Figures = dict[str, Any]


def page(found: Figures, title: str) -> str:
    """The whole file. found: what `dataset.figures` gave, with `tokens` beside it, or None where no tokenizer was."""
    parts = [Section("", findings(found)), Section("Rows", rows(found))]
    if found["tokens"]:
        parts.append(Section("Lengths in tokens", lengths(found)))
        parts.append(Section("What training would leave out", run(found["tokens"]["run"])))
    parts += [
        Section("Repetition", repetition(found)),
        Section("Quality", quality(found["ledger"])),
        Section("Rows that were left out", left_out(found)),
    ]
    return whole_page(title, [part for part in parts if part.parts])


def findings(found: Figures) -> list[Html]:
    """The verdicts, in plain words."""
    ledger, told = found["ledger"], []
    enough = found["rows"]["train"] >= 500
    told.append(finding("Size", found["verdict"], "good" if enough else "bad"))
    if found["tokens"]:
        told += _token_findings(found["tokens"])
    if balance := ledger.get("balance"):
        told.append(finding("Balance", balance, "bad" if "uneven" in balance else "even"))
    if ledger.get("leaks"):
        told.append(_leaks(ledger["leaks"]))
    if "fault_share" in ledger:
        read, written, named, faults = (ledger[key] for key in ("rows_read", "rows_written", "rows_named", "faults"))
        words = f"{read:,} rows read = {written:,} written + {named:,} named; {faults:,} faulty"
        told.append(finding("Account", words, "even" if ledger.get("accepted", True) else "bad"))
    return [*told, *(text(one) for one in ledger.get("said", []))]


def _leaks(leaks: Figures) -> Html:
    """Rows of val and test that training gives away, by kind; a kind that was not looked for is said to be so."""
    found = {f"{split} ({kind})": count for split, kinds in sorted(leaks.items()) for kind, count in kinds.items()}
    hit = [f"{count:,} of {name}" for name, count in found.items() if count]
    unseen = sorted({kind for kinds in leaks.values() for kind, count in kinds.items() if count is None})
    words = "rows that training gives away: " + (", ".join(hit) or "none")
    if unseen:
        words += f"; not looked for: {', '.join(unseen)} (data.near_duplicates: report)"
    return finding("Leaks", words, "bad" if hit else "even" if unseen else "good")


def _token_findings(tokens: Figures) -> list[Html]:
    run, share = tokens["run"], tokens["labelled"]["share"]
    limit, read = run["max_seq_len"], max(1, run["rows_read"])
    lost, cut = sum(run["reasons"].values()), run["rows_truncated"]
    words = f"at model.max_seq_len {limit:,}: {cut:,} of {read:,} rows are cut, {lost:,} are left out"
    if run["over_length"] == "error" and lost:
        words += "; model.over_length is `error`, so training would stop"
    elif cut or lost:
        longest = tokens["by_role"]["whole row"]["longest"]
        words += f" (model.over_length: {run['over_length']}; the longest row has {longest:,} tokens)"
    bad = (cut + lost) / read > 0.01
    about = f"{share:.0%} of the tokens are learnt; the rest is read only"
    learnt = finding("Labels", about, "bad" if share < 0.02 else "even")
    return [finding("Length", words, "bad" if bad else "good"), learnt]


def rows(found: Figures) -> list[Html]:
    """Where rows came from and where they went."""
    ledger = found["ledger"]
    parts = [table(["split", "rows", "file"], [[k, n, found["files"].get(k, "")] for k, n in found["rows"].items()])]
    if not ledger:
        return [*parts, text("These rows have no ledger: they were named in the config, not made by `make process`.")]
    if named := ledger.get("named"):
        svg = drawing.bars(list(named), list(named.values()), "rows", "rows left out, by reason")
        parts.append(figures([figure(svg, "Rows left out", "by reason", ["reason", "rows"], list(named.items()))]))
    sources = [[one["name"], one["rows"], one["taken"], f"{one['weight']:g}"] for one in ledger.get("sources", [])]
    parts.append(table(["source", "rows", "taken", "weight"], sources, caption="Sources"))
    about = {"format": ledger.get("formats"), "shape": ledger.get("shapes"), "encoding": ledger.get("encoding")}
    about |= {"copies made for weights": ledger.get("rows_repeated"), "replayed": ledger.get("rows_replayed")}
    return [*parts, facts({name: _counts(value) for name, value in about.items() if value})]


def _counts(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def lengths(found: Figures) -> list[Html]:
    """How long rows are, what each limit cuts, how much is learnt."""
    tokens, sample = found["tokens"], found["sample"]
    of = f"of all {sample['of']:,} training rows"
    if sample["rows"] < sample["of"]:
        of = f"of {sample['rows']:,} training rows drawn from {sample['of']:,} (seed {sample['seed']})"
    roles = [[role, *(one[key] for key in ("count", "total", "p5", "median", "p95", "longest"))]
             for role, one in tokens["by_role"].items()]  # fmt: skip
    cut = [
        [one["max_seq_len"], one["rows_over"], _percent(one["share_of_rows"]), one["rows_dropped"], one["tokens_lost"],
         _percent(one["share_of_tokens"])]
        for one in tokens["limits"]
    ]  # fmt: skip
    marks = sorted({*(one["max_seq_len"] for one in tokens["limits"]), tokens["run"]["max_seq_len"]})
    sizes = drawing.histogram(tokens["sizes"], "tokens in a row", "rows by length in tokens", marks=marks, log=True)
    shares = drawing.histogram([100 * one for one in tokens["shares"]], "% of a row that is learnt",
                               "rows by the share of tokens that is learnt")  # fmt: skip
    names = ["max_seq_len", "rows over it", "share of rows", "left out", "tokens lost", "share of tokens"]
    whole = tokens["by_role"]["whole row"]
    spread = [[key, whole[key]] for key in ("p5", "median", "p95", "longest")]
    learnt = [["tokens learnt", tokens["labelled"]["tokens"]], ["all tokens", tokens["total"]]]
    drawn = [
        figure(sizes, "Length of a row", "with its template; lines: limits", ["", "tokens"], spread),
        figure(shares, "Learnt share", "what is not learnt is read only", ["", "tokens"], learnt),
    ]
    return [
        text(f"Figures {of}. A role's tokens are those of its text alone, without what the template puts around it."),
        figures(drawn),
        table(["part", "texts", "tokens", "5 %", "median", "95 %", "longest"], roles, caption="Tokens by role"),
        table(names, cut, caption=f"What each limit would cut, with model.over_length: {tokens['run']['over_length']}"),
    ]


def _percent(share: float) -> Cell:
    return Cell(f"{share:.2%}" if share < 0.1 else f"{share:.1%}", share, "n")


def run(fate: Figures) -> list[Html]:
    """The reasons that need tokens."""
    words = (
        f"With model.max_seq_len {fate['max_seq_len']:,} and model.over_length {fate['over_length']}: "
        f"{fate['rows_read']:,} rows looked at = {fate['rows_trained']:,} trained on + "
        f"{sum(fate['reasons'].values()):,} named. {fate['rows_truncated']:,} rows are cut and lose "
        f"{fate['tokens_truncated']:,} tokens."
    )
    rows = [[why, count, ", ".join(fate["first_dropped"][why])] for why, count in fate["reasons"].items()]
    dropped = [table(["reason", "rows", "first ids (make preview shows them)"], rows)] if rows else []
    return [text(words), *dropped]


def repetition(found: Figures) -> list[Html]:
    """Duplicates, near duplicates, and the words that answers share."""
    near, phrases, sample = found["duplicates"]["near"], found["phrases"], max(1, found["sample"]["rows"])
    words = (
        f"{found['duplicates']['exact_dropped']:,} exact duplicates were left out. Nearly the same (Jaccard similarity "
        f"of five-word runs from {near['threshold']:g}): {near['pairs']:,} pairs, {near['rows_in_clusters']:,} rows, "
        f"among {near['of']:,} rows" + (", as processing found." if near["from"] == "ledger" else ".")
    )
    made = [text(words)]
    if near.get("shown"):
        made.append(details("pairs that are nearly the same", *map(bullets, near["shown"])))
    drawn = []
    for key, title in (("openings", "Answers begin with"), ("runs", "Answers hold")):
        if rows := phrases[key]:
            svg = drawing.bars([one for one, _ in rows], [100 * n / sample for _, n in rows], "% of rows", title)
            drawn.append(figure(svg, title, "the same words, by share of rows", ["words", "rows"], rows))
    return [*made, *([figures(drawn)] if drawn else [])]


def quality(ledger: Figures) -> list[Html]:
    """What the ledger reports and drops only when asked."""
    if not ledger:
        return []
    counts = [[name.replace("_", " "), n, f"data.drop: [{name}]"] for name, n in ledger.get("quality", {}).items()]
    made = [table(["what", "rows", "drops them"], counts, caption="Rows to look at")]
    if scripts := ledger.get("scripts"):
        made.append(table(["script", "rows"], list(scripts.items()), caption="Scripts"))
    if against := ledger.get("contamination", {}).get("against"):
        made.append(table(["benchmark", "rows hit"], [[one["name"], one["hits"]] for one in against]))
    if replay := ledger.get("replay"):
        made.append(facts({f"replay {name}": value for name, value in replay.items()}))
    return made


def left_out(found: Figures) -> list[Html]:
    """Examples of every reason in the ledger, from the quarantine."""
    made: list[Html] = []
    for reason, rows in found["examples"].items():
        count = found["ledger"].get("named", {}).get(reason, len(rows))
        made.append(heading(f"{reason}: {number(count)} rows"))
        made += [Html(text(f"{one['origin']}: {one['detail']}", soft=True) + shown_code(one["row"])) for one in rows]
    if not made and found["ledger"]:
        made.append(text("None: every row that was read is used."))
    return made
