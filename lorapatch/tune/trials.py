"""One run of tuning: the stage alone, with a configuration, under the budget; and what it showed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lorapatch.launch import Launch
from lorapatch.run.finish import Report, Subject
from lorapatch.run.gpus import Gpus
from lorapatch.run.runs import RunOptions, StageRun, run_stage
from lorapatch.run.state import LoggedStep, RunState
from lorapatch.run.view import View
from lorapatch.run.watch import MemorySample
from lorapatch.tune.decide import Decision
from lorapatch.tune.learning import judge
from lorapatch.tune.script import TunedScript
from lorapatch.tune.trial import Goal, Prediction, Trial

__all__ = ["FRACTION", "Runner", "RunTrial", "Row", "Shown", "measured_bytes", "showed"]

# What the trainer hands to torch.cuda.set_per_process_memory_fraction, so that "out of memory" is what a smaller card says.
FRACTION = "LORAPATCH_MEMORY_FRACTION"
# CUDA context, cuBLAS, NCCL, where no prediction says: seen between 0.5 and 2.3 GiB.
_OUTSIDE, _MOST_OUTSIDE = 1 << 30, 3 << 30
# The first step makes the optimizer's states, the second is the first with everything there: from then on a peak is one.
_STEPS_TO_PEAK = 2
# On a GPU a probe needs no more micro-steps than it takes for gradients to be added to others; host memory goes on growing
# with the samples that went through it, so there a probe has the whole batch.
_PROBE_ACCUMULATION = 2

RunTrial = Callable[[int, Decision, Prediction | None, float | None], Trial]


@dataclass(frozen=True)
class Runner:
    """Runs what was decided. ``options`` are those of every run; each gets a folder of its own in ``options.runs``."""

    tuned: TunedScript
    goal: Goal
    options: RunOptions
    view: View
    gpu: bool

    def __call__(
        self, number: int, decision: Decision, predicted: Prediction | None, timeout_s: float | None
    ) -> Trial:
        """Run ``decision`` to its end, ``timeout_s`` seconds at most. Raises Refused if it cannot be started."""
        configuration = decision.configuration
        assert configuration is not None
        script, launch = self.tuned.with_configuration(configuration)
        probe = decision.purpose == "probe"
        accumulation = configuration.accumulation
        if probe and self.gpu:
            accumulation = min(accumulation, _PROBE_ACCUMULATION)
        flags = {} if probe else _evaluation(launch, decision.steps)
        if accumulation != configuration.accumulation:
            flags["gradient_accumulation_steps"] = str(accumulation)
        stage = StageRun(
            "probe" if probe else "tune",
            "probe",
            max_steps=decision.steps,
            save_steps=decision.steps,
            flags=flags,
            environment=self._limit(predicted),
        )
        options = replace(
            self.options,
            timeout_s=timeout_s,
            predicted=_as_estimate(predicted) if predicted is not None else None,
        )
        subject = Subject(self.tuned.path, self.tuned.original, script, launch.line)
        report = run_stage(subject, launch, stage, options, _Steps(self.view))
        rows = _logged(report)
        shown = showed(report, rows, self.goal.budget_B, predicted)
        return Trial(
            number,
            decision.purpose,
            configuration,
            decision.steps,
            accumulation,
            decision.reason,
            predicted=predicted,
            expected_B=decision.expected_B,
            samples_per_s=_samples_per_s(report.record["metrics"]),
            losses=tuple(row.loss for row in rows),
            seconds=report.record["outcome"]["wall_s"],
            folder=report.folder.name,
            rates=tuple(row.rate for row in rows),
            held_out=_held_out(report.record["metrics"]),
            first_step_s=round(rows[0].time - _began(report), 1) if rows else None,
            **shown._asdict(),
        )

    def _limit(self, predicted: Prediction | None) -> dict[str, str]:
        """The share of the GPU that the trainer's allocator may have: the budget without what is not the allocator's."""
        if not self.gpu:
            return {}
        gpus = Gpus()
        try:
            total = min((gpu.total_B for gpu in gpus.memory()), default=0)
        finally:
            gpus.close()
        outside = predicted.outside if predicted is not None and predicted.outside else _OUTSIDE
        share = (self.goal.budget_B - outside) / total if total else 1.0
        given = float(os.environ.get(FRACTION) or 1.0)
        return {FRACTION: f"{min(max(share, 0.01), given):.4f}"} if min(share, given) < 1 else {}


def _evaluation(launch: Launch, steps: int) -> dict[str, str]:
    """Where the script looks at held-out data, a learning run does so once, behind its last step."""
    flag = launch.flag("eval_strategy", "evaluation_strategy")
    if flag is None or (flag.value or "no").lower() == "no":
        return {}
    return {flag.name.lstrip("-"): "steps", "eval_steps": str(steps)}


def _held_out(metrics: Mapping[str, Any]) -> float | None:
    losses = [float(found["eval_loss"]) for found in metrics["evaluations"] if "eval_loss" in found]
    return losses[-1] if losses else None


def _as_estimate(predicted: Prediction) -> dict[str, Any]:
    """A prediction as `lorapatch.estimate` would put it into a run's record."""
    device = {"low": predicted.low, "expected": predicted.expected, "high": predicted.high}
    return {"device": device, "breakdown": {"way": predicted.way}}


@dataclass(frozen=True)
class _Steps:
    """A view without what was said before the first run already, and would be said again with each."""

    view: View

    def begin(self, title: str, state: RunState, budget_B: int | None) -> None:
        self.view.begin(title, state, budget_B)

    def say(self, sentence: str) -> None:
        pass

    def step(self, row: LoggedStep) -> None:
        self.view.step(row)

    def memory(self, sample: MemorySample) -> None:
        self.view.memory(sample)

    def end(self) -> None:
        self.view.end()


def measured_bytes(record: Mapping[str, Any], predicted: Prediction | None) -> int | None:
    """The peak of a run in bytes: of the GPU as nvidia-smi counts it, of host memory where it used none.

    The driver tells of the whole card, and other processes may come and go on it. So where the trainer says what its own
    allocator had, that counts, with the predicted context; without a prediction with what the card shows beyond it, if
    that can be a context. Of another trainer there is only what the card holds more than it did before the run.
    """
    memory, speed = record["memory"], record["metrics"]["trainer"].get("speed", {})
    if memory["device_peak_B"] is None:
        return memory["host_rss_peak_B"] or None
    before = max((gpu["before_B"] or 0 for gpu in memory["gpus"] if gpu["index"] in memory["gpus_of_run"]), default=0)
    growth = int(memory["device_peak_B"]) - before
    if not (reserved := int(speed.get("peak_reserved_B") or 0)):
        return growth
    if predicted is not None and predicted.outside:
        return reserved + predicted.outside
    return growth if 0 < growth - reserved <= _MOST_OUTSIDE else reserved + _OUTSIDE


class Row(NamedTuple):
    """A logged step: its time (seconds since 1970), its loss, the learning rate if that was logged."""

    time: float
    loss: float
    rate: float | None


def _logged(report: Report) -> list[Row]:
    from lorapatch.run.folder import read_jsonl

    rows = read_jsonl(Path(report.folder) / "metrics.jsonl")
    return [Row(float(row["time"]), float(row["loss"]), row.get("learning_rate")) for row in rows]


def _began(report: Report) -> float:
    return time.mktime(time.strptime(report.record["outcome"]["started"][:19], "%Y-%m-%dT%H:%M:%S"))


def _samples_per_s(metrics: Mapping[str, Any]) -> float | None:
    own = metrics["trainer"].get("speed", {}).get("samples_per_s")
    value = own if own is not None else metrics["samples_per_s"]
    return round(float(value), 3) if value is not None else None


class Shown(NamedTuple):
    """How a run ended for tuning: the fields of a `Trial` of these names."""

    outcome: str
    cause: str = ""
    measured_B: int | None = None
    diagnosis: str = ""
    remedy: str = ""


def showed(report: Report, rows: Sequence[Row], budget_B: int, predicted: Prediction | None) -> Shown:
    """What a run teaches. One that failed, or that was cut short before its peak, says nothing of its memory."""
    state, found = report.record["outcome"]["state"], report.diagnosis
    if state == "interrupted":
        return Shown(state, report.sentence)
    if found is not None and found.id in ("cuda-oom", "host-oom"):
        return Shown("oom", found.cause)
    ended_well = report.exit_code == 0 and report.verdict.lines[0].state != "fail"
    if state != "timeout" and not ended_well:
        learning = judge([row.loss for row in rows], [row.rate for row in rows])
        if learning.state not in ("nan", "diverging"):
            id, remedy = (found.id, found.remedy) if found is not None else ("", "")
            return Shown("failed", found.cause if found is not None else report.sentence, None, id, remedy)
    short = f"the time limit ended it behind step {len(rows)}; `lorapatch tune … --resume` goes on"
    if state == "timeout" and len(rows) < _STEPS_TO_PEAK:
        return Shown(state, short)
    measured = measured_bytes(report.record, predicted)
    if measured is not None and measured > budget_B:
        return Shown("over", f"it took {measured / (1 << 30):.2f} GiB", measured)
    return Shown("timeout", short, measured) if state == "timeout" else Shown("fits", "", measured)
