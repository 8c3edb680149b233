"""One run: the script executed, its log read and kept, its memory watched, everything shown as it happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapatch.run.execute import Outcome, execute
from lorapatch.run.folder import RunFolder
from lorapatch.run.log import Event, Line, LogParser
from lorapatch.run.output import Output, trainer_states
from lorapatch.run.processes import Process
from lorapatch.run.state import RunState
from lorapatch.run.view import View
from lorapatch.run.watch import MemorySample, Peaks, SeenProcess, Watcher

__all__ = ["Session", "read_log", "run_session"]

# Of a long log, what a diagnosis looks at: its beginning and its end.
_HEAD, _TAIL = 1 << 18, 1 << 20


@dataclass(frozen=True)
class Session:
    """A run that has ended: how, what its log said, what it used, which processes it had."""

    outcome: Outcome
    state: RunState
    peaks: Peaks
    seen: tuple[SeenProcess, ...]
    driver: str | None


def run_session(
    command: Sequence[str],
    folder: RunFolder,
    view: View,
    *,
    title: str,
    state: RunState,
    environment: Mapping[str, str],
    samples_per_rank: int | None = None,
    budget_B: int | None = None,
    interval_s: float = 5.0,
    timeout_s: float | None = None,
) -> Session:
    """Run ``command`` in the current directory until it has ended, with all its processes; see `execute` for how.

    ``samples_per_rank`` is what one rank trains on in a step (micro-batch times accumulation); the ranks are counted as
    they are seen. Raises Refused when the program is not there.
    """
    parser = LogParser()
    shown, kept = _Careful(), _Careful()
    watchers: list[Watcher] = []

    def take(events: Sequence[Event]) -> None:
        now = time.time()
        for event in events:
            if isinstance(event, Line):
                kept.call(folder.write_line, event, now)
            row = state.apply(event, now)
            if row is not None:
                kept.call(folder.write_step, row)
                shown.call(view.step, row)

    def on_memory(sample: MemorySample) -> None:
        kept.call(folder.write_memory, sample)
        shown.call(view.memory, sample)
        if watchers and samples_per_rank is not None:
            state.samples_per_step = samples_per_rank * _ranks(watchers[0].seen.values())

    def on_start(root: Process, cookie: str) -> None:
        watchers.append(Watcher(root, cookie, on_memory, interval_s))

    if samples_per_rank is not None:
        state.samples_per_step = samples_per_rank
    shown.call(view.begin, title, state, budget_B)
    try:
        outcome = execute(
            command,
            environment=environment,
            on_output=lambda data: take(list(parser.feed(data))),
            on_start=on_start,
            timeout_s=timeout_s,
        )
        take(list(parser.close()))
    finally:
        for watcher in watchers:
            watcher.stop()
        shown.call(view.end)
        kept.call(folder.close, time.time())
    watcher = watchers[0]
    return Session(outcome, state, watcher.peaks, tuple(watcher.seen.values()), watcher.driver)


class _Careful:
    """A terminal that is closed, a pipe that nobody reads any more or a full disk must not end a training."""

    def __init__(self) -> None:
        self._works = True

    def call(self, function: Callable[..., None], *arguments: object) -> None:
        if self._works:
            try:
                function(*arguments)
            except OSError:
                self._works = False


def _ranks(seen: Any) -> int:
    sizes = [process.environment.get("WORLD_SIZE", "") for process in list(seen)]
    return max((int(size) for size in sizes if size.isdigit()), default=1)


def fill_from_trainer_state(folder: RunFolder, session: Session, output: Output | None, resumed_from: int) -> None:
    """Add to metrics.jsonl what ``trainer_state.json`` knows and the log did not show."""
    history = trainer_states(output) if output is not None else []
    if history and session.state.fill(history, session.outcome.ended, resumed_from):
        folder.rewrite_steps(session.state.logged)


def read_log(path: Path) -> str:
    """The log as text; of a long one its beginning and its end."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size <= _HEAD + _TAIL:
            return file.read().decode("utf-8", "replace")
        head = file.read(_HEAD)
        file.seek(size - _TAIL)
        return (head + b"\n" + file.read()).decode("utf-8", "replace")
