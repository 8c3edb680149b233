"""For all tests: a thread a process, memory kept for the next step, and the long tests first."""

from __future__ import annotations

import os

import pytest

# Workers and the ranks of a training share the cores, and models this small gain nothing by a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# glibc gives a large block back to the kernel as soon as it is free: a training asks for the same ones again at every
# step, and the kernel clears their pages every time. The processes that tests start keep them (1 GiB of free memory).
for _name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
    os.environ.setdefault(_name, str(1 << 30))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real training first: two workers that take file after file then end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("train") is None)
