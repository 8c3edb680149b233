"""Where a value comes from: options of the command line, constants, or a computation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from lorapatch.lora.support.flow import Flow
from lorapatch.lora.support.lookup import Value
from lorapatch.lora.support.option import Option
from lorapatch.lora.support.source import Place, Unit, dotted_name, last_name, string_of

__all__ = ["Origin", "Origins", "Separator"]

Separator = Literal["words", "comma", "regex", "unclear"]

# Conversions that leave the value what it is.
_TRANSPARENT = ("int", "float", "str", "list", "tuple", "set", "sorted", "bool")
# Parsers that hand each option to a parameter of the same name.
_PARAMETERS = ("click", "typer", "fire")
_TARGET_WORDS = ("target", "modules", "lora_layers", "trainable")
_DEPTH = 8


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: an option of the command line, a constant, or a computation.

    ``options`` are the attributes it is made of, ``text`` its source, ``separator`` how several words are given.
    """

    kind: Literal["flag", "constant", "computed"]
    text: str
    place: Place
    options: tuple[str, ...] = ()
    separator: Separator = "unclear"


class Origins:
    """Follows an expression back to the options it is made of."""

    def __init__(self, flow: Flow, options: dict[str, Option]) -> None:
        self.flow = flow
        self.options = options
        self._known: dict[tuple[int, int, int], Origin] = {}

    def keywords(self, unit: Unit, call: ast.Call) -> dict[str, Origin]:
        """Where each keyword of a call comes from, ``**kwargs`` looked into where it is a literal dictionary."""
        found: dict[str, Origin] = {}
        for keyword in call.keywords:
            if keyword.arg:
                found[keyword.arg] = self.of(unit, keyword.value)
                continue
            for where, value in self.flow.origins(unit, keyword.value):
                for name, node in _dictionary_items(value):
                    found.setdefault(name, self.of(where, node))
        return found

    def of(self, unit: Unit, node: ast.expr, depth: int = 0) -> Origin:
        """Where an expression comes from."""
        key = (id(unit), id(node), depth)
        if key not in self._known:
            self._known[key] = self._of(unit, node, depth)
        return self._known[key]

    def _of(self, unit: Unit, node: ast.expr, depth: int) -> Origin:
        if depth > _DEPTH:
            return Origin("computed", ast.unparse(node), unit.place(node))
        if isinstance(node, ast.Name):
            return self._name(unit, node, depth)
        if isinstance(node, (ast.Attribute, ast.Subscript)):
            return self._member(unit, node, depth)
        if isinstance(node, (ast.IfExp, ast.BoolOp)):
            values = [node.body, node.orelse] if isinstance(node, ast.IfExp) else node.values
            return _union([self.of(unit, value, depth + 1) for value in values], unit.place(node), ast.unparse(node))
        if isinstance(node, ast.ListComp):
            return self.of(unit, node.generators[0].iter, depth + 1)
        if isinstance(node, ast.Call):
            return self._call(unit, node, depth)
        kind: Literal["constant", "computed"] = "constant" if _is_literal(node) else "computed"
        return Origin(kind, ast.unparse(node), unit.place(node), self._mentioned(node))

    def _name(self, unit: Unit, node: ast.Name, depth: int) -> Origin:
        option = self.options.get(node.id)
        if option and option.declared_in in _PARAMETERS and any(p.arg == node.id for p in unit.parameters):
            return self._flag(unit, node, node.id)
        origins = [(u, n) for u, n in self.flow.origins(unit, node) if n is not node]
        if origins:
            return _union([self.of(u, n, depth + 1) for u, n in origins], unit.place(node), node.id)
        return Origin("computed", node.id, unit.place(node))

    def _member(self, unit: Unit, node: ast.Attribute | ast.Subscript, depth: int) -> Origin:
        name = node.attr if isinstance(node, ast.Attribute) else string_of(node.slice)
        if name in self.options:
            return self._flag(unit, node, name)
        if isinstance(node, ast.Attribute) and (dotted := dotted_name(node)):
            target = self.flow.lookup.resolve(unit.source, dotted)
            if isinstance(target, Value):
                return self.of(target.source.top, target.node, depth + 1)
            if dotted.startswith("self.") and dotted.count(".") == 1:
                stored = [(u, v) for u, v in _stored_on_self(self.flow, unit, node.attr)]
                if stored:
                    return _union([self.of(u, v, depth + 1) for u, v in stored], unit.place(node), dotted)
        return Origin("computed", ast.unparse(node), unit.place(node))

    def _flag(self, unit: Unit, node: ast.expr, name: str) -> Origin:
        option = self.options[name]
        separator: Separator = "words" if option.kind in ("list", "repeat", "literal") else "regex"
        if separator == "regex" and self._split_by_its_class(option):
            separator = "comma"
        return Origin("flag", ast.unparse(node), unit.place(node), (name,), separator)

    def _split_by_its_class(self, option: Option) -> bool:
        """``self.lora_target = split(self.lora_target)`` in the dataclass that declares it, or one made from it."""
        for unit in self.flow.units:
            if unit.owner and unit.source.path == option.place.file:
                for node in unit.nodes:
                    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
                    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                    if isinstance(value, ast.Call) and any(t and last_name(t) == option.dest for t in targets):
                        return "split" in ast.unparse(value)
        return False

    def _call(self, unit: Unit, node: ast.Call, depth: int) -> Origin:
        place, text = unit.place(node), ast.unparse(node)
        if last_name(node.func) in _TRANSPARENT and len(node.args) == 1:
            return self.of(unit, node.args[0], depth + 1)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("split", "strip", "replace", "lower"):
            inner = self.of(unit, node.func.value, depth + 1)
            if node.func.attr == "split" and inner.kind == "flag":
                comma = bool(node.args) and string_of(node.args[0]) == ","
                return replace(inner, text=text, place=place, separator="comma" if comma else "unclear")
            return inner
        if last_name(node.func) == "getattr" and len(node.args) > 1 and string_of(node.args[1]) in self.options:
            return self._flag(unit, node, string_of(node.args[1]) or "")
        mentioned = self._mentioned(node)
        wanted = tuple(name for name in mentioned if self._names_modules(name))
        if wanted:
            return Origin("flag", text, place, wanted, "comma")
        return Origin("computed", text, place, mentioned)

    def _names_modules(self, name: str) -> bool:
        return self.options[name].kind in ("str", "list", "repeat") and any(w in name.lower() for w in _TARGET_WORDS)

    def _mentioned(self, node: ast.expr) -> tuple[str, ...]:
        names = [last_name(n) for n in ast.walk(node) if isinstance(n, (ast.Attribute, ast.Name))]
        return tuple(dict.fromkeys(name for name in names if name in self.options))


def _stored_on_self(flow: Flow, unit: Unit, attribute: str) -> Iterator[tuple[Unit, ast.expr]]:
    """What the methods of the same class assign to ``self.attribute``."""
    for method in unit.source.methods(unit.owner) if unit.owner else []:
        for node in method.nodes:
            if isinstance(node, ast.Assign) and any(dotted_name(t) == f"self.{attribute}" for t in node.targets):
                yield method, node.value


def _dictionary_items(node: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            name = string_of(key)
            if name:
                yield name, value
    elif isinstance(node, ast.Call) and last_name(node.func) == "dict":
        yield from ((k.arg, k.value) for k in node.keywords if k.arg)


def _union(origins: list[Origin], place: Place, text: str) -> Origin:
    """Of several values that a name may have: a flag if any is one, else computed if any is, else a constant."""
    useful = [o for o in origins if not (o.kind == "constant" and o.text in ("None", "[]", "''"))] or origins
    for kind in ("flag", "computed", "constant"):
        chosen = [origin for origin in useful if origin.kind == kind]
        if chosen:
            best = next((origin for origin in chosen if origin.separator != "regex"), chosen[0])
            return replace(chosen[0], separator=best.separator)
    return Origin("computed", text, place)


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return all(map(_is_literal, node.elts))
    if isinstance(node, ast.UnaryOp):
        return _is_literal(node.operand)
    return isinstance(node, ast.Constant)
