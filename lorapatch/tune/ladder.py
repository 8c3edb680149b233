"""The ladder: a small YAML file of rungs, and what each of them can do to a script's configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorapatch.errors import UsageError
from lorapatch.lora.flags import ALL_MODULES
from lorapatch.tune.configuration import Configuration

__all__ = ["LADDERS", "Ladder", "Machine", "Rung", "Space", "open_space", "read_ladder"]

LADDERS = ("bytes", "plan")
_ORDERS = ("bytes", "written")
# What only costs time; everything else takes something from the result.
_COSTS_SPEED = ("micro_batch", "gradient_checkpointing", "offload", "zero3")
_WITH_VALUES = ("max_length", "target_modules", "r", "bits")
_NAMES = (*_COSTS_SPEED, *_WITH_VALUES, "model")


@dataclass(frozen=True)
class Ladder:
    """The file as read: ``order`` "bytes" or "written", ``rungs`` pairs of a name and the values that it goes through."""

    name: str
    order: str
    rungs: tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Rung:
    """One step down, for one script: ``changes`` are the fields of the configuration that it sets."""

    name: str
    label: str
    changes: tuple[tuple[str, Any], ...]

    @property
    def costs(self) -> str:
        """What is given up: "speed" or "quality"."""
        return "speed" if self.name in _COSTS_SPEED else "quality"

    def on(self, configuration: Configuration) -> Configuration | None:
        """``configuration`` one rung down; None where it is that low already."""
        changes = dict(self.changes)
        if "micro_batch" in changes:
            micro = changes["micro_batch"]
            return configuration.with_micro_batch(micro) if micro < configuration.micro_batch else None
        if "r" in changes and changes["r"] >= configuration.r:
            return None
        if "bits" in changes and changes["bits"] >= configuration.bits:
            return None
        if "max_length" in changes and (configuration.max_length or 1 << 30) <= changes["max_length"]:
            return None
        if "target_modules" in changes and not _fewer(changes["target_modules"], configuration.target_modules):
            return None
        lower = replace(configuration, **changes)
        return lower if lower != configuration else None


@dataclass(frozen=True)
class Machine:
    """What the rungs need to know of the script's surroundings. ``gpus``: those the run has, 0 on the CPU.

    ``siblings`` maps "offload", "no_offload" and "zero3" to the DeepSpeed configuration that stands beside the script's
    own; ``model`` is what ``--model`` names; ``longest`` the tokens of the longest sample, None where nobody knows.
    """

    gpus: int = 1
    siblings: tuple[tuple[str, str], ...] = ()
    model: str | None = None
    longest: int | None = None

    def sibling(self, kind: str) -> str | None:
        """The path of that kind of DeepSpeed configuration."""
        return dict(self.siblings).get(kind)


@dataclass(frozen=True)
class Space:
    """Everything that tuning may try: the script's own configuration, the rungs that are open to it, and those that are
    not with the reason. ``micro_batches`` are the divisors of a GPU's share of the global batch."""

    start: Configuration
    order: str
    micro_batches: tuple[int, ...]
    rungs: tuple[Rung, ...]
    closed: tuple[tuple[str, str], ...] = ()
    without_offload: str | None = None
    host: bool = False  # no GPU: the budget is of host memory
    takes_rank: bool = True  # whether the trainer has flags to go up by
    takes_modules: bool = True


def read_ladder(name: str) -> Ladder:
    """One of ``LADDERS``, or the YAML file at that path. Raises UsageError with what is wrong in it."""
    import yaml  # type: ignore[import-untyped]

    path = Path(__file__).parent / "ladders" / f"{name}.yaml" if name in LADDERS else Path(name)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(LADDERS)
        raise UsageError(f"there is no ladder {name} ({error.strerror}); there are {known}, or a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or set(data) - {"order", "rungs"} or not isinstance(data.get("rungs"), list):
        raise UsageError(f"{path}: a ladder has `order` and a list of `rungs`, nothing else")
    if data.get("order") not in _ORDERS:
        raise UsageError(f"{path}: order is {data.get('order')}; it has to be one of {', '.join(_ORDERS)}")
    rungs = tuple(_rung(path, item) for item in data["rungs"])
    if not rungs:
        raise UsageError(f"{path}: the ladder has no rung")
    return Ladder(path.stem, data["order"], rungs)


def _rung(path: Path, item: Any) -> tuple[str, tuple[Any, ...]]:
    name, values = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, None)
    if name not in _NAMES:
        raise UsageError(f"{path}: there is no rung {name!r}; there are {', '.join(_NAMES)}")
    if name not in _WITH_VALUES:
        if values is not None:
            raise UsageError(f"{path}: the rung {name} takes no values")
        return name, ()
    kind: Callable[[Any], bool] = _is_modules if name == "target_modules" else _is_positive
    if not isinstance(values, list) or not values or not all(kind(value) for value in values):
        wanted = "lists of module names" if name == "target_modules" else "whole numbers above 0"
        raise UsageError(f"{path}: the rung {name} wants a list of {wanted}, not {values!r}")
    if name == "bits" and not set(values) <= {4, 8}:
        raise UsageError(f"{path}: the rung bits takes 8 and 4, not {values!r}")
    return name, tuple(",".join(value) if name == "target_modules" else value for value in values)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_modules(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)


# -- what is open to one script --------------------------------------------------------------------------------------


def open_space(
    ladder: Ladder, start: Configuration, machine: Machine, takes: Callable[[Configuration], str | None]
) -> Space:
    """The rungs of ``ladder`` that a script with the configuration ``start`` can go down on this machine.

    ``takes`` says why its trainer cannot be given a configuration; None when it can.
    """
    rungs: list[Rung] = []
    closed: list[tuple[str, str]] = []
    for name, values in ladder.rungs:
        for found in _candidates(name, values, start, machine):
            if isinstance(found, str):
                closed.append((_LABELS.get(name, name), found))
                continue
            lower = found.on(start)
            reason = "the script is there already" if lower is None else takes(lower)
            if reason is None:
                rungs.append(found)
            else:
                closed.append((found.label, reason))
    return Space(
        start,
        ladder.order,
        _divisors(start.samples),
        tuple(rungs),
        tuple(closed),
        without_offload=machine.sibling("no_offload") if start.offload else None,
        host=machine.gpus == 0,
        takes_rank=takes(replace(start, r=2 * start.r, alpha=2 * start.alpha)) is None,
        takes_modules=takes(replace(start, target_modules=",".join(ALL_MODULES))) is None,
    )


_LABELS = {
    "micro_batch": "micro-batch", "zero3": "ZeRO-3", "offload": "optimizer in host memory", "max_length": "shorter samples",
    "bits": "fewer bits", "model": "a smaller model",
}  # fmt: skip


def _candidates(
    name: str, values: Sequence[Any], start: Configuration, machine: Machine
) -> Iterator[Rung | str]:
    """The rungs that one entry of the file stands for; a sentence instead where there is none."""
    if name == "micro_batch":
        smaller = [size for size in reversed(_divisors(start.samples)) if size < start.micro_batch]
        yield from (Rung(name, f"micro-batch {size}", (("micro_batch", size),)) for size in smaller)
        if not smaller:
            yield "it is 1 already"
    elif name == "gradient_checkpointing":
        yield Rung(name, "gradient checkpointing", (("checkpointing", True),))
    elif name in ("offload", "zero3"):
        yield _deepspeed(name, start, machine)
    elif name == "model":
        model = machine.model
        yield Rung(name, f"the model {model}", (("model", model),)) if model else "no other one is named with --model"
    elif name == "r":
        # The ratio of alpha to the rank is the scale of the update: it stays.
        for r in values:
            alpha = max(1, r * start.alpha // start.r)
            yield Rung(name, f"rank {r}", (("r", r), ("alpha", alpha)))
    elif name == "bits":
        yield from (Rung(name, f"{bits} bit", (("bits", bits),)) for bits in values if machine.gpus)
        if not machine.gpus:
            yield "fewer bits need a GPU"
    elif name == "target_modules":
        for modules in values:
            short = modules.replace("_proj", "").replace(",", ", ")
            yield Rung(name, f"LoRA on {short}", (("target_modules", modules),))
    else:
        useful = [length for length in values if machine.longest is None or length < machine.longest]
        yield from (Rung(name, f"{length} tokens", (("max_length", length),)) for length in useful)
        if not useful:
            yield f"no sample is longer than {machine.longest} tokens"


def _deepspeed(name: str, start: Configuration, machine: Machine) -> Rung | str:
    if start.deepspeed is None:
        return "the script runs without DeepSpeed"
    if name == "zero3" and machine.gpus < 2:
        return "it shares the weights out over several GPUs, and there are not several"
    if name == "zero3" and start.bits != 16:
        return "it does not go with fewer bits"
    if name == "offload" and start.offload:
        return "the script is there already"
    file = machine.sibling(name)
    if file is None:
        return "no such DeepSpeed configuration stands beside the script's own"
    if name == "offload":
        return Rung(name, "optimizer in host memory", (("deepspeed", file), ("offload", True)))
    return Rung(name, "ZeRO-3", (("deepspeed", file), ("offload", False)))


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, number + 1) if number % size == 0)


def _fewer(names: str, than: str | None) -> bool:
    if than is None or than == "all-linear":
        return True
    return set(names.split(",")) < set(than.split(","))
