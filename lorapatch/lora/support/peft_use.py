"""What a trainer does with PEFT: where it builds and applies LoRA, from what, and under which condition."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from lorapatch.lora.support.conditions import Condition, Conditions, conditions_of
from lorapatch.lora.support.flow import Flow
from lorapatch.lora.support.lookup import External, Found
from lorapatch.lora.support.option import Option
from lorapatch.lora.support.origins import Origin, Origins
from lorapatch.lora.support.source import Place, Unit, last_name

__all__ = ["Applied", "Call", "PeftUse", "read_peft_use"]

_CONFIGS = ("LoraConfig", "QLoraConfig", "AdaLoraConfig", "LoHaConfig")
_APPLIES = ("get_peft_model", "inject_adapter_in_model")
_INPUT_GRADS = ("enable_input_require_grads", "make_inputs_require_grad", "prepare_model_for_kbit_training",
                "prepare_model_for_int8_training")  # fmt: skip
_TRAINERS = ("Trainer", "Seq2SeqTrainer", "SFTTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "GRPOTrainer",
             "RewardTrainer", "PPOTrainer")  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A call of interest; ``arguments`` by keyword."""

    name: str
    place: Place
    arguments: dict[str, Origin] = field(default_factory=dict)


@dataclass(frozen=True)
class Applied:
    """LoRA put on the model: where, whether through PEFT, what must hold for it to run, and the unit it stands in."""

    call: Call
    unit: Unit
    conditions: Conditions
    through_peft: bool = True


@dataclass
class PeftUse:
    """``configs``: LoRA configurations built, under ``config_conditions``.

    ``applied``: what puts LoRA on the model, through PEFT or by itself.
    ``trl_config``: calls of TRL's ``get_peft_config``. ``input_grads``: what gradient checkpointing needs under LoRA.
    ``trainers``: transformers' Trainer, or a subclass, being made.
    """

    configs: list[Call] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)
    input_grads: list[Call] = field(default_factory=list)
    trl_config: list[Call] = field(default_factory=list)
    trainers: list[Call] = field(default_factory=list)
    config_conditions: Conditions = Conditions((), True)


def read_peft_use(flow: Flow, options: dict[str, Option]) -> PeftUse:
    """PEFT calls in the units that can run. ``options`` are the trainer's, by attribute."""
    origins = Origins(flow, options)
    use = PeftUse()
    ways = []
    for unit, call in flow.calls_named(*_CONFIGS):
        use.configs.append(Call(last_name(call.func), unit.place(call), origins.keywords(unit, call)))
        ways.append(conditions_of(flow, unit, call))
    if ways:
        tests = tuple(dict.fromkeys(test for way in ways for test in way.tests))
        use.config_conditions = Conditions(tests, any(way.free for way in ways))
    for unit, call in flow.calls_named(*_APPLIES):
        arguments = origins.keywords(unit, call)
        if "r" in arguments:  # unsloth's get_peft_model takes LoraConfig's keywords itself
            use.configs.append(Call(last_name(call.func), unit.place(call), arguments))
        _applied(flow, use, unit, call, last_name(call.func))
    for unit in flow.units:
        for call in unit.calls:
            _other_call(flow, use, unit, call)
    use.input_grads += [Call(last_name(c.func), u.place(c)) for u, c in flow.calls_named(*_INPUT_GRADS)]
    return use


def _other_call(flow: Flow, use: PeftUse, unit: Unit, call: ast.Call) -> None:
    name = last_name(call.func)
    keywords = {k.arg: k.value for k in call.keywords}
    peft_config = keywords.get("peft_config")
    if peft_config is not None and name not in _APPLIES and not _is_none(peft_config):
        _applied(flow, use, unit, call, f"{name}(peft_config=…)")
    elif name == "add_adapter" and (call.args or keywords) and use.configs:
        _applied(flow, use, unit, call, name)
    if name == "get_peft_config" and isinstance(flow.resolve(unit.source, call.func), External):
        use.trl_config.append(Call(name, unit.place(call)))
    elif name == "register_forward_hook" and any("require" in last_name(a) for a in call.args):
        use.input_grads.append(Call(name, unit.place(call)))
    elif _is_own_lora(name) and isinstance(flow.resolve(unit.source, call.func), Found):
        conditions = conditions_of(flow, unit, call)
        use.applied.append(Applied(Call(name, unit.place(call)), unit, conditions, through_peft=False))
    if _is_trainer(flow, unit, call.func, 0):
        use.trainers.append(Call(name, unit.place(call)))


def _is_own_lora(name: str) -> bool:
    """``convert_linear_layer_to_lora``, ``apply_lora``, ``LoRALinear`` …, not savers, loaders or printers."""
    lowered = name.lower()
    makes = "lora" in lowered and any(
        word in lowered for word in ("convert", "apply", "inject", "add", "replace", "wrap", "layer", "linear")
    )
    return makes and not any(
        word in lowered for word in ("save", "load", "state", "print", "find", "merge", "config", "lora_to_")
    )


def _is_trainer(flow: Flow, unit: Unit, node: ast.expr, depth: int) -> bool:
    """transformers' or TRL's Trainer, or a class of the project made from one."""
    target = flow.resolve(unit.source, node)
    if isinstance(target, External):
        top, _, rest = target.name.partition(".")
        return top in ("transformers", "trl", "peft") and rest.rpartition(".")[2] in _TRAINERS
    if isinstance(target, Found) and isinstance(target.node, ast.ClassDef) and depth < 6:
        return any(_is_trainer(flow, target.source.top, base, depth + 1) for base in target.node.bases)
    return False


def _applied(flow: Flow, use: PeftUse, unit: Unit, call: ast.Call, name: str) -> None:
    conditions = conditions_of(flow, unit, call)
    keyword = next((k.value for k in call.keywords if "config" in (k.arg or "")), None)
    config = call.args[1] if len(call.args) > 1 else keyword
    chosen = []
    for where, origin in flow.origins(unit, config) if config is not None else ():
        if isinstance(origin, ast.IfExp):  # LoraConfig(…) if args.use_peft else None
            chosen.append(Condition(where, origin.test))
    if chosen:
        conditions = Conditions((*chosen, *conditions.tests), False)
    if not use.config_conditions.free:  # where no configuration is built, there is none to apply
        conditions = Conditions((*conditions.tests, *use.config_conditions.tests), False)
    use.applied.append(Applied(Call(name, unit.place(call)), unit, conditions))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
