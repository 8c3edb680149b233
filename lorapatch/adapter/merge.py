"""Merge an adapter into its base model, shard by shard, into a folder that appears at once or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapatch.adapter.base_model import BaseModel, find_base
from lorapatch.adapter.bridge import read_bridge
from lorapatch.adapter.file_tier import check_files
from lorapatch.adapter.inspect import MERGE_FILE, Adapter, find_adapter, inspect_adapter
from lorapatch.adapter.merge_plan import Plan, pack, plan_merge
from lorapatch.adapter.model_files import copy_files, loader_warnings, merged_config
from lorapatch.adapter.shards import INDEX, bytes_of, write_shards
from lorapatch.errors import Refused, UsageError

__all__ = ["Merged", "merge"]

_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_SPARE = 64 << 20  # bytes: index, tokenizer, the file system's own
# What does not stand in the way of a merge: the merge itself does without PEFT.
_HARMLESS = frozenset({"peft"})


@dataclass(frozen=True)
class Merged:
    """What `merge` made. ``kept`` is where the adapter went, when the merged model took its place."""

    output: Path
    adapter: Path
    base: Path
    kept: Path | None
    dtype: str
    tensors: int
    changed: int  # weights that LoRA changed
    shards: int
    bytes: int
    seconds: float
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON (schema 1)."""
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        return {"schema": 1, **values, "warnings": list(self.warnings)}


def merge(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    shard_size: int | str = "2GB",
) -> Merged:
    """Write base + adapter as one model into ``output``, in the layout that transformers and upstream's loader read.

    ``base`` is the folder of the base model (default: the one that the adapter names); ``dtype`` is fp32, fp16 or bf16
    (default: the base's own); ``shard_size`` is in bytes or like "2GB". Everything is computed in float32.

    Where ``output`` is the adapter's own folder, the adapter and all beside it move to ``NAME-lora`` (``NAME-lora.1`` …
    if that is taken) and the merged model takes their place. Any other folder that is not empty is refused.

    The files are written beside ``output`` and renamed when they are complete. Raises Refused (a broken adapter,
    another base, no space, something in the way) and UsageError; then nothing was changed.
    """
    started = time.monotonic()
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype} is unknown: {', '.join(_DTYPES)}")
    limit = bytes_of(shard_size)
    source = Path(directory)
    target, in_place = _target(source, output)
    adapter = _sound(source, None if base is None else Path(base))
    model = find_base(adapter.settings, None if base is None else Path(base))
    plan = plan_merge(adapter, model, read_bridge(source), None if dtype is None else _DTYPES[dtype])
    config = merged_config(source, model, plan)
    shards = pack(plan.entries, limit)
    kept = _free_name(target) if in_place else None
    with _workplace(target, plan.nbytes + _SPARE) as folder:
        write_shards(folder, shards, adapter.settings)
        copy_files(source, model, folder, config)
        _write_receipt(folder, adapter, model, source if kept is None else kept, target)
        _take_place(folder, target, kept)
    return Merged(
        output=target,
        adapter=source,
        base=model.directory,
        kept=kept,
        dtype=plan.dtype,
        tensors=len(plan.entries),
        changed=sum(entry.pair is not None for entry in plan.entries),
        shards=len(shards),
        bytes=plan.nbytes,
        seconds=time.monotonic() - started,
        warnings=tuple(_warnings(target, config, plan)),
    )


def _target(source: Path, output: str | os.PathLike[str]) -> tuple[Path, bool]:
    """Where the merged model goes, and whether that is the adapter's own place."""
    target = Path(os.path.abspath(output))
    if source.resolve() == target.resolve():
        return target.resolve(), True  # a symbolic link stays, what it points to is replaced
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Refused(f"{target} exists already; choose another -o, or remove it first")
    return target, False


def _sound(directory: Path, base: Path | None) -> Adapter:
    """The adapter, if nothing is wrong with it that a merge would carry on."""
    last = find_adapter(directory)
    if last is not None and last.name.startswith("checkpoint-") and last != directory:
        raise Refused(f"{directory} holds no adapter, so its training did not end; {last.name} in it has one")
    adapter = inspect_adapter(directory)
    for finding in check_files(adapter, base):
        if finding.state == "fail" and finding.id not in _HARMLESS:
            raise Refused(f"the adapter in {directory} is not merged: {finding.sentence}")
    if reason := adapter.settings.unmergeable():
        raise Refused(f"the adapter in {directory} is not merged: {reason}")
    return adapter


@contextlib.contextmanager
def _workplace(target: Path, needed: int) -> Iterator[Path]:
    """A folder beside ``target`` to write into, locked; removed unless it was renamed. Leftovers of a killed run go."""
    folder = target.parent / f".{target.name}.merging"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, target):
            try:
                for leftover in folder.iterdir():
                    leftover.unlink()
                free = shutil.disk_usage(folder).free
                if free < needed:
                    raise Refused(f"{target.parent} has {_gib(free)} free, the merged model needs {_gib(needed)}")
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise Refused(f"{target} cannot be written ({_reason(error)}); nothing was changed") from error


@contextlib.contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Keep other merges out of ``folder``."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = os.fstat(handle).st_ino != folder.stat().st_ino  # another one renamed it a moment ago
        except OSError as error:
            busy = isinstance(error, (BlockingIOError, FileNotFoundError))  # else a file system without locks
        if busy:
            raise Refused(f"another merge into {target} is running")
        yield
    finally:
        os.close(handle)


def _reason(error: OSError) -> str:
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _free_name(target: Path) -> Path:
    number = 0
    while (path := target.with_name(f"{target.name}-lora{f'.{number}' if number else ''}")).exists():
        number += 1
    return path


def _write_receipt(folder: Path, adapter: Adapter, model: BaseModel, home: Path, target: Path) -> None:
    """What this model was merged from: `find_adapter` finds the adapter by it, a later merge the files it wrote."""
    receipt = {
        "schema": 1,
        "adapter": os.path.relpath(home, target),
        "adapter_sha256": adapter.sha256,
        "base": str(model.directory),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / MERGE_FILE).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def _take_place(folder: Path, target: Path, kept: Path | None) -> None:
    if kept is None:
        os.rename(folder, target)  # an empty folder may stand there
        return
    os.rename(target, kept)
    try:
        os.rename(folder, target)
    except OSError:
        os.rename(kept, target)
        raise
    _remove_old_model(kept)


def _remove_old_model(kept: Path) -> None:
    """A script that ran twice trained into the folder of the model merged before: its weights are no adapter's."""
    try:
        files = json.loads((kept / MERGE_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name, size in files.items():
        path = kept / name
        if (name == INDEX or name.startswith("model-")) and Path(name).name == name:
            with contextlib.suppress(OSError):
                if path.stat().st_size == size:
                    path.unlink()
    (kept / MERGE_FILE).unlink(missing_ok=True)


def _warnings(target: Path, config: dict[str, Any], plan: Plan) -> list[str]:
    warnings = loader_warnings(target, config)
    if plan.untied:
        warnings.append("input and output embeddings are no longer one tensor: training changed one of them alone")
    return warnings
