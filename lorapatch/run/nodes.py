"""A launch on several nodes: which command line each of them will run, without running anything."""

from __future__ import annotations

import base64
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch, Script, Word
from lorapatch.run.options import launcher_option

__all__ = ["NodeCommand", "node_commands", "read_hostfile"]

# deepspeed/launcher/runner.py, _parse_hostfile
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_PLAIN = re.compile(r"[\w./,:=+@%-]+")


@dataclass(frozen=True)
class NodeCommand:
    """What runs on one node: its rank, its GPUs, the command line."""

    host: str
    rank: int
    gpus: tuple[int, ...]
    command: str


def read_hostfile(path: Path) -> dict[str, int]:
    """Host to number of GPUs, in the order of the file, as DeepSpeed reads it: ``worker-1 slots=8``.

    Raises Refused with the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path}: the hostfile cannot be read ({error})") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.match(text)
        if match is None:
            raise Refused(f"{path}, line {number}: {text!r} is not of the form `worker-1 slots=8`")
        if match[1] in hosts:
            raise Refused(f"{path}, line {number}: {match[1]} is there twice")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise Refused(f"{path} names no host; one line each, such as `worker-1 slots=8`")
    return hosts


def node_commands(
    script: Script, launch: Launch, hosts: dict[str, int], *, num_gpus: int | None = None, port: int = 29500
) -> list[NodeCommand]:
    """The command of each node, as DeepSpeed's launcher starts it there through ssh. Values that only a run can tell
    stay as they are written.

    Raises Refused for another launcher than DeepSpeed's, and when a host has fewer GPUs than ``num_gpus``.
    """
    if launch.launcher != "deepspeed":
        raise Refused(f"line {launch.line}: {launch.launcher} takes no hostfile; only DeepSpeed's own launcher does")
    for host, slots in hosts.items():
        if num_gpus is not None and num_gpus > slots:
            raise Refused(f"{host} has {slots} GPUs by the hostfile, fewer than --num-gpus {num_gpus}")
    gpus = {host: tuple(range(num_gpus or slots)) for host, slots in hosts.items()}
    world = base64.urlsafe_b64encode(json.dumps({host: list(ids) for host, ids in gpus.items()}).encode()).decode()
    master = launcher_option(launch, "master_addr") or next(iter(hosts))
    port_text = launcher_option(launch, "master_port") or str(port)
    environment = [f"{name}={_written(word)}" for name, word in launch.environment]
    trainer = [*(["--module"] if launch.runs_module else []), *map(_written, (*launch.program, *launch.arguments))]
    found = []
    for rank, (host, ids) in enumerate(gpus.items()):
        options = [
            f"--world_info={world}",
            f"--node_rank={rank}",
            f"--master_addr={master}",
            f"--master_port={port_text}",
        ]
        words = [*environment, "python", "-u", "-m", "deepspeed.launcher.launch", *options, *trainer]
        found.append(NodeCommand(host, rank, ids, f"cd {shlex.quote(str(Path.cwd()))} && {' '.join(words)}"))
    return found


def _written(word: Word) -> str:
    """The word as a shell reads it again: its value, or as it is written where only a run can tell."""
    if word.value is None:
        return word.text
    return word.value if _PLAIN.fullmatch(word.value) else shlex.quote(word.value)
