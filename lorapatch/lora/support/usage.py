"""Which of the declared options the trainer's code reads at all."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from lorapatch.lora.support.option import Option
from lorapatch.lora.support.project import Project
from lorapatch.lora.support.source import Unit, last_name

__all__ = ["unused_options"]

_WHOLE_OBJECT = ("vars", "asdict", "astuple", "replace")


def unused_options(project: Project, options: Iterable[Option]) -> set[str]:
    """The ``dest`` of every option whose name appears nowhere in the project outside its own declaration.

    Empty where that cannot be told: a part of the project was not found, or arguments are taken all at once
    (``vars(args)``, ``asdict(args)``, ``args.__dict__``). A library's own options are its own business.
    """
    if not project.complete:
        return set()
    candidates = [option for option in options if option.library is None]
    owners = {(option.place.file, option.declared_in) for option in candidates}
    mentioned: set[str] = set()
    for unit in project.units:
        if (unit.source.path, unit.owner) in owners:
            continue
        if _takes_all_at_once(unit):
            return set()
        mentioned |= unit.attribute_loads | unit.name_loads | _strings(unit)
    return {option.dest for option in candidates} - mentioned


def _strings(unit: Unit) -> set[str]:
    """String constants (``getattr(args, "lora_r")``, ``args["lora_r"]``), but for a declaration's own ``dest=``."""
    own = {id(k.value) for call in unit.calls if last_name(call.func) == "add_argument" for k in call.keywords}
    return {
        node.value
        for node in unit.nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in own
    }


def _takes_all_at_once(unit: Unit) -> bool:
    if "__dict__" in unit.attribute_loads:
        return any(
            _looks_like_arguments(n.value) for n in unit.nodes if isinstance(n, ast.Attribute) and n.attr == "__dict__"
        )
    return any(
        last_name(call.func) in _WHOLE_OBJECT and any(map(_looks_like_arguments, call.args)) for call in unit.calls
    )


def _looks_like_arguments(node: ast.expr) -> bool:
    name = last_name(node).lower()
    return "arg" in name or "config" in name or "cfg" in name or "opt" in name or "param" in name
