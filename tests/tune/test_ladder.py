"""Ladders are small YAML files; what is wrong in one is said, and what a script cannot do is closed with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorapatch.errors import UsageError
from lorapatch.lora.flags import ALL_MODULES
from lorapatch.tune.configuration import Configuration
from lorapatch.tune.ladder import LADDERS, Ladder, Machine, Space, open_space, read_ladder

SEVEN = ",".join(ALL_MODULES)
START = Configuration(4, 32, max_length=2048, target_modules=SEVEN, deepspeed="z/zero2.json")
GPUS = Machine(2, (("offload", "z/zero2_offload.json"), ("zero3", "z/zero3.json")), "/models/small", 900)


def space(ladder: str | Ladder = "bytes", start: Configuration = START, machine: Machine = GPUS) -> Space:
    read = read_ladder(ladder) if isinstance(ladder, str) else ladder
    return open_space(read, start, machine, lambda configuration: None)


def test_the_shipped_ladders_have_every_rung_that_is_promised() -> None:
    found = {rung.name for rung in space().rungs}
    assert found == {
        "micro_batch", "gradient_checkpointing", "offload", "zero3", "max_length", "target_modules", "r", "bits", "model"
    }  # fmt: skip
    assert LADDERS == ("bytes", "plan")
    plan = [rung.label for rung in space("plan").rungs]
    assert plan[:3] == ["rank 8", "LoRA on q, v", "gradient checkpointing"] and plan[-1] == "ZeRO-3"


def test_the_global_batch_stays_on_every_rung() -> None:
    for rung in space().rungs:
        lower = rung.on(START)
        assert lower is not None and lower.samples == START.samples, rung.label
    assert space().micro_batches == (1, 2, 4, 8, 16, 32, 64, 128)
    assert [r.on(START).micro_batch for r in space().rungs if r.name == "micro_batch"] == [2, 1]  # type: ignore[union-attr]


def test_rank_keeps_the_scale_of_the_update() -> None:
    eight = next(rung for rung in space().rungs if rung.label == "rank 8").on(START)
    assert eight is not None and (eight.r, eight.alpha) == (8, 16)


def test_speed_is_what_costs_no_quality() -> None:
    costs = {rung.name: rung.costs for rung in space().rungs}
    assert {name for name, cost in costs.items() if cost == "speed"} == {
        "micro_batch", "gradient_checkpointing", "offload", "zero3"
    }  # fmt: skip


def test_what_a_script_cannot_do_is_closed_with_the_reason() -> None:
    alone = space(start=Configuration(1, 1, checkpointing=True), machine=Machine(gpus=0, longest=100))
    reasons = dict(alone.closed)
    assert alone.rungs and {rung.name for rung in alone.rungs} == {"target_modules", "r"}
    assert reasons["fewer bits"] == "fewer bits need a GPU"
    assert reasons["ZeRO-3"] == reasons["optimizer in host memory"] == "the script runs without DeepSpeed"
    assert reasons["shorter samples"] == "no sample is longer than 100 tokens"
    assert "--model" in reasons["a smaller model"] and reasons["micro-batch"] == "it is 1 already"
    assert reasons["gradient checkpointing"] == "the script is there already"
    one = space(machine=Machine(1, GPUS.siblings))
    assert "not several" in dict(one.closed)["ZeRO-3"]


def test_what_the_trainer_has_no_flag_for_is_closed() -> None:
    def takes(configuration: Configuration) -> str | None:
        return "the trainer has no flag for bits" if configuration.bits != 16 else None

    found = open_space(read_ladder("bytes"), START, GPUS, takes)
    assert dict(found.closed)["4 bit"] == "the trainer has no flag for bits"
    assert not any(rung.name == "bits" for rung in found.rungs)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("order: [", "is not YAML"),
        ("- r\n", "a ladder has `order` and a list of `rungs`"),
        ("order: bytes\nrungs: [r: [8]]\nmore: 1\n", "nothing else"),
        ("order: habit\nrungs: [micro_batch]\n", "order is habit; it has to be one of bytes, written"),
        ("order: bytes\nrungs: []\n", "the ladder has no rung"),
        ("order: bytes\nrungs: [batch]\n", "there is no rung 'batch'"),
        ("order: bytes\nrungs: [r]\n", "the rung r wants a list of whole numbers above 0, not None"),
        ("order: bytes\nrungs: [r: [0]]\n", "the rung r wants a list of whole numbers above 0"),
        ("order: bytes\nrungs: [bits: [2]]\n", "the rung bits takes 8 and 4"),
        ("order: bytes\nrungs: [offload: true]\n", "the rung offload takes no values"),
        ("order: bytes\nrungs: [target_modules: [q_proj]]\n", "wants a list of lists of module names"),
    ],
)
def test_a_wrong_ladder_is_told_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=".") as told:
        read_ladder(str(file))
    assert sentence in str(told.value) and str(file) in str(told.value) and "\n" not in str(told.value)


def test_a_ladder_that_is_not_there_is_told() -> None:
    with pytest.raises(UsageError, match=r"there is no ladder nothing .*; there are bytes, plan, or a YAML file"):
        read_ladder("nothing")


def test_a_ladder_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("order: written\nrungs:\n  - bits: [4]\n  - micro_batch\n")
    assert [rung.label for rung in space(str(file)).rungs] == ["4 bit", "micro-batch 2", "micro-batch 1"]
