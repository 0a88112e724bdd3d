"""Loads a tokenizer with a pad token that is not its end token, and reports text that does not survive it; writes the
base with a larger vocabulary (`model.add_tokens`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.errors import ModelError, one_line
from sft.model.files import INDEX, ModelFiles, tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("sft.model")
FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")
# Existing tokens that serve as padding, best first: meant for it, then never trained, then the end of a document where
# a turn ends with another token. Embeddings are never resized for a pad token.
PAD_TOKENS = (
    "<pad> [PAD] <|pad|> <|finetune_right_pad_id|> <|padding|> <|dummy_0|> <|endoftext|> <|end_of_text|> <unk> [UNK]"
).split()
PROBES = (
    "Order 48213, due 2024-07-31: 3 × €19.95.",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}\n",
    "Ein Käse für Zoë; naïve café, 東京, Привет, 🙂!",
    "  two  spaces,\ttabs\n\nand an empty line ",
)


def load_tokenizer(source: ModelFiles | Path | str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or of a folder with only tokenizer files, with a pad token that is not its end token.

    Where transformers rebuilds it into one with other ids, tokenizer.json is used as it is, with a warning.
    Raises ModelError if the folder has none, or one that cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = source.path if isinstance(source, ModelFiles) else Path(source)
    name = source.name if isinstance(source, ModelFiles) else str(folder)
    if not any((folder / file).is_file() for file in FILES):
        what = f"{name} has no tokenizer files"
        raise ModelError(what, where=str(folder), fix=f"download it again: make download-model MODEL={name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        message = one_line(error)
        needs_code = "trust_remote_code" in message
        fix = "if you trust its authors: --set model.trust_remote_code=true" if needs_code else "download it again"
        raise ModelError(f"the tokenizer of {name} cannot be loaded: {message}", where=str(folder), fix=fix) from None
    if problem := _rebuild_problem(tokenizer):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        log.warning(f"{problem}. Here it is loaded as its file says; other programs may still rebuild it")
    config = files.read_json(folder / "config.json")
    choose_pad(tokenizer, config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size"))
    return tokenizer  # type: ignore[no-any-return]


NEW_TOKENS = "sft_new_token_ids"  # key in config.json: ids whose rows are trained beside an adapter
_COPIED = 16 << 20  # bytes; larger files than these (weights in other formats) stay with the base


def with_new_tokens(base: ModelFiles, texts: Sequence[str], root: Path, *, weights: bool) -> ModelFiles:
    """The base with `texts` as tokens of its own, in a folder below .cache/models; the base itself if it has them.

    A new token's rows in embedding and head are the mean of the rows of the tokens that its text was before. Files
    without such rows are the base's own, linked. Written again when the base changes. weights: False writes tokenizer
    and config alone. Raises ModelError, EnvironmentProblem (disk).
    """
    tokenizer = load_tokenizer(base)
    known = tokenizer.get_vocab()
    if not (new := [text for text in dict.fromkeys(texts) if text not in known]):
        return base
    key = hashlib.sha256(json.dumps([str(base.path.resolve()), list(texts)]).encode()).hexdigest()[:8]
    folder = root / ".cache" / "models" / f"{Path(base.name).name}-{key}"
    stamp = {"base": base.fingerprint() if weights else None, "config": base.config}
    stored = files.read_json(folder / "base.json")
    if stored.get("config") != base.config or (weights and stored.get("base") != stamp["base"]):
        pieces = [tokenizer.encode(text, add_special_tokens=False) for text in new]
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in new])
        rows = dict(zip(tokenizer.convert_tokens_to_ids(new), pieces, strict=True))
        config: dict[str, Any] = json.loads(json.dumps(base.config))
        text_config = config.get("text_config") or config
        old = int(text_config["vocab_size"])
        text_config["vocab_size"], config[NEW_TOKENS] = max(old, *(token + 1 for token in rows)), sorted(rows)
        if weights:
            files.require_free(files.existing(root), base.bytes, "the base with new tokens", fix="free space there")
        with files.atomic_folder(folder) as staged:
            tokenizer.save_pretrained(staged)
            for path in base.path.iterdir():
                small = path.is_file() and path.stat().st_size < _COPIED and path.suffix != ".safetensors"
                if small and path.name != INDEX and not (staged / path.name).exists():
                    shutil.copyfile(path, staged / path.name)
            if weights:
                for source in base.weights:
                    _write_rows(source, staged / source.name, rows, old, text_config["vocab_size"])
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(base.path / INDEX, staged / INDEX)
            files.write_json(staged / "config.json", config)
            files.write_json(staged / "base.json", stamp)
    return ModelFiles(folder, base.name, base.revision, files.read_json(folder / "config.json"), base.kind)


def _write_rows(source: Path, target: Path, rows: dict[int, list[int]], old: int, new: int) -> None:
    """The safetensors file with `new` instead of `old` rows where a tensor has one for every token; a link without.

    rows: token id -> the ids whose mean its row is.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    shapes = {name: entry["shape"] for name, entry in tensors(source).items()}
    if not any(shape[:1] == [old] for shape in shapes.values()):
        try:
            os.link(source.resolve(), target)
        except OSError:  # another disk
            shutil.copyfile(source, target)
        return
    state = {}
    with safe_open(source, "pt") as opened:
        for name, shape in shapes.items():
            weight = state[name] = opened.get_tensor(name)
            if shape[:1] == [old] and any(part in name for part in ("emb", "wte", "head", "shared", "output")):
                state[name] = weight.new_zeros((new, *shape[1:]))
                state[name][:old] = weight
                for token, pieces in rows.items():
                    state[name][token] = weight[pieces].float().mean(0).to(weight.dtype)
    save_file(state, target, metadata={"format": "pt"})


def choose_pad(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> str:
    """Sets a pad token that differs from the end token, among the existing tokens; returns it.

    rows: rows of the embedding; a token beyond them is not used. Where nothing fits, padding uses the end token's id:
    labels come from `chat/`, never from the pad id, so the end of an answer stays in the loss.
    """
    eos, pad = tokenizer.eos_token, tokenizer.pad_token
    if pad is not None and pad != eos:
        return str(pad)
    vocabulary = tokenizer.get_vocab()
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    candidates = [token for token in PAD_TOKENS if token in vocabulary]
    for part in ("pad", "reserved", "unused"):
        candidates += [token for token in sorted(special) if part in token.lower()]
    for token in candidates:
        if token not in (eos, tokenizer.bos_token) and (rows is None or vocabulary[token] < rows):
            tokenizer.pad_token = token
            log.debug("padding with %s, since the tokenizer pads with %s", token, "its end token" if pad else "nothing")
            return token
    if eos is None:
        what = "the tokenizer has neither an end token nor a pad token, so answers could never stop"
        fix = "choose another model, or add eos_token to its tokenizer_config.json"
        raise ModelError(what, where=str(tokenizer.name_or_path), fix=fix)
    tokenizer.pad_token = eos
    log.debug("padding with the end token %s: no other token is free; it stays in the labels of an answer's end", eos)
    return str(eos)


def round_trip_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What text this tokenizer changes on the way to ids and back, or None."""
    for text in PROBES:
        ids = tokenizer.encode(text, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if str(back).strip(" ") != text.strip(" "):
            return f"the tokenizer changes text: {text!r} comes back as {back!r}"
    return None


def _rebuild_problem(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Where its ids differ from those of the folder's tokenizer.json, or None: transformers 5 rebuilds some tokenizers
    by the model's type."""
    path = Path(str(tokenizer.name_or_path)) / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    stored = Tokenizer.from_file(str(path))
    for text in PROBES:
        expected = stored.encode(text, add_special_tokens=False).ids
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != expected:
            return (
                f"the tokenizer is not the one in {path}: transformers rebuilt it as {type(tokenizer).__name__}, and"
                f" {text!r} becomes {len(ids)} tokens instead of {len(expected)}; the model was trained on the latter"
            )
    return None
