"""What a multimodal run trains beside LoRA: projector and vlm_uni modules, in non_lora_trainables.bin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorapatch.adapter.findings import Finding, counted
from lorapatch.adapter.settings import read_json
from lorapatch.adapter.tensors import Tensor, read_tensors
from lorapatch.errors import Refused

__all__ = ["FILE", "bridge_shapes", "check_bridge", "is_multimodal", "plain_name", "read_bridge", "read_config"]

FILE = "non_lora_trainables.bin"


def read_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` that the run left beside the adapter; empty if there is none. Raises Refused."""
    path = directory / "config.json"
    return read_json(path) if path.is_file() else {}


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` is that of a LLaVA-like model: a language model with ``mm_*`` fields."""
    return bool(config.get("mm_vision_tower") or str(config.get("model_type")).startswith(("mgm", "llava_")))


def read_bridge(directory: Path) -> dict[str, Tensor]:
    """The tensors of non_lora_trainables.bin by their name in the whole model; empty if there is no such file.

    Raises Refused for a damaged file, or one that could run code.
    """
    path = directory / FILE
    if not path.is_file():
        return {}
    return {plain_name(name): tensor for name, tensor in read_tensors(path).items()}


def plain_name(name: str) -> str:
    """The name in the whole model of a parameter that PEFT or a trainer has wrapped."""
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    return name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")


def bridge_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of the tensors between towers and language model; None if ``config`` does not say.

    The projector as LLaVA builds it (linear, mlpNx_gelu, identity), the vlm_uni modules as MGM does (a LayerNorm and a
    Linear each).
    """
    seen, hidden, aux = config.get("mm_hidden_size"), config.get("hidden_size"), config.get("mm_hidden_size_aux")
    if not isinstance(seen, int) or not isinstance(hidden, int):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    kind = str(config.get("mm_projector_type", "linear"))
    if kind == "linear":
        shapes |= _linear("model.mm_projector", hidden, seen)
    elif match := re.fullmatch(r"mlp(\d+)x_gelu", kind):
        for number in range(int(match[1])):
            shapes |= _linear(f"model.mm_projector.{2 * number}", hidden, hidden if number else seen)
    elif kind != "identity":
        return None
    if isinstance(aux, int) and config.get("mm_vision_tower_aux"):
        for name, size in (("query", seen), ("aux", aux), ("val", aux)):
            module = f"model.vlm_uni_{name}_projector"
            shapes |= {f"{module}.0.weight": (size,), f"{module}.0.bias": (size,)} | _linear(f"{module}.1", seen, size)
    return shapes


def _linear(module: str, out: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{module}.weight": (out, size), f"{module}.bias": (out,)}


def check_bridge(directory: Path, in_base: frozenset[str]) -> Finding:
    """Whether non_lora_trainables.bin holds all that the model needs; ``in_base`` are the base's own tensors."""
    try:
        config, tensors = read_config(directory), read_bridge(directory)
    except Refused as refusal:
        return Finding("bridge", 1, "fail", str(refusal))
    there = (directory / FILE).is_file()
    if not is_multimodal(config):
        if not there:
            return Finding("bridge", 1, "not checked", f"a text model: no {FILE} is needed")
        return _check_others(tensors, config, in_base)
    expected = bridge_shapes(config)
    if expected is None:
        return Finding("bridge", 1, "not checked", f"config.json does not say what {FILE} has to hold")
    return _compare(expected, tensors, in_base, there)


def _check_others(tensors: Mapping[str, Tensor], config: Mapping[str, Any], in_base: frozenset[str]) -> Finding:
    """What a model without LLaVA's fields has trained beside LoRA: parameters of the base, or of a head of its own."""
    if not config and any("mm_projector" in name or "vlm_uni" in name for name in tensors):
        sentence = f"{FILE} is there, but no config.json with mm_* fields: the model that it belongs to is unknown"
        return Finding("bridge", 1, "fail", sentence)
    figures = {"found": len(tensors), "parameters": sum(tensor.parameters for tensor in tensors.values())}
    bad = [name for name, tensor in tensors.items() if not tensor.parameters or not tensor.is_finite()]
    if bad:
        sentence = f"{FILE}: {counted(len(bad), 'tensor', 'is')} empty or not finite, such as {bad[0]}"
        return Finding("bridge", 1, "fail", sentence, figures)
    other = [name for name in tensors if name not in in_base]
    if not in_base or other:
        why = f"{other[0]} is not in the base model" if in_base else "the base model is not there"
        return Finding("bridge", 1, "not checked", f"{FILE}: {counted(len(tensors), 'tensor')}; {why}", figures)
    sentence = f"{FILE}: {counted(len(tensors), 'tensor')} of the base model, trained beside LoRA"
    return Finding("bridge", 1, "pass", sentence, figures)


def _compare(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], in_base: frozenset[str], there: bool
) -> Finding:
    missing = [name for name in expected if name not in tensors and name not in in_base]
    figures = {"expected": len(expected), "found": len(tensors), "missing": missing[:10]}
    if missing and not there:
        sentence = f"{FILE} is missing: {counted(len(missing), 'tensor')} of projector and vlm_uni were not saved"
        return Finding("bridge", 1, "fail", sentence, figures)
    if missing:
        sentence = f"{FILE} lacks {len(missing)} of {counted(len(expected), 'tensor')}, such as {missing[0]}"
        return Finding("bridge", 1, "fail", sentence, figures)
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            found = list(tensors[name].shape)
            sentence = f"{FILE}: {name} has the shape {found}, config.json asks for {list(shape)}"
            if not tensors[name].parameters:
                sentence = f"{FILE}: {name} is empty: ZeRO-3's shares were not gathered"
            return Finding("bridge", 1, "fail", sentence, figures)
    if broken := [name for name, tensor in tensors.items() if not tensor.is_finite()]:
        sentence = f"{FILE}: {counted(len(broken), 'tensor', 'holds')} NaN or infinity, such as {broken[0]}"
        return Finding("bridge", 1, "fail", sentence, figures)
    parameters = sum(tensor.parameters for tensor in tensors.values())
    sentence = f"{FILE}: all {counted(len(expected), 'tensor')} of projector and vlm_uni, {parameters:,} parameters"
    if not tensors:
        sentence = f"no {FILE}; the base model holds projector and vlm_uni"
    return Finding("bridge", 1, "pass", sentence, figures | {"parameters": parameters})
