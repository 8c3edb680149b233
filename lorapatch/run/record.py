"""What is kept of a run: record.json for programs, and the plan's record in Markdown, in English or Chinese."""

from __future__ import annotations

import difflib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorapatch.adapter.findings import Finding
from lorapatch.adapter.inspect import Adapter
from lorapatch.errors import Refused, UsageError
from lorapatch.run.chinese import CAUSES, LABELS, STATES
from lorapatch.run.diagnose import Diagnosis
from lorapatch.run.execute import Outcome
from lorapatch.run.state import RunState
from lorapatch.run.watch import Peaks

__all__ = ["RECORD", "SCHEMA", "append_record", "as_markdown", "metrics_summary", "script_change"]

SCHEMA = 1
RECORD = "RECORD.md"
GIB = 1 << 30
_ENGLISH = {
    "title": "Run record", "time": "Time", "step": "Step", "state": "State", "memory": "Memory", "problem": "Problem",
    "remedy": "Remedy", "next": "Next step", "none": "none", "steps": "steps", "of": "of", "record": "Record",
    "peak": "peak", "host": "host memory", "budget": "budget", "loss": "loss",
}  # fmt: skip
_KINDS = {"smoke": "smoke test", "full": "full run", "probe": "memory probe", "tune": "tuning run"}
LANGUAGES = ("en", "zh")


def script_change(original: bytes, patched: bytes, name: str) -> dict[str, Any]:
    """Hashes of both scripts, and the difference between them as a unified diff."""
    old, new = (text.decode("utf-8", "replace").splitlines(keepends=True) for text in (original, patched))
    return {
        "original_sha256": hashlib.sha256(original).hexdigest(),
        "patched_sha256": hashlib.sha256(patched).hexdigest(),
        "diff": "".join(difflib.unified_diff(old, new, name, f"{name} (patched)")),
    }


def outcome_dict(outcome: Outcome) -> dict[str, Any]:
    """How it ended, with the times as ISO 8601 of the local zone."""
    return {
        "state": outcome.state,
        "exit_code": outcome.exit_code,
        "reason": outcome.reason,
        "killed_processes": outcome.killed,
        "started": _iso(outcome.started),
        "ended": _iso(outcome.ended),
        "wall_s": round(outcome.wall_s, 3),
    }


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def metrics_summary(state: RunState) -> dict[str, Any]:
    """The figures of the last stage: steps, losses, speed, and what the trainer said of itself."""
    rows = [row for row in state.logged if row.stage == state.stage]
    rates = sorted(row.samples_per_s for row in rows if row.samples_per_s)
    return {
        "stages": state.stage,
        "step": state.step,
        "total_steps": state.total,
        "logged": len(rows),
        "first_loss": rows[0].loss if rows else None,
        "last_loss": rows[-1].loss if rows else None,
        "lowest_loss": min((row.loss for row in rows), default=None),
        "samples_per_s": rates[len(rates) // 2] if rates else None,
        "summary": dict(state.summary),
        "evaluations": state.evaluations,
        "trainer": state.facts,
    }


def memory_dict(peaks: Peaks, budget_B: int | None, predicted: Mapping[str, Any] | None) -> dict[str, Any]:
    """Predicted and measured memory, in bytes."""
    device = peaks.device
    return {
        "budget_B": budget_B,
        "predicted": predicted,
        "gpus": [{**asdict(gpu), "before_B": peaks.before.get(index)} for index, gpu in sorted(peaks.gpus.items())],
        "gpus_of_run": sorted(peaks.used_by_run),
        "device_peak_B": device.used_B if device else None,
        "host_rss_peak_B": peaks.host_rss_B,
        "ram_available_least_B": peaks.ram_available_B,
    }


def adapter_dict(adapter: Adapter | None, findings: Sequence[Finding]) -> dict[str, Any] | None:
    """What identifies an adapter, and what was found in its files."""
    if adapter is None:
        return None
    return {
        "file": str(adapter.file),
        "bytes": adapter.bytes,
        "sha256": adapter.sha256,
        "tensors": adapter.tensors,
        "lora_parameters": adapter.lora_parameters,
        "rank": adapter.rank,
        "modules": len(adapter.modules),
        "findings": [{"id": found.id, "state": found.state, "sentence": found.sentence} for found in findings],
    }


def diagnosis_dict(diagnosis: Diagnosis | None) -> dict[str, Any] | None:
    """The diagnosis for record.json."""
    return None if diagnosis is None else {**asdict(diagnosis), "figures": dict(diagnosis.figures)}


# -- the plan's record -----------------------------------------------------------------------------------------------


def as_markdown(record: Mapping[str, Any], language: str = "en") -> str:
    """The record of one run as the plan asks for it: time, step, state, memory, problem, remedy, next step.

    Raises UsageError for a language other than en and zh.
    """
    if language not in LANGUAGES:
        raise UsageError(f"there is no record in {language!r}; choose one of {', '.join(LANGUAGES)}")
    labels = _ENGLISH if language == "en" else LABELS
    outcome, diagnosis = record["outcome"], record.get("diagnosis")
    passed = record["verdict"]["passed"] and outcome["state"] == "finished"
    problem, remedy = labels["none"], labels["none"]
    if diagnosis:
        problem = diagnosis["cause"] if language == "en" else CAUSES.get(diagnosis["id"], diagnosis["cause"])
        problem += f" (`{diagnosis['evidence']}`)" if diagnosis["evidence"] else ""
        remedy = f"`{diagnosis['remedy']}`"
    elif not passed:
        failed = [line for line in record["verdict"]["lines"] if line["state"] == "fail"]
        problem = "; ".join(f"{line['what']}: {line['evidence']}" for line in failed)
    rows = {
        "time": f"{outcome['started'][:19].replace('T', ' ')}, {_duration(outcome['wall_s'])}",
        "step": _step(record, labels, language),
        "state": _state(outcome["state"], passed, language),
        "memory": _memory_line(record["memory"], labels),
        "problem": problem,
        "remedy": remedy,
        "next": f"`{record['next_step']}`",
        "record": f"[{record['folder']}]({record['folder']}/record.json)",
    }
    colon = ": " if language == "en" else "："
    heading = f"## {rows['time'].split(',')[0]} {record['kind']} {record['script']['name']}\n\n"
    return heading + "".join(f"- {labels[name]}{colon}{_one_line(value)}\n" for name, value in rows.items())


def _step(record: Mapping[str, Any], labels: Mapping[str, str], language: str) -> str:
    metrics = record["metrics"]
    kind = (
        _KINDS.get(record["kind"], record["kind"]) if language == "en" else labels.get(record["kind"], record["kind"])
    )
    text = f"{kind}, {record['script']['name']}, {metrics['step']}"
    if metrics["total_steps"]:
        text += f" {labels['of']} {metrics['total_steps']}"
    text += f" {labels['steps']}"
    if metrics["first_loss"] is not None:
        text += f", {labels['loss']} {_number(metrics['first_loss'])} → {_number(metrics['last_loss'])}"
    return text


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _state(state: str, passed: bool, language: str) -> str:
    name = "success" if passed else "failed" if state == "finished" else state
    return name if language == "en" else STATES[name]


def _memory_line(memory: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    peak = memory["device_peak_B"]
    gpus = [gpu for gpu in memory["gpus"] if gpu["index"] in memory["gpus_of_run"]]
    if peak is not None:
        total = max((gpu["total_B"] for gpu in gpus), default=None)
        text = f"{peak / GIB:.2f} GiB" + (f" / {total / GIB:.0f} GiB" if total else "")
    else:
        text = f"{memory['host_rss_peak_B'] / GIB:.2f} GiB ({labels['host']})"
    if memory["budget_B"]:
        text += f", {labels['budget']} {memory['budget_B'] / GIB:g} GiB"
    return text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def append_record(runs: Path, record: Mapping[str, Any], language: str = "en") -> Path:
    """Add a run to ``runs``/RECORD.md, which is begun when it is not there. Raises Refused if it cannot be written."""
    path = runs / RECORD
    text = as_markdown(record, language)
    title = (_ENGLISH if language == "en" else LABELS)["title"]
    try:
        # One write to a file opened for appending: two runs that end together do not mix their lines.
        with path.open("ab") as file:
            begun = os.fstat(file.fileno()).st_size > 0
            file.write(("\n" if begun else f"# {title}\n\n").encode() + text.encode("utf-8", "replace"))
    except OSError as error:
        raise Refused(f"{path} cannot be written ({error.strerror})") from error
    return path
