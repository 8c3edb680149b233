"""Where the commands and assignments of a shell script are, in bytes, whatever syntax stands around them.

tree-sitter-bash does the parsing: it knows all of bash, gives byte offsets and recovers from errors locally.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

__all__ = ["Assignment", "Command", "Context", "Outline", "Span", "outline", "parse"]

Span = tuple[int, int]
Context = tuple[tuple[str, int], ...]  # (if, for, function …; its offset), outermost first

# Bash syntax around a command, as users call it.
CONTEXTS = {
    "if_statement": "if",
    "elif_clause": "elif",
    "else_clause": "else",
    "for_statement": "for",
    "c_style_for_statement": "for",
    "while_statement": "while",
    "case_statement": "case",
    "case_item": "case item",
    "function_definition": "function",
    "subshell": "subshell",
    "compound_statement": "group",
    "command_substitution": "substitution",
    "process_substitution": "substitution",
}
REDIRECTS = {"file_redirect", "herestring_redirect", "heredoc_redirect"}
# What bash replaces before it runs the command; read by nobody but bash, so blanked out for the word parser.
EXPANSIONS = {
    "command_substitution",
    "process_substitution",
    "arithmetic_expansion",
    "expansion",
    "ansi_c_string",
    "translated_string",
}
# Kinds of words with nothing in them to expand; most words are of these.
_FLAT = {"word", "raw_string"}


class Command(NamedTuple):
    """A simple command. All spans are (start, end) in bytes of the script."""

    start: int
    end: int  # behind its last word or redirect
    words: tuple[Span, ...]
    assignments: tuple[Span, ...]  # the environment prefix, A=b before the program
    redirects: tuple[Span, ...]
    expansions: tuple[Span, ...]  # outermost $(…) `…` <(…) $((…)) ${…} $'…'
    heredocs: tuple[Span, ...]  # from << to the end of the here-document
    context: Context


class Assignment(NamedTuple):
    """``NAME=value``, ``NAME+=value`` or ``NAME=(…)`` as a statement of its own (or after export, local …)."""

    name: str
    start: int
    end: int
    value: Span  # an empty span for ``NAME=``
    append: bool
    elements: tuple[Span, ...] | None  # of an array
    context: Context
    statement: Span  # the whole statement, with export or local


class Outline(NamedTuple):
    """The commands and assignments of a script in the order in which they stand."""

    source: bytes
    commands: tuple[Command, ...]
    assignments: tuple[Assignment, ...]
    loop_variables: tuple[tuple[str, int], ...]  # name, offset
    errors: tuple[Span, ...]  # what tree-sitter could not read
    newlines: tuple[int, ...]  # where the line ends are

    def line(self, offset: int) -> int:
        """The line number, from 1, of the byte at ``offset``."""
        return bisect_left(self.newlines, offset) + 1


@cache
def _parser() -> Parser:
    import tree_sitter
    import tree_sitter_bash

    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


# A final backslash that continues into an empty line or the end of the file is harmless to bash, not to the grammar.
_DANGLING = re.compile(rb"\\(?=\n[ \t]*(?:\n|\Z)|\Z)")
# `# text` between back quotes is an old way to put a comment between continued flags.
_JOINS = re.compile(rb"(?:\\\n)+")
_NEWLINE = re.compile(rb"\n")
_QUOTED_COMMENT = re.compile(rb"(?<!\\)`[ \t]*#[^`\n]*`")


def readable_copy(source: bytes) -> bytes:
    """``source`` with what only confuses the grammar replaced at equal length."""
    if _QUOTED_COMMENT.search(source):
        source = _QUOTED_COMMENT.sub(lambda match: b"x" * len(match[0]), source)
    return _DANGLING.sub(b" ", source)


def parse(source: bytes) -> Node:
    """The root of tree-sitter's tree; its offsets are the bytes of ``source``."""
    return _parser().parse(readable_copy(source)).root_node


def outline(source: bytes) -> Outline:
    """Read ``source``; never fails, unreadable parts are in ``errors``. Time is linear in the length."""
    commands: list[Command] = []
    assignments: list[Assignment] = []
    loops: list[tuple[str, int]] = []
    errors: list[Span] = []
    stack = [_Visit(parse(source))]
    while stack:
        visit = stack.pop()
        node, kind = visit.node, visit.node.type
        if kind == "ERROR" or node.is_missing:
            errors.append(_span(node))
        if kind == "command":
            before, parts = _split_prefix(visit, source)
            assignments += [_read_assignment(_Visit(part, visit.context), source) for part in before]
            command, inner = _read_command(visit, parts, source)
            commands.append(command)
            stack.extend(_Visit(child, visit.context) for child in reversed(inner))
            continue
        if kind == "variable_assignment":
            assignments.append(_read_assignment(visit, source))
        elif kind == "for_statement" and (variable := node.child_by_field_name("variable")) is not None:
            loops.append((_text(source, variable), variable.start_byte))
        if node.named_child_count and kind != "heredoc_body":
            stack.extend(_visits_below(visit))
    newlines = tuple(match.start() for match in _NEWLINE.finditer(source))
    return Outline(source, tuple(commands), tuple(assignments), tuple(loops), tuple(errors), newlines)


class _Visit(NamedTuple):
    """A node to read, with what is known from the nodes above it."""

    node: Node
    context: Context = ()
    statement: Span | None = None  # the declaration an assignment belongs to
    redirects: tuple[Node, ...] = ()  # of the command that the node is


def _visits_below(visit: _Visit) -> list[_Visit]:
    """The children to visit, last first."""
    node, context, statement, _ = visit
    redirects: tuple[Node, ...] = ()
    kind = node.type
    children = node.named_children
    if kind in CONTEXTS:
        context = (*context, (CONTEXTS[kind], node.start_byte))
    elif kind in ("declaration_command", "variable_assignments"):
        statement = _span(node)
    elif kind == "redirected_statement":
        if children[0].type == "command":  # else they belong to a group, a loop or the last command of a list
            redirects = tuple(child for child in children if child.type in REDIRECTS)
            children = children[:1]
    below = [_Visit(child, context, statement, redirects) for child in children]
    if kind == "list":  # what stands behind the first && or || may not run
        below[1:] = [visit._replace(context=(*context, ("list", node.start_byte))) for visit in below[1:]]
    below.reverse()
    return below


def _span(node: Node) -> Span:
    return node.start_byte, node.end_byte


def _text(source: bytes, node: Node) -> str:
    return source[node.start_byte : node.end_byte].decode("utf-8", "surrogateescape")


def _split_prefix(visit: _Visit, source: bytes) -> tuple[list[Node], list[Node]]:
    """The grammar takes ``A=1 B=2`` on a line of its own for the prefix of the next line's command: undo that."""
    parts = [*visit.node.children, *visit.redirects]
    count = next((i for i, part in enumerate(parts) if part.type != "variable_assignment"), len(parts))
    if not 0 < count < len(parts):
        return [], parts
    gap = source[parts[count - 1].end_byte : parts[count].start_byte]
    return (parts[:count], parts[count:]) if b"\n" in gap.replace(b"\\\n", b"") else ([], parts)


def _read_command(visit: _Visit, parts: list[Node], source: bytes) -> tuple[Command, list[Node]]:
    """The command, and the nodes in its words that may hold further commands."""
    words: list[Span] = []
    prefix: list[Span] = []
    redirects: list[Span] = []
    heredocs: list[Span] = []
    expansions: list[Span] = []
    inner: list[Node] = []
    for part in parts:
        kind = part.type
        if kind == "variable_assignment":
            prefix.append(_span(part))
        elif kind in REDIRECTS:
            target, more = _split_redirect(part)
            words.extend(more)
            (heredocs if kind == "heredoc_redirect" else redirects).append((part.start_byte, target))
        else:
            _add_word(words, (part.start_byte, part.end_byte))
        if kind not in _FLAT:
            _find_expansions(part, expansions, inner)
    words = _join_continued(sorted(words), source)
    command = Command(
        start=parts[0].start_byte,
        end=max((end for _, end in (*words, *redirects, *prefix)), default=visit.node.end_byte),
        words=tuple(words),
        assignments=tuple(prefix),
        redirects=tuple(sorted(redirects)),
        expansions=tuple(sorted(expansions)),
        heredocs=tuple(heredocs),
        context=visit.context,
    )
    return command, inner


def _join_continued(words: list[Span], source: bytes) -> list[Span]:
    """A backslash and a line end between two words, and no blank, join them: ``ab\\`` newline ``cd`` is one word."""
    joined: list[Span] = []
    for word in words:
        if joined and word[0] - joined[-1][1] >= 2 and _JOINS.fullmatch(source, joined[-1][1], word[0]):
            joined[-1] = (joined[-1][0], word[1])
        else:
            joined.append(word)
    return joined


def _split_redirect(redirect: Node) -> tuple[int, list[Span]]:
    """Where a redirect ends, and the words behind it, which the grammar counts to it (``cmd > file word``)."""
    if redirect.type == "heredoc_redirect":
        own = {"heredoc_start", "heredoc_body", "heredoc_end"}
        return redirect.end_byte, [_span(child) for child in redirect.named_children if child.type not in own]
    targets: list[Span] = []
    for child in redirect.children:
        if child.is_named and child.type != "file_descriptor":
            _add_word(targets, _span(child))
    if not targets:  # `>&-`
        return redirect.end_byte, []
    return targets[0][1], targets[1:]


def _find_expansions(part: Node, expansions: list[Span], inner: list[Node]) -> None:
    """Collect the outermost expansions below ``part``; an array's or a here-document's text is not a word."""
    stack = [part]
    while stack:
        node = stack.pop()
        if node.type in EXPANSIONS:
            expansions.append(_span(node))
            inner.append(node)
        elif node.named_child_count and node.type != "heredoc_body":
            stack.extend(reversed(node.named_children))


def _read_assignment(visit: _Visit, source: bytes) -> Assignment:
    node = visit.node
    name = node.child_by_field_name("name")
    value = node.child_by_field_name("value")
    elements: list[Span] | None = None
    if value is not None and value.type == "array":
        elements = []
        for child in value.named_children:
            if child.type != "comment":
                _add_word(elements, _span(child))
    statement = visit.statement or _span(node)
    return Assignment(
        name=_text(source, name) if name is not None else "",
        start=node.start_byte,
        end=node.end_byte,
        value=_span(value) if value is not None else (node.end_byte, node.end_byte),
        append=any(child.type == "+=" for child in node.children),
        elements=None if elements is None else tuple(elements),
        context=visit.context,
        statement=statement,
    )


def _add_word(words: list[Span], span: Span) -> None:
    """What touches belongs to one word: the grammar splits ``$A/$B.json`` in two."""
    if words and words[-1][1] == span[0]:
        words[-1] = (words[-1][0], span[1])
    elif span[0] < span[1]:
        words.append(span)
