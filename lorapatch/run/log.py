"""What a training's output says: bytes in, events out, whatever library printed them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Announcement", "Event", "Line", "LogParser", "Metrics", "Progress", "Spawned", "Traceback"]

# A line longer than this is cut, so that output without a newline never fills the memory.
LONGEST_LINE = 1 << 16


@dataclass(frozen=True)
class Line:
    """A line of output as it stands, without its end; ``progress`` if a bar drew it and will draw over it."""

    raw: bytes
    progress: bool = False

    @property
    def text(self) -> str:
        """The line as text; bytes that are no UTF-8 become U+FFFD."""
        return self.raw.decode("utf-8", "replace")


@dataclass(frozen=True)
class Progress:
    """A tqdm bar: steps done and in all, seconds so far and to go, steps a second."""

    name: str
    step: int
    total: int
    elapsed_s: float | None
    eta_s: float | None
    steps_per_s: float | None


@dataclass(frozen=True)
class Metrics:
    """Numbers that were logged together; ``step`` only where the line itself names it. NaN and infinity are kept."""

    values: dict[str, float]
    step: int | None = None


@dataclass(frozen=True)
class Announcement:
    """A JSON line of one of our own trainers, or the same facts read from another's: ``kind`` is "lora" or "speed"."""

    kind: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Spawned:
    """A process that a launcher said it started: its id and its argv."""

    pid: int
    argv: list[str]


@dataclass(frozen=True)
class Traceback:
    """A Python traceback: the error's type and message, and its lines; ``rank`` where the lines name it."""

    error: str
    message: str
    lines: list[str]
    rank: int | None = None


Event = Line | Progress | Metrics | Announcement | Spawned | Traceback

_END = re.compile(rb"\r\n|\n|\r")
_BAR = re.compile(
    r"(?:(?P<name>[^|\r\n%]{0,200}?):\s*)?(?P<percent>\d{1,3})%\|[^|\r\n]{0,400}\|\s*(?P<step>\d{1,15})/(?P<total>\d{1,15})\s*"
    r"\[(?P<elapsed>[\d:?]{1,15})<(?P<eta>[\d:?]{1,15})(?:"
    r" days?)?,\s*(?P<rate>[\d.?]+)\s*(?P<unit>[^\s/\],]*/[^\s\],]*)(?P<more>[^\]\r\n]*)\]?"
)
_DICT = re.compile(r"\{['\"][^{}]{1,8000}\}")
_VALUE = r"(?:'(?P<single>[^']*)'|\"(?P<double>[^\"]*)\"|tensor\((?P<tensor>[^()]*)\)|(?P<plain>[^,{}\[\]()'\"]+))"
_PAIR = re.compile(r"['\"](?P<key>[\w./ -]{1,100})['\"]\s*:\s*" + _VALUE)
_POSTFIX = re.compile(r"(?P<key>[A-Za-z_]\w*)=(?P<value>[-+.\w]+)")
_PEFT = re.compile(r"trainable params: (\d[\d,]{0,20}) \|\| all params: (\d[\d,]{0,20})")
_DS_STEP = re.compile(r"\bstep=(?P<step>\d{1,15}), skipped=(?P<skipped>\d{1,15}), lr=\[(?P<lr>[^\],]+)")
_DS_SPEED = re.compile(
    r"global_step=(?P<step>\d{1,15}), RunningAvgSamplesPerSec=[\d.]+, CurrSamplesPerSec=(?P<rate>[\d.]+)"
)
_SPAWNED = re.compile(r"process (?P<pid>\d{1,9}) spawned with command: (?P<argv>\[.*\])\s*$")
_RANK = re.compile(r"^\s*\[(?:default|rank)?(?P<rank>\d{1,6})\]:\s?")
_TRACEBACK = "Traceback (most recent call last):"
_ERROR = re.compile(r"^(?P<error>[A-Za-z_][\w.]*)(?::\s?(?P<message>.*))?$")


class LogParser:
    """Feed it bytes as they come; how they are cut does not change what it finds. It never raises on any input."""

    def __init__(self) -> None:
        self._pending = b""
        self._tracebacks: dict[int | None, _OpenTraceback] = {}

    def feed(self, data: bytes) -> Iterator[Event]:
        """The events of the lines that ``data`` completes."""
        self._pending += data
        start = 0
        for end in _END.finditer(self._pending):
            if end[0] == b"\r" and end.end() == len(self._pending):
                break  # a line feed may follow
            yield from self._line(self._pending[start : end.start()], progress=end[0] == b"\r")
            start = end.end()
        self._pending = self._pending[start:]
        while len(self._pending) > LONGEST_LINE + 1:  # one more, the last byte may be a carriage return
            yield from self._line(self._pending[:LONGEST_LINE], progress=False)
            self._pending = self._pending[LONGEST_LINE:]

    def close(self) -> Iterator[Event]:
        """The events of what is left when the output has ended."""
        if self._pending:
            text, self._pending = self._pending, b""
            yield from self._line(text.removesuffix(b"\r"), progress=text.endswith(b"\r"))
        for traceback in self._tracebacks.values():
            yield traceback.cut_off()
        self._tracebacks.clear()

    def _line(self, raw: bytes, progress: bool) -> Iterator[Event]:
        for start in range(0, max(len(raw), 1), LONGEST_LINE):
            line = Line(raw[start : start + LONGEST_LINE], progress and start + LONGEST_LINE >= len(raw))
            text = line.text
            if text.strip() or not line.progress:  # a bar is wiped with blanks
                yield line
            yield from self._traceback(text)
            yield from _read(text)

    def _traceback(self, text: str) -> Iterator[Event]:
        rank_mark = _RANK.match(text)
        rank = int(rank_mark["rank"]) if rank_mark else None
        body = text[rank_mark.end() :] if rank_mark else text
        if body.rstrip().endswith(_TRACEBACK):
            # A second one for the same rank is the error during whose handling the next arose: the last one counts.
            self._tracebacks[rank] = _OpenTraceback(rank)
        elif rank in self._tracebacks:
            finished = self._tracebacks[rank].add(body)
            if finished:
                del self._tracebacks[rank]
                yield finished


@dataclass
class _OpenTraceback:
    """A traceback whose last line has not come yet."""

    rank: int | None
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> Traceback | None:
        if len(self.lines) > 2000:
            return self.cut_off()
        self.lines.append(line)
        if not line or line[0].isspace() or "%|" in line:
            return None
        found = _ERROR.match(line)
        if found is None:
            return None  # another rank's line, or a bar, in between
        return Traceback(found["error"], found["message"] or "", self.lines, self.rank)

    def cut_off(self) -> Traceback:
        return Traceback("", "", self.lines, self.rank)


def _read(text: str) -> Iterator[Event]:
    """What one line says besides being a line; a line may hold a bar and a log entry, or two entries."""
    if "%|" in text:
        for bar in _BAR.finditer(text):
            yield from _read_bar(bar)
    if "{" in text:
        yield from _read_entries(text)
    if "trainable params" in text and (counts := _PEFT.search(text)):
        trainable, total = (int(number.replace(",", "")) for number in counts.groups())
        yield Announcement("trainable", {"trainable": trainable, "total": total})
    if "step=" in text:
        if (entry := _DS_STEP.search(text)) and (rate := _number(entry["lr"])) is not None:
            yield Metrics({"learning_rate": rate, "skipped_steps": float(entry["skipped"])}, int(entry["step"]))
        if (entry := _DS_SPEED.search(text)) and (rate := _number(entry["rate"])) is not None:
            yield Metrics({"samples_per_s": rate}, int(entry["step"]))
    if "spawned with command" in text:
        spawned = _SPAWNED.search(text)
        if spawned and (argv := _string_list(spawned["argv"])):
            yield Spawned(int(spawned["pid"]), argv)


def _read_bar(bar: re.Match[str]) -> Iterator[Event]:
    rate = _number(bar["rate"])
    if rate is not None and bar["unit"].startswith("s/"):
        rate = 1 / rate if rate else None
    step, total = int(bar["step"]), int(bar["total"])
    name = (bar["name"] or "").strip()
    yield Progress(name, step, total, _clock(bar["elapsed"]), _clock(bar["eta"]), rate)
    postfix = {
        pair["key"]: number for pair in _POSTFIX.finditer(bar["more"]) if (number := _number(pair["value"])) is not None
    }
    if "loss" in postfix:
        yield Metrics(postfix, step)


def _read_entries(text: str) -> Iterator[Event]:
    """Log entries: our JSON lines, anybody's JSON with a loss, and Python dictionaries as Trainer prints them."""
    start = text.find("{")
    try:
        document, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and isinstance(document.get("lorapatch"), str):
        kind = document["lorapatch"]
        yield Announcement(kind, {key: value for key, value in document.items() if key != "lorapatch"})
        return
    for entry in _DICT.finditer(text, start):
        values = {}
        for pair in _PAIR.finditer(entry[0]):
            shown = pair["single"] or pair["double"] or pair["tensor"] or pair["plain"] or ""
            number = _number(shown.split(",")[0])  # tensor(23.4, device='cuda:0')
            if number is not None:
                values[pair["key"].strip()] = number
        if any("loss" in key for key in values) or "train_runtime" in values or "grad_norm" in values:
            step = values.pop("step", None) if "step" in values else values.pop("global_step", None)
            known = step is not None and math.isfinite(step)
            yield Metrics(values, int(step) if known and step is not None else None)


def _number(text: str) -> float | None:
    try:
        return float(text.strip())
    except ValueError:
        return None


def _clock(text: str) -> float | None:
    """Seconds of tqdm's ``12:34`` or ``1:02:03``; None for ``?``."""
    parts = text.split(":")
    if not all(part.isdigit() for part in parts):
        return None
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return float(seconds)


def _string_list(text: str) -> list[str] | None:
    import ast

    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
