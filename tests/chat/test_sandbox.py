"""Templates render as transformers renders them, and an evil one ends soon, in little memory, with its line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from sft.chat import template
from sft.chat.template import ChatTemplate, Refused
from sft.errors import TemplateError
from tests.chat.making import answer, system, user

FOLDER = Path(trl.__file__).parent / "chat_templates"
TALK = [system("Be brief."), user("Hi\n there "), answer("<think>\na\n</think>\n\nb"), user("ü🙂"), answer(" c\n")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

DOUBLED = (
    "{% set ns = namespace(a=(1,), b=(1,)) %}{% for i in range(40) %}{% set ns.a = (ns.a, ns.a) %}"
    "{% set ns.b = (ns.b, ns.b) %}{% endfor %}{% set a, b = ns.a, ns.b %}"
)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.jinja")), ids=lambda path: path.stem)
def test_text_is_that_of_transformers(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    made = ChatTemplate(path.stem, source, special)
    for talk in (TALK, TALK[1:], TALK[1:4]):
        for tools in (None, [TOOL]):
            for prompt in (False, True):
                try:
                    expected = render_jinja_template(
                        [talk], tools=tools, chat_template=source, add_generation_prompt=prompt, **special
                    )[0][0]
                except Exception:
                    with pytest.raises(Refused):
                        made.render(talk, tools=tools, add_generation_prompt=prompt)
                else:
                    assert made.render(talk, tools=tools, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ [1] * 10**9 }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a'.center(10**9) }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ '%*d' % (10**9, 3) }}",
        "{{ '%1000000000d' | format(3) }}",
        "{{ '{:>1000000000}'.format(3) }}",
        "{{ '{:>{w}}'.format(3, w=10**9) }}",
        "{{ 7 ** (10**7) }}",
        "{{ 'aaa'.replace('', 'b' * 9999999) | length }}",
        "{{ ('b' * 9999999).join(['a', 'a', 'a', 'a']) | length }}",
        "{{ ['a', 'a', 'a', 'a'] | join('b' * 9999999) | length }}",
        "{{ {'a': 1} | tojson(indent=10**9) }}",
        "{{ ('a\n' * 999999) | indent(999999) }}",
        "{{ 'a'.translate({97: 'b' * 999}) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) if i in range(99999) | list | reverse | list %}{% endfor %}",
        "{{ range(99999) | list | reject('in', range(99999) | list) | list | length }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ ('ab' * 4000000) | sort | length }}",
        "{{ ('a b ' * 2000000) | title | length }}",
        "{{ ('a' * 10000000) | batch(10) | list | length }}",
        "{{ ([[1]] * 90000) | sum(start=[]) | length }}",
        *[DOUBLED + walked for walked in ("{{ a }}", "{{ a|tojson }}", "{{ a ~ '' }}", "{{ a == b }}", "{{ {a: 1} }}")],
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_bomb_goes_off_harmlessly(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.4)
    made = ChatTemplate("evil", "\n" + source + "{{ messages }}", {})
    began = time.monotonic()
    with pytest.raises((TemplateError, Refused)) as caught:
        made.render(TALK)
    assert time.monotonic() - began < 4
    assert "evil:" in str(caught.value)


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages.clear() }}"])
def test_python_and_the_row_are_out_of_reach(source: str) -> None:
    made = ChatTemplate("evil", source + "{{ messages }}", {})
    with pytest.raises(Refused, match="unsafe"):
        made.render(TALK)


def test_a_syntax_error_names_the_line() -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("mine.jinja", "{% for m in messages %}\n{{ m.content }\n{% endfor %}", {})
    assert caught.value.where is not None and caught.value.where.startswith("mine.jinja:2: {{ m.content }")


def test_an_error_while_rendering_names_the_line_and_refuses_the_row_alone() -> None:
    made = ChatTemplate("mine.jinja", "{% for m in messages %}\n{{ m.content + 3 }}\n{% endfor %}", {})
    with pytest.raises(Refused, match=r"mine\.jinja:2\): TypeError"):
        made.render(TALK)
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
