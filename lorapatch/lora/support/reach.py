"""Which code of a project can run when its trainer is started, decided by the names that running code mentions."""

from __future__ import annotations

import ast
from collections import defaultdict

from lorapatch.lora.support.lookup import Found, Value
from lorapatch.lora.support.project import Project
from lorapatch.lora.support.source import Definition, SourceFile, Unit, dotted_name

__all__ = ["reachable_units"]


def reachable_units(project: Project) -> list[Unit]:
    """The units that can run, errors on the side of too many: a method counts when anything of its name is mentioned.

    A utility script inside an imported module (its ``__main__`` block, functions nobody calls) does not count, so
    that its argument parser is not taken for the trainer's.
    """
    return _Reach(project).run()


class _Reach:
    def __init__(self, project: Project) -> None:
        self.project = project
        self.reached: dict[int, Unit] = {}
        self.queue: list[Unit] = []
        self.methods: dict[str, list[Unit]] = defaultdict(list)
        for unit in project.units:
            if unit.owner:
                self.methods[unit.name].append(unit)
        self.instantiated: set[int] = set()

    def run(self) -> list[Unit]:
        if self.project.entry:
            self.add(self.project.entry.main)
        for source in self.project.files.values():
            self.add(source.top)
            for definition in source.definitions.values():
                if self._registered(source, definition):
                    self.add_definition(source, definition)
        while self.queue:
            self.visit(self.queue.pop())
        return list(self.reached.values())

    def add(self, unit: Unit) -> None:
        if id(unit) not in self.reached:
            self.reached[id(unit)] = unit
            self.queue.append(unit)

    def add_definition(self, source: SourceFile, node: Definition) -> None:
        if isinstance(node, ast.ClassDef):
            if id(node) not in self.instantiated:
                self.instantiated.add(id(node))
                for method in source.methods(node.name):
                    self.add(method)
        else:
            self.add(source.functions[id(node)])

    def visit(self, unit: Unit) -> None:
        for name in unit.name_loads:
            self._follow(unit.source, name)
        for attribute in unit.attribute_loads:
            for method in self.methods.get(attribute, ()):
                self.add(method)
        for dotted in {dotted_name(node) for node in unit.nodes if isinstance(node, ast.Attribute)}:
            if dotted:
                self._follow(unit.source, dotted)

    def _follow(self, source: SourceFile, name: str) -> None:
        target = self.project.resolve(source, name)
        if isinstance(target, Found):
            self.add_definition(target.source, target.node)

    def _registered(self, source: SourceFile, node: Definition) -> bool:
        """Put into a registry by its decorator, so used by a string that no name shows."""
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            name = dotted_name(called) or ""
            head = self.project.resolve(source, name.partition(".")[0])
            if "regist" in name.lower() or isinstance(head, (Found, Value)):
                return True
        return False
