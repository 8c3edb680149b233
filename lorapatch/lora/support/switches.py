"""What turns LoRA on in a trainer: the flags under which its LoRA code runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from lorapatch.lora.support.conditions import Condition
from lorapatch.lora.support.flow import Flow
from lorapatch.lora.support.lora_flags import LoraFlag, known_option, lora_flag, other_part
from lorapatch.lora.support.option import Option
from lorapatch.lora.support.origins import Origins
from lorapatch.lora.support.peft_use import Applied, PeftUse
from lorapatch.lora.support.source import Unit, last_name, string_of

__all__ = ["find_switches"]


def find_switches(flow: Flow, use: PeftUse, options: dict[str, Option]) -> tuple[list[LoraFlag], str]:
    """What turns LoRA on, and in words why: several flags must all be set; none with a reason means it is always on.

    An empty reason: nothing on the command line turns it on.
    """
    origins = Origins(flow, options)
    found = [s for applied in use.applied for c in applied.conditions.tests for s in _switches_in(origins, c, applied)]
    found.sort(key=lambda flag: (other_part(flag.name), flag.style == "rank", flag.style in ("off", "absent")))
    if found and not other_part(found[0].name):
        return found[:1], found[0].because
    option = known_option("lora_enable", options)
    if option and option.kind in ("bool", "switch"):
        return [lora_flag(option, "by its name", "lora_enable")], "by its name"
    if use.trl_config and "use_peft" in options:
        because = f"TRL's get_peft_config at {use.trl_config[0].place}"
        return [lora_flag(options["use_peft"], because, "lora_enable")], because
    chosen = [*_registered(flow, use, options), *_compared_with_lora(flow, options)]
    if chosen:
        by_name: dict[str, LoraFlag] = {}
        for flag in chosen:
            if flag.name not in by_name or flag.word == "lora":  # rather than "qlora" and the like
                by_name[flag.name] = flag
        return list(by_name.values()), "its value is compared with a word for LoRA"
    free = next((applied for applied in use.applied if applied.conditions.free), None)
    return [], f"{free.call.name} at {free.call.place} runs in any case" if free else ""


def _switches_in(origins: Origins, condition: Condition, applied: Applied) -> Iterator[LoraFlag]:
    """The LoRA switches in a test; those that must be off have the style "off" or "absent"."""
    test, holds = condition.test, condition.holds
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _switches_in(origins, Condition(condition.unit, test.operand, not holds), applied)
        return
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _switches_in(origins, Condition(condition.unit, value, holds), applied)
        return
    must = "" if holds else "not "
    because = f"{applied.call.name} at {applied.call.place} runs under `{must}{ast.unparse(test)}`"
    if isinstance(test, ast.Compare) and len(test.comparators) == 1:
        yield from _compared(origins, condition, test, because)
        return
    origin = origins.of(condition.unit, test)
    for name in origin.options if origin.kind == "flag" else ():
        yield from _plain(origins.options[name], because, holds)


def _plain(option: Option, because: str, holds: bool) -> Iterator[LoraFlag]:
    """``if args.use_lora``, ``if args.lora_rank``, ``if not args.full_finetuning``."""
    if option.kind in ("bool", "switch") and not holds and "full" in option.dest:
        yield LoraFlag(option.name, "absent" if option.kind == "switch" else "off", option.place, because)
    elif not holds or not _about_lora(option.dest):
        return
    elif option.kind in ("bool", "switch"):
        yield lora_flag(option, because, "lora_enable")
    elif option.kind == "int":
        yield LoraFlag(option.name, "rank", option.place, because)


def _compared(origins: Origins, condition: Condition, test: ast.Compare, because: str) -> Iterator[LoraFlag]:
    """``args.peft == "lora"``, ``args.lora_rank > 0``, ``args.use_lora is True``, and ``!=`` where it must not hold."""
    origin = origins.of(condition.unit, test.left)
    option = origins.options[origin.options[0]] if origin.kind == "flag" else None
    if option is None:
        return
    right, operator = test.comparators[0], test.ops[0]
    word = _lora_word(right)
    equal = (ast.Eq, ast.In) if condition.holds else (ast.NotEq, ast.NotIn)
    above = (ast.Gt, ast.NotEq) if condition.holds else (ast.LtE, ast.Eq)
    if isinstance(operator, equal) and word:
        yield LoraFlag(option.name, "choice", option.place, because, word)
    elif isinstance(operator, above) and _is_zero(right) and _about_lora(option.dest):
        yield LoraFlag(option.name, "rank", option.place, because)
    elif isinstance(right, ast.Constant) and isinstance(right.value, bool):
        yield from _plain(option, because, condition.holds == right.value)


def _compared_with_lora(flow: Flow, options: dict[str, Option]) -> Iterator[LoraFlag]:
    """Options that running code compares with the word "lora", but for those of the model's other parts."""
    for unit in flow.units:
        for node in unit.nodes:
            if not (isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.In))):
                continue
            option = options.get(last_name(node.left))
            word = _lora_word(node.comparators[0])
            if option and word and not other_part(option.dest):
                yield LoraFlag(
                    option.name, "choice", option.place, f"compared with {word!r} at {unit.place(node)}", word
                )


def _registered(flow: Flow, use: PeftUse, options: dict[str, Option]) -> Iterator[LoraFlag]:
    """A class kept under a word for LoRA (``@register("lora")``), and the option by which one is picked."""
    for applied in use.applied:
        definition = applied.unit.source.definitions.get(applied.unit.owner or applied.unit.name)
        for decorator in definition.decorator_list if definition else []:
            if not (isinstance(decorator, ast.Call) and decorator.args):
                continue
            word = _lora_word(decorator.args[0])
            registry = flow.resolve(applied.unit.source, decorator.func)
            for caller, call in _picks(flow, getattr(registry, "source", None)) if word else ():
                option = next((options[n] for a in call.args if (n := last_name(a)) in options), None)
                if option:
                    yield LoraFlag(option.name, "choice", option.place, f"picked at {caller.place(call)}", word)


def _picks(flow: Flow, registry: object) -> Iterator[tuple[Unit, ast.Call]]:
    """Calls of the functions that stand beside the registering decorator."""
    for unit in flow.units:
        for call in unit.calls:
            target = flow.resolve(unit.source, call.func) if call.args else None
            if target is not None and registry is not None and getattr(target, "source", None) is registry:
                yield unit, call


def _lora_word(node: ast.expr) -> str | None:
    """ "lora" itself, if it is among the constants, else the first that has it in it."""
    words = [text for text in map(string_of, ast.walk(node)) if text and "lora" in text.lower()]
    return next((word for word in words if word.lower() == "lora"), words[0] if words else None)


def _about_lora(name: str) -> bool:
    return any(word in name.lower() for word in ("lora", "peft", "adapter"))


def _is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 0
