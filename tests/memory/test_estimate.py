"""estimate(): a trace where there is one, bounds around it, the largest micro-batch; and arithmetic where there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import mgm_run, text_run

import lorapatch
from lorapatch.errors import Refused, UsageError
from lorapatch.memory import cache
from lorapatch.memory.cards import card_called
from lorapatch.memory.closed_form import closed_form
from lorapatch.memory.estimate import compare, estimate_dict, prediction_dict
from lorapatch.memory.model import Breakdown, RunSetup

GIB = 1 << 30


class FakeTrace:
    """Says what the closed form says, changed by ``change``; remembers what it was asked."""

    def __init__(self, change: Callable[[RunSetup, Breakdown], Breakdown]) -> None:
        self.change, self.asked, self.capacities = change, list[RunSetup](), list[int]()

    def __call__(self, setup: RunSetup, *, python: str | None = None, gpu: str = "", capacity: int = 0) -> Breakdown:
        self.asked.append(setup)
        self.capacities.append(capacity)
        return self.change(setup, replace(closed_form(setup), way="trace"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_IN_PROCESS", {})


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeTrace]:
    def install(change: Callable[[RunSetup, Breakdown], Breakdown] = lambda setup, found: found) -> FakeTrace:
        fake = FakeTrace(change)
        monkeypatch.setattr("lorapatch.memory.trace.trace", fake)
        return fake

    return install


def more(by: int) -> Callable[[RunSetup, Breakdown], Breakdown]:
    return lambda setup, found: replace(found, allocated=found.allocated + by, reserved=found.allocated + 2 * by)


def test_both_sides_are_traced_and_bounded(tmp_path: Path, traced: Any) -> None:
    fake = traced(more(GIB))
    found = lorapatch.estimate(mgm_run(tmp_path), gpu="H200")
    assert [setup.method for setup in fake.asked] == ["full", "lora"] or len(fake.asked) == 2
    assert found.gpu == "H200" and found.line == 2 and found.before is not None and found.after is not None
    for side in (found.before, found.after):
        assert side.breakdown.way == "trace"
        assert side.allocated.expected == closed_form(side.setup).allocated + GIB
        assert side.reserved.expected == closed_form(side.setup).allocated + 2 * GIB
        for bounds in (side.allocated, side.reserved, side.device):
            assert bounds.low <= bounds.expected <= bounds.high
        card = card_called("H200")  # ZeRO-2 talks in two groups of ranks
        assert side.device.expected - side.reserved.expected == card.context + card.nccl + card.communicator
    assert any("lengths from data.json" in note for note in found.after.breakdown.assumed)


def fragmented(capacity_of: FakeTrace) -> Callable[[RunSetup, Breakdown], Breakdown]:
    """Twice as much is reserved as is allocated, where the card has it."""

    def change(setup: RunSetup, found: Breakdown) -> Breakdown:
        most = 2 * found.allocated
        room = max(found.allocated, min(most, capacity_of.capacities[-1]))
        return replace(found, reserved=room, reserved_high=room)

    return change


def test_the_allocator_has_the_budget_less_what_lies_beside_it(tmp_path: Path, traced: Any) -> None:
    fake = traced()
    card = card_called("H200")
    beside = card.context + card.nccl + card.communicator
    lorapatch.estimate(mgm_run(tmp_path), gpu="H200", sides=("after",), largest=False)
    lorapatch.estimate(mgm_run(tmp_path), gpu="H200", sides=("after",), largest=False, budget_B=24 * GIB)
    assert fake.capacities == [card.memory - beside, 24 * GIB - beside]  # and both were asked: another card, another answer


def test_what_is_reserved_only_because_there_is_room_is_no_reason_against_a_micro_batch(tmp_path: Path, traced: Any) -> None:
    fake = traced()
    fake.change = fragmented(fake)
    found = lorapatch.estimate(mgm_run(tmp_path), gpu="H200", sides=("after",), budget_B=24 * GIB)
    assert found.after is not None and found.largest_micro_batch is not None
    assert found.after.device.expected <= 24 * GIB < 2 * found.after.allocated.expected
    assert found.largest_micro_batch >= found.after.setup.micro_batch
    tight = lorapatch.estimate(mgm_run(tmp_path), gpu="H200", sides=("after",), largest=False, budget_B=24 * GIB,
                               settings={"per_device_train_batch_size": found.largest_micro_batch}).after  # fmt: skip
    assert tight is not None and tight.device.expected <= 24 * GIB


def test_lengths_that_differ_may_come_in_an_order_that_fragments_nothing(tmp_path: Path, traced: Any) -> None:
    traced(lambda setup, found: replace(found, reserved=2 * found.allocated, reserved_high=3 * found.allocated))
    side = lorapatch.estimate(mgm_run(tmp_path), gpu="H200", sides=("after",), largest=False).after
    assert side is not None and side.setup.lengths
    assert side.reserved.low < 1.1 * side.allocated.low
    assert side.reserved.high >= 3 * side.allocated.expected


def test_one_side_alone_is_all_that_is_traced(tmp_path: Path, traced: Any) -> None:
    fake = traced()
    found = lorapatch.estimate(mgm_run(tmp_path), sides=("after",), largest=False)
    assert found.before is None and found.largest_micro_batch is None
    assert [setup.method for setup in fake.asked] == ["lora"]


def test_fast_traces_nothing(tmp_path: Path, traced: Any) -> None:
    fake = traced()
    found = lorapatch.estimate(mgm_run(tmp_path), fast=True)
    assert not fake.asked and found.after is not None and found.after.breakdown.way == "closed form"
    wide = (found.after.allocated.high - found.after.allocated.low) / found.after.allocated.expected
    slow = lorapatch.estimate(mgm_run(tmp_path))
    assert slow.after is not None
    assert (slow.after.allocated.high - slow.after.allocated.low) / slow.after.allocated.expected < wide / 3


def test_a_trace_that_fails_gives_way_to_the_closed_form_and_says_why(tmp_path: Path, traced: Any) -> None:
    def fail(setup: RunSetup, found: Breakdown) -> Breakdown:
        raise Refused("python lacks peft")

    traced(fail)
    found = lorapatch.estimate(mgm_run(tmp_path))
    assert found.after is not None and found.after.breakdown.way == "closed form"
    assert found.after.breakdown.assumed[0].endswith("counted by the closed form: python lacks peft")


def test_the_same_run_is_traced_once_in_the_process_and_on_the_disk(
    tmp_path: Path, traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = traced()
    script = mgm_run(tmp_path)
    first = lorapatch.estimate(script, sides=("after",))
    assert len(fake.asked) == 1
    lorapatch.estimate(script, sides=("after",))
    monkeypatch.setattr(cache, "_IN_PROCESS", {})
    assert lorapatch.estimate(script, sides=("after",)) == first
    assert len(fake.asked) == 1
    lorapatch.estimate(script, sides=("after",), settings={"lora_r": 4, "lora_enable": True})
    assert len(fake.asked) == 2  # another run
    config = tmp_path / "gemma/config.json"
    config.write_text(config.read_text().replace("16384", "8192"))
    lorapatch.estimate(script, sides=("after",))
    assert len(fake.asked) == 3  # another model in the same folder


def test_a_damaged_cache_is_made_again(tmp_path: Path, traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = traced()
    script = mgm_run(tmp_path)
    lorapatch.estimate(script, sides=("after",))
    for file in (tmp_path / "cache/lorapatch/traces").iterdir():
        file.write_text('{"way": "trace"')
    monkeypatch.setattr(cache, "_IN_PROCESS", {})
    lorapatch.estimate(script, sides=("after",))
    assert len(fake.asked) == 2


def test_the_largest_micro_batch_fits_and_the_next_does_not(tmp_path: Path, traced: Any) -> None:
    script = mgm_run(tmp_path, lora_enable=True)

    def dearer(setup: RunSetup, found: Breakdown) -> Breakdown:  # than the closed form thinks, for each sample
        extra = GIB + setup.micro_batch * (GIB // 10)
        return replace(found, allocated=found.allocated + extra, reserved=found.allocated + extra)

    fake = traced(dearer)
    found = lorapatch.estimate(script, sides=("after",), gpu="H200", budget_B=60 * GIB)
    most = found.largest_micro_batch
    assert most and len(fake.asked) == 2  # one trace more than the side itself
    for size, fits in ((most, True), (most + 1, False)):
        again = lorapatch.estimate(script, sides=("after",), gpu="H200", budget_B=60 * GIB, largest=False,
                                   settings={"per_device_train_batch_size": size})  # fmt: skip
        assert again.after is not None and (again.after.device.expected <= 60 * GIB) is fits


def test_nothing_fits_a_budget_that_is_too_small(tmp_path: Path) -> None:
    found = lorapatch.estimate(mgm_run(tmp_path), fast=True, budget_B=4 * GIB)
    assert found.largest_micro_batch == 0 and found.budget == 4 * GIB


def test_without_a_gpu_the_24_gb_card_is_assumed_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorapatch.memory.cards.card_here", lambda torch=None: None)
    found = lorapatch.estimate(mgm_run(tmp_path), fast=True)
    assert found.gpu == "RTX 4090" and found.budget == 24_564 << 20
    assert "no GPU is here" in found.notes[0]


def test_no_data_gives_wider_bounds_and_says_so(tmp_path: Path) -> None:
    script = text_run(tmp_path)
    sure = lorapatch.estimate(script, fast=True, sequence=256).after
    (tmp_path / "data.json").unlink()
    unsure = lorapatch.estimate(script, fast=True).after
    assert sure is not None and unsure is not None
    widths = [side.allocated.high / side.allocated.low for side in (sure, unsure)]
    assert widths[1] > 1.5 * widths[0]
    assert any("the longest allowed" in note for note in unsure.breakdown.assumed)


def test_an_unknown_model_gives_wider_bounds_and_says_so(tmp_path: Path) -> None:
    script = text_run(tmp_path)
    sure = lorapatch.estimate(script, fast=True, sequence=256).after
    config = tmp_path / "model/config.json"
    config.write_text(config.read_text().replace('"llama"', '"zebra"'))
    unsure = lorapatch.estimate(script, fast=True, sequence=256).after
    assert sure is not None and unsure is not None and unsure.allocated.expected == sure.allocated.expected
    assert unsure.allocated.low < 0.8 * sure.allocated.low and unsure.allocated.high > 1.2 * sure.allocated.high
    assert any("zebra model is not known" in note for note in unsure.breakdown.assumed)


def test_a_model_that_is_not_here_is_estimated_by_the_size_in_its_name(tmp_path: Path, traced: Any) -> None:
    def fail(setup: RunSetup, found: Breakdown) -> Breakdown:
        raise Refused("no such folder")

    traced(fail)
    after = lorapatch.estimate(text_run(tmp_path, model_name_or_path="models/vicuna-7b")).after
    assert after is not None and after.breakdown.total_parameters == pytest.approx(7e9, rel=0.1)
    assert any("vicuna-7b has no config.json" in note for note in after.breakdown.assumed)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("--model_name_or_path model", "--model_name_or_path mine"), "does not say how large the model is"),
        (("python train.py", "echo train.py"), "no launch was found"),
    ],
)
def test_what_cannot_be_estimated_is_refused_with_the_script_named(
    tmp_path: Path, change: tuple[str, str], sentence: str
) -> None:
    script = text_run(tmp_path)
    script.write_text(script.read_text().replace(*change))
    with pytest.raises(Refused, match=rf"train\.sh: .*{sentence}"):
        lorapatch.estimate(script, fast=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"sides": ("middle",)}, "no side middle"), ({"gpu": "Voodoo 2"}, "no card Voodoo 2"),
     ({"trainer": "mine"}, "no trainer called mine")],
)  # fmt: skip
def test_bad_values_are_usage_errors(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        lorapatch.estimate(text_run(tmp_path), fast=True, **options)


def test_a_grid_has_every_method_stage_and_micro_batch_in_order(tmp_path: Path) -> None:
    card, cells = compare(mgm_run(tmp_path), zeros=(0, 2, 3), micro_batches=(1, 4), gpu="A100 80GB", fast=True)
    assert card.name == "A100 80GB"
    shown = [(m, s.setup.zero.stage if s.setup.zero else 0, s.setup.micro_batch, s.setup.bits) for m, s in cells]
    bits = {"full": 16, "lora": 16, "qlora": 4}
    assert shown == [(m, z, b, bits[m]) for m in bits for z in (0, 2, 3) for b in (1, 4)]
    sizes = {row[:3]: side.allocated.expected for row, (_, side) in zip(shown, cells, strict=True)}
    assert sizes["qlora", 2, 1] < sizes["lora", 2, 1] < sizes["full", 2, 1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"methods": ("half",)}, "no method half"), ({"zeros": (7,)}, "no ZeRO stage 7"), ({"micro_batches": (0,)}, "at least 1")],
)
def test_a_grid_of_nothing_is_a_usage_error(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        compare(text_run(tmp_path), fast=True, **options)


def test_the_json_has_every_figure_in_bytes(tmp_path: Path) -> None:
    found = estimate_dict(lorapatch.estimate(mgm_run(tmp_path), fast=True))
    assert found["schema"] == 1
    for side in (found["before"], found["after"]):
        assert {name: set(side[name]) for name in ("allocated", "reserved", "device")} == {
            name: {"low", "expected", "high"} for name in ("allocated", "reserved", "device")
        }
        assert side["breakdown"]["allocated"] == side["allocated"]["expected"] and "events" not in side["breakdown"]
        assert side["setup"]["model"] == str(tmp_path / "gemma")


def test_what_a_record_keeps_names_the_card_and_the_way(tmp_path: Path) -> None:
    kept = prediction_dict(lorapatch.estimate(mgm_run(tmp_path), fast=True, gpu="L4"))
    assert (kept["gpu"], kept["breakdown"]["way"], kept["corrected_by"], kept["micro_batch"]) == ("L4", "closed form", 1.0, 4)
