"""Of a script, exactly what its launch depends on is kept: no more, no less, in order, as it stands."""
# ruff: noqa: E501 (scripts as they stand)

from __future__ import annotations

from pathlib import Path

import pytest

from lorapatch.launch import read_source
from lorapatch.run.slice import Slice, slice_launch

TRAIN = "python train.py --learning_rate 1"


def sliced(text: str) -> Slice:
    script = read_source(text.encode(), Path("/kit/train.sh"))
    return slice_launch(script, next(launch for launch in script.launches if "train.py" in launch.trainer.name))


def kept(text: str) -> list[str]:
    return [statement.decode() for statement in sliced(text).setup]


def test_assignments_are_kept_transitively_in_order_and_no_others() -> None:
    assert kept(f"A=1\nB=2\nC=$A/x\nA=9\nD=$(echo ${{C%/}})\n{TRAIN} --out $D\nE=3\n") == [
        "A=1",
        "C=$A/x",
        "D=$(echo ${C%/})",
    ]


def test_a_value_that_is_set_anew_hides_the_one_before_unless_it_is_added_to() -> None:
    assert kept(f"A=1\nA=2\n{TRAIN} --out $A") == ["A=2"]
    assert kept(f"A=1\nA+=2\n{TRAIN} --out $A") == ["A=1", "A+=2"]
    assert kept(f"A=1\nA=$A-2\n{TRAIN} --out $A") == ["A=1", "A=$A-2"]
    assert kept(f"L=(1 2)\nL[0]=5\n{TRAIN} --out ${{L[@]}}") == ["L=(1 2)", "L[0]=5"]
    assert kept(f"A=1\n: ${{A:=2}}\n{TRAIN} --out $A") == ["A=1", ": ${A:=2}"]


def test_the_environment_of_the_launch_is_kept_and_other_commands_are_not() -> None:
    setup = """export CUDA_VISIBLE_DEVICES=0,1
set -x
ulimit -n 4096
cd "$(dirname "$0")"
source ~/.bashrc
eval "$(conda shell.bash hook)"
conda activate mgm
module load cuda/12.1
umask 002
PATH=/opt/bin:$PATH
unset OLD"""
    dropped = "echo start\nmkdir -p out\nrm -rf old\nconda install -y x\npip install y\neval $(ls)\nnvidia-smi\npython prepare.py\n"
    assert kept(f"{dropped}{setup}\n{dropped}{TRAIN}") == setup.splitlines()


def test_words_that_only_look_like_uses_keep_nothing() -> None:
    assert kept(f"train=1\nlearning_rate=2\nX=3\n{TRAIN} --pattern 'awk $Y' --X train") == []


@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        (
            "if [ -n \"$BIG\" ]; then\n  LR=2\n  echo big\n  rm -rf cache\nelse\n  LR=3\n  wget data\nfi",
            "if [ -n \"$BIG\" ]; then\n  LR=2\n  echo big\n  :\nelse\n  LR=3\n  :\nfi",
        ),
        (
            "case $(hostname) in\n  a*) LR=2; mkdir x ;;\n  *) echo unknown >&2; exit 1 ;;\nesac",
            "case $(hostname) in\n  a*) LR=2; : ;;\n  *) echo unknown >&2; exit 1 ;;\nesac",
        ),
        (
            "for x in 1 2; do LR=$((LR + x)); python other.py; done",
            "for x in 1 2; do LR=$((LR + x)); :; done",
        ),
        ("[ -f fast ] && LR=2 || LR=3", "[ -f fast ] && LR=2 || LR=3"),
        ("{ LR=2; touch x; }", "{ LR=2; :; }"),
        ("if true; then if false; then LR=2; else rm x; fi; fi", "if true; then if false; then LR=2; else :; fi; fi"),
    ],
)  # fmt: skip
def test_of_a_branch_or_loop_what_sets_the_value_and_what_steers_is_kept(branch: str, expected: str) -> None:
    assert kept(f"{branch}\n{TRAIN} --lr $LR") == [expected]
    assert kept(f"{branch.replace('LR', 'OTHER')}\n{TRAIN} --lr $LR") == []


def test_what_a_kept_condition_looks_at_is_kept_too() -> None:
    assert kept(f"SIZE=7\nWORD=x\nif [ $SIZE -gt 3 ]; then LR=2; fi\n{TRAIN} --lr $LR") == [
        "SIZE=7",
        "if [ $SIZE -gt 3 ]; then LR=2; fi",
    ]


def test_functions_are_kept_where_they_are_called_for_a_value() -> None:
    function = "pick() {\n  local x=$1\n  echo $((x * 2))\n}"
    assert kept(f"{function}\nother() {{ rm x; }}\nLR=$(pick 3)\n{TRAIN} --lr $LR") == [function, "LR=$(pick 3)"]


def test_a_launch_in_a_function_gets_the_first_calls_arguments() -> None:
    text = f"BASE=1\ntune() {{\n  local lr=$1 name=${{2:-x}}\n  echo go\n  {TRAIN} --lr $lr --base $BASE\n}}\nBASE=2\ntune 5 'a b'\ntune 6\n"
    assert kept(text) == ["BASE=2", "set -- 5 'a b'", "declare lr=$1 name=${2:-x}"]
    assert kept(f'f() {{ {TRAIN} --lr $1; }}\ng() {{ f "$2"; }}\ng 1 2\n') == ["set -- 1 2", 'set -- "$2"']
    assert kept(f"f() {{ {TRAIN} --lr $1; }}\n") == []  # never called: nothing is known of its arguments


def test_of_a_loop_around_the_launch_its_first_turn_is_taken() -> None:
    assert kept(f"for lr in 1 2\ndo\n  OUT=out/$lr\n  {TRAIN} --lr $lr --out $OUT\ndone") == [
        "for lr in 1 2; do break; done",
        "OUT=out/$lr",
    ]
    assert kept(f"while read -r n; do {TRAIN} --n $n; done < sets.txt") == [
        "while read -r n; do break; done < sets.txt"
    ]
    assert kept(f"for ((i=3;i<9;i++)); do {TRAIN} --n $i; done") == ["for ((i=3;i<9;i++)); do break; done"]
    assert kept(f"for x in a b; do\n  [ $x = a ] && continue\n  {TRAIN} --n $x\ndone") == [
        "for x in a b; do [ $x = a ] && continue\nbreak; done"
    ]
    assert kept(f"while true; do {TRAIN}; done") == []


def test_of_an_if_around_the_launch_its_own_branch_is_taken() -> None:
    text = f"if [ $1 = a ]; then\n  X=1\n  python other.py\nelse\n  X=2\n  {TRAIN} --x $X\nfi"
    assert kept(text) == ["X=2"]
    assert kept(f"X=5 && {TRAIN} --x $X") == ["X=5"]
    assert kept(f"( cd sub; X=5; {TRAIN} --x $X ) | tee log") == ["cd sub", "X=5"]


def test_files_that_are_written_for_the_launch_are_written() -> None:
    config = 'cat <<EOF > ds.json\n{"a": $STAGE}\nEOF'
    text = f"STAGE=2\n{config}\ncat <<EOF > other.json\n{{}}\nEOF\necho hi > log\n{TRAIN} --deepspeed ds.json"
    assert kept(text) == ["STAGE=2", config]


def test_the_command_has_no_output_redirects_and_keeps_its_input() -> None:
    found = sliced(f"A=1 {TRAIN} > log 2>&1 --out x < data.txt | tee y &")
    assert (found.command, found.stdin) == (f"A=1 {TRAIN} --out x".encode(), b"< data.txt")
    found = sliced(f"{TRAIN} <<'E' 2>&1 | tee log\nyes\nE\necho after")
    assert (found.command, found.stdin) == (TRAIN.encode(), b"<<'E'\nyes\nE")
    assert sliced(f"{TRAIN} 2>&3 3>&- &> z").command == TRAIN.encode()


def test_variables_that_nothing_surely_sets_are_named() -> None:
    found = sliced(f'A=1\nif x; then B=2; fi\n{TRAIN} $A $B $C ${{D:-x}} ${{E[@]}} "${{F}}" $2 $10')
    assert found.unset == ("B", "C", "F") and found.positional == 2
    assert sliced(f'{TRAIN} $1 "$@"').positional == 0
