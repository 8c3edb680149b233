"""`lorapatch tune` on the plan's script in the demo toolkit, DeepSpeed on the CPU, with a budget of host memory."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lorapatch.launch import read_script
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.flags import PatchOptions
from lorapatch.run.runs import RunOptions
from lorapatch.run.view import PlainView
from lorapatch.tune import Goal, Prediction, Trial, TuneOptions, decide, tune
from lorapatch.tune.decide import Decision
from lorapatch.tune.script import read_tuned
from lorapatch.tune.trials import Runner

pytestmark = pytest.mark.train

SCRIPT = "train_mgm_2b_stage_1_10k_baseline.sh"
ONE_WORKER = {
    "per_device_train_batch_size": "16",
    "gradient_accumulation_steps": "1",
    "dataloader_num_workers": "1",
}
# Without workers what is left of the host memory is the trainer's own, and that goes with the micro-batch.
LARGE = {"per_device_train_batch_size": "96", "gradient_accumulation_steps": "1", "dataloader_num_workers": "0"}


@pytest.fixture
def script(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script in a folder of its own, beside the shared toolkit's parts."""
    kit = tmp_path / "toolkit"
    kit.mkdir()
    for name in ("training", "eval", "data-juicer"):
        (kit / name).symlink_to(demo / name)
    shutil.copy(demo / SCRIPT, kit)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.chdir(kit)
    monkeypatch.setattr(decide, "PROBE_STEPS", 1)  # of so many samples one is enough
    return kit / SCRIPT


def test_the_ladder_shrinks_into_host_memory(script: Path, tmp_path: Path) -> None:
    patch = PatchOptions(learning_rate=2e-4, extra=LARGE)
    view = PlainView(print)
    tuned = read_tuned(script, patch, None)
    options = RunOptions(runs=tmp_path / "runs", interval_s=1, timeout_s=400)
    first = Runner(tuned, Goal(1 << 40), options, view, gpu=False)(
        1, Decision("how much it takes", tuned.start, "probe", 1), None, 400
    )
    assert first.fits and first.measured_B is not None, first.cause
    goal = Goal(first.measured_B * 93 // 100, prefer="memory", max_runs=2)
    real = Runner(tuned, goal, options, view, gpu=False)

    def run(number: int, decision: Decision, predicted: Prediction | None, timeout_s: float | None) -> Trial:
        """The script's own settings were run just now: for this budget they are too large."""
        if decision.configuration == tuned.start:
            return replace(first, number=number, outcome="over", predicted=predicted)
        return real(number, decision, predicted, timeout_s)

    before = script.read_bytes()
    done = tune(script, goal, patch, TuneOptions(runs=tmp_path / "tunes"), run_trial=run, view=view)
    best = done.winner
    assert best is not None and done.passed and done.script is not None, [done.reason, done.rows]
    assert best.measured_B is not None and best.measured_B <= goal.budget_B < first.measured_B
    assert best.configuration.micro_batch < 96 and best.configuration.samples == 96
    assert best.samples_per_s and best.predicted is not None
    assert script.read_bytes() == before
    launch = choose_launch(read_script(done.script))
    assert launch.flag("per_device_train_batch_size").value == str(best.configuration.micro_batch)  # type: ignore[union-attr]


def test_a_learning_rate_that_diverges_is_brought_down_to_one_that_works(script: Path, tmp_path: Path) -> None:
    goal = Goal(64 << 30, prefer="memory", steps=(8,), max_runs=4)
    patch, view = PatchOptions(learning_rate=5e-3, extra=ONE_WORKER), PlainView(print)
    options = RunOptions(runs=tmp_path / "runs", interval_s=1)
    real = Runner(read_tuned(script, patch, None), goal, options, view, gpu=False)

    def run(number: int, decision: Decision, predicted: Prediction | None, timeout_s: float | None) -> Trial:
        """Memory is no matter here: the probe is one on paper."""
        if decision.purpose == "learn":
            return real(number, decision, predicted, timeout_s)
        assert decision.configuration is not None
        return Trial(number, "probe", decision.configuration, 1, 1, "", "fits", measured_B=2 << 30, samples_per_s=9.0)

    done = tune(script, goal, patch, TuneOptions(runs=tmp_path / "tunes"), run_trial=run, view=view)
    lessons = {t.configuration.learning_rate: t.learning.state for t in done.trials if t.purpose == "learn"}
    assert lessons[5e-3] in ("diverging", "nan", "spiking"), done.rows
    assert done.passed and done.winner is not None and done.winner.learning.learns, done.rows
    assert done.winner.configuration.learning_rate < 5e-3 and done.winner.losses[-1] < done.winner.losses[0]
    assert done.script is not None
    launch = choose_launch(read_script(done.script))
    assert float(launch.flag("learning_rate").value) == done.winner.configuration.learning_rate  # type: ignore[union-attr,arg-type]
