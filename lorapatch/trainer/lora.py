"""LoRA on the language model's linear layers, and on nothing else."""

# mypy: allow-untyped-calls
from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.model import BRIDGE, MGMForCausalLM

__all__ = [
    "add_lora",
    "linear_layers",
    "plain_adapter",
    "quantization",
    "read_adapter",
    "restore_adapter",
    "target_modules",
    "touched_modules",
]

_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_layers(model: nn.Module) -> list[str]:
    """Full paths of the language model's linear layers (``model.layers.0.self_attn.q_proj``, …), head excluded."""
    return [
        name
        for name, module in model.named_modules()
        if name.startswith("model.layers.") and isinstance(module, nn.Linear)
    ]


def target_modules(model: nn.Module, wanted: str) -> list[str]:
    """What ``--lora_target_modules`` means for ``model``: leaf names if they say it all, else full paths.

    ``all-linear`` is every linear layer of the language model; ``a,b`` are names; anything else is a regular expression
    that has to match full paths. Raises TrainerError (exit code 2) when a name or the expression matches nothing.
    """
    layers = linear_layers(model)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if wanted == "all-linear":
        chosen = layers
    elif all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names) and names:
        for name in names:
            if not any(f".{path}".endswith(f".{name}") for path in layers):
                raise TrainerError(
                    f"--lora_target_modules: no linear layer of the language model is called {name}; "
                    f"there are {', '.join(_leaves(layers))}",
                    exit_code=2,
                )
        chosen = [path for path in layers if any(f".{path}".endswith(f".{name}") for name in names)]
    else:
        chosen = _matching(layers, wanted)
    leaves = _leaves(chosen)
    return leaves if len(chosen) == sum(path.rsplit(".", 1)[-1] in leaves for path in layers) else chosen


def _matching(layers: list[str], wanted: str) -> list[str]:
    try:
        chosen = [path for path in layers if re.fullmatch(wanted, path)]
    except re.error as error:
        raise TrainerError(f"--lora_target_modules {wanted!r} is no regular expression ({error})", 2) from error
    if not chosen:
        raise TrainerError(
            f"--lora_target_modules {wanted!r} matches none of the {len(layers)} linear layers, {layers[0]} for one", 2
        )
    return chosen


def _leaves(paths: list[str]) -> list[str]:
    found = {path.rsplit(".", 1)[-1] for path in paths}
    return [name for name in _ORDER if name in found] + sorted(found - set(_ORDER))


def touched_modules(model: nn.Module) -> list[str]:
    """Leaf names of the layers that carry a LoRA pair in ``model`` (a PeftModel), in their usual order."""
    return _leaves([name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name])


def quantization(bits: int, *, dtype: torch.dtype, double: bool, kind: str) -> Any:
    """The BitsAndBytesConfig for ``bits`` 4 or 8, None for 16; raises TrainerError where bitsandbytes cannot run."""
    if bits == 16:
        return None
    try:
        import bitsandbytes  # type: ignore[import-not-found] # noqa: F401
    except Exception as error:  # a missing CUDA library raises RuntimeError or OSError
        raise TrainerError(
            f"--bits {bits} needs bitsandbytes, which cannot be imported here ({str(error).splitlines()[0]}): "
            "pip install bitsandbytes, or --bits 16"
        ) from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=[*(f"model.{name}" for name in BRIDGE), "lm_head"],
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_type=kind,
    )


def add_lora(model: MGMForCausalLM, args: Any) -> Any:
    """``model`` wrapped by PEFT as ``args`` (TrainingArguments) ask; the bridge stays trainable beside LoRA.

    PiSSA moves a part of each base weight into the adapter: those first values stay with the model
    (``initial_adapter``), so that :func:`plain_adapter` can write an adapter for the untouched base.
    """
    from peft import LoraConfig, get_peft_model

    first: Any = "pissa_niter_16" if args.lora_variant == "pissa" else True
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        target_modules=target_modules(model, args.lora_target_modules),
        task_type="CAUSAL_LM",
        use_rslora=args.lora_variant == "rslora",
        use_dora=args.lora_variant == "dora",
        init_lora_weights=first,
    )
    wrapped: Any = get_peft_model(cast(Any, model), config)
    if args.lora_variant == "pissa":
        wrapped.initial_adapter = {n: p.detach().cpu().clone() for n, p in _pairs(wrapped).items()}
    for name in BRIDGE:
        getattr(model.model, name, nn.Identity()).requires_grad_(True)
    return wrapped


def _pairs(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}


def plain_adapter(model: Any, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's configuration and tensors of ``model``'s adapter for the untouched base model.

    ``state`` has the adapter's parameters under ``model``'s names. PiSSA's difference to the base, s (BA - B₀A₀), is an
    adapter of twice the rank.
    """
    import copy

    from peft import get_peft_model_state_dict

    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = model.get_base_model().config.name_or_path
    state = dict(state)
    if initial := getattr(model, "initial_adapter", None):
        for name, first in initial.items():
            first = first.to(state[name].dtype)
            is_a = ".lora_A." in name
            state[name] = torch.cat([state[name], first if is_a else -first], dim=0 if is_a else 1)
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return config, {name: tensor.contiguous() for name, tensor in tensors.items()}


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder (``adapter_model.safetensors``, or ``.bin`` as PEFT 0.4 wrote it)."""
    folder = Path(folder)
    try:
        if (folder / "adapter_model.safetensors").is_file():
            from safetensors.torch import load_file

            return load_file(folder / "adapter_model.safetensors")
        return dict(torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True))
    except OSError as error:
        raise TrainerError(f"{folder} holds no adapter (adapter_model.safetensors): {error.strerror}") from error
    except Exception as error:
        raise TrainerError(f"the adapter in {folder} is damaged ({type(error).__name__})") from error


def restore_adapter(model: Any, folder: str | Path) -> None:
    """Put the adapter of ``folder`` into ``model``; raises TrainerError unless every tensor finds its place.

    A PiSSA adapter brings its own first values: the base weights are split again by those.
    """
    from peft import set_peft_model_state_dict

    tensors = read_adapter(folder)
    initial = getattr(model, "initial_adapter", None)
    if initial is not None:
        tensors = _split_pissa(model, tensors, initial)
    try:
        result: Any = set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:
        raise TrainerError(f"the adapter in {folder} does not fit this run (rank, modules or model differ)") from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        odd = (missing or result.unexpected_keys)[0]
        raise TrainerError(f"the adapter in {folder} does not fit this run: {odd} is on one side only")


@torch.no_grad()
def _split_pissa(model: Any, tensors: dict[str, Tensor], initial: dict[str, Tensor]) -> dict[str, Tensor]:
    trained = {}
    modules = dict(model.named_modules())
    for name in list(initial):
        key = name.replace(".default.", ".")
        if key not in tensors or tensors[key].numel() != 2 * initial[name].numel():
            raise TrainerError(f"{key} in the checkpoint is not of twice PiSSA's rank: it is of another kind of run")
    for layer in {name.split(".lora_")[0] for name in initial}:
        a, b = f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"
        new_a, first_a = tensors[a.replace(".default.", ".")].chunk(2, dim=0)
        new_b, first_b = tensors[b.replace(".default.", ".")].chunk(2, dim=1)
        base, scale = modules[layer].base_layer.weight, modules[layer].scaling["default"]
        whole = base.float() + scale * (initial[b].to(base.device).float() @ initial[a].to(base.device).float())
        gone = -scale * (first_b.to(base.device).float() @ first_a.to(base.device).float())
        base.copy_(whole - gone)
        initial[a], initial[b] = first_a.float(), -first_b.float()
        trained[a.replace(".default.", ".")], trained[b.replace(".default.", ".")] = new_a, new_b
    return trained
