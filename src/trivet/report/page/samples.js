// Sampled completions: the answers of several runs to one prompt, and those of one run step by step.

// The words of the second text, and which of them are not in the longest common subsequence with the first.
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

// Prompts that several runs answered: those of the judge where there are any, otherwise those that several runs recorded.
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
      el("p", { class: "soft" }, `The same prompt, answered by each run. Highlighted words differ from the answer of ${show(first.name)}.`),
      el("div", { class: "controls" },
        select("prompt", `prompt (of ${shared.length})`, shared.map(([text], i) => [i, `${i + 1}: ${text.slice(0, 70)}${text.length > 70 ? "…" : ""}`]), at, (i) => { chosen.prompt = shared[i][0]; again(); }),
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
    steps.length < of && el("p", { class: "soft small" }, `${count(steps.length, "step")} of the ${number(of)} recorded steps are on this page, evenly spaced, including the first and the last.`),
    body);
}
