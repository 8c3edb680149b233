"""What a run writes and reads back: adapter, bridge, full model, checkpoints; gathered under ZeRO-3, never half a file."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.lora import plain_adapter, restore_adapter
from lorapatch.trainer.model import BRIDGE, MGMForCausalLM
from lorapatch.trainer.towers import tower_state

__all__ = ["Kind", "RunKind", "fitting", "last_checkpoint", "load_bridge", "restore", "save"]

Kind = Literal["lora", "full", "pretrain"]
RUN_FILE = "lorapatch_run.json"
SHARD_SIZE = "5GB"


class RunKind(dict[str, Any]):
    """What makes a checkpoint fit a run: its kind, and for LoRA rank, variant and modules."""

    @classmethod
    def of(cls, kind: Kind, args: Any = None, modules: Iterable[str] = ()) -> RunKind:
        """The kind of a run with TrainingArguments ``args`` (needed for LoRA only)."""
        if kind != "lora":
            return cls(kind=kind)
        return cls(kind=kind, r=args.lora_r, variant=args.lora_variant, modules=sorted(modules))

    @classmethod
    def read(cls, folder: Path) -> RunKind:
        """What ``folder`` says of itself, or what its files show (a checkpoint of upstream's trainer)."""
        if (folder / RUN_FILE).is_file():
            return cls(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
        if (folder / "adapter_config.json").is_file():
            config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            return cls(kind="lora", r=config.get("r"), modules=sorted(config.get("target_modules") or []))
        if (folder / "mm_projector.bin").is_file():
            return cls(kind="pretrain")
        return cls(kind="full")

    def __str__(self) -> str:
        names = {"lora": "LoRA", "full": "full fine-tuning", "pretrain": "pre-training"}
        if self["kind"] != "lora":
            return names[self["kind"]]
        variant = self.get("variant", "lora")
        return f"LoRA (r {self['r']}, {'' if variant == 'lora' else variant + ', '}{', '.join(self['modules'])})"

    def fits(self, other: RunKind) -> bool:
        """Whether both agree on everything both know."""
        return all(self[key] == other[key] for key in self.keys() & other.keys())


def last_checkpoint(output_dir: str | Path, run: RunKind, *, ranks: int = 0) -> Path | None:
    """The newest whole ``checkpoint-*`` of ``output_dir``, None if there is none.

    One that was cut off while it was written is passed over with a line on standard error. ``ranks`` is the number of
    DeepSpeed's ranks, 0 without DeepSpeed. Raises TrainerError for one of another kind of run, or of another number of
    ranks: nothing is resumed by accident.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            found.append((int(match[1]), folder))
    for _, folder in sorted(found, reverse=True):
        if not (folder / "trainer_state.json").is_file():
            print(f"lorapatch trainer: {folder} is incomplete and is passed over", file=sys.stderr)
            continue
        return fitting(folder, run, ranks=ranks)
    return None


def fitting(folder: Path, run: RunKind, *, ranks: int = 0) -> Path:
    """``folder``, if this run can go on from it; raises TrainerError with the reason and the remedy if it cannot."""
    if not (folder / "trainer_state.json").is_file():
        raise TrainerError(f"{folder} is no whole checkpoint: it has no trainer_state.json")
    there = RunKind.read(folder)
    if not run.fits(there):
        raise TrainerError(
            f"{folder} was written by another kind of run, {there}, and this one is {run}: choose another "
            "--output_dir, or move the checkpoints away"
        )
    states = len(list(folder.glob("global_step*/*optim_states.pt")))
    # Without a shared file system a node sees its own ranks' states alone.
    one_node = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks) == ranks
    if bool(states) != bool(ranks) or states > ranks or (states < ranks and one_node):
        raise TrainerError(
            f"{folder} holds the optimizer of {_ranks(states)}, and this run has {_ranks(ranks)}: start it as the "
            "other was started, choose another --output_dir, or move the checkpoints away"
        )
    return folder


def _ranks(number: int) -> str:
    return f"{number} DeepSpeed rank{'s' if number > 1 else ''}" if number else "no DeepSpeed"


def save(model: Any, tokenizer: Any, run: RunKind, folder: str | Path, *, writer: bool) -> None:
    """Write the model's files to ``folder``; called on every rank, written where ``writer`` is true.

    LoRA: ``adapter_config.json``, ``adapter_model.safetensors``, ``non_lora_trainables.bin``. Pre-training:
    ``mm_projector.bin``. Full: ``model-*.safetensors`` with their index, towers included, as upstream's loader wants
    it. Always ``config.json``, the tokenizer and ``lorapatch_run.json``.
    """
    folder = Path(folder)
    inner = _inner(model)
    # A frozen projector is written, too: without it the folder would be of no use.
    state = _gather(model, writer, lambda name, p: run["kind"] == "full" or p.requires_grad or _in_bridge(name))
    if not writer:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if run["kind"] == "lora":
        adapter = {name: t for name, t in state.items() if "lora_" in name or _is_bias(name)}
        config, tensors = plain_adapter(model, adapter)
        if not tensors or any(not t.numel() for t in tensors.values()):
            raise TrainerError(f"the adapter is empty and was not written to {folder}")
        _write_safetensors(tensors, folder / "adapter_model.safetensors")
        config.save_pretrained(str(folder))
        others = {name: t for name, t in state.items() if name not in adapter}
        _replace(folder / "non_lora_trainables.bin", lambda path: torch.save(others, path))
    elif run["kind"] == "pretrain":
        _replace(folder / "mm_projector.bin", lambda path: torch.save(state, path))
    else:
        _save_full(inner, state, folder)
    _save_config(inner, folder)
    tokenizer.save_pretrained(str(folder))
    _replace(folder / RUN_FILE, lambda path: path.write_text(json.dumps(run) + "\n", encoding="utf-8"))


def restore(model: Any, run: RunKind, folder: str | Path) -> None:
    """Load what :func:`save` wrote back into ``model`` (where DeepSpeed does not do it itself)."""
    folder = Path(folder)
    if run["kind"] == "lora":
        restore_adapter(model, folder)
        load_bridge(_inner(model), folder / "non_lora_trainables.bin")
    elif run["kind"] == "pretrain":
        load_bridge(_inner(model), folder / "mm_projector.bin")
    else:
        from safetensors.torch import load_file

        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        for shard in sorted(set(index["weight_map"].values())):
            _inner(model).load_state_dict(load_file(folder / shard), strict=False)


def load_bridge(model: MGMForCausalLM, file: str | Path) -> None:
    """Fill projector and mining layers from ``mm_projector.bin`` or ``non_lora_trainables.bin``, ours or upstream's.

    Tower weights in the file are left alone (they are the frozen ones). A bridge module that the file lacks keeps its
    first values, with a line on standard error. Raises TrainerError for a file that does not fit.
    """
    try:
        written: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainerError(f"{file} cannot be read ({error.strerror}): run the pre-training stage first") from error
    except Exception as error:
        raise TrainerError(f"{file} is damaged ({type(error).__name__})") from error
    for name in BRIDGE:
        module: nn.Module | None = getattr(model.model, name, None)
        if module is None:
            continue
        state = {key.split(f"{name}.", 1)[1]: tensor for key, tensor in written.items() if f"{name}." in key}
        if not state:
            print(f"lorapatch trainer: {file} has no {name}, which keeps its first values", file=sys.stderr)
            continue
        _fill(module, state, name, file)


def _fill(module: nn.Module, state: Mapping[str, Tensor], name: str, file: str | Path) -> None:
    parameters = dict(module.named_parameters())
    for key, p in parameters.items():
        shape = tuple(getattr(p, "ds_shape", p.shape))
        if key not in state or tuple(state[key].shape) != shape:
            there = tuple(state[key].shape) if key in state else "missing"
            raise TrainerError(f"{file}: {name}.{key} is {there}, the model needs {shape}: it is of another model")
    with _gathered(list(parameters.values()), modify=True), torch.no_grad():
        for key, p in parameters.items():
            if p.numel():
                p.copy_(state[key])


def _inner(model: Any) -> MGMForCausalLM:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(inner, MGMForCausalLM)
    return inner


def _in_bridge(name: str) -> bool:
    return any(f".{module}." in name for module in BRIDGE)


def _is_bias(name: str) -> bool:
    return name.endswith(".bias") and not _in_bridge(name)


def _gathered(parameters: list[Any], *, modify: bool = False) -> Any:
    """ZeRO-3's GatheredParameters over what is partitioned, nothing elsewhere."""
    import contextlib

    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed  # type: ignore[import-untyped]

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)


def _gather(model: nn.Module, writer: bool, wanted: Callable[[str, nn.Parameter], bool]) -> dict[str, Tensor]:
    """The wanted parameters, whole, on the CPU of the writing rank; one at a time, so that a GPU holds one only."""
    state = {}
    for name, p in model.named_parameters():
        if wanted(name, p):
            with _gathered([p]):
                if writer:
                    state[name] = p.detach().cpu().clone()
    return state


def _save_full(model: MGMForCausalLM, state: dict[str, Tensor], folder: Path) -> None:
    """Shards and index, always: upstream's loader and evaluation look the weights up in the index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    towers = tower_state(model.clip, model.aux)
    whole = {**state, **{name: tensor.detach().cpu().contiguous() for name, tensor in towers.items()}}
    split = split_torch_state_dict_into_shards(whole, max_shard_size=SHARD_SIZE)
    total = len(split.filename_to_tensors)
    weight_map = {}
    for number, names in enumerate(split.filename_to_tensors.values(), start=1):
        file = f"model-{number:05d}-of-{total:05d}.safetensors"
        _write_safetensors({name: whole[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": split.metadata, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    _replace(folder / "model.safetensors.index.json", lambda path: path.write_text(text, encoding="utf-8"))


def _save_config(model: Any, folder: Path) -> None:
    """``config.json``, with the words of transformers 4 beside those of 5, so that upstream's trainer reads it too."""
    written = json.loads(model.config.to_json_string(use_diff=False))
    written.pop("quantization_config", None)  # the run's, not the model's
    written["torch_dtype"] = written.get("dtype")
    rope = written.get("rope_parameters") or {}
    written.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    written["use_cache"] = True
    text = json.dumps(written, indent=2, sort_keys=True) + "\n"
    _replace(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def _write_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    def write(path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)  # safetensors makes files that nobody else may read

    _replace(file, write)


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """``write`` a neighbour of ``file``, then put it in its place: a reader sees the old file or the new one."""
    beside = file.with_name(f".{file.name}.part")
    try:
        write(beside)
        os.replace(beside, file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
