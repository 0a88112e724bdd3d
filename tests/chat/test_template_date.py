"""The date that a template prints: one for the whole run, in every command and in what is exported."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers.utils.chat_template_utils import render_jinja_template

from sft import runs
from sft.chat import template
from sft.chat.template import ChatTemplate, fix_date, load_template
from sft.config.schema import Config, DataSection
from sft.ship.merge import portable_template
from tests.chat import words
from tests.chat.helpers import CHATML, ROOT, user
from tests.training import project
from tests.training.test_command import as_if_killed_after

DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') if strftime_now is defined }}\n" + CHATML
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def test_the_date_is_part_of_the_digest_of_templates_that_print_it() -> None:
    first, second = (ChatTemplate("t", DATED, SPECIAL, day=date(2026, 1, day)) for day in (2, 3))
    assert first.render([user("Hi")]).startswith("Today is 02 Jan 2026") and first.digest != second.digest
    plain = [ChatTemplate("t", CHATML, SPECIAL, day=date(2026, 1, day)).digest for day in (2, 3)]
    assert plain[0] == plain[1] == ChatTemplate("t", CHATML, SPECIAL).digest


def test_a_config_without_a_date_takes_that_of_the_run_it_resumes_else_today(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "today", lambda: date(2026, 5, 1))
    first = fix_date(Config())
    monkeypatch.setattr(template, "today", lambda: date(2026, 5, 2))
    assert first.data.template_date == "2026-05-01" == fix_date(Config(), first).data.template_date
    assert fix_date(Config(), Config()).data.template_date == "2026-05-02"  # a run of a version without the key
    explicit = Config(data=DataSection(template_date="2020-02-29"))
    assert fix_date(explicit, first) is explicit
    assert load_template(explicit.data, words.tokenizer(template=DATED), ROOT).day == date(2020, 2, 29)
    with pytest.raises(ValueError, match=r"is not a date: write auto, or year-month-day"):
        DataSection(template_date="tomorrow")


def test_an_exported_template_prints_the_date_of_the_run() -> None:
    dated = ChatTemplate("t", DATED, SPECIAL, day=date(2026, 1, 2))
    text = render_jinja_template([[user("Hi")]], chat_template=portable_template(dated), **SPECIAL)[0][0]
    assert text == dated.render([user("Hi")])
    assert "macro" not in portable_template(ChatTemplate("t", CHATML, SPECIAL))


def test_a_run_resumed_on_another_day_ends_with_the_same_adapter(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = project.make(tmp_path, tiny_qwen2)
    (root / "dated.jinja").write_text(DATED, encoding="utf-8")
    monkeypatch.setenv("SFT_ROOT", str(root))
    settings = ("data.template_path=dated.jinja", "train.max_steps=4", "eval.train_sample=0")

    def train_on(day: int) -> Any:
        monkeypatch.setattr(template, "today", lambda: date(2026, 1, day))
        project.run(root, *settings)
        return load_file(root / "adapters/t/adapter_model.safetensors")

    adapter = train_on(2)
    as_if_killed_after(root, 2)
    resumed = train_on(3)
    assert all(bool((resumed[name] == weight).all()) for name, weight in adapter.items())
    assert runs.run_of_adapter(root / "adapters/t").data.template_date == "2026-01-02"
