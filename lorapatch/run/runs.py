"""smoke and full: patch if needed, look at everything first, render, run, judge, record."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused, UsageError
from lorapatch.launch import Launch, Script, read_script, read_source
from lorapatch.lora.choose import choose_launch
from lorapatch.lora.flags import PatchOptions
from lorapatch.lora.lint import CheckOptions, check_script
from lorapatch.lora.lint.facts import LaunchFacts
from lorapatch.lora.patch import patch_script
from lorapatch.run.finish import Report, Subject, finish
from lorapatch.run.folder import RUNS, RunFolder
from lorapatch.run.options import free_port
from lorapatch.run.output import Restart, look_at, plan_restart, set_aside
from lorapatch.run.preflight import Preflight, preflight
from lorapatch.run.render import Rendered, render
from lorapatch.run.session import run_session
from lorapatch.run.state import RunState
from lorapatch.run.view import PlainView, View
from lorapatch.run.whole import render_full
from lorapatch.shell.files import read_bytes, write_new

__all__ = ["RunOptions", "StageRun", "full", "run_stage", "smoke"]

# Rules of `check` that the preflight looks at more closely, or that a run finds out anyway.
_LEFT_TO_PREFLIGHT = ("LP301", "LP302", "LP204")


@dataclass(frozen=True)
class RunOptions:
    """How to run. Sizes in bytes, times in seconds; ``runs`` is where the runs' folders and RECORD.md go.

    ``arguments`` are handed to the script, ``hostfile`` and ``num_gpus`` (of each node) to the launcher. ``predicted``
    is what an estimate said, kept beside what is measured. ``verify``: load the adapter that `smoke` and `full` leave
    with its base, and see what it does. Raises UsageError for a number out of its range.
    """

    runs: Path = Path(RUNS)
    budget_B: int | None = None
    interval_s: float = 5.0
    timeout_s: float | None = None
    arguments: Sequence[str] = ()
    hostfile: Path | None = None
    num_gpus: int | None = None
    trainer_root: Path | None = None
    template: str | None = None
    language: str = "en"
    predicted: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    verify: bool = True

    def __post_init__(self) -> None:
        for name in ("budget_B", "interval_s", "timeout_s", "num_gpus"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(
                    f"--{name.removesuffix('_B').removesuffix('_s').replace('_', '-')} has to be more than 0, not"
                    f" {value:g}"
                )
        if self.language not in ("en", "zh"):
            raise UsageError(f"there is no record in {self.language!r}; choose en or zh")


@dataclass(frozen=True)
class StageRun:
    """A short run of one stage: ``kind`` names it in its folder and record, ``flags`` are set for this run alone.

    ``target`` is where the rendered script goes; None: into the run's folder. ``environment`` is added to ours.
    ``verify``: as in `RunOptions`, for this run.
    """

    kind: str
    template: str = "test_lora_minimal"
    target: Path | None = None
    max_steps: int = 5
    save_steps: int = 2
    logging_steps: int = 1
    flags: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    verify: bool = False


def smoke(
    script: str | PathLike[str],
    patch: PatchOptions | None = None,
    options: RunOptions | None = None,
    *,
    view: View | None = None,
    max_steps: int = 5,
    save_steps: int = 2,
    logging_steps: int = 1,
    target: Path | None = None,
) -> Report:
    """Run the fine-tuning stage of ``script`` for a few steps and judge it.

    The script is patched first (with a backup) when it has no LoRA, or ``patch`` is given. The test is rendered to
    ``target`` (default: test_lora_minimal.sh beside the script) and kept in the run's folder.

    Raises Refused before anything runs, UsageError; a training that fails is told by the report, not by an exception.
    """
    options, view = options or RunOptions(), view or PlainView(lambda line: None)
    subject, launch = _patched(Path(fspath(script)), patch, options, view)
    target = target or _beside(subject.path, "test_lora_minimal.sh")
    stage = StageRun(
        "smoke", "test_lora_minimal", target, max_steps, save_steps, logging_steps, verify=options.verify
    )
    return run_stage(subject, launch, stage, options, view)


def run_stage(subject: Subject, launch: Launch, stage: StageRun, options: RunOptions, view: View) -> Report:
    """Render the stage that ``launch`` starts, run it, judge it, record it; ``subject.script`` need not be on the disk.

    Raises Refused before anything runs, UsageError; a training that fails is told by the report.
    """
    checked = preflight(subject.script, launch, alone=True, budget_B=options.budget_B, output=options.runs.absolute())
    _say_notes(view, checked)
    folder = RunFolder(options.runs, stage.kind, subject.path.stem)
    target = stage.target or folder.path / f"{stage.template}.sh"
    rendered = render(
        subject.script,
        launch,
        options.template or stage.template,
        target=target,
        folder=folder.path / "output",
        max_steps=stage.max_steps,
        save_steps=stage.save_steps,
        logging_steps=stage.logging_steps,
        flags=stage.flags,
        drop=checked.drop,
        hostfile=_hostfile(options),
        num_gpus=options.num_gpus,
        settings=options.settings,
    )
    return _run(folder, stage.kind, subject, launch, rendered, target, checked, options, view, stage=stage)


def full(
    script: str | PathLike[str],
    patch: PatchOptions | None = None,
    options: RunOptions | None = None,
    *,
    view: View | None = None,
    resume: bool = False,
    target: Path | None = None,
) -> Report:
    """Run the whole of ``script`` and judge its LoRA stage.

    Patched as in `smoke`. Run is NAME_full.sh (``target``), the script with two things added: a training that fails
    ends it, and a free master port. Nobody's finished output is started over; ``resume`` leaves finished stages out and
    lets the others go on from their last checkpoint. Raises as `smoke` does.
    """
    options, view = options or RunOptions(), view or PlainView(lambda line: None)
    path = Path(fspath(script))
    subject, launch = _patched(path, patch, options, view)
    restart = plan_restart(subject.script, launch, resume=resume)
    checked = preflight(subject.script, launch, alone=False, budget_B=options.budget_B)
    _say_notes(view, checked)
    for sentence in restart.sentences:
        view.say(sentence)
    set_aside(restart.incomplete)
    folder = RunFolder(options.runs, "full", path.stem)
    name = f"{path.stem}_full{path.suffix or '.sh'}"
    target = target or _beside(path, name) or folder.path / name
    rendered = render_full(
        subject.script,
        template=options.template or "full",
        target=target,
        skip=restart.skip,
        hostfile=_hostfile(options),
        num_gpus=options.num_gpus,
    )
    return _run(folder, "full", subject, launch, rendered, target, checked, options, view, restart=restart)


def _patched(path: Path, patch: PatchOptions | None, options: RunOptions, view: View) -> tuple[Subject, Launch]:
    """The script with LoRA, and its launch; what it was before is kept for the record."""
    original = read_bytes(path)
    script = read_script(path)
    stage = patch.stage if patch is not None else None
    launch = _chosen(path, script, stage)
    roots = [options.trainer_root] if options.trainer_root else []
    if patch is not None or not LaunchFacts(launch, path.absolute().parent, roots).lora:
        done = patch_script(path, patch, trainer_root=options.trainer_root)
        if done.written is not None:
            view.say(f"{done.written}: patched, the launch on line {launch.line}; backup: {done.backup}")
        script = read_script(path)
        launch = _chosen(path, script, stage or str(launch.number))
    for finding in check_script(path, CheckOptions(ignore=_LEFT_TO_PREFLIGHT, roots=roots)):
        if finding.severity == "error":
            raise Refused(f"{path}: line {finding.line}: {finding.sentence}; {finding.remedy} ({finding.rule})")
        view.say(f"warning: line {finding.line}: {finding.sentence} ({finding.rule})")
    return Subject(path, original, script, launch.line), launch


def _chosen(path: Path, script: Script, stage: str | None) -> Launch:
    try:
        return choose_launch(script, stage)
    except Refused as refusal:
        raise Refused(f"{path}: {refusal}") from refusal


def _say_notes(view: View, checked: Preflight) -> None:
    for note in checked.notes:
        view.say(f"note: {note}")
    if checked.cpu:
        view.say("note: there is no GPU, so it runs on the CPU")


def _beside(path: Path, name: str) -> Path | None:
    """Beside the script, where relative paths mean the same; None (the run's folder) where that cannot be written."""
    target = path.absolute().with_name(name)
    if not os.access(target.parent, os.W_OK):
        return None
    if target.exists() and b"made by lorapatch" not in target.read_bytes()[:1000]:
        return None  # somebody's own file of that name
    return target


def _hostfile(options: RunOptions) -> str | None:
    if options.hostfile is None:
        return None
    from lorapatch.run.nodes import read_hostfile

    read_hostfile(options.hostfile)  # refused here, with its line, and not by DeepSpeed
    return str(options.hostfile.absolute())


def _run(
    folder: RunFolder,
    kind: str,
    subject: Subject,
    launch: Launch,
    rendered: Rendered,
    target: Path,
    checked: Preflight,
    options: RunOptions,
    view: View,
    *,
    stage: StageRun | None = None,
    restart: Restart | None = None,
) -> Report:
    write_new(target, rendered.text, like=subject.path)
    (folder.path / "script.sh").write_bytes(rendered.text)
    started = _launch_in(rendered, target, launch)
    output = rendered.output_dir or _output_dir(subject.script, launch)
    flags = {flag.name.lstrip("-"): flag.value or "" for flag in started.flags}
    session = run_session(
        ["bash", str(target), *options.arguments],
        folder,
        view,
        title=f"{kind} · {subject.path.name}",
        state=RunState(_whole(flags.get("logging_steps")) or 1, _first_step(subject.script, launch, restart)),
        environment={
            "MASTER_PORT": str(free_port()),
            **os.environ,
            **(stage.environment if stage else {}),
            "PYTHONUNBUFFERED": "1",
        },
        samples_per_rank=_samples(flags),
        budget_B=options.budget_B,
        interval_s=options.interval_s,
        timeout_s=options.timeout_s,
    )
    return finish(
        folder,
        kind,
        subject,
        started,
        session,
        output=look_at(output) if output is not None else None,
        flags=flags,
        paths=checked.paths,
        python=checked.python,
        budget_B=options.budget_B,
        predicted=options.predicted,
        language=options.language,
        notes=(*checked.notes, *rendered.notes, *(restart.sentences if restart else ())),
        verify=stage.verify if stage else options.verify,
        say=view.say,
        expected_step=stage.max_steps if stage else None,
        resumed_from=restart.resume_from.step if restart and restart.resume_from else 0,
    )


def _launch_in(rendered: Rendered, target: Path, launch: Launch) -> Launch:
    """The launch as it stands in the rendered script, with the values that it has there."""
    inside = read_source(rendered.text, target.absolute()).launches
    same = [other for other in inside if other.trainer.name == launch.trainer.name and other.stage.training]
    if rendered.template == "full":
        return next((other for other in same if other.stage.name == launch.stage.name), launch)
    return same[-1] if same else (inside[-1] if inside else launch)


def _first_step(script: Script, launch: Launch, restart: Restart | None) -> int:
    """The step that the first training of the run goes on from; 0 when another one runs before the resumed one."""
    if restart is None or restart.resume_from is None:
        return 0
    earlier = [other for other in script.launches if other.stage.training and other.number < launch.number]
    return restart.resume_from.step if all(other.number in restart.skip for other in earlier) else 0


def _output_dir(script: Script, launch: Launch) -> Path | None:
    flag = launch.flag("output_dir")
    return Path(flag.value) if flag is not None and flag.value else None


def _samples(flags: Mapping[str, str]) -> int | None:
    """Samples of one rank in an optimizer step: micro-batch times accumulation; None when the script does not say."""
    batch = _whole(flags.get("per_device_train_batch_size"))
    return batch * (_whole(flags.get("gradient_accumulation_steps")) or 1) if batch else None


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
