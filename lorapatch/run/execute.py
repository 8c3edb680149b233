"""Runs a command in a session of its own, hands on its output, and ends all of it whatever happens."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from lorapatch.errors import Refused
from lorapatch.run.processes import COOKIE, Process, find, run_processes, stop

__all__ = ["Outcome", "execute"]

_CHUNK = 1 << 16
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``exit_code`` as a shell gives it (128 + the signal's number); times in seconds since 1970."""

    exit_code: int
    state: str  # finished, failed, interrupted, timeout
    started: float
    ended: float
    killed: int = 0  # processes that did not end by themselves when they were asked to
    reason: str = ""  # the signal, or the limit

    @property
    def wall_s(self) -> float:
        """Seconds from start to end."""
        return self.ended - self.started


def execute(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    on_output: Callable[[bytes], None],
    on_start: Callable[[Process, str], None] = lambda process, cookie: None,
    timeout_s: float | None = None,
    grace_s: float = 10.0,
) -> Outcome:
    """Run ``command`` until it and all its processes have ended.

    Standard output and error come to ``on_output`` as they are written; standard input is empty. SIGINT, SIGTERM and
    SIGHUP sent to us go to every process of the run (the second one kills at once), and so does SIGTERM after
    ``timeout_s`` seconds. What the command leaves behind in the background is ended too. ``on_start`` gets the first
    process and the value of ``LORAPATCH_RUN`` by which the others are known.

    Raises Refused when the program is not there.
    """
    cookie = uuid.uuid4().hex
    started, begun = time.time(), time.monotonic()
    with _signals() as received:
        child, root = _start(command, cwd, {**(os.environ if environment is None else environment), COOKIE: cookie})
        on_start(root, cookie)
        ending = _Ending(root, cookie, grace_s, received)
        try:
            _read_to_the_end(child, ending, on_output, None if timeout_s is None else begun + timeout_s)
        except BaseException:  # of on_output: nothing may be left behind for that
            stop(root, cookie, signal.SIGTERM, grace_s)
            child.wait()
            raise
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    state = ending.state or ("failed" if code else "finished")
    reason = f"{timeout_s:g} s" if state == "timeout" else received[0].name if received else ""
    return Outcome(code, state, started, started + time.monotonic() - begun, len(ending.killed), reason)


def _read_to_the_end(
    child: subprocess.Popen[bytes], ending: _Ending, on_output: Callable[[bytes], None], deadline: float | None
) -> None:
    assert child.stdout is not None
    with child.stdout, selectors.DefaultSelector() as selector:
        os.set_blocking(child.stdout.fileno(), False)
        selector.register(child.stdout, selectors.EVENT_READ)
        while not (ending.over and child.poll() is not None):
            if selector.get_map():
                if selector.select(0.05) and not _pass_on(child.stdout.fileno(), on_output):
                    selector.unregister(child.stdout)
            else:
                time.sleep(0.02)
            ending.check(child.poll() is not None, deadline is not None and time.monotonic() > deadline)
        if selector.get_map():
            _pass_on(child.stdout.fileno(), on_output)


class _Ending:
    """Ends the processes of a run, beside the loop that reads: a rank must be able to write its last words."""

    def __init__(self, root: Process, cookie: str, grace_s: float, received: list[signal.Signals]) -> None:
        self.root, self.cookie, self.grace_s, self.received = root, cookie, grace_s, received
        self.state = ""  # interrupted, timeout: why it was ended; empty if it ended by itself
        self.killed: list[Process] = []
        self._thread: threading.Thread | None = None
        self._alone_since: float | None = None

    @property
    def over(self) -> bool:
        """Whether the ending was begun, and nothing is left."""
        return self._thread is not None and not self._thread.is_alive()

    def check(self, exited: bool, late: bool) -> None:
        if self._thread is not None:
            return
        if self.received and not exited:
            self.state = "interrupted"
            self._begin(self.received[0])
        elif late and not exited:
            self.state = "timeout"
            self._begin(signal.SIGTERM)
        elif exited:
            # What writes the end of a log (`> >(tee log)`) ends by itself; it is given a second to.
            self._alone_since = self._alone_since or time.monotonic()
            waited = time.monotonic() - self._alone_since > 1 or bool(self.received)
            if waited or not run_processes(self.root, self.cookie):
                self._begin(signal.SIGTERM)

    def _begin(self, first: int) -> None:
        def end() -> None:
            self.killed = stop(self.root, self.cookie, first, self.grace_s, hurry=lambda: len(self.received) > 1)

        self._thread = threading.Thread(target=end, name="lorapatch-stop", daemon=True)
        self._thread.start()


def _start(
    command: Sequence[str], cwd: Path | None, environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], Process]:
    try:
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise Refused(f"{command[0]} cannot be started ({error.strerror}); is it installed?") from error
    root = find(child.pid) or Process(child.pid, os.getpid(), child.pid, 0, "?", "")
    return child, root


def _pass_on(descriptor: int, on_output: Callable[[bytes], None]) -> bool:
    """Hand on what can be read now; False at the end of the output."""
    while True:
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return True
        if not data:
            return False
        on_output(data)
        if len(data) < _CHUNK:
            return True


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """The signals that came in meanwhile, in order; the old handlers are put back. Only the main thread may."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.signal(number, note) for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
