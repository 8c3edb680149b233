"""What lorapatch.attach costs a step: a plain Trainer with LoRA by PEFT beside the same Trainer attached, side by side.

    python benchmarks/attach_overhead.py [--steps N] [--turns N] [--hidden N] [--layers N] [--device cpu|cuda]

Both train the same random Llama on the same samples in one process each, the two of a turn one after the other, in
changing order. The time of a step, from callbacks that both have, is wall time on a GPU and the process's CPU time on a
CPU, so that other work on the machine counts little. Printed first is what the hooks themselves take, called many times
around nothing, as a share of the plain step: the limit is 0.5 %. What two runs differ by has the noise of both in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

LIMIT = 0.005
ROOT = Path(__file__).resolve().parents[1]
TRAINER = '''
import argparse, json, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

parser = argparse.ArgumentParser()
for name, kind in (("steps", int), ("hidden", int), ("layers", int), ("batch", int), ("length", int), ("peft", int)):
    parser.add_argument("--" + name, type=kind)
parser.add_argument("--device")
parser.add_argument("--output_dir")
o = parser.parse_args()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=o.hidden, intermediate_size=o.hidden * 4, num_hidden_layers=o.layers, num_attention_heads=8, vocab_size=4096))
if o.device == "cuda":
    model = model.to(torch.bfloat16)
if o.peft:
    from peft import LoraConfig, get_peft_model
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4096
    def __getitem__(self, i):
        ids = torch.randint(4096, (o.length,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}

class Times(TrainerCallback):
    took = []
    def now(self):
        if o.device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()
    def on_step_begin(self, *args, **more):
        self.began = self.now()
    def on_step_end(self, *args, **more):
        self.took.append(self.now() - self.began)

args = TrainingArguments(output_dir=o.output_dir, max_steps=o.steps, per_device_train_batch_size=o.batch, learning_rate=1e-4,
    bf16=o.device == "cuda", use_cpu=o.device == "cpu", save_strategy="no", logging_steps=10, report_to="none",
    disable_tqdm=True, seed=0)
times = Times()
Trainer(model=model, args=args, train_dataset=Samples(), callbacks=[times]).train()
print("TIMES " + json.dumps(times.took[3:]), flush=True)
print("TRAINABLE", sum(p.numel() for p in model.parameters() if p.requires_grad), flush=True)
'''


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Path(folder) / "train.py"
        trainer.write_text(TRAINER)
        ratios, steps = [], []
        for turn in range(options.turns):
            order = ["plain", "attached"] if turn % 2 == 0 else ["attached", "plain"]
            took = {kind: _run(kind, trainer, options) for kind in order}
            ratios.append(took["attached"] / took["plain"] - 1)
            shown = ", ".join(f"{kind} {1000 * took[kind]:.2f} ms" for kind in ("plain", "attached"))
            print(f"turn {turn + 1}: {shown} a step, {100 * ratios[-1]:+.2f} %", flush=True)
            steps.append(took["plain"])
    cost, step = hooks(options.batch, options.length), median(steps)
    print(f"hooks {1e6 * cost:.2f} µs a step, {100 * cost / step:.4f} % of {1000 * step:.2f} ms, limit {100 * LIMIT:.1f} %")
    low, high = min(ratios), max(ratios)
    print(f"side by side {100 * median(ratios):+.2f} % (median of {options.turns}, {100 * low:+.2f} to {100 * high:+.2f} %)")
    sys.exit(int(cost / step > LIMIT))


def hooks(batch: int, length: int, calls: int = 20_000) -> float:
    """What attach adds to a step that logs: around training_step, at the step's end, around log; CPU time, s."""
    sys.path.insert(0, str(ROOT))
    import torch

    from lorapatch.attach import Attachment, Flags

    class Bare:
        """A Trainer that does nothing."""

        def __init__(self) -> None:
            self.args, self.state, self.optimizer, self.callbacks = None, SimpleNamespace(global_step=9, max_steps=99), None, []
            self.create_optimizer = self._save_checkpoint = self.training_step = lambda *_: None
            self.add_callback = self.callbacks.append

        def log(self, logs: dict[str, float]) -> None:
            pass

    attachment = Attachment(Flags({"lora_enable": ["--lora_enable"]}))
    inputs = {name: torch.zeros(batch, length, dtype=torch.long) for name in ("input_ids", "labels")}
    logs = {"loss": 1.0, "grad_norm": torch.tensor(1.0), "learning_rate": 1e-4, "epoch": 0.5}

    def timed(trainer: Any, callbacks: list[Any]) -> float:
        began = time.process_time()
        for _ in range(calls):
            trainer.training_step(None, inputs)
            for callback in callbacks:
                callback.on_step_end(None, trainer.state, None)
            trainer.log(dict(logs))
        return (time.process_time() - began) / calls

    plain = timed(Bare(), [])
    attachment.hook_logging(Bare)
    attachment.model = torch.nn.Linear(1, 1)
    trainer = Bare()
    attachment.follow(trainer)
    return timed(trainer, trainer.callbacks) - plain


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 60), ("turns", 4), ("hidden", 256), ("layers", 4), ("batch", 4), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


def _run(kind: str, trainer: Path, options: argparse.Namespace) -> float:
    """The median time of a step, s."""
    words = [word for name, value in vars(options).items() if name != "turns" for word in (f"--{name}", str(value))]
    words += ["--output_dir", str(trainer.parent / kind), "--peft", str(int(kind == "plain"))]
    program = [sys.executable, *(["-m", "lorapatch.attach"] if kind == "attached" else []), str(trainer), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{kind}: {done.stderr[-2000:]}")
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("TIMES", "TRAINABLE")))
    print(f"    {kind}: {int(said['TRAINABLE']):,} trainable parameters", flush=True)
    return median(json.loads(said["TIMES"]))


if __name__ == "__main__":
    main()
