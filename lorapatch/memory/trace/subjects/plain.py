"""Models of transformers under its own Trainer: any causal language model, any image-text one."""

# mypy: allow-untyped-calls
from __future__ import annotations

import functools
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from lorapatch.errors import Refused
from lorapatch.memory.model import RunSetup
from lorapatch.memory.trace import quantised
from lorapatch.memory.trace.fake import made_on_meta
from lorapatch.memory.trace.subjects.subject import DTYPES, Subject

__all__ = ["build", "cast", "count", "linear_names", "read_config", "version_of", "wrapped"]


def build(setup: RunSetup) -> Subject:
    """The model of ``setup.model``'s configuration, wrapped in LoRA by PEFT; raises Refused."""
    config = read_config(setup)
    model = wrapped("AutoModelForCausalLM", config, setup)
    model.train()
    total, trainable, lora = count(model)
    return Subject(
        model=model,
        make_batch=lambda length: _batch(setup, length),
        forward=_forward,
        vocabulary=int(config.get_text_config().vocab_size if hasattr(config, "get_text_config") else config.vocab_size),
        total=total,
        trainable=trainable,
        lora=lora,
        batches_at_once=version_of("transformers") >= (4, 46),
        assumed=[f"the weights are loaded in {setup.dtype}"],
    )


def wrapped(auto: str, config: Any, setup: RunSetup, skip: tuple[str, ...] = ("lm_head",)) -> Any:
    """The model of ``config`` by the auto class ``auto``: packed and with LoRA (nothing whose path has a name in ``skip``),
    checkpointing on, in the types that the run keeps it in.
    """
    with made_on_meta(DTYPES[setup.dtype]):
        model = from_config(auto, config, setup)
        quantised.replace(model, setup, skip=skip)
        quantised.prepare(model, setup)
        if setup.gradient_checkpointing:
            model.enable_input_require_grads()
    if setup.method == "lora":
        with made_on_meta(torch.float32):  # what a trainer adds has torch's own dtype
            model = add_lora(model, setup, keep_dtype=setup.zero is not None, skip=skip)
    if setup.zero is not None:
        cast(model, DTYPES[setup.dtype])
    checkpoint(model, setup)
    return model


def version_of(name: str) -> tuple[int, int]:
    """Major and minor version of an installed package."""
    import importlib.metadata

    numbers = re.findall(r"\d+", importlib.metadata.version(name))
    return int(numbers[0]), int(numbers[1])


def read_config(setup: RunSetup) -> Any:
    """``config.json`` as transformers reads it; raises Refused where it is missing, damaged or of an unknown kind."""
    from transformers import AutoConfig

    if not (setup.model / "config.json").is_file():
        raise Refused(f"{setup.model} has no config.json: the model's shape is not known")
    try:
        return AutoConfig.from_pretrained(str(setup.model))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"{setup.model}/config.json: this transformers cannot make a model of it ({reason})") from error


def from_config(auto: str, config: Any, setup: RunSetup) -> Any:
    """A model with random weights by the auto class ``auto``; call it inside :func:`made_on_meta`."""
    import transformers

    name = "dtype" if version_of("transformers") >= (4, 56) else "torch_dtype"
    flash = setup.attention.startswith("flash")
    if flash and version_of("transformers") < (4, 48):  # sdpa's kernel is flash's; an old torch counts as able
        modeling: Any = transformers.modeling_utils
        modeling.is_torch_sdpa_available = lambda: True
    make = functools.partial(getattr(transformers, auto).from_config, config, **{name: DTYPES[setup.dtype]})
    try:
        try:
            model = make(attn_implementation="eager" if setup.attention == "eager" else "sdpa")
        except (ImportError, ValueError) as error:  # a torch or a model without it: transformers falls back, too
            if "scaled_dot_product_attention" not in str(error) and "SDPA" not in str(error):
                raise
            model = make(attn_implementation="eager")
    except ValueError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Refused(f"{setup.model}/config.json: this transformers cannot make a model of it ({reason})") from error
    if flash and version_of("transformers") < (4, 48):
        model.config._attn_implementation = "flash_attention_2"  # what the mask is decided by; layers are made already
    model.tie_weights()
    model.config.use_cache = False
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """DeepSpeed's cast of every parameter that is not packed."""
    for p in model.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)


def checkpoint(model: Any, setup: RunSetup) -> None:
    """Turn gradient checkpointing on as the Trainer does."""
    if not setup.gradient_checkpointing:
        return
    if "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": setup.use_reentrant})
    else:
        model.gradient_checkpointing_enable()


def linear_names(model: nn.Module, skip: tuple[str, ...] = ("lm_head",)) -> list[str]:
    """What "all-linear" means: leaf names if they say it all, else full paths; none whose path has a name in ``skip``."""
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [path for path in paths if not any(part in path for part in skip)]
    leaves = {path.rsplit(".", 1)[-1] for path in chosen}
    told_apart = len(chosen) == sum(path.rsplit(".", 1)[-1] in leaves for path in paths)
    return sorted(leaves) if told_apart else chosen


def add_lora(model: Any, setup: RunSetup, *, keep_dtype: bool, skip: tuple[str, ...]) -> Any:
    """``model`` as a PeftModel; ``keep_dtype``: the adapter is not made float32 (DeepSpeed casts it back anyway)."""
    from peft import LoraConfig, get_peft_model

    assert setup.lora is not None
    lora = setup.lora
    wanted: Any = lora.target_modules
    if wanted == "all-linear":
        wanted = linear_names(model, skip)
    elif re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", wanted):
        wanted = [name.strip() for name in wanted.split(",")]
    options: dict[str, Any] = {"use_rslora": True} if lora.variant == "rslora" else {}
    if lora.variant == "dora":
        options["use_dora"] = True
    make: Any = LoraConfig
    config = make(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, bias=lora.bias, target_modules=wanted,
        task_type="CAUSAL_LM", **options,
    )  # fmt: skip
    extra = {"autocast_adapter_dtype": False} if keep_dtype else {}
    if "autocast_adapter_dtype" not in inspect.signature(get_peft_model).parameters:
        extra = {}
    try:
        wrap: Any = get_peft_model
        return wrap(model, config, **extra)
    except ValueError as error:
        raise Refused(f"LoRA does not fit {setup.model}: {str(error).splitlines()[0]}") from error


def count(model: nn.Module) -> tuple[int, int, int]:
    """Parameters in all, those that learn, those of LoRA; tied ones count once, packed ones as what they stand for."""
    named = dict(model.named_parameters())
    sizes = {name: int(getattr(p, "whole", p.numel())) for name, p in named.items()}
    return (
        sum(sizes.values()),
        sum(sizes[name] for name, p in named.items() if p.requires_grad),
        sum(size for name, size in sizes.items() if "lora_" in name),
    )


def _batch(setup: RunSetup, length: int) -> dict[str, Tensor]:
    shape = (setup.micro_batch, length)
    return {name: torch.empty(shape, dtype=torch.long) for name in ("input_ids", "labels", "attention_mask")}


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    if version_of("transformers") >= (4, 46):  # the loss is a sum over all labels of the step
        return model(**batch, num_items_in_batch=torch.ones((), dtype=torch.long))
    return model(**batch)
