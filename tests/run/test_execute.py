"""A run ends as a whole: by itself, by a signal, by its time limit; nothing of it is left."""
# ruff: noqa: E501 (scripts and logs as they stand)

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.run.execute import Outcome, execute
from lorapatch.run.processes import (
    COOKIE,
    Process,
    argv,
    environment,
    find,
    is_running,
    resident_bytes,
    run_processes,
    tree,
)

# A launcher with two ranks, each with a worker, as DeepSpeed's: the second rank is in a session of its own.
RANKS = r"""
import os, signal, subprocess, sys, time
kind = sys.argv[1]
if kind == "launcher":
    ranks = [subprocess.Popen([sys.executable, __file__, "rank", *sys.argv[2:]], start_new_session=bool(i)) for i in range(2)]
    sys.exit(max(rank.wait() for rank in ranks))
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
elif "polite" in sys.argv:
    def leave(number, frame):
        os.write(1, f"rank saw {signal.Signals(number).name}\n".encode())
        sys.exit(3)
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
os.write(1, f"rank {os.getpid()}\n".encode())
time.sleep(120)
"""


class Run:
    """A run in progress, as a test wants to look at it."""

    def __init__(self) -> None:
        self.output = b""
        self.root: Process | None = None
        self.cookie = ""
        self.seen: list[Process] = []

    def on_output(self, data: bytes) -> None:
        self.output += data

    def on_start(self, root: Process, cookie: str) -> None:
        self.root, self.cookie = root, cookie

    def wait_for(self, text: bytes, count: int = 1) -> None:
        deadline = time.monotonic() + 20
        while self.output.count(text) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.output.count(text) >= count, self.output
        assert self.root is not None
        self.seen = run_processes(self.root, self.cookie)


def run(command: list[str], when: Callable[[Run], None] | None = None, **options: float) -> tuple[Run, Outcome]:
    state = Run()
    if when is not None:
        threading.Thread(target=when, args=(state,), daemon=True).start()
    return state, execute(command, on_output=state.on_output, on_start=state.on_start, **options)


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    (tmp_path / "ranks.py").write_text(RANKS)
    (tmp_path / "train.sh").write_text(
        f'"{sys.executable}" "{tmp_path}/ranks.py" launcher "$@" 2>&1 | tee log.txt\necho after\n'
    )
    return ["bash", "-c", f'cd "{tmp_path}" && exec bash -o pipefail train.sh "$@"', "bash"]


def assert_nothing_is_left(state: Run) -> None:
    assert len(state.seen) >= 4  # bash, the launcher, two ranks, tee
    assert [process for process in state.seen if is_running(process)] == []


def send_to_us(number: int) -> Callable[[Run], None]:
    def when(state: Run) -> None:
        state.wait_for(b"rank", 2)
        os.kill(os.getpid(), number)

    return when


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, b"SIGINT"), (signal.SIGTERM, b"SIGTERM"), (signal.SIGHUP, b"")]
)
def test_a_signal_reaches_every_rank_and_its_last_words_are_kept(launcher: list[str], number: int, name: bytes) -> None:
    state, outcome = run([*launcher, "polite"], send_to_us(number), grace_s=8)
    assert outcome.state == "interrupted" and outcome.reason == signal.Signals(number).name
    assert_nothing_is_left(state)
    if name:
        assert state.output.count(b"rank saw " + name) == 2
        assert outcome.killed == 0
    assert b"after" not in state.output  # the script does not go on to its next command


def test_ranks_that_ignore_every_signal_are_killed_after_the_grace(launcher: list[str]) -> None:
    begun = time.monotonic()
    state, outcome = run([*launcher, "deaf"], send_to_us(signal.SIGTERM), grace_s=1)
    assert outcome.state == "interrupted" and outcome.killed == 2
    assert_nothing_is_left(state)
    assert 1 < time.monotonic() - begun < 10


def test_a_second_signal_does_not_wait_for_the_grace(launcher: list[str]) -> None:
    def twice(state: Run) -> None:
        send_to_us(signal.SIGINT)(state)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    begun = time.monotonic()
    state, outcome = run([*launcher, "deaf"], twice, grace_s=60)
    assert outcome.killed >= 2 and time.monotonic() - begun < 20
    assert_nothing_is_left(state)


def test_the_time_limit_ends_the_run(launcher: list[str]) -> None:
    state, outcome = run([*launcher, "polite"], lambda state: state.wait_for(b"rank", 2), timeout_s=2, grace_s=5)
    assert (outcome.state, outcome.reason) == ("timeout", "2 s")
    assert_nothing_is_left(state)


def test_ranks_are_found_after_their_launcher_and_its_shell_were_killed(launcher: list[str]) -> None:
    def kill_launcher(state: Run) -> None:
        state.wait_for(b"rank", 2)
        for process in state.seen:
            if state.root and process.pid == state.root.pid or "launcher" in argv(process.pid)[2:3]:
                os.kill(process.pid, signal.SIGKILL)

    state, outcome = run([*launcher, "deaf"], kill_launcher, grace_s=1)
    assert (outcome.state, outcome.exit_code) == ("failed", 137)
    assert_nothing_is_left(state)


def test_the_exit_code_and_all_output_come_through() -> None:
    state, outcome = run(["bash", "-c", "seq 100000; echo error >&2; exit 7"])
    assert (outcome.exit_code, outcome.state) == (7, "failed")
    assert state.output == b"".join(b"%d\n" % i for i in range(1, 100001)) + b"error\n"


def test_a_program_that_a_signal_ended_has_the_shells_code() -> None:
    assert run(["bash", "-c", "kill -9 $$"])[1].exit_code == 137


def test_what_writes_the_end_of_a_log_is_waited_for() -> None:
    state, outcome = run(["bash", "-c", "exec > >(sleep 0.3; cat); echo late"])
    assert (state.output, outcome.state) == (b"late\n", "finished")


def test_a_background_process_that_holds_the_output_open_is_ended() -> None:
    begun = time.monotonic()
    state, outcome = run(["bash", "-c", "sleep 100 & echo done"])
    assert (state.output, outcome.state, outcome.killed) == (b"done\n", "finished", 0)
    assert time.monotonic() - begun < 8


def test_a_run_that_closes_its_output_is_still_waited_for() -> None:
    assert run(["bash", "-c", "exec >&- 2>&-; sleep 0.5; exit 4"])[1].exit_code == 4


def test_the_input_is_empty_so_that_nothing_waits_for_it() -> None:
    assert run(["bash", "-c", "read -r x; echo got $?"])[0].output == b"got 1\n"


def test_a_missing_program_is_refused_with_its_name() -> None:
    with pytest.raises(Refused, match="no-such-shell cannot be started"):
        run(["no-such-shell"])


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run(["true"])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_run_works_outside_the_main_thread() -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(run(["bash", "-c", "exit 5"])[1]))
    thread.start()
    thread.join(20)
    assert outcomes[0].exit_code == 5


def test_a_process_is_read_as_it_is() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent("""
            held = b"x" * (64 << 20)
            print("ready", flush=True)
            input()
        """)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, COOKIE: "a b=c"},
    )  # fmt: skip
    try:
        assert child.stdout is not None
        child.stdout.readline()
        process = find(child.pid)
        assert process is not None and process.parent == os.getpid()
        assert argv(child.pid)[0] == sys.executable and environment(child.pid)[COOKIE] == "a b=c"
        assert 64 << 20 < resident_bytes([process]) < 256 << 20
        assert child.pid in [member.pid for member in tree(os.getpid())]
    finally:
        child.kill()
        child.communicate()
    assert find(child.pid) is None and not is_running(process)
    assert (argv(child.pid), environment(child.pid), resident_bytes([process])) == ([], {}, 0)


def test_an_id_that_is_used_again_is_not_ours() -> None:
    here = find(os.getpid())
    assert here is not None
    old = Process(here.pid, here.parent, here.session, here.started - 1, "S", "")
    assert run_processes(old, "no such run") == [] and not is_running(old)


def test_an_error_of_our_own_leaves_nothing_behind(launcher: list[str]) -> None:
    state = Run()

    def fail(data: bytes) -> None:
        state.output += data
        if state.output.count(b"rank") == 2:
            assert state.root is not None
            state.seen = run_processes(state.root, state.cookie)
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        execute([*launcher, "polite"], on_output=fail, on_start=state.on_start, grace_s=5)
    assert_nothing_is_left(state)
