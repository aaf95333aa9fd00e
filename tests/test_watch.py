"""trivet watch: a real server on this machine, its page and data, what it refuses, and what it makes of runs that go on or died."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import uvicorn

from runs import LIVING, write_run
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.report import watch
from trivet.store.reading import lives, read_metrics, state

GONE = 2**22 + 1  # no process has this pid


@pytest.fixture
def serve(monkeypatch):
    """Serve these paths from a thread, with no rest between two looks; returns ask(path, headers, method) -> (status, headers, body)."""
    monkeypatch.setattr(watch, "EVERY", 1e6)
    servers = []

    def start(*paths):
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = uvicorn.Server(
            uvicorn.Config(watch.application(list(paths)), log_level="warning", lifespan="off")
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        servers.append((server, thread, listening))

        def ask(path="/data.json", headers=None, method="GET"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.putrequest(method, path, skip_host="Host" in (headers or {}))
                for key, value in (headers or {}).items():
                    connection.putheader(key, value)
                connection.endheaders()
                answer = connection.getresponse()
                return answer.status, answer.headers, answer.read().decode()
            finally:
                connection.close()

        ask.port = port
        return ask

    yield start
    for server, thread, listening in servers:
        server.should_exit = True
        thread.join()
        listening.close()


def going_on(path, steps=6, pid=LIVING):
    """A run that has taken some of 40 steps."""
    return write_run(path, "grpo", steps, planned=40, done=False, pid=pid)


def append(run, text):
    """More of metrics.jsonl, as a run writes it."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text)


def line(run):
    """The line of the next step."""
    rows = read_metrics(run)
    return (
        json.dumps(rows[-1] | {"step": rows[-1]["step"] + 1, "seconds": rows[-1]["seconds"] + 0.6})
        + "\n"
    )


def test_the_page_the_data_and_what_they_say_to_browsers(serve, tmp_path):
    ask = serve(going_on(tmp_path / "grpo"))
    status, headers, page = ask("/")
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert "<html" in page
    status, headers, data = ask()
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers
    (run,) = json.loads(data)["runs"]
    assert (run["status"], run["done"], run["planned"]) == ("running", 6, 40)
    assert run["left"] == pytest.approx(34 * 0.6)
    assert run["speed"]["series"]["tokens"]["mean"][-1] == pytest.approx(16800 / 0.6, rel=1e-3)


def test_nothing_is_sent_again_until_something_is_new(serve, tmp_path):
    run = going_on(tmp_path / "grpo")
    ask = serve(run)
    status, headers, _ = ask()
    seen = {"If-None-Match": headers["ETag"]}
    status, headers, body = ask(headers=seen)
    assert (status, headers["ETag"], body) == (304, seen["If-None-Match"], "")
    new = line(run)
    append(run, new[:40])  # half a line is not news
    assert ask(headers=seen)[0] == 304
    append(run, new[40:])
    status, headers, body = ask(headers=seen)
    assert status == 200
    assert headers["ETag"] != seen["If-None-Match"]
    assert json.loads(body)["runs"][0]["done"] == 7


def test_a_run_ends_or_is_killed_or_goes_and_comes_back(serve, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = going_on(tmp_path / "grpo", pid=child.pid)
    ask = serve(run)

    def status():
        return json.loads(ask()[2])["runs"][0]["status"]

    assert status() == "running"
    os.utime(run / "metrics.jsonl", (time.time() - 60,) * 2)
    assert status() == "running"
    child.kill()
    until = time.time() + 60
    while status() == "running" and time.time() < until:
        time.sleep(0.05)
    assert status() == "stopped"  # though nobody has waited for it
    child.communicate()
    run.rename(tmp_path / "away")
    code, _, said = ask()
    assert code == 503
    assert "not a run directory" in said
    (tmp_path / "away").rename(run)
    write_run(run, "grpo", 8)
    assert status() == "done"


def test_several_who_watch_cost_what_one_does_and_the_loop_stays_free(serve, tmp_path, monkeypatch):
    gather, calls, free, now = watch.gather, [], [], [1000.0]
    looking, other = threading.Event(), threading.Event()

    def slow(runs):
        calls.append(runs)
        looking.set()
        free.append(other.wait(15))
        now[0] += 1
        return gather(runs)

    run = going_on(tmp_path / "grpo")
    ask = serve(run)
    monkeypatch.setattr(watch, "gather", slow)
    monkeypatch.setattr(watch, "EVERY", 2.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0))
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask) for _ in range(6)]
        assert looking.wait(60)
        assert ask("/nothing")[0] == 404
        other.set()
        assert {answer.result()[0] for answer in asked} == {200}
    assert free == [True]  # it was answered in the middle of a look
    append(run, line(run))
    now[0] = 1001 + 10 - 2
    assert json.loads(ask()[2])["runs"][0]["done"] == 6  # looking takes a tenth of the time at most
    assert len(calls) == 1
    now[0] += 0.1
    assert json.loads(ask()[2])["runs"][0]["done"] == 7
    assert len(calls) == 2


def test_a_folder_of_runs_shows_those_that_are_begun_later_too(serve, tmp_path):
    write_run(tmp_path / "sft", "sft", 5)
    ask = serve(tmp_path)
    assert [run["name"] for run in json.loads(ask()[2])["runs"]] == ["sft"]
    going_on(tmp_path / "grpo")
    assert [run["name"] for run in json.loads(ask()[2])["runs"]] == ["sft", "grpo"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io:80", ""]
)
def test_other_hosts_are_refused(serve, tmp_path, host):
    ask = serve(going_on(tmp_path / "grpo"))
    for path in ("/", "/data.json"):
        status, _, said = ask(path, {"Host": host})
        assert status == 403
        assert said.count("\n") == 1
        assert "127.0.0.1" in said


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:{}", "127.0.0.1:{}", "[::1]:{}", "LOCALHOST:{}"]
)
def test_this_machine_is_let_in(serve, tmp_path, host):
    ask = serve(going_on(tmp_path / "grpo"))
    assert ask(headers={"Host": host.format(ask.port)})[0] == 200


def test_no_file_is_served(serve, tmp_path):
    ask = serve(going_on(tmp_path / "grpo"))
    secret = tmp_path / "secret"
    secret.write_text("open sesame")
    for path in (
        "/run.json",
        "/metrics.jsonl",
        "/../secret",
        "/%2e%2e/secret",
        f"/{secret}",
        "//etc/passwd",
        "/data.json/",
        "/page.js",
    ):
        status, _, said = ask(path)
        assert status == 404, path
        assert "sesame" not in said
    assert ask("/", method="POST")[0] == 405
    status, headers, body = ask("/", method="HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 1000


def test_the_command_says_where_it_is_and_ends_quietly(tmp_path, capsys):
    run = going_on(tmp_path / "grpo")
    process = subprocess.Popen(
        [sys.executable, "-m", "trivet", "watch", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = process.stdout.readline()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", said)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/data.json")
    assert connection.getresponse().status == 200
    assert main(["watch", str(run), "--port", str(port)]) == 2
    taken = capsys.readouterr().err
    assert f"--port {port}" in taken
    assert taken.count("\n") == 1
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    connection.close()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nope"], "nope is not a run directory: it does not exist"),
        (["{}"], "no run.json"),
        ([], "name a run directory first"),
        (["{}/grpo", "--port", "99999"], "--port is 99999"),
        (["{}/grpo", "--prot", "1"], "--port"),
    ],
)
def test_what_cannot_be_watched_is_one_sentence(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch, "WAIT", 0.1)
    inside = tmp_path / "empty"
    inside.mkdir()
    going_on(inside / "other" / "grpo")
    assert (
        main(
            [
                "watch",
                *(word.format(inside if word == "{}" else inside / "other") for word in arguments),
            ]
        )
        == 2
    )
    said = capsys.readouterr().err.removeprefix(
        "trivet watch: waiting up to 0 s for nope to start\n"
    )
    assert named in said
    assert said.count("\n") == 1


def test_a_run_that_is_about_to_begin_is_waited_for(tmp_path, capsys, monkeypatch):
    run, now = tmp_path / "runs" / "grpo", [1000.0]

    def sleep(seconds):
        before = now[0]
        now[0] += seconds
        if before < 1020 <= now[0]:
            run.mkdir(parents=True)  # a run's directory is there a moment before what is in it
        if before < 1040 <= now[0]:
            going_on(run)

    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    watch.wait_for([run])
    assert 1040 <= now[0] < 1041
    assert capsys.readouterr().err == f"trivet watch: waiting up to 60 s for {run} to start\n"
    watch.wait_for([run])
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="it does not exist"):
        watch.wait_for([tmp_path / "never"])
    assert 1100 <= now[0] < 1102


def test_what_state_a_run_is_in(tmp_path, monkeypatch):
    run, now = going_on(tmp_path / "grpo"), 1_700_000_000.0
    monkeypatch.setattr("trivet.store.reading.time", SimpleNamespace(time=lambda: now))

    def quiet(seconds):
        os.utime(run / "metrics.jsonl", (now - seconds,) * 2)

    quiet(0)
    assert state(run, LIVING, [0.6]) == "running"
    assert state(run, None, [0.6]) == "running"  # from before run.json
    assert state(run, GONE, [0.6]) == "running"  # on another machine: its lines come
    assert state(run, GONE, []) == "stopped"
    quiet(30)
    assert state(run, GONE, [0.6]) == "stopped"
    assert state(run, GONE, [20.0]) == "running"
    assert state(run, None, [0.6]) == "running"
    quiet(1000)
    assert state(run, LIVING, [0.6]) == "stopped"  # a pid that is another's by now
    assert state(run, None, []) == "stopped"
    assert state(run, LIVING, [60.0]) == "running"
    assert state(run, LIVING, []) == "running"  # the first step may take long
    (run / "summary.json").write_text("{}")
    assert state(run, GONE, [0.6]) == "done"


def test_a_process_that_lives():
    assert lives(os.getpid()) is True
    assert lives(GONE) is False
    assert lives(10**30) is False
    assert lives(None) is None


@pytest.fixture(scope="module")
def browser():
    """A browser without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"needs chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


def test_the_open_page_follows_a_run_through_half_a_line_a_lost_directory_and_its_end(
    serve, tmp_path, browser
):
    run = going_on(tmp_path / "grpo")
    ask = serve(run)
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.clock.install()  # so that two seconds are over when we say so
    page.goto(f"http://localhost:{ask.port}/")
    page.evaluate("window.same = true")

    def shows(*words):
        with page.expect_response("**/data.json"):
            page.clock.run_for(2100)
        for word in words:
            page.locator("#live", has_text=word).wait_for()

    shows("step 6 of 40")
    new = line(run)
    append(run, new[:50])
    shows("step 6 of 40")
    append(run, new[50:])
    shows("step 7 of 40", "left")
    run.rename(tmp_path / "away")
    shows("lost")
    (tmp_path / "away").rename(run)
    append(run, line(run))
    shows("step 8 of 40")
    write_run(run, "grpo", 40)
    shows("ended")
    assert page.evaluate("window.same")  # nobody has loaded it again
    assert errors == []
    page.close()


def test_the_open_page_sees_that_a_run_was_killed(serve, tmp_path, browser):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run = going_on(tmp_path / "grpo", pid=child.pid)
    os.utime(run / "metrics.jsonl", (time.time() - 60,) * 2)
    ask, page = serve(run), browser.new_page()
    page.goto(f"http://127.0.0.1:{ask.port}/")
    page.wait_for_selector("#live[data-state=live]")
    child.kill()
    child.communicate()
    page.wait_for_selector("#live[data-state=ended]")
    assert "stopped" in page.inner_text("main")
    page.close()
