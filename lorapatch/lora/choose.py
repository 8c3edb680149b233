"""Which launch of a script is the one to patch; and what to say when there is none, or more than one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch, Script

__all__ = ["choose_launch"]


def choose_launch(script: Script, stage: str | None = None) -> Launch:
    """The launch to patch: the one training launch that is not pre-training, or the one that ``stage`` names.

    Raises Refused when there is none, or several, with the list of launches.
    """
    if stage is not None:
        return _named_launch(script, stage)
    training = [launch for launch in script.launches if launch.stage.training]
    tuning = [launch for launch in training if launch.stage.name != "pretrain"]
    if len(tuning) == 1 and not script.notes:
        return tuning[0]
    if len(tuning) == 1:
        raise Refused(
            f"{script.notes[0]} (or say --stage {tuning[0].number} to patch the launch on line {tuning[0].line})"
        )
    if tuning:
        raise Refused(f"{len(tuning)} launches could be the fine-tuning one; say which with --stage: {_listed(tuning)}")
    if training:
        raise Refused(
            "only pre-training launches were found, which LoRA would not help; if you mean one all the same, say"
            f" --stage: {_listed(training)}"
        )
    if script.notes:
        raise Refused(script.notes[0])
    if script.launches:
        raise Refused(f"no training launch was found, only these: {_listed(script.launches)}")
    raise Refused(_why_no_launch(script))


def _why_no_launch(script: Script) -> str:
    if not script.outline.commands and not script.outline.assignments:
        return "has no command, only comments or blank lines"
    for start, end in script.outline.errors:
        if re.search(rb"deepspeed|torchrun|accelerate", script.source[start:end]):
            return f"line {script.line(start)}: cannot be read here; write this command more simply"
    if called := _called_scripts(script):
        which = "that script" if len(called) == 1 else "the one that trains"
        return f"no launch was found, but other scripts are run ({_shortened(called, ', ')}); patch {which}"
    return "no launch was found: no deepspeed, torchrun, accelerate launch or python command that runs a trainer"


def _called_scripts(script: Script) -> list[str]:
    """The scripts that this one runs, each with its line."""
    found = []
    for command in script.outline.commands:
        words = [script.source[slice(*span)].decode("utf-8", "replace") for span in command.words]
        called = [word for word in words[:3] if word.strip("\"'").endswith(".sh")]
        if called and words[0].rsplit("/", 1)[-1] in ("bash", "sh", "source", ".", "sbatch", called[0].rsplit("/", 1)[-1]):
            found.append(f"line {script.line(command.start)}: {called[0]}")
    return found


def _named_launch(script: Script, stage: str) -> Launch:
    if stage.isdigit():
        found = [launch for launch in script.launches if launch.number == int(stage)]
    else:
        found = [launch for launch in script.launches if launch.stage.name == stage and launch.stage.training]
    if len(found) != 1:
        what = "no launch" if not found else f"{len(found)} launches"
        raise Refused(f"--stage {stage} fits {what}; there are: {_listed(script.launches) or 'none'}")
    if not found[0].stage.training:
        raise Refused(f"--stage {stage} is not a training launch ({found[0].stage.reasons[0]})")
    return found[0]


def _listed(launches: Sequence[Launch]) -> str:
    each = [
        f"{launch.number}: line {launch.line}, {launch.launcher} {launch.trainer.name.rsplit('/', 1)[-1]},"
        f" {launch.stage.name or 'stage unknown'}"
        for launch in launches
    ]
    return _shortened(each, "; ")


def _shortened(items: Sequence[str], separator: str) -> str:
    """The first eight; a sweep has dozens."""
    more = f"{separator}and {len(items) - 8} more" if len(items) > 8 else ""
    return separator.join(items[:8]) + more
