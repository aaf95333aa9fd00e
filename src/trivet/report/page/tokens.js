// The token view: every token of a completion colored by one of its values, and the margins of pairs.

const QUANTITIES = [
  ["gradient", "gradient weight", "−dL/dlog π: how hard this step pushes the token up (blue) or down (orange).", "signed", "gradient"],
  ["implicit_reward", "implicit reward", "β log π/π_ref of the token; its sum over a completion is the reward that preferences compare.", "signed", "implicit reward"],
  ["advantage", "advantage", "How much better than expected the token was; above 0, it is made more likely.", "signed", "advantage"],
  ["kl", "KL contribution", "log π/π_ref of the token; its sum over a completion is the KL to the reference.", "signed", "KL"],
  ["logprob", "log π, policy", "Log-probability of the token under the policy, in nats; darker is more surprising.", "surprise", "log π"],
  ["ref_logprob", "log π, reference", "Log-probability of the token under the reference, in nats; darker is more surprising.", "surprise", "log π_ref"],
  ["sampler_logprob", "log π, sampler", "Log-probability with which the token was sampled, in nats; darker is more surprising.", "surprise", "log π sampler"],
  ["ratio", "ratio π/π_old", "How much more likely the token is now than when it was sampled: 1 is no change, blue is more likely, orange less.", "ratio", "ratio"],
  ["value", "value", "The return that the critic predicts from here on.", "range", "value"],
  ["return", "return", "GAE's estimate of the reward from here to the end: the critic's target.", "range", "return"],
  ["token_reward", "token reward", "Reward at this token: minus the KL penalty, and plus the score at the last token.", "signed", "token reward"],
];
const UP = "0 114 178", DOWN = "213 94 0", STRONG = "204 121 167";
const ink = (rgb, part) => `rgb(${rgb} / ${(0.82 * Math.min(1, Math.max(0, part))).toFixed(3)})`;

// A color for each of the values shown, and the two ends of the legend.
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
  const cut = steps.length < kept.of && el("p", { class: "soft small" }, `${count(steps.length, "step")} of the ${number(kept.of)} recorded steps with tokens are on this page, evenly spaced, including the first and the last.`);
  return [controls, cut, body];
}

// One step: its controls, and what they show.
function oneStep(run, kept, draw) {
  const { samples: all } = kept.steps.find((each) => each.step === chosen.tokenStep) ?? kept.steps.at(-1);
  const samples = all.filter((sample) => sample.tokens || run.method === "reward-model");
  const groups = Object.values(Object.groupBy(samples, (sample) => `${sample.set ?? ""}/${sample.group ?? 0}`));
  const at = Math.min(chosen.tokenGroup ?? 0, groups.length - 1), group = groups[at];
  if (!group) return [[], el("p", { class: "soft" }, "The completions of this step are too long for this page.")];
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
    untrained && el("span", { class: "key" }, el("span", { class: "token untrained" }, "gray"), " no value: not trained on"),
    clipped && el("span", { class: "key" }, el("span", { class: "token clipped" }, "dashed"), " ratio clipped: no gradient"));
  const panel = el("aside", { id: "token-numbers", "aria-live": "polite" }, el("p", { class: "soft" }, "Point at a token, or use the arrow keys, to see all its values."));
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
    el("footer", {}, [sum && `sum of ${label}: ${number(total(sample, name), 4)}`, ending(sample), sample.more_tokens && `${number(sample.more_tokens)} more tokens`].filter(Boolean).join(" · ")));
}

function margin(group) {
  const [chosenSide, rejected] = ["chosen", "rejected"].map((side) => group.find((sample) => sample.side === side));
  if (!chosenSide || !rejected) return null;
  const of = (sample) => sample.reward ?? total(sample, "implicit_reward"), gap = of(chosenSide) - of(rejected);
  return el("p", {}, "Margin, chosen minus rejected: ", el("b", { id: "margin" }, number(gap, 4)), gap > 0 ? ". The pair is ranked as labeled." : ". The pair is not yet ranked as labeled.");
}

function scoredPair(group) {
  return [el("div", { class: "pair" }, group.map((sample) => el("article", { class: "card" }, el("header", {}, el("b", {}, sample.side ?? "completion"), rewards(sample)), said(sample.completion)))), margin(group)];
}

// Pairwise GRPO: the margin of every pair that the reward ranks.
function rankedPairs(run, group) {
  if (run.method !== "pairwise-grpo" || !group.every((sample) => sample.implicit_reward)) return null;
  const sums = group.map((sample) => total(sample, "implicit_reward"));
  const margins = group.flatMap((a, i) => group.map((b, j) => (a.reward > b.reward ? sums[i] - sums[j] : null)));
  if (margins.every((m) => m === null)) return el("p", { class: "soft" }, "All rewards are equal, so this group has no ranked pairs.");
  const scale = scaleOf("signed", margins);
  const rows = group.map((a, i) => el("tr", {}, el("th", { scope: "row" }, `${i + 1} (${number(a.reward)})`), group.map((b, j) => {
    const m = margins[i * group.length + j], cell = el("td", {}, m === null ? "" : `${m > 0 ? "✓" : "✗"} ${number(m)}`);
    if (m !== null) cell.style.background = scale.color(m);
    return cell;
  })));
  return el("div", {}, el("h4", {}, "Ranked pairs in this group"),
    el("p", { class: "soft small" }, "For each pair whose row has the higher reward: the implicit reward of the row minus that of the column. ✓: the policy ranks the pair as the reward does."),
    el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "ranked pairs" }, el("table", { class: "matrix" }, el("thead", {}, el("tr", {}, el("td", {}), group.map((b, j) => el("th", { scope: "col" }, `${j + 1} (${number(b.reward)})`)))), el("tbody", {}, rows))));
}
