"""The small files of a merged model: config.json, tokenizer, generation settings; what upstream's loader wants."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lorapatch.adapter.base_model import BaseModel
from lorapatch.adapter.bridge import is_multimodal, read_config
from lorapatch.adapter.merge_plan import Plan
from lorapatch.errors import Refused

__all__ = ["copy_files", "loader_warnings", "merged_config"]

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "spiece.model",
    "chat_template*",
)  # fmt: skip
_OTHERS = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "*.py")
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def merged_config(directory: Path, base: BaseModel, plan: Plan) -> dict[str, Any]:
    """``config.json`` of the merged model: the run's own where it left one (with its ``mm_*`` fields), else the base's.

    A quantisation that the run loaded the base with is left out: the merged weights are plain.
    """
    config = read_config(directory) or dict(base.config)
    bridged = any("vlm_uni" in entry.name or "mm_projector" in entry.name for entry in plan.entries)
    if bridged and not is_multimodal(config):
        raise Refused(
            f"{directory} has no config.json with model_type and mm_* fields: copy the one of the run's output or of a "
            "checkpoint into it"
        )
    config.pop("quantization_config", None)
    config.pop("_name_or_path", None)
    config["torch_dtype"] = _TYPES[plan.dtype]  # transformers 4's word, which 5 reads too
    if "dtype" in config:
        config["dtype"] = _TYPES[plan.dtype]
    if plan.untied:
        config["tie_word_embeddings"] = False
    rows = {entry.name: entry.source.shape[0] for entry in plan.entries if entry.source.shape}
    embedding = base.embedding()
    if embedding is not None and rows[embedding] != base.weights[embedding].shape[0] and "vocab_size" in config:
        config["vocab_size"] = rows[embedding]
    return config


def copy_files(directory: Path, base: BaseModel, target: Path, config: Mapping[str, Any]) -> None:
    """Write ``config`` and copy the tokenizer and the other small files of a model.

    The tokenizer is the base's while the run's has the same tokens: a run under newer libraries writes files that the
    evaluation's older ones cannot read (tokenizers 0.20 changed the form of merges). A tokenizer that changed is the run's.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")
    own = any((directory / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model"))
    changed = own and _tokens(directory) != _tokens(base.directory)
    _copy(directory if changed else base.directory, target, _TOKENIZER)
    _copy(base.directory, target, _OTHERS)
    _copy(directory, target, ("generation_config.json",))


def _tokens(directory: Path) -> dict[str, int] | str:
    """Token to id, added ones included, by ``tokenizer.json``; where it cannot be read, something equal to no other."""
    try:
        written = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
        return {**written["model"]["vocab"], **{token["content"]: token["id"] for token in written["added_tokens"]}}
    except (OSError, ValueError, LookupError, TypeError):
        return str(directory)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns):
            shutil.copyfile(path, target / path.name)


def loader_warnings(output: Path, config: Mapping[str, Any]) -> list[str]:
    """What upstream's MGM loader will trip over: it goes by the folder's name, and it wants the towers' folders."""
    kind = str(config.get("model_type"))
    if not kind.startswith("mgm"):
        return []
    warnings = []
    wanted = ["mgm", *(["2b"] if kind == "mgm_gemma" else ["8x7b"] if kind == "mgm_mixtral" else [])]
    missing = [word for word in wanted if word not in output.name.lower()]
    if missing:
        words = " and ".join(f'"{word}"' for word in missing)
        warnings.append(f"upstream's loader looks for {words} in the name of the folder, and {output.name} lacks it")
    for name in ("mm_vision_tower", "mm_vision_tower_aux"):
        tower = config.get(name)
        if tower and not os.path.isdir(str(tower)):
            warnings.append(f"config.json: {name} {tower} is no folder here, and the loader takes the tower from there")
    return warnings
