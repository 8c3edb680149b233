"""Habits of a trainer that a LoRA run has to know of: what freezes the model, what gathers it, what picks its class."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorapatch.lora.support.option import Option
from lorapatch.lora.support.source import Place, Unit, last_name, string_of

__all__ = ["Traits", "read_traits"]

# Any of these in a trainer's saving code gathers what ZeRO-3 has spread over the ranks.
_GATHERERS = ("GatheredParameters", "_zero3_consolidated_16bit_state_dict", "consolidated_16bit_state_dict",
              "get_fp32_state_dict_from_zero_checkpoint")  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """``frozen_by``: options (attributes) under which ``requires_grad_(False)`` is called on a whole model.

    ``gathers_shards``: whether it gathers ZeRO-3's shards itself. ``path_words``: for an option that holds a path, the
    words that the trainer looks for in it to choose a class (``if "gemma" in args.model_name_or_path``).
    """

    frozen_by: dict[str, Place] = field(default_factory=dict)
    gathers_shards: bool = False
    path_words: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_traits(units: Sequence[Unit], options: dict[str, Option]) -> Traits:
    """The traits of the units that can run."""
    frozen: dict[str, Place] = {}
    words: dict[str, list[str]] = {}
    gathers = False
    for unit in units:
        gathers = gathers or any(name in unit.attribute_loads | unit.name_loads for name in _GATHERERS)
        for node in unit.nodes:
            if isinstance(node, ast.If) and (name := last_name(node.test)) in options and _freezes(node.body):
                frozen.setdefault(name, unit.place(node))
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
                name, word = _subject(node.comparators[0]), string_of(node.left)
                if word and name in options and ("path" in name or "model" in name):
                    words.setdefault(name, []).append(word)
    return Traits(frozen, gathers, {name: tuple(dict.fromkeys(found)) for name, found in words.items()})


def _subject(node: ast.expr) -> str:
    """``model_name_or_path`` of ``args.model_name_or_path.lower()`` too."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return last_name(node.func.value)
    return last_name(node)


def _freezes(body: list[ast.stmt]) -> bool:
    calls = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(
        last_name(call.func) == "requires_grad_" and any(isinstance(a, ast.Constant) and not a.value for a in call.args)
        for call in calls
    )
