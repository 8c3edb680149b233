"""What `lorapatch smoke` costs over `bash test_lora_minimal.sh` by hand: wall time of both, turn by turn, side by side.

    python benchmarks/run_overhead.py [TURNS]

Twice: with real DeepSpeed on the CPU (the tiny trainer of the tests), whose own time varies by seconds, and with a
trainer that only waits 10 s, which shows the cost itself. The limit is 3 % of the wall time plus 1 s. The adapter is not
loaded afterwards (--no-verify): bash does not do that either.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from lorapatch.run.options import free_port

TESTS = Path(__file__).resolve().parents[1] / "tests" / "run"
sys.path.insert(0, str(TESTS))
LIMIT_SHARE, LIMIT_S = 0.03, 1.0
SCRIPT = """#!/bin/bash
HERE=$(cd "$(dirname "$0")" && pwd)
deepspeed --num_gpus 1 $HERE/train.py \\
    --deepspeed $HERE/zero2.json \\
    --output_dir $HERE/out \\
    --use_cpu True \\
    --bf16 True \\
    --per_device_train_batch_size 2 \\
    --learning_rate 5e-3 \\
    --report_to none 2>&1 | tee $HERE/train.log
"""
ZERO2 = {
    "zero_optimization": {"stage": 2},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}


def real_kit(folder: Path) -> Path:
    """A toolkit of one stage with a real trainer; returns its script."""
    folder.mkdir()
    shutil.copy(TESTS / "real_trainer.py", folder / "train.py")
    (folder / "zero2.json").write_text(json.dumps(ZERO2))
    script = folder / "train.sh"
    script.write_text(SCRIPT)
    return script


def waiting_kit(folder: Path) -> Path:
    """A toolkit whose trainer waits a quarter of a second a step."""
    from toykit import make_toykit

    script = make_toykit(folder)
    script.write_text(script.read_text().replace("--learning_rate 2e-4", "--learning_rate 2e-4 --step_s 0.25"))
    return script


def timed(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Seconds of wall time; the output is dropped. Raises CalledProcessError."""
    begun = time.perf_counter()
    nowhere = subprocess.DEVNULL
    subprocess.run(command, cwd=folder, env=environment, stdout=nowhere, stderr=nowhere, check=True)
    return time.perf_counter() - begun


def compare(what: str, script: Path, turns: int) -> bool:
    """Print every turn and the medians; whether the limit is kept."""
    folder = script.parent
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    smoke = [str(binaries / "lorapatch"), "smoke", str(script), "--max-steps", "40", "--save-steps", "20", "--no-verify"]
    by_hand = ["bash", str(folder / "test_lora_minimal.sh")]
    timed(smoke, folder, environment)  # patches, renders, and compiles DeepSpeed's operations
    hand, ours = [], []
    print(f"{what}\n{'turn':>4} {'bash by hand':>14} {'lorapatch smoke':>16} {'difference':>12}")
    for turn in range(1, turns + 1):
        port = {"MASTER_PORT": str(free_port())}  # another training on this machine may hold 29500
        hand.append(timed(by_hand, folder, environment | port))
        ours.append(timed(smoke, folder, environment))
        print(f"{turn:4} {hand[-1]:12.2f} s {ours[-1]:14.2f} s {ours[-1] - hand[-1]:10.2f} s", flush=True)
    cost, limit = median(ours) - median(hand), LIMIT_SHARE * median(hand) + LIMIT_S
    print(f"medians {median(hand):.2f} s and {median(ours):.2f} s: overhead {cost:+.2f} s, limit {limit:.2f} s\n")
    return cost <= limit


def main(turns: int) -> None:
    """Both comparisons; exit 1 when a limit is exceeded."""
    with tempfile.TemporaryDirectory() as place:
        kept = [
            compare("a trainer that only waits", waiting_kit(Path(place) / "waiting"), turns),
            compare("real DeepSpeed, ZeRO-2", real_kit(Path(place) / "real"), turns),
        ]
    if not all(kept):
        sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
