"""What training runs die of: how a log shows it, what it means, and the command that helps."""
# ruff: noqa: E501 (a table of patterns and sentences is read by its rows)

from __future__ import annotations

import re
from dataclasses import dataclass
from re import Pattern

__all__ = ["SYMPTOMS", "Symptom"]


@dataclass(frozen=True)
class Symptom:
    """One row. ``cause`` and ``remedy`` may name the groups of ``pattern``, and {script}, {python}, {output_dir},
    {images}, {zero2} and {and_zero2}. ``always``: it is looked for in a run that ended well, too. ``last``: only if nothing else, the exit
    code included, says more.
    """

    id: str
    pattern: Pattern[str]
    cause: str
    remedy: str
    always: bool = False
    last: bool = False


def _row(id: str, pattern: str, cause: str, remedy: str, always: bool = False, last: bool = False) -> Symptom:
    return Symptom(id, re.compile(pattern, re.MULTILINE), cause, remedy, always, last)


# The first row that is found counts, so causes stand before what follows from them (a rank that died of its own
# error makes the others report NCCL's). The figures of an out-of-memory message are read in diagnose.py.
SYMPTOMS: tuple[Symptom, ...] = (
    _row(
        "shared-memory",
        r"insufficient shared memory|unable to (?:open|mmap|allocate|write to) (?:shared memory )?(?:object|file) </torch_|"
        r"DataLoader worker .{0,80}Bus error",
        "The DataLoader's workers ran out of shared memory (/dev/shm), which is not the GPU's memory.",
        "lorapatch patch {script} --set dataloader_num_workers=0",
    ),
    _row(
        "no-space",
        r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed writing file|enforce fail at inline_container",
        "The disk is full: a checkpoint or the log could not be written.",
        "df -h {output_dir}",
    ),
    # -- the shell
    _row(
        "cut-command",
        r"line (?P<line>\d+): (?P<flag>--?[A-Za-z][\w-]*): command not found",
        "Line {line} of the script is not part of the command above it: {flag} was run as a command of its own, because a"
        " blank or a comment stands behind a backslash, or the backslash is missing.",
        "lorapatch check {script}",
    ),
    _row(
        "program-missing",
        r"(?:line \d+: |^bash: )(?P<program>[\w./+-]+): command not found",
        "{program} is not installed in this environment, or the environment is not activated.",
        "lorapatch doctor",
    ),
    _row(
        "unset-variable",
        r"line (?P<line>\d+): (?P<name>\w+): unbound variable",
        "Line {line} uses the variable {name}, which nothing has set.",
        "lorapatch inspect {script}",
    ),
    _row(
        "shell-syntax",
        r"line (?P<line>\d+): syntax error[^\n]*",
        "Bash cannot read line {line} of the script.",
        "lorapatch check {script}",
    ),
    # -- Python cannot start, or does not take the flags
    _row(
        "trainer-missing",
        r"can't open file '(?P<path>[^'\n]+)'",
        "The trainer {path} does not exist.",
        "lorapatch check {script}",
    ),
    _row(
        "flash-attention",
        r"No module named 'flash_attn[^\n]*|package flash_attn seems to be not installed|FlashAttention only supports Ampere GPUs"
        r" or newer|flash_attn_2_cuda[^\n]*undefined symbol",
        "Flash attention was asked for, and is not installed or does not work on this GPU.",
        "lorapatch patch {script} --set attn_implementation=sdpa",
    ),
    _row(
        "quantisation-missing",
        r"No module named 'bitsandbytes'|(?:requires|install) [^\n]{0,60}bitsandbytes|bitsandbytes [^\n]{0,80}was compiled without GPU support",
        "8 and 4 bits need bitsandbytes, which is not installed or has no GPU support here.",
        "{python} -m pip install -U bitsandbytes",
    ),
    _row(
        "missing-module",
        r"ModuleNotFoundError: No module named '(?P<module>[\w.]+)'",
        "The Python package {module} is not installed in the trainer's environment (or, if it is the toolkit's own, not on PYTHONPATH).",
        "{python} -m pip install {package}",
    ),
    _row(
        "missing-library",
        r"ImportError: [^\n]{0,200}(?:lib[\w.+-]+\.so[\w.]*): cannot open shared object file",
        "A system library that a Python package needs is missing.",
        "lorapatch doctor",
    ),
    _row(
        "versions",
        r"ImportError: cannot import name '(?P<name>\w+)' from '(?P<module>[\w.]+)'",
        "The installed {module} has no {name}: its version does not fit the trainer.",
        "lorapatch doctor",
    ),
    _row(
        "unknown-lora-flag",
        r"(?:unrecognized arguments:|not used by the HfArgumentParser:|no such option:?)[^\n]{0,400}?(?P<flag>--lora_\w+)",
        "The trainer knows no {flag}: it has no LoRA of its own, or calls it by another name.",
        "lorapatch patch {script} --mode attach",
    ),
    _row(
        "unknown-flag",
        r"(?:unrecognized arguments:|not used by the HfArgumentParser:|[Nn]o such option:?|[Uu]nknown (?:flag|option|argument):?)\s*"
        r"(?P<flags>[^\n]{1,200})",
        "The trainer does not know these flags: {flags}",
        "lorapatch check {script}",
    ),
    _row(
        "bad-value",
        r"error: argument (?P<flag>--?[\w/, -]+?): (?P<what>(?:expected|invalid) [^\n]{1,200})",
        "The value of {flag} is not accepted: {what}",
        "lorapatch inspect {script}",
    ),
    _row(
        "newer-peft",
        r"(?:Lora|Peft|Prompt)\w*Config\.__init__\(\) got an unexpected keyword argument '(?P<name>\w+)'",
        "The adapter was saved by a newer PEFT than the one that loads it, which does not know {name}.",
        "{python} -m pip install -U peft",
    ),
    _row(
        "renamed-argument",
        r"TrainingArguments\.__init__\(\) got an unexpected keyword argument '(?P<name>\w+)'",
        "The installed transformers has no training argument {name} (evaluation_strategy, for one, became eval_strategy).",
        "lorapatch check {script}",
    ),
    # -- LoRA
    _row(
        "target-modules",
        r"Target modules (?P<names>.{1,200}?) not found in the base model|No modules were targeted for adaptation|"
        r"Target module .{1,200}? is not supported",
        "LoRA found no layer by the target modules' names (or one that is not linear).",
        "lorapatch patch {script} --target-modules all-linear",
    ),
    _row(
        "no-gradient",
        r"element 0 of tensors does not require grad|None of the inputs have requires_grad=True",
        "Under gradient checkpointing no gradient reaches LoRA, because the inputs do not require one"
        " (enable_input_require_grads was not called).",
        "lorapatch patch {script} --mode attach",
        always=True,
    ),
    _row(
        "nothing-to-train",
        r"optimizer got an empty parameter list|trainable params: 0 \|\|",
        "No parameter is trainable: LoRA's were frozen again (tune_mm_mlp_adapter does that), or the flags stand on another stage.",
        "lorapatch check {script}",
        always=True,
    ),
    _row(
        "bitsandbytes-zero3",
        r"`?\.to`? is not supported for `?(?:4|8)-bit`?|has no attribute 'quant_state'|"
        r"DeepSpeed Zero-?3 is not compatible with|cannot quantize [^\n]{0,60}meta",
        "Weights in 8 or 4 bits do not go with ZeRO-3 in these versions (bitsandbytes 0.43.3 is the first that does).",
        "lorapatch patch {script} --set deepspeed={zero2}",
    ),
    _row(
        "tensor-in-json",
        r"Object of type Tensor is not JSON serializable",
        "The trainer's state holds a tensor (ZeRO-3's gradient norm) that transformers cannot write as JSON: saving fails.",
        "lorapatch patch {script} --set deepspeed={zero2}",
    ),
    _row(
        "resume-mismatch",
        r"loaded state dict (?:contains a parameter group that doesn't match|has a different number of parameter groups)|"
        r"Can't find a valid checkpoint at|size mismatch for [^\n]{1,200}copying a param [^\n]{0,100}checkpoint|"
        r"Missing key\(s\) in state_dict[^\n]{0,200}lora_",
        "The output directory holds a checkpoint of another kind of run (full tuning, another rank), and the trainer resumes from it.",
        "lorapatch patch {script} --set output_dir={output_dir}-lora",
    ),
    _row(
        "zero3-shard",
        r"(?:shape|size)[^\n]{0,60}torch\.Size\(\[0\]\)|'weight' must be 2-D",
        "A weight is empty: under ZeRO-3 it was used or saved without being gathered.",
        "lorapatch patch {script} --set deepspeed={zero2}",
    ),
    _row(
        "adapter-as-model",
        r"no file named (?:pytorch_model\.bin|model\.safetensors)[^\n]{0,200}found in directory (?P<path>\S+?)\.?$|"
        r"Unrecognized model in (?P<model>\S+?)\. Should have a `model_type` key",
        "A stage loads the LoRA adapter as if it were a whole model: it has to be merged into the base first.",
        "lorapatch patch {script} --with-merge",
    ),
    # -- numbers
    _row(
        "fp16-overflow",
        r"Current loss scale already at minimum",
        "In fp16 the gradients overflow at every step, and the loss scale cannot go lower.",
        "lorapatch patch {script} --set fp16=False --set bf16=True",
    ),
    _row(
        "template",
        r"tokenization mismatch: \d+ vs\. \d+",
        "The conversation template (--version) is not the tokenizer's: the labels are dropped, and the loss is 0 or NaN.",
        "lorapatch inspect {script}",
        always=True,
    ),
    _row(
        "vocabulary",
        r"device-side assert triggered|index out of range in self|srcIndex < srcSelectDimSize",
        "A token's id is outside of the embedding table: the tokenizer has more tokens than the model, or -200 reached it as an id.",
        "lorapatch check {script}",
    ),
    _row(
        "dtype",
        r"expected (?:m1 and m2|mat1 and mat2|scalar type)[^\n]{0,100}(?:dtype|but (?:found|got))[^\n]{0,60}|"
        r"must have the same dtype[^\n]{0,60}|Input type \([^\n)]+\) and (?:weight|bias) type \([^\n)]+\) should be the same|"
        r"output tensor must have the same type as input tensor|Index put requires the source and destination dtypes match",
        "Numbers of two types meet in one operation: parts of the model are in another precision than the rest.",
        "lorapatch patch {script} --set bf16=True --set fp16=False{and_zero2}",
    ),
    # -- GPU and its software
    _row(
        "no-gpu",
        r"no GPU resources available|No CUDA GPUs are available|Found no NVIDIA driver|Torch not compiled with CUDA enabled|"
        r"CUDA driver initialization failed|no NVIDIA GPU detected",
        "The trainer wants a CUDA GPU, and PyTorch sees none (no GPU, no driver, or a PyTorch without CUDA).",
        "lorapatch doctor",
    ),
    _row(
        "no-bf16",
        r"[Yy]our setup doesn't support bf16|bf16[^\n]{0,40}requires? Ampere|--tf32 requires Ampere|BFloat16 is not supported",
        "This GPU (older than Ampere), or no GPU at all, cannot compute in bf16 or TF32.",
        "lorapatch patch {script} --set bf16=False --set tf32=False --set fp16=True",
    ),
    _row(
        "no-such-gpu",
        r"invalid device ordinal|No slot '(?P<slot>\d+)' specified on host|Hostname '[^'\n]+' not found in hostfile",
        "The launch names a GPU that this machine does not have.",
        "nvidia-smi -L",
    ),
    _row(
        "no-kernel",
        r"no kernel image is available for execution on the device",
        "This PyTorch, or a compiled extension, was not built for this GPU's generation.",
        "lorapatch doctor",
    ),
    _row(
        "deepspeed-build",
        r"Error building extension '(?P<op>\w+)'|CUDAMismatchException|CUDA_HOME does not exist|Ninja is required|"
        r"object has no attribute 'ds_opt_adam'",
        "DeepSpeed could not compile one of its operations (no or another CUDA toolkit, no compiler, no ninja).",
        "lorapatch doctor",
    ),
    _row(
        "deepspeed-batch",
        r"Check batch related parameters|DeepSpeed config values that mismatch TrainingArguments",
        "The DeepSpeed configuration and the flags disagree; \"auto\" in the JSON takes the flags' values.",
        "lorapatch check {script}",
    ),
    _row(
        "deepspeed-config",
        r"(?:DeepSpeed|ds_config|deepspeed)[^\n]{0,200}(?:JSONDecodeError|is not valid JSON)|Expected a string path to an existing deepspeed config",
        "The DeepSpeed configuration is missing or is not JSON.",
        "lorapatch check {script}",
    ),
    # -- files
    _row(
        "gated",
        r"GatedRepoError|Cannot access gated repo|401 Client Error",
        "The model on the Hugging Face hub asks for an account that has accepted its terms.",
        "huggingface-cli login",
    ),
    _row(
        "model-missing",
        r"Repo id must be [^\n]{0,120}?'(?P<repo>/[^'\n]+)'|(?<![^\s'\"])(?P<path>[^\s'\"]{1,300})'? is not a local folder and is not a valid model identifier|"
        r"Incorrect path_or_model_id: '(?P<id>[^'\n]+)'|(?<!\S)(?P<folder>\S{1,300}) does not appear to have a file named config\.json",
        "The model folder is not there, or holds no model.",
        "lorapatch check {script}",
    ),
    _row(
        "offline",
        r"couldn't connect to '?https?://|LocalEntryNotFoundError|outgoing traffic has been disabled|Failed to resolve 'huggingface",
        "A name was looked up on the Hugging Face hub, which cannot be reached from here: a path is wrong, or the files have to be"
        " fetched first.",
        "lorapatch check {script}",
    ),
    _row(
        "bad-image",
        r"cannot identify image file (?:<\w+ name=)?'(?P<path>[^'\n]{1,300})'|cannot identify image file|image file is truncated",
        "An image of the data set is damaged: {path}",
        "find {images} -type f -size -2k   # a file that was cut short is a small one",
    ),
    _row(
        "missing-file",
        r"(?:FileNotFoundError|NotADirectoryError): [^\n]{0,200}?'(?P<path>[^'\n]+)'|: (?P<file>[^\s:']{1,300}): No such file or directory",
        "A file is missing: {path}",
        "lorapatch check {script}",
    ),
    _row(
        "permission",
        r"(?:PermissionError: [^\n]{0,80}?'(?P<path>[^'\n]+)'|(?<![^\s:'])(?P<file>[^\s:']{1,300}): Permission denied)",
        "No permission for {path}",
        "ls -ld {path}",
    ),
    _row(
        "bad-json",
        r"JSONDecodeError: (?P<what>[^\n]{1,200})",
        "A JSON file (data, configuration) cannot be read: {what}",
        "lorapatch check {script}",
    ),
    # -- what follows from something else, or says little
    _row(
        "keyword",
        r"(?<![\w.])(?P<function>[\w.]{1,200})\(\) got an unexpected keyword argument '(?P<name>\w+)'",
        "{function} knows no argument {name}: versions of the libraries do not fit the trainer.",
        "lorapatch doctor",
    ),
    _row(
        "port",
        r"[Aa]ddress already in use|EADDRINUSE",
        "Another process (another training, or what was left of one) holds the master port{port}.",
        "ss -ltnp   # end the one that holds it, or take --master_port out of the script: lorapatch then picks a free one",
    ),
    _row(
        "rank-lost",
        r"Watchdog caught collective operation timeout|NCCL (?:error|WARN)[^\n]{0,200}|ncclSystemError|ncclInternalError|"
        r"Connection (?:reset|closed) by peer|RendezvousTimeout|ChildFailedError|Timed out (?:waiting|initializing)",
        "The ranks lost each other: one of them died first, or the network between them does not work.",
        "NCCL_DEBUG=INFO lorapatch smoke {script}",
        last=True,
    ),
)  # fmt: skip
