"""The table of metrics by name, and the one function that scores a set of answers with several of them.

Every metric is a plain mean over rows (bleu and chrf, which count over the corpus, are not). Shares and ROUGE are 0 to
1; SARI, BLEU and chrF 0 to 100, as published.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.errors import ConfigError, DataError
from sft.metrics import form, match, outside, rouge, sari, schema, tags, text

log = logging.getLogger("sft.metrics")

References = Sequence[str | Sequence[str]]

_BY_REFERENCE: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": match.exact_match,
    "exact_match_normalised": match.exact_match_normalised,
    "token_f1": match.token_f1,
    "contains": match.contains,
    "numeric": match.numeric,
    "json_fields": schema.json_fields,
}
_BY_ANSWER: dict[str, Callable[[str], float]] = {
    "json_valid": schema.json_valid,
    "length_words": text.words,
    "repetition": text.repetition,
    "empty_rate": text.empty,
}
_CORPUS = ("bleu", "chrf")
_ROUGE = re.compile(r"rouge(L|Lsum|[1-9])")
_SPELLINGS = {
    "exact_match_normalized": "exact_match_normalised",
    "rouge_l": "rougeL",
    "rougel": "rougeL",
    "rougelsum": "rougeLsum",
}
NAMES = (
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "sari",
    *_BY_REFERENCE,
    *_BY_ANSWER,
    "format_adherence",
    "json_schema",
    *_CORPUS,
)
_SMALLER_IS_BETTER = {"loss", "row_loss", "perplexity", "repetition", "empty_rate", "length_words", "length_tokens"}


@dataclass(frozen=True)
class Scores:
    """`means`: the value of each metric. `rows`: each row's own value, for the metrics that have one."""

    means: dict[str, float]
    rows: dict[str, list[float]] = field(default_factory=dict)

    def of_row(self, index: int) -> dict[str, float]:
        """The values of one row."""
        return {name: round(values[index], 6) for name, values in self.rows.items()}

    @property
    def plain(self) -> dict[str, list[float]]:
        """The rows' values of the metrics whose mean over any rows means something: all but those of a corpus."""
        return {name: values for name, values in self.rows.items() if name not in _CORPUS}


def check_names(names: Sequence[str]) -> list[str]:
    """The names in their own spelling. Raises ConfigError with the nearest name for one that is not known."""
    problems = []
    known = []
    for given in names:
        name = _SPELLINGS.get(given, given)
        if name in NAMES or _ROUGE.fullmatch(name) or (name.startswith(outside.DOOR) and name != outside.DOOR):
            known.append(name)
            continue
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        problems.append(f"{given!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    if problems:
        raise ConfigError(
            f"no such metric: {', '.join(problems)}",
            where="eval.metrics",
            mend=f"choose from {', '.join(NAMES)}, or evaluate:NAME",
        )
    return list(dict.fromkeys(known))


def greater_is_better(name: str) -> bool:
    """False for losses, perplexity, repetition, length and empty answers; `eval_` or `eval/` in front is ignored."""
    return re.sub(r"^eval[_/]", "", name) not in _SMALLER_IS_BETTER


def as_lists(references: References) -> list[list[str]]:
    """Every row's references as a list. Raises DataError for a row that has none."""
    lists = [[item] if isinstance(item, str) else list(item) for item in references]
    for index, options in enumerate(lists, start=1):
        if not options:
            raise DataError("a row has no reference answer", where=f"row {index}", mend="give it one, or take it out")
    return lists


def score(
    names: Sequence[str],
    predictions: Sequence[str],
    references: References,
    sources: Sequence[str] | None = None,
    *,
    stemmer: bool = False,
    json_schema: dict[str, Any] | None = None,
    pattern: re.Pattern[str] | None = None,
) -> dict[str, float]:
    """{name: value} for each metric in `names`; see `score_rows`."""
    return score_rows(
        names, predictions, references, sources, stemmer=stemmer, json_schema=json_schema, pattern=pattern
    ).means


def score_rows(
    names: Sequence[str],
    predictions: Sequence[str],
    references: References,
    sources: Sequence[str] | None = None,
    *,
    stemmer: bool = False,
    json_schema: dict[str, Any] | None = None,
    pattern: re.Pattern[str] | None = None,
) -> Scores:
    """Scores answers: one prediction, one reference or a list of them, and one source text (SARI only) for each row.

    stemmer: stem English words before ROUGE. json_schema: a parsed schema, for the metric of that name. pattern: what
    `format_adherence` matches whole answers with; None compares their form with the references'.
    Raises ConfigError for an unknown name, DataError for rows that do not match in number or lack what is needed.
    """
    names, wanted = check_names(names), as_lists(references)
    if not len(predictions) == len(wanted) or (sources is not None and len(sources) != len(wanted)):
        raise DataError("predictions, references and sources differ in number")
    if not predictions:
        raise DataError("there are no answers to score")
    means: dict[str, float] = {}
    rows: dict[str, list[float]] = {}
    for name in names:
        if name in _CORPUS:
            means[name] = outside.corpus_score(name, predictions, wanted)
            rows[name] = outside.sentence_scores(name, predictions, wanted)
        elif name.startswith(outside.DOOR):
            means[name], values = outside.evaluate_score(name, predictions, wanted, sources)
            rows.update({name: values} if values else {})
        else:
            rows[name] = _rows(name, predictions, wanted, sources, stemmer, json_schema, pattern)
            means[name] = text.mean(rows[name])
    return Scores(means, rows)


def by_tag(
    tagged: Sequence[Sequence[str]],
    scores: Scores,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    more: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, dict[str, float]]:
    """{tag: {"rows": how many, metric: its value over them}}; a row of several tags counts for each of them.

    tagged: each row's tags. more: values of rows besides the scores'. Metrics of a corpus count over the tag's rows.
    """
    rows = {**scores.plain, **(more or {})}
    corpus = [name for name in scores.means if name in _CORPUS]
    return {
        tag: {"rows": len(where)}
        | {name: text.mean([values[at] for at in where]) for name, values in rows.items()}
        | {
            name: outside.corpus_score(name, [predictions[at] for at in where], [references[at] for at in where])
            for name in corpus
        }
        for tag, where in tags.places(tagged).items()
    }


def _rows(
    name: str,
    predictions: Sequence[str],
    references: list[list[str]],
    sources: Sequence[str] | None,
    stemmer: bool,
    json_schema: dict[str, Any] | None,
    pattern: re.Pattern[str] | None,
) -> list[float]:
    pairs = list(zip(predictions, references, strict=True))
    if name in _BY_REFERENCE:
        if name == "numeric" and (bare := sum(all(match.number(r) is None for r in refs) for _, refs in pairs)):
            log.warning("numeric: %d of %d references have no number; those rows count as wrong", bare, len(pairs))
        return [_BY_REFERENCE[name](prediction, refs) for prediction, refs in pairs]
    if name in _BY_ANSWER:
        return [_BY_ANSWER[name](prediction) for prediction in predictions]
    if name == "format_adherence":
        return [form.adherence(prediction, refs, pattern) for prediction, refs in pairs]
    if name == "json_schema":
        if json_schema is None:
            raise ConfigError("the metric json_schema has no schema", mend="set eval.json_schema to its file")
        validator = schema.Validator(json_schema)
        return [validator(prediction) for prediction in predictions]
    if name == "sari":
        if sources is None:
            raise DataError("sari compares with the source text, and there is none", mend='add "source" to every row')
        return [sari.sari(source, *pair) for source, pair in zip(sources, pairs, strict=True)]
    _warn_of_other_scripts(name, references, stemmer)
    return [rouge.rouge(name, prediction, refs, stemmer=stemmer) for prediction, refs in pairs]


def _warn_of_other_scripts(name: str, references: list[list[str]], stemmer: bool) -> None:
    blind = sum(not rouge.tokens(refs[0], stemmer) and bool(refs[0].strip()) for refs in references)
    if blind > len(references) / 2:
        log.warning(
            "%s sees only the letters a-z and digits, and %d of %d references have none: take chrf for this language",
            name,
            blind,
            len(references),
        )
