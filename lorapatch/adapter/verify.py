"""Prove an adapter: its files, loaded, merged."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lorapatch.adapter.file_tier import check_files
from lorapatch.adapter.findings import Finding, Verification
from lorapatch.adapter.inspect import Adapter, find_adapter, inspect_adapter
from lorapatch.adapter.tensors import FLOATS
from lorapatch.errors import Refused, UsageError

__all__ = ["verify"]

# With one of these wrong there is no point in loading it.
_BLOCKING = frozenset({"file", "empty", "finite", "pairs", "rank", "base", "bridge", "variant"})


def verify(
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    peers: bool = False,
    tiers: Sequence[int] = (1, 2, 3),
) -> Verification:
    """Check the adapter that a run left in ``directory`` (or in its last checkpoint).

    Tier 1 reads the files and needs no torch. Tier 2 loads base and adapter, through PEFT or, for an MGM adapter,
    through the embedded trainer with images. Tier 3 merges into a folder of its own (which needs the base's size on the
    disk) and compares logits. ``base`` is the base model's folder (default: the one that the adapter names), ``data``
    held-out samples in LLaVA's format with their images beside, ``peers`` compares the merge with PEFT's, tensor by
    tensor.

    Raises Refused when there is no adapter, UsageError for an unknown tier; what is wrong with an adapter is a finding.
    """
    if not set(tiers) <= {1, 2, 3}:
        raise UsageError(f"--tiers {','.join(map(str, tiers))}: there are 1, 2 and 3")
    folder = find_adapter(Path(directory))
    if folder is None:
        raise Refused(f"{directory} holds no adapter (adapter_model.safetensors or adapter_model.bin)")
    base_folder = None if base is None else Path(base)
    try:
        adapter = inspect_adapter(folder)
    except Refused as refusal:
        damaged = [Finding("file", 1, "fail", str(refusal))]
        return Verification(folder, base_folder, (*damaged, *_unchecked(tiers, "its files cannot be read")))
    first = [*check_files(adapter, base_folder), _norms(adapter)]
    findings = first if 1 in tiers else []
    broken = [finding for finding in first if finding.state == "fail" and finding.id in _BLOCKING]
    if broken:
        findings += _unchecked(tiers, f"tier 1 failed ({broken[0].id}: {broken[0].sentence})")
    elif {2, 3} & set(tiers) or peers:
        from lorapatch.adapter.loaded_tier import check_loaded

        samples = None if data is None else Path(data)
        findings += check_loaded(adapter, base_folder, samples, peers=peers, tiers=tiers)
    return Verification(folder, base_folder, tuple(findings))


def _unchecked(tiers: Sequence[int], reason: str) -> list[Finding]:
    names = {2: "loaded", 3: "merged"}
    return [Finding(names[tier], tier, "not checked", reason) for tier in sorted(set(tiers) & {2, 3})]


def _norms(adapter: Adapter) -> Finding:
    """How far B went in each layer: for people to look at, nothing to fail."""
    layers: dict[str, float] = {}
    for module, pair in adapter.pairs.items():
        if pair.b is not None and pair.b.dtype in FLOATS:
            match = re.search(r"\.(\d+)\.", module)
            layer = match[1] if match else module
            layers[layer] = math.hypot(layers.get(layer, 0.0), pair.b.norm())
    if not layers:
        return Finding("norms", 1, "not checked", "there is no lora_B to measure")
    low, high = (kind(layers, key=lambda layer: layers[layer]) for kind in (min, max))
    sentence = f"norm of lora_B per layer: {layers[low]:.3g} (layer {low}) to {layers[high]:.3g} (layer {high})"
    return Finding("norms", 1, "pass", sentence, {"b_norm_by_layer": layers})
