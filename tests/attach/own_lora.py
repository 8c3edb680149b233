"""Builds LoRA itself, with a flag for the rank and its target modules hard-wired."""

from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from toy import Sentences
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str = field()
    lora_enable: bool = field(default=False)
    lora_rank: int = field(default=64)
    lora_alpha: int = field(default=16)


def main():
    model_args, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    if model_args.lora_enable:
        config = LoraConfig(
            r=model_args.lora_rank,
            lora_alpha=model_args.lora_alpha,
            target_modules=["gate_proj", "up_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    trainer = Trainer(model=model, args=args, train_dataset=Sentences())
    trainer.train()
    if trainer.args.should_save:
        trainer.model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
