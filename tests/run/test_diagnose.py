"""Every row of the table is found in a log as such a run really prints it, and its remedy is a command."""
# ruff: noqa: E501 (messages as libraries print them)

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from lorapatch.run.diagnose import Diagnosis, Evidence, diagnose, is_exploding
from lorapatch.run.symptoms import SYMPTOMS

GIB = 1 << 30
FLAGS = {
    "deepspeed": "scripts/zero3_offload.json",
    "output_dir": "out/MGM 2B",
    "learning_rate": "2e-4",
    "bf16": "True",
    "model_name_or_path": "model_zoo/gemma",
}
BEFORE = """\
[2025-07-01 22:35:01,102] [INFO] [launch.py:253:main] process 4711 spawned with command: ['/env/bin/python', '-u', 'train.py']
[2025-07-01 22:35:09,530] [INFO] [comm.py:652:init_distributed] cdb=None
Loading checkpoint shards: 100%|##########| 2/2 [00:01<00:00,  1.52it/s]
"""
AFTER = """\
[2025-07-01 22:35:20,118] [INFO] [launch.py:316:sigkill_handler] Killing subprocess 4711
[2025-07-01 22:35:20,119] [ERROR] [launch.py:322:sigkill_handler] ['/env/bin/python', '-u', 'train.py'] exits with return code = 1
"""


def traceback(last: str, rank: str = "") -> str:
    lines = [
        "Traceback (most recent call last):",
        '  File "/kit/mgm/train/train.py", line 1178, in <module>',
        "    train()",
        last,
    ]
    return "".join(f"{rank}{line}\n" for line in "\n".join(lines).splitlines())


def told(text: str, **known: object) -> Diagnosis:
    run = Evidence(log=BEFORE + text + AFTER, exit_code=1, script="my train.sh", python="/env/bin/python", flags=FLAGS)
    found = diagnose(replace(run, **known))  # type: ignore[arg-type]
    assert found is not None
    return found


# id of the row: what the log holds, what the cause has to say, what the remedy is
ROWS: list[tuple[str, str, str, str]] = [
    (
        "shared-memory",
        traceback("RuntimeError: DataLoader worker (pid 523) is killed by signal: Bus error. It is possible that dataloader's"
                  " workers are out of shared memory. Please try to raise your shared memory limit."),
        "/dev/shm",
        "lorapatch patch 'my train.sh' --set dataloader_num_workers=0",
    ),
    (
        "shared-memory",
        traceback('RuntimeError: unable to write to file </torch_523_1887_0>: No space left on device (28)'),
        "/dev/shm",
        "lorapatch patch 'my train.sh' --set dataloader_num_workers=0",
    ),
    ("no-space", traceback("OSError: [Errno 28] No space left on device"), "disk is full", "df -h 'out/MGM 2B'"),
    (
        "no-space",
        traceback("RuntimeError: [enforce fail at inline_container.cc:664] . unexpected pos 5120 vs 5014"),
        "disk is full",
        "df -h 'out/MGM 2B'",
    ),
    ("cut-command", "train.sh: line 88: --lora_r: command not found\n", "Line 88 of the script", "lorapatch check 'my train.sh'"),
    ("program-missing", "train.sh: line 81: deepspeed: command not found\n", "deepspeed is not installed", "lorapatch doctor"),
    ("unset-variable", "train.sh: line 9: DATA_ROOT: unbound variable\n", "the variable DATA_ROOT", "lorapatch inspect 'my train.sh'"),
    (
        "shell-syntax",
        "train.sh: line 40: syntax error near unexpected token `done'\n",
        "line 40",
        "lorapatch check 'my train.sh'",
    ),
    (
        "trainer-missing",
        "/env/bin/python: can't open file '/kit/mgm/train/train_men.py': [Errno 2] No such file or directory\n",
        "The trainer /kit/mgm/train/train_men.py does not exist",
        "lorapatch check 'my train.sh'",
    ),
    (
        "flash-attention",
        traceback("ImportError: FlashAttention2 has been toggled on, but it cannot be used due to the following error: the package"
                  " flash_attn seems to be not installed."),
        "Flash attention",
        "lorapatch patch 'my train.sh' --set attn_implementation=sdpa",
    ),
    ("flash-attention", traceback("RuntimeError: FlashAttention only supports Ampere GPUs or newer."), "Flash attention",
     "lorapatch patch 'my train.sh' --set attn_implementation=sdpa"),
    (
        "quantisation-missing",
        traceback("ImportError: Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install -U bitsandbytes>=0.46.1`"),
        "bitsandbytes",
        "/env/bin/python -m pip install -U bitsandbytes",
    ),
    ("missing-module", traceback("ModuleNotFoundError: No module named 'PIL'"), "The Python package PIL",
     "/env/bin/python -m pip install pillow"),
    ("missing-module", traceback("ModuleNotFoundError: No module named 'open_clip.factory'"), "open_clip.factory",
     "/env/bin/python -m pip install open-clip-torch"),
    (
        "missing-library",
        traceback("ImportError: libGL.so.1: cannot open shared object file: No such file or directory"),
        "system library",
        "lorapatch doctor",
    ),
    (
        "versions",
        traceback("ImportError: cannot import name 'is_torch_fx_available' from 'transformers.utils' (/env/lib/transformers/utils/__init__.py)"),
        "The installed transformers.utils has no is_torch_fx_available",
        "lorapatch doctor",
    ),
    (
        "unknown-lora-flag",
        traceback("ValueError: Some specified arguments are not used by the HfArgumentParser: ['--lora_enable', 'True', '--lora_r', '16']"),
        "The trainer knows no --lora_enable",
        "lorapatch patch 'my train.sh' --mode attach",
    ),
    (
        "unknown-lora-flag",
        "usage: train.py [-h] [--lr LR]\ntrain.py: error: unrecognized arguments: --lora_enable True\n",
        "The trainer knows no --lora_enable",
        "lorapatch patch 'my train.sh' --mode attach",
    ),
    (
        "unknown-flag",
        traceback("ValueError: Some specified arguments are not used by the HfArgumentParser: ['--image_grid', '2']"),
        "['--image_grid', '2']",
        "lorapatch check 'my train.sh'",
    ),
    ("unknown-flag", "Error: No such option: --data_pth\n", "--data_pth", "lorapatch check 'my train.sh'"),
    (
        "bad-value",
        "train.py: error: argument --per_device_train_batch_size: invalid int value: 'four'\n",
        "--per_device_train_batch_size is not accepted: invalid int value: 'four'",
        "lorapatch inspect 'my train.sh'",
    ),
    (
        "newer-peft",
        traceback("TypeError: LoraConfig.__init__() got an unexpected keyword argument 'corda_config'"),
        "saved by a newer PEFT than the one that loads it, which does not know corda_config",
        "/env/bin/python -m pip install -U peft",
    ),
    (
        "renamed-argument",
        traceback("TypeError: TrainingArguments.__init__() got an unexpected keyword argument 'evaluation_strategy'"),
        "no training argument evaluation_strategy",
        "lorapatch check 'my train.sh'",
    ),
    (
        "target-modules",
        traceback("ValueError: Target modules {'query', 'value'} not found in the base model. Please check the target modules and try again."),
        "no layer by the target modules' names",
        "lorapatch patch 'my train.sh' --target-modules all-linear",
    ),
    (
        "no-gradient",
        traceback("RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn"),
        "enable_input_require_grads",
        "lorapatch patch 'my train.sh' --mode attach",
    ),
    ("nothing-to-train", traceback("ValueError: optimizer got an empty parameter list"), "tune_mm_mlp_adapter",
     "lorapatch check 'my train.sh'"),
    (
        "bitsandbytes-zero3",
        traceback("ValueError: `.to` is not supported for `4-bit` or `8-bit` bitsandbytes models. Please use the model as it is."),
        "do not go with ZeRO-3",
        "lorapatch patch 'my train.sh' --set deepspeed=scripts/zero2.json",
    ),
    (
        "bitsandbytes-zero3",
        traceback("ValueError: DeepSpeed Zero-3 is not compatible with passing a `device_map`."),
        "do not go with ZeRO-3",
        "lorapatch patch 'my train.sh' --set deepspeed=scripts/zero2.json",
    ),
    (
        "tensor-in-json",
        traceback("TypeError: Object of type Tensor is not JSON serializable"),
        "cannot write as JSON",
        "lorapatch patch 'my train.sh' --set deepspeed=scripts/zero2.json",
    ),
    (
        "resume-mismatch",
        traceback("ValueError: loaded state dict contains a parameter group that doesn't match the size of optimizer's group"),
        "a checkpoint of another kind of run",
        "lorapatch patch 'my train.sh' --set output_dir='out/MGM 2B'-lora",
    ),
    (
        "zero3-shard",
        traceback("RuntimeError: 'weight' must be 2-D"),
        "without being gathered",
        "lorapatch patch 'my train.sh' --set deepspeed=scripts/zero2.json",
    ),
    (
        "adapter-as-model",
        traceback("OSError: Error no file named pytorch_model.bin, tf_model.h5, model.ckpt.index or flax_model.msgpack found in directory out/MGM-2B."),
        "as if it were a whole model",
        "lorapatch patch 'my train.sh' --with-merge",
    ),
    (
        "fp16-overflow",
        traceback("Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."),
        "fp16",
        "lorapatch patch 'my train.sh' --set fp16=False --set bf16=True",
    ),
    ("template", "WARNING: tokenization mismatch: 112 vs. 114. (ignored)\n" + traceback("ZeroDivisionError: division by zero"),
     "conversation template", "lorapatch inspect 'my train.sh'"),
    (
        "vocabulary",
        "../aten/src/ATen/native/cuda/Indexing.cu:1292: indexSelectLargeIndex: block: [9,0,0], thread: [64,0,0]"
        " Assertion `srcIndex < srcSelectDimSize` failed.\n"
        + traceback("RuntimeError: CUDA error: device-side assert triggered"),
        "embedding table",
        "lorapatch check 'my train.sh'",
    ),
    (
        "dtype",
        traceback("RuntimeError: expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16"),
        "two types",
        "lorapatch patch 'my train.sh' --set bf16=True --set fp16=False --set deepspeed=scripts/zero2.json",
    ),
    (
        "dtype",
        traceback("RuntimeError: Input type (torch.cuda.FloatTensor) and weight type (torch.cuda.HalfTensor) should be the same"),
        "two types",
        "lorapatch patch 'my train.sh' --set bf16=True --set fp16=False --set deepspeed=scripts/zero2.json",
    ),
    (
        "dtype",
        traceback("TypeError: output tensor must have the same type as input tensor"),
        "two types",
        "lorapatch patch 'my train.sh' --set bf16=True --set fp16=False --set deepspeed=scripts/zero2.json",
    ),
    ("no-gpu", traceback("RuntimeError: Unable to proceed, no GPU resources available"), "PyTorch sees none", "lorapatch doctor"),
    (
        "no-bf16",
        traceback("ValueError: Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train the model on CPU."),
        "bf16",
        "lorapatch patch 'my train.sh' --set bf16=False --set tf32=False --set fp16=True",
    ),
    ("no-such-gpu", traceback("ValueError: No slot '3' specified on host 'localhost'"), "does not have", "nvidia-smi -L"),
    (
        "no-kernel",
        traceback("RuntimeError: CUDA error: no kernel image is available for execution on the device"),
        "not built for this GPU",
        "lorapatch doctor",
    ),
    ("deepspeed-build", traceback("RuntimeError: Error building extension 'cpu_adam'"), "could not compile", "lorapatch doctor"),
    (
        "deepspeed-build",
        traceback("AttributeError: 'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'"),
        "could not compile",
        "lorapatch doctor",
    ),
    (
        "deepspeed-batch",
        traceback("AssertionError: Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu *"
                  " gradient_acc_step * world_size 128 != 4 * 16 * 1"),
        "disagree",
        "lorapatch check 'my train.sh'",
    ),
    (
        "deepspeed-config",
        traceback("ValueError: Expected a string path to an existing deepspeed config, or a dictionary or a valid base64."
                  " Received: scripts/zero9.json"),
        "missing or is not JSON",
        "lorapatch check 'my train.sh'",
    ),
    (
        "gated",
        traceback("huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo for url https://huggingface.co/google/gemma-2b-it"),
        "accepted its terms",
        "huggingface-cli login",
    ),
    (
        "model-missing",
        traceback("huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name':"
                  " '/kit/model_zoo/gemma'. Use `repo_type` argument if needed."),
        "model folder is not there",
        "lorapatch check 'my train.sh'",
    ),
    (
        "model-missing",
        traceback("OSError: model_zoo/gemma is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'"),
        "model folder is not there",
        "lorapatch check 'my train.sh'",
    ),
    (
        "offline",
        traceback("OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files."),
        "cannot be reached from here",
        "lorapatch check 'my train.sh'",
    ),
    (
        "bad-image",
        traceback("PIL.UnidentifiedImageError: cannot identify image file '/kit/data/a b.jpg'"),
        "/kit/data/a b.jpg",
        "find IMAGE_FOLDER -type f -size -2k",
    ),
    (
        "bad-image",
        traceback("OSError: image file is truncated (12 bytes not processed)"),
        "the log does not say which",
        "find IMAGE_FOLDER -type f -size -2k",
    ),
    (
        "missing-file",
        traceback("FileNotFoundError: [Errno 2] No such file or directory: 'training/data/stage_1.json'"),
        "A file is missing: training/data/stage_1.json",
        "lorapatch check 'my train.sh'",
    ),
    ("missing-file", "bash: eval/textvqa.sh: No such file or directory\n", "eval/textvqa.sh", "lorapatch check 'my train.sh'"),
    (
        "permission",
        traceback("PermissionError: [Errno 13] Permission denied: '/data/out'"),
        "No permission for /data/out",
        "ls -ld /data/out",
    ),
    (
        "bad-json",
        traceback("json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        "Expecting value: line 1 column 1",
        "lorapatch check 'my train.sh'",
    ),
    (
        "keyword",
        traceback("TypeError: GemmaForCausalLM.forward() got an unexpected keyword argument 'num_items_in_batch'"),
        "knows no argument num_items_in_batch",
        "lorapatch doctor",
    ),
    (
        "port",
        traceback("torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address."
                  " port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use"),
        "holds the master port 29500",
        "ss -ltnp",
    ),
    (
        "rank-lost",
        "[rank1]:[E701 22:40:12 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)\n",
        "lost each other",
        "NCCL_DEBUG=INFO lorapatch smoke 'my train.sh'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("id", "text", "cause", "remedy"), ROWS, ids=[f"{row[0]}-{i}" for i, row in enumerate(ROWS)])
def test_a_row_is_found_and_its_remedy_is_a_command(id: str, text: str, cause: str, remedy: str) -> None:
    found = told(text)
    assert (found.id, found.remedy.split("   #")[0]) == (id, remedy)
    assert cause in found.cause
    assert found.cause.endswith((".", "]")) or "\n" not in found.cause
    assert found.evidence and found.evidence in text
    assert "{" not in found.remedy


def test_every_row_of_the_table_has_such_a_log() -> None:
    assert {row.id for row in SYMPTOMS} == {row[0] for row in ROWS}


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        (
            ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.95 GiB. GPU 0 has a total capacity of 23.50 GiB of"
            " which 1.25 GiB is free. Including non-PyTorch memory, this process has 22.24 GiB memory in use. Of the allocated"
            " memory 21.50 GiB is allocated by PyTorch, and 300.00 MiB is reserved by PyTorch but unallocated."),
            {"wanted_B": round(1.95 * GIB), "total_B": round(23.5 * GIB), "free_B": round(1.25 * GIB), "allocated_B": round(21.5 * GIB),
             "idle_B": 300 << 20},
        ),
        (
            ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 512.00 MiB (GPU 0; 23.50 GiB total capacity; 22.00 GiB"
            " already allocated; 100.00 MiB free; 22.50 GiB reserved in total by PyTorch)"),
            {"wanted_B": 512 << 20, "total_B": round(23.5 * GIB), "free_B": 100 << 20, "allocated_B": 22 * GIB},
        ),
    ],
)  # fmt: skip
def test_the_figures_of_a_full_gpu_are_read_from_old_and_new_messages(text: str, figures: dict[str, int]) -> None:
    found = told(traceback(text, "[rank0]: "))
    assert (found.id, dict(found.figures)) == ("cuda-oom", figures)
    assert found.remedy == "lorapatch tune 'my train.sh' --budget 23.5GiB"
    assert "of 23.50 GiB in all" in found.cause and "were wanted" in found.cause


def test_a_full_gpu_says_who_else_is_on_it_and_when_it_is_only_in_pieces() -> None:
    shared = told(traceback(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.50 GiB of which"
        " 1.00 MiB is free. Process 99 has 15.00 GiB memory in use. Of the allocated memory 8.00 GiB is allocated by PyTorch, and"
        " 30.00 MiB is reserved by PyTorch but unallocated."
    ))  # fmt: skip
    assert "Another process holds 15.00 GiB" in shared.cause and shared.remedy.startswith("nvidia-smi")
    pieces = told(traceback(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.50 GiB of which"
        " 1.00 MiB is free. Of the allocated memory 8.00 GiB is allocated by PyTorch, and 3.00 GiB is reserved by PyTorch but unallocated."
    ))  # fmt: skip
    assert pieces.remedy == "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lorapatch smoke 'my train.sh'"


def test_a_full_gpu_without_figures_is_found_too() -> None:
    found = told(traceback("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert (found.id, found.remedy) == ("cuda-oom", "lorapatch tune 'my train.sh' --budget 24GiB")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[2025-07-01] [ERROR] [launch.py:322:sigkill_handler] ['python', 'train.py'] exits with return code = -9\n", 247),
        ("train.sh: line 3: 4711 Killed                  python train.py\n", 137),
        ("  exitcode  : -9 (pid: 4711)\n  traceback : Signal 9 (SIGKILL) received by PID 4711\n", 1),
        (traceback("RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory:"
                   " you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"), 1),
        ("", 137),
    ],
)  # fmt: skip
def test_a_host_out_of_memory_is_told_from_a_gpu_out_of_memory(text: str, code: int) -> None:
    run = Evidence(BEFORE + text + "Connection closed by peer\n", code, script="t.sh", flags=FLAGS)
    found = diagnose(run)
    assert found is not None and found.id == "host-oom"
    assert "host memory, not the GPU's" in found.cause and "zero3_offload.json" in found.cause
    assert found.remedy == "lorapatch patch t.sh --set deepspeed=scripts/zero3.json"
    assert ("8589934592" in text) == (found.figures == {"wanted_B": 8589934592})
    other = diagnose(replace(run, flags={}))
    assert other is not None and other.remedy == "lorapatch patch t.sh --set dataloader_num_workers=0"


@pytest.mark.parametrize(("code", "name"), [(139, "SIGSEGV"), (132, "SIGILL"), (134, "SIGABRT"), (135, "SIGBUS")])
def test_a_crash_in_compiled_code_names_the_signal(code: int, name: str) -> None:
    found = diagnose(Evidence(BEFORE, code))
    assert found is not None and found.id == "crash" and name in found.cause
    launched = diagnose(Evidence(f"x exits with return code = -{code - 128}\n", 1))
    assert launched is not None and name in launched.cause


def test_a_loss_that_is_no_number_says_at_which_step_and_what_to_change() -> None:
    run = Evidence(
        "",
        0,
        "finished",
        script="t.sh",
        flags={"learning_rate": "2e-3", "bf16": "True"},
        losses=[2.0, math.nan, math.nan],
    )
    found = diagnose(run)
    assert found is not None and found.id == "nan-loss" and "step 2" in found.evidence
    assert found.remedy == "lorapatch patch t.sh --learning-rate 0.0002"
    fp16 = diagnose(replace(run, flags={"fp16": "True"}))
    assert fp16 is not None and fp16.remedy == "lorapatch patch t.sh --set fp16=False --set bf16=True"


def test_a_loss_of_zero_an_exploding_and_a_flat_one_are_found_in_runs_that_ended_well() -> None:
    run = Evidence("", 0, "finished", script="t.sh", flags={"learning_rate": "2e-5"})
    zero = diagnose(replace(run, losses=[0.0] * 5))
    assert zero is not None and zero.id == "zero-loss" and "template" in zero.cause
    exploding = diagnose(replace(run, losses=[2.1, 2.0, 2.3, 6.0, 9.0, 11.0]))
    assert exploding is not None and exploding.remedy == "lorapatch patch t.sh --learning-rate 2e-06"
    flat = diagnose(replace(run, losses=[2.0 + 0.05 * math.sin(i) for i in range(40)]))
    assert flat is not None and flat.id == "flat-loss" and flat.remedy == "lorapatch patch t.sh --learning-rate 0.0002"


def test_a_good_run_has_no_diagnosis_whatever_warnings_it_printed() -> None:
    warnings = (
        BEFORE
        + "UserWarning: bf16 requires Ampere\nWARNING: No module named 'triton'\nretrying: Connection reset by peer\n"
    )
    falling = [2.5 - 0.03 * i + 0.02 * math.sin(i) for i in range(40)]
    assert diagnose(Evidence(warnings, 0, "finished", flags={"learning_rate": "2e-5"}, losses=falling)) is None
    assert diagnose(Evidence(warnings, 0, "finished", losses=[3.0, 2.0, 2.9, 2.1, 2.0])) is None


def test_a_warning_that_means_an_untrained_adapter_is_found_in_a_good_run() -> None:
    found = diagnose(
        Evidence("UserWarning: None of the inputs have requires_grad=True. Gradients will be None\n", 0, "finished")
    )
    assert found is not None and found.id == "no-gradient"
    harmless = Evidence("None of the inputs have requires_grad=True.\n", 0, "finished", passed=True)
    assert diagnose(harmless) is None  # the adapter shows that it was trained


@pytest.mark.parametrize(
    ("known", "id", "remedy"),
    [
        ({"lora_parameters": 0}, "no-lora", "lorapatch check t.sh"),
        ({"adapter_problems": {"empty": "every tensor is empty"}}, "empty-adapter",
         "lorapatch patch t.sh --set deepspeed=scripts/zero2.json"),
        ({"adapter_problems": {"moved": "every lora_B is zero"}}, "untrained-lora",
         "lorapatch patch t.sh --mode attach"),
        ({"adapter_modules": ["model.layers.0.q_proj", "model.vision_tower.layers.0.q_proj"]}, "lora-on-vision",
         "lorapatch patch t.sh --mode attach --target-modules q_proj,v_proj,o_proj"),
    ],
)  # fmt: skip
def test_what_the_adapter_shows_is_diagnosed_although_the_run_ended_well(
    known: dict[str, object], id: str, remedy: str
) -> None:
    found = diagnose(replace(Evidence("", 0, "finished", script="t.sh", flags=FLAGS), **known))  # type: ignore[arg-type]
    assert found is not None and (found.id, found.remedy) == (id, remedy)


def test_an_end_from_outside_is_no_fault_of_the_training() -> None:
    for state, reason in (("interrupted", "SIGINT"), ("timeout", "60 s")):
        found = diagnose(
            Evidence(BEFORE + "torch.OutOfMemoryError: CUDA out of memory.", 137, state, script="t.sh", reason=reason)
        )
        assert found is not None and found.id == state and reason in found.cause
        assert found.remedy == "lorapatch full t.sh --resume"
        smoke = diagnose(Evidence("", 137, state, kind="smoke", script="t.sh"))
        assert smoke is not None and smoke.remedy == "lorapatch smoke t.sh"
        for kind in ("probe", "tune"):  # both are parts of a tuning
            part = diagnose(Evidence("", 137, state, kind=kind, script="t.sh", budget_B=24 << 30))
            assert part is not None and part.remedy == f"lorapatch tune t.sh --budget {24 << 30} --resume"


def test_the_first_error_of_several_ranks_is_shown_when_no_row_fits() -> None:
    text = traceback("mgm.errors.OddError: first", "[rank1]: ") + traceback("RuntimeError: second", "[rank0]: ")
    found = told(text)
    assert (found.id, found.evidence) == ("unknown", "mgm.errors.OddError: first")
    silent = diagnose(Evidence("nothing\nlast words\n\n", 3))
    assert silent is not None and (silent.evidence, "exit code 3" in silent.cause) == ("last words", True)


def test_a_launcher_that_hides_its_trainers_end_is_not_believed() -> None:
    found = diagnose(Evidence("step 2\n", 0, "finished", reached_end=False))
    assert found is not None and found.id == "not-finished"


def test_the_cause_counts_before_what_follows_from_it() -> None:
    text = (
        traceback("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited", "[rank0]: ")
        + traceback("FileNotFoundError: [Errno 2] No such file or directory: 'images/1.jpg'", "[rank1]: ")
    )  # fmt: skip
    assert told(text).id == "missing-file"


def test_figures_decide_whether_a_loss_explodes() -> None:
    assert not is_exploding([]) and not is_exploding([5.0]) and not is_exploding([0.1, 0.15, 0.3])
    assert not is_exploding([2.0, 3.5, 2.0, 3.8, 1.9]) and is_exploding([2.0, 2.0, 9.0])


def test_patterns_take_linear_time_on_a_long_log() -> None:
    import time

    log = ("x" * 300 + " [INFO] 12:34 '/a/b' \n") * 5_000 + "a" * 200_000
    begun = time.perf_counter()
    diagnose(Evidence(log, 1))
    assert time.perf_counter() - begun < 20
    assert all(re.compile(row.pattern.pattern) for row in SYMPTOMS)
