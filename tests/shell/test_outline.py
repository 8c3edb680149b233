"""The outline finds every command and assignment, wherever bash syntax puts it."""

from __future__ import annotations

import time

from lorapatch.shell.outline import outline


def commands(text: str) -> list[list[str]]:
    read = outline(text.encode())
    return [[read.source[a:b].decode() for a, b in command.words] for command in read.commands]


def contexts(text: str) -> list[list[str]]:
    return [[kind for kind, _ in command.context] for command in outline(text.encode()).commands]


def test_words_that_touch_are_one_word() -> None:
    assert commands("run $A/$B.json 'x'\"y\"z") == [["run", "$A/$B.json", "'x'\"y\"z"]]


def test_words_behind_a_redirect_belong_to_the_command() -> None:
    read = outline(b"run --x > out.log --y\n")
    assert [read.source[a:b] for a, b in read.commands[0].words] == [b"run", b"--x", b"--y"]
    assert [read.source[a:b] for a, b in read.commands[0].redirects] == [b"> out.log"]


def test_commands_are_found_in_every_construct() -> None:
    assert contexts("if a; then b; else c; fi") == [["if"], ["if"], ["if", "else"]]
    assert contexts("f() { a; }") == [["function", "group"]]
    assert contexts("(a; b &)") == [["subshell"], ["subshell"]]
    assert contexts("for i in 1 2; do a; done") == [["for"]]
    assert contexts("while a; do b; done") == [["while"], ["while"]]
    assert contexts("case $1 in x) a ;; esac") == [["case", "case item"]]
    assert contexts("a && b") == [[], ["list"]]
    assert contexts("x=$(a)") == [["substitution"]]


def test_assignments_on_their_own_line_are_not_the_prefix_of_the_next_command() -> None:
    read = outline(b"A=1 B=2\nrun --x\n")
    assert [a.name for a in read.assignments] == ["A", "B"]
    assert read.commands[0].assignments == ()
    assert read.source[read.commands[0].start :].startswith(b"run")


def test_a_prefix_stays_a_prefix() -> None:
    read = outline(b"A=1 \\\n  B=2 run --x\n")
    assert read.assignments == ()
    assert len(read.commands[0].assignments) == 2


def test_arrays_and_appends_are_read() -> None:
    read = outline(b"A=(x 'y z' # why\n  w)\nA+=(v)\nexport S=\"$Q\"\n")
    first, second, third = read.assignments
    assert [read.source[a:b] for a, b in first.elements or ()] == [b"x", b"'y z'", b"w"]
    assert second.append and not first.append
    assert read.source[slice(*third.statement)] == b'export S="$Q"'


def test_here_documents_are_text() -> None:
    assert commands("cat <<EOF\ndeepspeed train.py\nEOF\nrun") == [["cat"], ["run"]]


def test_a_dangling_backslash_does_not_swallow_what_follows() -> None:
    assert commands("run --x \\\n\nnext\n") == [["run", "--x"], ["next"]]
    assert commands("run --x \\") == [["run", "--x"]]


def test_a_word_may_go_on_over_a_line_end() -> None:
    assert commands("run ab\\\ncd\\\n   ef") == [["run", "ab\\\ncd", "ef"]]


def test_bytes_that_are_not_utf8_keep_their_offsets() -> None:
    read = outline(b"# caf\xe9\nrun \xff --x\n")
    assert [read.source[a:b] for a, b in read.commands[0].words] == [b"run", b"\xff", b"--x"]


def test_line_numbers_count_from_one() -> None:
    read = outline(b"a\nb\n")
    assert [read.line(c.start) for c in read.commands] == [1, 2]


def test_reading_takes_time_in_proportion_to_the_length() -> None:
    def seconds(count: int) -> float:
        text = b"run --a 1 \\\n  --b $X\nif a; then b; fi\n" * count
        begin = time.process_time()
        assert len(outline(text).commands) == 3 * count
        return time.process_time() - begin

    seconds(200)
    small, large = seconds(1000), seconds(8000)
    assert large < 8 * small * 3 + 0.05  # quadratic would be 64 times
