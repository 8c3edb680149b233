"""The whole of a script, so that a training that fails ends it, and stages that are done are left out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorapatch.launch.model import Launch, Script
from lorapatch.run.options import free_port, port_edit, set_options
from lorapatch.run.pin import pin_script_path
from lorapatch.run.render import Rendered, about, fill
from lorapatch.run.tree import command_node
from lorapatch.shell.edit import Edit, apply_edits
from lorapatch.shell.outline import parse

if TYPE_CHECKING:
    from tree_sitter import Node

__all__ = ["render_full"]

_BODIES = {
    "program",
    "do_group",
    "compound_statement",
    "subshell",
    "else_clause",
    "elif_clause",
    "case_item",
    "if_statement",
}
_PIPEFAIL = re.compile(rb"^[^#\n]*\bset\b[^#\n]*\bpipefail\b", re.MULTILINE)
_SHEBANG = re.compile(rb"#![^\n]*(?:\n|\Z)")


def render_full(
    script: Script,
    *,
    template: str = "full",
    target: Path | None = None,
    skip: Mapping[int, str] | None = None,
    hostfile: str | None = None,
    num_gpus: int | None = None,
) -> Rendered:
    """The whole of ``script``, to be run as ``target`` (default: NAME_full.sh beside it).

    Behind each training launch the script ends with the trainer's exit code when that is not 0, also where its output
    is piped into `tee` (whose code ``$?`` would be). A launch that names no master port takes ``$MASTER_PORT``.
    ``skip`` maps the numbers of launches that are not run again to the reason. Every other byte stays.

    The template may use script_name, script, version, shebang, body, notes. Raises Refused and UsageError as `render`
    does.
    """
    path = script.path or Path.cwd() / "script.sh"
    target = target or path.with_name(f"{path.stem}_full{path.suffix}")
    root = parse(script.source)
    edits: list[Edit] = []
    notes: list[str] = []
    has_pipefail = _PIPEFAIL.search(script.source) is not None
    for launch in script.launches:
        if not launch.stage.training:
            continue
        node = command_node(root, launch)
        if skip and launch.number in skip:
            notes.append(f"the launch on line {launch.line} is left out: {skip[launch.number]}")
            edits.append(_left_out(node, f"lorapatch: {notes[-1]}"))
            continue
        edits += set_options(launch, hostfile=hostfile if launch.launcher == "deepspeed" else None, num_gpus=num_gpus)
        edits += [edit for edit in [port_edit(launch, free_port())] if edit is not None]
        edits += _ends_with_it(script.source, node, launch, has_pipefail)
    text = apply_edits(script.source, dict.fromkeys(edits))
    shebang = _SHEBANG.match(text)
    body = pin_script_path(text[shebang.end() if shebang else 0 :], script.path, target)
    context = {
        **about(script),
        "shebang": _decode(shebang[0]).rstrip("\n") if shebang else "#!/usr/bin/env bash",
        "body": _decode(body.removesuffix(b"\n")),
        "notes": notes,
    }
    return Rendered(fill(template, context), "full", None, None, {}, tuple(notes))


def _pipeline_of(node: Node) -> Node:
    """``node`` with its redirects and what it is piped into."""
    while node.parent is not None and node.parent.type in ("pipeline", "redirected_statement"):
        node = node.parent
    return node


def _left_out(node: Node, sentence: str) -> Edit:
    pipeline = _pipeline_of(node)
    said = f"echo {shlex.quote(sentence)}".encode("utf-8", "surrogateescape")
    return Edit(pipeline.start_byte, pipeline.end_byte, said)


def _ends_with_it(source: bytes, node: Node, launch: Launch, has_pipefail: bool) -> list[Edit]:
    """`` || exit "$?"`` behind the pipeline, unless the script looks at the outcome itself or does not wait for it."""
    edits: list[Edit] = []
    while not launch.use.heredocs:
        pipeline = _pipeline_of(node)
        parent, follows = pipeline.parent, pipeline.next_sibling
        in_list = parent is not None and parent.type == "list"
        handled = in_list and _is_handled(source, pipeline)
        if parent is None or not (in_list or parent.type in _BODIES) or _is_condition(pipeline):
            break
        if follows is not None and follows.type == "&":
            break
        toggle = _is_piped(pipeline) and not has_pipefail
        before = b"set -o pipefail; " if toggle else b""
        behind = b"" if handled else b' || exit "$?"' + (b"; set +o pipefail" if toggle else b"")
        if in_list and (before or behind):
            before, behind = b"{ " + before, behind + b"; }"
        edits += [Edit(pipeline.start_byte, pipeline.start_byte, before)] if before else []
        edits += [Edit(pipeline.end_byte, pipeline.end_byte, behind)] if behind else []
        if not _is_own_process(parent):
            break
        node = parent  # `( … )`, `{ … } | tee log`: exit has only left the brackets
    return edits


def _is_handled(source: bytes, node: Node) -> bool:
    """Whether the list goes on by the outcome: ``train || retry``, ``train && break``."""
    while node.parent is not None and node.parent.type == "list":
        operator = node.next_sibling
        if operator is not None:
            following = operator.next_sibling
            words = source[following.start_byte : following.end_byte] if following is not None else b""
            if operator.type == "||" or words.split()[:1] in ([b"break"], [b"return"], [b"exit"]):
                return True
        node = node.parent
    return False


def _is_own_process(body: Node) -> bool:
    """Whether bash runs a body in a process of its own, which alone ends by an exit in it."""
    around = body.parent
    while around is not None and around.type == "redirected_statement":
        around = around.parent
    return body.type == "subshell" or (
        body.type == "compound_statement" and around is not None and around.type == "pipeline"
    )


def _is_piped(pipeline: Node) -> bool:
    first = pipeline.children[0] if pipeline.type == "redirected_statement" else pipeline
    return first.type == "pipeline"


def _is_condition(node: Node) -> bool:
    """Whether an ``if``, ``while`` or ``!`` decides by the outcome."""
    parent = node.parent
    while parent is not None and parent.type == "list":
        node, parent = parent, parent.parent
    if parent is None or parent.type not in ("if_statement", "elif_clause", "while_statement", "negated_command"):
        return False
    before = node.prev_sibling
    while before is not None and before.type != "then":
        before = before.prev_sibling
    return before is None


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
