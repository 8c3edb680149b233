"""estimate: the memory of a run before it is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lorapatch
from lorapatch.cli.patching import patch_options, patch_settings
from lorapatch.cli.shared import ROOT, SCRIPT, Size

if TYPE_CHECKING:
    from rich.console import Console

    from lorapatch.memory.calibrate import Calibration
    from lorapatch.memory.history import Past
    from lorapatch.memory.model import Breakdown, Bytes, Estimate, Side

__all__ = ["estimate"]

MIB, GIB = 1 << 20, 1 << 30


class _Names(click.ParamType[list[str]]):
    """Names with commas between them."""

    name = "a,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if isinstance(value, list):
            return value
        return [part.strip() for part in str(value).split(",") if part.strip()]


class _Numbers(click.ParamType[list[int]]):
    """Whole numbers with commas between them."""

    name = "1,2"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(part) for part in str(value).split(",") if part.strip()]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,4,16", param, ctx)


@click.command()
@click.argument("script", type=SCRIPT, required=False)
@patch_options
@click.option("--fast", is_flag=True, help="By arithmetic alone, in a moment; wider bounds.")
@click.option("--budget", type=Size(), metavar="24GiB", help="GPU memory the run may take.")
@click.option("--gpu", metavar="NAME", help="The card meant; without it the one here, else one of 24 GB.")
@click.option("--python", metavar="PATH", help="The interpreter that the run will use: its libraries are traced.")
@click.option("--seq", type=int, help="Tokens of the longest sample; without it the data file tells.")
@click.option("--images", type=int, help="Images of a sample.")
@click.option("--trainer", type=click.Choice(["embedded", "upstream", "transformers"]), help="What the trainer is.")
@click.option("--trainer-root", type=ROOT, help="The folder that the trainer's path or imports start from.")
@click.option("--compare", type=_Names(), metavar="full,lora,qlora", help="A grid of these methods.")
@click.option("--zero", type=_Numbers(), metavar="0,2,3", help="ZeRO stages of the grid; 0 is none.")
@click.option("--batch", type=_Numbers(), metavar="1,4,16", help="Micro-batches of the grid.")
@click.option("--calibrate", is_flag=True, help="Measure what this GPU takes beside tensors, and keep it.")
@click.option("--history", is_flag=True, help="Predicted against measured, of every run so far; later estimates learn.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("lorapatch_runs"), help="Where runs are kept.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def estimate(
    script: Path | None, calibrate: bool, history: bool, runs: Path, as_json: bool, python: str | None, **values: Any
) -> None:
    """Predict the memory of the run that SCRIPT describes, before and after the patch."""
    if calibrate:
        return _calibrate(python, as_json)
    if history:
        return _history(runs, as_json)
    if script is None:
        raise click.UsageError("which script? (or --calibrate, --history)")
    methods, zeros, batches = (values.pop(name) for name in ("compare", "zero", "batch"))
    budget, values["sequence"] = values.pop("budget"), values.pop("seq")
    how = {name: values.pop(name) for name in ("fast", "gpu", "sequence", "images", "trainer", "trainer_root", "stage")}
    # The patch's own --set goes to both sides: a micro-batch is not LoRA's.
    given = any(value not in (None, ()) for name, value in values.items() if name != "settings")
    options = patch_settings(**{**values, "settings": ()}) if given else None
    settings = dict(patch_settings(values["settings"]).extra)
    if methods or zeros or batches:
        return _compare(script, options, as_json, budget, methods=methods or ["full", "lora"], zeros=zeros or (),
                        micro_batches=batches or (), settings=settings, python=python, **how)  # fmt: skip
    found = lorapatch.estimate(script, options, settings=settings, budget_B=budget, python=python, **how)
    if as_json:
        from lorapatch.memory.estimate import estimate_dict

        click.echo(json.dumps(estimate_dict(found), indent=1, ensure_ascii=False))
    else:
        _print(found, budget)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _gib(size: float, unit: int = GIB) -> str:
    return f"{size / unit:.2f}" if size else "–"


def _bounds(bounds: Bytes, unit: int = GIB) -> str:
    return f"{_gib(bounds.expected, unit)} ({_gib(bounds.low, unit)} to {_gib(bounds.high, unit)})"


def _unit(sides: Iterable[Side]) -> tuple[int, str]:
    """GiB, or MiB for a model that is a toy."""
    return (GIB, "GiB") if max(side.allocated.expected for side in sides) >= GIB // 2 else (MIB, "MiB")


def _count(parameters: int) -> str:
    return f"{parameters:,}"


def _print(found: Estimate, budget: int | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from lorapatch.memory.model import CATEGORIES

    sides = [(name, side) for name, side in (("before", found.before), ("after", found.after)) if side]
    console = _console()
    unit, unit_name = _unit(side for _, side in sides)
    ways = ", ".join(dict.fromkeys(side.breakdown.way for _, side in sides))
    what = f"the launch on line {found.line}, memory of one {found.gpu} in {unit_name} ({ways})"
    console.print(f"{escape(f'{found.script}: {what}')}\n")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    table.add_column("")
    for name, side in sides:
        table.add_column(f"{name}: {_method(side)}", justify="right", no_wrap=True)
    for category in CATEGORIES:
        table.add_row(category.replace("_", " "), *(_gib(s.breakdown.categories.get(category, 0), unit) for _, s in sides))
    for name in ("allocated", "reserved", "device"):
        style = "bold" if name == "device" else ""
        table.add_row(_TOTALS[name], *(_bounds(getattr(side, name), unit) for _, side in sides), style=style)
    if any(side.breakdown.host > unit // 100 for _, side in sides):
        table.add_row("host memory, offloaded", *(_gib(side.breakdown.host, unit) for _, side in sides))
    for label, row in _facts(sides):
        table.add_row(label, *(escape(cell) for cell in row))
    table.add_row(*_fits(found, sides, budget))
    console.print(table)
    _print_biggest(console, sides, unit)
    for name, side in sides:
        for line in side.breakdown.advice:
            console.print(f"advice for {name}: {escape(line)}")
    for title, lines in (("assumed", _union(found.notes, (side.breakdown.assumed for _, side in sides))),
                         ("not modelled", _union((), (side.breakdown.not_modelled for _, side in sides)))):  # fmt: skip
        for line in lines:
            console.print(f"[dim]{title}:[/] {escape(line)}")


_TOTALS = {"allocated": "total allocated", "reserved": "reserved", "device": "device, as nvidia-smi shows it"}


def _method(side: Side) -> str:
    setup = side.setup
    lora = setup.lora
    words = {"full": "full", "pretrain": "projector alone", "lora": f"LoRA r {lora.r}" if lora else "LoRA"}[setup.method]
    return f"{words}, {setup.bits} bits" if setup.bits < 16 else words


def _facts(sides: Sequence[tuple[str, Side]]) -> Iterable[tuple[str, list[str]]]:
    breakdowns = [side.breakdown for _, side in sides]
    yield "parameters", [_count(b.total_parameters) for b in breakdowns]
    yield "trainable", [_count(b.trainable_parameters) for b in breakdowns]
    yield "trainable, per cent", [f"{100 * b.trainable_parameters / max(b.total_parameters, 1):.2f}" for b in breakdowns]
    yield "micro-batch, tokens of the longest", [f"{s.setup.micro_batch} × {s.setup.sequence}" for _, s in sides]
    yield "peak in", [_peak(b) for b in breakdowns]


def _peak(breakdown: Breakdown) -> str:
    return f"{breakdown.phase}: {_operation(breakdown.operation)}" if breakdown.operation else breakdown.phase


def _operation(name: str) -> str:
    """An operation of torch without the name of its overload."""
    return name.partition(".")[0]


def _fits(found: Estimate, sides: Sequence[tuple[str, Side]], budget: int | None) -> list[str]:
    assert found.budget is not None
    cells = []
    for name, side in sides:
        if side.device.high <= found.budget:
            cell = "yes"
        elif side.device.expected <= found.budget:
            cell = "likely"
        else:
            cell = "no"
        if name == sides[-1][0] and found.largest_micro_batch is not None:
            most = found.largest_micro_batch
            cell += f", up to micro-batch {most}" if most else ", not even micro-batch 1"
        cells.append(cell)
    return [f"fits {found.budget / GIB:.4g} GiB" + ("" if budget else f" ({found.gpu})"), *cells]


def _print_biggest(console: Console, sides: Sequence[tuple[str, Side]], unit: int) -> None:
    from rich.markup import escape

    for name, side in sides:
        if side.breakdown.biggest:
            console.print(f"\nbiggest tensors {name}:")
        for tensor in side.breakdown.biggest:
            shape = " × ".join(f"{edge:,}" for edge in tensor.shape)
            made = f"{_operation(tensor.operation)}, {tensor.phase}"
            console.print(f"    {_gib(tensor.nbytes, unit):>6}  {tensor.dtype} {shape}  {escape(made)}")
    console.print()


def _union(first: Sequence[str], more: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys([*first, *(line for lines in more for line in lines)]))


def _compare(script: Path, options: Any, as_json: bool, budget: int | None, **how: Any) -> None:
    from rich.table import Table

    from lorapatch.memory.estimate import compare, side_dict

    card, cells = compare(script, options, budget_B=budget, **how)
    budget = budget or card.memory
    if as_json:
        grid = [{"method": method, **side_dict(side)} for method, side in cells]
        click.echo(json.dumps({"schema": 1, "gpu": card.name, "budget_B": budget, "grid": grid}, indent=1))
        return
    console = _console()
    console.print(f"memory of one {card.name} in GiB ({cells[0][1].breakdown.way}), budget {budget / GIB:.4g} GiB\n")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for head in ("method", "ZeRO", "micro-batch", "allocated", "reserved", "device", "fits"):
        table.add_column(head, justify="left" if head in ("method", "fits") else "right", no_wrap=True)
    for method, side in cells:
        zero = side.setup.zero
        fits = "yes" if side.device.high <= budget else "likely" if side.device.expected <= budget else "no"
        table.add_row(
            method, str(zero.stage) if zero else "none", str(side.setup.micro_batch), _gib(side.allocated.expected),
            _gib(side.reserved.expected), _bounds(side.device), fits,
            style={"yes": "green", "no": "red"}.get(fits, "yellow"),
        )  # fmt: skip
    console.print(table)


def _calibrate(python: str | None, as_json: bool) -> None:
    from lorapatch.memory.calibrate import calibrate

    found: Calibration = calibrate(python)
    if as_json:
        click.echo(json.dumps({"schema": 1, **found.as_dict()}, indent=1))
        return
    click.echo(f"{found.gpu}, torch {found.torch}: kept for the estimates to come")
    for name, size in (("CUDA context", found.context), ("NCCL", found.nccl), ("  a further group", found.communicator),
                       ("cuBLAS workspace", found.workspace)):  # fmt: skip
        click.echo(f"    {name:18} {'not measured' if size is None else f'{size / (1 << 20):,.0f} MiB'}")


def _history(runs: Path, as_json: bool) -> None:
    from lorapatch.memory.history import learn, read_history

    past = read_history(runs)
    learned = learn(past)
    if as_json:
        rows = [{**run._asdict(), "error": run.error} for run in past]
        click.echo(json.dumps({"schema": 1, "runs": rows, "corrections": learned}, indent=1))
        return
    if not past:
        click.echo(f"{runs}: no finished run has both a prediction and a measurement of a GPU's memory")
        return
    _print_history(past, learned)


def _print_history(past: Sequence[Past], learned: dict[str, float]) -> None:
    from statistics import mean

    from rich.table import Table

    console = _console()
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for head in ("run", "GPU", "way", "predicted GiB", "measured GiB", "error"):
        table.add_column(head, justify="right" if "GiB" in head or head == "error" else "left", no_wrap=True)
    for run in past:
        table.add_row(run.folder, run.gpu, run.way, _gib(run.predicted), _gib(run.measured), f"{100 * run.error:+.1f} %")
    console.print(table)
    console.print(f"\n{len(past)} run{'s' if len(past) > 1 else ''}, mean error {100 * mean(abs(r.error) for r in past):.1f} %")
    for key, factor in learned.items():
        console.print(f"{key}: device memory is corrected by {factor:.3f} from now on")
