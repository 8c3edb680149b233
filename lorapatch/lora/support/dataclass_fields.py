"""The command-line options that HfArgumentParser makes of a dataclass, read from its source."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, replace

from lorapatch.lora.support.lookup import External, Found, Lookup, library_class
from lorapatch.lora.support.option import Kind, Option
from lorapatch.lora.support.source import Place, SourceFile, dotted_name, string_of
from lorapatch.lora.support.transformers_fields import is_training_arguments
from lorapatch.lora.support.trl_fields import trl_options

__all__ = ["ClassOptions", "annotation_kind", "class_options", "external_options"]

_DEPTH = 12


@dataclass
class ClassOptions:
    """``options`` by attribute; ``training_arguments``: transformers' own on top; ``unread``: bases out of reach."""

    options: dict[str, Option] = field(default_factory=dict)
    training_arguments: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)


def class_options(lookup: Lookup, found: Found, library: str | None = None, depth: int = 0) -> ClassOptions:
    """The options of a dataclass and of its bases, the class's own over its bases'."""
    result = ClassOptions()
    if depth > _DEPTH:
        return result
    for base in reversed(found.node.bases if isinstance(found.node, ast.ClassDef) else []):
        _merge(result, _base_options(lookup, found.source, base, library, depth))
    if isinstance(found.node, ast.ClassDef) and _is_dataclass(found.node):
        for statement in found.node.body:
            option = _field_option(found.source, found.node.name, statement)
            if option:
                result.options[option.dest] = replace(option, library=library)
    return result


def external_options(name: str, place: Place, depth: int = 0) -> ClassOptions:
    """The options of a library's dataclass: transformers' by table, any other read where it is installed."""
    if is_training_arguments(name):
        return ClassOptions(training_arguments={name.rpartition(".")[2]})
    installed = library_class(name)
    if installed:
        return class_options(*installed, library=name, depth=depth + 1)
    known = trl_options(name, place)
    if known is not None:
        return ClassOptions(options=known)
    if name.startswith("trl.") and name.endswith("Config"):
        return ClassOptions(training_arguments={"TrainingArguments"}, unread=[name])
    return ClassOptions(unread=[name])


def _base_options(lookup: Lookup, source: SourceFile, base: ast.expr, library: str | None, depth: int) -> ClassOptions:
    name = dotted_name(base)
    target = lookup.resolve(source, name) if name else None
    if isinstance(target, Found):
        return class_options(lookup, target, library, depth + 1)
    if isinstance(target, External):
        return external_options(target.name, Place(source.path, base.lineno), depth)
    if name in ("object", "ABC", "Protocol", "Generic"):
        return ClassOptions()
    return ClassOptions(unread=[name or ast.unparse(base)])


def _merge(into: ClassOptions, other: ClassOptions) -> None:
    into.options.update(other.options)
    into.training_arguments |= other.training_arguments
    into.unread += other.unread


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = [dotted_name(d.func if isinstance(d, ast.Call) else d) or "" for d in node.decorator_list]
    return any(name.rpartition(".")[2] == "dataclass" for name in names)


def _field_option(source: SourceFile, owner: str, statement: ast.stmt) -> Option | None:
    if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
        return None
    annotation = ast.unparse(statement.annotation)
    call = statement.value if isinstance(statement.value, ast.Call) else None
    keywords = {k.arg: k.value for k in call.keywords if k.arg} if call else {}
    if "ClassVar" in annotation or _is_false(keywords.get("init")):
        return None
    name = statement.target.id
    spellings = [f"--{name}"]
    if "_" in name:
        spellings.append(f"--{name.replace('_', '-')}")
    spellings += _aliases(keywords)
    default = keywords.get("default") or keywords.get("default_factory") if call else statement.value
    kind = annotation_kind(statement.annotation)
    if kind == "bool" and default is not None and ast.unparse(default) == "True":
        spellings += [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
    return Option(
        spellings=tuple(dict.fromkeys(spellings)),
        dest=name,
        kind=kind,
        place=Place(source.path, statement.lineno),
        declared_in=owner,
        default=ast.unparse(default) if default is not None else None,
        choices=_literal_choices(statement.annotation),
    )


def annotation_kind(annotation: ast.expr | None) -> Kind:
    """How a value of this type is given on the command line; the first type of a union that is not None or str."""
    if annotation is None:
        return "str"
    text = string_of(annotation) or ast.unparse(annotation)
    words = [word for word in _type_words(text) if word not in ("Optional", "Union", "None", "Annotated", "str")]
    first = words[0].lower() if words else "str"
    kinds: dict[str, Kind] = {"bool": "bool", "int": "int", "float": "float", "list": "list", "sequence": "list"}
    return kinds.get(first, "str")


def _type_words(text: str) -> list[str]:
    cleaned = "".join(c if c.isalnum() or c in "_." else " " for c in text)
    return [word.rpartition(".")[2] for word in cleaned.split()]


def _literal_choices(annotation: ast.expr) -> tuple[str, ...]:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and (dotted_name(node.value) or "").endswith("Literal"):
            return tuple(str(c.value) for c in ast.walk(node.slice) if isinstance(c, ast.Constant))
    return ()


def _aliases(keywords: dict[str, ast.expr]) -> list[str]:
    """``HfArg(aliases=…)`` and ``field(metadata={"aliases": …})``."""
    value = keywords.get("aliases")
    metadata = keywords.get("metadata")
    if isinstance(metadata, ast.Dict):
        pairs = zip(metadata.keys, metadata.values, strict=True)
        value = next((v for k, v in pairs if string_of(k) == "aliases"), value)
    if value is None:
        return []
    return [text for text in map(string_of, ast.walk(value)) if text]


def _is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False
