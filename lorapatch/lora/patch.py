"""Patch a script on the disk: read, plan, prove, and only then write."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Literal, NamedTuple

from lorapatch.errors import Refused
from lorapatch.launch import read_script
from lorapatch.lora.flags import PatchOptions
from lorapatch.lora.plan import Patch, plan_patch
from lorapatch.shell.files import replace_with_backup, write_new

__all__ = ["Patched", "patch_script"]


class Patched(NamedTuple):
    """What `patch_script` did: the plan, the file written (None: nothing was to do), the backup (None: none made)."""

    patch: Patch
    written: Path | None
    backup: Path | None


def patch_script(
    path: str | PathLike[str],
    options: PatchOptions | None = None,
    *,
    output: str | PathLike[str] | None = None,
    dry_run: bool = False,
    mode: Literal["auto", "flags", "attach"] = "auto",
    attach_path: bool = False,
    trainer_root: str | PathLike[str] | None = None,
    with_merge: bool = False,
) -> Patched:
    """Patch the script at ``path`` for LoRA, in place with a backup, or into ``output``; ``dry_run`` writes nothing.

    ``mode``, ``attach_path``, ``trainer_root`` and ``with_merge``: see `plan_patch`. Raises Refused with the file, the line and
    what to do; then nothing was written.
    """
    file = Path(fspath(path))
    script = read_script(file)
    try:
        roots = [] if trainer_root is None else [Path(fspath(trainer_root))]
        patch = plan_patch(
            script, options, mode=mode, attach_path=attach_path, trainer_roots=roots, with_merge=with_merge
        )
    except Refused as refusal:
        raise Refused(f"{file}: {refusal}") from refusal
    target = None if output is None else Path(fspath(output))
    if target is not None and not dry_run and not (target.exists() and target.samefile(file)):  # else with a backup
        write_new(target, patch.text, like=file)
        return Patched(patch, target, None)
    if dry_run or not patch.changed:
        return Patched(patch, None, None)
    return Patched(patch, file, replace_with_backup(file, script.source, patch.text))
