"""A run as its user sees it: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from lorapatch.run.state import LoggedStep, RunState
from lorapatch.run.verdict import Verdict
from lorapatch.run.watch import MemorySample

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["LiveView", "PlainView", "View", "clock", "memory_table", "sparkline", "verdict_lines"]

GIB = 1 << 30
_BLOCKS = "▁▂▃▄▅▆▇█"
_BAR = 32


class View(Protocol):
    """What a run shows itself to. Every method returns at once; none may stop the run."""

    def begin(self, title: str, state: RunState, budget_B: int | None) -> None:
        """The run has started; ``state`` is kept up to date by the run."""

    def say(self, sentence: str) -> None:
        """Something that the user should read, before, during or after the run."""

    def step(self, row: LoggedStep) -> None:
        """A step was logged."""

    def memory(self, sample: MemorySample) -> None:
        """Memory was looked at. Called from another thread."""

    def end(self) -> None:
        """The run is over."""


class PlainView:
    """One line for each logged step, with the memory; for files, pipes and continuous integration."""

    def __init__(self, write: Callable[[str], None], every_s: float = 0.0) -> None:
        self._write, self._every_s = write, every_s
        self._state = RunState()
        self._sample: MemorySample | None = None
        self._last = -math.inf

    def begin(self, title: str, state: RunState, budget_B: int | None) -> None:
        self._state = state
        self._write(title)

    def say(self, sentence: str) -> None:
        self._write(sentence)

    def step(self, row: LoggedStep) -> None:
        last_one = self._state.total is not None and row.step >= self._state.total
        if row.time - self._last < self._every_s and not last_one:
            return
        self._last = row.time
        of = f"/{self._state.total}" if self._state.total else ""
        parts = [f"step {row.step}{of}", f"loss {row.loss:.4g}"]
        if row.grad_norm is not None:
            parts.append(f"grad norm {row.grad_norm:.3g}")
        if row.learning_rate is not None:
            parts.append(f"lr {row.learning_rate:.3g}")
        if row.samples_per_s:
            parts.append(f"{row.samples_per_s:.3g} samples/s")
        if self._state.eta_s:
            parts.append(f"{clock(self._state.eta_s)} to go")
        if self._sample is not None:
            parts.append(memory_words(self._sample))
        self._write("  ".join(parts))

    def memory(self, sample: MemorySample) -> None:
        self._sample = sample

    def end(self) -> None:
        pass


def memory_words(sample: MemorySample) -> str:
    """The memory in a line: of each GPU and, where no GPU is or a process was named, of the host."""
    words = [f"GPU {gpu.index} {gpu.used_B / GIB:.2f}/{gpu.total_B / GIB:.1f} GiB" for gpu in sample.gpus]
    if sample.host_rss_B is not None and not words:
        words.append(f"host {sample.host_rss_B / GIB:.2f} GiB")
    elif not words:
        used = sample.ram_total_B - sample.ram_available_B
        words.append(f"RAM {used / GIB:.2f}/{sample.ram_total_B / GIB:.1f} GiB")
    return "  ".join(words)


class LiveView:
    """Steps, loss, speed, memory against the budget and the last log lines, drawn four times a second."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._state = RunState()
        self._title = ""
        self._budget_B: int | None = None
        self._sample: MemorySample | None = None
        self._peaks: dict[str, int] = {}
        self._begun = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._draw)

    def begin(self, title: str, state: RunState, budget_B: int | None) -> None:
        self._title, self._state, self._budget_B = title, state, budget_B
        self._begun = time.monotonic()
        self._live.start()

    def say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False)

    def step(self, row: LoggedStep) -> None:
        pass  # it is in the state

    def memory(self, sample: MemorySample) -> None:
        for name, used in _used(sample):
            self._peaks[name] = max(self._peaks.get(name, 0), used)
        self._sample = sample

    def end(self) -> None:
        self._live.stop()

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.text import Text

        parts: list[RenderableType] = [self._steps(), self._numbers()]
        if self._sample is not None:
            parts.append(memory_table(self._sample, self._budget_B, self._peaks, self._bar_width))
        width = max(20, self._console.width - 4)
        lines = [_plain(line)[:width] for line in list(self._state.tail)[-_log_lines(self._console.height) :]]
        parts += [
            Text(),
            Text("\n".join(lines) or "the trainer is starting …", style="dim", no_wrap=True, overflow="crop"),
        ]
        passed = clock(time.monotonic() - self._begun)
        return Panel(
            Group(*parts),
            title=f"[bold]{_escape(self._title)}[/]",
            title_align="left",
            subtitle=f"{passed} · Ctrl-C ends it",
            subtitle_align="right",
            border_style="blue",
            padding=(0, 1),
        )

    @property
    def _bar_width(self) -> int:
        return max(8, min(_BAR, self._console.width - 50))

    def _steps(self) -> Text:
        from rich.text import Text

        state = self._state
        text = Text(f"{'step':8}", style="bold")
        text.append_text(_bar(state.step, state.total or 0, "cyan", self._bar_width))
        text.append(f"  {state.step}" + (f" of {state.total}" if state.total else ""), style="bold cyan")
        parts = []
        if state.steps_per_s:
            slow = state.steps_per_s < 1
            parts.append(f"{1 / state.steps_per_s:.2f} s a step" if slow else f"{state.steps_per_s:.2f} steps/s")
        if state.eta_s is not None:
            parts.append(f"{clock(state.eta_s)} to go")
        return self._with(text, parts)

    def _with(self, text: Text, parts: Sequence[str]) -> Text:
        """``text`` and as many of the parts as fit beside it."""
        for part in parts:
            if len(text) + len(part) + 3 <= self._console.width - 4:
                text.append(f"   {part}", style="not bold")
        return text

    def _numbers(self) -> Text:
        from rich.text import Text

        text = Text(f"{'loss':8}", style="bold")
        losses = self._state.losses
        if not losses:
            return text.append("–", style="dim")
        row = self._state.logged[-1]
        width = self._bar_width
        text.append(f"{sparkline(losses, width):{width}}", style="green" if math.isfinite(losses[-1]) else "red")
        text.append(f"  {losses[-1]:.4g}", style="bold green" if math.isfinite(losses[-1]) else "bold red")
        parts = [f"from {losses[0]:.4g}"] if len(losses) > 1 else []
        parts += [
            f"{value:.3g} {name}"
            for value, name in (
                (row.samples_per_s, "samples/s"), (row.grad_norm, "gradient norm"), (row.learning_rate, "learning"
                " rate"),
            )
            if value is not None
        ]  # fmt: skip
        return self._with(text, parts)


def _log_lines(height: int) -> int:
    return min(12, max(3, height - 12))


def _used(sample: MemorySample) -> list[tuple[str, int]]:
    used = [(f"GPU {gpu.index}", gpu.used_B) for gpu in sample.gpus]
    return used if sample.host_rss_B is None else [*used, ("host", sample.host_rss_B)]


def memory_table(
    sample: MemorySample, budget_B: int | None = None, peaks: dict[str, int] | None = None, width: int = _BAR
) -> Table:
    """Bars of the memory of each GPU (against the budget, or the GPU), of the run's processes, and of the machine."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=6, style="bold", no_wrap=True)
    table.add_column(width=width, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    for gpu in sample.gpus:
        limit = min(budget_B or gpu.total_B, gpu.total_B)
        table.add_row(
            *_memory_row(f"GPU {gpu.index}", gpu.used_B, limit, "budget" if budget_B else gpu.name, peaks, width)
        )
    if sample.host_rss_B is not None:
        limit = budget_B if budget_B and not sample.gpus else sample.ram_total_B
        table.add_row(
            *_memory_row("host", sample.host_rss_B, limit, "budget" if limit == budget_B else "RAM", peaks, width)
        )
    used = sample.ram_total_B - sample.ram_available_B
    if sample.host_rss_B is None or sample.ram_available_B < sample.ram_total_B / 10:
        table.add_row(*_memory_row("RAM", used, sample.ram_total_B, "of the machine", None, width))
    return table


def _memory_row(
    name: str, used: int, limit: int, of: str, peaks: dict[str, int] | None, width: int
) -> tuple[str, Text, str, str]:
    share = used / limit if limit else 0
    colour = "red" if share > 0.97 else "yellow" if share > 0.85 else "magenta"
    peak = f", peak {peaks[name] / GIB:.2f}" if peaks and name in peaks else ""
    return name, _bar(used, limit, colour, width), f"{used / GIB:.2f} / {limit / GIB:.1f} GiB", f"{of}{peak}"


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict as lines of text in columns: state, what, evidence."""
    width = max((len(line.what) for line in verdict.lines), default=0)
    return [f"{line.state:11}  {line.what:{width}}  {line.evidence}" for line in verdict.lines]


def _bar(done: float, total: float, colour: str, width: int) -> Text:
    from rich.text import Text

    filled = min(width, round(width * done / total)) if total else 0
    text = Text("━" * filled, style=colour)
    return text.append("━" * (width - filled), style="grey30")


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as blocks, at most ``width`` of them (means of neighbours where there are more); NaN as ×."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "×" * len(values)
    low, high = min(finite), max(finite)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(_BLOCKS[round((value - low) * scale)] if math.isfinite(value) else "×" for value in values)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``4:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _plain(line: str) -> str:
    """A log line without what would move the cursor or colour the screen."""
    import re

    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]", "", line.expandtabs(4))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
