"""Collects the state dict itself and hands it to the Trainer's inner save, from one rank."""

import sys
from dataclasses import dataclass, field

from toy import Sentences
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str = field()


def save(trainer, folder):
    whole = {name: tensor.cpu() for name, tensor in trainer.model.state_dict().items()}
    if trainer.args.should_save:
        trainer._save(folder, state_dict=whole)


def main():
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, args = parser.parse_args_into_dataclasses(args=sys.argv[1:])
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    trainer = Trainer(model=model, args=args, train_dataset=Sentences())
    trainer.train()
    save(trainer, args.output_dir)


if __name__ == "__main__":
    sys.exit(main())
