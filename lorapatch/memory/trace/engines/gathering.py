"""Whole parameters for as long as a module needs them: deepspeed/runtime/zero/partitioned_param_coordinator.py."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorapatch.memory.model import Zero
from lorapatch.memory.trace.engines.zero import on_device
from lorapatch.memory.trace.recorder import Recorder

__all__ = ["Gatherer"]

REUSE_DISTANCE = 1_000_000_000  # elements (stage3_max_reuse_distance)


class Gatherer:
    """Every parameter of ``model`` becomes a share; modules gather theirs before they run and let go of them after.

    The first micro-batch records the order of the modules. From then on what comes next is fetched ahead
    (``prefetch_bucket_size`` elements), and what is used again soon is kept. A module of a class in ``leaves`` gathers all
    that is below it, and its children nothing (deepspeed/utils/z3_leaf_module.py).
    """

    def __init__(
        self, recorder: Recorder, model: nn.Module, zero: Zero, ranks: int, leaves: tuple[type[nn.Module], ...] = ()
    ) -> None:
        self.recorder, self.zero, self.ranks = recorder, zero, ranks
        self.parameters = list(model.parameters())
        self.shapes = {id(p): p.shape for p in self.parameters}
        self.shares: list[Tensor] = []
        self.gathered: set[int] = set()
        self.available = 0
        self.order: list[list[Tensor]] = []
        self.complete = False
        self.at = 0
        self._partition()
        self.leaves = leaves
        self.handles = [handle for module in self._watched(model) for handle in self._watch(module)]

    def _partition(self) -> None:
        for p in self.parameters:
            size = p.numel()
            category = "trainable_weights" if p.requires_grad else "frozen_weights"
            share = -(-size // self.ranks)
            # made before anything counts as persistent: those shares lie in host memory, too
            with self.recorder.of(category), on_device(self.recorder, not self.zero.offload_param):
                self.shares.append(torch.empty(share, dtype=p.dtype))
            persists = size <= self.zero.param_persistence_threshold
            p.data = torch.empty(p.shape if persists else 0, dtype=p.dtype)

    def _watched(self, module: nn.Module) -> Iterator[nn.Module]:
        yield module
        if not isinstance(module, self.leaves):
            for child in module.children():
                yield from self._watched(child)

    def _watch(self, module: nn.Module) -> list[Any]:
        limit, whole = self.zero.param_persistence_threshold, isinstance(module, self.leaves)
        own: list[Tensor] = [p for p in module.parameters(recurse=whole) if self._size(p) > limit]
        if not own:
            return []
        return [
            module.register_forward_pre_hook(lambda *_: self._fetch(own)),
            module.register_forward_hook(lambda *_: self._release_forward(own)),
            module.register_full_backward_pre_hook(lambda *_: self._fetch(own)),
            module.register_full_backward_hook(lambda _, inputs, __: self._release_after(own, inputs)),
        ]

    def _release_forward(self, own: list[Tensor]) -> None:
        """A layer that is computed again keeps its parameters for the backward pass that follows at once."""
        if self.recorder.phase != "backward":
            self._release(own)

    def _release_after(self, own: list[Tensor], input_grads: Any) -> None:
        """A module whose inputs take no gradient (an embedding) keeps its parameters until the backward pass is over."""
        if any(isinstance(grad, Tensor) for grad in input_grads):
            self._release(own)

    def _size(self, parameter: Tensor) -> int:
        return self.shapes[id(parameter)].numel()

    def _fetch(self, own: list[Tensor]) -> None:
        self._gather(own)
        if not self.complete:
            self.order.append(own)
        self.at += 1
        if self.complete:
            self._gather(self._ahead())

    def _ahead(self) -> list[Tensor]:
        room = min(self.zero.max_live_parameters - self.available, self.zero.prefetch_bucket_size)
        found: list[Tensor] = []
        for module in self.order[self.at :]:
            for p in module:
                if room <= 0:
                    return found
                if id(p) not in self.gathered and all(p is not other for other in found):
                    found.append(p)
                    room -= self._size(p)
        return found

    def _gather(self, parameters: Iterable[Tensor]) -> None:
        missing = [p for p in parameters if id(p) not in self.gathered]
        if not missing:
            return
        with torch.no_grad(), self.recorder.of("buffers"), self.recorder.on("all-gather"):
            flat = None
            if self.ranks > 1 and len(missing) > 1:  # one collective, then each parameter a copy of its own
                size = sum(-(-self._size(p) // self.ranks) * self.ranks for p in missing)
                flat = torch.empty(size, dtype=missing[0].dtype)
            for p in missing:
                p.data = torch.empty(self.shapes[id(p)], dtype=p.dtype)
                self.gathered.add(id(p))
                self.available += self._size(p)
            del flat

    def _release(self, own: list[Tensor]) -> None:
        soon = self._used_soon() if self.complete else set()
        for p in own:
            if id(p) in self.gathered and id(p) not in soon:
                p.data = torch.empty(0, dtype=p.dtype)
                self.gathered.discard(id(p))
                self.available -= self._size(p)

    def _used_soon(self) -> set[int]:
        found: set[int] = set()
        seen = 0
        for module in self.order[self.at :]:
            if seen >= REUSE_DISTANCE:
                break
            found.update(id(p) for p in module)
            seen += sum(self._size(p) for p in module)
        return found

    def end(self) -> None:
        """The micro-batch is over: the order is known, everything is let go."""
        self.complete, self.at = True, 0
        for p in self.parameters:
            if id(p) in self.gathered:
                p.data = torch.empty(0, dtype=p.dtype)
        self.gathered.clear()
        self.available = 0

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
