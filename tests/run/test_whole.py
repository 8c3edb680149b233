"""The whole script runs as it stands, but ends with the trainer's exit code, and skips what is done."""
# ruff: noqa: E501 (scripts and logs as they stand)

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import PATCHED, Case
from oracle import Call, run_script

from lorapatch.launch import read_source
from lorapatch.run.whole import render_full

HOME = Path("/work/script.sh")  # where the oracle puts a script


def without_port(call: Call) -> tuple[object, ...]:
    """The call less the port that is given to it, in its words and in the strings it is kept in."""
    words: list[bytes] = []
    for word in call.argv:
        if words[-1:] and words[-1] in (b"--master_port", b"--main_process_port"):
            words.pop()
        else:
            words.append(
                re.sub(rb" --(?:master|main_process)_port \S+", b"", word.replace(b"/work/script.sh", b"script.sh"))
            )
    environment = [(name, re.sub(rb" --master_port \S+", b"", value)) for name, value in call.environment]
    return call.program, words, environment


@pytest.mark.parametrize("case", PATCHED, ids=str)
def test_the_whole_runs_every_command_of_the_script_with_the_same_words(case: Case) -> None:
    run = case.facts.get("run", {})
    if case.facts.get("skip_run"):
        pytest.skip(case.facts["skip_run"])
    rendered = render_full(read_source(case.text, HOME), target=HOME)
    before = run_script(case.text, run.get("args", ()), run.get("env"))
    after = run_script(rendered.text, run.get("args", ()), run.get("env"))
    key = repr
    assert sorted(map(without_port, after), key=key) == sorted(map(without_port, before), key=key)


def whole(text: str, tmp_path: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the whole of ``text``, whose trainers end with the code they are given: `python train.py"
    " --learning_rate CODE`."""
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[1:], flush=True); sys.exit(int(sys.argv[2]))")
    script = read_source(text.encode(), tmp_path / "script.sh")
    rendered = render_full(script, **options)  # type: ignore[arg-type]
    (tmp_path / "script_full.sh").write_bytes(rendered.text)
    return subprocess.run(["bash", "script_full.sh"], cwd=tmp_path, capture_output=True, text=True, check=False)


BAD = "python train.py --learning_rate 7"
GOOD = "python train.py --learning_rate 0"


@pytest.mark.parametrize(
    ("text", "code", "goes_on"),
    [
        (f"{BAD}\necho after", 7, False),
        (f"{BAD} 2>&1 | tee log\nif [ $? -ne 0 ]; then exit 1; fi\necho after", 7, False),
        (f"{GOOD} | tee log\nfalse | true && echo after", 0, True),  # pipefail is the launch's alone
        (f"set -o pipefail\n{GOOD} | tee log\nfalse | true && echo after\nexit 5", 5, False),
        (f"( cd .; {BAD} ) | tee log\necho after", 7, False),
        (f"{{ {BAD}; }} > log 2>&1\necho after", 7, False),
        (f"{{ {BAD}; }} 2>&1 | tee log\necho after", 7, False),
        (f"{{ {GOOD}; false; }} > log\necho after", 0, True),
        (f"true && {BAD} && echo done\necho after", 7, False),
        (f"false && {BAD}\necho after", 0, True),
        (f"{BAD} || echo after", 0, True),
        (f"{BAD} | cat || echo after", 0, True),
        (f"if {BAD}; then echo yes; else echo after; fi", 0, True),
        (f"for i in 1 2; do {BAD} && break; done; echo after", 0, True),
        (f"f() {{ {BAD}; }}\nf\necho after", 7, False),
        (f"{BAD} &\nwait\necho after", 0, True),
        (f"! {BAD} && echo after", 0, True),
    ],
)
def test_a_failed_training_ends_the_script_unless_the_script_looks_at_it_itself(
    tmp_path: Path, text: str, code: int, goes_on: bool
) -> None:
    done = whole(text + "\n", tmp_path)
    assert (done.returncode, "after" in done.stdout) == (code, goes_on), done


def test_stages_that_are_done_are_left_out_with_a_word_about_it(tmp_path: Path) -> None:
    text = f"{GOOD} --output_dir one 2>&1 | tee log || exit 1\n{GOOD} --output_dir two\n"
    done = whole(text, tmp_path, skip={1: "one/it's.bin is there"})
    lines = done.stdout.splitlines()
    assert lines[0] == "lorapatch: the launch on line 1 is left out: one/it's.bin is there"
    assert len(lines) == 2 and "two" in lines[1]


def test_the_script_keeps_every_other_byte_and_its_own_name() -> None:
    source = b'#!/bin/bash -l\n#SBATCH -N 1\n# \xe9\xe8\nexport X=1\ncp $0 out/$(basename "$0")\ndeepspeed t.py --learning_rate 1\n'
    text = render_full(read_source(source, Path("/kit/train.sh"))).text
    lines = text.split(b"\n")
    assert lines[0] == b"#!/bin/bash -l" and b"#SBATCH -N 1" in lines and b"# \xe9\xe8" in lines
    assert b'cp ${lorapatch_script} out/$(basename "${lorapatch_script}")' in lines
    assert lines[-2] == b'deepspeed --master_port "${MASTER_PORT:-29500}" t.py --learning_rate 1 || exit "$?"'


def test_hosts_and_gpus_go_to_every_deepspeed_launch() -> None:
    source = b"deepspeed a.py --learning_rate 1\ntorchrun b.py --learning_rate 1\n"
    text = render_full(read_source(source, HOME), hostfile="hosts", num_gpus=2).text.decode()
    first, second = text.splitlines()[-2:]
    assert "--hostfile hosts" in first and "--num_gpus 2" in first
    assert "--hostfile" not in second and "--nproc_per_node 2" in second


def test_what_is_added_to_a_script_gives_shellcheck_nothing_new_to_say(tmp_path: Path) -> None:
    found = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    for kind in ("before", "after"):
        (tmp_path / kind).mkdir()
    for case in PATCHED:
        script = read_source(case.text, HOME)
        (tmp_path / "before" / f"{case}.sh").write_bytes(case.text)
        (tmp_path / "after" / f"{case}.sh").write_bytes(render_full(script, target=HOME).text)
    said = {}
    for kind in ("before", "after"):
        files = sorted((tmp_path / kind).iterdir())
        command = [found, "--shell=bash", "--format=gcc", *(file.name for file in files)]
        lines = (
            subprocess.run(command, cwd=tmp_path / kind, capture_output=True, check=False).stdout.decode().splitlines()
        )
        said[kind] = Counter((line.partition(":")[0], line.rpartition("[")[2]) for line in lines)
    assert said["after"] - said["before"] == Counter()
