"""Answers that must be JSON: do they parse, do they satisfy a schema, are their fields right."""

from __future__ import annotations

import difflib
import json
import logging
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

from sft.errors import ConfigError, DataError, EnvironmentProblem
from sft.metrics import ngram, text
from sft.metrics.text import mean

_BROKEN = object()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def parse(text: str) -> Any:
    """The JSON value that the whole text is, or a marker for which `broken` is true.

    Stricter than Python's reader: NaN, Infinity and duplicate keys are faults, and so is a Markdown fence around it.
    """
    try:
        return json.loads(text.strip(), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError):
        return _BROKEN


def broken(value: Any) -> bool:
    """True for what `parse` gives when a text is not JSON."""
    return value is _BROKEN


def json_valid(prediction: str) -> float:
    """1 when the answer is one JSON value and nothing else."""
    return float(not broken(parse(prediction)))


def load(path: Path) -> dict[str, Any]:
    """A JSON-schema file. Raises ConfigError when it is missing, not JSON or not a schema."""
    from jsonschema import exceptions, validators

    fix = "fix the file, or set eval.json_schema to another (null for none)"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the JSON schema cannot be read: {error}", where=str(path), fix=fix) from None
    schema = parse(text)
    if not isinstance(schema, dict):
        raise ConfigError("eval.json_schema is not a file with one JSON object", where=str(path), fix=fix)
    try:
        validators.validator_for(schema).check_schema(schema)
    except exceptions.SchemaError as error:
        raise ConfigError(f"not a JSON schema: {error.message}", where=str(path), fix=fix) from None
    return schema


class Validator:
    """A schema ready to check answers; references to other files are never fetched."""

    def __init__(self, schema: dict[str, Any]) -> None:
        from jsonschema import validators
        from referencing import Registry

        self._validator = validators.validator_for(schema)(schema, registry=Registry())

    def __call__(self, prediction: str) -> float:
        """1 when the answer is JSON and satisfies the schema."""
        value = parse(prediction)
        return float(not broken(value) and bool(self._validator.is_valid(value)))


def same(first: Any, second: Any) -> bool:
    """JSON equality: 1 is 1.0, but true is not 1, and the order of an object's keys does not matter."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def fields(prediction: str, reference: str) -> dict[str, bool]:
    """For each field of the reference object: does the answer have it with the same value. Empty if it is no object."""
    wanted, found = parse(reference), parse(prediction)
    if not isinstance(wanted, dict):
        return {}
    had = found if isinstance(found, dict) else {}
    return {key: key in had and same(value, had[key]) for key, value in wanted.items()}


def json_fields(prediction: str, references: Sequence[str]) -> float:
    """The share of the reference's fields that the answer has right; 1 or 0 where the reference is no object."""
    return max(_share_right(prediction, reference) for reference in references)


def _share_right(prediction: str, reference: str) -> float:
    right = fields(prediction, reference)
    if right:
        return sum(right.values()) / len(right)
    wanted, found = parse(reference), parse(prediction)
    return float(not broken(wanted) and not broken(found) and same(wanted, found))


def by_field(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The share of rows that have each field right, over the rows whose (first) reference has that field."""
    right: dict[str, list[bool]] = {}
    for prediction, options in zip(predictions, references, strict=True):
        for key, value in fields(prediction, options[0]).items():
            right.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in right.items()}


_ITEM = re.compile(r"\s*(?:[-*+•]|\d+[.)])\s+\S")
_NUMBER = re.compile(r"[-+]?[$€£]?\d[\d.,]*%?")


def form(text: str) -> str:
    """The form of a text: nothing, json, number, code (fenced), list, table, N fields (a line parted by `|`), line or
    lines."""
    text = text.strip()
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return "nothing"
    if text[0] in "{[" and not broken(parse(text)):
        return "json"
    if _NUMBER.fullmatch(text):
        return "number"
    if text.startswith("```"):
        return "code"
    if len(lines) > 1 and all(_ITEM.match(line) for line in lines):
        return "list"
    if len(lines) > 1 and all(line.lstrip().startswith("|") for line in lines):
        return "table"
    if len(lines) == 1 and "|" in text:
        return f"{text.count('|') + 1} fields"
    return "line" if len(lines) == 1 else "lines"


def adherence(prediction: str, references: Sequence[str], pattern: re.Pattern[str] | None) -> float:
    """1 when the whole answer matches the pattern; without one, when its form is that of a reference."""
    if pattern is not None:
        return float(pattern.fullmatch(prediction.strip()) is not None)
    return float(form(prediction) in {form(reference) for reference in references})


def compiled(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern of `eval.format`, in which a dot is any letter, line breaks too. Raises ConfigError."""
    try:
        return None if pattern is None else re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"not a regular expression: {error}", where="eval.format", fix="fix it, or set it to null"
        ) from None


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER_IN_ANSWER = re.compile(
    r"(?:(?<!\w)-)?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}\b)?"
)  # 10-12 has no sign
_MARKED = re.compile(rf"####\W*?({_NUMBER_IN_ANSWER.pattern})")
_NO_DIGITS = str.maketrans("", "", ",$€£")


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer is a reference, letter by letter."""
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
    found = normalise(prediction).split()
    return max(_token_f1(found, normalise(reference).split()) for reference in references)


def _token_f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def contains(prediction: str, references: Sequence[str]) -> float:
    """1 when a reference stands somewhere in the answer, upper and lower case alike."""
    text = prediction.strip().casefold()
    wanted = [reference.strip().casefold() for reference in references]
    return float(any(reference in text if reference else not text for reference in wanted))


def number(text: str) -> Decimal | None:
    """The answer's number: the one after `####` as GSM8K writes it, else the last one in the text; None without one.

    Commas in it and $, € or £ before it do not count; units behind it are no part of it; 1e3 is 1000.
    """
    text = text.replace("\u2212", "-")
    marked = _MARKED.search(text)
    found = [marked.group(1)] if marked else _NUMBER_IN_ANSWER.findall(text)
    return Decimal(found[-1].translate(_NO_DIGITS)) if found else None


def numeric(prediction: str, references: Sequence[str]) -> float:
    """1 when the answer's number is the reference's (`1,000` is `1000.0`); 0 when the reference has none."""
    found = number(prediction)
    return float(found is not None and any(number(reference) == found for reference in references))


DOOR = "evaluate:"


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Row-wise references as sacrebleu's columns; None where a row has fewer."""
    most = max((len(options) for options in references), default=0)
    return [[options[i] if i < len(options) else None for options in references] for i in range(most)]


def _sacrebleu(name: str, **options: bool) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU(**options) if name == "bleu" else CHRF()


def corpus_score(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """`bleu` or `chrf` of the corpus with sacrebleu's defaults, 0 to 100.

    It is not the mean of the sentences' scores: its n-grams are counted over all rows together.
    """
    return float(_sacrebleu(name).corpus_score(list(predictions), _streams(references)).score)


def sentence_scores(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Each row's own `bleu` (of the orders that it is long enough for) or `chrf`, 0 to 100."""
    single = _sacrebleu(name, effective_order=True)
    pairs = zip(predictions, references, strict=True)
    return [float(single.sentence_score(prediction, list(options)).score) for prediction, options in pairs]


def evaluate_score(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None
) -> tuple[float, list[float] | None]:
    """The metric that `evaluate.load(NAME)` gives, for a name `evaluate:NAME`; its scale is its own.

    A result of many values is read at the metric's own name, else at `f1`, else at its first number; a list counts by
    its mean. Raises EnvironmentProblem when the library is missing or the metric cannot be loaded (most come from the
    hub), ConfigError when it cannot score plain texts.
    """
    wanted = name.removeprefix(DOOR)
    try:
        import evaluate
    except ImportError:
        raise EnvironmentProblem(
            f"the metric {name} needs the library `evaluate`", fix="pip install evaluate, or take it out: eval.metrics"
        ) from None
    try:
        metric = evaluate.load(wanted)
    except Exception as error:  # whatever the hub, a script or a missing library raises
        said = " ".join(str(error).split())[:300]
        raise EnvironmentProblem(
            f"evaluate cannot load {wanted}: {said}",
            fix="check its name and the network, or take it out: eval.metrics",
        ) from None
    given: dict[str, Any] = {"predictions": list(predictions), "references": [list(options) for options in references]}
    if "sources" in getattr(metric, "features", {}):
        given["sources"] = list(sources or [])
    if wanted.endswith("bertscore"):
        given["lang"] = "en"
    return _read_result(wanted, _compute(name, metric, given))


def _compute(name: str, metric: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Tries lists of references first, then plain ones where every row has one: metrics differ in what they take."""
    tries = [given]
    if all(len(options) == 1 for options in given["references"]):
        tries.append({**given, "references": [options[0] for options in given["references"]]})
    said = ""
    for arguments in reversed(tries):
        try:
            return dict(metric.compute(**arguments))
        except Exception as error:
            said = " ".join(str(error).split())[:300]
    raise ConfigError(f"{name} cannot score these answers: {said}", fix="take it out of eval.metrics")


def _read_result(wanted: str, result: dict[str, Any]) -> tuple[float, list[float] | None]:
    short = wanted.rsplit("/", 1)[-1].removesuffix(".py")
    for key in [short, "f1", "score", *result]:
        value = result.get(key)
        if isinstance(value, Real):
            return float(value), None
        if isinstance(value, list) and value and all(isinstance(item, Real) for item in value):
            rows = [float(item) for item in value]
            return sum(rows) / len(rows), rows
    raise ConfigError(f"evaluate:{wanted} gave no number, only {sorted(result)}", fix="take it out of eval.metrics")


log = logging.getLogger("sft.metrics")

References = Sequence[str | Sequence[str]]

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
        if name in NAMES or _ROUGE.fullmatch(name) or (name.startswith(DOOR) and name != DOOR):
            known.append(name)
            continue
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        problems.append(f"{given!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    if problems:
        raise ConfigError(
            f"no such metric: {', '.join(problems)}",
            where="eval.metrics",
            fix=f"choose from {', '.join(NAMES)}, or evaluate:NAME",
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
            raise DataError("a row has no reference answer", where=f"row {index}", fix="give it one, or take it out")
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
            means[name] = corpus_score(name, predictions, wanted)
            rows[name] = sentence_scores(name, predictions, wanted)
        elif name.startswith(DOOR):
            means[name], values = evaluate_score(name, predictions, wanted, sources)
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
            name: corpus_score(name, [predictions[at] for at in where], [references[at] for at in where])
            for name in corpus
        }
        for tag, where in text.places(tagged).items()
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
        if name == "numeric" and (bare := sum(all(number(r) is None for r in refs) for _, refs in pairs)):
            log.warning("numeric: %d of %d references have no number; those rows count as wrong", bare, len(pairs))
        return [_BY_REFERENCE[name](prediction, refs) for prediction, refs in pairs]
    if name in _BY_ANSWER:
        return [_BY_ANSWER[name](prediction) for prediction in predictions]
    if name == "format_adherence":
        return [adherence(prediction, refs, pattern) for prediction, refs in pairs]
    if name == "json_schema":
        if json_schema is None:
            raise ConfigError("the metric json_schema has no schema", fix="set eval.json_schema to its file")
        validator = Validator(json_schema)
        return [validator(prediction) for prediction in predictions]
    if name == "sari":
        if sources is None:
            raise DataError("sari compares with the source text, and there is none", fix='add "source" to every row')
        return [ngram.sari(source, *pair) for source, pair in zip(sources, pairs, strict=True)]
    _warn_of_other_scripts(name, references, stemmer)
    return [ngram.rouge(name, prediction, refs, stemmer=stemmer) for prediction, refs in pairs]


def _warn_of_other_scripts(name: str, references: list[list[str]], stemmer: bool) -> None:
    blind = sum(not ngram.tokens(refs[0], stemmer) and bool(refs[0].strip()) for refs in references)
    if blind > len(references) / 2:
        log.warning(
            "%s sees only the letters a-z and digits, and %d of %d references have none: take chrf for this language",
            name,
            blind,
            len(references),
        )


CANDIDATES = 200
SAMPLE = 400


@dataclass(frozen=True)
class Constant:
    """The training answer that scores best in ROUGE-L, its scores, and the best exact match of any one answer."""

    answer: str
    scores: dict[str, float]


def _candidates(answers: Sequence[str], most: int, seed: int) -> list[str]:
    """Half the most frequent answers, half a seeded draw from the rest."""
    counted = [answer for answer, _ in Counter(answers).most_common()]
    if len(counted) <= most:
        return counted
    rest = counted[most // 2 :]
    return counted[: most // 2] + random.Random(seed).sample(rest, most - most // 2)


def best_constant(
    training_answers: Sequence[str],
    references: References,
    *,
    stemmer: bool = False,
    most: int = CANDIDATES,
    seed: int = 0,
) -> Constant | None:
    """Tries up to `most` training answers against the references (chosen on at most 400 of them, scored on all).

    `scores` has rougeL of the answer that is best in it, and exact_match of the answer that is best in that: no one
    answer can do better in either. None when there is nothing to choose from.
    """
    wanted = as_lists(references)
    candidates = _candidates(training_answers, most, seed)
    if not candidates or not wanted:
        return None
    sample = wanted if len(wanted) <= SAMPLE else random.Random(seed).sample(wanted, SAMPLE)
    by_rouge = [
        mean([ngram.rouge("rougeL", answer, refs, stemmer=stemmer) for refs in sample]) for answer in candidates
    ]
    answer = candidates[by_rouge.index(max(by_rouge))]
    exact = max(mean([exact_match(candidate, refs) for refs in wanted]) for candidate in candidates)
    rouge_l = score(["rougeL"], [answer] * len(wanted), wanted, stemmer=stemmer)["rougeL"]
    return Constant(answer, {"rougeL": rouge_l, "exact_match": exact})
