"""inspect, patch, restore: reading a script and changing it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import lorapatch
from lorapatch.cli.shared import ROOT, SCRIPT, fail, pairs
from lorapatch.errors import LorapatchError

if TYPE_CHECKING:
    from lorapatch.launch.model import Script
    from lorapatch.lora.flags import PatchOptions
    from lorapatch.lora.patch import Patched

__all__ = ["inspect", "patch", "patch_options", "patch_settings", "restore"]


@click.command()
@click.argument("script", type=SCRIPT)
@click.option(
    "--set-env", "set_env", multiple=True, metavar="NAME=VALUE", help="A value the script will find in its environment."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(script: Path, set_env: tuple[str, ...], as_json: bool) -> None:
    """Show what a script launches, and why."""
    found = lorapatch.read_script(script, dict(pairs(set_env, "--set-env")))
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
    else:
        _print_script(script, found)


def _print_script(path: Path, script: Script) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lorapatch.launch.describe import oddities

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)  # piped: one line a flag
    count = len(script.launches)
    console.print(f"{escape(str(path))}: {count} launch{'' if count == 1 else 'es'}")
    for launch in script.launches:
        stage = launch.stage.name or "unknown stage"
        console.print(
            f"\n[bold]{launch.number}[/] line {launch.line}: {launch.launcher} "
            f"[bold]{escape(launch.trainer.name.rsplit('/', 1)[-1])}[/] — [bold]{stage}[/]"
            f"{'' if launch.stage.training else ' (does not train)'}"
        )
        for reason in launch.stage.reasons:
            console.print(f"    because {escape(reason)}")
        if launch.context:
            console.print(f"    inside {' › '.join(launch.context)}")
        if not launch.stage.training or not launch.flags:
            continue
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 4), show_header=True, header_style="dim")
        table.add_column("line", justify="right")
        table.add_column("flag", no_wrap=True)
        table.add_column("value", overflow="fold")
        for flag in launch.flags:
            unresolved = next((word.reason for word in flag.values if word.value is None), "")
            value = flag.value if flag.value is not None else f"{flag.text}  (unresolved: {unresolved})"
            style = "green" if "lora" in flag.name else ""
            table.add_row(str(flag.line), escape(flag.name), escape(value), style=style)
        console.print(table)
    for sentence in oddities(script):
        console.print(f"\n[yellow]odd[/] {escape(sentence)}")


def patch_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what to patch."""
    for option in reversed(
        [
            click.option(
                "--preset",
                type=click.Choice(["conservative", "aggressive", "expressive"]),
                help="A LoRA configuration.",
            ),
            click.option("--r", type=int, help="Rank."),
            click.option("--alpha", type=int, help="Scale of the update is alpha / r."),
            click.option("--dropout", type=float, help="LoRA dropout."),
            click.option("--bias", type=click.Choice(["none", "all", "lora_only"]), help="Which biases are trained."),
            click.option("--target-modules", metavar="A,B", help="Modules that get LoRA, or all-linear."),
            click.option("--bits", type=int, help="16, 8 or 4: how the frozen weights are kept."),
            click.option("--learning-rate", type=float, help="LoRA wants about ten times that of full tuning."),
            click.option(
                "--set", "settings", multiple=True, metavar="FLAG=VALUE", help="Any other flag of the trainer."
            ),
            click.option("--stage", metavar="N|NAME", help="Which launch, as inspect numbers them."),
        ]
    ):
        command = option(command)
    return command


def patch_settings(settings: tuple[str, ...], **values: Any) -> PatchOptions:
    return lorapatch.PatchOptions(extra=dict(pairs(settings, "--set")), **values)


@click.command()
@click.argument("scripts", nargs=-1, required=True, type=SCRIPT, metavar="SCRIPT...")
@patch_options
@click.option(
    "--mode",
    type=click.Choice(["auto", "flags"]),
    default="auto",
    help="auto reads the trainer's Python and sets the flags that it takes; flags sets the usual ones unread.",
)
@click.option("--trainer-root", type=ROOT, help="The folder that the trainer's path or imports start from.")
@click.option("--with-merge", is_flag=True, help="Merge the adapter behind the launch, for the stages below it.")
@click.option("--diff", is_flag=True, help="Show the change, write nothing.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if something would change.")
@click.option("-o", "--output", type=SCRIPT, help="Write the patched script here instead.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def patch(
    scripts: tuple[Path, ...],
    mode: str,
    trainer_root: Path | None,
    with_merge: bool,
    diff: bool,
    check: bool,
    output: Path | None,
    as_json: bool,
    settings: tuple[str, ...],
    **values: Any,
) -> None:
    """Give the fine-tuning launch its LoRA flags."""
    if output is not None and len(scripts) > 1:
        raise click.UsageError("-o takes one script")
    options = patch_settings(settings, **values)
    exit_code, changes, reports = 0, False, []
    for script in scripts:
        try:
            done = lorapatch.patch_script(
                script,
                options,
                output=output,
                dry_run=diff or check,
                read_trainer=mode == "auto",
                trainer_root=trainer_root,
                with_merge=with_merge,
            )
        except LorapatchError as error:
            exit_code = max(exit_code, error.exit_code)
            reports.append({"script": str(script), "refused": str(error)})
            fail(str(error))
            continue
        changes = changes or done.patch.changed
        reports.append(_patch_report(script, done))
        if not as_json:
            _print_patch(script, done, diff)
    if as_json:
        click.echo(json.dumps({"schema": 1, "scripts": reports}, indent=1, ensure_ascii=False))
    sys.exit(exit_code or int(check and changes))


def _patch_report(script: Path, done: Patched) -> dict[str, Any]:
    patch = done.patch
    return {
        "script": str(script),
        "launch": {"number": patch.launch.number, "line": patch.launch.line, "stage": patch.launch.stage.name},
        "changed": patch.changed,
        "settings": [
            {"flag": setting.flag, "before": setting.before, "after": setting.after, "line": setting.line}
            for setting in patch.settings
        ],
        "written": None if done.written is None else str(done.written),
        "backup": None if done.backup is None else str(done.backup),
        "notes": list(patch.notes),
    }


def _print_patch(script: Path, done: Patched, diff: bool) -> None:
    for note in done.patch.notes:
        click.echo(f"{script}: note: {note}", err=True)
    if diff:
        _print_diff(script, done)
        return
    launch = done.patch.launch
    where = f"the {launch.stage.name} launch on line {launch.line}"
    if not done.patch.changed:
        click.echo(f"{script}: nothing to do, {where} has its LoRA flags")
    elif done.written is None:
        click.echo(f"{script}: would be patched, {where}")
    else:
        backup = "" if done.backup is None else f" (backup: {done.backup.name})"
        click.echo(f"{done.written}: patched {where}{backup}")
    for setting in done.patch.settings:
        was = "" if setting.before is None else f"   (was {setting.before})"
        click.echo(f"    {setting.flag} {setting.after}{was}")


def _print_diff(script: Path, done: Patched) -> None:
    from difflib import diff_bytes, unified_diff

    old, new = (text.splitlines(keepends=True) for text in (done.patch.script.source, done.patch.text))
    name = str(script).encode("utf-8", "surrogateescape")
    colours = {b"+": "green", b"-": "red", b"@": "cyan"}
    for line in diff_bytes(unified_diff, old, new, name, name + b" (patched)"):
        if sys.stdout.isatty():
            click.secho(line.rstrip(b"\n").decode("utf-8", "replace"), fg=colours.get(line[:1]))
        else:
            end = b"" if line.endswith(b"\n") else b"\n\\ No newline at end of file\n"
            click.echo(line + end, nl=False)


@click.command()
@click.argument("script", type=SCRIPT)
@click.option(
    "--force", is_flag=True, help="Restore a script that was edited since; the edited one is kept as a backup."
)
def restore(script: Path, force: bool) -> None:
    """Give a script its original bytes back."""
    kept = lorapatch.restore(script, force=force)
    click.echo(f"{script}: restored" + (f" (the edited one is kept as {kept.name})" if kept else ""))
