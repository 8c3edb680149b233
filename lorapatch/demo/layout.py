"""Lay out the miniature of the competition toolkit: the same paths as the real one, made on the spot."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused, UsageError
from lorapatch.resources import resource_dir

__all__ = ["SCRIPT", "VERSION", "make_demo"]

SCRIPT = "train_mgm_2b_stage_1_10k_baseline.sh"
STAMP = ".lorapatch_demo.json"
VERSION = 1  # of what make_demo lays out
NEEDED = {"tiny": 1 << 27, "true": 6 << 30}  # free bytes on disk
OURS = ("toolkit", "input")  # what it lays out; output/ belongs to the script

Progress = Callable[[str, int, int], None]

TRAINER = """import torch

from lorapatch.trainer.train import main

if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # the loader's workers need the other cores, and a tiny model no second one
    raise SystemExit(main())
"""
# The other Python files of the toolkit, and the function each starts.
STARTERS = {
    "training/mgm/eval/model_vqa_loader.py": ("lorapatch.demo.evaluation", "answer_textvqa"),
    "training/mgm/eval/model_vqa_mmbench.py": ("lorapatch.demo.evaluation", "answer_mmbench"),
    "training/mgm/eval/eval_textvqa.py": ("lorapatch.demo.evaluation", "score_textvqa"),
    "training/mgm/eval/eval_mmbench.py": ("lorapatch.demo.evaluation", "score_mmbench"),
    "training/preprocess/check_global_batch_size.py": ("lorapatch.demo.preprocess", "check_global_batch_size"),
    "training/preprocess/check_sample_number.py": ("lorapatch.demo.preprocess", "check_sample_number"),
    "data-juicer/tools/multimodal/data_juicer_format_to_target_format/dj_to_llava.py": (
        "lorapatch.demo.dj_to_llava",
        "dj_to_llava",
    ),
}


def make_demo(
    directory: str | Path, *, size: str = "tiny", device: str = "cpu", seed: int = 0, progress: Progress | None = None
) -> Path:
    """Lay out the miniature toolkit in ``directory`` and return its ``toolkit`` folder, where the script is.

    ``size`` "tiny" trains in minutes on two cores and its models get a short real training; "true" has the true sizes
    (2,506,172,416 + 303,507,456 + 199,770,816 parameters, 5.7 GiB) and random bf16 weights, made on ``device``.
    ``progress(what, done, total)`` is called as the work goes on. A finished demo of the same size and seed is left as it
    is; an interrupted one is made again.

    Raises UsageError for an unknown size or device, Refused for a directory that holds something else.
    """
    from lorapatch.demo.zoo import SIZES

    if size not in SIZES:
        raise UsageError(f"--size {size}: choose one of {', '.join(SIZES)}.")
    root = Path(directory).absolute()
    wanted = {"version": VERSION, "size": size, "seed": seed}
    if _finished(root, wanted):
        return root / "toolkit"
    _check_device(device)
    _begin(root, wanted)
    if (free := shutil.disk_usage(root).free) < NEEDED[size]:
        raise Refused(f"{root}: {free / 2**30:.1f} GiB are free, a demo of size {size} needs {NEEDED[size] / 2**30:.1f}.")
    say = progress or (lambda what, done, total: None)
    try:
        _lay_out_files(root / "toolkit")
        _lay_out_data(root, random.Random(seed), say)
        figures = _lay_out_zoo(root / "toolkit" / "training" / "model_zoo", size, device, seed, say)
        _write_stamp(root, wanted | {"finished": True} | figures)
    except OSError as error:
        raise Refused(f"the demo in {root} is not finished: {error}; the same command makes it again.") from error
    return root / "toolkit"


def _finished(root: Path, wanted: dict[str, Any]) -> bool:
    """Whether ``root`` holds this demo already. Raises Refused when it holds another one, or something else."""
    try:
        found = _read_stamp(root)
        if not found and root.exists() and any(root.iterdir()):
            raise Refused(f"{root} is not empty and no earlier demo: name another directory.")
    except OSError as error:
        raise Refused(f"cannot make a demo in {root}: {error.strerror}.") from error
    if not found.get("finished"):
        return False
    if {name: found.get(name) for name in wanted} != wanted:
        raise Refused(
            f"{root} holds a demo of size {found.get('size')}, seed {found.get('seed')}, layout {found.get('version')}: "
            "name another directory, or remove it."
        )
    return True


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _begin(root: Path, wanted: dict[str, Any]) -> None:
    """Leave a stamp in ``root`` and nothing of an interrupted demo. Raises Refused."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        _write_stamp(root, wanted | {"finished": False})
        for name in OURS:
            if (root / name).exists():
                shutil.rmtree(root / name)
    except OSError as error:
        raise Refused(f"cannot make a demo in {root}: {error.strerror}.") from error


def _read_stamp(root: Path) -> dict[str, Any]:
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"finished": False}  # cut off while it was written
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(root: Path, stamp: dict[str, Any]) -> None:
    (root / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def _lay_out_files(toolkit: Path) -> None:
    """The script, the shell and JSON files as they travel with lorapatch, and a starter for each Python file."""
    shutil.copytree(Path(__file__).with_name("toolkit"), toolkit)
    script = toolkit / SCRIPT
    shutil.copyfile(resource_dir("original_scripts") / SCRIPT, script)
    for shell in (script, *toolkit.glob("eval/*.sh")):
        shell.chmod(0o755)
    starters = {name: _starter(module, function) for name, (module, function) in STARTERS.items()}
    for name, text in (starters | {"training/mgm/train/train_mem.py": TRAINER}).items():
        path = toolkit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _starter(module: str, function: str) -> str:
    imports = f"from {module} import {function}\nfrom lorapatch.demo.preprocess import tool\n"
    if module == "lorapatch.demo.preprocess":
        imports = f"from {module} import {function}, tool\n"
    return f'{imports}\nif __name__ == "__main__":\n    raise SystemExit(tool({function}))\n'


def _lay_out_data(root: Path, rng: random.Random, say: Progress) -> None:
    from lorapatch.demo import data

    folders = (
        (data.write_pretraining, root / "input" / "pretrain_stage_1_10k"),
        (data.write_finetuning, root / "toolkit" / "training" / "data" / "finetuning_stage_1_12k"),
        (data.write_evaluation, root / "toolkit" / "training" / "data" / "eval_stage_1"),
    )
    for done, (write, folder) in enumerate(folders):
        say("data", done, len(folders))
        folder.mkdir(parents=True)
        write(folder, rng)
    say("data", len(folders), len(folders))


def _lay_out_zoo(folder: Path, size: str, device: str, seed: int, say: Progress) -> dict[str, Any]:
    """Tokenizer and models; the figures for the stamp: parameters, and what the tiny ones have learned."""
    import torch
    from transformers import AutoTokenizer

    from lorapatch.demo import data, pretraining, zoo
    from lorapatch.demo.tokenizer import train_tokenizer

    tiny = size == "tiny"
    total = pretraining.STEPS + 1 if tiny else 2
    say("model zoo", 0, total)
    language = folder / zoo.FOLDERS["language"]
    tokens = train_tokenizer(data.corpus(random.Random(seed)), language)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = zoo.build(
            zoo.SIZES[size], tokens=tokens, device=device, dtype=torch.float32 if tiny else torch.bfloat16
        )
    figures: dict[str, Any] = {"parameters": models.parameters()}
    if tiny:
        figures["accuracy"] = pretraining.pretrain(
            models, AutoTokenizer.from_pretrained(language), seed=seed, report=lambda step: say("model zoo", step, total)
        )
    say("model zoo", total - 1, total)
    zoo.save(models, zoo.SIZES[size], folder)
    say("model zoo", total, total)
    return figures
