"""A toolkit whose trainer takes host memory and shows losses as its flags say: real processes, a second each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "run"))

import toykit  # noqa: E402

# 16 MiB a sample, half of it with checkpointing; a learning rate above 1e-2 diverges, one below 1e-4 does nothing.
MEMORY = """
    size = args.per_device_train_batch_size << (23 if args.gradient_checkpointing else 24)
    held = bytearray(b"x") * size
"""
LOSS = """
        rate = args.learning_rate
        wave = 0.01 * ((7 * step) % 5 - 2)
        loss = 2.5 * 1.6 ** step if rate > 1e-2 else 2.5 + wave - (0.05 * step if rate >= 1e-4 else 0)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script of two stages in a toolkit of its own; micro-batch 8, accumulation 4, both kept in variables."""
    path = toykit.make_toykit(tmp_path / "kit", "train.sh")
    source = toykit.TRAINER.replace("    mode = os.environ", f"{MEMORY}    mode = os.environ", 1)
    source = source.replace(
        '    parser.add_argument("--step_s"',
        '    parser.add_argument("--gradient_checkpointing", type=lambda text: text == "True", default=False)\n'
        '    parser.add_argument("--step_s"',
    )
    start = source.index("        loss = float")
    source = source[:start] + LOSS.lstrip("\n") + source[source.index("\n", start) + 1 :]
    (path.parent / "train.py").write_text(source)
    text = path.read_text()
    text = text.replace("NAME=toy\n", "NAME=toy\nBATCH=8\nACCUMULATION=4\n[ $((BATCH * ACCUMULATION)) = 32 ] || exit 1\n")
    text = text.replace("train_batch_size 2", "train_batch_size $BATCH").replace("steps 4 ", "steps $ACCUMULATION ")
    path.write_text(text)
    monkeypatch.chdir(tmp_path)
    for name, value in toykit.quick_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return path
