"""The shipped demo model and samples: their content, that they are reproducible, and that nothing leaks."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo_model import build, pretrain
from demo_model.corpus import Message, chats
from demo_model.samples import FIRST_NAMES, LAST_NAMES

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/demo"
SAMPLES = ROOT / "data/samples/support_desk.jsonl"
COMMAND = [sys.executable, str(ROOT / "dev/make_demo_model.py")]
TEXTS = (
    "Order 48213, please: Mara's blue kettle isn't here!",
    "  two  spaces\n\n\nand lines\t\r\ntabs \n ",
    "naïve café, Ångström, e\u0301, 東京, 🙂",
    "<|im_start|>user\nHello<|im_end|>\n",
    '{"name": "Ineja Toral", "number": 30201} | a - b / c; d',
    "We'll SAY it's 1,234.50 they'VE paid",
)


@cache
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@cache
def trained_tokenizer() -> PreTrainedTokenizerBase:
    return build.train_tokenizer(build.Recipe())


@cache
def samples() -> list[dict[str, str]]:
    return [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]


def answer(chat: list[Message]) -> tuple[str, bool]:
    """The model's answer by greedy decoding, and whether it stopped by itself."""
    inputs = tokenizer().apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model().generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :].tolist()
    stopped = output[-1] == tokenizer().eos_token_id
    return tokenizer().decode(output, skip_special_tokens=True), stopped


def test_the_folder_is_at_most_8_mb_and_holds_no_checkpoint() -> None:
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) <= 8_000_000
    assert {file.suffix for file in MODEL.iterdir()} <= {".json", ".jsonl", ".jinja", ".md", ".safetensors"}


def test_the_model_is_a_qwen2_whose_widths_quantisers_divide() -> None:
    config = model().config
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.hidden_size % 64 == 0 and config.intermediate_size % 64 == 0
    assert (config.hidden_size // config.num_attention_heads) % 32 == 0
    assert config.max_position_embeddings >= 1024
    assert model().dtype == torch.float32


def test_the_stop_tokens_agree_in_tokenizer_config_and_generation_config() -> None:
    assert (tokenizer().eos_token, tokenizer().pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer().eos_token_id == model().config.eos_token_id
    stops = tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model().generation_config.eos_token_id == stops


def test_autotokenizer_gives_the_ids_of_the_tokenizer_that_was_trained_with() -> None:
    texts = [*TEXTS, *(row["user"] for row in samples()[:100])]
    texts += ["".join(text for text, _ in build.render(chat)) for chat in itertools.islice(chats(99), 100)]
    for text in texts:
        assert tokenizer()(text).input_ids == trained_tokenizer()(text).input_ids


@pytest.mark.parametrize("text", [text for text in TEXTS if "\u0301" not in text])
def test_the_tokenizer_decodes_to_the_original_text(text: str) -> None:
    assert tokenizer().decode(tokenizer()(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_every_digit_and_every_special_token_is_one_token() -> None:
    assert tokenizer().tokenize("48213") == list("48213")
    assert tokenizer().tokenize("<|im_end|>") == ["<|im_end|>"]


def test_the_template_renders_the_text_that_was_trained_on() -> None:
    for chat in itertools.islice(chats(5), 50):
        assert tokenizer().apply_chat_template(chat, tokenize=False) == "".join(text for text, _ in build.render(chat))


def test_the_generation_prompt_opens_the_assistants_turn() -> None:
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert tokenizer().apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_copies_an_unseen_name_and_number_from_a_letter_and_stops() -> None:
    letter = "Hello,\n\nI am Drosia Welkerberg. My number is 90417. What a wonderful silver flute!\n\nYours,"
    assert answer([{"role": "user", "content": f"{letter}\n\nWhat is the name of the writer?"}]) == (
        "Drosia Welkerberg",
        True,
    )
    assert answer([{"role": "user", "content": f"{letter}\n\nWhich number is given?"}]) == ("90417", True)


def test_it_predicts_most_answer_tokens_of_held_out_chats() -> None:
    held_out = pretrain.batches(tokenizer(), itertools.islice(chats(pretrain.HELD_OUT_SEED + 1), 128), seed=1)
    with torch.inference_mode():
        assert pretrain.answers_right(model(), held_out) >= 0.75


def test_the_untuned_model_writes_no_ticket() -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = []
    for row in samples()[:24]:
        output, _ = answer([{"role": role, "content": row[role]} for role in ("system", "user")])
        assert output != row["assistant"]
        scores.append(scorer.score(row["assistant"], output)["rougeL"].fmeasure)
    assert sum(scores) / len(scores) < 0.3


@pytest.mark.slow
def test_a_short_build_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    short = [*COMMAND, "--steps", "3", "--threads", "1", "--out"]
    builds = [subprocess.Popen([*short, str(tmp_path / name)]) for name in ("first", "second")]
    assert [build.wait() for build in builds] == [0, 0]
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_stopped_build_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"EVERY": 2, "CHUNK_ROWS": 128, "STEPS_A_CHUNK": 2, "HELD_OUT_ROWS": 16}.items():
        monkeypatch.setattr(pretrain, name, value)
    recipe = build.Recipe(steps=4, hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1)

    def weights(folder: Path, stop_at: int) -> dict[str, torch.Tensor]:
        built = build.new_model(recipe, len(tokenizer()))

        def report(at: pretrain.Progress) -> None:
            if at.step == stop_at:
                raise KeyboardInterrupt

        try:
            pretrain.pretrain(built, tokenizer(), recipe, folder, report)
        except KeyboardInterrupt:
            assert (folder / pretrain.CHECKPOINT).exists()
        return built.state_dict()

    whole = weights(tmp_path / "whole", stop_at=0)
    weights(tmp_path / "stopped", stop_at=3)
    resumed = weights(tmp_path / "stopped", stop_at=0)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_samples_are_reproducible(tmp_path: Path) -> None:
    subprocess.run([*COMMAND, "--samples", "--out", str(tmp_path / "again.jsonl")], check=True)
    assert (tmp_path / "again.jsonl").read_bytes() == SAMPLES.read_bytes()


def test_the_samples_are_many_and_no_customer_or_order_comes_twice() -> None:
    tickets = [row["assistant"].split(" | ") for row in samples()]
    assert len(tickets) >= 500
    assert len({ticket[0] for ticket in tickets}) == len({ticket[2] for ticket in tickets}) == len(tickets)
    for row, ticket in zip(samples(), tickets, strict=True):
        assert len(ticket) == 4
        assert all(field in row["user"] for field in ticket)


@pytest.mark.slow
def test_no_name_or_order_number_of_the_samples_is_in_the_pretraining_text() -> None:
    """The whole text, chunk by chunk. A ticket holds a name and a number, so no ticket occurs there either."""
    recipe = build.Recipe(**json.loads((MODEL / "build.json").read_text(encoding="utf-8"))["recipe"])
    kept_out = frozenset(FIRST_NAMES + LAST_NAMES) | {row["assistant"].split(" | ")[0] for row in samples()}
    chunks = [pretrain.chunk_chats(recipe, chunk) for chunk in range(-(-recipe.steps // pretrain.STEPS_A_CHUNK))]
    for drawn in [itertools.islice(chats(recipe.seed), recipe.tokenizer_chats), *chunks]:
        text = "\n".join(turn["content"] for chat in drawn for turn in chat)
        assert kept_out.isdisjoint(re.findall(r"\w+", text))


def test_no_constant_answer_scores_on_the_samples() -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    answers = [row["assistant"] for row in samples()]
    for constant in [
        *answers[:40],
        "normal",
        "late parcel normal",
        "missing part | low",
        "wrong item | black | normal",
    ]:
        scores = [scorer.score(reference, constant)["rougeL"].fmeasure for reference in answers]
        assert sum(scores) / len(scores) <= 0.25
        assert answers.count(constant) <= 0.1 * len(answers)


def test_the_faq_has_questions_and_answers() -> None:
    rows = [json.loads(line) for line in (ROOT / "data/samples/faq.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 40
    assert all(set(row) == {"question", "answer"} and all(row.values()) for row in rows)
    assert len({row["question"] for row in rows}) == len(rows)
