"""After a run: what it left, the verdict, the diagnosis, the record."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lorapatch
from lorapatch.adapter.file_tier import check_files
from lorapatch.adapter.findings import Finding
from lorapatch.adapter.inspect import Adapter, find_adapter, inspect_adapter
from lorapatch.errors import Refused
from lorapatch.launch import Launch, Script
from lorapatch.run import record as records
from lorapatch.run.diagnose import Diagnosis, Evidence, diagnose
from lorapatch.run.folder import RunFolder
from lorapatch.run.loaded import load_adapter
from lorapatch.run.output import Output
from lorapatch.run.preflight import PathFlag
from lorapatch.run.session import Session, fill_from_trainer_state, read_log
from lorapatch.run.verdict import Verdict, decide
from lorapatch.run.versions import library_versions, processes_of
from lorapatch.shell.files import Receipt

__all__ = ["Report", "Subject", "finish"]


@dataclass(frozen=True)
class Subject:
    """The script that a run is about: its path, its bytes when we came, and as it is now; the line of its launch."""

    path: Path
    original: bytes
    script: Script
    line: int


@dataclass(frozen=True)
class Report:
    """A run that has ended. ``record`` is what record.json holds; ``markdown`` the file that its entry was added to."""

    folder: Path
    verdict: Verdict
    diagnosis: Diagnosis | None
    exit_code: int
    record: Mapping[str, Any]
    markdown: Path

    @property
    def passed(self) -> bool:
        """Whether the training ended well and no line of the verdict fails."""
        return self.exit_code == 0 and self.verdict.passed

    @property
    def sentence(self) -> str:
        """What happened, with the cause and the remedy, for the last line on a terminal."""
        if self.diagnosis is not None:
            return f"{self.diagnosis.cause} Try: {self.diagnosis.remedy}"
        failed = [f"{line.what}: {line.evidence}" for line in self.verdict.lines if line.state == "fail"]
        return "; ".join(failed) if failed else "every line that could be checked passes"


def finish(
    folder: RunFolder,
    kind: str,
    subject: Subject,
    launch: Launch,
    session: Session,
    *,
    output: Output | None,
    flags: Mapping[str, str],
    paths: Sequence[PathFlag],
    python: str | None,
    budget_B: int | None,
    predicted: Mapping[str, Any] | None,
    language: str,
    notes: Sequence[str],
    verify: bool,
    say: Callable[[str], None],
    expected_step: int | None,
    resumed_from: int,
) -> Report:
    """Judge a run and write its record; what there is to say about it. Raises Refused if it cannot be written."""
    fill_from_trainer_state(folder, session, output, resumed_from)
    adapter, findings = _adapter(output, session.outcome.started)
    sound = all(finding.state != "fail" for finding in findings)
    loaded: Sequence[Finding] = ()
    if adapter is not None and verify and sound and not session.outcome.exit_code:
        say("loading the adapter with its base, to see what it does")
        loaded = load_adapter(adapter.directory)
    checkpoints = [checkpoint.path.name for checkpoint in output.checkpoints] if output else []
    verdict = decide(
        session.outcome,
        session.state,
        session.peaks,
        adapter=adapter,
        adapter_problems=[finding.sentence for finding in findings if finding.state == "fail"],
        loaded=loaded,
        checkpoints=checkpoints,
        saves=flags.get("save_strategy") != "no",
        expected_step=expected_step,
        resumed_from=resumed_from,
        budget_B=budget_B,
    )
    processes = processes_of(launch, session.seen, session.state.spawned)
    interpreter = processes.python or python
    diagnosis = _diagnosis(kind, folder, subject, session, verdict, adapter, findings, flags, interpreter)
    document = {
        "schema": records.SCHEMA,
        "lorapatch": lorapatch.__version__,
        "kind": kind,
        "folder": folder.path.name,
        "outcome": records.outcome_dict(session.outcome),
        "script": {
            "path": str(subject.path.absolute()),
            "name": subject.path.name,
            "line": subject.line,
            **records.script_change(_first_original(subject), subject.script.source, subject.path.name),
        },
        "launch": {
            "argv": processes.launcher or (list(processes.ranks[0]) if processes.ranks else None),
            "ranks": [list(argv) for argv in processes.ranks],
            "environment": dict(processes.environment),
            "flags": dict(flags),
            "paths": [asdict(path) for path in paths],
        },
        "versions": {
            **(library_versions(interpreter, processes.environment or None) if interpreter else {}),
            "interpreter": interpreter,
            "driver": session.driver,
        },
        "memory": records.memory_dict(session.peaks, budget_B, predicted),
        "metrics": records.metrics_summary(session.state),
        "checkpoints": checkpoints,
        "adapter": records.adapter_dict(adapter, (*findings, *loaded)),
        "verdict": verdict.as_dict(),
        "diagnosis": records.diagnosis_dict(diagnosis),
        "notes": list(notes),
        "resumed_from": resumed_from or None,
        "next_step": _next_step(kind, subject, verdict, diagnosis, folder, output),
    }
    try:
        folder.write_json("record.json", document)
    except OSError as error:
        raise Refused(f"{folder.path}: the record cannot be written ({error.strerror})") from error
    markdown = records.append_record(folder.path.parent, document, language)
    return Report(folder.path, verdict, diagnosis, session.outcome.exit_code, document, markdown)


def _adapter(output: Output | None, since: float) -> tuple[Adapter | None, Sequence[Finding]]:
    """The adapter of this run (not an older one), and what its files say; without one, why."""
    if output is None:
        return None, [_no_adapter("the launch names no output directory")]
    directory = find_adapter(output.directory)
    if directory is None:
        return None, [_no_adapter(f"{output.directory} holds no adapter")]
    try:
        adapter = inspect_adapter(directory)
        findings = check_files(adapter)
    except Refused as refusal:
        return None, [_no_adapter(str(refusal))]
    if adapter.file.stat().st_mtime < math.floor(since):
        return None, [_no_adapter(f"{adapter.file} is older than this run")]
    return adapter, findings


def _no_adapter(sentence: str) -> Finding:
    return Finding("adapter", 1, "fail", sentence)


def _diagnosis(
    kind: str,
    folder: RunFolder,
    subject: Subject,
    session: Session,
    verdict: Verdict,
    adapter: Adapter | None,
    findings: Sequence[Finding],
    flags: Mapping[str, str],
    python: str | None,
) -> Diagnosis | None:
    reached_end = verdict.lines[0].state != "fail"
    lora = session.state.facts.get("lora", {}).get("lora")
    return diagnose(
        Evidence(
            log=read_log(folder.path / "log.txt"),
            exit_code=session.outcome.exit_code,
            state=session.outcome.state,
            kind=kind,
            script=str(subject.path),
            python=python or "python",
            flags=flags,
            losses=session.state.losses,
            adapter_problems={finding.id: finding.sentence for finding in findings if finding.state == "fail"},
            adapter_modules=adapter.modules if adapter else (),
            lora_parameters=lora if isinstance(lora, int) else None,
            reached_end=reached_end,
            passed=verdict.passed,
            reason=session.outcome.reason,
        )
    )


def _next_step(
    kind: str, subject: Subject, verdict: Verdict, diagnosis: Diagnosis | None, folder: RunFolder, output: Output | None
) -> str:
    if diagnosis is not None:
        return diagnosis.remedy
    if not verdict.passed:
        return f"less {shlex.quote(str(folder.path / 'log.txt'))}"
    if kind == "smoke" or output is None:
        return f"lorapatch full {shlex.quote(str(subject.path))}"
    return f"lorapatch verify {shlex.quote(str(output.directory))}"


def _first_original(subject: Subject) -> bytes:
    """The script before lorapatch first patched it, where its backup is still there."""
    receipt = subject.path.absolute().parent / f".{subject.path.name}.lorapatch.json"
    try:
        backup = receipt.parent / Receipt(**json.loads(receipt.read_text())).backup
        return backup.read_bytes()
    except (OSError, ValueError, TypeError):
        return subject.original
