"""What a process takes of the first GPU beside its tensors, in bytes: ``python gpu_probe.py USED_BEFORE``, needs torch alone.

It does in small what a training step does, so that the driver loads the same kernels, and sets up communication as
DeepSpeed does: ZeRO-3 in one group of ranks, ZeRO-1 and 2 in two. It should be alone on the GPU: what it takes is what
the driver says is free before and after.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
import sys
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

WIDTH, WORDS = 512, 1024


def main(before: int) -> None:
    """Print one JSON line."""
    torch.cuda.set_device(0)
    weights = [torch.randn(WORDS, WIDTH, device="cuda", requires_grad=True) for _ in range(4)]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    for dtype in (torch.bfloat16, torch.float32):
        _step([w.to(dtype) for w in weights])
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    tensors = sum(t.nbytes for w in weights for t in (w, *(s for s in optimizer.state[w].values() if s.is_cuda)))
    workspace = torch.cuda.memory_allocated() - tensors  # cuBLAS's, of this thread and of autograd's
    context = _used(before)
    nccl, communicator = _communication(before + context)
    found = {"context": context, "workspace": workspace, "nccl": nccl, "communicator": communicator}
    sys.stdout.write(json.dumps({"torch": torch.__version__, **found}) + "\n")


def _used(before: int) -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(0)
    return int(total - free - before - torch.cuda.memory_reserved())


def _step(weights: list[Tensor]) -> None:
    """Embedding, normalisation, attention, MLP, a convolution and the loss, forward and backward."""
    words = torch.randint(0, WORDS, (4, 128), device="cuda")
    hidden = functional.embedding(words, weights[0])
    hidden = functional.layer_norm(hidden.float(), (WIDTH,)).to(hidden.dtype)
    heads = functional.linear(hidden, weights[1][:WIDTH]).view(4, 128, 8, 64).transpose(1, 2)
    attended = functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    hidden = hidden + functional.dropout(attended.transpose(1, 2).reshape(4, 128, WIDTH), 0.1)
    inner = functional.silu(functional.linear(hidden, weights[2])) * functional.gelu(functional.linear(hidden, weights[2]))
    image = functional.conv2d(hidden.reshape(4, 1, 256, 256), weights[3][:16, :196].reshape(16, 1, 14, 14), stride=14)
    logits = functional.linear(inner[..., :WIDTH], weights[3]).float()
    kept = logits[words > WORDS // 2]
    loss = functional.cross_entropy(kept, words[words > WORDS // 2]) + image.float().softmax(-1).std()
    torch.cat([loss[None], kept.norm()[None]]).sum().backward()


def _communication(before: int) -> tuple[int | None, int | None]:
    """Bytes of the first group of ranks that talks, and of one more; None where NCCL is not there or does not work."""
    found = []
    try:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
        groups: list[Any] = [dist.group.WORLD, dist.new_group(ranks=[0])]
        for group in groups:
            _talk(group)
            found.append(_used(before))
        dist.destroy_process_group()
    except (AttributeError, RuntimeError, ValueError):  # a torch without torch.distributed, without NCCL, or an NCCL error
        return None, None
    return found[0], found[1] - found[0]


def _talk(group: Any) -> None:
    there = torch.ones(1 << 16, device="cuda", dtype=torch.bfloat16)
    dist.all_reduce(there, group=group)
    dist.broadcast(there, 0, group=group)
    dist.all_gather_into_tensor(torch.empty_like(there), there, group=group)
    dist.reduce_scatter_tensor(torch.empty_like(there), there, group=group)


if __name__ == "__main__":
    main(int(sys.argv[1]))
