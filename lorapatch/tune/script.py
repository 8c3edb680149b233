"""The script that is tuned: what it is set to, and its text with other settings, written where a person would."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.launch import Launch, Script, read_source
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.dialect import trainer_support
from lorapatch.lora.flags import PatchOptions
from lorapatch.lora.lint.facts import LaunchFacts
from lorapatch.lora.plan import plan_patch, set_flags
from lorapatch.lora.support import TrainerSupport
from lorapatch.run.gpus import Gpus
from lorapatch.run.options import gpus_option
from lorapatch.shell.edit import Edit, apply_edits
from lorapatch.shell.files import read_bytes
from lorapatch.shell.values import Unresolved
from lorapatch.tune.configuration import Configuration, flags_between, read_configuration
from lorapatch.tune.ladder import Machine

__all__ = ["TunedScript", "read_tuned", "set_values"]

Words = tuple[str, ...]
_VARIABLE = re.compile(r"\"?\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))\"?")
_LITERAL = re.compile(rb"(['\"]?)([\w./:+-]*)\1")


@dataclass(frozen=True)
class TunedScript:
    """The script on the disk, and what it is with LoRA (in memory only); ``start`` is what it is set to then."""

    path: Path
    original: bytes
    script: Script
    launch: Launch
    support: TrainerSupport | None
    start: Configuration
    patch: PatchOptions | None = None  # what made it LoRA; None: it was
    notes: tuple[str, ...] = ()

    def text(self, configuration: Configuration) -> bytes:
        """The whole script with ``configuration``. Raises Refused when the trainer cannot be given it."""
        flags = flags_between(self.start, configuration, self.launch, self.support)
        return set_values(self.script, self.launch.number, flags) if flags else self.script.source

    def with_configuration(self, configuration: Configuration) -> tuple[Script, Launch]:
        """`text` as it is read again, and the launch in it."""
        script = read_source(self.text(configuration), self.script.path)
        return script, script.launches[self.launch.number - 1]

    def takes(self, configuration: Configuration) -> str | None:
        """Why the script cannot be given ``configuration``; None when it can."""
        try:
            flags_between(self.start, configuration, self.launch, self.support)
        except Refused as refusal:
            return str(refusal)
        return None


def read_tuned(path: Path, patch: PatchOptions | None, trainer_root: Path | None) -> TunedScript:
    """Read the script at ``path`` and give it LoRA if it has none, or ``patch`` asks for something. Raises Refused."""
    original = read_bytes(path)
    script = read_source(original, path)
    roots = [trainer_root] if trainer_root else []
    notes: tuple[str, ...] = ()
    try:
        launch = choose_launch(script, patch.stage if patch is not None else None)
        if patch is not None or not LaunchFacts(launch, path.absolute().parent, roots).lora:
            patch = replace(patch or PatchOptions(), stage=str(launch.number))
            planned = plan_patch(script, patch, trainer_roots=roots)
            script, notes = read_source(planned.text, path), planned.notes
            launch = script.launches[launch.number - 1]
        support = trainer_support(script, launch, roots)
        start = read_configuration(launch, support)
    except Refused as refusal:
        raise Refused(f"{path}: {refusal}") from refusal
    if start.deepspeed is not None:
        own = _zero(Path(path.absolute().parent, start.deepspeed))
        start = replace(start, offload=_offloads(own))
    return TunedScript(path, original, script, launch, support, start, patch, notes)


# -- the machine -----------------------------------------------------------------------------------------------------


def machine_of(tuned: TunedScript, *, cpu: bool, model: str | None, longest: int | None) -> Machine:
    """What the rungs have to know of the surroundings of the script."""
    gpus = 0 if cpu else _gpus(tuned.launch)
    return Machine(gpus, tuple(sorted(_siblings(tuned).items())), model, longest)


def _gpus(launch: Launch) -> int:
    """How many GPUs the launch will have."""
    gpus = Gpus()
    try:
        there = len(gpus)
    finally:
        gpus.close()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        there = min(there, len([number for number in visible.split(",") if number.strip()]))
    asked = gpus_option(launch)
    if asked is not None and asked.isdigit():
        return min(there, int(asked))
    return min(there, 1) if launch.launcher == "python" else there


def _siblings(tuned: TunedScript) -> dict[str, str]:
    """The DeepSpeed configurations beside the script's own, by what they would change."""
    if tuned.start.deepspeed is None:
        return {}
    own = Path(tuned.path.absolute().parent, tuned.start.deepspeed)
    stage = _zero(own).get("stage")
    found: dict[str, str] = {}
    for file in sorted(own.parent.glob("*.json")):
        zero = _zero(file)
        path = str(Path(tuned.start.deepspeed).with_name(file.name))
        if file.name == own.name or not zero:
            continue
        if zero.get("stage") == stage and not zero.get("offload_param"):
            found.setdefault("offload" if _offloads(zero) else "no_offload", path)
        if zero.get("stage") == 3 and not _offloads(zero):
            found.setdefault("zero3", path)
    return found


def _zero(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    zero = data.get("zero_optimization") if isinstance(data, dict) else None
    return zero if isinstance(zero, dict) else {}


def _offloads(zero: Mapping[str, Any]) -> bool:
    devices = [zero.get(name) for name in ("offload_optimizer", "offload_param")]
    return any(isinstance(device, dict) and device.get("device") in ("cpu", "nvme") for device in devices)


# -- the text --------------------------------------------------------------------------------------------------------


def set_values(script: Script, number: int, flags: Mapping[str, Words]) -> bytes:
    """The text of ``script`` with ``flags`` set in launch ``number``, each where a person would set it.

    A value that is a plain variable is changed where the variable is set, so that what else the script does with it
    (checking the global batch) stays true; of a path only the name of the file. Everything else is changed in the
    launch, as `set_flags` does, which proves the result. Raises Refused.
    """
    for name, words in flags.items():
        changed = _set_naturally(script, number, name, words)
        script = changed if changed is not None else script
    return set_flags(script, script.launches[number - 1], flags).text


def _set_naturally(script: Script, number: int, name: str, words: Words) -> Script | None:
    """The script with that one flag changed at its source; None where only the launch itself can be changed."""
    launch = script.launches[number - 1]
    flag = launch.flag(name)
    if flag is None or len(flag.values) != 1 or len(words) != 1 or flag.value == words[0]:
        return None
    if flag.values[0].where != "command":
        return None
    edit = _assignment_edit(script, launch, flag.values[0].text, words[0]) or _name_edit(flag.values[0], words[0])
    if edit is None:
        return None
    after = read_source(apply_edits(script.source, [edit]), script.path, script.values.environment)
    if len(after.launches) != len(script.launches) or not _only(script, after, number, name, words[0]):
        return None
    return after


def _assignment_edit(script: Script, launch: Launch, text: str, value: str) -> Edit | None:
    """Set the variable that ``text`` is, if one line sets it to a plain value."""
    match = _VARIABLE.fullmatch(text)
    if match is None:
        return None
    try:
        pieces = script.values.pieces(match[1] or match[2], launch.start, launch.use.context)
    except Unresolved:
        return None
    if len(pieces) != 1 or pieces[0].append or pieces[0].elements is not None:
        return None
    start, end = pieces[0].value
    literal = _LITERAL.fullmatch(script.source[start:end])
    if literal is None or not re.fullmatch(r"[\w./:+-]+", value):
        return None
    return Edit(start, end, literal[1] + value.encode() + literal[1])


def _name_edit(word: Any, value: str) -> Edit | None:
    """Of a path whose folder stays, the name of the file."""
    if word.value is None or os.path.dirname(word.value) != os.path.dirname(value):
        return None
    old, new = os.path.basename(word.value), os.path.basename(value)
    at = word.text.rfind(f"/{old}")
    if at < 0 or not re.fullmatch(r"[\w.+-]+", new) or word.text[at + 1 + len(old) :].strip("\"'"):
        return None
    start = word.span[0] + len(word.text[: at + 1].encode())
    return Edit(start, start + len(old.encode()), new.encode())


def _only(before: Script, after: Script, number: int, name: str, value: str) -> bool:
    """Whether the flag has its value now, and no other training and no flag but batch sizes has changed.

    A command that checks the batch size is given the new one: that is what the variable is for.
    """
    flag = after.launches[number - 1].flag(name)
    if flag is None or flag.value != value:
        return False
    for old, new in zip(before.launches, after.launches):
        if old.number == number:
            if _flags(old, name) != _flags(new, name):
                return False
        elif old.stage.training and [word.value for word in old.words] != [word.value for word in new.words]:
            return False
    return True


def _flags(launch: Launch, but: str) -> list[tuple[str, str | None]]:
    """Names and values, without ``but`` and without what may follow from it: accumulation from the micro-batch."""
    own = launch.flag(but)
    aside = {own.name if own else "", "--gradient_accumulation_steps", "--per_device_train_batch_size"}
    return [(flag.name, flag.value) for flag in launch.flags if flag.name not in aside]
