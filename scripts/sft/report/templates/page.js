"use strict";
/* Tables with data-table: a button in each heading sorts, the fields above filter. Folded parts open for printing,
   except the numbers under a chart. */
for (const box of document.querySelectorAll("[data-table]")) {
  const body = box.querySelector("tbody"), rows = [...body.rows], heads = [...box.querySelectorAll("thead th")];
  const search = box.querySelector("input"), choices = [...box.querySelectorAll("select")], count = box.querySelector("output");
  const value = (row, at) => row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
  const filter = () => {
    const words = (search?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word)) ||
        choices.some(one => one.value && value(row, Number(one.dataset.column)) !== one.value);
      shown += !row.hidden;
    }
    if (count) count.textContent = shown === rows.length ? `${shown} rows` : `${shown} of ${rows.length} rows`;
  };
  const sort = at => {
    const down = heads[at].getAttribute("aria-sort") === "ascending", number = rows.every(row => row.cells[at].dataset.value !== undefined && !isNaN(value(row, at)));
    heads.forEach(head => head.removeAttribute("aria-sort"));
    heads[at].setAttribute("aria-sort", down ? "descending" : "ascending");
    const by = number ? (a, b) => value(a, at) - value(b, at)
      : (a, b) => value(a, at).localeCompare(value(b, at), undefined, {numeric: true});
    body.append(...[...rows].sort((a, b) => down ? by(b, a) : by(a, b)));
  };
  heads.forEach((head, at) => head.querySelector("button")?.addEventListener("click", () => sort(at)));
  search?.addEventListener("input", filter);
  choices.forEach(one => one.addEventListener("change", filter));
  filter();
}
const closed = () => [...document.querySelectorAll("details:not([open])")].filter(one => !one.closest("figcaption"));
let opened = [];
addEventListener("beforeprint", () => { opened = closed(); opened.forEach(one => { one.open = true; }); });
addEventListener("afterprint", () => opened.forEach(one => { one.open = false; }));
