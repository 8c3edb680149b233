"""A command is touched only if two parsers agree on its words, and nothing cuts it short."""

from __future__ import annotations

import sys

import pytest

from lorapatch.errors import Refused
from lorapatch.shell import bashlex_words
from lorapatch.shell.command import blank, check_not_cut, check_words
from lorapatch.shell.outline import outline


def check(text: str, number: int = 0) -> None:
    read = outline(text.encode())
    check_not_cut(read, read.commands[number])
    check_words(read, read.commands[number])


@pytest.mark.parametrize(
    "text",
    [
        "run --x 1 'a b' \"c $D\" e\\ f",
        "A=1 B='x y' run --x",
        'run $(cd "$(dirname "$0")" && pwd)/x --n $((1 + 2)) ${V:-"a b"} <(sort f)',
        "run --x 2>&1 >log | tee l",
        "run --x &> log &",
        "time run --x",
        "run --中文 “值” \xa0 --x",
        "run --a frozen\\\n  --b x\\\n\n",
        "run --x $'it\\'s' --y",
        "run `date +%s` --x <<< in",
        "run --x <<EOF\ntext --y\nEOF\n",
    ],
)
def test_the_parsers_agree(text: str) -> None:
    check(text)


@pytest.mark.parametrize("text", ["run <<EOF --more x | tee log\nhi\nEOF\n"])
def test_a_command_on_which_they_do_not_agree_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="line 1: two parsers do not agree"):
        check(text)


def test_a_span_that_is_off_by_one_byte_is_a_disagreement() -> None:
    read = outline(b"run --long_name some/long-value.json A_B2=c then done 'quoted words here' x${LONG_NAME}yz\n")
    command = read.commands[0]
    for index, (start, end) in enumerate(command.words):
        for span in ((start - 1, end), (start + 1, end), (start, end - 1), (start, end + 1)):
            words = (*command.words[:index], span, *command.words[index + 1 :])
            with pytest.raises(Refused, match="two parsers do not agree"):
                check_words(read, command._replace(words=words))
    check_words(read, command)


@pytest.mark.parametrize("text", ["run --x", "run `date`"])
def test_a_missing_bashlex_is_no_disagreement(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bashlex", None)
    bashlex_words._tokenizer.cache_clear()
    read = outline(text.encode())
    with pytest.raises(ImportError, match="bashlex"):
        check_words(read, read.commands[0]._replace(expansions=()))


def test_a_comment_behind_a_backslash_is_found() -> None:
    with pytest.raises(Refused, match=r"line 2: a comment stands behind the backslash"):
        check("run \\\n  --x 1 \\   # why\n  --y 2\n")


def test_a_blank_behind_a_backslash_is_found() -> None:
    with pytest.raises(Refused, match="line 1: a blank stands behind the backslash"):
        check("run --x 1 \\ \n  --y 2\n")


def test_a_comment_line_between_flags_is_found() -> None:
    with pytest.raises(Refused, match="line 3: the command is cut short by a comment.*line 4"):
        check("run \\\n  --x 1 \\\n  # --z 3 \\\n  --y 2\n")


def test_a_missing_backslash_is_found() -> None:
    with pytest.raises(Refused, match="line 1: the command is cut short by a missing backslash"):
        check("run --x 1\n  --y 2\n")


def test_an_escaped_blank_inside_a_word_is_no_cut() -> None:
    check("run --x a\\ b --y\nnext\n")


def test_blanking_keeps_every_offset() -> None:
    text = "a $(b) “c”".encode()
    assert blank(text, 0, len(text), [(2, 6)]) == b"a xxxx " + b"xxx" + b"c" + b"xxx"
