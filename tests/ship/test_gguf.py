"""GGUF files: read back value by value, llama.cpp's token ids, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sft import runs
from sft.chat.encode import build_encoder
from sft.config.schema import Config, ModelSection, TuningSection
from sft.errors import ModelError, RunError, TemplateError
from sft.generation.load import Target
from sft.model import gguf as model_gguf
from sft.model import hub
from sft.model.tokenizer import load_tokenizer
from sft.runs import run_of_adapter
from sft.ship import gguf as ship_gguf
from sft.ship.export import export
from tests import tiny_models
from tests.conftest import ROOT

DEMO = ROOT / "models" / "demo"
NO_LLAMA = (
    "llama_cpp is not installed: pip install llama-cpp-python (built from source, minutes), or SFT_LLAMA_PYTHON=python"
)


def model_files(folder: Path):
    return hub.find(ModelSection(name=str(folder)), folder)


def vocabulary(folder: Path) -> model_gguf.Vocabulary:
    rows = model_files(folder).config["vocab_size"]
    tokenizer = load_tokenizer(folder)
    return ship_gguf.vocabulary_of_tokenizer(tokenizer, rows, [tokenizer.eos_token_id], adds_bos=False)


def written(folder: Path, path: Path, kind: str) -> float:
    ship_gguf.write(model_files(folder), path, kind, vocabulary(folder), "{{ messages }}", lambda *_: None)
    return ship_gguf.check(model_files(folder), path, kind, lambda *_: None)


def tiny(folder: Path, family: str) -> Path:
    """A random model of one of the supported families."""
    import transformers

    tiny_models.byte_level_tokenizer(folder)
    config_class, model_class = {
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "llama3": ("LlamaConfig", "LlamaForCausalLM"),
        "mistral": ("MistralConfig", "MistralForCausalLM"),
    }[family]
    settings = {
        "vocab_size": 416,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }
    if family == "llama3":
        settings["rope_parameters"] = {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
        }  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-3), ("q8_0", 0.05), ("bf16", 0.01), ("f32", 0.0)])
def test_every_number_is_read_back_within_its_type(tmp_path, kind, most):
    assert written(DEMO, tmp_path / "m.gguf", kind) <= most
    stored = model_gguf.vocabulary_of_file(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert stored == vocabulary(DEMO)


def test_a_wrong_number_in_the_file_is_an_error(tmp_path):
    written(DEMO, tmp_path / "m.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf", "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.2.ffn_up.weight")
    tensor.data[5, 40] ^= 0x40
    reader.data.flush()
    with pytest.raises(ModelError, match=r"blk\.2\.ffn_up\.weight in m\.gguf differs from the model's by up to"):
        ship_gguf.check(model_files(DEMO), tmp_path / "m.gguf", "q8_0", lambda *_: None)


def test_an_unsupported_architecture_is_refused_by_name(tiny_gpt2, tmp_path):
    with pytest.raises(ModelError, match=r"is a GPT2LMHeadModel; .* supports Qwen2ForCausalLM, .*LlamaForCausalLM"):
        written(tiny_gpt2, tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()


def test_what_gguf_does_not_support_is_refused_before_merging(tiny_gpt2, tmp_path):
    config = Config(model=ModelSection(name=str(tiny_gpt2)))
    runs.write_resolved(tmp_path / "a", config)  # no adapter in it: a merge would say so
    target = Target(config, None, adapter=tmp_path / "a")
    with pytest.raises(ModelError, match="export to GGUF supports Qwen2"):
        export(target, "gguf", "f16", tmp_path / "out", tmp_path, card="")
    gone = config.model.model_copy(update={"name": str(tmp_path / "gone")})
    with pytest.raises(ModelError, match=rf"if the base of a \({tiny_gpt2}\) has moved: --set model.name="):
        export(replace(target, config=Config(model=gone)), "hf", "f16", tmp_path / "out", tmp_path, card="")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_its_own_code_is_exported_where_that_is_trusted(tmp_path):
    folder = tmp_path / "outputs" / "run" / "model"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("build*"))
    (folder / "own_tokenizer.py").write_text(
        "from transformers import Qwen2TokenizerFast\n\n\n"
        "class OwnTokenizer(Qwen2TokenizerFast):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **{**kwargs, 'bos_token': '<|im_start|>'})\n"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model = ModelSection(name=str(folder), trust_remote_code=True)
    target = Target(Config(model=model, tuning=TuningSection(mode="full")), None, merged=folder)
    report = export(target, "gguf", "f32", tmp_path / "out", tmp_path, card="")
    assert (report.parity["equal"], report.largest_error) == (True, 0.0)
    reader = gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf")
    assert model_gguf.vocabulary_of_file(reader).bos == load_tokenizer(DEMO).convert_tokens_to_ids("<|im_start|>")


def converter(folder: Path, body: str) -> Path:
    """A program in the place of llama.cpp's converter; `outfile` is the path that it has to write."""
    start = "import pathlib, sys\noutfile = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(start + body)
    return path


def test_a_converters_file_is_checked_as_our_own_is(tmp_path):
    template, path = (DEMO / "chat_template.jinja").read_text(), tmp_path / "theirs.gguf"
    script = converter(tmp_path, f"outfile.write_bytes(pathlib.Path({str(path)!r}).read_bytes())")
    target = Target(Config(model=ModelSection(name=str(DEMO))), None, merged=DEMO)
    ship_gguf.write(model_files(DEMO), path, "f32", vocabulary(DEMO), template, lambda *_: None)
    report = export(target, "ollama", "f32", tmp_path / "out", tmp_path, card="", converter=script.parent)
    assert (report.parity["equal"], report.largest_error, report.tensors) == (True, None, 50)
    assert (tmp_path / "out" / "demo-f32.gguf").read_bytes() == path.read_bytes()
    wrong = replace(vocabulary(DEMO), pre="gpt-2")
    ship_gguf.write(model_files(DEMO), path, "f32", wrong, template, lambda *_: None)
    with pytest.raises(TemplateError, match="parity: in gguf, the prompt differs from training"):
        export(target, "gguf", "f32", tmp_path / "no", tmp_path, card="", converter=script)
    unknown = replace(vocabulary(DEMO), pre="never-heard-of")
    ship_gguf.write(model_files(DEMO), path, "f32", unknown, template, lambda *_: None)
    if not ship_gguf.has_llama_cpp():
        with pytest.raises(ModelError, match="cannot be checked: its pre-tokenizer is 'never-heard-of'"):
            export(target, "gguf", "f32", tmp_path / "no", tmp_path, card="", converter=script)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('x')\nsys.exit('Model GraniteForCausalLM is not supported')", "demo: Model GraniteForCausalLM is not"),
        ("raise NotImplementedError('pre-tokenizer')", "cannot convert demo: NotImplementedError: pre-tokenizer"),
        ("", "cannot convert demo: it wrote no file"),
        ("outfile.write_bytes(b'GGUF' + b'x' * 99)", "cannot convert demo: its file cannot be read"),
    ],
)
def test_a_converter_that_fails_is_an_error_with_its_own_words_and_leaves_nothing(tmp_path, body, message):
    target = Target(Config(model=ModelSection(name=str(DEMO))), None, merged=DEMO)
    with pytest.raises(ModelError, match=message):
        export(target, "gguf", "f16", tmp_path / "out", tmp_path, card="", converter=converter(tmp_path, body))
    assert [path.name for path in tmp_path.iterdir()] == ["convert_hf_to_gguf.py"]


def test_a_converter_is_named_for_gguf_and_exists(tmp_path):
    target = Target(Config(model=ModelSection(name=str(DEMO))), None, merged=DEMO)
    for form, message in (("hf", "a converter writes GGUF files"), ("gguf", r"gone\.py does not exist")):
        with pytest.raises(ModelError, match=message):
            export(target, form, "f16", tmp_path / "out", tmp_path, card="", converter=tmp_path / "gone.py")


def test_an_export_replaces_only_an_earlier_export(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    target = Target(Config(), None, merged=DEMO)
    with pytest.raises(RunError, match="is not an export"):
        export(target, "gguf", "f16", tmp_path, tmp_path, card="")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_numbers_too_large_for_f16_are_refused(tmp_path):
    tiny(tmp_path / "m", "qwen2")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight does not fit f16"):
        written(tmp_path / "m", tmp_path / "m.gguf", "f16")
    assert written(tmp_path / "m", tmp_path / "m.gguf", "f32") == 0.0


def test_llama_3_frequencies_are_transformers_own(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig.from_pretrained(tiny(tmp_path / "m", "llama3"))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 10000.0 ** (np.arange(0, 32, 2) / 32)
    assert np.allclose(plain / model_gguf.rope_factors(model_files(tmp_path / "m").config), scaled.numpy(), rtol=1e-5)


@pytest.mark.parametrize(("pattern", "pre"), [(r"\p{N}", "qwen2"), (r"\p{N}{1,3}", "llama-bpe")])
def test_the_pre_tokeniser_is_the_one_that_gives_the_models_ids(tmp_path, pattern, pre):
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("build*"))
    state = json.loads((folder / "tokenizer.json").read_text())
    text = json.dumps(state["pre_tokenizer"])
    assert r"\\p{N}" in text
    state["pre_tokenizer"] = json.loads(text.replace(r"|\\p{N}|", json.dumps(f"|{pattern}|")[1:-1]))
    for at, pair in enumerate((["4", "8"], ["48", "2"])):  # numbers of several digits are tokens
        state["model"]["vocab"]["".join(pair)] = 2048 + at
        state["model"]["merges"].append(pair)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2050}))
    assert vocabulary(folder).pre == pre


def splitter(pre: str):
    """The pre-tokeniser that models of a kind have in their own tokenizer.json."""
    from tokenizers import Regex, pre_tokenizers

    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(False)
    if pre == "smollm":  # as SmolLM2's own file has it
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    cuts = [pre_tokenizers.Split(Regex(text), "isolated") for text in model_gguf.PRE_TOKENIZERS[pre]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(False, use_regex=False)])


def tokenizer_like(pre: str, texts: list[str], vocab: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter(pre), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=alphabet, show_progress=False, special_tokens=["<end>"]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.mark.parametrize("pre", model_gguf.PRE_TOKENIZERS)
@pytest.mark.parametrize("texts", [list(model_gguf.PROBES) * 2, ["a b\n\nc  d"] * 4], ids=["full", "small"])
def test_each_pre_tokeniser_is_recognised_by_its_own_tokenizer(pre, texts):
    tokenizer = tokenizer_like(pre, texts, 1200)
    assert ship_gguf.vocabulary_of_tokenizer(tokenizer, len(tokenizer), [0], adds_bos=False).pre == pre


@pytest.mark.parametrize("pair", list(itertools.combinations(model_gguf.PRE_TOKENIZERS, 2)), ids="-".join)
def test_the_probes_separate_every_pair_of_pre_tokenisers(pair):
    one, other = (splitter(pre) for pre in pair)
    assert any(one.pre_tokenize_str(text) != other.pre_tokenize_str(text) for text in model_gguf.PROBES)


def test_a_blank_line_before_a_digit_separates_smollm_from_gpt_2():
    tokenizer = tokenizer_like("smollm", ["a\n\n8  7"] * 4, 300)
    vocabulary = ship_gguf.vocabulary_of_tokenizer(tokenizer, len(tokenizer), [0], adds_bos=False)
    as_gpt2 = replace(vocabulary, pre="gpt-2")
    assert model_gguf.first_difference(tokenizer, vocabulary, model_gguf.PROBES) is None
    assert "8" in str(model_gguf.first_difference(tokenizer, as_gpt2, model_gguf.PROBES))


def test_a_tokenizer_that_llama_cpp_cannot_express_is_refused_with_the_text(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("build*"))
    state = json.loads((folder / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ModelError, match=r"with qwen2, 'Order 48213.* becomes .* in the model and .* in llama.cpp"):
        vocabulary(folder)


# --- a real llama.cpp


@pytest.fixture(scope="module")
def llama() -> list[str]:
    """The interpreter that has llama_cpp, with the script that it runs."""
    python = os.environ.get("SFT_LLAMA_PYTHON", sys.executable)
    installed = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
    if installed.returncode:
        pytest.skip(NO_LLAMA)
    return [python, str(Path(__file__).with_name("llama_answers.py"))]


def ask(llama: list[str], model: Path, prompts: list[str], texts: list[str], tokens: int) -> dict:
    request = {"model": str(model), "prompts": prompts, "texts": texts, "tokens": tokens}
    done = subprocess.run(llama, input=json.dumps(request), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def greedy(folder: Path, prompt: list[int], tokens: int, stops: set[int]) -> list[int]:
    """The model's own greedy answer, a token at a time, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(stops), pad_token_id=0
    )[0, len(prompt) :].tolist()  # fmt: skip
    return generated[: next((at for at, token in enumerate(generated) if token in stops), len(generated))]


def first_departures(model, prompts: list[list[int]], answers: list[list[int]], stops: set[int], most: int) -> list:
    """Where greedy decoding by `model` leaves an answer: (prompt, position, its choice's logit over the answer's).

    One forward over prompt and answer shows it: up to the first departure, the model has chosen each token itself.
    """
    departures = []
    for at, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 :]
        for place, scores in enumerate(logits[: len(answer) + (len(answer) < most)]):
            best = int(scores.argmax())
            ended = place == len(answer)  # llama.cpp ended here
            if best in stops if ended else best == answer[place]:
                continue
            other = max(float(scores[stop]) for stop in stops) if ended else float(scores[answer[place]])
            departures.append((at, place, float(scores[best]) - other))
            break
    return departures


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "llama3", "mistral"])
def test_llama_cpp_answers_as_transformers_does_in_every_family(llama, tmp_path, family):
    folder = tiny(tmp_path / "m", family)
    written(folder, tmp_path / "m.gguf", "f32")
    prompt = "<|im_start|>user\n" + " ".join(tiny_models.TEXT[:2]) + "<|im_end|>\n<|im_start|>assistant\n"
    answered = ask(llama, tmp_path / "m.gguf", [prompt], [], 24)
    stops = ship_gguf.stop_ids(vocabulary(folder))
    assert answered["prompts"] == [load_tokenizer(folder).encode(prompt)]
    assert answered["answers"] == [greedy(folder, answered["prompts"][0], 24, stops)]


@pytest.mark.slow
def test_a_converters_file_that_llama_cpp_fails_on_is_refused(tmp_path):
    pytest.importorskip("llama_cpp", reason=NO_LLAMA)
    own, path = vocabulary(DEMO), tmp_path / "theirs.gguf"
    broken = replace(own, tokens=[f"[{at}]" if len(token) == 1 else token for at, token in enumerate(own.tokens)])
    ship_gguf.write(model_files(DEMO), path, "f32", replace(broken, merges=[]), "{{ messages }}", lambda *_: None)
    script = converter(tmp_path, f"outfile.write_bytes(pathlib.Path({str(path)!r}).read_bytes())")
    target = Target(Config(model=ModelSection(name=str(DEMO))), None, merged=DEMO)
    with pytest.raises(ModelError, match=r"cannot convert demo: llama\.cpp cannot tokenise with its file"):
        export(target, "gguf", "f32", tmp_path / "out", tmp_path, card="", converter=script)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_gguf_of_another_architecture_is_imported_trained_exported_and_answers_alike(llama, tmp_path, command):
    folder = tiny(tmp_path / "m", "qwen2")
    template = load_tokenizer(folder).chat_template
    ship_gguf.write(model_files(folder), tmp_path / "q.gguf", "q8_0", vocabulary(folder), template, lambda *_: None)
    config = ["--config", ROOT / "configs" / "demo_cpu.yaml", "--set", "model.name=models/q model.max_seq_len=1024"]
    for step in (
        ("import_gguf", "--file", tmp_path / "q.gguf"),
        ("process_data", *config, "--raw_path", ROOT / "data" / "samples" / "support_desk.jsonl"),
        ("train", *config, "--set", "train.max_steps=6 train.eval_strategy=no"),
        ("merge_lora", *config, "--dtype", "fp32", "--out", tmp_path / "merged"),
        ("export", *config, "--format", "gguf", "--type", "f32"),
    ):
        done = command(*step, SFT_ROOT=str(tmp_path))
        assert done.returncode == 0, done.stderr
    encoder = build_encoder(
        run_of_adapter(tmp_path / "merged"), load_tokenizer(tmp_path / "merged"), "causal", tmp_path
    )
    turns = [[{"role": "user", "content": text}] for text in ("What is it?", *tiny_models.TEXT[:3])]
    prompts = [encoder.template.render(each, add_generation_prompt=True) for each in turns]
    (path,) = (tmp_path / "outputs" / "export").glob("*/*-f32.gguf")
    answered = ask(llama, path, prompts, [], 24)
    assert answered["prompts"] == [encoder.prompt(each) for each in turns]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    departures = first_departures(model, answered["prompts"], answered["answers"], set(encoder.stops.ids), 24)
    assert all(gap < 1e-3 for _, _, gap in departures), (
        departures
    )  # a random model's best tokens may be as good as tied


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_llama_cpp_gives_the_tuned_demo_s_text_for_20_prompts_in_f16(llama, tmp_path, command):
    """End to end: train, export, load in llama.cpp, and compare the greedy text."""
    from sft.ship.parity import GOLDEN_ROWS

    root, config = {"SFT_ROOT": str(tmp_path)}, ["--config", ROOT / "configs" / "demo_cpu.yaml"]
    raw = ROOT / "data" / "samples" / "support_desk.jsonl"
    for step in (
        ("process_data", *config, "--raw_path", raw),
        ("train", *config, "--set", "train.max_steps=240"),
        ("export", *config, "--format", "gguf"),
        ("merge_lora", *config),
    ):
        done = command(*step, timeout=1500, **root)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "merged_fp16"
    tokenizer = load_tokenizer(folder)
    encoder = build_encoder(run_of_adapter(folder), tokenizer, "causal", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "data" / "processed" / "test.jsonl").read_text().splitlines()[:20]]
    assert len(rows) == 20
    turns = [[{"role": role, "content": row[role]} for role in ("system", "user")] for row in rows]
    prompts = [encoder.template.render(one, add_generation_prompt=True) for one in turns]
    texts = [*model_gguf.PROBES, *(turn["content"] for row in GOLDEN_ROWS for turn in row["messages"])]
    texts = [unicodedata.normalize("NFC", text) for text in texts]  # as the tokenizer does; llama.cpp does not
    answered = ask(llama, tmp_path / "outputs" / "export" / "demo-gguf" / "demo-f16.gguf", prompts, texts, 64)
    assert answered["ids"] == [tokenizer.encode(text) for text in texts]
    assert answered["prompts"] == [encoder.prompt(one) for one in turns]
    assert answered["template"] == encoder.template.source
    expected = [tokenizer.decode(greedy(folder, prompt, 64, set(encoder.stops.ids))) for prompt in answered["prompts"]]
    assert answered["texts"] == expected
