"""Checks a merged model: its logits against those of the adapter on its base, and a question answered end to end.

The comparison reads each layer's weights from the disk for the time of its forward, so a model of any size is compared
in the memory of one layer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from sft import runs
from sft.chat.encode import Encoded, Encoder
from sft.config import load
from sft.config.schema import Config
from sft.data import rows as records
from sft.data import store
from sft.errors import DataError, ModelError, RunError, TemplateError
from sft.generation.encoder import load_encoder
from sft.generation.evaluate import answerable
from sft.generation.load import open_model
from sft.model.files import ModelFiles, read_config, tensors
from sft.ship.lora_delta import BLOCK, find_name

log = logging.getLogger("sft.ship")
Row = dict[str, Any]
HELD_OUT_ROWS = 64
LOGIT_BYTES = 1 << 27  # of one model's float32 logits over the held-out sample
FP32_TOLERANCE = 1e-3  # largest difference of float32 logits, relative to the largest logit
KL_LIMIT = 0.05  # nats per token; rounding to 16 bits costs about 1e-4
LOSS_LIMIT = 0.02  # nats per token by which the merged model's held-out loss may be higher
GREETING = "Hello! What can you do?"
_SHIPPED = "data/samples/support_desk.jsonl"
_SHOWN = 600  # characters of a question or an answer
FIRST_ROWS = 100_000  # of the run's own that some are chosen from
_CHECKED_TOKENS = 64  # newest tokens of the prompt whose logits must be finite


# --- held-out rows


@dataclass(frozen=True)
class Sample:
    """Encoded held-out rows. source: the file they come from. rows_in_source: its rows. kind: causal or seq2seq."""

    source: str
    rows: list[Encoded]
    rows_in_source: int
    kind: str

    def logits(self, model: Any) -> list[Tensor]:
        """The model's logits [tokens, vocabulary] for each row; the batch is padded on the right, which a causal
        model's earlier positions never see.
        """

        def padded(rows: list[list[int]]) -> Tensor:
            return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

        ids = [row.input_ids for row in self.rows]
        inputs = {"input_ids": padded(ids), "attention_mask": padded([[1] * len(row) for row in ids])}
        if self.kind == "seq2seq":
            start = int(model.config.decoder_start_token_id or model.config.pad_token_id or 0)
            shifted = [[start, *(max(token, 0) for token in row.labels[:-1])] for row in self.rows]
            inputs["decoder_input_ids"] = padded(shifted)
        with torch.no_grad():
            logits: Tensor = model(**inputs).logits
        return [logits[index, : len(row.labels)] for index, row in enumerate(self.rows)]

    def loss(self, logits: list[Tensor]) -> float:
        """Mean cross-entropy of the labelled tokens in nats; logits [tokens, vocabulary] of each row."""
        total, count = 0.0, 0
        for row, row_logits in zip(self.rows, logits, strict=True):
            labels = torch.tensor(row.labels[1:] if self.kind == "causal" else row.labels)
            used = row_logits[: len(labels)]
            total += float(torch.nn.functional.cross_entropy(used, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
        return total / max(1, count)


def held_out_sample(encoder: Encoder, config: Config, root: Path, vocabulary: int) -> Sample:
    """Up to HELD_OUT_ROWS rows of the run's validation file, else of the shipped sample, with logits in LOGIT_BYTES.

    vocabulary: width of the logits. A row that is too long loses its beginning (seq2seq: its end). Raises DataError
    if no row fits.
    """
    most_tokens = max(8, LOGIT_BYTES // (4 * vocabulary))
    own = run_rows(config, root)
    for source, rows in [*([own] if own else []), (_SHIPPED, shipped_rows(root, None))]:
        encoded = [row for row in encoder.encode_batch(rows[:HELD_OUT_ROWS]) if row.dropped is None]
        for row in encoded:
            if encoder.kind == "seq2seq":
                row.labels = row.labels[:most_tokens]
            else:
                row.input_ids, row.labels = row.input_ids[-most_tokens:], row.labels[-most_tokens:]
        encoded.sort(key=lambda row: len(row.labels))
        for count in range(len(encoded), 0, -1):
            if len(encoded[count - 1].labels) * count <= most_tokens:
                return Sample(source, encoded[:count], len(rows), encoder.kind)
    raise DataError("no held-out row fits the model's template", where=_SHIPPED, fix="make process, then try again")


def run_rows(config: Config, root: Path) -> tuple[str, list[Row]] | None:
    """The run's validation file and its rows, else those of its training file; None if its data is gone.

    A file outside the project is named without its folder, since what is exported may be published.
    """
    try:
        stage = store.resolve_stage(config.data, root)
        for path in (stage.val, stage.train):
            if path is not None and (rows := list(islice(store.iter_rows(path), FIRST_ROWS))):
                shown = load.display_path(path, root)
                return path.name if Path(shown).is_absolute() else shown, rows
    except DataError as error:
        log.warning(f"the run's own rows cannot be read: {error.what}")
    return None


def shipped_rows(root: Path, limit: int | None = HELD_OUT_ROWS) -> list[Row]:
    """Rows of the sample that comes with the kit; None: all."""
    path = load.shipped(root, _SHIPPED)
    lines = path.read_text(encoding="utf-8").splitlines()[:limit] if path.is_file() else []
    return [json.loads(line) for line in lines]


# --- adapter on its base against merged model


@dataclass(frozen=True)
class Comparison:
    """Adapter on its full-precision base against the merged model, on `held_out_rows` of the `held_out_of` rows of the
    file `held_out`. loss_*: nats per labelled token. mean_kl: KL(adapter || merged), nats per token. top1_agreement:
    share of tokens with the same most likely next token.
    """

    held_out: str
    held_out_rows: int
    held_out_of: int
    held_out_tokens: int
    loss_adapter: float
    loss_merged: float
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float


def verify_merge(files: ModelFiles, folder: Path, config: Config, adapter: Path, dtype: str, root: Path) -> Comparison:
    """Compares the adapter on the base `files` with the merged weights in `folder`, on held-out rows.

    Raises ModelError if they differ by more than rounding, or the held-out loss rises by more than LOSS_LIMIT.
    """
    trusted = config.model.trust_remote_code
    merged = ModelFiles(folder, str(folder), None, read_config(folder, str(folder)), files.kind)
    encoder = load_encoder(config, root, files=merged)
    sample = held_out_sample(encoder, config, root, int(merged.config.get("vocab_size", 1 << 17)))
    before = sample.logits(open_streamed(files, trust_remote_code=trusted, adapter=adapter))
    after = sample.logits(open_streamed(merged, trust_remote_code=trusted))
    tokens = sum(len(row.labels) for row in sample.rows)
    compared = Comparison(
        sample.source, len(sample.rows), sample.rows_in_source, tokens,
        sample.loss(before), sample.loss(after), *difference(before, after),
    )  # fmt: skip
    log.info(
        f"adapter against merged, {tokens} held-out tokens: loss {compared.loss_adapter:.4f} and"
        f" {compared.loss_merged:.4f}, same most likely token {compared.top1_agreement:.2%}, KL {compared.mean_kl:.2g}"
    )
    largest_logit = max(1.0, *(float(part.abs().max()) for part in before))
    differs = compared.max_logit_difference > FP32_TOLERANCE * largest_logit
    if differs if dtype == "fp32" else not compared.mean_kl <= KL_LIMIT:
        raise ModelError(
            f"the merged model differs from the trained one: logits by up to {compared.max_logit_difference:.3g},"
            f" KL {compared.mean_kl:.3g}",
            where=str(adapter),
            fix="nothing was written; with fp16 or bf16 try --dtype fp32, else report this",
        )
    if compared.loss_merged > compared.loss_adapter + LOSS_LIMIT:
        what = f"merging raises the held-out loss from {compared.loss_adapter:.4f} to {compared.loss_merged:.4f}"
        fix = "try --dtype fp32"
        if dtype == "bf16":
            fix = "changes of few steps are smaller than bf16 can add to a weight: --dtype fp16"
        raise ModelError(what, where=sample.source, fix=f"nothing was written; {fix}")
    return compared


def difference(one: list[Tensor], other: list[Tensor]) -> tuple[float, float, float]:
    """Largest absolute difference of logits, mean KL(one || other) per token in nats, share of equal argmaxes."""
    largest = kl = equal = 0.0
    count = 0
    for first, second in zip(one, other, strict=True):
        log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        equal += float((first.argmax(-1) == second.argmax(-1)).sum())
        largest = max(largest, float((first - second).abs().max()))
        count += first.shape[0]
    return largest, max(0.0, kl / count), equal / count


# --- a model whose weights stay on the disk


def open_streamed(files: ModelFiles, *, trust_remote_code: bool, adapter: Path | None = None) -> Any:
    """The model in eval mode in float32, with peft's adapter if one is named; each module reads its weights from
    the files for the time of its forward. Raises ModelError if the files lack a parameter.
    """
    settings = AutoConfig.from_pretrained(files.path, local_files_only=True, trust_remote_code=trust_remote_code)
    auto_class = AutoModelForSeq2SeqLM if files.kind == "seq2seq" else AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        model: Any = auto_class.from_config(settings, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    model.config.use_cache = False
    stored = _replace_by_placeholders(model, files)
    if adapter is not None:
        from peft import PeftModel  # a second to import

        model = PeftModel.from_pretrained(
            model, str(adapter), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=True
        )
    modules = list(model.modules())
    dora_layers = {id(layer.base_layer): layer for layer in modules if getattr(layer, "lora_magnitude_vector", None)}
    dora_layers |= {id(layer.base_layer): layer for layer in modules if hasattr(layer, "trainable_tokens_delta")}
    for module in modules:
        own = {key: stored[weight] for key, weight in module._parameters.items() if weight in stored}
        if own:  # a DoRA layer reads the weights of its base layer itself, and so does that of new tokens
            unit = dora_layers.get(id(module), module)
            run: Any = _run_linear if type(unit) is nn.Linear else partial(_run_loaded, unit.forward)
            unit.forward = partial(run, module, own)
    return model.eval()


def _replace_by_placeholders(model: Any, files: ModelFiles) -> dict[Any, Callable[..., Tensor]]:
    """Replaces the meta parameters by CPU ones that have a shape and no memory, since peft puts an adapter on the
    device of its base layer and nothing can be computed on the meta device.

    Returns by placeholder the function that reads its tensor (or some rows of it) in float32.
    """
    paths = {name: path for path in files.weights for name in tensors(path)}
    shared: dict[Any, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        shared.setdefault(weight, []).append(name)
    stored: dict[Any, Callable[..., Tensor]] = {}
    for weight, names in shared.items():
        key = next((key for name in names if (key := find_name(name, set(paths)))), None)
        if key is None:
            raise ModelError(f"{files.name} has no tensor for {names[0]}", where=str(files.path))
        placeholder = nn.Parameter(torch.zeros(1).expand(weight.shape), requires_grad=False)
        stored[placeholder] = partial(_read, paths[key], key)
        for name in names:
            module, _, attribute = name.rpartition(".")
            model.get_submodule(module)._parameters[attribute] = placeholder
    return stored


def _read(path: Path, name: str, rows: slice = slice(None)) -> Tensor:
    with safe_open(path, "pt") as opened:  # opened per read, so that pages already read are released
        tensor: Tensor = opened.get_tensor(name) if rows == slice(None) else opened.get_slice(name)[rows]
        return tensor.float() if tensor.is_floating_point() else tensor.clone()


def _run_loaded(forward: Any, module: Any, own: dict[str, Callable[..., Tensor]], *args: Any, **kwargs: Any) -> Any:
    """`forward` with the weights of `module` in memory while it runs."""
    placeholders = {key: module._parameters[key] for key in own}
    try:
        module._parameters.update({key: nn.Parameter(read(), requires_grad=False) for key, read in own.items()})
        return forward(*args, **kwargs)
    finally:
        module._parameters.update(placeholders)


def _run_linear(layer: Any, own: dict[str, Callable[..., Tensor]], x: Tensor) -> Tensor:
    """A linear layer's forward, some rows of its weight at a time: a head may be as large as ten layers."""
    step = max(1, BLOCK // layer.in_features)
    starts = range(0, layer.out_features, step)
    parts = [torch.nn.functional.linear(x, own["weight"](slice(at, at + step))) for at in starts]
    bias = own["bias"]() if "bias" in own else layer.bias  # a trained bias came with the adapter
    return torch.cat(parts, dim=-1) if bias is None else torch.cat(parts, dim=-1) + bias


# --- a question answered end to end


@dataclass(frozen=True)
class SmokeTest:
    """One answer. source: where the question is from. reference: the expected answer, if it is known.

    stopped: the answer ended by itself. tokens: generated ones, the end token included. device: where the model was
    loaded: the GPU, or the CPU where its 16-bit weights do not fit the GPU's free memory.
    """

    question: str
    source: str
    reference: str | None
    text: str
    stopped: bool
    tokens: int
    device: str

    def summary(self) -> str:
        """Question, reference and answer as readable text, long ones shortened."""
        texts = {f"question ({self.source})": self.question, "reference": self.reference, "answer": self.text}
        lines = [f"{name}: {text[:_SHOWN]}{' ...' * (len(text) > _SHOWN)}" for name, text in texts.items() if text]
        ended = "stopped by itself" if self.stopped else "cut off at max_new_tokens"
        return "\n".join([*lines, f"{self.tokens} tokens, {ended}; logits finite; on {self.device}"])


def smoke_test(folder: Path, question: str | None, root: Path) -> SmokeTest:
    """The model's greedy answer to `question`; None: to the first held-out row of its run, else to a greeting.

    The weights are opened in the type they are stored in. Raises ModelError (no model, logits not finite).
    """
    if not folder.is_dir():
        raise ModelError(f"there is no merged model in {folder}", where=str(folder), fix="make merge")
    config, rows = Config(), list[Row]()
    with suppress(RunError):
        config = runs.run_of_adapter(folder)
        source, rows = run_rows(config, root) or ("", [])
    dtype: torch.dtype = getattr(torch, str(read_config(folder, str(folder)).get("dtype", "float32")))
    loaded = open_model(config, merged=folder, root=root, dtype=dtype, low_memory="cpu")
    reference: str | None = None
    row = None if question else first_row(rows, lambda row: loaded.prompt(row, config.generation))
    if row is not None:
        ids, _ = loaded.prompt(row, config.generation)
        source, question, reference = f"from {source}", records.question(row), records.reference(row)
    else:
        source = "--prompt" if question else "a greeting: its run's rows are not available"
        question = question or GREETING
        ids, _ = loaded.prompt([{"role": "user", "content": question}], config.generation)
    newest = torch.tensor([ids[-_CHECKED_TOKENS:]], device=loaded.device)
    decoder_start = {"decoder_input_ids": newest[:, :1]} if loaded.kind == "seq2seq" else {}
    with torch.no_grad():
        logits = loaded.model(input_ids=newest, **decoder_start).logits
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the merged model's logits are not finite", fix="merge again with --dtype bf16 or fp32")
    (answer,) = loaded.generate([ids], config.generation, 1)
    return SmokeTest(question, source, reference, answer.text, answer.stopped, answer.tokens, loaded.device)


def first_row(rows: list[Row], prompt: Callable[[Row], object]) -> Row | None:
    """The first row with an answer whose prompt can be rendered; None if there is none."""
    for row in filter(answerable, rows[:HELD_OUT_ROWS]):
        with suppress(TemplateError):
            prompt(row)
            return row
    return None
