"""What the rules look at: a script's launches, each with its trainer, its LoRA switch and its DeepSpeed file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapatch.errors import Refused
from lorapatch.launch.model import Flag, Launch, Script
from lorapatch.lora import support  # loads its readers when they are called

if TYPE_CHECKING:
    from lorapatch.lora.support import LoraFlag, TrainerSupport

__all__ = ["DeepSpeedFile", "Facts", "LaunchFacts", "number", "true"]

ATTACH = ("lorapatch.attach", "lorapatch/attach.py")
_SWITCHES = ("lora_enable", "use_lora", "enable_lora", "use_peft")


@dataclass(frozen=True)
class DeepSpeedFile:
    """A DeepSpeed configuration: its data, or the line and reason why it does not parse."""

    path: Path
    data: dict[str, Any] | None
    line: int = 1
    reason: str = ""

    @property
    def zero(self) -> dict[str, Any]:
        found = (self.data or {}).get("zero_optimization", {})
        return found if isinstance(found, dict) else {}

    @property
    def stage(self) -> int | None:
        stage = self.zero.get("stage")
        return stage if isinstance(stage, int) else None


@dataclass
class LaunchFacts:
    """One launch, and what is known around it."""

    launch: Launch
    script_dir: Path
    roots: Sequence[Path]

    @property
    def line(self) -> int:
        return self.launch.line

    @property
    def attached(self) -> bool:
        """Whether it goes through lorapatch.attach, which brings LoRA to any trainer."""
        return str(self.launch.trainer.word).endswith(ATTACH)

    @cached_property
    def trainer_path(self) -> Path | None:
        """The trainer's file, behind lorapatch.attach too; None if it is not found."""
        trainer = self.launch.trainer
        if self.attached:
            word = next((str(w) for w in self.launch.arguments if not str(w).startswith("-")), "")
            return support.find_trainer(word, module=not word.endswith(".py"), script_dir=self.script_dir, roots=self._roots)
        if trainer.path is not None and trainer.path.is_file():
            return trainer.path
        return support.find_trainer(str(trainer.word), module=trainer.module, script_dir=self.script_dir, roots=self._roots)

    @property
    def _roots(self) -> list[Path]:
        """``--trainer-root`` and the launch's own PYTHONPATH."""
        given = next((word.value for name, word in self.launch.environment if name == "PYTHONPATH"), None)
        return [*self.roots, *(Path(part) for part in (given or "").split(":") if part.startswith("/"))]

    @cached_property
    def support(self) -> TrainerSupport | None:
        """What the trainer's source says; None if it is not found or cannot be read."""
        if self.trainer_path is None:
            return None
        return _read_trainer(self.trainer_path, tuple(self._roots), self.python)

    @cached_property
    def python(self) -> Path | None:
        """The interpreter that the launch uses: named in full, or behind the launcher that is found on PATH."""
        for word in self.launch.launcher_words:
            found = shutil.which(word.value) if word.value else None
            if found and Path(found).name.startswith("python"):
                return Path(found)
            behind = _shebang(Path(found)) if found else None
            if behind:
                return behind
        return None

    def flag(self, *names: str) -> Flag | None:
        return self.launch.flag(*names)

    def value(self, *names: str) -> str | None:
        """The resolved value of a flag; None if it is not given or only a run can tell."""
        flag = self.launch.flag(*names)
        return flag.value if flag else None

    def at(self, *names: str) -> int:
        """The line of a flag, or of the launch."""
        flag = self.launch.flag(*names)
        return flag.line if flag else self.launch.line

    def name_of(self, canonical: str) -> str:
        """The trainer's own name for one of our flags."""
        names = self.support.lora_names if self.support and not self.attached else {}
        return names.get(canonical, f"--{canonical}")

    @cached_property
    def lora(self) -> bool:
        """Whether this launch trains with LoRA."""
        if self.attached:
            return True
        support = self.support
        if support is None or not (support.switches or support.always_on):
            return any(true(self.value(name)) for name in _SWITCHES if self.flag(name))
        return support.always_on or all(self._is_on(switch) for switch in support.switches)

    def _is_on(self, switch: LoraFlag) -> bool:
        flag = self.flag(switch.name)
        if switch.style in ("off", "absent"):
            return flag is None or (switch.style == "off" and not true(flag.value))
        if flag is None:
            return False
        if switch.style == "rank":
            return (number(flag.value) or 0) > 0
        return flag.value == switch.word if switch.style == "choice" else true(flag.value)

    @cached_property
    def deepspeed(self) -> DeepSpeedFile | None:
        """The DeepSpeed configuration file that the launch names, if it is there."""
        value = self.value("deepspeed", "deepspeed_config")
        path = self.find(value) if value and value.endswith(".json") else None
        return _read_deepspeed(path, path.stat().st_mtime_ns) if path and path.is_file() else None

    def find(self, value: str) -> Path | None:
        """The existing file or folder that a path names, tried from the folders the script may be started in."""
        given = Path(value).expanduser()
        candidates = (
            [given] if given.is_absolute() else [f / given for f in (self.script_dir, *self.script_dir.parents)]
        )
        try:
            return next((path for path in [*candidates[:6], Path.cwd() / given] if path.exists()), None)
        except OSError:  # a name that is too long for a path
            return None


@dataclass
class Facts:
    """Everything the rules look at. ``bf16``: whether the GPU has bf16 and TF32, None if nobody asked."""

    path: Path
    script: Script
    roots: Sequence[Path] = ()
    bf16: bool | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def launches(self) -> list[LaunchFacts]:
        folder = self.path.absolute().parent
        return [LaunchFacts(launch, folder, self.roots) for launch in self.script.launches]

    @property
    def training(self) -> Iterator[LaunchFacts]:
        return (facts for facts in self.launches if facts.launch.stage.training)

    @property
    def source(self) -> bytes:
        return self.script.source

    def words(self, command_index: int) -> list[str]:
        """The words of a command, resolved where they can be."""
        command = self.script.outline.commands[command_index]
        texts = [self.source[slice(*span)].decode("utf-8", "replace") for span in command.words]
        return [self.script.value(text, span[0]) or text for text, span in zip(texts, command.words, strict=True)]


def true(value: str | None) -> bool:
    """A flag alone counts as true, as HfArgumentParser takes it."""
    return value is not None and value.lower() in ("", "true", "1", "yes", "y", "t", "on")


def number(value: str | None) -> float | None:
    try:
        return float(value) if value is not None else None
    except ValueError:
        return None


@lru_cache(maxsize=64)
def _read_trainer(path: Path, roots: tuple[Path, ...], python: Path | None) -> TrainerSupport | None:
    try:
        return support.read_trainer(path, roots=roots, python=python)
    except Refused:
        return None


def _shebang(launcher: Path) -> Path | None:
    """The Python in the first line of a launcher such as ``deepspeed`` or ``torchrun``."""
    try:
        with launcher.open("rb") as file:
            line = file.readline(500).decode("utf-8", "replace")
    except OSError:
        return None
    python = Path(line[2:].strip().split(" ")[0]) if line.startswith("#!/") else None
    return python if python and python.name.startswith("python") else None


@lru_cache(maxsize=64)
def _read_deepspeed(path: Path, _mtime_ns: int) -> DeepSpeedFile:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return DeepSpeedFile(path, None, error.lineno, error.msg)
    except (OSError, UnicodeDecodeError) as error:
        return DeepSpeedFile(path, None, 1, str(error))
    return DeepSpeedFile(path, data) if isinstance(data, dict) else DeepSpeedFile(path, None, 1, "it is not an object")
