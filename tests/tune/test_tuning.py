"""Tuning from beginning to end, with real processes: host memory as the budget, a script that stays as it is."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lorapatch.cli import main
from lorapatch.errors import Refused, UsageError
from lorapatch.launch import read_script
from lorapatch.lora.flags import PatchOptions
from lorapatch.resources import resource_dir
from lorapatch.run.runs import RunOptions
from lorapatch.run.view import PlainView
from lorapatch.tune import Goal, Prediction, Trial, TuneOptions, Tuning, preview, tune
from lorapatch.tune.configuration import Configuration
from lorapatch.tune.decide import Decision
from lorapatch.tune.record import COLUMNS
from lorapatch.tune.script import read_tuned
from lorapatch.tune.trials import Runner

MIB = 1 << 20


def predict(c: Configuration, exact: bool) -> Prediction:
    size = (20 + c.micro_batch * (1 if c.checkpointing else 2)) * MIB  # of a GPU: far from what host memory will be
    return Prediction(size * 9 // 10, size, size * 11 // 10, 0, "trace" if exact else "closed form")


def run(script: Path, size_MiB: int, patch: PatchOptions | None = None, **more: object) -> Tuning:
    options = {name: more.pop(name) for name in ("ladder", "resume") if name in more}
    goal = Goal(size_MiB * MIB, steps=(5, 20), **more)  # type: ignore[arg-type]
    tuning = TuneOptions(runs=Path("runs"), interval_s=0.2, **options)  # type: ignore[arg-type]
    return tune(script, goal, patch or PatchOptions(learning_rate=2e-4), tuning, estimate=predict)


@pytest.fixture
def small(script: Path) -> tuple[Path, Tuning]:
    """A tuning under a budget that the script's own settings (8 samples of 16 MiB) exceed."""
    return script, run(script, 110)


def test_the_ladder_shrinks_until_it_fits_and_learns(small: tuple[Path, Tuning]) -> None:
    script, done = small
    assert done.passed and done.end == "done" and done.winner is not None, done.reason
    first = done.trials[0]
    assert first.outcome == "over" and first.measured_B is not None and first.measured_B > 110 * MIB
    best = done.winner
    assert best.measured_B is not None and best.measured_B <= 110 * MIB and best.learning.learns
    assert best.configuration.samples == 32
    assert len(done.trials) <= 7
    smaller = best.configuration.micro_batch < 8 or best.configuration.checkpointing
    assert smaller, best.configuration
    # Every rung is a run with its own record.
    for trial in done.trials:
        record = json.loads((done.folder / trial.folder / "record.json").read_text())
        assert record["kind"] in ("probe", "tune") and record["memory"]["budget_B"] == 110 * MIB
    assert (done.folder / "RECORD.md").read_text().count("## ") == len(done.trials)


def test_the_winner_stands_beside_the_script_and_the_script_stays(script: Path) -> None:
    before = script.read_bytes()
    names = {path.name for path in script.parent.iterdir()}
    done = run(script, 70)
    assert script.read_bytes() == before
    assert {path.name for path in script.parent.iterdir()} - names == {"train_tuned.sh"}
    assert done.script == script.parent / "train_tuned.sh" and done.winner is not None
    micro = done.winner.configuration.micro_batch
    text = done.script.read_text()
    # Where the script checks its variables, they are what changes.
    assert f"\nBATCH={micro}\n" in text and f"\nACCUMULATION={32 // micro}\n" in text
    assert "--per_device_train_batch_size $BATCH" in text and "[ $((BATCH * ACCUMULATION)) = 32 ]" in text
    launch = read_script(done.script).launches[1]
    wanted = {"lora_enable": "True", "learning_rate": "2e-4", "per_device_train_batch_size": str(micro)}
    assert {name: launch.flag(name).value for name in wanted} == wanted  # type: ignore[union-attr]
    assert done.script.stat().st_mode == script.stat().st_mode
    assert done.diff.startswith("--- train.sh\n+++ train_tuned.sh\n") and f"+BATCH={micro}" in done.diff
    ended = subprocess.run(["bash", str(done.script)], capture_output=True, text=True)
    assert ended.returncode == 0 and (script.parent / "evaluated.txt").exists(), ended.stderr


def test_everything_is_in_tune_json_and_in_the_table(small: tuple[Path, Tuning]) -> None:
    script, done = small
    data = json.loads((done.folder / "tune.json").read_text())
    assert data["schema"] == 1 and data["end"]["what"] == "done" and data["goal"]["budget_B"] == 110 * MIB
    assert [Trial.from_dict(item) for item in data["trials"]] == list(done.trials)
    assert data["winner"]["script"] == str(done.script) and data["winner"]["diff"] == done.diff
    assert data["winner"]["run"] == done.winner.number  # type: ignore[union-attr]
    for trial in data["trials"]:
        assert trial["reason"] and trial["learning"]["sentence"] and trial["predicted"] and trial["expected_B"]
    assert len(done.rows) == len(done.trials) + len(done.skipped) and all(len(row) == len(COLUMNS) for row in done.rows)
    assert [row[0] for row in done.rows if "*" in row[0]] == [f"{done.winner.number}*"]  # type: ignore[union-attr]
    assert all(trial.samples_per_s for trial in done.trials)


def test_a_learning_rate_that_diverges_is_brought_down_to_one_that_works(script: Path) -> None:
    done = run(script, 4000, PatchOptions(learning_rate=0.2), max_runs=12)
    assert done.passed and done.winner is not None, done.reason
    tried = [trial.configuration.learning_rate for trial in done.trials if trial.purpose == "learn"]
    assert tried[:2] == [0.2, 0.02] and done.winner.configuration.learning_rate == tried[-1] == 2e-3
    assert [trial.learning.state for trial in done.trials if trial.configuration.learning_rate == 0.2][-1] == "diverging"
    assert "--learning_rate 0.002" in done.script.read_text()  # type: ignore[union-attr]


def test_an_interrupted_tuning_goes_on_where_it_was(script: Path) -> None:
    begun = run(script, 110, max_runs=2)
    assert begun.end == "limit" and len(begun.trials) == 2
    rest = run(script, 110, resume=True)
    assert rest.folder == begun.folder and rest.trials[:2] == begun.trials and rest.end == "done"

    def recorded(number, decision, predicted, timeout):  # type: ignore[no-untyped-def]
        trial = rest.trials[number - 1]
        assert (decision.configuration, decision.reason, decision.steps) == (trial.configuration, trial.reason, trial.steps)
        return trial

    # Decided as in one go, from the same runs.
    goal, patch = Goal(110 * MIB, steps=(5, 20)), PatchOptions(learning_rate=2e-4)
    whole = tune(script, goal, patch, TuneOptions(runs=Path("runs")), estimate=predict, run_trial=recorded)
    assert whole.trials == rest.trials and whole.reason == rest.reason
    assert rest.script == whole.script  # what tuning wrote, tuning replaces


def test_a_run_that_the_limit_ends_is_told_to_be_gone_on_with(script: Path) -> None:
    tuned = read_tuned(script, PatchOptions(learning_rate=2e-4), None)
    goal, options = Goal(4000 * MIB), RunOptions(runs=Path("runs"), interval_s=0.2, budget_B=4000 * MIB)
    runner = Runner(tuned, goal, options, PlainView(lambda line: None), gpu=False)
    trial = runner(1, Decision("how far it comes", tuned.start, "learn", 2000), None, 5.0)
    assert trial.outcome == "timeout" and "`lorapatch tune … --resume` goes on" in trial.cause
    assert len(trial.rates) == len(trial.losses) < 2000 and (trial.first_step_s is not None) == bool(trial.losses)
    assert trial.fits == (len(trial.losses) >= 2) and Trial.from_dict(json.loads(json.dumps(trial.as_dict()))) == trial
    record = json.loads((Path("runs") / trial.folder / "record.json").read_text())
    assert record["diagnosis"]["remedy"] == f"lorapatch tune {script} --budget {4000 * MIB} --resume"


def test_where_the_script_evaluates_the_held_out_loss_counts(script: Path) -> None:
    trainer = script.parent / "train.py"
    source = trainer.read_text().replace(
        '    parser.add_argument("--step_s"',
        '    parser.add_argument("--eval_strategy", default="no")\n    parser.add_argument("--eval_steps", type=int)\n'
        '    parser.add_argument("--step_s"',
    )
    shown = "        if args.eval_strategy == 'steps' and step % args.eval_steps == 0:\n"
    shown += "            print({'eval_loss': str(loss + 1), 'epoch': '0.1'}, flush=True)\n"
    trainer.write_text(source.replace("        if args.save_strategy != ", f"{shown}        if args.save_strategy != ", 1))
    text = script.read_text()
    script.write_text(text.replace("    --learning_rate 2e-4", "    --eval_strategy epoch \\\n    --learning_rate 2e-4"))
    done = run(script, 4000, max_runs=2, prefer="memory")
    probe, lesson = done.trials
    assert probe.held_out is None and lesson.purpose == "learn"
    assert lesson.held_out == pytest.approx(lesson.losses[-1] + 1) and lesson.final == lesson.held_out
    assert done.rows[1][5].endswith(f", held out {lesson.held_out:.4g}")
    assert "--eval_strategy epoch" in done.script.read_text()  # type: ignore[union-attr]


def test_a_session_that_its_limit_cut_short_goes_on_with_a_wider_one(script: Path) -> None:
    cut = []

    def limited(number, decision, predicted, timeout):  # type: ignore[no-untyped-def]
        """A probe of 20 s; of the learning run the limit leaves one step."""
        losses = (2.5, 2.4, 2.3, 2.2, 2.1)[: 3 if decision.purpose == "probe" else 5]
        short = timeout is not None and timeout < 60 and decision.purpose == "learn"
        cut.append(short)
        return Trial(
            number, decision.purpose, decision.configuration, decision.steps, 2, decision.reason,
            "timeout" if short else "fits", measured_B=None if short else 60 * MIB, samples_per_s=3.0,
            losses=losses[:1] if short else losses, seconds=20.0, first_step_s=10.0, cause="the time limit" if short else "",
            rates=(2e-4,) * (1 if short else len(losses)),
        )  # fmt: skip

    def go(limit_s: float, resume: bool) -> Tuning:
        options = TuneOptions(runs=Path("runs"), resume=resume)
        goal = Goal(4000 * MIB, prefer="memory", steps=(5,), time_limit_s=limit_s)
        patch = PatchOptions(learning_rate=2e-4)
        return tune(script, goal, patch, options, estimate=predict, run_trial=limited)

    first = go(50, False)
    assert first.end == "limit" and [trial.outcome for trial in first.trials][-1] == "timeout"
    assert "cut short" in first.rows[-1][6] and first.winner is not None and first.winner.purpose == "probe"
    rest = go(900, True)
    assert rest.folder == first.folder and rest.end == "done" and rest.passed, rest.reason
    again = rest.trials[len(first.trials)]
    assert (again.configuration, again.steps) == (first.trials[-1].configuration, 5) and again.learning.learns


def test_an_interruption_is_no_run_and_writes_no_script(script: Path) -> None:
    def interrupted(number, decision, predicted, timeout):  # type: ignore[no-untyped-def]
        return Trial(number, "probe", decision.configuration, 3, 2, decision.reason, "interrupted")

    goal = Goal(110 * MIB)
    done = tune(script, goal, None, TuneOptions(runs=Path("runs")), estimate=predict, run_trial=interrupted)
    assert done.end == "interrupted" and not done.passed and done.trials == () and done.script is None
    assert "--resume" in done.reason and not (script.parent / "train_tuned.sh").exists()
    assert (done.folder / "tune.json").exists()


def test_somebody_elses_file_of_that_name_is_left_alone(script: Path) -> None:
    own = script.with_name("train_tuned.sh")
    own.write_text("echo mine\n")
    done = run(script, 4000, max_runs=2)
    assert own.read_text() == "echo mine\n" and done.script == script.with_name("train_tuned.1.sh")


def test_nothing_fits_is_told_and_nothing_is_written(script: Path) -> None:
    done = run(script, 10)
    assert done.end == "nothing fits" and not done.passed and done.script is None
    assert "nothing fits in" in done.reason
    assert not script.with_name("train_tuned.sh").exists()


def test_a_training_that_fails_ends_it_with_the_cause(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = script.parent / "train.py"
    trainer.write_text(trainer.read_text().replace("    args = parser.parse_args()", "    raise ValueError('no luck')"))
    done = run(script, 4000)
    assert done.end == "failed" and "no luck" in done.reason and len(done.trials) == 1 and not done.passed


# -- the dry run, and the command line -----------------------------------------------------------------------------------


def test_a_dry_run_shows_the_rungs_and_runs_nothing(script: Path) -> None:
    before = sorted(path.name for path in script.parent.iterdir())
    found = preview(script, Goal(110 * MIB), estimate=predict)
    rungs = {label: (costs, alone, saves) for label, costs, alone, saves, _ in found.rungs}
    assert rungs["micro-batch 1"] == ("speed", 22 * MIB, 14 * MIB)
    assert rungs["gradient checkpointing"] == ("speed", 28 * MIB, 8 * MIB)
    saved = [saves or 0 for _, _, _, saves, _ in found.rungs]
    assert saved == sorted(saved, reverse=True)  # by bytes
    assert found.first.configuration == found.start and dict(found.closed)["fewer bits"]
    assert sorted(path.name for path in script.parent.iterdir()) == before and not Path("runs").exists()


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["tune", *arguments])


def test_the_command_tells_what_it_does_and_what_came_of_it(script: Path) -> None:
    shown = command(str(script), "--budget", "4GiB", "--dry-run", "--learning-rate", "2e-4")
    assert shown.exit_code == 0 and "the script's own settings: 8 × 4" in shown.output and "first run:" in shown.output
    done = command(
        str(script), "--budget", "4GiB", "--max-runs", "2", "--steps", "5,20", "--time-limit", "10min", "--interval", "0.2"
    )
    assert done.exit_code == 0, done.output
    assert "to go on: the same command with --resume and a wider limit" in done.output
    assert "run 1, probe of 3 steps" in done.output and "limit: the limit of 2 runs is reached" in done.output
    assert "because " in done.output and "+++ train_tuned.sh" in done.output and "written: " in done.output


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--budget", "0"], 2, "--budget has to be more than 0"),
        (["--budget", "much"], 2, "'much' is not a size such as 24GiB"),
        (["--budget", "1GiB", "--prefer", "luck"], 2, "--prefer luck: choose one of speed, memory, quality"),
        (["--budget", "1GiB", "--max-runs", "0"], 2, "--max-runs has to be at least 1, not 0"),
        (["--budget", "1GiB", "--time-limit", "soon"], 2, "'soon' is not a time such as 2h, 30min or 90s"),
        (["--budget", "1GiB", "--time-limit", "0s"], 2, "--time-limit has to be more than 0"),
        (["--budget", "1GiB", "--steps", "20,5"], 2, "--steps 20,5: whole numbers from 2 on"),
        (["--budget", "1GiB", "--steps", "some"], 2, "'some' is not a list of steps"),
        (["--budget", "1GiB", "--ladder", "nothing"], 2, "there is no ladder nothing"),
        (["--budget", "1GiB", "--ladder", "."], 2, "there is no ladder . (Is a directory)"),
        (["--budget", "1GiB", "--ladder", "kit/data.json"], 2, "kit/data.json: a ladder has `order` and a list of `rungs`"),
        (["--budget", "1GiB", "--model", "nowhere"], 3, "--model nowhere: there is no such folder"),
        (["--budget", "1GiB", "--resume"], 3, "holds no tuning of train.sh to go on with"),
        ([], 2, "Missing option '--budget'"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(script: Path, arguments: list[str], code: int, sentence: str) -> None:
    done = command(str(script), *arguments)
    assert done.exit_code == code and sentence in done.output and "Traceback" not in done.output, done.output
    assert not Path("lorapatch_runs").exists()


def test_the_make_target_is_the_command(script: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make here")
    words = [make, "--no-print-directory", "-n", "tune", f"SCRIPT={script}", "BUDGET=8GiB", "TUNE_OPTIONS=--dry-run"]
    shown = subprocess.run(words, cwd=resource_dir("templates").parent, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == f".venv/bin/lorapatch tune {script} --budget 8GiB --dry-run"


def test_a_number_that_only_a_run_can_tell_is_refused_with_its_line(script: Path) -> None:
    script.write_text(script.read_text().replace("BATCH=8\n", "BATCH=$(nproc)\n"))
    with pytest.raises(Refused, match=r"train\.sh: line \d+: --per_device_train_batch_size \$BATCH can only be known"):
        run(script, 100)


def test_going_on_with_another_aim_is_refused(script: Path) -> None:
    run(script, 4000, max_runs=1)
    with pytest.raises(Refused, match="was tuned with another budget; say the same again"):
        run(script, 5000, resume=True)
    script.write_text(script.read_text() + "\n# a new line\n")
    with pytest.raises(Refused, match="another script and another settings"):
        run(script, 4000, resume=True)
    file = next(Path("runs").glob("*/tune.json"))
    data = json.loads(file.read_text())
    data["trials"][0].pop("steps")
    file.write_text(json.dumps(data))
    script.write_text(script.read_text().replace("\n# a new line\n", ""))
    with pytest.raises(Refused, match="is not what lorapatch wrote"):
        run(script, 4000, resume=True)


def test_goals_out_of_their_range_are_usage_errors() -> None:
    with pytest.raises(UsageError):
        Goal(-1)
