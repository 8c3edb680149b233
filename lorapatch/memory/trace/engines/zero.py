"""ZeRO-1 and ZeRO-2 as deepspeed/runtime/zero/stage_1_and_2.py allocates them (0.11 to 0.19), for rank 0."""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from lorapatch.memory.model import RunSetup, Zero
from lorapatch.memory.trace import optimizers
from lorapatch.memory.trace.engines.plain import decay_groups, when_accumulated
from lorapatch.memory.trace.recorder import Recorder

__all__ = ["ZeroEngine", "on_device"]


class ZeroEngine:
    """Flat 16-bit parameters, float32 masters of this rank's share, buckets that gradients are copied into.

    The two groups of parameters share one gradient buffer (``grads_in_partition``): so the second group's gradients keep
    all of it alive while the first group is stepped.
    """

    def __init__(self, recorder: Recorder, model: nn.Module, setup: RunSetup) -> None:
        assert setup.zero is not None
        self.zero: Zero = setup.zero
        self.recorder, self.ranks = recorder, setup.gpus
        self.accumulates = self.zero.stage == 2 and setup.accumulation > 1
        self.groups = decay_groups(model)
        self.dtype = self.groups[0][0].dtype
        self.flats, self.masters = [], []
        for group in self.groups:
            recorder.empty_cache()
            with recorder.of("trainable_weights"):
                self.flats.append(self._flatten(group))
            self.masters.append(self._master(self.flats[-1]))
        self.mine = [self._in_partition(group, flat) for group, flat in zip(self.groups, self.flats)]
        self.largest = max(p.numel() for group in self.groups for p in group)
        self._offload_buffers()
        self.bucket: list[Tensor] = []
        self.bucket_index = self.filled = 0
        self.waiting: list[Tensor] = []
        self.gradients: Tensor | None = None
        self.offset = 0
        self.accumulated: list[list[Tensor] | None] = [None] * len(self.groups)
        self.boundary = False
        self.kept = [when_accumulated(p, self._hook) for group in self.groups for p in group]
        self.optimizer = optimizers.make(setup.optimizer, recorder, [[m] for m in self.masters], self.zero.offload_optimizer)
        for master in self.masters:  # initialize_optimizer_states: on the GPU they go again
            with recorder.of("gradients"), self._offloaded():
                gradient = torch.empty(len(master), dtype=torch.float32)
                if self.zero.offload_optimizer:
                    master.grad = gradient
                del gradient

    def _flatten(self, group: list[Tensor]) -> Tensor:
        alignment = 2 * self.ranks  # nccl_start_alignment_factor
        size = sum(p.numel() for p in group)
        size += -size % alignment
        flat = torch.empty(size, dtype=group[0].dtype)
        offset = 0
        for p in group:
            p.data = flat.narrow(0, offset, p.numel()).view(p.shape)
            offset += p.numel()
        return flat

    def _offloaded(self) -> contextlib.AbstractContextManager[None]:
        return on_device(self.recorder, not self.zero.offload_optimizer, pinned=self.zero.pin_memory)

    def _master(self, flat: Tensor) -> Tensor:
        share = flat.narrow(0, 0, len(flat) // self.ranks).detach().clone()
        with self.recorder.of("master_copies"), self._offloaded():
            return torch.empty(len(share), dtype=torch.float32).requires_grad_(True)

    def _in_partition(self, group: list[Tensor], flat: Tensor) -> list[Tensor]:
        share, start, mine = len(flat) // self.ranks, 0, []
        for p in group:
            if start < share:
                mine.append(p)
            start += p.numel()
        return mine

    def _offload_buffers(self) -> None:
        self.host: list[Tensor] = []
        self.accumulated_on_host: dict[int, Tensor] = {}
        if not self.zero.offload_optimizer:
            return
        with self._offloaded():
            self.host += [torch.empty(len(m), dtype=self.dtype) for m in self.masters]
            self.host.append(torch.empty(self.largest, dtype=self.dtype))
        with self.recorder.of("buffers"):
            self.gpu_buffer = torch.empty(self.largest, dtype=self.dtype)

    def _hook(self, parameter: Tensor) -> None:
        """A gradient is complete: into the bucket with it (reduce_independent_p_g_buckets_and_remove_grads)."""
        if parameter.grad is None:
            return
        self.recorder.add(parameter.grad, "gradients")
        self._set_up_buckets()
        if self.zero.stage == 1 and not (self.boundary and self.zero.overlap_comm):
            return
        self._put(parameter)

    def _put(self, parameter: Tensor) -> None:
        size = parameter.numel()
        if self.filled + size > self.zero.reduce_bucket_size:
            self._reduce()
            if self.zero.contiguous_gradients and self.zero.overlap_comm:
                self.bucket_index = 1 - self.bucket_index
        if self.zero.contiguous_gradients and size <= self.zero.reduce_bucket_size:
            place = self.bucket[self.bucket_index].narrow(0, self.filled, size)
            parameter.grad = place.view(parameter.shape)
        self.filled += size
        self.waiting.append(parameter)

    def _set_up_buckets(self) -> None:
        if self.bucket or not self.zero.contiguous_gradients:
            return
        with self.recorder.of("buffers"):
            count = 2 if self.zero.overlap_comm else 1
            self.bucket = [torch.empty(self.zero.reduce_bucket_size, dtype=self.dtype) for _ in range(count)]
        self.bucket_index = 0

    def _reduce(self) -> None:
        """reduce_ipg_grads: what this rank owns is copied out of the bucket, the rest is dropped."""
        if self.ranks > 1 and self.waiting or not self.zero.contiguous_gradients:  # shares of several ranks: flatten copies
            self.recorder.temporary(self.filled * self.flats[0].element_size(), "the reduced bucket")
        owned = {id(p) for group in self.mine for p in group}
        for p in self.waiting:
            if id(p) not in owned:
                if self.zero.stage == 2:
                    p.grad = None
            elif self.zero.offload_optimizer:
                self._to_host(p)
                p.grad = None if self.boundary or self.zero.contiguous_gradients else p.grad
            elif self.zero.contiguous_gradients:
                self._copy_out(p)
        self.waiting, self.filled = [], 0

    def _to_host(self, parameter: Tensor) -> None:
        """Where a step has several backwards, a 16-bit sum of gradients; before the step their norm and float32 copies.

        Sources: async_accumulate_grad_in_cpu_via_gpu, set_norm_for_param_grad_in_gpu (get_norm_dtype: float64),
        async_inplace_copy_grad_to_fp32_buffer_from_gpu.
        """
        if self.accumulates and id(parameter) not in self.accumulated_on_host:
            with self._offloaded():
                self.accumulated_on_host[id(parameter)] = torch.empty(parameter.numel(), dtype=self.dtype)
        if self.boundary:
            self.recorder.temporary(8 * parameter.numel(), "the norm in float64")
            self.recorder.temporary(4 * parameter.numel(), "the gradient in float32")

    def _copy_out(self, parameter: Tensor) -> None:
        if self.gradients is None:
            # made while the reduction's stream is the current one: its block serves no other stream
            with self.recorder.of("gradients"), self.recorder.on("reduction" if self.zero.overlap_comm else ""):
                size = sum(p.numel() for group in self.mine for p in group)
                self.gradients, self.offset = torch.empty(size, dtype=self.dtype), 0
        parameter.grad = self.gradients.narrow(0, self.offset, parameter.numel()).view(parameter.shape)
        self.offset += parameter.numel()

    def backward(self, loss: Tensor, *, boundary: bool) -> None:
        """One micro-batch's backward pass; ``boundary``: a step comes behind it."""
        self.boundary = boundary
        loss.backward()
        if self.zero.stage == 1 and not boundary:
            return
        if self.zero.stage == 1 and not self.zero.overlap_comm:
            for group in self.groups:
                for p in group:
                    if p.grad is not None:
                        self._put(p)
        self._epilogue()

    def _epilogue(self) -> None:
        """independent_gradient_partition_epilogue."""
        self._reduce()
        if not self.zero.offload_optimizer:
            for number, group in enumerate(self.mine):
                with self.recorder.of("gradients"):
                    new = [torch.empty_like(p) if p.grad is None else p.grad for p in group]
                if self.accumulated[number] is None:
                    self.accumulated[number] = new
                del new
        self.gradients = None
        self.bucket = []
        for group in self.groups:
            for p in group:
                p.grad = None

    def step(self) -> None:
        """Norm, float32 copy of this rank's gradients, the optimizer on the masters, 16-bit parameters again."""
        if self.zero.offload_optimizer:
            with self.recorder.host():
                self.optimizer.step()
            return
        for parts in self.accumulated:
            for gradient in parts or []:
                gradient.to(torch.float64)  # get_norm_dtype
        for number in range(len(self.groups)):
            self._step_group(number)

    def _step_group(self, number: int) -> None:
        master, parts = self.masters[number], self.accumulated[number]
        with self.recorder.of("gradients"):
            flat = torch.empty(len(master), dtype=self.dtype)
            whole = flat.to(torch.float32)
            del flat
        master.grad = whole
        del whole, parts
        self.accumulated[number] = None
        self.optimizer.step(number)
        master.grad = None

    def close(self) -> None:
        """Let go of the hooks."""
        for handle in self.kept:
            if hasattr(handle, "remove"):
                handle.remove()


def on_device(recorder: Recorder, yes: bool, *, pinned: bool = False) -> contextlib.AbstractContextManager[None]:
    """Allocations inside go to the GPU, or to the host, ``pinned`` there or not."""
    return contextlib.nullcontext() if yes else recorder.host(pinned=pinned)
