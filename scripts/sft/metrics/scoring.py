"""The metrics by name, over rows of predictions, references and sources.

score_rows(["rougeL", "sari"], predictions, references, sources).means  -> {"rougeL": 0.41, "sari": 38.2}
"""

from __future__ import annotations

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sft.errors import ConfigError, DataError, nearest
from sft.metrics import ngram, text
from sft.metrics.text import mean, means

log = logging.getLogger("sft.metrics")
References = Sequence[str | Sequence[str]]

# --- answers that must be JSON

_NOT_JSON = object()


def _parse(text: str) -> Any:
    """The JSON value that the whole text is, else _NOT_JSON; NaN, Infinity and duplicate keys are not JSON."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return dict(pairs)

    try:
        return json.loads(text.strip(), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return _NOT_JSON


def json_valid(prediction: str) -> float:
    """1 when the answer is one JSON value and nothing else."""
    return float(_parse(prediction) is not _NOT_JSON)


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON-schema file. Raises ConfigError when it is missing, not JSON or not a schema."""
    from jsonschema import exceptions, validators

    fix = "fix the file, or set eval.json_schema to another (null for none)"
    try:
        schema = _parse(path.read_text(encoding="utf-8"))
        if not isinstance(schema, dict):
            raise ConfigError("eval.json_schema is not a file with one JSON object", where=str(path), fix=fix)
        validators.validator_for(schema).check_schema(schema)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the JSON schema cannot be read: {error}", where=str(path), fix=fix) from None
    except exceptions.SchemaError as error:
        raise ConfigError(f"not a JSON schema: {error.message}", where=str(path), fix=fix) from None
    return schema


def _satisfies(schema: dict[str, Any] | None) -> Callable[[str], float]:
    """A metric: 1 for an answer that satisfies the schema; references to other files are never fetched."""
    if schema is None:
        raise ConfigError("the metric json_schema has no schema", fix="set eval.json_schema to its file")
    from jsonschema import validators
    from referencing import Registry

    validator = validators.validator_for(schema)(schema, registry=Registry())
    return lambda prediction: float((value := _parse(prediction)) is not _NOT_JSON and validator.is_valid(value))


def _equal(first: Any, second: Any) -> bool:
    """JSON equality: 1 is 1.0, but true is not 1, and the order of an object's keys does not matter."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def _correct_fields(prediction: str, reference: str) -> dict[str, bool]:
    """Of each field of the reference object: whether the answer has the same value. Empty if it is not an object."""
    expected, answer = _parse(reference), _parse(prediction)
    if not isinstance(expected, dict):
        return {}
    answer = answer if isinstance(answer, dict) else {}
    return {key: key in answer and _equal(value, answer[key]) for key, value in expected.items()}


def json_fields(prediction: str, references: Sequence[str]) -> float:
    """The share of the reference's fields that are correct; 1 or 0 if the reference is not an object."""

    def share(reference: str) -> float:
        if correct := _correct_fields(prediction, reference):
            return sum(correct.values()) / len(correct)
        expected = _parse(reference)
        return float(expected is not _NOT_JSON and _equal(expected, _parse(prediction)))

    return max(map(share, references))


def by_field(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of rows with each field correct, over the rows whose (first) reference has that field."""
    correct: dict[str, list[bool]] = {}
    for prediction, options in zip(predictions, references, strict=True):
        for key, value in _correct_fields(prediction, options[0]).items():
            correct.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in correct.items()}


# --- the form of an answer

_ITEM = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s+\S")
_ONE_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d.,]*%?")


def form(text: str) -> str:
    """The form of a text: nothing, json, number, code (fenced), list, table, N fields (a line parted by `|`), line or
    lines."""
    text = text.strip()
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "nothing"
    if text[0] in "{[" and json_valid(text):
        return "json"
    if _ONE_NUMBER.fullmatch(text):
        return "number"
    if text.startswith("```"):
        return "code"
    if len(lines) == 1:
        return f"{text.count('|') + 1} fields" if "|" in text else "line"
    if all(_ITEM.match(line) for line in lines):
        return "list"
    return "table" if all(line.lstrip().startswith("|") for line in lines) else "lines"


def adherence(prediction: str, references: Sequence[str], pattern: re.Pattern[str] | None) -> float:
    """1 when the whole answer matches the pattern; without one, when its form is that of a reference."""
    if pattern is not None:
        return float(pattern.fullmatch(prediction.strip()) is not None)
    return float(form(prediction) in {form(reference) for reference in references})


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern of `eval.format`; its dot matches line breaks too. Raises ConfigError."""
    try:
        return None if pattern is None else re.compile(pattern, re.DOTALL)
    except re.error as error:
        problem = f"not a regular expression: {error}"
        raise ConfigError(problem, where="eval.format", fix="fix it, or set it to null") from None


# --- exact match, words and numbers

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?:(?<!\w)-)?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}\b)?")  # 10-12 has no minus
_MARKED_NUMBER = re.compile(rf"####\W*?({_NUMBER.pattern})")
_NO_DIGITS = str.maketrans("", "", ",$€£")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer is a reference, character by character, outer whitespace aside."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def normalise(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles (a, an, the), single spaces.

    Source: the official SQuAD evaluation script (Rajpurkar et al. 2016), `normalize_answer`.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match_normalised(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer is a reference after SQuAD's normalisation."""
    return float(normalise(prediction) in {normalise(reference) for reference in references})


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """SQuAD's F1 over the bag of normalised words; two empty texts agree (SQuAD 2.0)."""
    words = normalise(prediction).split()

    def f1(expected: list[str]) -> float:
        if not words or not expected:
            return float(words == expected)
        common = (Counter(words) & Counter(expected)).total()
        precision, recall = common / len(words), common / len(expected)
        return 2 * precision * recall / (precision + recall) if common else 0.0

    return max(f1(normalise(reference).split()) for reference in references)


def contains(prediction: str, references: Sequence[str]) -> float:
    """1 when a reference occurs anywhere in the answer, case aside."""
    text = prediction.strip().casefold()
    options = [reference.strip().casefold() for reference in references]
    return float(any(option in text if option else not text for option in options))


def number(text: str) -> Decimal | None:
    """The answer's number: the one after `####` as GSM8K writes it, else the last one in the text; None without one.

    Commas and a $, € or £ in front are ignored; units after it are ignored; 1e3 is 1000.
    """
    text = text.replace("\u2212", "-")
    marked = _MARKED_NUMBER.search(text)
    numbers = [marked.group(1)] if marked else _NUMBER.findall(text)
    return Decimal(numbers[-1].translate(_NO_DIGITS)) if numbers else None


def numeric(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer's number is the reference's (`1,000` is `1000.0`); 0 when the reference has none."""
    value = number(prediction)
    return float(value is not None and any(number(reference) == value for reference in references))


# --- sacrebleu


def _sacrebleu(name: str, *, of_row: bool) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(effective_order=of_row) if name == "bleu" else CHRF()


def corpus_score(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """`bleu` or `chrf` of the corpus with sacrebleu's defaults, 0 to 100: n-grams are counted over all rows together,
    so it is not the mean of the rows' scores."""
    columns = list(zip_longest(*references))  # sacrebleu wants columns, None where a row has fewer references
    return float(_sacrebleu(name, of_row=False).corpus_score(list(predictions), columns).score)


# --- all metrics by name

_BY_REFERENCE: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "exact_match_normalised": exact_match_normalised,
    "token_f1": token_f1,
    "contains": contains,
    "numeric": numeric,
    "json_fields": json_fields,
}
_BY_ANSWER: dict[str, Callable[[str], float]] = {
    "json_valid": json_valid,
    "length_words": text.words,
    "repetition": text.repetition,
    "empty_rate": text.empty,
}
_CORPUS = ("bleu", "chrf")
_SPELLINGS = {"rouge_l": "rougeL", "rougel": "rougeL", "rougelsum": "rougeLsum"}
_ROUGE = re.compile(r"rouge(L|Lsum|[1-9])")
NAMES = (
    *("rouge1", "rouge2", "rougeL", "rougeLsum", "sari"),
    *_BY_REFERENCE,
    *_BY_ANSWER,
    *("format_adherence", "json_schema"),
    *_CORPUS,
)
_SMALLER_IS_BETTER = set("loss row_loss perplexity repetition empty_rate loop_rate length_words length_tokens".split())


@dataclass(frozen=True)
class Scores:
    """`means`: the value of each metric. `rows`: each row's own value, for the metrics that have one."""

    means: dict[str, float]
    rows: dict[str, list[float]] = field(default_factory=dict)

    def of_row(self, index: int) -> dict[str, float]:
        """The values of one row."""
        return {name: round(values[index], 6) for name, values in self.rows.items()}


def check_names(names: Sequence[str]) -> list[str]:
    """The names in their own spelling. Raises ConfigError with the nearest name for one that is not known."""
    problems, known = [], []
    for name in (_SPELLINGS.get(name, name.replace("normalized", "normalised")) for name in names):
        if name in NAMES or _ROUGE.fullmatch(name):
            known.append(name)
            continue
        if name.startswith("evaluate:"):
            problems.append(f"{name!r} (removed: score outputs/samples.jsonl with that library yourself)")
            continue
        close = nearest(name, NAMES, 0.4)
        problems.append(f"{name!r}" + (f" (did you mean {close}?)" if close else ""))
    if problems:
        what = f"no such metric: {', '.join(problems)}"
        raise ConfigError(what, where="eval.metrics", fix=f"choose from {', '.join(NAMES)}")
    return list(dict.fromkeys(known))


def greater_is_better(name: str) -> bool:
    """False for losses, perplexity, repetition, length and empty answers; `eval_` or `eval/` in front is ignored."""
    return re.sub(r"^eval[_/]", "", name) not in _SMALLER_IS_BETTER


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
    names, options = check_names(names), _as_lists(references)
    if not len(predictions) == len(options) or (sources is not None and len(sources) != len(options)):
        raise DataError("predictions, references and sources differ in number")
    if not predictions:
        raise DataError("there are no answers to score")
    pairs = list(zip(predictions, options, strict=True))
    rows: dict[str, list[float]] = {}
    for name in names:
        if name == "sari":
            if sources is None:
                what = "sari compares with the source text, and there is none"
                raise DataError(what, fix='add "source" to every row')
            rows[name] = [ngram.sari(source, *pair) for source, pair in zip(sources, pairs, strict=True)]
        else:
            metric = _metric(name, stemmer, json_schema, pattern)
            rows[name] = [metric(*pair) for pair in pairs]
            _warn_unsuited(name, options, stemmer)
    corpus = {name: corpus_score(name, predictions, options) for name in names if name in _CORPUS}
    return Scores(means(rows) | corpus, rows)


def _as_lists(references: References) -> list[list[str]]:
    lists = [[item] if isinstance(item, str) else list(item) for item in references]
    for index, options in enumerate(lists, start=1):
        if not options:
            raise DataError("a row has no reference answer", where=f"row {index}", fix="add one, or remove the row")
    return lists


def _metric(
    name: str, stemmer: bool, json_schema: dict[str, Any] | None, pattern: re.Pattern[str] | None
) -> Callable[[str, list[str]], float]:
    """The value of a row's answer and its references."""
    if name in _BY_REFERENCE:
        return _BY_REFERENCE[name]
    if name == "format_adherence":
        return lambda prediction, references: adherence(prediction, references, pattern)
    if name in _CORPUS:
        score = _sacrebleu(name, of_row=True).sentence_score
        return lambda prediction, references: float(score(prediction, references).score)
    if name in _BY_ANSWER or name == "json_schema":
        of_answer = _BY_ANSWER.get(name) or _satisfies(json_schema)
        return lambda prediction, _: of_answer(prediction)
    return lambda prediction, references: ngram.rouge(name, prediction, references, stemmer=stemmer)


def _warn_unsuited(name: str, references: list[list[str]], stemmer: bool) -> None:
    """Warns if most of the references hold nothing that the metric can see."""
    if name == "numeric":
        without = sum(all(number(reference) is None for reference in options) for options in references)
        if without:
            what = "numeric: %d of %d references have no number; those rows count as wrong"
            log.warning(what, without, len(references))
    elif _ROUGE.fullmatch(name):
        firsts = [options[0] for options in references]
        invisible = sum(bool(first.strip()) and not ngram.rouge_tokens(first, stemmer) for first in firsts)
        if invisible > len(references) / 2:
            what = "%s sees only the letters a-z and digits, and %d of %d references have none: use chrf"
            log.warning(what + " for this language", name, invisible, len(references))


def by_tag(
    tags: Sequence[Sequence[str]],
    scores: Scores,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    more: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, dict[str, float]]:
    """{tag: {"rows": how many, metric: its value over them}}; a row of several tags counts for each of them.

    tags: those of each row. more: rows' values besides the scores. Corpus metrics count over the tag's rows.
    """
    rows = {name: values for name, values in scores.rows.items() if name not in _CORPUS} | dict(more or {})
    result: dict[str, dict[str, float]] = {}
    for tag in sorted({tag for row_tags in tags for tag in row_tags}):
        where = [index for index, row_tags in enumerate(tags) if tag in row_tags]
        result[tag] = {"rows": len(where)} | {name: mean([values[at] for at in where]) for name, values in rows.items()}
        texts, options = [predictions[at] for at in where], [references[at] for at in where]
        result[tag] |= {name: corpus_score(name, texts, options) for name in _CORPUS if name in scores.means}
    return result


def constant_baseline(
    training_answers: Sequence[str], references: References, *, stemmer: bool = False
) -> dict[str, Any] | None:
    """{"answer", "rougeL", "exact_match"} of the best constant answer: one training answer to every question.

    The 200 most frequent training answers are tried; ROUGE-L chooses on the first 400 references and is computed on
    all. exact_match is that of the best answer in it: no constant does better in either. None without answers.
    """
    options = _as_lists(references)
    candidates = [answer for answer, _ in Counter(training_answers).most_common(200)]
    if not candidates or not options:
        return None

    def rouge_l(answer: str, targets: Sequence[Sequence[str]]) -> float:
        return mean([ngram.rouge("rougeL", answer, target, stemmer=stemmer) for target in targets])

    best = max(candidates, key=lambda answer: rouge_l(answer, options[:400]))
    exact = max(mean([exact_match(answer, target) for target in options]) for answer in candidates)
    return {"answer": best, "rougeL": rouge_l(best, options), "exact_match": exact}
