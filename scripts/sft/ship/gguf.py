"""How a model's config and tensors stand in a GGUF file, for the architectures that are tried against llama.cpp.

Names come from the gguf package's TensorNameMap. Source of what is special to each: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError
from sft.model.files import ModelFiles, tensors

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray
if TYPE_CHECKING:
    import gguf
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
}
ROPE_FACTORS = "rope_freqs.weight"


def architecture(config: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the model's architecture. Raises ModelError for one that is not covered."""
    found = next(iter(config.get("architectures") or ["unknown"]))
    if found not in ARCHITECTURES:
        raise ModelError(
            f"{name} is a {found}, which export to GGUF does not cover: it covers {', '.join(ARCHITECTURES)}",
            where="config.json: architectures",
            fix="FORMAT=hf, then llama.cpp's own convert_hf_to_gguf.py",
        )
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if ARCHITECTURES[found] == "qwen3" and biased:
        raise ModelError(f"{name} has biases that llama.cpp's {found} has no place for", fix="FORMAT=hf")
    return ARCHITECTURES[found]


def tensor_names(arch: str, layers: int, names: list[str]) -> dict[str, str]:
    """The GGUF name of each of the model's tensors. Raises ModelError for one that has none."""
    import gguf

    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    mapping = gguf.get_tensor_name_map(kind, layers)
    found = {}
    for name in names:
        if name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")):
            continue  # computed, not trained
        place = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise ModelError(f"GGUF has no place for {name} in {arch}", fix="FORMAT=hf")
        found[name] = place
    return found


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], arch: str) -> None:
    """Writes the model's dimensions. Raises ModelError for position scalings that are not covered."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    context, window = config["max_position_embeddings"], config.get("sliding_window")
    sliding = config.get("use_sliding_window", arch == "llama") and window
    writer.add_context_length(min(context, window) if sliding else context)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if arch == "llama":
        writer.add_rope_dimension_count(width)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    _scaling(writer, rope)


def rope_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """What Llama 3.1 divides each frequency by (Dubey et al. 2024), [head width / 2]; None for other models."""
    import numpy as np

    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    trained = rope["original_max_position_embeddings"]
    found = []
    for index in range(0, width, 2):
        length = 2 * math.pi * rope.get("rope_theta", 10000.0) ** (index / width)
        smooth = min(1.0, max(0.0, (trained / length - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


def arranged(name: str, values: NDArray[Any], config: dict[str, Any], arch: str) -> NDArray[Any]:
    """The tensor as llama.cpp wants it: Llama's queries and keys have the two halves of each head interleaved."""
    if arch != "llama" or not re.search(r"\.self_attn\.[qk]_proj\.", name):
        return values
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    turned = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2)
    return turned.reshape(values.shape)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Position settings under their new names, whichever way config.json tells them."""
    told = dict(config.get("rope_scaling") or {})
    told.update(config.get("rope_parameters") or {})
    told.setdefault("rope_type", told.get("type", "default"))
    if "rope_theta" in config:
        told.setdefault("rope_theta", config["rope_theta"])
    return told


def _scaling(writer: gguf.GGUFWriter, rope: dict[str, Any]) -> None:
    import gguf

    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind not in ("default", "linear", "llama3"):
        raise ModelError(f"positions scaled the {kind} way are not covered by export to GGUF", fix="FORMAT=hf")


NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # gguf.TokenType
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
PRE = {  # name -> expressions, applied one after the other
    "qwen2": [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST],
    "llama-bpe": [_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST],
    "gpt-2": [_GPT2],
    "smollm": [r"\p{N}", _GPT2],
    "qwen35": [
        _CONTRACTIONS
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}
_WHOLE_WORDS = {"llama-bpe"}  # a word that is a token is taken at once, whatever the merges say
PROBES = (
    "Order 48213, due 2024-07-31: 3 × €19.95, 1234567 in all.",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}\n\n\n",
    "Ein Käse für Zoë; naïve café, 東京, Привет, हिन्दी, 🙂‍🌫️!",
    "  two  spaces,\ttabs\n \nand an empty line \r\n",
    "I'm sure they'd've said we'll, HE'S late. 'Quoted'...!!! ====--- \\n",
    "x\n\n8  7\t\t6   x",  # white space before a digit: gpt-2 and smollm
    "4821 x 12 345",  # digits: one by one, by three, or all together
    "Ze\u0301 नमस्ते हिन्दी",  # combining marks: qwen2 and qwen35
)


_ENDS = set(  # tokens at which llama.cpp ends an answer whatever the file says
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>"
    " <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>".split()
)


@dataclass(frozen=True)
class Vocabulary:
    """tokens, their types, merges (`a b`), the pre-tokeniser's name, and the ids of marks.

    ends: tokens that end an answer, the template's own first. adds_bos: a begin token is put before every text.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    bos: int | None
    pad: int | None
    ends: list[int]
    adds_bos: bool

    def built(self) -> Tokenizer:
        """The tokenizer that llama.cpp makes of this."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        vocab = {token: at for at, token in enumerate(self.tokens) if self.types[at] != UNUSED}
        merges = [(merge.split(" ")[0], merge.split(" ")[1]) for merge in self.merges]
        made = Tokenizer(models.BPE(vocab, merges, ignore_merges=self.pre in _WHOLE_WORDS))
        cuts: list[Any] = [pre_tokenizers.Split(Regex(text), "isolated") for text in PRE[self.pre]]
        made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
        marks = [token for at, token in enumerate(self.tokens) if self.types[at] in (CONTROL, USER)]
        made.add_special_tokens([AddedToken(token, normalized=False) for token in marks])
        return made

    def stops(self) -> set[int]:
        """The ids at which llama.cpp ends an answer."""
        return {*self.ends[:3], *(at for at, token in enumerate(self.tokens) if token in _ENDS)}

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Puts it into a GGUF file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for add, token in zip(
            (writer.add_eos_token_id, writer.add_eot_token_id, _eom(writer)), self.ends, strict=False
        ):
            add(token)
        if self.bos is not None:
            writer.add_bos_token_id(self.bos)
        if self.pad is not None:
            writer.add_pad_token_id(self.pad)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)


def of_tokenizer(
    tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int], *, adds_bos: bool, texts: Iterable[str] = ()
) -> Vocabulary:
    """The vocabulary of a byte-level BPE tokenizer. rows: of the embedding. texts: probes besides our own.

    Raises ModelError for other kinds of tokenizer, and where no pre-tokeniser of llama.cpp gives the model's ids.
    """
    state = refuse_other_kinds(tokenizer)
    model = state["model"]
    tokens, types = [f"[PAD{at}]" for at in range(rows)], [UNUSED] * rows
    for token, at in model["vocab"].items():
        tokens[at], types[at] = token, NORMAL
    for added in state["added_tokens"]:
        if added["id"] < rows:
            special = added["special"] or added["id"] in ends
            tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if special else USER
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    marks = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id, "ends": ends, "adds_bos": adds_bos}
    probes = [*PROBES, *texts]
    candidates = [Vocabulary(tokens, types, merges, pre, **marks) for pre in PRE]
    differences = [first_difference(tokenizer, candidate, probes) for candidate in candidates]
    equal = [candidate for candidate, difference in zip(candidates, differences, strict=True) if difference is None]
    if equal:  # where several give the same ids on the probes, the one that splits text at the same places is safest
        return next((candidate for candidate in equal if _splits_alike(tokenizer, candidate, probes)), equal[0])
    raise ModelError(
        f"no pre-tokeniser of llama.cpp gives the model's ids; written as qwen2, {differences[0]}",
        where="tokenizer.json",
        fix="FORMAT=hf, then llama.cpp's own convert_hf_to_gguf.py, which may know this tokenizer by name",
    )


def refuse_other_kinds(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's tokenizer.json. Raises ModelError where it is no byte-level BPE."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(state["pre_tokenizer"]):
        raise ModelError(
            "the tokenizer is no byte-level BPE, the only kind that export to GGUF covers (Llama 2 and Gemma"
            " have others)",
            where="tokenizer.json",
            fix="FORMAT=hf, then llama.cpp's own convert_hf_to_gguf.py",
        )
    return state


def first_difference(tokenizer: PreTrainedTokenizerBase, made: Vocabulary, texts: Iterable[str]) -> str | None:
    """The first text that llama.cpp would cut otherwise than the model's tokenizer, told; None where all agree."""
    import unicodedata

    built = made.built()
    for text in (unicodedata.normalize("NFC", text) for text in texts):  # what llama.cpp leaves to others
        ours: list[int] = tokenizer.encode(text, add_special_tokens=False)
        theirs = built.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            at = next(at for at, pair in enumerate(zip([*ours, -1], [*theirs, -1], strict=False)) if pair[0] != pair[1])
            return (
                f"{text!r} becomes {tokenizer.convert_ids_to_tokens(ours[at : at + 3])} in the model and"
                f" {[made.tokens[token] for token in theirs[at : at + 3]]} in llama.cpp, at token {at}"
            )
    return None


def _splits_alike(tokenizer: PreTrainedTokenizerBase, candidate: Vocabulary, texts: Iterable[str]) -> bool:
    """Whether the candidate's pre-tokeniser splits every text where the model's own does."""
    own, other = tokenizer.backend_tokenizer.pre_tokenizer, candidate.built().pre_tokenizer

    def pieces(splitter: Any, text: str) -> list[str]:
        return [piece for piece, _ in splitter.pre_tokenize_str(text)]

    return all(pieces(own, text) == pieces(other, text) for text in texts)


def of_file(reader: gguf.GGUFReader) -> Vocabulary:
    """The vocabulary that a GGUF file holds."""

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    ends = [value(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
    return Vocabulary(
        list(value("tokens")),
        [int(kind) for kind in value("token_type")],
        list(value("merges")),
        str(value("pre")),
        value("bos_token_id"),
        value("padding_token_id"),
        [int(token) for token in ends if token is not None],
        bool(value("add_bos_token", False)),
    )


def _eom(writer: gguf.GGUFWriter) -> Any:
    return lambda token: writer.add_uint32("tokenizer.ggml.eom_token_id", token)


BYTES = {"f16": 2.0, "q8_0": 34 / 32, "bf16": 2.0, "f32": 4.0}  # a number
_ERRORS = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8}  # of a number, half a step
Progress = Callable[[int, int, str], None]


def write(
    files: ModelFiles, path: Path, kind: str, vocabulary: Vocabulary, template: str | None, progress: Progress
) -> int:
    """Writes `files` to `path`; returns the number of tensors. kind: f16, q8_0, bf16 or f32; vectors stay f32.

    Raises ModelError for an architecture that is not covered, and for numbers that do not fit the type.
    """
    import gguf

    arch = architecture(files.config, files.name)
    placed = _places(files, arch)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(files.name).name)
    writer.add_file_type(_file_type(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer, files.config, arch)
    vocabulary.write(writer)
    if template is not None:
        writer.add_chat_template(template)
    factors = rope_factors(files.config)
    for name, (_, _, shape) in placed.items():
        _announce(writer, name, shape, _type_of(name, shape, kind))
    if factors is not None:
        _announce(writer, ROPE_FACTORS, list(factors.shape), gguf.GGMLQuantizationType.F32)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for at, (name, (source, own, shape)) in enumerate(placed.items()):
            values = arranged(own, read(source, own), files.config, arch)
            writer.write_tensor_data(_stored(values, _type_of(name, shape, kind), own))
            progress(at + 1, len(placed), name)
        if factors is not None:
            writer.write_tensor_data(factors)
    finally:
        writer.close()
    return len(placed)


def check(files: ModelFiles, path: Path, progress: Progress) -> float:
    """Reads the file back and compares every tensor with the model's; returns the largest error of a number.

    Raises ModelError where one is missing or off by more than its type's rounding.
    """
    import gguf

    arch = architecture(files.config, files.name)
    placed, worst = _places(files, arch), 0.0
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if missing := sorted(set(placed) - set(found)):
        raise ModelError(f"{path.name} lacks {len(missing)} tensors: {', '.join(missing[:3])}", where=str(path))
    for at, (name, (source, own, _)) in enumerate(placed.items()):
        values = arranged(own, read(source, own), files.config, arch)
        off = _error(values, found[name], path)
        worst = max(worst, off)
        progress(at + 1, len(placed), name)
    return worst


def read(source: Path, name: str) -> NDArray[np.float32]:
    """One tensor of a safetensors file, float32."""
    from safetensors import safe_open

    with safe_open(source, "pt") as opened:
        values: NDArray[np.float32] = opened.get_tensor(name).float().numpy()
    return values


def _places(files: ModelFiles, arch: str) -> dict[str, tuple[Path, str, list[int]]]:
    """GGUF name -> (file, own name, shape), in the files' order; a head that is the embedding is left out."""
    headers = [(path, name, entry["shape"]) for path in files.weights for name, entry in tensors(path).items()]
    named = tensor_names(arch, files.config["num_hidden_layers"], [name for _, name, _ in headers])
    tied = bool(files.config.get("tie_word_embeddings"))
    return {
        named[name]: (path, name, shape)
        for path, name, shape in headers
        if name in named and not (tied and named[name] == "output.weight")
    }


def _type_of(name: str, shape: list[int], kind: str) -> gguf.GGMLQuantizationType:
    import gguf

    if len(shape) == 1 or name.endswith("_norm.weight"):
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


def _file_type(kind: str) -> gguf.LlamaFileType:
    import gguf

    return gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"]


def _announce(writer: gguf.GGUFWriter, name: str, shape: list[int], kind: gguf.GGMLQuantizationType) -> None:
    import gguf
    import numpy as np

    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        of: Any = np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16
        writer.add_tensor_info(name, shape, np.dtype(of), int(np.prod(shape)) * np.dtype(of).itemsize)
        return
    stored = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)


def _stored(values: NDArray[Any], kind: gguf.GGMLQuantizationType, name: str) -> NDArray[Any]:
    import gguf
    import numpy as np

    if kind == gguf.GGMLQuantizationType.F16 and values.size and float(np.abs(values).max()) > 65504:
        raise ModelError(f"{name} does not fit f16: a number in it becomes infinite", fix="TYPE=bf16, f32 or q8_0")
    return gguf.quants.quantize(np.ascontiguousarray(values), kind)


def _error(values: NDArray[Any], tensor: gguf.ReaderTensor, path: Path) -> float:
    """The largest error of a tensor. Raises ModelError where it is more than half a step of its type."""
    import gguf
    import numpy as np

    kind = tensor.tensor_type
    got = gguf.quants.dequantize(np.asarray(tensor.data), kind).reshape(values.shape)
    off = np.abs(got - values)
    if kind == gguf.GGMLQuantizationType.Q8_0:  # a block of 32 shares one scale: its largest / 127, kept as f16
        blocks = np.abs(values).reshape(-1, 32).max(axis=1, keepdims=True)
        allowed = np.broadcast_to(blocks * (0.5 / 127 + 2**-10) + 2**-17, (blocks.shape[0], 32)).reshape(values.shape)
    else:
        allowed = np.abs(values) * _ERRORS[kind.name] + (2**-24 if kind == gguf.GGMLQuantizationType.F16 else 0)
    if got.shape != values.shape or not bool((off <= allowed).all()):
        raise ModelError(
            f"{tensor.name} in {path.name} differs from the model's by up to {float(off.max()):.3g}, more than"
            f" {kind.name} rounds",
            where=str(path),
            fix="report this; FORMAT=hf is not touched by it",
        )
    return float(off.max(initial=0.0))
