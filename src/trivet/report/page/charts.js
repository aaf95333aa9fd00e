// Line charts: figures that follow the width of the page, axes, names beside lines, and the points of a metric.

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

// Room for names beside a chart of this width, in pixels per letter; longer names are shortened.
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
    per.length > 0 && `Each point is the mean of ${list(per.map(String))} steps; the band spans their minimum and maximum.`,
    ...notes,
  ], height, draw, held);
}
// A domain around a single value, where there is no range to take it from; undefined for several values.
function around(points, key) {
  const [low, high] = d3.extent(points.flatMap((p) => [p[key], p.low, p.high].filter((v) => typeof v === "number")));
  return low !== high ? undefined : low === 0 ? [0, 1] : [low - Math.abs(low) / 2, low + Math.abs(low) / 2];
}
// Ticks at whole steps only.
function stepTicks(lines, width) {
  const [first, last] = d3.extent(lines.flatMap((line) => [...line.points, ...(line.held ?? [])]), (p) => p.x), most = Math.max(3, Math.floor(width / 90));
  return last - first <= most ? d3.range(first, last + 1) : most;
}

// Numbers on the y axis: small ones all with an exponent, large ones all with an SI letter.
function ticks(lines) {
  const most = d3.max(lines.flatMap((line) => [...line.points, ...(line.held ?? [])]), (p) => Math.abs(p.y ?? 0));
  if (most < 0.005) return (value) => (value ? d3.format(".1~e")(value).replace("−", "-") : "0");
  return most >= 10000 ? d3.format("~s") : String;
}

function points(table, name) {
  const series = table.series[name];
  return series ? table.steps.map((x, i) => ({ x, y: series.mean[i], low: series.low?.[i], high: series.high?.[i] })) : [];
}
