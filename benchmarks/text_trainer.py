"""A plain text trainer for memory_accuracy.py: any causal language model's config.json, random weights, one length.

    python text_trainer.py --model FOLDER --sequence 512 --output_dir OUT [--lora_enable True] [TrainingArguments]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    """The model's folder, the length of every sample, and LoRA as the LLaVA family has it."""

    model_name_or_path: str = ""
    sequence: int = 512
    lora_enable: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    lora_target_modules: str = "all-linear"


class RandomTokens(Dataset[dict[str, torch.Tensor]]):
    """Samples of ``length`` random tokens below ``vocabulary``, every one a label."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.length, self.vocabulary = length, vocabulary

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, self.vocabulary, (self.length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    """Train a few steps; what it took is printed by the observer."""
    arguments, training = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    with torch.device(training.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if arguments.lora_enable:
        from peft import LoraConfig, get_peft_model

        names = arguments.lora_target_modules
        if training.gradient_checkpointing:
            model.enable_input_require_grads()
        lora = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=names if names == "all-linear" else names.split(","),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, lora)
    data = RandomTokens(arguments.sequence, config.vocab_size)
    Trainer(model=model, args=training, train_dataset=data).train()


if __name__ == "__main__":
    main()
