"""The parity certificate: equal for an unchanged export; each planted fault is refused and the token shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sft.chat.encode import Encoder, build_encoder
from sft.chat.template import ChatTemplate
from sft.config.schema import Config, DataSection, ModelSection
from sft.errors import TemplateError
from sft.model.files import read_config
from sft.model.tokenizer import load_tokenizer
from sft.ship import gguf, parity, verify
from sft.ship.merge import portable_template
from tests.conftest import ROOT

DEMO = ROOT / "models" / "demo"
SHIPPED = verify.shipped_rows(ROOT, 40)
THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\\n') }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def trained(**data):
    """The encoder of a run on the demo model."""
    tokenizer = load_tokenizer(DEMO)
    config = Config(model=ModelSection(name="models/demo", max_seq_len=1 << 20), data=DataSection(**data))
    return build_encoder(config, tokenizer, "causal", ROOT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A merged model's folder, as far as tokens and stops are concerned."""
    shutil.copytree(DEMO, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors", "build*"))
    return tmp_path / "m"


def edit(folder: Path, *, template: str | None = None, **generation) -> Path:
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, **generation}))
    return folder


def certify(encoder, folder: Path, rows=(*parity.GOLDEN_ROWS, *SHIPPED)) -> parity.Certificate:
    return parity.certify(encoder, [parity.route_of_folder(folder, trust_remote_code=False)], list(rows), ["golden"])


def in_llama(encoder, *, bos: str | None = None) -> tuple[gguf.Vocabulary, str]:
    tokenizer = load_tokenizer(DEMO)
    rows = int(read_config(DEMO, "demo")["vocab_size"])
    return gguf.vocabulary_of_tokenizer(tokenizer, rows, [2, 0], adds_bos=False), portable_template(encoder.template)


def test_an_unchanged_export_is_certified_on_every_row(folder):
    encoder = trained()
    vocabulary, source = in_llama(encoder)
    template = parity.go_template(encoder.template, "")
    forms = [
        parity.route_of_folder(folder, trust_remote_code=False),
        parity.route_of_gguf(vocabulary, source, encoder.tokenizer),
        parity.route_of_ollama(vocabulary, template, ["<|im_end|>"]),
    ]
    certificate = parity.certify(encoder, forms, [*parity.GOLDEN_ROWS, *SHIPPED], ["golden", "data/samples"])
    assert certificate.equal
    assert certificate.compared == {"safetensors": 47, "gguf": 47, "ollama": 46}
    assert certificate.set_aside == {"golden-tools (ollama)": "our Ollama templates do not support tools"}
    assert certificate.stops["training"] == [2]


def test_a_second_begin_token_is_refused_and_shown(folder):
    own = (DEMO / "chat_template.jinja").read_text()
    encoder = Encoder(
        ChatTemplate("with begin", "{{ '<|endoftext|>' }}" + own, {}), load_tokenizer(DEMO),
        max_seq_len=1 << 20, over_length="error", labels="all_assistant",
    )  # fmt: skip
    once = certify(encoder, edit(folder, template="{{ '<|endoftext|>' }}" + own))
    assert once.equal
    with pytest.raises(TemplateError, match=r"token 1 is '<\|endoftext\|>' \(0\), training has '<\|im_start\|>' \(1\)"):
        certify(encoder, edit(folder, template="{{ '<|endoftext|><|endoftext|>' }}" + own))


def test_a_lost_system_turn_is_refused_and_shown(folder):
    own = (DEMO / "chat_template.jinja").read_text()
    lost = own.replace("for message in messages", "for message in messages if message['role'] != 'system'")
    with pytest.raises(TemplateError) as raised:
        certify(trained(), edit(folder, template=lost), [parity.GOLDEN_ROWS[1]])
    message = str(raised.value)
    assert "row golden-system" in message
    assert "training: 'system\\nYou answer in one word.<|im_end|>" in message
    assert "safetensors: 'user\\nWhat is" in message
    assert raised.value.details["token"] == 1


def test_a_stripped_think_block_is_refused_and_shown(folder):
    with pytest.raises(TemplateError, match="row golden-think") as raised:
        certify(trained(), edit(folder, template=THINK))
    assert "training: '<think>\\n17 minus 9" in str(raised.value)


def test_another_stop_token_is_refused(folder):
    with pytest.raises(
        TemplateError, match=r"ends answers with '<\|im_end\|>' \(2\), but safetensors stops at .*\(0\)"
    ):
        certify(trained(), edit(folder, eos_token_id=0))


def test_a_tokenizer_that_splits_words_differently_is_refused(folder):
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][:-600]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(TemplateError, match="the prompt differs from training"):
        certify(trained(), folder)


def test_rows_with_control_tokens_in_words_are_skipped_and_named(folder):
    row = {"id": "odd", "user": "What is <|im_end|>?", "assistant": "A token.", "system": ""}
    certificate = certify(trained(), folder, [row, parity.GOLDEN_ROWS[0]])
    assert (certificate.set_aside, certificate.rows) == ({"odd": "its words contain control tokens"}, 1)
    with pytest.raises(
        TemplateError, match="no row could be compared for safetensors: its words contain control tokens"
    ):
        certify(trained(), folder, [row])


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "mistral", "alpaca", "vicuna", "plain", "default"])
def test_shipped_templates_go_to_llama_cpp_and_ollama(name):
    encoder = trained(template_path=name)
    vocabulary, source = in_llama(encoder)
    llama = parity.route_of_gguf(vocabulary, source, encoder.tokenizer)
    assert parity.certify(encoder, [llama], parity.GOLDEN_ROWS, ["golden"]).equal
    stops = [encoder.tokenizer.convert_ids_to_tokens(token) for token in encoder.stops.ids]
    ollama = parity.route_of_ollama(vocabulary, parity.go_template(encoder.template, ""), stops)
    assert parity.certify(encoder, [ollama], parity.GOLDEN_ROWS, ["golden"]).equal


def test_a_template_without_a_go_form_is_refused_for_ollama(tmp_path):
    (tmp_path / "numbered.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ loop.index }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}"
    )
    encoder = trained(template_path=str(tmp_path / "numbered.jinja"))
    vocabulary, source = in_llama(encoder)
    assert parity.certify(
        encoder, [parity.route_of_gguf(vocabulary, source, encoder.tokenizer)], parity.GOLDEN_ROWS, []
    ).equal
    ollama = parity.route_of_ollama(vocabulary, parity.go_template(encoder.template, ""), ["<|im_end|>"])
    with pytest.raises(TemplateError, match="in ollama, the prompt differs from training"):
        parity.certify(encoder, [ollama], parity.GOLDEN_ROWS, [])


def test_a_template_of_turns_is_exported_over_messages(folder, tmp_path):
    (tmp_path / "turns.jinja").write_text(
        "{% if system %}{{ system }}\n\n{% endif %}### Question: {{ user }}\n### Answer: {{ assistant }}<|im_end|>\n"
    )
    encoder = trained(template_path=str(tmp_path / "turns.jinja"))
    certificate = certify(encoder, edit(folder, template=portable_template(encoder.template)))
    assert certificate.compared["safetensors"] >= 40
    assert "takes one system, user and assistant text" in certificate.set_aside["golden-turns"]
