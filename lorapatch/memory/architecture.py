"""Shapes and parameters of models, counted from their configuration files: no weight is read, no library loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from lorapatch.errors import Refused
from lorapatch.memory.defaults import language_defaults

__all__ = ["Language", "Linear", "language_in", "model_folder", "read_config", "read_language", "text_config"]


class Linear(NamedTuple):
    """A linear layer that each decoder layer has: its leaf name, widths, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Language:
    """A decoder as its ``config.json`` has it; widths in elements.

    ``linears`` are those of one layer, ``layer_rest`` the other parameters of a layer (norms), ``rest`` those outside
    the layers, embeddings and head apart. ``known`` is False where the counts are a guess by Llama's pattern.
    """

    kind: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    linears: tuple[Linear, ...]
    layer_rest: int
    rest: int
    positions: int  # max_position_embeddings
    tied: bool
    head_bias: bool = False
    known: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies two branches (SwiGLU, GeGLU)."""
        return any(linear.name in ("gate_proj", "gate_up_proj") for linear in self.linears)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head that are not the embedding's."""
        return (0 if self.tied else self.embedding) + (self.vocabulary if self.head_bias else 0)

    @property
    def linear_parameters(self) -> int:
        """Of all layers: what quantisation packs."""
        return self.layers * sum(linear.inputs * linear.outputs for linear in self.linears)

    @property
    def parameters(self) -> int:
        layer = sum(linear.parameters for linear in self.linears) + self.layer_rest
        return self.embedding + self.head + self.layers * layer + self.rest

    @property
    def peft_targets(self) -> str:
        """What PEFT takes when nobody names modules (peft/utils/constants.py): as a rule queries and values."""
        names = [linear.name for linear in self.linears]
        usual = {"phi": ("q_proj", "v_proj", "fc1", "fc2")}.get(self.kind, ("q_proj", "v_proj"))
        found = [name for name in usual if name in names] or names[:1]
        return ",".join(found)

    def targets(self, wanted: str) -> tuple[Linear, ...]:
        """The linear layers that ``target_modules`` names: leaf names, all-linear, or a regular expression on paths."""
        if wanted in ("", "all-linear"):
            return self.linears
        names = {name.strip().rsplit(".", 1)[-1] for name in wanted.split(",")}
        found = tuple(linear for linear in self.linears if linear.name in names)
        if found:
            return found
        try:
            pattern = re.compile(wanted)
        except re.error:
            return ()
        return tuple(linear for linear in self.linears if any(pattern.fullmatch(path) for path in _paths(linear.name)))


def _paths(leaf: str) -> tuple[str, ...]:
    return tuple(f"{stem}.0.{part}.{leaf}" for stem in ("model.layers", "layers") for part in ("self_attn", "mlp"))


def model_folder(name: str, tried: Path | None) -> Path | None:
    """The folder with ``config.json`` for ``--model_name_or_path``: the one found, or the hub's local cache; else None."""
    if tried is not None and (tried / "config.json").is_file():
        return tried
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    hub = Path.home() / ".cache/huggingface/hub" / f"models--{name.replace('/', '--')}" / "snapshots"
    return next((config.parent for config in sorted(hub.glob("*/config.json"))), None)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder. Raises Refused when it is not there or not a JSON object."""
    path = folder / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise Refused(f"{path} is not JSON ({error})") from error
    if not isinstance(written, dict):
        raise Refused(f"{path} is not a JSON object")
    return written


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a configuration (``text_config`` where a multimodal one has it), defaults filled in."""
    inner = config.get("text_config") or config.get("llm_config")
    if not isinstance(inner, dict):
        return {**language_defaults(_kind(config)), **config}
    return {**config, **language_defaults(_kind({**config, **inner})), **inner}


def _kind(written: Mapping[str, Any]) -> str:
    """``model_type`` without what says that it is a part, or whose family the whole is."""
    return re.sub(r"^(mgm|llava|minigemini)_|_text$", "", str(written.get("model_type", "")))


def read_language(config: Mapping[str, Any]) -> Language:
    """The decoder that a ``config.json`` describes. Raises Refused when not even its sizes are there."""
    written = text_config(config)
    kind = _kind(written)
    try:
        language = _OTHERS[kind](written) if kind in _OTHERS else _llama_like(kind, written)
    except KeyError as error:
        raise Refused(f"config.json of a {kind or 'nameless'} model has no {error.args[0]}") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise Refused(f"config.json of a {kind or 'nameless'} model has a size that cannot be ({error})") from error
    if min(language.vocabulary, language.hidden, language.layers, language.heads, language.kv_heads) < 1:
        raise Refused(f"config.json of a {kind or 'nameless'} model has a size below 1")
    return language


# Norms of a layer in units of hidden_size, biases of q/k/v and of the others, per-head norms, whether the head is tied
# when the configuration does not say: transformers' configuration_*.py and modeling_*.py of each.
_LLAMA_LIKE: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "gemma": {"tied": True, "head_dim": 256},
    "gemma2": {"tied": True, "head_dim": 256, "norms": 4},
    "gemma3": {"tied": True, "head_dim": 256, "norms": 4, "head_norms": True},
    "qwen2": {"qkv_bias": True},
    "qwen2_vl": {"qkv_bias": True},
    "qwen2_5_vl": {"qkv_bias": True},
    "qwen3": {"head_dim": 128, "head_norms": True},
    "qwen3_vl": {"head_dim": 128, "head_norms": True},
    "phi3": {"fused": True},
}


def _llama_like(kind: str, written: Mapping[str, Any]) -> Language:
    habits = _LLAMA_LIKE.get(kind, {})
    hidden, heads = int(written["hidden_size"]), int(written.get("num_attention_heads") or 32)
    kv_heads = int(written.get("num_key_value_heads") or heads)
    head_dim = int(written.get("head_dim") or habits.get("head_dim") or hidden // heads)
    intermediate = int(written.get("intermediate_size") or 4 * hidden)
    bias = bool(written.get("attention_bias"))
    qkv_bias = bias or bool(habits.get("qkv_bias"))
    mlp_bias = bool(written.get("mlp_bias"))
    q, kv = heads * head_dim, kv_heads * head_dim
    output = Linear("o_proj", q, hidden, bias and "qkv_bias" not in habits)
    down = Linear("down_proj", intermediate, hidden, mlp_bias)
    linears: tuple[Linear, ...]
    if habits.get("fused"):
        linears = (Linear("qkv_proj", hidden, q + 2 * kv), output, Linear("gate_up_proj", hidden, 2 * intermediate), down)
    else:
        linears = (
            *(Linear(name, hidden, width, qkv_bias) for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv))),
            output,
            *(Linear(name, hidden, intermediate, mlp_bias) for name in ("gate_proj", "up_proj")),
            down,
        )
    experts = int(written.get("num_local_experts") or written.get("num_experts") or 1)
    notes = [] if kind in _LLAMA_LIKE else [f"a {kind or 'nameless'} model is not known; it was counted as a Llama"]
    extra = 0
    if experts > 1:
        notes.append(f"its {experts} experts were counted as {experts} MLPs of a Llama")
        extra = (experts - 1) * sum(linear.parameters for linear in linears if linear.name.endswith(_MLP))
    return Language(
        kind=kind, vocabulary=int(written["vocab_size"]), hidden=hidden, intermediate=intermediate,
        layers=int(written["num_hidden_layers"]), heads=heads, kv_heads=kv_heads, head_dim=head_dim, linears=linears,
        layer_rest=int(habits.get("norms", 2)) * hidden + (2 * head_dim if habits.get("head_norms") else 0) + extra,
        rest=hidden, positions=int(written.get("max_position_embeddings") or 2048),
        tied=bool(_given(written, "tie_word_embeddings", habits.get("tied", False))),
        known=kind in _LLAMA_LIKE and experts == 1, notes=tuple(notes),
    )  # fmt: skip


_MLP = ("gate_proj", "up_proj", "down_proj")


def _given(written: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    value = written.get(name)
    return otherwise if value is None else value


def _phi(written: Mapping[str, Any]) -> Language:
    """Phi-1, 1.5 and 2: biases everywhere, one LayerNorm a layer, a head with a bias."""
    hidden, heads = int(written["hidden_size"]), int(written["num_attention_heads"])
    kv_heads = int(written.get("num_key_value_heads") or heads)
    kv, inner = kv_heads * (hidden // heads), int(written["intermediate_size"])
    linears = (
        Linear("q_proj", hidden, hidden, True), Linear("k_proj", hidden, kv, True), Linear("v_proj", hidden, kv, True),
        Linear("dense", hidden, hidden, True), Linear("fc1", hidden, inner, True), Linear("fc2", inner, hidden, True),
    )  # fmt: skip
    return _layer_norm_model("phi", written, hidden, heads, kv_heads, inner, int(written["num_hidden_layers"]), linears,
                             norms=1, tied=False, head_bias=True)  # fmt: skip


def _gpt2(written: Mapping[str, Any]) -> Language:
    hidden, heads = int(written["n_embd"]), int(written["n_head"])
    inner = int(written.get("n_inner") or 4 * hidden)
    linears = (
        Linear("c_attn", hidden, 3 * hidden, True), Linear("c_proj", hidden, hidden, True),
        Linear("c_fc", hidden, inner, True), Linear("c_proj", inner, hidden, True),
    )  # fmt: skip
    return _layer_norm_model("gpt2", written, hidden, heads, heads, inner, int(written["n_layer"]), linears, norms=2,
                             tied=True, extra=int(written["n_positions"]) * hidden)  # fmt: skip


def _gpt_neox(written: Mapping[str, Any]) -> Language:
    hidden, heads = int(written["hidden_size"]), int(written["num_attention_heads"])
    inner, bias = int(written["intermediate_size"]), bool(_given(written, "attention_bias", True))
    linears = (
        Linear("query_key_value", hidden, 3 * hidden, bias), Linear("dense", hidden, hidden, bias),
        Linear("dense_h_to_4h", hidden, inner, True), Linear("dense_4h_to_h", inner, hidden, True),
    )  # fmt: skip
    return _layer_norm_model("gpt_neox", written, hidden, heads, heads, inner, int(written["num_hidden_layers"]),
                             linears, norms=2, tied=False)  # fmt: skip


def _layer_norm_model(
    kind: str,
    written: Mapping[str, Any],
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    layers: int,
    linears: tuple[Linear, ...],
    *,
    norms: int,
    tied: bool,
    head_bias: bool = False,
    extra: int = 0,
) -> Language:
    return Language(
        kind=kind, vocabulary=int(written["vocab_size"]), hidden=hidden, intermediate=intermediate, layers=layers,
        heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, linears=linears, layer_rest=2 * norms * hidden,
        rest=2 * hidden + extra, positions=int(_given(written, "max_position_embeddings", 2048)),
        tied=bool(_given(written, "tie_word_embeddings", tied)), head_bias=head_bias,
    )  # fmt: skip


_OTHERS = {"phi": _phi, "gpt2": _gpt2, "gpt_neox": _gpt_neox}


def language_in(model: Path) -> Language:
    """The decoder in a model's folder; one of the size that the name says (``vicuna-7b``) where there is no folder.

    Raises Refused when neither tells.
    """
    if (model / "config.json").is_file():
        return read_language(read_config(model))
    return _guessed(str(model))


def _guessed(name: str) -> Language:
    """A Llama of the size in a model's name: 12 · layers · hidden² parameters, 128 · layers = hidden."""
    sizes = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)[bB](?![a-zA-Z])", Path(name).name)
    if not sizes:
        raise Refused(f"{name} has no config.json, and its name does not say how large the model is; download it first")
    billions = float(sizes[0])
    layers = max(round((billions * 1e9 / 12 * 128) ** (1 / 3) / 128), 1)
    hidden = 64 * max(round((billions * 1e9 / 12 / layers) ** 0.5 / 64), 1)
    vocabulary = next((size for kind, size in _VOCABULARIES.items() if kind in name.lower()), 32_000)
    written = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": max(hidden // 128, 1), "intermediate_size": round(8 / 3 * hidden),
    }  # fmt: skip
    said = f"{name} has no config.json; it was counted as a Llama of the {sizes[0]} billion parameters in its name"
    return replace(_llama_like("llama", written), known=False, notes=(said,))


_VOCABULARIES = {"gemma": 256_000, "qwen": 152_064, "llama-3": 128_256, "llama3": 128_256}
