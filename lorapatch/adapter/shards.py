"""Writing a model's shards: safetensors files filled by several threads, a few megabytes of each tensor at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lorapatch.adapter.merge_plan import Entry
from lorapatch.adapter.settings import Settings
from lorapatch.adapter.tensors import SIZES, Tensor
from lorapatch.adapter.update import Update, as_torch, torch_dtype
from lorapatch.errors import Refused, UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX", "bytes_of", "write_shards"]

INDEX = "model.safetensors.index.json"
BLOCK = 2 << 20  # bytes in float32: what fits into a core's cache
_PART = 64 << 20  # bytes copied by one call
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def bytes_of(size: int | str) -> int:
    """Bytes of ``2GB``, ``500MB``, ``1.5GiB`` or a number. Raises UsageError."""
    text = str(size).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip().removesuffix("b")
    try:
        value = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        value = 0
    if value <= 0:
        raise UsageError(f"a shard size of {size!r} is no size: write 2GB or 500MB")
    return value


def write_shards(folder: Path, shards: Sequence[Sequence[Entry]], settings: Settings) -> dict[str, str]:
    """Write ``model-0000i-of-0000n.safetensors`` and their index into ``folder``; returns the file of each tensor.

    In memory are, for each thread, one module's A and B and some rows of its weight. Raises Refused, and OSError.
    """
    weight_map: dict[str, str] = {}
    workers = max(1, min(16, len(os.sched_getaffinity(0))))
    with contextlib.ExitStack() as stack:
        torch_threads = stack.enter_context(_TorchThreads())
        pool = stack.enter_context(_pool(workers))
        written: list[tuple[int, list[Future[None]]]] = []
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            handle = os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, handle)
            weight_map.update(dict.fromkeys((entry.name for entry in shard), file))
            places = list(_lay_out(handle, shard))
            tasks = [pool.submit(_write, entry, handle, at, settings, torch_threads) for entry, at in places]
            written.append((handle, tasks))
        for handle, tasks in written:
            for task in tasks:
                task.result()
            os.fsync(handle)  # while the threads go on with the next shard
    index = {"metadata": {"total_size": sum(e.nbytes for s in shards for e in s)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return weight_map


class _TorchThreads:
    """torch's own threads off while ours each work on a tensor: small products are not worth sharing.

    torch is loaded by the first thread that needs it, while another may already copy what training left alone.
    """

    def __init__(self) -> None:
        self._before = 0
        self._lock = threading.Lock()

    def __enter__(self) -> _TorchThreads:
        return self

    def one_each(self) -> None:
        """To be called in each thread before it uses torch."""
        import torch

        with self._lock:
            self._before = self._before or torch.get_num_threads()
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self._before:
            import torch

            torch.set_num_threads(self._before)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that drops what it has not begun when something fails."""
    pool = ThreadPoolExecutor(workers, "merge")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _lay_out(handle: int, shard: Sequence[Entry]) -> Iterator[tuple[Entry, int]]:
    """Write the header, and give each tensor with the place of its bytes; wide types first, so all are aligned."""
    ordered = sorted(shard, key=lambda entry: -SIZES[entry.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        header[entry.name] = {
            "dtype": entry.dtype, "shape": list(entry.source.shape), "data_offsets": [end, end + entry.nbytes],
        }  # fmt: skip
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
    os.ftruncate(handle, 8 + len(text) + end)
    at = 8 + len(text)
    for entry in ordered:
        yield entry, at
        at += entry.nbytes


def _write(entry: Entry, handle: int, at: int, settings: Settings, torch_threads: _TorchThreads) -> None:
    source = entry.source
    if not entry.nbytes:
        return
    if entry.pair is None and entry.dtype == source.dtype:
        if source.start is None:
            _write_all(handle, source.read(), at)
        else:
            _copy(source, handle, at)
        return
    torch_threads.one_each()
    if entry.is_bias:
        assert entry.pair is not None and entry.pair.bias is not None
        own = as_torch(entry.pair.bias).float() * settings.scale(entry.pair.module)
        _write_tensor(entry, as_torch(source) + own, handle, at, bytearray(entry.nbytes))
    else:
        _write_rows(entry, handle, at, None if entry.pair is None else Update(entry.pair, settings))


def _write_rows(entry: Entry, handle: int, at: int, update: Update | None) -> None:
    """Merge and convert some rows at a time, in the same few buffers."""
    import torch

    source, shape = entry.source, entry.source.shape or (1,)
    rows, width = shape[0], math.prod(shape[1:])
    whole = update is not None and not update.by_rows
    step = rows if whole else -(-rows // -(-rows * width * 4 // BLOCK))
    line = width * SIZES[source.dtype]
    data = bytearray(step * line)
    read = torch.frombuffer(data, dtype=torch_dtype(source.dtype)).view(step, width)
    merged = read if update is None else torch.empty(step, width)
    result = bytearray(step * width * SIZES[entry.dtype])
    with _opened(source) as fill:
        for first in range(0, rows, step):
            count = min(step, rows - first)
            fill(memoryview(data)[: count * line], first * line)
            if update is not None:
                update.rows(read[:count], first, merged[:count])
            at += _write_tensor(entry, merged[:count], handle, at, result)


@contextlib.contextmanager
def _opened(source: Tensor) -> Iterator[Callable[[memoryview, int], None]]:
    """A function that fills a buffer with the tensor's bytes from an offset on."""
    if source.start is None:
        whole = source.read()

        def take(view: memoryview, offset: int) -> None:
            view[:] = whole[offset : offset + len(view)]

        yield take
        return
    start = source.start
    with source.file.open("rb", buffering=0) as file:

        def fill(view: memoryview, offset: int) -> None:
            while view:
                done = os.preadv(file.fileno(), [view], start + offset)
                if not done:
                    raise Refused(f"{source.file} became shorter while it was read")
                view, offset = view[done:], offset + done

        yield fill


def _write_tensor(entry: Entry, tensor: torch.Tensor, handle: int, at: int, data: bytearray) -> int:
    """Round ``tensor`` to the entry's type in the buffer ``data`` and write it; returns the number of bytes."""
    import torch

    rounded = torch.frombuffer(data, dtype=torch_dtype(entry.dtype), count=tensor.numel())
    rounded.copy_(tensor.reshape(-1))
    if entry.dtype == "F16" and not torch.isfinite(rounded).all():
        raise Refused(f"{entry.name} has numbers that fp16 cannot hold: merge to bf16 or fp32")
    size = tensor.numel() * SIZES[entry.dtype]
    _write_all(handle, memoryview(data)[:size], at)
    return size


def _write_all(handle: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done


def _copy(source: Tensor, handle: int, at: int) -> None:
    """Bytes from file to file, by the kernel where it can."""
    assert source.start is not None
    place, left, by_kernel = source.start, source.nbytes, hasattr(os, "copy_file_range")
    with source.file.open("rb", buffering=0) as file:
        while left:
            done = 0
            if by_kernel:
                try:
                    done = os.copy_file_range(file.fileno(), handle, min(left, _PART), place, at)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                        raise
                    by_kernel = False
            if not by_kernel:
                data = os.pread(file.fileno(), min(left, 8 << 20), place)
                _write_all(handle, data, at)
                done = len(data)
            if not done:
                raise Refused(f"{source.file} became shorter while it was read")
            place, at, left = place + done, at + done, left - done
