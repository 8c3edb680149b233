"""A configuration of a run as far as tuning moves it: what it is in a script, and what sets it apart in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch

if TYPE_CHECKING:
    from lorapatch.lora.support import TrainerSupport

__all__ = ["Configuration", "flags_between", "read_configuration"]

Words = tuple[str, ...]
# A field, the flags that trainers have for it, and what transformers and MGM take where the script says nothing.
_PLAIN: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "micro_batch": (("per_device_train_batch_size", "per_gpu_train_batch_size"), 8),
    "accumulation": (("gradient_accumulation_steps",), 1),
    "checkpointing": (("gradient_checkpointing",), False),
    "max_length": (("model_max_length", "max_seq_length", "max_length", "cutoff_len"), None),
    "learning_rate": (("learning_rate",), 5e-5),
    "deepspeed": (("deepspeed",), None),
    "model": (("model_name_or_path", "model_name"), None),
}
_LORA: Mapping[str, tuple[str, Any]] = {
    "r": ("lora_r", 16),
    "alpha": ("lora_alpha", 32),
    "target_modules": ("lora_target_modules", None),
    "bits": ("bits", 16),
}
_TRUE = ("true", "1", "yes", "on", "")


@dataclass(frozen=True)
class Configuration:
    """``micro_batch`` samples of one GPU at once, ``accumulation`` of them a step; ``max_length`` in tokens.

    ``deepspeed`` is the path of its configuration file, ``offload`` whether that keeps states in host memory;
    ``target_modules`` names with commas (None: what the trainer takes by itself), ``model`` the folder of the language
    model. None: the script does not say.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool = False
    max_length: int | None = None
    learning_rate: float = 5e-5
    deepspeed: str | None = None
    model: str | None = None
    r: int = 16
    alpha: int = 32
    target_modules: str | None = None
    bits: int = 16
    offload: bool = False

    @property
    def samples(self) -> int:
        """Samples of one GPU in an optimizer step: its share of the global batch."""
        return self.micro_batch * self.accumulation

    @property
    def footprint(self) -> Configuration:
        """The same without its learning rate, which takes no memory and no time."""
        return replace(self, learning_rate=0.0)

    def with_micro_batch(self, micro_batch: int) -> Configuration:
        """The same global batch in pieces of another size. ``micro_batch`` has to divide it."""
        return replace(self, micro_batch=micro_batch, accumulation=self.samples // micro_batch)

    def as_dict(self) -> dict[str, Any]:
        """For tune.json; ``Configuration(**…)`` is the way back."""
        return asdict(self)

    def words(self) -> str:
        """The whole of it in a line of a table."""
        parts = [f"{self.micro_batch} × {self.accumulation}", "checkpointing" if self.checkpointing else "no checkpointing"]
        parts.append(f"r {self.r}" + (f" on {_modules(self.target_modules)}" if self.target_modules else ""))
        parts += [f"{self.bits} bit"] if self.bits != 16 else []
        parts += [f"{self.max_length} tokens"] if self.max_length else []
        parts += [_name(self.deepspeed)] if self.deepspeed else []
        return ", ".join([*parts, f"lr {self.learning_rate:g}"])

    def unlike(self, other: Configuration) -> str:
        """What it has that ``other`` has not, in words."""
        said = {
            "micro_batch": f"micro-batch {self.micro_batch} × {self.accumulation} (was {other.micro_batch} ×"
            f" {other.accumulation})",
            "checkpointing": f"gradient checkpointing {'on' if self.checkpointing else 'off'}",
            "max_length": f"at most {self.max_length} tokens a sample",
            "learning_rate": f"learning rate {self.learning_rate:g} (was {other.learning_rate:g})",
            "deepspeed": f"{_name(self.deepspeed or 'no DeepSpeed')}",
            "model": f"the model {_name(self.model or '')}",
            "r": f"r {self.r} (was {other.r})",
            "target_modules": f"LoRA on {_modules(self.target_modules or 'the modules of the trainer')}",
            "bits": f"{self.bits} bit",
        }
        changed = [name for name in said if getattr(self, name) != getattr(other, name)]
        return ", ".join(said[name] for name in changed) or "the script's own settings"


def _modules(names: str) -> str:
    short = [name.removesuffix("_proj") for name in names.split(",")]
    return "all seven modules" if len(short) == 7 else ", ".join(short)


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def read_configuration(launch: Launch, support: TrainerSupport | None) -> Configuration:
    """The configuration that ``launch`` asks for. Raises Refused for a number that only a run can tell."""
    values: dict[str, Any] = {}
    for name, (flags, default) in _PLAIN.items():
        values[name] = _value(launch, flags, default, type_of(name))
    own = support.lora_names if support is not None else {}
    for name, (canonical, default) in _LORA.items():
        flag = own.get(canonical, f"--{canonical}").lstrip("-")
        values[name] = _value(launch, (flag,), default, type_of(name))
    if values["micro_batch"] < 1 or values["accumulation"] < 1:
        raise Refused(f"line {launch.line}: micro-batch and accumulation have to be at least 1")
    return Configuration(**values)


def type_of(name: str) -> str:
    """The type of a field as it is written above: int, float, bool or str."""
    return next(str(field.type) for field in fields(Configuration) if field.name == name).partition(" ")[0]


def _value(launch: Launch, names: tuple[str, ...], default: Any, kind: str) -> Any:
    flag = launch.flag(*names)
    if flag is None:
        return default
    if flag.value is None:
        reason = next((word.reason for word in flag.values if word.value is None), "")
        raise Refused(
            f"line {flag.line}: {flag.name} {flag.text} can only be known when it runs ({reason}); write its value out"
        )
    if kind == "bool":
        return flag.value.lower() in _TRUE
    try:
        return {"int": int, "float": float, "str": str}[kind](flag.value)
    except ValueError as error:
        raise Refused(f"line {flag.line}: {flag.name} {flag.value} is not a number") from error


def flags_between(
    before: Configuration, after: Configuration, launch: Launch, support: TrainerSupport | None
) -> dict[str, Words]:
    """The flags that make ``after`` out of ``before`` in ``launch``: name without dashes to the words behind it.

    Raises Refused when the trainer has no flag for one of them.
    """
    flags: dict[str, Words] = {}
    for field in fields(Configuration):
        value = getattr(after, field.name)
        if field.name == "offload" or value == getattr(before, field.name):
            continue  # the first is what the DeepSpeed file says
        if field.name in _LORA:
            flags.update(_lora_flags(_LORA[field.name][0], _text(value), support))
        else:
            flags[_flag_name(field.name, launch, support)] = (_text(value),)
    return flags


def _lora_flags(canonical: str, text: str, support: TrainerSupport | None) -> dict[str, Words]:
    if support is None:
        return {canonical: (text,)}
    settings = support.settings(canonical, text.split(",") if canonical == "lora_target_modules" else text)
    if settings is None:
        raise Refused(f"the trainer has no flag for {canonical} {text}")
    return {setting.flag.lstrip("-"): setting.words for setting in settings}


def _flag_name(field: str, launch: Launch, support: TrainerSupport | None) -> str:
    names = _PLAIN[field][0]
    there = launch.flag(*names)
    if there is not None:
        return there.name.lstrip("-")
    for name in names:
        if support is None or support.flag(name).state != "unknown":
            return name
    raise Refused(f"the trainer has no flag for {names[0]}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        text = f"{value:.3g}"
        mantissa, mark, exponent = (f"{value:.2e}" if value < 0.001 else text).partition("e")
        return f"{float(mantissa):g}e{int(exponent)}" if mark else text
    return str(value)
