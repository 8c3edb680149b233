"""tune.json: everything that tuning knew and decided, written after each run; and the way back to go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorapatch.errors import Refused
from lorapatch.tune.decide import Decision, Skipped
from lorapatch.tune.fitting import gib
from lorapatch.tune.ladder import Ladder, Space
from lorapatch.tune.predict import Predictor
from lorapatch.tune.script import TunedScript
from lorapatch.tune.trial import Goal, Trial

__all__ = ["FILE", "Earlier", "document", "earlier_session", "hashes_written", "table", "write"]

FILE = "tune.json"
SCHEMA = 1


@dataclass(frozen=True)
class Earlier:
    """A session that is gone on with: its folder, its runs, what was predicted and what was passed over."""

    folder: Path
    trials: tuple[Trial, ...]
    predictions: list[Mapping[str, Any]]
    skipped: tuple[Skipped, ...]


def document(
    tuned: TunedScript,
    goal: Goal,
    ladder: Ladder,
    space: Space,
    predictor: Predictor,
    trials: Sequence[Trial],
    skipped: Sequence[Skipped],
    ended: Decision | None,
    winner: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All of it for tune.json."""
    import lorapatch

    return {
        "schema": SCHEMA,
        "lorapatch": lorapatch.__version__,
        "script": str(tuned.path.absolute()),
        "same": sameness(tuned, goal, ladder),
        "goal": asdict(goal),
        "start": tuned.start.as_dict(),
        "closed": [{"rung": rung, "reason": reason} for rung, reason in space.closed],
        "predictions": predictor.as_list(),
        "not_predicted": predictor.refusals,
        "trials": [trial.as_dict() for trial in trials],
        "skipped": [{**asdict(item), "configuration": item.configuration.as_dict()} for item in skipped],
        "end": {"what": ended.end, "reason": ended.reason} if ended is not None else None,
        "winner": winner,
    }


def sameness(tuned: TunedScript, goal: Goal, ladder: Ladder) -> dict[str, Any]:
    """What has to be the same for a session to be gone on with. Limits may change."""
    return {
        "script": hashlib.sha256(tuned.original).hexdigest(),
        "settings": hashlib.sha256(tuned.script.source).hexdigest(),
        "budget": goal.budget_B,
        "prefer": goal.prefer,
        "steps": list(goal.steps),
        "ladder": json.loads(json.dumps([ladder.name, ladder.order, ladder.rungs])),
    }


def write(folder: Path, data: Mapping[str, Any]) -> None:
    """tune.json, at once or not at all. Raises Refused."""
    temporary = folder / f".{FILE}.tmp"
    try:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(folder / FILE)
    except OSError as error:
        raise Refused(f"{folder / FILE} cannot be written ({error.strerror})") from error


def earlier_session(runs: Path, tuned: TunedScript, goal: Goal, ladder: Ladder) -> Earlier:
    """The last session of this script in ``runs``. Raises Refused when there is none, or it had another aim."""
    files = [file for file in runs.glob(f"*-tune-*/{FILE}") if (data := _read(file)) and _is_of(data, tuned)]
    if not files:
        raise Refused(f"{runs} holds no tuning of {tuned.path.name} to go on with; start one without --resume")
    file = max(files, key=lambda path: path.stat().st_mtime)
    data = _read(file)
    assert data is not None
    now, then = sameness(tuned, goal, ladder), data["same"]
    other = [name for name in now if now[name] != then.get(name)]
    if other:
        raise Refused(
            f"{file.parent} was tuned with another {' and another '.join(other)}; say the same again,"
            " or start anew without --resume"
        )
    try:
        trials = tuple(Trial.from_dict(item) for item in data["trials"])
        skipped = tuple(_skipped(item) for item in data["skipped"])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{file} is not what lorapatch wrote; start anew without --resume") from error
    return Earlier(file.parent.absolute(), trials, data["predictions"], skipped)


def hashes_written(runs: Path) -> set[str]:
    """The SHA-256 of every tuned script that sessions in ``runs`` have written."""
    winners = [(_read(file) or {}).get("winner") for file in runs.glob(f"*-tune-*/{FILE}")]
    return {str(winner["sha256"]) for winner in winners if winner}


def _read(file: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("schema") == SCHEMA and isinstance(data.get("same"), dict) else None


def _is_of(data: Mapping[str, Any], tuned: TunedScript) -> bool:
    return bool(data.get("script") == str(tuned.path.absolute()))


def _skipped(item: Mapping[str, Any]) -> Skipped:
    from lorapatch.tune.configuration import Configuration

    return Skipped(Configuration(**item["configuration"]), item["expected_B"], item["reason"])


# -- for people ------------------------------------------------------------------------------------------------------

COLUMNS = ("run", "configuration", "predicted", "measured", "samples/s", "loss", "verdict", "why")


def table(tuned: TunedScript, trials: Sequence[Trial], skipped: Sequence[Skipped], best: Trial | None) -> list[list[str]]:
    """The rows below `COLUMNS`: each run in order, then what was passed over unseen."""
    rows = []
    for trial in trials:
        learning = trial.learning
        loss = f"{trial.losses[0]:.4g} to {trial.losses[-1]:.4g}" if trial.losses else "n/a"
        loss += f", held out {trial.held_out:.4g}" if trial.held_out is not None else ""
        verdict = trial.outcome if not trial.fits or trial.purpose == "probe" else learning.state
        if trial.cut_short:
            verdict = f"{verdict}, cut short" if trial.fits else "cut short"
        rows.append(
            [
                f"{trial.number}{'*' if best is not None and best.number == trial.number else ''}",
                f"{trial.configuration.unlike(tuned.start)}; {trial.steps} steps",
                gib(trial.expected_B),
                gib(trial.measured_B),
                f"{trial.samples_per_s:.3g}" if trial.samples_per_s else "n/a",
                loss,
                verdict + (f": {trial.cause}" if trial.cause and trial.outcome == "failed" else ""),
                trial.reason,
            ]
        )
    for item in skipped:
        words = item.configuration.unlike(tuned.start)
        rows.append(["not run", words, gib(item.expected_B), "", "", "", "skipped", item.reason])
    return rows
