"""The checks a toolkit script runs before it trains: global batch size, number of samples."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lorapatch.errors import LorapatchError, Refused, UsageError

__all__ = ["check_global_batch_size", "check_sample_number", "device_count", "tool"]

SEED = 1024  # the same samples are kept every time


def tool(function: Callable[[Sequence[str]], None]) -> int:
    """Run ``function`` on the command line's arguments; an error is one sentence on stderr. Returns the exit code."""
    try:
        function(sys.argv[1:])
    except LorapatchError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return 1
    return 0


def device_count() -> int:
    """How many processes DeepSpeed's launcher starts here: one a GPU, else one a NUMA node if numactl is there."""
    import torch

    gpus = int(torch.cuda.device_count())
    if gpus or shutil.which("numactl") is None:
        return gpus or 1
    nodes = Path("/sys/devices/system/node").glob("node[0-9]*/cpulist")
    return max(1, sum(bool(node.read_text().strip()) for node in nodes))


def _positive(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"{name} is {text!r}; it has to be a whole number above 0.")
    return int(text)


def check_global_batch_size(arguments: Sequence[str]) -> None:
    """Print True if BATCH_SIZE x ACCUMULATION x devices is WANTED, else False with the sum on stderr.

    Raises UsageError for arguments that are not three whole numbers above 0.
    """
    if len(arguments) != 3:
        raise UsageError(f"wants BATCH_SIZE ACCUMULATION WANTED, got {len(arguments)} arguments.")
    names = ("BATCH_SIZE", "ACCUMULATION", "WANTED")
    batch, accumulation, wanted = (_positive(*pair) for pair in zip(names, arguments, strict=True))
    devices = device_count()
    total = batch * accumulation * devices
    print(total == wanted)
    if total != wanted:
        print(f"{batch} x {accumulation} x {devices} devices = {total}, not {wanted}", file=sys.stderr)


def check_sample_number(arguments: Sequence[str]) -> None:
    """Copy the JSON lines of INPUT to OUTPUT, at most LIMIT (200000) of them, drawn with a fixed seed, in order.

    Raises UsageError for bad arguments, Refused for an input that is missing or empty.
    """
    if len(arguments) not in (2, 3):
        raise UsageError(f"wants INPUT OUTPUT [LIMIT], got {len(arguments)} arguments.")
    source, target = Path(arguments[0]), Path(arguments[1])
    limit = _positive("LIMIT", arguments[2]) if len(arguments) == 3 else 200_000
    lines = _lines(source)
    kept = lines
    if len(lines) > limit:
        kept = [lines[number] for number in sorted(random.Random(SEED).sample(range(len(lines)), limit))]
    write_whole(target, "".join(line + "\n" for line in kept))
    print(f"{len(lines)} samples in {source.name}, {len(kept)} kept")


def _lines(source: Path) -> list[str]:
    try:
        lines = [line for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"cannot read {source}: {_reason(error)}.") from error
    if not lines:
        raise Refused(f"{source} holds no samples.")
    return lines


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


def write_whole(target: Path, text: str) -> None:
    """Write ``text`` to ``target`` in one piece: a reader sees the old file or the new one, never a half.

    Raises Refused when it cannot be written.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Refused(f"cannot write {target}: {_reason(error)}.") from error
