"""What of a script one launch depends on: the statements before it that set its variables and its environment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorapatch.launch.model import Launch, Script
from lorapatch.run.effects import (
    ALWAYS,
    ARGUMENTS,
    STATEMENTS,
    assigned,
    assignments,
    effects,
    field_text,
    program,
    text,
    uses,
    written_file,
)
from lorapatch.run.prune import is_guard, pruned
from lorapatch.run.tree import command_node, start_of
from lorapatch.shell.outline import parse

if TYPE_CHECKING:
    from tree_sitter import Node

__all__ = ["Slice", "slice_launch"]

_BODIES = {
    "program", "do_group", "compound_statement", "subshell", "else_clause", "elif_clause", "case_item", "if_statement",
    "command_substitution", "process_substitution",
}  # fmt: skip
_LOOPS = {"for_statement", "c_style_for_statement", "while_statement"}
_PLAIN = ("variable_assignment", "variable_assignments", "declaration_command")
_BREAK = b"break; done"
_NAME = re.compile(rb"\$\{?[#!]?([A-Za-z_]\w*)")
_OPERATOR = re.compile(rb"\d*<<-?[ \t]*(?:\\?\w+|'[^'\n]*'|\"[^\"\n]*\")")
_WITH_DEFAULT = re.compile(rb"\$\{[A-Za-z_]\w*(?:\[[^]]*\])?(?::?[-+=?]|\[@\]|\[\*\])")


@dataclass(frozen=True)
class Slice:
    """The launch alone. ``setup``: the statements it depends on, in order, as they stand in the script.

    ``command`` is the launch with its environment prefix, without redirects of its output and without what it is piped
    into; ``stdin`` its here-document or input redirect; ``unset`` the variables it uses that nothing surely sets;
    ``positional`` the highest $N it uses (0: none, or all of them by "$@").
    """

    setup: tuple[bytes, ...]
    command: bytes
    stdin: bytes
    unset: tuple[str, ...]
    positional: int

    @property
    def text(self) -> bytes:
        """A script of it: the setup, and the command on its last lines."""
        stdin = b" " + self.stdin if self.stdin else b""
        return b"".join(statement + b"\n" for statement in self.setup) + self.command + stdin + b"\n"


@dataclass
class _Statement:
    """One statement that may be kept: what it sets, and whether that is sure."""

    text: bytes
    node: Node | None = None  # of a branch or loop, of which only a part may be kept
    sets: set[bytes] = field(default_factory=set)
    environment: bool = False
    sure: bool = False  # it sets its names anew, whatever they were
    file: bytes = b""  # the file it writes, as it is written


def slice_launch(script: Script, launch: Launch) -> Slice:
    """The part of ``script`` that ``launch`` needs; nothing of it is run.

    Kept are assignments that its words depend on, in order and transitively; ``export``, ``cd``, ``source``, ``conda
    activate``, ``module load``, ``set``, ``ulimit`` and their like; files that ``cat <<EOF``, ``echo`` or ``printf``
    write for it; of an ``if``, ``case`` or loop around such a one its branches, with everything else in them left out;
    of a loop around the launch its first turn, of a function the first call's arguments.

    Raises Refused when the launch cannot be found in the syntax tree.
    """
    source = script.source
    root = parse(source)
    node = command_node(root, launch)
    command = _command_text(source, launch, start_of(launch))
    statements = list(_before(source, root, node, frozenset()))
    setup = _needed(source, statements, command)
    surely: set[bytes] = set().union(*(statement.sets for statement in statements if statement.sure))
    names = {match[1].decode() for match in _NAME.finditer(_WITH_DEFAULT.sub(b"", command))}
    unset = sorted(name for name in names if name.encode() not in surely)
    return Slice(tuple(setup), command, _stdin(source, launch), tuple(unset), _highest(command))


def _needed(source: bytes, statements: list[_Statement], command: bytes) -> list[bytes]:
    """The statements that ``command`` depends on, found from the last to the first."""
    needed = uses(command) | ALWAYS
    kept: list[bytes] = []
    for statement in reversed(statements):
        is_read = statement.file and any(statement.file in later for later in (command, *kept))
        if not (statement.environment or statement.sets & needed or is_read):
            continue
        written = statement.text
        if statement.node is not None:
            # `local` is only known inside a function, which the launch is taken out of.
            written = re.sub(rb"^local\b", b"declare", pruned(source, statement.node, needed))
        if statement.sure:
            needed -= statement.sets - ALWAYS
        needed |= uses(written)
        kept.append(written)
    kept.reverse()
    return kept


def _highest(command: bytes) -> int:
    if re.search(rb"\$\{?[@*#]", command):
        return 0
    return max((int(number) for number in re.findall(rb"\$\{?([1-9])\b", command)), default=0)


def _command_text(source: bytes, launch: Launch, start: int) -> bytes:
    """The words of the command that runs the launch, without the redirects between them."""
    use = launch.use
    end = max(last for _, last in (*use.words, *use.assignments))
    parts: list[bytes] = []
    done = start
    for first, last in sorted((*use.redirects, *use.heredocs)):
        if done <= first < end:
            parts.append(source[done:first].rstrip(b" \t"))
            done = min(last, end)
    return b"".join([*parts, source[done:end]])


def _stdin(source: bytes, launch: Launch) -> bytes:
    """What feeds the launch's standard input, as it is written behind the command."""
    written = [source[first:last] for first, last in launch.use.redirects]
    inputs = [redirect for redirect in written if re.match(rb"\d*<(?![&(])", redirect)]
    bodies = []
    for first, last in launch.use.heredocs:
        operator = _OPERATOR.match(source, first, last)
        line_end = source.find(b"\n", first, last)
        if operator is not None and line_end >= 0:
            inputs.append(operator[0])
            bodies.append(source[line_end:last])
    return b" ".join(inputs) + b"".join(bodies)


# -- what stands before the launch, in the order in which it runs ----------------------------------------------------


def _before(source: bytes, root: Node, node: Node, functions: frozenset[bytes]) -> Iterator[_Statement]:
    """The statements that have run when ``node`` runs, in order; of a loop on the way, its head."""
    path = [node]
    while (above := path[0].parent) is not None:
        path.insert(0, above)
    inside = max((i for i, step in enumerate(path) if step.type == "function_definition"), default=None)
    if inside is not None:
        name = field_text(source, path[inside], "name")
        call = None if name in functions else _first_call(source, root, name)
        if call is not None:
            yield from _before(source, root, call, functions | {name})
            arguments = source[_end_of_name(call) : call.end_byte].strip()
            yield _Statement(b"set -- " + arguments if arguments else b"set --", None, {ARGUMENTS}, sure=True)
        path = path[inside + 1 :]
    for depth, (parent, child) in enumerate(zip(path, path[1:])):
        if parent.type in _BODIES:
            for sibling in _siblings_before(parent, child):
                yield from _statement(source, sibling)
        elif parent.type == "list" and child.start_byte > parent.children[0].start_byte:
            yield from _statement(source, parent.children[0])
        elif parent.type in _LOOPS and child.type == "do_group":
            yield _loop_head(source, parent, child, path[depth + 2])
    yield from _own_line_prefix(source, node)


def _siblings_before(parent: Node, child: Node) -> list[Node]:
    """The statements of the same body that come before ``child``: for an ``if`` of its branch only."""
    before: list[Node] = []
    for sibling in parent.children:
        if sibling.start_byte >= child.start_byte:
            return [] if child.type in ("elif_clause", "else_clause") else before
        if sibling.type == "then":
            before = []
        elif sibling.type in STATEMENTS:
            before.append(sibling)
    return before


def _loop_head(source: bytes, loop: Node, body: Node, inner: Node) -> _Statement:
    """``for x in a b; do break; done`` leaves the first value in x, and bash finds it out itself.

    Where the body skips some turns before it comes to ``inner``, so does the head.
    """
    before = _siblings_before(body, inner)
    skips = [part for part in before if b"continue" in text(source, part) and is_guard(source, part)]
    kept = [part for part in before if part in skips or (skips and part.type in _PLAIN)]
    head = source[loop.start_byte : body.start_byte].rstrip(b" \t\n;") + b"; do "
    head += b"".join(text(source, part) + b"\n" for part in kept) + _BREAK
    outside = loop.parent
    if outside is not None and outside.type == "redirected_statement":
        inputs = [text(source, part) for part in outside.children if part.type.endswith("_redirect")]
        head += b"".join(b" " + redirect for redirect in inputs if redirect.startswith(b"<"))
    sets = {text(source, name) for name in loop.children_by_field_name("variable")}
    for part in loop.children:
        if part.start_byte < body.start_byte:
            sets |= effects(source, part)[0]
    return _Statement(head, None, sets, sure=loop.type == "for_statement")


def _first_call(source: bytes, root: Node, name: bytes) -> Node | None:
    stack = [root]
    while stack:
        node = stack.pop()
        if node.type == "function_definition" and field_text(source, node, "name") == name:
            continue
        if node.type == "command" and program(source, node) == name:
            return node
        stack.extend(reversed(node.named_children))
    return None


def _end_of_name(command: Node) -> int:
    name = command.child_by_field_name("name")
    return name.end_byte if name is not None else command.start_byte


def _statement(source: bytes, node: Node) -> Iterator[_Statement]:
    """``node`` as a statement that may be kept; nothing for what can only have effects outside of the shell."""
    if node.type == "command":
        yield from _own_line_prefix(source, node)
    if node.type == "function_definition":
        yield _Statement(text(source, node), None, {field_text(source, node, "name") + b"()"})
        return
    sets, environment = effects(source, node)
    file = written_file(source, node)
    if sets or environment or file:
        written = text(source, node)
        sure = written.endswith(_BREAK) or (node.type in _PLAIN and not _adds(source, node))
        yield _Statement(written, node, sets, environment, sure, file)


def _adds(source: bytes, node: Node) -> bool:
    """``A+=1``, ``A[0]=1``: what was there before still counts."""
    return any(
        text(source, part)[len(assigned(source, part)) :].startswith((b"+=", b"[")) for part in assignments(node)
    )


def _own_line_prefix(source: bytes, node: Node) -> Iterator[_Statement]:
    """The grammar takes ``A=1 B=2`` on a line of its own for the prefix of the next line's command."""
    name = node.child_by_field_name("name")
    parts = [child for child in assignments(node) if name is not None and child.end_byte < name.start_byte]
    if name is None or not parts:
        return
    end = parts[-1].end_byte
    if b"\n" in source[end : name.start_byte].replace(b"\\\n", b""):
        yield _Statement(source[node.start_byte : end], None, {assigned(source, part) for part in parts}, sure=True)
