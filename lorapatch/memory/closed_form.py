"""The peak of a training step by arithmetic alone: no model is built, no library loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorapatch.memory.activations import FIRST_GEMMA, bridge_saved, logits_bytes, saved_by_layer, seeing, working_on_layer
from lorapatch.memory.model import CATEGORIES, Breakdown, RunSetup, Tensor
from lorapatch.memory.parameters import Parts, parts_of
from lorapatch.memory.zero import NORM_PART, SUB_GROUP, said_of_host

__all__ = ["closed_form"]

# Bytes that the optimizer keeps of a parameter (float32 states), by transformers' names; AdamW's otherwise.
_STATES = {"sgd": 0.0, "adafactor": 0.02, "lion_32bit": 4.0, "lion_8bit": 1.0, "adagrad": 4.0, "rmsprop": 4.0}


def closed_form(setup: RunSetup, workspace: int = 0, transformers: str = "") -> Breakdown:
    """The bytes of one GPU at the peak of ``setup``'s run, ``workspace`` of them cuBLAS's.

    ``transformers``: the version that runs, where it matters (MGM's own trainer; without it the 4.38 that it pins).
    Model states after ZeRO (Rajbhandari et al., 2020), activations after the tensors that autograd keeps of each layer.
    Raises Refused when not even the model's size is known.
    """
    parts = parts_of(setup)
    states = _states(setup, parts, transformers)
    moments = _phases(setup, parts, states, transformers)
    phases = {name: {**states.held, **_added(states.held, needs)} for name, needs in moments.items()}
    sums = {name: sum(needs.values()) + workspace for name, needs in phases.items()}
    phase = max(sums, key=lambda name: sums[name])
    categories = {name: round(phases[phase].get(name, 0)) for name in CATEGORIES}
    categories["buffers"] += workspace
    when, operation = _WHERE[phase]
    by_when: dict[str, int] = {}
    for name, total in sums.items():
        by_when[_WHERE[name][0]] = max(by_when.get(_WHERE[name][0], 0), round(total))
    return Breakdown(
        way="closed form",
        categories=categories,
        allocated=sum(categories.values()),
        phases=by_when,
        phase=when,
        operation=operation,
        biggest=_biggest(setup, parts, states),
        host=round(states.host),
        total_parameters=parts.total,
        trainable_parameters=parts.trainable,
        lora_parameters=parts.lora,
        assumed=(*parts.notes, *said_of_host(states.host, states.host_step)),
        not_modelled=("temporaries of single kernels", "fragmentation, but for a ratio"),
    )


_WHERE = {
    "load": ("load", "ZeRO's flat copy of the weights that learn"),
    "see": ("forward", "the vision towers"),
    "loss": ("backward", "the loss over the vocabulary"),
    "layer": ("backward", "a decoder layer"),
    "bridge": ("backward", "the vision bridge"),
    "step": ("step", "the optimizer"),
}


@dataclass(frozen=True)
class _States:
    """``held`` all the time, by category; per learning parameter bytes on this GPU; ``host`` bytes of RAM."""

    held: Mapping[str, float]
    gradient: float  # bytes of all gradients as they are kept between micro-steps
    bucket: float  # ZeRO's and DDP's buckets during the backward pass
    step: float  # what the step adds
    gathered: float  # ZeRO-3's whole weights while something is computed
    host: float
    host_step: float  # what the step adds to that


def element(setup: RunSetup) -> int:
    """Bytes of a weight as it is computed with."""
    return 4 if setup.dtype == "fp32" else 2


def _states(setup: RunSetup, parts: Parts, transformers: str) -> _States:
    e, zero = element(setup), setup.zero
    ranks = max(setup.gpus, 1)
    learning = parts.trainable
    stage = zero.stage if zero else 0
    share = learning / (ranks if stage else 1)
    weight = e if zero else _weight_without_deepspeed(setup)
    frozen = _frozen_bytes(setup, parts)
    buffers = _masks(setup, parts, transformers)[0]
    mixed = zero is not None and e == 2
    master, states = 4 * share * mixed, share * _state_bytes(setup, 4 if zero else weight)
    gradient = {3: e * share, 2: e * share, 1: e * learning}.get(stage, (4 if mixed else weight) * learning)
    flat = 4 * share if zero is not None else 0.0  # the float32 gradients that the step is taken with
    temporary = (0 if "fused" in setup.optimizer or "8bit" in setup.optimizer else 1) * (4 if zero else weight) * share
    bucket = 0.0
    if zero is not None and stage:
        bucket = e * min(zero.reduce_bucket_size, max(learning, 1)) if stage == 1 else e * zero.reduce_bucket_size
        bucket *= 2 if zero.overlap_comm and stage < 3 else 1
    elif ranks > 1:
        bucket = weight * learning
    host = host_step = gathered = 0.0
    if zero is not None and stage == 3:
        frozen = frozen / ranks + _whole_towers(setup, parts, e) * (1 - 1 / ranks)
        gathered = _gathered(setup, parts, e)
        flat, temporary = (min(value, 4.0 * SUB_GROUP) for value in (flat, temporary))
        weights = e * share
        if zero.offload_param:
            kept = _whole_towers(setup, parts, e)
            host += frozen - kept + weights
            frozen, weights = kept, 0.0
    else:
        weights = weight * learning
    if setup.optimizer.startswith("paged"):
        host, states = host + states, 0.0
    if zero is not None and zero.offload_optimizer and stage:
        host += master + states + 4 * share + e * share  # the 16-bit ones: parameters (ZeRO-3: gradients) on their way
        if stage < 3:  # the way of one gradient, and where ZeRO-2 accumulates all of them
            largest = e * _largest(setup, parts)
            host += largest + (e * share if stage == 2 and setup.accumulation > 1 else 0)
            buffers += largest
        host_step = 2 * temporary if setup.optimizer == "adamw_torch" else 0.0  # parameter after parameter: two at once
        master = states = flat = temporary = 0.0
        gradient = e * learning if stage == 1 else 0.0
        if stage < 3:  # the norm of one gradient, in float64
            flat = (8 + e) / e * largest
        else:  # the largest weight with its gradient, whose share goes to the host: itself, its norm, its float32 copy
            part = _largest(setup, parts) / ranks
            flat = 2 * e * part * ranks + e * part + max(8 * min(part, NORM_PART), 4 * part)
    if zero is None and weight == 4 and e == 2:
        buffers += 2 * learning  # autocast keeps its casts of the weights until the pass is over
    held = {"frozen_weights": frozen, "trainable_weights": weights, "master_copies": master, "optimizer_states": states,
            "buffers": buffers}  # fmt: skip
    return _States(held, gradient, bucket, flat + temporary, gathered, host, host_step)


def _largest(setup: RunSetup, parts: Parts) -> int:
    """Elements of the largest tensor that learns."""
    hidden = parts.language.hidden
    pair = max((setup.lora.r * max(x.inputs, x.outputs) for x in parts.targets), default=0) if setup.lora else 0
    return max(pair, hidden**2 if setup.family == "mgm" else 0, parts.language.embedding if setup.method == "full" else 0)


def _weight_without_deepspeed(setup: RunSetup) -> int:
    """Bytes of a weight that learns: lorapatch.trainer and PEFT (of a half-precision model) keep those in float32."""
    if setup.trainer == "embedded" or (setup.trainer == "transformers" and setup.method == "lora"):
        return 4
    return element(setup)


def _state_bytes(setup: RunSetup, weight: float) -> float:
    name = setup.optimizer
    if name in _STATES:
        return _STATES[name]
    return 2.0 if "8bit" in name else 2 * weight


def _frozen_bytes(setup: RunSetup, parts: Parts) -> float:
    e = element(setup)
    if setup.bits == 16:
        return e * parts.frozen
    packed = parts.language.linear_parameters
    if setup.bits == 8:  # a byte each, and a float32 scale a row
        rows = parts.language.layers * sum(linear.outputs for linear in parts.language.linears)
        return packed + 4 * rows + e * (parts.frozen - packed)
    # Half a byte each; a scale for 64: float32, or (double_quant) a byte and a float32 for 256 of them (QLoRA, 2023).
    scale = (1 + 4 / 256) / 64 if setup.double_quant else 4 / 64
    return packed * (0.5 + scale) + e * (parts.frozen - packed)


def _masks(setup: RunSetup, parts: Parts, transformers: str) -> tuple[float, float]:
    """transformers 4.38 keeps a causal mask over all positions, and makes one of the model's type for each sample."""
    if setup.trainer != "upstream" or not (transformers or "4.38").startswith(("4.38", "4.39")):
        return 0.0, 0.0
    square = float(parts.language.positions**2)
    return (8 if transformers in FIRST_GEMMA else 1) * square, element(setup) * square


def _whole_towers(setup: RunSetup, parts: Parts, e: int) -> float:
    """The embedded trainer's towers stand outside what ZeRO-3 cuts."""
    return float(e * parts.towers) if setup.trainer == "embedded" else 0.0


def _gathered(setup: RunSetup, parts: Parts, e: int) -> float:
    """Weights that ZeRO-3 holds: what it fetches ahead, as much as may live, and the embedding or head that is needed now.

    One rank that keeps its weights on the GPU gathers nothing.
    """
    assert setup.zero is not None
    if setup.gpus == 1 and not setup.zero.offload_param:
        return 0.0
    return float(e * min(setup.zero.max_live_parameters + parts.language.embedding, parts.language.parameters))


def _added(held: Mapping[str, float], needs: Mapping[str, float]) -> dict[str, float]:
    return {name: held.get(name, 0.0) + value for name, value in needs.items()}


def _phases(setup: RunSetup, parts: Parts, states: _States, transformers: str) -> dict[str, dict[str, float]]:
    """What the moments that can be the peak need beside what is held, by category."""
    e, tokens = element(setup), setup.micro_batch * setup.sequence
    layers = parts.language.layers
    kept = states.gradient if setup.accumulation > 1 or setup.zero is None else 0.0
    if setup.gradient_checkpointing:
        passed = float(layers * tokens * parts.language.hidden * e)
    else:
        passed = layers * tokens * saved_by_layer(setup, parts)
    mask = setup.micro_batch * _masks(setup, parts, transformers)[1]
    bridge = bridge_saved(setup, parts)
    scratch = e * max(linear.inputs * linear.outputs for linear in parts.language.linears) if setup.bits < 16 else 0
    activations = passed + bridge + mask
    layer = working_on_layer(setup, parts) * tokens
    if not setup.gradient_checkpointing:
        layer -= saved_by_layer(setup, parts) * tokens
    see, mining = seeing(setup, parts)
    whole = {"gradients": states.gradient, "buffers": states.bucket + scratch}
    flattening = setup.zero is not None and setup.zero.stage in (1, 2)
    found = {
        "load": {"buffers": e * parts.trainable if flattening else 0.0},
        "loss": {"gradients": kept, "activations": activations, "logits": logits_bytes(setup, parts, transformers),
                 "buffers": scratch + states.gathered},
        "layer": {**whole, "activations": activations + layer, "buffers": whole["buffers"] + states.gathered},
        "step": {"gradients": states.gradient, "buffers": states.step},
    }
    if parts.vision is not None:
        found["see"] = {"gradients": kept, "activations": bridge + see}
        if setup.trainer == "embedded":
            found["bridge"] = {**whole, "activations": bridge + mining}
    return found


def _biggest(setup: RunSetup, parts: Parts, states: _States) -> tuple[Tensor, ...]:
    """The largest single tensors of the run, as far as arithmetic knows them."""
    e, language = element(setup), parts.language
    kind = {"bf16": "bfloat16", "fp16": "float16"}.get(setup.dtype, "float32")
    made = setup.micro_batch * (setup.labels if setup.trainer == "embedded" else setup.sequence)
    if setup.trainer == "embedded":
        made = min(made, 256)
    flat = parts.trainable // (max(setup.gpus, 1) if setup.zero and setup.zero.stage else 1)
    wide = setup.micro_batch * setup.sequence
    found = [
        Tensor(e * language.embedding, (language.vocabulary, language.hidden), kind, "load", "embedding"),
        Tensor(4 * made * language.vocabulary, (made, language.vocabulary), "float32", "backward", "logits"),
        Tensor(e * wide * language.intermediate, (wide, language.intermediate), kind, "backward", "MLP of a layer"),
    ]
    if setup.zero is not None and states.held["master_copies"]:
        names = ("master copy", "exp_avg", "exp_avg_sq")
        found += [Tensor(4 * flat, (flat,), "float32", "step", name) for name in names]
    if states.bucket and setup.zero is not None:
        size = setup.zero.reduce_bucket_size
        found.append(Tensor(e * size, (size,), kind, "backward", "ZeRO's bucket"))
    return tuple(sorted(found, reverse=True)[:5])
