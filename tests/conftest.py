"""For all tests: a thread a process, and the long tests first."""

from __future__ import annotations

import os

import pytest

# Workers and the ranks of a training share the cores, and models this small gain nothing by a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real training first: two workers that take file after file then end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("train") is None)
