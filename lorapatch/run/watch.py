"""Memory of a run while it runs: GPUs, processes, the machine; and the argv that each process really had."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lorapatch.errors import Refused, UsageError
from lorapatch.run.gpus import Gpu, Gpus
from lorapatch.run.processes import Process, argv, environment, find, is_running, resident_bytes, run_processes, tree

__all__ = ["MemorySample", "Peaks", "SeenProcess", "Watcher", "host_memory", "monitor"]

# How often it looks, so that a peak between two recorded samples is not missed.
_TICK_S = 1.0
_KEPT_PROCESSES = 256
_KEPT_ENVIRONMENT = (
    "PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX",
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR",
)  # fmt: skip


@dataclass(frozen=True)
class MemorySample:
    """Memory at one moment, in bytes; ``time`` in seconds since 1970.

    ``host_rss_B`` is what the processes of the run hold (None: no process was named), ``ram_available_B`` what could
    still be had, by the machine's or the container's limit, whichever is less.
    """

    time: float
    gpus: tuple[Gpu, ...]
    host_rss_B: int | None
    ram_available_B: int
    ram_total_B: int
    processes: int

    def as_dict(self) -> dict[str, object]:
        """The sample as a line of ``memory.jsonl``."""
        return {
            "time": round(self.time, 3),
            "gpus": [{"index": gpu.index, "used_B": gpu.used_B, "total_B": gpu.total_B} for gpu in self.gpus],
            "host_rss_B": self.host_rss_B,
            "ram_available_B": self.ram_available_B,
            "ram_total_B": self.ram_total_B,
            "processes": self.processes,
        }


@dataclass
class Peaks:
    """The largest values seen, in bytes. ``before`` is what each GPU already held when the run began."""

    before: dict[int, int] = field(default_factory=dict)
    gpus: dict[int, Gpu] = field(default_factory=dict)
    host_rss_B: int = 0
    ram_available_B: int | None = None  # the least
    used_by_run: set[int] = field(default_factory=set)

    def add(self, sample: MemorySample, users: Collection[int] = ()) -> None:
        """Take in a sample; ``users``: the GPUs that a process of the run was seen on."""
        for gpu in sample.gpus:
            if gpu.index not in self.gpus or gpu.used_B > self.gpus[gpu.index].used_B:
                self.gpus[gpu.index] = gpu
            if gpu.used_B - self.before.get(gpu.index, gpu.used_B) > 128 << 20:  # a CUDA context is larger
                self.used_by_run.add(gpu.index)
        self.used_by_run.update(users)
        self.host_rss_B = max(self.host_rss_B, sample.host_rss_B or 0)
        self.ram_available_B = min(self.ram_available_B or sample.ram_available_B, sample.ram_available_B)

    @property
    def device(self) -> Gpu | None:
        """The fullest GPU of the run at its peak; None when it used none."""
        return max((self.gpus[i] for i in self.used_by_run if i in self.gpus), key=lambda gpu: gpu.used_B, default=None)


@dataclass
class SeenProcess:
    """A process of the run: its argv as the kernel has it, and the part of its environment that matters here."""

    pid: int
    parent: int
    argv: list[str]
    environment: dict[str, str] = field(default_factory=dict)


class Watcher:
    """Looks at a run from a thread of its own until it is stopped.

    ``on_sample`` gets a sample every ``interval_s`` seconds, the first at once; the peaks are watched every second.
    """

    def __init__(
        self, root: Process, cookie: str, on_sample: Callable[[MemorySample], None], interval_s: float = 5.0
    ) -> None:
        self.peaks = Peaks()
        self.seen: dict[int, SeenProcess] = {}
        self.driver: str | None = None
        self.latest: MemorySample | None = None
        self._root, self._cookie, self._on_sample, self._interval_s = root, cookie, on_sample, interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lorapatch-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End watching and wait for it."""
        self._over.set()
        self._thread.join(timeout=10)

    def _watch(self) -> None:
        gpus = Gpus()
        self.driver = gpus.driver
        self.peaks.before = {gpu.index: gpu.used_B for gpu in gpus.memory()}
        due, tick = 0.0, 0.1  # a launch that fails at once is looked at in time
        try:
            while True:
                members = run_processes(self._root, self._cookie)
                self._note(members)
                sample = _sample(gpus, members)
                pids = {process.pid for process in members}
                self.peaks.add(sample, [i for i in range(len(gpus)) if gpus.users(i) & pids])
                self.latest = sample
                if sample.time >= due:
                    due = sample.time + self._interval_s
                    self._on_sample(sample)
                if self._over.wait(min(tick, self._interval_s)):
                    return
                tick = min(tick * 1.5, _TICK_S)
        finally:
            gpus.close()

    def _note(self, members: list[Process]) -> None:
        for process in members:
            words = argv(process.pid)
            known = self.seen.get(process.pid)
            if not words or (known is not None and known.argv == words):
                continue  # else between fork and exec it had its parent's
            if len(self.seen) < _KEPT_PROCESSES or known is not None:
                kept = environment(process.pid)
                kept = {name: kept[name] for name in _KEPT_ENVIRONMENT if name in kept}
                self.seen[process.pid] = SeenProcess(process.pid, process.parent, words, kept)


def monitor(pid: int | None = None, interval_s: float = 5.0) -> Iterator[MemorySample]:
    """Memory every ``interval_s`` seconds, for any training that runs: of process ``pid`` and all below it until it
    ends, or of all GPUs and the machine, for ever.

    Raises Refused when there is no such process, UsageError when the interval is not positive.
    """
    if interval_s <= 0:
        raise UsageError(f"an interval of {interval_s:g} s: it has to be more than 0")
    root = find(pid) if pid is not None else None
    if pid is not None and root is None:
        raise Refused(f"there is no process {pid}; `lorapatch monitor` without --pid shows all GPUs")
    return _monitor(root, interval_s)


def _monitor(root: Process | None, interval_s: float) -> Iterator[MemorySample]:
    gpus = Gpus()
    try:
        while root is None or is_running(root):
            yield _sample(gpus, tree(root.pid) if root else None)
            end = time.monotonic() + interval_s
            while (left := end - time.monotonic()) > 0 and (root is None or is_running(root)):
                time.sleep(min(left, 0.5))
    finally:
        gpus.close()


def _sample(gpus: Gpus, members: list[Process] | None) -> MemorySample:
    available, total = host_memory()
    rss = resident_bytes(members) if members is not None else None
    return MemorySample(time.time(), gpus.memory(), rss, available, total, len(members or ()))


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """RAM available and in all, in bytes: the machine's, or what the container (cgroup v2 or v1) allows if less."""
    numbers = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        numbers[name] = int(rest.split()[0]) * 1024
    available, total = numbers["MemAvailable"], numbers["MemTotal"]
    for limit, used, cache in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        group = root / "sys/fs/cgroup"
        try:
            allowed, held = int((group / limit).read_text()), int((group / used).read_text())
            statistics = dict(line.split() for line in (group / cache).read_text().splitlines())
        except (OSError, ValueError):  # not in a container, or "max"
            continue
        if allowed < total:
            reclaimable = int(statistics.get("inactive_file", 0))
            available, total = min(available, allowed - held + reclaimable), allowed
    return max(available, 0), total
