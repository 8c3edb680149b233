"""Demos to test with: one made quickly, whose models have learned next to nothing, and a real one."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from lorapatch.demo import make_demo, pretraining

pytest.importorskip("deepspeed")


def shorten(patch: pytest.MonkeyPatch) -> None:
    for name in ("LANGUAGE_STEPS", "VISION_STEPS", "AUX_STEPS"):
        patch.setattr(pretraining, name, 2)
    patch.setattr(pretraining, "STEPS", 6)


@pytest.fixture
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny models of a new demo train for a few steps only."""
    shorten(monkeypatch)


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toolkit folder of a demo whose models are all but random; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return make_demo(tmp_path_factory.mktemp("quick") / "demo")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toolkit folder of a demo as users get it: one for all workers, not to be changed."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with (shared / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed; who comes second finds a finished demo
        return make_demo(shared / "demo")
