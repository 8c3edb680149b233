"""Trains a tiny Llama with transformers, PEFT and DeepSpeed; copied beside a script by the tests of real runs."""

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


@dataclass
class LoraArguments:
    lora_enable: bool = field(default=False)
    lora_r: int = field(default=8)
    lora_alpha: int = field(default=16)
    lora_dropout: float = field(default=0.0)
    lora_bias: str = field(default="none")


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.arange(index, index + 12) % 50
        return {"input_ids": ids, "labels": ids}


class KilledOnce(TrainerCallback):
    """Ends rank 0 as the kernel's out-of-memory killer does, at the step that KILL_AT names, unless it was resumed."""

    def on_step_end(self, args, state, control, **more):
        resumed = any(Path(args.output_dir).glob("resumed"))
        if state.global_step == int(os.environ.get("KILL_AT", "-1")) and not resumed and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = HfArgumentParser((TrainingArguments, LoraArguments))
    args, lora = parser.parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    if lora.lora_enable:
        model = get_peft_model(
            model,
            LoraConfig(
                r=lora.lora_r,
                lora_alpha=lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                bias=lora.lora_bias,
                target_modules=["q_proj", "v_proj"],
            ),
        )
        model.print_trainable_parameters()
    trainer = Trainer(model=model, args=args, train_dataset=Sentences(), callbacks=[KilledOnce()])
    checkpoints = any(Path(args.output_dir).glob("checkpoint-*"))
    if checkpoints:
        (Path(args.output_dir) / "resumed").touch()
    trainer.train(resume_from_checkpoint=checkpoints)
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
