// Draws the payload of report/gather.py. All text goes in as text nodes, never as markup; what the reader chose is kept in
// `chosen`, so that trivet.render(payload) can be called again with newer data.
"use strict";
(() => {
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const chosen = { open: {} };
  let payload = null;

  // ---- elements and words

  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    node.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  // Control characters, which print nothing or worse, as their pictures.
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
  // Who is who in the charts of a section.
  function legend(runs, made) {
    const ring = made.some((chart) => chart.querySelector("[data-held]"));
    const items = [payload.runs.length > 1 && runs.map((run) => el("li", {}, nameOf(run, payload.runs.indexOf(run)))), ring && el("li", { class: "name soft" }, "○ rings: held-out data")];
    return made.length > 0 && items.some(Boolean) && el("ul", { class: "legend" }, items);
  }

  // ---- charts

  const drawn = new Map(); // element: {draw, width}
  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const chart = drawn.get(target), width = Math.floor(target.clientWidth);
      if (!chart || !width || Math.abs(width - chart.width) < 2) continue;
      chart.width = width;
      target.replaceChildren(chart.draw(width));
    }
  });

  function figure(title, notes, height, draw, held = false) {
    const box = el("div", { class: "plot", "data-held": held, style: `min-height: ${height}px` });
    drawn.set(box, { draw, width: 0 });
    resized.observe(box);
    notes = notes.filter(Boolean);
    return el("figure", { class: "chart" }, el("figcaption", {}, el("h4", {}, title), notes.map((note) => el("p", {}, note))), box);
  }

  const axis = { labelArrow: "none", tickSize: 0 };
  const plain = { marginTop: 12, marginBottom: 36, style: { background: "none" } };

  // Room for names beside a chart of this width, at so many pixels a letter; what is longer is cut.
  const BOLD = 7, PLAIN = 6.4;
  const roomFor = (names, width, letter) => Math.ceil(Math.min(0.36 * width, 14 + letter * Math.max(...names.map((name) => name.length))));
  const fitting = (name, room, letter) => brief(name, Math.max(2, Math.floor((room - 8) / letter)));

  // Names to the right of lines, moved apart where they would overlap; a thin line leads to what does not end there.
  function labelEnds(svg, width, right, lines) {
    const y = svg.scale("y"), x = svg.scale("x"), gap = 13, [top, bottom] = d3.extent(y.range);
    const labels = lines
      .map((line) => ({ ...line, last: line.points.findLast((point) => point.y !== null) }))
      .filter((line) => line.last)
      .map((line) => ({ text: line.label, color: line.color, y: y.apply(line.last.y), x: x.apply(line.last.x) }))
      .sort((a, b) => a.y - b.y);
    const stacks = labels.map((label) => ({ middle: label.y, labels: [label] })); // names that touch, around the mean of their lines' ends
    const settle = (stack) => {
      const half = (gap * (stack.labels.length - 1)) / 2;
      stack.middle = Math.max(top + half, Math.min(bottom - half, d3.mean(stack.labels, (label) => label.y)));
      stack.labels.forEach((label, i) => (label.at = stack.middle - half + gap * i));
    };
    stacks.forEach(settle);
    for (let i = 0; i + 1 < stacks.length; ) {
      if (stacks[i + 1].labels[0].at - stacks[i].labels.at(-1).at >= gap) { i++; continue; }
      stacks[i].labels.push(...stacks.splice(i + 1, 1)[0].labels);
      settle(stacks[i]);
      i = Math.max(0, i - 1);
    }
    const group = d3.select(svg).append("g").attr("aria-label", "line ends"), edge = width - right, far = labels.filter((d) => edge - d.x > 8 || Math.abs(d.at - d.y) > 6);
    group.selectAll("path").data(far).join("path").attr("aria-hidden", "true").attr("fill", "none").attr("stroke", (d) => d.color).attr("stroke-dasharray", "1 5")
      .attr("d", (d) => `M${d.x + 3},${d.y}L${Math.max(d.x + 3, edge - 8)},${d.y}L${edge + 4},${d.at}`);
    group.selectAll("text").data(labels).join("text")
      .attr("text-anchor", "start").attr("x", edge + 7).attr("y", (d) => d.at).attr("dy", "0.32em").style("fill", (d) => inked(d.color)).attr("font-weight", 600)
      .text((d) => fitting(d.text, right, BOLD));
  }

  // lines: [{label, color, dash, points: [{x, y, low, high}], held: [{x, y}], band: [...]}]
  function lineChart({ title, notes = [], unit, lines, zero, percent, marks = [], height = 230 }) {
    lines = lines.filter((line) => line.points.some((p) => p.y !== null) || line.held?.length);
    if (!lines.length) return null;
    const draw = (width) => {
      const named = (lines.length > 1 || payload.runs.length > 1) && width > 330, right = named ? roomFor([...lines.map((line) => line.label), ...(payload.runs.length > 1 ? payload.runs.map((run) => run.name) : [])], width, BOLD) : 16;
      const tips = lines.flatMap((line) => [
        ...line.points.filter((p) => p.y !== null).map((p) => ({ ...p, title: `${line.label}\nstep ${p.x}: ${number(p.y, 4)}${p.low !== undefined && p.low !== null ? `\n(${number(p.low)} to ${number(p.high)})` : ""}` })),
        ...(line.held ?? []).map((p) => ({ ...p, title: `${line.label}, held-out\nstep ${p.x}: ${number(p.y, 4)}` })),
      ]);
      const svg = Plot.plot({
        ...plain, width, height, marginLeft: 52, marginRight: right, ariaLabel: title,
        ariaDescription: lines.map((line) => `${line.label}: ${number(line.points.find((p) => p.y !== null)?.y)} to ${number(line.points.findLast((p) => p.y !== null)?.y)}`).join("; "),
        x: { ...axis, label: "step", labelAnchor: "center", ticks: stepTicks(lines, width), tickFormat: (step) => step.toLocaleString("en-US"), nice: false },
        y: { ...axis, label: null, ticks: 5, grid: true, zero, percent: false, nice: true, domain: around(lines.flatMap((line) => [...line.points, ...(line.held ?? [])]), "y"), tickFormat: percent ? "~%" : ticks(lines) },
        marks: [
          lines.filter((line) => line.points.some((p) => p.low !== undefined && p.low !== null)).map((line) =>
            Plot.areaY(line.points, { x: "x", y1: "low", y2: "high", fill: line.color, fillOpacity: 0.14, ariaDescription: "band" })),
          lines.map((line) => Plot.lineY(line.points, { x: "x", y: "y", stroke: line.color, strokeWidth: 1.8, strokeDasharray: line.dash, ariaDescription: line.label })),
          lines.map((line) => Plot.dot(line.points.filter((p) => p.y !== null).length < 3 ? line.points : [], { x: "x", y: "y", fill: line.color, r: 3 })),
          lines.map((line) => Plot.dot(line.held ?? [], { x: "x", y: "y", stroke: line.color, fill: "var(--raised)", strokeWidth: 1.6, r: 3.2, ariaDescription: `${line.label}, held-out` })),
          marks,
          Plot.tip(tips, Plot.pointer({ x: "x", y: "y", title: "title", fontSize: 12, lineHeight: 1.25, stroke: "var(--rule)", fill: "var(--raised)" })),
        ],
      });
      if (named) labelEnds(svg, width, right, lines.map((line) => (line.points.some((p) => p.y !== null) ? line : { ...line, points: line.held })));
      return svg;
    };
    const per = unique(lines.map((line) => line.per).filter((n) => n > 1));
    const held = lines.some((line) => line.held?.length);
    return figure(title, [
      unit,
      per.length > 0 && `Each point is the mean of ${list(per.map(String))} steps; the band goes from the least to the most of them.`,
      ...notes,
    ], height, draw, held);
  }
  // A domain around what is all of one value, which would else have an axis of its own; undefined where there are several.
  function around(points, key) {
    const [low, high] = d3.extent(points.flatMap((p) => [p[key], p.low, p.high].filter((v) => typeof v === "number")));
    return low !== high ? undefined : low === 0 ? [0, 1] : [low - Math.abs(low) / 2, low + Math.abs(low) / 2];
  }
  // Whole steps only.
  function stepTicks(lines, width) {
    const [first, last] = d3.extent(lines.flatMap((line) => [...line.points, ...(line.held ?? [])]), (p) => p.x), most = Math.max(3, Math.floor(width / 90));
    return last - first <= most ? d3.range(first, last + 1) : most;
  }

  // Numbers at the y axis: small ones all with an exponent, large ones all with a letter.
  function ticks(lines) {
    const most = d3.max(lines.flatMap((line) => [...line.points, ...(line.held ?? [])]), (p) => Math.abs(p.y ?? 0));
    if (most < 0.005) return (value) => (value ? d3.format(".1~e")(value).replace("−", "-") : "0");
    return most >= 10000 ? d3.format("~s") : String;
  }

  function points(table, name) {
    const series = table.series[name];
    return series ? table.steps.map((x, i) => ({ x, y: series.mean[i], low: series.low?.[i], high: series.high?.[i] })) : [];
  }
  const has = (run, name) => name in run.metrics.series || `eval/${name}` in run.heldout.series;

  // One line a run (or, of several names, one line for each name of each run).
  function linesOf(names, labels, runs) {
    const several = payload.runs.length > 1, lines = [];
    for (const run of runs)
      names.forEach((name, k) => {
        if (!has(run, name)) return;
        const index = payload.runs.indexOf(run), own = names.length > 1 ? labels[k] : run.name;
        lines.push({
          label: several && names.length > 1 ? `${run.name} ${labels[k]}` : own,
          color: k && !several ? "var(--second)" : color(index),
          dash: names.length > 1 ? DASHES[k] : several ? DASHES[index % 8] : "",
          points: points(run.metrics, name),
          held: points(run.heldout, `eval/${name}`).filter((p) => p.y !== null),
          per: run.metrics.per,
        });
      });
    return lines;
  }

  // What is drawn in which leg: title, unit, metrics. each: one chart for each method, as the numbers are not comparable.
  const CHARTS = {
    generation: [
      { title: "Length of completions", unit: "Tokens, the end token included", names: ["completions/mean_length"] },
      { title: "Completions cut at the length limit", unit: "Share of completions", names: ["completions/clipped_ratio"], percent: true, zero: true },
      { title: "Entropy of the policy", unit: "Nats per token; low: every sample is the same", names: ["entropy"], zero: true },
      { title: "Sampler against learner, mean", unit: "Difference of their log-probabilities of the same tokens, nats", names: ["sampling/logprob_difference/mean"], zero: true },
      { title: "Sampler against learner, largest", unit: "Largest difference of the step, nats", names: ["sampling/logprob_difference/max"], zero: true },
      { title: "Groups that differ, after sampling again", unit: "Share of groups", names: ["dynamic_sampling/useful"], percent: true, zero: true },
    ],
    reward: [
      { title: "Reward", unit: "Mean over completions of the weighted sum", names: ["reward"], band: "reward_std" },
      { title: "Reward minus the KL charge", unit: "Per completion", names: ["objective/rlhf_reward"] },
      { title: "Groups whose rewards are all equal", unit: "Share of groups; they teach nothing in grpo and pairwise-grpo", names: ["frac_reward_zero_std"], percent: true, zero: true },
      { title: "Opinions missing", unit: "Rewards that were not given", names: ["rewards/unscored"], zero: true },
      { title: "Pairs told apart", unit: "Share of pairs in which the chosen side has the higher reward; at the first step all are equal, which counts as 0", names: ["rewards/accuracies"], percent: true },
      { title: "Margin of the pairs", unit: "Implicit reward of the chosen minus the rejected side", names: ["rewards/margins"] },
      { title: "Implicit reward of both sides", unit: "β log π/π_ref, summed over tokens", names: ["rewards/chosen", "rewards/rejected"], labels: ["chosen", "rejected"] },
      { title: "Pairs ranked right by the reward model", unit: "Share of pairs in which the chosen side scores higher; a head that has learned nothing scores all alike, which counts as 0", names: ["accuracy"], percent: true },
      { title: "Margin of the scores", unit: "Score of the chosen minus the rejected side", names: ["margin"] },
      { title: "Mean score", unit: "Over both sides", names: ["mean_reward"] },
    ],
    optimization: [
      { title: "Loss", names: ["loss"], each: { sft: "Mean over tokens of −log π, nats", "reward-model": "Mean over pairs of −log σ(score margin)", dpo: "Mean over pairs of −log σ(reward margin)" } },
      { title: "KL to the reference", unit: "Nats per completion", names: ["kl"] },
      { title: "Tokens whose ratio is clipped", unit: "Share of tokens: they have no gradient", names: ["clip_ratio"], percent: true, zero: true },
      { title: "Norm of the gradient", unit: "Before clipping", names: ["grad_norm"], zero: true },
      { title: "Learning rate", unit: "Of AdamW", names: ["lr"], zero: true },
      { title: "What the critic explains", unit: "Share of the returns' variance; 0 is as good as a constant", names: ["value/explained_variance"] },
      { title: "Norm of the critic's gradient", unit: "Before clipping", names: ["value/grad_norm"], zero: true },
      { title: "Ranked pairs", unit: "Pairs in the step", names: ["pairs"], zero: true },
      { title: "Weight of the KL", unit: "β of the step", names: ["objective/kl_coef"] },
      { title: "Supervised part of the loss", unit: "−log π of the chosen side, nats per token", names: ["nll_loss"] },
      { title: "Log-probability of both sides", unit: "log π summed over tokens, nats", names: ["logps/chosen", "logps/rejected"], labels: ["chosen", "rejected"] },
    ],
  };
  const NAMED = new Set(Object.values(CHARTS).flat().flatMap((chart) => [...chart.names, chart.band]));

  function charts(specs) {
    const made = [];
    for (const spec of specs) {
      const runs = payload.runs.filter((run) => spec.names.some((name) => has(run, name)));
      const parts = spec.each && runs.length ? unique(runs.map((run) => run.method)).map((method) => runs.filter((run) => run.method === method)) : [runs];
      for (const part of parts) {
        const lines = linesOf(spec.names, spec.labels, part);
        const notes = [];
        if (spec.band && part.length === 1 && spec.band in part[0].metrics.series && part[0].metrics.per === 1) {
          const spread = part[0].metrics.series[spec.band].mean;
          lines[0].points = lines[0].points.map((p, i) => (p.y === null || spread[i] === null ? p : { ...p, low: p.y - spread[i], high: p.y + spread[i] }));
          notes.push("Band: ± one standard deviation over completions.");
        }
        const method = part[0]?.method, suffix = spec.each && payload.runs.length > 1 ? `: ${method}` : "";
        made.push(lineChart({ ...spec, title: spec.title + suffix, unit: spec.each ? spec.each[method] ?? "Mean over the step" : spec.unit, lines, notes }));
      }
    }
    return made.filter(Boolean);
  }
  const grid = (made) => made.length > 0 && el("div", { class: "charts" }, made);

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

  // A slider over the steps that were kept, with buttons to either side. It stays while what it steers is drawn again.
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

  // Draw a part again, with the focus where it was.
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
  const ending = (sample) => (sample.finished === false ? "cut at the length limit" : sample.finished ? "ended by itself" : "");

  // ---- 1: header

  const WORD = { done: "done", running: "running", stopped: "stopped" };
  const when = (run) => (run.began ? new Date(run.began * 1000).toLocaleString("en-US", { dateStyle: "medium", timeStyle: "short" }) : "–");
  const stepsOf = (run) => (run.done === run.planned || !run.planned ? number(run.done) : `${number(run.done)} of ${number(run.planned)}`);
  const status = (run) => el("span", { class: `status ${run.status}` }, WORD[run.status]);

  function header() {
    const { runs } = payload, methods = unique(runs.map((run) => run.method).filter(Boolean));
    const node = [], fact = ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", { dir: "auto" }, typeof value === "string" ? show(value) : value));
    if (runs.length === 1) {
      const [run] = runs;
      const facts = [["method", run.method], ["started from", run.about.started_from], ["status", status(run)], ["steps", stepsOf(run)], ["began", when(run)], ["took", duration(run.seconds)], ["left, about", run.left ? duration(run.left) : null]];
      node.push(el("h1", { dir: "auto" }, show(run.name)), el("dl", { class: "facts" }, facts.filter(([, value]) => value).map(fact)));
      const last = Object.entries(run.last);
      if (last.length) node.push(el("dl", { class: "facts last" }, fact(["held-out, at the", "last evaluation"]), last.map(([name, value]) => fact([name, number(value)]))));
    } else {
      const rows = runs.map((run, i) => [nameOf(run, i), show(run.about.started_from ?? "–"), status(run), stepsOf(run), when(run), duration(run.seconds) + (run.left ? `, ${duration(run.left)} left` : "")]);
      node.push(el("h1", {}, `${runs.length} runs: ${list(methods)}`), table(["run", "started from", "status", "steps", "began", "took"], rows, { numeric: [3], kind: "stacked facts-of-runs" }));
    }
    if (runs.every((run) => !run.done)) node.push(el("p", {}, "No step has finished yet, so there is nothing to draw."));
    const warned = runs.flatMap((run) => run.warnings.map((warning) => ({ run, ...warning })));
    node.push(...warned.map((warning) => el("div", { class: "warning", role: "note" },
      el("b", {}, runs.length > 1 ? `${show(warning.run.name)}: ` : "", warning.what), el("p", {}, warning.reason), el("p", { class: "help" }, warning.help))));
    if (!warned.length && runs.some((run) => run.done)) node.push(el("p", { class: "soft small" }, "No warnings: nothing in the numbers asks for attention."));
    return node;
  }

  // ---- 2: comparison

  function comparison() {
    const { comparison: found, runs } = payload;
    if (!found) return null;
    const node = [], byRun = ({ heads, rows }, numeric) => table(["method", ...heads], rows.map((row, i) => [nameOf(runs[i], i), ...row]), { numeric, kind: "stacked methods" });
    node.push(byRun(found.measured, d3.range(1, found.measured.heads.length + 1)));
    node.push(el("p", { class: "soft small" }, "Memory and compute are those of each run alone, not of the stages before it. ±: standard error."), byRun(found.about, []));
    const frontier = frontierChart(found.frontier), against = optimism();
    if (frontier || against.length) node.push(el("div", { class: "charts wide" }, frontier));
    return [...node, ...against];
  }

  function frontierChart({ reward, lines }) {
    const trails = lines.map((trail, i) => ({ label: payload.runs[i].name, color: color(i), dash: DASHES[i % 8], trail })).filter((line) => line.trail.length);
    if (d3.sum(trails, (line) => line.trail.length) < 2) return null; // one point shows no price
    const dots = trails.flatMap((line, k) => line.trail.map((p) => ({ ...p, ...line, symbol: k, title: `${line.label}\nstep ${p.step}\nreward ${number(p.reward)}${p.se ? ` ± ${number(2 * p.se, 2)}` : ""}\nKL ${number(p.kl)}` })));
    const start = dots.find((p) => p.step === 0 && p.kl < 0.01) ?? dots.find((p) => p.label === "sft");
    const errors = dots.some((p) => p.se);
    return figure("What the reward costs in KL", [
      `Held-out ${reward}, against KL to the start in nats per completion; each dot is an evaluation, each line a run in the order of its steps.`,
      errors && "Bars: ± two standard errors.",
    ], 380, (width) => {
      const named = width > 420, right = named ? roomFor(trails.map((line) => line.label), width, BOLD) : 18;
      const svg = Plot.plot({
        ...plain, width, height: 380, marginTop: 12, marginLeft: 40, marginRight: right, marginBottom: 42, ariaLabel: "Held-out reward against KL, by run",
        x: { ...axis, label: "KL to the start, nats per completion", labelAnchor: "center", grid: true, nice: true, zero: true, domain: around(dots, "kl"), ticks: Math.floor(width / 90) },
        y: { ...axis, label: null, grid: true, nice: true, domain: around(dots, "reward"), ticks: 6 },
        symbol: { range: ["circle", "square", "triangle", "diamond", "star", "wye", "cross"] },
        marks: [
          trails.map((line) => Plot.line(line.trail, { x: "kl", y: "reward", stroke: line.color, strokeWidth: 1.8, strokeDasharray: line.dash, ariaDescription: line.label })),
          Plot.ruleX(dots.filter((p) => p.se), { x: "kl", y1: (p) => p.reward - 2 * p.se, y2: (p) => p.reward + 2 * p.se, stroke: "color", strokeOpacity: 0.7, ariaDescription: "two standard errors" }),
          Plot.dot(dots, { x: "kl", y: "reward", stroke: "color", fill: "var(--raised)", symbol: (p) => String(p.symbol), r: 4, strokeWidth: 1.7, ariaDescription: "evaluations" }),
          start && Plot.dot([start], { x: "kl", y: "reward", r: 9, stroke: "currentColor", strokeWidth: 1.2, ariaDescription: "start" }),
          start && Plot.text([start], { x: "kl", y: "reward", text: () => "start", dx: 8, dy: 19, textAnchor: "start", fill: "currentColor", fontSize: 12 }),
          Plot.tip(dots, Plot.pointer({ x: "kl", y: "reward", title: "title", fontSize: 12, lineHeight: 1.25, stroke: "var(--rule)", fill: "var(--raised)" })),
        ].filter(Boolean),
      });
      if (named) {
        const far = trails.filter((line) => line.trail.length > 1 || trails.every((t) => t.trail.length === 1));
        nearEnds(svg, far.map((line) => ({ label: line.label, color: line.color, x: line.trail.at(-1).kl, y: line.trail.at(-1).reward })), dots);
      }
      return svg;
    });
  }

  // Names beside points, each moved up or down to where it touches no other name and no point.
  function nearEnds(svg, ends, dots) {
    const x = svg.scale("x"), y = svg.scale("y"), placed = [];
    const points = dots.map((dot) => [x.apply(dot.kl), y.apply(dot.reward)]);
    for (const end of ends) {
      const at = { ...end, px: x.apply(end.x) + 10 }, middle = y.apply(end.y), wide = 7 * end.label.length;
      const free = (py) => !placed.some((other) => Math.abs(other.px - at.px) < 95 && Math.abs(other.py - py) < 13) &&
        !points.some(([px, qy]) => px > at.px - 4 && px < at.px + wide && Math.abs(qy - py) < 11);
      at.py = middle + ([0, 6, -6, 12, -12, 18, -18, 24, -24, 32, -32].find((by) => free(middle + by)) ?? 0);
      placed.push(at);
    }
    d3.select(svg).append("g").attr("aria-label", "names").selectAll("text").data(placed).join("text")
      .attr("text-anchor", "start").attr("x", (d) => d.px).attr("y", (d) => d.py).attr("dy", "0.32em").style("fill", (d) => inked(d.color)).attr("font-weight", 600)
      .attr("paint-order", "stroke").attr("stroke", "var(--paper)").attr("stroke-width", 3).text((d) => fitting(d.label, svg.getAttribute("width") - d.px, BOLD));
  }

  // Learned against true reward: two charts with the same steps, and what was seen in words.
  function optimism() {
    const runs = payload.runs.filter((run) => run.true);
    if (!runs.length) return [];
    const names = unique(runs.map((run) => run.true.name)), marks = [];
    const lines = (key) => runs.map((run) => {
      const index = payload.runs.indexOf(run), { chart } = run.true;
      return { label: run.name, color: color(index), dash: payload.runs.length > 1 ? DASHES[index % 8] : "", points: points(chart, key), per: chart.per };
    });
    const turned = runs.filter((run) => run.true.turn?.turns), steady = runs.filter((run) => !run.true.turn?.turns);
    for (const run of turned) {
      const stroke = color(payload.runs.indexOf(run));
      marks.push(Plot.ruleX([run.true.turn.step], { stroke, strokeWidth: 1.2, strokeDasharray: "1 3", ariaDescription: "turning point" }));
    }
    const peaks = turned.map((run) => Plot.dot([run.true.turn], { x: "step", y: "peak", r: 5.5, stroke: "currentColor", strokeWidth: 1.6, symbol: "diamond", ariaDescription: "turning point" }));
    const words = turned.map((run) => {
      const { step, peak, fall, rise } = run.true.turn;
      return el("p", {}, el("b", { dir: "auto" }, show(run.name)), ` turns at step ${number(step)}: its ${show(run.true.name)} reward was highest there (${number(peak)}) and has fallen by ${number(fall)} since, while the learned reward rose by another ${number(rise)}. From there on it pleases the reward model, not the judge.`);
    });
    const known = steady.filter((run) => run.true.turn), few = steady.filter((run) => !run.true.turn);
    if (known.length) words.push(el("p", {}, turned.length || few.length ? `No such turn was seen in ${list(known.map((run) => show(run.name)))}.` : `No turn was seen: nowhere does the ${show(list(names))} reward fall by more than its noise while the learned one rises by more than its own.`));
    if (few.length) words.push(el("p", {}, `Too few points to see a turn: ${list(few.map((run) => show(run.name)))}.`));
    const measured = known.map((run) => {
      const { fall, fall_noise, rise, rise_noise } = run.true.turn;
      return `${show(run.name)} fell by ${number(fall, 2)} (noise ${number(fall_noise, 2)})${fall > fall_noise ? ` while the learned one rose by ${number(rise, 2)} (noise ${number(rise_noise, 2)})` : ""}`;
    });
    if (known.length) words.push(el("p", { class: "soft small" }, `From its highest point to the end: ${measured.join("; ")}. Measured on means over a tenth of the points; noise: six standard errors of such a mean, four for the learned reward.`));
    return [
      el("h3", {}, "Learned against true reward"),
      el("p", { class: "soft" }, `The learned reward is what methods that sample are trained on; the ${show(list(names))} reward only watches. Where the first goes on rising while the second falls, the reward is over-optimized.`),
      words,
      el("div", { class: "charts" },
        lineChart({ title: "Learned reward", unit: "Mean over completions", lines: lines("learned"), marks }),
        lineChart({ title: `True reward: ${show(list(names))}`, unit: "Mean over completions", notes: [turned.length > 0 && "Diamond and dotted line: where it turns."], lines: lines("true"), marks: [...marks, ...peaks] })),
    ];
  }

  // ---- 3: the legs

  const SAMPLES_NOTHING = ["sft", "reward-model", "dpo"];
  const samplers = () => payload.runs.filter((run) => !SAMPLES_NOTHING.includes(run.method));

  function without() {
    const methods = unique(payload.runs.map((run) => run.method)).filter((method) => SAMPLES_NOTHING.includes(method));
    const several = methods.length > 1, from = methods.every((method) => method === "sft") ? "answers" : methods.includes("sft") ? "answers and pairs" : "pairs";
    return methods.length > 0 && el("p", { class: "soft" }, `${list(methods)} ${several ? "sample" : "samples"} nothing: ${several ? "they learn" : "it learns"} from ${from} that are in the data.`);
  }

  function generation() {
    const host = el("div"), made = charts(CHARTS.generation);
    const parts = [without(), legend(samplers(), made), grid(made)];
    redraw(host, () => samplesView(host));
    if (host.childNodes.length) parts.push(el("h3", { id: "samples" }, "Samples"), host);
    return parts;
  }

  function reward() {
    const names = unique(payload.runs.flatMap((run) => [...Object.keys(run.metrics.series), ...Object.keys(run.heldout.series).map((name) => name.slice(5))]).filter((name) => /^rewards\/.+\/mean$/.test(name)));
    const same = (name) => payload.runs.every((run) => !(name in run.metrics.series) || String(run.metrics.series[name].mean) === String(run.metrics.series.reward?.mean));
    const alone = payload.runs.length === 1 && payload.runs[0].true;
    const parts = names.filter((name) => !same(name) && name !== `rewards/${alone?.name}/mean`)
      .map((name) => ({ title: `Reward: ${show(name.slice(8, -5))}`, unit: "Mean over completions, before its weight", names: [name] }));
    const made = charts([CHARTS.reward[0], ...parts, ...CHARTS.reward.slice(1)]);
    const runs = payload.runs.filter((run) => run.method !== "sft");
    const none = payload.runs.some((run) => run.method === "sft") && el("p", { class: "soft" }, "sft has no reward: the chosen answer itself is what is good.");
    return [none, legend(runs, made), grid(made), payload.runs.length === 1 && optimism()];
  }

  function optimization() {
    const rest = unique(payload.runs.flatMap((run) => [...Object.keys(run.metrics.series), ...Object.keys(run.heldout.series).map((name) => name.replace(/^eval\//, ""))]))
      .filter((name) => !NAMED.has(name) && !/^rewards\/.+\/mean$/.test(name) && !name.startsWith("eval/"));
    const others = charts(rest.map((name) => ({ title: show(name), unit: "As it was logged", names: [name] })));
    const made = charts(CHARTS.optimization);
    return [legend(payload.runs, made), grid(made), others.length > 0 && fold("others", `Everything else that was logged (${others.length})`, grid(others))];
  }

  // ---- samples

  // Words of two texts, and which of the second are not in the longest common run of words.
  function differing(base, text) {
    const a = base.split(/(\s+)/), b = text.split(/(\s+)/);
    const word = (w) => w.trim() !== "";
    const x = a.filter(word), y = b.filter(word);
    if (x.length * y.length > 2e6) return b.map((w) => [w, false]);
    const longest = Array.from({ length: x.length + 1 }, () => new Uint16Array(y.length + 1));
    for (let i = x.length - 1; i >= 0; i--)
      for (let j = y.length - 1; j >= 0; j--)
        longest[i][j] = x[i] === y[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    const same = new Set();
    for (let i = 0, j = 0; i < x.length && j < y.length; )
      if (x[i] === y[j]) { same.add(j); i++; j++; }
      else if (longest[i + 1][j] >= longest[i][j + 1]) i++;
      else j++;
    let j = 0;
    return b.map((w) => (word(w) ? [w, !same.has(j++)] : [w, false]));
  }

  function compared(base, text) {
    const node = el("div", { class: "said", dir: "auto" });
    let open = null, space = "";
    for (const [word, differs] of differing(base.trim(), text.trim())) {
      if (word.trim() === "") { space += word; continue; }
      (differs && open ? open : node).append(show(space)); // between two marked words the space is marked too
      if (differs) open ??= node.appendChild(el("mark"));
      else open = null;
      (open ?? node).append(show(word));
      space = "";
    }
    return node;
  }

  // Prompts that several runs answered: the judge's where there are any, else those in the samples of several runs.
  function sharedPrompts() {
    const answers = new Map();
    const add = (run, sample) => {
      const of = answers.get(sample.prompt) ?? answers.set(sample.prompt, new Map()).get(sample.prompt);
      of.set(run, sample);
    };
    const judged = payload.runs.filter((run) => run.judged.samples.length);
    if (judged.length > 1)
      for (const run of judged) for (const sample of run.judged.samples) add(run, { ...sample, rewards: Object.fromEntries(["gold", "learned"].filter((k) => k in sample).map((k) => [k, sample[k]])) });
    else
      for (const run of samplers()) for (const kind of ["plain", "tokens"]) for (const step of run.samples[kind].steps) for (const sample of step.samples) add(run, { ...sample });
    const newest = ([, of]) => Math.max(...[...of.values()].map((sample) => sample.step ?? 0));
    return [...answers].filter(([, of]) => of.size > 1).sort((a, b) => newest(b) - newest(a));
  }

  const stepsWithSamples = (run) => [...run.samples.plain.steps, ...run.samples.tokens.steps].sort((a, b) => a.step - b.step);

  function samplesView(host) {
    const again = () => redraw(host, () => samplesView(host));
    const runs = samplers().filter((run) => stepsWithSamples(run).length), shared = payload.runs.length > 1 ? sharedPrompts() : [];
    const parts = [];
    if (shared.length) {
      const at = Math.max(0, shared.findIndex(([prompt]) => prompt === chosen.prompt));
      const [prompt, of] = shared[at], first = [...of.keys()][0];
      const go = (by) => { chosen.prompt = shared[(at + by + shared.length) % shared.length][0]; again(); };
      parts.push(
        el("p", { class: "soft" }, `The same prompt, answered by each run. Marked: words that differ from ${show(first.name)}'s answer.`),
        el("div", { class: "controls" },
          select("prompt", `prompt, ${shared.length} in all`, shared.map(([text], i) => [i, `${i + 1}: ${text.slice(0, 70)}${text.length > 70 ? "…" : ""}`]), at, (i) => { chosen.prompt = shared[i][0]; again(); }),
          el("span", { class: "stepper" }, el("button", { type: "button", id: "prompt-back", "aria-label": "previous prompt", onclick: () => go(-1) }, "‹"), " ", el("button", { type: "button", id: "prompt-on", "aria-label": "next prompt", onclick: () => go(1) }, "›"))),
        said(prompt, "div", "said prompt"),
        el("div", { class: "cards" }, [...of].map(([run, sample]) => el("article", { class: "card" },
          el("header", {}, nameOf(run, payload.runs.indexOf(run)), rewards(sample)),
          run === first ? said(sample.completion.trim()) : compared(of.get(first).completion, sample.completion),
          el("footer", {}, [sample.step !== undefined ? `step ${sample.step}` : "", ending(sample)].filter(Boolean).join(" · "))))));
    }
    if (runs.length) parts.push(shared.length ? fold("by-step", "One run, step by step", byStep(runs, again)) : byStep(runs, again));
    return parts;
  }

  function byStep(runs, again) {
    const run = runs.find((each) => each.name === chosen.sampleRun) ?? runs[0], kept = stepsWithSamples(run), steps = kept.map((each) => each.step);
    const of = run.samples.plain.of + run.samples.tokens.of, body = el("div");
    const draw = () => redraw(body, () => {
      const samples = (kept.find((each) => each.step === chosen.sampleStep) ?? kept.at(-1)).samples;
      return Object.values(Object.groupBy(samples, (sample) => `${sample.set ?? ""}/${sample.group ?? 0}/${sample.prompt}`)).map((group) => [
        group[0].set === "held-out" && el("p", { class: "soft small" }, "Held-out prompt:"),
        said(group[0].prompt, "div", "said prompt"),
        el("div", { class: "cards" }, group.map((sample) => el("article", { class: "card" },
          el("header", {}, el("span", { class: "soft" }, sample.side ?? `step ${sample.step}`), rewards(sample)), said(sample.completion.trim()), el("footer", {}, ending(sample))))),
      ]);
    });
    draw();
    return el("div", {},
      el("div", { class: "controls" },
        runs.length > 1 && select("sample-run", "run", runs.map((each) => [each.name, each.name]), run.name, (name) => { chosen.sampleRun = name; again(); }),
        stepper("sample-step", steps, chosen.sampleStep ?? steps.at(-1), (step) => { chosen.sampleStep = step; draw(); })),
      steps.length < of && el("p", { class: "soft small" }, `${count(steps.length, "step")} of the ${number(of)} that were recorded are on this page, evenly spread, the first and the last among them.`),
      body);
  }

  // ---- 4: the token view

  const QUANTITIES = [
    ["gradient", "gradient weight", "−dL/dlog π: how hard this step pushes the token up (blue) or down (orange).", "signed", "gradient"],
    ["implicit_reward", "implicit reward", "β log π/π_ref of the token; summed over a completion it is what preferences are compared by.", "signed", "implicit reward"],
    ["advantage", "advantage", "How much better than expected; above 0 the token is made more likely.", "signed", "advantage"],
    ["kl", "KL contribution", "log π/π_ref of the token; summed over a completion it is the KL to the reference.", "signed", "KL"],
    ["logprob", "log π, policy", "Log-probability the policy gives the token, in nats; the darker, the more surprising.", "surprise", "log π"],
    ["ref_logprob", "log π, reference", "Log-probability the reference gives the token, in nats; the darker, the more surprising.", "surprise", "log π_ref"],
    ["sampler_logprob", "log π, sampler", "Log-probability with which the token was sampled, in nats; the darker, the more surprising.", "surprise", "log π sampler"],
    ["ratio", "ratio π/π_old", "How much likelier the token is now than when it was sampled: 1 is no change, blue more, orange less.", "ratio", "ratio"],
    ["value", "value", "The return that the critic expects from here.", "range", "value"],
    ["return", "return", "The reward from here to the end, as GAE estimates it: what the critic learns.", "range", "return"],
    ["token_reward", "reward charged", "Reward at this token: the KL charge, and at the end the score.", "signed", "charged"],
  ];
  const UP = "0 114 178", DOWN = "213 94 0", STRONG = "204 121 167";
  const ink = (rgb, part) => `rgb(${rgb} / ${(0.82 * Math.min(1, Math.max(0, part))).toFixed(3)})`;

  // From the values on show to a color for each, and the legend's two ends.
  function scaleOf(kind, values) {
    const known = values.filter((v) => typeof v === "number").sort((a, b) => a - b);
    if (kind === "signed") {
      const most = d3.quantile(known.map(Math.abs).sort((a, b) => a - b), 0.98) || 1e-9;
      return { color: (v) => ink(v < 0 ? DOWN : UP, Math.abs(v) / most), low: -most, middle: 0, high: most, ramp: [ink(DOWN, 1), "transparent", ink(UP, 1)] };
    }
    if (kind === "ratio") {
      const most = Math.max(0.01, d3.quantile(known.map((v) => Math.abs(Math.log(v))).sort((a, b) => a - b), 0.98) || 0);
      return { color: (v) => ink(v < 1 ? DOWN : UP, Math.abs(Math.log(v)) / most), low: Math.exp(-most), middle: 1, high: Math.exp(most), ramp: [ink(DOWN, 1), "transparent", ink(UP, 1)] };
    }
    if (kind === "surprise") {
      const most = d3.quantile(known, 0.02) || -1e-9;
      return { color: (v) => ink(STRONG, v / most), low: most, high: 0, ramp: [ink(STRONG, 1), "transparent"] };
    }
    const [low, high] = [known[0] ?? 0, known.at(-1) ?? 1];
    return { color: (v) => ink(STRONG, (v - low) / (high - low || 1)), low, high, ramp: ["transparent", ink(STRONG, 1)] };
  }

  const withTokens = () => payload.runs.filter((run) => run.samples.tokens.steps.length || (run.method === "reward-model" && run.samples.plain.steps.length));
  const tokenSteps = (run) => (run.samples.tokens.steps.length ? run.samples.tokens : run.samples.plain);

  function tokens() {
    const runs = withTokens();
    if (!runs.length) return null;
    const host = el("div");
    redraw(host, () => tokenView(host, runs));
    return [host];
  }

  function tokenView(host, runs) {
    const again = () => redraw(host, () => tokenView(host, runs));
    const run = runs.find((each) => each.name === chosen.tokenRun) ?? runs.find((each) => each.samples.tokens.steps.some((s) => s.samples.some((c) => "advantage" in c))) ?? runs.at(-1);
    const kept = tokenSteps(run), steps = kept.steps.map((each) => each.step);
    const body = el("div"), choices = el("span", { class: "contents" });
    const draw = () => { const [first, rest] = oneStep(run, kept, draw); redraw(choices, () => first); redraw(body, () => rest); };
    const controls = el("div", { class: "controls" },
      runs.length > 1 && select("token-run", "run", runs.map((each) => [each.name, each.name]), run.name, (name) => { chosen.tokenRun = name; again(); }),
      stepper("token-step", steps, steps.includes(chosen.tokenStep) ? chosen.tokenStep : steps.at(-1), (step) => { chosen.tokenStep = step; draw(); }),
      choices);
    draw();
    const cut = steps.length < kept.of && el("p", { class: "soft small" }, `${count(steps.length, "step")} of the ${number(kept.of)} that were kept are on this page, evenly spread, the first and the last among them.`);
    return [controls, cut, body];
  }

  // Of one step: what there is to choose, and what it shows.
  function oneStep(run, kept, draw) {
    const { samples: all } = kept.steps.find((each) => each.step === chosen.tokenStep) ?? kept.steps.at(-1);
    const samples = all.filter((sample) => sample.tokens || run.method === "reward-model");
    const groups = Object.values(Object.groupBy(samples, (sample) => `${sample.set ?? ""}/${sample.group ?? 0}`));
    const at = Math.min(chosen.tokenGroup ?? 0, groups.length - 1), group = groups[at];
    if (!group) return [[], el("p", { class: "soft" }, "The completions of this step are too long to be kept on this page.")];
    const there = QUANTITIES.filter(([name]) => group.some((sample) => sample[name]));
    const quantity = there.find(([name]) => name === chosen.quantity) ?? there[0];
    const choices = [
      groups.length > 1 && select("token-group", "prompt", groups.map((each, i) => [i, `${i + 1}${each[0].set === "held-out" ? ", held-out" : ""}: ${each[0].prompt.slice(0, 60)}`]), at, (i) => { chosen.tokenGroup = Number(i); draw(); }),
      quantity && select("quantity", "color by", there.map(([name, label]) => [name, label]), quantity[0], (name) => { chosen.quantity = name; draw(); })];
    const prompt = said(group[0].prompt, "div", "said prompt");
    if (!quantity) return [choices, [prompt, scoredPair(group)]];
    const values = group.flatMap((sample) => sample[quantity[0]] ?? []), scale = scaleOf(quantity[3], values);
    const untrained = group.some((sample) => sample[quantity[0]]?.includes(null)), clipped = group.some((sample) => sample.clipped?.includes(true));
    const key = el("div", { class: "scale" },
      number(scale.low), el("span", { class: "ramp", style: `background: linear-gradient(90deg, ${scale.ramp.join(", ")})` }), number(scale.high),
      untrained && el("span", { class: "key" }, el("span", { class: "token untrained" }, "grey"), " no number: not trained on"),
      clipped && el("span", { class: "key" }, el("span", { class: "token clipped" }, "dashed"), " ratio clipped: no gradient"));
    const panel = el("aside", { id: "token-numbers", "aria-live": "polite" }, el("p", { class: "soft" }, "Point at a token, or move with the arrow keys, to see all its numbers."));
    const boxes = group.map((sample, i) => completionBox(sample, i, quantity, scale, panel, there));
    return [choices, [el("p", { class: "small" }, quantity[2]), key, prompt,
      el("div", { class: "tokenview" }, el("div", { class: "stack" }, el("div", { class: group[0].side ? "pair" : "stack" }, boxes), group[0].side ? margin(group) : rankedPairs(run, group)), panel)]];
  }

  const total = (sample, name) => d3.sum(sample[name] ?? [], (v) => (typeof v === "number" ? v : 0));

  function completionBox(sample, i, [name, label], scale, panel, there) {
    const box = el("div", { class: "tokens", role: "listbox", "aria-label": `tokens of ${sample.side ?? `completion ${i + 1}`}`, dir: "auto" });
    let word = null; // tokens of one word stay on one line where they fit
    sample.tokens.forEach((token, t) => {
      if (!word || /^\s/.test(token) || /\s$/.test(sample.tokens[t - 1])) word = box.appendChild(el("span", { class: "word" }));
      const value = sample[name]?.[t] ?? null;
      const node = el("span", { class: `token${value === null ? " untrained" : ""}${sample.clipped?.[t] ? " clipped" : ""}`, role: "option", tabindex: t ? -1 : 0, "data-t": t, "aria-selected": "false", dir: "auto", "aria-label": `${show(token)} ${label} ${value === null ? "none" : value}` }, show(token).replace(/\n/g, "↵"));
      if (value !== null) node.style.background = scale.color(value);
      word.append(node);
      if (token.endsWith("\n")) box.append("\n");
    });
    const pick = (node) => {
      if (!node?.dataset?.t) return;
      const t = Number(node.dataset.t);
      for (const other of document.querySelectorAll('.token[aria-selected="true"]')) other.setAttribute("aria-selected", "false");
      for (const other of box.querySelectorAll('.token[tabindex="0"]')) other.tabIndex = -1;
      node.tabIndex = 0;
      node.setAttribute("aria-selected", "true");
      const rows = there.filter(([key]) => sample[key]).map(([key, , , , title]) => el("tr", { class: key === name ? "now" : null, "data-quantity": key }, el("th", { scope: "row" }, title), el("td", { class: "number" }, typeof sample[key][t] !== "number" ? "–" : plainly(sample[key][t]))));
      const flags = [sample.clipped?.[t] && "ratio clipped", sample[name]?.[t] === null && "not trained on"].filter(Boolean);
      panel.replaceChildren(el("span", { class: "token said", dir: "auto" }, show(sample.tokens[t]).replace(/\n/g, "↵") || "(empty)"), el("div", { class: "soft" }, [`token ${t + 1} of ${sample.tokens.length + (sample.more_tokens ?? 0)}`, ...flags].join(" · ")), el("table", {}, el("tbody", {}, rows)));
    };
    box.addEventListener("mouseover", (event) => pick(event.target));
    box.addEventListener("focusin", (event) => pick(event.target));
    box.addEventListener("keydown", (event) => {
      const all = [...box.querySelectorAll(".token")], now = all.indexOf(document.activeElement), to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: all.length - 1 }[event.key];
      if (all[to]) { all[to].focus(); event.preventDefault(); }
    });
    const sum = ["gradient", "implicit_reward", "kl", "logprob", "ref_logprob", "sampler_logprob", "token_reward"].includes(name);
    return el("article", { class: "card" },
      el("header", {}, el("b", {}, sample.side ?? `completion ${i + 1}`), rewards(sample)), box,
      el("footer", {}, [sum && `sum of ${label}: ${number(total(sample, name), 4)}`, ending(sample), sample.more_tokens && `${number(sample.more_tokens)} tokens more`].filter(Boolean).join(" · ")));
  }

  function margin(group) {
    const [chosenSide, rejected] = ["chosen", "rejected"].map((side) => group.find((sample) => sample.side === side));
    if (!chosenSide || !rejected) return null;
    const of = (sample) => sample.reward ?? total(sample, "implicit_reward"), gap = of(chosenSide) - of(rejected);
    return el("p", {}, "Margin, chosen minus rejected: ", el("b", { id: "margin" }, number(gap, 4)), gap > 0 ? ". The pair is told apart as labeled." : ". The pair is not yet told apart as labeled.");
  }

  function scoredPair(group) {
    return [el("div", { class: "pair" }, group.map((sample) => el("article", { class: "card" }, el("header", {}, el("b", {}, sample.side ?? "completion"), rewards(sample)), said(sample.completion)))), margin(group)];
  }

  // Pairwise GRPO: the margin of every pair that the reward ranks.
  function rankedPairs(run, group) {
    if (run.method !== "pairwise-grpo" || !group.every((sample) => sample.implicit_reward)) return null;
    const sums = group.map((sample) => total(sample, "implicit_reward"));
    const margins = group.flatMap((a, i) => group.map((b, j) => (a.reward > b.reward ? sums[i] - sums[j] : null)));
    if (margins.every((m) => m === null)) return el("p", { class: "soft" }, "All rewards are equal: this group has no ranked pair.");
    const scale = scaleOf("signed", margins);
    const rows = group.map((a, i) => el("tr", {}, el("th", { scope: "row" }, `${i + 1} (${number(a.reward)})`), group.map((b, j) => {
      const m = margins[i * group.length + j], cell = el("td", {}, m === null ? "" : `${m > 0 ? "✓" : "✗"} ${number(m)}`);
      if (m !== null) cell.style.background = scale.color(m);
      return cell;
    })));
    return el("div", {}, el("h4", {}, "Ranked pairs of this group"),
      el("p", { class: "soft small" }, "Row above column in reward: by how much the row's implicit reward is higher. ✓: the policy ranks them as the reward does."),
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "ranked pairs" }, el("table", { class: "matrix" }, el("thead", {}, el("tr", {}, el("td", {}), group.map((b, j) => el("th", { scope: "col" }, `${j + 1} (${number(b.reward)})`)))), el("tbody", {}, rows))));
  }

  // ---- 5: cost

  const TINTS = {
    program: "#c9c9c4", generation: "#56B4E9", reward: "#E69F00", forward: "#009E73", backward: "#0072B2", weights: "#0072B2", optimizer: "#CC79A7", reference: "#56B4E9",
    critic: "#009E73", "reward model": "#E69F00", cache: "#F0E442", gradients: "#D55E00", evaluation: "#D55E00",
    other: "#8f8f8f", "activations and the rest": "#8f8f8f",
  };

  function bars(title, notes, unit, format, rows) {
    // rows: [{run, parts: {name: value}}]
    rows = rows.filter((row) => Object.values(row.parts).some((v) => v > 0));
    if (!rows.length) return null;
    const order = Object.keys(TINTS), place = (name) => (order.indexOf(name) + 99) % 99;
    const names = unique(rows.flatMap((row) => Object.keys(row.parts))).filter((name) => rows.some((row) => row.parts[name] > 0)).sort((a, b) => place(a) - place(b));
    const tint = (name) => TINTS[name] ?? "#D55E00";
    const flat = rows.flatMap((row) => names.filter((name) => row.parts[name] > 0).map((name) => ({ run: row.run.name, name, value: row.parts[name], fill: tint(name) })));
    const most = Math.max(...rows.map((row) => d3.sum(Object.values(row.parts))));
    const key = el("ul", { class: "legend" }, names.map((name) => el("li", { class: "name" }, el("span", { style: `display:inline-block;width:.8rem;height:.8rem;border-radius:2px;background:${tint(name)}` }), el("span", {}, show(name)))));
    const height = 46 + 34 * rows.length;
    const chart = figure(title, notes, height, (width) => {
      const left = rows.length > 1 ? roomFor(rows.map((row) => row.run.name), width, PLAIN) : 8, room = (width - left - 16) / most;
      const label = (d) => (d.name.length * 6.6 + 8 < d.value * room ? d.name : "");
      return Plot.plot({
        ...plain, width, height, marginLeft: left, marginRight: 16, marginBottom: 38, ariaLabel: title,
        x: { ...axis, label: unit, labelAnchor: "center", grid: true, ticks: Math.max(2, Math.floor(width / 110)), tickFormat: format },
        y: { ...axis, label: null, domain: rows.map((row) => row.run.name), padding: 0.22, axis: rows.length > 1 ? "left" : null, tickFormat: (name) => fitting(name, left, PLAIN) },
        color: { type: "identity" },
        marks: [
          Plot.barX(flat, Plot.stackX({ x: "value", y: "run", fill: "fill", order: null, inset: 0.5, ariaDescription: title, title: (d) => `${d.run}, ${d.name}: ${format(d.value)} ${unit}` })),
          Plot.text(flat, Plot.stackX({ x: "value", y: "run", text: label, fill: (d) => (d.fill === "#0072B2" ? "#ffffff" : "#101214"), fontSize: 11, order: null, pointerEvents: "none" })),
        ],
      });
    });
    const tableRows = rows.map((row) => [show(row.run.name), ...names.map((name) => format(row.parts[name] ?? 0)), format(d3.sum(Object.values(row.parts)))]);
    return el("div", {}, chart, key, fold(title, "as numbers", table(["run", ...names.map(show), "together"], tableRows, { numeric: names.map((_, i) => i + 1).concat(names.length + 1) })));
  }

  function cost() {
    const { runs } = payload;
    const short3 = (v) => number(v, 3);
    const made = [
      bars("Where the time goes", ["Seconds of all steps together, by part."], "seconds", short3, runs.map((run) => ({ run, parts: run.time }))),
      bars("What fills the memory", ["At its fullest, by part. Program: Python and its libraries, before the model was loaded."], "MiB", (v) => number(v, 3), runs.map((run) => ({ run, parts: Object.fromEntries(Object.entries(run.memory).map(([name, n]) => [name, n / 2 ** 20])) }))),
    ].filter(Boolean);
    const lines = runs.map((run, i) => ({ label: run.name, color: color(i), dash: runs.length > 1 ? DASHES[i % 8] : "", points: points(run.speed, "tokens"), per: run.speed.per }));
    const speed = lineChart({ title: "Tokens per second", unit: "Sampled and trained together", notes: [runs.some((run) => run.time.evaluation) && "Without the time of evaluations."], lines, zero: true });
    if (!made.length && !speed) return null;
    return [el("div", { class: "charts" }, made, speed)];
  }

  // ---- 6: what was run

  const written = (value) => (typeof value === "string" ? value : JSON.stringify(value));

  function what() {
    return payload.runs.map((run, i) => {
      const option = ({ name, value, help }) => [el("span", { title: help }, `--${show(name).replaceAll("_", "-")}`), said(written(value), "span", "said mono"), el("span", { class: "soft small help" }, help ?? "")];
      const own = run.options.filter((each) => !each.default), rest = run.options.filter((each) => each.default), about = run.about;
      const versions = Object.entries(about.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", ");
      const facts = [["started from", about.started_from], ["parameters", about.parameters ? number(about.parameters) : null], ["machine", about.machine], ["versions", versions], ["peak memory", run.peak_memory ? bytes(run.peak_memory) : null]].filter(([, value]) => value);
      const inside = [
        own.length > 0 && el("h4", {}, "Options that differ from the defaults"),
        own.length > 0 && table([], own.map(option), { kind: "options" }),
        rest.length > 0 && fold(`rest ${run.name}`, `${count(rest.length, "option")} as by default`, table([], rest.map(option), { kind: "options" })),
        about.data && [el("h4", {}, "Data"), table([], Object.entries(about.data).map(([name, n]) => [show(name), number(n)]), { numeric: [1] })],
        run.example && (run.example.completions.length ? [el("h4", {}, "One example"), el("p", { class: "soft small" }, "Marked: what is trained on."), example(run.example)] : [el("h4", {}, "One prompt"), example(run.example)]),
        facts.length > 0 && [el("h4", {}, "Machine and versions"), table([], facts.map(([name, value]) => [name, show(value)]))],
      ];
      if (payload.runs.length === 1) return el("div", {}, inside);
      return el("div", { class: "run" }, fold(`run ${run.name}`, el("h3", {}, nameOf(run, i)), inside));
    });
  }

  function example({ prompt, completions }) {
    return el("div", {}, said(prompt, "div", "said prompt"),
      completions.map((spans) => el("div", { class: "card said", dir: "auto" }, spans.map(([part, learned]) => el("span", { class: learned ? "learned" : "soft" }, show(part))))));
  }

  // ---- the page

  const question = (title, asked) => el("h2", {}, title, el("span", { class: "question" }, asked));
  const SECTIONS = [
    ["overview", "Overview", () => null, header],
    ["comparison", "Comparison", () => question("Comparison", "What does each method buy, and what does it cost?"), comparison],
    ["generation", "Generation", () => question("Generation", "What does the policy say?"), generation],
    ["reward", "Reward", () => question("Reward", "What is good?"), reward],
    ["optimization", "Optimization", () => question("Optimization", "How does it change?"), optimization],
    ["tokens", "Token view", () => question("Token view", "Every token of a completion, colored by what acts on it."), tokens, () => withTokens().map((run) => [run.name, tokenSteps(run)])],
    ["cost", "Cost", () => question("Cost", "Time and memory."), cost],
    ["what", "What was run", () => question("What was run", "Options, data, machine."), what, () => payload.runs.map((run) => [run.name, run.options, run.about, run.example, run.peak_memory])],
  ];

  // A section that can't be drawn says so, and the others are drawn.
  function attempt(build) {
    try {
      return build();
    } catch (error) {
      console.error(error);
      return [el("p", {}, `This section could not be drawn: ${show(error.message)}`)];
    }
  }

  const built = {}; // sections by name; live, one whose data is as before stays as it is

  function render(given) {
    const at = window.scrollY, focus = document.activeElement?.id;
    payload = given;
    payload.runs.forEach((run, i) => root.style.setProperty(`--run-${i}`, `light-dark(${run.color}, ${IN_THE_DARK[run.color] ?? run.color})`));
    const main = byId("main"), links = [], sections = [];
    for (const [id, title, head, build, needs] of SECTIONS) {
      const key = root.dataset.live && needs ? JSON.stringify(needs()) : null;
      if (key === null || built[id]?.key !== key) {
        const children = attempt(build);
        built[id] = { key, section: children && el("section", { id, "aria-label": title }, head(), children) };
      }
      if (!built[id].section) continue;
      sections.push(built[id].section);
      links.push(el("li", { class: id === "tokens" ? "sub" : null }, el("a", { href: `#${id}` }, title)));
    }
    sections.push(el("footer", { id: "made", class: "soft small" }, `Made ${new Date(payload.made * 1000).toLocaleString("en-US", { dateStyle: "long", timeStyle: "short" })} by trivet report. This file needs no network.`));
    let before = null;
    for (const section of sections) { // what stays is not touched: it may hold the focus
      const old = byId(section.id);
      if (old && old !== section) old.replaceWith(section);
      else if (!old) before ? before.after(section) : main.prepend(section);
      before = section;
    }
    for (const other of [...main.childNodes]) if (!sections.includes(other)) other.remove();
    for (const box of drawn.keys()) if (!box.isConnected) { resized.unobserve(box); drawn.delete(box); }
    byId("contents").replaceChildren(el("ol", {}, links));
    follow(sections);
    if (at) window.scrollTo({ top: at, behavior: "instant" });
    if (focus) byId(focus)?.focus({ preventScroll: true });
    requestAnimationFrame(() => requestAnimationFrame(() => { root.dataset.ready = String(Number(root.dataset.ready ?? 0) + 1); performance.mark("rendered"); }));
  }

  // The contents show where the reader is.
  let seen = null, mark = () => {};
  function follow(sections) {
    seen?.disconnect();
    let marked = null;
    const inView = new Set(), last = sections.findLast((section) => section.tagName === "SECTION");
    mark = () => {
      const end = window.scrollY > 0 && window.scrollY + window.innerHeight >= root.scrollHeight - 2; // where the last one can't get higher
      const now = (end ? last : sections.find((section) => inView.has(section.id)))?.id;
      if (now === marked) return;
      marked = now;
      for (const link of byId("contents").querySelectorAll("a")) link.getAttribute("href") === `#${now}` ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
      const here = byId("contents").querySelector("[aria-current]"), row = byId("contents").firstChild;
      if (here) row.scrollLeft = here.offsetLeft - row.offsetLeft - (row.clientWidth - here.offsetWidth) / 2;
    };
    seen = new IntersectionObserver((entries) => {
      for (const entry of entries) entry.isIntersecting ? inView.add(entry.target.id) : inView.delete(entry.target.id);
      mark();
    }, { rootMargin: "-15% 0px -60% 0px" });
    for (const section of sections) seen.observe(section);
  }

  window.addEventListener("scroll", () => mark(), { passive: true });

  // ---- theme and live

  const themes = ["auto", "light", "dark"];
  byId("theme").addEventListener("click", () => {
    const next = themes[(themes.indexOf(chosen.theme ?? "auto") + 1) % 3];
    chosen.theme = next;
    root.style.colorScheme = next === "auto" ? "light dark" : next;
    byId("theme").textContent = `theme: ${next}`;
  });

  function say(state) {
    const run = payload.runs.find((each) => each.status === "running");
    const text = { live: run ? `live · ${show(run.name)} · step ${stepsOf(run)}${run.left ? ` · ${duration(run.left)} left` : ""}` : "", ended: "run ended", lost: "connection lost, trying again" }[state];
    byId("live").dataset.state = state;
    if (byId("live").textContent !== text) byId("live").textContent = text;
  }

  async function poll(tag) {
    let state = null;
    try {
      const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 200) { tag = answer.headers.get("ETag"); render(await answer.json()); }
      else if (answer.status !== 304) state = "lost";
    } catch { state = "lost"; }
    say(state ?? (payload.runs.some((run) => run.status === "running") ? "live" : "ended"));
    setTimeout(poll, 2000, tag);
  }

  window.trivet = { render };
  render(JSON.parse(byId("data").textContent));
  if (root.dataset.live) { say(payload.runs.some((run) => run.status === "running") ? "live" : "ended"); setTimeout(poll, 2000, null); }
})();
