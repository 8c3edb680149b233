"""Measure what this GPU takes of a process beside its tensors: CUDA context, cuBLAS's workspace, NCCL."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from lorapatch.errors import Refused
from lorapatch.memory.cards import card_here, save_calibration

__all__ = ["Calibration", "calibrate"]

_TIMEOUT_S = 120


@dataclass(frozen=True)
class Calibration:
    """Bytes of one process on ``gpu`` under this version of torch; None: could not be measured."""

    gpu: str
    torch: str
    context: int
    nccl: int | None
    workspace: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Runs alone on the GPU, in the interpreter that the training will use: device memory is what the driver says is free
# less what it said before, so another process that starts or ends meanwhile would spoil it; the caller looks for that.
_PROBE = """
import json, os, sys
import torch
def used():
    free, total = torch.cuda.mem_get_info(0)
    return total - free
before = int(sys.argv[1])
torch.cuda.set_device(0)
a = torch.randn(512, 512, device="cuda", dtype=torch.float16, requires_grad=True)
torch.nn.functional.layer_norm(a, (512,)).float().softmax(-1).sum().backward()
torch.cuda.synchronize()
context = used() - before - torch.cuda.memory_reserved()
held = torch.cuda.memory_allocated()
b = torch.nn.functional.linear(a.detach(), a.detach(), a.detach()[0])
c = a.detach() @ a.detach()
torch.cuda.synchronize()
workspace = torch.cuda.memory_allocated() - held - b.nbytes - c.nbytes
context = max(context, used() - before - torch.cuda.memory_reserved())
nccl = None
try:
    import torch.distributed as dist
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    t = torch.ones(1 << 20, device="cuda")
    dist.all_reduce(t); dist.broadcast(t, 0); dist.all_gather_into_tensor(torch.empty_like(t), t)
    torch.cuda.synchronize()
    nccl = used() - before - torch.cuda.memory_reserved() - context
    dist.destroy_process_group()
except Exception:
    pass
print(json.dumps({"torch": torch.__version__, "context": context, "workspace": workspace, "nccl": nccl}))
"""


def calibrate(python: str | None = None) -> Calibration:
    """Measure the first GPU of this machine with ``python``'s torch (default: this one's), and keep it for estimates.

    Takes some ten seconds. Raises Refused where there is no GPU or torch cannot use it.
    """
    card = card_here()
    if card is None:
        raise Refused("no GPU is here to calibrate; `lorapatch doctor` says what is missing")
    found = _probe(python or sys.executable, _used())
    measured = Calibration(
        card.name,
        str(found["torch"]).partition("+")[0],
        max(int(found["context"]), 0),
        None if found["nccl"] is None else max(int(found["nccl"]), 0),
        max(int(found["workspace"]), 0),
    )
    save_calibration(card, measured.torch, context=measured.context, nccl=measured.nccl, workspace=measured.workspace)
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
    command = [python, "-c", _PROBE, str(before)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
        found = json.loads(ended.stdout.strip().splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Refused(f"{python} cannot use the GPU: {last}") from error
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise Refused(f"{python} cannot measure the GPU: {error}") from error
    if not isinstance(found, dict):
        raise Refused(f"{python} cannot measure the GPU: it answered {found!r}")
    return found
