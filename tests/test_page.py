"""The report page, opened from disk in a browser: it draws, it is honest, nothing in the data can run or break it."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runs import LIVING, METHODS, TOKEN_ARRAYS, write_quickstart, write_run
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.report.gather import POINTS, gather, thin, turning_point
from trivet.report.page import SCRIPTS, as_json, build_page
from trivet.step.option_texts import file_of, options_of

CHROMIUM = shutil.which("chromium")
HOSTILE = [
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 2</script><!--",
    '<img src="https://example.com/x.png" onerror="window.ran = 3">',
    "emoji 👩🏽‍🚀 and \ud800 half of one",
    "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202e the rest",
    "a\x00b\x07c\x1b[31m\u2028\u2029",
    "x" * 100_000,
    "{{data}} ${window.ran = 4} &amp; &lt;",
]


@pytest.fixture(scope="module")
def browser():
    """One browser for the module."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page of these runs from disk; at the end nothing may have been asked of a network or complained of."""
    troubles, asked, tabs = [], [], []

    def show(runs: list[Path], width: int = 1200, **options):
        file = tmp_path / "page.html"
        file.write_text(build_page(gather(runs, **options)), encoding="utf-8")
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.set_default_timeout(60_000)
        tabs.append(tab)
        tab.on("console", lambda message: troubles.append(message.text))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(file.as_uri())
        until(tab, "document.documentElement.dataset.ready")
        return tab

    yield show
    for tab in tabs:
        assert tab.evaluate("window.ran") is None
        tab.close()
    assert troubles == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> list[Path]:
    """A quickstart's six runs."""
    return write_quickstart(tmp_path_factory.mktemp("quickstart"), steps=20)


def recorded(run: Path) -> list[dict]:
    """The lines of samples.jsonl."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def until(tab, condition: str, seconds: float = 60) -> None:
    """Wait for it; the page's policy forbids what playwright's own wait_for_function does."""
    for _ in range(int(20 * seconds)):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(f"never: {condition}")


EMPTY_CHARTS = """[...document.querySelectorAll(".plot")].filter(plot => plot.clientWidth &&
    !plot.querySelector("svg [aria-label=line] path, svg [aria-label=dot] *, svg [aria-label=bar] rect"))
    .map(plot => plot.closest("figure").querySelector("h4").textContent)"""
TITLES = '[...document.querySelectorAll("figure h4")].map(title => title.textContent)'


def test_six_runs_side_by_side(show, six):
    tab = show(six)
    assert tab.evaluate(EMPTY_CHARTS) == []
    titles = tab.evaluate(TITLES)
    assert {
        "What the reward costs in KL",
        "Learned reward",
        "True reward: gold",
        "KL to the reference",
    } <= set(titles)
    assert {
        "Loss: sft",
        "Loss: dpo",
        "Loss: reward-model",
        "Where the time goes",
        "What fills the memory",
    } <= set(titles)
    assert [
        tab.locator(f"#{part} h2").count()
        for part in ("generation", "reward", "optimization", "tokens", "cost", "what")
    ] == [1] * 6
    rows = tab.locator("#comparison table").first.locator("tbody tr")
    assert [row.split("\t")[0].strip() for row in rows.all_inner_texts()] == list(METHODS)
    assert "gold reward" in tab.locator("#comparison thead").nth(0).inner_text()
    assert "best for" in tab.locator("#comparison thead").nth(1).inner_text()
    tab.set_viewport_size({"width": 1280, "height": 800})
    for table in (0, 1):  # on a laptop's screen without scrolling
        box = tab.locator("#comparison .scroll").nth(table)
        assert box.evaluate("node => node.scrollWidth <= node.clientWidth")
    text = tab.locator("#comparison").inner_text()
    assert re.search(r"ppo turns at step (9|10|11|12)\b", text)
    assert "No such turn was seen in dpo, grpo and pairwise-grpo." in text
    assert "sft, reward-model and dpo sample nothing" in tab.locator("#generation").inner_text()
    assert tab.locator("#generation .cards").first.locator("mark").count() > 5
    dashes = tab.evaluate(
        '[...document.querySelectorAll("#reward .legend line")].map(line => line.getAttribute("stroke-dasharray"))'
    )
    assert len(set(dashes)) == len(dashes) > 3  # never by color alone
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("method", METHODS)
def test_each_method_alone_and_narrow(show, six, method):
    tab = show([six[METHODS.index(method)]], width=400)
    assert tab.evaluate(EMPTY_CHARTS) == []
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.locator("#comparison").count() == 0
    nothing = method in ("sft", "dpo", "reward-model")
    assert ("samples nothing" in tab.locator("#generation").inner_text()) == nothing
    assert (tab.locator("#token-numbers").count() == 1) == (method != "reward-model")
    if method in ("dpo", "reward-model"):
        chosen, rejected = recorded(six[METHODS.index(method)])[-2:]
        assert tab.locator("#margin").inner_text() == f"{chosen['reward'] - rejected['reward']:.4g}"
    assert (tab.locator("table.matrix").count() == 1) == (method == "pairwise-grpo")


@pytest.mark.parametrize("method", TOKEN_ARRAYS)
def test_the_token_view_shows_the_numbers_that_were_recorded(show, six, method):
    run = six[METHODS.index(method)]
    last = [line for line in recorded(run) if line["step"] == 20 and "tokens" in line]
    tab = show([run])
    boxes = tab.locator(".tokens")
    assert boxes.count() == sum(line["group"] == 0 for line in last)
    assert boxes.first.locator(".token").all_inner_texts() == last[0]["tokens"]
    seen = set()
    for name in (name for name in TOKEN_ARRAYS[method] if name != "clipped"):
        tab.locator("#quantity").select_option(name)
        colors = boxes.first.evaluate(
            "box => [...box.querySelectorAll('.token')].map(token => token.style.background)"
        )
        assert [color == "" for color in colors] == [value is None for value in last[0][name]]
        seen.add(str(colors))
        assert tab.locator(".tokens").first.locator(".untrained").count() == last[0][name].count(
            None
        )
        tab.locator(".tokens").first.locator(".token").nth(1).hover()
        shown = tab.evaluate(
            "Object.fromEntries([...document.querySelectorAll('#token-numbers tr')].map(row => [row.dataset.quantity, row.lastChild.textContent]))"
        )
        assert {key: float(value) for key, value in shown.items()} == pytest.approx(
            {key: last[0][key][1] for key in TOKEN_ARRAYS[method] if key != "clipped"}, rel=1e-3
        )
    assert len(seen) >= max(2, len(TOKEN_ARRAYS[method]) - 2)  # another quantity, other colors
    if "clipped" in last[0]:
        assert boxes.first.locator(".clipped").count() == last[0]["clipped"].count(True)


def test_tokens_by_keyboard_and_the_readers_choices_survive_new_data(show, six):
    tab = show([six[METHODS.index("grpo")]])
    tab.locator("#quantity").select_option("ratio")
    tab.locator("#token-step").evaluate(
        "slider => { slider.value = 1; slider.dispatchEvent(new Event('input')); }"
    )
    assert tab.evaluate("document.activeElement.id || document.body.tagName") == "BODY"
    tab.locator(".tokens .token").first.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator('[aria-selected="true"]').get_attribute("data-t") == "1"
    assert "token 2 of" in tab.locator("#token-numbers").inner_text()
    tab.evaluate("window.scrollTo(0, 700)")
    tab.evaluate("window.trivet.render(JSON.parse(document.getElementById('data').textContent))")
    until(tab, "document.documentElement.dataset.ready === '2'")
    assert tab.locator("#quantity").input_value() == "ratio"
    assert tab.locator("#token-step").input_value() == "1"
    assert tab.evaluate("scrollY") == pytest.approx(700, abs=2)


def test_a_slider_can_be_dragged_and_what_did_not_change_stays(show, six, browser):
    tab = show([six[METHODS.index("ppo")]])
    tab.evaluate("window.slider = document.getElementById('token-step')")
    for value in (0, 2, 1):
        tab.evaluate(f"slider.value = {value}; slider.dispatchEvent(new Event('input'))")
        assert tab.evaluate("slider.isConnected")
    last = [
        line
        for line in recorded(six[METHODS.index("ppo")])
        if line["step"] == 5 and "tokens" in line
    ]
    assert tab.locator(".tokens").first.locator(".token").all_inner_texts() == last[0]["tokens"]
    tab.locator("#token-step-later").click()
    assert "".join(tab.locator(".tokens").first.locator(".token").all_inner_texts()) != "".join(
        last[0]["tokens"]
    )


def test_scripts_that_are_not_the_pages_own_do_not_run(browser, six, tmp_path):
    """Were something to slip into the page, its policy would stop it."""
    page = build_page(gather([six[0]]))
    for slipped in ("<script>window.ran = 1</script>", "<img src=x onerror='window.ran = 2'>"):
        file = tmp_path / "page.html"
        file.write_text(page.replace("</main>", f"</main>{slipped}"), encoding="utf-8")
        tab = browser.new_page()
        tab.goto(file.as_uri())
        until(tab, "document.documentElement.dataset.ready")
        assert tab.evaluate("window.ran") is None
        assert (
            tab.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'stopped')")
            == "stopped"
        )
        tab.close()


def test_an_advantage_of_the_whole_completion_is_that_of_each_token(tmp_path):
    run = write_run(tmp_path / "grpo", "grpo", 1)
    lines = recorded(run)
    lines[0]["advantage"] = -0.12345678
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = gather([run])["runs"][0]["samples"]["tokens"]["steps"][0]["samples"][0]
    assert sample["advantage"] == [-0.1235] * len(sample["tokens"])


def test_runs_named_alike_are_told_apart(six, tmp_path):
    twin = write_run(tmp_path / "other" / "grpo", "grpo", 3)
    runs = gather([six[4], twin])["runs"]
    assert [run["name"] for run in runs] == [
        f"{six[4].parent.name}/grpo (grpo)",
        "other/grpo (grpo)",
    ]
    assert runs[0]["color"] != runs[1]["color"]


def test_hostile_text_neither_runs_nor_breaks_the_page(show, tmp_path):
    runs = [
        write_run(
            tmp_path / f"<b>{method}",
            method,
            3,
            keep_every=1,
            texts=HOSTILE,
            prompts=HOSTILE,
            options={"data": HOSTILE[0]},
        )
        for method in ("grpo", "dpo", "ppo")
    ]
    for shown in (runs, runs[:1]):
        tab = show(shown)
        assert tab.evaluate(EMPTY_CHARTS) == []
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.locator("script").count() == 4
        assert tab.locator("main img, main b b").count() == 0
    # half of a pair of surrogates is no character; the browser shows one that says so
    tab = show(runs[:1])
    for step in range(3):
        tab.locator("#sample-step").evaluate(
            f"slider => {{ slider.value = {step}; slider.dispatchEvent(new Event('input')); }}"
        )
        tab.locator("#token-step").evaluate(
            f"slider => {{ slider.value = {step}; slider.dispatchEvent(new Event('input')); }}"
        )
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    text = "".join(tab.locator("#generation .said").all_inner_texts())
    assert "</script><script>window.ran = 2" in text


def test_control_characters_are_seen_and_long_lines_cut(show, tmp_path):
    run = write_run(
        tmp_path / "grpo", "grpo", 1, texts=HOSTILE[5:7], prompts=["\x00 \u05e9\u05dc\u05d5\u05dd"]
    )
    tab = show([run])
    text = "".join(tab.locator("#generation .said").all_inner_texts())
    assert "a␀b␇c␛[31m" in text
    assert "␀ \u05e9" in text
    assert "… 95,000 more characters" in text
    assert tab.locator(".tokens .token").count() < 10_000


def test_old_runs_and_broken_ones(show, tmp_path):
    old = write_run(tmp_path / "old", "ppo", run_json=False)
    going = write_run(tmp_path / "going", "grpo", 12, planned=40, done=False, pid=LIVING)
    killed = write_run(tmp_path / "killed", "dpo", 7, planned=40, done=False)
    waiting = write_run(tmp_path / "waiting", "sft", 0, planned=40, done=False, pid=LIVING)
    for name in ("metrics", "samples"):
        path = going / f"{name}.jsonl"
        path.write_bytes(path.read_bytes()[:-30])  # half a line
    (killed / "samples.jsonl").unlink()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "seconds": 5.0, "loss": null, "grad_norm": NaN}\n[1]\n')
    os.utime(killed / "metrics.jsonl", (0, 0))  # its last line did not come just now
    payload = gather([old, going, killed, waiting])
    assert [run["status"] for run in payload["runs"]] == ["done", "running", "stopped", "running"]
    assert [run["done"] for run in payload["runs"]] == [20, 11, 8, 0]
    assert payload["runs"][1]["left"] == pytest.approx(29 * 0.6)
    assert payload["runs"][0]["method"] == "ppo"
    assert payload["runs"][0]["true"]["name"] == "gold"
    tab = show([old, going, killed, waiting])
    assert tab.evaluate(EMPTY_CHARTS) == []
    assert "11 of 40" in tab.locator("#overview").inner_text()
    tab = show([waiting])
    assert "No step has finished yet" in tab.locator("#overview").inner_text()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="empty is not a run directory"):
        gather([empty])


@pytest.mark.slow
def test_ten_thousand_steps_are_shortened_and_say_so(show, tmp_path):
    run = write_run(tmp_path / "long", "grpo", 10_000, keep_every=10, eval_every=100)
    payload = gather([run], token_bytes=1_000_000)
    series = payload["runs"][0]["metrics"]["series"]["kl"]
    assert len(series["mean"]) <= POINTS
    assert len(series["low"]) == len(series["mean"])
    kept = payload["runs"][0]["samples"]["tokens"]
    assert (kept["of"], kept["steps"][0]["step"], kept["steps"][-1]["step"]) == (1001, 1, 10_000)
    assert 500_000 < len(json.dumps(kept["steps"])) <= 1_000_000
    gaps = [b["step"] - a["step"] for a, b in zip(kept["steps"], kept["steps"][1:], strict=False)]
    assert max(gaps[1:]) - min(gaps[1:]) <= 10  # evenly, of steps ten apart
    page = build_page(payload)
    assert len(page.encode()) < 3_500_000
    tab = show([run], token_bytes=1_000_000)
    assert (
        f"{len(kept['steps'])} steps of the 1,001 recorded steps with tokens"
        in tab.locator("#tokens").inner_text()
    )
    assert "Each point is the mean of 17 steps" in tab.locator("#optimization").inner_text()
    assert tab.evaluate(EMPTY_CHARTS) == []
    assert tab.evaluate("document.querySelectorAll('*').length") < 6000


def test_bucket_means_are_means():
    lines = [
        {"step": step, "x": float(step), "y": None if step % 2 else 1.0}
        for step in range(1, 2 * POINTS + 1)
    ]
    found = thin(lines)
    assert found["per"] == 2
    assert found["series"]["x"]["mean"][:2] == [1.5, 3.5]
    assert (found["series"]["x"]["low"][1], found["series"]["x"]["high"][1]) == (3.0, 4.0)
    assert set(found["series"]["y"]["mean"]) == {1.0}
    assert thin(lines[:POINTS])["per"] == 1
    assert thin([])["steps"] == []


def test_turning_point():
    import random

    noise = random.Random(0)
    steps = list(range(100))
    learned = [step / 25 + noise.gauss(0, 0.1) for step in steps]
    turns = [4 - ((step - 60) / 30) ** 2 + noise.gauss(0, 0.1) for step in steps]
    found = turning_point(steps, turns, learned)
    assert found["turns"]
    assert abs(found["step"] - 60) <= 8
    assert found["fall"] == pytest.approx(1.5, abs=0.3)
    rising = [step / 50 + noise.gauss(0, 0.1) for step in steps]
    flat = [noise.gauss(0, 0.1) for _ in steps]
    assert not turning_point(steps, rising, learned)["turns"]
    assert not turning_point(steps, flat, learned)["turns"]
    assert not turning_point(steps, turns, flat)[
        "turns"
    ]  # the learned one does not rise: nothing is over-optimized
    assert turning_point([1, 2, 3], [1, 2, 0], [1, 2, 3]) is None
    few = [0, 5, 10, 15, 20, 25], [1, 2, 2.9, 2.6, 2.2, 1.7], [0, 1, 2, 3, 4, 5]
    seen, unsure = turning_point(*few, 0.1), turning_point(*few, 0.3)
    assert (seen["turns"], seen["step"], unsure["turns"]) == (True, 10, False)
    assert unsure["fall"] == pytest.approx(1.2)
    assert unsure["fall_noise"] == pytest.approx(1.8)  # six standard errors


def test_runs_of_other_lengths_have_whole_names_that_lead_to_their_lines(show, tmp_path):
    runs = [
        write_run(tmp_path / name, method, steps)
        for name, method, steps in (("k", "grpo", 16), ("pw", "pairwise-grpo", 3))
    ]
    tab = show(runs)
    ends = tab.locator("#optimization figure", has=tab.get_by_text("KL to the reference")).locator(
        "[aria-label='line ends']"
    )
    assert sorted(ends.locator("text").all_text_contents()) == ["k (grpo)", "pw (pairwise-grpo)"]
    assert ends.locator("path").count() >= 1
    assert tab.evaluate("""[...document.querySelectorAll("[aria-label='line ends'] text")].every((name) =>
        name.getBoundingClientRect().right <= name.closest(".plot").getBoundingClientRect().right + 1)""")
    tab.evaluate("scrollTo({ top: document.body.scrollHeight, behavior: 'instant' })")
    until(
        tab, "document.querySelector('#contents [aria-current]')?.getAttribute('href') === '#what'"
    )
    tab.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
    until(
        tab,
        "document.querySelector('#contents [aria-current]')?.getAttribute('href') === '#overview'",
    )


def test_names_that_are_cut_are_still_told_apart(show, tmp_path):
    name = "a-run-of-many-words-with-beta-0.05-and-lr-1e-5"
    tab = show([write_run(tmp_path / f"{name}-seed-{seed}", "grpo", 5) for seed in (0, 1)])
    labels = (
        tab.locator("#optimization [aria-label='line ends']")
        .first.locator("text")
        .all_text_contents()
    )
    assert len(set(labels)) == 2
    assert all("…" in label for label in labels)


def test_what_is_of_one_value_has_an_axis_all_the_same(show, tmp_path):
    runs = [write_run(tmp_path / method, method, 1) for method in ("sft", "grpo")]
    rows = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    (runs[1] / "metrics.jsonl").write_text(
        "".join(json.dumps(row | {"clip_ratio": 0.0}) + "\n" for row in rows)
    )
    tab = show(runs)
    assert "What the reward costs in KL" not in tab.evaluate(TITLES)  # one point
    axis = "[aria-label='y-axis tick label'] text"
    for title in ("Tokens whose ratio is clipped", "Learned reward"):
        chart = tab.locator("figure", has=tab.get_by_text(title, exact=True))
        assert len(set(chart.locator(axis).all_text_contents())) > 2
    assert "Too few points to see a turn: grpo." in tab.locator("#comparison").inner_text()


def test_what_is_too_small_a_fall_says_how_large_it_is(show, six):
    said = show([six[METHODS.index("grpo")]]).locator("#reward").inner_text()
    turn = gather([six[METHODS.index("grpo")]])["runs"][0]["true"]["turn"]
    assert "No turn was seen: the gold reward never falls by more than its noise" in said
    fell, noise = re.search(r"grpo fell by ([\d.e-]+) \(noise ([\d.e-]+)\)", said).groups()
    assert (float(fell), float(noise)) == pytest.approx(
        (turn["fall"], turn["fall_noise"]), rel=0.06, abs=1e-6
    )
    assert "six standard errors" in said


def test_the_speed_of_a_step_leaves_its_evaluation_out(tmp_path):
    run = write_run(tmp_path / "grpo", "grpo", 4)
    rows = [
        {"step": step, "seconds": 2.0 * step, "tokens/generated": 100, "tokens/trained": 300}
        for step in range(1, 4)
    ]
    rows[1] |= {"seconds": 14.0, "time/evaluation": 10.0}
    rows[2] |= {"seconds": 16.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gather([run])["runs"][0]["speed"]["series"]["tokens"]["mean"] == [200, 200, 200]


def test_no_path_of_this_machine_but_those_that_were_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {
        "model": "/home/someone/trivet/src/trivet/toy/stories",
        "data": f"{tmp_path}/data.jsonl",
    }
    options |= {"reward": [f"{tmp_path}/runs/rm", "/elsewhere/rm"], "chat_template": "plain"}
    run = write_run(tmp_path / "grpo", "grpo", 2, options=options)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"started_from": options["model"]}))
    found = gather([run])["runs"][0]
    shown = {option["name"]: option["value"] for option in found["options"]}
    assert found["about"]["started_from"] == shown["model"] == "trivet/toy/stories"
    assert (shown["data"], shown["reward"], shown["chat_template"]) == (
        "data.jsonl",
        ["runs/rm", "/elsewhere/rm"],
        "plain",
    )


@pytest.mark.slow
def test_a_page_that_is_live_asks_for_data_and_nothing_else(browser, six):
    """Served: it takes a new payload, says when the run has ended and when nobody answers."""
    running = gather([six[4]])
    running["runs"][0] |= {"status": "running", "planned": 40, "left": 61.0}
    ended = json.loads(json.dumps(running))
    ended["runs"][0] |= {"status": "done", "done": 40}
    answers = {"now": (200, as_json(running))}
    tab = browser.new_page()
    page = build_page(running, live=True)
    asked = []

    def serve(route):
        asked.append((route.request.url, route.request.headers.get("if-none-match")))
        if not route.request.url.endswith("data.json"):
            route.fulfill(body=page, content_type="text/html")
        elif answers["now"] is None:
            route.abort()
        else:
            status, body = answers["now"]
            route.fulfill(status=status, body=body, headers={"ETag": '"1"'})

    tab.route("**/*", serve)
    tab.goto("http://trivet.test/")
    assert "live · grpo · step 20 of 40 · 1 min 1 s left" in tab.locator("#live").inner_text()
    until(tab, "document.documentElement.dataset.ready > 1")
    answers["now"] = None
    until(tab, "document.getElementById('live').dataset.state === 'lost'")
    answers["now"] = (200, as_json(ended))
    until(tab, "document.getElementById('live').textContent === 'run ended'")
    assert {url for url, _ in asked} == {"http://trivet.test/", "http://trivet.test/data.json"}
    assert asked[-1][1] == '"1"'
    tab.close()


def test_options_that_differ_from_the_defaults_come_first(six):
    options = {option["name"]: option for option in gather([six[4]])["runs"][0]["options"]}
    assert options["beta"]["default"] is False
    assert options["group_size"]["default"] is True
    assert options["lr"]["help"] == "Learning rate of AdamW."
    from trivet.recipes import grpo

    assert {
        name: option.default for name, option in options_of(file_of("trivet.recipes.grpo")).items()
    } == vars(grpo.Config())


def test_the_command(six, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(six[4])]) == 0
    assert capsys.readouterr().out.startswith(f"{six[4] / 'report.html'}  ·  0.")
    assert main(["report", str(six[0].parent)]) == 0
    written = six[0].parent / "report.html"
    assert str(written) in capsys.readouterr().out
    assert written.stat().st_size < 5e6
    whole = written.read_bytes()
    assert main(["report", str(six[4]), str(six[3])]) == 0
    beside = six[0].parent / "report-grpo-ppo.html"
    assert capsys.readouterr().out.startswith(f"{beside}  ·  ")
    assert main(["report", *map(str, six[:5]), str(six[2])]) == 0
    assert written.read_bytes() == whole
    assert main(["report", *map(str, six)]) == 0
    names = {"report.html", "report-grpo-ppo.html", "report-sft-reward-model-dpo-ppo-grpo.html"}
    assert {path.name for path in six[0].parent.glob("*.html")} == names
    alone = write_run(tmp_path / "elsewhere" / "run", "sft", 3)
    other = write_run(tmp_path / "dpo", "dpo", 3)
    assert main(["report", "elsewhere/run", "dpo"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("report-elsewhere-run-dpo.html  ·  ")
    assert main(["report", str(alone), str(other)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/report-elsewhere-run-dpo.html  ·  ")
    many = [write_run(tmp_path / "many" / f"{'x' * 60}{number}", "sft", 1) for number in range(5)]
    for some in (many[:4], many[1:]):
        assert main(["report", *map(str, some)]) == 0
    assert len(list((tmp_path / "many").glob("report-x*.html"))) == 2
    assert main(["report", str(alone), "--out", "made/here.html"]) == 0
    assert Path("made/here.html").exists()
    assert main(["report", "nowhere"]) == 2
    assert main(["report", "--out", "x.html"]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["report", "--help"]) == 0
    assert "trivet report RUN [RUN ...] [--out FILE.html]" in capsys.readouterr().out


def test_the_data_cannot_end_its_script():
    text = as_json({"x": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"x": "</script><!-- & \u2028"}


def test_the_assets_are_in_the_wheel_and_help_stays_light(tmp_path):
    root = Path(__file__).parent.parent
    pytest.importorskip("hatchling", reason="needs hatchling, which builds the wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=root,
        check=True,
        capture_output=True,
    )
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    parts = (
        "page.html",
        "page.css",
        *(f"{script}.js" for script in SCRIPTS),
        "vendor/d3.min.js",
        "vendor/plot.umd.min.js",
        "vendor/d3.LICENSE",
        "vendor/plot.LICENSE",
    )
    assert {f"trivet/report/page/{part}" for part in parts} <= names
    code = "import sys; from trivet.cli.main import main; main(['report', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
