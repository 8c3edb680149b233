"""The syntax tree of a script, and the node of a launch in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch

if TYPE_CHECKING:
    from tree_sitter import Node

__all__ = ["command_node", "start_of"]


def start_of(launch: Launch) -> int:
    """The first byte of the command that runs the launch, its environment prefix included."""
    return min(first for first, _ in (*launch.use.words, *launch.use.assignments))


def command_node(root: Node, launch: Launch) -> Node:
    """The command that runs ``launch``. Raises Refused when the tree has none there."""
    start = start_of(launch)
    node = root.descendant_for_byte_range(start, start + 1)
    while node is not None and node.type != "command":
        node = node.parent
    if node is None:
        raise Refused(
            f"line {launch.line}: the launch cannot be taken out of the script; write it as a command of its own"
        )
    return node
