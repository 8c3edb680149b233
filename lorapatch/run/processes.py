"""The processes of a run, found and ended without leaving one behind, through /proc (Linux)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "COOKIE",
    "Process",
    "argv",
    "environment",
    "find",
    "is_running",
    "resident_bytes",
    "run_processes",
    "send",
    "stop",
    "tree",
]

# Every process of a run inherits it, whoever its parent is by then: a rank outlives a launcher that was killed, and
# is then nobody's child. (Build servers find the left-overs of a job in the same way.)
COOKIE = "LORAPATCH_RUN"
_PROC = Path("/proc")
_SHELLS = {"bash", "sh", "dash", "ksh", "zsh"}


@dataclass(frozen=True)
class Process:
    """A process: its id, and when it started (clock ticks since boot), since ids are used again."""

    pid: int
    parent: int
    session: int
    started: int
    state: str
    name: str


def find(pid: int) -> Process | None:
    """The process with this id now; None when there is none."""
    return _read(pid)


def is_running(process: Process) -> bool:
    """Whether it is still there, as the same process and not as a zombie."""
    now = _read(process.pid)
    return now is not None and now.started == process.started and now.state not in "ZX"


def tree(root: int) -> list[Process]:
    """The process ``root`` and all below it."""
    return _below(_all(), {root})


def run_processes(root: Process, cookie: str) -> list[Process]:
    """All processes of a run: those below ``root``, in its session, or with ``cookie`` in their environment."""
    everyone = _all()
    now = next((process for process in everyone if process.pid == root.pid), None)
    mine = now is None or now.started == root.started  # else the id is somebody else's by now
    found = {process.pid for process in everyone if mine and root.pid in (process.pid, process.session)}
    found = {process.pid for process in _below(everyone, found)}
    mark = f"{COOKIE}={cookie}".encode()
    found |= {p.pid for p in everyone if p.pid not in found and mark in _bytes(p.pid, "environ").split(b"\0")}
    found.discard(os.getpid())
    return _below(everyone, found)


def argv(pid: int) -> list[str]:
    """The words the process was started with; empty when it is gone."""
    return [word.decode("utf-8", "replace") for word in _bytes(pid, "cmdline").split(b"\0")[:-1]]


def environment(pid: int) -> dict[str, str]:
    """The environment the process was started with; empty when it is gone or somebody else's."""
    pairs = (item.partition(b"=") for item in _bytes(pid, "environ").split(b"\0") if b"=" in item)
    return {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, _, value in pairs}


def resident_bytes(processes: Iterable[Process]) -> int:
    """Bytes of RAM the processes hold: private and file-backed pages of each, shared memory once (the largest)."""
    page = os.sysconf("SC_PAGE_SIZE")
    own = shared = 0
    for process in processes:
        resident, in_memory_files = _resident_pages(process.pid)
        own += resident - in_memory_files
        shared = max(shared, in_memory_files)
    return (own + shared) * page


def send(processes: Iterable[Process], number: int) -> None:
    """Send the signal to each that is still the same process."""
    for process in processes:
        if is_running(process):
            try:
                os.kill(process.pid, number)
            except (ProcessLookupError, PermissionError):
                pass  # gone in between, or not ours to end


def stop(
    root: Process, cookie: str, first: int = signal.SIGTERM, grace_s: float = 10.0, hurry: Callable[[], bool] = bool
) -> list[Process]:
    """End every process of a run: ``first``, then SIGTERM after half of ``grace_s``, then SIGKILL.

    Bash starts background jobs with SIGINT ignored, so SIGTERM follows it; and a shell gets SIGTERM in the place of
    SIGINT, after which it might go on to its next command. What only reads the output of another
    process of the run (tee) is left out at first: it ends with its input, and hands on the last words until then.
    ``hurry`` is asked all the time; once it is true, SIGKILL follows at once. Processes that appear meanwhile are
    ended too. Returns those that were killed.
    """
    begun = time.monotonic()
    sent: dict[tuple[int, int], int] = {}
    killed: list[Process] = []
    while members := [process for process in run_processes(root, cookie) if process.state not in "ZX"]:
        passed = time.monotonic() - begun
        number = first if passed < grace_s / 2 else signal.SIGTERM
        if passed > grace_s or hurry():
            number = signal.SIGKILL
        readers = _readers(members) if passed < grace_s / 2 and not hurry() else set()
        for process in members:
            if process.pid in readers:
                continue
            identity = (process.pid, process.started)
            if sent.get(identity) != number:
                sent[identity] = number
                send([process], signal.SIGTERM if number == signal.SIGINT and process.name in _SHELLS else number)
                if number == signal.SIGKILL:
                    killed.append(process)
        if passed > grace_s + 5:
            break  # in an uninterruptible sleep, or not ours to end
        time.sleep(0.02 if passed < 1 else 0.1)
    return killed


def _readers(members: list[Process]) -> set[int]:
    """Those whose standard input is a pipe that another one's standard output or error goes into."""
    outputs = {_pipe(process.pid, descriptor) for process in members for descriptor in (1, 2)} - {""}
    return {process.pid for process in members if _pipe(process.pid, 0) in outputs}


def _pipe(pid: int, descriptor: int) -> str:
    try:
        target = os.readlink(_PROC / str(pid) / "fd" / str(descriptor))
    except OSError:
        return ""
    return target if target.startswith("pipe:") else ""


def _below(everyone: list[Process], roots: set[int]) -> list[Process]:
    children: dict[int, list[Process]] = {}
    for process in everyone:
        children.setdefault(process.parent, []).append(process)
    found = [process for process in everyone if process.pid in roots]
    seen = set(roots)
    for process in found:  # grows while it is walked
        for child in children.get(process.pid, ()):
            if child.pid not in seen:
                seen.add(child.pid)
                found.append(child)
    return found


def _all() -> list[Process]:
    try:
        names = os.listdir(_PROC)
    except OSError:
        return []
    return [process for name in names if name.isdigit() and (process := _read(int(name)))]


def _read(pid: int) -> Process | None:
    # The name in brackets may hold blanks and brackets itself: the fields are counted from the last one.
    front, _, back = _bytes(pid, "stat").rpartition(b")")
    fields = back.split()
    if len(fields) < 20:
        return None
    name = front.partition(b"(")[2].decode("utf-8", "replace")
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), fields[0].decode(), name)


def _resident_pages(pid: int) -> tuple[int, int]:
    """Resident pages in all, and those of shared memory (RssShmem is in kB)."""
    resident = shared = 0
    for line in _bytes(pid, "status").splitlines():
        if line.startswith(b"VmRSS:"):
            resident = int(line.split()[1])
        elif line.startswith(b"RssShmem:"):
            shared = int(line.split()[1])
    per_page = os.sysconf("SC_PAGE_SIZE") // 1024
    return resident // per_page, shared // per_page


def _bytes(pid: int, name: str) -> bytes:
    try:
        return (_PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""
