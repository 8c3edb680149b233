"""What is run next, and why: in worlds on paper, where every run's outcome is known."""

from __future__ import annotations

from dataclasses import replace

import h200
import pytest
from world import GIB, START, World, budget, space, tuned

from lorapatch.tune.decide import decide, winner
from lorapatch.tune.fitting import Fitting, corrected
from lorapatch.tune.ladder import Machine
from lorapatch.tune.trial import Goal, Prediction, Trial


def described(trials: list[Trial]) -> list[str]:
    return [f"{trial.purpose} {trial.configuration.unlike(START)}: {trial.outcome}" for trial in trials]


@pytest.mark.parametrize("size", [8, 9, 10, 12, 16, 24, 80])
def test_no_budget_is_exceeded_and_few_runs_are_needed(size: int) -> None:
    world, goal = World(), budget(size)
    trials, end = tuned(world, goal)
    best = winner(goal, trials)
    assert end.end == "done" and best is not None and best.learning.learns, end.reason
    assert world.bytes(best.configuration) <= goal.budget_B
    assert len(trials) <= 7, described(trials)
    assert best.configuration.samples == START.samples  # the global batch
    assert all(trial.fits for trial in trials)  # predictions were right, so nothing was tried in vain


def test_more_room_is_used_for_speed() -> None:
    rates = []
    for size in (9, 12, 16, 24, 80):
        goal = budget(size)
        best = winner(goal, tuned(World(), goal)[0])
        assert best is not None and best.configuration.bits == 16 and best.configuration.r == 16
        rates.append(best.samples_per_s or 0)
    assert rates == sorted(rates) and rates[-2] > 2 * World().samples_per_s(START.with_micro_batch(1))


def test_the_fastest_as_measured_wins_and_not_as_scored() -> None:
    class Slow(World):
        def samples_per_s(self, c):  # type: ignore[no-untyped-def]
            return super().samples_per_s(c) * (1 if c.checkpointing else 0.2)

    goal = budget(80)
    trials, _ = tuned(Slow(), goal)
    best = winner(goal, trials)
    kinds = {trial.configuration.checkpointing for trial in trials if trial.purpose == "probe"}
    assert kinds == {True, False} and best is not None and best.configuration.checkpointing


def test_what_cannot_fit_is_skipped_unseen_with_its_prediction() -> None:
    first = decide(space(), budget(7.5), [], World().predict)
    assert first.configuration is not None and first.configuration.bits in (4, 8)
    (item,) = [item for item in first.skipped if item.configuration.bits == 16 and not item.configuration.offload]
    assert item.configuration.micro_batch == 1 and item.expected_B == World().bytes(item.configuration)
    assert "GiB" in item.reason


def test_of_the_rungs_that_suffice_the_one_that_gives_up_least_is_taken() -> None:
    # At micro-batch 1 the whole thing takes 8.71 GiB; the optimizer in host memory saves 0.35 and costs no quality.
    first = decide(space(), budget(8.7), [], World().predict)
    assert first.configuration is not None
    assert first.configuration.offload and first.configuration.bits == 16, first.reason


def test_four_bits_are_measured_against_eight_where_they_may_be_faster() -> None:
    trials, _ = tuned(World(), budget(7.5, prefer="speed"))
    assert {trial.configuration.bits for trial in trials} == {8, 4} or {t.configuration.bits for t in trials} == {4}
    only = tuned(World(), budget(7.5, prefer="quality"))[0]
    assert {trial.configuration.bits for trial in only} == {8}


def test_memory_can_be_preferred() -> None:
    goal = budget(24, prefer="memory")
    trials, _ = tuned(World(), goal)
    best = winner(goal, trials)
    assert best is not None and best.configuration.micro_batch == 1 and best.configuration.checkpointing
    assert best.configuration.bits == 16  # nothing is given up for what fits anyway


def test_the_plan_goes_by_its_own_order() -> None:
    first = decide(space(ladder="plan"), budget(8.68), [], World().predict)
    given_up = [item.configuration for item in first.skipped]
    assert [c.r for c in given_up][:2] == [16, 8] and given_up[-1].r == 8
    assert first.configuration is not None and first.configuration.r == 8


def test_nothing_fits_is_said_with_the_smallest() -> None:
    trials, end = tuned(World(), budget(2.5))
    assert trials == [] and end.end == "nothing fits"
    assert "nothing fits in 2.50 GiB: the smallest" in end.reason and "4 bit" in end.reason
    assert winner(budget(2.5), trials) is None


def test_a_prediction_that_is_too_low_costs_runs_but_no_budget() -> None:
    world = World(error=lambda size: size * 7 // 10)
    goal = budget(12)
    trials, end = tuned(world, goal)
    best = winner(goal, trials)
    assert end.end == "done" and best is not None and best.fits, described(trials)
    assert any(trial.outcome == "oom" for trial in trials) and len(trials) <= 9
    # What was measured once is not predicted wrong twice: no two runs out of memory at growing size.
    sizes = [world.bytes(trial.configuration) for trial in trials if trial.outcome == "oom"]
    assert sizes == sorted(sizes, reverse=True)


def test_a_prediction_that_is_too_high_is_corrected_downwards() -> None:
    world = World(error=lambda size: size * 14 // 10)
    goal = budget(16)
    trials, _ = tuned(world, goal)
    best = winner(goal, trials)
    assert best is not None and world.bytes(best.configuration) > world.bytes(trials[0].configuration)


def test_a_trace_is_asked_for_only_where_the_closed_form_leaves_it_open() -> None:
    world = World()
    decide(space(), budget(24), [], world.predict)
    traced = [c for c, exact in world.asked if exact]
    assert 1 <= len(traced) <= 2
    world = World()
    decide(space(), budget(500), [], world.predict)
    assert not any(exact for _, exact in world.asked)


def test_what_a_trace_shows_may_take_another_rung() -> None:
    class Optimist(World):
        def predict(self, c, exact):  # type: ignore[no-untyped-def]
            self.asked.append((c, exact))
            size = self.bytes(c) if exact else self.bytes(c) * 8 // 10
            return Prediction(size * 8 // 10, size, size * 14 // 10, 2 * GIB, "trace" if exact else "closed form")

    world = Optimist()
    first = decide(space(), budget(8), [], world.predict)  # 8.7 GiB at least, in closed form 7
    assert first.configuration is not None and first.configuration.bits in (4, 8), first.reason
    assert world.bytes(first.configuration) <= 8 * GIB
    assert len([c for c, exact in world.asked if exact]) <= 2


def test_a_kind_that_fails_is_left_alone_and_the_next_is_taken() -> None:
    goal = budget(7.5, prefer="quality")
    trials, end = tuned(World(broken={"bits": 8}), goal)
    best = winner(goal, trials)
    assert [trial.configuration.bits for trial in trials if trial.outcome == "failed"] == [8]
    assert end.end == "done" and best is not None and best.configuration.bits == 4


def test_what_a_diagnosis_names_is_taken_away_whole() -> None:
    # Without bitsandbytes there are neither 4 nor 8 bits, however the rest is set.
    trials, end = tuned(World(broken={"bits": 4}, diagnosis="quantisation-missing"), budget(7.5))
    assert [trial.configuration.bits for trial in trials][:1] == [4]
    assert all(trial.configuration.bits == 16 for trial in trials[1:]) and end.end == "nothing fits"
    assert "nothing fits in 7.50 GiB: the smallest," in end.reason
    assert "run 1 failed: bitsandbytes is not there; try `pip install bitsandbytes`, and 6.85 GiB are" in end.reason
    ended = decide(space(), budget(7.5, max_runs=1), trials[:1], World().predict)
    assert ended.reason.startswith("the limit of 1 run is reached; run 1 failed: bitsandbytes is not there; try `pip")
    eight = next(item for item in end.skipped if item.configuration.bits == 8)
    assert eight.reason == "run 1 failed: bitsandbytes is not there"


def test_host_memory_that_cannot_be_used_is_done_without() -> None:
    # The script offloads, and the operation for that cannot be compiled here.
    start = replace(START, deepspeed="z_offload.json", offload=True)
    where = space(start, machine=Machine(1, (("no_offload", "z.json"),)))
    world = World(broken={"offload": True}, diagnosis="deepspeed-build")
    trials, end = tuned(world, budget(8.7), where)
    best = winner(budget(8.7), trials)
    assert [trial.outcome for trial in trials if trial.configuration.offload] == ["failed"]
    assert best is not None and not best.configuration.offload and best.learning.learns, end.reason
    assert end.end == "done" and "run 1 failed: " in end.reason
    # Where no file without it stands beside the script's own, nothing else can be tried.
    trials, end = tuned(world, budget(24), space(start, machine=Machine(1)))
    assert len(trials) == 1 and end.end == "failed"


def test_without_predictions_what_failed_is_passed_by() -> None:
    world, goal, trials = World(broken={"checkpointing": True}), budget(1), list[Trial]()
    where = space(replace(START, micro_batch=1, accumulation=2, checkpointing=False))
    for _ in range(8):
        decision = decide(where, goal, trials, lambda c, exact: None)
        if decision.configuration is None:
            break
        trials.append(world.run(len(trials) + 1, decision, goal))
    assert [t.configuration.checkpointing for t in trials[:2]] == [False, True] and len(trials) > 3
    assert not any(trial.configuration.checkpointing for trial in trials[2:])


# -- as it was on a real card ------------------------------------------------------------------------------------------


def test_a_missing_module_is_no_measurement() -> None:
    where, failed = h200.space(), h200.failed()
    first = decide(where, h200.GOAL_8, [], h200.predict)
    assert first.configuration == failed.configuration and first.expected_B == failed.expected_B
    fitting = Fitting(where, h200.GOAL_8, [failed], h200.predict)
    assert failed.measured_B is not None and (fitting.expected(failed.configuration) or 0) < 9 << 30 < failed.measured_B
    assert all((fitting.expected(rung.on(h200.START) or h200.START) or 0) < 14 << 30 for rung in where.rungs)
    # What comes nearest without it is tried, and out of memory ends it.
    trials, decision = [failed], decide(where, h200.GOAL_8, [failed], h200.predict)
    while decision.configuration is not None:
        assert decision.configuration.bits == 16
        assert decision.expected_B is not None and 8 << 30 < decision.expected_B < 10 << 30
        number = len(trials) + 1
        trials.append(Trial(number, "probe", decision.configuration, 3, 2, decision.reason, "oom", seconds=30.0))
        decision = decide(where, h200.GOAL_8, trials, h200.predict)
    assert decision.end == "nothing fits" and len(trials) <= 3
    assert h200.CAUSE.rstrip(".") in decision.reason and "32.5" not in decision.reason
    assert "try `pip install -U bitsandbytes`, and 6.73 GiB are expected of 2 × 64" in decision.reason


def test_a_session_that_was_cut_short_is_judged_by_what_it_has() -> None:
    probe = replace(h200.cut_short(), number=3, purpose="probe", outcome="fits", losses=(12.72, 12.77, 10.66), rates=())
    lesson = h200.cut_short()
    assert lesson.fits and lesson.counts and lesson.learning.learns
    goal = Goal(12 << 30, steps=(5,), time_limit_s=210.0)
    assert winner(goal, [probe, lesson]) == lesson
    # Gone on with, it is as good as one that ended by itself.
    end = decide(h200.space(), replace(goal, time_limit_s=900.0), [probe, lesson], h200.predict)
    assert end.end == "done" and "run 4 fits and learns" in end.reason
    # One that has too few losses is run again, and its memory is known all the same.
    early = replace(lesson, losses=lesson.losses[:2], rates=h200.RATES[:2])
    again = decide(h200.space(), replace(goal, time_limit_s=900.0), [probe, early], h200.predict)
    assert again.configuration == early.configuration and again.purpose == "learn" and again.steps == 5
    # One that ended before anything was there is as if it had not been.
    nothing = replace(lesson, losses=(), rates=(), measured_B=None)
    assert not nothing.fits and not nothing.counts
    once_more = decide(h200.space(), replace(goal, time_limit_s=900.0), [probe, nothing], h200.predict)
    assert once_more.configuration == nothing.configuration and winner(goal, [probe, nothing]) == probe


def test_a_run_that_would_not_reach_its_first_step_is_not_started() -> None:
    # 16 GiB: 210 s of limit, 205.4 s run, and the last run took 36 s to its first step.
    goal = Goal(16 << 30, steps=(5,), time_limit_s=210.0)
    run = replace(h200.cut_short(), number=3, outcome="fits", seconds=205.4, first_step_s=36.2)
    end = decide(h200.space(), goal, [run], h200.predict)
    assert end.end == "limit"
    assert end.reason == "5 s of the time limit of 210 s are left, and run 3 took 36 s to its first step"
    assert decide(h200.space(), replace(goal, time_limit_s=300.0), [run], h200.predict).end != "limit"


def test_a_failure_of_the_scripts_own_settings_ends_it() -> None:
    start = replace(START, checkpointing=True)
    trials, end = tuned(World(broken={"bits": 16}), budget(12), space(start))
    assert end.end == "failed" and "bitsandbytes is not there" in end.reason and len(trials) == 1


def test_limits_end_it_and_are_named() -> None:
    trials, end = tuned(World(works=(1.0, 2.0)), budget(24, max_runs=3))
    assert len(trials) == 3 and end.end == "limit" and end.reason == "the limit of 3 runs is reached"
    trials, end = tuned(World(works=(1.0, 2.0)), budget(24, time_limit_s=100))
    assert len(trials) == 3 and end.reason.startswith("10 s of the time limit of 100 s are left, and run 3 took 20 s")
    trials, end = tuned(World(works=(1.0, 2.0)), budget(24, time_limit_s=90))
    assert len(trials) == 3 and "the time limit of 90 s is reached, 90 s were run" in end.reason


def test_host_memory_is_measured_before_anything_is_believed() -> None:
    host = space(machine=Machine(0))
    first = decide(host, budget(1), [], World().predict)
    assert first.configuration == host.start and "measured first" in first.reason


def test_without_predictions_it_goes_down_as_written_and_up_by_what_was_measured() -> None:
    world, trials = World(), list[Trial]()
    goal = budget(8.6)
    for _ in range(12):
        decision = decide(space(), goal, trials, lambda c, exact: None)
        if decision.configuration is None:
            break
        trials.append(world.run(len(trials) + 1, decision, goal))
    probes = [trial.configuration.micro_batch for trial in trials if trial.purpose == "probe"]
    assert probes[:3] == [4, 2, 1]
    best = winner(goal, trials)
    assert best is not None and world.bytes(best.configuration) <= goal.budget_B
    # With room for twice as much the micro-batch is doubled.
    goal, trials = budget(80), []
    for _ in range(3):
        decision = decide(space(), goal, trials, lambda c, exact: None)
        trials.append(world.run(len(trials) + 1, decision, goal))
    assert [trial.configuration.micro_batch for trial in trials] == [4, 8, 16]


@pytest.mark.parametrize("size", [7.5, 8.7, 12, 24])
def test_the_same_input_gives_the_same_decisions(size: float) -> None:
    runs = [tuned(World(), budget(size)) for _ in range(2)]
    assert [t.as_dict() for t in runs[0][0]] == [t.as_dict() for t in runs[1][0]] and runs[0][1] == runs[1][1]
    # And from any point on: a session that is gone on with decides as one that was never interrupted.
    trials, _ = runs[0]
    for done in range(len(trials)):
        again = decide(space(), budget(size), [Trial.from_dict(t.as_dict()) for t in trials[:done]], World().predict)
        assert again.configuration == trials[done].configuration and again.reason == trials[done].reason


def test_corrections_are_the_line_through_what_was_measured() -> None:
    x = Prediction(0, 10 * GIB, 20 * GIB)
    assert corrected(x, []) == 10 * GIB
    assert corrected(x, [(8 * GIB, 9 * GIB)]) == 11 * GIB
    assert corrected(x, [(8 * GIB, 6 * GIB)]) == 9 * GIB  # downwards by half
    assert corrected(x, [(8 * GIB, 9 * GIB), (9 * GIB, 11 * GIB)]) == 13 * GIB
    assert corrected(x, [(8 * GIB, 9 * GIB), (9 * GIB, 99 * GIB)], steepest=3) == 102 * GIB


# -- does it learn? ----------------------------------------------------------------------------------------------------


def rates(trials: list[Trial]) -> list[float]:
    return [trial.configuration.learning_rate for trial in trials if trial.purpose == "learn"]


def test_lessons_grow_until_they_are_clear() -> None:
    trials, end = tuned(World(), budget(24))
    lessons = [trial.steps for trial in trials if trial.purpose == "learn"]
    assert lessons == [5, 20] and "fits and learns" in end.reason
    assert end.reason.count("a step (90 %") == 1


def test_a_rate_that_diverges_is_lowered_until_one_works() -> None:
    goal = budget(24, max_runs=20)
    start = replace(START, learning_rate=0.5)
    trials, end = tuned(World(), goal, space(start))
    best = winner(goal, trials)
    assert best is not None and best.learning.learns and 1e-4 <= best.configuration.learning_rate <= 1e-3
    assert rates(trials) == [0.5, 0.05, 0.005, 0.0005, 0.0005]
    assert [trial.steps for trial in trials if trial.purpose == "learn"] == [5, 5, 5, 5, 20]
    assert "is too high" in trials[-2].reason


def test_a_flat_loss_gets_five_and_ten_times_the_rate() -> None:
    goal = budget(24, max_runs=20)
    start = replace(START, learning_rate=2e-5)
    trials, _ = tuned(World(works=(1.5e-4, 1e-3)), goal, space(start))
    assert list(dict.fromkeys(rates(trials))) == [2e-5, 1e-4, 2e-4]
    best = winner(goal, trials)
    assert best is not None and best.learning.learns and best.configuration.learning_rate == 2e-4


def test_where_no_rate_helps_rank_and_modules_go_up_and_then_it_ends() -> None:
    goal = budget(24, max_runs=30)
    start = replace(START, target_modules="q_proj,v_proj")
    trials, end = tuned(World(works=(0.5, 2.0)), goal, space(start))
    said = [trial.configuration.unlike(start) for trial in trials if trial.purpose == "learn"]
    assert any("r 32 (was 16)" in words for words in said) and any("all seven modules" in words for words in said)
    assert end.end == "done" and end.reason.startswith("nothing more to try")
    best = winner(goal, trials)
    assert best is not None and not best.learning.learns


def test_between_a_rate_that_is_too_low_and_one_too_high_lies_the_next() -> None:
    goal = budget(24, max_runs=30)
    start = replace(START, learning_rate=1e-2)
    trials, _ = tuned(World(works=(2e-3, 5e-3)), goal, space(start))
    assert rates(trials)[0] == 1e-2 and any(1e-3 < rate < 1e-2 for rate in rates(trials))


def test_quality_goes_on_until_nothing_improves() -> None:
    goal = budget(24, prefer="quality", max_runs=30)
    trials, end = tuned(World(), goal)
    assert max(rates(trials)) > START.learning_rate
    assert "nothing improves any more" in end.reason or "nothing more to try" in end.reason
    best = winner(goal, trials)
    assert best is not None and best.learning.learns
