"""Run one untrusted program isolated from the machine. A standalone script: code.py starts it and
passes it the job.

It makes namespaces without other processes or network, whose only files are Python's and the
system's, read-only, and /box, a small folder in memory. Then it forks: this process waits outside;
the child is the first process inside, and when it ends the kernel ends all others there; its own
child gives up the remaining privileges, sets the limits, and becomes the program. Each dies with
its parent. Errors before the program starts go to stderr, which the program itself does not have.
"""

import ctypes
import json
import os
import resource
import signal
import sys

LIBC = ctypes.CDLL(None, use_errno=True)
# Flags of unshare(2).
NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000  # of mount(2)
READ_ONLY, NO_SUID, NO_DEV = 1, 2, 4  # of mount(2) and mount_setattr(2)
MOUNT_SETATTR, HERE, ALL_BELOW = 442, -100, 0x8000
PDEATHSIG, NO_NEW_PRIVILEGES = 1, 38  # of prctl(2)
SEEN = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/alternatives", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
INSIDE = 1000  # user id that the program sees

# The program of a job with tests: runs them after the source, in its namespace. The verdict goes to
# a descriptor that print does not reach.
HARNESS = """
import json, os
verdict = os.dup(1)
job = json.load(open(0, closefd=False))
null = os.open("/dev/null", os.O_RDWR)
os.dup2(null, 0), os.dup2(null, 1)
names, passed = {"__name__": "solution"}, 0
try:
    exec(compile(job.pop("source"), "solution.py", "exec"), names)
except BaseException:
    os._exit(1)
for test in job["tests"]:
    try:
        exec(compile(test, "test.py", "exec"), names)
    except BaseException:
        continue
    passed += 1
os.write(verdict, f"{job['word']} {passed}".encode())
os._exit(0)
"""


def kernel(name: str, *arguments: object) -> None:
    """Call a function of the C library; raise OSError if it fails."""
    if getattr(LIBC, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def die_with_parent(parent: int) -> None:
    """Arrange for SIGKILL when the parent ends, and exit if it already has."""
    kernel("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def mount(source: str, target: str, kind: str = "none", flags: int = 0, data: str = "") -> None:
    """Call mount(2)."""
    kernel(
        "mount",
        source.encode(),
        target.encode(),
        kind.encode(),
        ctypes.c_ulong(flags),
        data.encode(),
    )


def restrict(target: str, flags: int, below: int = 0) -> None:
    """Set flags of an existing mount, and of the mounts below it if asked."""
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    kernel("syscall", MOUNT_SETATTR, HERE, target.encode(), below, attributes, ctypes.c_size_t(32))


def leave_the_machine(folder: str, seen: list[str], bytes_of_files: int) -> None:
    """Enter new namespaces, with a root folder built on `folder`."""
    user, group = os.getuid(), os.getgid()
    kernel("unshare", NEWNS | NEWIPC | NEWPID | NEWNET | (NEWUSER if user else 0))
    if user:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INSIDE} {user} 1"),
            ("gid_map", f"{INSIDE} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    mount("none", "/", flags=RECURSIVE | PRIVATE)
    mount("tmpfs", folder, "tmpfs", NO_SUID | NO_DEV, "size=1m,mode=755")
    for name in ("box", "tmp"):
        os.mkdir(f"{folder}/{name}")
    size = f"size={bytes_of_files},nr_inodes=1000,mode=1777"
    mount("tmpfs", f"{folder}/box", "tmpfs", NO_SUID | NO_DEV, size)
    mount(f"{folder}/box", f"{folder}/tmp", flags=BIND)
    shown: list[str] = []
    for path in sorted({os.path.abspath(path) for path in seen}):
        target = folder + path
        if (
            not os.path.lexists(path)
            or path == "/"
            or any(path.startswith(f"{other}/") for other in shown)
        ):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        shown.append(path)
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "w").close()
        mount(path, target, flags=BIND | RECURSIVE)
        device = path in DEVICES
        restrict(
            target, NO_SUID if device else READ_ONLY | NO_SUID | NO_DEV, 0 if device else ALL_BELOW
        )
    restrict(folder, READ_ONLY)
    os.chroot(folder)


def become(job: dict, box: str, outside: int) -> None:
    """Become the program, with no privileges, few resources and none of the environment."""
    # A user id that nobody else has, so that the process limit counts this program alone.
    if os.getuid() == 0:
        number = 61184 + outside % 4000
        os.chown(box, number, number) if job["unconfined"] else None
        os.setgroups([])
        os.setresgid(number, number, number)
        os.setresuid(number, number, number)
    kernel("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    kernel("prctl", PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # again: changing the user clears it
    stdin = job["stdin"]
    if job["tests"] is None:
        with open(f"{box}/solution.py", "w", encoding="utf-8", errors="replace") as file:
            file.write(job["source"])
        program = [f"{box}/solution.py"]
    else:
        stdin = json.dumps({key: job[key] for key in ("source", "tests", "word")})
        program = ["-c", HARNESS]
    reader = os.memfd_create("stdin")
    os.write(reader, stdin.encode("utf-8", "replace"))
    os.lseek(reader, 0, os.SEEK_SET)
    os.dup2(reader, 0)
    limits = {
        "CPU": job["cpu_seconds"],
        "AS": job["memory"],
        "FSIZE": job["file_size"],
        "NPROC": job["processes"],
    }
    for name, value in (limits | {"NOFILE": 64, "CORE": 0}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    os.chdir(box)
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": box,
        "TMPDIR": box,
        "LANG": "C.UTF-8",
    }
    environment |= dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
    )
    errors = os.dup(2)  # closed by exec; reports what can't be executed
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    try:
        os.execve(job["python"], [job["python"], "-I", "-B", *program], environment)
    except OSError as error:
        os.write(errors, f"{job['python']}: {error.strerror}".encode())
        os._exit(1)


def main() -> None:
    """Read the job, run it, and exit as it exited."""
    job = json.load(sys.stdin)
    die_with_parent(job["parent"])
    box = job["folder"] if job["unconfined"] else "/box"
    try:
        if not job["unconfined"]:
            leave_the_machine(job["folder"], [*SEEN, *DEVICES, *job["seen"]], job["file_size"])
        outside = os.getpid()
        first = os.fork()
        if first == 0:
            # Inside, the parent is in another namespace and reads as 0.
            die_with_parent(outside if job["unconfined"] else 0)
            if not job["unconfined"]:
                os.setsid()  # so that a signal to the program's group stays inside
            program = os.fork()
            if program == 0:
                become(job, box, outside)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) & 255)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 255)
    except OSError as error:
        print(error.strerror or error, file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
