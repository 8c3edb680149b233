"""Memory is seen while a run goes on, with a GPU and without."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorapatch.errors import Refused, UsageError
from lorapatch.run.execute import execute
from lorapatch.run.gpus import Gpu, Gpus
from lorapatch.run.processes import Process
from lorapatch.run.watch import MemorySample, Peaks, Watcher, host_memory, monitor

GIB = 1 << 30


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """An nvidia-ml-py with two GPUs: the second answers nothing, ``used`` is the first one's memory."""
    module = types.ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def memory(handle: int) -> object:
        if handle == 1:
            raise NVMLError("Not Supported")
        return types.SimpleNamespace(used=module.used, total=24 * GIB)  # type: ignore[attr-defined]

    for name, value in {
        "NVMLError": NVMLError,
        "used": 1 * GIB,
        "pids": [],
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: b"550.54",
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "NVIDIA GeForce RTX 4090",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (7 + handle, 5),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [
            types.SimpleNamespace(pid=pid)
            for pid in module.pids  # type: ignore[attr-defined]
        ],
    }.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    yield module


def test_gpus_are_read_and_one_that_does_not_answer_is_left_out(driver: types.ModuleType) -> None:
    gpus = Gpus()
    assert (len(gpus), gpus.driver) == (2, "550.54")
    assert gpus.memory() == (Gpu(0, "NVIDIA GeForce RTX 4090", GIB, 24 * GIB),)
    assert (gpus.supports_bf16(0), gpus.supports_bf16(1)) == (False, True)
    gpus.close()
    assert gpus.memory() == ()


def test_what_the_driver_keeps_for_itself_is_not_counted_as_used(driver: types.ModuleType) -> None:
    """nvidia-smi leaves it out where driver and library can tell, and an old driver refuses the newer question."""

    def memory(handle: int, version: int = 1) -> object:
        return types.SimpleNamespace(used=GIB if version == driver.nvmlMemory_v2 else 2 * GIB, total=24 * GIB)

    driver.nvmlMemory_v2 = 2
    driver.nvmlDeviceGetMemoryInfo = memory
    assert [gpu.used_B for gpu in Gpus().memory()] == [GIB, GIB]

    def old(handle: int, version: int = 1) -> object:
        if version == driver.nvmlMemory_v2:
            raise driver.NVMLError("Function Not Found")
        return memory(handle)

    driver.nvmlDeviceGetMemoryInfo = old
    assert [gpu.used_B for gpu in Gpus().memory()] == [2 * GIB, 2 * GIB]


def test_no_driver_and_no_library_are_told_apart(driver: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise driver.NVMLError("NVML Shared Library Not Found")

    driver.nvmlInit = fail
    assert "driver does not answer" in Gpus().why_none
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in Gpus().why_none
    assert Gpus().memory() == ()


def watch(command: list[str], interval_s: float) -> tuple[Watcher, list[MemorySample]]:
    samples: list[MemorySample] = []
    watchers: list[Watcher] = []

    def start(root: Process, cookie: str) -> None:
        watchers.append(Watcher(root, cookie, samples.append, interval_s))

    execute(command, on_output=lambda data: None, on_start=start)
    watchers[0].stop()
    return watchers[0], samples


def test_a_run_on_a_machine_without_gpu_has_host_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    holds = "import time; held = b'x' * (128 << 20); time.sleep(2)"
    watcher, samples = watch(["bash", "-c", f'"{sys.executable}" -c "{holds}"; true'], interval_s=0.4)
    assert len(samples) >= 4
    assert 128 << 20 < watcher.peaks.host_rss_B < 400 << 20
    assert watcher.peaks.device is None and samples[-1].gpus == ()
    assert samples[0].ram_total_B >= samples[0].ram_available_B > 0
    gaps = [later.time - earlier.time for earlier, later in itertools.pairwise(samples)]
    assert min(gaps) >= 0.4


def test_the_argv_and_environment_of_every_process_are_kept_as_the_kernel_has_them(tmp_path: Path) -> None:
    script = tmp_path / "train me.py"
    script.write_text("import time; time.sleep(1.5)")
    watcher, _ = watch(["bash", "-c", f'RANK=3 "{sys.executable}" "{script}" --name "a  b" "\u635f" ""; true'], 60)
    (trainer,) = [process for process in watcher.seen.values() if str(script) in process.argv]
    assert trainer.argv == [sys.executable, str(script), "--name", "a  b", "\u635f", ""]
    assert trainer.environment["RANK"] == "3" and "PATH" in trainer.environment
    assert set(trainer.environment) & {"HOME", "USER"} == set()


def test_gpus_of_the_run_are_those_that_grew_or_hold_one_of_its_processes(driver: types.ModuleType) -> None:
    gpu = [Gpu(i, "", GIB, 24 * GIB) for i in range(3)]
    peaks = Peaks(before={0: GIB, 1: GIB, 2: 9 * GIB})
    peaks.add(MemorySample(0, (gpu[0], gpu[1], Gpu(2, "", 9 * GIB, 24 * GIB)), 5, 70, 100, 1))
    assert peaks.device is None
    peaks.add(MemorySample(1, (Gpu(0, "", 8 * GIB, 24 * GIB), gpu[1]), 9, 50, 100, 1))
    peaks.add(MemorySample(2, (gpu[0], Gpu(1, "", GIB + 1, 24 * GIB)), 7, 60, 100, 1), users={1})
    assert peaks.used_by_run == {0, 1}
    assert peaks.device == Gpu(0, "", 8 * GIB, 24 * GIB)
    assert (peaks.host_rss_B, peaks.ram_available_B) == (9, 50)


def test_a_gpu_that_fills_up_during_the_run_is_seen(driver: types.ModuleType) -> None:
    threading.Timer(0.7, lambda: setattr(driver, "used", 9 * GIB)).start()
    watcher, samples = watch(["sleep", "2"], interval_s=60)
    assert watcher.peaks.device == Gpu(0, "NVIDIA GeForce RTX 4090", 9 * GIB, 24 * GIB)
    assert len(samples) == 1 and watcher.driver == "550.54"  # the peak is watched between the samples, too


def test_a_sample_is_a_line_of_json() -> None:
    sample = MemorySample(1.23456, (Gpu(0, "x", 1, 2),), 3, 4, 5, 6)
    assert sample.as_dict() == {
        "time": 1.235, "gpus": [{"index": 0, "used_B": 1, "total_B": 2}], "host_rss_B": 3,
        "ram_available_B": 4, "ram_total_B": 5, "processes": 6,
    }  # fmt: skip


def test_monitor_follows_a_process_until_it_ends() -> None:
    child = subprocess.Popen(["sleep", "1"])
    reaper = threading.Thread(target=child.wait)
    reaper.start()
    samples = list(monitor(child.pid, 0.2))
    reaper.join()
    assert len(samples) >= 3 and all(sample.processes == 1 and sample.host_rss_B for sample in samples)


def test_monitor_of_the_machine_goes_on_for_ever(driver: types.ModuleType) -> None:
    samples = monitor(interval_s=0.01)
    assert [next(samples).gpus[0].used_B for _ in range(3)] == [GIB] * 3
    assert next(samples).host_rss_B is None
    samples.close()  # type: ignore[attr-defined]


def test_monitor_refuses_what_cannot_be_watched() -> None:
    with pytest.raises(Refused, match="there is no process 4194999"):
        monitor(4194999)
    with pytest.raises(UsageError, match="more than 0"):
        monitor(os.getpid(), 0)


@pytest.mark.parametrize("version", [1, 2])
def test_the_containers_limit_counts_where_it_is_less(tmp_path: Path, version: int) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 800 kB\n")
    assert host_memory(tmp_path) == (800 << 10, 1000 << 10)
    group = tmp_path / "sys/fs/cgroup" / ("memory" if version == 1 else "")
    group.mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, value in zip((*names, "memory.stat"), ("512000", "400000", "inactive_file 100000\nfile 7")):
        (group / name).write_text(value)
    assert host_memory(tmp_path) == (212000, 512000)
    (group / names[0]).write_text("max" if version == 2 else str(1 << 62))
    assert host_memory(tmp_path) == (800 << 10, 1000 << 10)


def test_a_machine_that_is_watched_is_not_kept_busy() -> None:
    begun, used = time.monotonic(), time.process_time()
    watch(["sleep", "3"], interval_s=5)
    assert (time.process_time() - used) / (time.monotonic() - begun) < 0.1
