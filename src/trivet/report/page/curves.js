// The curves of the three legs, generation, reward and optimization: which metric is drawn where, and under which title.

const has = (run, name) => name in run.metrics.series || `eval/${name}` in run.heldout.series;

// One line per run, or per name and run where there are several names.
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

// The charts of each leg: title, unit, metrics. each: one chart per method, since their values are not comparable.
const CHARTS = {
  generation: [
    { title: "Completion length", unit: "Tokens, including the end token", names: ["completions/mean_length"] },
    { title: "Truncated completions", unit: "Share of completions that reached the length limit", names: ["completions/clipped_ratio"], percent: true, zero: true },
    { title: "Policy entropy", unit: "Nats per token; near 0, all samples are the same", names: ["entropy"], zero: true },
    { title: "Sampler vs. learner, mean", unit: "Difference in log-probability of the same tokens, nats", names: ["sampling/logprob_difference/mean"], zero: true },
    { title: "Sampler vs. learner, maximum", unit: "Largest difference in the step, nats", names: ["sampling/logprob_difference/max"], zero: true },
    { title: "Useful groups after resampling", unit: "Share of groups whose rewards differ", names: ["dynamic_sampling/useful"], percent: true, zero: true },
  ],
  reward: [
    { title: "Reward", unit: "Weighted sum of all rewards, mean over completions", names: ["reward"], band: "reward_std" },
    { title: "Reward minus KL penalty", unit: "Per completion", names: ["objective/rlhf_reward"] },
    { title: "Groups with equal rewards", unit: "Share of groups; they give no learning signal in grpo and pairwise-grpo", names: ["frac_reward_zero_std"], percent: true, zero: true },
    { title: "Unscored completions", unit: "Rewards that returned None", names: ["rewards/unscored"], zero: true },
    { title: "Preference accuracy", unit: "Share of pairs whose chosen side has the higher implicit reward; at the first step all are tied, which counts as 0", names: ["rewards/accuracies"], percent: true },
    { title: "Preference margin", unit: "Implicit reward of the chosen side minus that of the rejected side", names: ["rewards/margins"] },
    { title: "Implicit rewards", unit: "β log π/π_ref, summed over tokens", names: ["rewards/chosen", "rewards/rejected"], labels: ["chosen", "rejected"] },
    { title: "Reward model accuracy", unit: "Share of pairs whose chosen side scores higher; an untrained head scores all alike, which counts as 0", names: ["accuracy"], percent: true },
    { title: "Score margin", unit: "Score of the chosen side minus that of the rejected side", names: ["margin"] },
    { title: "Mean score", unit: "Over chosen and rejected sides", names: ["mean_reward"] },
  ],
  optimization: [
    { title: "Loss", names: ["loss"], each: { sft: "Mean over tokens of −log π, nats", "reward-model": "Mean over pairs of −log σ(score margin)", dpo: "Mean over pairs of −log σ(reward margin)" } },
    { title: "KL to the reference", unit: "Nats per completion", names: ["kl"] },
    { title: "Tokens whose ratio is clipped", unit: "Share of tokens; a clipped token has no gradient", names: ["clip_ratio"], percent: true, zero: true },
    { title: "Gradient norm", unit: "Before clipping", names: ["grad_norm"], zero: true },
    { title: "Learning rate", unit: "AdamW", names: ["lr"], zero: true },
    { title: "Explained variance of the critic", unit: "Share of the variance of the returns; 0 is no better than a constant", names: ["value/explained_variance"] },
    { title: "Gradient norm of the critic", unit: "Before clipping", names: ["value/grad_norm"], zero: true },
    { title: "Ranked pairs", unit: "Pairs per step", names: ["pairs"], zero: true },
    { title: "KL coefficient", unit: "β in each step", names: ["objective/kl_coef"] },
    { title: "Supervised loss term", unit: "−log π of the chosen side, nats per token", names: ["nll_loss"] },
    { title: "Log-probabilities", unit: "log π summed over tokens, nats", names: ["logps/chosen", "logps/rejected"], labels: ["chosen", "rejected"] },
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

// ---- the legs

const SAMPLES_NOTHING = ["sft", "reward-model", "dpo"];
const samplers = () => payload.runs.filter((run) => !SAMPLES_NOTHING.includes(run.method));

function without() {
  const methods = unique(payload.runs.map((run) => run.method)).filter((method) => SAMPLES_NOTHING.includes(method));
  const several = methods.length > 1, from = methods.every((method) => method === "sft") ? "answers" : methods.includes("sft") ? "answers and pairs" : "pairs";
  return methods.length > 0 && el("p", { class: "soft" }, `${list(methods)} ${several ? "sample" : "samples"} nothing: ${several ? "they learn" : "it learns"} from the ${from} in the data.`);
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
    .map((name) => ({ title: `Reward: ${show(name.slice(8, -5))}`, unit: "Mean over completions, before weighting", names: [name] }));
  const made = charts([CHARTS.reward[0], ...parts, ...CHARTS.reward.slice(1)]);
  const runs = payload.runs.filter((run) => run.method !== "sft");
  const none = payload.runs.some((run) => run.method === "sft") && el("p", { class: "soft" }, "sft has no reward: it imitates the chosen answers.");
  return [none, legend(runs, made), grid(made), payload.runs.length === 1 && optimism()];
}

function optimization() {
  const rest = unique(payload.runs.flatMap((run) => [...Object.keys(run.metrics.series), ...Object.keys(run.heldout.series).map((name) => name.replace(/^eval\//, ""))]))
    .filter((name) => !NAMED.has(name) && !/^rewards\/.+\/mean$/.test(name) && !name.startsWith("eval/"));
  const others = charts(rest.map((name) => ({ title: show(name), unit: "As logged", names: [name] })));
  const made = charts(CHARTS.optimization);
  return [legend(payload.runs, made), grid(made), others.length > 0 && fold("others", `All other metrics (${others.length})`, grid(others))];
}
