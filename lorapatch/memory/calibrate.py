"""Measure what this GPU takes of a process beside its tensors: CUDA context, cuBLAS's workspace, NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.memory.cards import CALIBRATED, card_here, save_calibration

__all__ = ["Calibration", "calibrate"]

_TIMEOUT_S = 120
_PROBE = Path(__file__).parent / "trace" / "gpu_probe.py"


@dataclass(frozen=True)
class Calibration:
    """Bytes of one process on ``gpu`` under this version of torch, as `Card` has them; None: could not be measured."""

    gpu: str
    torch: str
    context: int
    nccl: int | None
    communicator: int | None
    workspace: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(python: str | None = None) -> Calibration:
    """Measure the first GPU of this machine with ``python``'s torch (default: this one's), and keep it for estimates.

    Takes some ten seconds. Raises Refused where there is no GPU or torch cannot use it.
    """
    card = card_here()
    if card is None:
        raise Refused("no GPU is here to calibrate; `lorapatch doctor` says what is missing")
    found = _probe(python or sys.executable, _used())
    sizes: dict[str, Any] = {name: None if found[name] is None else max(int(found[name]), 0) for name in CALIBRATED}
    measured = Calibration(card.name, str(found["torch"]).partition("+")[0], **sizes)
    save_calibration(card, measured.torch, **sizes)
    return measured


def _used() -> int:
    """What others hold of the GPU now, bytes."""
    from lorapatch.run.gpus import Gpus

    gpus = Gpus()
    try:
        return gpus.memory()[0].used_B
    finally:
        gpus.close()


def _probe(python: str, before: int) -> dict[str, Any]:
    command = [python, str(_PROBE), str(before)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        found = json.loads(ended.stdout.strip().splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Refused(f"{python} cannot use the GPU: {last}") from error
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise Refused(f"{python} cannot measure the GPU: {error}") from error
    if not isinstance(found, dict) or not found.keys() >= {"torch", *CALIBRATED}:
        raise Refused(f"{python} cannot measure the GPU: it answered {found!r}")
    return found
