"""What a launch is for, decided by weighed evidence, each piece with its reason in words."""

from __future__ import annotations

import re

from lorapatch.launch.model import Launch, Stage
from lorapatch.shell.outline import Outline

__all__ = ["decide_stage"]

# What names say, by their parts: "MGM-2B-Finetune" has mgm, 2b and finetune.
_WORDS: dict[str, frozenset[str]] = {
    "pretrain": frozenset("pretrain pretraining alignment align".split()),
    "finetune": frozenset(
        "finetune finetuned finetuning tune tuning ft sft dpo rlhf kto ppo it instruct instruction instructions".split()
    ),
}
# What may stand anywhere in a name, parts or not.
_INSIDE = {"pretrain": ("pretrain", "预训练"), "finetune": ("finetun", "微调")}
_STAGES = re.compile(r"stage[-_ ]?(\d)")
_TRAINS = frozenset("train trainer training pretrain finetune finetuning tune sft dpo rlhf ppo reward".split())
_OTHER_TRADES: dict[str, frozenset[str]] = {
    "preprocessing": frozenset(
        "preprocess process preprocessing postprocess postprocessing check convert conversion download prepare tokenize"
        " split clean format merge extract build make create consolidate fp32 quantize export upload dj analyze analyse"
        " data dataset filter annotate caption embed embedding embeddings pip setup install".split()
    ),
    "evaluation": frozenset(
        "eval evaluate evaluation evaluator test tests bench benchmark score scores metric metrics vqa mmbench mme"
        " summarize".split()
    ),
    "inference": frozenset(
        "infer inference predict prediction generate generation serve server cli demo chat app gradio web controller"
        " worker api".split()
    ),
}
_TRAINING_FLAGS = {
    "learning_rate": "a learning rate",
    "lr": "a learning rate",
    "num_train_epochs": "a number of epochs",
    "num_epochs": "a number of epochs",
    "epochs": "a number of epochs",
    "max_steps": "a number of steps",
    "max_train_steps": "a number of steps",
    "per_device_train_batch_size": "a train batch size",
    "train_batch_size": "a train batch size",
    "train_micro_batch_size_per_gpu": "a train batch size",
    "gradient_accumulation_steps": "gradient accumulation",
    "deepspeed": "a DeepSpeed configuration",
    "deepspeed_config": "a DeepSpeed configuration",
    "zero_stage": "a ZeRO stage",
    "warmup_ratio": "a warm-up",
    "lr_scheduler_type": "a learning rate schedule",
}
_NAMING_FLAGS = (
    "output_dir",
    "output_path",
    "save_dir",
    "run_name",
    "logging_dir",
    "wandb_run_name",
    "exp_name",
    "log_dir",
)


def decide_stage(launch: Launch, outline: Outline) -> Stage:
    """The stage of ``launch`` with the evidence for it."""
    name = launch.trainer.name.rsplit("/", 1)[-1]
    parts = _parts(name.removesuffix(".py"))
    evidence = [
        f"{flag.name} gives {_TRAINING_FLAGS[key]}"
        for flag in launch.flags
        if (key := flag.name.lstrip("-").replace("-", "_")) in _TRAINING_FLAGS and _counts(key, flag.value)
    ]
    trade = next((trade for trade, words in _OTHER_TRADES.items() if words & parts), None)
    trains = bool(_TRAINS & parts)
    # A name against the flags: `eval.py --num_train_epochs …` needs more of them to be believed.
    if trade is not None and len(evidence) < (2 if trains else 3):
        return Stage(trade, False, (f"the program is called {name}",))
    if trains:
        evidence.append(f"the trainer is called {name}")
    if not evidence:
        return Stage(None, False, ("nothing says that it trains",))
    return _training_stage(launch, outline, evidence)


def _counts(key: str, value: str | None) -> bool:
    """``--deepspeed`` counts with a configuration behind it, ``--max_steps -1`` not at all."""
    if key == "deepspeed":
        return value is None or value != ""
    return value not in ("-1", "0") or key not in ("max_steps", "max_train_steps")


def _parts(name: str) -> frozenset[str]:
    """The lower-case words in a name: at dots, dashes, underscores, digits and capitals."""
    return frozenset(part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*", name))


def _training_stage(launch: Launch, outline: Outline, evidence: list[str]) -> Stage:
    votes = {"pretrain": 0, "finetune": 0}
    reasons: dict[str, list[str]] = {"pretrain": [], "finetune": []}

    def vote(stage: str, weight: int, reason: str) -> None:
        votes[stage] += weight
        if reason not in reasons[stage]:
            reasons[stage].append(reason)

    for flag in launch.flags:
        key = flag.name.lstrip("-").replace("-", "_")
        if key == "tune_mm_mlp_adapter" and (flag.value or "").lower() in ("true", "1", "yes", ""):
            vote("pretrain", 20, f"{flag.name} {flag.text}: only the projector is trained".replace("  ", " "))
        elif key == "pretrain_mm_mlp_adapter":
            vote("finetune", 6, f"{flag.name}: it starts from a pre-trained projector")
        elif key in ("tune_mm_vision_tower", "unfreeze_mm_vision_tower") and (flag.value or "").lower() == "true":
            vote("finetune", 2, f"{flag.name} {flag.text}")
    for what, text, weight in _names(launch, outline):
        for stage, points, said in _said(text):
            vote(stage, points * weight, f"{what} says {said}")
    if votes["pretrain"] > votes["finetune"]:
        return Stage("pretrain", True, (*reasons["pretrain"], *evidence))
    why = reasons["finetune"] or ["a training launch, and nothing says pre-training"]
    return Stage("finetune", True, (*why, *evidence))


def _said(text: str) -> list[tuple[str, int, str]]:
    """(stage, points, what was said) for each hint in a name or a comment."""
    parts = _parts(text)
    plain = text.lower().replace("-", "").replace("_", "").replace(" ", "")
    found = [
        (stage, 2, stage)
        for stage, words in _WORDS.items()
        if words & parts or any(word in plain.replace("pretrained", "") for word in _INSIDE[stage])
    ]
    for number in _STAGES.findall(text.lower()):
        found.append(("pretrain" if number == "1" else "finetune", 1, f"stage {number}"))
    return found


def _names(launch: Launch, outline: Outline) -> list[tuple[str, str, int]]:
    """(what it is, its text, its weight) of the names around a launch."""
    found = [("the trainer's name", launch.trainer.name.rsplit("/", 1)[-1], 2)]
    flags = {flag.name.lstrip("-").replace("-", "_"): flag for flag in launch.flags}  # the last counts
    for name in _NAMING_FLAGS:
        flag = flags.get(name)
        if flag is not None:
            found.append((flag.name, flag.value if flag.value is not None else flag.text, 2))
            found.append((f"the variable in {flag.name}", flag.text if "$" in flag.text else "", 2))
    source = outline.source
    end = source.find(b"\n", launch.end)
    tail = source[launch.end : end if end >= 0 else len(source)]
    found.append(("the log's name", tail.decode("utf-8", "replace"), 1))
    found += [("the redirect", text, 1) for text in launch.redirects]
    if launch.environment:
        found.append(("the environment", " ".join(f"{name}={word.text}" for name, word in launch.environment), 1))
    found.append(("the comment above", _comment_above(source, launch.start), 1))
    return found


def _comment_above(source: bytes, start: int) -> str:
    """The comment lines and echoes directly above the command, not those of the command before it."""
    lines = source[max(0, start - 2000) : start].decode("utf-8", "replace").split("\n")[:-1]
    kept: list[str] = []
    for line in reversed(lines):
        text = line.strip()
        if text.startswith(("#", "echo ")):
            kept.append(text)
        elif text and (kept or not text.startswith(("mkdir", "export", "set ", "cd "))):
            break
        if len(kept) >= 6:
            break
    return " ".join(kept)
