"""Real DeepSpeed on the CPU, two ranks: a smoke, Ctrl-C in the middle, a run that is killed and resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorapatch.adapter.inspect import inspect_adapter
from lorapatch.launch import read_script
from lorapatch.lora.patch import patch_script
from lorapatch.run.finish import Report
from lorapatch.run.folder import read_jsonl
from lorapatch.run.nodes import node_commands
from lorapatch.run.options import free_port
from lorapatch.run.processes import COOKIE
from lorapatch.run.runs import RunOptions, full, smoke

pytestmark = pytest.mark.train
for _name in ("torch", "transformers", "peft", "deepspeed", "psutil"):
    pytest.importorskip(_name)

SCRIPT = """#!/bin/bash
HERE=$(cd "$(dirname "$0")" && pwd)
deepspeed $HERE/train.py \\
    --deepspeed $HERE/zero2.json \\
    --output_dir $HERE/out \\
    --use_cpu True \\
    --bf16 True \\
    --max_steps 12 \\
    --save_steps 4 \\
    --logging_steps 1 \\
    --per_device_train_batch_size 2 \\
    --gradient_accumulation_steps 2 \\
    --learning_rate 5e-3 \\
    --report_to none 2>&1 | tee $HERE/train.log
"""
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(Path(__file__).with_name("real_trainer.py"), tmp_path / "train.py")
    (tmp_path / "zero2.json").write_text(json.dumps(ZERO2))
    path = tmp_path / "train.sh"
    path.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    return path


def options(tmp_path: Path, ranks: int = 2) -> RunOptions:
    return RunOptions(runs=tmp_path / "runs", interval_s=1, timeout_s=400, num_gpus=ranks)


def lines(report: Report) -> dict[str, str]:
    return {line.what: line.state for line in report.verdict.lines}


def test_a_smoke_of_two_ranks_under_zero_2_passes(script: Path, tmp_path: Path) -> None:
    report = smoke(script, None, options(tmp_path))
    assert report.passed, (report.sentence, (report.folder / "log.txt").read_text()[-3000:])
    others = {what: state for what, state in lines(report).items() if state != "pass"}
    assert set(others.values()) == {"not checked"}
    # No budget was given, and the trainer makes its base model itself.
    assert set(others) == {"the peak is under the budget", "loaded with its base, the adapter works"}
    launch, metrics = report.record["launch"], report.record["metrics"]
    assert [argv[3] for argv in launch["ranks"]] == ["--local_rank=0", "--local_rank=1"]
    assert launch["environment"]["WORLD_SIZE"] == "2"
    assert launch["argv"][launch["argv"].index("--master_port") + 1] not in ("29500", "")
    assert metrics["step"] == metrics["total_steps"] == 5 and metrics["trainer"]["trainable"]["trainable"] > 0
    assert report.record["versions"]["deepspeed"] and report.record["versions"]["torch"]
    assert report.record["adapter"]["lora_parameters"] == metrics["trainer"]["trainable"]["trainable"]
    steps = read_jsonl(report.folder / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5] and all(
        step["learning_rate"] is not None for step in steps
    )
    assert report.record["memory"]["host_rss_peak_B"] > 400 << 20
    assert not (tmp_path / "out").exists()


def test_ctrl_c_reaches_both_ranks_and_nothing_is_left(script: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            found = list((tmp_path / "runs").glob("*/metrics.jsonl"))
            if found and len(read_jsonl(found[0])) >= 2:
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    report = smoke(script, None, options(tmp_path), max_steps=100_000)
    assert report.record["outcome"]["state"] == "interrupted"
    assert report.record["metrics"]["step"] >= 2
    assert [path for path in Path("/proc").glob("[0-9]*/environ") if _is_ours(path, tmp_path)] == []


def _is_ours(environ: Path, folder: Path) -> bool:
    try:
        return (
            COOKIE.encode() in environ.read_bytes() and os.fsencode(folder) in environ.with_name("cmdline").read_bytes()
        )
    except OSError:
        return False


def test_the_commands_of_a_dry_run_train_on_two_nodes(script: Path, tmp_path: Path) -> None:
    script.write_text(script.read_text().replace("--max_steps 12", "--max_steps 3"))
    patch_script(script)
    read = read_script(script)
    nodes = node_commands(read, read.launches[0], {"127.0.0.1": 1, "localhost": 1}, port=free_port())
    logs = [tmp_path / f"node{node.rank}.txt" for node in nodes]
    ranks = []
    for node, log in zip(nodes, logs):
        with log.open("wb") as file:
            ranks.append(
                subprocess.Popen(["bash", "-c", node.command], stdout=file, stderr=file, start_new_session=True)
            )
    try:
        codes = [rank.wait(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert "dist_world_size=2" in logs[0].read_text() and "3/3" in logs[0].read_text()
    assert inspect_adapter(tmp_path / "out").moved > 0


def test_a_run_killed_in_the_middle_is_resumed_to_its_end(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILL_AT", "6")
    killed = full(script, None, options(tmp_path, 1))
    assert killed.exit_code != 0 and killed.diagnosis is not None and killed.diagnosis.id == "host-oom", killed.sentence
    assert lines(killed)["ran to the last step"] == "fail"
    report = full(script, None, options(tmp_path, 1), resume=True)
    assert report.passed, (report.sentence, (report.folder / "log.txt").read_text()[-3000:])
    assert report.record["resumed_from"] == 4 and lines(report)["went on from step 4"] == "pass"
    assert [step["step"] for step in read_jsonl(report.folder / "metrics.jsonl")] == list(range(5, 13))
    assert report.record["metrics"]["last_loss"] < killed.record["metrics"]["first_loss"]
