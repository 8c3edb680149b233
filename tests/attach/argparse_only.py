"""No HfArgumentParser: argparse with a few flags, one of which is called as one of LoRA's; saves the model, not the Trainer."""

import argparse

from toy import Sentences
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--deepspeed")
parser.add_argument("--lr", type=float, default=5e-3)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--lora_dropout", type=float, default=0.0, help="read by nobody")
options = parser.parse_args()
print("lora_dropout", options.lora_dropout, flush=True)

model = AutoModelForCausalLM.from_pretrained(options.model)
args = TrainingArguments(
    output_dir=options.output_dir,
    deepspeed=options.deepspeed,
    learning_rate=options.lr,
    max_steps=options.steps,
    use_cpu=True,
    bf16=True,
    per_device_train_batch_size=2,
    save_strategy="no",
    logging_steps=1,
    report_to="none",
)
trainer = Trainer(model=model, args=args, train_dataset=Sentences())
trainer.train()
if args.process_index == 0:
    model.save_pretrained(options.output_dir)
