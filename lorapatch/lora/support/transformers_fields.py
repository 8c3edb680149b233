"""The fields of transformers' TrainingArguments: by table for every release line, and as installed here."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

from lorapatch.lora.support.option import Kind
from lorapatch.lora.support.trainer_file import installed_package

__all__ = ["Release", "is_training_arguments", "pinned_version", "read_fields", "releases_for", "table_fields",
           "table_kind", "table_span"]  # fmt: skip

FIRST, LAST = (4, 38), (5, 23)

# Made by reading training_args.py and training_args_seq2seq.py in the last patch release of the lines 4.38 to 5.23,
# halving every span whose two ends differed, so each change is known to the very line. Kind, first and last release.
_TABLE = """
bool  4.38 5.23  do_train do_eval do_predict prediction_loss_only log_on_each_node logging_first_step
                  logging_nan_inf_filter save_on_each_node save_only_model use_cpu bf16 fp16 bf16_full_eval
                  fp16_full_eval tf32 dataloader_drop_last disable_tqdm remove_unused_columns load_best_model_at_end
                  greater_is_better ignore_data_skip ddp_find_unused_parameters ddp_broadcast_buffers
                  dataloader_pin_memory dataloader_persistent_workers skip_memory_metrics push_to_hub hub_private_repo
                  hub_always_push gradient_checkpointing auto_find_batch_size full_determinism torch_compile
float 4.38 5.23  eval_delay learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
                  num_train_epochs warmup_steps logging_steps save_steps eval_steps label_smoothing_factor
                  neftune_noise_alpha
int   4.38 5.23  per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
                  eval_accumulation_steps max_steps save_total_limit seed data_seed local_rank dataloader_num_workers
                  dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout
list  4.38 5.23  debug label_names report_to
str   4.38 5.23  output_dir lr_scheduler_type lr_scheduler_kwargs log_level log_level_replica logging_strategy
                  save_strategy ddp_backend run_name metric_for_best_model fsdp fsdp_config accelerator_config
                  deepspeed optim optim_args length_column_name resume_from_checkpoint hub_model_id hub_strategy
                  hub_token gradient_checkpointing_kwargs torch_compile_backend torch_compile_mode
                  include_num_input_tokens_seen
bool  4.38 4.50  dispatch_batches split_batches
str   4.38 4.50  evaluation_strategy
bool  4.38 4.56  use_ipex
bool  4.38 4.57  overwrite_output_dir save_safetensors no_cuda use_mps_device jit_mode_eval tpu_metrics_debug
                  adafactor use_legacy_prediction_loop include_inputs_for_metrics include_tokens_per_second
int   4.38 4.57  per_gpu_train_batch_size per_gpu_eval_batch_size tpu_num_cores past_index fsdp_min_num_params
str   4.38 4.57  fp16_opt_level half_precision_backend fsdp_transformer_layer_cls_to_wrap fp16_backend
                  push_to_hub_model_id push_to_hub_organization push_to_hub_token mp_parameters torchdynamo ray_scope
bool  4.38 5.1   group_by_length
float 4.38 5.14  warmup_ratio
str   4.38 5.14  logging_dir
list  4.39 5.23  optim_target_modules
bool  4.40 5.23  eval_do_concat_batches
bool  4.41 5.23  restore_callback_states_from_checkpoint batch_eval_metrics
str   4.41 5.23  eval_strategy
bool  4.42 5.23  eval_on_start
bool  4.43 5.23  eval_use_gather_object
int   4.43 5.23  torch_empty_cache_steps
bool  4.45 5.23  use_liger_kernel
bool  4.46 5.23  average_tokens_across_devices
list  4.46 5.23  include_for_metrics
int   4.50 4.51  tp_size
str   4.53 5.23  hub_revision liger_kernel_config
str   4.56 5.23  parallelism_config
str   4.57 5.23  project trackio_space_id
bool  5.0  5.23  enable_jit_checkpoint use_cache
str   5.2  5.23  train_sampling_strategy
bool  5.6  5.23  ddp_static_graph
str   5.6  5.23  trackio_bucket_id trackio_static_space_id
bool  5.15 5.23  dataloader_in_order
str   5.15 5.23  dataloader_multiprocessing_context
bool  5.23 5.23  activation_checkpointing
str   5.23 5.23  activation_checkpointing_kwargs
"""
_SEQ2SEQ: dict[str, Kind] = {
    "sortish_sampler": "bool",
    "predict_with_generate": "bool",
    "generation_max_length": "int",
    "generation_num_beams": "int",
    "generation_config": "str",
}
_PIN = re.compile(r"transformers\s*(?:\[[^]]*\])?\s*={2,3}\s*(\d+\.\d+(?:\.\d+)?)")
_PIN_FILES = ("pyproject.toml", "setup.py", "setup.cfg", "requirements.txt", "requirements/requirements.txt",
              "environment.yml", "environment.yaml")  # fmt: skip


@lru_cache(maxsize=1)
def _fields() -> dict[str, tuple[Kind, tuple[int, int], tuple[int, int]]]:
    """Kind, first and last release line of every field, by name."""
    fields = {}
    kind: Kind = "str"
    first, last = FIRST, LAST
    for line in _TABLE.strip().splitlines():
        words = line.split()
        if not line.startswith(" "):
            kind, first, last = cast(Kind, words[0]), _line(words[1]), _line(words[2])
            words = words[3:]
        fields.update(dict.fromkeys(words, (kind, first, last)))
    return fields


def _line(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class Release:
    """One transformers release that may be the trainer's: ``label`` says which and why, ``fields`` what it accepts."""

    label: str
    fields: frozenset[str]


def is_training_arguments(name: str) -> bool:
    """Whether a dotted name is transformers' TrainingArguments or Seq2SeqTrainingArguments."""
    top, _, _ = name.partition(".")
    return top == "transformers" and name.rpartition(".")[2] in ("TrainingArguments", "Seq2SeqTrainingArguments")


def table_kind(name: str) -> Kind | None:
    """The kind of a field of any release in the table."""
    return _fields()[name][0] if name in _fields() else _SEQ2SEQ.get(name)


def table_span(name: str) -> str | None:
    """The releases that have a field, in words: "up to 4.50", "from 5.0 on"; None when all of the table do."""
    if name not in _fields():
        return None
    _, first, last = _fields()[name]
    if last < LAST:
        return f"up to {last[0]}.{last[1]}"
    return None if first == FIRST else f"from {first[0]}.{first[1]} on"


def table_fields(version: str) -> frozenset[str]:
    """The fields of a release line by the table; releases outside it count as the nearest line inside."""
    line = min(max(_line(version), FIRST), LAST)
    return frozenset(name for name, (_, first, last) in _fields().items() if first <= line <= last)


def releases_for(roots: Sequence[Path], classes: set[str], python: Path | None = None) -> tuple[Release, ...]:
    """The releases to judge a trainer's flags by: that of the interpreter which will run it, where it is known.

    Else the one installed beside lorapatch and the one its project pins; with neither, any release of the table.
    """
    extra = frozenset(_SEQ2SEQ) if "Seq2SeqTrainingArguments" in classes else frozenset()
    runs = _of_interpreter(python) if python else None
    candidates = (runs,) if runs else (_installed(), _pinned(tuple(roots)))
    found = [Release(release.label, release.fields | extra) for release in candidates if release]
    return tuple(found) or (Release("any transformers from 4.38 to 5.23", frozenset(_fields()) | extra),)


def _of_interpreter(python: Path) -> Release | None:
    """What stands in the site-packages of the environment that an interpreter belongs to."""
    for folder in sorted(python.parent.parent.glob("lib/python3*/site-packages/transformers")):
        release = _read_release(folder, f"of {python}")
        if release:
            return release
    return None


def pinned_version(roots: Sequence[Path]) -> tuple[str, Path] | None:
    """The transformers version that a project asks for with ``==``, and the file that says so."""
    for root in roots:
        for name in _PIN_FILES:
            file = root / name
            try:
                match = _PIN.search(file.read_text(encoding="utf-8", errors="replace"))
            except OSError:
                continue
            if match:
                return match.group(1), file
    return None


def _pinned(roots: tuple[Path, ...]) -> Release | None:
    pin = pinned_version(roots)
    if pin is None:
        return None
    version, file = pin
    return Release(f"transformers {version} (pinned in {file.name})", table_fields(version))


@lru_cache(maxsize=1)
def _installed() -> Release | None:
    folder = installed_package("transformers")
    return _read_release(folder, "installed here") if folder else None


@lru_cache(maxsize=8)
def _read_release(folder: Path, which: str) -> Release | None:
    try:
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        fields = read_fields(folder / "training_args.py")
    except (OSError, SyntaxError, ValueError):
        return None
    version = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return Release(f"transformers {version.group(1) if version else '(unknown version)'} ({which})", fields)


def read_fields(file: Path) -> frozenset[str]:
    """The names that ``TrainingArguments`` of a ``training_args.py`` makes options of.

    Raises OSError or SyntaxError.
    """
    fields = set()
    for node in ast.parse(file.read_bytes()).body:
        if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments":
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                    text = ast.unparse(statement)
                    if "ClassVar" not in text and "init=False" not in text:
                        fields.add(statement.target.id)
    return frozenset(fields)
