"""The marked block behind a fine-tuning launch that merges its adapter, so that the later stages find a whole model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch, Script
from lorapatch.shell.edit import Edit
from lorapatch.shell.outline import Span, parse

if TYPE_CHECKING:
    from tree_sitter import Node

__all__ = ["find_merge_block", "merge_block", "merge_edits"]

BEGIN = "# >>> lorapatch merge >>> the stages below need a whole model; the adapter is kept beside it, as NAME-lora"
END = "# <<< lorapatch merge <<<"
_LINES = (
    BEGIN,
    "lorapatch_output={word}",
    'if ! lorapatch merge "$lorapatch_output" -o "$lorapatch_output"; then',
    '    echo "lorapatch: $lorapatch_output was not merged; stopped, because the stages below need a whole model" >&2',
    "    exit 1",
    "fi",
    END,
)
_BLOCK = re.compile(
    rb"^[ \t]*# >>> lorapatch merge >>>[^\n]*\n(?:[^\n]*\n)*?[ \t]*# <<< lorapatch merge <<<[^\n]*\n?", re.MULTILINE
)
# A word whose expansion would run something again, or count on.
_RUNS = re.compile(r"`|\$\((?!\()|<\(|>\(|\+\+|--\)|\$\{?(RANDOM|SECONDS)\b")
_WHOLE = {"pipeline", "redirected_statement", "negated_command", "list"}
_CONDITIONS = {"if_statement", "elif_clause", "while_statement", "until_statement"}
# What may come before the merge: it only talks.
_TALK = rb"(?:echo|printf|date|true|:)(?![\w-])[^;&|\n]*"
_REST = re.compile(rb"(?:[ \t]|\\(?:\n|\Z))*(?:;[ \t]*" + _TALK + rb")?;?[ \t]*(?P<comment>#[^\n]*)?(?:\n|\Z)")


def merge_block(word: str, indent: str = "") -> str:
    """The block that merges in the folder ``word`` (a shell word as it is written, quotes and ``$`` included).

    An assignment splits no words, so ``word`` means there what it means behind ``--output_dir``.
    """
    return "".join(f"{indent}{line.format(word=word) if '{word}' in line else line}\n" for line in _LINES)


def find_merge_block(source: bytes) -> Span | None:
    """The bytes of the block in ``source``, whole lines; None if there is none."""
    match = _BLOCK.search(source)
    return None if match is None else match.span()


def merge_edits(script: Script, launch: Launch) -> list[Edit]:
    """The edits that put the block behind ``launch``, or bring one that stands there up to date; none if it is right.

    Raises Refused where the block cannot follow the launch: no output folder, one named by a command, a launch in the
    background, in a condition, in a subshell, run by exec, with other commands behind it on its line.
    """
    source = script.source
    word = _output_word(launch)
    start, at, dangling = _statement(source, launch)
    indent = re.search(rb"[ \t]*\Z", source[source.rfind(b"\n", 0, start) + 1 : start])
    text = merge_block(word, "" if indent is None else indent[0].decode()).encode("utf-8", "surrogateescape")
    there = find_merge_block(source)
    if there is not None and there[0] == at:
        return [] if source[slice(*there)] == text else [Edit(*there, text)]
    text = b"\n" * (dangling + (not source[:at].endswith(b"\n"))) + text
    return [*([] if there is None else [Edit(*there, b"")]), Edit(at, at, text)]


def _output_word(launch: Launch) -> str:
    flag = launch.flag("output_dir")
    if flag is None or len(flag.values) != 1:
        raise Refused(f"line {launch.line}: --with-merge needs the launch's --output_dir, and it has none")
    text = flag.values[0].text
    if flag.values[0].where == "string":
        text = text.replace('\\"', '"')
    if _RUNS.search(text):
        raise Refused(
            f"line {flag.line}: {flag.name} {text} would be another folder the second time; put it in a variable "
            "first, so that --with-merge can name it"
        )
    if "\n" in text:
        raise Refused(f"line {flag.line}: {flag.name} goes over several lines; write it on one")
    return text


def _statement(source: bytes, launch: Launch) -> tuple[int, int, bool]:
    """Where the statement around the launch begins, with what it is piped into, and where the line behind it does.

    The third is whether it ends in a backslash, which would continue into that line. Raises Refused where no block can
    follow.
    """
    if any(word.text == "exec" for word in launch.prefix):
        raise _cannot(launch, "is run by exec, so nothing behind it runs; write it without exec")
    root = parse(source)
    first = min(start for start, _ in (*launch.use.words, *launch.use.assignments))
    node = root.descendant_for_byte_range(first, first + 1)
    while node is not None and node.type != "command":
        node = node.parent
    if node is None:
        raise _cannot(launch, "cannot be told from what stands around it; write it as a command of its own")
    while (above := node.parent) is not None and above.type in _WHOLE:
        if above.type == "list" and not _only_talks(source, above, node):
            raise _cannot(launch, "is followed by &&; write what follows on a line of its own")
        node = above
    _check_surroundings(launch, node)
    end = max([node.end_byte, launch.use.end, *(last for _, last in launch.use.heredocs)])
    if source[end - 1 : end] == b"\n":
        return node.start_byte, end, False
    if re.match(rb"[ \t]*&(?!&)", source[end:]):
        raise _cannot(launch, "runs in the background; write `wait` behind it and merge there yourself")
    rest = _REST.match(source, end)
    if rest is None:
        raise _cannot(launch, "has more commands behind it on its line; write them on lines of their own")
    dangling = rest["comment"] is None and re.search(rb"\\\n?\Z", rest[0]) is not None
    return node.start_byte, rest.end(), dangling


def _only_talks(source: bytes, above: Node, node: Node) -> bool:
    """Whether what a list runs after ``node`` has succeeded is nothing that needs the merged model."""
    later = [child for child in above.children if child.start_byte >= node.end_byte]
    if not later or later[0].type != "&&":
        return True
    return re.fullmatch(_TALK, source[later[0].end_byte : above.end_byte].strip()) is not None


def _check_surroundings(launch: Launch, node: Node) -> None:
    below, above = node, node.parent
    while above is not None:
        if above.type in _CONDITIONS and below in above.children_by_field_name("condition"):
            raise _cannot(launch, "is a condition; write it as a command of its own")
        inside = above.type in ("subshell", "command_substitution", "process_substitution")
        if inside or (above.type == "pipeline" and below.type != "command"):
            raise _cannot(launch, "stands in a subshell or a piped group, where exit would not stop the script")
        below, above = above, above.parent


def _cannot(launch: Launch, reason: str) -> Refused:
    return Refused(f"line {launch.line}: --with-merge cannot put the merge behind the launch, which {reason}")
