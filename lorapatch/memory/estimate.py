"""Know the memory before the run: what a script's training takes of one GPU, in full and with LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused, UsageError
from lorapatch.launch import read_script
from lorapatch.launch.model import Launch, Script
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.flags import PatchOptions
from lorapatch.memory.cache import as_dict, breakdown_dict
from lorapatch.memory.cards import Card, card_called, default_card
from lorapatch.memory.history import correction
from lorapatch.memory.model import Bytes, Estimate, Side, Zero
from lorapatch.memory.predict import Predictor, largest_micro_batch
from lorapatch.memory.setup import Described, Wanted, describe
from lorapatch.memory.versions import versions_of

__all__ = ["METHODS", "compare", "estimate", "estimate_dict", "prediction_dict", "side_dict"]

SIDES = ("before", "after")
METHODS = ("full", "lora", "qlora")


def estimate(
    script: str | PathLike[str],
    patch: PatchOptions | None = None,
    *,
    settings: Mapping[str, object] | None = None,
    sides: Sequence[str] = SIDES,
    budget_B: int | None = None,
    gpu: str | None = None,
    python: str | None = None,
    sequence: int | None = None,
    images: int | None = None,
    trainer: str | None = None,
    trainer_root: str | PathLike[str] | None = None,
    fast: bool = False,
    stage: str | None = None,
    largest: bool = True,
) -> Estimate:
    """The memory of the run that ``script`` describes: ``before`` in full, ``after`` with LoRA as the script has it or as
    ``patch`` would write it. Nothing is written, no GPU is touched. All sizes in bytes.

    ``settings``: any flag of the trainer to its value, None to leave it out. ``gpu``: the card that device memory is for
    (default: the one here, else a 24 GB one). ``python``: the interpreter whose libraries are traced (default: the one
    that the launch runs, else this one). ``sequence`` (tokens of the longest sample, image tokens included) and
    ``images`` (of a sample) instead of what the data file says. ``trainer``: embedded, upstream or transformers.
    ``fast``: closed form, no trace. ``stage``: as `patch` takes it. ``largest``: look for the largest micro-batch within
    ``budget_B`` (default: the card's memory), which costs a trace more, three where memory is fragmented.

    Raises Refused when the script names no launch or no model whose size can be known, UsageError for a bad value.
    """
    if unknown := set(sides) - set(SIDES):
        raise UsageError(f"there is no side {sorted(unknown)[0]}; before and after are the two")
    wanted = Wanted(settings, python, sequence, images, trainer, _path(trainer_root))
    read, launch, described = _described(Path(fspath(script)), patch, wanted, sides, stage)
    card, notes = _card(gpu, described.values())
    predictor = Predictor(card, fast, budget_B)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = dict(zip(described, pool.map(predictor.side, described.values()), strict=True))
        most = None
        if largest and (name := "after" if "after" in found else "before") in found:
            budget = budget_B or card.memory
            most = largest_micro_batch(predictor, described[name], found[name], budget, confirm=budget_B is not None)
    except Refused as refusal:
        raise Refused(f"{script}: {refusal}") from refusal
    return Estimate(
        script=Path(fspath(script)), line=launch.line, gpu=card.name, before=found.get("before"),
        after=found.get("after"), budget=budget_B or card.memory, largest_micro_batch=most, notes=notes,
    )  # fmt: skip


def compare(
    script: str | PathLike[str],
    patch: PatchOptions | None = None,
    *,
    methods: Sequence[str] = METHODS,
    zeros: Sequence[int] = (),
    micro_batches: Sequence[int] = (),
    settings: Mapping[str, object] | None = None,
    budget_B: int | None = None,
    gpu: str | None = None,
    python: str | None = None,
    sequence: int | None = None,
    images: int | None = None,
    trainer: str | None = None,
    trainer_root: str | PathLike[str] | None = None,
    fast: bool = False,
    stage: str | None = None,
) -> tuple[Card, list[tuple[str, Side]]]:
    """A grid: every method (full, lora, qlora: 4 bits) under every ZeRO stage (0: none) at every micro-batch.

    An empty sequence means the script's own. Returns the card and the sides in this order. Raises as `estimate` does.
    """
    if unknown := set(methods) - set(METHODS):
        raise UsageError(f"there is no method {sorted(unknown)[0]}; choose from {', '.join(METHODS)}")
    if wrong := [stage_ for stage_ in zeros if stage_ not in (0, 1, 2, 3)]:
        raise UsageError(f"there is no ZeRO stage {wrong[0]}; 0 (none), 1, 2 and 3 are the stages")
    if wrong := [size for size in micro_batches if size < 1]:
        raise UsageError(f"a micro-batch of {wrong[0]}: it has to be at least 1")
    cells: list[tuple[str, Described]] = []
    path, root = Path(fspath(script)), _path(trainer_root)
    for method in methods:
        given = {**(settings or {}), **({"bits": 4} if method == "qlora" else {})}
        wanted = Wanted(given, python, sequence, images, trainer, root)
        side = "before" if method == "full" else "after"
        one = _described(path, patch, wanted, (side,), stage)[2][side]
        for zero in zeros or (None,):
            for size in micro_batches or (one.setup.micro_batch,):
                cells.append((method, _changed(one, zero, size)))
    card, _ = _card(gpu, [cell for _, cell in cells])
    predictor = Predictor(card, fast, budget_B)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(predictor.side, [cell for _, cell in cells]))
    return card, [(method, side) for (method, _), side in zip(cells, found, strict=True)]


def _changed(described: Described, stage: int | None, micro_batch: int) -> Described:
    zero = described.setup.zero
    if stage is not None:
        zero = None if stage == 0 else replace(zero or Zero(), stage=stage)
    setups = (described.setup, described.low, described.high)
    new = [replace(setup, zero=zero, micro_batch=micro_batch) for setup in setups]
    return replace(described, setup=new[0], low=new[1], high=new[2])


def _described(
    path: Path, patch: PatchOptions | None, wanted: Wanted, sides: Sequence[str], stage: str | None
) -> tuple[Script, Launch, dict[str, Described]]:
    script = read_script(path)
    try:
        launch = choose_launch(script, stage or (patch.stage if patch is not None else None))
        return script, launch, describe(script, launch, patch, wanted, sides)
    except Refused as refusal:
        raise Refused(f"{path}: {refusal}") from refusal


def _card(gpu: str | None, described: Iterable[Described]) -> tuple[Card, tuple[str, ...]]:
    torch = next((versions_of(one.python).get("torch") for one in described), None)
    if gpu is not None:
        return card_called(gpu, torch), ()
    card, note = default_card(torch)
    return card, (note,) if note else ()


def _path(value: str | PathLike[str] | None) -> Path | None:
    return None if value is None else Path(fspath(value))


def side_dict(side: Side) -> dict[str, Any]:
    """A side for JSON: bytes with their bounds, the breakdown, the setup."""
    bounds: dict[str, Bytes] = {"allocated": side.allocated, "reserved": side.reserved, "device": side.device}
    return {
        **{name: value._asdict() for name, value in bounds.items()},
        "breakdown": breakdown_dict(side.breakdown),
        "setup": as_dict(side.setup),
    }


def prediction_dict(found: Estimate) -> dict[str, Any]:
    """What a run's record keeps of the side that is run: bytes with their bounds, the breakdown, and the card.

    ``corrected_by`` is what earlier runs changed of it, so that the history does not learn from its own corrections.
    """
    side = found.after or found.before
    assert side is not None
    corrected_by = correction(found.gpu, side.breakdown.way)
    return {"gpu": found.gpu, "micro_batch": side.setup.micro_batch, "corrected_by": corrected_by, **side_dict(side)}


def estimate_dict(found: Estimate) -> dict[str, Any]:
    """The whole estimate for JSON (schema 1), sizes in bytes."""
    return {
        "schema": 1,
        "script": str(found.script),
        "line": found.line,
        "gpu": found.gpu,
        "before": side_dict(found.before) if found.before else None,
        "after": side_dict(found.after) if found.after else None,
        "budget_B": found.budget,
        "largest_micro_batch": found.largest_micro_batch,
        "notes": list(found.notes),
    }
