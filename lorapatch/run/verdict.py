"""Whether a run did what it should: each line passed, failed or was not checked, and says by what."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorapatch.adapter.findings import Finding, counted
from lorapatch.adapter.inspect import Adapter
from lorapatch.run.diagnose import is_exploding
from lorapatch.run.execute import Outcome
from lorapatch.run.state import RunState
from lorapatch.run.watch import Peaks

__all__ = ["Line", "Verdict", "decide"]

GIB = 1 << 30


@dataclass(frozen=True)
class Line:
    """One line of a verdict: ``state`` is "pass", "fail" or "not checked"; ``evidence`` the figures it stands on."""

    what: str
    state: str
    evidence: str


@dataclass(frozen=True)
class Verdict:
    """All lines of a verdict; it passes when none fails."""

    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        """Whether no line fails."""
        return all(line.state != "fail" for line in self.lines)

    def as_dict(self) -> dict[str, Any]:
        """For record.json."""
        return {"passed": self.passed, "lines": [asdict(line) for line in self.lines]}


def decide(
    outcome: Outcome,
    state: RunState,
    peaks: Peaks,
    *,
    adapter: Adapter | None,
    adapter_problems: Sequence[str] = (),
    loaded: Sequence[Finding] = (),
    checkpoints: Sequence[str] = (),
    expects_lora: bool = True,
    saves: bool = True,
    expected_step: int | None = None,
    resumed_from: int = 0,
    budget_B: int | None = None,
) -> Verdict:
    """The verdict on a run. ``adapter`` is what it left, ``adapter_problems`` what is wrong with its files, ``loaded`` what
    was seen when it was loaded with its base (none: it was not).

    ``expected_step`` is the step it should have come to (None: its bar's total); ``resumed_from`` the step it went on
    from; ``budget_B`` the bytes it may use, of the GPU, or of host memory when it used none.
    """
    lines = [_reached_end(outcome, state, expected_step)]
    if resumed_from:
        lines.append(_went_on(state, resumed_from))
    if expects_lora:
        lines += [_lora_active(state, adapter), _no_base(adapter), _moved(adapter)]
    lines += [_loss(state), _memory(peaks, budget_B)]
    if saves:
        lines.append(_checkpoints(checkpoints, outcome))
        if expects_lora:
            lines.append(_loadable(adapter, adapter_problems))
            lines += [_works(loaded)] if loaded else []
    return Verdict(tuple(lines))


def _reached_end(outcome: Outcome, state: RunState, expected: int | None) -> Line:
    what = "ran to the last step"
    total = expected or state.total
    steps = f"step {state.step} of {total}" if total else f"step {state.step}"
    if outcome.state != "finished":
        how = outcome.state if outcome.state != "failed" else f"exit code {outcome.exit_code}"
        return Line(what, "fail", f"{how} at {steps}")
    if total is None and not state.summary:
        return Line(what, "not checked", "exit code 0; the log shows no steps")
    return Line(what, "pass" if total is None or state.step >= total else "fail", f"exit code 0, {steps}")


def _went_on(state: RunState, resumed_from: int) -> Line:
    first = next((row.step for row in state.logged if row.stage == state.stage), None)
    what = f"went on from step {resumed_from}"
    if first is None:
        return Line(what, "not checked", "no step was logged")
    return Line(what, "pass" if first > resumed_from else "fail", f"the first logged step is {first}")


def _lora_active(state: RunState, adapter: Adapter | None) -> Line:
    what = "LoRA is active"
    lora = state.facts.get("lora", {})
    counts = {**state.facts.get("trainable", {}), **lora}
    trainable, total = _count(counts, "trainable"), _count(counts, "total")
    own = _count(lora, "lora")
    if own is None and adapter is not None:
        own = adapter.lora_parameters
    if trainable is None and own is None:
        return Line(what, "not checked", "the trainer names no counts, and there is no adapter")
    parts = [f"{own:,} LoRA parameters"] if own is not None else []
    if trainable is not None and total:
        parts.append(f"{trainable:,} of {total:,} are trainable ({100 * trainable / total:.2f} %)")
    modules = len(adapter.modules) if adapter is not None else len(lora.get("modules", ()))
    if modules:
        parts.append(f"in {counted(modules, 'module')}")
    active = (own is None or own > 0) and (trainable is None or 0 < trainable and (not total or trainable < total))
    return Line(what, "pass" if active else "fail", ", ".join(parts))


def _count(counts: Mapping[str, Any], name: str) -> int | None:
    value = counts.get(name)
    return value if isinstance(value, int) else None


def _no_base(adapter: Adapter | None) -> Line:
    what = "no base parameter in the adapter"
    if adapter is None:
        return Line(what, "not checked", "no adapter")
    if adapter.base_tensors:
        return Line(what, "fail", f"{counted(len(adapter.base_tensors), 'tensor')}, such as {adapter.base_tensors[0]}")
    return Line(what, "pass", f"{counted(adapter.tensors, 'tensor')}, {_size(adapter.bytes)}")


def _moved(adapter: Adapter | None) -> Line:
    what = "lora_B has moved from zero"
    if adapter is None:
        return Line(what, "not checked", "no adapter")
    count = adapter.moved + len(adapter.still)
    example = f", not in {adapter.still[0]}" if adapter.still else ""
    return Line(what, "pass" if adapter.moved else "fail", f"{adapter.moved} of {counted(count, 'module')}{example}")


def _loss(state: RunState) -> Line:
    what = "the loss is finite and does not explode"
    losses = state.losses
    if not losses:
        return Line(what, "not checked", "no loss was logged")
    shown = f"{losses[0]:.4g}" if len(losses) == 1 else f"{losses[0]:.4g} to {losses[-1]:.4g} in {len(losses)} entries"
    bad = next((row for row in state.logged if row.stage == state.stage and not math.isfinite(row.loss)), None)
    if bad is not None:
        return Line(what, "fail", f"{bad.loss} at step {bad.step}")
    if not any(losses):
        return Line(what, "fail", "it is exactly 0: no label is left")
    return Line(what, "fail" if is_exploding(losses) else "pass", shown)


def _memory(peaks: Peaks, budget_B: int | None) -> Line:
    what = "the peak is under the budget"
    gpu = peaks.device
    used = gpu.used_B if gpu is not None else peaks.host_rss_B
    where = f"GPU {gpu.index}" if gpu is not None else "host memory (no GPU was used)"
    shown = f"{_size(used)} of {where}"
    if budget_B is None:
        of = f", which has {_size(gpu.total_B)}" if gpu is not None else ""
        return Line(what, "not checked", f"{shown}{of}; no budget was given")
    return Line(what, "pass" if used <= budget_B else "fail", f"{shown}, budget {_size(budget_B)}")


def _checkpoints(checkpoints: Sequence[str], outcome: Outcome) -> Line:
    if checkpoints:
        return Line("a checkpoint was written", "pass", ", ".join(checkpoints))
    return Line("a checkpoint was written", "fail", "the output directory holds none")


def _loadable(adapter: Adapter | None, problems: Sequence[str]) -> Line:
    what = "the adapter can be loaded"
    if problems:
        return Line(what, "fail", "; ".join(problems))
    if adapter is None:
        return Line(what, "fail", "no adapter was saved")
    return Line(what, "pass", f"{adapter.file.name}, every tensor finite, ranks as configured (r {adapter.rank})")


def _works(findings: Sequence[Finding]) -> Line:
    what = "loaded with its base, the adapter works"
    wrong = [finding.sentence for finding in findings if finding.state == "fail"]
    if wrong:
        return Line(what, "fail", "; ".join(wrong))
    seen = [finding.sentence for finding in findings if finding.state == "pass"]
    return Line(what, "pass" if seen else "not checked", "; ".join(seen) or findings[0].sentence)


def _size(count: int) -> str:
    """Bytes for people: GiB, below a tenth of one MiB, below a tenth of that KiB."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if count >= size / 10:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"
