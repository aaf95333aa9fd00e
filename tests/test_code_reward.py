"""Code that the model wrote: right and wrong answers, and programs that attack the machine, each with small limits."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from test_rewards import rollouts
from trivet.cli.main import main
from trivet.errors import InputError
from trivet.rewards import code
from trivet.rewards.code import CodeReward, _NotIsolatedError, code_of
from trivet.rewards.functions import load_rewards
from trivet.rewards.guard import with_time_limit

SMALL: dict[str, Any] = {
    "cpu_seconds": 2,
    "wall_seconds": 60.0,
    "memory_mb": 256,
    "processes": 8,
    "file_mb": 1,
}
LONG = 20  # seconds of programs that are ended before; should they not be, they end by themselves


def made(**settings: Any) -> CodeReward:
    return CodeReward(**(SMALL | settings))


@pytest.fixture(scope="module", autouse=True)
def launcher(tmp_path_factory) -> Iterator[Path]:
    """The launcher under a name of its own, so that its processes can be told from those of tests that run beside these."""
    before = code.CONFINED
    code.CONFINED = tmp_path_factory.mktemp("launcher") / f"confined-{os.getpid()}.py"
    code.CONFINED.write_text(before.read_text())
    yield code.CONFINED
    code.CONFINED = before


@pytest.fixture(scope="module")
def apart() -> CodeReward:
    """The reward, where this machine has namespaces."""
    command = [
        "unshare",
        "--net",
        "--pid",
        "--mount",
        "--fork",
        *(["--user"] if os.getuid() else []),
        "true",
    ]
    if not shutil.which("unshare") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("there are no namespaces here")
    return made()


def said(reward: CodeReward, source: str, given: str = "") -> str:
    """What a program prints, its errors included."""
    wrapped = f"import sys\nsys.stderr = sys.stdout\n{source}"
    return reward._output({"source": wrapped, "tests": None, "word": "", "stdin": given})


# Right and wrong ----------------------------------------------------------------------------------------------------

ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = {
    "prompt": "p",
    "tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(1, 1) == 3"],
}


@pytest.mark.parametrize(
    ("source", "row", "share"),
    [
        (ADD, {"tests": "assert add(1, 2) == 3"}, 1),
        (ADD, ASSERTS, 2 / 3),
        (
            ADD,
            {
                "test_list": ASSERTS["tests"][:2],
                "test_setup_code": "import math",
                "challenge_test_list": [],
            },
            1,
        ),
        (
            ADD,
            {
                "test_imports": ["import math", "import re"],
                "test_list": ["assert add(math.pi, 0) > 3"],
            },
            1,
        ),
        (ADD, {"test": "def check(f):\n    assert f(2, 2) == 4\n", "entry_point": "add"}, 1),
        (ADD, {"test": "def check(f):\n    assert f(2, 2) == 5\n", "entry_point": "add"}, 0),
        ("def add(a, b)", ASSERTS, 0),
        ("", ASSERTS, 0),
        ("\0", ASSERTS, 0),
        ("raise SystemExit(0)", ASSERTS, 0),
        ("import os\nos._exit(0)", ASSERTS, 0),
        ("print('0' * 32, 3)\nimport os\nos._exit(0)", ASSERTS, 0),
        ("import sys\nsys.exit = lambda code: None\nraise ValueError", ASSERTS, 0),
        ("def add(a, b):\n    raise SystemExit(0)", ASSERTS, 0),
        ("def add(a, b):\n    import os; os._exit(0)", ASSERTS, 0),
        ("import ctypes\nctypes.string_at(0)", ASSERTS, 0),  # a crash
        ("print(int(input()) * 2)", {"stdin": "4\n", "expected_output": "8"}, 1),
        ("print(int(input()) * 2)", {"stdin": ["4", "5"], "expected_output": ["8  \n\n", "10"]}, 1),
        ("print(8)", {"expected_output": 8}, 1),
        ("print(8)\nraise SystemExit(1)", {"expected_output": "8"}, 0),
        ("print(9)", {"expected_output": "8"}, 0),
        ("print('é')", {"expected_output": "é"}, 1),
        (
            "if __name__ == '__main__':\n    print(open('x', 'w').write('ab'))",
            {"expected_output": "2"},
            1,
        ),
    ],
)
def test_the_share_of_tests_that_a_program_passes(apart, source, row, share):
    assert apart._share_passed(source, row) == share


def test_all_or_nothing_or_the_share_and_no_opinion_without_tests(apart):
    rows = [ASSERTS, {"prompt": "q"}]
    given = rollouts(rows, group_size=1)
    given = type(given)(
        **{name: getattr(given, name) for name in given.__slots__} | {"texts": [ADD, ADD]}
    )
    assert [str(x) for x in apart(given).tolist()] == ["0.0", "nan"]
    assert apart.logged == {"rewards/code/out_of_time": 0.0}
    assert made(partial=True)(given).tolist()[0] == pytest.approx(2 / 3)


def test_data_without_any_tests_is_told(apart):
    with pytest.raises(InputError, match="the data has no tests; it needs a column tests"):
        apart(rollouts())
    with pytest.raises(InputError, match="2 entries in stdin but 1 in expected_output"):
        apart._share_passed("", {"stdin": ["1", "2"], "expected_output": "1"})


def test_it_is_named_code_and_takes_settings(apart, tmp_path):
    (tmp_path / "tests.toml").write_text('reward = "code"\npartial = true\nmemory_mb = 300\n')
    found = load_rewards(["code", f"{tmp_path}/tests.toml"], [], None, like=None).rewards
    assert list(found) == ["code", "tests"]
    assert found["tests"].partial  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1", "x = 1"),
        ("so:\n```python\nx = 1\n```\nthat is it", "x = 1\n"),
        ("```py\nx = 1\n```\nbetter:\n```\nx = 2\n```", "x = 2\n"),
        ("cut off:\n```python\nx = 1\ny", "x = 1\ny"),
    ],
)
def test_the_last_fenced_block_is_the_code(text, found):
    assert code_of(text) == found


def test_finding_the_code_reads_odd_texts_once():
    """A search that goes over them again from every place would take hours, and is given up after a minute."""
    texts = [
        "```python\n" * 300_000,
        "```" * 500_000,
        "```py" + " " * 500_000,
        "```\n" + "``\n" * 300_000,
    ]
    found = with_time_limit(60.0, lambda: [code_of(text) for text in texts])
    assert found == ["", *texts[1:3], "``\n" * 300_000]


def test_each_test_comes_with_the_set_up():
    row = {"test_list": ["a", "b"], "test_setup_code": "import re"}
    assert code.tests_of(row) == ["import re\na", "import re\nb"]


# Attacks ------------------------------------------------------------------------------------------------------------


def ours(word: str) -> list[int]:
    """Processes of this machine with a word in their command line. The first process inside has that of the launcher, and is
    there until all others inside are gone."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if word.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def comes(condition: Callable[[], Any], seconds: float = 60.0) -> bool:
    """Whether this is so, now or in a while."""
    end = time.monotonic() + seconds
    while not (so := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(so)


def gone(word: str) -> bool:
    """Whether no process with this word is left, once the kernel has ended them."""
    return comes(lambda: not ours(word))


BOMB = """
import os, time
born = 0
for _ in range(200):  # bounded, should the limit not hold
    try:
        if os.fork() == 0:
            time.sleep(100)  # longer than it is waited for
            os._exit(0)
        born += 1
    except OSError as error:
        print(born, error.errno)
        break
else:
    print("no limit", born)
"""


def test_a_fork_bomb_meets_the_limit_and_nothing_of_it_is_left(apart, launcher):
    born, number = said(
        apart, BOMB
    ).split()  # nothing, had it been ended by its time or waited for those it has started
    assert (int(born) <= 8, number) == (True, "11")  # EAGAIN
    assert gone(launcher.name)


def test_threads_count_as_processes(apart):
    text = "import threading, time\nfor n in range(100):\n    threading.Thread(target=time.sleep, args=(100,), daemon=True).start()"
    assert "can't start new thread" in said(
        apart,
        f"try:\n    {text.replace(chr(10), chr(10) + '    ')}\nexcept RuntimeError as e:\n    print(e)",
    )


def test_two_programs_do_not_count_each_others_processes(apart):
    sources = [
        "import os, time\nfor _ in range(5):\n    if os.fork() == 0:\n        time.sleep(100); os._exit(0)\ntime.sleep(1)\nprint('all')"
    ] * 3
    given = rollouts([{"prompt": "p", "expected_output": "all"}] * 3, group_size=1)
    given = type(given)(
        **{name: getattr(given, name) for name in given.__slots__} | {"texts": sources}
    )
    assert made(at_once=3)(given).tolist() == [1.0] * 3


SLEEPS = f"import time\ntime.sleep({LONG})\nprint('x')"
DEAF = "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass"


@pytest.mark.parametrize(
    ("source", "late"),
    [
        ("while True: pass", False),  # processor time
        (SLEEPS, True),  # wall time
        (f"{DEAF}\n{SLEEPS}", True),
        (
            "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\ntime.sleep(100)",
            False,
        ),  # leaves a child behind
        ("input()", False),  # there is nothing to read
        ("while True: print('x' * 1000)", False),
        ("while True: open('x', 'ab').write(b'x' * 100000)", False),
        ("n = 0\nwhile True:\n    open(str(n), 'wb').write(b'x' * 100000)\n    n += 1", False),
        ("n = 0\nwhile True:\n    open(str(n), 'wb')\n    n += 1", False),
    ],
)
def test_what_goes_on_for_ever_is_ended_with_all_it_started(
    apart, launcher, monkeypatch, source, late
):
    """By its time, before it comes to an end of its own; or by another limit, before its time is up."""
    monkeypatch.setattr(apart, "cpu_seconds", 1)
    monkeypatch.setattr(apart, "wall_seconds", 0.7 if late else 60.0)
    monkeypatch.setattr(apart, "late", [])
    assert apart._share_passed(source, {"expected_output": "x"}) == 0
    assert apart.late == [1] * late
    assert gone(launcher.name)


def test_memory_is_limited(apart):
    source = "try:\n    x = bytearray(10 * 2**30)\n    print('had it')\nexcept MemoryError:\n    print('refused')"
    assert said(apart, source) == "refused\n"
    source = "x = []\ntry:\n    while True: x.append(bytearray(2**20))\nexcept MemoryError:\n    print(len(x) < 256)"
    assert said(apart, source) == "True\n"


def test_output_and_files_are_limited(apart):
    assert (
        len(
            said(
                apart,
                "import os\ntry:\n    while True: os.write(1, b'x' * 4096)\nexcept OSError: pass",
            )
        )
        == 2**20
    )
    text = said(
        apart,
        "n = 0\ntry:\n    while True:\n        open(str(n), 'wb').write(b'x' * 100000)\n        n += 1\nexcept OSError as e:\n    print(n, e.errno)",
    )
    assert text in ("10 28\n", "9 28\n")  # ENOSPC: all files together


def test_nothing_can_be_written_outside_its_folder(apart, tmp_path):
    os.chmod(tmp_path, 0o777)
    paths = [tmp_path / "a", "/tmp/a-trivet-test", "/var/tmp/a", "/dev/shm/a", "/etc/a", "/usr/lib/a", "/a", sys.prefix + "/a", sys.base_prefix + "/a", Path(__file__).parent / "a"]  # fmt: skip
    source = f"for path in {[str(path) for path in paths]!r}:\n    try:\n        open(path, 'w').write('x')\n        print('wrote', path)\n    except OSError: pass"
    assert set(said(apart, source).split("\n")) <= {
        "wrote /tmp/a-trivet-test",
        "",
    }  # which is its own /tmp
    assert not [path for path in paths if Path(path).exists()]
    source = "import os\nfor how in (os.rmdir, os.unlink):\n    try: how('/usr/bin/env'); print('removed')\n    except OSError: pass"
    assert said(apart, source) == ""


@pytest.mark.skipif(not os.access("/usr/bin/python3", os.X_OK), reason="needs the system's Python")
def test_what_it_sees_is_read_only_even_where_anybody_may_write(apart, tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "file").write_text("ours")
    for path in (tmp_path, tmp_path / "open", tmp_path / "open" / "file"):
        path.chmod(0o777)
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))  # which is shown
    path = str(tmp_path / "open" / "file")
    assert (
        said(
            apart,
            f"print(open({path!r}).read())\ntry: open({path!r}, 'w')\nexcept OSError as e: print(e.errno)",
        )
        == "ours\n30\n"
    )


def test_the_machine_s_files_are_out_of_sight(apart, tmp_path):
    (tmp_path / "secret").write_text("answers")
    paths = [tmp_path / "secret", __file__, "/etc/passwd", "/etc/shadow", "/proc/self/environ", "/proc/1/environ", "/sys/kernel", "/var", "/home"]  # fmt: skip
    assert (
        said(
            apart,
            f"import os\nprint([p for p in {[str(p) for p in paths]!r} if os.path.exists(p)])",
        )
        == "[]\n"
    )


def test_the_environment_is_not_inherited(apart, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert "secret" not in said(apart, "import os\nprint(dict(os.environ))")


def test_there_is_no_network(apart):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = f"import socket\nfor host, port in (('127.0.0.1', {port}), ('1.1.1.1', 53)):\n    try: socket.create_connection((host, port), 1); print('connected')\n    except OSError as e: print(e.errno)"
        assert said(apart, source) == "101\n101\n"  # ENETUNREACH
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


def test_abstract_sockets_of_the_machine_are_out_of_reach(apart):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0trivet-test")
        server.listen()
        source = "import socket\ntry: socket.socket(socket.AF_UNIX).connect('\\0trivet-test'); print('connected')\nexcept OSError: print('no')"
        assert said(apart, source) == "no\n"


VICTIM = "import sys, time; secret = 'in memory'; sys.stdout.write('up'); sys.stdout.flush(); time.sleep(3600)"


def test_no_other_process_can_be_signalled_or_read(apart):
    """Its parent, this process, one of the same user, and all at once."""
    victim = subprocess.Popen([sys.executable, "-c", VICTIM], stdout=subprocess.PIPE)
    try:
        assert victim.stdout is not None
        victim.stdout.read(2)
        source = f"""
import ctypes, os, signal
for pid in ({victim.pid}, {os.getpid()}, os.getppid(), -1, 0):
    for how in (lambda: os.kill(pid, signal.SIGTERM), lambda: os.killpg(pid, signal.SIGKILL)):
        if (pid, how) and pid not in (0, -1):
            try: how()
            except OSError: pass
libc = ctypes.CDLL(None, use_errno=True)
for pid in ({victim.pid}, {os.getpid()}, 1):
    print(libc.ptrace(16, pid, 0, 0), end=" ")  # attach
    part = (ctypes.c_size_t * 2)(id(libc), 8)
    print(libc.process_vm_readv(pid, part, 1, part, 1, 0), end=" ")
"""
        assert said(apart, source).split() == ["-1"] * 6
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.communicate()


@pytest.mark.parametrize(
    ("kill", "left"),
    [
        ("kill(os.getppid(), 9)", "alive\n"),
        ("kill(-1, 9)", "alive\n"),
        ("kill(1, 15)", "alive\n"),
        ("killpg(0, 9)", ""),
    ],
)
def test_killing_its_parent_its_group_or_all_ends_at_most_itself(apart, kill, left):
    assert said(apart, f"import os\ntry: os.{kill}\nexcept OSError: pass\nprint('alive')") == left


def test_it_has_no_rights_and_can_gain_none(apart):
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(os.getuid() != 0, os.geteuid() != 0, libc.prctl(39, 0, 0, 0, 0))  # no new privileges
tries = [libc.unshare(0x10000000), libc.unshare(0x20000), libc.mount(b"none", b"/box", b"tmpfs", 0, b""), libc.umount2(b"/usr", 2),
         libc.mount(b"none", b"/usr", None, 4096 | 32, None), libc.chroot(b"."), libc.setns(0, 0), libc.setuid(0), libc.mknod(b"x", 0o60666, 0x800)]
print(tries)
"""
    assert said(apart, source).split("\n")[:2] == ["True True 1", str([-1] * 9)]


def test_no_file_of_the_launcher_is_open(apart):
    source = "import os\nn = 0\nfor fd in range(3, 64):\n    try: os.fstat(fd); n += 1\n    except OSError: pass\nprint(n)"
    assert said(apart, source) == "0\n"


def test_programs_end_when_the_run_is_killed(apart, launcher, monkeypatch):
    """The whole process of the run, by SIGKILL, while a program sleeps."""
    monkeypatch.setattr(apart, "wall_seconds", 300.0)
    if not (run := os.fork()):
        try:
            apart._share_passed("import time; time.sleep(300)", {"expected_output": "x"})
        finally:
            os._exit(1)
    try:
        # outside and inside; a third one is the program, before it is another
        assert comes(lambda: len(ours(launcher.name)) == 2)
    finally:
        os.kill(run, signal.SIGKILL)
        os.waitpid(run, 0)
    assert gone(launcher.name)


def test_ctrl_c_waits_for_no_program(launcher, monkeypatch):
    given = rollouts([{"prompt": "p", "tests": f"import time\ntime.sleep({LONG})"}] * 4)
    given = type(given)(
        **{name: getattr(given, name) for name in given.__slots__} | {"texts": [""] * 8}
    )
    reward, shares = made(at_once=2), list[float]()
    passed = reward._share_passed
    monkeypatch.setattr(
        reward,
        "_share_passed",
        lambda source, row: shares.append(passed(source, row)) or shares[-1],
    )

    def interrupt() -> None:
        comes(lambda: len(ours(launcher.name)) == 4)  # two programs run
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        reward(given)
    thread.join()
    assert shares == [0.0] * 2  # 1 had they come to their ends, and more had others been started
    assert gone(launcher.name)


# Machines that can't keep programs apart ----------------------------------------------------------------------------


@pytest.fixture
def without_namespaces(tmp_path, monkeypatch) -> Iterator[str]:
    """A launcher to which the kernel refuses namespaces; gives the folder that holds those of its programs."""
    source = code.CONFINED.read_text()
    refused = 'raise OSError(1, "unshare: Operation not permitted")'
    old = '    kernel("unshare", NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))'
    assert old in source
    (tmp_path / "confined.py").write_text(source.replace(old, f"    {refused}"))
    monkeypatch.setattr("trivet.rewards.code.CONFINED", tmp_path / "confined.py")
    with tempfile.TemporaryDirectory(prefix="unconfined-") as folder:
        os.chmod(folder, 0o755)  # the program's user goes through it
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


def test_where_there_are_no_namespaces_it_is_refused_unless_allowed(
    without_namespaces, monkeypatch
):
    with pytest.raises(
        InputError,
        match=r"isolate the model's code on this machine .*Operation not permitted.*unconfined = true",
    ):
        made()
    if os.getuid() == 0 and os.access(
        "/usr/bin/python3", os.X_OK
    ):  # a Python that the program's user can read
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    reward = made(unconfined=True)
    assert reward._share_passed(ADD, ASSERTS) == 2 / 3
    assert said(reward, "x = bytearray(10 * 2**30)") == ""
    with monkeypatch.context() as patch:
        patch.setattr(reward, "wall_seconds", 0.5)
        assert said(reward, SLEEPS) == ""
    assert reward.late == [1]
    assert "secret" not in said(reward, "import os\nprint(dict(os.environ))")
    before = os.getpid()
    if (
        os.getuid() == 0
    ):  # the program is somebody else, whom the kernel counts and keeps from signalling us
        assert said(reward, BOMB).endswith(" 11\n")
        assert (
            said(
                reward, f"import os\ntry: os.kill({before}, 0)\nexcept PermissionError: print('no')"
            )
            == "no\n"
        )
        assert gone(without_namespaces)


def test_where_namespaces_are_granted_but_do_not_hold_it_is_refused(apart, monkeypatch):
    with_network = code.CONFINED.read_text().replace("NEWPID | NEWNET |", "NEWPID |")
    for kept in (
        with_network,
        code.CONFINED.read_text().replace("    os.chroot(folder)", "    os.chroot('/')"),
    ):
        assert kept != code.CONFINED.read_text()
        with tempfile.NamedTemporaryFile("w", suffix=".py") as file, monkeypatch.context() as patch:
            file.write(kept)
            file.flush()
            patch.setattr("trivet.rewards.code.CONFINED", Path(file.name))
            with pytest.raises(
                InputError, match=r"isolate the model's code on this machine|raise memory_mb"
            ):
                made()


def test_a_launcher_that_fails_later_is_no_wrong_answer(apart, monkeypatch, tmp_path):
    (tmp_path / "confined.py").write_text("import sys; sys.exit('no memory')")
    monkeypatch.setattr("trivet.rewards.code.CONFINED", tmp_path / "confined.py")
    with pytest.raises(_NotIsolatedError, match="no memory"):
        apart._share_passed("print(1)", {"expected_output": "1"})
    with pytest.raises(InputError, match="could not start a program: no memory"):
        apart(rollouts([{"prompt": "p", "tests": "pass"}]))


@pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, to become somebody else"
)
@pytest.mark.skipif(
    not os.access("/usr/bin/python3", os.X_OK), reason="needs a Python that all can read"
)
def test_an_ordinary_user_gets_the_same(tmp_path):
    """With the machine's Python, as nobody: the way through a user namespace."""
    folder = tmp_path / "for-nobody"
    shutil.copytree(Path(code.__file__).parent, folder)
    body = """
import json, math, sys, types
from importlib import machinery, util
for name in ("torch", "trivet", "trivet.batch", "trivet.errors"):  # which nobody may read
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch"].Tensor = sys.modules["trivet.batch"].Rollouts = object
sys.modules["torch"].nan = math.nan
sys.modules["trivet.errors"].InputError = ValueError
spec = util.spec_from_loader("reward", machinery.SourceFileLoader("reward", sys.argv[1] + "/code.py"))
module = sys.modules["reward"] = util.module_from_spec(spec)
spec.loader.exec_module(module)
reward = module.CodeReward(cpu_seconds=2, wall_seconds=60.0, memory_mb=256, processes=8, file_mb=1)
outputs = [reward._output({"source": source, "tests": None, "word": "", "stdin": ""}) for source in sys.argv[2:]]
print(json.dumps([reward._share_passed("print(1)", {"expected_output": "1"}), *outputs]))
"""
    (folder / "try.py").write_text(body)
    for path in (tmp_path, *tmp_path.parents):
        if (
            path.stat().st_uid == 0
            and path.is_relative_to(tempfile.gettempdir())
            and str(path) != tempfile.gettempdir()
        ):
            path.chmod(0o755)
    command = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "/usr/bin/python3",
        "-B",
    ]
    outside = "try: open('/var/tmp/x', 'w')\nexcept OSError: print('no')"
    rights = "import os, ctypes\nprint(os.getuid(), ctypes.CDLL(None).unshare(0x20000))"
    words = [*command, str(folder / "try.py"), str(folder), BOMB, outside, rights]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    if "keep the model's code apart" in done.stderr:
        pytest.skip("user namespaces are closed to ordinary users here")
    assert done.returncode == 0, done.stderr
    passed, bomb, wrote, held = json.loads(done.stdout)
    born, number = bomb.split()
    assert (passed, wrote, held) == (1, "no\n", "1000 -1\n")
    assert (int(born) <= 8, number) == (True, "11")


def test_a_run_is_rewarded_for_code(apart, tmp_path):
    rows = [
        {"prompt": f"One day, {name}", "tests": "pass"} for name in ("Nora", "Ben", "Tim", "Lily")
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "grpo --preset toy --steps 1 --prompts-per-step 2 --group-size 2 --max-completion-tokens 8 --reward code"
    limits = f"--eval-fraction 0 --quiet --data {tmp_path}/data.jsonl --out {tmp_path}/run"
    assert main([*words.split(), *limits.split()]) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (line["rewards/code/mean"], line["rewards/code/out_of_time"]) == (0.0, 0.0)
