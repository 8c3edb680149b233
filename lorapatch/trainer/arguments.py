"""The flags: MGM's three groups over transformers' own, old names included, checked before anything is loaded."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, cast

import torch
import transformers
from transformers import HfArgumentParser
from transformers.utils.import_utils import is_torch_tf32_available

from lorapatch.trainer.errors import TrainerError

__all__ = ["DataArguments", "ModelArguments", "TrainingArguments", "parse"]


@dataclass
class ModelArguments:
    """Which language model, which towers, which bridge between them, and what is frozen."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder of the language model."})
    version: str | None = field(default=None, metadata={"help": "Conversation template; told by the model if absent."})
    freeze_backbone: bool = False
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Pre-training stage: the bridge alone learns."})
    vision_tower: str | None = field(default=None, metadata={"help": "CLIP folder."})
    vision_tower_aux: str | None = field(default=None, metadata={"help": "open_clip or Hugging Face ConvNeXt folder."})
    optimize_vision_tower: bool = False
    optimize_vision_tower_aux: bool = False
    drop_path: bool = field(default=True, metadata={"help": "Stochastic depth in the aux tower, as its folder says."})
    image_processor: str | None = None
    mm_vision_select_layer: int = -1
    pretrain_mm_mlp_adapter: str | None = field(default=None, metadata={"help": "mm_projector.bin of pre-training."})
    mm_projector_type: str = "linear"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = False
    mm_vision_select_feature: Literal["patch"] = "patch"


@dataclass
class DataArguments:
    """Where the samples are and how their images are cut."""

    data_path: str | None = field(default=None, metadata={"help": "JSON list of samples in LLaVA's format."})
    lazy_preprocess: bool = field(default=True, metadata={"help": "Accepted; samples are always read when needed."})
    is_multimodal: bool = True
    image_folder: str | None = None
    image_aspect_ratio: Literal["square", "pad"] = "square"
    image_grid_pinpoints: str | None = None
    image_size_aux: int = 320
    image_grid: int = 1
    image_global: bool = False
    max_bad_samples: float = field(
        default=0.01, metadata={"help": "Broken samples skipped before giving up: a share below 1, a number from 1 on."}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' arguments, MGM's, and three of our own (target modules, variant, profile)."""

    cache_dir: str | None = None
    optim: str = "adamw_torch"
    remove_unused_columns: bool = False
    # A NaN loss has to be seen, and looking for it at every micro-step makes the CPU wait for the GPU.
    logging_nan_inf_filter: bool = False
    freeze_mm_mlp_adapter: bool = False
    mpt_attn_impl: str | None = None
    attn_implementation: str = field(default="sdpa", metadata={"help": "Falls back to sdpa where it is missing."})
    model_max_length: int = 512
    bits: int = field(default=16, metadata={"help": "16, or 8 and 4 through bitsandbytes."})
    double_quant: bool = True
    quant_type: Literal["nf4", "fp4"] = "nf4"
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_weight_path: str = field(default="", metadata={"help": "Adapter folder to start from."})
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "Names with commas, all-linear, or a regular expression on full paths."}
    )
    lora_variant: Literal["lora", "rslora", "dora", "pissa"] = "lora"
    mm_projector_lr: float | None = None
    group_by_modality_length: bool = False
    group_by_length: bool = False
    lr_multi: str | None = field(default=None, metadata={"help": "name:factor, with commas: other learning rates."})
    profile_steps: int = field(default=0, metadata={"help": "Print a line of speed and memory every N steps."})


# What transformers 4 called otherwise.
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "warmup_ratio": "warmup_steps",
}
# What transformers 4 had and 5 does without; none of it changes the training.
_RETIRED = {
    "fp16_backend",
    "fp16_opt_level",
    "half_precision_backend",
    "include_inputs_for_metrics",
    "jit_mode_eval",
    "logging_dir",
    "mp_parameters",
    "overwrite_output_dir",
    "past_index",
    "ray_scope",
    "save_safetensors",
    "use_ipex",
    "use_mps_device",
}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TrainerError(re.sub(r"/--[\w-]+(?=:)", "", message), exit_code=2)  # each flag has a second spelling


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The three groups of flags in ``argv``; raises TrainerError (exit code 2) for what cannot be right."""
    parser = _Parser((ModelArguments, DataArguments, TrainingArguments), allow_abbrev=False)  # type: ignore[arg-type]
    known = {option for action in parser._actions for option in action.option_strings}
    words = _today(list(argv))
    try:
        model, data, training, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except (ValueError, ImportError, OSError) as error:
        raise TrainerError(str(error).strip().splitlines()[0], exit_code=2) from error
    if rest:
        raise TrainerError(_unknown(rest[0], known), exit_code=2)
    groups = cast(tuple[ModelArguments, DataArguments, TrainingArguments], (model, data, training))
    _check(*groups)
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        # The other way hangs a Python hook on every saved tensor: a fifth of the CPU's time in a small step.
        if getattr(training, name, "") is None:
            setattr(training, name, {"use_reentrant": True})
    if training.ddp_find_unused_parameters is None:  # every batch uses them all, and looking for others is a conflict
        training.ddp_find_unused_parameters = False
    return groups


def _today(words: list[str]) -> list[str]:
    """``words`` with old names made new, and with what this machine needs: CPU where there is no GPU."""
    flags: list[list[str]] = [[]]
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            flags.append([name, value] if equals else [name])
        else:
            flags[-1].append(word)
    names = {flag[0].removeprefix("--").replace("-", "_") for flag in flags[1:]}
    result = flags[0]
    for flag in flags[1:]:
        name = flag[0].removeprefix("--").replace("-", "_")
        if name in _RETIRED:
            print(f"lorapatch trainer: --{name} has no effect any more", file=sys.stderr)
        elif not _dropped(name, names):
            result += [f"--{_RENAMED.get(name, name)}", *flag[1:]]
    if not names & {"use_cpu", "no_cuda"} and (
        os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    ):
        result += ["--use_cpu", "True"]
    return result


def _dropped(name: str, names: set[str]) -> bool:
    """Steps of warm-up win over a ratio, as they always did; tf32 is for GPUs that have it."""
    return (name == "warmup_ratio" and "warmup_steps" in names) or (name == "tf32" and not is_torch_tf32_available())


def _unknown(word: str, known: set[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag: a value too many, or a flag without its two dashes"
    names = [name for name in known if "-" not in name.removeprefix("--")] + [f"--{name}" for name in _RENAMED]
    near = difflib.get_close_matches(word, names, n=5, cutoff=0.5)
    nearest = max(near, key=lambda name: len(os.path.commonprefix([name, word])), default=None)
    return f"{word} is no flag of the trainer" + (f"; did you mean {nearest}?" if nearest else "")


_STAGES = "the pre-training stage trains the projector alone, the LoRA flags belong to the fine-tuning command"


def _check(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> None:
    plugin: Any = training.deepspeed_plugin
    stage = int(plugin.zero_stage or 0) if plugin else 0
    unsupported: dict[str, Any] = {
        "--optimize_vision_tower": model.optimize_vision_tower,
        "--optimize_vision_tower_aux": model.optimize_vision_tower_aux,
        "--mm_use_im_start_end": model.mm_use_im_start_end,
        "--mm_use_im_patch_token": model.mm_use_im_patch_token,
        "--image_global": data.image_global,
        "--image_grid": data.image_grid != 1,
    }
    faults = [
        *((value is None, f"{flag} is missing") for flag, value in _needed(model, data, training).items()),
        *((wrong, f"{flag}: the trainer cannot do this; leave it out") for flag, wrong in unsupported.items()),
        (training.bits not in {4, 8, 16}, f"--bits {training.bits}: 4, 8 or 16"),
        (training.lora_r < 1, f"--lora_r {training.lora_r}: at least 1"),
        (training.lora_alpha <= 0, f"--lora_alpha {training.lora_alpha}: must be above 0"),
        (not 0 <= training.lora_dropout < 1, f"--lora_dropout {training.lora_dropout}: from 0 to below 1"),
        (data.max_bad_samples < 0, f"--max_bad_samples {data.max_bad_samples}: not below 0"),
        (
            training.lora_enable and model.tune_mm_mlp_adapter,
            f"--lora_enable and --tune_mm_mlp_adapter exclude each other: {_STAGES}",
        ),
        (
            training.bits < 16 and not training.lora_enable,
            f"--bits {training.bits} needs --lora_enable True: quantised weights cannot be trained themselves",
        ),
        (training.bits < 16 and stage == 3, f"--bits {training.bits} and ZeRO-3 exclude each other: use ZeRO-2"),
        (
            training.lora_variant == "pissa" and (training.bits < 16 or stage == 3),
            "--lora_variant pissa needs whole weights: --bits 16 and ZeRO-2 or no ZeRO",
        ),
    ]
    for wrong, message in faults:
        if wrong:
            raise TrainerError(message, exit_code=2)


def _needed(model: ModelArguments, data: DataArguments, training: TrainingArguments) -> dict[str, str | None]:
    return {
        "--model_name_or_path": model.model_name_or_path,
        "--vision_tower": model.vision_tower,
        "--data_path": data.data_path,
        "--output_dir": training.output_dir,
    }
