"""transformers' Trainer for memory_accuracy.py: a language or image-text model's config.json, random weights, one length.

    python plain_trainer.py --model_name_or_path FOLDER --sequence 512 --output_dir OUT [--lora_enable True] [TrainingArguments]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

SIDE = 448  # pixels of an image, for a model that takes any size
IMAGE_TENSORS = ("pixel_values", "image_grid_thw")
TOWERS = r".*(vision_tower|visual|projector).*"


@dataclass
class ModelArguments:
    """The model's folder, the length of every sample with its image's tokens, and LoRA as the LLaVA family has it."""

    model_name_or_path: str = ""
    sequence: int = 512
    lora_enable: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1


class RandomSamples(Dataset[dict[str, Tensor]]):
    """Samples of ``length`` random tokens, every one a label; an image-text model's begin with one image."""

    def __init__(self, config: Any, length: int) -> None:
        self.config, self.length = config, length
        self.image = image_tokens(config) if hasattr(config, "vision_config") else []
        self.vocabulary = min([config.get_text_config().vocab_size, *self.image])  # the image's tokens stand above
        if length <= len(self.image):
            raise SystemExit(f"--sequence {length} leaves no token beside the image's {len(self.image)}")

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(0, self.vocabulary, (self.length - len(self.image),), generator=generator)
        image = torch.tensor(self.image, dtype=torch.long)
        ids, labels = torch.cat([image, text]), torch.cat([torch.full_like(image, -100), text])
        sample = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        if self.image:  # the Trainer leaves out what a model's forward does not name
            seen = (ids == self.config.image_token_id).long()
            sample |= {"mm_token_type_ids": seen, "token_type_ids": 1 - seen, **pixels(self.config, generator)}
        return sample


def image_tokens(config: Any) -> list[int]:
    """One image in the sequence: a token for each feature, between marks where the model has them."""
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        count = (SIDE // vision.patch_size // vision.spatial_merge_size) ** 2
        return [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
    return [config.image_token_id] * (vision.image_size // vision.patch_size) ** 2


def pixels(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """One image as the model's processor gives it: [1, 3, side, side], or [patches, values] and its grid [1, 3]."""
    vision = config.vision_config
    if not hasattr(vision, "spatial_merge_size"):
        return {"pixel_values": torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)}
    side = SIDE // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(side**2, values, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, side, side]])}


def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Images one after the other, whatever number of patches they have; all else stacked."""
    return {
        name: (torch.cat if name in IMAGE_TENSORS else torch.stack)([sample[name] for sample in samples])
        for name in samples[0]
    }


def main() -> None:
    """Train a few steps; what it took is printed by the observer."""
    arguments, training = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    sees = hasattr(config, "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device(training.device):  # each rank's own; a GPU is quick at random weights
        model = auto.from_config(config, dtype=torch.bfloat16)
    if arguments.lora_enable:
        from peft import LoraConfig, get_peft_model

        if training.gradient_checkpointing:
            model.enable_input_require_grads()
        lora = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules="all-linear",
            exclude_modules=TOWERS if sees else None,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
        model.print_trainable_parameters()
    data = RandomSamples(config, arguments.sequence)
    Trainer(model=model, args=training, train_dataset=data, data_collator=collate).train()


if __name__ == "__main__":
    main()
