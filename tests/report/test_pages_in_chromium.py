"""The reports in a real browser: they render, sort and filter, fit a phone and dark mode, and log no error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compare
from tests.generation import tiny_runs
from tests.report.browser import chromium, tried

pytestmark = pytest.mark.slow
USE = """
const box = [...document.querySelectorAll("[data-table]")].find(one => one.querySelector("input"));
const heads = [...box.querySelectorAll("thead th")], rows = () => [...box.querySelectorAll("tbody tr")];
const column = at => rows().map(row => row.cells[at].dataset.value ?? row.cells[at].textContent.trim());
const visible = () => rows().filter(row => row.getBoundingClientRect().height > 0).length;
const last = heads.length - 1, r = {rows: rows().length, before: column(last)};
heads[last].querySelector("button").click(); r.up = column(last); r.mark = heads[last].getAttribute("aria-sort");
heads[last].querySelector("button").click(); r.down = column(last);
heads[0].querySelector("button").click(); r.ids = column(0); r.unmarked = heads[last].getAttribute("aria-sort");
const search = box.querySelector("input"), put = (field, value, event) => {
  field.value = value; field.dispatchEvent(new Event(event, {bubbles: true})); };
put(search, "41 what", "input"); r.searched = visible(); r.count = box.querySelector("output").textContent;
put(search, "no such words", "input"); r.none = visible();
put(search, "", "input"); r.all = visible();
const choice = box.querySelector("select"); r.options = [...choice.options].map(one => one.value).filter(Boolean);
put(choice, r.options[0], "change"); r.chosen = visible();
r.meant = rows().filter(row => row.cells[Number(choice.dataset.column)].dataset.value === r.options[0]).length;
return r;
"""
LOOK = """
const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(one => one / 255)
  .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const under = node => { for (let one = node; one; one = one.parentElement) {
  const colour = getComputedStyle(one).backgroundColor; if (!/, 0\\)|transparent/.test(colour)) return colour; }
  return "rgb(255,255,255)"; };
const poor = [];
for (const node of document.querySelectorAll("p,td,th,figcaption,small,summary,a,b,ins,del,label,caption,output")) {
  const [one, other] = [light(getComputedStyle(node).color), light(under(node))].sort((a, b) => b - a);
  if ((one + 0.05) / (other + 0.05) < 4.5) poor.push(node.tagName + " " + node.className);
}
const ids = [...document.querySelectorAll("[id]")].map(one => one.id);
return {
  width: innerWidth, wide: document.documentElement.scrollWidth,
  dark: light(getComputedStyle(document.body).backgroundColor) < 0.2,
  poor: [...new Set(poor)], drawings: document.querySelectorAll("figure svg").length,
  unseen: [...document.querySelectorAll("figure svg")].filter(one => one.getBoundingClientRect().height < 40).length,
  unnamed: document.querySelectorAll("svg:not([aria-label]),input:not(label input),select:not(label select)").length,
  heads: document.querySelectorAll("h1").length, lang: document.documentElement.lang,
  twice: ids.length - new Set(ids).size,
  bar: getComputedStyle(document.querySelector("svg [style*='fill: var(--two)']")).fill,
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    chromium()
    root = tiny_runs.project(tmp_path_factory.mktemp("pages"), tiny_qwen2)
    tiny_runs.write_rows(root / "data" / "processed" / "test.jsonl", tiny_runs.rows(14, 40))
    tiny_runs.finished_run(root, scale=0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_ROOT", str(root))
        flags = ["--config", str(root / "configs" / "run_bnb.yaml"), "--set", "eval.metrics=[sari, rougeL]"]
        compare.main(compare.parser().parse_args(flags))
    return root / "outputs" / "tiny" / "report" / "index.html"


def numbers(values: list[str]) -> list[float]:
    return [float(value) for value in values]


def test_the_table_of_answers_sorts_and_filters(page: Path, tmp_path: Path) -> None:
    # the first table with a search field is the general questions' in its closed detail: open all, look at the answers
    script = 'document.querySelectorAll("details").forEach(one => one.remove());' + USE
    report, console = tried(page, script, tmp_path)
    assert console == [] and "error" not in report, (console, report)
    assert report["rows"] == report["all"] == 14
    assert len(set(report["before"])) > 2
    assert numbers(report["up"]) == sorted(numbers(report["before"]))
    assert numbers(report["down"]) == sorted(numbers(report["before"]), reverse=True)
    assert report["mark"] == "ascending" and report["unmarked"] is None
    assert report["ids"] == [f"r{n}" for n in range(40, 54)]
    assert report["searched"] == 1 and report["count"] == "1 of 14 rows" and report["none"] == 0
    assert report["chosen"] == report["meant"] >= 1


@pytest.mark.parametrize(
    ("flags", "dark"),
    [
        (("--window-size=1200,900",), False),
        (("--window-size=500,900",), False),
        (("--window-size=500,900", "--force-dark-mode", "--blink-settings=preferredColorScheme=0"), True),
    ],
    ids=["desk", "phone", "phone in the dark"],
)
def test_the_page_works_on_small_screens_in_the_dark_and_on_paper(
    page: Path, tmp_path: Path, flags: tuple[str, ...], dark: bool
) -> None:
    report: dict[str, Any]
    report, console = tried(page, LOOK, tmp_path, *flags)
    assert console == [] and "error" not in report, (console, report)
    assert report["dark"] is dark and report["poor"] == []
    assert report["wide"] <= report["width"]  # nothing overflows the screen
    assert report["drawings"] >= 6 and report["unseen"] == 0 and report["unnamed"] == 0
    assert (report["heads"], report["lang"], report["twice"]) == (1, "en", 0)
    assert report["bar"] == ("rgb(98, 176, 255)" if dark else "rgb(11, 107, 203)")  # drawings follow the page
