"""A few held-out rows as a model sees them: the run's own validation rows, else rows that are shipped with the kit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import runs
from sft.chat.encode import Encoded, Encoder
from sft.config import load
from sft.config.schema import Config
from sft.data import store
from sft.errors import DataError, ModelError, RunError, TemplateError
from sft.model import files as model_files
from sft.model.files import ModelFiles
from sft.ship.delta import BLOCK, home

if TYPE_CHECKING:
    import torch
if TYPE_CHECKING:
    from sft.generation.evaluate import Prompt, Question


log = logging.getLogger("sft.ship")
ROOM = 1 << 27  # bytes of float32 logits that a sample may have
ROWS = 64
_SHIPPED = "data/samples/support_desk.jsonl"
Row = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Encoded rows. source: the file that they came from. of: the rows in it. kind: causal or seq2seq."""

    source: str
    rows: list[Encoded]
    of: int
    kind: str = "causal"

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row for which there are logits."""
        return [len(row.labels) for row in self.rows]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def batch(self, config: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The model's inputs, padded at the right (which changes nothing to the left of it in a causal model)."""
        if self.kind == "causal":
            ids = [row.input_ids for row in self.rows]
            return {"input_ids": _padded(ids, 0), "attention_mask": _padded([[1] * len(row) for row in ids], 0)}
        start = int(config.get("decoder_start_token_id") or config.get("pad_token_id") or 0)
        source = [row.input_ids for row in self.rows]
        target = [[start, *(max(token, 0) for token in row.labels[:-1])] for row in self.rows]
        mask = _padded([[1] * len(row) for row in source], 0)
        return {"input_ids": _padded(source, 0), "attention_mask": mask, "decoder_input_ids": _padded(target, 0)}

    def loss(self, logits: list[torch.Tensor]) -> float:
        """Mean loss on the labelled tokens, nats; logits [tokens, vocabulary] of each row."""
        import torch

        total, count = 0.0, 0
        for row, found in zip(self.rows, logits, strict=True):
            wanted = torch.tensor(row.labels[self.kind == "causal" :])
            lost = torch.nn.functional.cross_entropy(found[: len(wanted)], wanted, ignore_index=-100, reduction="sum")
            total, count = total + float(lost), count + int((wanted != -100).sum())
        return total / max(1, count)


def take(encoder: Encoder, config: Config, root: Path, vocabulary: int) -> Sample:
    """At most ROWS rows with logits in ROOM bytes: from the run's validation file, else from the shipped samples.

    vocabulary: rows of the head. Rows past their room lose their beginning.
    """
    room = max(8, ROOM // (4 * vocabulary))
    for source, rows in _sources(config, root):
        encoded = [row for row in encoder.encode_batch(rows[:ROWS]) if row.dropped is None]
        encoded = sorted((_shortened(row, room, encoder.kind) for row in encoded), key=lambda row: len(row.labels))
        longest = 0
        for count in range(len(encoded), 0, -1):
            longest = len(encoded[count - 1].labels)
            if longest * count <= room:
                return Sample(source, encoded[:count], len(rows), encoder.kind)
    raise DataError("no held-out row fits the model's template", where=_SHIPPED, fix="make process, then try again")


def run_rows(config: Config, root: Path) -> tuple[str, list[Row]] | None:
    """The run's validation file and its rows, else those of its training file; None where its data is gone.

    A file outside the project is named without its folder, since what is exported may be pushed.
    """
    try:
        stage = store.paths(config.data, root)
        for path in (stage.val, stage.train):
            if path is not None and (rows := store.read_rows(path)):
                shown = load.display_path(path, root)
                return path.name if Path(shown).is_absolute() else shown, rows
    except DataError as error:
        log.warning(f"the run's own rows are not there: {error.what}")
    return None


def shipped_rows(root: Path, limit: int | None = ROWS) -> list[Row]:
    """Rows of the sample that comes with the kit; None: all."""
    path = load.shipped(root, _SHIPPED)
    lines = path.read_text(encoding="utf-8").splitlines()[:limit] if path.is_file() else []
    return [json.loads(line) for line in lines]


def _sources(config: Config, root: Path) -> list[tuple[str, list[Row]]]:
    own = run_rows(config, root)
    return [*([own] if own else []), (_SHIPPED, shipped_rows(root, None))]


def _shortened(row: Encoded, room: int, kind: str) -> Encoded:
    if len(row.labels) <= room:
        return row
    if kind == "seq2seq":
        return Encoded(row.id, row.input_ids, row.labels[:room])
    return Encoded(row.id, row.input_ids[-room:], row.labels[-room:])


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    import torch

    longest = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


class Weights:
    """The tensors in a model's files, by the names that the model's parameters have. Each read opens the file anew."""

    def __init__(self, files: ModelFiles, model: Any) -> None:
        self.shapes: dict[str, list[int]] = {}
        where: dict[str, Path] = {}
        for path in files.weights:
            for name, entry in model_files.tensors(path).items():
                where[name], self.shapes[name] = path, entry["shape"]
        self.where: dict[str, tuple[Path, str]] = {}
        shared: dict[int, list[str]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            shared.setdefault(id(weight), []).append(name)
        for names in shared.values():
            found = next((hit for name in names if (hit := home(name, set(where)))), None)
            if found is None:
                raise ModelError(f"{files.name} has no tensor for {names[0]}", where=str(files.path))
            self.where.update(dict.fromkeys(names, (where[found], found)))

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or some of its rows, in float32."""
        from safetensors import safe_open

        path, key = self.where[name]
        with safe_open(path, "pt") as opened:
            found: torch.Tensor = opened.get_tensor(key) if rows is None else opened.get_slice(key)[rows]
            return found.float() if found.is_floating_point() else found.clone()


def open_model(files: ModelFiles, config: dict[str, Any], *, trust_remote_code: bool, adapter: Path | None) -> Any:
    """The model in eval mode, with peft's adapter on it where one is named.

    config: what differs from the model's config.json (a vocabulary that the adapter has made larger). Raises ModelError
    where the files do not hold a parameter under its name.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    settings = AutoConfig.from_pretrained(files.path, local_files_only=True, trust_remote_code=trust_remote_code)
    settings.update(config)
    maker = AutoModelForSeq2SeqLM if files.kind == "seq2seq" else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model: Any = maker.from_config(settings, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    model.config.use_cache = False
    weights = Weights(files, model)
    named = {module: name for name, module in model.named_modules()}
    hollow = _hollow(model)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(
            model, str(adapter), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=True
        )
    _attend(model, named, weights, hollow)
    return model.eval()


def _hollow(model: Any) -> dict[int, Any]:
    """Turns weights of the meta device into ones of the CPU that have a shape and no memory; returns them by their id.

    peft puts an adapter where its base layer is, and nothing can be computed on the meta device.
    """
    import torch
    from torch import nn

    made: dict[int, Any] = {}
    for module in model.modules():
        for key, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                empty = nn.Parameter(torch.zeros(1).expand(weight.shape), requires_grad=False)
                module._parameters[key] = made.setdefault(id(weight), empty)
    return {id(weight): weight for weight in made.values()}


def _attend(model: Any, named: dict[Any, str], weights: Weights, hollow: dict[int, Any]) -> None:
    """Gives every module that has weights on the disk the means to read them for the time of its forward."""
    from torch import nn

    units: dict[Any, list[tuple[Any, str, str]]] = {}
    for module in model.modules():
        own = {key: weight for key, weight in module._parameters.items() if id(weight) in hollow}
        if not own or module not in named:
            continue
        places = [(module, key, f"{named[module]}.{key}".lstrip(".")) for key in own]
        unit = next((outer for outer in model.modules() if _needs_base(outer, module)), module)
        units.setdefault(unit, []).extend(places)
    for unit, places in units.items():
        plain = type(unit) is nn.Linear
        unit.__dict__["forward"] = (_linear if plain else _loaded)(unit, places, weights)


def _needs_base(outer: Any, module: Any) -> bool:
    """Whether `outer` is an adapter that looks at the weights of its base layer `module` (DoRA)."""
    return bool(getattr(outer, "lora_magnitude_vector", None)) and getattr(outer, "base_layer", None) is module


def _loaded(unit: Any, places: list[tuple[Any, str, str]], weights: Weights) -> Any:
    forward = unit.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _held(places, weights):
            return forward(*args, **kwargs)

    return run


@contextmanager
def _held(places: list[tuple[Any, str, str]], weights: Weights) -> Iterator[None]:
    from torch import nn

    kept = [(module, key, module._parameters[key]) for module, key, _ in places]
    try:
        for module, key, name in places:
            module._parameters[key] = nn.Parameter(weights.read(name), requires_grad=False)
        yield
    finally:
        for module, key, empty in kept:
            module._parameters[key] = empty


def _linear(layer: Any, places: list[tuple[Any, str, str]], weights: Weights) -> Any:
    """A linear layer's forward, some rows of its weight at a time: a head may be as large as ten layers."""
    import torch

    names = {key: name for _, key, name in places}

    def run(x: torch.Tensor) -> torch.Tensor:
        step = max(1, BLOCK // layer.in_features)
        parts = [
            torch.nn.functional.linear(x, weights.read(names["weight"], slice(at, at + step)))
            for at in range(0, layer.out_features, step)
        ]
        found = torch.cat(parts, dim=-1)
        bias = weights.read(names["bias"]) if "bias" in names else layer.bias  # a trained one came with the adapter
        return found if bias is None else found + bias

    return run


TOLERANCE = 1e-3  # of float32 logits, of their largest
KL_LIMIT = 0.05  # nats a token, of 16-bit weights, whose rounding alone costs about 1e-4
LOSS_LIMIT = 0.02  # nats a token that the held-out loss may rise


@dataclass(frozen=True)
class Agreement:
    """Adapter against merged, on `tokens` tokens of `rows` of the `of` held-out rows in `source`.

    loss_*: nats a labelled token. top1: share of equal first choices. kl: mean, nats a token. largest: difference of
    logits.
    """

    source: str
    rows: int
    of: int
    tokens: int
    loss_adapter: float
    loss_merged: float
    top1: float
    kl: float
    largest: float


def compare(
    files: ModelFiles, merged: ModelFiles, config: Config, adapter: Path, dtype: str, sample: Sample
) -> Agreement:
    """Runs both over the sample. Raises ModelError where they differ by more than rounding does."""
    rows = {key: merged.config[key] for key in ("vocab_size",) if key in merged.config}
    before = logits(files, rows, config, adapter, sample)
    after = logits(merged, {}, config, None, sample)
    largest, kl, top1 = difference(before, after)
    found = Agreement(
        sample.source,
        len(sample.rows),
        sample.of,
        sample.tokens,
        sample.loss(before),
        sample.loss(after),
        top1,
        kl,
        largest,
    )
    log.info(
        f"adapter against merged, {found.tokens} held-out tokens: loss {found.loss_adapter:.4f} and"
        f" {found.loss_merged:.4f}, same first choice in {top1:.2%}, KL {kl:.2g}"
    )
    scale = max(1.0, float(max(part.abs().max() for part in before)))
    if (largest > TOLERANCE * scale) if dtype == "fp32" else (kl > KL_LIMIT):
        raise ModelError(
            f"the merged model is not the trained one: logits differ by up to {largest:.3g}, KL {kl:.3g}",
            where=str(adapter),
            fix="nothing was written; if fp16 or bf16 was asked for, try --dtype fp32, else report this",
        )
    if found.loss_merged > found.loss_adapter + LOSS_LIMIT:
        raise ModelError(
            f"the merge harms: the held-out loss rises from {found.loss_adapter:.4f} to {found.loss_merged:.4f}",
            where=sample.source,
            fix="nothing was written; try --dtype fp32",
        )
    return found


def logits(
    files: ModelFiles, settings: dict[str, Any], config: Config, adapter: Path | None, sample: Sample
) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each row, float32."""
    import torch

    model = open_model(files, settings, trust_remote_code=config.model.trust_remote_code, adapter=adapter)
    with torch.no_grad():
        found: torch.Tensor = model(**sample.batch(files.config)).logits

    return [found[index, :length] for index, length in enumerate(sample.lengths)]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> tuple[float, float, float]:
    """Largest absolute difference, mean KL(one || other) a token in nats, share of equal first choices."""
    largest = total = same = 0.0
    count = 0
    for first, second in zip(one, other, strict=True):
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
        same += float((first.argmax(-1) == second.argmax(-1)).sum())
        largest = max(largest, float((first - second).abs().max()))
        count += first.shape[0]
    return largest, max(0.0, total / count), same / count


GREETING = "Hello! What can you do?"
_SHOWN = 600  # letters of a question or an answer
_LOOKED_AT = 64  # newest tokens of the prompt whose logits must be finite


@dataclass(frozen=True)
class Trial:
    """One answer. source: where the question is from. reference: what should be answered, where that is known.

    stopped: it ended by itself. tokens: tokens made, its end included. device: where the model was loaded: the GPU, or
    the CPU where its 16-bit weights do not fit the GPU's free memory.
    """

    question: str
    source: str
    reference: str | None
    text: str
    stopped: bool
    tokens: int
    device: str

    def told(self) -> str:
        """Question, reference and answer for people, long ones cut."""
        lines = [f"question ({self.source}): {_cut(self.question)}"]
        if self.reference is not None:
            lines.append(f"reference: {_cut(self.reference)}")
        ended = "stopped by itself" if self.stopped else "cut off at the limit"
        return "\n".join(
            [*lines, f"answer: {_cut(self.text)}", f"{self.tokens} tokens, {ended}; logits finite; on {self.device}"]
        )


def answer(folder: Path, question: str | None, root: Path) -> Trial:
    """The model's greedy answer to `question` as a single user turn; None: to the first held-out row of its run, or to
    a greeting where there is none. Raises ModelError (no model, logits not finite).
    """
    import torch

    from sft.generation.engine import generate
    from sft.generation.load import open_model
    from sft.model.files import read_config

    if not folder.is_dir():
        raise ModelError(f"there is no merged model in {folder}", where=str(folder), fix="make merge")
    run = _config(folder)
    config = run or Config()
    stored = read_config(folder, str(folder)).get("dtype", "float32")
    dtype: torch.dtype = getattr(torch, str(stored))
    served = open_model(config, merged=folder, root=root, dtype=dtype, low_memory="cpu")
    own: tuple[str, Question] | None = None
    if run and question is None:
        own = _held_out(lambda row: served.prompt(row, config.generation), run, root)
    reference: str | None = None
    if own is not None:
        source, asked = own
        ids, text, reference = asked.ids, asked.source, asked.reference
    else:
        source = "as asked" if question is not None else "a greeting, for no held-out row of its run is here"
        text = GREETING if question is None else question
        ids = served.prompt([{"role": "user", "content": text}], config.generation)[0]
    _refuse_infinite(served.model, ids, served.kind, served.device)
    found = generate(
        served.model, served.tokenizer, [ids], config.generation, served.encoder.stops, batch_size=1, kind=served.kind
    )[0]
    return Trial(text, source, reference, found.text, found.stopped, found.tokens, served.device)


def _held_out(prompt: Prompt, config: Config, root: Path) -> tuple[str, Question] | None:
    """The run's first row that asks something, and the file it is from; None where the run's rows are gone.

    Rows that the template refuses are passed over, as in training.
    """
    from sft.generation.evaluate import answerable, questions

    plain = config.model_copy(update={"eval": config.eval.model_copy(update={"shots": 0, "turns": "last"})})
    source, rows = run_rows(config, root) or ("", [])
    for row in filter(answerable, rows[:ROWS]):
        with suppress(TemplateError):
            return f"from {source}", questions(prompt, [row], plain, root)[0]
    return None


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _refuse_infinite(model: Any, ids: list[int], kind: str, device: str) -> None:
    import torch

    given = torch.tensor([ids[-_LOOKED_AT:]], device=device)
    extra = {"decoder_input_ids": given[:, :1]} if kind == "seq2seq" else {}
    with torch.no_grad():
        logits = model(input_ids=given, **extra).logits
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the merged model's logits are not finite", fix="merge again with --dtype bf16 or fp32")


def _config(folder: Path) -> Config | None:
    try:
        return runs.run_of_adapter(folder)
    except RunError:
        return None
