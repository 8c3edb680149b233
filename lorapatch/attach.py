"""LoRA for a trainer that has none: ``python -m lorapatch.attach [-m] TRAINER FLAGS…`` runs it, with LoRA on its model.

The trainer is run as python would run it and stays as it is. What it trains has to go through transformers' Trainer or a
subclass (one process a rank; not ``torch.multiprocessing.spawn``): before that is made, LoRA is put into the model in
place, so the trainer's own references to the model, its class and its forward stay what they were. How the trainer reads
its command line does not matter: the flags of ``FLAGS`` are taken out of ``sys.argv``, and argparse (HfArgumentParser,
TrlParser …) gets those back that a parser declares itself. A trainer that builds LoRA of its own keeps it; what it has no
flag for (target modules, rank, variant …) is set in its LoraConfig.

LoRA goes onto linear layers that the trainer would have trained, never onto vision or audio towers, projectors or heads.
Projectors and heads that the trainer trains stay trainable; ``--lora_also_train REGEX`` names others.

Saved is an adapter, whichever way the trainer saves: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT
writes them, ``non_lora_trainables.bin`` for the other trainable parameters (names as LLaVA writes them).

One file, on purpose: stdlib, torch, transformers >= 4.38 and peft >= 0.4. Nothing of them is imported before the trainer
imports it, for a trainer may set up its environment first.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import argparse
import functools
import importlib.abc
import importlib.util
import inspect
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["FLAGS", "main"]

FLAGS = (
    "lora_enable",  # False: the trainer runs as it is
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_bias",  # none, all, lora_only
    "lora_target_modules",  # names with commas or blanks between them, all-linear, or a regular expression for full paths
    "lora_variant",  # lora, rslora, dora, pissa
    "lora_plus_ratio",  # LoRA+ (https://arxiv.org/abs/2402.12354): learning rate of B over that of A
    "lora_also_train",  # regular expression: further parameters that stay trainable, if the trainer trains them
)
_DEFAULTS = {"r": "16", "alpha": "32", "dropout": "0.1", "bias": "none", "target_modules": "all-linear", "variant": "lora"}
# The release of PEFT that brought a variant.
_SINCE = {"rslora": "0.7", "dora": "0.9", "pissa": "0.11"}
_FLAG = re.compile(r"--?[A-Za-z]")
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
# Parts of a multimodal model that LoRA on its language model leaves alone, by the names in a module's path.
_TOWER = re.compile(
    r"(^|[._])(vision|visual|vit|clip|siglip|image|img|audio|speech|video|whisper)([._]|$)|tower|convnext|(^|[._])mm_",
    re.IGNORECASE,
)
_BRIDGE = re.compile(r"projector|connector|merger|resampler|perceiver|abstractor|qformer|vlm_uni|(^|\.)mlp1\.", re.IGNORECASE)
_NEW_HEAD = re.compile(r"(^|\.)(score|classifier|v_head|value_head|qa_outputs)(\.|$)")  # it starts at random
_HEAD = re.compile(rf"(^|\.)(lm_head|embed_out)(\.|$)|{_NEW_HEAD.pattern}")
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
_PREFIX = "base_model.model."  # what PEFT puts before the names of the model's own parameters
_OTHERS = "non_lora_trainables.bin"
_WRAPPED = ("module", "_fsdp_wrapped_module", "_orig_mod")  # what DDP and DeepSpeed, FSDP, torch.compile call the model


def main() -> None:
    """Run the trainer that the command line names; ends as the trainer ends, or with 2 or 3 and one sentence."""
    launcher, module, trainer, words = split_command(sys.argv[1:])
    flags, rest = take_flags(words)
    attachment = Attachment(Flags(flags))
    sys.argv = [trainer, *launcher, *rest]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.getcwd() if module else os.path.dirname(os.path.realpath(trainer))
    attachment.watch()
    try:
        if module:
            runpy.run_module(trainer, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(trainer, run_name="__main__")
    except BaseException as end:
        if not isinstance(end, SystemExit) or end.code not in (None, 0):
            attachment.rescue(end)
            raise
    attachment.finish()


def split_command(words: Sequence[str]) -> tuple[list[str], bool, str, list[str]]:
    """(options that the launcher put in front, whether the trainer is a module, the trainer, the words behind it).

    DeepSpeed's launcher and torch's old one put ``--local_rank=N`` between the program and its words.
    """
    rest = list(words)
    launcher: list[str] = []
    while rest and rest[0].startswith("--local"):
        launcher.append(rest.pop(0))
    module = rest[:1] == ["-m"]
    if module:
        rest.pop(0)
    if not rest or rest[0].startswith("-"):
        _refuse("which trainer? python -m lorapatch.attach train.py --flags, or -m package.module --flags", 2)
    if not module and not Path(rest[0]).exists():
        _refuse(f"the trainer {rest[0]} does not exist", 2)
    return launcher, module, rest[0], rest[1:]


def take_flags(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Our flags by name, each with its own words (``["--lora_r", "16"]``; the last one counts), and all other words."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    current, room = rest, 0
    for word in words:
        if _FLAG.match(word):
            name, equals, _ = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            current = rest
            if name in FLAGS:
                current = found[name] = []
                room = 1 if equals else 1 << 16 if name == "lora_target_modules" else 2
        elif current is not rest and len(current) >= room:
            current = rest
        current.append(word)
    return found, rest


def _refuse(sentence: str, code: int = 3) -> NoReturn:
    """End the process. SystemExit, so that no ``except Exception`` of a trainer takes it for one of its own errors."""
    rank = int(os.environ.get("RANK") or 0)
    print(f"lorapatch attach: {f'rank {rank}: ' if rank else ''}{sentence}", file=sys.stderr, flush=True)
    raise SystemExit(code)


class Flags:
    """Our flags as they were given: name to its own words; names without ``lora_`` in the methods."""

    def __init__(self, words: Mapping[str, list[str]]) -> None:
        self.words = dict(words)

    def text(self, name: str) -> str | None:
        """A flag's value as it was given; None if it was not."""
        words = self.words.get(f"lora_{name}")
        if words is None:
            return None
        head, *values = words
        return head.partition("=")[2] if "=" in head else ",".join(values)

    def value(self, name: str) -> str:
        """A flag's value, or its default."""
        given = self.text(name)
        return _DEFAULTS[name] if given is None else given

    def number(self, name: str, kind: type[int] | type[float], low: float, high: float = float("inf")) -> Any:
        """A flag's value as a number from ``low`` up, below ``high``; refuses any other."""
        text = self.value(name)
        try:
            number = kind(text)
        except ValueError:
            number = None
        if number is None or not low <= number < high:
            _refuse(f"--lora_{name} {text}: {'a whole number' if kind is int else 'a number'} from {low:g} up is needed", 2)
        return number

    @property
    def enabled(self) -> bool:
        """Whether there is to be LoRA."""
        text = self.text("enable")
        return text is None or text.lower() in ("", "true", "1", "yes", "on")

    @property
    def variant(self) -> str:
        """lora, rslora, dora or pissa."""
        variant = self.value("variant")
        if variant not in ("lora", *_SINCE):
            _refuse(f"--lora_variant {variant}: there are lora, {', '.join(_SINCE)}", 2)
        return variant

    def config_values(self, names: Iterable[str]) -> dict[str, Any]:
        """What the flags ``names`` (without ``lora_``) say, as LoraConfig's fields; target modules are not among them."""
        values: dict[str, Any] = {}
        for name in names:
            if name == "r":
                values["r"] = self.number("r", int, 1)
            elif name == "alpha":
                values["lora_alpha"] = self.number("alpha", int, 1)
            elif name == "dropout":
                values["lora_dropout"] = self.number("dropout", float, 0, 1)
            elif name == "bias":
                values["bias"] = self.value("bias")
                if values["bias"] not in ("none", "all", "lora_only"):
                    _refuse(f"--lora_bias {values['bias']}: there are none, all, lora_only", 2)
            elif name == "variant" and self.variant != "lora":
                values.update(_variant_fields(self.variant))
        return values


class Attachment:
    """LoRA on one trainer's model: the flags it was given, the model it went into, what is to be saved of it."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.declared: set[str] = set()  # those that a parser of the trainer took
        self.seen = False  # a Trainer was made
        self.model: Any = None
        self.config: Any = None
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the parameters to be saved, by the model's own names
        self.resized = False  # the trainer changed the model's vocabulary
        self.first: dict[str, Any] = {}  # PiSSA's first values, by the same names
        self.args: Any = None
        self.state: Any = None  # the Trainer's
        self.kept: tuple[int, dict[str, Any]] | None = None  # step, and the trainable parameters at it, on the CPU
        self.unsaved = False  # trained, and no adapter written since
        self.alarm: Any = None  # a hook on optimizers, until a Trainer is made
        self.quiet = False  # PEFT's own classes are used by us, or to load an adapter

    # -- watching the trainer ----------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Be there when a parser parses, and when transformers' Trainer and PEFT have been imported."""
        parse = argparse.ArgumentParser.parse_known_args

        @functools.wraps(parse)
        def parse_known_args(parser: Any, args: Any = None, namespace: Any = None) -> Any:
            return parse(parser, self.words_for(parser, args), namespace)

        argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign,assignment]
        _after_import("transformers.trainer", self.hook_trainer)
        _after_import("peft", self.hook_peft)
        _after_import("torch.optim.optimizer", self.hook_optimizers)

    def words_for(self, parser: argparse.ArgumentParser, args: Sequence[str] | None) -> Sequence[str] | None:
        """The words to parse, with those of our flags that the parser declares. Lists of the trainer's own stay."""
        line = sys.argv[1:]
        if args is not None and not (args and set(args) <= set(line)):
            return args
        spelled = {text.lstrip("-").replace("-", "_") for text in parser._option_string_actions if text.startswith("--")}
        own = [name for name in self.flags.words if name in spelled]
        self.declared.update(own)
        return [*(line if args is None else args), *(word for name in own for word in self.flags.words[name])]

    def hook_optimizers(self, module: Any) -> None:
        """Stop a trainer that trains without a Trainer at its first step, not at its end."""

        def _step(*_: Any) -> None:
            self.made()
            if not self.seen and self.flags.enabled:
                _refuse("the trainer makes no transformers.Trainer, so nothing gets LoRA")

        self.alarm = module.register_optimizer_step_pre_hook(_step)

    def made(self) -> None:
        """Take the alarm away."""
        if self.alarm is not None:
            self.alarm.remove()
            self.alarm = None

    def hook_trainer(self, module: Any) -> None:
        """Put ourselves before and behind the methods of transformers' Trainer that make, save and load a model."""
        cls = module.Trainer
        self.hook_making(cls)
        self.hook_logging(cls)
        self.hook_resizing(sys.modules["transformers.modeling_utils"].PreTrainedModel)
        self.hook_saving(cls, module)
        self.hook_loading(cls, module)

    def hook_making(self, cls: Any) -> None:
        init = cls.__init__
        names = list(inspect.signature(init).parameters)[1:]  # some releases take further, deprecated ones by name

        @functools.wraps(init)
        def __init__(trainer: Any, *args: Any, **named: Any) -> None:
            given = {**dict(zip(names, args)), **named}
            model, make = given.get("model"), given.get("model_init")
            if model is not None and hasattr(model, "named_parameters"):
                self.adopt(model, given.get("args"))
            elif make is not None:
                given["model_init"] = functools.wraps(make)(lambda *a: self.adopt(make(*a), given.get("args")))
            init(trainer, **given)
            self.follow(trainer)

        cls.__init__ = __init__

    def hook_logging(self, cls: Any) -> None:
        """Numbers into the log where there are tensors of one: they would stop the trainer's state from being written.

        transformers before 4.39 logs the gradient norm as DeepSpeed gives it, which is a tensor in newer releases.
        """
        log = cls.log

        @functools.wraps(log)
        def _log(trainer: Any, logs: dict[str, Any], *args: Any, **named: Any) -> None:
            if self.model is not None:
                for name, value in logs.items():  # in place: Trainer goes on with this dict
                    if getattr(value, "ndim", None) == 0:
                        logs[name] = value.item()
            log(trainer, logs, *args, **named)

        cls.log = _log

    def hook_resizing(self, cls: Any) -> None:
        """Remember which models got another vocabulary: their embeddings are no longer those of the base on the disk."""
        resize = cls.resize_token_embeddings

        @functools.wraps(resize)
        def _resize(model: Any, *args: Any, **named: Any) -> Any:
            before = _shape(model.get_input_embeddings().weight)
            done = resize(model, *args, **named)
            if _shape(model.get_input_embeddings().weight) != before:
                model._lorapatch_resized = True
            return done

        cls.resize_token_embeddings = _resize

    def hook_saving(self, cls: Any, module: Any) -> None:
        save_model, save, keep = cls.save_model, cls._save, cls._save_optimizer_and_scheduler
        pretrained = sys.modules["transformers.modeling_utils"].PreTrainedModel
        save_pretrained = pretrained.save_pretrained

        @functools.wraps(save_model)
        def _save_model(trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
            if not self.holds(trainer.model):
                return save_model(trainer, output_dir, _internal_call)  # type: ignore[no-any-return]
            self.keep(trainer)
            if trainer.args.should_save:
                assert self.kept is not None
                trainer._save(output_dir or trainer.args.output_dir, state_dict=self.kept[1])
            if trainer.args.push_to_hub and not _internal_call:
                trainer.push_to_hub(commit_message="Model save")
            return None

        @functools.wraps(save)
        def _save(trainer: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
            if not self.holds(trainer.model) or isinstance(self.model, pretrained):
                return save(trainer, output_dir, state_dict)  # type: ignore[no-any-return]
            import torch

            folder = Path(output_dir or trainer.args.output_dir)  # Trainer would write all of a plain module
            self.write(folder, state_dict)
            torch.save(trainer.args, folder / "training_args.bin")
            return None

        @functools.wraps(save_pretrained)
        def _save_pretrained(model: Any, save_directory: Any, *args: Any, **named: Any) -> Any:
            if model is not self.model or self.config is None:
                return save_pretrained(model, save_directory, *args, **named)
            main = args[0] if args else named.get("is_main_process", self.args is None or self.args.should_save)
            if main:
                self.write(Path(save_directory), named.get("state_dict", args[1] if len(args) > 1 else None))
            return None

        @functools.wraps(keep)
        def _keep(trainer: Any, output_dir: str) -> None:
            engine = trainer.model_wrapped
            store = getattr(engine, "save_checkpoint", None)
            if self.holds(trainer.model) and store and "exclude_frozen_parameters" in inspect.signature(store).parameters:
                if not isinstance(store, functools.partial):  # frozen weights come from the base model again
                    engine.save_checkpoint = functools.partial(store, exclude_frozen_parameters=True)
            keep(trainer, output_dir)

        cls.save_model, cls._save, cls._save_optimizer_and_scheduler = _save_model, _save, _keep
        pretrained.save_pretrained = _save_pretrained

    def hook_loading(self, cls: Any, module: Any) -> None:
        train, load, load_best = cls.train, cls._load_from_checkpoint, cls._load_best_model
        load_engine = module.deepspeed_load_checkpoint

        @functools.wraps(train)
        def _train(trainer: Any, resume_from_checkpoint: Any = None, *args: Any, **named: Any) -> Any:
            asked = getattr(trainer.args, "resume_from_checkpoint", None)
            if resume_from_checkpoint is None and self.holds(trainer.model) and asked and asked.lower() != "false":
                resume_from_checkpoint = True if asked.lower() == "true" else asked  # few trainers pass it on
            try:
                done = train(trainer, resume_from_checkpoint, *args, **named)
            except Exception:
                if 0 < trainer.state.max_steps <= trainer.state.global_step:  # its last checkpoint, its last evaluation
                    self.ended(trainer, alone=True)
                raise
            self.ended(trainer)
            return done

        @functools.wraps(load)
        def _load(trainer: Any, resume_from_checkpoint: str, model: Any = None) -> Any:
            if not self.holds(trainer.model) or trainer.is_fsdp_enabled:
                return load(trainer, resume_from_checkpoint, model)
            return self.load(Path(resume_from_checkpoint))

        @functools.wraps(load_best)
        def _load_best(trainer: Any) -> Any:
            if not self.holds(trainer.model) or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
                return load_best(trainer)
            return self.load(Path(trainer.state.best_model_checkpoint))

        @functools.wraps(load_engine)
        def _load_engine(engine: Any, checkpoint_path: str, **named: Any) -> Any:
            if self.config is None:
                return load_engine(engine, checkpoint_path, **named)
            self.check(Path(checkpoint_path))
            done = load_engine(engine, checkpoint_path, load_module_strict=False)  # the frozen weights are not in there
            if self.first or self.resized:  # what is frozen and yet not the base model's
                self.load(Path(checkpoint_path))
            return done

        cls.train, cls._load_from_checkpoint, cls._load_best_model = _train, _load, _load_best
        module.deepspeed_load_checkpoint = _load_engine

    def hook_peft(self, module: Any) -> None:
        """Set what was asked for in a LoraConfig of the trainer's own, the moment it goes onto a model."""
        lora = module.tuners.lora.LoraModel
        init, from_pretrained = lora.__init__, module.PeftModel.from_pretrained.__func__
        save_pretrained = module.PeftModel.save_pretrained

        @functools.wraps(init)
        def __init__(tuner: Any, model: Any, config: Any, *args: Any, **named: Any) -> None:
            if not self.quiet:
                for one in list(config.values()) if isinstance(config, dict) else [config]:
                    self.override(one, model)
            init(tuner, model, config, *args, **named)

        @functools.wraps(from_pretrained)
        def _from_pretrained(cls: Any, *args: Any, **named: Any) -> Any:
            quiet, self.quiet = self.quiet, True  # an adapter that is there stays what it is
            try:
                return from_pretrained(cls, *args, **named)
            finally:
                self.quiet = quiet

        @functools.wraps(save_pretrained)
        def _save_pretrained(model: Any, *args: Any, **named: Any) -> Any:
            done = save_pretrained(model, *args, **named)
            self.unsaved = self.unsaved and model is not self.model
            return done

        lora.__init__ = __init__
        module.PeftModel.from_pretrained = classmethod(_from_pretrained)
        module.PeftModel.save_pretrained = _save_pretrained

    def override(self, config: Any, model: Any) -> None:
        """Set in the trainer's own ``config`` what the command line asks for and the trainer has no flag for."""
        asked = [name.removeprefix("lora_") for name in self.flags.words if name not in self.declared]
        values = self.flags.config_values(asked)
        if "pissa" in str(values.get("init_lora_weights")):
            _refuse("--lora_variant pissa: the trainer saves its LoRA itself, without PiSSA's part of the base weights")
        if "target_modules" in asked:
            values["target_modules"] = compact(model, targets(model, self.flags.value("target_modules"), frozen=True))
        for name, value in values.items():
            setattr(config, name, set(value) if isinstance(value, list) else value)
        if values and int(os.environ.get("RANK") or 0) == 0:
            said = ", ".join(f"{name} {value}" for name, value in values.items())
            print(f"lorapatch attach: the trainer's own LoRA gets {said}", flush=True)

    # -- the model ---------------------------------------------------------------------------------------------------

    def holds(self, model: Any) -> bool:
        """Whether ``model``, however it is wrapped by now, is the one that LoRA was put into."""
        while self.config is not None and model is not None:
            if model is self.model:
                return True
            model = next((model._modules[name] for name in _WRAPPED if name in model._modules), None)
        return False

    def adopt(self, model: Any, args: Any) -> Any:
        """LoRA into ``model`` (once), in place; what learns is said on standard output. Returns ``model``."""
        if model is self.model:
            return model
        self.seen = True
        self.made()
        limit_memory(args)
        if not self.flags.enabled:
            return model
        own = any(".lora_" in name for name, _ in model.named_parameters())
        self.model, self.args, self.config, self.kept, self.first = model, args, None, None, {}
        if not own:
            self.inject(model, args)
        if checkpoints(model, args):
            require_input_grads(model)
        self.shapes = {name: _shape(p) for name, p in model.named_parameters() if p.requires_grad}
        self.resized = self.config is not None and getattr(model, "_lorapatch_resized", False)
        if self.resized:  # PEFT saves them then, too
            heads = [model.get_input_embeddings(), model.get_output_embeddings()]
            weights = [head.weight for head in heads if head is not None]
            named = ((name, p) for name, p in model.named_parameters() if any(p is weight for weight in weights))
            self.shapes.update((name, _shape(p)) for name, p in named)
        if not any("lora_" in name for name in self.shapes):
            _refuse("the trainer froze its own LoRA, so nothing of it would learn")
        if getattr(args, "process_index", 0) == 0:
            print(json.dumps(self.announcement()), flush=True)
        return model

    def inject(self, model: Any, args: Any) -> None:
        """LoRA layers beside the target modules; everything else frozen, but what is to stay trainable."""
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        before = {name for name, p in model.named_parameters() if p.requires_grad}
        chosen = targets(model, self.flags.value("target_modules"))
        modules = dict(model.named_modules())
        weights = [modules[path].weight for path in chosen]
        values = self.flags.config_values(["r", "alpha", "dropout", "bias", "variant"])
        if self.flags.variant == "pissa" and (_is_partitioned(weights[0]) or not weights[0].is_floating_point()):
            _refuse("--lora_variant pissa needs whole weights of 16 bits or more: not ZeRO-3, and no quantization")
        conv = type(modules[chosen[0]]).__name__ == "Conv1D"
        config = LoraConfig(target_modules=compact(model, chosen), fan_in_fan_out=conv, **values)
        self.quiet = True
        try:
            tuner = LoraModel(model, {"default": config}, "default")
        finally:
            self.quiet = False
        model.peft_config = tuner.peft_config
        model._hf_peft_config_loaded = True  # what transformers' add_adapter says of a model with LoRA in it
        self.config = config
        also = self.flags.text("also_train")
        sharded = bool(getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None) or _is_fsdp(args))
        dtype = weights[0].dtype
        for name, p in model.named_parameters():
            plain = name.replace(".base_layer.", ".")
            if "lora_" in name:
                # DeepSpeed and FSDP put parameters of one type together, and keep the float32 copies themselves.
                p.data = p.data.to(dtype) if sharded and dtype.is_floating_point else p.data.float()
            elif not name.endswith(".base_layer.weight") and plain in before and (
                _BRIDGE.search(plain) or _NEW_HEAD.search(plain) or (also and _search(also, plain))
            ):
                p.requires_grad = True
            elif p.requires_grad and plain not in before:
                p.requires_grad = False  # PEFT's bias="all" also means the towers'
        if self.flags.variant == "pissa":
            pairs = ((n, p) for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n)
            self.first = {name: p.detach().cpu().float().clone() for name, p in pairs}

    def announcement(self) -> dict[str, Any]:
        """The JSON line: how many parameters there are, how many learn, which modules carry LoRA."""
        named = dict(self.model.named_parameters())
        lora = {name: p for name, p in named.items() if ".lora_" in name}
        paths = [name.split(".lora_A")[0] for name in lora if ".lora_A" in name]
        config = self.config or next(iter(self.model.peft_config.values()))
        return {
            "lorapatch": "lora",
            "trainable": sum(_numel(p) for p in named.values() if p.requires_grad),
            "total": sum(_numel(p) for p in named.values()),
            "lora": sum(_numel(p) for p in lora.values()),
            "tensors": len(lora),
            "modules": list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)),
            "r": config.r,
            "alpha": config.lora_alpha,
        }

    def follow(self, trainer: Any) -> None:
        """Everything that happens with one Trainer from now on: its optimizer, its samples, its speed."""
        self.seen = True
        self.made()
        if not self.flags.enabled or self.model is None:
            return
        self.args, self.state = trainer.args, trainer.state
        speed = speed_callback()
        create, step, save = trainer.create_optimizer, trainer.training_step, trainer._save_checkpoint

        def create_optimizer(*args: Any, **named: Any) -> Any:
            optimizer = create(*args, **named) or trainer.optimizer
            self.retarget(optimizer)
            return optimizer

        def training_step(model: Any, inputs: Any, *args: Any, **named: Any) -> Any:
            speed.samples += _batch_size(inputs)
            return step(model, inputs, *args, **named)

        def save_checkpoint(*args: Any, **named: Any) -> None:
            began = time.perf_counter()
            save(*args, **named)
            speed.pause += time.perf_counter() - began

        trainer.create_optimizer, trainer.training_step = create_optimizer, training_step
        trainer._save_checkpoint = save_checkpoint
        trainer.add_callback(speed)
        if trainer.optimizer is not None:  # made by the trainer before LoRA was there
            self.retarget(trainer.optimizer)
        elif self.flags.text("plus_ratio") and _optimizer_of_deepspeed(trainer):
            _refuse("--lora_plus_ratio: the optimizer stands in the DeepSpeed configuration; take it out there, so that"
                    " Trainer makes it")  # fmt: skip

    def retarget(self, optimizer: Any) -> None:
        """Let ``optimizer`` hold what is trainable and nothing else, B's learning rate by LoRA+ if that was asked for."""
        groups = getattr(optimizer, "param_groups", None)
        if self.config is None and not self.flags.text("plus_ratio") or not groups or optimizer.state:
            return
        named = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        held = set()
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
            held.update(group["params"])
        missing = [p for p, name in named.items() if p not in held and "lora_" in name]
        if missing:
            groups[0]["params"] += missing
        if len(groups) > 1 and not all(group["params"] for group in groups) and not self.scheduled(groups):
            groups[:] = [group for group in groups if group["params"]]
        ratio = self.flags.text("plus_ratio")
        if ratio is not None:
            self.speed_up(groups, named, self.flags.number("plus_ratio", float, 1))

    @staticmethod
    def scheduled(groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a scheduler knows these groups already: then their number has to stay."""
        return any("initial_lr" in group for group in groups)

    @staticmethod
    def speed_up(groups: list[dict[str, Any]], named: Mapping[Any, str], ratio: float) -> None:
        for group in list(groups):
            fast = [p for p in group["params"] if ".lora_B." in named.get(p, "")]
            if fast:
                group["params"] = [p for p in group["params"] if ".lora_B." not in named.get(p, "")]
                more = {**group, "params": fast, "lr": group["lr"] * ratio}
                groups.append(more)
        groups[:] = [group for group in groups if group["params"]]

    # -- what is saved and loaded ------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return int(getattr(self.state, "global_step", 0))

    def ended(self, trainer: Any, alone: bool = False) -> None:
        """Training is over: keep what it trained until that is on the disk. ``alone``: other ranks may be elsewhere."""
        own = self.config is None and trainer.model is self.model  # LoRA of the trainer's own, which it saves itself
        if not own and not self.holds(trainer.model):
            return
        self.state, self.kept, self.unsaved = trainer.state, None, True  # the best checkpoint may have been loaded
        fsdp = _is_fsdp(trainer.args)
        together = fsdp or any(_is_partitioned(p) for p in self.model.parameters() if p.requires_grad)
        if not (own and fsdp) and not (alone and together):
            self.keep(trainer)  # all ranks are here; what the trainer saves from one alone comes later

    def keep(self, trainer: Any) -> None:
        """Gather the trainable parameters on the CPU; called on every rank."""
        self.state = trainer.state
        if self.kept is not None and self.kept[0] == self.step:
            return
        state: dict[str, Any] = {}
        if _is_fsdp(trainer.args):
            whole = trainer.accelerator.get_state_dict(trainer.model)
            state = self.picked(whole) or {} if trainer.args.should_save else {}
        else:
            for name, p in self.model.named_parameters():
                if name in self.shapes:
                    with _gathered(p):
                        if trainer.args.should_save:
                            state[name] = p.detach().cpu().clone()
        self.kept = self.step, state

    def picked(self, state_dict: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Our parameters from a state dict of the trainer's; None unless it has all of them, whole."""
        wrapped = re.compile(rf"(^|\.)({'|'.join(_WRAPPED)})\.")
        clean = {wrapped.sub(r"\1", name): tensor for name, tensor in (state_dict or {}).items()}
        found = {name: clean[name] for name in self.shapes if name in clean and tuple(clean[name].shape) == self.shapes[name]}
        return found if len(found) == len(self.shapes) else None

    def write(self, folder: Path, state_dict: Mapping[str, Any] | None = None) -> None:
        """The adapter's files in ``folder``, from the trainer's state dict if that has all of it."""
        state = self.picked(state_dict)
        if state is None and self.kept is not None and self.kept[0] == self.step:
            state = self.kept[1]
        if state is None:
            live = {name: p for name, p in self.model.named_parameters() if name in self.shapes}
            if any(_is_partitioned(p) for p in live.values()):
                _refuse(f"{folder} cannot be written: under ZeRO-3 one rank alone does not have the adapter; call"
                        " trainer.save_model() on all of them")  # fmt: skip
            state = {name: p.detach().cpu() for name, p in live.items()}
        biases = self.config.bias != "none"
        adapter = {n: t for n, t in state.items() if "lora_" in n or (biases and n.endswith("bias"))}
        others = {_PREFIX + name: tensor for name, tensor in state.items() if name not in adapter}
        folder.mkdir(parents=True, exist_ok=True)
        self.write_adapter(folder, {name: tensor.contiguous() for name, tensor in adapter.items()})
        if others:
            import torch

            _replace(folder / _OTHERS, lambda path: torch.save(others, path))
        if hasattr(getattr(self.model, "config", None), "save_pretrained"):
            self.model.config.save_pretrained(str(folder))
        self.unsaved = False

    def write_adapter(self, folder: Path, tensors: dict[str, Any]) -> None:
        import copy

        import torch
        from peft import PeftModel

        config = copy.deepcopy(self.config)
        config.inference_mode = True
        base = getattr(self.model, "config", None)
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or getattr(base, "_name_or_path", None)
        config.task_type = next((task for part, task in _TASKS.items() if part in type(self.model).__name__), None)
        if self.first:  # the difference to the base as it is on the disk: s (BA - B₀A₀), an adapter of twice the rank
            for name, first in self.first.items():
                down = ".lora_A." in name
                both = [tensors[name].float(), first if down else -first]
                tensors[name] = torch.cat(both, dim=0 if down else 1).to(tensors[name].dtype)
            config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
        plain = {_peft_name(name): tensor for name, tensor in tensors.items()}
        if "safe_serialization" in inspect.signature(PeftModel.save_pretrained).parameters:
            from safetensors.torch import save_file

            _replace(folder / "adapter_model.safetensors", lambda path: save_file(plain, path, metadata={"format": "pt"}))
        else:
            _replace(folder / "adapter_model.bin", lambda path: torch.save(plain, path))
        config.save_pretrained(str(folder))

    def check(self, folder: Path) -> None:
        """Refuse a checkpoint that is not one of LoRA of this rank."""
        file = folder / "adapter_config.json"
        if not file.is_file():
            _refuse(f"{folder} holds no adapter, it is of a full fine-tuning: give --output_dir another name, or move it away")
        r = json.loads(file.read_text(encoding="utf-8")).get("r")
        here = self.config.r * (2 if self.first else 1)
        if r != here:
            _refuse(f"{folder} is of LoRA of rank {r}, this run has rank {here}: give --output_dir another name, or move it"
                    " away")  # fmt: skip

    def load(self, folder: Path) -> None:
        """Put what :meth:`write` wrote back into the model."""
        import torch

        self.check(folder)
        written = _read_tensors(folder)
        if (folder / _OTHERS).is_file():
            written.update(torch.load(folder / _OTHERS, map_location="cpu", weights_only=True))
        parameters = {name: p for name, p in self.model.named_parameters() if name in self.shapes}
        missing = [name for name in parameters if _peft_name(name) not in written]
        if missing:
            _refuse(f"{folder} does not fit this run: it has no {missing[0]}; were other modules trained?")
        if self.first:
            self.rebase(written)
        with torch.no_grad():
            for name, p in parameters.items():
                tensor = written[_peft_name(name)]
                with _gathered(p, modify=True):
                    if p.numel() and tuple(p.shape) != tuple(tensor.shape):
                        _refuse(f"{folder} does not fit this run: {name} is {tuple(tensor.shape)} there, {tuple(p.shape)} here")
                    if p.numel():
                        p.copy_(tensor)

    def rebase(self, written: dict[str, Any]) -> None:
        """Split the base weights as PiSSA had split them in the run that wrote ``written``."""
        import torch

        modules = dict(self.model.named_modules())
        with torch.no_grad():
            for path in {name.split(".lora_")[0] for name in self.first}:
                a, b = f"{path}.lora_A.default.weight", f"{path}.lora_B.default.weight"
                new_a, first_a = written[_peft_name(a)].float().chunk(2, dim=0)
                new_b, first_b = written[_peft_name(b)].float().chunk(2, dim=1)
                layer = modules[path]
                weight, scale = layer.base_layer.weight, layer.scaling["default"]
                change = scale * (self.first[b] @ self.first[a] + first_b @ first_a)  # first_b was written negative
                weight.add_((change.T if self.config.fan_in_fan_out else change).to(weight.device, weight.dtype))
                self.first[a], self.first[b] = first_a.clone(), -first_b
                written[_peft_name(a)], written[_peft_name(b)] = new_a, new_b

    def finish(self) -> None:
        """After the trainer: was there a Trainer, and is what it trained on the disk?"""
        if not self.seen and self.flags.enabled:
            _refuse("the trainer has ended and made no transformers.Trainer, so nothing got LoRA")
        if not self.unsaved or self.config is None or self.kept is None or not self.args.should_save:
            return
        folder = Path(self.args.output_dir)
        self.write(folder, self.kept[1])
        print(f"lorapatch attach: the trainer saved in a way of its own; the adapter is in {folder}", flush=True)

    def rescue(self, error: BaseException) -> None:
        """The trainer fails behind its training: write what was kept, if nothing is on the disk; never raises.

        Nothing is gathered here, for the other ranks may be anywhere: under ZeRO-3 and FSDP there is something to write
        only if ``trainer.train`` came to its end, where all of them were.
        """
        if not self.unsaved or not self.args.should_save:
            return
        folder = Path(self.args.output_dir)
        said = f"after training the trainer failed ({type(error).__name__})"
        try:
            if self.kept is None:
                said += "; its adapter is not saved, for under ZeRO-3 and FSDP that takes all ranks: see the last checkpoint"
            else:
                (self.write if self.config is not None else self.write_own)(folder, self.kept[1])
                said += f"; the adapter is in {folder}"
        except Exception as failure:
            said += f"; its adapter cannot be saved in {folder} ({failure})"
        print(f"lorapatch attach: {said}", file=sys.stderr, flush=True)

    def write_own(self, folder: Path, state: Mapping[str, Any]) -> None:
        """The files of the trainer's own LoRA, as LLaVA's trainer and its like write them."""
        import torch

        self.model.save_pretrained(str(folder), state_dict=dict(state))
        others = {name: tensor for name, tensor in state.items() if "lora_" not in name}
        if others:
            _replace(folder / _OTHERS, lambda path: torch.save(others, path))
        if hasattr(getattr(self.model, "config", None), "save_pretrained"):
            self.model.config.save_pretrained(str(folder))


# -- which modules ---------------------------------------------------------------------------------------------------


def linear_layers(model: Any, frozen: bool = False) -> dict[str, Any]:
    """Full path to linear layer (nn.Linear, its quantized kinds, GPT-2's Conv1D) that the trainer would have trained.

    Left out are frozen ones unless ``frozen`` (quantized ones are frozen by nature), heads, towers and projectors; in a
    model that is nothing else, such as a vision model by itself, the towers are what there is.
    """
    import torch

    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and module is not head
        and not _HEAD.search(name)
        and (frozen or module.weight.requires_grad or not module.weight.is_floating_point())
    }
    language = {name: module for name, module in found.items() if not _TOWER.search(name) and not _BRIDGE.search(name)}
    return language or found


def targets(model: Any, wanted: str, frozen: bool = False) -> list[str]:
    """The full paths of the modules that ``--lora_target_modules`` means; ``frozen``: see :func:`linear_layers`."""
    layers = list(linear_layers(model, frozen))
    if not layers:
        _refuse("the trainer has frozen every linear layer of its model, so nothing is left for LoRA")
    if wanted == "all-linear":
        return layers
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if names and all(_NAME.fullmatch(name) for name in names):
        for name in names:
            if not any(f".{path}".endswith(f".{name}") for path in layers):
                there = ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in layers))
                _refuse(f"--lora_target_modules: no linear layer that could be trained is called {name}; there are {there}", 2)
        return [path for path in layers if any(f".{path}".endswith(f".{name}") for name in names)]
    chosen = [path for path in layers if _search(f"(?:{wanted})\\Z", path, match=True)]
    if not chosen:
        _refuse(f"--lora_target_modules {wanted!r} matches none of the {len(layers)} linear layers, {layers[0]} for one", 2)
    return chosen


def compact(model: Any, chosen: Sequence[str]) -> list[str] | str:
    """``chosen`` as LoraConfig's target_modules: leaf names if they mean no other module, else an expression for the paths.

    A list of full paths would not do: PEFT takes them for the ends of paths.
    """
    everything = [name for name, _ in model.named_modules()]
    leaves = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in chosen))
    meant = {name for name in everything if name.rsplit(".", 1)[-1] in leaves}
    if meant == set(chosen):
        return leaves
    shapes = dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "\0", path) for path in chosen)
    pattern = "|".join(re.escape(shape).replace("\0", r"\d+") for shape in shapes)
    if {name for name in everything if re.fullmatch(pattern, name)} == set(chosen):
        return pattern
    return "|".join(re.escape(path) for path in chosen)


def _search(pattern: str, text: str, *, match: bool = False) -> bool:
    try:
        return (re.match if match else re.search)(pattern, text) is not None
    except re.error as error:
        _refuse(f"{pattern!r} is no regular expression ({error})", 2)


def _variant_fields(variant: str) -> dict[str, Any]:
    """LoraConfig's fields for a variant; refuses what the installed PEFT does not have."""
    import peft

    fields = peft.LoraConfig.__dataclass_fields__
    name = {"rslora": "use_rslora", "dora": "use_dora", "pissa": "init_lora_weights"}[variant]
    there = name in fields
    if variant == "pissa":
        there = "pissa" in inspect.getsource(sys.modules[peft.LoraConfig.__module__])
    if not there:
        _refuse(f"--lora_variant {variant} needs peft {_SINCE[variant]} or newer, here is {peft.__version__}: pip install -U"
                " peft, or leave the flag out")  # fmt: skip
    return {name: "pissa_niter_16" if variant == "pissa" else True}


# -- gradients and memory --------------------------------------------------------------------------------------------


def checkpoints(model: Any, args: Any) -> bool:
    """Whether activations are computed again: by the flag, switched on in the model, or written into its forward."""
    if getattr(args, "gradient_checkpointing", False):
        return True
    for module in model.modules():
        forward = getattr(type(module).forward, "__wrapped__", type(module).forward)
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        if getattr(module, "gradient_checkpointing", False) is True or "checkpoint" in names:
            return True
    return False


def require_input_grads(model: Any) -> None:
    """Let the embeddings' output want gradients: a checkpointed layer with frozen inputs would learn nothing."""
    import torch

    if hasattr(model, "enable_input_require_grads"):
        try:
            model.enable_input_require_grads()
            return
        except (AttributeError, NotImplementedError):  # a model that does not say where its embeddings are
            pass

    def want(_module: Any, _inputs: Any, output: Any) -> None:
        output.requires_grad_(True)

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.register_forward_hook(want)


def limit_memory(args: Any) -> None:
    """A share of the GPU's memory, set from outside, that this process may not pass."""
    fraction = os.environ.get("LORAPATCH_MEMORY_FRACTION")
    if not fraction:
        return
    import torch

    if torch.cuda.is_available():
        try:
            torch.cuda.set_per_process_memory_fraction(float(fraction), getattr(args, "device", None))
        except ValueError:
            _refuse(f"LORAPATCH_MEMORY_FRACTION={fraction}: a number from 0 to 1 is needed", 2)


def _optimizer_of_deepspeed(trainer: Any) -> bool:
    plugin = getattr(trainer.args, "deepspeed_plugin", None) or getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return "optimizer" in (getattr(plugin, "deepspeed_config", None) or {})


def _is_fsdp(args: Any) -> bool:
    return bool(getattr(args, "fsdp", None)) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _is_partitioned(p: Any) -> bool:
    return hasattr(p, "ds_id")


class _gathered:
    """The whole of a parameter inside of the block, on every rank, where ZeRO-3 has cut it; all ranks have to enter."""

    def __init__(self, p: Any, modify: bool = False) -> None:
        self.inner: Any = None
        if _is_partitioned(p):
            import deepspeed  # type: ignore[import-untyped]

            self.inner = deepspeed.zero.GatheredParameters([p], modifier_rank=0 if modify else None)

    def __enter__(self) -> None:
        if self.inner is not None:
            self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.inner is not None:
            self.inner.__exit__(*error)


def _shape(p: Any) -> tuple[int, ...]:
    return tuple(getattr(p, "ds_shape", p.shape))


def _numel(p: Any) -> int:
    count = int(getattr(p, "ds_numel", p.numel()))
    quantized = getattr(p, "quant_state", None)
    return int(quantized.shape.numel()) if quantized is not None and hasattr(quantized, "shape") else count


# -- files -----------------------------------------------------------------------------------------------------------


def _peft_name(name: str) -> str:
    """A parameter's name in PEFT's files."""
    return _PREFIX + re.sub(r"\.default(?=\.|$)", "", name.replace(".lora_magnitude_vector.default.weight",
                                                                 ".lora_magnitude_vector"))  # fmt: skip


def _read_tensors(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_model.safetensors").is_file():
        from safetensors.torch import load_file

        return load_file(str(folder / "adapter_model.safetensors"))
    import torch

    return dict(torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True))


def _replace(path: Path, write: Callable[[str], Any]) -> None:
    """Write beside ``path`` and rename: a run that dies leaves no half of a file."""
    beside = path.with_name(f".{path.name}.writing")
    write(str(beside))
    os.replace(beside, path)


# -- watching imports, counting --------------------------------------------------------------------------------------


class _Watch(importlib.abc.MetaPathFinder):
    """Calls ``then`` with a module as soon as it has been imported."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then
        self.asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name or self.asking:
            return None
        self.asking = True  # the other finders
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                if self in sys.meta_path:  # not before: libraries ask for specs only to see what is installed
                    sys.meta_path.remove(self)
                run(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _after_import(name: str, then: Callable[[Any], None]) -> None:
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, then))


def _batch_size(inputs: Any) -> int:
    values: Iterator[Any] = iter(inputs.values() if hasattr(inputs, "values") else inputs)
    return next((len(value) for value in values if getattr(value, "ndim", 0)), 0)


def speed_callback() -> Any:
    """A TrainerCallback that prints one JSON line at the end: time of a step, samples a second, peak memory in bytes.

    The first step (compiling, allocating) and the writing of checkpoints do not count.
    """
    import torch
    from transformers import TrainerCallback

    class Speed(TrainerCallback):
        samples = 0
        pause = 0.0
        first = 0
        since = (0, 0.0, 0)

        def mark(self, step: int) -> tuple[int, float, int]:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            return step, time.perf_counter() - self.pause, self.samples

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.first = state.global_step + 1
            self.since = self.mark(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == self.first < state.max_steps:
                self.since = self.mark(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps, seconds, samples = (b - a for a, b in zip(self.since, self.mark(state.global_step)))
            if args.world_size > 1 and torch.distributed.is_initialized():
                both = torch.tensor([samples], device=args.device)
                torch.distributed.all_reduce(both)
                samples = int(both.item())
            cuda = args.device.type == "cuda"
            line = {
                "lorapatch": "speed",
                "steps": steps,
                "step_time_s": round(seconds / steps, 4) if steps else None,
                "samples_per_s": round(samples / seconds, 3) if steps else None,
                "peak_allocated_B": torch.cuda.max_memory_allocated() if cuda else None,
                "peak_reserved_B": torch.cuda.max_memory_reserved() if cuda else None,
            }
            if args.process_index == 0:
                sys.stdout.write(f"\n{json.dumps(line)}\n")  # a progress bar may hold the line
                sys.stdout.flush()

    return Speed()


if __name__ == "__main__":
    main()
