"""What `lorapatch tune` makes of budgets of 8, 12, 16 and 24 GiB, beside the plan's own settings.

    python benchmarks/tune_budgets.py --work W                  # needs a GPU; models of true size are made in W/demo
    python benchmarks/tune_budgets.py --work W --device cpu --budgets 2.9,3.2 --runs 4    # the miniature, host memory

The script of the plan, once for each budget, all tuned at the same time on one card: each trainer is held to its budget
by LORAPATCH_MEMORY_FRACTION, so that running out of memory is real. A budget's line is printed as soon as it is known.
Speeds measured side by side are for the decisions alone: at the end each chosen configuration, and the plan's (micro-batch
1, r 16, checkpointing, this trainer), is run once more by itself, at the same global batch, and that is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

GIB = 1 << 30
SCRIPT = "train_mgm_2b_stage_1_10k_baseline.sh"
LEARNING_RATE = 2e-4  # ten times what the script has for full tuning
ALONE_STEPS = 3
COLUMNS = ("budget", "chosen", "runs", "minutes", "samples/s", "peak", "reserved", "loss", "end")


def tune_one(script: Path, budget_GiB: float, options: argparse.Namespace) -> dict[str, Any]:
    """One session, in a process of its own."""
    from lorapatch.lora.flags import PatchOptions
    from lorapatch.tune import Goal, TuneOptions, tune

    os.chdir(script.parent)
    goal = Goal(
        int(budget_GiB * GIB), steps=options.steps, max_runs=options.runs, time_limit_s=options.session_limit
    )
    began = time.monotonic()
    done = tune(
        script, goal, PatchOptions(learning_rate=LEARNING_RATE), TuneOptions(runs=options.work / "runs", interval_s=1)
    )
    trials = [
        {**trial.as_dict(), "reserved_B": _reserved(done.folder / trial.folder), "words": trial.configuration.words()}
        for trial in done.trials
    ]
    return {
        "budget_GiB": budget_GiB,
        "minutes": (time.monotonic() - began) / 60,
        "end": done.end,
        "reason": done.reason,
        "trials": trials,
        "winner": done.winner.number if done.winner else None,
        "script": str(done.script) if done.script else None,
        "folder": str(done.folder),
    }


def _reserved(folder: Path) -> int | None:
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    found = record["metrics"]["trainer"].get("speed", {}).get("peak_reserved_B")
    return int(found) if found else None


def run_alone(
    script: Path, budget_GiB: float, options: argparse.Namespace, predicted: Any, micro_batch: int | None = None
) -> dict[str, Any]:
    """A few steps of a script with nothing else on the card; the script of the plan with ``micro_batch``, else as it is."""
    from lorapatch.lora.flags import PatchOptions
    from lorapatch.run.runs import RunOptions
    from lorapatch.run.view import PlainView
    from lorapatch.tune.decide import Decision
    from lorapatch.tune.script import read_tuned
    from lorapatch.tune.trial import Goal
    from lorapatch.tune.trials import Runner

    os.chdir(script.parent)
    tuned = read_tuned(script, PatchOptions(learning_rate=LEARNING_RATE) if micro_batch else None, None)
    configuration = tuned.start.with_micro_batch(micro_batch) if micro_batch else tuned.start
    silent = PlainView(lambda line: None)
    runner = Runner(
        tuned, Goal(int(budget_GiB * GIB)), RunOptions(runs=options.work / "alone", interval_s=1), silent,
        gpu=options.device == "cuda",
    )  # fmt: skip
    # At most eight micro-steps a step: the optimizer's own time, a few ms of LoRA, is all that changes with more.
    shown = replace(configuration, accumulation=min(configuration.accumulation, 8))
    trial = runner(1, Decision("alone", shown, "learn", ALONE_STEPS), predicted, options.alone_limit)
    return {**trial.as_dict(), "reserved_B": _reserved(options.work / "alone" / trial.folder), "words": configuration.words()}


def row(found: dict[str, Any]) -> str:
    """A budget's line of the table."""
    chosen = next((trial for trial in found["trials"] if trial["number"] == found["winner"]), None)
    sizes = [trial["measured_B"] for trial in found["trials"] if trial["outcome"] == "fits"]
    cells = [f"{found['budget_GiB']:g} GiB", chosen["words"] if chosen else "none"]
    cells += [str(len(found["trials"])), f"{found['minutes']:.1f}"]
    cells += [_number(chosen and chosen["samples_per_s"]), _size(max(sizes, default=None))]
    cells += [_size(chosen and chosen["reserved_B"]), chosen["learning"]["sentence"] if chosen else "", found["reason"]]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"


def _size(value: int | None) -> str:
    return "n/a" if value is None else f"{value / GIB:.2f} GiB"


def compare(options: argparse.Namespace, sessions: list[dict[str, Any]], plan: Path) -> dict[str, Any]:
    """Each winner and the plan's settings by themselves, one after another."""
    from lorapatch.tune import Prediction

    largest = max(options.budgets)
    print("\n| alone | configuration | samples/s | times the plan's | peak | reserved | outcome |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    # The context is the same for all; without a prediction of it the driver's figure for the card is taken.
    known = next((trial["predicted"] for found in sessions for trial in found["trials"] if trial["predicted"]), None)
    predicted = Prediction(**known) if known else None
    results: dict[str, Any] = {"plan": run_alone(plan, largest, options, predicted, 1)}
    slow = results["plan"]["samples_per_s"]
    _print_alone("the plan's", results["plan"], slow)
    for found in sorted(sessions, key=lambda session: -session["budget_GiB"]):
        if found["script"]:
            name = f"{found['budget_GiB']:g} GiB"
            results[name] = run_alone(Path(found["script"]), found["budget_GiB"], options, predicted)
            _print_alone(name, results[name], slow)
    return results


def _print_alone(name: str, result: dict[str, Any], slow: float | None) -> None:
    rate = result["samples_per_s"]
    times = f"{rate / slow:.1f}" if rate and slow else "n/a"
    cells = [name, result["words"], _number(rate), times, _size(result["measured_B"]), _size(result["reserved_B"])]
    print(f"| {' | '.join([*cells, result['outcome']])} |", flush=True)


def prepare(options: argparse.Namespace) -> dict[float, Path]:
    """The demo, and a copy of its script for each budget and for the plan (0)."""
    from lorapatch.demo import make_demo

    size = "true" if options.device == "cuda" else "tiny"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # its GPU memory is gone with it
        toolkit = process.submit(make_demo, options.work / "demo", size=size, device=options.device).result()
    scripts = {}
    for budget in (0.0, *options.budgets):
        scripts[budget] = toolkit / (f"tune_{budget:g}.sh" if budget else "tune_plan.sh")
        scripts[budget].write_bytes((toolkit / SCRIPT).read_bytes())
    return scripts


def main(argv: list[str]) -> int:
    """Tune every budget at once, then measure what was chosen alone."""
    if not argv:
        print("needs a GPU and some minutes; nothing was run (--help says how)")
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="demo, runs and results")
    parser.add_argument("--budgets", type=lambda text: [float(part) for part in text.split(",")], default=[8, 12, 16, 24])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=lambda text: tuple(int(part) for part in text.split(",")), default=(5,))
    parser.add_argument("--runs", type=int, default=5, help="of each budget at most")
    parser.add_argument("--jobs", type=int, default=4, help="budgets at the same time")
    parser.add_argument("--session-limit", type=float, default=240, help="seconds that a budget's runs may take")
    parser.add_argument("--alone-limit", type=float, default=90, help="seconds that a run by itself may take")
    options = parser.parse_args(argv)
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    began = time.monotonic()
    scripts = prepare(options)
    print(f"demo: {time.monotonic() - began:.0f} s\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    sessions: list[dict[str, Any]] = []
    results: dict[str, Any] = {"sessions": sessions}
    # The smallest budget needs the most runs: it begins first.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {pool.submit(tune_one, scripts[b], b, options): b for b in sorted(options.budgets)}
        for job in as_completed(jobs):
            try:
                sessions.append(job.result())
            except Exception as error:  # noqa: BLE001 - the other budgets go on
                print(f"| {jobs[job]:g} GiB | {type(error).__name__}: {error} |", flush=True)
                continue
            print(row(sessions[-1]), flush=True)
            _write(options, results)
    print(f"\nside by side: {time.monotonic() - began:.0f} s")
    results["alone"] = compare(options, sessions, scripts[0.0])
    _write(options, results)
    print(f"\nin all: {time.monotonic() - began:.0f} s; {options.work / 'tune_budgets.json'}")
    return 0


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    text = json.dumps(results, indent=1, default=str)
    (options.work / "tune_budgets.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
