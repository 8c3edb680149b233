"""Predicted against measured GPU memory: scripts of many kinds, each estimated first and then run; the peers beside.

    python benchmarks/memory_accuracy.py prepare --work W --data samples.json --images FOLDER   # scripts, configurations
    python benchmarks/memory_accuracy.py predict --work W [--python P] [--upstream-python P]    # no GPU is touched
    python benchmarks/memory_accuracy.py measure --work W --upstream MGM --upstream-path OLD    # needs a GPU

Every configuration is a launch script of its own (``W/scripts/NAME.sh``): ``lorapatch.estimate`` reads it, and bash runs
it. Every sample is the longest of the data, so that each micro-batch is the one that makes the peak; the runs called
mixed have the samples as they are. ``measure`` refuses to run what has no prediction, leaves out what takes more GPUs
than there are, and packs as many runs on the card at once as their predictions allow: memory is counted by process, and
of several processes it is rank 0's that is compared. What was measured before stays in ``measured.json``. True size,
random weights; upstream (MGM, unmodified) runs with the packages that it pins.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import upstream
from plain_models import MODELS, tiny

import lorapatch
from lorapatch.run.gpus import Gpus
from lorapatch.run.log import Announcement, LogParser, Metrics
from lorapatch.run.options import free_port

HERE = Path(__file__).resolve().parent
CONFIGURATIONS = Path(lorapatch.__file__).parent / "demo/toolkit/training/scripts"
GIB = 1 << 30


@dataclass(frozen=True)
class Run:
    """One configuration: ``trainer`` lorapatch, upstream or plain; ``flags`` beside the usual ones.

    ``deepspeed`` names a configuration of the demo's, ``model`` one of plain_models.py, ``data`` a file that prepare writes.
    """

    name: str
    trainer: str
    micro_batch: int
    deepspeed: str | None = "zero2"
    lora: bool = True
    flags: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    gpus: int = 1
    data: str = "samples.json"
    allocator: str = ""  # PYTORCH_CUDA_ALLOC_CONF

    @property
    def offloads(self) -> bool:
        return self.deepspeed is not None and "offload" in self.deepspeed


NO_CHECKPOINTS = {"gradient_checkpointing": False}
SEQUENCE = {"sequence": 1024}
SAMPLES = 512  # of each file
MIXED = "samples_mixed.json"
EXPANDABLE = "expandable_segments:True"


def epoch(micro_batch: int) -> dict[str, int]:
    """As many steps as show every sample once, with the accumulation of all these runs."""
    return {"max_steps": SAMPLES // (2 * micro_batch)}


RUNS = [
    Run("lora-1", "lorapatch", 1),
    Run("lora-4", "lorapatch", 4),
    Run("lora-16", "lorapatch", 16),
    Run("full-1", "lorapatch", 1, lora=False),
    Run("full-4", "lorapatch", 4, lora=False),
    Run("full-16", "lorapatch", 16, lora=False),
    Run("lora-4-no-checkpointing", "lorapatch", 4, flags=NO_CHECKPOINTS),
    Run("lora-16-no-checkpointing", "lorapatch", 16, flags=NO_CHECKPOINTS),
    Run("lora-4-zero3", "lorapatch", 4, deepspeed="zero3"),
    Run("full-1-zero3", "lorapatch", 1, deepspeed="zero3", lora=False),
    Run("lora-4-no-zero", "lorapatch", 4, deepspeed=None),
    Run("lora-16-no-zero", "lorapatch", 16, deepspeed=None),
    Run("lora-4-4bit", "lorapatch", 4, flags={"bits": 4}),
    Run("lora-1-4bit", "lorapatch", 1, flags={"bits": 4}),
    Run("lora-4-8bit", "lorapatch", 4, flags={"bits": 8}),
    Run("upstream-lora-1", "upstream", 1),
    Run("upstream-lora-4", "upstream", 4),
    Run("upstream-lora-16", "upstream", 16),
    Run("upstream-full-1", "upstream", 1, lora=False),
    Run("llama-1b-lora-4", "plain", 4, deepspeed=None, model="llama-1b", flags=SEQUENCE),
    Run("llama-1b-full-4", "plain", 4, deepspeed=None, lora=False, model="llama-1b", flags=SEQUENCE),
    Run("qwen2-7b-lora-2", "plain", 2, deepspeed=None, model="qwen2-7b", flags=SEQUENCE),
    Run("qwen2-7b-lora-2-zero2", "plain", 2, model="qwen2-7b", flags=SEQUENCE),
    Run("llava-7b-lora-2", "plain", 2, deepspeed=None, model="llava-7b", flags=SEQUENCE),
    Run("llava-7b-lora-2-zero2", "plain", 2, model="llava-7b", flags=SEQUENCE),
    Run("paligemma-3b-lora-4", "plain", 4, deepspeed=None, model="paligemma-3b", flags={"sequence": 512}),
    Run("qwen2-vl-2b-lora-2", "plain", 2, deepspeed=None, model="qwen2-vl-2b", flags=SEQUENCE),
    Run("lora-4-offload", "lorapatch", 4, deepspeed="zero2_offload"),
    Run("full-1-offload", "lorapatch", 1, deepspeed="zero2_offload", lora=False),
    Run("lora-4-zero3-offload", "lorapatch", 4, deepspeed="zero3_offload"),
    Run("full-1-zero3-offload", "lorapatch", 1, deepspeed="zero3_offload", lora=False),
    Run("lora-4-2gpus", "lorapatch", 4, gpus=2),
    Run("full-1-2gpus", "lorapatch", 1, lora=False, gpus=2),
    Run("lora-4-zero3-2gpus", "lorapatch", 4, deepspeed="zero3", gpus=2),
    Run("full-1-zero3-2gpus", "lorapatch", 1, deepspeed="zero3", lora=False, gpus=2),
    Run("qwen2-7b-lora-2-zero3-2gpus", "plain", 2, deepspeed="zero3", model="qwen2-7b", flags=SEQUENCE, gpus=2),
    Run("llama-1b-full-4-2gpus", "plain", 4, deepspeed=None, lora=False, model="llama-1b", flags=SEQUENCE, gpus=2),
    Run("lora-4-mixed", "lorapatch", 4, flags=epoch(4), data=MIXED),
    Run("upstream-lora-1-mixed", "upstream", 1, flags=epoch(1), data=MIXED),
    Run("upstream-lora-4-mixed", "upstream", 4, flags=epoch(4), data=MIXED),
    Run("upstream-lora-16-mixed", "upstream", 16, flags=epoch(16), data=MIXED),
    Run("upstream-lora-4-mixed-expandable", "upstream", 4, flags=epoch(4), data=MIXED, allocator=EXPANDABLE),
    Run("upstream-lora-16-mixed-expandable", "upstream", 16, flags=epoch(16), data=MIXED, allocator=EXPANDABLE),
]


def prepare(options: argparse.Namespace) -> int:
    """The samples, the folders' configurations and tokenizer, and a script for each run."""
    samples = json.loads(options.data.read_text(encoding="utf-8"))
    work = options.work
    (work / "scripts").mkdir(parents=True, exist_ok=True)
    folders = work / "zoo"
    if not (folders / "LLM/gemma/gemma-2b-it/tokenizer.json").is_file():
        _configurations(folders, samples, options.size)
    longest = max(samples, key=lambda sample: _tokens(folders, sample))
    for name, repeated in (("samples.json", [longest]), (MIXED, samples)):
        many = [{**repeated[number % len(repeated)], "id": str(number)} for number in range(SAMPLES)]
        (work / name).write_text(json.dumps(many), encoding="utf-8")
    for name, config in MODELS.items():
        (folders / name).mkdir(exist_ok=True)
        written = tiny(config) if options.size == "tiny" else config
        (folders / name / "config.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    for run in chosen(options):
        (work / "scripts" / f"{run.name}.sh").write_text(script(options, run), encoding="utf-8")
    print(f"{len(chosen(options))} scripts in {work / 'scripts'}")
    return 0


def _configurations(folders: Path, samples: list[dict[str, Any]], size: str) -> None:
    """What ``upstream.make_zoo`` writes beside the weights: models on the meta device have the same configurations."""
    import torch

    from lorapatch.demo import zoo
    from lorapatch.demo.tokenizer import train_tokenizer

    language = folders / zoo.FOLDERS["language"]
    tokens = train_tokenizer((turn["value"] for s in samples for turn in s["conversations"]), language)
    true = zoo.SIZES["true"]
    shape = zoo.Size(zoo.SIZES[size].language, zoo.SIZES[size].vision, true.vision_aux, true.embed)
    models = zoo.build(shape, tokens=tokens, device="meta", dtype=torch.bfloat16)
    for model, name in ((models.language, "language"), (models.vision, "vision")):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folders / zoo.FOLDERS[name])
    aux = folders / zoo.FOLDERS["vision_aux"]
    aux.mkdir(parents=True, exist_ok=True)
    zoo._dump(aux / "open_clip_config.json", zoo._open_clip_config(shape))


def _tokens(folders: Path, sample: dict[str, Any]) -> int:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folders / "LLM/gemma/gemma-2b-it/tokenizer.json"))
    return sum(len(tokenizer.encode(turn["value"]).ids) for turn in sample["conversations"])


def chosen(options: argparse.Namespace) -> list[Run]:
    """The runs that ``--only`` names, all without it."""
    return [run for run in RUNS if not options.only or run.name in options.only]


def script(options: argparse.Namespace, run: Run) -> str:
    """The launch as somebody would write it."""
    words = _plain_words(options, run) if run.trainer == "plain" else _mgm_words(options, run)
    launch = " \\\n    ".join(words)
    if run.allocator:
        launch = f"export PYTORCH_CUDA_ALLOC_CONF={run.allocator}\n{launch}"
    return f"#!/bin/bash\n# {run.name}\n{launch}\n"


def _launcher(run: Run, *trainer: str) -> list[str]:
    words = " ".join(trainer)
    if run.deepspeed is not None:
        module = words.replace("-m ", "--module ")
        return [f'deepspeed --num_gpus {run.gpus} --master_port "$MASTER_PORT" {module}']
    if run.gpus > 1:
        return [f'torchrun --nproc_per_node {run.gpus} --master_port "$MASTER_PORT" {words}']
    return [f"{shlex.quote(sys.executable)} {words}"]


def _mgm_words(options: argparse.Namespace, run: Run) -> list[str]:
    pair = upstream.Run(run.trainer, run.micro_batch, 2)
    words = upstream.flags(options, pair)
    values = dict(zip(words[::2], words[1::2], strict=True))
    values["--output_dir"] = str(options.work / "runs" / run.name)
    values["--data_path"] = str(options.work / run.data)
    values |= {f"--{name}": str(value) for name, value in run.flags.items()}
    if run.deepspeed is None:
        del values["--deepspeed"]
    else:
        values["--deepspeed"] = str(CONFIGURATIONS / f"{run.deepspeed}.json")
    if not run.lora:
        values = {name: value for name, value in values.items() if not name.startswith("--lora")}
    trainer = ["-m", "lorapatch.trainer.train"]
    if run.trainer == "upstream":
        trainer = [shlex.quote(str(options.upstream / "mgm/train/train.py"))]
    return [*_launcher(run, *trainer), *(f"{name} {shlex.quote(value)}" for name, value in values.items())]


def _plain_words(options: argparse.Namespace, run: Run) -> list[str]:
    values: dict[str, Any] = {
        "model_name_or_path": options.work / "zoo" / run.model,
        "output_dir": options.work / "runs" / run.name,
        "max_steps": options.steps,
        "per_device_train_batch_size": run.micro_batch,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "bf16": True,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "gradient_checkpointing": True,
        "report_to": "none",
        **({"deepspeed": CONFIGURATIONS / f"{run.deepspeed}.json"} if run.deepspeed is not None else {}),
        **({"lora_enable": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1} if run.lora else {}),
        **run.flags,
    }
    trainer = _launcher(run, shlex.quote(str(HERE / "plain_trainer.py")))
    return [*trainer, *(f"--{name} {shlex.quote(str(value))}" for name, value in values.items())]


def predict(options: argparse.Namespace) -> int:
    """Estimate every script, write ``predictions.json``: what is there already stays as it is."""
    path = options.work / "predictions.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    runs = [run for run in chosen(options) if run.name not in known]
    with ThreadPoolExecutor(options.jobs) as pool:
        for run, found in zip(runs, pool.map(lambda run: _predict(options, run), runs), strict=True):
            known[run.name] = {**found, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            print(run.name, found.get("way", ""), found.get("allocated", found.get("refused")), flush=True)
    return 0


def _predict(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """The side of the estimate that the script describes, in bytes; by a process of its own, as a user asks for it."""
    python = options.upstream_python if run.trainer == "upstream" else options.python
    sides = ["after" if run.lora else "before"]
    command = [sys.executable, "-m", "lorapatch.cli", "estimate", str(options.work / "scripts" / f"{run.name}.sh")]
    command += ["--json", "--gpu", options.gpu, *(["--python", python] if python else [])]
    if run.trainer == "plain":
        command += ["--seq", str(run.flags["sequence"])]
    started = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {"refused": ended.stderr.strip()[-500:]}
    side = json.loads(ended.stdout)[sides[0]]
    return {**side["breakdown"], **{name: side[name] for name in ("allocated", "reserved", "device")},
            "seconds": round(time.monotonic() - started, 1)}  # fmt: skip


class Card:
    """The first GPU's memory, shared out among the runs by what each is predicted to take.

    A run of several GPUs takes as much of each of the others, and no other run is there: the first is the fullest.
    """

    def __init__(self, free_B: float, slots: int) -> None:
        self.free, self.slots = free_B, slots
        self.changed = threading.Condition()

    def take(self, size_B: float) -> None:
        """Wait until ``size_B`` bytes and a slot are free."""
        with self.changed:
            self.changed.wait_for(lambda: self.free >= size_B and self.slots)
            self.free -= size_B
            self.slots -= 1

    def give(self, size_B: float) -> None:
        """What :meth:`take` took."""
        with self.changed:
            self.free += size_B
            self.slots += 1
            self.changed.notify_all()


def measure(options: argparse.Namespace) -> int:
    """Make the weights, run what is predicted, the largest first; ``measured.json`` and the table."""
    predictions = json.loads((options.work / "predictions.json").read_text())
    gpus = len(Gpus())
    for run in chosen(options):
        if run.gpus > gpus:
            print(f"{run.name} is left out: GPUs that it takes: {run.gpus}, that are here: {gpus}", flush=True)
    runs = [run for run in chosen(options) if run.name in predictions and run.gpus <= gpus]
    samples = json.loads(options.data.read_text(encoding="utf-8"))
    if not (options.work / "zoo/parameters.json").is_file():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # its GPU memory is gone with it
            process.submit(upstream.make_zoo, options.work / "zoo", samples, options.size).result()
    for name in ("logs", "runs"):
        (options.work / name).mkdir(exist_ok=True)
    card = Card(options.card * GIB, options.jobs)
    sizes = {run.name: _size(predictions[run.name], options.card) for run in runs}
    runs.sort(key=lambda run: -sizes[run.name])
    path = options.work / "measured.json"
    measured = json.loads(path.read_text()) if path.is_file() else {}

    def one(run: Run) -> None:
        card.take(sizes[run.name])
        try:
            measured[run.name] = _measure(options, run)
        finally:
            card.give(sizes[run.name])
        path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        print(row(run, predictions[run.name], measured[run.name]), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, runs))
    print()
    return table(options)


def _size(prediction: dict[str, Any], card_GiB: float) -> float:
    likely = _expected(prediction["device"]) if "device" in prediction else card_GiB * GIB / 2
    return min(likely * 1.1 + 2 * GIB, card_GiB * GIB)


def _measure(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    log = options.work / "logs" / f"{run.name}.log"
    environment = upstream.environment(options, upstream.Run(run.trainer, run.micro_batch, 2))
    environment |= {
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "8" if run.offloads else "2",  # the optimizer's step is the CPU's
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(run.gpus))),  # a plain Trainer takes all that it sees
    }
    if run.deepspeed is None and run.gpus == 1:
        environment["OBSERVE_PYTHON"] = "1"
    started = time.monotonic()
    with log.open("wb") as file:
        command = ["timeout", str(options.timeout), "bash", str(options.work / "scripts" / f"{run.name}.sh")]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    shutil.rmtree(options.work / "runs" / run.name, ignore_errors=True)
    found: dict[str, Any] = {"exit": code, "seconds": round(time.monotonic() - started, 1), "losses": []}
    parser, ranks = LogParser(), []
    for event in (*parser.feed(log.read_bytes()), *parser.close()):
        if isinstance(event, Metrics) and "loss" in event.values:
            found["losses"].append(event.values["loss"])
        elif isinstance(event, Announcement) and event.kind == "observer":
            ranks.append(event.data)
    for rank in ranks:
        if rank["rank"] == "0":  # is what the prediction is compared with
            found |= {**rank, "largest_device_used_B": max(other["device_used_B"] or 0 for other in ranks)}
    return found


def row(run: Run, prediction: dict[str, Any], measured: dict[str, Any]) -> str:
    """A line of the table: predicted, measured and error of allocated, reserved and device."""
    cells = [run.name]
    for name, key in (("allocated", "peak_allocated_B"), ("reserved", "peak_reserved_B"), ("device", "device_used_B")):
        cells += _compared(_expected(prediction[name]) if name in prediction else None, measured.get(key))
    end = f"{len(measured.get('losses', []))} steps, exit {measured.get('exit')}"
    if run.gpus > 1:
        end += f", largest device {(measured.get('largest_device_used_B') or 0) / GIB:.3f}"
    return f"| {' | '.join(cells)} | {end} |"


def _compared(guess: float | None, real: float | None) -> list[str]:
    """Predicted and measured bytes in GiB, and how far the first is off."""
    error = f"{100 * (guess - real) / real:+.2f} %" if guess and real else "n/a"
    return [f"{value / GIB:.3f}" if value else "n/a" for value in (guess, real)] + [error]


def table(options: argparse.Namespace) -> int:
    """Everything measured beside what was predicted, and beside what the peers say."""
    predictions = json.loads((options.work / "predictions.json").read_text())
    measured = json.loads((options.work / "measured.json").read_text())
    names = ("allocated", "measured", "error", "reserved", "measured", "error", "device", "measured", "error")
    print(f"| run | {' | '.join(names)} | end |\n|{' --- |' * 11}")
    for run in RUNS:
        if run.name in measured:
            print(row(run, predictions[run.name], measured[run.name]))
    for line in (*hosts(predictions, measured), *peers(options, predictions, measured)):
        print(line)
    return 0


def hosts(predictions: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """What the runs that offload have in the CPU's memory: predicted, all tensors' bytes, and the whole process's peak."""
    lines = ["", "| run | host tensors GiB | measured | error | VmHWM |", "|" + " --- |" * 5]
    for run in RUNS:
        if run.offloads and run.name in measured:
            real = measured[run.name]
            cells = _compared(predictions[run.name].get("host"), real.get("host_tensors_B"))
            lines.append(f"| {run.name} | {' | '.join(cells)} | {(real.get('host_peak_B') or 0) / GIB:.3f} |")
    return lines if len(lines) > 3 else []


def peers(options: argparse.Namespace, predictions: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """What DeepSpeed's and accelerate's estimators say of the same runs (they know neither LoRA nor activations)."""
    lines = ["", "| run | measured GiB | deepspeed's estimator | accelerate's | closed form |", "|" + " --- |" * 5]
    for run in RUNS:
        real = measured.get(run.name, {}).get("peak_allocated_B")
        total = predictions.get(run.name, {}).get("total_parameters")
        if real and total:
            cells = [_with_error(guess, real) for guess in (_deepspeed(run, total), _accelerate(total))]
            cells.append(_with_error(_closed_form(options, run), real))
            lines.append(f"| {run.name} | {real / GIB:.2f} | {' | '.join(cells)} |")
    return lines


def _with_error(guess: float | None, real: int) -> str:
    return "n/a" if guess is None else f"{guess / GIB:.2f} ({100 * (guess - real) / real:+.0f} %)"


def _deepspeed(run: Run, total: int) -> float | None:
    """What DeepSpeed's own estimators answer for a model of ``total`` parameters, for each GPU."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    if run.deepspeed is None:
        return None
    same = {"num_gpus_per_node": run.gpus, "num_nodes": 1, "cpu_offload": run.offloads}
    if run.deepspeed.startswith("zero2"):
        return float(estimate_zero2_model_states_mem_needs(total, **same)[1])
    language = MODELS.get(run.model, {"vocab_size": 256_000, "hidden_size": 2048})
    largest = language["vocab_size"] * language["hidden_size"]  # the embedding
    return float(estimate_zero3_model_states_mem_needs(total, largest, cpu_offload_params=run.offloads, **same)[1])


def _accelerate(total: int) -> float:
    """`accelerate estimate-memory` for training with Adam in bf16: its largest step."""
    from accelerate.commands.estimate import estimate_training_usage

    return float(max(estimate_training_usage(4 * total, "bfloat16").values()))


def _closed_form(options: argparse.Namespace, run: Run) -> float | None:
    command = [sys.executable, "-m", "lorapatch.cli", "estimate", str(options.work / "scripts" / f"{run.name}.sh")]
    command += ["--json", "--fast", *(["--seq", str(run.flags["sequence"])] if run.trainer == "plain" else [])]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        return None
    return float(_expected(json.loads(ended.stdout)["after" if run.lora else "before"]["allocated"]))


def _expected(bounds: Any) -> float:
    return float(bounds["expected"] if isinstance(bounds, dict) else bounds[1])


def main(argv: list[str]) -> int:
    """Run the part that is asked for."""
    if not argv:
        print("needs samples and a GPU; nothing was run (--help says how)")
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["prepare", "predict", "measure", "table"])
    parser.add_argument("--work", type=Path, default=Path("build/memory"), help="scripts, weights, logs and results")
    parser.add_argument("--data", type=Path, help="samples in LLaVA's format, each with an image")
    parser.add_argument("--images", type=Path, help="folder that the samples' image paths begin in")
    parser.add_argument("--upstream", type=Path, default=Path("MGM"), help="folder that holds upstream's mgm/")
    parser.add_argument("--upstream-path", default="", help="folders of the packages it pins, as in PYTHONPATH")
    parser.add_argument("--python", help="interpreter whose libraries are traced")
    parser.add_argument("--upstream-python", help="the same for upstream's runs")
    parser.add_argument("--gpu", default="H200", help="the card that is predicted")
    parser.add_argument("--card", type=float, default=130, help="GiB of it that the runs may share")
    parser.add_argument("--jobs", type=int, default=4, help="runs or predictions at the same time")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="names of runs")
    parser.add_argument("--size", choices=["tiny", "true"], default="true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=200, help="seconds a run may take")
    options = parser.parse_args(argv)
    for name in ("data", "images", "work", "upstream"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).absolute())
    return {"prepare": prepare, "predict": predict, "measure": measure, "table": table}[options.part](options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
