"""No DeepSpeed: gradients on the parameters, torch's clipping, DistributedDataParallel where there are several GPUs."""

# mypy: allow-untyped-calls
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorapatch.memory.model import RunSetup
from lorapatch.memory.trace import optimizers
from lorapatch.memory.trace.recorder import Recorder

__all__ = ["PlainEngine", "decay_groups", "when_accumulated"]


def decay_groups(model: nn.Module) -> list[list[Tensor]]:
    """transformers' two groups of what learns: matrices, and the vectors (norms, biases) that weight decay spares."""
    learning: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in learning if p.dim() > 1], [p for p in learning if p.dim() < 2]]
    return [group for group in groups if group]


def when_accumulated(parameter: Tensor, hook: Any) -> Any:
    """Call ``hook(parameter)`` whenever its gradient is complete; returns what has to be kept alive."""
    if hasattr(parameter, "register_post_accumulate_grad_hook"):
        return parameter.register_post_accumulate_grad_hook(hook)
    node: Any = parameter.expand_as(parameter).grad_fn
    accumulator = node.next_functions[0][0]
    accumulator.register_hook(lambda *_: hook(parameter))  # torch before 2.1
    return accumulator


class PlainEngine:
    """accelerate without a plugin: what a micro-batch and a step do to memory beside the model itself."""

    def __init__(self, recorder: Recorder, model: nn.Module, setup: RunSetup) -> None:
        self.recorder = recorder
        self.groups = decay_groups(model)
        self.kept = [when_accumulated(p, self._mark) for group in self.groups for p in group]
        if setup.gpus > 1:  # torch/csrc/distributed/c10d/reducer.cpp: buckets of 25 MiB hold a copy of every gradient
            with recorder.of("buffers"):
                self.buckets = [torch.empty_like(p) for group in self.groups for p in group]
        self.optimizer = optimizers.make(setup.optimizer, recorder, self.groups)

    def _mark(self, parameter: Tensor) -> None:
        self.recorder.add(parameter.grad, "gradients")  # type: ignore[arg-type]

    def backward(self, loss: Tensor, *, boundary: bool) -> None:
        """One micro-batch's backward pass."""
        loss.backward()

    def step(self) -> None:
        """Clip, update, forget the gradients."""
        torch.nn.utils.clip_grad_norm_([p for group in self.groups for p in group], 1.0)
        self.optimizer.step()
        for group in self.groups:
            for p in group:
                p.grad = None

    def close(self) -> None:
        """Nothing of it outlives the run."""
