"""A toolkit for tests of runs: a script of two stages, and a trainer that only prints and saves as a real one does."""
# ruff: noqa: E501 (scripts and logs as they stand)

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["make_toykit", "quick_environment"]

TRAINER = r"""
import argparse, json, os, random, signal, struct, sys, time
from pathlib import Path

from peft import LoraConfig, get_peft_model


def save_adapter(folder, rank, moved):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    header, data = {}, b""
    for matrix, shape in (("A", [rank, 4]), ("B", [4, rank])):
        value = 0.0 if matrix == "B" and not moved else 0.5
        raw = struct.pack("<f", value) * (shape[0] * shape[1])
        header[f"{name}{matrix}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj"], "bias": "none"}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name_or_path", default="")
    parser.add_argument("--data_path", default="")
    parser.add_argument("--output_dir", default="")
    parser.add_argument("--pretrain_mm_mlp_adapter", default="")
    parser.add_argument("--save_strategy", default="steps")
    parser.add_argument("--report_to", default="")
    parser.add_argument("--mode", default="")
    parser.add_argument("--max_steps", type=int, default=6)
    parser.add_argument("--save_steps", type=int, default=2)
    parser.add_argument("--logging_steps", type=int, default=1)
    parser.add_argument("--per_device_train_batch_size", type=int, default=1)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--step_s", type=float, default=0.05)
    parser.add_argument("--bf16", type=bool, default=False)
    parser.add_argument("--use_cpu", type=bool, default=False)
    parser.add_argument("--tune_mm_mlp_adapter", type=bool, default=False)
    parser.add_argument("--lora_enable", type=bool, default=False)
    parser.add_argument("--lora_r", type=int, default=8)
    parser.add_argument("--lora_alpha", type=float, default=16)
    parser.add_argument("--lora_dropout", type=float, default=0.1)
    parser.add_argument("--lora_bias", default="none")
    args = parser.parse_args()
    if args.lora_enable:
        config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias=args.lora_bias)
        model = get_peft_model(object(), config)
    mode = os.environ.get("TOY_MODE", args.mode)
    output = Path(args.output_dir)
    print(json.dumps({"toy": sys.argv[1:]}), flush=True)
    if mode == "oom" and args.lora_enable:
        print("[rank0]: Traceback (most recent call last):\n[rank0]:   File \"train.py\", line 9, in <module>\n[rank0]: torch.OutOfMemoryError: "
              "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.50 GiB of which 1.25 GiB is free.", flush=True)
        sys.exit(1)
    if mode == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if args.lora_enable:
        print(json.dumps({"lorapatch": "lora", "trainable": 64, "total": 1000, "lora": 64, "tensors": 2, "modules": ["q_proj"]}), flush=True)
    done = sorted(int(p.name.split("-")[1]) for p in output.glob("checkpoint-*")) if output.is_dir() else []
    history = json.loads((output / f"checkpoint-{done[-1]}" / "trainer_state.json").read_text())["log_history"] if done else []
    first = done[-1] + 1 if done else 1
    for step in range(first, args.max_steps + 1):
        time.sleep(args.step_s)
        if mode == "killed" and step == 4 and args.lora_enable and not done:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = float("nan") if mode == "nan" and step > 2 else 2.5 - 0.2 * step
        sys.stderr.write(f"\r{100 * step // args.max_steps:3d}%|####  | {step}/{args.max_steps} [00:0{step % 10}<00:01,  9.00it/s]")
        sys.stderr.flush()
        if step % args.logging_steps == 0:
            entry = {"loss": loss, "grad_norm": 1.5, "learning_rate": args.learning_rate, "epoch": step / 10}
            history.append({**entry, "step": step})
            print("\r" + " " * 20 + "\r" + str({key: str(value) for key, value in entry.items()}), flush=True)
        if args.save_strategy != "no" and step % args.save_steps == 0 and args.lora_enable:
            folder = output / f"checkpoint-{step}"
            save_adapter(folder, args.lora_r, mode != "still")
            (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    output.mkdir(parents=True, exist_ok=True)
    if args.lora_enable:
        save_adapter(output, args.lora_r, mode != "still")
    else:
        (output / "mm_projector.bin").write_text("x")
    (output / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    print({"train_runtime": 1.5, "train_samples_per_second": 3.2, "train_loss": 2.0, "epoch": 1.0}, flush=True)


if __name__ == "__main__":
    main()
"""

SCRIPT = """#!/bin/bash
# A toolkit in small: pre-training, fine-tuning, evaluation.
HERE=$(cd "$(dirname "$0")" && pwd)
NAME=toy
PYTHON=@PYTHON@
export TOKENIZERS_PARALLELISM=false

$PYTHON $HERE/train.py \\
    --model_name_or_path $HERE/model \\
    --data_path $HERE/data.json \\
    --tune_mm_mlp_adapter True \\
    --output_dir $HERE/out/$NAME-pretrain \\
    --learning_rate 1e-3 \\
    --max_steps 2 2>&1 | tee $HERE/pretrain.log

$PYTHON $HERE/train.py \\
    --model_name_or_path $HERE/model \\
    --data_path $HERE/data.json \\
    --pretrain_mm_mlp_adapter $HERE/out/$NAME-pretrain/mm_projector.bin \\
    --output_dir $HERE/out/$NAME-finetune \\
    --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps 4 \\
    --learning_rate 2e-4 \\
    --logging_steps 1 \\
    --save_steps 2 2>&1 | tee $HERE/finetune.log

echo "evaluated $NAME" > $HERE/evaluated.txt
"""


def make_toykit(folder: Path, name: str = "train toy.sh") -> Path:
    """Lay out the toolkit in ``folder``; returns its script, which has no LoRA yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(TRAINER)
    # The trainer's source has to show where LoRA is made; the real library would take seconds to load.
    (folder / "peft.py").write_text(
        "class LoraConfig:\n    def __init__(self, **given):\n        pass\n\n\ndef get_peft_model(model, config):\n    return model\n"
    )
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "gemma"}')
    (folder / "data.json").write_text("[]")
    script = folder / name
    script.write_text(SCRIPT.replace("@PYTHON@", sys.executable))
    script.chmod(0o755)
    return script


def quick_environment() -> dict[str, str]:
    """The environment, without what a developer's own settings would change in a run."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("MASTER_PORT", "TOY_MODE", "RANK", "WORLD_SIZE")
    }
