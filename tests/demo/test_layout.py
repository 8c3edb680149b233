"""The tree of the miniature toolkit: complete, repeatable, never over somebody's files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from lorapatch.demo import SCRIPT, layout, make_demo
from lorapatch.errors import Refused, UsageError
from lorapatch.resources import resource_dir

STAMP = ".lorapatch_demo.json"

# Both note every argument that is a path of the demo and whether it is there; a launch leaves what its stage makes.
DEEPSPEED_STUB = """#!{python}
import sys
from pathlib import Path
words = sys.argv[1:]
output = Path(words[words.index("--output_dir") + 1])
with open({log!r}, "a") as log:
    for word in words:
        if "/" in word and word != str(output):
            print(Path(word).exists(), word, file=log)
(output / "mm_projector.bin").touch()
(output / "config.json").touch()
"""
PYTHON_STUB = """#!{python}
import os, sys
from pathlib import Path
words = sys.argv[1:]
if "/mgm/eval/" not in words[0]:
    os.execv({python!r}, [{python!r}, *words])
with open({log!r}, "a") as log:
    for word in words:
        if "/" in word and "eval_results" not in word:
            print(Path(word).exists(), word, file=log)
for word in words:
    if word.endswith(".jsonl") and "eval_results" in word:
        Path(word).touch()
"""


def test_every_path_of_the_script_is_there_when_its_stage_begins(quick_demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "demo" / "toolkit"
    shutil.copytree(quick_demo.parent, copy.parent)
    stubs, log = tmp_path / "bin", tmp_path / "log"
    stubs.mkdir()
    for name, text in (("deepspeed", DEEPSPEED_STUB), ("python", PYTHON_STUB)):
        (stubs / name).write_text(text.format(python=sys.executable, log=str(log)))
        (stubs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["bash", str(copy / SCRIPT)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    seen = log.read_text().splitlines()
    assert [line for line in seen if not line.startswith("True ")] == []
    named = {Path(line.split()[1]).name for line in seen}
    assert {"train_mem.py", "zero2_offload.json", "gemma-2b-it", "mm_projector.bin"} <= named
    assert {"model_vqa_loader.py", "eval_textvqa.py", "model_vqa_mmbench.py", "eval_mmbench.py"} <= named
    assert (copy.parent / "output" / "train.sh").read_bytes() == (quick_demo / SCRIPT).read_bytes()


def test_the_script_is_the_one_that_travels_with_lorapatch(quick_demo: Path) -> None:
    assert (quick_demo / SCRIPT).read_bytes() == (resource_dir("original_scripts") / SCRIPT).read_bytes()
    assert os.access(quick_demo / SCRIPT, os.X_OK)


def test_every_shell_file_passes_shellcheck(quick_demo: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    for path, level in [(quick_demo / SCRIPT, "error"), *((path, "style") for path in quick_demo.glob("eval/*.sh"))]:
        ran = subprocess.run([shellcheck, "-S", level, path], capture_output=True, text=True, check=False)
        assert ran.stdout == ""


def test_every_zero_configuration_leaves_to_the_flags_what_they_decide(quick_demo: Path) -> None:
    found = {path.stem: json.loads(path.read_text()) for path in (quick_demo / "training/scripts").glob("zero*.json")}
    assert found.keys() == {"zero2", "zero2_offload", "zero3", "zero3_offload"}
    for name, config in found.items():
        assert config["zero_optimization"]["stage"] == int(name[4])
        assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("offload")
        assert config["train_micro_batch_size_per_gpu"] == config["gradient_accumulation_steps"] == "auto"


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_interrupted_demo_is_made_again_with_the_same_bytes(
    quick_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_training: None
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(layout, "_lay_out_zoo", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_demo(tmp_path / "demo")
    (tmp_path / "demo/toolkit/half.part").touch()
    (tmp_path / "demo/output").mkdir()
    (tmp_path / "demo/output/mine").touch()
    calls: list[tuple[str, int, int]] = []
    assert make_demo(tmp_path / "demo", progress=lambda *call: calls.append(call)) == tmp_path / "demo/toolkit"
    assert (tmp_path / "demo/output/mine").exists()
    shutil.rmtree(tmp_path / "demo/output")
    assert digests(tmp_path / "demo") == digests(quick_demo.parent)
    for what in ("data", "model zoo"):
        steps = [(done, total) for name, done, total in calls if name == what]
        assert steps == sorted(steps)
        assert steps[0][0] == 0
        assert steps[-1][0] == steps[-1][1]


def test_a_stamp_cut_off_while_it_was_written_counts_as_interrupted(tmp_path: Path) -> None:
    (tmp_path / STAMP).write_text('{"version": 1, "si')
    (tmp_path / "toolkit").mkdir()
    assert not layout._finished(tmp_path, {"version": 1})
    layout._begin(tmp_path, {"version": 1})
    assert [path.name for path in tmp_path.iterdir()] == [STAMP]


def test_a_finished_demo_is_left_as_it_is_whatever_was_changed_in_it(quick_demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(quick_demo.parent, copy)
    (copy / "toolkit" / SCRIPT).write_text("patched")
    before = digests(copy)
    assert make_demo(copy) == copy / "toolkit"
    assert digests(copy) == before


def test_a_demo_of_another_seed_is_refused(quick_demo: Path) -> None:
    with pytest.raises(Refused, match="size tiny, seed 0, layout 1: name another directory, or remove it"):
        make_demo(quick_demo.parent, seed=1)


def test_somebodys_directory_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Refused, match="is not empty and no earlier demo"):
        make_demo(tmp_path)
    with pytest.raises(Refused, match=r"cannot make a demo in .*mine\.txt"):
        make_demo(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_size_or_device_that_is_not_there_is_a_usage_error_before_anything_is_written(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(UsageError, match="--size huge: choose one of tiny, true"):
        make_demo(tmp_path / "demo", size="huge")
    for device in ("nonsense", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(UsageError, match=f"--device {device}: "):
            make_demo(tmp_path / "demo", device=device)
    assert not (tmp_path / "demo").exists()


def test_too_little_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(1 << 40, 0, 3 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Refused, match=r"3\.0 GiB are free, a demo of size true needs 6\.0"):
        make_demo(tmp_path / "demo", size="true")


def test_a_disk_that_fills_up_is_one_sentence_and_the_demo_is_made_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout, "_lay_out_data", full)
    with pytest.raises(Refused, match=r"is not finished: .*No space left on device"):
        make_demo(tmp_path / "demo")
    assert json.loads((tmp_path / "demo" / STAMP).read_text())["finished"] is False
