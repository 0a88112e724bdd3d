"""A tokenizer small enough to write ids by hand: words, spaces and newlines are tokens with fixed numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SPECIAL = (
    "<pad> <s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST]".split()
)
WORDS = (
    "<unk>", "\n", "\n\n", " ", "system", "user", "assistant", "System", "User", "Assistant", ":", "USER", "ASSISTANT",
    "###", "Instruction", "Response", "<<", "SYS", ">>", "<</", "Be", "brief", ".", "Who", "are", "you", "?", "Ann",
    "And", "now", "Bob", "|", "<", ">", "im_start", "im_end", "/", "s", "eot_id", "[", "]", "INST",
)  # fmt: skip
ID = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}


def tokenizer(*, bos: str | None = "<s>", eos: str = "</s>", template: str | None = None) -> Any:
    """Words, runs of newlines and single other characters; special tokens first. `ID` has the numbers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|\n|[A-Za-z_]+|###|<</|<<|>>| |."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    begin = {"bos_token": bos} if bos else {}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        **begin,
    )
    fast.chat_template = template
    return fast


def folder(path: Path, **options: Any) -> Path:
    """The tokenizer's files alone, no model beside them."""
    tokenizer(**options).save_pretrained(path)
    return path


def ids(text: str) -> list[int]:
    """Ids written as words, a space between: `_` is a space, `/n` a newline, `/n/n` an empty line."""
    escapes = {"_": " ", "/n": "\n", "/n/n": "\n\n"}
    return [ID[escapes.get(word, word)] for word in text.split()]
