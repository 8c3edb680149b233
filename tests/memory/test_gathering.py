"""ZeRO-3's gathering as the trace models it, held against DeepSpeed's own coordinator on the CPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import GEMMA, ZERO3, folder, mgm_run, text_run  # noqa: E402

from lorapatch.memory.model import LoraSetup, RunSetup  # noqa: E402
from lorapatch.memory.trace.engines.gathering import Gatherer  # noqa: E402
from lorapatch.memory.trace.exchange import setup_to  # noqa: E402
from lorapatch.memory.trace.recorder import Recorder  # noqa: E402
from lorapatch.memory.trace.run import trace_subject  # noqa: E402
from lorapatch.memory.trace.subjects import embedded, plain  # noqa: E402

HERE = Path(__file__).parent
# As large beside these models as the usual limits are beside one of 2.5 billion parameters.
OFFLOADED = replace(
    ZERO3, offload_param=True, prefetch_bucket_size=3686, param_persistence_threshold=640, max_live_parameters=60_000,
    max_reuse_distance=60_000,
)  # fmt: skip


def cases(path: Path) -> dict[str, RunSetup]:
    deep = folder(path / "deep", GEMMA | {"num_hidden_layers": 3})
    return {
        "lora": mgm_run(path, zero=OFFLOADED, model=deep, lora=LoraSetup(r=16)),
        "full": mgm_run(path, zero=OFFLOADED, model=deep, method="full", lora=None),
        # another branch of a checkpointed head, which computes logits again in the backward pass
        "many labels": mgm_run(path, zero=OFFLOADED, method="full", lora=None, sequence=200, labels=150),
        "plain": text_run(path, zero=replace(OFFLOADED, max_reuse_distance=10_000)),
        "no checkpoints": text_run(path, zero=OFFLOADED, method="full", lora=None, gradient_checkpointing=False),
    }


@pytest.fixture(scope="module")
def coordinated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunSetup, list[str]]]:
    """The events of DeepSpeed's coordinator, by case."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    setups = cases(tmp_path_factory.mktemp("gathering"))
    ended = subprocess.run(
        [sys.executable, str(HERE / "real_gathering.py")], input=json.dumps([setup_to(s) for s in setups.values()]),
        capture_output=True, text=True, env={**os.environ, "DS_BUILD_OPS": "0", "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    return {name: (setup, events) for (name, setup), events in zip(setups.items(), json.loads(ended.stdout.splitlines()[-1]))}


def in_order(events: list[str]) -> list[str]:
    """What one step releases together, by name: sets have no order."""
    found: list[str] = []
    for released, group in groupby(events, lambda event: event.startswith("release")):
        together = list(group)
        found += sorted(together) if released else together
    return found


def traced(setup: RunSetup, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same events of the trace."""
    subject = (embedded if setup.trainer == "embedded" else plain).build(setup)
    events: list[str] = []
    fetch, gather, let_go = Gatherer._fetch, Gatherer._gather, Gatherer._let_go

    modules = {id(module): name for name, module in subject.model.named_modules()}
    names = [name for name, _ in subject.model.named_parameters()]

    def name_of(part: Any) -> str:
        return names[part.number]

    def fetched(self: Any, module: Any, *, forward: bool) -> None:
        events.append(f"{'forward' if forward else 'backward'} {modules[id(module)]}")
        fetch(self, module, forward=forward)

    def gathered(self: Any, parts: Any) -> None:
        events.extend(sorted(f"gather {name_of(part)}" for part in parts if not part.here))
        gather(self, parts)

    def released(self: Any, part: Any) -> None:
        before = part.here
        let_go(self, part)
        if part.here != before:
            events.append(f"release {name_of(part)}")

    monkeypatch.setattr(Gatherer, "_fetch", fetched)
    monkeypatch.setattr(Gatherer, "_gather", gathered)
    monkeypatch.setattr(Gatherer, "_let_go", released)
    trace_subject(subject, setup, 90)
    return events


@pytest.mark.parametrize("case", ["lora", "full", "many labels", "plain", "no checkpoints"])
def test_the_trace_gathers_and_releases_what_deepspeed_does(
    coordinated: dict[str, tuple[RunSetup, list[str]]], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, real = coordinated[case]
    ours = in_order(traced(setup, monkeypatch))
    assert any(event.startswith("gather") for event in ours)
    parted = next((at for at, pair in enumerate(zip(in_order(real), ours)) if pair[0] != pair[1]), None)
    assert parted is None, (in_order(real)[parted - 3 : parted + 3], ours[parted - 3 : parted + 3])
    assert len(ours) == len(real)


def gatherer(model: torch.nn.Module, ranks: int = 2, **changes: Any) -> Gatherer:
    zero = replace(ZERO3, param_persistence_threshold=0, max_reuse_distance=0, **changes)
    return Gatherer(Recorder(), model, zero, ranks)


def test_a_collectives_buffer_lives_until_the_last_of_its_parameters_was_waited_for() -> None:
    found = gatherer(torch.nn.Linear(16, 16))
    weight, bias = found.parts.values()
    found._gather([weight, bias])
    flight = weight.flight
    assert flight is not None and flight is bias.flight and flight.flat is not None
    assert flight.flat.numel() == 16 * 16 + 16
    assert not weight.parameter.numel()  # nothing is copied out of the buffer before somebody needs it
    found._land(weight)
    assert weight.parameter.shape == (16, 16) and bias.parameter.shape == (16,)
    assert weight.flight is None and bias.flight is flight


def test_a_parameter_that_is_gathered_alone_needs_no_buffer() -> None:
    found = gatherer(torch.nn.Linear(16, 16, bias=False))
    (weight,) = found.parts.values()
    found._gather([weight])
    assert weight.parameter.shape == (16, 16) and weight.flight is not None and weight.flight.flat is None


def test_another_order_of_modules_makes_the_trace_invalid_and_a_new_one_is_recorded() -> None:
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    modes = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([first, second])
            self.turned = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in reversed(self.layers) if self.turned else self.layers:
                x = layer(x)
            return x

    model = Model()
    found = gatherer(model)
    found.recorder.phase = "forward"
    for turned in (False, False, True, True, True):
        model.turned = turned
        model(torch.ones(1, 8)).sum().backward()
        found.end()
        modes.append(found.mode)
    assert modes == ["record", "complete", "invalid", "record", "complete"]
    found.close()
    assert not model._forward_pre_hooks and not first._forward_hooks
