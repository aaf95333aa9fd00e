"""A vLLM server on this machine, as a process of another Python: Trivet imports no vLLM, and leaves no server behind."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trivet.errors import InputError

# The server's own process waits, in a thread, for the end of its standard input, which comes when this process is gone in
# whatever way; then it takes its group with it.
WATCHED = """
import os, runpy, signal, sys, threading
def watch():
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
runpy.run_module({module!r}, run_name="__main__")
"""


# what torchrun tells the processes that it starts, of which the server is none
TORCHRUN = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


class Local:
    """One server process, on a free port of 127.0.0.1, its output in a file."""

    def __init__(
        self, python: Path, log: Path, flags: Sequence[str], module: str = "vllm.entrypoints.openai.api_server"
    ):
        self.python, self.log, self.flags, self.module = python, log, flags, module
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port: int = found.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0  # where in the log its output begins

    def start(self, model: str) -> None:
        """Begin to serve this model folder; what ran before is ended."""
        self.stop()
        own = ("--model", model, "--host", "127.0.0.1", "--port", str(self.port))
        words = [str(self.python), "-c", WATCHED.format(module=self.module), *own, *self.flags]
        environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1"}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {name: said for name, said in os.environ.items() if not TORCHRUN.fullmatch(name)}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.began = log.tell()
            said = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(words, env=environment, start_new_session=True, **said)  # type: ignore[call-overload]

    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def stop(self, patience: float = 10.0) -> None:
        """End it, politely at first."""
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

    def complaint(self) -> str:
        """The first error that it has named since it was started."""
        with suppress(OSError):
            said = self.log.read_bytes()[self.began :].decode(errors="replace")
            found = re.search(r"\b\w*Error: .+", said)
            return found[0].strip()[:300] if found else ""
        return ""


def python_with_vllm() -> Path:
    """The Python that has vLLM: TRIVET_VLLM_PYTHON, or what `make vllm` made."""
    given = os.environ.get("TRIVET_VLLM_PYTHON", "")
    found = Path(given or ".vllm/bin/python")
    if not found.exists():
        told = f"TRIVET_VLLM_PYTHON is {given}, which is not there" if given else "there is no .vllm/bin/python here"
        raise InputError(
            f"--vllm: {told}; `make vllm` installs vLLM there, or set TRIVET_VLLM_PYTHON to a Python with it"
        )
    return found.absolute()
