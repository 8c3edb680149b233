"""What must hold for a piece of code to run: the tests around it, and around the calls that lead to it."""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from lorapatch.lora.support.flow import Flow
from lorapatch.lora.support.source import Unit, last_name

__all__ = ["Condition", "Conditions", "conditions_of"]


@dataclass(frozen=True)
class Condition:
    """A test, the unit it stands in, and whether it must hold or must not."""

    unit: Unit
    test: ast.expr
    holds: bool = True


@dataclass(frozen=True)
class Conditions:
    """``tests`` from the inside out, over every way that leads here; ``free`` if one way has no test at all."""

    tests: tuple[Condition, ...]
    free: bool


def conditions_of(flow: Flow, unit: Unit, node: ast.AST) -> Conditions:
    """The conditions of a node. A function that nobody is seen to call is not free: what calls it is out of sight."""
    tests: dict[Condition, None] = {}
    free = False
    queue, seen = deque([(unit, node, True)]), set()
    while queue:
        unit, node, unguarded = queue.popleft()
        own = tuple(_around(unit, node))
        tests |= dict.fromkeys(own)
        unguarded = unguarded and not own
        if unit.function is None:
            free = free or unguarded
        elif (id(unit.function), unguarded) not in seen:  # each function twice at most, however many ways lead there
            seen.add((id(unit.function), unguarded))
            callers = flow.callers(unit)
            free = free or (not callers and unguarded and _handed_over(flow, unit))
            queue.extend((*caller, unguarded) for caller in callers[:8])
    return Conditions(tuple(tests), free)


def _handed_over(flow: Flow, unit: Unit) -> bool:
    """``fire.Fire(train)``, ``spawn(train)`` where the program starts."""
    starts = [u for u in flow.units if u.function is None and unit.name in u.name_loads]
    return any(last_name(argument) == unit.name for u in starts for call in u.calls for argument in call.args)


def _around(unit: Unit, node: ast.AST) -> Iterator[Condition]:
    """The tests of the branches that a node is in, within its own function."""
    parents = unit.source.parents
    child, parent = node, parents.get(id(node))
    while parent is not None and child is not unit.function:
        if isinstance(parent, (ast.If, ast.IfExp)) and child is not parent.test and not _is_main(parent.test):
            body = parent.body if isinstance(parent.body, list) else [parent.body]
            yield Condition(unit, parent.test, child in body)
        for test in _guards_before(parent, child):
            yield Condition(unit, test, holds=False)
        child, parent = parent, parents.get(id(parent))


def _is_main(test: ast.expr) -> bool:
    return "__name__" in {n.id for n in ast.walk(test) if isinstance(n, ast.Name)}


def _guards_before(parent: ast.AST, child: ast.AST) -> Iterator[ast.expr]:
    """``if not args.use_lora: return model`` before the node: its test must not hold."""
    for body in (getattr(parent, "body", None), getattr(parent, "orelse", None)):
        if not isinstance(body, list) or child not in body:
            continue
        for statement in body[: body.index(child)]:
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return):
                yield statement.test
