"""Which tensors a merged model has, and where each comes from: base, base + LoRA, adapter, non_lora_trainables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorapatch.adapter.base_model import BaseModel
from lorapatch.adapter.inspect import Adapter, Pair
from lorapatch.adapter.tensors import FLOATS, SIZES, Tensor
from lorapatch.errors import Refused

__all__ = ["Entry", "Plan", "pack", "plan_merge", "usual_dtype"]

# Upstream's MGM loader takes CLIP's tensors from a shard that also has vlm_uni ones, all of them or none.
_SIGHT = ("vision_tower.vision_tower.", "vision_tower_aux.", "vlm_uni", "mm_projector")


@dataclass(frozen=True)
class Entry:
    """A tensor of the merged model: ``source``, changed by ``pair`` (a weight) or by a pair's own bias."""

    name: str
    dtype: str
    source: Tensor
    pair: Pair | None = None
    is_bias: bool = False  # then ``pair.bias`` is added, not B·A

    @property
    def nbytes(self) -> int:
        """Its size in the merged model, bytes."""
        return self.source.parameters * SIZES[self.dtype]


@dataclass(frozen=True)
class Plan:
    """All tensors of the merged model in their order. ``untied``: it needs an output embedding of its own."""

    entries: tuple[Entry, ...]
    untied: bool
    dtype: str  # of most of its bytes

    @property
    def nbytes(self) -> int:
        """The size of all tensors, bytes."""
        return sum(entry.nbytes for entry in self.entries)


def plan_merge(adapter: Adapter, base: BaseModel, bridge: Mapping[str, Tensor], dtype: str | None) -> Plan:
    """Lay out the merged model; ``dtype`` ("BF16") is that of all floats, or each keeps its own.

    Raises Refused for what the base has no place for.
    """
    weights = base.weights
    usual = usual_dtype(weights)
    entries = {name: Entry(name, _target(tensor, tensor.dtype, dtype), tensor) for name, tensor in weights.items()}
    untied = _untie(adapter, base, entries)
    for name, tensor in adapter.others.items():
        if name not in entries:
            raise Refused(f"the adapter holds {name}, for which {base.directory} has no place")
        if name.endswith(".bias") and tensor.shape != weights[name].shape:
            raise Refused(f"{name} has the shape {list(tensor.shape)}, in {base.directory} {list(weights[name].shape)}")
        entries[name] = replace(entries[name], source=tensor)
    for name, tensor in bridge.items():
        own = weights[name].dtype if name in weights else usual
        entries[name] = Entry(name, _target(tensor, own, dtype), tensor)
    for module, pair in adapter.pairs.items():
        _add_pair(entries, module, pair, base)
    return Plan(tuple(entries.values()), untied, dtype or usual)


def _add_pair(entries: dict[str, Entry], module: str, pair: Pair, base: BaseModel) -> None:
    for name, wanted in ((f"{module}.weight", True), (f"{module}.bias", pair.bias is not None)):
        if not wanted:
            continue
        if name not in entries:
            raise Refused(f"the adapter changes {name}, which {base.directory} does not have")
        source = entries[name].source
        if source.dtype not in FLOATS:
            raise Refused(f"{name} is {source.dtype}: the base is quantised; give the plain one with --base")
        if len(source.shape) > 2:
            raise Refused(f"{name} is a convolution's; only linear layers and embeddings are merged here")
        entries[name] = replace(entries[name], pair=pair, is_bias=name.endswith(".bias"))


def _untie(adapter: Adapter, base: BaseModel, entries: dict[str, Entry]) -> bool:
    """Give a tied model an output embedding of its own where training changed one of the two and not the other.

    PEFT merges in place, which changes both; the tuned model, unmerged, has only one of them changed.
    """
    embedding = base.embedding()
    if not base.tied or embedding is None or adapter.config.get("ensure_weight_tying"):
        return False
    heads = [name for name in (*entries, *_changed(adapter)) if name.rsplit(".", 2)[-2] in ("lm_head", "embed_out")]
    head = next(iter(heads), "lm_head.weight")
    if not {embedding, head} & _changed(adapter):
        return False
    if head not in entries:
        entries[head] = replace(entries[embedding], name=head)
    return True


def _changed(adapter: Adapter) -> set[str]:
    return {*adapter.others, *(f"{module}.weight" for module in adapter.pairs)}


def _target(tensor: Tensor, own: str, dtype: str | None) -> str:
    return tensor.dtype if tensor.dtype not in FLOATS else dtype or own


def usual_dtype(weights: Mapping[str, Tensor]) -> str:
    """The type of most of a model's bytes. Raises Refused for a model without floats."""
    counts: Counter[str] = Counter()
    for tensor in weights.values():
        if tensor.dtype in FLOATS:
            counts[tensor.dtype] += tensor.nbytes
    if not counts:
        raise Refused("the base model has no float weights: it is quantised; give the plain one with --base")
    return counts.most_common(1)[0][0]


def pack(entries: tuple[Entry, ...], limit: int) -> list[list[Entry]]:
    """Shards of at most ``limit`` bytes (one tensor may be larger), in the order of ``entries``.

    A multimodal model's projector, vlm_uni modules and towers share one shard, the last, whatever their size.
    """
    sight = [entry for entry in entries if any(part in entry.name for part in _SIGHT)]
    names = {entry.name for entry in sight}
    shards: list[list[Entry]] = []
    size = limit
    for entry in entries:
        if entry.name in names:
            continue
        if size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return [shard for shard in (*shards, sight) if shard]
