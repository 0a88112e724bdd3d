"""The figures of a data report: rows in tokens, what is cut at which length, what repeats, what was left out.

Rows are never changed here. Token figures are of a seeded draw of the training rows where there are very many of them.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sft import files
from sft.chat.dataset import BATCH, RunLedger, pieces
from sft.chat.encode import Encoded, Encoder
from sft.chat.loss_mask import IGNORED
from sft.config.schema import Config
from sft.data import rows as records
from sft.data import store
from sft.data.dedup import WORD, Index, text_of
from sft.data.ledger import SIZES
from sft.data.quality import quantiles
from sft.report import html
from sft.report.html import Cell, Html, Section, bullets, details, facts, figure, heading, number, table, text
from sft.report.html import code as shown_code
from sft.report.html import figures as html_figures
from sft.report.html import page as whole_page
from sft.report.html import verdict as finding

Row = dict[str, Any]
Figures = dict[str, Any]
Progress = Callable[[int, int], None]
LIMITS = (512, 1024, 2048, 4096)
NO_LIMIT = 10**9
GRAM, OPENING, TOP, EXAMPLES, SHOWN = 4, 3, 15, 3, 600  # words, words, phrases, rows, characters


def figures(config: Config, stage: store.Stage, folder: Path, limit: int) -> tuple[Figures, list[Row]]:
    """All of them but those in tokens, and the rows that were drawn for `tokens` to look at.

    folder: where ledger.json and quarantine.jsonl lie. limit: most rows looked at one by one, 0 is all.
    """
    ledger = files.read_json(folder / "ledger.json") if stage.name != "given" else {}
    held_out = {name: path for name, path in (("val", stage.val), ("test", stage.test)) if path is not None}
    rows, total = draw(store.iter_rows(stage.train), limit, config.data.split.seed)
    found = {
        "stage": stage.name,
        "files": {name: path.name for name, path in {"train": stage.train, **held_out}.items()},
        "rows": {"train": total, **{name: store.count(path) for name, path in held_out.items()}},
        "ledger": ledger,
        "verdict": ledger.get("verdict") or next(f"{total:,} rows to train on: {w}" for n, w in SIZES if total >= n),
        "sample": {"rows": len(rows), "of": total, "seed": config.data.split.seed},
        "phrases": phrases(rows),
        "duplicates": duplicates(rows, config.data.near_duplicate_threshold, ledger),
        "examples": examples(folder / "quarantine.jsonl", ledger.get("named", {})),
    }
    return found, rows


def draw(rows: Iterable[Row], limit: int, seed: int) -> tuple[list[Row], int]:
    """Up to `limit` rows, each as likely as any other, in their order; and how many there were (0: all are kept)."""
    choose, kept, total = random.Random(seed), [], 0
    for total, row in enumerate(rows, start=1):
        if not limit or total <= limit:
            kept.append((total, row))
        elif (at := choose.randrange(total)) < limit:
            kept[at] = (total, row)
    return [row for _, row in sorted(kept, key=lambda one: one[0])], total


def tokens(encoder: Encoder, rows: Sequence[Row], on_progress: Progress | None = None) -> Figures:
    """Lengths by role, what each limit cuts, the share that is learnt, what training with this encoder would do.

    sizes: each row's tokens; shares: the part of them that is learnt.
    """
    whole = _with_limit(encoder, NO_LIMIT)
    lengths: dict[str, Counter[int]] = {}
    made: list[Encoded] = []
    for at in range(0, len(rows), BATCH):
        part = rows[at : at + BATCH]
        made += whole.encode_batch(list(part))
        for role, size in _by_role(encoder, part):
            lengths.setdefault(role, Counter())[size] += 1
        if on_progress:
            on_progress(min(at + BATCH, len(rows)), len(rows))
    sides = 2 if encoder.kind == "seq2seq" else 1
    sizes = [sum(map(len, (one.input_ids, one.labels)[:sides])) for one in made]
    learnt = [sum(label != IGNORED for label in one.labels) for one in made]
    total = sum(sizes)
    return {
        "total": total,
        "sizes": sizes,
        "shares": [part / size for part, size in zip(learnt, sizes, strict=True) if size],
        "labelled": {"tokens": sum(learnt), "share": sum(learnt) / total if total else 0.0},
        "by_role": {role: _spread(counts) for role, counts in {"whole row": Counter(sizes), **lengths}.items()},
        "limits": [_cut_at(encoder, limit, rows, made, sizes) for limit in LIMITS],
        "run": _fate(encoder, rows, made),
    }


def _with_limit(encoder: Encoder, limit: int) -> Encoder:
    probe = copy.copy(encoder)
    probe.max_seq_len = limit
    if probe.over_length == "error":  # which would stop at the first such row: here they are to be counted
        probe.over_length = "drop"
    return probe


def _by_role(encoder: Encoder, rows: Sequence[Row]) -> Iterator[tuple[str, int]]:
    """(role, tokens) of every turn's own text, without what the template puts around it."""
    said = [turn for row in rows for turn in _turns(row) if turn[1]]
    if said:
        ids = encoder.tokenizer([text for _, text in said], add_special_tokens=False)["input_ids"]
        yield from ((role, len(one)) for (role, _), one in zip(said, ids, strict=True))


def _turns(row: Row) -> list[tuple[str, str]]:
    if records.is_rendered(row):
        return [("input", str(row["input"])), ("target", str(row["target"]))]
    return [(str(turn["role"]), str(turn.get("content") or "")) for turn in records.messages(row)]


def _spread(counts: Counter[int]) -> Figures:
    shares = (0.05, 0.5, 0.95, 1.0)
    named = dict(zip(("p5", "median", "p95", "longest"), quantiles(counts, shares), strict=True))
    return {"count": counts.total(), "total": sum(size * n for size, n in counts.items()), **named}


def _again(encoder: Encoder, limit: int, rows: Sequence[Row], made: Sequence[Encoded]) -> dict[int, list[Encoded]]:
    """The rows that are over the limit, encoded under it, by their number: one piece each, or several (split_turns)."""
    probe = _with_limit(encoder, limit)
    over = [at for at, one in enumerate(made) if max(len(one.input_ids), len(one.labels)) > limit]
    parts = (over[start : start + BATCH] for start in range(0, len(over), BATCH))
    return {at: one for part in parts for at, one in zip(part, pieces(probe, [rows[at] for at in part]), strict=True)}


def _cut_at(
    encoder: Encoder, limit: int, rows: Sequence[Row], made: Sequence[Encoded], sizes: Sequence[int]
) -> Figures:
    again = _again(encoder, limit, rows, made)
    dropped = [at for at, parts in again.items() if all(part.dropped for part in parts)]
    lost = sum(sizes[at] for at in dropped)
    shorter = (part for at, parts in again.items() if at not in dropped for part in parts)
    lost += sum(len(part.input_ids) if part.dropped else part.truncated_tokens for part in shorter)
    return {
        "max_seq_len": limit,
        "rows_over": len(again),
        "share_of_rows": len(again) / len(rows) if rows else 0.0,
        "rows_dropped": len(dropped),
        "tokens_lost": lost,
        "share_of_tokens": lost / sum(sizes) if sum(sizes) else 0.0,
    }


def _fate(encoder: Encoder, rows: Sequence[Row], made: Sequence[Encoded]) -> Figures:
    """What training with these settings would do with the rows: rows read = rows trained on + rows named."""
    again = _again(encoder, encoder.max_seq_len, rows, made)
    ledger = RunLedger()
    for at, one in enumerate(made):
        ledger.add(*again.get(at, [one]))
    told = ledger.to_dict()
    first = {reason: ids[:EXAMPLES] for reason, ids in told.pop("dropped").items()}
    return {"max_seq_len": encoder.max_seq_len, "over_length": encoder.over_length, **told, "first_dropped": first}


def phrases(rows: Sequence[Row]) -> Figures:
    """How many rows' answers begin with the same words, and hold the same run of words; the most frequent ones."""
    openings: Counter[str] = Counter()
    grams: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        words = WORD.findall(records.reference(row).lower())
        openings[_joined(words[:OPENING])] += bool(words)
        grams.update({tuple(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1)})
    return {
        "openings": [[text, count] for text, count in openings.most_common(TOP) if count > 1],
        "runs": [[_joined(words), count] for words, count in grams.most_common(TOP) if count > 1],
    }


def _joined(words: Sequence[str]) -> str:
    """Words as they are read: characters of scripts that put no space between them stand together."""
    alone = all(len(word) == 1 and not word.isascii() for word in words)
    return ("" if alone else " ").join(words)


def duplicates(rows: Sequence[Row], threshold: float, ledger: Figures) -> Figures:
    """Exact ones that processing left out, and near ones: all of them where it looked, else those among these rows."""
    exact = ledger.get("named", {}).get("exact duplicate", 0)
    if near := ledger.get("near_duplicates"):
        return {"exact_dropped": exact, "near": {**near, "of": ledger.get("rows_written"), "from": "ledger"}}
    index = Index(threshold)
    for row in rows:
        index.add(text_of(row))
    pairs = list(index.pairs())
    shown = [[_short(text_of(rows[later])), _short(text_of(rows[earlier]))] for later, earlier in pairs[:EXAMPLES]]
    together = len({number for pair in pairs for number in pair})
    near = {"threshold": threshold, "pairs": len(pairs), "rows_in_clusters": together, "of": len(rows), "shown": shown}
    return {"exact_dropped": exact, "near": {**near, "from": "sample"}}


def examples(path: Path, named: dict[str, int]) -> Figures:
    """Some rows of each reason from the quarantine: `{reason: [{"origin", "detail", "row"}]}`."""
    found: dict[str, list[Row]] = {reason: [] for reason in named}
    if not named or not path.is_file():
        return found
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            kept = found.setdefault(row["reason"], [])
            if len(kept) < EXAMPLES:
                shown = row["text"] if "text" in row else json.dumps(row.get("row"), ensure_ascii=False)
                kept.append({"origin": row["origin"], "detail": row["detail"], "row": _short(shown)})
            if all(len(kept) >= min(EXAMPLES, named.get(reason, 0)) for reason, kept in found.items()):
                break
    return found


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + f" … ({len(text):,} characters)"


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
        svg = html.bars(list(named), list(named.values()), "rows", "rows left out, by reason")
        parts.append(html_figures([figure(svg, "Rows left out", "by reason", ["reason", "rows"], list(named.items()))]))
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
    sizes = html.histogram(tokens["sizes"], "tokens in a row", "rows by length in tokens", marks=marks, log=True)
    shares = html.histogram([100 * one for one in tokens["shares"]], "% of a row that is learnt",
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
        html_figures(drawn),
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
            svg = html.bars([one for one, _ in rows], [100 * n / sample for _, n in rows], "% of rows", title)
            drawn.append(figure(svg, title, "the same words, by share of rows", ["words", "rows"], rows))
    return [*made, *([html_figures(drawn)] if drawn else [])]


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
