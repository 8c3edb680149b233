"""One run of tuning: the stage alone, with a configuration, under the budget; and what it showed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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

__all__ = ["FRACTION", "Runner", "RunTrial"]

# What the trainer hands to torch.cuda.set_per_process_memory_fraction, so that "out of memory" is what a smaller card says.
FRACTION = "LORAPATCH_MEMORY_FRACTION"
# CUDA context, cuBLAS, NCCL, where no prediction says: seen between 0.5 and 2.3 GiB; and how far off a prediction may be.
_OUTSIDE = 1 << 30
_SPREAD, _MOST_OUTSIDE = 3 << 28, 3 << 30
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
        stage = StageRun(
            "probe" if probe else "tune",
            "probe",
            max_steps=decision.steps,
            save_steps=decision.steps,
            flags={"gradient_accumulation_steps": str(accumulation)} if accumulation != configuration.accumulation else {},
            environment=self._limit(predicted),
        )
        options = replace(
            self.options,
            timeout_s=timeout_s,
            predicted=_as_estimate(predicted) if predicted is not None else None,
        )
        subject = Subject(self.tuned.path, self.tuned.original, script, launch.line)
        report = run_stage(subject, launch, stage, options, _Steps(self.view))
        measured = measured_bytes(report.record, predicted)
        losses = _losses(report)
        outcome, cause = _outcome(report, measured, self.goal.budget_B, losses)
        return Trial(
            number,
            decision.purpose,
            configuration,
            decision.steps,
            accumulation,
            decision.reason,
            outcome,
            predicted,
            decision.expected_B,
            measured if outcome != "oom" else None,
            _samples_per_s(report.record["metrics"]),
            losses,
            report.record["outcome"]["wall_s"],
            report.folder.name,
            cause,
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

    The driver tells of the whole card, and other processes may come and go on it. Where the trainer says what its
    allocator had, and the rest is not what a context takes, the rest is theirs, and the predicted context is taken instead.
    """
    memory, speed = record["memory"], record["metrics"]["trainer"].get("speed", {})
    if memory["device_peak_B"] is None:
        return memory["host_rss_peak_B"] or None
    before = max((gpu["before_B"] or 0 for gpu in memory["gpus"] if gpu["index"] in memory["gpus_of_run"]), default=0)
    device = int(memory["device_peak_B"]) - before
    reserved = speed.get("peak_reserved_B")
    known = predicted.outside if predicted is not None else 0
    rest = device - int(reserved or 0)
    if not reserved or (abs(rest - known) <= _SPREAD if known else 0 < rest <= _MOST_OUTSIDE):
        return device
    return int(reserved) + (known or _OUTSIDE)


def _losses(report: Report) -> tuple[float, ...]:
    from lorapatch.run.folder import read_jsonl

    return tuple(float(step["loss"]) for step in read_jsonl(Path(report.folder) / "metrics.jsonl"))


def _samples_per_s(metrics: Mapping[str, Any]) -> float | None:
    own = metrics["trainer"].get("speed", {}).get("samples_per_s")
    value = own if own is not None else metrics["samples_per_s"]
    return round(float(value), 3) if value is not None else None


def _outcome(report: Report, measured: int | None, budget_B: int, losses: tuple[float, ...]) -> tuple[str, str]:
    """How it ended for tuning, and the diagnosis where it failed."""
    state = report.record["outcome"]["state"]
    if state in ("interrupted", "timeout"):
        return state, report.sentence
    cause = report.diagnosis.cause if report.diagnosis is not None else ""
    if report.diagnosis is not None and report.diagnosis.id in ("cuda-oom", "host-oom"):
        return "oom", cause
    ended_well = report.exit_code == 0 and report.verdict.lines[0].state != "fail"
    if not ended_well and judge(losses).state not in ("nan", "diverging"):
        return "failed", cause or report.sentence
    if measured is not None and measured > budget_B:
        return "over", f"it took {measured / (1 << 30):.2f} GiB"
    return "fits", ""
