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
from sft.chat.batch import BATCH, RunLedger, pieces
from sft.chat.encode import Encoded, Encoder
from sft.chat.length import IGNORED
from sft.config.schema import Config
from sft.data import records, store
from sft.data.ledger import SIZES
from sft.data.near import Index
from sft.data.quality import quantiles
from sft.data.words import WORD, text_of

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
