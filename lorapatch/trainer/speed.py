"""What a step took, as lines of JSON on standard output."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback

__all__ = ["SpeedReport"]


class SpeedReport(TrainerCallback):
    """Counts samples and tokens, and prints what a step took; the first step (compiling, allocating) stands apart."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples = self.tokens = 0
        self.pause = 0.0
        self.first = 0
        self.all_steps = self._mark(0)
        self.window = self.all_steps

    def count(self, samples: int, tokens: int) -> None:
        """One micro-batch of this rank."""
        self.samples += samples
        self.tokens += tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first = state.global_step + 1
        self.all_steps = self.window = self._mark(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.first < state.max_steps:
            self.all_steps = self.window = self._mark(state.global_step)
        elif self.every and state.global_step % self.every == 0:
            self._say(self.window, state.global_step, args)
            self.window = self._mark(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._say(self.all_steps, state.global_step, args)

    def _mark(self, step: int) -> tuple[int, float, int, int]:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return step, time.perf_counter() - self.pause, self.samples, self.tokens

    def _say(self, since: tuple[int, float, int, int], step: int, args: Any) -> None:
        now = self._mark(step)
        steps, seconds, samples, tokens = (b - a for a, b in zip(since, now, strict=True))
        if args.world_size > 1:
            both = torch.tensor([samples, tokens], device=args.device)
            torch.distributed.all_reduce(both)
            samples, tokens = both.tolist()
        cuda = args.device.type == "cuda"
        line = {
            "lorapatch": "speed",
            "steps": steps,
            "step_time_s": round(seconds / steps, 4) if steps else None,
            "samples_per_s": round(samples / seconds, 3) if steps else None,
            "tokens_per_s": round(tokens / seconds, 1) if steps else None,
            "peak_allocated_B": torch.cuda.max_memory_allocated() if cuda else None,
            "peak_reserved_B": torch.cuda.max_memory_reserved() if cuda else None,
        }
        if args.process_index == 0:
            tqdm.write(json.dumps(line), file=sys.stdout)
            sys.stdout.flush()
