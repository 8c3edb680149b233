"""Adds up live storages while a step runs on fake tensors: every allocation and release, in bytes, as CUDA would make it."""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lorapatch.memory.allocator import EMPTY_CACHE, CachingAllocator

try:
    from torch._subclasses.fake_tensor import unset_fake_temporarily
except ImportError:  # torch before 2.1
    from torch.fx.experimental import proxy_tensor

    unset_fake_temporarily = proxy_tensor.maybe_disable_fake_tensor_mode  # type: ignore[attr-defined]

__all__ = ["Record", "Recorder", "unset_fake_temporarily"]

_ANY = {getattr(torch.ops.aten.any, name) for name in torch.ops.aten.any.overloads()}
# Before torch 2.1 a storage's Python object dies at once: whether the storage still lives has to be asked.
_ASKED = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 1)
_LIFT = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}  # torch.tensor() on its way
_READ = torch.ops.aten._local_scalar_dense.default


@dataclass(slots=True)
class Record:
    """One storage: bytes of the block that the allocator gives it, who made it, and its first and last event."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    phase: str
    operation: str
    category: str
    born: int
    died: int | None = None


class Recorder(TorchDispatchMode):
    """Enter it inside a FakeTensorMode. ``events`` lists (+bytes, id) and (-bytes, id); ``records[id]`` says what it was.

    torch's allocator runs along: a storage counts as large as the block that it gets (max_memory_allocated() adds up
    blocks), and blocks that no other storage fits into stay reserved.

    What is made inside :meth:`host` lies in the CPU's memory and counts there. Questions that the data would have to answer
    are answered as for samples of equal length: ``if mask.all()`` is true, ``if (mask != 1).any()`` is not; ``questions``
    names what was asked.
    """

    def __init__(self, allocator: CachingAllocator | None = None) -> None:
        super().__init__()
        self.allocator = allocator or CachingAllocator()
        self.records: list[Record] = []
        self.events: list[tuple[int, int]] = []
        self.live = self.peak = self.peak_event = 0
        self.phases: dict[str, int] = {}
        self.marks: list[tuple[str, int, int]] = []  # what begins, of which length, with which event
        self.host_live = self.host_peak = self.host_held = 0  # held: when the run is over
        self.host_rounding = 0  # ATen/core/CachingHostAllocator.h: a pinned block has a power of two of bytes
        self.phase = "load"
        self.category = "activations"
        self.stream = ""
        self.streams: dict[int, str] = {}  # of the storages that another stream allocated
        self.questions: set[str] = set()
        self.computes_known = False  # real tensors (small ones, whose values decide shapes) are computed with, not counted
        self._young: dict[int, Any] = {}
        self._looked = 0
        self._anys: set[int] = set()  # storages that hold an ``any``
        self._known: dict[int, tuple[Any, int]] = {}
        self._on_host = self._pinned = False
        self._uncounted = False
        self._scalars_on_host = False
        self._operation = "load"

    @contextlib.contextmanager
    def host(self, *, pinned: bool = False) -> Iterator[None]:
        """What is allocated inside lies in host memory, in pages that cannot move if it is ``pinned``."""
        before, self._on_host, self._pinned = (self._on_host, self._pinned), True, pinned
        try:
            yield
        finally:
            self._on_host, self._pinned = before

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is made inside is nowhere: the run never has it."""
        self._uncounted = True
        try:
            yield
        finally:
            self._uncounted = False

    @contextlib.contextmanager
    def scalars_on_host(self) -> Iterator[None]:
        """Single numbers made inside (an optimizer's step counters) lie in host memory: too little to count."""
        self._scalars_on_host = True
        try:
            yield
        finally:
            self._scalars_on_host = False

    @contextlib.contextmanager
    def of(self, category: str) -> Iterator[None]:
        """What is allocated inside belongs to ``category``."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        """What is allocated inside comes from another stream's blocks."""
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    def mark(self, kind: str, length: int = 0) -> None:
        """From the next event on it is ``kind`` ("inputs", "micro-batch", "step"), of ``length`` tokens a sample."""
        self.marks.append((kind, length, len(self.events)))

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache()."""
        self.events.append(EMPTY_CACHE)
        self.allocator.empty_cache()

    def add(self, tensor: Tensor, category: str | None = None) -> None:
        """Count the storage of ``tensor``, or give one that is counted its ``category``."""
        key = _storage(tensor)._cdata
        if key in self._known:
            if category and self.records[self._known[key][1]].category != "host":
                self.records[self._known[key][1]].category = category
            return
        storage = _storage(tensor)
        nbytes = storage.nbytes()
        if nbytes == 0 or self._uncounted or (self._scalars_on_host and tensor.dim() == 0):
            return
        if self._on_host:
            self._add_on_host(storage, key, nbytes)
            return
        number = self._allocate(nbytes, tuple(tensor.shape), tensor.dtype, category)
        self._known[key] = (self._watch(storage, key), number)

    def temporary(self, nbytes: int, operation: str) -> None:
        """Memory that a kernel takes and gives back before it ends."""
        if nbytes > 0:
            before, self._operation = self._operation, operation
            self._release(self._allocate(nbytes, (nbytes,), torch.uint8, None))
            self._operation = before

    def keep(self, nbytes: int, operation: str, category: str = "buffers") -> None:
        """Memory that is never given back (a library's workspace)."""
        before, self._operation = self._operation, operation
        self._allocate(nbytes, (nbytes,), torch.uint8, category)
        self._operation = before

    def alive_at_peak(self) -> list[Record]:
        """The storages that lived when most was allocated."""
        at = self.peak_event
        return [r for r in self.records if r.born <= at and (r.died is None or r.died > at)]

    def _add_on_host(self, storage: Any, key: int, nbytes: int) -> None:
        self.host_live += nbytes
        if self._pinned:
            self.host_rounding += (1 << (nbytes - 1).bit_length()) - nbytes
        self.host_peak = max(self.host_peak, self.host_live)
        self.records.append(Record(nbytes, (), torch.uint8, self.phase, self._operation, "host", len(self.events), -1))
        self._known[key] = (self._watch(storage, key), len(self.records) - 1)

    def _watch(self, storage: Any, key: int) -> Any:
        if not _ASKED:
            return weakref.ref(storage, lambda _: self._gone(key))
        from torch.multiprocessing.reductions import StorageWeakRef

        watch = StorageWeakRef(storage)
        if self.phase != "load":
            self._young[key] = watch
        return watch

    def _look_around(self) -> None:
        """Ask which storages died: the young ones each time, the model's own now and then."""
        self._looked += 1
        watched = self._young if self._looked % 256 else {key: watch for key, (watch, _) in self._known.items()}
        for key in [key for key, watch in watched.items() if watch.expired()]:
            self._gone(key)

    def _gone(self, key: int) -> None:
        number = self._known.pop(key)[1]
        self._young.pop(key, None)
        self._anys.discard(key)
        if self.records[number].category == "host":
            self.host_live -= self.records[number].nbytes
        else:
            self._release(number)

    def _allocate(self, nbytes: int, shape: tuple[int, ...], dtype: torch.dtype, category: str | None) -> int:
        number = len(self.records)
        born = len(self.events)
        if self.stream:
            self.streams[number] = self.stream
        block = self.allocator.malloc(number, nbytes, self.stream)
        self.records.append(Record(block, shape, dtype, self.phase, self._operation, category or self.category, born))
        self.events.append((nbytes, number))
        self.live += block
        if self.live > self.peak:
            self.peak, self.peak_event = self.live, born
        if self.live > self.phases.get(self.phase, 0):
            self.phases[self.phase] = self.live
        return number

    def _release(self, number: int) -> None:
        record = self.records[number]
        record.died = len(self.events)
        self.events.append((-record.nbytes, number))
        self.allocator.release(number)
        self.live -= record.nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _ASKED:
            self._look_around()
        if self.computes_known and args and type(args[0]) is Tensor and func not in _LIFT and _known(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        self._operation = func.__name__ if hasattr(func, "__name__") else str(func)
        try:
            out = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return self._answer(func, args)
        if isinstance(out, Tensor):
            self.add(out)
            if func in _ANY:
                self._anys.add(_storage(out)._cdata)
        elif out is not None:
            for leaf in tree_flatten(out)[0]:
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        return out

    def _answer(self, func: Any, args: Any) -> Any:
        if func is not _READ:
            raise
        asked_any = _storage(args[0])._cdata in self._anys
        self.questions.add("any" if asked_any else "all")
        dtype = args[0].dtype
        return not asked_any if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _known(args: Any, kwargs: Any) -> bool:
    leaves = tree_flatten((args, kwargs))[0]
    return all(type(leaf) is Tensor for leaf in leaves if isinstance(leaf, Tensor))
