"""The options of TRL's ModelConfig, for machines where TRL itself is not there to be read."""

from __future__ import annotations

from lorapatch.lora.support.option import Kind, Option
from lorapatch.lora.support.source import Place

__all__ = ["trl_options"]

# As in trl/trainer/model_config.py of TRL 0.9 and later; what single releases add beside these is left out.
_MODEL_CONFIG: dict[str, Kind] = {
    "model_name_or_path": "str",
    "model_revision": "str",
    "attn_implementation": "str",
    "use_peft": "bool",
    "lora_r": "int",
    "lora_alpha": "int",
    "lora_dropout": "float",
    "lora_target_modules": "list",
    "lora_modules_to_save": "list",
    "lora_task_type": "str",
    "use_rslora": "bool",
    "use_dora": "bool",
    "load_in_8bit": "bool",
    "load_in_4bit": "bool",
    "bnb_4bit_quant_type": "str",
    "use_bnb_nested_quant": "bool",
}


def trl_options(name: str, place: Place) -> dict[str, Option] | None:
    """The options of a class of TRL by its dotted name, placed where the trainer names it; None if not known here."""
    top, _, _ = name.partition(".")
    if top != "trl" or name.rpartition(".")[2] != "ModelConfig":
        return None
    return {
        field: Option((f"--{field}", f"--{field.replace('_', '-')}"), field, kind, place, "ModelConfig", library=name)
        for field, kind in _MODEL_CONFIG.items()
    }
