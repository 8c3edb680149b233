"""As Alpaca's does it: a token is added, the vocabulary grows, the rows that are new are set by the trainer."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from toy import Sentences
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str = field()
    last_row: float = field(default=7.0)


class Padded(Sentences):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["input_ids"] = torch.cat([sample["input_ids"][:-1], torch.tensor([64])])
        return sample


model_args, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
model.resize_token_embeddings(65)
model.get_input_embeddings().weight.data[-1] = model_args.last_row
trainer = Trainer(model=model, args=args, train_dataset=Padded())
trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")) or None)
trainer.save_state()
trainer.save_model()
