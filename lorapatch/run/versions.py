"""Which versions of the libraries a run used, asked from its own interpreter, and which process was which launch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorapatch.launch.model import Launch
from lorapatch.run.log import Spawned
from lorapatch.run.watch import SeenProcess

__all__ = ["LaunchedProcesses", "library_versions", "processes_of"]

_LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes", "safetensors", "tokenizers")
# Metadata alone: importing torch would take seconds and could take GPU memory.
_ASK = f"""
import importlib.metadata as m, json, sys
found = {{"python": sys.version.split()[0]}}
for name in {_LIBRARIES!r}:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class LaunchedProcesses:
    """The processes of one launch: argv of its launcher and its ranks, interpreter and environment of the first."""

    launcher: list[str] | None
    ranks: tuple[list[str], ...]
    python: str | None
    environment: Mapping[str, str]

    @property
    def world_size(self) -> int:
        """How many ranks were seen."""
        return max(1, len(self.ranks))


def processes_of(launch: Launch, seen: Iterable[SeenProcess], spawned: Sequence[Spawned] = ()) -> LaunchedProcesses:
    """Which of the ``seen`` processes are ``launch``; a process too short-lived to be seen is taken from the log."""
    trainer = str(launch.trainer.word)
    name = trainer if launch.trainer.module else Path(trainer).name
    output = launch.flag("output_dir")
    mark = output.value if output is not None else None
    ranks: list[SeenProcess] = []
    launcher: list[str] | None = None
    for process in seen:
        index = next((i for i, word in enumerate(process.argv) if Path(word).name == name or word == trainer), None)
        if index is None or (mark and not any(mark in word for word in process.argv)):
            continue
        if _is_python(process.argv[0]) and not any(_is_launcher(word) for word in process.argv[:index]):
            if not any(process.parent == other.pid and process.argv == other.argv for other in ranks):  # a data worker
                ranks.append(process)
        elif launcher is None and not _is_shell(process.argv[0]):
            launcher = process.argv
    ranks.sort(key=lambda process: int(process.environment.get("RANK", "0") or 0))
    argvs = [process.argv for process in ranks] or [
        s.argv for s in spawned if any(Path(w).name == name for w in s.argv)
    ]
    python = argvs[0][0] if argvs and _is_python(argvs[0][0]) else None
    return LaunchedProcesses(launcher, tuple(argvs), python, ranks[0].environment if ranks else {})


def _is_python(word: str) -> bool:
    return Path(word).name.startswith(("python", "pypy"))


def _is_shell(word: str) -> bool:
    return Path(word).name in ("bash", "sh", "dash", "tee", "timeout", "nohup", "env", "srun")


def _is_launcher(word: str) -> bool:
    return Path(word).name in ("deepspeed", "torchrun", "accelerate", "deepspeed.launcher.launch") or word.startswith(
        ("deepspeed.launcher", "torch.distributed")
    )


def library_versions(python: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Versions of Python and the training libraries that ``python`` finds; empty when it cannot be asked.

    ``environment`` is the one the run had, as far as it is known (PYTHONPATH, VIRTUAL_ENV, PATH).
    """
    try:
        answer = subprocess.run(
            [python, "-c", _ASK],
            env=dict(environment) if environment else None,
            capture_output=True,
            timeout=30,
            check=True,
        )
        found = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return {str(name): str(version) for name, version in found.items()}
