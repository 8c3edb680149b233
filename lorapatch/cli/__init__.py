"""The command line: parse, call one function, print, exit with its code."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from typing import Any

import click

import lorapatch
from lorapatch.cli.shared import fail
from lorapatch.errors import LorapatchError

__all__ = ["main"]

# Most commands live for a fraction of a second; looking for garbage every 700 objects takes a twentieth of it.
gc.set_threshold(100_000)

# In the order of a run, not of the alphabet. Each is loaded when it is called.
_MODULE_OF = {
    "inspect": "patching",
    "patch": "patching",
    "restore": "patching",
    "check": "checking",
    "doctor": "checking",
    "estimate": "estimating",
    "render": "running",
    "smoke": "running",
    "tune": "tuning",
    "full": "running",
    "verify": "adapters",
    "merge": "adapters",
    "monitor": "running",
    "demo": "running",
}


class _Commands(click.Group):
    """Our errors become one sentence and their exit code; a closed pipe ends quietly, as does a closed output."""

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stdout is None:  # started with >&-
            sys.stdout = open(os.devnull, "w")
        try:
            return super().invoke(ctx)
        except LorapatchError as error:
            fail(str(error))
            ctx.exit(error.exit_code)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("lorapatch"):
                raise
            fail(f'{error.name} is not installed, and {ctx.invoked_subcommand} needs it: pip install "lorapatch[train]"')
            ctx.exit(3)
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(0)
        except OSError as error:  # of the output, as a rule: what touches a script says more
            gone = error.filename is None and isinstance(error, FileNotFoundError)
            what = "the current folder" if gone else error.filename or "standard output"
            fail(f"{what}: {error.strerror or error}")
            sys.stdout = open(os.devnull, "w")  # no second attempt at the end
            ctx.exit(3)
        finally:
            gc.freeze()  # nor is garbage looked for once more, which takes as long again

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULE_OF)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _MODULE_OF.get(cmd_name)
        return None if module is None else getattr(import_module(f"lorapatch.cli.{module}"), cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(lorapatch.__version__, prog_name="lorapatch")
def main() -> None:
    """Turn a full fine-tuning launch script into a LoRA run that fits your GPU, and prove it."""
