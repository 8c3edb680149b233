"""How many GPUs a launch uses, on all its nodes: one process each."""

from __future__ import annotations

from pathlib import Path

from lorapatch.errors import LorapatchError
from lorapatch.launch.model import Launch, Script
from lorapatch.run.nodes import read_hostfile
from lorapatch.run.options import gpus_option, launcher_option

__all__ = ["count_gpus"]


def count_gpus(script: Script, launch: Launch) -> tuple[int, str | None]:
    """The number of GPUs, and what was assumed to get it (None: the launch says so)."""
    if launch.launcher == "python":
        return 1, None
    included = launcher_option(launch, "include")
    if included and (count := _included(included)):
        return count, None
    nodes = _number(launcher_option(launch, "num_nodes") or launcher_option(launch, "nnodes")) or 1
    given = _number(gpus_option(launch))
    if launch.launcher == "accelerate":
        return (given, None) if given else (1, "accelerate's own settings were not read: one GPU")
    hostfile = launcher_option(launch, "hostfile")
    if hostfile and script.path is not None:
        try:
            hosts = read_hostfile(script.path.parent / Path(hostfile))
        except (LorapatchError, OSError):
            pass
        else:
            return sum(min(given or slots, slots) for slots in hosts.values()), None
    if given:
        return given * nodes, None
    if visible := _visible(script, launch):
        return visible * nodes, None
    return nodes, f"{nodes} GPU{'s' if nodes > 1 else ''}: the launch does not say how many, it takes all that it finds"


def _included(text: str) -> int:
    """``localhost:0,1@worker:0,1``: DeepSpeed's --include; 0 where a host is named without its GPUs."""
    hosts = [part.partition(":")[2] for part in text.strip("\"'").split("@")]
    return sum(len([gpu for gpu in gpus.split(",") if gpu]) for gpus in hosts) if all(hosts) else 0


def _visible(script: Script, launch: Launch) -> int:
    name = "CUDA_VISIBLE_DEVICES"
    given = next((word.value for key, word in launch.environment if key == name), None)
    given = given if given is not None else script.value(f"${name}", launch.start)
    return len([gpu for gpu in (given or "").split(",") if gpu.strip()])


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() and int(text) > 0 else None
