"""Whole parameters for as long as modules need them: deepspeed/runtime/zero/partitioned_param_coordinator.py (0.19)."""

# mypy: allow-untyped-calls
from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorapatch.memory.model import Zero
from lorapatch.memory.trace.engines.zero import on_device
from lorapatch.memory.trace.recorder import Recorder

__all__ = ["Gatherer"]

NEVER = -1  # before the first step of a micro-batch


@dataclass(eq=False, slots=True)
class _Flight:
    """A collective under way: what it brings, and the buffer it fills first if it brings several parameters."""

    parts: list[_Part]
    flat: Tensor | None
    landed: bool = False


@dataclass(eq=False, slots=True)
class _Part:
    """A parameter: ``here`` while it is whole or on its way; ``flight`` brings it, until a module has waited for it."""

    parameter: Tensor
    shape: torch.Size
    persists: bool
    number: int
    here: bool = False
    flight: _Flight | None = None
    users: set[nn.Module] = field(default_factory=set)

    @property
    def size(self) -> int:
        return self.shape.numel()


class Gatherer:
    """Every parameter of ``model`` becomes a share; modules gather theirs before they run and let go of them after.

    Whatever module runs, with parameters or without, is a step of the trace. The first micro-batch records it. From then
    on every step fetches ahead (``prefetch_bucket_size`` elements at a time, so that ``max_live_parameters`` are soon
    reached), and what is used again soon is kept. A micro-batch whose modules come in another order makes the trace
    invalid. A module of a class in ``leaves`` gathers all that is below it, and its children nothing
    (deepspeed/utils/z3_leaf_module.py).
    """

    def __init__(
        self, recorder: Recorder, model: nn.Module, zero: Zero, ranks: int, leaves: tuple[type[nn.Module], ...] = ()
    ) -> None:
        self.recorder, self.zero, self.ranks, self.leaves = recorder, zero, ranks, leaves
        self.parts = {id(p): self._partition(p, number) for number, p in enumerate(model.parameters())}
        self.shares: list[Tensor] = self._shares()
        self.below = {module: self._parts(module, below=True) for module in model.modules()}
        self.own = {module: self._parts(module, below=isinstance(module, leaves)) for module in model.modules()}
        self.external: defaultdict[nn.Module, list[_Part]] = defaultdict(list)
        self.mode = "invalid"  # then record, then complete
        self.order: list[nn.Module] = []
        self.uses: list[tuple[_Part, int]] = []  # the trace by parameters, each with the step that it is for
        self.queue: deque[tuple[_Part, int]] = deque()
        self.fetched: dict[_Part, int] = {}  # the last step that a parameter was fetched, or skipped, for
        self.going: dict[tuple[nn.Module, int], set[_Part]] = {}
        self.at = self.live = 0
        self.running: list[nn.Module] = [model]
        self.waiting: dict[nn.Module, int] = {}  # inputs whose gradients have not come yet
        self.backward: dict[nn.Module, None] = {}  # modules whose backward pass has begun, in that order
        self.recomputed: defaultdict[nn.Module, set[_Part]] = defaultdict(set)
        self.handles = [model.register_forward_pre_hook(lambda *_: self._begin())]
        self.handles += [handle for module in self._watched(model) for handle in self._watch(module)]
        self.modules = list(model.modules())
        for module in self.modules:
            module._parameters = _Parameters(module._parameters, self._looked_at)

    def _partition(self, parameter: Tensor, number: int) -> _Part:
        persists = parameter.numel() <= self.zero.param_persistence_threshold
        return _Part(parameter, parameter.shape, persists, number)

    def _shares(self) -> list[Tensor]:
        found = []
        for part in self.parts.values():
            category = "trainable_weights" if part.parameter.requires_grad else "frozen_weights"
            where = on_device(self.recorder, not self.zero.offload_param, pinned=self.zero.pin_memory)
            with self.recorder.of(category), where:
                found.append(torch.empty(-(-part.size // self.ranks), dtype=part.parameter.dtype))
            part.parameter.data = torch.empty(0, dtype=part.parameter.dtype)
        return found

    def _parts(self, module: nn.Module, *, below: bool) -> list[_Part]:
        return [self.parts[id(p)] for p in module.parameters(recurse=below)]

    def _needs(self, module: nn.Module) -> list[_Part]:
        """What it gathers: its own parameters and the others' that its forward pass was seen to look at."""
        return [*self.own[module], *(p for p in self.external[module] if p not in self.own[module])]

    def _watched(self, module: nn.Module) -> Iterator[nn.Module]:
        yield module
        if not isinstance(module, self.leaves):
            for child in module.children():
                yield from self._watched(child)

    def _watch(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_pre_hook(self._before), module.register_forward_hook(self._after)]

    def _before(self, module: nn.Module, inputs: Any) -> Any:
        """Its backward pass ends when the last of its positional inputs has its gradient."""
        self.running.append(module)
        self._fetch(module, forward=True)
        self.waiting[module] = 0
        return self._telling(inputs, functools.partial(self._input_done, module), functools.partial(self._count, module))

    def _after(self, module: nn.Module, _: Any, output: Any) -> Any:
        """Its backward pass begins with the gradient of each of its outputs."""
        self.running.pop()
        self._release(module, forward=True)
        return self._telling(output, functools.partial(self._fetch, module, forward=False))

    def _count(self, module: nn.Module) -> None:
        self.waiting[module] += 1

    def _input_done(self, module: nn.Module) -> None:
        self.waiting[module] -= 1
        if self.waiting[module] == 0:
            self._release(module, forward=False)

    def _telling(self, value: Any, told: Callable[[], None], each: Callable[[], None] | None = None) -> Any:
        """``value`` with every tensor that takes a gradient replaced by one that calls ``told`` when it comes."""
        if isinstance(value, Tensor):
            if not value.requires_grad:
                return value
            if each is not None:
                each()
            return _Telling.apply(value, told)
        if isinstance(value, (tuple, list)):
            made = [self._telling(part, told, each) for part in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        if isinstance(value, dict):
            for name in value:
                value[name] = self._telling(value[name], told, each)
        return value

    def _looked_at(self, parameter: Tensor) -> None:
        """A module that looks at another one's parameter, which is not there, gets it, and gathers it from then on."""
        part = self.parts.get(id(parameter))
        if part is None or part.here or self.recorder.phase != "forward":
            return
        if part not in self.external[self.running[-1]]:
            self.external[self.running[-1]].append(part)
        self._fill(part)
        part.here = True

    def _begin(self) -> None:
        """A micro-batch begins (reset_step)."""
        self._clean_up()
        if self.mode == "record":
            self.mode = "complete"
            self.uses = [
                (part, step)
                for step, module in enumerate(self.order)
                for part in _together(self._needs(module), ())
            ]
        elif self.mode == "invalid":
            self.mode = "record"
        self.queue = deque(self.uses)
        self.fetched = {}
        self.at = self.live = 0

    def _clean_up(self) -> None:
        """What was fetched for nothing."""
        for part in self.parts.values():
            if part.flight is not None:
                self._land(part)
                self._let_go(part)

    def _follow(self, module: nn.Module) -> None:
        """Is it the module that the trace has here?"""
        if self.mode == "complete" and (len(self.order) <= self.at or self.order[self.at] is not module):
            self.mode = "invalid"
            self.order, self.uses, self.queue, self.fetched = [], [], deque(), {}
            self._clean_up()
        if self.mode == "record":
            self.order.append(module)

    def _fetch(self, module: nn.Module, *, forward: bool) -> None:
        self._follow(module)
        if not forward:
            self.backward[module] = None
        needed = self._needs(module)
        self._gather(needed)
        again = forward and self.recorder.phase == "backward" and self.backward
        for part in needed:
            part.users.add(module)
            if again and not part.parameter.requires_grad:  # the module that asked for it lets go of it
                owner = next(reversed(self.backward))
                self.recomputed[owner].add(part)
                part.users.add(owner)
            self._land(part)
        if self.mode == "complete":
            self._pass(needed)
            self._gather(self._ahead())
        self.at += 1

    def _pass(self, needed: list[_Part]) -> None:
        """What is here need not be fetched ahead any more."""
        missing = sum(self.fetched.get(part, NEVER) < self.at for part in needed)
        passed: set[_Part] = set()
        while self.queue and len(passed) < missing:
            part, step = self.queue.popleft()
            self.fetched[part] = step
            passed.add(part)

    def _ahead(self) -> list[_Part]:
        room = min(self.zero.max_live_parameters - self.live, self.zero.prefetch_bucket_size)
        found: list[_Part] = []
        while self.queue and room > 0:
            part, step = self.queue.popleft()
            self.fetched[part] = max(self.fetched.get(part, NEVER), step)
            if not part.here and part not in found:
                found.append(part)
                room -= part.size
        return found

    def _gather(self, parts: Iterable[_Part]) -> None:
        """One collective: a parameter alone is filled at once, several take their parts of a buffer when it has landed."""
        missing = [part for part in parts if not part.here]
        if not missing:
            return
        flight = _Flight(missing, None)
        with torch.no_grad(), self.recorder.of("buffers"), self._collecting():
            if self.ranks > 1 and len(missing) > 1:
                size = sum(-(-part.size // self.ranks) * self.ranks for part in missing)
                flight.flat = torch.empty(size, dtype=missing[0].parameter.dtype)
            for part in missing:
                part.here, part.flight = True, flight
                self.live += part.size
                if flight.flat is None:
                    self._fill(part)

    def _collecting(self) -> Any:
        return self.recorder.on("all-gather" if self.zero.overlap_comm else "")

    def _land(self, part: _Part) -> None:
        """Wait for ``part``; the buffer stays until the last of those that came with it was waited for."""
        flight, part.flight = part.flight, None
        if flight is None or flight.landed:
            return
        flight.landed = True
        with self._collecting():
            for other in flight.parts if flight.flat is not None else []:
                self._fill(other)

    def _fill(self, part: _Part) -> None:
        with torch.no_grad(), self.recorder.of("buffers"):
            part.parameter.data = torch.empty(part.shape, dtype=part.parameter.dtype)

    def _release(self, module: nn.Module, *, forward: bool) -> None:
        needed = self._needs(module)
        going = set(self._unused_soon(module) if self.mode == "complete" else needed)
        if not forward:
            recomputed = self.recomputed.pop(module, set())
            needed = _together(needed, recomputed)
            going |= {part for part in recomputed if not part.persists}
            self.backward.pop(module, None)
        for part in needed:
            part.users.discard(module)
            if part in going:
                self._let_go(part)

    def _unused_soon(self, module: nn.Module) -> set[_Part]:
        """Of a module's parameters those that nothing will use within ``max_reuse_distance`` elements.

        They are known from the first time on: DeepSpeed, too, looks once (lru_cache), even if a new trace was recorded.
        """
        key = module, self.at
        if key in self.going:
            return self.going[key]
        found = {p for p in self._needs(module) if not p.persists and self.fetched.get(p, NEVER) <= self.at}
        whole, seen = isinstance(module, self.leaves), 0
        for later in self.order[self.at :]:
            if seen >= self.zero.max_reuse_distance or not found:
                break
            for part in self.below[later] if whole else self._needs(later):
                found.discard(part)
                seen += part.size
        self.going[key] = found
        return found

    def _let_go(self, part: _Part) -> None:
        on_its_way = part.flight is not None and not part.flight.landed
        if part.here and not part.users and not on_its_way:
            part.parameter.data = torch.empty(0, dtype=part.parameter.dtype)
            part.here = False
            self.live -= part.size

    def end(self) -> None:
        """The micro-batch is over: modules whose inputs took no gradient (an embedding) let go (backward_epilogue)."""
        while self.backward:
            module, _ = self.backward.popitem()
            for part in _together(self._needs(module), self.recomputed.pop(module, set())):
                part.users.discard(module)
                if not part.persists:
                    self._let_go(part)

    def let_all_go(self) -> None:
        """An optimizer step begins."""
        for part in self.parts.values():
            self._land(part)
            part.users.clear()
            self._let_go(part)

    def gather_persistent(self) -> None:
        """An optimizer step is over: the small parameters come back and stay."""
        for part in self.parts.values():
            if part.persists:
                self._fill(part)
                part.here = True

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        for module in self.modules:
            module._parameters = dict(module._parameters)


def _together(some: Iterable[_Part], others: Iterable[_Part]) -> list[_Part]:
    """Each once, in the model's order: the allocator minds which is freed first."""
    return sorted({*some, *others}, key=lambda part: part.number)


class _Parameters(dict[str, Any]):
    """A module's parameters; says which one is looked at (ZeROOrderedDict)."""

    def __init__(self, parameters: Any, looked_at: Callable[[Tensor], None]) -> None:
        super().__init__(parameters)
        self._looked_at = looked_at

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None:
            self._looked_at(parameter)
        return parameter


class _Telling(torch.autograd.Function):
    """The same tensor; ``told`` is called when its gradient comes."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, told: Callable[[], None]) -> Tensor:
        context.told = told
        return tensor.detach()

    @staticmethod
    def backward(context: Any, *grads: Any) -> Any:
        context.told()
        return grads[0], None
