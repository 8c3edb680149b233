"""What a memory estimate is made from and what it says, as data: the run, the bytes by category, the bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = ["CATEGORIES", "Breakdown", "Bytes", "Estimate", "LoraSetup", "RunSetup", "Side", "Tensor", "Zero"]

# In the order of the table. At the peak of the run; their sum is what is allocated then.
CATEGORIES = (
    "frozen_weights",
    "trainable_weights",
    "master_copies",
    "gradients",
    "optimizer_states",
    "activations",
    "logits",
    "buffers",  # model buffers, ZeRO's buckets, workspaces
)


class Bytes(NamedTuple):
    """A number of bytes with its bounds: ``low <= expected <= high``."""

    low: int
    expected: int
    high: int


@dataclass(frozen=True, slots=True)
class Zero:
    """DeepSpeed's ZeRO as the run's configuration has it, defaults filled in (sizes in elements, as DeepSpeed counts)."""

    stage: int = 0
    offload_optimizer: bool = False
    offload_param: bool = False
    pin_memory: bool = False
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    reduce_bucket_size: int = 500_000_000
    allgather_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000


@dataclass(frozen=True, slots=True)
class LoraSetup:
    """LoRA as the run has it. ``target_modules``: leaf names with commas, "all-linear" or a regular expression."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.1
    bias: str = "none"
    target_modules: str = "all-linear"
    variant: str = "lora"


@dataclass(frozen=True, slots=True)
class RunSetup:
    """One training run as far as its memory goes: everything both ways of estimating need.

    ``trainer`` is "embedded" (lorapatch.trainer), "upstream" (MGM: logits at every position) or "transformers" (a plain
    Hugging Face Trainer); ``family`` "mgm", "causal_lm" or "image_text". ``sequence`` is the longest sample of a
    micro-batch in tokens, image tokens included; ``labels`` the supervised positions of one sample; ``images`` per sample.
    ``lengths`` are quantiles of the samples' tokens, ascending; empty where all are alike. ``allocator`` is
    PYTORCH_CUDA_ALLOC_CONF.
    """

    family: str
    trainer: str
    model: Path  # folder with config.json
    method: str  # full, lora, pretrain (the projector alone)
    micro_batch: int
    sequence: int
    labels: int
    vision_tower: Path | None = None
    vision_tower_aux: Path | None = None
    projector: str = "mlp2x_gelu"
    image_size_aux: int = 768
    images: int = 1
    lora: LoraSetup | None = None
    bits: int = 16
    double_quant: bool = True
    quant_type: str = "nf4"
    dtype: str = "bf16"  # bf16, fp16, fp32: what the forward pass computes in
    gradient_checkpointing: bool = True
    use_reentrant: bool = True
    accumulation: int = 1
    gpus: int = 1  # of all nodes together
    zero: Zero | None = None  # None: no DeepSpeed
    optimizer: str = "adamw_torch"  # transformers' names
    attention: str = "sdpa"
    model_max_length: int = 2048
    device: str = "cuda"
    lengths: tuple[int, ...] = ()
    allocator: str = ""


class Tensor(NamedTuple):
    """A storage that lives at the peak, for the list of the biggest."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    phase: str  # load, forward, backward, step
    operation: str  # the operation that made it


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The bytes of one GPU at the peak of the run; ``categories`` maps each of CATEGORIES to bytes and adds up to
    ``allocated`` (what torch.cuda.max_memory_allocated() will say).
    """

    way: str  # trace, closed form
    categories: Mapping[str, int]
    allocated: int
    phases: Mapping[str, int]  # peak allocated in load, forward, backward, step
    phase: str = ""  # of the peak
    operation: str = ""
    biggest: tuple[Tensor, ...] = ()
    reserved: int | None = None  # the allocator's segments at their most; None: nothing was replayed
    reserved_high: int | None = None  # by the order in which samples of different lengths come
    host: int = 0  # bytes of host RAM for offloaded states, of one rank, as they lie there between two steps
    total_parameters: int = 0
    trainable_parameters: int = 0
    lora_parameters: int = 0
    assumed: tuple[str, ...] = ()  # in words
    not_modelled: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)  # of the libraries traced
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Side:
    """One method of a script's run: what it takes of one GPU, in bytes.

    ``allocated`` and ``reserved`` are what torch.cuda.max_memory_allocated() and max_memory_reserved() will say, ``device``
    what nvidia-smi shows for the process: reserved, CUDA context, NCCL.
    """

    setup: RunSetup
    breakdown: Breakdown
    allocated: Bytes
    reserved: Bytes
    device: Bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a script's run will need: ``before`` in full, ``after`` with LoRA; a side that was not asked for is None."""

    script: Path
    line: int  # of the launch
    gpu: str  # the card that device memory is meant for
    before: Side | None
    after: Side | None
    budget: int | None = None  # bytes of one GPU
    largest_micro_batch: int | None = None  # of ``after``, that fits the budget; 0 if none does
    notes: tuple[str, ...] = ()
