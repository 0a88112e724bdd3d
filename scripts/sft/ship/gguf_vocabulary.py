"""A tokenizer as GGUF holds it, and the ids that llama.cpp makes with it.

llama.cpp knows pre-tokenisers (how text is cut into words) by name. The name is not guessed: for each, the tokenizer is
built again from what the file holds and llama.cpp's own expressions (src/llama-vocab.cpp), and the first that gives the
model's ids on every probe is taken. llama.cpp normalises no text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.errors import ModelError

if TYPE_CHECKING:
    import gguf
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

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
    wrong = ""
    for pre in PRE:
        made = Vocabulary(tokens, types, merges, pre, **marks)
        difference = first_difference(tokenizer, made, probes)
        if difference is None:
            return made
        wrong = wrong or difference
    raise ModelError(
        f"no pre-tokeniser of llama.cpp gives the model's ids; written as qwen2, {wrong}",
        where="tokenizer.json",
        mend="FORMAT=hf, then llama.cpp's own convert_hf_to_gguf.py, which may know this tokenizer by name",
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
            mend="FORMAT=hf, then llama.cpp's own convert_hf_to_gguf.py",
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
