"""The options that the launchers take themselves, before the trainer: which of them have a value."""

from __future__ import annotations

__all__ = ["ALONE", "LAUNCHERS", "is_attach", "launcher_of", "module_option"]

LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "torch.distributed.run", "torch.distributed.launch", "python")

# Options without a value; every other option before the trainer takes one.
# deepspeed/launcher/runner.py, torch/distributed/run.py and launch.py, accelerate/commands/launch.py, `python --help`.
_TORCH = frozenset(
    "standalone m module no_python no-python run_path run-path use_env use-env virtual_local_rank virtual-local-rank"
    " help h".split()
)
ALONE: dict[str, frozenset[str]] = {
    "deepspeed": frozenset(
        "module no_python no_local_rank no_ssh no_ssh_check force_multi save_pid elastic_training bind_cores_to_rank"
        " q quiet help h".split()
    ),
    "torchrun": _TORCH,
    "torch.distributed.run": _TORCH,
    "torch.distributed.launch": _TORCH,
    "accelerate": frozenset(
        "quiet q cpu multi_gpu tpu ipex use_xpu use_mps_device enable_cpu_affinity dynamo_use_fullgraph"
        " dynamo_use_dynamic dynamo_use_regional_compilation use_deepspeed use_fsdp use_parallelism_config"
        " use_megatron_lm same_network m module no_python tpu_cluster no_tpu_cluster tpu_use_cluster tpu_use_sudo"
        " downcast_bf16 fp8_use_autocast_during_eval debug help h".split()
    ),
    "python": frozenset("b B d E h i I O q s S u v V x OO bb vv m".split()),
}


# The program that gives a trainer LoRA, by its module's name or by its file.
_ATTACH = ("lorapatch.attach", "lorapatch/attach.py")


def is_attach(program: str, module: bool) -> bool:
    """Whether a launched program is ``lorapatch.attach``, which runs the trainer named behind it."""
    return program == _ATTACH[0] if module else program.endswith(_ATTACH[1])


def module_option(launcher: str) -> str:
    """The launcher's option that says that a module follows, not a file."""
    return "--module" if launcher == "deepspeed" else "-m"


def launcher_of(program: str) -> str | None:
    """The launcher that a program's name stands for; None for any other program."""
    name = program.rsplit("/", 1)[-1]
    if name in ("deepspeed", "torchrun", "accelerate"):
        return name
    if name == "deepspeed.pt":
        return "deepspeed"
    if name == "accelerate-launch":
        return "accelerate"
    stem = name.removeprefix("python").removeprefix("pypy")
    if (
        name.startswith(("python", "pypy")) and all(part.isdigit() for part in stem.split(".") if part)
    ) or name == "py":
        return "python"
    return None
