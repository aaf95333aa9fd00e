// The page as a whole: its sections in order, trivet.render, the contents, the theme, and new data while a run goes on.

// ---- the page

const question = (title, asked) => el("h2", {}, title, el("span", { class: "question" }, asked));
const SECTIONS = [
  ["overview", "Overview", () => null, header],
  ["comparison", "Comparison", () => question("Comparison", "What does each method gain, and at what cost?"), comparison],
  ["generation", "Generation", () => question("Generation", "What does the policy say?"), generation],
  ["reward", "Reward", () => question("Reward", "What is good?"), reward],
  ["optimization", "Optimization", () => question("Optimization", "How does it change?"), optimization],
  ["tokens", "Token view", () => question("Token view", "Each token of a completion, colored by the value you choose."), tokens, () => withTokens().map((run) => [run.name, tokenSteps(run)])],
  ["cost", "Cost", () => question("Cost", "Time and memory."), cost],
  ["what", "What was run", () => question("What was run", "Options, data, machine."), what, () => payload.runs.map((run) => [run.name, run.options, run.about, run.example, run.peak_memory])],
];

// A section that fails says so, and the others are still drawn.
function attempt(build) {
  try {
    return build();
  } catch (error) {
    console.error(error);
    return [el("p", {}, `This section could not be drawn: ${show(error.message)}`)];
  }
}

const built = {}; // sections by name; on a live page, a section whose data did not change is kept

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
  sections.push(el("footer", { id: "made", class: "soft small" }, `Created ${new Date(payload.made * 1000).toLocaleString("en-US", { dateStyle: "long", timeStyle: "short" })} by trivet report. This file works offline.`));
  let before = null;
  for (const section of sections) { // a kept section is not touched: it may hold the focus
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

// The contents mark the section that is being read.
let seen = null, mark = () => {};
function follow(sections) {
  seen?.disconnect();
  let marked = null;
  const inView = new Set(), last = sections.findLast((section) => section.tagName === "SECTION");
  mark = () => {
    const end = window.scrollY > 0 && window.scrollY + window.innerHeight >= root.scrollHeight - 2; // the last section cannot scroll any higher
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
  const text = { live: run ? `live · ${show(run.name)} · step ${stepsOf(run)}${run.left ? ` · ${duration(run.left)} left` : ""}` : "", ended: "run ended", lost: "connection lost, retrying" }[state];
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
