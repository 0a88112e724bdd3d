"""GGUF files as models to fine-tune: their vocabulary by llama.cpp's rules, and their import into a model's folder.

`import_file` dequantises a file tensor by tensor. Everything else (shapes, special tokens, how text is split, the
template) comes from the file's own metadata, where transformers guesses: it takes SmolLM2's begin token for its end
token, does not split digits, and decodes byte-level tokens as SentencePiece's.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sft import files
from sft.errors import ModelError, one_line
from sft.model.files import INDEX, SINGLE
from sft.model.tokenizer import load_tokenizer

log = logging.getLogger("sft.model")
SENTENCEPIECE = "sentencepiece"  # instead of a pre-tokenizer's name
RECORD = "import.json"  # beside an imported model: where it comes from
SHARD = 2 * 2**30  # bytes of a safetensors file
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # gguf.TokenType
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PRE_TOKENIZERS = {  # llama.cpp's name -> its expressions, applied one after the other
    "qwen2": [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST],
    "llama-bpe": [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST],
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
        r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen35": [
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
SAME_AS = {  # other names of llama.cpp for the same expressions
    **dict.fromkeys(("llama3", "llama-v3", "falcon3"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    **dict.fromkeys(("starcoder", "refact"), "smollm"),
}
_IGNORES_MERGES = {"llama-bpe", "tekken"}  # a whole word that is a token is used as it is, whatever the merges give
PROBES = (  # together they separate every pair of PRE_TOKENIZERS
    "Order 48213, due 2024-07-31: 3 × €19.95, 1234567 in all.",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}\n\n\n",
    "Ein Käse für Zoë; naïve café, 東京, Привет, हिन्दी, 🙂‍🌫️!",
    "  two  spaces,\ttabs\n \nand an empty line \r\n",
    "I'm sure they'd've said we'll, HE'S late. 'Quoted'...!!! ====--- \\n",
    "x\n\n8  7\t\t6   x",  # white space before a digit: gpt-2 and smollm
    "4821 x 12 345",  # digits: one by one, by three, or all together
    "camelCase HTMLPage /usr/bin",  # capitals inside a word: tekken
    "Ze\u0301 नमस्ते हिन्दी",  # combining marks: qwen2 and qwen35
)
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # end tokens that a GGUF file has a place for


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Position settings under transformers 5's names, whichever version wrote config.json."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {"rope_type": rope.get("type", "default"), "rope_theta": config.get("rope_theta", 10000.0), **rope}


def rope_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """What Llama 3.1 divides each frequency by (Dubey et al. 2024), [head width / 2]; None for other models."""
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high, trained = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    smooth = np.clip((trained / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as a GGUF file holds it: byte-level BPE, or SentencePiece's BPE, which alone has `scores`.

    types: of each token (gguf.TokenType). merges: `a b`. pre: the pre-tokenizer's name. ends: tokens that end an
    answer, the template's own first. adds_bos: a begin token is put before every text. adds_space: a space is put
    before every text (SentencePiece).
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    bos: int | None
    pad: int | None
    ends: list[int]
    adds_bos: bool
    scores: Sequence[float] = ()
    adds_space: bool = False

    def as_tokenizer(self) -> Tokenizer:
        """The tokenizer that llama.cpp builds from this."""
        ids = {token: at for at, token in enumerate(self.tokens) if self.types[at] != UNUSED}
        if self.scores:
            tokenizer = self._sentencepiece(ids)
        else:
            merges = [(first, second) for first, second in (merge.split(" ") for merge in self.merges)]
            tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=self.pre in _IGNORES_MERGES))
            cuts: list[Any] = [pre_tokenizers.Split(Regex(text), "isolated") for text in PRE_TOKENIZERS[self.pre]]
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
            tokenizer.decoder = decoders.ByteLevel()
        added = {
            kind: [token for token, other in zip(self.tokens, self.types, strict=True) if other == kind]
            for kind in (CONTROL, USER_DEFINED)
        }
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added[CONTROL]])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added[USER_DEFINED]])
        return tokenizer

    def _sentencepiece(self, ids: dict[str, int]) -> Tokenizer:
        """SentencePiece's BPE: pairs are merged into the piece with the highest score; bytes where no piece fits."""
        pieces = [token for token, at in ids.items() if self.types[at] == NORMAL and len(token) > 1]
        merges = []
        for piece in sorted(pieces, key=lambda piece: -self.scores[ids[piece]]):
            pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
            merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        unknown = next((self.tokens[at] for at, kind in enumerate(self.types) if kind == UNKNOWN), None)
        tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        spaces: list[Any] = [normalizers.Replace(" ", "▁")]
        plain: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.adds_space:
            spaces, plain = [normalizers.Prepend("▁"), *spaces], [*plain, decoders.Strip(" ", 1, 0)]
        tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(plain)
        return tokenizer


def vocabulary_of_file(reader: gguf.GGUFReader) -> Vocabulary:
    """The vocabulary that a GGUF file holds."""

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    sentencepiece = value("model") == "llama"
    pre = SENTENCEPIECE if sentencepiece else SAME_AS.get(str(value("pre")), str(value("pre")))
    ends = [int(value(key)) for key in END_KEYS if value(key) is not None]
    adds_bos = value("add_bos_token", sentencepiece or pre in _IGNORES_MERGES)
    return Vocabulary(
        list(value("tokens", [])), [int(kind) for kind in value("token_type", [])], list(value("merges", [])), pre,
        value("bos_token_id"), value("padding_token_id"), ends, bool(adds_bos),
        value("scores") if sentencepiece else (), bool(value("add_space_prefix", sentencepiece)),
    )  # fmt: skip


def first_difference(tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, texts: Iterable[str]) -> str | None:
    """The first text for which llama.cpp would give other ids than the model's tokenizer, described; None: all equal.

    Texts are in composed form (NFC): llama.cpp does not normalise.
    """
    built = vocabulary.as_tokenizer()
    for text in (unicodedata.normalize("NFC", text) for text in texts):
        ours: list[int] = tokenizer.encode(text, add_special_tokens=False)
        theirs = built.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            at = first_unequal(ours, theirs)
            return (
                f"{text!r} becomes {tokenizer.convert_ids_to_tokens(ours[at : at + 3])} in the model and"
                f" {[vocabulary.tokens[token] for token in theirs[at : at + 3]]} in llama.cpp, at token {at}"
            )
    return None


def first_unequal(one: list[int], other: list[int]) -> int:
    """The first position at which two lists differ; the shorter one's length if that one begins the other."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


# --- importing


def import_file(path: Path, out: Path, *, source: str = "", progress: Callable[[int, int], None] | None = None) -> None:
    """Writes the model of the GGUF file `path` into the new folder `out`: config.json, safetensors, tokenizer, card.

    Weights that are stored as f16 or f32 keep their bits, quantised ones become bf16. source: what the record names as
    its origin, the path by default. progress: called with the number of tensors done and of all.
    Raises ModelError (cut short or not GGUF, an architecture, tokenizer or position scaling that is not supported,
    tensors that do not fit, other token ids than llama.cpp's) and leaves nothing behind then.
    """
    reader = _open(path)
    log.info("importing %s into %s", path.name, out)
    values = {key: field.contents() for key, field in reader.fields.items() if "ggml.tokens" not in key}
    config = _config(reader, values)
    vocabulary = _vocabulary(reader, values)
    numbers: Counter[str] = Counter()
    for tensor in reader.tensors:
        numbers[tensor.tensor_type.name] += int(tensor.n_elements)
    stored, count = numbers.most_common(1)[0][0], numbers.total()
    dtype = {"F16": "float16", "F32": "float32"}.get(stored, "bfloat16")
    files.require_free(
        out.parent, count * (4 if dtype == "float32" else 2), "the imported model", fix="free space there"
    )
    with files.atomic_folder(out) as folder:
        tokenizer = _write_tokenizer(vocabulary, values, config["max_position_embeddings"], folder)
        if problem := first_difference(tokenizer, vocabulary, PROBES) or _llama_cpp_difference(path, tokenizer):
            raise ModelError(f"the tokenizer of {path.name} cannot be rebuilt: {problem}", where=str(path))
        _write_weights(reader, config, dtype, folder, progress or (lambda *_: None))
        ends = vocabulary.ends if len(vocabulary.ends) > 1 else vocabulary.ends[0]
        special = {"bos_token_id": vocabulary.bos, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
        files.write_json(folder / "config.json", {**config, **special, "dtype": dtype})
        files.write_json(folder / "generation_config.json", special)
        license_, name = values.get("general.license", "not stated"), values.get("general.name", path.stem)
        record = {"source": source or str(path), "file": path.name, "bytes": path.stat().st_size, "stored": stored}
        files.write_json(folder / RECORD, {**record, "name": name, "license": license_})
        note = stored
        if dtype == "bfloat16":
            note = f"dequantised from {stored}, so they are not those that were published"
        card = f"# {out.name}\n\n{name}, imported from `{path.name}`. Weights: {note}. License: {license_}.\n"
        files.write_text(folder / "README.md", card)


def _open(path: Path) -> gguf.GGUFReader:
    """Raises ModelError if it is no GGUF file, or cut short."""
    if not path.is_file():
        raise ModelError(f"the GGUF file {path.name} does not exist", where=str(path), fix="name an existing file")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # whatever reading beyond the end of the file leads to
        what = f"{path.name} is not a GGUF file, or is cut short: {one_line(error, 120)}"
        raise ModelError(what, where=str(path), fix="download or copy it again") from None


def _config(reader: gguf.GGUFReader, values: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the model. Raises ModelError for what it cannot describe."""
    arch, path = str(values.get("general.architecture")), str(reader.data.filename)
    if arch not in CLASSES or values.get(f"{arch}.expert_count"):
        raise ModelError(
            f"the architecture of this GGUF file is {arch}{' with experts' * (arch in CLASSES)}; {', '.join(CLASSES)}"
            " can be imported",
            where=path,
            fix="use the model's own repository: make download-model MODEL=its hub id",
        )

    def value(key: str, default: Any = None) -> Any:
        number = values.get(f"{arch}.{key}", default)
        if number is None:
            raise ModelError(f"the GGUF file lacks {arch}.{key}", where=path, fix="download or copy it again")
        return float(f"{number:.7g}") if isinstance(number, float) else number  # stored in float32

    shapes = {tensor.name: [int(size) for size in reversed(tensor.shape)] for tensor in reader.tensors}
    heads = value("attention.head_count")
    width = value("attention.key_length", value("rope.dimension_count", value("embedding_length") // heads))
    rope = {"rope_type": value("rope.scaling.type", "none"), "rope_theta": value("rope.freq_base", 10000.0)}
    if rope["rope_type"] in ("linear", "yarn"):
        rope["factor"] = value("rope.scaling.factor")
        if rope["rope_type"] == "yarn":
            rope["original_max_position_embeddings"] = value("rope.scaling.original_context_length")
    elif rope["rope_type"] == "none":
        rope["rope_type"] = "default"
    if "rope_freqs.weight" in shapes:
        factors = next(tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
        rope |= {"rope_type": "llama3", "factor": float(f"{factors.max():.5g}"), "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        expected = rope_factors({"rope_parameters": rope, "head_dim": width})
        if expected is None or expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
            rope["rope_type"] = "of an unknown kind"
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        raise ModelError(f"the scaling of positions is {rope['rope_type']}, which cannot be imported", where=path)
    return {
        "architectures": [CLASSES[arch]],
        "model_type": arch,
        "vocab_size": shapes.get("token_embd.weight", [0])[0],
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": width,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in shapes,
        **({"attention_bias": "blk.0.attn_q.bias" in shapes} if arch != "qwen2" else {}),
        **({"mlp_bias": "blk.0.ffn_gate.bias" in shapes} if arch == "llama" else {}),
    }


def _vocabulary(reader: gguf.GGUFReader, values: dict[str, Any]) -> Vocabulary:
    """Raises ModelError for a tokenizer of another kind, or with a name that is not known."""
    kind, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != "llama" and (kind != "gpt2" or SAME_AS.get(str(pre), pre) not in PRE_TOKENIZERS):
        raise ModelError(
            "the tokenizer of this GGUF file cannot be imported: "
            + (f"its pre-tokenizer is {pre!r}" if kind == "gpt2" else f"its kind is {kind!r}"),
            where=str(reader.data.filename),
            fix=f"known pre-tokenizers: {', '.join([*PRE_TOKENIZERS, *SAME_AS])};"
            " use the model's own repository: make download-model MODEL=its hub id",
        )
    vocabulary = vocabulary_of_file(reader)
    if not vocabulary.ends:
        raise ModelError("the GGUF file names no end token", where=str(reader.data.filename))
    return vocabulary


def _write_tokenizer(
    vocabulary: Vocabulary, values: dict[str, Any], longest: int, folder: Path
) -> PreTrainedTokenizerBase:
    """Writes tokenizer.json, tokenizer_config.json and the template; returns the tokenizer as loaded from there."""
    tokenizer, tokens = vocabulary.as_tokenizer(), vocabulary.tokens
    if vocabulary.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # as the authors' tokenizer.json; llama.cpp does not normalise
    if vocabulary.adds_bos and vocabulary.bos is not None:
        bos = (tokens[vocabulary.bos], vocabulary.bos)
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos[0]} $A", f"{bos[0]} $A $B", [bos])
    names = {"bos_token": vocabulary.bos, "eos_token": vocabulary.ends[0], "pad_token": vocabulary.pad}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=longest,
        **{name: tokens[token] for name, token in names.items() if token is not None},
    )
    wrapped.chat_template = values.get("tokenizer.chat_template")
    wrapped.save_pretrained(folder)
    return load_tokenizer(folder)


def _llama_cpp_difference(path: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first probe for which llama.cpp has other ids, described; None if all are equal or it cannot be used."""
    theirs = open_in_llama_cpp(path, vocab_only=True)
    for text in (unicodedata.normalize("NFC", text) for text in PROBES if theirs):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != (other := theirs.tokenize(text.encode(), add_bos=False, special=True)):
            return f"{text!r} becomes {ids[:12]} here and {other[:12]} in llama.cpp"
    return None


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def open_in_llama_cpp(path: Path, **options: Any) -> Any:
    """llama.cpp's model of a file; None where llama-cpp-python is not installed or, with a warning, cannot open it."""
    if not has_llama_cpp():
        return None
    llama = llama_cpp()
    try:
        return llama.Llama(str(path), n_gpu_layers=0, verbose=False, **options)
    except (ValueError, RuntimeError) as error:
        log.warning(f"llama-cpp-python {llama.__version__} cannot open {path.name}: {one_line(error)}")
        return None


@cache
def llama_cpp() -> Any:
    """llama_cpp without its log, which would go to stderr."""
    llama: Any = importlib.import_module("llama_cpp")
    llama.silent_log = llama.llama_log_callback(lambda level, text, data: None)  # llama.cpp holds only a pointer to it
    llama.llama_log_set(llama.silent_log, None)
    return llama


def _write_weights(
    reader: gguf.GGUFReader, config: dict[str, Any], dtype: str, folder: Path, progress: Callable[[int, int], None]
) -> None:
    """Writes safetensors in files of at most SHARD bytes and their index.

    Raises ModelError if a tensor is missing, left over, of another shape, or not finite.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config["model_type"])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    stored = {tensor.name: tensor for tensor in reader.tensors if tensor.name != "rope_freqs.weight"}
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    gguf_names = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}
    different = sorted(set(gguf_names.values()) ^ set(stored), key=str)
    if different:
        raise ModelError(
            f"the tensors of the GGUF file are not those of {config['architectures'][0]}: {len(different)} differ, for"
            f" example {different[0]}",
            where=str(reader.data.filename),
        )
    parts: list[dict[str, Any]] = [{}]
    size, shard_of = 0, dict[str, int]()
    for done, (name, source) in enumerate(gguf_names.items()):
        tensor = stored[str(source)]
        numbers = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        shape = [int(length) for length in reversed(tensor.shape)]
        if shape != shapes[name] or not np.isfinite(numbers).all():
            problem = f"has the shape {shape}, not {shapes[name]}" if shape != shapes[name] else "is not finite"
            raise ModelError(f"{source} {problem}", where=str(reader.data.filename), fix="download or copy it again")
        numbers = unpermute(numbers.reshape(shape), str(source), config)
        weight = torch.tensor(numbers).to(getattr(torch, dtype))
        if size + weight.nbytes > SHARD and parts[-1]:
            save_file(parts[-1], folder / f"part-{len(parts)}", metadata={"format": "pt"})
            parts[-1].clear()
            parts.append({})
            size = 0
        parts[-1][name], shard_of[name], size = weight, len(parts), size + weight.nbytes
        progress(done + 1, len(gguf_names))
    save_file(parts[-1], folder / f"part-{len(parts)}", metadata={"format": "pt"})
    if len(parts) == 1:
        (folder / "part-1").rename(folder / SINGLE)
        return
    titles = [f"model-{at + 1:05d}-of-{len(parts):05d}.safetensors" for at in range(len(parts))]
    for at, title in enumerate(titles):
        (folder / f"part-{at + 1}").rename(folder / title)
    files.write_json(folder / INDEX, {"metadata": {}, "weight_map": {n: titles[at - 1] for n, at in shard_of.items()}})


def unpermute(values: NDArray[Any], name: str, config: dict[str, Any]) -> NDArray[Any]:
    """A tensor as transformers computes with it: llama.cpp interleaves the two halves of Llama's queries and keys."""
    if config["model_type"] != "llama" or (".attn_q." not in name and ".attn_k." not in name):
        return values
    heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
