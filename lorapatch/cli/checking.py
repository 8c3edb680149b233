"""check, doctor: what would go wrong, before anything runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from lorapatch.cli.shared import ROOT, SCRIPT

__all__ = ["check", "doctor"]


@click.command()
@click.argument("scripts", nargs=-1, type=SCRIPT, metavar="SCRIPT...")
@click.option("--select", multiple=True, metavar="ID", help="Only these rules (ids or their beginnings).")
@click.option("--ignore", multiple=True, metavar="ID", help="Not these rules.")
@click.option("--trainer-root", type=ROOT, help="The folder that the trainer's path or imports start from.")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option("--format", "style", type=click.Choice(["text", "json", "github", "sarif"]), default="text")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option("--list", "list_rules", is_flag=True, help="List the rules and exit.")
def check(
    scripts: tuple[Path, ...],
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    trainer_root: Path | None,
    strict: bool,
    style: str,
    as_json: bool,
    list_rules: bool,
) -> None:
    """Find what would go wrong before it runs."""
    from lorapatch.lora import lint

    if list_rules:
        click.echo(lint.rule_list())
        return
    if not scripts:
        raise click.UsageError("Missing argument 'SCRIPT...'.")
    roots = () if trainer_root is None else (trainer_root,)
    options = lint.CheckOptions(select=select, ignore=ignore, roots=roots, bf16=_gpus_have_bf16())
    found = lint.check_scripts(scripts, options)
    formats = {"json": lint.as_json, "github": lint.as_github, "sarif": lint.as_sarif}
    formatted = formats.get("json" if as_json else style)
    text = lint.as_text(found, len(scripts)) if formatted is None else formatted(found)
    if text:
        click.echo(text)
    sys.exit(lint.exit_code(found, strict=strict))


def _gpus_have_bf16() -> bool | None:
    """Whether every GPU of this machine does; None where none can be asked."""
    from lorapatch.run.gpus import Gpus

    gpus = Gpus()
    answers = [gpus.supports_bf16(index) for index in range(len(gpus))]
    gpus.close()
    return all(answer is not False for answer in answers) if answers else None


@click.command()
@click.option("--python", metavar="PROGRAM", help="The interpreter to examine.")
@click.option("--script", type=SCRIPT, help="Examine the interpreter that this script runs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(python: str | None, script: Path | None, as_json: bool) -> None:
    """Say what works on this machine."""
    from lorapatch.run.doctor import examine

    findings = examine(python=python, script_python=None if script is None else _interpreter_of(script))
    if as_json:
        click.echo(json.dumps({"schema": 1, "findings": [finding.as_dict() for finding in findings]}, indent=1))
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for finding in findings:
            click.echo(f"{click.style(f'{finding.state:4}', fg=colours[finding.state])}  {finding.sentence}")
            if finding.remedy:
                click.echo(f"      {click.style(finding.remedy, dim=True)}")
    sys.exit(int(any(finding.state == "fail" for finding in findings)))


def _interpreter_of(script: Path) -> str | None:
    """The interpreter that the script's training launch names; None if it names none."""
    import lorapatch

    for launch in lorapatch.read_script(script).launches:
        if launch.stage.training:
            first = launch.launcher_words[0]
            if first.value and "python" in first.value.rsplit("/", 1)[-1]:
                return first.value
    return None
