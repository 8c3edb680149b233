"""What a GPU takes beside PyTorch's allocations: CUDA context, NCCL, cuBLAS's workspace; a table, refined by measuring."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from lorapatch.errors import UsageError
from lorapatch.memory.cache import load, store
from lorapatch.memory.model import Bytes
from lorapatch.memory.trace import COMPUTE_CAPABILITY
from lorapatch.run.gpus import Gpus

__all__ = ["CALIBRATED", "CARDS", "Card", "card_called", "card_here", "default_card", "save_calibration"]

MIB = 1 << 20
_CALIBRATION = "calibration.json"
CALIBRATED = ("context", "nccl", "communicator", "workspace")


@dataclass(frozen=True)
class Card:
    """A GPU: memory as nvidia-smi shows it, and what a process takes of it beside its tensors; bytes.

    ``context`` is the CUDA context with the kernels that a training step loads, ``nccl`` what communication takes when
    a launcher sets it up (DeepSpeed does for one GPU, too), ``communicator`` what every further group of ranks takes,
    ``peers`` what talking to other GPUs takes, ``workspace`` cuBLAS's and cuBLASLt's, which PyTorch allocates.
    ``measured``: on such a card, by us or by ``lorapatch estimate --calibrate``; else it is the nearest one's.
    """

    name: str
    memory: int
    context: int
    nccl: int
    communicator: int
    peers: int
    workspace: int
    measured: bool = False

    @property
    def traced_as(self) -> str:
        """Its name as the trace has it, for the compute capability."""
        return next((name for name in COMPUTE_CAPABILITY if name.lower() in _words(self.name)), self.name)

    def overhead(self, *, communicators: int, alone: bool = True) -> Bytes:
        """Device memory beside what PyTorch reserves, for one process in so many groups of ranks; ``alone``: of one GPU."""
        expected = self.context + (self.nccl + (communicators - 1) * self.communicator if communicators else 0)
        expected += 0 if alone else self.peers
        spread = 0.25 if self.measured else 0.4
        return Bytes(round(expected * (1 - spread)), expected, round(expected * (1 + spread)))


def _card(
    name: str, memory: int, context: int, nccl: int, more: int, peers: int, workspace: int, measured: bool = False
) -> Card:
    sizes = (memory, context, nccl, more, peers, workspace)
    memory, context, nccl, more, peers, workspace = (size * MIB for size in sizes)
    return Card(name, memory, context, nccl, more, peers, workspace, measured)


# Memory: nvidia-smi's total, MiB. Workspace: aten/src/ATen/cuda/CUDABlas.cpp, getChosenWorkspaceSize (32 MiB on compute
# capability 9, else 8 MiB and a little), once for the forward thread and once for autograd's. Context and NCCL of the
# H200: training runs with torch 2.11; device less reserved was 0.74 GiB without a launcher, 1.67 GiB under ZeRO-2 (two
# groups of ranks), 1.29 GiB under ZeRO-3 (one); with a second GPU 0.27 (DDP), 0.38 (ZeRO-2) and 0.47 GiB (ZeRO-3) more.
# The H100 is the same chip. The other cards' contexts are rounded from what users report for a PyTorch process with lazy
# loading (CUDA 12), and were not measured by us.
CARDS = (
    _card("H200", 143_771, 760, 560, 390, 380, 64, measured=True),
    _card("H100", 81_559, 760, 560, 390, 380, 64),
    _card("A100 80GB", 81_920, 450, 600, 400, 300, 17),
    _card("A100 40GB", 40_960, 450, 600, 400, 300, 17),
    _card("L40S", 46_068, 430, 540, 360, 250, 17),
    _card("RTX A6000", 49_140, 350, 480, 320, 250, 17),
    _card("A10", 23_028, 300, 420, 280, 200, 17),
    _card("L4", 23_034, 330, 420, 280, 200, 17),
    _card("RTX 5090", 32_607, 500, 540, 360, 250, 17),
    _card("RTX 4090", 24_564, 400, 420, 280, 200, 17),
    _card("RTX 3090", 24_576, 310, 420, 280, 200, 17),
    _card("T4", 15_360, 180, 300, 200, 150, 17),
    _card("V100 32GB", 32_768, 310, 420, 280, 200, 17),
    _card("V100 16GB", 16_384, 310, 420, 280, 200, 17),
)
_USUAL = "RTX 4090"  # the 24 GB card, where there is none to look at


def card_called(name: str, torch: str | None = None) -> Card:
    """The card that ``name`` (as nvidia-smi or people write it) means, with what was measured of it under that ``torch``.

    Raises UsageError for a card that is not in the table.
    """
    words = _words(name)
    found = [card for card in CARDS if _words(card.name)[0] in words]
    if not found:
        raise UsageError(f"there is no card {name} in the table; choose one of {', '.join(card.name for card in CARDS)}")
    exact = [card for card in found if set(_words(card.name)) <= set(words)]
    return _calibrated((exact or found)[0], torch)


def card_here(torch: str | None = None) -> Card | None:
    """This machine's first GPU; None where there is none. One that the table does not know has its own memory."""
    gpus = Gpus()
    try:
        seen = gpus.memory()
    finally:
        gpus.close()
    if not seen:
        return None
    try:
        known = card_called(seen[0].name, torch)
    except UsageError:
        known = _calibrated(replace(card_called(_USUAL), name=seen[0].name, measured=False), torch)
    return replace(known, memory=seen[0].total_B)


def default_card(torch: str | None = None) -> tuple[Card, str | None]:
    """The card here, or the usual 24 GB one, and then what was assumed."""
    here = card_here(torch)
    if here is not None:
        return here, None
    return card_called(_USUAL, torch), f"no GPU is here; device memory is meant for a {_USUAL} (say --gpu)"


def _words(name: str) -> list[str]:
    """``NVIDIA GeForce RTX 4090`` and ``rtx4090`` as ["4090"]; ``A100-SXM4-80GB`` as ["a100", "sxm4", "80gb"]."""
    words = [word.removeprefix("rtx") for word in re.findall(r"[a-z0-9]+", name.lower())]
    return [word for word in words if word and word not in ("nvidia", "geforce", "tesla")] or [name.lower()]


def _calibrated(card: Card, torch: str | None) -> Card:
    found = load(_CALIBRATION).get(_key(card.name, torch))
    if not isinstance(found, dict):
        return card
    sizes: dict[str, Any] = {name: int(found[name]) for name in CALIBRATED if found.get(name) is not None}
    return replace(card, measured=True, **sizes)


def save_calibration(card: Card, torch: str, **measured_B: int | None) -> None:
    """Keep what was measured on ``card`` with this version of torch, for every estimate from now on."""
    store(_CALIBRATION, {**load(_CALIBRATION), _key(card.name, torch): measured_B})


def _key(name: str, torch: str | None) -> str:
    return f"{' '.join(_words(name))} torch {(torch or '').partition('+')[0]}"
