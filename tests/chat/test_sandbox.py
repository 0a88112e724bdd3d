"""Templates render as transformers renders them, in its sandbox, under limits of time and text."""

from __future__ import annotations

from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from sft.chat import template
from sft.chat.template import ChatTemplate, Refused
from sft.errors import TemplateError
from tests.chat.helpers import answer, system, user

FOLDER = Path(trl.__file__).parent / "chat_templates"
TALK = [system("Be brief."), user("Hi\n there "), answer("<think>\na\n</think>\n\nb"), user("ü🙂"), answer(" c\n")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jinja")), ids=lambda path: path.stem)
def test_text_is_that_of_transformers(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    chat_template = ChatTemplate(path.stem, source, special)
    for talk in (TALK, TALK[1:], TALK[1:4]):
        for tools in (None, [TOOL]):
            for prompt in (False, True):
                try:
                    expected = render_jinja_template(
                        [talk], tools=tools, chat_template=source, add_generation_prompt=prompt, **special
                    )[0][0]
                except Exception:
                    with pytest.raises(Refused):
                        chat_template.render(talk, tools=tools, add_generation_prompt=prompt)
                else:
                    assert chat_template.render(talk, tools=tools, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "runs for more than"),
        ("{% for i in range(99999) if i in range(99999) | list | reverse | list %}{% endfor %}", "runs for more than"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "runs for more than",
        ),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "writes more than 20,000,000 characters"),
    ],
)
def test_a_template_that_does_not_end_is_stopped(source: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.4)
    endless = ChatTemplate("evil", "\n" + source + "{{ messages }}", {})
    with pytest.raises(TemplateError, match=reason) as caught:
        endless.render(TALK)
    assert caught.value.where is not None and caught.value.where.startswith("evil:")


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages.clear() }}"])
def test_a_template_cannot_reach_python_or_change_the_row(source: str) -> None:
    chat_template = ChatTemplate("evil", source + "{{ messages }}", {})
    with pytest.raises(Refused, match="unsafe"):
        chat_template.render(TALK)


def test_a_syntax_error_names_the_line() -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("mine.jinja", "{% for m in messages %}\n{{ m.content }\n{% endfor %}", {})
    assert caught.value.where is not None and caught.value.where.startswith("mine.jinja:2: {{ m.content }")


def test_an_error_while_rendering_names_the_line_and_refuses_the_row_alone() -> None:
    chat_template = ChatTemplate("mine.jinja", "{% for m in messages %}\n{{ m.content + 3 }}\n{% endfor %}", {})
    with pytest.raises(Refused, match=r"mine\.jinja:2\): TypeError"):
        chat_template.render(TALK)
    stern = ChatTemplate("mine.jinja", "{{ messages }}\n\n{{ raise_exception('no tools here') }}", {})
    with pytest.raises(Refused, match=r"mine\.jinja:3\): no tools here"):
        stern.render(TALK)


def test_options_and_special_tokens_reach_the_template_and_its_digest() -> None:
    source = "{{ messages | length }}{{ bos_token }}{{ enable_thinking }}"
    one = ChatTemplate("t", source, {"bos_token": "<s>"}, {"enable_thinking": False})
    assert one.render(TALK) == "5<s>False"
    other = ChatTemplate("t", source, {"bos_token": "<s>"}, {"enable_thinking": True})
    assert (
        one.digest != other.digest == ChatTemplate("u", source, {"bos_token": "<s>"}, {"enable_thinking": True}).digest
    )
