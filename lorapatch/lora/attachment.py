"""What attach mode asks of a launch: which words it gets, and an interpreter that can import lorapatch."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch, Script
from lorapatch.launch.options import module_option
from lorapatch.lora.flags import PatchOptions

if TYPE_CHECKING:
    from lorapatch.lora.support import TrainerSupport

__all__ = ["attach_words", "check_interpreter", "why_attach"]

_MODULE = "lorapatch.attach"
_NOT_PYTHON = ("no_python", "run_path")


def why_attach(launch: Launch, support: TrainerSupport | None, options: PatchOptions, mode: str) -> str | None:
    """Why the launch has to go through lorapatch.attach, in words; None if the trainer's own flags do.

    ``mode`` is "auto", "flags" or "attach". Raises Refused where neither can make it a LoRA run.
    """
    if launch.attached:
        return "the launch goes through lorapatch.attach already"
    if mode == "flags" or (support is None and mode == "auto"):
        return None
    if support is None:
        return "--mode attach"
    extra = {name.lstrip("-") for name in options.extra}
    own_targets = options.target_modules is not None or "lora_target_modules" in extra
    advice = support.recommend(target_modules=own_targets or mode == "attach")
    if advice.mode is None:
        raise Refused(f"{advice.reason}; this cannot be made a LoRA run")
    if mode == "attach":
        return "--mode attach"
    if advice.mode == "attach":
        return advice.reason
    from lorapatch.attach import FLAGS  # argparse, runpy and more come with it

    ours = sorted(name for name in extra & set(FLAGS) if support.flag(name).state == "unknown")
    return f"{support.trainer} has no flag --{ours[0]}" if ours else None


def attach_words(launch: Launch, *, by_path: bool = False) -> tuple[str, ...]:
    """The words that go before the trainer; none if they stand there.

    ``by_path`` names attach.py by its path, for an interpreter that cannot import lorapatch. Raises Refused for a
    launcher that is told to run something else than Python.
    """
    if launch.attached:
        return ()
    for word in launch.launcher_options:
        if str(word).lstrip("-").replace("-", "_") in _NOT_PYTHON:
            raise Refused(
                f"line {launch.line}: {word.text} runs the trainer without python, so attach mode cannot; take it out"
            )
    if launch.trainer.word.span[0] < 0:
        raise Refused(f"line {launch.line}: the trainer's name is put together from several places; write it in one piece")
    behind = ("-m",) if launch.trainer.module else ()
    if not by_path:
        before = () if launch.trainer.module else (module_option(launch.launcher),)
        return (*before, _MODULE, *behind)
    if launch.trainer.module:
        raise Refused(
            f"line {launch.line}: the launcher is told to run a module, {launch.trainer.name}, so lorapatch cannot be named by"
            " its path; let the launch name the trainer's file, or leave --attach-path out"
        )
    return (str(_folder() / "attach.py"),)


def check_interpreter(script: Script, launch: Launch, environment: Mapping[str, str] | None = None) -> str | None:
    """Raise Refused if the launch's interpreter is known and cannot import lorapatch.attach; a note if it is not known."""
    from lorapatch.lora.lint.facts import LaunchFacts

    unchecked = f"that its interpreter can import lorapatch was not checked ({{}}); if not, {_remedy('python')}"
    if script.activates_environment(launch.start):
        return unchecked.format("the script activates an environment")
    python = LaunchFacts(launch, script.path.parent if script.path else Path.cwd(), ()).python
    if python is None:
        return unchecked.format(f"its {launch.launcher} was not found here")
    env = _environment(script, launch, os.environ if environment is None else environment)
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({_MODULE!r}) is None)"
    try:
        done = subprocess.run([python, "-c", code], env=env, cwd="/", timeout=30, capture_output=True)
    except (OSError, subprocess.TimeoutExpired) as error:
        return unchecked.format(f"{python}: {error}")
    if done.returncode:
        raise Refused(
            f"line {launch.line}: {python} cannot import lorapatch, which attach mode runs there; {_remedy(str(python))}"
        )
    return None


def _remedy(python: str) -> str:
    folder = _folder().parent
    prefix = ""
    if folder.name not in ("site-packages", "dist-packages"):  # there everything else would come along
        prefix = f", or write PYTHONPATH={shlex.quote(str(folder))} before the launch"
    return (
        f"{shlex.quote(python)} -m pip install --no-deps lorapatch{prefix}, or say --attach-path, which names its file in the"
        " launch and needs nothing there"
    )


def _folder() -> Path:
    import lorapatch

    return Path(lorapatch.__file__).absolute().parent


def _environment(script: Script, launch: Launch, environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with the PYTHONPATH that the launch will have, as far as the script tells."""
    given = next((word.value for name, word in launch.environment if name == "PYTHONPATH"), None)
    path = given or script.value('"$PYTHONPATH"', launch.start)
    return {**environment, "PYTHONPATH": path} if path else dict(environment)
