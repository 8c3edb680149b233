"""`lorapatch tune`: read, then decide, run and record until it fits and learns; then the winner is written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import unified_diff
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.lora.flags import PatchOptions
from lorapatch.run.folder import RUNS, make_folder
from lorapatch.run.preflight import Preflight, preflight
from lorapatch.run.runs import RunOptions
from lorapatch.run.view import PlainView, View
from lorapatch.shell.files import write_new
from lorapatch.shell.syntax import syntax_error
from lorapatch.tune import record
from lorapatch.tune.configuration import Configuration
from lorapatch.tune.decide import Decision, Skipped, decide, winner
from lorapatch.tune.fitting import gib
from lorapatch.tune.ladder import Ladder, Space, open_space, read_ladder
from lorapatch.tune.predict import Predictor
from lorapatch.tune.samples import cut_by, token_lengths
from lorapatch.tune.script import TunedScript, machine_of, read_tuned
from lorapatch.tune.trial import Goal, Prediction, Trial
from lorapatch.tune.trials import Runner, RunTrial

__all__ = ["Preview", "Tuning", "TuneOptions", "preview", "tune"]

EstimateOf = Callable[[Configuration, bool], Prediction | None]


@dataclass(frozen=True)
class TuneOptions:
    """``ladder`` is "bytes", "plan" or the path of a YAML file, ``model`` a smaller language model to fall back on.

    ``runs`` is where the session's folder goes, ``resume`` goes on with the last session of this script there.
    """

    ladder: str = "bytes"
    model: str | None = None
    runs: Path = Path(RUNS)
    resume: bool = False
    trainer_root: Path | None = None
    interval_s: float = 5.0
    language: str = "en"


@dataclass(frozen=True)
class Tuning:
    """A session that has ended. ``winner`` is the run whose configuration stands in ``script`` (None: there is none).

    ``end`` is "done", "limit", "nothing fits" or "failed", ``reason`` the same in words; ``rows`` the table.
    """

    folder: Path
    trials: tuple[Trial, ...]
    skipped: tuple[Skipped, ...]
    end: str
    reason: str
    winner: Trial | None
    script: Path | None
    diff: str
    rows: list[list[str]]

    @property
    def passed(self) -> bool:
        """Whether there is a configuration that fits and, as far as it was looked at, learns."""
        return self.winner is not None and (self.end == "limit" or self.winner.learning.state in ("falling", "weak"))


@dataclass(frozen=True)
class Preview:
    """What a dry run shows: the script's own configuration, each rung with its prediction, and the first decision.

    ``rungs`` are tuples of label, what it costs, bytes with it alone, bytes it saves, and a note; ``closed`` pairs of a
    rung and why it is closed.
    """

    start: Configuration
    expected_B: int | None
    rungs: tuple[tuple[str, str, int | None, int | None, str], ...]
    closed: tuple[tuple[str, str], ...]
    first: Decision
    notes: tuple[str, ...] = ()


@dataclass
class _Session:
    """One tuning from its first decision to its end."""

    tuned: TunedScript
    goal: Goal
    ladder: Ladder
    space: Space
    predictor: Predictor
    folder: Path
    view: View
    lengths: Sequence[int] | None = None
    trials: list[Trial] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def run(self, run_trial: RunTrial) -> Decision:
        """Decide, run, record, until there is an end. Raises Refused for a run that cannot be started."""
        while True:
            decision = decide(self.space, self.goal, self.trials, self.predictor)
            said = {item.configuration for item in decision.skipped}
            self.skipped = [item for item in self.skipped if item.configuration not in said] + list(decision.skipped)
            if decision.configuration is None:
                return decision
            number = len(self.trials) + 1
            self._say(number, decision)
            self.save(None, None)
            trial = run_trial(number, decision, self.predictor.best(decision.configuration), self._time_left())
            if trial.outcome == "interrupted":
                return Decision("interrupted; `lorapatch tune --resume` goes on", end="interrupted")
            self.trials.append(trial)
            self.save(None, None)
            self.view.say(f"run {number}: {result_words(trial, self.goal)}")

    def _say(self, number: int, decision: Decision) -> None:
        configuration = decision.configuration
        assert configuration is not None
        for item in decision.skipped:
            self.view.say(f"skipped: {item.configuration.unlike(self.space.start)}: {item.reason}")
        words = configuration.unlike(self.space.start)
        steps = f"{decision.steps} step{'s' * (decision.steps != 1)}"
        self.view.say(f"run {number}, {decision.purpose} of {steps}: {words}\n    because {decision.reason}")
        if configuration.max_length != self.space.start.max_length and self.lengths:
            self.view.say(f"    note: {cut_by(self.lengths, configuration.max_length)}")

    def _time_left(self) -> float | None:
        if self.goal.time_limit_s is None:
            return None
        return max(self.goal.time_limit_s - sum(trial.seconds for trial in self.trials), 1.0)

    def save(self, ended: Decision | None, result: Mapping[str, Any] | None) -> None:
        """tune.json as things stand."""
        data = record.document(
            self.tuned, self.goal, self.ladder, self.space, self.predictor, self.trials, self.skipped, ended, result
        )
        record.write(self.folder, data)


def tune(
    script: str | PathLike[str],
    goal: Goal,
    patch: PatchOptions | None = None,
    options: TuneOptions | None = None,
    *,
    view: View | None = None,
    estimate: EstimateOf | None = None,
    run_trial: RunTrial | None = None,
) -> Tuning:
    """Find the best configuration of ``script`` under a memory budget in few and short runs, and show that it learns.

    The script on the disk is not touched; the winner is written beside it as NAME_tuned.sh. ``estimate`` and
    ``run_trial`` take the place of `lorapatch.estimate` and of real runs. Raises Refused before anything runs, UsageError;
    what runs showed is told by the result, not by an exception.
    """
    options, view = options or TuneOptions(), view or PlainView(lambda line: None)
    ladder = read_ladder(options.ladder)
    tuned, checked, space, lengths = _prepare(Path(fspath(script)), goal, patch, options, ladder)
    for note in (*tuned.notes, *checked.notes):
        view.say(f"note: {note}")
    earlier = record.earlier_session(options.runs, tuned, goal, ladder) if options.resume else None
    folder = earlier.folder if earlier else make_folder(options.runs, "tune", tuned.path.stem)
    predictor = Predictor(estimate or _estimator(tuned, options, goal), earlier.predictions if earlier else None)
    session = _Session(tuned, goal, ladder, space, predictor, folder, view, lengths)
    if earlier is not None:
        session.trials, session.skipped = list(earlier.trials), list(earlier.skipped)
        view.say(f"going on behind run {len(earlier.trials)} of {folder.name}")
    if run_trial is None:
        run_options = RunOptions(
            runs=folder, budget_B=goal.budget_B, interval_s=options.interval_s, language=options.language,
            trainer_root=options.trainer_root,
        )  # fmt: skip
        run_trial = Runner(tuned, goal, run_options, view, gpu=not space.host)
    ours = record.hashes_written(options.runs)  # before this session's record takes the place of an earlier one
    ended = session.run(run_trial)
    return _finish(session, ended, ours)


def preview(
    script: str | PathLike[str],
    goal: Goal,
    patch: PatchOptions | None = None,
    options: TuneOptions | None = None,
    *,
    estimate: EstimateOf | None = None,
) -> Preview:
    """What `tune` would begin with: every rung with its prediction, and the first decision. Runs and writes nothing."""
    options = options or TuneOptions()
    ladder = read_ladder(options.ladder)
    tuned, checked, space, lengths = _prepare(Path(fspath(script)), goal, patch, options, ladder)
    predictor = Predictor(estimate or _estimator(tuned, options, goal))
    own = predictor(space.start)
    rungs = []
    for rung in space.rungs:
        lower = rung.on(space.start)
        answer = predictor(lower) if lower is not None else None
        saves = own.expected - answer.expected if own is not None and answer is not None else None
        length = dict(rung.changes).get("max_length")
        note = cut_by(lengths, length) if length is not None and lengths else ""
        rungs.append((rung.label, rung.costs, answer.expected if answer is not None else None, saves, note))
    if ladder.order == "bytes":
        rungs.sort(key=lambda row: -(row[3] or 0))
    first = decide(space, goal, (), predictor)
    notes = (*tuned.notes, *checked.notes, *predictor.refusals[:1])
    return Preview(space.start, own.expected if own is not None else None, tuple(rungs), space.closed, first, notes)


def _prepare(
    path: Path, goal: Goal, patch: PatchOptions | None, options: TuneOptions, ladder: Ladder
) -> tuple[TunedScript, Preflight, Space, Sequence[int] | None]:
    """Everything that is looked at before the first run. Raises Refused."""
    tuned = read_tuned(path, patch, options.trainer_root)
    if options.model is not None and not Path(options.model).is_dir():
        raise Refused(f"--model {options.model}: there is no such folder; name that of the smaller language model")
    try:
        checked = preflight(tuned.script, tuned.launch, alone=True, budget_B=goal.budget_B, output=options.runs.absolute())
    except Refused as refusal:
        raise Refused(f"{path}: {refusal}") from refusal
    lengths = token_lengths(tuned.launch, path.absolute().parent)
    machine = machine_of(
        tuned,
        cpu=checked.cpu,
        model=str(Path(options.model).absolute()) if options.model else None,
        longest=max(lengths, default=None) if lengths else None,
    )
    return tuned, checked, open_space(ladder, tuned.start, machine, tuned.takes), lengths


def _estimator(tuned: TunedScript, options: TuneOptions, goal: Goal) -> EstimateOf:
    from lorapatch.tune.estimates import estimator

    return estimator(tuned, options.trainer_root, goal.budget_B)


# -- the end ---------------------------------------------------------------------------------------------------------


def _finish(session: _Session, ended: Decision, ours: set[str]) -> Tuning:
    """Write the winner beside the script, and the record."""
    tuned = session.tuned
    best = winner(session.goal, session.trials) if ended.end in ("done", "limit") else None
    target, diff, result = None, "", None
    if best is not None:
        text = tuned.text(best.configuration)
        if (objection := syntax_error(text)) is not None:
            raise Refused(f"{tuned.path}: bash does not accept the tuned script: {objection}")
        target = _target(tuned.path, text, ours)
        write_new(target, text, like=tuned.path)
        old, new = (part.decode("utf-8", "replace").splitlines(keepends=True) for part in (tuned.original, text))
        diff = "".join(unified_diff(old, new, tuned.path.name, target.name))
        result = {
            "run": best.number,
            "configuration": best.configuration.as_dict(),
            "script": str(target),
            "sha256": hashlib.sha256(text).hexdigest(),
            "diff": diff,
        }
    session.save(ended, result)
    rows = record.table(tuned, session.trials, session.skipped, best)
    return Tuning(
        session.folder, tuple(session.trials), tuple(session.skipped), ended.end, ended.reason, best, target, diff, rows
    )


def _target(path: Path, text: bytes, ours: set[str]) -> Path:
    """NAME_tuned.sh beside the script; NAME_tuned.1.sh … where that is not what an earlier tuning wrote (``ours``)."""
    number = 0
    while True:
        target = path.absolute().with_name(f"{path.stem}_tuned{f'.{number}' if number else ''}{path.suffix or '.sh'}")
        if not target.exists():
            return target
        there = target.read_bytes()
        if there == text or hashlib.sha256(there).hexdigest() in ours:
            return target
        number += 1


def result_words(trial: Trial, goal: Goal) -> str:
    """What a run showed, in a line."""
    outcomes = {
        "fits": f"fits: {gib(trial.measured_B)} of {gib(goal.budget_B)}",
        "over": f"too large: {gib(trial.measured_B)} of {gib(goal.budget_B)}",
        "oom": f"out of memory: {trial.cause}",
        "failed": f"failed: {trial.cause}",
        "timeout": trial.cause,
    }
    parts = [outcomes.get(trial.outcome, trial.outcome)]
    parts += [f"{gib(trial.measured_B)} of {gib(goal.budget_B)}"] if trial.cut_short and trial.fits else []
    parts += [f"{trial.samples_per_s:.3g} samples/s"] if trial.samples_per_s else []
    parts += [f"{trial.held_out:.4g} on held-out data"] if trial.held_out is not None else []
    parts += [trial.learning.sentence] if trial.purpose == "learn" and trial.losses else []
    return ", ".join(parts)
