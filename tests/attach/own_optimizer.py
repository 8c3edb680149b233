"""A Trainer with a create_optimizer of its own, which takes every parameter, frozen or not, and two learning rates."""

from dataclasses import dataclass, field

import torch
from toy import Sentences
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str = field()


class OwnTrainer(Trainer):
    def create_optimizer(self, model=None):
        self.model.config.use_cache = False
        norms = [p for name, p in self.model.named_parameters() if "norm" in name]
        others = [p for name, p in self.model.named_parameters() if "norm" not in name]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "lr": 1e-5}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        sizes = [sum(p.numel() for p in group["params"]) for group in self.optimizer.param_groups]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.args.process_index == 0:
            print(f"groups {sizes} rates {rates}", flush=True)
        return super().create_scheduler(num_training_steps, optimizer)


model_args, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
trainer = OwnTrainer(AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path), args, train_dataset=Sentences())
trainer.train()
trainer.save_model(args.output_dir)
