"""Each line of a verdict, passing, failing and without anything to check."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from lorapatch.adapter.findings import Finding, State
from lorapatch.adapter.inspect import Adapter, inspect_adapter
from lorapatch.run.execute import Outcome
from lorapatch.run.gpus import Gpu
from lorapatch.run.state import LoggedStep, RunState
from lorapatch.run.verdict import Verdict, decide
from lorapatch.run.watch import Peaks

GIB = 1 << 30
DONE = Outcome(0, "finished", 0.0, 9.0)
LORA = {"lora": {"trainable": 64, "total": 1000, "lora": 64, "modules": ["q_proj"]}}


def state(losses: list[float], total: int | None = 5, facts: dict[str, dict[str, object]] | None = None) -> RunState:
    found = RunState(total=total, step=len(losses), facts=LORA if facts is None else facts)
    found.logged = [LoggedStep(float(i), 1, i, loss) for i, loss in enumerate(losses, 1)]
    return found


def adapter(folder: Path, b: float = 0.5, extra: str = "") -> Adapter:
    """An adapter of one module, rank 2, with every B equal to ``b``, and a further tensor called ``extra``."""
    tensors = {"layers.0.q_proj.lora_A": (0.5, [2, 4]), "layers.0.q_proj.lora_B": (b, [4, 2])}
    if extra:
        tensors[extra] = (1.0, [2])
    header, data = {}, b""
    for name, (value, shape) in tensors.items():
        raw = struct.pack("<f", value) * math.prod(shape)
        offsets = [len(data), len(data) + len(raw)]
        header[f"base_model.model.{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return inspect_adapter(folder)


def line(verdict: Verdict, what: str) -> tuple[str, str]:
    (found,) = [line for line in verdict.lines if line.what == what]
    return found.state, found.evidence


LOSSES = [2.5, 2.4, 2.3, 2.2, 2.1]


def test_a_good_run_passes_every_line_with_its_figures(tmp_path: Path) -> None:
    peaks = Peaks(gpus={0: Gpu(0, "x", 14 * GIB, 24 * GIB)}, used_by_run={0})
    verdict = decide(
        DONE, state(LOSSES), peaks, adapter=adapter(tmp_path), checkpoints=["checkpoint-2"], budget_B=16 * GIB
    )
    assert verdict.passed and {found.state for found in verdict.lines} == {"pass"}
    assert line(verdict, "ran to the last step")[1] == "exit code 0, step 5 of 5"
    assert line(verdict, "LoRA is active")[1] == "64 LoRA parameters, 64 of 1,000 are trainable (6.40 %), in 1 module"
    assert line(verdict, "lora_B has moved from zero")[1] == "1 of 1 module"
    assert line(verdict, "the peak is under the budget")[1] == "14.00 GiB of GPU 0, budget 16.00 GiB"
    assert verdict.as_dict()["passed"] is True


def test_nothing_to_check_is_said_and_does_not_fail() -> None:
    verdict = decide(DONE, RunState(), Peaks(host_rss_B=5 << 20), adapter=None, saves=False)
    assert verdict.passed and {found.state for found in verdict.lines} == {"not checked"}
    assert (
        line(verdict, "the peak is under the budget")[1]
        == "5.00 MiB of host memory (no GPU was used); no budget was given"
    )


@pytest.mark.parametrize(
    ("outcome", "losses", "expected", "evidence"),
    [
        (DONE, LOSSES[:3], 5, "exit code 0, step 3 of 5"),
        (replace(DONE, exit_code=1, state="failed"), LOSSES[:2], None, "exit code 1 at step 2 of 5"),
        (replace(DONE, exit_code=143, state="timeout"), LOSSES[:2], None, "timeout at step 2 of 5"),
    ],
)
def test_a_run_that_stops_early_fails(
    outcome: Outcome, losses: list[float], expected: int | None, evidence: str
) -> None:
    verdict = decide(outcome, state(losses), Peaks(), adapter=None, expected_step=expected)
    assert line(verdict, "ran to the last step") == ("fail", evidence) and not verdict.passed


@pytest.mark.parametrize(
    ("facts", "state_", "evidence"),
    [
        (
            {"lora": {"trainable": 0, "total": 1000, "lora": 0}},
            "fail",
            "0 LoRA parameters, 0 of 1,000 are trainable (0.00 %)",
        ),
        ({"trainable": {"trainable": 1000, "total": 1000}}, "fail", "1,000 of 1,000 are trainable (100.00 %)"),
        ({"trainable": {"trainable": 10, "total": 1000}}, "pass", "10 of 1,000 are trainable (1.00 %)"),
        ({}, "not checked", "the trainer names no counts, and there is no adapter"),
    ],
)
def test_lora_is_active_when_some_but_not_all_is_trainable(
    facts: dict[str, dict[str, object]], state_: str, evidence: str
) -> None:
    verdict = decide(DONE, state(LOSSES, facts=facts), Peaks(), adapter=None, saves=False)
    assert line(verdict, "LoRA is active") == (state_, evidence)


def test_an_adapter_tells_the_count_where_the_trainer_does_not(tmp_path: Path) -> None:
    verdict = decide(DONE, state(LOSSES, facts={}), Peaks(), adapter=adapter(tmp_path), checkpoints=["c"])
    assert line(verdict, "LoRA is active") == ("pass", "16 LoRA parameters, in 1 module")


def test_a_base_parameter_an_unmoved_b_and_a_missing_adapter_fail(tmp_path: Path) -> None:
    verdict = decide(DONE, state(LOSSES), Peaks(), adapter=adapter(tmp_path, extra="layers.0.mlp"), checkpoints=["c"])
    assert line(verdict, "no base parameter in the adapter")[0] == "fail"
    verdict = decide(DONE, state(LOSSES), Peaks(), adapter=adapter(tmp_path, b=0.0), checkpoints=["c"])
    assert line(verdict, "lora_B has moved from zero") == ("fail", "0 of 1 module, not in layers.0.q_proj")
    verdict = decide(DONE, state(LOSSES), Peaks(), adapter=None, adapter_problems=["it is cut short"])
    assert line(verdict, "the adapter can be loaded") == ("fail", "it is cut short")
    assert line(verdict, "a checkpoint was written")[0] == "fail"
    assert line(verdict, "no base parameter in the adapter")[0] == "not checked"


@pytest.mark.parametrize(
    ("states", "state_", "evidence"),
    [
        ({"a": "pass", "b": "pass", "c": "not checked"}, "pass", "a; b"),
        ({"a": "pass", "b": "fail"}, "fail", "b"),
        ({"a": "not checked", "b": "not checked"}, "not checked", "a"),
    ],
)
def test_what_was_seen_of_the_loaded_adapter_is_a_line(states: dict[str, State], state_: str, evidence: str) -> None:
    found = [Finding(name, 2, seen, name) for name, seen in states.items()]
    verdict = decide(DONE, state(LOSSES), Peaks(), adapter=None, loaded=found)
    assert line(verdict, "loaded with its base, the adapter works") == (state_, evidence)


@pytest.mark.parametrize(
    ("losses", "state_", "evidence"),
    [
        ([2.0, math.nan, 1.0], "fail", "nan at step 2"),
        ([0.0, 0.0], "fail", "it is exactly 0: no label is left"),
        ([2.0, 2.1, 9.0], "fail", "2 to 9 in 3 entries"),
        ([2.0], "pass", "2"),
        ([], "not checked", "no loss was logged"),
    ],
)
def test_the_loss_has_to_be_finite_and_stay_in_bounds(losses: list[float], state_: str, evidence: str) -> None:
    verdict = decide(DONE, state(losses), Peaks(), adapter=None, saves=False)
    assert line(verdict, "the loss is finite and does not explode") == (state_, evidence)


def test_a_budget_counts_for_the_gpu_or_for_host_memory_without_one() -> None:
    gpu = Peaks(gpus={1: Gpu(1, "x", 20 * GIB, 24 * GIB)}, used_by_run={1}, host_rss_B=50 * GIB)
    verdict = decide(DONE, state(LOSSES), gpu, adapter=None, saves=False, budget_B=16 * GIB)
    assert line(verdict, "the peak is under the budget") == ("fail", "20.00 GiB of GPU 1, budget 16.00 GiB")
    host = Peaks(host_rss_B=3 * GIB)
    verdict = decide(DONE, state(LOSSES), host, adapter=None, saves=False, budget_B=4 * GIB)
    assert line(verdict, "the peak is under the budget")[0] == "pass"


@pytest.mark.parametrize(("first", "state_"), [(6, "pass"), (1, "fail"), (None, "not checked")])
def test_a_resumed_run_has_to_go_on_behind_its_checkpoint(first: int | None, state_: str) -> None:
    found = state([] if first is None else [2.0])
    for row in found.logged:
        row.step = first or 0
    verdict = decide(DONE, found, Peaks(), adapter=None, saves=False, resumed_from=5)
    assert line(verdict, "went on from step 5")[0] == state_


def test_a_run_without_lora_is_judged_without_its_lines() -> None:
    verdict = decide(DONE, state(LOSSES), Peaks(), adapter=None, expects_lora=False, saves=False)
    assert len(verdict.lines) == 3
