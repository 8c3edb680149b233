"""A Trainer whose script has FSDP flags, as FastChat's and Alpaca's have."""

from dataclasses import dataclass, field
from pathlib import Path

from toy import Sentences
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str = field()


def main():
    model_args, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    trainer = Trainer(model=model, args=args, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")) or None)
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    main()
