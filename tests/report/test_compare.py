"""make compare: an adapter that does nothing gives no difference, an overfitted one has forgotten, the files add up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import compare
from sft.errors import ConfigError, DataError, ModelError
from sft.report import compare as general
from sft.report import compare_page
from tests.generation import tiny_runs
from tests.report.test_judge import Server, biased

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    """Two finished runs on one base: the adapter of `zero` does nothing, that of `other` is random."""
    root = tiny_runs.project(tmp_path_factory.mktemp("compare"), tiny_qwen2)
    tiny_runs.write_rows(root / "data" / "processed" / "test.jsonl", tiny_runs.rows(14, 40))
    tiny_runs.finished_run(root, name="zero", scale=0.0)
    tiny_runs.finished_run(root, name="other", seed=5)
    log = [{"step": step, "train/loss": 3 / step, "train/lr": 1e-3} for step in range(1, 9)]
    (root / "outputs" / "other" / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in log))
    return root


@pytest.fixture
def overfitted(tmp_path: Path) -> Path:
    """A run of the demo model, trained to give one answer to every question, until nothing else is left."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sft.config.load import load
    from sft.generation.encoder import load_encoder

    root = tiny_runs.project(tmp_path, ROOT / "models" / "demo")
    adapter = tiny_runs.finished_run(root, name="over", scale=0.0)
    encoder = load_encoder(load(root / "configs" / "run_bnb.yaml", root=root).config, root)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "demo", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    rows = [encoder.encode({"user": f"Tell me {n}.", "assistant": "It is 80."}) for n in range(4)]
    ids, labels = torch.tensor([row.input_ids for row in rows]), torch.tensor([row.labels for row in rows])
    torch.manual_seed(0)
    for _ in range(40):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(adapter)
    return root


def run(root: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    monkeypatch.setenv("SFT_ROOT", str(root))
    monkeypatch.chdir(root)
    args = compare.parser().parse_args(["--config", "configs/run_bnb.yaml", *flags])
    return compare.main(args)


def test_an_adapter_that_changes_nothing_gives_no_difference(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(project, monkeypatch, "--adapters", "adapters/zero")
    (one,) = result["comparisons"]
    assert (result["split"], result["rows"], one["name"]) == ("test", 14, "zero")
    assert {"rougeL", "sari", "exact_match", "row_loss", "stop_rate", "repetition"} <= set(one["metrics"])
    for name, metric in one["metrics"].items():
        assert (metric["difference"], metric["low"], metric["high"]) == (0.0, 0.0, 0.0), name
        assert (metric["wins"], metric["losses"], metric["finding"]) == (0, 0, "same"), name
    assert one["verdict"]["headline"] == "No difference: zero answers exactly as its base does"
    assert one["general"]["level"] != "forgotten" and one["general"]["row_loss"]["difference"] == 0.0
    folder = project / "outputs" / "zero" / "report"
    assert {path.name for path in folder.iterdir()} == {"index.html", "compare.json", "answers.jsonl", "README.md"}
    assert json.loads((folder / "compare.json").read_text()) == json.loads(json.dumps(result))
    page = (folder / "index.html").read_text()
    assert "No difference: zero answers exactly as its base does" in page
    assert not re.search(r"""(src|href)=["'](?!data:,|#)""", page) and "url(h" not in page
    assert len(ids := re.findall(r'\bid="([^"]+)"', page)) == len(set(ids))


def test_an_overfitted_adapter_raises_the_forgetting_warning(
    overfitted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(overfitted, monkeypatch, "--split", "val", "--limit", "4")
    (one,) = result["comparisons"]
    assert one["general"]["level"] == "forgotten" and one["general"]["row_loss"]["low"] > general.FORGETTING_LOSS
    assert "warning: It has forgotten general abilities" in capsys.readouterr().err
    assert one["verdict"]["finding"] == "too few rows"
    folder = overfitted / "outputs" / "over" / "report"
    assert "It has forgotten general abilities" in (folder / "index.html").read_text()
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and all(answer["answers"]["over"] == "It is 80." for answer in answers)


def test_several_models_are_compared_and_the_hub_can_read_the_card(
    project: Path, monkeypatch: pytest.MonkeyPatch, tiny_qwen2: Path
) -> None:
    from huggingface_hub import ModelCard

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(biased)
    (project / "mine.jsonl").write_text('{"user": "Say yes.", "assistant": "Yes."}\n' * 2)
    folders = ["adapters/other", "adapters/zero", str(tiny_qwen2)]
    result = run(project, monkeypatch, "--adapters", *folders, "--general", "mine.jsonl", "--limit", "12",
                "--judge-url", server.url, "--judge-model", "a-judge", "--judge-limit", "2")  # fmt: skip
    server.http.shutdown()
    assert [one["judge"]["rows"] for one in result["comparisons"]] == [2, 2, 2]
    assert result["comparisons"][1]["judge"]["aspects"]["helpfulness"]["difference"] == 0.0
    assert "a-judge scored 2 rows" in (project / "outputs" / "other" / "report" / "index.html").read_text()
    assert [one["name"] for one in result["comparisons"]] == ["other", "zero", "tiny-qwen2"]
    other, zero, whole = result["comparisons"]
    assert zero["verdict"]["finding"] == "same" == whole["verdict"]["finding"]  # the base itself, named as a model
    assert other["general"]["rows"] == 2 and other["general"]["passed"] is None
    loss, means = other["metrics"]["row_loss"], result["sides"]["row_loss"]
    assert (means["other"]["value"], means["base"]["value"]) == (loss["tuned"], loss["base"])
    assert loss["difference"] == pytest.approx(loss["tuned"] - loss["base"], abs=2e-6) and loss["difference"] != 0
    assert loss["wins"] + loss["ties"] + loss["losses"] == loss["rows"] == 12
    assert (loss["finding"] == "better") == (loss["high"] < 0)
    assert "Loss over the steps of training" in (project / "outputs" / "other" / "report" / "index.html").read_text()

    page = (project / "outputs" / "other" / "report" / "index.html").read_text()
    assert not other["sound"] and 'class="good"' not in page.split('id="s-answers"')[1]  # random weights: gibberish
    assert "rougeL ↑" in page and "row_loss ↓" in page and "length_tokens<" in page and "rows trained" not in page

    text = (project / "outputs" / "other" / "report" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder here is nothing to the hub
    assert {result.metric_type for result in card.data.eval_results} >= {"rougeL", "row_loss"}
    assert str(tiny_qwen2.parent) not in text and "| rougeL |" in text
    assert "AutoPeftModelForCausalLM" in text and "a LoRA adapter (r" in text


def test_every_answer_of_a_row_is_compared_when_eval_turns_is_all(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "One?"), ("assistant", "1."))]
    rows = [{"id": "two", "messages": turns * 2}, {"id": "one", "messages": turns}]
    tiny_runs.write_rows(project / "data" / "processed" / "val.jsonl", rows)
    result = run(project, monkeypatch, "--adapters", "adapters/other", "--split", "val", "--general", "none",
                "--set", "eval.turns=all")  # fmt: skip
    metrics = result["comparisons"][0]["metrics"]
    assert (result["rows"], metrics["rougeL"]["rows"], metrics["row_loss"]["rows"]) == (3, 3, 2)
    answers = project / "outputs" / "other" / "report" / "answers.jsonl"
    error = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(one["id"], one["scores"]["base"]["row_loss"] is None) for one in error] == [
        ("two#0", True), ("two#1", False), ("one#0", False),
    ]  # fmt: skip


def test_models_that_cannot_be_compared_are_an_error(
    project: Path, monkeypatch: pytest.MonkeyPatch, tiny_gpt2: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="no adapter"):
        run(project, monkeypatch, "--adapters", "configs")
    with pytest.raises(ConfigError, match="--judge-model"):
        run(project, monkeypatch, "--judge-url", "http://127.0.0.1:9/v1")
    with pytest.raises(DataError, match="no such file"):
        run(project, monkeypatch, "--general", "nowhere.jsonl")
    other = tiny_runs.project(tmp_path, tiny_gpt2)
    resolved = (project / "adapters" / "other" / "config.resolved.yaml").read_text()
    (tmp_path / "adapters" / "far").mkdir(parents=True)
    for path in (project / "adapters" / "other").iterdir():
        (tmp_path / "adapters" / "far" / path.name).write_bytes(path.read_bytes())
    name = re.search(r"name: (.*tiny-qwen2)", resolved)
    assert name
    (tmp_path / "adapters" / "far" / "config.resolved.yaml").write_text(resolved.replace(name[1], str(tiny_gpt2)))
    with pytest.raises(ModelError, match="different bases"):
        run(project, monkeypatch, "--adapters", "adapters/zero", str(other / "adapters" / "far"))


def test_words_that_differ_are_marked_and_all_is_escaped() -> None:
    one, other = compare_page.mark_changes("It is <b>4</b> now", "It is 5 now")
    assert one == "It is <del>&lt;b&gt;4&lt;/b&gt; </del>now" and other == "It is <ins>5 </ins>now"
    assert compare_page.mark_changes("same", "same") == ("same", "same")
