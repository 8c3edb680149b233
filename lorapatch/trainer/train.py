"""The training run from flags to files: read ``main`` first, the rest is in the order it happens."""

# mypy: allow-untyped-calls
from __future__ import annotations

import functools
import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import AutoTokenizer, Trainer, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from lorapatch.trainer.arguments import DataArguments, ModelArguments, TrainingArguments, parse
from lorapatch.trainer.counting import count_parameters
from lorapatch.trainer.data import Collator, GroupedSampler, ImageSettings, Samples, template_for
from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.lora import add_lora, quantization, restore_adapter, target_modules, touched_modules
from lorapatch.trainer.mining import KeyProjector, ValueProjector
from lorapatch.trainer.model import BRIDGE, CAUSAL_SDPA, MGMForCausalLM, load_model, mgm_config
from lorapatch.trainer.saving import RunKind, fitting, last_checkpoint, load_bridge, restore, save
from lorapatch.trainer.speed import SpeedReport

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the flags in ``argv`` (or on the command line) say; a fault ends the process with one sentence."""
    try:
        train(sys.argv[1:] if argv is None else argv)
    except TrainerError as error:
        # From a data loader's worker it comes with that process's traceback in front.
        _fail(str(error).strip().splitlines()[-1].split("TrainerError: ")[-1], error.exit_code)
    except torch.OutOfMemoryError as error:
        _fail(f"{str(error).splitlines()[0]} (lower the micro-batch, or turn gradient checkpointing on)", 4)
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(str(error), 4)
    return 0


def train(argv: Sequence[str]) -> None:
    """The run itself, top to bottom."""
    # transformers 5.23 renames gradient checkpointing; 5.17 and PEFT do not know the new name.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
    _single_process_defaults(argv)
    model_args, data_args, args = parse(argv)
    _limit_memory(args)
    _join(args)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args, args)
    model, run = build_model(model_args, data_args, args, tokenizer)
    checkpoint = _where_to_go_on(args, run)
    if checkpoint and args.lora_variant == "pissa":
        restore_adapter(model, checkpoint)  # the base weights have to be split as they were
    samples, collator = build_data(model_args, data_args, args, model, tokenizer)
    trainer = MGMTrainer(run, model=model, args=args, samples=samples, collator=collator, tokenizer=tokenizer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_state()
    trainer.save_model(args.output_dir)
    _leave()


def _leave() -> None:
    """Part from the other ranks while all are there: gloo's threads, if they outlive the interpreter, abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _fail(sentence: str, code: int) -> None:
    rank = int(os.environ.get("RANK", "0"))
    print(f"lorapatch trainer: {f'rank {rank}: ' if rank else ''}{sentence}", file=sys.stderr, flush=True)
    sys.exit(code)


def _where_to_go_on(args: TrainingArguments, run: RunKind) -> Path | None:
    """The checkpoint that was named, or the newest in the output directory: upstream resumes without being asked."""
    ranks = args.world_size if args.deepspeed_plugin else 0
    if args.resume_from_checkpoint and args.resume_from_checkpoint.lower() not in {"true", "false"}:
        return fitting(Path(args.resume_from_checkpoint), run, ranks=ranks)
    return last_checkpoint(str(args.output_dir), run, ranks=ranks)


def _single_process_defaults(argv: Sequence[str]) -> None:
    """DeepSpeed without a launcher looks for MPI; one process needs none."""
    if "RANK" not in os.environ and any(word.split("=")[0] == "--deepspeed" for word in argv):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
            os.environ[name] = str(value)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


def _limit_memory(args: TrainingArguments) -> None:
    """A share of the GPU's memory, set from outside, that this process may not pass."""
    fraction = os.environ.get("LORAPATCH_MEMORY_FRACTION")
    if fraction and args.device.type == "cuda":
        try:
            torch.cuda.set_per_process_memory_fraction(float(fraction), args.device)
        except ValueError as error:
            raise TrainerError(f"LORAPATCH_MEMORY_FRACTION={fraction}: a number from 0 to 1 is needed", 2) from error


def _join(args: TrainingArguments) -> None:
    """Let DeepSpeed know the other ranks before ZeRO-3 cuts the first weight (on the CPU nobody else tells it)."""
    if args.deepspeed_plugin:
        import deepspeed  # type: ignore[import-untyped]

        backend = "nccl" if args.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def load_tokenizer(model_args: ModelArguments, args: TrainingArguments) -> Any:
    """The model folder's tokenizer, padding on the right; raises TrainerError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path, model_max_length=args.model_max_length, padding_side="right"
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise TrainerError(f"no tokenizer in --model_name_or_path {model_args.model_name_or_path}: {first}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def compute_dtype(args: TrainingArguments) -> torch.dtype:
    """bf16, fp16 or float32, as the flags say."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def build_model(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, tokenizer: Any
) -> tuple[Any, RunKind]:
    """Language model, towers, bridge, LoRA; frozen what has to be; says on standard output what can learn."""
    dtype = compute_dtype(args)
    run_full = not (args.lora_enable or model_args.tune_mm_mlp_adapter)
    config = mgm_config(str(model_args.model_name_or_path), **_config_fields(model_args, data_args, args, tokenizer))
    model = load_model(
        config,
        # Without DeepSpeed's float32 copies the weights that learn have to be float32 themselves.
        dtype=torch.float32 if run_full and not args.deepspeed_plugin else dtype,
        tower_dtype=dtype,
        attn_implementation=args.attn_implementation,
        quantization=quantization(args.bits, dtype=dtype, double=args.double_quant, kind=args.quant_type),
        device_map={"": args.device} if args.bits < 16 else None,
    )
    if model_args.pretrain_mm_mlp_adapter:
        load_bridge(model, model_args.pretrain_mm_mlp_adapter)
    for tower in model.towers:
        tower.to(args.device)
    window = getattr(config, "sliding_window", None)
    if model.config._attn_implementation == "sdpa" and (not window or window >= args.model_max_length):
        model.set_attn_implementation(CAUSAL_SDPA)
    if model.aux is not None:
        model.aux.train(model_args.drop_path)  # its stochastic depth; the tower has nothing else that trains
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    if is_deepspeed_zero3_enabled():
        from deepspeed.utils import set_z3_leaf_modules  # type: ignore[import-untyped]

        set_z3_leaf_modules(model, [KeyProjector, ValueProjector])  # they use their layers' weights, not the layers
    run = _run_kind(model_args, args, model)
    return _choose_trainable(model, run, model_args, args), run


def _config_fields(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, tokenizer: Any
) -> dict[str, Any]:
    """What upstream writes to ``config.json`` beside the language model's own fields."""
    return {
        "mm_vision_tower": model_args.vision_tower,
        "mm_vision_tower_aux": model_args.vision_tower_aux,
        "mm_projector_type": model_args.mm_projector_type,
        "mm_vision_select_layer": model_args.mm_vision_select_layer,
        "mm_vision_select_feature": model_args.mm_vision_select_feature,
        "mm_use_im_start_end": model_args.mm_use_im_start_end,
        "mm_use_im_patch_token": model_args.mm_use_im_patch_token,
        "mm_projector_lr": args.mm_projector_lr,
        "use_mm_proj": True,
        "optimize_vision_tower": False,
        "optimize_vision_tower_aux": False,
        "image_size_aux": data_args.image_size_aux,
        "image_grid": data_args.image_grid,
        "image_global": data_args.image_global,
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "image_grid_pinpoints": data_args.image_grid_pinpoints,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": tokenizer.model_max_length,
        "tune_mm_mlp_adapter": model_args.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": args.freeze_mm_mlp_adapter,
        "mgm_version": model_args.version,
    }


def _run_kind(model_args: ModelArguments, args: TrainingArguments, model: MGMForCausalLM) -> RunKind:
    if model_args.tune_mm_mlp_adapter:
        return RunKind.of("pretrain")
    if not args.lora_enable:
        return RunKind.of("full")
    return RunKind.of("lora", args, target_modules(model, args.lora_target_modules))


def _choose_trainable(model: MGMForCausalLM, run: RunKind, model_args: ModelArguments, args: TrainingArguments) -> Any:
    """Freeze and wrap; what learns gets the dtype that its optimizer wants. Prints the counts, on rank 0."""
    bridge = [getattr(model.model, name) for name in BRIDGE if hasattr(model.model, name)]
    wrapped: Any = model
    if run["kind"] == "lora":
        wrapped = add_lora(model, args)
        if args.lora_weight_path:
            restore_adapter(wrapped, args.lora_weight_path)
            others = Path(args.lora_weight_path) / "non_lora_trainables.bin"
            if others.is_file():
                load_bridge(model, others)
    elif run["kind"] == "pretrain" or model_args.freeze_backbone:
        model.requires_grad_(False)
        for module in bridge:
            module.requires_grad_(True)
    if args.freeze_mm_mlp_adapter:
        model.model.mm_projector.requires_grad_(False)
    dtype = compute_dtype(args) if args.deepspeed_plugin else torch.float32
    for p in wrapped.parameters():
        if p.requires_grad and p.dtype != dtype and p.is_floating_point():
            p.data = p.data.to(dtype)
    counts = count_parameters(wrapped)
    line: dict[str, Any] = {"lorapatch": "model", "trainable": counts.trainable, "total": counts.total}
    if run["kind"] == "lora":
        line.update(lorapatch="lora", lora=counts.lora, tensors=counts.tensors, modules=touched_modules(wrapped))
        line.update(r=args.lora_r, alpha=args.lora_alpha)
    if args.process_index == 0:
        print(json.dumps(line), flush=True)
    return wrapped


def build_data(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, model: Any, tokenizer: Any
) -> tuple[Samples, Collator]:
    """The data set and what makes batches of it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = ImageSettings.of(inner)
    tokens = inner.clip.grid**2
    samples = Samples(
        Samples.read(str(data_args.data_path)),
        tokenizer,
        template_for(model_args.version, inner.config.model_type),
        image_folder=data_args.image_folder or "",
        settings=settings,
        tokens_per_image=tokens,
        max_length=args.model_max_length,
        max_bad=data_args.max_bad_samples,
    )
    return samples, Collator(tokenizer.pad_token_id, settings.size, tokens)


class MGMTrainer(Trainer):
    """transformers' Trainer with MGM's order of samples, learning rates and files.

    The loss of a step is the mean over its micro-batches, each a mean over its own labels (as transformers did until
    4.45, and upstream with it): so two ranks and one with twice the accumulation agree.
    """

    def __init__(self, run: RunKind, *, samples: Samples, collator: Collator, tokenizer: Any, **options: Any) -> None:
        self.run = run
        self.speed = SpeedReport(options["args"].profile_steps)
        super().__init__(
            train_dataset=samples,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=[self.speed],
            **options,
        )
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        self.speed.count(len(inputs["input_ids"]), inputs.pop("token_count"))
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks over all parameters at every micro-step."""
        return 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        args: Any = self.args
        if not (args.group_by_modality_length or args.group_by_length):
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        return GroupedSampler(
            self.train_dataset.lengths,  # type: ignore[union-attr]
            args.train_batch_size,
            args.world_size * args.gradient_accumulation_steps,
            args.seed if args.data_seed is None else args.data_seed,
            by_modality=args.group_by_modality_length,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        args: Any = self.args
        factors = _factors(args.lr_multi)
        if self.optimizer is not None or (args.mm_projector_lr is None and not factors):
            return super().create_optimizer()
        whole: Any = self.model
        decaying = set(self.get_decay_parameter_names(whole))
        groups: dict[tuple[float, bool], list[Any]] = {}
        for name, p in whole.named_parameters():
            if p.requires_grad:
                rate = args.learning_rate * next((f for part, f in factors.items() if part in name), 1.0)
                if args.mm_projector_lr is not None and "mm_projector" in name:
                    rate = args.mm_projector_lr
                groups.setdefault((rate, name in decaying), []).append(p)
        cls, options = self.get_optimizer_cls_and_kwargs(args, whole)
        self.optimizer = cls(
            [
                {"params": members, "lr": rate, "weight_decay": args.weight_decay if decays else 0.0}
                for (rate, decays), members in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save(
            self.model,
            self.processing_class,
            self.run,
            str(output_dir or self.args.output_dir),
            writer=self.args.should_save,
        )

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        started = time.perf_counter()
        super()._save_checkpoint(*args, **options)
        self.speed.pause += time.perf_counter() - started

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        engine: Any = self.model_wrapped
        if self.is_deepspeed_enabled and not isinstance(engine.save_checkpoint, functools.partial):
            # Frozen weights come from the base model again.
            engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.model, self.run, resume_from_checkpoint)


def _factors(text: str | None) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in (part.split(":") for part in (text or "").split(",") if part)}
    except ValueError as error:
        raise TrainerError(f"--lr_multi {text}: pairs of name:factor with commas between them", 2) from error


if __name__ == "__main__":
    sys.exit(main())
