"""Tier 1: the adapter's files against themselves, against the base model and against the installed PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorapatch.adapter.base_model import BaseModel, find_base, shapes_by_config
from lorapatch.adapter.bridge import check_bridge, read_config
from lorapatch.adapter.findings import Finding, counted, judged
from lorapatch.adapter.inspect import Adapter, Pair
from lorapatch.adapter.peft_version import check_version, installed_peft
from lorapatch.errors import Refused

__all__ = ["check_files"]


def check_files(adapter: Adapter, base: Path | None = None) -> list[Finding]:
    """All findings of tier 1. Needs no torch; reads the base model's headers, not its weights."""
    findings = list(adapter.findings)
    model: BaseModel | None = None
    try:
        model = find_base(adapter.settings, base)
        shapes = _shapes(model)
        source = str(model.directory)
        silent = f"{source} has no weights that can be read, and config.json is of an unknown family"
    except Refused as refusal:
        shapes = _lenient_shapes(adapter.directory)
        source = f"{adapter.directory.name}/config.json"
        silent = str(refusal)
    if not shapes:
        findings += [Finding(name, 1, "not checked", silent) for name in ("modules", "base")]
    else:
        findings += [_check_targets(adapter, shapes), _check_base(adapter, shapes, source)]
    in_base = frozenset(model.weights) if model is not None and model.has_weights else frozenset()
    findings.append(check_bridge(adapter.directory, in_base))
    findings.append(check_version(adapter.config, installed_peft()))
    return findings


def _shapes(model: BaseModel) -> Mapping[str, tuple[int, ...]]:
    if not model.has_weights:
        return shapes_by_config(model.config) or {}
    shapes = model.shapes()
    if model.tied and (name := model.embedding()):  # a head without a tensor of its own is a module all the same
        shapes.setdefault("lm_head", model.weights[name].shape)
    return shapes


def _lenient_shapes(directory: Path) -> Mapping[str, tuple[int, ...]]:
    try:
        return shapes_by_config(read_config(directory)) or {}
    except Refused:
        return {}


def _check_targets(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Finding:
    """The modules that carry LoRA against those that ``target_modules`` names in the base."""
    wanted = adapter.settings.targets(shapes)
    if wanted is None:
        return Finding("modules", 1, "not checked", "adapter_config.json has no target_modules")
    missing = sorted(wanted - set(adapter.pairs))
    extra = sorted(module for module in adapter.pairs if module in shapes and module not in wanted)
    figures = {"expected": len(wanted), "found": len(adapter.pairs), "missing": missing[:10], "extra": extra[:10]}
    faults = []
    if missing:
        faults.append(f"{counted(len(missing), 'module')} of target_modules without LoRA: {_some(missing)}")
    if extra:
        faults.append(f"{counted(len(extra), 'module')} with LoRA that target_modules does not name: {_some(extra)}")
    fine = f"all {counted(len(wanted), 'module')} of target_modules carry LoRA, and no other"
    return judged("modules", 1, "; ".join(faults), fine, figures)


def _check_base(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], source: str) -> Finding:
    """Whether every LoRA pair fits a module of the base."""
    unknown = sorted(module for module in adapter.pairs if module not in shapes)
    wrong = []
    for module, pair in adapter.pairs.items():
        made, there = _made_for(adapter, pair), shapes.get(module)
        if made is not None and there is not None and made != tuple(there):
            wrong.append(f"{module} is made for {list(made)}, the base has {list(there)}")
    figures = {"modules": len(adapter.pairs), "unknown": unknown[:10], "wrong": len(wrong)}
    fault = ""
    if wrong:
        fault = f"wrong base: {wrong[0]} ({len(wrong)} of {counted(len(adapter.pairs), 'module')}; {source})"
    elif unknown:
        fault = f"{counted(len(unknown), 'module')} with LoRA that {source} does not have: {_some(unknown)}"
    return judged("base", 1, fault, f"all {counted(len(adapter.pairs), 'module')} fit the shapes of {source}", figures)


def _made_for(adapter: Adapter, pair: Pair) -> tuple[int, int] | None:
    """The shape of the weight that a pair is for; None where swapped, single or of another rank (said before)."""
    rank = adapter.settings.rank(pair.module)
    if pair.a is None or pair.b is None or len(pair.a.shape) != 2 or len(pair.b.shape) != 2:
        return None
    if (pair.a.shape[0], pair.b.shape[1]) != (rank, rank):
        return None
    out, size = pair.b.shape[0], pair.a.shape[1]
    return (size, out) if pair.embedding or adapter.config.get("fan_in_fan_out") else (out, size)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
