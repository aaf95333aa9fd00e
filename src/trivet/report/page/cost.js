// Time and memory as stacked bars, and tokens per second.

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
  return el("div", {}, chart, key, fold(title, "as a table", table(["run", ...names.map(show), "total"], tableRows, { numeric: names.map((_, i) => i + 1).concat(names.length + 1) })));
}

function cost() {
  const { runs } = payload;
  const short3 = (v) => number(v, 3);
  const made = [
    bars("Where the time goes", ["Total seconds over all steps, by stage."], "seconds", short3, runs.map((run) => ({ run, parts: run.time }))),
    bars("What fills the memory", ["At peak, by component. Program: Python and its libraries, before the model is loaded."], "MiB", (v) => number(v, 3), runs.map((run) => ({ run, parts: Object.fromEntries(Object.entries(run.memory).map(([name, n]) => [name, n / 2 ** 20])) }))),
  ].filter(Boolean);
  const lines = runs.map((run, i) => ({ label: run.name, color: color(i), dash: runs.length > 1 ? DASHES[i % 8] : "", points: points(run.speed, "tokens"), per: run.speed.per }));
  const speed = lineChart({ title: "Tokens per second", unit: "Sampled plus trained", notes: [runs.some((run) => run.time.evaluation) && "Evaluation time excluded."], lines, zero: true });
  if (!made.length && !speed) return null;
  return [el("div", { class: "charts" }, made, speed)];
}
