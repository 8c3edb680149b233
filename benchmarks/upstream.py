"""The embedded trainer and MGM's own, side by side: same weights, same samples, same flags; loss, memory and speed.

    python benchmarks/upstream.py --upstream MGM --upstream-path OLD_PACKAGES --data samples.json --images FOLDER

``--upstream`` is a checkout of MGM, run as it is (``mgm/train/train.py``, LoRA r 16 on all seven projections, ZeRO-2);
``--upstream-path`` is put before its PYTHONPATH and holds what it pins (transformers 4.38, tokenizers 0.15, accelerate
0.28, peft 0.4, timm 0.9, open_clip 2.24). Random weights, the samples in the same shuffled order. Stochastic depth is
off, so that the losses can be compared. Speed is taken from outside, by the clock at which each step's log line comes;
memory by an observer that both processes load (observer/).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lorapatch
from lorapatch.run.execute import Outcome, execute
from lorapatch.run.gpus import Gpus
from lorapatch.run.log import Announcement, LogParser, Metrics, Traceback
from lorapatch.run.options import free_port
from lorapatch.run.processes import Process
from lorapatch.run.watch import Watcher

HERE = Path(__file__).resolve().parent
ZERO2 = Path(lorapatch.__file__).parent / "demo/toolkit/training/scripts/zero2.json"
TRAINERS = ("lorapatch", "upstream")
WARM_UP = 2  # steps before the clock counts: compiling, allocating, the first images
LOSS_TOLERANCE = 1e-2
GIB = 2**30


@dataclass
class Run:
    """One training and what was seen of it; memory in bytes, None where there is no GPU or nothing was said."""

    trainer: str
    micro_batch: int
    accumulation: int
    losses: list[float] = field(default_factory=list)
    samples_per_s: float | None = None
    peak_allocated_B: int | None = None
    peak_reserved_B: int | None = None
    device_used_B: int | None = None
    gpu: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    wall_s: float = 0.0
    exit_code: int | None = None
    failure: str = ""  # the last exception, if there was one; upstream's save_state ends in a TypeError

    @property
    def first_loss(self) -> float | None:
        return self.losses[0] if self.losses else None


def make_zoo(folder: Path, samples: list[dict[str, Any]], size_name: str) -> None:
    """Gemma, CLIP, ConvNeXt and a pre-trained bridge (``mm_projector.bin``) of random weights, readable by both.

    ``tiny`` keeps the true ConvNeXt: upstream takes its shape from the folder's name.
    """
    import torch

    from lorapatch.demo import zoo
    from lorapatch.demo.tokenizer import train_tokenizer

    torch.manual_seed(0)
    true = zoo.SIZES["true"]
    chosen = zoo.SIZES[size_name]
    size = zoo.Size(chosen.language, chosen.vision, true.vision_aux, true.embed)
    language = folder / zoo.FOLDERS["language"]
    tokens = train_tokenizer((turn["value"] for s in samples for turn in s["conversations"]), language)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = zoo.build(size, tokens=tokens, device=device, dtype=torch.bfloat16)
    zoo.save(models, size, folder)
    torch.save(_bridge(size), folder / "mm_projector.bin")
    _for_transformers_4(language / "tokenizer.json", folder / zoo.FOLDERS["vision"] / "model.safetensors")
    (folder / "parameters.json").write_text(json.dumps(models.parameters()), encoding="utf-8")


def _bridge(size: Any) -> dict[str, Any]:
    import torch
    from torch import nn

    from lorapatch.trainer.mining import build_projector, build_query_projector

    vision, hidden = size.vision["hidden_size"], size.language["hidden_size"]
    stages = sum(size.vision_aux["hidden_sizes"])
    modules = {
        "mm_projector": build_projector("mlp2x_gelu", vision, hidden),
        "vlm_uni_query_projector": build_query_projector(vision),
        "vlm_uni_aux_projector": nn.Sequential(nn.LayerNorm(stages), nn.Linear(stages, vision)),
        "vlm_uni_val_projector": nn.Sequential(nn.LayerNorm(stages), nn.Linear(stages, vision)),
    }
    return {
        f"model.{name}.{key}": tensor.to(torch.bfloat16)
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


def _for_transformers_4(tokenizer: Path, vision: Path) -> None:
    """Merges as text and CLIP's names with their prefix: what transformers 4 wrote, and what 5 reads as well."""
    from safetensors.torch import load_file, save_file

    written = json.loads(tokenizer.read_text(encoding="utf-8"))
    model = written["model"]
    model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokenizer.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    state = {f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in load_file(vision).items()}
    save_file(state, vision, metadata={"format": "pt"})


def flags(options: argparse.Namespace, run: Run) -> list[str]:
    """The plan's fine-tuning flags, for both trainers alike."""
    zoo = options.work / "zoo"
    values: dict[str, object] = {
        "deepspeed": ZERO2,
        "model_name_or_path": zoo / "LLM/gemma/gemma-2b-it",
        "version": "gemma",
        "data_path": options.work / "samples.json",
        "image_folder": options.images,
        "vision_tower": zoo / "OpenAI/clip-vit-large-patch14-336",
        "vision_tower_aux": zoo / "OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
        "pretrain_mm_mlp_adapter": zoo / "mm_projector.bin",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_size_aux": 768 if options.size == "true" else 64,
        "image_aspect_ratio": "pad",
        "drop_path": False,
        "bf16": True,
        "tf32": len(Gpus()) > 0,
        "output_dir": options.work / "runs" / f"{run.trainer}-{run.micro_batch}",
        "max_steps": options.steps,
        "per_device_train_batch_size": run.micro_batch,
        "gradient_accumulation_steps": run.accumulation,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "model_max_length": 2048,
        "gradient_checkpointing": True,
        "dataloader_num_workers": min(8, os.cpu_count() or 1),
        "lazy_preprocess": True,
        "report_to": "none",
        "seed": 42,
        "lora_enable": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "lora_bias": "none",
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def command(options: argparse.Namespace, run: Run) -> list[str]:
    """Both through DeepSpeed's launcher, one rank."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port())]
    if run.trainer == "lorapatch":
        return [*launcher, "--module", "lorapatch.trainer.train", *flags(options, run)]
    return [*launcher, str(options.upstream / "mgm/train/train.py"), *flags(options, run)]


def environment(options: argparse.Namespace, run: Run) -> dict[str, str]:
    """The observer first, then what the trainer needs, then what there was."""
    theirs = [options.upstream_path, str(options.upstream)] if run.trainer == "upstream" else []
    path = [str(HERE / "observer"), *theirs, str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}


def measure(options: argparse.Namespace, run: Run) -> None:
    """Train, and fill ``run`` with what is seen; the log goes to a file of its own."""
    parser, times, watchers = LogParser(), [], []
    log = options.work / "logs" / f"{run.trainer}-{run.micro_batch}.log"

    def read(events: Iterator[Any]) -> None:
        for event in events:
            if isinstance(event, Metrics) and "loss" in event.values:
                times.append(time.perf_counter())
                run.losses.append(event.values["loss"])
            elif isinstance(event, Announcement) and event.kind == "observer":
                for name in ("gpu", "peak_allocated_B", "peak_reserved_B", "versions"):
                    setattr(run, name, event.data[name])
            elif isinstance(event, Traceback) and event.error:
                run.failure = f"{event.error}: {event.message}"[:200]

    with log.open("wb", buffering=0) as file:

        def on_output(data: bytes) -> None:
            file.write(data)
            read(parser.feed(data))

        def on_start(root: Process, cookie: str) -> None:
            watchers.append(Watcher(root, cookie, lambda sample: None))

        outcome: Outcome = execute(
            command(options, run),
            environment=environment(options, run),
            on_output=on_output,
            on_start=on_start,
            timeout_s=options.timeout,
        )
    read(parser.close())
    watchers[0].stop()
    device = watchers[0].peaks.device
    run.device_used_B = device.used_B if device else None
    run.exit_code, run.wall_s = outcome.exit_code, round(outcome.wall_s, 1)
    if outcome.state == "timeout":
        run.failure = f"stopped after {options.timeout} s"
    if len(times) > WARM_UP:
        steps = len(times) - WARM_UP
        run.samples_per_s = run.micro_batch * run.accumulation * steps / (times[-1] - times[WARM_UP - 1])


def table(runs: list[Run]) -> str:
    """One row a run, and the difference of the first losses below each pair; Markdown."""
    head = ("micro-batch", "trainer", "first loss", "allocated GiB", "reserved GiB", "device GiB", "samples/s", "end")
    rows: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    for run in runs:
        memory = (run.peak_allocated_B, run.peak_reserved_B, run.device_used_B)
        rows.append(
            (
                str(run.micro_batch),
                run.trainer,
                "n/a" if run.first_loss is None else f"{run.first_loss:.4f}",
                *("n/a" if value is None else f"{value / GIB:.2f}" for value in memory),
                "n/a" if run.samples_per_s is None else f"{run.samples_per_s:.2f}",
                f"{run.wall_s:.0f} s, exit {run.exit_code}{', ' + run.failure if run.failure else ''}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(runs: list[Run]) -> dict[int, float | None]:
    """How far apart the two first losses are, for each micro-batch; None where one is missing."""
    found: dict[int, float | None] = {}
    for size in dict.fromkeys(run.micro_batch for run in runs):
        losses = [run.first_loss for run in runs if run.micro_batch == size]
        whole = len(losses) == len(TRAINERS) and None not in losses
        found[size] = abs(losses[0] - losses[1]) if whole else None  # type: ignore[operator]
    return found


def main(argv: list[str]) -> int:
    """Make what is missing, run each pair, print the table; 1 if a pair of first losses is not equal to 1e-2."""
    if not argv:
        print("needs a checkout of MGM and samples to compare with; nothing was run (--help says how)")
        return 0
    options = _options(argv)
    samples = json.loads(options.data.read_text(encoding="utf-8"))
    for name in ("logs", "runs"):
        (options.work / name).mkdir(parents=True, exist_ok=True)
    if not (options.work / "zoo/parameters.json").is_file():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # its GPU memory is gone with it
            process.submit(make_zoo, options.work / "zoo", samples, options.size).result()
    needed = options.steps * options.accumulation * max(options.micro_batches)
    repeated = [{**samples[i % len(samples)], "id": str(i)} for i in range(needed)]
    (options.work / "samples.json").write_text(json.dumps(repeated), encoding="utf-8")
    runs = []
    for micro_batch in options.micro_batches:
        for trainer in TRAINERS:
            runs.append(Run(trainer, micro_batch, options.accumulation))
            measure(options, runs[-1])
            print(table(runs[-1:]).splitlines()[-1], flush=True)
            result = {"schema": 1, "size": options.size, "steps": options.steps, "runs": [asdict(run) for run in runs]}
            (options.work / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    apart = differences(runs)
    shown = ", ".join(f"{size}: {'n/a' if gap is None else f'{gap:.5f}'}" for size, gap in apart.items())
    print(f"\n{table(runs)}\n\nfirst losses apart, by micro-batch: {shown}")
    for trainer in TRAINERS:
        known = next((run for run in runs if run.trainer == trainer and run.versions), None)
        if known:
            print(f"{trainer}: {known.gpu or 'no GPU'}, {', '.join(f'{k} {v}' for k, v in known.versions.items())}")
    return 0 if all(gap is not None and gap <= LOSS_TOLERANCE for gap in apart.values()) else 1


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="folder that holds upstream's mgm/")
    parser.add_argument("--upstream-path", default="", help="folders of the packages it pins, as in PYTHONPATH")
    parser.add_argument("--data", type=Path, required=True, help="samples in LLaVA's format, each with an image")
    parser.add_argument("--images", type=Path, required=True, help="folder that the samples' image paths begin in")
    parser.add_argument("--work", type=Path, default=Path("build/upstream"), help="weights, logs and result.json")
    parser.add_argument("--size", choices=["tiny", "true"], default="true")
    parser.add_argument("--micro-batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help=f"optimizer steps a run; the clock skips {WARM_UP}")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a run may take")
    options = parser.parse_args(argv)
    for name in ("upstream", "data", "images", "work"):
        setattr(options, name, getattr(options, name).resolve())
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
