"""Optimizers as they take memory: states made at the first step, temporaries of every step."""

# mypy: allow-untyped-calls
from __future__ import annotations

import torch
from torch import Tensor

from lorapatch.memory.trace.recorder import Recorder

__all__ = ["Optimizer", "assumption", "make"]

_FUSED = {"adamw_torch_fused", "adamw_apex_fused", "fused_adam"}
_EIGHT_BITS = {"adamw_bnb_8bit", "adamw_8bit", "lion_8bit"}
_PAGED = {"paged_adamw_8bit": 1, "paged_adamw_32bit": 4, "paged_adamw": 4, "paged_lion_8bit": 1, "paged_lion_32bit": 4}
_ONE_STATE = {"sgd": 0, "lion_32bit": 1, "lion_8bit": 1}
_BLOCK = 256  # bitsandbytes/functional.py: one float32 scale for each block of a state
_SMALL = 4096  # bitsandbytes/optim/optimizer.py: smaller tensors keep float32 states


def assumption(name: str) -> str | None:
    """What is said where an optimizer is not known: AdamW is taken."""
    known = {"adamw_torch", "adamw_hf", "adafactor", *_FUSED, *_EIGHT_BITS, *_PAGED, *_ONE_STATE}
    return None if name in known else f"the optimizer {name} is counted as AdamW"


class Optimizer:
    """Updates groups of parameters; ``step(group)`` allocates what the real one would."""

    def __init__(self, recorder: Recorder, groups: list[list[Tensor]]) -> None:
        self.recorder, self.groups = recorder, groups
        self.states: dict[int, list[Tensor]] = {}

    def step(self, group: int | None = None) -> None:
        """One step over all groups, or over one of them (as ZeRO does it)."""
        for members in self.groups if group is None else [self.groups[group]]:
            with_grad = [p for p in members if p.grad is not None]
            for p in with_grad:
                if id(p) not in self.states:
                    with self.recorder.of("optimizer_states"):
                        self.states[id(p)] = self._make_states(p)
            self._update(with_grad)

    def _make_states(self, parameter: Tensor) -> list[Tensor]:
        step = torch.empty((), dtype=torch.float32)
        return [step, torch.empty_like(parameter), torch.empty_like(parameter)]

    def _update(self, parameters: list[Tensor]) -> None:
        """In place, one kernel over all of them: nothing is allocated."""


class _Torch(Optimizer):
    """torch.optim.AdamW as it is installed (its temporaries differ by version): all parameters at once by its ``foreach``
    way on the GPU, one after the other on the CPU.
    """

    def __init__(self, recorder: Recorder, groups: list[list[Tensor]], foreach: bool) -> None:
        super().__init__(recorder, groups)
        self.real = torch.optim.AdamW([{"params": g} for g in groups if g], lr=1e-4, weight_decay=0.0, foreach=foreach)
        self.all_groups = self.real.param_groups

    def step(self, group: int | None = None) -> None:
        filled = [g for g in self.groups if g]
        self.real.param_groups = self.all_groups
        if group is not None:
            self.real.param_groups = [self.all_groups[[id(g) for g in filled].index(id(self.groups[group]))]]
        with self.recorder.scalars_on_host():
            self.real.step()
        for state in self.real.state.values():
            for tensor in state.values():
                if isinstance(tensor, Tensor) and tensor.dim():
                    self.recorder.add(tensor, "optimizer_states")


class _OneByOne(Optimizer):
    """transformers 4's own AdamW: a denominator of the parameter's size, for one parameter at a time."""

    def _make_states(self, parameter: Tensor) -> list[Tensor]:
        return [torch.empty_like(parameter), torch.empty_like(parameter)]

    def _update(self, parameters: list[Tensor]) -> None:
        for p in parameters:
            torch.empty_like(p)


class _States(Optimizer):
    """Optimizers of ``count`` states of the parameter's size, of ``width`` bytes an element (None: the parameter's own)."""

    def __init__(self, recorder: Recorder, groups: list[list[Tensor]], count: int, width: int | None, host: bool) -> None:
        super().__init__(recorder, groups)
        self.count, self.width, self.host = count, width, host

    def _make_states(self, parameter: Tensor) -> list[Tensor]:
        if self.host:  # paged: managed memory, which torch's allocator does not count
            with self.recorder.host():
                return self._filled(parameter)
        return self._filled(parameter)

    def _filled(self, parameter: Tensor) -> list[Tensor]:
        size = parameter.numel()
        if self.width is None:
            return [torch.empty_like(parameter) for _ in range(self.count)]
        if self.width == 4 or size < _SMALL:
            return [torch.empty(size, dtype=torch.float32) for _ in range(self.count)]
        made = [torch.empty(size, dtype=torch.uint8) for _ in range(self.count)]
        return made + [torch.empty(-(-size // _BLOCK), dtype=torch.float32) for _ in range(self.count)]


class _Adafactor(Optimizer):
    """transformers' Adafactor: rows and columns instead of a second moment; a float32 update a parameter."""

    def _make_states(self, parameter: Tensor) -> list[Tensor]:
        if parameter.dim() < 2:
            return [torch.empty(parameter.shape, dtype=torch.float32)]
        return [torch.empty(parameter.shape[:-1], dtype=torch.float32),
                torch.empty(parameter.shape[:-2] + parameter.shape[-1:], dtype=torch.float32)]  # fmt: skip

    def _update(self, parameters: list[Tensor]) -> None:
        for p in parameters:
            gradient = p.grad.float()  # type: ignore[union-attr]
            update = gradient**2
            update = update.rsqrt() * gradient
            del gradient, update


def make(name: str, recorder: Recorder, groups: list[list[Tensor]], on_cpu: bool = False) -> Optimizer:
    """The optimizer that transformers calls ``name``; an unknown one is AdamW (see :func:`assumption`).

    ``on_cpu``: where what it steps lies.
    """
    if name in _FUSED:
        return Optimizer(recorder, groups)
    if name == "adamw_hf":
        return _OneByOne(recorder, groups)
    if name == "adafactor":
        return _Adafactor(recorder, groups)
    count = 1 if "lion" in name else 2
    if name in _EIGHT_BITS:
        return _States(recorder, groups, count, 1, host=False)
    if name in _PAGED:
        return _States(recorder, groups, count, _PAGED[name], host=True)
    if name in _ONE_STATE:
        return _States(recorder, groups, _ONE_STATE[name], None, host=False)
    return _Torch(recorder, groups, foreach=not on_cpu)
