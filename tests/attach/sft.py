"""As TRL does it: a parser class of its own, a Trainer that is given the model's name and makes model and data itself."""

import argparse
from dataclasses import dataclass, field

from toy import Sentences
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class SFTConfig(TrainingArguments):
    max_length: int = field(default=12)
    packing: bool = field(default=False)


@dataclass
class ScriptArguments:
    model_name_or_path: str = field()
    use_peft: bool = field(default=False)


class OwnParser(HfArgumentParser):
    def parse_args_and_config(self):
        first = argparse.ArgumentParser(add_help=False)
        first.add_argument("--config")
        _, rest = first.parse_known_args()
        return self.parse_args_into_dataclasses(args=rest)


class SFTTrainer(Trainer):
    def __init__(self, model, args, train_dataset, peft_config=None):
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model)
        if peft_config is not None:
            raise ValueError("no LoRA here")
        super().__init__(model=model, args=args, train_dataset=train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**{name: tensor[:, : self.args.max_length] for name, tensor in inputs.items()})
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


script_args, args = OwnParser((ScriptArguments, SFTConfig)).parse_args_and_config()
trainer = SFTTrainer(script_args.model_name_or_path, args, Sentences())
trainer.train()
trainer.save_model()
