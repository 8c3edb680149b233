"""The folder of a run: its log as `tee` would keep it, its numbers, its memory, each line written as it comes."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.run.log import Line
from lorapatch.run.state import LoggedStep
from lorapatch.run.watch import MemorySample

__all__ = ["RUNS", "RunFolder", "make_folder", "read_jsonl"]

RUNS = "lorapatch_runs"
# Of a progress bar, which draws over itself ten times a second, a line is kept this often.
_BAR_EVERY_S = 5.0


def make_folder(runs: Path, kind: str, name: str, now: float | None = None) -> Path:
    """A new folder ``runs``/<time>-<kind>-<name>. Raises Refused."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._")[:60] or "run"
    runs = runs.absolute()
    try:
        for number in range(1, 1000):
            path = runs / (f"{stamp}-{kind}-{plain}" if number == 1 else f"{stamp}-{kind}-{plain}.{number}")
            runs.mkdir(parents=True, exist_ok=True)
            try:
                path.mkdir()
                return path
            except FileExistsError:
                continue
    except OSError as error:
        raise Refused(f"{runs}: the run's folder cannot be made there ({error.strerror})") from error
    raise Refused(f"{runs} holds a thousand runs of this second; remove some")


class RunFolder:
    """``RUNS/<time>-<kind>-<name>`` with log.txt, metrics.jsonl and memory.jsonl. Raises Refused."""

    def __init__(self, runs: Path, kind: str, name: str, now: float | None = None) -> None:
        self.path = make_folder(runs, kind, name, now)
        self._log = (self.path / "log.txt").open("wb")
        self._metrics = (self.path / "metrics.jsonl").open("w", encoding="utf-8")
        self._memory = (self.path / "memory.jsonl").open("w", encoding="utf-8")
        self._bar: bytes | None = None  # the bar's last state, not written yet
        self._shown = b""  # the state that was written last
        self._bar_written = -math.inf

    def write_line(self, line: Line, now: float) -> None:
        """Keep a line of the log; of a bar its last state before anything else, and one every few seconds."""
        if line.progress:
            self._bar = line.raw
            if now - self._bar_written < _BAR_EVERY_S:
                return  # what is drawn next, or the next other line, writes it
            self._write_bar(now)
        else:
            self._write_bar(now)
            self._log.write(line.raw + b"\n")
        self._log.flush()

    def _write_bar(self, now: float) -> None:
        if self._bar is not None and self._bar != self._shown:
            self._log.write(self._bar + b"\n")
            self._shown, self._bar_written = self._bar, now
        self._bar = None

    def write_step(self, step: LoggedStep) -> None:
        """Add a logged step to metrics.jsonl."""
        self._metrics.write(_json(asdict(step)) + "\n")
        self._metrics.flush()

    def rewrite_steps(self, steps: Iterable[LoggedStep]) -> None:
        """Write metrics.jsonl anew, when gaps in it were filled."""
        temporary = self.path / "metrics.jsonl.tmp"
        temporary.write_text("".join(_json(asdict(step)) + "\n" for step in steps), encoding="utf-8")
        os.replace(temporary, self.path / "metrics.jsonl")

    def write_memory(self, sample: MemorySample) -> None:
        """Add a sample to memory.jsonl; called from the watcher's thread."""
        if not self._memory.closed:
            self._memory.write(_json(sample.as_dict()) + "\n")
            self._memory.flush()

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a whole document, at once or not at all."""
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(_json(document, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path / name)

    def close(self, now: float = 0.0) -> None:
        """Write what is left of a bar, and close the files."""
        self._write_bar(now)
        for file in (self._log, self._metrics, self._memory):
            file.close()


def _json(value: Any, indent: int | None = None) -> str:
    """JSON as every reader takes it: NaN and infinity, which JSON has not, become strings."""
    return (
        json.dumps(_plain(value), ensure_ascii=False, indent=indent, allow_nan=False)
        .encode("utf-8", "replace")
        .decode("utf-8")
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; one that was cut off while it was written is left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found
