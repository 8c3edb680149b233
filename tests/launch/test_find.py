"""Launches are found behind every launcher and wrapper, with their trainer, flags and values."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorapatch.launch import Launch, read_source


def launches(text: str) -> tuple[Launch, ...]:
    return read_source(text.encode(), Path("/work/s.sh")).launches


@pytest.mark.parametrize(
    ("command", "launcher", "trainer", "module"),
    [
        ("deepspeed train.py --lr 1", "deepspeed", "train.py", False),
        ("deepspeed --include localhost:0,1 --master_port 2 train.py", "deepspeed", "train.py", False),
        ("deepspeed --module pkg.train --lr 1", "deepspeed", "pkg.train", True),
        ("/opt/env/bin/deepspeed --bind_cores_to_rank train.py", "deepspeed", "train.py", False),
        ("python $(which deepspeed) --num_gpus 2 train.py", "deepspeed", "train.py", False),
        ("/a/python3.10 `which torchrun` --nproc_per_node=2 train.py", "torchrun", "train.py", False),
        ("$PYTHON -u train.py", "python", "train.py", False),
        ("torchrun --standalone --nproc_per_node 2 -m pkg.train x", "torchrun", "pkg.train", True),
        ("python -m torch.distributed.run --nnodes=1 train.py", "torch.distributed.run", "train.py", False),
        ("python3 -m torch.distributed.launch --use_env train.py", "torch.distributed.launch", "train.py", False),
        ("python -m deepspeed.launcher.runner train.py", "deepspeed", "train.py", False),
        ("accelerate launch --multi_gpu --num_processes 2 train.py", "accelerate", "train.py", False),
        ("accelerate launch --config_file c.yaml -m pkg.train", "accelerate", "pkg.train", True),
        ("python -u -W ignore train.py", "python", "train.py", False),
        ("python -m pkg.train", "python", "pkg.train", True),
        ("A=1 B='x y' nohup srun -N 2 --gres=gpu:8 deepspeed train.py &", "deepspeed", "train.py", False),
        ("env -u X A=1 exec time torchrun train.py", "torchrun", "train.py", False),
        ("timeout 3h numactl -N 0 python train.py", "python", "train.py", False),
        ("bash -c 'deepspeed train.py --lr 1'", "deepspeed", "train.py", False),
        ('srun bash -c "torchrun train.py"', "torchrun", "train.py", False),
        ('eval "deepspeed train.py"', "deepspeed", "train.py", False),
        ("T=train.py; deepspeed $T --x", "deepspeed", "train.py", False),
        ("L='torchrun --nproc_per_node 2'; $L train.py", "torchrun", "train.py", False),
    ],
)
def test_a_launcher_is_found(command: str, launcher: str, trainer: str, module: bool) -> None:
    (found,) = launches(command + "\n")
    assert (found.launcher, found.trainer.name, found.trainer.module) == (launcher, trainer, module)


@pytest.mark.parametrize(
    "command",
    [
        "echo deepspeed train.py",
        "# deepspeed train.py",
        "python -c 'print(1)'",
        "python --version",
        "pip install deepspeed",
        "cat <<EOF\ndeepspeed train.py\nEOF",
        "accelerate config",
        "grep -n deepspeed train.py",
        "which deepspeed",
        "pkill -9 python",
    ],
)
def test_what_only_speaks_of_a_launcher_is_none(command: str) -> None:
    assert launches(command + "\n") == ()


def test_flags_of_every_style_are_read_with_their_values() -> None:
    (found,) = launches("D=/d; deepspeed t.py --a 1 --b=2 --c --d x 'y z' --e -2 -f \"$D/q\" --a 3 --g $(hostname)\n")
    assert [(flag.name, flag.value, flag.equals) for flag in found.flags] == [
        ("--a", "1", False),
        ("--b", "2", True),
        ("--c", "", False),
        ("--d", "x y z", False),
        ("--e", "-2", False),
        ("-f", "/d/q", False),
        ("--a", "3", False),
        ("--g", None, False),
    ]
    assert "hostname" in found.flags[-1].values[0].reason
    last = found.flag("a")
    assert last is not None and last.value == "3"


def test_spans_are_bytes_of_the_script() -> None:
    text = "# é\nOPTS=\"--lr 1 \\\n  --x 2\"\ndeepspeed t.py $OPTS --y '3'\n".encode()
    found = read_source(text).launches[0]
    for flag in found.flags:
        assert text[slice(*flag.word.span)].decode() == flag.name
        assert text[slice(*flag.values[0].span)].decode() == flag.values[0].text
    assert [flag.line for flag in found.flags] == [2, 3, 4]


def test_environment_redirects_pipe_and_context_are_read() -> None:
    (found,) = launches("if true; then\n  A=1 deepspeed t.py 2>&1 | tee log\nfi\n")
    assert [(name, word.value) for name, word in found.environment] == [("A", "1")]
    assert found.redirects == ("2>&1",) and found.piped and found.context == ("if",) and found.line == 2


def test_a_launch_in_a_variable_set_only_in_some_cases_is_said() -> None:
    script = read_source(b"if x; then C='deepspeed a.py'; else C='deepspeed b.py'; fi\n$C\n")
    assert script.launches == ()
    assert any("line 1" in note and "$C" in note for note in script.notes)


def test_a_trainer_that_comes_from_the_arguments_is_said() -> None:
    script = read_source(b'run() { deepspeed "$@"; }\nrun train.py\n')
    assert script.launches == () and "$@" in script.notes[0]


def test_the_json_has_all_of_it() -> None:
    import json

    script = read_source(b"deepspeed t.py --lora_r 8 --x=$Q\n")
    document = json.loads(json.dumps(script.as_dict()))
    (launch,) = document["launches"]
    assert document["schema"] == 1
    assert launch["trainer"]["name"] == "t.py" and launch["lora_flags"] == ["--lora_r"]
    assert launch["flags"][1]["values"] == [
        {"text": "$Q", "value": None, "unresolved": "$Q, which the script does not set"}
    ]
