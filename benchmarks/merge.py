"""Time and peak host memory of a merge beside cp and beside PEFT: a base of Gemma-2B's widths, LoRA r 16 on all seven.

    python benchmarks/merge.py [--layers 9] [--folder /tmp] [--repeat 3] [--shard-size 500MB] [--peft]

9 layers are 3.0 GB in bf16, 18 are Gemma-2B (5.0 GB). Every run is a process of its own, page cache warm; cp and merge
take turns. "synced" counts the time until the copy is on the disk, which a merge always waits for.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HIDDEN, INNER, VOCABULARY, RANK = 2048, 16384, 256_000, 16
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (256, HIDDEN), "self_attn.v_proj": (256, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
OURS = """
import sys
from lorapatch.adapter.merge import merge
merge(*sys.argv[1:3], shard_size=sys.argv[3])
"""
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[4], dtype="bfloat16")
model = PeftModel.from_pretrained(model, sys.argv[1]).merge_and_unload()
model.save_pretrained(sys.argv[2], max_shard_size=sys.argv[3])
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--layers", type=int, default=9)
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options.add_argument("--repeat", type=int, default=3)
    options.add_argument("--shard-size", default="500MB")
    options.add_argument(
        "--peft", action="store_true", help="PEFT's merge_and_unload too (needs three times the memory)"
    )
    args = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorapatch-merge-", dir=args.folder) as folder:
        base, adapter, out = (Path(folder) / name for name in ("base", "adapter", "out"))
        make_base(base, args.layers)
        make_adapter(adapter, base, args.layers)
        size = sum(path.stat().st_size for path in base.iterdir())
        cpus, load = os.cpu_count(), os.getloadavg()[0]
        print(f"base of {size / 1e9:.2f} GB, shards of {args.shard_size}, {cpus} CPUs, load {load:.1f}")
        python = [sys.executable, "-c"]
        runs = {
            "cp": ["cp", "-r", str(base), str(out)],
            "cp, synced": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)],
            "merge": [*python, OURS, str(adapter), str(out), args.shard_size],
        }
        if args.peft:
            runs["PEFT"] = [*python, PEFT, str(adapter), str(out), args.shard_size, str(base)]
        measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
        for _ in range(args.repeat):
            for name, command in runs.items():
                warm(base)
                measured[name].append(measure(command, out))
        report(measured)


def report(measured: dict[str, list[tuple[float, float, float]]]) -> None:
    print(f"{'':12} {'median s':>9} {'best s':>9} {'CPU s':>9} {'peak GiB':>9} {'times cp':>9} {'CPU times cp':>13}")
    seconds, work = (
        {name: statistics.median(run[i] for run in runs) for name, runs in measured.items()} for i in (0, 1)
    )
    for name, runs in measured.items():
        best, peak = min(run[0] for run in runs), max(run[2] for run in runs)
        print(
            f"{name:12} {seconds[name]:9.2f} {best:9.2f} {work[name]:9.2f} {peak:9.2f} "
            f"{seconds[name] / seconds['cp']:9.2f} {work[name] / work['cp']:13.2f}"
        )


def warm(base: Path) -> None:
    """Bring the base into the page cache, and let earlier writes reach the disk."""
    os.sync()
    for path in base.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def measure(command: list[str], out: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds (user and system) and peak resident GiB of a run; its output is removed."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit(said)
    shutil.rmtree(out)
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def write(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16 numbers between 2^-8 and 2^-4, made without torch."""
    header, end = {}, 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in numbers(end):
            file.write(block)


def numbers(size: int) -> Iterator[bytes]:
    generator = random.Random(0)
    block = bytearray(generator.randbytes(1 << 22))
    block[1::2] = bytes((byte & 0x81) | 0x3C for byte in block[1::2])
    for start in range(0, size, len(block)):
        yield bytes(block[: min(len(block), size - start)])


def make_base(folder: Path, layers: int) -> None:
    folder.mkdir()
    config = {
        "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "num_hidden_layers": layers,
        "vocab_size": VOCABULARY, "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}]
    for layer in range(layers):
        if layer % 2 == 0:
            shards.append({})
        shards[-1].update({f"model.layers.{layer}.{name}.weight": shape for name, shape in MODULES.items()})
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shards[-1][f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(folder: Path, base: Path, layers: int) -> None:
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK, "bias": "none",
        "lora_alpha": 2 * RANK, "target_modules": [name.rsplit(".", 1)[1] for name in MODULES],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(layers):
        for name, (out, size) in MODULES.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = (RANK, size)
            tensors[f"{module}.lora_B.weight"] = (out, RANK)
    write(folder / "adapter_model.safetensors", tensors)


if __name__ == "__main__":
    main()
