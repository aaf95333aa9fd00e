// State, elements, words, the color and dash of each run, and the controls that every section uses.

const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const chosen = { open: {} }; // what the reader chose, which outlives trivet.render(payload) with newer data
let payload = null;

// ---- elements and words: text from a run becomes text nodes, never markup

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Shows control characters, which print nothing or worse, as their Unicode pictures.
const show = (text) =>
  String(text ?? "").replace(/[\u0000-\u0008\u000b\u000c\u000d\u000e-\u001f\u007f]/g, (c) =>
    c === "\u007f" ? "␡" : String.fromCharCode(0x2400 + c.charCodeAt(0)));
const said = (text, tag = "div", kind = "said") => el(tag, { class: kind, dir: "auto" }, show(text));

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return show(value);
  if (Math.abs(value) >= 10000) return Math.round(value).toLocaleString("en-US");
  if (Math.abs(value) >= 1000) return Number(value.toPrecision(4)).toLocaleString("en-US");
  return plainly(Number(value.toPrecision(digits)));
}
const plainly = (value) => (value && Math.abs(value) < 1e-3 ? value.toExponential() : String(value));
const count = (n, noun) => `${Number(n).toLocaleString("en-US")} ${noun}${n === 1 ? "" : "s"}`;
const bytes = (n) => (n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(1)} GiB` : `${(n / 2 ** 20).toFixed(n < 2e7 ? 1 : 0)} MiB`);
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}
const list = (words) => (words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`);
const unique = (values) => [...new Set(values)];

// ---- runs: a color and a dash each, so that color is never alone

const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 2", "6 2 1 2 1 2"];
const IN_THE_DARK = { "#000000": "#f1f0ec", "#999999": "#9a9a9a", "#0072B2": "#5fb5ee", "#009E73": "#2fc296" };
const color = (index) => `var(--run-${index})`;
const inked = (of) => `color-mix(in srgb, ${of} 62%, var(--ink))`; // for words, which need more contrast than lines
const brief = (name, most) => (name.length <= most ? name : `${name.includes("/") ? "" : name.slice(0, most >> 1)}…${name.slice(name.includes("/") ? 1 - most : 1 - (most - (most >> 1)))}`); // ends tell runs apart
function nameOf(run, index) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [k, v] of Object.entries({ width: 26, height: 10, "aria-hidden": "true" })) svg.setAttribute(k, v);
  const drawn = { x1: 1, x2: 25, y1: 5, y2: 5, stroke: color(index), "stroke-width": 2.6, "stroke-dasharray": DASHES[index % 8] };
  for (const [k, v] of Object.entries(drawn)) line.setAttribute(k, v);
  svg.append(line);
  return el("span", { class: "name" }, payload.runs.length > 1 && svg, el("span", { dir: "auto" }, show(run.name)));
}
// Which line belongs to which run in the charts of a section.
function legend(runs, made) {
  const ring = made.some((chart) => chart.querySelector("[data-held]"));
  const items = [payload.runs.length > 1 && runs.map((run) => el("li", {}, nameOf(run, payload.runs.indexOf(run)))), ring && el("li", { class: "name soft" }, "○ rings: held-out data")];
  return made.length > 0 && items.some(Boolean) && el("ul", { class: "legend" }, items);
}

// ---- small parts

function table(heads, rows, { numeric = [], firstIsHead = true, kind = "" } = {}) {
  const cell = (value, i) => el(i === 0 && firstIsHead ? "th" : "td", { class: numeric.includes(i) ? "number" : null, scope: i === 0 && firstIsHead ? "row" : null, dir: "auto" }, value);
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "table" },
    el("table", { class: kind },
      heads.length > 0 && el("thead", {}, el("tr", {}, heads.map((head, i) => el("th", { scope: "col", class: numeric.includes(i) ? "number" : null }, head)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell))))));
}

function fold(key, title, ...children) {
  const node = el("details", { open: chosen.open[key] }, el("summary", {}, title), ...children);
  node.addEventListener("toggle", () => (chosen.open[key] = node.open));
  return node;
}

function select(id, label, options, value, change) {
  const node = el("select", { id, onchange: () => change(node.value) }, options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(value) }, show(text))));
  return el("label", {}, label, node);
}

// A slider over the recorded steps with a button on each side; it stays in place while the part it controls is redrawn.
function stepper(id, steps, value, change) {
  let at = Math.max(0, steps.indexOf(value));
  const slider = el("input", { type: "range", id, min: 0, max: steps.length - 1, value: at, "aria-label": "step" });
  const out = el("output", { for: id });
  const move = (by, name, sign) => el("button", { type: "button", id: `${id}-${name}`, "aria-label": `${name} step`, onclick: () => to(at + by) }, sign);
  const back = move(-1, "earlier", "‹"), on = move(1, "later", "›");
  const say = () => {
    slider.value = at;
    slider.setAttribute("aria-valuetext", `step ${steps[at]}`);
    out.textContent = String(steps[at]);
    back.disabled = at === 0;
    on.disabled = at === steps.length - 1;
  };
  const to = (index) => { at = index; say(); change(at === steps.length - 1 ? undefined : steps[at]); };
  slider.addEventListener("input", () => to(Number(slider.value)));
  say();
  return el("label", {}, "step", el("span", { class: "stepper" }, back, slider, on, out));
}

// Redraws a part and keeps the focus where it was.
function redraw(host, build) {
  const focus = host.contains(document.activeElement) ? document.activeElement.id : "";
  host.replaceChildren(...[build()].flat(9).filter(Boolean));
  if (focus) byId(focus)?.focus({ preventScroll: true });
}

function rewards(sample) {
  const parts = Object.entries(sample.rewards ?? {}).map(([name, value]) => `${name} ${number(value)}`);
  const total = sample.reward ?? null;
  if (total === null) return el("span", { class: "score" }, parts.join(" · "));
  return el("span", { class: "score" }, el("b", {}, number(total)), parts.length > 1 && ` (${parts.join(", ")})`);
}
const ending = (sample) => (sample.finished === false ? "truncated at the length limit" : sample.finished ? "ended on its own" : "");
