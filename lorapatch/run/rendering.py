"""`lorapatch render`: what a template makes of a script, and the commands of each node of a cluster."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.launch import read_script, read_source
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.flags import PatchOptions
from lorapatch.lora.plan import plan_patch
from lorapatch.run.nodes import NodeCommand, node_commands, read_hostfile
from lorapatch.run.render import render
from lorapatch.run.whole import render_full
from lorapatch.shell.files import write_new

__all__ = ["RenderedScript", "plan_nodes", "render_script"]


@dataclass(frozen=True)
class RenderedScript:
    """A rendered script that is not yet written: its text, where it belongs, what was set or left out."""

    text: bytes
    target: Path
    notes: tuple[str, ...]
    like: Path  # the script whose mode it gets

    def write(self) -> None:
        """Put it in its place, at once or not at all. Raises Refused."""
        write_new(self.target, self.text, like=self.like)


def render_script(
    path: str | PathLike[str],
    template: str = "test_lora_minimal",
    *,
    stage: str | None = None,
    target: Path | None = None,
    **settings: Any,
) -> RenderedScript:
    """What ``template`` makes of the script at ``path``, to stand at ``target`` (default: beside it, by its name).

    ``settings`` are those of `lorapatch.run.render.render`. Nothing is written. Raises Refused, UsageError.
    """
    file = Path(fspath(path))
    script = read_script(file)
    name = Path(template).name.removesuffix(".j2").removesuffix(".sh")
    stem = f"{file.stem}_full" if name == "full" else name
    target = target or file.absolute().with_name(f"{stem}.sh")
    if target.exists() and target.samefile(file):
        raise Refused(f"{target}: is the script itself; write the rendered one elsewhere")
    try:
        if name == "full":
            options = {key: settings[key] for key in ("hostfile", "num_gpus") if settings.get(key) is not None}
            done = render_full(script, template=template, target=target, **options)
        else:
            done = render(script, choose_launch(script, stage), template, target=target, **settings)
    except Refused as refusal:
        raise Refused(f"{file}: {refusal}") from refusal
    return RenderedScript(done.text, target, done.notes, file)


def plan_nodes(
    path: str | PathLike[str], hostfile: Path | None, *, num_gpus: int | None = None, patch: PatchOptions | None = None
) -> list[NodeCommand]:
    """The command line of every node of ``hostfile`` (without one: this machine) for the patched script; runs nothing.

    Raises Refused.
    """
    file = Path(fspath(path))
    script = read_script(file)
    try:
        launch = choose_launch(script, patch.stage if patch else None)
        if patch is not None or launch.flag("lora_enable") is None:
            planned = plan_patch(script, patch)
            script = read_source(planned.text, script.path)
            launch = script.launches[launch.number - 1]
    except Refused as refusal:
        raise Refused(f"{file}: {refusal}") from refusal
    hosts = read_hostfile(hostfile) if hostfile is not None else {"localhost": num_gpus or 1}
    return node_commands(script, launch, hosts, num_gpus=num_gpus)
