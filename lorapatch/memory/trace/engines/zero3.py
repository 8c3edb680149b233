"""ZeRO-3 as deepspeed/runtime/zero/stage3.py and partition_parameters.py allocate it, for rank 0.

One rank that keeps its parameters on the GPU gathers nothing (a gathered parameter is a view of its whole partition);
several ranks, and parameters offloaded to the host, take what :mod:`gathering` brings.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorapatch.memory.model import RunSetup, Zero
from lorapatch.memory.trace import optimizers
from lorapatch.memory.trace.cuda import autocast_dtype
from lorapatch.memory.trace.engines.gathering import Gatherer
from lorapatch.memory.trace.engines.plain import decay_groups, when_accumulated
from lorapatch.memory.trace.engines.zero import on_device
from lorapatch.memory.trace.recorder import Recorder
from lorapatch.memory.zero import NORM_PART, SUB_GROUP

__all__ = ["Zero3Engine"]


class Zero3Engine:
    """Partitions in one flat buffer, float32 masters and a step by sub-group, gradients reduced into a flat buffer."""

    def __init__(
        self, recorder: Recorder, model: nn.Module, setup: RunSetup, leaves: tuple[type[nn.Module], ...] = ()
    ) -> None:
        assert setup.zero is not None
        self.zero: Zero = setup.zero
        self.recorder, self.ranks = recorder, setup.gpus
        self.groups = _sub_groups(decay_groups(model), self.ranks)
        self.learning = [p for group in self.groups for p in group]
        self.dtype = self.learning[0].dtype
        self.linear = functional.linear
        functional.linear = _linear  # zero.Init's memory_efficient_linear
        self.sizes = {id(p): p.numel() for p in model.parameters()}
        self.late: set[int] = set()
        # before the gatherer's hooks, which let go of what these still need
        self.kept: list[Any] = [self._watch_leaf(module) for module in model.modules() if isinstance(module, leaves)]
        self.gatherer: Gatherer | None = None
        if self.ranks > 1 or self.zero.offload_param:
            self.gatherer = Gatherer(recorder, model, self.zero, self.ranks, leaves)
        else:
            self._flatten()
        self.masters = [self._master(group) for group in self.groups]
        self._init_states()
        host = self.zero.offload_optimizer
        with recorder.of("buffers"):
            self.bucket = torch.empty(self.zero.reduce_bucket_size, dtype=self.dtype)
        with recorder.of("gradients"), on_device(recorder, not host, pinned=self.zero.pin_memory):
            self.gradients = torch.empty(sum(self._share(p) for p in self.learning), dtype=self.dtype)
        self.waiting: list[Tensor] = []
        self.filled = 0
        self.boundary = False  # does a step come behind this micro-batch?
        self.kept += [when_accumulated(p, self._hook) for p in self.learning if id(p) not in self.late]
        self.optimizer = optimizers.make(setup.optimizer, recorder, [[m] for m in self.masters], on_cpu=host)

    def _watch_leaf(self, leaf: nn.Module) -> Any:
        """Its gradients wait until its backward pass is over (create_reduce_and_remove_grad_hooks)."""
        parameters: list[Tensor] = [p for p in leaf.parameters() if p.requires_grad]
        self.late.update(id(p) for p in parameters)
        return leaf.register_full_backward_hook(functools.partial(self._reduce_leaf, parameters))

    def _reduce_leaf(self, parameters: list[Tensor], *_: Any) -> None:
        for p in parameters:
            if p.grad is None:
                p.grad = torch.empty_like(p)
            self._hook(p)

    def _share(self, parameter: Tensor) -> int:
        return -(-self.sizes[id(parameter)] // self.ranks)

    def _flatten(self) -> None:
        """defragment: through the host, so that the flat buffer takes the place of the parts."""
        shapes = [p.shape for p in self.learning]
        for p in self.learning:
            p.data = torch.empty(0, dtype=self.dtype)
        self.recorder.empty_cache()
        with self.recorder.of("trainable_weights"):
            flat = torch.empty(sum(shape.numel() for shape in shapes), dtype=self.dtype)
        offset = 0
        for p, shape in zip(self.learning, shapes):
            p.data = flat.narrow(0, offset, shape.numel()).view(shape)
            offset += shape.numel()

    def _master(self, group: list[Tensor]) -> Tensor:
        with self.recorder.of("master_copies"), on_device(self.recorder, not self.zero.offload_optimizer):
            converted = torch.empty(sum(self._share(p) for p in group), dtype=torch.float32)
            return converted.clone().requires_grad_(True)

    def _init_states(self) -> None:
        host = self.zero.offload_optimizer
        with self.recorder.of("gradients"), on_device(self.recorder, not host):
            buffer = torch.empty(max(len(m) for m in self.masters), dtype=torch.float32)
            with on_device(self.recorder, not host, pinned=self.zero.pin_memory):
                for master in self.masters if host else []:
                    master.grad = torch.empty(len(master), dtype=torch.float32)
            del buffer

    def _hook(self, parameter: Tensor) -> None:
        """reduce_independent_p_g_buckets_and_remove_grads."""
        if parameter.grad is None:
            return
        self.recorder.add(parameter.grad, "gradients")
        size = parameter.grad.numel()
        if self.filled and self.filled + size > self.zero.reduce_bucket_size:
            self._reduce()
        if self.filled + size <= self.zero.reduce_bucket_size:
            parameter.grad = self.bucket.narrow(0, self.filled, size).view(parameter.grad.shape)
        self.waiting.append(parameter)
        self.filled += size

    def _reduce(self) -> None:
        """reduce_scatter_coalesced: several gradients are laid one behind the other first, their shares are parts of that."""
        with self.recorder.of("gradients"), self.recorder.on("reduction" if self.zero.overlap_comm else ""):
            flat = torch.empty(self.filled, dtype=self.dtype) if len(self.waiting) > 1 else None
            for p in self.waiting:
                if self.zero.offload_optimizer:
                    self._to_host(self._share(p))
                p.grad = None
            del flat
        self.waiting, self.filled = [], 0

    def _to_host(self, share: int) -> None:
        """The way of one gradient (partition_grads): a copy on the GPU, before the step its norm and a float32 copy, too."""
        copy = torch.empty(share, dtype=self.dtype)
        if self.boundary:
            for start in range(0, share, NORM_PART):
                self.recorder.temporary(8 * min(share - start, NORM_PART), "the norm in float64")
            self.recorder.temporary(4 * share, "the gradient in float32")
        del copy

    def backward(self, loss: Tensor, *, boundary: bool) -> None:
        """One micro-batch's backward pass; what was reduced is added to the flat buffer in place."""
        self.boundary = boundary
        loss.backward()
        self._reduce()
        if self.gatherer is not None:
            self.gatherer.end()

    def step(self) -> None:
        """Norms, then each sub-group: float32 gradients, the optimizer, 16-bit partitions."""
        if self.gatherer is not None:
            self.gatherer.let_all_go()
        self._step_groups()
        if self.gatherer is not None:
            self.gatherer.gather_persistent()

    def _step_groups(self) -> None:
        if self.zero.offload_optimizer:
            with self.recorder.host():
                self.optimizer.step()
            return
        for p in self.learning:
            self.recorder.temporary(8 * self._share(p), "the norm in float64")
        for number, master in enumerate(self.masters):
            with self.recorder.of("gradients"):
                flat = torch.empty(len(master), dtype=self.dtype) if len(self.groups[number]) > 1 else None
                master.grad = torch.empty(len(master), dtype=torch.float32)
                del flat
            self.optimizer.step(number)
            master.grad = None

    def close(self) -> None:
        """Linear layers as torch has them."""
        functional.linear = self.linear
        if self.gatherer is not None:
            self.gatherer.close()
        for handle in self.kept:
            with contextlib.suppress(AttributeError):
                handle.remove()


def _sub_groups(groups: list[list[Tensor]], ranks: int) -> list[list[Tensor]]:
    found = []
    for group in groups:
        part: list[Tensor] = []
        filled = 0
        for p in group:
            part.append(p)
            filled += -(-p.numel() // ranks)
            if filled >= SUB_GROUP:
                found.append(part)
                part, filled = [], 0
        if part:
            found.append(part)
    return found


class _Linear(torch.autograd.Function):
    """deepspeed/runtime/zero/linear.py: keeps input and weight themselves (a transposed view would keep what is gathered)."""

    @staticmethod
    def forward(context: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(input, weight, bias)
        if input.dim() == 2 and bias is not None:
            return torch.addmm(bias, input, weight.t())
        output = input.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        input, weight, bias = context.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        needs = context.needs_input_grad
        return (
            grad.matmul(weight) if needs[0] else None,
            flat.t().matmul(input.reshape(-1, input.shape[-1])) if needs[1] else None,
            flat.sum(0) if bias is not None and needs[2] else None,
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    low = autocast_dtype()
    if low is not None:
        input, weight = input.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    output: Tensor = _Linear.apply(input, weight, bias)
    return output
