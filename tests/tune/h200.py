"""What sessions on one H200 showed: MGM-2B at true size, random weights, budgets of 8 to 24 GiB on a card they shared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lorapatch.tune.configuration import Configuration
from lorapatch.tune.ladder import Machine, Space, open_space, read_ladder
from lorapatch.tune.trial import Goal, Prediction, Trial

__all__ = ["CAUSE", "CONTEXT_B", "GOAL_8", "LOSSES", "MEASURED", "RATES", "START", "cut_short", "failed", "predict", "space"]

# The learning rates that were logged in five steps with a warm-up of one, and the losses that belong to them.
RATES = (0.0, 2e-4, 1.707e-4, 1e-4, 2.929e-5)
LOSSES = {
    "16 GiB, 2e-4": (12.78, 12.78, 10.57, 7.123, 5.458),
    "16 GiB, 1e-3": (12.78, 12.78, 10.52, 4.63, 3.757),
    "24 GiB, 2e-4": (12.78, 12.78, 10.57, 7.117, 5.457),
    "24 GiB, 1e-3": (12.78, 12.78, 10.53, 4.623, 3.746),
    "12 GiB, 2e-4": (12.77, 12.78, 10.58, 7.125, 5.455),
}
# Of runs alone on the card: what it showed, and what the trainer's allocator had reserved (bytes).
CONTEXT_B = 1790967808
MEASURED = {"12 GiB": (12516655104, 10714349568), "24 GiB": (20555038720, 18752733184)}
CAUSE = "8 and 4 bits need bitsandbytes, which is not installed or has no GPU support here."

_SCRIPTS = "training/scripts"
START = Configuration(
    4, 32, checkpointing=True, max_length=2048, learning_rate=2e-4, deepspeed=f"{_SCRIPTS}/zero2_offload.json", offload=True
)
GOAL_8 = Goal(8 << 30, steps=(5,), max_runs=5, time_limit_s=210)
_FILE = json.loads((Path(__file__).parent / "h200_predictions.json").read_text())
_KNOWN = {tuple(row[:8]): Prediction(*row[8:], outside=_FILE["outside"]) for row in _FILE["predictions"]}


def space() -> Space:
    """The rungs that were open to it; the longest of its samples has 695 tokens."""
    machine = Machine(1, (("no_offload", f"{_SCRIPTS}/zero2.json"),), longest=695)
    return open_space(read_ladder("bytes"), START, machine, lambda configuration: None)


def predict(c: Configuration, exact: bool) -> Prediction | None:
    """As it was predicted there; what nobody asked for then (shorter samples, another rank) saves nothing."""
    whole = c if (c.max_length or 0) >= 695 else replace(c, max_length=2048)
    own = whole.micro_batch, whole.checkpointing, whole.max_length, whole.r, whole.target_modules, whole.bits, whole.offload
    return _KNOWN.get((*own, exact)) or _KNOWN.get((*own[:3], 16, *own[4:], exact))


def failed(diagnosis: str = "quantisation-missing") -> Trial:
    """The first probe under 8 GiB where bitsandbytes was missing, its 'measurement' what other processes held."""
    four = replace(START.with_micro_batch(2), bits=4)
    return Trial(
        1, "probe", four, 3, 2, "without 4 bit nothing fits", "failed", predict(four, True), 7228882944,
        measured_B=35581526016, seconds=23.653, cause=CAUSE, diagnosis=diagnosis, remedy="pip install -U bitsandbytes",
    )  # fmt: skip


def cut_short() -> Trial:
    """The learning run under 12 GiB, which the session's limit ended behind its last step."""
    eight = START.with_micro_batch(8)
    return Trial(
        4, "learn", eight, 5, 16, "is it stable in 5 steps?", "timeout", None, 12530483200, 12736004096, 25.798,
        LOSSES["12 GiB, 2e-4"], 86.405, rates=RATES, first_step_s=63.0,
    )  # fmt: skip
