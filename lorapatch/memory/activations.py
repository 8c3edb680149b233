"""Bytes of activations, by hand: what autograd keeps of a decoder layer, the loss and MGM's vision bridge."""

from __future__ import annotations

from lorapatch.memory.model import RunSetup
from lorapatch.memory.parameters import Parts

__all__ = ["FIRST_GEMMA", "bridge_saved", "logits_bytes", "saved_by_layer", "seeing", "working_on_layer"]

# transformers' first releases with Gemma: logits are not cast to float32, the causal mask is of int64.
FIRST_GEMMA = ("4.38.0", "4.38.1")
# lorapatch.trainer: positions whose logits exist at once (head.py), images seen and mined at once (model.py, mining.py).
_POSITIONS_AT_ONCE, _SEEN_AT_ONCE, _MINED_AT_ONCE = 256, 8, 4
# Copies of the stacked features that exist while a window is mined (autocast, where there is no DeepSpeed, normalises
# them in float32), and of ConvNeXt's widest map while it runs.
_MINING_COPIES, _MINING_COPIES_AUTOCAST, _CONVNEXT_COPIES = 2.4, 5.0, 12


def _element(setup: RunSetup) -> int:
    return 4 if setup.dtype == "fp32" else 2


def saved_by_layer(setup: RunSetup, parts: Parts) -> float:
    """Bytes that autograd keeps of one decoder layer for each token, without checkpointing."""
    e, language = _element(setup), parts.language
    hidden, inner = language.hidden, language.intermediate
    queries, keys = language.heads * language.head_dim, language.kv_heads * language.head_dim
    learning = setup.method == "full"
    norms = language.layer_rest // hidden
    if language.gated:  # RMSNorm works on a float32 copy; its weight wants the normalised one
        norm = (4 + (e if learning else 0)) * hidden
    else:
        norm, norms = e * hidden, max(norms // 2, 1)
    repeated = queries if setup.trainer == "upstream" else keys  # transformers 4.38 repeats keys and values for each head
    attention = e * (2 * queries + 2 * repeated) + 4 * language.heads
    if setup.attention == "eager":
        attention += language.heads * setup.sequence * (2 * e + 4)
    mlp = e * (3 * inner if language.gated else inner)
    return norms * norm + attention + mlp + _inputs_of_linears(setup, parts)


def _inputs_of_linears(setup: RunSetup, parts: Parts) -> float:
    """What weights that learn want of their inputs: shared where several layers have one; LoRA's dropout copies it."""
    e, language = _element(setup), parts.language
    if setup.method == "full":
        shared = {(linear.inputs, linear.name in ("down_proj", "o_proj")) for linear in language.linears}
        return float(e * sum(width for width, _ in shared))
    if setup.lora is None:
        return 0.0
    each = e + 1 if setup.lora.dropout > 0 else e
    return float(sum(each * linear.inputs + e * setup.lora.r for linear in parts.targets))


def working_on_layer(setup: RunSetup, parts: Parts) -> float:
    """Bytes for each token while one layer is run backward: what it kept, and the gradients in flight."""
    e, language = _element(setup), parts.language
    in_flight = e * (3 * language.intermediate + 4 * language.hidden)
    if setup.zero is None and setup.lora is not None and e == 2:  # LoRA in float32: its input and that one's gradient
        in_flight += 8 * language.intermediate
    return saved_by_layer(setup, parts) + in_flight


def logits_bytes(setup: RunSetup, parts: Parts, transformers: str = "") -> float:
    """Logits and their gradient at the beginning of the backward pass; ``transformers`` is its version."""
    vocabulary = parts.language.vocabulary
    if setup.trainer == "embedded":  # supervised positions alone: log-softmax, its gradient, the loss's, in float32
        return 12.0 * vocabulary * min(setup.micro_batch * setup.labels, _POSITIONS_AT_ONCE)
    positions = setup.micro_batch * setup.sequence
    if setup.trainer == "upstream" and transformers in FIRST_GEMMA:  # three copies in the type of the model
        return 3.0 * _element(setup) * vocabulary * positions
    return 12.0 * vocabulary * positions


def _feature_elements(setup: RunSetup, parts: Parts) -> int:
    """Elements of all stages' features on the first stage's grid, for one image."""
    assert parts.aux is not None
    return parts.aux.channels * (setup.image_size_aux // parts.aux.patch_size) ** 2


def bridge_saved(setup: RunSetup, parts: Parts) -> float:
    """What the vision bridge keeps of all images of a micro-batch for the backward pass."""
    e, images = _element(setup), setup.micro_batch * setup.images
    if parts.vision is None or not images:
        return 0.0
    tokens = images * parts.vision.tokens
    projector = float(tokens * e * (2 * parts.vision.hidden + 2 * parts.language.hidden))
    if parts.aux is None:
        return projector
    positions = (setup.image_size_aux // parts.aux.patch_size) ** 2
    if setup.trainer == "upstream":  # features, both LayerNorms' results, keys and values
        return projector + images * positions * e * (3.0 * parts.aux.channels + 2 * parts.vision.hidden)
    maps = images * e * parts.aux.map_elements(setup.image_size_aux)
    if setup.gradient_checkpointing:
        return projector + maps
    return projector + maps + 2.0 * e * images * _feature_elements(setup, parts)


def seeing(setup: RunSetup, parts: Parts) -> tuple[float, float]:
    """Temporaries while the towers run, and while the embedded trainer mines its windows."""
    e, images = _element(setup), setup.micro_batch * setup.images
    if parts.vision is None or not images:
        return 0.0, 0.0
    at_once = min(images, _SEEN_AT_ONCE) if setup.trainer == "embedded" else images
    clip = at_once * parts.vision.patches * e * (4 * parts.vision.hidden + 2 * parts.vision.intermediate)
    if parts.aux is None:
        return float(clip), 0.0
    first = parts.aux.widths[0] * (setup.image_size_aux // parts.aux.patch_size) ** 2
    copies = _MINING_COPIES_AUTOCAST if setup.zero is None and e == 2 else _MINING_COPIES
    mining = copies * e * min(images, _MINED_AT_ONCE) * _feature_elements(setup, parts)
    return float(max(clip, _CONVNEXT_COPIES * e * at_once * first)), mining
