"""A vLLM server on this machine, run as a process of another Python: Trivet does not import vLLM
and leaves no server behind.
"""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trivet.errors import InputError

# A thread in the server's process waits for end of file on stdin, which comes when this process
# ends in any way; it then kills the server's process group.
LAUNCHER = """
import os, runpy, signal, sys, threading
def watch():
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module({module!r}, run_name="__main__")
"""


# variables that torchrun sets for its workers; the server must not inherit them
TORCHRUN = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*"
)


class LocalServer:
    """One server process on a free port of 127.0.0.1, with its output in a file."""

    def __init__(
        self,
        python: Path,
        log: Path,
        flags: Sequence[str],
        module: str = "vllm.entrypoints.openai.api_server",
    ):
        self.python, self.log, self.flags, self.module = python, log, flags, module
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0  # offset in the log where its output begins

    def start(self, model: str) -> None:
        """Start serving this model folder, after stopping any earlier process."""
        self.stop()
        required = ("--model", model, "--host", "127.0.0.1", "--port", str(self.port))
        words = [
            str(self.python),
            "-c",
            LAUNCHER.format(module=self.module),
            *required,
            *self.flags,
        ]
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "HF_HUB_OFFLINE": "1",
        }
        environment |= {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        environment |= {
            name: value for name, value in os.environ.items() if not TORCHRUN.fullmatch(name)
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.began = log.tell()
            streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(
                words, env=environment, start_new_session=True, **streams
            )  # type: ignore[call-overload]

    def alive(self) -> bool:
        """Return whether the process is running."""
        return self.process is not None and self.process.poll() is None

    def stop(self, patience: float = 10.0) -> None:
        """Terminate the process, and kill it if it does not end within `patience` seconds."""
        if self.process is None:
            return
        if self.alive():
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what is left of its group
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self.process = None

    def first_error(self) -> str:
        """Return the first error in its log since it was started."""
        with suppress(OSError):
            text = self.log.read_bytes()[self.began :].decode(errors="replace")
            match = re.search(r"\b\w*Error: .+", text)
            return match[0].strip()[:300] if match else ""
        return ""


def python_with_vllm() -> Path:
    """Return the Python that has vLLM: TRIVET_VLLM_PYTHON, or the one that `make vllm` creates."""
    variable = os.environ.get("TRIVET_VLLM_PYTHON", "")
    python = Path(variable or ".vllm/bin/python")
    if not python.exists():
        problem = (
            f"TRIVET_VLLM_PYTHON is {variable}, which does not exist"
            if variable
            else ".vllm/bin/python does not exist here"
        )
        raise InputError(
            f"--vllm: {problem}; install vLLM with `make vllm`, or set TRIVET_VLLM_PYTHON to a "
            "Python that has it"
        )
    return python.absolute()
