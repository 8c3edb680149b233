"""The base model of an adapter on the disk: where it is, its configuration, its weights, the shapes of its modules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorapatch.adapter.settings import Settings, read_json
from lorapatch.adapter.tensors import Tensor, read_tensors
from lorapatch.errors import Refused

__all__ = ["BaseModel", "find_base", "shapes_by_config"]

# In the order in which transformers looks.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")
_KNOWN = ("gemma", "llama", "mistral", "qwen2", "qwen3")  # families with these names for their linear layers


@dataclass(frozen=True)
class BaseModel:
    """A folder with ``config.json`` and weights, safetensors or .bin, sharded or not."""

    directory: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``. Raises Refused."""
        return read_json(self.directory / "config.json")

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """All tensors by name, in the order of their files; nothing but the files' indexes is read. Raises Refused."""
        found: dict[str, Tensor] = {}
        for file in self._files():
            if not file.is_file():
                raise Refused(f"{file} is missing, and the index of {self.directory} names it: copy the model again")
            if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
                raise Refused(f"{file} is a pointer of git-lfs, not the weights: run git lfs pull in {self.directory}")
            found.update(read_tensors(file))
        return found

    def _files(self) -> list[Path]:
        for name in (_SINGLE[0], _INDEXES[0], _SINGLE[1], _INDEXES[1]):
            path = self.directory / name
            if path.is_file() and name in _SINGLE:
                return [path]
            if path.is_file():
                weight_map = read_json(path).get("weight_map")
                if not isinstance(weight_map, dict) or not weight_map:
                    raise Refused(f"{path} has no weight_map: copy the model again")
                return [self.directory / file for file in dict.fromkeys(sorted(map(str, weight_map.values())))]
        raise Refused(f"{self.directory} holds no weights ({', '.join((*_SINGLE, *_INDEXES))})")

    @property
    def has_weights(self) -> bool:
        """Whether there are weights that can be read."""
        with contextlib.suppress(Refused):
            return bool(self.weights)
        return False

    @property
    def tied(self) -> bool:
        """Whether input and output embeddings are one tensor."""
        default = str(self.config.get("model_type", "")).removeprefix("mgm_").startswith("gemma")
        return bool(self.config.get("tie_word_embeddings", default)) or not self._has_head()

    def _has_head(self) -> bool:
        return any(name.rsplit(".", 2)[-2] in ("lm_head", "embed_out") for name in self.weights if "." in name)

    def embedding(self) -> str | None:
        """The name of the input embedding's tensor."""
        names = (name for name in self.weights if name.endswith(tuple(f"{part}.weight" for part in _EMBEDDINGS)))
        return min(names, key=len, default=None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The weight's shape of every module that has one of two dimensions or more, from the weights."""
        return {
            name.removesuffix(".weight"): tensor.shape
            for name, tensor in self.weights.items()
            if name.endswith(".weight") and len(tensor.shape) > 1
        }


def find_base(settings: Settings, base: Path | None) -> BaseModel:
    """The base model: ``base``, or the one that the adapter names (a folder, or a model in Hugging Face's cache).

    Raises Refused when it is not here.
    """
    named = settings.raw.get("base_model_name_or_path")
    if base is not None:
        folder = base
    elif not named:
        raise Refused("the adapter does not name its base model: give it with --base")
    else:
        folder = Path(str(named)) if Path(str(named)).is_dir() else _cached(str(named))
    if not (folder / "config.json").is_file():
        raise Refused(f"{folder} is no model folder: it has no config.json")
    return BaseModel(folder)


def _cached(name: str) -> Path:
    """The folder of a model of the hub, if it was downloaded earlier; nothing is downloaded."""
    with contextlib.suppress(Exception):  # no huggingface_hub, no such model, a path that is no name
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    raise Refused(f"the adapter's base model {name} is not here: give it with --base")


def shapes_by_config(config: Mapping[str, Any]) -> dict[str, tuple[int, int]] | None:
    """[out, in] of every linear layer and embedding that ``config.json`` describes; None for an unknown family."""
    family = str(config.get("model_type")).removeprefix("mgm_")
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads, layers, vocabulary = (
            int(config[name]) for name in ("num_attention_heads", "num_hidden_layers", "vocab_size")
        )
        size = int(config.get("head_dim") or (256 if family == "gemma" else hidden // heads))
        shared = int(config.get("num_key_value_heads") or heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    if not family.startswith(_KNOWN):
        return None
    one = {
        "self_attn.q_proj": (heads * size, hidden), "self_attn.k_proj": (shared * size, hidden),
        "self_attn.v_proj": (shared * size, hidden), "self_attn.o_proj": (hidden, heads * size),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    found = {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}
    return {"model.embed_tokens": (vocabulary, hidden), **found, "lm_head": (vocabulary, hidden)}
