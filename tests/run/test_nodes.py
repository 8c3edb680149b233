"""The command line of each node, without starting any."""
# ruff: noqa: E501 (scripts and logs as they stand)

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.launch import read_source
from lorapatch.run.nodes import node_commands, read_hostfile


def hostfile(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_as_deepspeed_does(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# ours\n\nworker-1 slots=8\n  worker-2\tslots=4 # four\n")
    assert read_hostfile(path) == {"worker-1": 8, "worker-2": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker-1\n", r"hosts, line 1: 'worker-1' is not of the form"),
        ("a slots=1\na slots=2\n", r"hosts, line 2: a is there twice"),
        ("# none\n", "names no host"),
        (None, "the hostfile cannot be read"),
    ],
)
def test_a_hostfile_that_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "hosts" if text is None else hostfile(tmp_path, text)
    with pytest.raises(Refused, match=message):
        read_hostfile(path)


def commands(text: str, hosts: dict[str, int], **options: int) -> list[tuple[str, str]]:
    script = read_source(text.encode(), Path("/kit/train.sh"))
    return [(node.host, node.command) for node in node_commands(script, script.launches[0], hosts, **options)]


def test_each_node_gets_its_rank_the_same_world_and_the_scripts_words() -> None:
    text = 'NAME="a b"\nNCCL_DEBUG=INFO deepspeed --include x train.py --name "$NAME" --learning_rate 1 --run $(date) --lit \'$5\'\n'
    found = commands(text, {"one": 2, "two": 4}, num_gpus=2)
    assert [host for host, _ in found] == ["one", "two"]
    for rank, (_, command) in enumerate(found):
        assert (
            f"--node_rank={rank} --master_addr=one --master_port=29500 train.py --name 'a b' --learning_rate 1"
            in command
        )
        assert (
            command.endswith("--run $(date) --lit '$5'")
            and "&& NCCL_DEBUG=INFO python -u -m deepspeed.launcher.launch" in command
        )
        world = re.search(r"--world_info=(\S+)", command)
        assert world is not None
        assert json.loads(base64.urlsafe_b64decode(world[1])) == {"one": [0, 1], "two": [0, 1]}


def test_a_module_and_the_launchs_own_address_and_port_are_kept() -> None:
    ((_, command),) = commands(
        "deepspeed --master_addr 10.0.0.1 --master_port=7 --module a.train --learning_rate 1", {"one": 1}
    )
    assert "--master_addr=10.0.0.1 --master_port=7 --module a.train" in command


def test_what_deepspeed_cannot_do_is_refused() -> None:
    with pytest.raises(Refused, match="torchrun takes no hostfile"):
        commands("torchrun t.py --learning_rate 1", {"one": 1})
    with pytest.raises(Refused, match="two has 2 GPUs by the hostfile, fewer than --num-gpus 4"):
        commands("deepspeed t.py --learning_rate 1", {"one": 4, "two": 2}, num_gpus=4)
