"""demo, render, smoke, full, monitor: a place to run in, and runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lorapatch
from lorapatch.cli.patching import patch_options, patch_settings
from lorapatch.cli.shared import SCRIPT, Size, fail

if TYPE_CHECKING:
    from lorapatch.lora.flags import PatchOptions
    from lorapatch.run.finish import Report
    from lorapatch.run.runs import RunOptions
    from lorapatch.run.view import View

__all__ = ["demo", "full", "monitor", "render", "smoke"]

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.argument("directory", type=FOLDER)
@click.option("--size", type=click.Choice(["tiny", "true"]), default="tiny", help="tiny trains on two CPU cores.")
@click.option("--device", default="cpu", metavar="cpu|cuda", help="Where the true-size weights are made.")
@click.option("--seed", type=int, default=0)
def demo(directory: Path, size: str, device: str, seed: int) -> None:
    """Lay out a miniature toolkit to train in."""
    from lorapatch.demo import make_demo

    live = sys.stderr.isatty()

    def progress(stage: str, done: int, total: int) -> None:
        if live or done >= total:
            start, end = ("\r", "\n" if done >= total else "") if live else ("", "\n")
            click.echo(f"{start}{stage}: {done} of {total}{end}", nl=False, err=True)

    click.echo(str(make_demo(directory, size=size, device=device, seed=seed, progress=progress)))


@click.command()
@click.argument("script", type=SCRIPT)
@click.option(
    "--template", default="test_lora_minimal", metavar="NAME|FILE", help="A template of ours, or a file of yours."
)
@click.option("--max-steps", type=int, help="5 for the test, 1 for the probe.")
@click.option("--save-steps", type=int, help="2 for the test.")
@click.option("--logging-steps", type=int, help="1 for the test.")
@click.option("--hostfile", help="DeepSpeed's hostfile, for several nodes.")
@click.option("--num-gpus", type=int, help="GPUs of each node.")
@click.option("--num-nodes", type=int, default=1, help="Nodes of a Slurm job.")
@click.option("--stage", metavar="N|NAME", help="Which launch, as inspect numbers them.")
@click.option("-o", "--output", type=SCRIPT, help="Where to write it; - for standard output.")
def render(script: Path, template: str, stage: str | None, output: Path | None, **values: Any) -> None:
    """Write a test of the fine-tuning stage alone."""
    from lorapatch.run import render_script

    done = render_script(script, template, stage=stage, target=None if output == Path("-") else output, **values)
    if output == Path("-"):
        click.echo(done.text, nl=False)
        return
    done.write()
    click.echo(f"{done.target}: rendered from {template}")
    for note in done.notes:
        click.echo(f"    note: {note}")


def _run_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how to run."""
    for option in reversed(
        [
            click.option(
                "--budget", type=Size(), metavar="24GiB", help="GPU memory the run may take (host memory on the CPU)."
            ),
            click.option("--interval", type=float, default=5.0, help="Seconds between two looks at the memory."),
            click.option("--timeout", type=float, help="Seconds after which the run is ended."),
            click.option("--runs", type=FOLDER, default=Path("lorapatch_runs"), help="Where the runs are kept."),
            click.option("--hostfile", type=SCRIPT, help="DeepSpeed's hostfile, for several nodes."),
            click.option("--num-gpus", type=int, help="GPUs of each node."),
            click.option(
                "--trainer-root", type=SCRIPT, help="The folder that the trainer's path or imports start from."
            ),
            click.option("--template", metavar="NAME|FILE", help="Another template than the usual one."),
            click.option("--lang", type=click.Choice(["en", "zh"]), default="en", help="Language of the record."),
            click.option(
                "--verify/--no-verify", default=True, help="Load the adapter with its base afterwards, see what it does."
            ),
            click.option("--dry-run", is_flag=True, help="Print the command line of each node, run nothing."),
        ]
    ):
        command = option(command)
    return command


@click.command()
@click.argument("script", type=SCRIPT)
@click.argument("arguments", nargs=-1)
@click.option("--max-steps", type=int, default=5)
@click.option("--save-steps", type=int, default=2)
@click.option("--logging-steps", type=int, default=1)
@_run_options
@patch_options
def smoke(
    script: Path, arguments: tuple[str, ...], max_steps: int, save_steps: int, logging_steps: int, **values: Any
) -> None:
    """Run the fine-tuning stage for a few steps.

    SCRIPT is patched if it has no LoRA, a test is rendered beside it, run, watched and judged. ARGUMENTS are handed to
    the script.
    """
    from lorapatch import run

    options, patch, dry_run = _split(arguments, values)
    if dry_run:
        return _print_nodes(script, options, patch)
    options = _with_prediction(script, options, patch)
    _report(
        run.smoke(
            script,
            patch,
            options,
            view=_view(),
            max_steps=max_steps,
            save_steps=save_steps,
            logging_steps=logging_steps,
        )
    )


@click.command()
@click.argument("script", type=SCRIPT)
@click.argument("arguments", nargs=-1)
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@_run_options
@patch_options
def full(script: Path, arguments: tuple[str, ...], resume: bool, **values: Any) -> None:
    """Run the whole script and judge it.

    SCRIPT is patched if it has no LoRA. ARGUMENTS are handed to the script.
    """
    from lorapatch import run

    options, patch, dry_run = _split(arguments, values)
    if dry_run:
        return _print_nodes(script, options, patch)
    options = _with_prediction(script, options, patch)
    _report(run.full(script, patch, options, view=_view(), resume=resume))


def _split(arguments: tuple[str, ...], values: dict[str, Any]) -> tuple[RunOptions, PatchOptions | None, bool]:
    """The options of the run and, when one of them is given, those of the patch."""
    from lorapatch.run import RunOptions

    dry_run = values.pop("dry_run")
    options = RunOptions(
        runs=values.pop("runs"),
        budget_B=values.pop("budget"),
        interval_s=values.pop("interval"),
        timeout_s=values.pop("timeout"),
        arguments=arguments,
        hostfile=values.pop("hostfile"),
        num_gpus=values.pop("num_gpus"),
        trainer_root=values.pop("trainer_root"),
        template=values.pop("template"),
        language=values.pop("lang"),
        verify=values.pop("verify"),
    )
    given = any(value not in (None, ()) for value in values.values())
    return options, patch_settings(**values) if given else None, dry_run


def _with_prediction(script: Path, options: RunOptions, patch: PatchOptions | None) -> RunOptions:
    """The options with what the run's memory should be, for the record beside what it was; a run never fails for it."""
    from dataclasses import replace

    from lorapatch.memory.estimate import prediction_dict

    try:
        found = lorapatch.estimate(
            script, patch, sides=("after",), trainer_root=options.trainer_root, fast=True, largest=False
        )
        return replace(options, predicted=prediction_dict(found))
    except Exception as error:  # noqa: BLE001 - whatever is odd about the script, running it tells more than guessing
        click.echo(f"note: its memory was not predicted: {error}")
        return options


def _view() -> View:
    from lorapatch.run.view import LiveView, PlainView

    if not sys.stdout.isatty():
        return PlainView(click.echo)
    from rich.console import Console

    return LiveView(Console())


def _print_nodes(script: Path, options: RunOptions, patch: PatchOptions | None) -> None:
    from lorapatch.run import plan_nodes

    for node in plan_nodes(script, options.hostfile, num_gpus=options.num_gpus, patch=patch):
        click.echo(f"# node {node.rank}: {node.host}, GPUs {', '.join(map(str, node.gpus))}")
        click.echo(node.command)


def _report(report: Report) -> None:
    """The verdict, line by line with its evidence, and where everything is; estimates learn from what was measured."""
    from lorapatch.memory.history import learn, read_history

    learn(read_history(report.folder.parent))
    colours = {"pass": "green", "fail": "red"}
    click.echo("")
    for line in report.verdict.lines:
        state = click.style(f"{line.state:11}", fg=colours.get(line.state, "yellow"))
        click.echo(f"{state}  {line.what}: {line.evidence}")
    click.echo(f"\nrun:    {report.folder}\nrecord: {report.markdown}")
    if not report.passed:
        fail(report.sentence)
        sys.exit(lorapatch.RunFailed.exit_code)
    click.echo(click.style("passed", fg="green", bold=True))


@click.command()
@click.option("--interval", type=float, default=5.0, help="Seconds between two looks.")
@click.option("--pid", type=int, help="Only this process and those below it, until it ends.")
def monitor(interval: float, pid: int | None) -> None:
    """Show the memory of a training, live."""
    from lorapatch.run import monitor as samples
    from lorapatch.run.view import memory_table, memory_words

    found = samples(pid, interval)
    try:
        if not sys.stdout.isatty():
            for sample in found:
                click.echo(memory_words(sample))
            return
        from rich.live import Live

        with Live(auto_refresh=False) as live:
            for sample in found:
                live.update(memory_table(sample), refresh=True)
    except KeyboardInterrupt:
        pass
