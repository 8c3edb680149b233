"""tune: the best configuration under a memory budget, found by few and short runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lorapatch
from lorapatch.cli.patching import patch_options, patch_settings
from lorapatch.cli.shared import SCRIPT, Size, fail

if TYPE_CHECKING:
    from lorapatch.tune import Preview, Tuning

__all__ = ["tune"]

FOLDER = click.Path(path_type=Path, file_okay=False)
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


class Duration(click.ParamType[float]):
    """A time such as 2h, 30min or 90s, in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value))
        if match is None or match[2] not in _SECONDS:
            self.fail(f"{value!r} is not a time such as 2h, 30min or 90s", param, ctx)
        return float(match[1]) * _SECONDS[match[2]]


class Steps(click.ParamType[tuple[int, ...]]):
    """Numbers of steps with commas between them."""

    name = "steps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"\d+(,\d+)*", str(value)):
            self.fail(f"{value!r} is not a list of steps such as 5,20,50", param, ctx)
        return tuple(int(part) for part in str(value).split(","))


@click.command()
@click.argument("script", type=SCRIPT)
@click.option("--budget", type=Size(), required=True, metavar="24GiB", help="GPU memory (host memory on the CPU).")
@click.option("--prefer", default="speed", metavar="speed|memory|quality", help="What counts among those that fit.")
@click.option("--ladder", default="bytes", metavar="bytes|plan|FILE", help="The rungs and their order, a YAML file.")
@click.option("--model", metavar="FOLDER", help="A smaller language model, as the last rung.")
@click.option("--steps", type=Steps(), default=(5, 20, 50), metavar="5,20,50", help="Lengths of the learning runs.")
@click.option("--max-runs", type=int, default=12, help="Runs at most.")
@click.option("--time-limit", type=Duration(), metavar="2h", help="Time that the runs may take together.")
@click.option("--resume", is_flag=True, help="Go on with the last tuning of this script.")
@click.option("--dry-run", is_flag=True, help="Print the rungs with their predictions, run nothing.")
@click.option("--runs", type=FOLDER, default=Path("lorapatch_runs"), help="Where the runs are kept.")
@click.option("--interval", type=float, default=5.0, help="Seconds between two looks at the memory.")
@click.option("--trainer-root", type=SCRIPT, help="The folder that the trainer's path or imports start from.")
@click.option("--lang", type=click.Choice(["en", "zh"]), default="en", help="Language of the runs' records.")
@patch_options
def tune(
    script: Path,
    budget: int,
    prefer: str,
    ladder: str,
    model: str | None,
    steps: tuple[int, ...],
    max_runs: int,
    time_limit: float | None,
    resume: bool,
    dry_run: bool,
    runs: Path,
    interval: float,
    trainer_root: Path | None,
    lang: str,
    **values: Any,
) -> None:
    """Tune until it fits the budget and learns.

    SCRIPT stays as it is. Its fine-tuning stage is run for a few steps at a time, and the best configuration is written
    beside it as NAME_tuned.sh.
    """
    from lorapatch import tune as tuning
    from lorapatch.run.view import PlainView

    goal = tuning.Goal(budget, prefer, steps, max_runs, time_limit)
    options = tuning.TuneOptions(ladder, model, runs, resume, trainer_root, interval, lang)
    given = any(value not in (None, ()) for value in values.values())
    patch = patch_settings(**values) if given else None
    if dry_run:
        return _print_preview(tuning.preview(script, goal, patch, options), goal.budget_B)
    _report(tuning.tune(script, goal, patch, options, view=PlainView(click.echo)))


def _print_preview(found: Preview, budget_B: int) -> None:
    from lorapatch.tune.fitting import gib

    for note in found.notes:
        click.echo(f"note: {note}")
    click.echo(f"the script's own settings: {found.start.words()}")
    click.echo(f"predicted: {gib(found.expected_B)} of {gib(budget_B)}\n")
    rows = [
        [label, costs, gib(alone), gib(saves) if saves is not None else "n/a", note]
        for label, costs, alone, saves, note in found.rungs
    ]
    rows += [[label, "", "", "", f"closed: {reason}"] for label, reason in found.closed]
    _print_table(["rung", "costs", "with it alone", "saves", ""], rows)
    for item in found.first.skipped:
        click.echo(f"skipped: {item.configuration.unlike(found.start)}: {item.reason}")
    what = found.first.configuration
    if what is None:
        click.echo(f"\nno run: {found.first.reason}")
    else:
        click.echo(f"\nfirst run: {what.unlike(found.start)}\n    because {found.first.reason}")


def _report(done: Tuning) -> None:
    from lorapatch.tune.record import COLUMNS, FILE

    click.echo("")
    _print_table(COLUMNS, done.rows)
    click.echo(f"\n{done.end}: {done.reason}")
    click.echo(f"record: {done.folder / FILE}")
    if done.end in ("limit", "interrupted"):
        more = {"limit": " and a wider limit", "interrupted": ""}[done.end]
        click.echo(f"to go on: the same command with --resume{more}")
    if done.winner is not None:
        click.echo(f"run {done.winner.number} is the one: {done.winner.configuration.words()}\n")
        click.echo(done.diff)
        click.echo(f"written: {done.script}")
    if not done.passed:
        fail(done.reason if done.winner is None else f"it fits, but it was not seen to learn: {done.reason}")
        sys.exit(lorapatch.RunFailed.exit_code)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import ASCII2, SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    live = sys.stdout.isatty()
    console = Console(highlight=False, width=None if live else 240)
    table = Table(*columns, box=SIMPLE if live else ASCII2, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
