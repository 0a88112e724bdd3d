"""A page about the training rows: lengths in tokens, what is cut at which length, what repeats, what was left out.

Rows are never changed here. Where there are very many training rows, the numbers come from a seeded sample of them.
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
from sft.chat.dataset import BATCH, RunLedger
from sft.chat.encode import Encoded, Encoder
from sft.chat.loss_mask import IGNORED
from sft.config.schema import Config
from sft.data import rows as records
from sft.data import shards, store
from sft.data.dedup import WORD, NearDuplicates
from sft.data.ledger import SIZES
from sft.data.quality import quantiles
from sft.report import html
from sft.report.html import Chart

Row = dict[str, Any]
Figures = dict[str, Any]
Progress = Callable[[int, int], None]
LIMITS = (512, 1024, 2048, 4096)
NO_LIMIT = 10**9
GRAM, OPENING, TOP, EXAMPLES, EXAMPLE_CHARACTERS = 4, 3, 15, 3, 600  # words, words, phrases, rows, characters


def figures(config: Config, stage: store.Stage, folder: Path, limit: int) -> tuple[Figures, list[Row]]:
    """All figures but those in tokens, and the sampled rows for `token_figures`.

    folder: where ledger.json and quarantine.jsonl are. limit: most rows in the sample, 0 is all.
    """
    ledger = files.read_json(folder / "ledger.json") if stage.name != "given" else {}
    rows, total = sample_rows(store.iter_rows(stage.train), limit, config.data.split.seed)
    held_out = {name: shards.count(path) for name, path in stage.paths.items() if name != "train"}
    size = next(f"{total:,} rows to train on: {words}" for minimum, words in SIZES if total >= minimum)
    result = {
        "stage": stage.name,
        "files": {name: path.name for name, path in stage.paths.items()},
        "rows": {"train": total, **held_out},
        "ledger": ledger,
        "verdict": ledger.get("verdict") or size,
        "sample": {"rows": len(rows), "of": total, "seed": config.data.split.seed},
        "phrases": phrases(rows),
        "duplicates": duplicates(rows, config.data.near_duplicate_threshold, ledger),
        "examples": examples(folder / "quarantine.jsonl", ledger.get("named", {})),
    }
    return result, rows


def sample_rows(rows: Iterable[Row], limit: int, seed: int) -> tuple[list[Row], int]:
    """A reservoir sample of up to `limit` rows (0: all) in file order, and how many rows there were."""
    choose, sample, total = random.Random(seed), [], 0
    for total, row in enumerate(rows, start=1):
        if not limit or total <= limit:
            sample.append((total, row))
        elif (slot := choose.randrange(total)) < limit:
            sample[slot] = (total, row)
    return [row for _, row in sorted(sample, key=lambda entry: entry[0])], total


def token_figures(encoder: Encoder, rows: Sequence[Row], on_progress: Progress | None = None) -> Figures:
    """Lengths by role, what each limit cuts, the share of labelled tokens, what training with this encoder would do.

    sizes: each row's tokens; shares: the labelled part of each row.
    """
    whole = _with_limit(encoder, NO_LIMIT)
    lengths: dict[str, Counter[int]] = {}
    encoded: list[Encoded] = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        encoded += whole.encode_batch(list(part))
        for role, size in _turn_lengths(encoder, part):
            lengths.setdefault(role, Counter())[size] += 1
        if on_progress:
            on_progress(min(start + BATCH, len(rows)), len(rows))
    sizes = [len(one.input_ids) + len(one.labels) * (encoder.kind == "seq2seq") for one in encoded]
    labelled = [sum(label != IGNORED for label in one.labels) for one in encoded]
    total = sum(sizes)
    run = _cut_at(encoder, encoder.max_seq_len, rows, encoded, sizes)[0].to_dict()
    first = {reason: ids[:EXAMPLES] for reason, ids in run.pop("dropped").items()}
    return {
        "total": total,
        "sizes": sizes,
        "shares": [part / size for part, size in zip(labelled, sizes, strict=True) if size],
        "labelled": {"tokens": sum(labelled), "share": sum(labelled) / total if total else 0.0},
        "by_role": {role: _spread(counts) for role, counts in {"whole row": Counter(sizes), **lengths}.items()},
        "limits": [_cut_at(encoder, limit, rows, encoded, sizes)[1] for limit in LIMITS],
        "run": {"max_seq_len": encoder.max_seq_len, "over_length": encoder.over_length, **run, "first_dropped": first},
    }


def _with_limit(encoder: Encoder, limit: int) -> Encoder:
    """The encoder with another max_seq_len; `over_length: error` becomes `drop`, so that such rows are counted."""
    probe = copy.copy(encoder)
    probe.max_seq_len = limit
    if probe.over_length == "error":
        probe.over_length = "drop"
    return probe


def _turn_lengths(encoder: Encoder, rows: Sequence[Row]) -> Iterator[tuple[str, int]]:
    """(role, tokens) of every turn's own text, without the template around it."""
    turns: list[tuple[str, str]] = []
    for row in rows:
        if records.is_rendered(row):
            turns += [("input", str(row["input"])), ("target", str(row["target"]))]
        else:
            turns += [(str(turn["role"]), str(turn.get("content") or "")) for turn in records.messages(row)]
    turns = [turn for turn in turns if turn[1]]
    if turns:
        ids = encoder.tokenizer([text for _, text in turns], add_special_tokens=False)["input_ids"]
        yield from ((role, len(tokens)) for (role, _), tokens in zip(turns, ids, strict=True))


def _spread(counts: Counter[int]) -> Figures:
    shares = (0.05, 0.5, 0.95, 1.0)
    named = dict(zip(("p5", "median", "p95", "longest"), quantiles(counts, shares), strict=True))
    return {"count": counts.total(), "total": sum(size * n for size, n in counts.items()), **named}


def _cut_at(
    encoder: Encoder, limit: int, rows: Sequence[Row], encoded: Sequence[Encoded], sizes: Sequence[int]
) -> tuple[RunLedger, Figures]:
    """What training with model.max_seq_len = limit would do: rows read = rows trained on + rows named; what is lost.

    encoded, sizes: the rows without a limit; only those over it are encoded again, each as one piece or several.
    """
    probe, ledger, again = _with_limit(encoder, limit), RunLedger(), dict[int, list[Encoded]]()
    over = [i for i, one in enumerate(encoded) if max(len(one.input_ids), len(one.labels)) > limit]
    for start in range(0, len(over), BATCH):
        part = over[start : start + BATCH]
        again |= zip(part, probe.encode_pieces([rows[i] for i in part]), strict=True)
    lost = 0
    for i, parts in again.items():
        usable = not all(part.dropped for part in parts)
        lost += sum(len(p.input_ids) if p.dropped else p.truncated_tokens for p in parts) if usable else sizes[i]
    for i, one in enumerate(encoded):
        ledger.add(*again.get(i, [one]))
    return ledger, {
        "max_seq_len": limit,
        "rows_over": len(again),
        "share_of_rows": len(again) / max(1, len(rows)),
        "rows_dropped": sum(all(part.dropped for part in parts) for parts in again.values()),
        "tokens_lost": lost,
        "share_of_tokens": lost / max(1, sum(sizes)),
    }


def phrases(rows: Sequence[Row]) -> Figures:
    """How many rows' answers begin with the same words, or contain the same run of words; the most frequent ones."""
    openings: Counter[str] = Counter()
    runs: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        words = WORD.findall(records.reference(row).lower())
        openings[_joined(words[:OPENING])] += bool(words)
        runs.update({tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)})
    return {
        "openings": [[text, count] for text, count in openings.most_common(TOP) if count > 1],
        "runs": [[_joined(words), count] for words, count in runs.most_common(TOP) if count > 1],
    }


def _joined(words: Sequence[str]) -> str:
    """Words as they are read: without spaces between characters of scripts that have none."""
    single = all(len(word) == 1 and not word.isascii() for word in words)
    return ("" if single else " ").join(words)


def duplicates(rows: Sequence[Row], threshold: float, ledger: Figures) -> Figures:
    """Exact duplicates that processing left out, and near duplicates among the rows."""
    index = NearDuplicates(threshold)
    for row in rows:
        index.add(records.comparison_text(row))
    pairs = list(index.pairs())
    return {
        "exact_dropped": ledger.get("named", {}).get("exact duplicate", 0),
        "near": {
            "threshold": threshold,
            "pairs": len(pairs),
            "rows_in_clusters": len({number for pair in pairs for number in pair}),
            "of": len(rows),
            "shown": [[_short(records.comparison_text(rows[at])) for at in pair] for pair in pairs[:EXAMPLES]],
        },
    }


def examples(path: Path, named: dict[str, int]) -> Figures:
    """Some rows of each reason from the quarantine: `{reason: [{"origin", "detail", "row"}]}`."""
    by_reason: dict[str, list[Row]] = {reason: [] for reason in named}
    if not named or not path.is_file():
        return by_reason
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            rows = by_reason.setdefault(row["reason"], [])
            if len(rows) < EXAMPLES:
                text = row["text"] if "text" in row else json.dumps(row.get("row"), ensure_ascii=False)
                rows.append({"origin": row["origin"], "detail": row["detail"], "row": _short(text)})
            if all(len(rows) >= min(EXAMPLES, named.get(reason, 0)) for reason, rows in by_reason.items()):
                break
    return by_reason


def _short(text: str) -> str:
    return text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:EXAMPLE_CHARACTERS]} … ({len(text):,} characters)"


def page(result: Figures, title: str) -> str:
    """The whole page. result: of `figures`, with `token_figures` under "tokens" (None without a tokenizer)."""
    names = {"format": "formats", "shape": "shapes", "encoding": "encoding", "copies by weight": "rows_repeated"}
    names["replayed"] = "rows_replayed"
    return html.render(
        "data.html.j2",
        title,
        **result,
        findings=_findings(result),
        facts={name: value for name, key in names.items() if (value := result["ledger"].get(key))},
        length_charts=_length_charts(result["tokens"]) if result["tokens"] else [],
        bar_charts=_bar_charts(result),
    )


def _findings(result: Figures) -> list[tuple[str, str, str]]:
    """(headline, words, tone) of each finding."""
    ledger = result["ledger"]
    findings = [("Size", result["verdict"], "good" if result["rows"]["train"] >= 500 else "bad")]
    if result["tokens"]:
        findings += _token_findings(result["tokens"])
    if balance := ledger.get("balance"):
        findings.append(("Balance", balance, "bad" if "uneven" in balance else "even"))
    if leaks := ledger.get("leaks"):
        counts = {f"{split} ({kind})": n for split, kinds in sorted(leaks.items()) for kind, n in kinds.items()}
        leaked = [f"{count:,} of {name}" for name, count in counts.items() if count]
        unseen = sorted({kind for kinds in leaks.values() for kind, count in kinds.items() if count is None})
        words = "held-out rows that also occur in training: " + (", ".join(leaked) or "none")
        if unseen:
            words += f"; not looked for: {', '.join(unseen)} (data.near_duplicates: report)"
        findings.append(("Leaks", words, "bad" if leaked else "even" if unseen else "good"))
    if "fault_share" in ledger:
        read, written, named, faults = (ledger[key] for key in ("rows_read", "rows_written", "rows_named", "faults"))
        words = f"{read:,} rows read = {written:,} written + {named:,} named; {faults:,} faulty"
        findings.append(("Account", words, "even" if ledger.get("accepted", True) else "bad"))
    return findings


def _token_findings(tokens: Figures) -> list[tuple[str, str, str]]:
    run, share = tokens["run"], tokens["labelled"]["share"]
    dropped, cut = sum(run["reasons"].values()), run["rows_truncated"]
    words = f"at model.max_seq_len {run['max_seq_len']:,}: {cut:,} of {run['rows_read']:,} rows are cut, "
    words += f"{dropped:,} are left out"
    if run["over_length"] == "error" and dropped:
        words += "; model.over_length is `error`, so training would stop"
    elif cut or dropped:
        longest = tokens["by_role"]["whole row"]["longest"]
        words += f" (model.over_length: {run['over_length']}; the longest row has {longest:,} tokens)"
    bad = (cut + dropped) / max(1, run["rows_read"]) > 0.01
    labels = f"{share:.0%} of the tokens are in the loss; the others are only read"
    return [("Length", words, "bad" if bad else "good"), ("Labels", labels, "bad" if share < 0.02 else "even")]


def _length_charts(tokens: Figures) -> list[Chart]:
    limits = sorted({*(entry["max_seq_len"] for entry in tokens["limits"]), tokens["run"]["max_seq_len"]})
    sizes = html.histogram(tokens["sizes"], "tokens in a row", "rows by length in tokens", limits=limits, log=True)
    percent = [100 * share for share in tokens["shares"]]
    shares = html.histogram(percent, "% of a row in the loss", "rows by the share of tokens in the loss")
    whole = tokens["by_role"]["whole row"]
    spread = [[key, whole[key]] for key in ("p5", "median", "p95", "longest")]
    labelled = [["tokens in the loss", tokens["labelled"]["tokens"]], ["all tokens", tokens["total"]]]
    return [
        Chart(sizes, "Length of a row", ["", "tokens"], spread, "with its template; lines: limits"),
        Chart(shares, "Share in the loss", ["", "tokens"], labelled, "the other tokens are only read"),
    ]


def _bar_charts(result: Figures) -> dict[str, list[Chart]]:
    """Rows left out by reason, and what many answers share: charts by the section that they belong to."""
    named, rows = result["ledger"].get("named"), max(1, result["sample"]["rows"])
    charts: dict[str, list[Chart]] = {"rows": [], "repetition": []}
    if named:
        svg = html.bars(list(named), list(named.values()), "rows", "rows left out, by reason")
        charts["rows"] = [Chart(svg, "Rows left out", ["reason", "rows"], list(named.items()), "by reason")]
    for key, title in (("openings", "Answers begin with"), ("runs", "Answers contain")):
        if entries := result["phrases"][key]:
            svg = html.bars([text for text, _ in entries], [100 * n / rows for _, n in entries], "% of rows", title)
            note = "the same words, by share of rows"
            charts["repetition"].append(Chart(svg, title, ["words", "rows"], entries, note))
    return charts
