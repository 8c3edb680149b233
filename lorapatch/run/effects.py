"""What a statement of a script sets and looks at: variables, functions, the environment, files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tree_sitter import Node

__all__ = [
    "ALWAYS",
    "ARGUMENTS",
    "COMPOUND",
    "STATEMENTS",
    "assignments",
    "assigned",
    "effects",
    "field_text",
    "is_control",
    "is_test",
    "program",
    "text",
    "uses",
    "written_file",
]

# What changes the environment of everything behind it, whatever variables it names.
_ENVIRONMENT = {"cd", "pushd", "popd", "source", ".", "ulimit", "unset", "umask", "shopt", "module", "ml", "alias"}
_ACTIVATES = {"conda", "mamba", "micromamba", "pyenv", "nvm", "spack"}
_ACTIVATIONS = (b"activate", b"deactivate", b"shell", b"load", b"use")
_HOOK = re.compile(rb"conda|mamba|pyenv|direnv|spack|modulecmd|ssh-agent")
_READS = {b"read", b"mapfile", b"readarray", b"getopts", b"let"}
# Variables that are the environment's even when the script does not export them, and the one that splits words.
ALWAYS = {b"PATH", b"PYTHONPATH", b"LD_LIBRARY_PATH", b"HOME", b"TMPDIR", b"IFS"}
ARGUMENTS = b"@"  # stands for $1, $2 … in the sets of names
_CONTROL = {b"break", b"continue", b"exit", b"return", b"shift", b"set", b":", b"true", b"false", b"echo", b"printf"}
_TESTS = {b"[", b"test", b"grep", b"command", b"type", b"hash", b"true", b"false", b"which"}
COMPOUND = {
    "if_statement", "for_statement", "c_style_for_statement", "while_statement", "case_statement", "compound_statement",
}  # fmt: skip
_PARTS = {"program", "do_group", "else_clause", "elif_clause", "case_item", "command_substitution"}
STATEMENTS = COMPOUND | {
    "command", "declaration_command", "variable_assignment", "variable_assignments", "redirected_statement", "list",
    "pipeline", "negated_command", "test_command", "unset_command", "subshell", "function_definition",
}  # fmt: skip
_USED = re.compile(rb"\$\{?[#!]?([A-Za-z_]\w*)")
_POSITIONAL = re.compile(rb"\$(?:\{[#!]?[0-9@*#]|[0-9@*#])|\bgetopts\b")
_ARITHMETIC = re.compile(rb"\(\((.*?)\)\)|\blet\s+([^\n;]*)", re.DOTALL)
_DECLARED = re.compile(rb"(?:export|readonly|declare|typeset)\s+(.*)", re.DOTALL)
_EXPORTS = re.compile(rb"export\b|(?:declare|typeset)\s+-\w*x")
_NAME = re.compile(rb"[A-Za-z_]\w*")
_CALLED = re.compile(rb"(?<![\w$./-])[A-Za-z_][\w-]*(?![\w=./-])")
_DEFAULT = re.compile(rb"\$\{([A-Za-z_]\w*):?=")


def text(source: bytes, node: Node) -> bytes:
    """The bytes of a node."""
    return source[node.start_byte : node.end_byte]


def field_text(source: bytes, node: Node, name: str) -> bytes:
    """The bytes of a node's field; empty when it has none."""
    child = node.child_by_field_name(name)
    return text(source, child) if child is not None else b""


def program(source: bytes, node: Node) -> bytes:
    """The first word of a command."""
    return field_text(source, node, "name")


def assignments(node: Node) -> list[Node]:
    """The assignments in a statement of nothing but assignments, or before a command."""
    if node.type == "variable_assignment":
        return [node]
    return [child for child in node.named_children if child.type == "variable_assignment"]


def assigned(source: bytes, assignment: Node) -> bytes:
    """The name that an assignment sets, for ``A[0]=1`` that of the array."""
    match = _NAME.match(field_text(source, assignment, "name"))
    return match[0] if match else b""


def effects(source: bytes, node: Node) -> tuple[set[bytes], bool]:
    """The names that a statement may set, and whether it changes the environment of what follows."""
    kind = node.type
    sets = {match[1] for match in _DEFAULT.finditer(text(source, node))} if kind not in COMPOUND else set()
    if kind == "variable_assignment":
        return sets | {assigned(source, node)}, False
    if kind == "declaration_command":
        names = {text(source, child) for child in node.named_children if child.type == "variable_name"}
        names |= {assigned(source, part) for part in assignments(node)}
        return sets | names, _EXPORTS.match(text(source, node)) is not None
    if kind == "unset_command":
        return sets, True
    if kind == "command":
        return _command_effects(source, node, sets)
    if kind == "test_command" and text(source, node).startswith(b"(("):
        return sets | set(_NAME.findall(text(source, node))), False
    environment = False
    if kind in STATEMENTS | _PARTS and kind not in ("subshell", "function_definition", "pipeline"):
        for child in node.named_children:
            more, also = effects(source, child)
            sets, environment = sets | more, environment or also
        if kind == "for_statement":
            sets |= {text(source, name) for name in node.children_by_field_name("variable")}
    return sets, environment


def _command_effects(source: bytes, node: Node, sets: set[bytes]) -> tuple[set[bytes], bool]:
    first = program(source, node)
    name = first.decode("utf-8", "replace")
    words = [text(source, child) for child in node.children_by_field_name("argument")]
    if first == b"set":
        return (sets | {ARGUMENTS}, False) if words[:1] == [b"--"] else (sets, True)
    if first == b"shift":
        return sets | {ARGUMENTS}, False
    if first in _READS or (first == b"printf" and words[:1] == [b"-v"]):
        return sets | {found for word in words for found in _NAME.findall(word)} | {b"OPTARG"}, False
    if name in _ENVIRONMENT:
        return sets, True
    if name in _ACTIVATES:
        return sets, bool(words) and words[0] in _ACTIVATIONS
    if first == b"eval":
        hook = bool(words) and words[0].lstrip(b"\"'").startswith((b"$(", b"`"))
        return sets, hook and _HOOK.search(b" ".join(words)) is not None
    return sets, False


def uses(written: bytes) -> set[bytes]:
    """The names that a text may look at: variables, ``$1`` and its like, and functions (with ``()``)."""
    names = {match[1] for match in _USED.finditer(written)}
    for inner in _ARITHMETIC.finditer(written):
        names |= set(_NAME.findall(inner[0]))
    if _POSITIONAL.search(written):
        names.add(ARGUMENTS)
    if match := _DECLARED.match(written):
        names |= {word for word in match[1].split() if _NAME.fullmatch(word)}
    return names | {word + b"()" for word in _CALLED.findall(written)}


def written_file(source: bytes, node: Node) -> bytes:
    """The file that ``echo``, ``printf`` or ``cat <<EOF`` writes for a later command to read; empty for others."""
    if node.type != "redirected_statement" or program(source, node.children[0]) not in (b"echo", b"printf", b"cat"):
        return b""
    # Behind `<<EOF` the grammar counts further redirects to the here-document.
    parts = [part for child in node.named_children for part in (child, *child.named_children)]
    for part in parts:
        if part.type == "file_redirect" and re.match(rb"1?>", text(source, part)):
            return field_text(source, part, "destination").strip(b"\"'")
    return b""


def is_test(source: bytes, node: Node) -> bool:
    """Whether a statement is run for its exit code alone."""
    if node.type in ("negated_command", "list"):
        return all(is_test(source, part) for part in node.named_children)
    return node.type == "test_command" or (node.type == "command" and program(source, node) in _TESTS)


def is_control(source: bytes, node: Node) -> bool:
    """Whether a statement only says where to go on, or a word to the user: ``exit 1``, ``{ echo no; exit 1; }``."""
    if node.type == "compound_statement":
        return all(is_control(source, part) for part in node.named_children if part.type in STATEMENTS)
    if node.type == "redirected_statement":
        return text(source, node).rstrip().endswith(b"&2") and is_control(source, node.children[0])
    return node.type == "command" and program(source, node) in _CONTROL
