"""Logs tensors, builds LoRA itself if it is told to, and fails where it is told to: at the end of training, or saving."""

import sys
from dataclasses import dataclass, field

from toy import Sentences
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str = field()
    own: bool = field(default=False)
    where: str = field(default="nowhere")


class LoggingTrainer(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.log({"half": (loss[0] if isinstance(loss, tuple) else loss).detach() / 2})
        return loss

    def _load_best_model(self):
        raise OSError("the best checkpoint is gone")


def main():
    model_args, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path)
    if model_args.own:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["up_proj"], task_type="CAUSAL_LM"))
        model.get_input_embeddings().weight.requires_grad_(True)
    trainer = LoggingTrainer(model=model, args=args, train_dataset=Sentences(), eval_dataset=Sentences())
    trainer.train()
    trainer.save_state()
    if model_args.where == "saving":
        raise OSError("the disk of another machine is gone")
    if model_args.where == "exit":
        sys.exit("no more today")
    trainer.save_model()


if __name__ == "__main__":
    main()
