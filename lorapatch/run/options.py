"""Options of the launchers themselves: master port, hosts, number of GPUs."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Mapping

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch, Word
from lorapatch.shell.edit import Edit

__all__ = ["free_port", "gpus_option", "launcher_option", "port_edit", "set_options"]

# deepspeed/launcher/runner.py, torch/distributed/run.py and launch.py, accelerate/commands/launch.py
_PORT = {
    "deepspeed": "master_port",
    "torchrun": "master_port",
    "torch.distributed.run": "master_port",
    "torch.distributed.launch": "master_port",
    "accelerate": "main_process_port",
}
_GPUS = {
    "deepspeed": "num_gpus",
    "torchrun": "nproc_per_node",
    "torch.distributed.run": "nproc_per_node",
    "torch.distributed.launch": "nproc_per_node",
    "accelerate": "num_processes",
}
# With these the port is found in another way.
_OWN_RENDEZVOUS = {"standalone", "rdzv_endpoint", "rdzv_backend", "rdzv_conf", "config_file"}
_SAME = {"num_accelerators": "num_gpus", "H": "hostfile", "i": "include", "e": "exclude"}
_PLAIN = re.compile(r"[\w./,:=+@%-]+")


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _options(launch: Launch) -> dict[str, tuple[Word, Word | None]]:
    """The launcher's options by name (without dashes, with ``_``): the word, and its value's word."""
    found: dict[str, tuple[Word, Word | None]] = {}
    words = launch.launcher_options
    for index, word in enumerate(words):
        text = str(word)
        if text.startswith("-"):
            name = text.lstrip("-").partition("=")[0].replace("-", "_")
            following = (
                words[index + 1] if index + 1 < len(words) and not str(words[index + 1]).startswith("-") else None
            )
            found[_SAME.get(name, name)] = (word, None if "=" in text else following)
    return found


def launcher_option(launch: Launch, name: str) -> str | None:
    """The value of the launcher's option ``name``, resolved where that is possible; None without the option."""
    option = _options(launch).get(name)
    if option is None:
        return None
    word, value = option
    return str(value) if value is not None else str(word).partition("=")[2]


def gpus_option(launch: Launch) -> str | None:
    """How many processes a node the launch asks for, as it is written; None when it does not say."""
    name = _GPUS.get(launch.launcher)
    return launcher_option(launch, name) if name else None


def port_edit(launch: Launch, port: int | None = None) -> Edit | None:
    """Let a launch that names no master port take ``$MASTER_PORT`` (29500 without it); None where there is no need.

    A launcher kept in a string or an array may stand in quotes already, so ``port`` itself is written there.
    """
    name = _PORT.get(launch.launcher)
    options = _options(launch)
    if name is None or name in options or _OWN_RENDEZVOUS & options.keys():
        return None
    where, at = launch.launcher_words[-1].where, launch.launcher_words[-1].span[1]
    if at < 0 or (where != "command" and port is None):
        return None
    value = str(port) if where != "command" else '"${MASTER_PORT:-29500}"'
    return Edit(at, at, f" --{name} {value}".encode())


def set_options(launch: Launch, *, hostfile: str | None = None, num_gpus: int | None = None) -> list[Edit]:
    """Edits that hand ``hostfile`` and ``num_gpus`` (of each node) to the launcher, changing what stands there.

    Raises Refused when this launcher takes them in another way.
    """
    wanted: dict[str, str] = {}
    if hostfile is not None:
        if launch.launcher != "deepspeed":
            raise Refused(
                f"line {launch.line}: {launch.launcher} takes no hostfile; only DeepSpeed's own launcher does"
            )
        wanted["hostfile"] = hostfile
    if num_gpus is not None:
        name = _GPUS.get(launch.launcher)
        if name is None:
            raise Refused(
                f"line {launch.line}: {launch.launcher} runs one process; launch it by deepspeed for several GPUs"
            )
        wanted[name] = str(num_gpus)
    options = _options(launch)
    for selection in ("include", "exclude"):
        if "num_gpus" in wanted and selection in options:
            raise Refused(
                f"line {launch.line}: the launch chooses its GPUs by --{selection}, which DeepSpeed does not"
                f" allow together"
                " with --num_gpus; take one of them out"
            )
    return _edits(launch, wanted, options)


def _edits(launch: Launch, wanted: Mapping[str, str], options: Mapping[str, tuple[Word, Word | None]]) -> list[Edit]:
    edits = []
    last = launch.launcher_words[-1]
    for name, value in wanted.items():
        text = value if _PLAIN.fullmatch(value) else shlex.quote(value)
        if name in options:
            word, old = options[name]
            start, end = old.span if old is not None else word.span
            new = text if old is not None else f"--{name}={text}"
        else:
            start = end = last.span[1]
            new = f" --{name} {text}"
        if start < 0 or (last.where != "command" and text != value):
            raise Refused(
                f"line {launch.line}: --{name} cannot be given to this launch; write it as a command of its own"
            )
        edits.append(Edit(start, end, new.encode()))
    return edits
