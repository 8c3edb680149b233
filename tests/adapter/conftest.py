"""Tiny bases and adapters, made once a session and copied for each test that changes them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_models  # noqa: E402

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``bases(family, dtype, **configuration)``: the folder of a base model; not to be changed."""
    made: dict[str, Path] = {}

    def base(family: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
        key = f"{family}-{dtype}-{sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("base") / f"{family}-{dtype}"
            made[key] = tiny_models.make_base(folder, family, dtype, **changes)
        return made[key]

    return base


@pytest.fixture(scope="session")
def good(bases: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter of the Llama base; not to be changed."""
    return tiny_models.make_adapter(tmp_path_factory.mktemp("good") / "adapter", bases())


@pytest.fixture
def adapter(good: Path, tmp_path: Path) -> Path:
    """A copy of the sound adapter."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@pytest.fixture(scope="session")
def mgm_made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model zoo and an MGM adapter; not to be changed."""
    return tiny_models.make_mgm(tmp_path_factory.mktemp("mgm"))


@pytest.fixture
def mgm(mgm_made: tuple[Any, Path], tmp_path: Path) -> Path:
    """A copy of the MGM adapter."""
    return Path(shutil.copytree(mgm_made[1], tmp_path / "MGM-2B-Finetune-test"))
