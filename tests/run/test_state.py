"""What the events of a log add up to."""

from __future__ import annotations

from lorapatch.run.log import LogParser
from lorapatch.run.state import RunState


def state_of(*lines: str, state: RunState | None = None) -> RunState:
    """A state that has seen ``lines``, one a second."""
    state = state or RunState()
    parser = LogParser()
    for second, line in enumerate(lines):
        for event in parser.feed(line.encode()):
            state.apply(event, float(second))
    for event in parser.close():
        state.apply(event, float(len(lines)))
    return state


def bar(step: int, total: int, name: str = "") -> str:
    percent = f"{100 * step // total:3d}%"
    return f"{name}{': ' if name else ''}{percent}|██  | {step}/{total} [00:0{step % 10}<00:01,  1.00it/s]\r"


def loss(value: float) -> str:
    return f"{{'loss': {value}, 'grad_norm': 1.0, 'learning_rate': 1e-4, 'epoch': 0.1}}\n"


def test_steps_follow_the_bar_and_losses_get_its_step() -> None:
    state = state_of(bar(0, 5), bar(1, 5), loss(3.0), bar(2, 5), loss(2.5))
    assert [(row.step, row.loss) for row in state.logged] == [(1, 3.0), (2, 2.5)]
    assert (state.step, state.total, state.steps_per_s) == (2, 5, 1.0)


def test_steps_are_counted_when_the_bar_is_too_slow_to_be_drawn() -> None:
    state = state_of(bar(0, 30), loss(3.0), loss(2.9), loss(2.8), state=RunState(logging_steps=10))
    assert [row.step for row in state.logged] == [10, 20, 30]


def test_a_resumed_run_counts_from_where_the_bar_starts() -> None:
    state = state_of(bar(41, 50), loss(2.0), bar(42, 50), loss(1.9))
    assert [row.step for row in state.logged] == [41, 42]


def test_a_resumed_run_counts_on_where_its_first_entry_comes_before_the_bar() -> None:
    state = state_of(bar(0, 9), loss(2.0), bar(5, 9), bar(6, 9), loss(1.9), state=RunState(first_step=4))
    assert [row.step for row in state.logged] == [5, 6]


def test_samples_a_second_need_a_step_before() -> None:
    state = state_of(bar(1, 5), loss(3.0), bar(2, 5), loss(2.0), state=RunState(samples_per_step=16))
    assert [row.samples_per_s for row in state.logged] == [None, 8.0]


def test_bars_of_loading_mapping_and_evaluation_are_not_the_trainings() -> None:
    state = state_of(bar(2, 2, "Loading checkpoint shards"), bar(0, 9), bar(3, 9), bar(7, 80), bar(4, 9))
    assert (state.step, state.total) == (4, 9)


def test_a_second_training_of_the_script_is_a_new_stage() -> None:
    summary = "{'train_runtime': 9.0, 'train_loss': 2.0}\n"
    state = state_of(bar(0, 2), bar(1, 2), loss(3.0), bar(2, 2), loss(2.9), summary, bar(0, 7), bar(1, 7), loss(1.0))
    assert [(row.stage, row.step) for row in state.logged] == [(1, 1), (1, 2), (2, 1)]
    assert (state.total, state.losses, state.summary) == (7, [1.0], {})


def test_an_evaluation_behind_the_training_does_not_hide_it() -> None:
    state = state_of(
        bar(0, 2), bar(1, 2), loss(3.0), bar(2, 2), loss(2.0), "{'train_runtime': 9.0}\n", bar(1, 80), bar(80, 80)
    )
    assert (state.stage, state.step, state.total, state.losses) == (1, 2, 2, [3.0, 2.0])


def test_the_facts_of_a_stage_are_its_own() -> None:
    facts = '{"lorapatch": "lora", "lora": %d}\n'
    speed = '{"lorapatch": "speed", "steps": 1}\n'
    summary = "{'train_runtime': 9.0}\n"
    state = state_of(bar(1, 1), loss(3.0), summary, speed, facts % 7)
    assert state.facts == {"speed": {"steps": 1}}
    state_of(bar(0, 3), loss(3.0), state=state)
    assert state.facts == {"lora": {"lora": 7}}


def test_a_postfix_that_shows_a_loss_again_is_one_step() -> None:
    line = "Epoch 1:  50%|██  | 5/10 [00:05<00:05,  1.00it/s, loss=1.25, lr=2e-5]\r"
    state = state_of(line, line, line)
    assert [(row.step, row.loss, row.learning_rate) for row in state.logged] == [(5, 1.25, 2e-5)]


def test_evaluations_are_kept_apart() -> None:
    state = state_of("{'eval_loss': 1.5, 'eval_runtime': 2.0, 'epoch': 1.0}\n")
    assert state.logged == [] and state.evaluations[0]["eval_loss"] == 1.5


def test_trainer_state_fills_gaps_and_corrects_the_steps() -> None:
    # logging_first_step: the log's entries are steps 1, 10 and 20, the last of which did not reach the log
    state = state_of(loss(3.0), loss(2.5), state=RunState(logging_steps=10))
    history = [
        {"step": 1, "loss": 3.0},
        {"step": 10, "loss": 2.5},
        {"step": 20, "loss": "2.25", "epoch": 0.5},
        {"step": 20, "eval_loss": 1},
    ]
    assert state.fill(history, 9.0)
    assert [(row.step, row.loss) for row in state.logged] == [(1, 3.0), (10, 2.5), (20, 2.25)]


def test_trainer_state_of_before_the_resume_is_not_this_runs() -> None:
    state = state_of(bar(5, 9), loss(2.0))
    history = [{"step": step, "loss": 9.0 - step} for step in (1, 2, 3, 4)] + [
        {"step": 5, "loss": 2.0},
        {"step": 6, "loss": "bad"},
    ]
    assert not state.fill(history, 9.0, after_step=4)
    assert [row.step for row in state.logged] == [5]
