"""bash is asked for its view, and never executes anything of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorapatch.errors import Refused
from lorapatch.shell import syntax
from lorapatch.shell.outline import outline
from lorapatch.shell.syntax import BashWords, syntax_error


def words(text: str) -> list[bytes]:
    read = outline(text.encode())
    with BashWords((read.source, read.commands[0])) as bash:
        return bash.words()[0]


def test_words_are_split_as_bash_splits_them() -> None:
    assert words("run 'a b' \"c\"d e\\ f \\\n   --x") == [b"run", b"a b", b"cd", b"e f", b"--x"]


def test_redirects_are_dropped() -> None:
    assert words("run a > f b 2>&1") == [b"run", b"a", b"b"]


def test_several_commands_are_asked_for_at_once() -> None:
    read = outline(b"a 'x'\nb y z\n")
    with BashWords(*[(read.source, c) for c in read.commands]) as bash:
        assert bash.words() == [[b"a", b"x"], [b"b", b"y", b"z"]]


@pytest.mark.parametrize(
    "text",
    [
        "run $(touch {f})",
        "run `touch {f}`",
        'run "$(touch {f})"',
        "run <(touch {f})",
        "run ${{X:=$(touch {f})}}",
        "run $((X=1)) $[`touch {f}`]",
        "run '$(touch {f})' \\$(touch {f})",
        "run a > {f}",
        'run "a`touch {f}`b"',
        "run $'x\\'; touch {f}; \\''",
    ],
)
def test_nothing_is_executed(text: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    source = text.format(f=mark)
    try:
        words(source)
    except (Refused, IndexError):
        pass
    syntax_error(source.encode())
    assert not mark.exists()


def test_a_syntax_error_is_told_with_its_line() -> None:
    assert syntax_error(b"echo ok\n") is None
    assert "line 2" in (syntax_error(b"if true\nfi\n") or "")


def test_without_bash_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Refused, match="bash is not on the PATH"):
        syntax_error(b"echo\n")


@pytest.mark.parametrize(
    ("bash", "said"),
    [("not a program\n", "cannot be run"), ("#!/bin/sh\necho hello\nexec /bin/bash \"$@\"\n", "does not split")],
)
def test_a_bash_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bash: str, said: str) -> None:
    (tmp_path / "bash").write_text(bash)
    (tmp_path / "bash").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(Refused, match=said):
        words("run a b")


@pytest.mark.parametrize("ask", [words, syntax_error])
def test_a_bash_that_does_not_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any) -> None:
    (tmp_path / "bash").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "bash").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(syntax, "_TIMEOUT", 0.3)
    with pytest.raises(Refused, match=r"bash did not answer within 0\.3 s"):
        ask("run a b" if ask is words else b"run a b\n")


def test_bash_is_asked_from_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert words("run a b") == [b"run", b"a", b"b"]
    monkeypatch.chdir(tmp_path)
