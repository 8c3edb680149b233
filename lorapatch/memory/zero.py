"""DeepSpeed's ZeRO as a run has it: the configuration file with its "auto" values filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorapatch.memory.model import Zero

__all__ = ["NORM_PART", "SUB_GROUP", "read_zero", "runs_in", "said_of_host"]


SUB_GROUP = 1_000_000_000  # elements that ZeRO-3 steps at once (sub_group_size)
NORM_PART = 250_000_000  # elements that it takes the norm of at once (_constant_buffered_norm2)


def read_zero(config: Mapping[str, Any], hidden: int | None) -> Zero:
    """ZeRO of a DeepSpeed configuration; sizes in elements.

    "auto" is what transformers makes of it (integrations/deepspeed.py, trainer_config_finalize): ``hidden`` squared and
    so on; what is missing is DeepSpeed's default (runtime/zero/config.py).
    """
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    stage = _whole(zero.get("stage"), 0)
    square = (hidden or 0) ** 2
    return Zero(
        stage=stage,
        offload_optimizer=_offloads(zero, "offload_optimizer") or zero.get("cpu_offload") is True,
        offload_param=stage == 3 and _offloads(zero, "offload_param"),
        pin_memory=any(_offloads(zero, name) and zero[name].get("pin_memory") is True for name in _OFFLOADED),
        overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
        contiguous_gradients=zero.get("contiguous_gradients", True) is not False,
        reduce_bucket_size=_sized(zero, "reduce_bucket_size", square, 500_000_000),
        allgather_bucket_size=_sized(zero, "allgather_bucket_size", 0, 500_000_000),
        prefetch_bucket_size=_sized(zero, "stage3_prefetch_bucket_size", int(0.9 * square), 50_000_000),
        param_persistence_threshold=_sized(zero, "stage3_param_persistence_threshold", 10 * (hidden or 0), 100_000),
        max_live_parameters=_sized(zero, "stage3_max_live_parameters", 0, 1_000_000_000),
        max_reuse_distance=_sized(zero, "stage3_max_reuse_distance", 0, 1_000_000_000),
    )


_OFFLOADED = ("offload_optimizer", "offload_param")


def _offloads(zero: Mapping[str, Any], name: str) -> bool:
    target = zero.get(name)
    return isinstance(target, dict) and target.get("device") in ("cpu", "nvme")


def _sized(zero: Mapping[str, Any], name: str, auto: int, default: int) -> int:
    value = zero.get(name, default)
    if value == "auto":
        return auto or default
    return _whole(value, default)


def _whole(value: Any, default: int) -> int:
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return default


def runs_in(config: Mapping[str, Any], asked: str) -> str:
    """bf16, fp16 or fp32: what the configuration enables, or ``asked`` (the flags) where it says "auto"."""
    for name in ("bf16", "fp16"):
        part = config.get(name)
        if isinstance(part, dict) and part.get("enabled") is True:
            return name
    return asked


def said_of_host(held: float, step: float, rounding: float = 0) -> tuple[str, ...]:
    """What is said of host memory beside the ``held`` bytes of tensors: what an optimizer on the CPU takes for its
    ``step``, and what pinned buffers take more than they hold; nothing of what is less than a hundredth.
    """
    told = (
        (step, "while the optimizer steps on the CPU it takes {:.2f} GiB more of host memory"),
        (rounding, "PyTorch rounds pinned buffers up to powers of two: they take {:.2f} GiB more of host memory"),
    )
    return tuple(text.format(size / (1 << 30)) for size, text in told if size and size * 100 >= held)
