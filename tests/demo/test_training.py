"""The plan's script in the miniature toolkit, for real: DeepSpeed on the CPU, from the first line to the last."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lorapatch
from lorapatch.adapter.inspect import find_adapter
from lorapatch.demo import SCRIPT
from lorapatch.run.loaded import load_adapter

pytestmark = pytest.mark.train

LORA = (
    "    --lora_enable True \\\n    --lora_r 16 \\\n    --lora_alpha 32 \\\n"
    "    --lora_dropout 0.1 \\\n    --lora_bias none \\\n"
)
LAST_FLAG = "    --report_to none \\\n"
# The same 128 samples a step in fewer parts, and no more processes than it takes.
QUICK = {
    "FINETUNE_BATCH_SIZE_PER_GPU": "16", "FINETUNE_GRADIENT_ACCUMULATION_STEPS": "8",
    "FINETUNE_DATALOADER_NUM_WORKERS": "1",
}  # fmt: skip


def environment(folder: Path) -> dict[str, str]:
    """This Python first on PATH, and a ``deepspeed`` that takes a free port, as another run may have the usual one."""
    programs, stubs = Path(sys.executable).parent, folder / "bin"
    stubs.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (stubs / "deepspeed").write_text(f'#!/bin/bash\nexec "{programs}/deepspeed" --master_port {port} "$@"\n')
    (stubs / "deepspeed").chmod(0o755)
    path = f"{stubs}:{programs}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(words: list[str], folder: Path) -> str:
    """Run a command to its end; what it said."""
    ran = subprocess.run(
        words, env=environment(folder), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=900, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "Traceback" not in ran.stdout, ran.stdout[-3000:]
    return ran.stdout


def losses(folder: Path, log: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", (folder / log).read_text())]


def accuracy(toolkit: Path, name: str) -> dict[str, float]:
    results = toolkit.parent / "output" / "eval_results" / name
    return {
        benchmark: json.loads((results / benchmark / "score.json").read_text())["accuracy"]
        for benchmark in ("textvqa", "mmbench")
    }


@pytest.fixture(scope="module")
def trained(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toolkit after its script has run, unchanged."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(demo.parent, folder / "demo")
    run(["bash", str(folder / "demo/toolkit" / SCRIPT)], folder)
    return folder / "demo/toolkit"


@pytest.fixture(scope="module")
def before(trained: Path) -> dict[str, float]:
    """The held-out accuracy of what pre-training left."""
    for words in (["textvqa.sh", "MGM-2B-Pretrain-default", "0"],
                  ["mmbench.sh", "MGM-2B-Pretrain-default", "mmbench_dev_20230712", "0"]):  # fmt: skip
        run(["bash", str(trained / "eval" / words[0]), *words[1:]], trained.parent)
    return accuracy(trained, "MGM-2B-Pretrain-default")


def test_the_unchanged_script_runs_to_its_end_and_its_losses_fall(trained: Path) -> None:
    runs = trained.parent / "output" / "training_dirs"
    pretraining = losses(runs / "MGM-2B-Pretrain-default", "pretrain.log")
    assert len(pretraining) == 10
    assert pretraining[-1] < 0.6 * pretraining[0]
    finetuning = losses(runs / "MGM-2B-Finetune-default", "finetuning.log")
    assert len(finetuning) == 20
    assert sum(finetuning[-5:]) < 0.7 * sum(finetuning[:5])
    assert (trained.parent / "output" / "train.sh").read_bytes() == (trained / SCRIPT).read_bytes()


def test_fine_tuning_raises_the_accuracy_on_held_out_pictures(trained: Path, before: dict[str, float]) -> None:
    after = accuracy(trained, "MGM-2B-Finetune-default")
    print(f"held-out accuracy before fine-tuning {before}, after {after}")
    assert after["textvqa"] > before["textvqa"] + 0.05
    assert after["mmbench"] > before["mmbench"] + 0.1


def shortened(trained: Path, name: str, samples: int, **values: str) -> Path:
    """A copy of the toolkit as pre-training left it, with other settings in its script and less to fine-tune on."""
    toolkit = trained.parent.with_name(name) / "toolkit"
    shutil.copytree(trained.parent, toolkit.parent)
    for made in ("training_dirs", "eval_results"):
        shutil.rmtree(toolkit.parent / "output" / made / "MGM-2B-Finetune-default")
    data = toolkit / "training" / "data" / "finetuning_stage_1_12k" / "mgm_instruction_stage_1_12k.json"
    data.write_text(json.dumps(json.loads(data.read_text())[:samples]))
    text = (toolkit / SCRIPT).read_text()
    for old, new in (QUICK | values).items():
        text, found = re.subn(rf"^{old}=.*$", f"{old}={new}", text, flags=re.MULTILINE)
        assert found == 1, old
    (toolkit / SCRIPT).write_text(text)
    return toolkit


def small_lora(trained: Path, name: str, launch: str = "deepspeed", **values: str) -> Path:
    """The script with the plan's five flags in its fine-tuning command, two steps of data and few questions."""
    toolkit = shortened(trained, name, 256, **values)
    for table in (toolkit / "training/data/eval_stage_1").rglob("*.*"):
        if table.suffix in (".tsv", ".jsonl"):
            table.write_text("".join(table.read_text().splitlines(keepends=True)[:13]))
    text = (toolkit / SCRIPT).read_text()
    before, behind = text.rsplit(LAST_FLAG, 1)
    text = before + LAST_FLAG + LORA + behind
    start, end = text.rsplit("\ndeepspeed ", 1)
    (toolkit / SCRIPT).write_text(f"{start}\n{launch} {end}")
    return toolkit


def skip_pretraining(script: Path) -> None:
    """Take the first launch out: what it would make is there."""
    start, end = script.read_text().split("\ndeepspeed ", 1)
    script.write_text(start + end[end.index("\n\n") :])


@pytest.fixture(scope="module")
def lora(trained: Path) -> Path:
    toolkit = small_lora(trained, "lora")  # pre-training finds its checkpoint and adds no step
    run(["bash", str(toolkit / SCRIPT)], toolkit.parent)
    return toolkit


def test_the_script_with_the_plans_five_flags_trains_an_adapter_and_evaluates_it(lora: Path) -> None:
    tuned = lora.parent / "output/training_dirs/MGM-2B-Finetune-default"
    assert (tuned / "adapter_model.safetensors").stat().st_size > 100_000
    assert (tuned / "non_lora_trainables.bin").is_file()
    assert '"lorapatch": "lora"' in (tuned / "finetuning.log").read_text()
    assert len(losses(tuned, "finetuning.log")) == 2
    results = lora.parent / "output/eval_results/MGM-2B-Finetune-default"
    assert len((results / "textvqa/bm1.jsonl").read_text().splitlines()) == 13
    answers = results / "mmbench/answers/mmbench_dev_20230712/MGM-2B-Finetune-default.jsonl"
    assert len(answers.read_text().splitlines()) == 12
    seen = {finding.id: finding.state for finding in load_adapter(tuned)}  # as smoke and full do when a run has ended
    assert seen == {"loaded": "pass", "effect": "pass", "pictures": "pass", "answers": "not checked"}


def test_with_the_merge_the_scripts_own_evaluation_scores_the_tuned_model(
    trained: Path, before: dict[str, float]
) -> None:
    """LoRA at ten times the script's learning rate, merged behind its launch: the evaluation finds a whole model."""
    toolkit = shortened(trained, "merged", 1280)
    tuned = toolkit.parent / "output/training_dirs/MGM-2B-Finetune-default"
    lorapatch.patch_script(toolkit / SCRIPT, lorapatch.PatchOptions(learning_rate=2e-4), with_merge=True)
    skip_pretraining(toolkit / SCRIPT)
    run(["bash", str(toolkit / SCRIPT)], toolkit.parent)
    assert (tuned / "model.safetensors.index.json").is_file() and not (tuned / "adapter_config.json").exists()
    assert find_adapter(tuned) is not None  # kept beside
    after = accuracy(toolkit, "MGM-2B-Finetune-default")
    print(f"held-out accuracy of the base {before}, of the merged model {after}")
    assert after["textvqa"] > before["textvqa"] and after["mmbench"] > before["mmbench"]


def test_two_ranks_under_zero_3_have_the_losses_of_one_under_zero_2(lora: Path, trained: Path) -> None:
    toolkit = small_lora(trained, "ranks", "deepspeed --num_accelerators 2", FINETUNE_GRADIENT_ACCUMULATION_STEPS="4")
    script = toolkit / SCRIPT
    # The check counts one device where there is no GPU and no numactl: two ranks are this test's own idea.
    text = script.read_text().replace("$FINETUNE_GRADIENT_ACCUMULATION_STEPS 128`", "$FINETUNE_GRADIENT_ACCUMULATION_STEPS 64`")
    start, end = text.rsplit("zero2_offload.json", 1)
    script.write_text(f"{start}zero3.json{end}")
    skip_pretraining(script)
    run(["bash", str(script)], toolkit.parent)
    name = "MGM-2B-Finetune-default"
    one, two = (losses(root.parent / "output/training_dirs" / name, "finetuning.log") for root in (lora, toolkit))
    assert two == pytest.approx(one, abs=0.02)
    assert accuracy(toolkit, name).keys() == {"textvqa", "mmbench"}
