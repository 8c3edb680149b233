"""Models and adapters small enough for seconds: three families with PEFT's adapters, trained by chance."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

FAMILIES = ("gemma", "llama", "qwen2")
_SIZE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def make_base(folder: Path, family: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    """A model of ``family`` with random weights, in ``folder``. Qwen2 has biases, Gemma tied embeddings."""
    import transformers

    name = {"gemma": "Gemma", "llama": "Llama", "qwen2": "Qwen2"}[family]
    extra = {"head_dim": 8} if family == "gemma" else {}
    config = getattr(transformers, f"{name}Config")(**{**_SIZE, **extra, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    if family == "qwen2":
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def load_base(folder: Path) -> Any:
    """The model in ``folder`` with the types it has on the disk."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def make_adapter(folder: Path, base: Path, seed: int = 1, **options: Any) -> Path:
    """An adapter for ``base`` as PEFT makes and saves it, its trained values drawn by chance."""
    from peft import LoraConfig, get_peft_model

    settings = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM",
    } | options  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_base(base), LoraConfig(**settings))
        shake(model, seed)
        model.save_pretrained(str(folder))
    return folder


def shake(model: Any, seed: int = 1) -> None:
    """Change everything trainable a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data = (parameter.data.float() + noise).to(parameter.dtype)


def make_partly_trained(folder: Path, base: Path) -> Any:
    """A model with LoRA of which norms, biases and the embedding were trained, too, saved to ``folder``; the live one."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_base(base), config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed_tokens" in name or name.endswith(".bias"):
            parameter.requires_grad_(True)
    shake(model)
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.save_pretrained(str(folder))
    model.config.save_pretrained(str(folder))
    others = {name: tensor for name, tensor in trained.items() if ".lora_" not in name}
    torch.save(others, folder / "non_lora_trainables.bin")
    return model


def merged_by_peft(base: Path, adapter: Path) -> dict[str, Any]:
    """The state that PEFT's ``merge_and_unload`` gives, by name; tied tensors under both names."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load_base(base), str(adapter)).merge_and_unload()
    return dict(model.state_dict())


def edit_config(folder: Path, **changes: Any) -> Path:
    """Set fields of ``adapter_config.json``; None takes a field out."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def tensors_of(folder: Path) -> dict[str, Any]:
    """All tensors of a model's or an adapter's safetensors files."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def rewrite(folder: Path, tensors: dict[str, Any], binary: bool = False) -> Path:
    """Give an adapter other tensors."""
    from safetensors.torch import save_file

    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (folder / name).unlink(missing_ok=True)
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def make_mgm(folder: Path) -> tuple[Any, Path]:
    """A zoo of the trainer's tests, and an adapter of its MGM model, saved as the trainer saves it."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from lorapatch.trainer.lora import add_lora
    from lorapatch.trainer.model import load_model, mgm_config
    from lorapatch.trainer.saving import RunKind, save

    zoo = trainer_zoo().make_zoo(folder)
    fields = {
        "mm_vision_tower": str(zoo.clip), "mm_vision_tower_aux": str(zoo.aux), "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2, "image_size_aux": 64, "image_aspect_ratio": "pad", "mgm_version": "gemma",
    }  # fmt: skip
    args = SimpleNamespace(
        lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_bias="none", lora_target_modules="q_proj,v_proj,down_proj",
        lora_variant="lora",
    )  # fmt: skip
    model = add_lora(load_model(mgm_config(zoo.language, **fields)), args)
    shake(model)
    modules = args.lora_target_modules.split(",")
    output = folder / "MGM-2B-Finetune-test"
    save(model, AutoTokenizer.from_pretrained(zoo.language), RunKind.of("lora", args, modules), output, writer=True)
    return zoo, output


def trainer_zoo() -> Any:
    """The module with the tiny zoo of the trainer's tests."""
    import importlib.util
    import sys

    path = Path(__file__).parents[1] / "trainer" / "zoo.py"
    spec = importlib.util.spec_from_file_location("trainer_zoo", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["trainer_zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
