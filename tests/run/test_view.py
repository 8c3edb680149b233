"""What a run shows: plain lines that say all of it, and a panel that fits its terminal."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from lorapatch.run.gpus import Gpu
from lorapatch.run.state import LoggedStep, RunState
from lorapatch.run.verdict import Line, Verdict
from lorapatch.run.view import LiveView, PlainView, clock, memory_table, memory_words, sparkline, verdict_lines
from lorapatch.run.watch import MemorySample

GIB = 1 << 30
GPU = MemorySample(0, (Gpu(0, "RTX 4090", 14 * GIB, 24 * GIB),), 3 * GIB, 60 * GIB, 64 * GIB, 5)
HOST = MemorySample(0, (), 3 * GIB, 4 * GIB, 64 * GIB, 5)


def state(steps: int = 3) -> RunState:
    found = RunState(step=steps, total=5, eta_s=61, steps_per_s=0.5)
    for step in range(1, steps + 1):
        found.logged.append(LoggedStep(step, 1, step, 3 - step / 2, 1.25, 2e-4, 0.1, 12.5))
    found.tail.extend(["first line", "\x1b[31mred\x1b[0m [bold]kept[/bold]", "x" * 500])
    return found


def test_plain_lines_say_step_loss_speed_and_memory() -> None:
    written: list[str] = []
    view = PlainView(written.append)
    view.begin("smoke · train.sh", state(), None)
    view.step(state().logged[0])
    view.memory(GPU)
    view.step(state().logged[2])
    view.memory(HOST)
    view.step(state().logged[2])
    view.end()
    assert written == [
        "smoke · train.sh",
        "step 1/5  loss 2.5  grad norm 1.25  lr 0.0002  12.5 samples/s  1:01 to go",
        "step 3/5  loss 1.5  grad norm 1.25  lr 0.0002  12.5 samples/s  1:01 to go  GPU 0 14.00/24.0 GiB",
        "step 3/5  loss 1.5  grad norm 1.25  lr 0.0002  12.5 samples/s  1:01 to go  host 3.00 GiB",
    ]


def test_plain_lines_of_a_long_run_are_one_in_a_while_and_the_last() -> None:
    written: list[str] = []
    view = PlainView(written.append, every_s=10)
    view.begin("", RunState(total=100), None)
    for step in range(1, 101):
        view.step(LoggedStep(float(step), 1, step, 2.0))
    assert [line.split()[1] for line in written[1:]] == [
        f"{step}/100" for step in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100)
    ]


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (60, 12)])
def test_the_panel_fits_its_terminal_and_shows_steps_loss_memory_and_log(width: int, height: int) -> None:
    output = io.StringIO()
    console = Console(file=output, width=width, height=height, force_terminal=True, color_system=None)
    view = LiveView(console)
    view.begin("smoke · train [x].sh", state(), 16 * GIB)
    view.memory(GPU)
    view.end()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert max(len(line) for line in shown.replace("\r", "\n").splitlines()) <= width
    always = ("smoke · train [x].sh", "3 of 5", "1.5", "14.00 / 16.0 GiB", "[bold]kept[/bold]")
    where_it_fits = ("2.00 s a step", "from 2.5") if width >= 80 else ()
    for expected in (*always, *where_it_fits):
        assert expected in shown, expected
    assert "\x1b[31m" not in output.getvalue()


def test_the_panel_is_there_before_anything_is_known() -> None:
    output = io.StringIO()
    view = LiveView(Console(file=output, width=80, force_terminal=True, color_system=None))
    view.begin("full · x.sh", RunState(), None)
    view.say("note: something")
    view.end()
    assert "the trainer is starting" in output.getvalue() and "note: something" in output.getvalue()


def rows(sample: MemorySample, budget_B: int | None = None) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=100, color_system=None).print(memory_table(sample, budget_B, {"GPU 0": 15 * GIB}))
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_memory_is_shown_against_the_budget_or_what_there_is() -> None:
    assert "14.00 / 24.0 GiB  RTX 4090, peak 15.00" in rows(GPU)[0]
    assert "14.00 / 16.0 GiB  budget, peak 15.00" in rows(GPU, 16 * GIB)[0]
    assert "3.00 / 64.0 GiB  RAM" in rows(GPU)[1]
    assert "3.00 / 4.0 GiB  budget" in rows(HOST, 4 * GIB)[0]
    assert rows(HOST)[1].startswith("RAM") and "60.00 / 64.0 GiB" in rows(HOST)[1]  # nearly full: worth a word
    alone = MemorySample(0, (), None, 60 * GIB, 64 * GIB, 0)
    assert len(rows(alone)) == 1 and "4.00 / 64.0 GiB  of the machine" in rows(alone)[0]


def test_memory_in_words_is_of_what_was_asked_for() -> None:
    assert memory_words(GPU) == "GPU 0 14.00/24.0 GiB" and memory_words(HOST) == "host 3.00 GiB"
    assert memory_words(MemorySample(0, (), None, 60 * GIB, 64 * GIB, 0)) == "RAM 4.00/64.0 GiB"


def test_sparklines_show_the_course_in_the_width_there_is() -> None:
    assert sparkline([1, 2, 3], 10) == "▁▅█" or sparkline([1, 2, 3], 10) == "▁▄█"
    assert sparkline([5, 5], 10) == "▁▁"
    assert sparkline([1, math.nan, 3], 10) == "▁×█" and sparkline([math.inf], 9) == "×"
    assert len(sparkline(list(range(1000)), 32)) == 32 and sparkline(list(range(1000)), 32)[-1] == "█"


def test_times_are_read_at_a_glance() -> None:
    assert [clock(value) for value in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_a_verdict_stands_in_columns() -> None:
    verdict = Verdict((Line("ran", "pass", "step 5"), Line("the loss", "not checked", "none")))
    assert verdict_lines(verdict) == ["pass         ran       step 5", "not checked  the loss  none"]
