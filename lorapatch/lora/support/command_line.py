"""Every option that a trainer's command line takes, whichever parser reads it."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass, field

from lorapatch.lora.support.argparse_options import add_argument_option
from lorapatch.lora.support.dataclass_fields import ClassOptions, class_options, external_options
from lorapatch.lora.support.flow import Flow
from lorapatch.lora.support.function_options import click_options, fire_options, typer_options
from lorapatch.lora.support.lookup import External, Found, Target
from lorapatch.lora.support.option import Option
from lorapatch.lora.support.source import Place, Unit, last_name

__all__ = ["CommandLine", "read_command_line"]

_HF_PARSERS = ("HfArgumentParser", "TrlParser")
# Calls that make a command line out of something which is not read here.
_OTHER_PARSERS = (
    "tyro.cli", "hydra.main", "omegaconf.OmegaConf.from_cli", "jsonargparse.CLI", "jsonargparse.auto_cli",
    "jsonargparse.ArgumentParser", "simple_parsing.parse", "simple_parsing.ArgumentParser", "draccus.wrap",
    "draccus.parse", "pyrallis.wrap", "pyrallis.parse", "docopt.docopt", "absl.app.run",
)  # fmt: skip
# deepspeed.add_config_arguments, deepspeed/__init__.py
_DEEPSPEED_OPTIONS = {
    "deepspeed": "switch",
    "deepspeed_config": "str",
    "deepscale": "switch",
    "deepscale_config": "str",
}


@dataclass
class CommandLine:
    """``options`` by spelling. ``open_because``: why a flag that is not among them may be accepted all the same.

    ``rewritten``: names that may stand for options, since the trainer rewrites its words before it parses them.
    """

    options: dict[str, Option] = field(default_factory=dict)
    parsers: list[str] = field(default_factory=list)
    training_arguments: set[str] = field(default_factory=set)
    open_because: list[tuple[Place, str]] = field(default_factory=list)
    abbreviations: bool = False
    rewritten: set[str] = field(default_factory=set)
    declared_twice: list[tuple[str, Option, Option]] = field(default_factory=list)

    def add(self, option: Option) -> None:
        for spelling in option.spellings:
            self.options[spelling] = option

    def note(self, parser: str) -> None:
        if parser not in self.parsers:
            self.parsers.append(parser)


def read_command_line(flow: Flow, entry: Place) -> CommandLine:
    """The command line of the units that can run."""
    reader = _Reader(flow)
    for unit in flow.units:
        if unit.owner not in _HF_PARSERS:  # what those do is known
            for call in unit.calls:
                reader.read_call(unit, call)
    for option in (*click_options(flow), *typer_options(flow)):
        reader.line.note(option.declared_in)
        reader.line.add(option)
    line = reader.line
    if not line.parsers and not line.open_because:
        line.open_because.append((entry, "no command-line parser was found"))
    return line


class _Reader:
    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.line = CommandLine()

    def read_call(self, unit: Unit, call: ast.Call) -> None:
        last = last_name(call.func)
        if last == "add_argument" and isinstance(call.func, ast.Attribute):
            self._add_argument(unit, call)
        elif _keeps_unknown(call) and _refuses_rest(unit, call):
            if call.args:  # words that may have been rewritten: whoever does that names them
                self.line.rewritten |= {text for other in unit.source.units for text in other.strings}
        elif last in ("parse_known_args", "parse_known_intermixed_args"):
            self._open(unit, call, "it reads its flags with parse_known_args, which lets unknown ones pass")
        elif _keeps_unknown(call):
            self._open(unit, call, "it keeps the flags that it does not know (return_remaining_strings)")
        elif _keyword_is_true(call, "ignore_unknown_options") or _allows_unknown(call):
            self._open(unit, call, "its parser is told to ignore unknown options")
        else:
            self._constructor_or_library(unit, call)

    def _constructor_or_library(self, unit: Unit, call: ast.Call) -> None:
        target = self.flow.resolve(unit.source, call.func)
        if isinstance(target, External) and target.name in _OTHER_PARSERS:
            self._open(unit, call, f"its options are read by {target.name}, which is not followed")
            return
        kind = self._parser_kind(target, 0)
        if kind:
            self.line.note(kind)
            abbreviated = next((k.value for k in call.keywords if k.arg == "allow_abbrev"), None)
            self.line.abbreviations |= not (isinstance(abbreviated, ast.Constant) and abbreviated.value is False)
            if kind == "HfArgumentParser":
                self._dataclasses(unit, call)
            return
        if not isinstance(target, External):
            return
        if target.name.startswith("fire.") and target.name.endswith("Fire"):
            self._fire(unit, call)
        elif target.name == "deepspeed.add_config_arguments":
            self._deepspeed(unit, call)
        elif any(isinstance(a, ast.Name) and "parser" in a.id for a in call.args):
            self._open(unit, call, f"its parser is handed to {target.name}, which may add options")

    def _parser_kind(self, target: Target, depth: int) -> str | None:
        """HfArgumentParser or argparse, also through subclasses in the project."""
        if isinstance(target, External):
            last = target.name.rpartition(".")[2]
            if last in _HF_PARSERS:
                return "HfArgumentParser"
            return "argparse" if last.endswith("ArgumentParser") else None
        if isinstance(target, Found) and isinstance(target.node, ast.ClassDef) and depth < 8:
            if target.node.name in _HF_PARSERS:
                return "HfArgumentParser"  # a copy of it in the project
            bases = [self.flow.resolve(target.source, base) for base in target.node.bases]
            return next(filter(None, (self._parser_kind(base, depth + 1) for base in bases)), None)
        return None

    def _add_argument(self, unit: Unit, call: ast.Call) -> None:
        option = add_argument_option(unit, call)
        if option == "positional":
            return
        if option is None:
            self._open(unit, call, "it adds options whose names are computed")
            return
        self.line.note("argparse")
        self.line.add(option)

    def _dataclasses(self, unit: Unit, call: ast.Call) -> None:
        keyword = next((k.value for k in call.keywords if k.arg == "dataclass_types"), None)
        argument = call.args[0] if call.args else keyword
        if argument is None:
            return
        by_class: list[ClassOptions] = []
        for where, node in self._class_nodes(unit, argument, 0):
            found = self._class(where, node)
            if found is None:
                self._open(where, node, f"its parser is made of {ast.unparse(node)}, which could not be followed")
                continue
            by_class.append(found)
            self.line.training_arguments |= found.training_arguments
            for base in found.unread:
                self._open(where, node, f"its options come from {base}, which is not installed here to be read")
            for option in found.options.values():
                self.line.add(option)
        self._declared_twice(by_class)

    def _declared_twice(self, classes: list[ClassOptions]) -> None:
        counts = Counter(dest for found in classes for dest in found.options)
        for dest in (dest for dest, count in counts.items() if count > 1):
            first, second = [found.options[dest] for found in classes if dest in found.options][:2]
            if first.place != second.place:
                self.line.declared_twice.append((dest, first, second))

    def _class(self, unit: Unit, node: ast.expr) -> ClassOptions | None:
        target = self.flow.resolve(unit.source, node)
        if isinstance(target, Found) and isinstance(target.node, ast.ClassDef):
            return class_options(self.flow.lookup, target)
        if isinstance(target, External):
            return external_options(target.name, unit.place(node))
        return None

    def _class_nodes(self, unit: Unit, node: ast.expr, depth: int) -> list[tuple[Unit, ast.expr]]:
        """The classes in ``(A, B)``, ``[A, *MORE]``, ``ARGS + (B,)`` or a variable or parameter that holds such."""
        if depth > 6:
            return [(unit, node)]
        parts: list[ast.expr]
        if isinstance(node, (ast.Tuple, ast.List)):
            parts = list(node.elts)
        elif isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Starred):
            parts = [node.value]
        elif isinstance(node, ast.Call) and last_name(node.func) in ("tuple", "list") and node.args:
            parts = [node.args[0]]
        else:
            if isinstance(self.flow.resolve(unit.source, node), (Found, External)):
                return [(unit, node)]
            origins = [(u, n) for u, n in self.flow.origins(unit, node) if n is not node]
            return [pair for u, n in origins for pair in self._class_nodes(u, n, depth + 1)] or [(unit, node)]
        return [pair for part in parts for pair in self._class_nodes(unit, part, depth + 1)]

    def _fire(self, unit: Unit, call: ast.Call) -> None:
        self.line.note("fire")
        target = self.flow.resolve(unit.source, call.args[0]) if call.args else None
        if not isinstance(target, Found) or isinstance(target.node, ast.ClassDef):
            self._open(unit, call, "fire makes its options out of something that is not one function")
            return
        options, takes_any = fire_options(target)
        if takes_any:
            self._open(unit, call, "its function takes any keyword")
        for option in options:
            self.line.add(option)

    def _deepspeed(self, unit: Unit, call: ast.Call) -> None:
        for name, kind in _DEEPSPEED_OPTIONS.items():
            place = unit.place(call)
            self.line.add(Option((f"--{name}",), name, kind, place, "deepspeed", library="deepspeed"))  # type: ignore[arg-type]

    def _open(self, unit: Unit, node: ast.AST, reason: str) -> None:
        self.line.open_because.append((unit.place(node), reason))


def _keeps_unknown(call: ast.Call) -> bool:
    last = last_name(call.func)
    remaining = last == "parse_args_into_dataclasses" and _keyword_is_true(call, "return_remaining_strings")
    return remaining or last in ("parse_known_args", "parse_known_intermixed_args")


def _refuses_rest(unit: Unit, call: ast.Call) -> bool:
    """``args, rest = parser.parse_known_args()`` and then ``if rest: raise …``."""
    statement = unit.source.parents.get(id(call))
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    rest = target.elts[-1] if isinstance(target, (ast.Tuple, ast.List)) and target.elts else None
    if not isinstance(rest, ast.Name):
        return False
    tests = [node for node in unit.nodes if isinstance(node, ast.If) and last_name(node.test) == rest.id]
    return any(isinstance(inner, ast.Raise) for test in tests for inner in test.body)


def _keyword_is_true(call: ast.Call, name: str) -> bool:
    return any(k.arg == name and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def _allows_unknown(call: ast.Call) -> bool:
    """``context_settings={"ignore_unknown_options": True}`` of click and typer."""
    for keyword in call.keywords:
        if keyword.arg == "context_settings" and "ignore_unknown_options" in ast.unparse(keyword.value):
            return True
    return False
