"""Values are what bash would make of the text, or they are said to be unresolved: bash is asked for each."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lorapatch.shell.outline import outline
from lorapatch.shell.values import Unresolved, Values

RESOLVED = [
    "A=x; V=$A/y",
    "A='a b'; V=\"${A} c\"",
    "V=${UNSET_NAME:-fallback}",
    "A=; V=${A:-empty}",
    "A=; V=${A-unset}",
    "A=x; V=${A:+yes}",
    'V=$(cd "$(dirname "$0")" && pwd)/z',
    "V=`basename /a/b.txt`",
    "A=/x/y/z.tar.gz; V=${A##*/}",
    "A=/x/y/z.tar.gz; V=${A%.*}",
    "A=/x/y/z.tar.gz; V=${A%%.*}",
    "A=/x/y/z.tar.gz; V=${A#*/}",
    "A=8; V=$((128 / A * 2 - 1))",
    "A=7; V=$(( -A % 4 ))",
    'V=a; V+=b; V="$V c"',
    'V=\'q$x\'"r\\"\\$s"t\\ u',
    "V=$(dirname /a/b/c)",
    ': "${V:=given}"',
    "A=1; f() { A=2; }; V=x",
    "( V=inner ); V=outer",
    "if true; then A=1; fi; V=2",
    "if true; then V=1; fi; V=2",
    "V=1; V+=2; V=3; V+=4",
    'V="one \\\n two"',
    'V="l1\nl2"',
]


@pytest.mark.parametrize("text", RESOLVED)
def test_a_value_is_what_bash_says(text: str, tmp_path: Path) -> None:
    script = tmp_path / "s.sh"
    script.write_text(text + "\n")
    values = Values(outline(script.read_bytes()), script)
    bash = subprocess.run(
        ["bash", "-c", '. "$0"; printf %s "$V"', str(script)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert values.variable("V", len(text) + 1) == bash.stdout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("V=$(hostname)", "hostname"),
        ("V=$HOME/x", "HOME"),
        ("if [ $1 ]; then V=1; fi", "only in some cases"),
        ("[ -d x ] && V=1", "only in some cases"),
        ("for V in 1 2; do :; done", "set in a loop"),
        ("read V", "read"),
        ("V=1; [ x ] && V+=2", "only in some cases"),
        ("V=(a b)", "array"),
        ("V=$W; W=$V; V=$W$W; W=$V$W; V=$W", "W"),
        ("V=$((1/0))", "1/0"),
        ("V=*.txt", "pattern"),
    ],
)
def test_what_only_a_run_can_tell_is_unresolved_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(Unresolved, match=reason.replace("*", r"\*")):
        Values(outline(text.encode()), None).variable("V", len(text))


def test_the_environment_given_counts_and_the_real_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "from the real environment")
    read = outline(b"V=$MODEL\n")
    with pytest.raises(Unresolved):
        Values(read, None).variable("V", 9)
    assert Values(read, None, {"MODEL": "m"}).variable("V", 9) == "m"


def test_strings_that_double_end_at_a_limit() -> None:
    text = "V=ab\n" + 'V="$V$V"\n' * 30
    with pytest.raises(Unresolved, match="longer than"):
        Values(outline(text.encode()), None).variable("V", len(text))


def test_a_long_chain_of_variables_ends_at_a_limit() -> None:
    text = "A0=x\n" + "".join(f"A{i}=$A{i - 1}\n" for i in range(1, 3000)) + "V=$A2999\n"
    with pytest.raises(Unresolved, match="too many others"):
        Values(outline(text.encode()), None).variable("V", len(text))


@pytest.mark.parametrize("pwd", ["$(pwd)", "`pwd`", "$PWD", "${PWD}", "$(pwd -P)"])
def test_the_folder_that_a_script_stays_in_is_a_dot(pwd: str) -> None:
    def value(text: str, **environment: str) -> str:
        return Values(outline(text.encode()), None, environment).word("$HERE/train.py", len(text))

    assert value(f"HERE={pwd}\nD=$(cd /x && pwd)\n(cd y)\n") == "./train.py"
    assert value(f"HERE={pwd}\n", PWD="/work") == "/work/train.py"
    with pytest.raises(Unresolved):
        value(f"cd sub\nHERE={pwd}\n")
