"""What an output directory holds already: a finished run, checkpoints to go on from, or nothing."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch, Script

__all__ = ["Checkpoint", "Output", "Restart", "look_at", "plan_restart", "set_aside", "trainer_states"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What a training leaves at its end, outside of its checkpoints.
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_MODELS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "mm_projector.bin", "mm_projector.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of Trainer: complete when its ``trainer_state.json``, which is written last, can be read."""

    path: Path
    step: int
    complete: bool
    lora: bool


@dataclass(frozen=True)
class Output:
    """An output directory: the file that a finished run left, and the checkpoints in the order of their steps."""

    directory: Path
    finished: Path | None
    checkpoints: tuple[Checkpoint, ...]

    @property
    def last(self) -> Checkpoint | None:
        """The last complete checkpoint."""
        return next((checkpoint for checkpoint in reversed(self.checkpoints) if checkpoint.complete), None)


@dataclass(frozen=True)
class Restart:
    """How a script is to be started again: launches that are done (number to reason), what the LoRA launch goes on
    from, half-written checkpoints that have to be set aside, and all of it in sentences."""

    skip: Mapping[int, str]
    resume_from: Checkpoint | None
    incomplete: tuple[Path, ...]
    sentences: tuple[str, ...]


def look_at(directory: Path) -> Output:
    """What ``directory`` holds; it need not be there."""
    finished = next((directory / name for name in (*_ADAPTERS, *_MODELS) if (directory / name).is_file()), None)
    found = []
    for path in directory.glob("checkpoint-*"):
        number = _CHECKPOINT.fullmatch(path.name)
        if number and path.is_dir():
            lora = any((path / name).is_file() for name in (*_ADAPTERS, "adapter_config.json"))
            found.append(Checkpoint(path, int(number[1]), _read_json(path / "trainer_state.json") is not None, lora))
    return Output(directory, finished, tuple(sorted(found, key=lambda checkpoint: checkpoint.step)))


def plan_restart(script: Script, launch: Launch, *, resume: bool) -> Restart:
    """Whether the training launches up to ``launch`` may be started, and from where.

    Without ``resume`` nothing may be there: somebody's finished output is not started over, and a trainer that finds a
    checkpoint goes on from it without being asked. Raises Refused with what to do.
    """
    skip: dict[int, str] = {}
    sentences: list[str] = []
    resume_from: Checkpoint | None = None
    incomplete: list[Path] = []
    for earlier in script.launches:
        if not earlier.stage.training or earlier.number > launch.number:
            continue
        directory = _directory(script, earlier)
        if directory is None:
            continue
        output = look_at(directory)
        if not resume:
            _refuse_output(output, earlier)
        elif output.finished is not None:
            if earlier.number == launch.number:
                raise Refused(f"{output.finished} is there: that run is finished, there is nothing to resume")
            skip[earlier.number] = f"{output.finished} is there ({_date(output.finished)})"
            sentences.append(f"the launch on line {earlier.line} is not run again: {skip[earlier.number]}")
        else:
            if output.last is not None:
                _refuse_other_kind(output.last, earlier)
                sentences.append(f"the launch on line {earlier.line} goes on from {output.last.path}")
            unfinished = [checkpoint for checkpoint in output.checkpoints if not checkpoint.complete]
            incomplete += [checkpoint.path for checkpoint in unfinished]
            sentences += [f"{checkpoint.path} was cut off while it was written: set aside" for checkpoint in unfinished]
            if earlier.number == launch.number:
                resume_from = output.last
    if resume and not sentences:
        sentences.append("there is nothing to resume from: it starts from the beginning")
    return Restart(skip, resume_from, tuple(incomplete), tuple(sentences))


def _directory(script: Script, launch: Launch) -> Path | None:
    flag = launch.flag("output_dir")
    if flag is None or not flag.value:
        return None
    path = Path(flag.value).expanduser()
    folders = [Path.cwd(), *([script.path.parent] if script.path else [])]
    candidates = [path] if path.is_absolute() else [folder / path for folder in folders]
    return next((candidate for candidate in candidates if candidate.is_dir()), candidates[0])


def _refuse_output(output: Output, launch: Launch) -> None:
    if output.finished is not None:
        raise Refused(
            f"line {launch.line}: {output.directory} holds a finished run ({output.finished.name} of"
            f" {_date(output.finished)});"
            " --resume leaves that stage out, or move it away, or give --output_dir another name"
        )
    if output.checkpoints:
        raise Refused(
            f"line {launch.line}: {output.directory} holds {output.checkpoints[-1].path.name} of an interrupted"
            f" run; --resume"
            " goes on from it, or move it away"
        )


def _refuse_other_kind(checkpoint: Checkpoint, launch: Launch) -> None:
    lora = any("lora" in flag.name and (flag.value or "").lower() in ("true", "") for flag in launch.flags)
    if lora and not checkpoint.lora:
        raise Refused(
            f"{checkpoint.path} is of a full fine-tuning, a LoRA run cannot go on from it; move it away, or give"
            " --output_dir another name"
        )


def set_aside(paths: tuple[Path, ...]) -> None:
    """Rename half-written checkpoints, so that no trainer takes them for the last. Raises Refused."""
    for path in paths:
        target = path.with_name(f"incomplete-{path.name}")
        try:
            path.rename(target)
        except OSError as error:
            raise Refused(f"{path} cannot be renamed to {target.name} ({error.strerror}); move it away") from error


def trainer_states(output: Output) -> list[Mapping[str, Any]]:
    """The ``log_history`` of the newest ``trainer_state.json``: at the top, or in the last checkpoint."""
    files = [output.directory / "trainer_state.json"]
    files += [checkpoint.path / "trainer_state.json" for checkpoint in reversed(output.checkpoints)]
    for file in files:
        state = _read_json(file)
        history = state.get("log_history") if state else None
        if isinstance(history, list):
            return [entry for entry in history if isinstance(entry, dict)]
    return []


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _date(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
