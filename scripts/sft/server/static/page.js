/* The page of `make serve`: runs, a new run, chat. It shows what the routes under /api/v1/sft and /v1 answer, no more. */
const API = "/api/v1/sft";
const main = document.getElementById("main");

// ---- small tools

/** An element. props: attributes; `onclick` and its like are listeners, true and false set an attribute or leave it out. */
function h(tag, props = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "circle", "title", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.flat(Infinity).filter(child => child != null && child !== false));
  return node;
}

/** What a route answers. Throws an Error whose `detail` has the server's error, where and fix. */
async function api(method, path, body, signal) {
  const url = path.startsWith("/") ? path : `${API}/${path}`;
  const upload = body instanceof Blob;
  const headers = body && !upload ? {"Content-Type": "application/json"} : {};
  return (await request(url, {method, headers, signal, body: upload ? body : body && JSON.stringify(body)})).json();
}

/** A route's answer. Throws as `api` does. */
async function request(url, options) {
  let answer;
  try {
    answer = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw failure({error: "the server does not answer", fix: "make serve"});
  }
  if (answer.ok) return answer;
  const value = await answer.json().catch(() => ({}));
  throw failure(value.error ? value : {error: `the server answers ${answer.status}`});
}

function failure(detail) {
  const what = detail.error.message ?? detail.error;
  return Object.assign(new Error(what), {detail: {...detail, error: what}});
}

/** What went wrong, where, and what to do (a fix that is a route is for programs: the page has a button for it). */
function problem(error) {
  const one = error.detail ?? {error: error.message};
  const rest = entry => [entry.where && h("small", {}, ` ${entry.where}`), entry.fix && !/^(GET|POST) /.test(entry.fix) && h("div", {}, "Fix: ", h("code", {}, entry.fix))];
  const more = (one.problems ?? []).map(each => h("li", {}, sentence(each.error), rest(each)));
  return h("div", {class: "verdict bad", role: "alert"}, h("b", {}, sentence(one.error)), rest(one), more.length ? h("ul", {}, more) : null);
}

const sentence = text => text.replaceAll("`", "").replace(/^[a-z](?=[a-z]*[ ,:])/, first => first.toUpperCase()); // not a path
const verdict = (tone, headline, ...words) => h("div", {class: `verdict ${tone}`}, h("b", {}, headline), ...words);
const count = value => Number(value).toLocaleString("en");
const number = value => value == null ? "" : Math.abs(value) >= 100 || Number.isInteger(value) ? count(Math.round(value))
  : Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
const gib = value => value < 0.1 ? `${Math.max(1, Math.round(value * 1024))} MiB` : `${value.toFixed(value < 10 ? 2 : 1)} GiB`;
const show = (place, ...nodes) => place.replaceChildren(...nodes.flat(Infinity).filter(Boolean));
const wait = (ms, signal) => new Promise(done => { const timer = setTimeout(done, ms); signal?.addEventListener("abort", () => clearTimeout(timer)); });

function duration(seconds) {
  if (seconds < 100) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function notice(text) {
  const place = document.getElementById("notice");
  place.textContent = text;
  setTimeout(() => { if (place.textContent === text) place.textContent = ""; }, 5000);
}

/** Runs `work` now and every `ms` while the page is seen, until the view is left. */
async function poll(work, ms, signal) {
  while (!signal.aborted) {
    if (!document.hidden) await work();
    await wait(ms, signal);
  }
}

/** Replaces what `place` shows if `value` has changed, without taking the focus away. */
function update(place, value, draw) {
  const text = JSON.stringify(value);
  if (place.dataset.shown === text) return;
  place.dataset.shown = text;
  const focus = place.contains(document.activeElement) && document.activeElement.textContent;
  show(place, draw());
  if (focus) [...place.querySelectorAll("a,button")].find(one => one.textContent === focus)?.focus();
}

/** Does `work` for a button, which is disabled meanwhile; an error is shown in `place`. */
function action(label, place, work, kind = "") {
  const button = h("button", {type: "button", class: kind, onclick: async () => {
    button.disabled = true;
    show(place);
    try { await work(); } catch (error) { show(place, problem(error)); }
    button.disabled = false;
  }}, label);
  return button;
}

function table(columns, rows, caption) {
  const numeric = at => rows.length && rows.every(row => typeof row[at] === "number");
  return h("div", {class: "scroll", tabindex: "0", role: "group", "aria-label": caption ?? columns.join(", ")}, h("table", {class: "cards"},
    caption && h("caption", {}, caption),
    h("thead", {}, h("tr", {}, columns.map((name, at) => h("th", {scope: "col", class: numeric(at) && "n"}, name)))),
    h("tbody", {}, rows.map(row => h("tr", {}, row.map((cell, at) =>
      h("td", {"data-label": columns[at], class: numeric(at) && "n"}, typeof cell === "number" ? number(cell) : cell)))))));
}

const WORDS = {queued: "waiting", running: "running", paused: "paused", completed: "done", failed: "failed", stopped: "stopped"};
const KINDS = {train: "training", merge: "merge", export: "export", evaluate: "evaluation", report: "comparison"};
const state = job => h("span", {class: `state ${job.status}`}, job.requested && job.status === "running" ? "stopping" : WORDS[job.status] ?? job.status);
const href = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;

function howFar(job) {
  const parts = [job.total_steps ? `step ${count(job.current_step)} of ${count(job.total_steps)}` : job.phase];
  if (job.status === "running") {
    if (job.seconds_left) parts.push(`${duration(job.seconds_left)} left`);
    if (job.tokens_per_second) parts.push(`${number(job.tokens_per_second)} tokens/s`);
  }
  return parts.filter(Boolean).join(", ");
}

// ---- runs

async function viewRuns(_, signal) {
  const list = h("div"), trouble = h("div");
  main.append(h("div", {class: "title"}, h("h1", {}, "Runs"), h("a", {class: "button", href: "#/new"}, "New run")), trouble, list);
  await poll(async () => {
    try {
      const {jobs} = await api("GET", "jobs?limit=200", undefined, signal);
      show(trouble);
      update(list, jobs, () => jobs.length ? runTable(jobs) : h("div", {class: "empty"},
        h("h2", {}, "There is no run yet"),
        h("p", {}, "A run starts with a file of questions and answers. You see what the model is trained on and whether it fits, watch it train, and chat with it beside its base."),
        h("a", {class: "button primary", href: "#/new"}, "Choose a file")));
    } catch (error) { if (!signal.aborted) show(trouble, problem(error)); }
  }, 2000, signal);
}

function runTable(jobs) {
  return table(["run", "model", "state", "progress", "loss", "changed"], jobs.map(job => [
    h("a", {href: href("run", job.job_id)}, runName(job)), job.model ?? "", state(job),
    h("span", {}, job.status === "running" && job.total_steps ? [h("progress", {max: 1, value: job.progress, "aria-label": "progress"}), " "] : null, howFar(job)),
    number(lossOf(job.metrics)), when(job)]));
}

const when = job => new Date(job.updated_at).toLocaleString([], {dateStyle: "medium", timeStyle: "short"});
const runName = job => job.kind === "train" ? job.run ?? job.name ?? job.job_id : `${KINDS[job.kind]} of ${job.run}`;
const lossOf = metrics => metrics?.["eval/loss"] ?? metrics?.["train/loss"] ?? metrics?.loss;

async function viewRun(id, signal) {
  const head = h("div"), lost = h("div"), trouble = h("div"), curves = h("div", {class: "figures"}), after = h("div"), answers = h("div");
  const lines = h("pre", {class: "log", tabindex: "0", role: "log", "aria-label": "Log"});
  const log = h("details", {ontoggle: () => log.open && follow(id, lines, signal)}, h("summary", {}, "Log"), lines);
  const title = h("h1", {}, id);
  main.append(title, lost, head, trouble, curves, after, answers, log);
  let history = [], opened = false;
  await poll(async () => {
    try {
      const job = await api("GET", `jobs/${encodeURIComponent(id)}`, undefined, signal);
      show(lost);
      title.textContent = runName(job);
      update(head, job, () => runHead(job, trouble));
      if (job.kind !== "train") { log.open ||= !opened; opened = true; return; }
      const last = Math.max(0, ...history.map(entry => entry.step)); // its evaluation may still come
      const {history: fresh} = await api("GET", `jobs/${encodeURIComponent(id)}/metrics?after=${last - 1}`, undefined, signal);
      history = [...history.filter(entry => entry.step < last), ...fresh];
      if (!opened && (job.status === "failed" || !history.length)) log.open = opened = true; // there is nothing else to see
      update(curves, history.length, () => CURVES.map(([title, unit, names]) => chart(title, unit, seriesOf(history, names))));
      if (job.status !== "completed" || !job.run) return;
      const {jobs} = await api("GET", "jobs?limit=200", undefined, signal);
      const info = await api("GET", `models/${encodeURIComponent(job.run)}/info`, undefined, signal);
      const own = jobs.filter(one => one.run === job.run && one.kind !== "train");
      update(after, [own, info], () => modelTools(job.run, info, own, trouble));
      const evaluated = JSON.stringify(info.metrics);
      if (info.has_samples && answers.dataset.evaluated !== evaluated) {
        answers.dataset.evaluated = evaluated;
        await showSamples(job.run, answers);
      }
    } catch (error) { if (!signal.aborted) show(lost, problem(error)); }
  }, 1500, signal);
}

function runHead(job, trouble) {
  const path = `jobs/${encodeURIComponent(job.job_id)}`;
  const does = (label, method, end, then, kind) => action(label, trouble, async () => { await api(method, path + end); notice(then); }, kind);
  const stops = "It stops after this step, with a checkpoint", again = job.kind === "train" ? "Resume" : "Start again";
  const buttons = {
    running: () => [job.kind === "train" && does("Pause", "POST", "/pause", stops), does("Stop", "DELETE", "", job.kind === "train" ? stops : "It stops")],
    queued: () => [does("Remove from the queue", "DELETE", "", "Removed")],
    paused: () => [does(again, "POST", "/resume", "In the queue", "primary")], stopped: () => [does(again, "POST", "/resume", "In the queue")],
    failed: () => [does(again, "POST", "/resume", "In the queue")],
  }[job.status]?.() ?? [];
  return [
    h("p", {class: "lead"}, state(job), [job.kind !== "train" && KINDS[job.kind], job.model, howFar(job)].filter(Boolean).map(part => `, ${part}`)),
    job.status === "running" && h("progress", {class: "wide", max: 1, value: job.progress || null, "aria-label": "progress"}),
    job.status === "queued" && h("p", {class: "soft"}, "One job runs at a time on each GPU (or on the CPU): it starts when those before it have ended."),
    job.error && problem({detail: job.error}),
    buttons.length || job.kind !== "train" ? h("div", {class: "actions"}, buttons,
      job.kind !== "train" && h("a", {class: "button", href: href("run", job.run)}, `The run ${job.run}`)) : null];
}

/** What can be done with a finished model, and how far that is. */
function modelTools(run, info, own, trouble) {
  const path = `models/${encodeURIComponent(run)}`;
  const format = h("select", {"aria-label": "Export as"}, ["gguf", "ollama", "hf"].map(name => h("option", {}, name)));
  const start = (what, body) => async () => { await api("POST", `${path}/${what}`, body()); notice("In the queue"); };
  return [
    h("h2", {}, "This model"),
    h("div", {class: "actions"},
      h("a", {class: "button primary", href: href("chat", run)}, "Chat"),
      info.has_report && h("a", {class: "button", href: `${API}/${path}/report`, target: "_blank"}, "Open the comparison"),
      action(info.has_report ? "Compare again" : "Compare with its base", trouble, start("report", () => ({}))),
      action("Evaluate", trouble, start("evaluate", () => ({}))),
      h("span", {}, format, " ", action("Export", trouble, start("export", () => ({format: format.value}))))),
    own.length ? table(["work", "state", "changed"], own.map(job => [h("a", {href: href("run", job.job_id)}, KINDS[job.kind]), state(job), when(job)])) : null,
    scores(info.metrics)];
}

/** The last evaluation's figures. */
function scores({tuned, base, rows, split}) {
  if (!tuned) return null;
  const names = Object.keys(tuned).filter(name => typeof tuned[name] === "number");
  const columns = ["metric", ...(base ? ["base"] : []), "tuned"];
  return [h("h2", {}, "Scores"), table(columns, names.map(name => [name, ...(base ? [base[name] ?? ""] : []), tuned[name]]), `of the last evaluation: ${count(rows)} rows (${split})`)];
}

async function showSamples(run, place) {
  const {samples} = await api("GET", `models/${encodeURIComponent(run)}/samples?limit=30`);
  const shown = samples.map(one => [h("span", {class: "answer"}, one.prompt), one.prediction, one.reference]);
  show(place, h("h2", {}, "Answers of the last evaluation"), table(["question", "answer", "reference"], shown));
}

/** Shows a job's log from its events. */
function follow(id, place, signal) {
  if (place.dataset.followed) return;
  place.dataset.followed = "yes";
  const events = new EventSource(`${API}/jobs/${encodeURIComponent(id)}/logs`), lines = [];
  const draw = () => {
    const end = place.scrollTop + place.clientHeight >= place.scrollHeight - 8;
    place.textContent = lines.slice(-500).join("\n");
    if (end) place.scrollTop = place.scrollHeight;
  };
  events.onmessage = event => { lines.push(event.data); draw(); };
  events.addEventListener("end", () => events.close());
  signal.addEventListener("abort", () => events.close());
}

// ---- curves

const CURVES = [
  ["Loss", "", {training: "train/loss", validation: "eval/loss"}],
  ["Memory", "GiB", {peak: ["gpu/memory_gib", "cpu/memory_gib"], "whole card": "gpu/memory_used_gib", "at this step": "cpu/memory_now_gib"}],
  ["Learning rate", "", {last: "train/lr"}],
  ["Speed", "tokens/s", {last: "train/tokens_per_second"}],
];

function seriesOf(history, names) {
  const series = Object.entries(names).map(([label, keys]) =>
    [label, history.map(entry => [entry.step, [keys].flat().map(key => entry[key]).find(Number.isFinite)]).filter(([, value]) => value !== undefined)]);
  return series.filter(([, points]) => points.length);
}

/** Lines over steps: one figure. series: [[label, [[step, value], ...]], ...]; nothing is drawn without a value. With a unit
 * the axis begins at 0: its figures are amounts. */
function chart(title, unit, series) {
  if (!series.length) return null;
  const [width, height, left, bottom] = [460, 210, 54, 24], all = series.flatMap(([, points]) => points);
  const steps = all.map(point => point[0]), values = all.map(point => point[1]);
  const [x0, x1] = [Math.min(...steps), Math.max(...steps, Math.min(...steps) + 1)];
  let [y0, y1] = [unit ? 0 : Math.min(...values), Math.max(...values)];
  const step = nice((y1 - y0 || Math.abs(y1) || 1) / 3);
  [y0, y1] = [Math.floor(y0 / step) * step, Math.max(Math.ceil(y1 / step) * step, Math.floor(y0 / step) * step + step)];
  const x = value => left + (value - x0) / (x1 - x0) * (width - left - 12), y = value => 10 + (y1 - value) / (y1 - y0) * (height - bottom - 10);
  const ticks = Array.from({length: Math.round((y1 - y0) / step) + 1}, (_, at) => y0 + at * step);
  const digits = step < 1 ? Math.min(6, Math.ceil(-Math.log10(step))) : 0;
  const written = value => !value ? "0" : step < 1e-3 ? value.toExponential(1) : value.toFixed(digits);
  const last = series.map(([label, points]) => `${label} ${number(points.at(-1)[1])}`).join(", ");
  return h("figure", {}, h("svg", {class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} over steps ${x0} to ${x1}; now: ${last}`},
    ticks.map(tick => [h("line", {class: "axis", x1: left, x2: width - 12, y1: y(tick), y2: y(tick)}),
      h("text", {x: left - 6, y: y(tick) + 4, "text-anchor": "end"}, written(tick))]),
    [x0, x1].map((value, at) => h("text", {x: x(value), y: height - 6, "text-anchor": at ? "end" : "start"}, at ? `step ${count(value)}` : count(value))),
    series.map(([, points], at) => h("g", {class: `c${at + 1}`},
      h("path", {d: points.map(([a, b], index) => `${index ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("")}),
      points.length < 12 ? points.map(([a, b]) => h("circle", {cx: x(a), cy: y(b), r: 3})) : null))),
  h("figcaption", {}, h("b", {}, title, unit && ` (${unit})`), h("ul", {class: "key"},
    series.map(([label, points], at) => h("li", {}, h("i", {class: `c${at + 1}`}), `${label} ${number(points.at(-1)[1])}`)))));
}

function nice(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find(factor => factor * power >= rough) * power;
}

// ---- a new run

const MAIN_KEYS = ["model.name", "tuning.mode", "train.epochs", "train.learning_rate", "tuning.lora.r", "model.max_seq_len"];

async function viewNew(_, signal) {
  const data = h("div"), preview = h("div"), fields = h("div"), more = h("div"), plan = h("div"), trouble = h("div");
  const config = h("select"), name = h("input", {value: "my-run", pattern: "[A-Za-z0-9][A-Za-z0-9_.\\-]*", title: "letters, digits, _ . and -", autocomplete: "off"});
  const gpu = h("input", {placeholder: "this machine", autocomplete: "off"}), overrides = {}, dataKeys = {};
  const rowsOf = h("p", {class: "soft"}, "Rows: the config's own");
  // not a submit button: Enter in a field is the end of that field, and starts no training
  const start = h("button", {type: "button", class: "primary", onclick: () => start.form.requestSubmit()}, "Start training");
  main.append(h("h1", {}, "New run"), h("form", {class: "beside", onsubmit: send},
    h("div", {},
      h("h2", {}, "Questions and answers"), dropzone(uploaded, data), data, preview,
      h("h2", {}, "Settings"),
      h("div", {class: "fields"}, field("name", name, "The run's folder below outputs/; a second run of this name gets a number."), field("config", config, "The file that the settings come from.")),
      fields, h("details", {}, h("summary", {}, "all settings"), more)),
    h("aside", {"aria-label": "Memory and start"}, h("h2", {}, "Memory"), plan,
      field("graphics card", gpu, "To plan for another one: RTX 4060, 8GiB, or cpu."), trouble, rowsOf, h("div", {class: "actions"}, start))));
  const request = () => ({config_path: config.value, overrides: {...overrides, ...dataKeys, "train.output_dir": `outputs/${name.value}`}});
  let planned = 0, shown = {};

  async function uploaded(answer, file) {
    Object.assign(dataKeys, answer.overrides);
    rowsOf.textContent = `Rows: ${file.name}`;
    show(data, ledger(answer.ledger));
    await changed();
    await previewRows();
  }

  async function previewRows() {
    show(preview, h("p", {class: "soft", role: "status"}, "Reading the first rows as the model will…"));
    try {
      const {rows} = await api("POST", "templates/preview", {...request(), limit: 4}, signal);
      show(preview, h("h3", {}, `What the model is trained on: ${rowsOf.textContent.slice(6)}`),
        h("p", {class: "soft"}, "It learns the ", h("mark", {}, "marked text"), "; the rest is what it reads before it."), rows.slice(0, 2).map(tokens),
        rows.length > 2 ? h("details", {}, h("summary", {}, `${rows.length - 2} more rows`), rows.slice(2).map(tokens)) : null);
    } catch (error) { if (!signal.aborted) show(preview, problem(error)); }
  }

  function setKey(key, value) {
    if (value === undefined) delete overrides[key]; else overrides[key] = value;
    changed(800);
  }

  /** Checks the settings and plans their memory, once the last change is `ms` old. */
  async function changed(ms = 0) {
    const turn = ++planned;
    show(trouble);
    await wait(ms, signal);
    if (turn !== planned || signal.aborted) return;
    try {
      const checked = await api("POST", "configs/validate", request(), signal);
      if (turn !== planned) return;
      for (const control of main.querySelectorAll("[data-key]"))
        control.setAttribute("aria-invalid", (checked.errors ?? []).some(error => `${error.where} ${error.error}`.split(/[^\w.]+/).includes(control.dataset.key)));
      if (!checked.valid) { show(plan, problem({detail: {error: "the settings cannot be used", problems: checked.errors}})); return; }
      shown = checked.config;
      for (const control of main.querySelectorAll("[data-key]")) control.show?.(shown);
      show(plan, h("p", {class: "soft", role: "status"}, "Computing the plan…"));
      const planAnswer = await api("POST", "plan", {...request(), ...(gpu.value ? {gpu: gpu.value} : {})}, signal);
      if (turn === planned) show(plan, planBar(planAnswer, (key, value) => {
        const control = main.querySelector(`[data-key="${key}"]`);
        control.value = value;
        control.dispatchEvent(new Event("change"));
        notice(`${key} is now ${value}`);
      }));
    } catch (error) { if (turn === planned && !signal.aborted) show(plan, problem(error)); }
  }

  async function send(event) {
    event.preventDefault();
    start.disabled = true;
    start.textContent = "Checking the memory plan…";
    show(trouble);
    try {
      const job = await api("POST", "train", request());
      location.hash = href("run", job.job_id);
    } catch (error) {
      show(trouble, problem(error));
      start.disabled = false;
      start.textContent = "Start training";
    }
  }

  try {
    const [{configs, default: first}, {keys}] = await Promise.all([api("GET", "configs"), api("GET", "configs/schema")]);
    config.append(...configs.map(each => h("option", {value: each.path, selected: each.path === first}, each.path)));
    const known = keys.filter(each => !each.section && !each.key.includes("[]"));
    const control = each => keyField(each, setKey);
    fields.append(h("div", {class: "fields"}, MAIN_KEYS.map(key => known.find(each => each.key === key)).filter(Boolean).map(control)));
    const rest = known.filter(each => !MAIN_KEYS.includes(each.key) && each.key !== "train.output_dir").map(control);
    const find = h("input", {type: "search", oninput: () => rest.forEach(one => {
      one.hidden = !one.classList.contains("changed") && !one.textContent.toLowerCase().includes(find.value.trim().toLowerCase()); })});
    more.append(field("find a setting", find, ""), h("div", {class: "fields"}, rest));
    config.addEventListener("change", () => changed());
    gpu.addEventListener("change", () => changed());
    await changed();
  } catch (error) { show(trouble, problem(error)); }
}

const field = (label, control, meaning) => h("label", {class: "field"}, h("span", {}, label), control, meaning && h("small", {class: "soft"}, meaning));

/** A key of the config. It shows the config's own value until it is changed. */
function keyField(key, set) {
  const choices = key.choices.length && /^one of|`/.test(key.expected) && !/number|text|list/.test(key.expected) ? key.choices
    : key.expected.startsWith("`true`") ? ["true", "false"] : null;
  const control = choices ? h("select", {}, h("option", {value: ""}), choices.map(one => h("option", {}, one)))
    : h("input", {autocomplete: "off", inputmode: /number/.test(key.expected) ? "decimal" : "text"});
  const box = field(key.key, control, (choices || key.text ? key.description : `${key.description} Takes ${key.expected}.`).replaceAll("`", ""));
  control.dataset.key = key.key;
  control.show = config => {
    const value = key.key.split(".").reduce((section, part) => section?.[part], config);
    const text = value == null ? "null" : typeof value === "object" ? JSON.stringify(value) : String(value);
    if (control.value === "" || !box.classList.contains("changed"))
      if (choices) control.options[0].textContent = text; else control.placeholder = text;
  };
  control.addEventListener("change", () => {
    box.classList.toggle("changed", control.value !== "");
    set(key.key, control.value === "" ? undefined : valueOf(control.value.trim(), key.text));
  });
  return box;
}

/** The value that a person's text means. isText: the key takes no numbers. */
function valueOf(text, isText) {
  if (/^[[{]/.test(text)) { try { return JSON.parse(text); } catch { return text; } }
  const plain = {true: true, false: false, null: null};
  if (text in plain) return plain[text];
  return !isText && text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

function dropzone(done, place) {
  const input = h("input", {type: "file", accept: ".jsonl,.ndjson,.json,.csv,.tsv,.txt,.parquet,.xlsx,.gz,.zst", onchange: () => input.files[0] && take(input.files[0])});
  const columns = {user_col: h("input", {autocomplete: "off"}), answer_col: h("input", {autocomplete: "off"})};
  async function take(file, names = Object.values(columns).map(control => control.value)) {
    show(place, h("p", {class: "soft", role: "status"}, `Reading ${file.name}…`));
    const name = file.name.replace(/[^\p{L}\p{N}_.-]+/gu, "-").replace(/^[.-]+/, "").slice(-80);
    const chosen = Object.keys(columns).map((key, at) => names[at] && `&${key}=${encodeURIComponent(names[at])}`).filter(Boolean);
    try { await done(await api("POST", `data?name=${encodeURIComponent(name)}${chosen.join("")}`, file), file); }
    catch (error) {
      const guess = error.detail?.columns;
      show(place, problem(error), guess && h("div", {class: "actions"}, h("button", {type: "button", onclick: () => take(file, guess)},
        `Take ${guess[0]} as the question, ${guess[1]} as the answer`)));
    }
    input.value = "";
  }
  const over = on => event => { event.preventDefault(); zone.classList.toggle("over", on); };
  const zone = h("label", {class: "drop", ondragover: over(true), ondragleave: over(false), ondrop: event => {
    over(false)(event);
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  }}, input, h("b", {}, "Choose a file"), " or drop it here", h("br"), h("small", {}, "JSONL, JSON, CSV, Parquet, text: one row an example. Without a file, the config's own rows are used."));
  return [zone, h("details", {}, h("summary", {}, "columns with other names"), h("div", {class: "fields"},
    field("question column", columns.user_col, "Set it before the file is chosen."), field("answer column", columns.answer_col, "")))];
}

/** What became of every row of a file. */
function ledger(one) {
  const lost = Object.entries(one.named ?? {}), splits = Object.entries(one.splits ?? {});
  const examples = Object.entries(one.examples ?? {}).flatMap(([reason, places]) =>
    [places].flat().map(place => [reason, typeof place === "string" ? place : [place.where, place.detail].filter(Boolean).join(": ") || JSON.stringify(place)]));
  return [
    verdict(lost.length ? "even" : "good", `${count(one.rows_written)} of ${count(one.rows_read)} rows are used`, splits.map(([name, rows]) => `${name} ${count(rows)}`).join(", ")),
    (one.warnings ?? []).map(text => verdict("even", "Note", " ", text)),
    lost.length ? table(["left out because", "rows"], lost) : null,
    examples.length ? h("details", {}, h("summary", {}, "which rows"), table(["reason", "row"], examples)) : null,
  ];
}

/** A row as its tokens: marked where the loss is taken, struck through where it is cut. */
function tokens(row) {
  const tags = {labelled: "mark", cut: "s"};
  const parts = row.tokens ? row.tokens.map(([text, kind]) => tags[kind] ? h(tags[kind], {}, text) : text) : row.text;
  return h("div", {class: "tokens"}, row.dropped ? h("b", {}, `left out: ${row.dropped}\n`) : null, parts);
}

/** The plan as a bar of its parts, with what would help if it does not fit. use: sets a key. */
function planBar(plan, use) {
  const has = plan.device?.gib, phase = plan.phases[plan.worst_phase], scale = Math.max(plan.peak_gib, has ?? 0);
  const parts = [...Object.entries(phase.parts), ["reserve", phase.peak_gib - phase.allocated_gib]].filter(([, size]) => size > 0);
  const colour = at => `c${at === parts.length - 1 ? "reserve" : at % 8}`;
  const bar = h("div", {class: "plan", role: "img", "aria-label": `${gib(plan.peak_gib)} ${has ? `of ${gib(has)}` : ""}`},
    parts.map(([, size], at) => { const part = h("i", {class: colour(at)}); part.style.width = `${size / scale * 100}%`; return part; }));
  if (has && has < plan.peak_gib) { const limit = h("b"); limit.style.left = `${has / scale * 100}%`; bar.append(limit); }
  return [
    verdict(plan.fits ? "good" : "bad", `${plan.fits ? "It fits" : "It does not fit"}: ${gib(plan.peak_gib)}${has ? ` of ${gib(has)}` : ""}`,
      `${plan.device?.name ?? ""}; most is needed in ${plan.worst_phase} (${phase.note})`),
    bar,
    h("ul", {class: "key"}, parts.map(([name, size], at) => h("li", {}, h("i", {class: colour(at)}), `${name} ${gib(size)}`))),
    plan.remedies?.length ? [h("h3", {}, "What would help"), h("ul", {class: "remedies"}, plan.remedies.map(one => {
      const [, key, value] = /^([\w.]+)=(.*)$/s.exec(one.setting) ?? [];
      return h("li", {}, h("div", {}, h("code", {}, one.setting), h("small", {}, `saves ${gib(one.saves_gib)}; ${one.costs}`)),
        key && h("button", {type: "button", "aria-label": `Use ${one.setting}`, onclick: () => use(key, value)}, "Use"));
    }))] : null];
}

// ---- chat

async function viewChat(id, signal) {
  const talk = h("div", {role: "log", "aria-label": "Conversation"}), trouble = h("div"), model = h("select"), sides = [];
  const beside = h("input", {type: "checkbox", checked: true}), system = h("textarea", {rows: 2});
  const settings = {temperature: h("input", {type: "number", min: 0, max: 2, step: 0.1}), max_tokens: h("input", {type: "number", min: 1, step: 1})};
  const question = h("textarea", {rows: 2, placeholder: "Ask something", onkeydown: event => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); event.target.form.requestSubmit(); }
  }});
  const button = h("button", {type: "submit", class: "primary"}, "Send");
  let running = null;
  main.append(h("h1", {}, "Chat"),
    h("div", {class: "fields"}, field("model", model, ""), h("label", {class: "field"}, h("span", {}, "side by side"), h("div", {class: "tick"}, beside, " with its base"))),
    h("details", {}, h("summary", {}, "settings"), h("div", {class: "fields"},
      field("system text", system, "Empty: the one that the model was trained with."),
      field("temperature", settings.temperature, "0 always gives the likeliest answer. Empty: the run's own settings."),
      field("longest answer", settings.max_tokens, "In tokens. Empty: the run's own."))),
    talk, trouble,
    h("div", {class: "compose"}, h("form", {onsubmit: send}, h("label", {}, h("span", {class: "hidden"}, "Question"), question), button,
      h("button", {type: "button", onclick: begin}, "New chat"))));

  function begin() {
    running?.abort();
    const names = beside.checked && !model.value.startsWith("base") ? [model.value, `${model.value}:base`] : [model.value];
    sides.splice(0, sides.length, ...names.map(name => ({name, messages: []})));
    show(talk, h("div", {class: "empty"}, h("p", {class: "soft"}, "Ask what your users will ask.", sides.length > 1 && " The model and its base answer side by side.")));
    question.focus();
  }

  async function send(event) {
    event.preventDefault();
    if (running) { running.abort(); return; }
    const text = question.value.trim();
    if (!text) return;
    question.value = "";
    show(trouble);
    running = new AbortController();
    button.textContent = "Stop";
    const cells = sides.map(({name}) => h("section", {class: `side busy ${name.endsWith("base") ? "" : "tuned"}`},
      h("h3", {}, name.endsWith(":base") ? "its base" : name), h("div"), h("small", {}, "")));
    talk.querySelector(".empty")?.remove();
    talk.append(h("article", {class: "turn"}, h("p", {class: "question"}, text), h("div", {class: "sides"}, cells)));
    scrollTo(0, document.body.scrollHeight);
    await Promise.all(sides.map((side, at) => answer(side, text, cells[at], running.signal)));
    running = null;
    button.textContent = "Send";
  }

  /** Streams one side's answer into its cell, and remembers it for the next question. */
  async function answer(side, text, cell, stopped) {
    const [, place, foot] = cell.children, asked = [...side.messages, {role: "user", content: text}];
    const first = system.value.trim() ? [{role: "system", content: system.value.trim()}] : [];
    const chosen = Object.entries(settings).filter(([, control]) => control.value !== "").map(([key, control]) => [key, Number(control.value)]);
    const body = {model: side.name, messages: [...first, ...asked], stream: true, stream_options: {include_usage: true}, ...Object.fromEntries(chosen)};
    let whole = "", begun = 0, cut = "";
    foot.textContent = "thinking; the first answer loads the model";
    try {
      for await (const chunk of streamOf("/v1/chat/completions", body, AbortSignal.any([stopped, signal]))) {
        if (chunk.error) throw failure(chunk);
        whole += chunk.choices[0]?.delta.content ?? "";
        const atEnd = scrollY + innerHeight >= document.body.scrollHeight - 40;
        place.textContent = whole;
        if (atEnd) scrollTo(0, document.body.scrollHeight);
        if (whole && !begun) { begun = performance.now(); foot.textContent = ""; }
        if (chunk.choices[0]?.finish_reason === "length") cut = ", cut at the longest answer";
        if (chunk.usage) foot.textContent = `${chunk.usage.completion_tokens} tokens, ${number(Number((chunk.usage.completion_tokens / (performance.now() - begun) * 1000).toPrecision(2)))} tokens/s${cut}`;
      }
    } catch (error) {
      if (error.name === "AbortError") foot.textContent = "stopped"; else { foot.textContent = ""; cell.append(problem(error)); }
    }
    cell.classList.remove("busy");
    if (whole) side.messages = [...asked, {role: "assistant", content: whole}];
  }

  try {
    const {data} = await api("GET", "/v1/models", undefined, signal);
    const names = data.map(one => one.id).filter(name => !name.endsWith(":base"));
    model.append(...[...names.slice(1), "base"].map(name => h("option", {value: name, selected: name === id}, name === "base" ? "base (no training)" : name)));
    if (id && !names.includes(id)) show(trouble, problem(new Error(`there is no finished run ${id}`)));
    [model, beside].forEach(control => control.addEventListener("change", begin));
    begin();
  } catch (error) { if (!signal.aborted) show(trouble, problem(error)); }
}

/** The values of a stream of server-sent events. */
async function* streamOf(url, body, signal) {
  const answer = await request(url, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "";;) {
    const {done, value} = await reader.read();
    if (done) return;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events) if (event.startsWith("data: {")) yield JSON.parse(event.slice(6));
  }
}

// ---- which view

const VIEWS = {runs: viewRuns, run: viewRun, new: viewNew, chat: viewChat};
let leave = new AbortController();

function route() {
  leave.abort();
  leave = new AbortController();
  const [name, id] = location.hash.slice(2).split("/").map(decodeURIComponent), shown = VIEWS[name] ? name : "runs";
  show(main);
  for (const link of document.querySelectorAll("header nav a")) {
    const here = link.hash === `#/${shown === "run" ? "runs" : shown}`;
    if (here) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.title = `${id ?? {runs: "Runs", new: "New run", chat: "Chat"}[shown]} · sft-play`;
  VIEWS[shown](id, leave.signal);
}

document.querySelector(".skip").addEventListener("click", event => { event.preventDefault(); main.focus(); }); // #main names no view
addEventListener("hashchange", () => { route(); main.focus(); });
route();
