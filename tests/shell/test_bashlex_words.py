"""bashlex's tokenizer, shown an abridged text, says what its grammar says of the whole one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapatch.shell.bashlex_words import Parts, bashlex_parts


def by_grammar(text: str) -> Parts | str:
    import bashlex

    try:
        trees = bashlex.parse(text, expansionlimit=0)
        assert len(trees) == 1 and trees[0].kind == "command"
        found: dict[str, list[tuple[int, int]]] = {"word": [], "assignment": [], "redirect": []}
        for part in trees[0].parts:
            found[part.kind].append(tuple(part.pos))
    except Exception:
        return "no simple command"
    return Parts(*map(tuple, found.values()))


def parts(text: str) -> Parts | str:
    try:
        return bashlex_parts(text.encode("ascii"))
    except Exception:
        return "no simple command"


@pytest.mark.parametrize(
    "text",
    [
        "run --per_device_train_batch_size    16 models/vicuna-7b-v1.5/config.json",
        "LONG_VARIABLE_NAME=long/value.json ab-long-name=c run long_name_behind=x",
        "run a\\   long_name_here \\\n        --x\\ \\  y",
        "run 12345678901>file 2>&1 3>&- >>long_file_name.log <&3 &>both.log <<<word {fd}>file",
        "run > 'quoted    blanks' \"and   long_names\" x",
        "run then done function select_function while",
        "A=1 while",
        "function_of_mine select",
        "while",
        "run a; run b",
        "run a | run b",
        "run >",
        "run > 2>",
        "run >& ",
        "run <<EOF\n",
        "run 'unclosed",
        "run a\nrun b",
        "run long_name_here\\",
        "run # long_comment_here    and more",
        "run long#name_is_no_comment",
        "run {a,long_name_here} $LONG_NAME_HERE/long_name_behind $1",
        "( run )",
        "! run",
        "",
    ],
)
def test_both_ways_agree_on_text_that_is_hard_to_split(text: str) -> None:
    assert parts(text) == by_grammar(text)


PIECES = st.sampled_from(
    "long_name_here ab /long.path/of-it 123456 1 A_LONG_NAME = + \\ \\\n ' \" > >> < <& >& &> & | ; # $ { } ( ) [ ] ! - -- ~ *"
    " then done function select while until coproc time in x".split(" ")
    + [" ", "   ", "\t", "\n"]
)


@settings(deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_both_ways_agree_on_any_text(text: str) -> None:
    assert parts("run " + text) == by_grammar("run " + text)
    assert parts(text) == by_grammar(text)


def test_a_plain_command_needs_no_grammar_and_the_grammar_can_be_loaded_behind_it() -> None:
    code = """if True:
        import sys
        from lorapatch.shell.bashlex_words import bashlex_parts
        assert bashlex_parts(b"run a").words == ((0, 3), (4, 5))
        assert "bashlex" not in sys.modules and "bashlex.parser" not in sys.modules
        assert bashlex_parts(b"run `a`").words == ((0, 3), (4, 7))
        import bashlex
        assert bashlex.parse("a $(b) | c")[0].kind == "pipeline" and list(bashlex.split("a 'b c'")) == ["a", "b c"]
        assert bashlex.parser.tokenizer is bashlex.tokenizer is sys.modules["bashlex.tokenizer"]
        assert bashlex_parts(b"run a").words == ((0, 3), (4, 5))
    """
    subprocess.run([sys.executable, "-c", code], check=True)
