"""Metrics that other libraries compute: BLEU and chrF (sacrebleu), and any other by name through `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

from sft.errors import ConfigError, EnvironmentProblem

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
            f"the metric {name} needs the library `evaluate`", mend="pip install evaluate, or take it out: eval.metrics"
        ) from None
    try:
        metric = evaluate.load(wanted)
    except Exception as error:  # whatever the hub, a script or a missing library raises
        said = " ".join(str(error).split())[:300]
        raise EnvironmentProblem(
            f"evaluate cannot load {wanted}: {said}",
            mend="check its name and the network, or take it out: eval.metrics",
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
    raise ConfigError(f"{name} cannot score these answers: {said}", mend="take it out of eval.metrics")


def _read_result(wanted: str, result: dict[str, Any]) -> tuple[float, list[float] | None]:
    short = wanted.rsplit("/", 1)[-1].removesuffix(".py")
    for key in [short, "f1", "score", *result]:
        value = result.get(key)
        if isinstance(value, Real):
            return float(value), None
        if isinstance(value, list) and value and all(isinstance(item, Real) for item in value):
            rows = [float(item) for item in value]
            return sum(rows) / len(rows), rows
    raise ConfigError(f"evaluate:{wanted} gave no number, only {sorted(result)}", mend="take it out of eval.metrics")
