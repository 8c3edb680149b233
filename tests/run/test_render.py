"""A rendered script starts what the script starts with the test's flags, and nothing else; bash accepts it."""
# ruff: noqa: E501 (scripts as they stand)

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from cases import PATCHED, Case
from oracle import LAUNCHERS, Call, run_script

from lorapatch.errors import Refused, UsageError
from lorapatch.launch import Launch, Script, read_source
from lorapatch.lora.plan import set_flags
from lorapatch.run.render import TEMPLATES, Rendered, render

HOME = Path("/work/script.sh")  # where the oracle puts a script
STAGES = [name for name in TEMPLATES if name != "full"]
TEST = {
    "--max_steps": "5",
    "--save_steps": "2",
    "--logging_steps": "1",
    "--output_dir": "test_out/model",
}
ALSO = ("--save_strategy", "--logging_strategy", "--evaluation_strategy", "--eval_strategy", "--report_to",
        "--load_best_model_at_end", "--resume_from_checkpoint", "--master_port", "--main_process_port")  # fmt: skip
AWKWARD = 'a b/it\'s $HOME `x` "q" 模型*'


def read(case: Case) -> tuple[Script, Launch]:
    script = read_source(case.text, HOME)
    return script, script.launches[case.facts["patched"]]


def shellcheck(text: bytes) -> str:
    found = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    result = subprocess.run([found, "--shell=bash", "-"], input=text, capture_output=True)
    return result.stdout.decode()


def assert_accepted(text: bytes) -> None:
    syntax = subprocess.run(["bash", "-n"], input=text, capture_output=True)
    assert (syntax.returncode, syntax.stderr) == (0, b""), text.decode("utf-8", "replace")
    assert shellcheck(text) == ""


def words_of(call: Call) -> tuple[list[bytes], dict[str, str]]:
    """The argv less the flags of a test, and the values those have."""
    rest: list[bytes] = []
    values: dict[str, str] = {}
    waiting = ""
    for word in call.argv:
        name, equals, value = word.decode("utf-8", "replace").partition("=")
        if name.replace("-", "_").replace("__", "--", 1) in (*TEST, *ALSO):
            name = name.replace("-", "_").replace("__", "--", 1)
            values[name] = value
            waiting = "" if equals else name
        elif waiting and not word.startswith(b"--"):
            values[waiting], waiting = word.decode(), ""
        else:
            rest, waiting = [*rest, word], ""
    return rest, values


def launches(calls: Sequence[Call], trainer: str) -> list[Call]:
    return [call for call in calls if call.program in LAUNCHERS and any(trainer.encode() in word for word in call.argv)]


@pytest.mark.parametrize("case", PATCHED, ids=str)
def test_the_rendered_test_starts_exactly_what_the_script_starts(case: Case) -> None:
    script, launch = read(case)
    rendered = render(script, launch, folder=Path("test_out"))
    run = case.facts.get("run", {})
    if case.facts.get("skip_run"):
        pytest.skip(case.facts["skip_run"])
    before = run_script(case.text, run.get("args", ()), run.get("env"))
    after = run_script(rendered.text, run.get("args", ()), run.get("env"))
    trainer = case.facts["launches"][case.facts["patched"]]["trainer"].rsplit("/")[-1]
    mark = case.facts.get("mark", "")
    started = launches(after, trainer)
    assert len(started) == 1, rendered.text.decode("utf-8", "replace")
    words, values = words_of(started[0])
    known = [words_of(call)[0] for call in launches(before, trainer)]
    assert words in known, (words, known, mark)
    assert values.items() >= TEST.items()
    original = next(call for call in launches(before, trainer) if words_of(call)[0] == words)
    exported = {pair for pair in original.environment if trainer.encode() not in pair[1]}  # less a launch kept in one
    assert exported <= set(started[0].environment)
    others = [call for call in after if call not in started]
    own = {"tee", "mkdir", "rm"}
    assert [
        call for call in others if call.program not in own and call.program not in {c.program for c in before}
    ] == []


@pytest.mark.parametrize("template", STAGES)
def test_every_template_is_accepted_for_every_case(template: str, tmp_path: Path) -> None:
    for case in PATCHED:
        script, launch = read(case)
        (tmp_path / f"{case}.sh").write_bytes(render(script, launch, template).text)  # refused if `bash -n` objects
    found = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    texts = sorted(tmp_path.glob("*.sh"))
    assert len(texts) == len(PATCHED) > 150
    # One process for all: starting shellcheck is what takes the time.
    result = subprocess.run([found, "--shell=bash", "--format=gcc", *texts], capture_output=True, text=True)
    assert result.stdout == ""


PLAIN = b"""#!/bin/bash
export NCCL_DEBUG=INFO
UNUSED=1
SCRIPT_DIR=$(cd "$(dirname "$0")" && pwd)
DATA="$SCRIPT_DIR/my data"
NAME=run-$MODE
mkdir -p out
deepspeed $SCRIPT_DIR/train.py \\
    --data_path "$DATA" \\
    --report_to wandb \\
    --evaluation_strategy steps --load_best_model_at_end True \\
    --resume_from_checkpoint out/checkpoint-3 \\
    --pretrain_mm_mlp_adapter out/mm_projector.bin \\
    --save_strategy epoch \\
    --output_dir "out/$NAME" \\
    --learning_rate 2e-5 2>&1 | tee "out/$NAME.log"
if [ $? -ne 0 ]; then exit 1; fi
python evaluate.py
"""


def plain(template: str = "test_lora_minimal", text: bytes = PLAIN, **options: object) -> Rendered:
    script = read_source(text, Path("/kit/train me.sh"))
    return render(script, script.launches[0], template, **options)  # type: ignore[arg-type]


def test_a_test_has_nothing_to_do_with_the_real_run() -> None:
    text = plain().text.decode()
    for real in ("UNUSED", "evaluate.py", "mkdir -p out", "NAME=", "out/$NAME"):
        assert real not in text, real
    for expected in (
        "export NCCL_DEBUG=INFO", "--max_steps 5", "--save_steps 2", "--logging_steps 1", "--save_strategy steps", "--report_to none",
        "--evaluation_strategy no", "--load_best_model_at_end False", '--output_dir "/kit/test_lora_minimal_output/model"',
        '--master_port "${MASTER_PORT:-29500}"', "set -euo pipefail", "# Note: --resume_from_checkpoint"
        " out/checkpoint-3 is left out",
    ):  # fmt: skip
        assert expected in text, expected


def test_numbers_and_flags_of_ones_own_are_set_and_others_left_out() -> None:
    rendered = plain(
        max_steps=20, save_steps=10, logging_steps=5, flags={"lora_r": "8"}, drop=["pretrain_mm_mlp_adapter"]
    )
    text = rendered.text.decode()
    assert (
        "--max_steps 20" in text and "--save_steps 10" in text and "--logging_steps 5" in text and "--lora_r 8" in text
    )
    assert rendered.notes == (
        "--pretrain_mm_mlp_adapter out/mm_projector.bin is left out",
        "--resume_from_checkpoint out/checkpoint-3 is left out",
    )
    assert "mm_projector.bin \\" not in text


def test_a_probe_saves_nothing() -> None:
    text = plain("probe").text.decode()
    assert "--max_steps 1" in text and "--save_strategy no" in text and "--save_steps" not in text


def test_a_job_of_the_whole_stage_keeps_the_scripts_flags() -> None:
    for template in ("sbatch", "multinode"):
        text = plain(template).text.decode()
        assert '--output_dir "out/$NAME"' in text and "--max_steps" not in text and "--report_to wandb" in text
    assert "--max_steps 3" in plain("sbatch", max_steps=3).text.decode()


def test_elsewhere_the_folder_of_the_script_is_pinned(tmp_path: Path) -> None:
    kit = tmp_path / "the kit's $x"
    kit.mkdir()
    source = b'HERE=$(cd "$(dirname "$0")" && pwd)\nME=${BASH_SOURCE[0]##*/}\npython $HERE/train.py --learning_rate 1 --name "$ME" --quoted \'$0\'\n'
    script = read_source(source.replace(b"$HERE/train", b'"$HERE"/train'), kit / "train it.sh")
    (kit / "train.py").write_text("import sys; print(sys.argv)")
    for target in (tmp_path / "elsewhere.sh", kit / "beside.sh"):
        rendered = render(script, script.launches[0], target=target, folder=tmp_path / "out")
        target.write_bytes(rendered.text)
        shown = subprocess.run(
            ["bash", str(target)],
            capture_output=True,
            text=True,
            cwd="/",
            env={**os.environ, "PATH": os.environ["PATH"]},
        )
        assert (
            repr(str(kit / "train.py"))[1:-1] in shown.stdout and "'train it.sh', '--quoted', '$0'" in shown.stdout
        ), shown


def test_beside_the_script_what_asks_for_its_folder_stays_as_it_is() -> None:
    assert b'SCRIPT_DIR=$(cd "$(dirname "$0")" && pwd)\n' in plain().text
    assert b"lorapatch_script=" not in plain().text
    assert b"lorapatch_script='/kit/train me.sh'" in plain(target=Path("/else/where.sh")).text


@pytest.mark.parametrize("template", STAGES)
def test_every_value_is_quoted(template: str, tmp_path: Path) -> None:
    folder = tmp_path / AWKWARD
    rendered = plain(template, target=folder / "t.sh", folder=folder / "out", max_steps=2, hostfile=f"{folder}/hosts\nx",
                     flags={"run_name": AWKWARD}, settings={"job_name": AWKWARD})  # fmt: skip
    assert_accepted(rendered.text)
    program = re.sub(rb"(?m)^deepspeed ", b"printf '%s\\\\0' ", rendered.text)
    if template in ("test_lora_minimal", "probe"):
        shown = subprocess.run(["bash", "-c", program.decode(), "bash"], capture_output=True, cwd=tmp_path)
        words = shown.stdout.decode().split("\0")
        assert words[words.index("--run_name") + 1] == AWKWARD
        assert words[words.index("--output_dir") + 1] == str(folder / "out" / "model")
        assert (folder / "out" / "train.log").read_bytes() == shown.stdout


def test_the_exit_code_is_the_trainers_behind_the_pipe(tmp_path: Path) -> None:
    script = read_source(b"python train.py --learning_rate 1 | tee log\n", tmp_path / "train.sh")
    (tmp_path / "train.py").write_text("print('last words'); raise SystemExit(7)")
    text = render(script, script.launches[0]).text
    done = subprocess.run(["bash"], input=text, capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, b"last words\n")


def test_a_test_starts_afresh_but_never_removes_what_is_not_its_own(tmp_path: Path) -> None:
    script = read_source(b"python train.py --learning_rate 1\n", tmp_path / "train.sh")
    (tmp_path / "train.py").write_text("import os; print(os.listdir('test_lora_minimal_output'))")
    text = render(script, script.launches[0]).text
    folder = tmp_path / "test_lora_minimal_output"
    folder.mkdir()
    (folder / "precious").write_text("")
    refused = subprocess.run(["bash"], input=text, capture_output=True, cwd=tmp_path)
    assert refused.returncode == 3 and b"nothing was started" in refused.stderr and (folder / "precious").exists()
    (folder / ".made_by_lorapatch").write_text("")
    again = subprocess.run(["bash"], input=text, capture_output=True, cwd=tmp_path)
    assert again.returncode == 0 and not (folder / "precious").exists()


def test_variables_that_nothing_sets_are_empty_as_in_the_script(tmp_path: Path) -> None:
    source = b'export PYTHONPATH=$PYTHONPATH:.\npython train.py --learning_rate 1 --a "x$NOT_SET" --b "$2" --c "${ALSO:-d}"\n'
    script = read_source(source, tmp_path / "train.sh")
    (tmp_path / "train.py").write_text("import sys; print(sys.argv[3:])")
    text = render(script, script.launches[0]).text
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(["bash"], input=text, capture_output=True, cwd=tmp_path, env=clean)
    assert b"['--a', 'x', '--b', '', '--c', 'd', " in done.stdout


def test_a_template_of_ones_own_works_the_same(tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh.j2"
    mine.write_text(
        "#!/bin/sh\n{{ setup }}\necho {{ output_dir | shellquote }} {{ colour | shellquote }}\n{{ launch }}\n"
    )
    text = plain(str(mine), settings={"colour": "dark blue"}).text.decode()
    assert "'dark blue'" in text and "--max_steps 5" in text
    extended = tmp_path / "extended.sh.j2"
    extended.write_text('{% extends "stage.sh.j2" %}{% block about %}# mine\n{% endblock %}')
    assert "# mine" in plain(str(extended)).text.decode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{{ nothing }}", "'nothing' is undefined; there are "),
        ("line\n{% if %}", "mine.sh.j2, line 2: "),
        ("if {{ line }}", "mine.sh.j2: bash does not accept what it makes: "),
        ("\xff", "cannot be read as a template"),
    ],
)
def test_a_template_that_is_wrong_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    mine = tmp_path / "mine.sh.j2"
    mine.write_bytes(content.encode("latin-1"))
    with pytest.raises((UsageError, Refused), match=re.escape(message)):
        plain(str(mine))


def test_what_cannot_be_rendered_is_refused_with_a_sentence() -> None:
    with pytest.raises(UsageError, match="there is no template other; there are test_lora_minimal, probe"):
        plain("other")
    with pytest.raises(UsageError, match="--max-steps has to be at least 1, not 0"):
        plain(max_steps=0)
    with pytest.raises(Refused, match="line 1: torchrun takes no hostfile"):
        plain(text=b"torchrun t.py --learning_rate 1", hostfile="hosts")
    with pytest.raises(Refused, match="runs one process"):
        plain(text=b"python t.py --learning_rate 1", num_gpus=2)
    with pytest.raises(Refused, match="--include, which DeepSpeed does not allow"):
        plain(text=b"deepspeed --include localhost:0 t.py --learning_rate 1", num_gpus=2)
    with pytest.raises(Refused, match="kept in a variable"):
        plain("sbatch", text=b'CMD="deepspeed t.py --learning_rate 1"\neval "$CMD"', num_nodes=2)
    with pytest.raises(UsageError, match="cannot stand in an #SBATCH line"):
        plain("sbatch", settings={"job_name": "a\nb"})


@pytest.mark.parametrize(
    ("launch", "options", "expected"),
    [
        ("deepspeed t.py", {}, 'deepspeed --master_port "${MASTER_PORT:-29500}" t.py'),
        ("deepspeed --master_port 7 t.py", {}, "deepspeed --master_port 7 t.py"),
        ("deepspeed --master_port=$PORT t.py", {}, "deepspeed --master_port=$PORT t.py"),
        ("torchrun --standalone t.py", {}, "torchrun --standalone t.py"),
        (
            "python -m torch.distributed.run t.py",
            {},
            'torch.distributed.run --master_port "${MASTER_PORT:-29500}" t.py',
        ),
        ("accelerate launch t.py", {}, 'accelerate launch --main_process_port "${MASTER_PORT:-29500}" t.py'),
        ("python t.py", {}, "python t.py"),
        ("deepspeed t.py", {"num_gpus": 2}, "--num_gpus 2 t.py"),
        ("deepspeed --num_gpus=8 t.py", {"num_gpus": 2}, "--num_gpus=2 t.py"),
        ("deepspeed --num_accelerators 8 t.py", {"num_gpus": 2}, "--num_accelerators 2 t.py"),
        ("torchrun --nproc_per_node $N t.py", {"num_gpus": 2}, "--nproc_per_node 2 t.py"),
        ("deepspeed t.py", {"hostfile": "my hosts"}, "--hostfile 'my hosts' t.py"),
        ("deepspeed -H old t.py", {"hostfile": "new"}, "-H new t.py"),
    ],
)
def test_options_of_the_launcher_are_given_or_changed(launch: str, options: dict[str, object], expected: str) -> None:
    assert expected in plain(text=f"{launch} --learning_rate 1\n".encode(), **options).text.decode()


def test_a_patched_launch_keeps_its_lora_flags() -> None:
    script = read_source(PLAIN, Path("/kit/train.sh"))
    patched = set_flags(script, script.launches[0], {"lora_enable": ("True",), "lora_r": ("16",)})
    again = read_source(patched.text, Path("/kit/train.sh"))
    text = render(again, again.launches[0]).text.decode()
    assert "--lora_enable True" in text and "--lora_r 16" in text


# -- a Slurm job of several nodes, with a Slurm of our own ------------------------------------------------------------

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@"; wait
"""


@pytest.mark.parametrize(
    "launcher", ["deepspeed --include localhost:0", "torchrun --nproc_per_node 8", "accelerate launch"]
)
def test_a_job_of_several_nodes_starts_each_with_its_rank_and_the_same_words(tmp_path: Path, launcher: str) -> None:
    words = tmp_path / "words"
    words.mkdir()
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "srun").write_text(SRUN)
    (bin_ / "scontrol").write_text('#!/bin/bash\necho "node-a"; echo node-b\n')
    for name in ("python", "accelerate"):
        (bin_ / name).write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > "{words}/$SLURM_NODEID"\n')
    for file in bin_.iterdir():
        file.chmod(0o755)
    source = f'NAME="a b"\n{launcher} train.py --learning_rate 1 --name "$NAME" --quote \'x"y\'\n'.encode()
    rendered = plain("sbatch", text=source, num_nodes=2, num_gpus=4, folder=tmp_path / "out")
    assert_accepted(rendered.text)
    environment = {
        **os.environ,
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "7",
    }
    environment.pop("MASTER_PORT", None)
    done = subprocess.run(["bash"], input=rendered.text, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = ((words / str(rank)).read_bytes().decode().split("\0") for rank in (0, 1))
    assert [word.replace("=0", "=1") if "rank" in word else word for word in first] == second
    assert first[first.index("train.py") :] == [
        "train.py",
        "--learning_rate",
        "1",
        "--name",
        "a b",
        "--quote",
        'x"y',
        "",
    ]
    shown = " ".join(first)
    assert "=node-a" in shown and "port=20007" in shown
    if launcher.startswith("deepspeed"):
        import base64
        import json

        world = next(word for word in first if word.startswith("--world_info=")).partition("=")[2]
        assert json.loads(base64.urlsafe_b64decode(world)) == {"node-a": [0, 1, 2, 3], "node-b": [0, 1, 2, 3]}


def test_a_job_has_its_settings_where_slurm_reads_them() -> None:
    lines = (
        plain("sbatch", num_nodes=2, num_gpus=8, settings={"time_limit": "2-00:00:00", "cpus_per_task": 16})
        .text.decode()
        .splitlines()
    )
    assert lines[1:8] == [
        '#SBATCH --job-name="train me"', "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=16", "#SBATCH --time=2-00:00:00", '#SBATCH --output="train me-%j.log"',
    ]  # fmt: skip


def test_hosts_that_cannot_be_reached_end_the_script_before_the_launch(tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in {"ssh": '[[ "$*" != *"-- bad true" ]]', "deepspeed": 'printf "%s " "$@"'}.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    hosts = tmp_path / "hosts"
    rendered = plain(
        "multinode",
        text=b"deepspeed t.py --learning_rate 1\n",
        hostfile=str(hosts),
        num_gpus=2,
        folder=tmp_path / "out",
    )
    environment = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"}

    def run() -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(["bash"], input=rendered.text, capture_output=True, cwd=tmp_path, env=environment)

    assert (run().returncode, b"is missing: one line for each host" in run().stderr) == (3, True)
    hosts.write_text("# ours\n\nlocalhost slots=2\nbad slots=2\n")
    assert (run().returncode, b"bad of " in run().stderr) == (3, True)
    hosts.write_text("localhost slots=2\ngood slots=2\n")
    assert run().stdout.startswith(f"--master_port 29500 --hostfile {hosts} --num_gpus 2 t.py".encode()), run()
