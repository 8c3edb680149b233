"""What doctor says of interpreters that are well, old, broken, hung or missing, and of the machine."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorapatch.run import doctor
from lorapatch.run.doctor import Finding, examine
from lorapatch.run.doctor_probes import Answer, ask
from lorapatch.run.doctor_rules import misfits

MODERN = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0", "accelerate": "1.15.0", "deepspeed": "0.19.8"}
PEFT = {
    "fields": ["r", "use_rslora", "use_dora", "lora_bias", "exclude_modules", "target_parameters"],
    "pissa": True,
    "all_linear": True,
}
TORCH = {"cuda": None, "hip": None, "available": False, "devices": [], "architectures": []}
H100: dict[str, Any] = {"name": "H100", "capability": [9, 0]}
CUDA = {"cuda": "13.0", "hip": None, "available": True, "devices": [H100], "architectures": ["sm_90", "compute_120"]}


def fake(
    folder: Path,
    *,
    versions: dict[str, str] | None = None,
    torch: dict[str, Any] | str = TORCH,
    peft: dict[str, Any] | str = PEFT,
    deepspeed: str | None = None,
    requires: dict[str, list[str]] | None = None,
    minimum: dict[str, str] | None = None,
) -> str:
    """An interpreter that answers each probe as given; a text instead of an answer is what it says as it fails."""
    found = MODERN if versions is None else versions
    first = {
        "python": "3.11.7",
        "executable": "/fake/python",
        "versions": found,
        "requires": requires or {},
        "minimum": minimum or {},
    }
    cases = [
        ("*import json, torch*", torch),
        ("*LoraConfig*", peft),
        ("*import json, deepspeed*", deepspeed or {"accelerator": "cpu"}),
    ]
    path = folder / "python"
    lines = ["#!/bin/sh", 'case "$2" in']
    lines += [f"{pattern.replace(' ', chr(92) + ' ')}) {_say(answer)} ;;" for pattern, answer in (*cases, ("*", first))]
    path.write_text("\n".join([*lines, "esac"]) + "\n")
    path.chmod(0o755)
    return str(path)


def _say(answer: dict[str, Any] | str) -> str:
    if isinstance(answer, str):
        return f"echo Traceback >&2; echo {shlex.quote(answer)} >&2; exit 1"
    return f"echo a library says hello; echo {shlex.quote('lorapatch-answer:' + json.dumps(answer))}; echo bye"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, [])


def gpus(monkeypatch: pytest.MonkeyPatch, found: list[dict[str, Any]], driver: str = "580.65", why: str = "") -> None:
    data = {"why_none": why, "driver": driver, "gpus": found}
    monkeypatch.setattr(doctor, "ask_gpus", lambda python, timeout: Answer(data))


def by_id(findings: list[Finding]) -> dict[str, Finding]:
    found = {finding.id: finding for finding in findings}
    assert len(found) == len(findings), "every finding has an id of its own"
    assert all(finding.remedy for finding in findings if finding.state != "ok"), "what is not ok has a remedy"
    return found


def test_a_good_environment_is_ok(tmp_path: Path) -> None:
    found = by_id(examine(python=fake(tmp_path)))
    assert {found[name].state for name in (*MODERN, "python", "versions", "peft-import", "peft-options")} == {"ok"}
    assert found["peft"].sentence == "peft 0.21.0"
    assert "rsLoRA, DoRA" in found["peft-options"].sentence
    assert found["bitsandbytes"].state == "warn"


def test_the_interpreter_that_runs_lorapatch_is_examined_without_another() -> None:
    found = by_id(examine())
    assert found["python"].state == "ok"
    assert str(Path(sys.executable)) in found["python"].sentence
    assert found["peft-import"].id == "peft-import" if "peft-import" in found else found["peft"].state == "fail"


def test_an_environment_with_nothing_in_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True, timeout=120)
    found = by_id(examine(script_python=str(tmp_path / "bare/bin/python")))
    assert {name: found[name].state for name in MODERN} == dict.fromkeys(MODERN, "fail")
    assert found["torch"].remedy == "pip install torch"
    assert "peft-import" not in found


def test_python_goes_before_the_script_s_python(tmp_path: Path) -> None:
    good = fake(tmp_path)
    assert by_id(examine(python=good, script_python="/nowhere/python"))["python"].state == "ok"


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    found = by_id(examine(script_python="/home/user/gone/bin/python"))
    assert found["python"].state == "fail"
    assert "/home/user/gone/bin/python is not there" in found["python"].sentence
    assert "disk" in found and "port" in found


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "it ended with status 3 and said nothing"),
        ("echo broken env >&2; exit 1", "broken env"),
        ("echo 'lorapatch-answer:{'", "its answer cannot be read"),
        ("exec sleep 30", "no answer within 1 s"),
        ("sleep 30", "no answer within 1 s"),  # in a process of its own, which holds the output
    ],
)
def test_a_broken_interpreter_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "QUICK_S", 1.0)
    monkeypatch.setattr(doctor, "IMPORT_S", 1.0)
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    found = by_id(examine(python=str(path)))
    assert (found["python"].state, said in found["python"].sentence) == ("fail", True)


def test_a_file_that_is_no_program_is_an_answer_too(tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_bytes(b"\x7fELFnonsense")
    path.chmod(0o755)
    assert ask(str(path), "print()", 5).data is None


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("ImportError: cannot import name 'EncoderDecoderCache' from 'transformers'", "pip install 'peft<0.14'"),
        ("ImportError: cannot import name 'HybridCache' from 'transformers'", "pip install --upgrade peft"),
        ("ModuleNotFoundError: No module named 'accelerate'", "install it into this environment"),
        ("ImportError: libfoo.so: undefined symbol: _ZN3c10", "built for another torch"),
        ("ValueError: something new", "run it by hand"),
    ],
)
def test_an_import_that_fails_says_why_and_what_to_do(tmp_path: Path, error: str, remedy: str) -> None:
    found = by_id(examine(python=fake(tmp_path, peft=error)))["peft-import"]
    assert found.state == "fail"
    assert found.sentence == f"`from peft import LoraConfig, get_peft_model` fails: {error}"
    assert remedy in found.remedy


def test_deepspeed_and_torch_that_do_not_import(tmp_path: Path) -> None:
    broken = "ImportError: cannot import name 'log' from 'torch.distributed.elastic.agent.server.api'"
    found = by_id(examine(python=fake(tmp_path, torch="OSError: libcudart.so.12", deepspeed=broken)))
    assert (found["torch-import"].state, "reinstall torch" in found["torch-import"].remedy) == ("fail", True)
    assert "deepspeed>=0.14.4" in found["deepspeed-import"].remedy


def test_an_old_peft_says_what_it_lacks(tmp_path: Path) -> None:
    old = {"fields": ["r", "lora_alpha"], "pissa": False, "all_linear": False}
    found = by_id(examine(python=fake(tmp_path, peft=old)))["peft-options"]
    assert found.state == "warn"
    assert "it lacks rsLoRA, DoRA" in found.sentence and "all-linear" in found.sentence


@pytest.mark.parametrize(
    ("versions", "name", "fails"),
    [
        ({"numpy": "2.1.0", "torch": "2.0.1"}, "numpy-torch", True),
        ({"torch": "2.4.0", "deepspeed": "0.11.1"}, "torch-deepspeed", True),
        ({"transformers": "4.57.1", "torch": "2.4.1+cu121"}, "transformers-torch", False),
        ({"bitsandbytes": "0.42.0", "deepspeed": "0.14.4"}, "bitsandbytes-deepspeed", False),
        ({"peft": "0.14.0", "transformers": "4.38.2"}, "peft-transformers", True),
    ],
)
def test_each_rule_finds_its_pair_and_names_its_source(versions: dict[str, str], name: str, fails: bool) -> None:
    (misfit,) = misfits(versions, {}, {})
    assert (misfit.name, misfit.fails) == (name, fails)
    assert misfit.source and misfit.remedy
    assert all(version in misfit.sentence for version in versions.values())


def test_pinned_old_and_new_sets_that_fit_are_left_alone() -> None:
    upstream = {"torch": "2.0.1", "transformers": "4.38.2", "peft": "0.4.0", "deepspeed": "0.11.1", "numpy": "1.26.4"}
    assert list(misfits(upstream, {}, {"peft": "0.4.0"})) == []
    assert list(misfits(MODERN | {"numpy": "2.4.0", "bitsandbytes": "0.50.0"}, {}, {"peft": "0.20.0"})) == []


def test_what_packages_say_of_each_other_counts() -> None:
    requires = {
        "transformers": ["torch>=2.6 ; extra == 'torch'", "numpy>=1.17", "jax ; extra == 'flax'", "not a line ###"]
    }
    (misfit,) = misfits({"transformers": "5.0.0", "torch": "2.5.1", "numpy": "2.0.0"}, requires, {})
    assert (misfit.name, misfit.remedy) == ("transformers-torch", "pip install 'torch>=2.6'")
    (other,) = misfits({"transformers": "5.23.0", "peft": "0.15.0"}, {}, {"peft": "0.20.0"})
    assert "needs peft 0.20.0 or newer, here is 0.15.0" in other.sentence


def test_a_misfit_is_a_finding(tmp_path: Path) -> None:
    versions = MODERN | {"deepspeed": "0.13.0"}
    found = by_id(examine(python=fake(tmp_path, versions=versions)))
    assert found["versions-torch-deepspeed"].state == "fail"
    assert "DeepSpeed issue 5337" in found["versions-torch-deepspeed"].sentence
    assert "versions" not in found


def gpu(**changes: Any) -> dict[str, Any]:
    return {"index": 0, "name": "NVIDIA H100", "used": 2**29, "total": 80 * 2**30, "bf16": True} | changes


def test_a_gpu_with_its_driver_memory_and_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, [gpu()])
    found = by_id(examine(python=fake(tmp_path, torch=CUDA)))
    assert found["gpu-0"] == Finding("gpu-0", "ok", "GPU 0: NVIDIA H100, 79.5 of 80.0 GiB free, compute capability 9.0")
    assert (found["driver"].state, found["nvml"].state, found["torch-cuda"].state) == ("ok", "ok", "ok")


@pytest.mark.parametrize(
    ("changes", "torch", "driver", "name", "state", "said"),
    [
        ({"bf16": False}, TORCH, "580.1", "gpu-0", "warn", "no bf16, no TF32"),
        ({"used": 40 * 2**30}, CUDA, "580.1", "gpu-0", "warn", "somebody else uses it"),
        ({}, CUDA, "535.104.05", "driver", "fail", "too old for torch's CUDA 13.0, which needs 580"),
        ({}, CUDA | {"architectures": ["sm_70", "sm_80"]}, "580.1", "gpu-0", "fail", "torch has no code for it"),
        ({}, CUDA | {"architectures": ["sm_80", "compute_80"]}, "580.1", "gpu-0", "ok", "compute capability 9.0"),
        ({}, CUDA | {"available": False, "devices": []}, "580.1", "torch-cuda", "warn", "but sees no GPU"),
    ],
)
def test_what_is_wrong_with_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    torch: dict[str, Any],
    driver: str,
    name: str,
    state: str,
    said: str,
) -> None:
    gpus(monkeypatch, [gpu(**changes)], driver)
    found = by_id(examine(python=fake(tmp_path, torch=torch)))[name]
    assert (found.state, said in found.sentence) == (state, True), found


def test_no_gpu_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, [], why="nvidia-ml-py is not installed: pip install nvidia-ml-py")
    found = by_id(examine(python=fake(tmp_path)))["nvml"]
    assert (found.state, found.remedy) == ("warn", "pip install nvidia-ml-py")


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with one folder, and sh."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    return folder


def test_compilers_that_are_missing_or_dead(tmp_path: Path, bin_only: Path) -> None:
    found = by_id(examine(python=fake(tmp_path)))
    assert (found["g++"].state, found["ninja"].state) == ("warn", "warn")
    program(bin_only, "g++", "exit 1")
    program(tmp_path, "ninja", "echo 1.13")
    found = by_id(examine(python=fake(tmp_path)))
    assert "does not run" in found["g++"].sentence
    assert found["ninja"].remedy == f"export PATH={tmp_path}:$PATH"


@pytest.mark.parametrize(
    ("release", "state"), [("release 13.0, V13.0.88", "ok"), ("release 12.4, V12.4.99", "fail"), ("no version", "warn")]
)
def test_nvcc_must_be_of_torch_s_cuda(
    tmp_path: Path, bin_only: Path, monkeypatch: pytest.MonkeyPatch, release: str, state: str
) -> None:
    program(bin_only, "nvcc", f"echo 'Cuda compilation tools, {release}'")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    found = by_id(examine(python=fake(tmp_path, torch=CUDA)))
    assert found["nvcc"].state == state
    assert (found["cuda-home"].state, "without nvcc" in found["cuda-home"].sentence) == ("warn", True)


def test_a_deepspeed_of_another_environment_is_noticed(tmp_path: Path, bin_only: Path) -> None:
    other = tmp_path / "other/bin"
    other.mkdir(parents=True)
    (bin_only / "deepspeed").write_text(f"#!{other}/python\n")
    (bin_only / "deepspeed").chmod(0o755)
    found = by_id(examine(python=fake(tmp_path)))["launcher"]
    assert found.state == "warn"
    assert f"which runs {other}/python" in found.sentence
    (bin_only / "deepspeed").write_text(f"#!{tmp_path}/python3\n")
    assert by_id(examine(python=fake(tmp_path)))["launcher"].state == "ok"


def test_a_deepspeed_beside_the_interpreter_but_not_on_path(tmp_path: Path, bin_only: Path) -> None:
    program(tmp_path, "deepspeed", "true")
    assert by_id(examine(python=fake(tmp_path)))["launcher"].remedy == f"export PATH={tmp_path}:$PATH"


def test_a_taken_port_and_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "PORT", taken.getsockname()[1])
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: _Free(2**30))
        found = by_id(examine(python=fake(tmp_path)))
    assert (found["port"].state, "--master_port" in found["port"].remedy) == ("warn", True)
    assert (found["disk"].state, found["shared-memory"].state) == ("fail", "ok")


class _Free:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_finding_goes_into_json() -> None:
    assert json.loads(json.dumps(Finding("a", "warn", "b", "c").as_dict())) == {
        "id": "a",
        "state": "warn",
        "sentence": "b",
        "remedy": "c",
    }


def test_without_packaging_the_versions_are_not_compared_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "packaging"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "packaging", None)  # type: ignore[arg-type]
    finding = next(found for found in examine() if found.id == "versions")
    assert finding.state == "warn" and "pip install packaging" in finding.remedy
