"""The option that one ``add_argument`` call declares."""

from __future__ import annotations

import ast
from typing import Literal

from lorapatch.lora.support.option import Kind, Option
from lorapatch.lora.support.source import Unit, dotted_name, string_of

__all__ = ["add_argument_option", "constant_strings"]


def add_argument_option(unit: Unit, call: ast.Call) -> Option | Literal["positional"] | None:
    """The option, "positional" for an argument without dashes, None when its name is computed."""
    names = [string_of(argument) for argument in call.args]
    if not names or any(name is None for name in names):
        return None
    spellings = tuple(name for name in names if name and name.startswith("-"))
    if not spellings:
        return "positional"
    keywords = {k.arg: k.value for k in call.keywords if k.arg}
    long = next((s for s in spellings if s.startswith("--")), spellings[0])
    dest = string_of(keywords.get("dest")) or long.lstrip("-").replace("-", "_")
    kind = _kind(keywords)
    if "BooleanOptionalAction" in ast.unparse(keywords.get("action", ast.Constant(""))):
        spellings += tuple(f"--no-{s[2:]}" for s in spellings if s.startswith("--"))
    default = keywords.get("default")
    return Option(
        spellings=(long, *(s for s in spellings if s != long)),
        dest=dest,
        kind=kind,
        place=unit.place(call),
        declared_in="argparse",
        default=ast.unparse(default) if default is not None else None,
        choices=constant_strings(keywords.get("choices")),
    )


def _kind(keywords: dict[str, ast.expr]) -> Kind:
    action = string_of(keywords.get("action")) or dotted_name(keywords.get("action", ast.Constant(""))) or ""
    if action in ("store_true", "store_const", "count") or action.endswith("BooleanOptionalAction"):
        return "switch"
    if action == "store_false":
        return "off-switch"
    if action in ("append", "extend"):
        return "repeat" if action == "append" else "list"
    nargs = keywords.get("nargs")
    if isinstance(nargs, ast.Constant) and nargs.value is not None and nargs.value != "?":
        return "list"
    kind = dotted_name(keywords.get("type", ast.Constant(""))) or ""
    if "bool" in kind.lower():
        return "bool"
    return "int" if kind == "int" else "float" if kind == "float" else "str"


def constant_strings(node: ast.expr | None) -> tuple[str, ...]:
    """The constants of a literal list, tuple or set, as text."""
    if not isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return ()
    return tuple(str(element.value) for element in node.elts if isinstance(element, ast.Constant))
