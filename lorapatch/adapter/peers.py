"""Our merge against PEFT's, tensor by tensor."""

from __future__ import annotations

from typing import Any

from lorapatch.adapter.base_model import BaseModel
from lorapatch.adapter.findings import Finding, counted, judged
from lorapatch.adapter.inspect import Adapter
from lorapatch.adapter.update import Update, as_torch

__all__ = ["check_peers"]

_SHARE = {"float32": 1e-6, "float64": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}  # one rounding, of the largest weight


def check_peers(adapter: Adapter, base: BaseModel, model: Any) -> Finding:
    """Every weight that LoRA changes, merged by PEFT in ``model`` (which is changed by it) and by us."""
    import torch
    from peft.tuners.lora import LoraLayer

    same = compared = 0
    largest, worst, limit = 0.0, "", 0.0
    layers: list[tuple[str, Any]] = [(n, layer) for n, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        module = name.removeprefix("base_model.model.")
        if module not in adapter.pairs:
            continue
        tensor = base.weights.get(f"{module}.weight") or base.weights[str(base.embedding())]
        with torch.no_grad():
            layer.merge()
            theirs = layer.get_base_layer().weight.detach().cpu()
            weight = as_torch(tensor).to(theirs.dtype)
            ours = Update(adapter.pairs[module], adapter.settings).rows(weight, 0).to(theirs.dtype)
        limit = _SHARE[str(theirs.dtype).removeprefix("torch.")]
        share = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max().clamp_min(1e-12))
        same += torch.equal(ours, theirs)
        compared += 1
        if share >= largest:
            largest, worst = share, module
    figures = {"compared": compared, "identical": same, "largest_relative_difference": largest, "tolerance": limit}
    text = (
        f"{same} of {counted(compared, 'merged weight')} have PEFT's very bits, the largest difference is {largest:.2g}"
    )
    fault = f"{text} of the largest weight, in {worst}: PEFT merges it otherwise" if largest > limit else ""
    return judged("peers", 3, fault or ("no LoRA layer was found in the model" if not compared else ""), text, figures)
