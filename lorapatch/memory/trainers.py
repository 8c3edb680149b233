"""Which trainer a launch runs, as far as its memory goes, and what that trainer does where no flag says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapatch.lora.lint.facts import LaunchFacts

__all__ = ["TRAINERS", "Habits", "family_of", "habits_of", "trainer_of"]

TRAINERS = ("embedded", "upstream", "transformers")
_READ_B = 200_000  # of a trainer's source
_HEAD_B = 2000


@dataclass(frozen=True)
class Habits:
    """What a trainer's run has when no flag says otherwise; ``attention`` and ``optimizer`` in transformers' names."""

    r: int
    alpha: int
    dropout: float
    model_max_length: int
    attention: str
    optimizer: str
    use_reentrant: bool
    image_size_aux: int = 320


def trainer_of(facts: LaunchFacts) -> tuple[str, str | None]:
    """Embedded, upstream or transformers, and what was assumed to say so (None: the trainer itself told).

    lorapatch's own is told by what the file imports; MGM's, and with it LLaVA's family, by its flags and files: both
    keep logits of every position.
    """
    name = str(facts.launch.trainer.word)
    source = source_of(facts.trainer_path, _HEAD_B)
    if name.startswith("lorapatch.trainer") or name.endswith("lorapatch/trainer/train.py"):
        return "embedded", None
    if "lorapatch.trainer" in source:
        return "embedded", None
    parts = Path(name.replace(".", "/") if facts.launch.trainer.module else name).parts
    family = next((part for part in ("mgm", "minigemini", "llava") if part in parts), None)
    if facts.flag("vision_tower_aux") or facts.flag("tune_mm_mlp_adapter") or (family and facts.flag("vision_tower")):
        if facts.trainer_path is None:
            return "upstream", f"{facts.launch.trainer.name} was not found; taken for MGM's own by its name and flags"
        return "upstream", None
    if facts.flag("vision_tower") and facts.flag("mm_projector_type"):
        return "upstream", "a trainer of LLaVA's family by its flags, modelled as MGM's without the second tower"
    return "transformers", None


def source_of(path: Path | None, most: int = _READ_B) -> str:
    """The beginning of a trainer's source; empty where there is none."""
    if path is None:
        return ""
    try:
        with path.open("rb") as file:
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def family_of(trainer: str, facts: LaunchFacts, config: Mapping[str, Any]) -> str:
    """mgm, image_text or causal_lm."""
    if trainer in ("embedded", "upstream") or facts.flag("vision_tower", "vision_tower_aux"):
        return "mgm"
    if str(config.get("model_type", "")).startswith(("mgm_", "llava_")) and config.get("mm_vision_tower"):
        return "mgm"
    return "image_text" if isinstance(config.get("vision_config"), dict) else "causal_lm"


def habits_of(trainer: str, facts: LaunchFacts, versions: Mapping[str, str]) -> Habits:
    """The defaults of lorapatch.trainer.arguments, of MGM's train.py, or of transformers and peft as installed."""
    if trainer == "embedded":
        return Habits(64, 16, 0.05, 512, "sdpa", "adamw_torch", True)
    if trainer == "upstream":
        # train_mem.py asks for flash attention (old ones patch it in), train.py for nothing: then it is sdpa.
        flash = str(facts.launch.trainer.word).rsplit("/", 1)[-1] == "train_mem.py"
        if facts.trainer_path is not None:
            flash = "flash" in source_of(facts.trainer_path, _HEAD_B)
        return Habits(64, 16, 0.05, 512, "flash_attention_2" if flash else "sdpa", "adamw_torch", True)
    five, torch = _version(versions, "transformers") >= (5, 0), _version(versions, "torch")
    fused = five and torch >= (2, 8)
    return Habits(8, 8, 0.0, 2048, "sdpa", "adamw_torch_fused" if fused else "adamw_torch", not five)


def _version(versions: Mapping[str, str], name: str) -> tuple[int, int]:
    """Major and minor; the newest where nothing is installed."""
    parts = versions.get(name, "99.0").split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return 99, 0
