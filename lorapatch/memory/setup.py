"""From a script to what its runs are made of: the RunSetup in full and with LoRA, and every assumption in words."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorapatch.errors import LorapatchError, Refused, UsageError
from lorapatch.launch.model import Launch, Script
from lorapatch.lora.flags import PatchOptions
from lorapatch.lora.lint.facts import LaunchFacts, true
from lorapatch.memory.allocator import settings
from lorapatch.memory.architecture import Language, language_in, model_folder, read_config
from lorapatch.memory.launched import patched_facts, with_flags
from lorapatch.memory.lengths import Lengths, measure_lengths
from lorapatch.memory.lora_setup import bits_of, lora_of
from lorapatch.memory.model import RunSetup, Zero
from lorapatch.memory.ranks import count_gpus
from lorapatch.memory.towers import ANY_SIZE, read_vision, vision_of
from lorapatch.memory.trainers import TRAINERS, Habits, family_of, habits_of, trainer_of
from lorapatch.memory.versions import versions_of
from lorapatch.memory.zero import read_zero, runs_in
from lorapatch.run.options import launcher_option

__all__ = ["Described", "Wanted", "describe"]

_MODEL = ("model_name_or_path", "model_name", "model_path", "model_id", "base_model", "model")
_DATA = ("data_path", "train_file", "train_data", "train_data_path", "dataset_path", "data_file", "dataset")
_LIMIT = ("model_max_length", "max_seq_length", "max_seq_len", "max_length", "cutoff_len", "block_size")


@dataclass(frozen=True)
class Wanted:
    """What the caller fixes, beside the script: see ``estimate``."""

    settings: Mapping[str, object] | None = None
    python: str | None = None
    sequence: int | None = None
    images: int | None = None
    trainer: str | None = None
    trainer_root: Path | None = None

    def __post_init__(self) -> None:
        if self.trainer is not None and self.trainer not in TRAINERS:
            raise UsageError(f"there is no trainer called {self.trainer}; choose one of {', '.join(TRAINERS)}")
        for name, least in (("sequence", 1), ("images", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name if name == 'images' else 'seq'} has to be at least {least}, not {value}")


@dataclass(frozen=True)
class Described:
    """One side: the run at the longest sample, at the median one (``low``) and at the longest there could be (``high``).

    ``assumed`` and ``not_modelled`` in words; ``sure``: whether sizes and lengths were read, none guessed.
    """

    setup: RunSetup
    low: RunSetup
    high: RunSetup
    assumed: tuple[str, ...]
    not_modelled: tuple[str, ...]
    python: str | None
    sure: bool


def describe(
    script: Script, launch: Launch, patch: PatchOptions | None, wanted: Wanted, sides: Sequence[str]
) -> dict[str, Described]:
    """The sides ("before", "after") of the run that ``launch`` describes. Raises Refused when it names no model."""
    folder = (script.path or Path.cwd() / "script").parent
    roots = [wanted.trainer_root] if wanted.trainer_root else []
    settings = dict(wanted.settings or {})
    plain = LaunchFacts(with_flags(launch, settings), folder, roots)
    trainer, guessed = (wanted.trainer, None) if wanted.trainer else trainer_of(plain)
    reader = _Reader(script, plain, wanted, str(trainer), [guessed] if guessed else [])
    found = {}
    if "before" in sides:
        found["before"] = reader.side(plain, lora=False)
    if "after" in sides:
        found["after"] = reader.side(*_with_lora(reader, launch, patch, settings, folder, roots), lora=True)
    return found


def _with_lora(
    reader: _Reader,
    launch: Launch,
    patch: PatchOptions | None,
    settings: Mapping[str, object],
    folder: Path,
    roots: Sequence[Path],
) -> tuple[LaunchFacts, Sequence[str]]:
    """The launch as it is when it has LoRA, else as `patch` would leave it."""
    own = reader.trainer != "transformers"
    switched = true(reader.facts.value("lora_enable")) if own else reader.facts.lora
    if patch is None and switched:
        return reader.facts, ()
    facts, notes = patched_facts(launch, patch or PatchOptions(), folder=folder, roots=roots, own_flags=own)
    return LaunchFacts(with_flags(facts.launch, settings), folder, roots), notes


@dataclass
class _Reader:
    """What both sides share."""

    script: Script
    facts: LaunchFacts
    wanted: Wanted
    trainer: str
    assumed: list[str]

    def side(self, facts: LaunchFacts, notes: Sequence[str] = (), *, lora: bool) -> Described:
        model = self._model(facts)
        language, config = language_in(model), _config(model)
        python = self.wanted.python or (str(facts.python) if facts.python else None)
        habits = habits_of(self.trainer, facts, versions_of(python))
        family = family_of(self.trainer, facts, config)
        assumed, sure = [*self.assumed, *language.notes, *notes], language.known
        method = "pretrain" if true(facts.value("tune_mm_mlp_adapter")) else "lora" if lora else "full"
        gpus, said = count_gpus(self.script, facts.launch)
        assumed += [said] if said else []
        zero, config_dtype, optimizer = self._deepspeed(facts, language, habits, assumed)
        micro_batch = self._micro_batch(facts, assumed)
        tower = self._tower(facts, config)
        setup = RunSetup(
            family=family, trainer=self.trainer, model=model, method=method, micro_batch=micro_batch,
            sequence=1, labels=1, vision_tower=tower, vision_tower_aux=self._folder(facts, "vision_tower_aux"),
            projector=facts.value("mm_projector_type") or str(config.get("mm_projector_type") or "linear"),
            image_size_aux=_whole(facts.value("image_size_aux"), habits.image_size_aux),
            lora=lora_of(facts, habits, self.trainer, language) if method == "lora" else None,
            bits=bits_of(facts) if method == "lora" else 16,
            double_quant=true(facts.value("double_quant") or "True"), quant_type=facts.value("quant_type") or "nf4",
            dtype=config_dtype, gradient_checkpointing=true(facts.value("gradient_checkpointing")),
            use_reentrant=_reentrant(facts, habits), accumulation=_accumulation(facts), gpus=gpus, zero=zero,
            optimizer=optimizer,
            attention=facts.value("attn_implementation") or habits.attention,
            model_max_length=_limit(facts, habits), allocator=self._allocator(facts, assumed),
        )  # fmt: skip
        if setup.attention.startswith("flash"):
            assumed.append(f"{setup.attention} is counted as PyTorch's own flash kernel")
        setup, low, high, exact = self._with_lengths(setup, facts, language, config, assumed)
        return Described(setup, low, high, tuple(dict.fromkeys(assumed)), self._not_modelled(facts), python, sure and exact)

    def _model(self, facts: LaunchFacts) -> Path:
        name = facts.value(*_MODEL)
        if not name:
            flag = facts.flag(*_MODEL)
            why = f"{flag.name} {flag.text} is known only when it runs" if flag else "the launch names no model"
            raise Refused(f"line {facts.line}: {why}; say it with --set model_name_or_path=FOLDER")
        return model_folder(name, facts.find(name)) or Path(name)

    def _folder(self, facts: LaunchFacts, flag: str) -> Path | None:
        value = facts.value(flag)
        return (model_folder(value, facts.find(value)) or facts.find(value) or Path(value)) if value else None

    def _tower(self, facts: LaunchFacts, config: Mapping[str, Any]) -> Path | None:
        inside = config.get("mm_vision_tower")
        return self._folder(facts, "vision_tower") or (Path(inside) if isinstance(inside, str) else None)

    def _deepspeed(
        self, facts: LaunchFacts, language: Language, habits: Habits, assumed: list[str]
    ) -> tuple[Zero | None, str, str]:
        """ZeRO, the type that is computed in, and the optimizer."""
        asked = "bf16" if true(facts.value("bf16")) else "fp16" if true(facts.value("fp16")) else "fp32"
        config = self._deepspeed_config(facts, assumed)
        optimizer = facts.value("optim") or habits.optimizer
        if config is None:
            return None, asked, optimizer
        zero = read_zero(config, language.hidden)
        own = isinstance(config.get("optimizer"), dict)  # DeepSpeed makes it itself, or accelerate DeepSpeed's for the CPU
        if own or (zero.offload_optimizer and "adam" in optimizer and config.get("zero_force_ds_cpu_optimizer", True)):
            optimizer = "adamw_torch_fused"  # needs no temporaries, as FusedAdam and DeepSpeedCPUAdam do not
        return zero, runs_in(config, asked), optimizer

    def _deepspeed_config(self, facts: LaunchFacts, assumed: list[str]) -> Mapping[str, Any] | None:
        value = facts.value("deepspeed", "deepspeed_config")
        flag = facts.flag("deepspeed", "deepspeed_config")
        if facts.launch.launcher == "accelerate":
            value = value or launcher_option(facts.launch, "deepspeed_config_file")
            stage = launcher_option(facts.launch, "zero_stage")
            if not value and stage and stage.isdigit():
                return {"zero_optimization": {"stage": int(stage)}}
        if not value and flag is None:
            return None
        path = facts.find(value) if value else None
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None
        except (OSError, ValueError):
            found = None
        if isinstance(found, dict):
            return found
        name = value or (flag.text if flag else "")
        stage = next((digit for digit in "320" if f"zero{digit}" in name.lower().replace("_", "")), "2")
        assumed.append(f"the DeepSpeed configuration {name} could not be read: ZeRO-{stage} with DeepSpeed's defaults")
        return {"zero_optimization": {"stage": int(stage), "offload_optimizer": _offload_named(name)}}

    def _micro_batch(self, facts: LaunchFacts, assumed: list[str]) -> int:
        given = facts.value("per_device_train_batch_size", "per_gpu_train_batch_size", "train_batch_size", "batch_size")
        found = _whole(given, 0)
        if found < 1:
            assumed.append("a micro-batch of 8, transformers' default: the launch names none that can be read")
        return found if found >= 1 else 8

    def _with_lengths(
        self, setup: RunSetup, facts: LaunchFacts, language: Language, config: Mapping[str, Any], assumed: list[str]
    ) -> tuple[RunSetup, RunSetup, RunSetup, bool]:
        """The setup at its longest, its median and its longest possible sample."""
        image_tokens = _image_tokens(setup, config, assumed)
        lengths, why = self._lengths(setup, facts, language, image_tokens)
        limit = min(setup.model_max_length, language.positions if setup.family != "mgm" else setup.model_max_length)
        if self.wanted.sequence is not None:
            images = self._images(setup, lengths)
            labels = lengths.labels(setup.micro_batch) if lengths else max(self.wanted.sequence - images * image_tokens, 1)
            if setup.family == "causal_lm" and lengths is None:
                labels = self.wanted.sequence
            fixed = replace(setup, sequence=self.wanted.sequence, labels=min(labels, self.wanted.sequence), images=images)
            return fixed, fixed, fixed, True
        if lengths is None:
            images = self._images(setup, None)
            assumed.append(f"samples of {limit} tokens, the longest allowed: {why}; say --seq")
            longest = replace(setup, sequence=limit, labels=max(limit - images * image_tokens, 1), images=images)
            short = max(min(limit, 512 + images * image_tokens) // 2, 1)
            return longest, replace(longest, sequence=short, labels=min(short, longest.labels)), longest, False
        assumed.append(f"lengths from {lengths.how}: p50 {lengths.p50}, p99 {lengths.p99}, longest {lengths.longest}")
        images = self._images(setup, lengths)
        labels = max(min(lengths.labels(setup.micro_batch), lengths.longest), 1)
        longest = replace(setup, sequence=lengths.longest, labels=labels, images=images,
                          lengths=_spread(lengths, images * image_tokens))  # fmt: skip
        median = replace(longest, sequence=lengths.p50, labels=max(min(lengths.labels_mean, lengths.p50), 1))
        if lengths.whole and lengths.exact:
            return longest, median, longest, True
        most = min(limit, round(1.25 * lengths.longest))
        return longest, median, replace(longest, sequence=most), lengths.exact

    def _images(self, setup: RunSetup, lengths: Lengths | None) -> int:
        if setup.family == "causal_lm":
            return 0
        if self.wanted.images is not None:
            return self.wanted.images
        return lengths.images if lengths is not None else 1

    def _lengths(
        self, setup: RunSetup, facts: LaunchFacts, language: Language, image_tokens: int
    ) -> tuple[Lengths | None, str]:
        name = facts.value(*_DATA)
        path = facts.find(name) if name else None
        if path is None or not path.is_file():
            return None, f"{name} is not here" if name else "the launch names no data file"
        if self.wanted.images is not None and self.wanted.sequence is not None:
            return None, "both are given"
        version = facts.value("version") or language.kind
        try:
            return measure_lengths(path, setup.model if setup.model.is_dir() else None, version=version,
                                   image_tokens=image_tokens, limit=setup.model_max_length), ""  # fmt: skip
        except LorapatchError as error:
            return None, str(error)

    def _not_modelled(self, facts: LaunchFacts) -> tuple[str, ...]:
        found = []
        if facts.value("fsdp"):
            found.append("FSDP: every GPU is counted as if it held the whole model")
        if true(facts.value("use_liger_kernel")):
            found.append("Liger kernels: the logits that they never make are counted")
        return tuple(found)

    def _allocator(self, facts: LaunchFacts, assumed: list[str]) -> str:
        """What the launch, the script or the environment says to PyTorch's allocator."""
        for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            own = next((word for key, word in facts.launch.environment if key == name), None)
            said = own or self.script.value(f"${name}", facts.launch.start) or os.environ.get(name)
            if not said:
                continue
            try:
                settings(str(said))
            except UsageError as error:
                assumed.append(f"{error}; PyTorch's defaults are counted")
                continue
            return str(said)
        return ""


def _spread(lengths: Lengths, images: int) -> tuple[int, ...]:
    """Quantiles of the samples, each with ``images`` tokens of images at least; empty where all are alike."""
    found = tuple(max(length, images + 2) for length in lengths.quantiles)
    return found if found[0] < found[-1] else ()


def _config(model: Path) -> Mapping[str, Any]:
    return read_config(model) if (model / "config.json").is_file() else {}


def _reentrant(facts: LaunchFacts, habits: Habits) -> bool:
    given = facts.value("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
    try:
        return bool(json.loads(given).get("use_reentrant", habits.use_reentrant)) if given else habits.use_reentrant
    except (ValueError, AttributeError):
        return habits.use_reentrant


def _accumulation(facts: LaunchFacts) -> int:
    return max(_whole(facts.value("gradient_accumulation_steps"), 1), 1)


def _limit(facts: LaunchFacts, habits: Habits) -> int:
    found = _whole(facts.value(*_LIMIT), habits.model_max_length)
    return found if found > 0 else habits.model_max_length


def _image_tokens(setup: RunSetup, config: Mapping[str, Any], assumed: list[str]) -> int:
    """Tokens of one image in the language model's sequence."""
    if setup.family == "causal_lm":
        return 0
    given = config.get("image_seq_length") or config.get("mm_tokens_per_image")
    if isinstance(given, int):
        return given
    try:
        if setup.family == "image_text":
            tower = vision_of(config, str(setup.model))
        elif setup.vision_tower is not None:
            tower = read_vision(setup.vision_tower)
        else:
            raise Refused("the launch names no vision tower")
    except Refused as refusal:
        assumed.append(f"576 tokens an image: {refusal}")
        return 576
    if tower.merge > 1:
        assumed.append(f"{tower.tokens} tokens an image: the model takes any size, here {ANY_SIZE} x {ANY_SIZE} pixels")
    return tower.tokens


def _offload_named(name: str) -> Mapping[str, str]:
    return {"device": "cpu"} if "offload" in name.lower() else {"device": "none"}


def _whole(value: object, default: int) -> int:
    try:
        return int(float(str(value))) if value is not None else default
    except (ValueError, OverflowError):
        return default
