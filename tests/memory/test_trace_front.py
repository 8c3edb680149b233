"""The front of the trace: a subprocess of the run's interpreter, and one sentence for everything that can go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import GEMMA, folder, mgm_run, text_run

from lorapatch.errors import Refused
from lorapatch.memory.model import RunSetup
from lorapatch.memory.trace import trace
from lorapatch.memory.trace.__main__ import answer
from lorapatch.memory.trace.exchange import breakdown_from, breakdown_to, setup_from, setup_to


def refusal(*args: object, **options: object) -> str:
    with pytest.raises(Refused) as caught:
        trace(*args, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def refusal_inside(setup: RunSetup) -> str:
    """What the traced process answers, without the process."""
    message: str = answer({"setup": setup_to(setup), "architecture": 90, "capacity": None})["refused"]
    assert "\n" not in message
    return message


def stand_in(path: Path, script: str) -> str:
    """An interpreter that does what ``script`` (bash) says."""
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_run_travels_to_the_traced_process_and_back(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    setup = mgm_run(tmp_path)
    assert setup_from(json.loads(json.dumps(setup_to(setup)))) == setup
    found = trace(setup)
    assert found.way == "trace"
    assert sum(found.categories.values()) == found.allocated
    assert set(found.versions) == {"torch", "transformers", "peft"}
    assert breakdown_from(json.loads(json.dumps(breakdown_to(found)))) == found


def test_the_front_needs_no_library() -> None:
    code = "import sys, lorapatch.memory.trace; print([m for m in ('torch', 'transformers', 'click') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_an_interpreter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refusal(text_run(tmp_path), python=str(tmp_path / "python"))
    assert message == f"{tmp_path}/python cannot be run (No such file or directory): --python names the run's interpreter"


def test_an_interpreter_without_torch_is_refused_with_its_name(tmp_path: Path) -> None:
    bare = stand_in(tmp_path / "python", f'exec {sys.executable} -S "$@"')  # no site-packages
    assert "cannot trace a transformers run: it lacks torch" in refusal(text_run(tmp_path), python=bare)


def test_a_trace_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    slow = stand_in(tmp_path / "python", "exec sleep 60")
    setup = text_run(tmp_path)
    assert refusal(setup, python=slow, timeout_s=0.2) == f"the trace of {setup.model} took longer than 0.2 s and was stopped"


def test_a_process_that_dies_is_refused_with_its_last_words(tmp_path: Path) -> None:
    killed = stand_in(tmp_path / "python", "echo out of memory >&2; exit 137")
    assert refusal(text_run(tmp_path), python=killed).endswith("ended without an answer: out of memory")
    silent = stand_in(tmp_path / "silent", "exit 137")
    assert refusal(text_run(tmp_path), python=silent).endswith("ended without an answer: exit code 137")


def test_the_traced_process_sees_no_gpu_no_network_and_this_package(tmp_path: Path) -> None:
    names = "CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES HF_HUB_OFFLINE=$HF_HUB_OFFLINE $PYTHONPATH"
    spy = stand_in(tmp_path / "python", f'echo "{names}" >&2; exit 1')
    message = refusal(text_run(tmp_path), python=spy)
    assert "CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1" in message
    assert str(Path(__file__).parents[2]) in message.split(os.pathsep)[0] + message


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "no_such_model"}, "this transformers cannot make a model of it"),
        ({"model_type": "llama", "hidden_size": "many"}, "cannot"),
        ({"model_type": "clip_vision_model"}, "this transformers cannot make a model of it"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(tmp_path: Path, config: dict[str, object], said: str) -> None:
    pytest.importorskip("transformers")
    assert said in refusal_inside(replace(text_run(tmp_path), model=folder(tmp_path / "odd", config)))


def test_a_damaged_or_missing_configuration_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    assert "config.json" in refusal_inside(replace(text_run(tmp_path), model=damaged))
    missing = tmp_path / "nothing"
    assert (
        refusal_inside(replace(text_run(tmp_path), model=missing))
        == f"{missing} has no config.json: the model's shape is not known"
    )


def test_the_embedded_trainers_own_refusals_come_through(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    odd = folder(tmp_path / "odd", GEMMA | {"model_type": "gpt2"})
    assert "holds a 'gpt2' model; the trainer knows gemma" in refusal_inside(replace(mgm_run(tmp_path), model=odd))
    assert "multiple of 16" in refusal_inside(mgm_run(tmp_path, image_size_aux=72))
