"""The options that click and typer decorators, and fire, make of a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from lorapatch.lora.support.argparse_options import constant_strings
from lorapatch.lora.support.dataclass_fields import annotation_kind
from lorapatch.lora.support.flow import Flow
from lorapatch.lora.support.lookup import External, Found
from lorapatch.lora.support.option import Kind, Option
from lorapatch.lora.support.source import Place, Unit, dotted_name, last_name, string_of

__all__ = ["click_options", "fire_options", "typer_options"]

_CLICK = ("click", "rich_click", "asyncclick", "cloup")


def click_options(flow: Flow) -> Iterator[Option]:
    """Of every ``click.option`` call, but for those that decorate a function which cannot run."""
    running = {id(unit.function) for unit in flow.units if unit.function}
    for unit in flow.units:
        idle = {id(d) for f in _functions(unit) if id(f) not in running for d in f.decorator_list}
        for call in unit.calls:
            target = flow.resolve(unit.source, call.func)
            if not isinstance(target, External) or id(call) in idle:
                continue
            if target.name.partition(".")[0] in _CLICK and target.name.endswith(".option"):
                option = _click_option(unit, call)
                if option:
                    yield option


def _functions(unit: Unit) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [inner.function for inner in unit.source.functions.values() if inner.function]


def _click_option(unit: Unit, call: ast.Call) -> Option | None:
    texts = [text for text in map(string_of, call.args) if text]
    dashed = [text for text in texts if text.startswith("-")]
    if not dashed:
        return None
    spellings = tuple(part.strip() for text in dashed for part in text.split("/"))
    long = next((s for s in spellings if s.startswith("--")), spellings[0])
    plain = [text for text in texts if not text.startswith("-")]
    keywords = {k.arg: k.value for k in call.keywords if k.arg}
    default = keywords.get("default")
    kind = _click_kind(keywords, pair=any("/" in text for text in dashed))
    return Option(
        spellings=(long, *(s for s in spellings if s != long)),
        dest=plain[0] if plain else long.lstrip("-").replace("-", "_"),
        kind=kind,
        place=unit.place(call),
        declared_in="click",
        default=ast.unparse(default) if default is not None else None,
        choices=_click_choices(keywords.get("type")),
    )


def _click_kind(keywords: dict[str, ast.expr], *, pair: bool) -> Kind:
    if pair or _is_true(keywords.get("is_flag")):
        return "switch"
    if _is_true(keywords.get("multiple")):
        return "repeat"
    declared = (dotted_name(keywords["type"]) or "").rpartition(".")[2].lower() if "type" in keywords else ""
    default = keywords.get("default")
    if not declared and isinstance(default, ast.Constant) and default.value is not None:
        declared = type(default.value).__name__
    kinds: dict[str, Kind] = {"bool": "bool", "int": "int", "float": "float"}
    return kinds.get(declared, "str")


def _click_choices(node: ast.expr | None) -> tuple[str, ...]:
    if isinstance(node, ast.Call) and (dotted_name(node.func) or "").endswith("Choice") and node.args:
        return constant_strings(node.args[0])
    return ()


def typer_options(flow: Flow) -> Iterator[Option]:
    """Of the parameters of every function that is a typer command and can run."""
    commands = {id(f.node): f for unit in flow.units for f in _typer_commands(flow, unit)}
    for unit in flow.units:
        if unit.function is not None and (id(unit.function) in commands or _is_typer_command(flow, unit)):
            for argument in unit.parameters:
                option = _typer_option(unit, argument)
                if option:
                    yield option


def _typer_commands(flow: Flow, unit: Unit) -> Iterator[Found]:
    for call in unit.calls:
        target = flow.resolve(unit.source, call.func)
        if isinstance(target, External) and target.name == "typer.run" and call.args:
            command = flow.resolve(unit.source, call.args[0])
            if isinstance(command, Found):
                yield command


def _is_typer_command(flow: Flow, unit: Unit) -> bool:
    """Decorated with ``app.command()`` or ``app.callback()`` where ``app`` is a ``typer.Typer``."""
    for decorator in unit.function.decorator_list if unit.function else []:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if not (isinstance(called, ast.Attribute) and called.attr in ("command", "callback")):
            continue
        for where, origin in flow.origins(unit.source.top, called.value):
            target = flow.resolve(where.source, origin.func) if isinstance(origin, ast.Call) else None
            if isinstance(target, External) and target.name.startswith("typer."):
                return True
    return False


def _typer_option(unit: Unit, argument: ast.arg) -> Option | None:
    default = unit.defaults.get(argument.arg)
    annotation, marker = argument.annotation, None
    if isinstance(annotation, ast.Subscript) and (dotted_name(annotation.value) or "").endswith("Annotated"):
        parts = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        annotation = parts[0]
        marker = next((p for p in parts[1:] if isinstance(p, ast.Call)), None)
    if marker is None and isinstance(default, ast.Call) and last_name(default.func) in ("Option", "Argument"):
        marker, default = default, default.args[0] if default.args else None
    if marker is not None and last_name(marker.func) == "Argument" or (marker is None and default is None):
        return None
    texts = [t for t in map(string_of, marker.args if marker else []) if t and t.startswith("-")]
    spellings = [part for text in texts for part in text.split("/")] or [f"--{argument.arg.replace('_', '-')}"]
    kind = annotation_kind(annotation)
    if kind == "bool":
        kind = "switch"
        if not texts:
            spellings.append(f"--no-{argument.arg.replace('_', '-')}")
    long = next((s for s in spellings if s.startswith("--")), spellings[0])
    return Option(
        spellings=(long, *(s for s in spellings if s != long)),
        dest=argument.arg,
        kind="repeat" if kind == "list" else kind,
        place=Place(unit.source.path, argument.lineno),
        declared_in="typer",
        default=ast.unparse(default) if default is not None else None,
    )


def fire_options(found: Found) -> tuple[list[Option], bool]:
    """The options of a function given to ``fire.Fire``, and whether it takes any keyword."""
    if isinstance(found.node, ast.ClassDef):
        return [], True
    unit = found.source.functions[id(found.node)]
    options = []
    for argument in unit.parameters:
        default = unit.defaults.get(argument.arg)
        kind = annotation_kind(argument.annotation)
        spellings = dict.fromkeys((f"--{argument.arg}", f"--{argument.arg.replace('_', '-')}"))
        options.append(
            Option(
                spellings=tuple(spellings),
                dest=argument.arg,
                kind="literal" if kind == "list" else kind,
                place=Place(found.source.path, argument.lineno),
                declared_in="fire",
                default=ast.unparse(default) if default is not None else None,
            )
        )
    return options, found.node.args.kwarg is not None


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True
