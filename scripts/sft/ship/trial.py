"""A merged model loaded as anyone would load it, and asked one question: a held-out one of its run."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import runs
from sft.config.schema import Config, ModelSection, TuningSection
from sft.errors import ModelError, RunError, TemplateError
from sft.ship import sample

if TYPE_CHECKING:
    from sft.generation.questions import Prompt, Question

GREETING = "Hello! What can you do?"
_SHOWN = 600  # letters of a question or an answer
_LOOKED_AT = 64  # newest tokens of the prompt whose logits must be finite


@dataclass(frozen=True)
class Trial:
    """One answer. source: where the question is from. reference: what should be answered, where that is known.

    stopped: it ended by itself. tokens: tokens made, its end included.
    """

    question: str
    source: str
    reference: str | None
    text: str
    stopped: bool
    tokens: int

    def told(self) -> str:
        """Question, reference and answer for people, long ones cut."""
        lines = [f"question ({self.source}): {_cut(self.question)}"]
        if self.reference is not None:
            lines.append(f"reference: {_cut(self.reference)}")
        ended = "stopped by itself" if self.stopped else "cut off at the limit"
        return "\n".join([*lines, f"answer: {_cut(self.text)}", f"{self.tokens} tokens, {ended}; logits finite"])


def answer(folder: Path, question: str | None, root: Path) -> Trial:
    """The model's greedy answer to `question` as a single user turn; None: to the first held-out row of its run, or to
    a greeting where there is none. Raises ModelError (no model, logits not finite).
    """
    import torch

    from sft.chat.encode import encoder_for
    from sft.generation.engine import generate, prompt_room
    from sft.generation.room import fitted
    from sft.model import hub, loading
    from sft.model.tokenizer import load_tokenizer

    if not folder.is_dir():
        raise ModelError(f"there is no merged model in {folder}", where=str(folder), mend="make merge")
    run = _config(folder)
    config = run or Config()
    section = ModelSection(name=str(folder.absolute()), trust_remote_code=config.model.trust_remote_code)
    files = hub.find(section, root)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, str(files.config.get("dtype", "float32")))
    tokenizer = load_tokenizer(files, trust_remote_code=section.trust_remote_code)
    model: Any = loading.load_base(files, section, TuningSection(mode="lora"), dtype, device=device, train=False)
    encoder = encoder_for(config, tokenizer, files.kind, root)
    room = prompt_room(model, config.generation, files.kind)
    own = _held_out(lambda row: fitted(encoder, row, room), run, root) if run and question is None else None
    reference: str | None = None
    if own is not None:
        source, asked = own
        ids, text, reference = asked.ids, asked.source, asked.reference
    else:
        source = "as asked" if question is not None else "a greeting, for no held-out row of its run is here"
        text = GREETING if question is None else question
        ids = fitted(encoder, [{"role": "user", "content": text}], room)[0]
    _refuse_infinite(model, ids, files.kind, device)
    found = generate(model, tokenizer, [ids], config.generation, encoder.stops, batch_size=1, kind=files.kind)[0]
    return Trial(text, source, reference, found.text, found.stopped, found.tokens)


def _held_out(prompt: Prompt, config: Config, root: Path) -> tuple[str, Question] | None:
    """The run's first row that asks something, and the file it is from; None where the run's rows are gone.

    Rows that the template refuses are passed over, as in training.
    """
    from sft.generation.questions import answerable, questions

    plain = config.model_copy(update={"eval": config.eval.model_copy(update={"shots": 0, "turns": "last"})})
    source, rows = sample.run_rows(config, root) or ("", [])
    for row in filter(answerable, rows[: sample.ROWS]):
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
        raise ModelError("the merged model's logits are not finite", mend="merge again with --dtype bf16 or fp32")


def _config(folder: Path) -> Config | None:
    try:
        return runs.run_of_adapter(folder)
    except RunError:
        return None
