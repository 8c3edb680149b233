"""The log is understood whatever prints it, and nothing in it is ever an error."""
# ruff: noqa: E501 (scripts and logs as they stand)

from __future__ import annotations

import json
import math
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapatch.run.log import LONGEST_LINE, Announcement, Event, Line, LogParser, Metrics, Progress, Spawned, Traceback

BAR = " 40%|████      | 2/5 [00:03<00:04,  1.52s/it]"


def read(data: bytes | str) -> list[Event]:
    parser = LogParser()
    raw = data.encode() if isinstance(data, str) else data
    return [*parser.feed(raw), *parser.close()]


def only(kind: type, data: bytes | str) -> list:
    return [event for event in read(data) if isinstance(event, kind)]


@pytest.mark.parametrize(
    "text",
    [
        "{'loss': 2.3125, 'grad_norm': 1.5, 'learning_rate': 2e-05, 'epoch': 0.2}",  # transformers 4.38
        "{'loss': '2.3125', 'grad_norm': '1.5', 'learning_rate': '2e-05', 'epoch': '0.2'}",  # transformers 5
        "{'loss': 2.3125, 'grad_norm': tensor(1.5, device='cuda:0'), 'learning_rate': 2e-05, 'epoch': 0.2}",
        '{"loss": 2.3125, "grad_norm": 1.5, "learning_rate": 2e-05, "epoch": 0.2}',
        f"{BAR}{{'loss': 2.3125, 'grad_norm': 1.5, 'learning_rate': 2e-05, 'epoch': 0.2}}",  # on the bar's line
        "[rank0]: {'loss': 2.3125, 'grad_norm': 1.5, 'learning_rate': 2e-05, 'epoch': 0.2}",
    ],
)
def test_the_same_numbers_are_read_from_every_way_to_print_them(text: str) -> None:
    (metrics,) = only(Metrics, text + "\n")
    assert metrics.values == {"loss": 2.3125, "grad_norm": 1.5, "learning_rate": 2e-05, "epoch": 0.2}


def test_two_entries_jammed_into_one_line_are_two() -> None:
    found = only(Metrics, "{'loss': 1.0, 'epoch': 0.1}{'loss': 2.0, 'epoch': 0.1}\n")
    assert [metrics.values["loss"] for metrics in found] == [1.0, 2.0]


def test_nan_and_infinity_are_kept() -> None:
    (metrics,) = only(Metrics, "{'loss': nan, 'grad_norm': 'inf', 'epoch': 0.1}\n")
    assert math.isnan(metrics.values["loss"]) and math.isinf(metrics.values["grad_norm"])


def test_the_summary_at_the_end_is_read() -> None:
    (metrics,) = only(
        Metrics, "{'train_runtime': 12.5, 'train_samples_per_second': 3.2, 'train_loss': 2.1, 'epoch': 1.0}\n"
    )
    assert metrics.values["train_samples_per_second"] == 3.2


def test_a_dictionary_without_training_numbers_is_just_a_line() -> None:
    assert only(Metrics, "{'train_batch_size': 4, 'zero': {'stage': 2}}\n{'a': '1'}\n{}\n") == []


def test_a_step_that_the_entry_names_is_kept() -> None:
    (metrics,) = only(Metrics, '{"step": 40, "loss": 1.25}\n')
    assert (metrics.step, metrics.values) == (40, {"loss": 1.25})


def test_a_bar_gives_step_total_rate_and_time_to_go() -> None:
    (bar,) = only(Progress, BAR + "\r")
    assert bar == Progress("", 2, 5, 3.0, 4.0, pytest.approx(1 / 1.52))


def test_bars_with_a_name_hours_an_unknown_rate_and_a_postfix() -> None:
    text = (
        "Loading checkpoint shards: 100%|██████████| 2/2 [00:01<00:00,  1.9it/s]\n"
        "  0%|          | 0/5000 [00:00<?, ?it/s]\r"
        " 10%|█         | 500/5000 [1:00:00<9:00:00,  7.20s/it]\r"
        "Epoch 1:  50%|█████     | 5/10 [00:05<00:05,  1.00it/s, loss=1.25, lr=2e-5]\r"
    )
    shards, first, later, postfix = only(Progress, text)
    assert shards.name == "Loading checkpoint shards"
    assert (first.step, first.total, first.eta_s, first.steps_per_s) == (0, 5000, None, None)
    assert (later.elapsed_s, later.eta_s) == (3600.0, 32400.0)
    assert postfix.name == "Epoch 1"
    assert only(Metrics, text) == [Metrics({"loss": 1.25, "lr": 2e-5}, 5)]


def test_our_trainers_json_lines_are_announcements() -> None:
    lora = {"lorapatch": "lora", "trainable": 100, "total": 1000, "lora": 90, "tensors": 4, "modules": ["a.q_proj"]}
    speed = {"lorapatch": "speed", "steps": 5, "step_time_s": 0.5, "peak_allocated_B": None}
    found = only(Announcement, f"{json.dumps(lora)}\n{json.dumps(speed)}\n")
    assert [event.kind for event in found] == ["lora", "speed"]
    assert found[0].data["modules"] == ["a.q_proj"]
    assert only(Metrics, json.dumps(lora)) == []


def test_pefts_own_count_is_an_announcement() -> None:
    (event,) = only(Announcement, "trainable params: 3,022,848 || all params: 2,509,195,264 || trainable%: 0.1205\n")
    assert event == Announcement("trainable", {"trainable": 3022848, "total": 2509195264})


def test_deepspeeds_step_lines_are_metrics() -> None:
    text = (
        "[2025-07-01 22:35:01,123] [INFO] [logging.py:96:log_dist] [Rank 0] step=10, skipped=2, lr=[2e-05,"
        " 2e-05], mom=[[0.9, 0.999]]\n"
        "[2025-07-01 22:35:01,124] [INFO] [timer.py:260:stop] epoch=0/micro_step=10/global_step=10, "
        "RunningAvgSamplesPerSec=8.1, CurrSamplesPerSec=8.4, MemAllocated=8.45GB, MaxMemAllocated=13.9GB\n"
    )
    first, second = only(Metrics, text)
    assert first == Metrics({"learning_rate": 2e-05, "skipped_steps": 2.0}, 10)
    assert second == Metrics({"samples_per_s": 8.4}, 10)


def test_the_launchers_word_on_what_it_started_is_read() -> None:
    text = (
        "[2025-07-01 22:35:01,000] [INFO] [launch.py:351:main] process 4711 spawned with command: "
        "['/env/bin/python', '-u', 'train.py', '--local_rank=0', '--name', 'it is']\n"
    )
    assert only(Spawned, text) == [
        Spawned(4711, ["/env/bin/python", "-u", "train.py", "--local_rank=0", "--name", "it is"])
    ]
    assert only(Spawned, "process 1 spawned with command: [broken\n") == []


def test_a_traceback_is_put_together_between_other_lines() -> None:
    text = (
        "Traceback (most recent call last):\n"
        '  File "train.py", line 3, in <module>\n'
        "    main()\n"
        "[2025-07-01 22:35:01,000] [INFO] another process speaks\n"
        "Map:  50%|█████     | 1/2 [00:01<00:01,  1.0it/s]\n"
        "ValueError: a: b\n"
    )
    (found,) = only(Traceback, text)
    assert (found.error, found.message, found.rank) == ("ValueError", "a: b", None)
    assert len(found.lines) == 5


def test_tracebacks_of_two_ranks_are_kept_apart() -> None:
    text = (
        "[rank0]: Traceback (most recent call last):\n"
        "[rank1]: Traceback (most recent call last):\n"
        '[rank0]:   File "train.py", line 3, in <module>\n'
        '[rank1]:   File "train.py", line 9, in <module>\n'
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n"
        "[rank0]: KeyError: 'x'\n"
    )
    found = {event.rank: event.error for event in only(Traceback, text)}
    assert found == {0: "KeyError", 1: "torch.OutOfMemoryError"}


def test_a_traceback_that_the_end_cuts_off_is_still_reported() -> None:
    (found,) = only(Traceback, 'Traceback (most recent call last):\n  File "train.py", line 3\n')
    assert (found.error, found.lines) == ("", ['  File "train.py", line 3'])


def test_lines_keep_their_bytes_and_bars_are_marked() -> None:
    found = only(Line, b"plain \xff\r\n\rbar 1\r      \rbar 2\r\n\nlast")
    assert found == [Line(b"plain \xff"), Line(b"bar 1", True), Line(b"bar 2"), Line(b""), Line(b"last")]
    assert found[0].text == "plain \N{REPLACEMENT CHARACTER}"


def test_output_without_an_end_of_line_is_cut_and_not_kept_in_memory() -> None:
    parser = LogParser()
    pieces = [event for _ in range(100) for event in parser.feed(b"x" * 10_000)]
    assert len(parser._pending) <= LONGEST_LINE + 1
    assert sum(len(event.raw) for event in [*pieces, *parser.close()] if isinstance(event, Line)) == 1_000_000


SNIPPETS = st.sampled_from(
    [
        b"{'loss': 1.5}", b"{'loss': nan, 'a': tensor(", b"tensor(1, device='x')}", BAR.encode(), b"\r", b"\n", b"\r\n", b"  ",
        b"Traceback (most recent call last):", b"  File x", b"ValueError: y", b"[rank1]: ", b'{"lorapatch": "lora", "x": [1', b"]}",
        b"process 3 spawned with command: ['a']", b"trainable params: 1,0 || all params: ,", b"step=1, skipped=0, lr=[",
        b"0%|", b"|", b"1/2 [", b"99:99<?, ?it/s]", b"{" * 50, b"}", b"'" * 3, b"\xff\xfe", "损失".encode(), b"9" * 5000,
    ]
)  # fmt: skip


@given(st.lists(st.one_of(SNIPPETS, st.binary(max_size=40)), max_size=40), st.lists(st.integers(0, 30), max_size=60))
@settings(max_examples=600, deadline=None)
def test_any_bytes_cut_anywhere_give_the_same_events_and_no_line_is_lost(parts: list[bytes], cuts: list[int]) -> None:
    data = b"".join(parts)
    whole = read(data)
    parser = LogParser()
    ends = [*accumulate(cuts), len(data)]
    chunks = [data[start:end] for start, end in zip([0, *ends], ends)]
    pieces = [event for chunk in chunks for event in parser.feed(chunk)] + list(parser.close())
    assert repr(pieces) == repr(whole)  # repr, because nan is not equal to itself
    kept = b"".join(event.raw for event in whole if isinstance(event, Line))
    assert kept.split() == data.split() or b"".join(kept.split()) == b"".join(data.split())


@given(st.binary(max_size=3))
def test_a_long_line_cut_anywhere_gives_the_same_events(end: bytes) -> None:
    data = b"x" * (LONGEST_LINE - 1) + end + b"y\r"
    parser = LogParser()
    pieces = [
        event
        for byte in (data[:-6], *(data[i : i + 1] for i in range(len(data) - 6, len(data))))
        for event in parser.feed(byte)
    ]
    assert [*pieces, *parser.close()] == read(data)
