"""Where a value comes from: names followed back through assignments, parameters and the calls that fill them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

from lorapatch.lora.support.lookup import Found, Lookup, Target, Value
from lorapatch.lora.support.source import SourceFile, Unit, dotted_name, last_name

__all__ = ["Flow"]

_DEPTH = 6


class Flow:
    """Over the units that can run. Each answer is an expression with the unit in which it stands."""

    def __init__(self, lookup: Lookup, units: list[Unit]) -> None:
        self.lookup = lookup
        self.units = units
        self._origins: dict[tuple[int, int, int], list[tuple[Unit, ast.expr]]] = {}
        self._callers: dict[int, list[tuple[Unit, ast.Call]]] = {}

    @cached_property
    def _calls_by_name(self) -> dict[str, list[tuple[Unit, ast.Call]]]:
        calls: dict[str, list[tuple[Unit, ast.Call]]] = defaultdict(list)
        for unit in self.units:
            for call in unit.calls:
                calls[last_name(call.func)].append((unit, call))
        return calls

    def calls_named(self, *names: str) -> list[tuple[Unit, ast.Call]]:
        """Every call of a function or method with one of these last names."""
        return [pair for name in names for pair in self._calls_by_name.get(name, ())]

    def callers(self, unit: Unit) -> list[tuple[Unit, ast.Call]]:
        """The calls that run a function; those of a method by its name, those of ``__init__`` by its class."""
        if unit.function is None:
            return []
        if id(unit) not in self._callers:
            self._callers[id(unit)] = self._find_callers(unit)
        return self._callers[id(unit)]

    def _find_callers(self, unit: Unit) -> list[tuple[Unit, ast.Call]]:
        is_constructor = unit.name in ("__init__", "__new__")
        name = unit.owner if unit.owner and is_constructor else unit.name
        return [(u, c) for u, c in self._calls_by_name.get(name or "", ()) if self._calls(u, c, unit, is_constructor)]

    def _calls(self, caller: Unit, call: ast.Call, unit: Unit, is_constructor: bool) -> bool:
        if unit.owner and not is_constructor:
            return isinstance(call.func, ast.Attribute)
        target = self.resolve(caller.source, call.func)
        if isinstance(target, Found):
            return target.node is unit.function or bool(unit.owner and target.node.name == unit.owner)
        return isinstance(call.func, ast.Name) and caller.source is unit.source

    def resolve(self, source: SourceFile, node: ast.expr) -> Target:
        """What a dotted name means, another name for it (``Parser = transformers.HfArgumentParser``) seen through."""
        name = dotted_name(node)
        target = self.lookup.resolve(source, name) if name else None
        for _ in range(_DEPTH):
            if not isinstance(target, Value) or not (name := dotted_name(target.node)):
                break
            target = self.lookup.resolve(target.source, name)
        return target

    def origins(self, unit: Unit, node: ast.expr, depth: int = 0) -> list[tuple[Unit, ast.expr]]:
        """What a plain name stands for, as far back as it can be followed; any other expression is its own origin."""
        if not isinstance(node, ast.Name) or depth > _DEPTH:
            return [(unit, node)]
        key = (id(unit), id(node), depth)
        if key not in self._origins:  # kept, for in a large project many ways lead to the same name
            found = {(id(u), id(n)): (u, n) for u, n in self._follow(unit, node, depth)}
            self._origins[key] = list(found.values())
        return self._origins[key]

    def _follow(self, unit: Unit, node: ast.Name, depth: int) -> Iterator[tuple[Unit, ast.expr]]:
        steps = list(self._step(unit, node.id))
        if not steps:
            yield unit, node
        for source_unit, value in steps:
            if value is node or (isinstance(value, ast.Name) and value.id == node.id and source_unit is unit):
                yield source_unit, value
            else:
                yield from self.origins(source_unit, value, depth + 1)

    def _step(self, unit: Unit, name: str) -> Iterator[tuple[Unit, ast.expr]]:
        if name in unit.assignments:
            for value in unit.assignments[name]:
                yield unit, value
            return
        position = next((i for i, p in enumerate(unit.parameters) if p.arg == name), None)
        if position is not None:
            yield from self._arguments(unit, name, position)
            return
        target = self.lookup.resolve(unit.source, name)
        if isinstance(target, Value):
            yield target.source.top, target.node

    def _arguments(self, unit: Unit, name: str, position: int) -> Iterator[tuple[Unit, ast.expr]]:
        """What callers pass for a parameter, and its default."""
        for caller, call in self.callers(unit):
            keyword = next((k.value for k in call.keywords if k.arg == name), None)
            index = position - 1 if unit.owner else position
            if keyword is not None:
                yield caller, keyword
            elif 0 <= index < len(call.args) and not any(isinstance(a, ast.Starred) for a in call.args):
                yield caller, call.args[index]
        if name in unit.defaults:
            yield unit.source.top, unit.defaults[name]
