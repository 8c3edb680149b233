"""A branch or a loop with only what matters left in it: everything else becomes ``:``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorapatch.run.effects import COMPOUND, STATEMENTS, effects, is_control, is_test, text, uses

if TYPE_CHECKING:
    from tree_sitter import Node

__all__ = ["is_guard", "pruned"]

_STEERS = re.compile(rb"\b(?:exit|return|break|continue|shift)\b")
_Cut = tuple[int, int]


def pruned(source: bytes, node: Node, needed: set[bytes]) -> bytes:
    """``node`` with each command that neither sets a needed name nor steers replaced by ``:``."""
    while True:
        kept = _without(source, node, list(_cuts(source, node, needed)))
        more = needed | uses(kept)
        if more == needed:
            return kept
        needed = more  # what the conditions that stay look at has to stay, too


def is_guard(source: bytes, node: Node) -> bool:
    """``[ … ] || continue``, ``if [ … ]; then continue; fi``: a test, and where to go on."""
    if node.type == "list":
        return is_test(source, node.children[0]) and is_control(source, node.children[-1])
    if node.type != "if_statement":
        return False
    parts = [part for child in node.children for part in (child.children if child.type.endswith("clause") else [child])]
    return all(is_test(source, part) or is_control(source, part) for part in parts if part.type in STATEMENTS)


def _without(source: bytes, node: Node, cuts: list[_Cut]) -> bytes:
    parts: list[bytes] = []
    done = node.start_byte
    for start, end in cuts:
        parts += [source[done:start], b":"]
        done = end
    return b"".join([*parts, source[done : node.end_byte]])


def _cuts(source: bytes, node: Node, needed: set[bytes]) -> Iterator[_Cut]:
    if _is_redirected(node):
        yield from _cuts(source, node.children[0], needed)
    elif node.type == "list":
        first, last = node.children[0], node.children[-1]
        if not is_test(source, first):
            yield from _cuts_of_statement(source, first, needed)
        yield from _cuts_of_statement(source, last, needed)
    elif node.type in ("if_statement", "compound_statement"):
        yield from _cuts_in_body(source, node, needed)
    else:
        for child in node.children:
            if child.type in ("do_group", "case_item"):
                yield from _cuts_in_body(source, child, needed)


def _cuts_in_body(source: bytes, body: Node, needed: set[bytes]) -> Iterator[_Cut]:
    waiting = body.type in ("if_statement", "elif_clause")  # for `then`: the condition stays as it is
    values = {value.start_byte for value in body.children_by_field_name("value")}  # the patterns of a case
    for child in body.children:
        if child.type == "then":
            waiting = False
        elif child.type in ("elif_clause", "else_clause"):
            yield from _cuts_in_body(source, child, needed)
        elif not waiting and child.type in STATEMENTS and child.start_byte not in values:
            yield from _cuts_of_statement(source, child, needed)


def _cuts_of_statement(source: bytes, node: Node, needed: set[bytes]) -> Iterator[_Cut]:
    sets, environment = effects(source, node)
    matters = environment or bool(sets & needed)
    if node.type == "list":
        if matters or is_guard(source, node):
            yield from _cuts(source, node, needed)
            return
    elif node.type in COMPOUND or _is_redirected(node):
        if matters or _STEERS.search(text(source, node)):
            yield from _cuts(source, node, needed)
            return
    elif matters or is_control(source, node):
        return
    yield node.start_byte, node.end_byte


def _is_redirected(node: Node) -> bool:
    return node.type == "redirected_statement" and node.children[0].type in COMPOUND
