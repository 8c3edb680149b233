"""The command line: parse, call one function, print, exit with its code."""

from __future__ import annotations

import sys
from typing import Any

import click

import lorapatch
from lorapatch.cli.adapters import merge, verify
from lorapatch.cli.checking import check, doctor
from lorapatch.cli.patching import inspect, patch, restore
from lorapatch.cli.running import demo, full, monitor, render, smoke
from lorapatch.cli.shared import fail
from lorapatch.errors import LorapatchError

__all__ = ["main"]


class _Commands(click.Group):
    """Our errors become one sentence and their exit code; a closed pipe ends quietly."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LorapatchError as error:
            fail(str(error))
            ctx.exit(error.exit_code)
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(0)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of a run, not of the alphabet


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lorapatch.__version__, prog_name="lorapatch")
def main() -> None:
    """Turn a full fine-tuning launch script into a LoRA run that fits your GPU, and prove it."""


for _command in (inspect, patch, restore, check, doctor, render, smoke, full, verify, merge, monitor, demo):
    main.add_command(_command)
