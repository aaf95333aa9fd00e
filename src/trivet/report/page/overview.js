// What was run and what came out: the header with its warnings, the comparison of several runs, options, data and machine.

// ---- header

const WORD = { done: "done", running: "running", stopped: "stopped" };
const when = (run) => (run.began ? new Date(run.began * 1000).toLocaleString("en-US", { dateStyle: "medium", timeStyle: "short" }) : "–");
const stepsOf = (run) => (run.done === run.planned || !run.planned ? number(run.done) : `${number(run.done)} of ${number(run.planned)}`);
const status = (run) => el("span", { class: `status ${run.status}` }, WORD[run.status]);

function header() {
  const { runs } = payload, methods = unique(runs.map((run) => run.method).filter(Boolean));
  const node = [], fact = ([name, value]) => el("div", {}, el("dt", {}, name), el("dd", { dir: "auto" }, typeof value === "string" ? show(value) : value));
  if (runs.length === 1) {
    const [run] = runs;
    const facts = [["method", run.method], ["started from", run.about.started_from], ["status", status(run)], ["steps", stepsOf(run)], ["start time", when(run)], ["duration", duration(run.seconds)], ["time left, estimated", run.left ? duration(run.left) : null]];
    node.push(el("h1", { dir: "auto" }, show(run.name)), el("dl", { class: "facts" }, facts.filter(([, value]) => value).map(fact)));
    const last = Object.entries(run.last);
    if (last.length) node.push(el("dl", { class: "facts last" }, fact(["held-out", "last evaluation"]), last.map(([name, value]) => fact([name, number(value)]))));
  } else {
    const rows = runs.map((run, i) => [nameOf(run, i), show(run.about.started_from ?? "–"), status(run), stepsOf(run), when(run), duration(run.seconds) + (run.left ? `, ${duration(run.left)} left` : "")]);
    node.push(el("h1", {}, `${runs.length} runs: ${list(methods)}`), table(["run", "started from", "status", "steps", "start time", "duration"], rows, { numeric: [3], kind: "stacked facts-of-runs" }));
  }
  if (runs.every((run) => !run.done)) node.push(el("p", {}, "No step has finished yet, so there is nothing to draw."));
  const warned = runs.flatMap((run) => run.warnings.map((warning) => ({ run, ...warning })));
  node.push(...warned.map((warning) => el("div", { class: "warning", role: "note" },
    el("b", {}, runs.length > 1 ? `${show(warning.run.name)}: ` : "", warning.what), el("p", {}, warning.reason), el("p", { class: "help" }, warning.help))));
  if (!warned.length && runs.some((run) => run.done)) node.push(el("p", { class: "soft small" }, "No warnings: no check of the metrics found a problem."));
  return node;
}

// ---- comparison

function comparison() {
  const { comparison: found, runs } = payload;
  if (!found) return null;
  const node = [], byRun = ({ heads, rows }, numeric) => table(["method", ...heads], rows.map((row, i) => [nameOf(runs[i], i), ...row]), { numeric, kind: "stacked methods" });
  node.push(byRun(found.measured, d3.range(1, found.measured.heads.length + 1)));
  node.push(el("p", { class: "soft small" }, "Memory and compute are for each run alone, without the stages before it. ±: standard error."), byRun(found.about, []));
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
    `Held-out ${reward}, against KL to the starting model in nats per completion. Each dot is an evaluation; a line connects the evaluations of a run in order.`,
    errors && "Bars: ± two standard errors.",
  ], 380, (width) => {
    const named = width > 420, right = named ? roomFor(trails.map((line) => line.label), width, BOLD) : 18;
    const svg = Plot.plot({
      ...plain, width, height: 380, marginTop: 12, marginLeft: 40, marginRight: right, marginBottom: 42, ariaLabel: "Held-out reward vs. KL, by run",
      x: { ...axis, label: "KL to the starting model, nats per completion", labelAnchor: "center", grid: true, nice: true, zero: true, domain: around(dots, "kl"), ticks: Math.floor(width / 90) },
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

// Names beside points, each moved up or down so that it touches no other name and no point.
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

// Learned vs. true reward: two charts over the same steps, and a sentence on what they show.
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
    return el("p", {}, el("b", { dir: "auto" }, show(run.name)), ` turns at step ${number(step)}: its ${show(run.true.name)} reward peaked there (${number(peak)}) and has since fallen by ${number(fall)}, while the learned reward rose by another ${number(rise)}. From then on, it satisfies the reward model, but not the judge.`);
  });
  const known = steady.filter((run) => run.true.turn), few = steady.filter((run) => !run.true.turn);
  if (known.length) words.push(el("p", {}, turned.length || few.length ? `No such turn was seen in ${list(known.map((run) => show(run.name)))}.` : `No turn was seen: the ${show(list(names))} reward never falls by more than its noise while the learned reward rises by more than its own.`));
  if (few.length) words.push(el("p", {}, `Too few points to see a turn: ${list(few.map((run) => show(run.name)))}.`));
  const measured = known.map((run) => {
    const { fall, fall_noise, rise, rise_noise } = run.true.turn;
    return `${show(run.name)} fell by ${number(fall, 2)} (noise ${number(fall_noise, 2)})${fall > fall_noise ? ` while the learned reward rose by ${number(rise, 2)} (noise ${number(rise_noise, 2)})` : ""}`;
  });
  if (known.length) words.push(el("p", { class: "soft small" }, `From its peak to the end: ${measured.join("; ")}. Values are means over a tenth of the points; noise is six standard errors of such a mean, four for the learned reward.`));
  return [
    el("h3", {}, "Learned vs. true reward"),
    el("p", { class: "soft" }, `Methods that sample are trained on the learned reward; the ${show(list(names))} reward is only recorded. Where the learned reward keeps rising while the ${show(list(names))} reward falls, the learned reward is over-optimized.`),
    words,
    el("div", { class: "charts" },
      lineChart({ title: "Learned reward", unit: "Mean over completions", lines: lines("learned"), marks }),
      lineChart({ title: `True reward: ${show(list(names))}`, unit: "Mean over completions", notes: [turned.length > 0 && "Diamond and dotted line: the turning point."], lines: lines("true"), marks: [...marks, ...peaks] })),
  ];
}

// ---- what was run

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
      rest.length > 0 && fold(`rest ${run.name}`, `${count(rest.length, "option")} left at default`, table([], rest.map(option), { kind: "options" })),
      about.data && [el("h4", {}, "Data"), table([], Object.entries(about.data).map(([name, n]) => [show(name), number(n)]), { numeric: [1] })],
      run.example && (run.example.completions.length ? [el("h4", {}, "One example"), el("p", { class: "soft small" }, "Highlighted: what is trained on."), example(run.example)] : [el("h4", {}, "One prompt"), example(run.example)]),
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
