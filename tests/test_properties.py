"""Properties that hold for every script: generated ones in many styles, and any bytes at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorapatch
from lorapatch.errors import LorapatchError
from lorapatch.launch import read_source
from lorapatch.launch.describe import oddities
from lorapatch.lora import PatchOptions, plan_patch

# Continuous integration takes its time, a developer's run does not.
MANY = 10_000 if os.environ.get("CI") else 1_000
SEVERAL = MANY // 5
SOME = 300 if os.environ.get("CI") else 60
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much]}

names = st.from_regex(r"[a-z][a-z_]{0,9}", fullmatch=True).filter(
    lambda name: "lora" not in name and "tune" not in name
)
plain = st.from_regex(r"[\w./:,@%+-]{1,12}", fullmatch=True).map(lambda text: "v" + text)
text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
quoted = st.one_of(
    text.filter(lambda t: "'" not in t).map(lambda t: f"'{t}'"),
    text.filter(lambda t: not set(t) & set('"$`\\!')).map(lambda t: f'"{t}"'),
)
expansion = st.sampled_from(
    [
        "$OUT",
        "${OUT}/x",
        '"$OUT"',
        "${N:-4}",
        "$((1 + 2))",
        "$(date +%s)",
        '"$(cd "$(dirname "$0")" && pwd)"',
        "a\\ b",
        "{}",
        "x*y",
    ]
)
values = st.one_of(plain, plain, quoted, expansion)
flags = st.one_of(
    st.tuples(names, values).map(lambda pair: f"--{pair[0]} {pair[1]}"),
    st.tuples(names, values).map(lambda pair: f"--{pair[0]}={pair[1]}"),
    names.map(lambda name: f"--{name}"),
    st.sampled_from(["--lora_r 4", "--lora_r=8", '--lora_alpha "7"', "--lora_enable False", "--lora_dropout 0.5"]),
)
launchers = st.sampled_from(
    [
        "deepspeed",
        "deepspeed --include localhost:0,1 --master_port 29501",
        "torchrun --nproc_per_node=2",
        "accelerate launch --num_processes 2",
        "python -m torch.distributed.run --nproc_per_node 2",
        "A=1 nohup python",
        "srun -N 2 torchrun",
    ]
)
endings = st.sampled_from(
    ["", " 2>&1 | tee log", " > log 2>&1 &", " || exit 1", ' "$@"', " # done", " \\\n", "; echo ok", " &> log"]
)
frames = st.sampled_from(["{}", "if true; then\n{}\nfi", "f() {{\n{}\n}}\nf", "for i in 1 2; do\n{}\ndone", "(\n{}\n)"])
before = st.lists(
    st.one_of(
        st.just("set -e"),
        st.just("OUT=out/run"),
        text.map(lambda t: "# " + t),
        st.just("cat <<'EOF'\ndeepspeed train.py --x 1\nEOF"),
        st.just("if [[ -d x ]]; then echo y; fi"),
        st.just("echo 训练 🚀"),
    ),
    max_size=4,
)


@st.composite
def scripts(draw: st.DrawFn) -> str:
    joint = draw(st.sampled_from([" ", " \\\n    ", " \\\n\t", "  \\\n", " \\\n  \\\n  "]))
    words = [f"{draw(launchers)} train.py", "--learning_rate 2e-5", *draw(st.lists(flags, max_size=8))]
    command = joint.join(words) + draw(endings)
    body = draw(frames).format(command)
    return "\n".join(["#!/bin/bash", *draw(before), body, *draw(before)]) + draw(st.sampled_from(["\n", ""]))


@given(scripts())
@settings(max_examples=SOME, **QUIET)  # type: ignore[arg-type]
def test_patching_twice_is_patching_once_and_other_bytes_stay(script: str) -> None:
    source = script.encode()
    plan = plan_patch(read_source(source))
    again = plan_patch(read_source(plan.text))
    assert again.text == plan.text and not again.changed
    old, new = bytearray(source), bytearray(plan.text)
    for edit in sorted(plan.edits, reverse=True):
        del old[edit.start : edit.end]
    shift = 0
    for edit in sorted(plan.edits):
        begin = edit.start + shift
        del new[begin : begin + len(edit.text)]
        shift -= edit.end - edit.start
    assert old == new


@given(scripts(), st.integers(1, 512), st.floats(0, 0.99), st.sampled_from(["none", "all", "lora_only"]))
@settings(max_examples=SOME // 3, **QUIET)  # type: ignore[arg-type]
def test_restore_undoes_any_sequence_of_patches(script: str, r: int, dropout: float, bias: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.sh")
        path.write_bytes(script.encode())
        lorapatch.patch_script(path)
        lorapatch.patch_script(path, PatchOptions(r=r, dropout=dropout, bias=bias))
        if path.read_bytes() != script.encode():
            lorapatch.restore(path)
        assert path.read_bytes() == script.encode()
        assert [p.name for p in Path(folder).iterdir()] == ["train.sh"]


def survives(source: bytes) -> None:
    """Reading and planning end with a result or with one of our errors."""
    script = read_source(source, Path("/x/s.sh"))
    script.as_dict()
    oddities(script)
    try:
        plan_patch(script)
    except LorapatchError:
        pass


@given(st.binary(max_size=300))
@settings(max_examples=MANY, **QUIET)  # type: ignore[arg-type]
def test_random_bytes_raise_nothing_but_our_errors(source: bytes) -> None:
    survives(source)


PIECES = r"""deepspeed train.py --lora_r 8 --a=b $ $( ) ` ' " \\ ; & | || { } ( (( )) [[ ]] if then fi for in do done case esac
eval $C ${A[@]} C= A=( += -c # = $(( \xe9 > 2>&1 >( < ! time function export ${X:- % * $' \xff"""
fragments = st.sampled_from([*PIECES.split(), " ", "\n", "\t", "\\\n", "\\ ", "<<EOF\n", "EOF\n", "bash -c", "é", "\xff"])


@given(st.lists(fragments, max_size=30))
@settings(max_examples=SEVERAL, **QUIET)  # type: ignore[arg-type]
def test_broken_shell_raises_nothing_but_our_errors(parts: list[str]) -> None:
    survives("".join(parts).encode("latin-1", "replace"))


@given(st.lists(fragments, max_size=30))
@settings(max_examples=SEVERAL, **QUIET)  # type: ignore[arg-type]
def test_broken_shell_in_words_raises_nothing_but_our_errors(parts: list[str]) -> None:
    survives(" ".join(["deepspeed train.py --learning_rate 1", *parts]).encode())
