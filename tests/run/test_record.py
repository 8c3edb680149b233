"""The plan's record says time, step, state, memory, problem, remedy and next step, in English and Chinese."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lorapatch.errors import Refused, UsageError
from lorapatch.launch import read_source
from lorapatch.run.chinese import CAUSES, STATES
from lorapatch.run.log import Spawned
from lorapatch.run.record import append_record, as_markdown, script_change
from lorapatch.run.symptoms import SYMPTOMS
from lorapatch.run.versions import library_versions, processes_of
from lorapatch.run.watch import SeenProcess

GIB = 1 << 30


def record(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": "smoke",
        "folder": "20250701-223501-smoke-train",
        "outcome": {"state": "finished", "started": "2025-07-01T22:35:01+0800", "wall_s": 92.4},
        "script": {"name": "train.sh"},
        "metrics": {"step": 5, "total_steps": 5, "first_loss": 2.5, "last_loss": 2.125},
        "memory": {
            "device_peak_B": 14 * GIB, "budget_B": 24 * GIB, "host_rss_peak_B": 3 * GIB, "gpus_of_run": [0],
            "gpus": [{"index": 0, "total_B": 24 * GIB}, {"index": 1, "total_B": 80 * GIB}],
        },
        "verdict": {"passed": True, "lines": []},
        "diagnosis": None,
        "next_step": "lorapatch full train.sh",
    }  # fmt: skip
    return {**found, **changes}


OOM = {
    "id": "cuda-oom",
    "cause": "The GPU's memory is full.",
    "remedy": "lorapatch tune t.sh",
    "evidence": "CUDA out of memory",
}


def test_a_good_run_in_english() -> None:
    assert as_markdown(record()) == (
        "## 2025-07-01 22:35:01 smoke train.sh\n\n"
        "- Time: 2025-07-01 22:35:01, 1 min 32 s\n"
        "- Step: smoke test, train.sh, 5 of 5 steps, loss 2.5 → 2.125\n"
        "- State: success\n"
        "- Memory: 14.00 GiB / 24 GiB, budget 24 GiB\n"
        "- Problem: none\n"
        "- Remedy: none\n"
        "- Next step: `lorapatch full train.sh`\n"
        "- Record: [20250701-223501-smoke-train](20250701-223501-smoke-train/record.json)\n"
    )


def test_a_failed_run_in_chinese() -> None:
    outcome = {"state": "failed", "started": "2025-07-01T22:35:01+0800", "wall_s": 7}
    text = as_markdown(record(outcome=outcome, diagnosis=OOM, next_step="lorapatch tune t.sh"), "zh")
    for line in (
        "- 时间：2025-07-01 22:35:01, 7 s", "- 步骤：小规模测试, train.sh, 5 / 5 步, 损失 2.5 → 2.125", "- 状态：失败",
        "- 显存使用：14.00 GiB / 24 GiB, 预算 24 GiB", "- 问题：GPU 显存不足。 (`CUDA out of memory`)",
        "- 解决方案：`lorapatch tune t.sh`", "- 下一步：`lorapatch tune t.sh`",
    ):  # fmt: skip
        assert line in text, line


def test_a_verdict_that_fails_without_a_diagnosis_names_its_lines() -> None:
    lines = [
        {"what": "ran", "state": "pass", "evidence": "x"},
        {"what": "the loss", "state": "fail", "evidence": "a\nb"},
    ]
    text = as_markdown(record(verdict={"passed": False, "lines": lines}))
    assert "- State: failed\n" in text and "- Problem: the loss: a b\n" in text


def test_a_run_without_gpu_says_host_memory() -> None:
    memory = {"device_peak_B": None, "budget_B": None, "host_rss_peak_B": 3 * GIB, "gpus_of_run": [], "gpus": []}
    assert "- Memory: 3.00 GiB (host memory)\n" in as_markdown(record(memory=memory))


def test_every_diagnosis_has_chinese_words() -> None:
    source = (Path(sys.modules["lorapatch.run.diagnose"].__file__ or "")).read_text()
    ids = {row.id for row in SYMPTOMS} | set(re.findall(r'Diagnosis\(\s*"([\w-]+)"', source))
    assert ids == set(CAUSES) and set(STATES) == {"success", "failed", "interrupted", "timeout"}


def test_runs_that_end_together_do_not_mix_their_lines(tmp_path: Path) -> None:
    threads = [threading.Thread(target=append_record, args=(tmp_path, record())) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / "RECORD.md").read_text()
    assert text.count(as_markdown(record())) == 20


def test_what_cannot_be_written_or_is_not_spoken_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose one of en, zh"):
        as_markdown(record(), "fr")
    (tmp_path / "RECORD.md").mkdir()
    with pytest.raises(Refused, match="RECORD.md cannot be written"):
        append_record(tmp_path, record())


def test_the_change_of_the_script_is_kept_with_hashes() -> None:
    change = script_change(b"a\nb\n", b"a\nc\n", "t.sh")
    assert change["diff"] == "--- t.sh\n+++ t.sh (patched)\n@@ -1,2 +1,2 @@\n a\n-b\n+c\n"
    assert change["original_sha256"] != change["patched_sha256"]


# -- versions and processes ------------------------------------------------------------------------------------------

SCRIPT = b"deepspeed kit/train.py --learning_rate 1 --output_dir out/x\n"
ARGS = ["kit/train.py", "--learning_rate", "1", "--output_dir", "out/x"]


def seen(*argvs: list[str], **environment: str) -> list[SeenProcess]:
    return [SeenProcess(100 + i, 1, argv, environment) for i, argv in enumerate(argvs)]


def test_launcher_and_ranks_are_told_apart() -> None:
    launch = read_source(SCRIPT, Path("/kit/t.sh")).launches[0]
    processes = [
        *seen(
            ["bash", "t.sh"],
            ["/e/python", "/e/bin/deepspeed", *ARGS],
            ["/e/python", "-m", "deepspeed.launcher.launch", *ARGS],
        ),
        SeenProcess(7, 1, ["/e/python", "-u", ARGS[0], "--local_rank=1", *ARGS[1:]], {"RANK": "1"}),
        SeenProcess(8, 1, ["/e/python", "-u", ARGS[0], "--local_rank=0", *ARGS[1:]], {"RANK": "0", "PATH": "/e"}),
        SeenProcess(9, 8, ["/e/python", "-u", ARGS[0], "--local_rank=0", *ARGS[1:]], {"RANK": "0"}),  # a data worker
        *seen(["/e/python", "kit/train.py", "--output_dir", "out/other"], ["tee", "out/x/log"]),
    ]
    found = processes_of(launch, processes)
    assert found.launcher == ["/e/python", "/e/bin/deepspeed", *ARGS]
    assert [argv[3] for argv in found.ranks] == ["--local_rank=0", "--local_rank=1"]
    assert (found.python, found.world_size, found.environment["PATH"]) == ("/e/python", 2, "/e")


def test_a_rank_too_short_lived_to_be_seen_is_taken_from_the_log() -> None:
    launch = read_source(SCRIPT, Path("/kit/t.sh")).launches[0]
    found = processes_of(launch, [], [Spawned(1, ["/e/python3", "-u", *ARGS])])
    assert (found.ranks, found.python, found.launcher) == ((["/e/python3", "-u", *ARGS],), "/e/python3", None)
    assert processes_of(launch, []).python is None


def test_versions_are_asked_from_the_interpreter_of_the_run(tmp_path: Path) -> None:
    found = library_versions(sys.executable)
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and "transformers" in found
    (tmp_path / "peft-99.dist-info").mkdir()
    (tmp_path / "peft-99.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 99\n")
    assert library_versions(sys.executable, {"PYTHONPATH": str(tmp_path)})["peft"] == "99"
    assert library_versions("/no/such/python") == {} and library_versions("/bin/true") == {}
