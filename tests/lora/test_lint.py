"""Each rule has a script that breaks it and one that does not; selection, comments and every output format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorapatch.errors import UsageError
from lorapatch.lora import lint
from lorapatch.lora.lint import CheckOptions, Diagnostic, check_script, check_scripts, config_rules, exit_code
from lorapatch.lora.support import transformers_fields as fields

TRAINER = """
from dataclasses import dataclass, field
from typing import List, Optional
import transformers
from peft import LoraConfig, get_peft_model

@dataclass
class ModelArguments:
    model_name_or_path: str = ""
    vision_tower: str = ""
    tune_mm_mlp_adapter: bool = False
    pretrain_mm_mlp_adapter: Optional[str] = None
    forgotten: int = 0

@dataclass
class TrainingArguments(transformers.TrainingArguments):
    data_path: str = ""
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 64
    lora_target_modules: List[str] = field(default_factory=list)
    bits: int = 16

def train():
    parser = transformers.HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, args = parser.parse_args_into_dataclasses()
    if "gemma" in model_args.model_name_or_path:
        model = gemma(model_args.model_name_or_path, args.bits)
    else:
        model = llama(model_args.model_name_or_path, model_args.pretrain_mm_mlp_adapter)
    model.vision(model_args.vision_tower, args.data_path)
    model.enable_input_require_grads()
    if args.lora_enable:
        config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=args.lora_target_modules)
        model = get_peft_model(model, config)
    if model_args.tune_mm_mlp_adapter:
        model.requires_grad_(False)
    transformers.Trainer(model=model, args=args).train()

if __name__ == "__main__":
    train()
"""
SCRIPT = """#!/bin/bash
set -o pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
NAME=mini
OUT=$HERE/output/$NAME
python $HERE/tools/check_global_batch.py 4 8 32
mkdir -p $OUT-pretrain
deepspeed --num_gpus 1 $HERE/train.py \\
    --deepspeed $HERE/zero2.json \\
    --model_name_or_path $HERE/models/gemma-2b \\
    --vision_tower $HERE/models/clip \\
    --data_path $HERE/data/train.json \\
    --tune_mm_mlp_adapter True \\
    --output_dir $OUT-pretrain \\
    --per_device_train_batch_size 4 \\
    --gradient_accumulation_steps 8 \\
    --learning_rate 1e-3 2>&1 | tee pre.log
deepspeed --num_gpus 1 $HERE/train.py \\
    --deepspeed $HERE/zero2.json \\
    --model_name_or_path $HERE/models/gemma-2b \\
    --vision_tower $HERE/models/clip \\
    --data_path $HERE/data/train.json \\
    --pretrain_mm_mlp_adapter $OUT-pretrain/mm_projector.bin \\
    --lora_enable True \\
    --lora_r 16 \\
    --lora_alpha 32 \\
    --bf16 True \\
    --gradient_checkpointing True \\
    --output_dir $OUT-finetune \\
    --per_device_train_batch_size 4 \\
    --gradient_accumulation_steps 8 \\
    --learning_rate 2e-4 2>&1 | tee fine.log
if [ $? -ne 0 ]; then echo failed; exit 1; fi
python tools/merge_lora.py $OUT-finetune
bash eval/textvqa.sh $NAME-finetune 0
"""
GATHERS = "import transformers\nfrom deepspeed.zero import GatheredParameters\nprint(GatheredParameters)"
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
ZERO2 = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}}


@pytest.fixture(autouse=True)
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_installed", lambda: None)


class Toolkit:
    """A folder with a script, a trainer, a model and data; all of it in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "run.sh"
        self.write("run.sh", SCRIPT)
        self.write("train.py", TRAINER)
        self.write("zero2.json", json.dumps(ZERO2))
        self.write("models/gemma-2b/config.json", '{"model_type": "gemma"}')
        self.write("models/clip/config.json", "{}")
        self.write("data/train.json", "[]")

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def edit(self, name: str, old: str, new: str, *, last: bool = True) -> None:
        """Replace the last (or first) ``old`` in a file."""
        text = (self.folder / name).read_text()
        assert old in text
        self.write(name, new.join(text.rsplit(old, 1)) if last else text.replace(old, new, 1))

    def line(self, text: str) -> int:
        """The number of the last line that has ``text`` in it."""
        lines = self.script.read_text().splitlines()
        return max(i for i, line in enumerate(lines, 1) if text in line)

    def check(self, **options: object) -> list[Diagnostic]:
        return check_script(self.script, CheckOptions(**options))  # type: ignore[arg-type]


@pytest.fixture
def toolkit(tmp_path: Path) -> Toolkit:
    return Toolkit(tmp_path)


def test_a_script_in_order_is_clean(toolkit: Toolkit) -> None:
    assert toolkit.check() == []


def zero3(toolkit: Toolkit, **more: object) -> None:
    toolkit.write("zero2.json", json.dumps({"zero_optimization": {"stage": 3, **more}}))


def _cut(t: Toolkit) -> None:
    t.edit("run.sh", "--lora_r 16 \\", "--lora_r 16 \\  # the rank")


def _both_class_names(t: Toolkit) -> None:
    t.edit("run.sh", "models/gemma-2b", "models/base")
    t.write("models/base/config.json", '{"model_type": "gemma"}')


# rule, what breaks the script, the text of the line that is reported, a part of the sentence
BREAKS: list[tuple[str, Callable[[Toolkit], object], str, str]] = [
    ("LP101", lambda t: t.edit("run.sh", "exit 1; fi", "exit 1"), "", "bash -n"),
    ("LP102", _cut, "# the rank", "a comment stands behind the backslash"),
    ("LP103", lambda t: t.edit("run.sh", "set -o pipefail", "true"), "if [ $?", "$? is the status of tee"),
    (
        "LP103",
        lambda t: (
            t.edit("run.sh", "set -o pipefail", "true"),
            t.edit("run.sh", "fine.log\nif [ $? -ne 0 ]", "fine.log || exit 1\nif false"),
        ),
        "|| exit 1",
        "test the status of tee",
    ),
    (
        "LP104",
        lambda t: t.edit("run.sh", "NAME=mini\n", "echo $LATER\nNAME=mini\nLATER=1\n"),
        "echo $LATER",
        "set on line 6",
    ),
    (
        "LP105",
        lambda t: t.edit("run.sh", "--lora_r 16 \\", "--lora_r 16 --lora-r 8 \\"),
        "--lora-r 8",
        "a second time (first on line 25)",
    ),
    (
        "LP201",
        lambda t: t.edit("run.sh", "--tune_mm_mlp_adapter True", "--tune_mm_mlp_adapter True --lora_enable True"),
        "--tune_mm",
        "freezes it",
    ),
    ("LP202", lambda t: t.edit("run.sh", "2e-4", "2e-5"), "2e-5", "full fine-tuning"),
    ("LP202", lambda t: t.edit("run.sh", "2e-4", "1e-2"), "1e-2", "diverge"),
    ("LP203", lambda t: t.edit("run.sh", "--lora_alpha 32", "--lora_alpha 256"), "--lora_alpha", "256 / 16 = 16"),
    ("LP203", lambda t: t.edit("run.sh", "--lora_r 16 \\\n", "--lora_r 256 \\\n"), "--lora_alpha", "32 / 256"),
    (
        "LP204",
        lambda t: t.write("output/mini-finetune/checkpoint-5/model.safetensors", ""),
        "--output_dir",
        "of a full fine-tuning",
    ),
    (
        "LP204",
        lambda t: t.write("output/mini-pretrain/checkpoint-5/adapter_config.json", ""),
        "$OUT-pretrain \\",
        "of a LoRA run",
    ),
    (
        "LP205",
        lambda t: t.edit("run.sh", "python tools/merge_lora.py $OUT-finetune\n", ""),
        "textvqa.sh",
        "will hold an adapter",
    ),
    (
        "LP206",
        lambda t: t.edit("train.py", "    model.enable_input_require_grads()\n", ""),
        "--gradient_checkpointing",
        "input gradients",
    ),
    ("LP301", lambda t: t.edit("run.sh", "$HERE/models/clip", "$HERE/models/clap"), "models/clap", "is not there"),
    (
        "LP301",
        lambda t: t.edit("run.sh", "$OUT-pretrain/mm", "$OUT-other/mm"),
        "-other",
        "mm_projector.bin is not there",
    ),
    (
        "LP302",
        lambda t: t.edit("run.sh", "deepspeed --num", "/opt/gone/bin/deepspeed --num"),
        "/opt/gone",
        "is not there",
    ),
    ("LP303", _both_class_names, "models/base", "looks for 'gemma'"),
    ("LP401", lambda t: t.write("zero2.json", '{\n"a": 1,\n}'), "--deepspeed", "zero2.json:3: "),
    ("LP401", lambda t: t.write("zero2.json", "[]"), "--deepspeed", "not an object"),
    (
        "LP402",
        lambda t: t.write("zero2.json", json.dumps(ZERO2 | {"train_micro_batch_size_per_gpu": 2})),
        "--per_device_train",
        "train_micro_batch_size_per_gpu is 2",
    ),
    (
        "LP402",
        lambda t: t.write("zero2.json", json.dumps(ZERO2 | {"bf16": {"enabled": False}})),
        "--bf16",
        "bf16.enabled is False",
    ),
    ("LP403", lambda t: t.write("zero2.json", json.dumps(OFFLOAD)), "--deepspeed", "to the cpu"),
    ("LP404", zero3, "--deepspeed", "may be empty"),
    (
        "LP405",
        lambda t: (
            zero3(t, stage3_gather_16bit_weights_on_model_save=True),
            t.edit("run.sh", "--lora_r 16", "--lora_r 16 --bits 4"),
        ),
        "--bits 4",
        "0.42.0 is too old",
    ),
    ("LP407", lambda t: t.edit("run.sh", "batch.py 4 8 32", "batch.py 3 8 32"), "batch.py", "no divisor of 32"),
    (
        "LP407",
        lambda t: t.edit("run.sh", "batch.py 4 8 32", "batch.py 4 8 64"),
        "batch.py",
        "1 GPU(s) is 32, the check wants 64",
    ),
    (
        "LP407",
        lambda t: t.write("run_backup.sh", SCRIPT.replace("steps 8", "steps 16")),
        "--gradient_accumulation",
        "in run_backup.sh it was 64",
    ),
    ("LP501", lambda t: t.edit("run.sh", "--lora_r 16", "--lora_rnk 16"), "--lora_rnk", "did you mean --lora_r?"),
    ("LP502", lambda t: t.edit("run.sh", "--lora_r 16", "--lora_r 16 --forgotten 1"), "--forgotten", "read nowhere"),
    (
        "LP503",
        lambda t: t.edit("train.py", "get_peft_model(model, config)", "model"),
        "--lora_enable",
        "puts no LoRA on its model",
    ),
    (
        "LP504",
        lambda t: t.edit("train.py", "    forgotten: int = 0", "    bits: int = 16"),
        "deepspeed --num",
        "--bits is declared at",
    ),
    (
        "LP505",
        lambda t: (
            t.write("helper.py", "def f(:\n"),
            t.edit("train.py", "import transformers", "import transformers, helper", last=False),
        ),
        "deepspeed --num",
        "helper.py:1: Python cannot read",
    ),
    ("LP506", lambda t: (t.folder / "train.py").unlink(), "deepspeed --num", "train.py is not found"),
]


@pytest.mark.parametrize(
    ("rule", "break_it", "where", "said"), BREAKS, ids=[f"{i}-{b[0]}" for i, b in enumerate(BREAKS)]
)
def test_each_rule_finds_what_breaks_it_at_its_line(
    toolkit: Toolkit,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
    break_it: Callable[[Toolkit], object],
    where: str,
    said: str,
) -> None:
    monkeypatch.setattr(config_rules, "_bitsandbytes", lambda: "0.42.0")
    break_it(toolkit)
    found = [diagnostic for diagnostic in toolkit.check() if diagnostic.rule == rule]
    assert found, toolkit.check()
    assert said in found[-1].sentence
    assert found[-1].remedy
    lines = {diagnostic.line for diagnostic in found}
    assert not where or toolkit.line(where) in lines or any(where in _line(toolkit, n) for n in lines)


def _line(toolkit: Toolkit, number: int) -> str:
    return toolkit.script.read_text().splitlines()[number - 1]


def test_every_rule_has_a_script_that_breaks_it() -> None:
    tested = {rule for rule, *_ in BREAKS} | {"LP100", "LP406"}
    assert {rule.id for rule in lint.rules()} == tested


def test_bf16_is_only_judged_where_the_gpu_is_known(toolkit: Toolkit) -> None:
    assert [d.rule for d in toolkit.check(bf16=False)] == ["LP406"]
    assert toolkit.check(bf16=True) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.edit("run.sh", "--num_gpus 1", "--num_gpus 2", last=False),  # the check cannot know which launch
        lambda t: t.write("output/mini-finetune/checkpoint-5/adapter_config.json", ""),
        lambda t: t.edit("run.sh", "--data_path $HERE/data/train.json", "--data_path $UNKNOWN/train.json"),
        lambda t: t.edit("run.sh", "$HERE/models/clip", "openai/clip-vit-large-patch14-336"),
        lambda t: (
            t.edit("run.sh", "mkdir -p", "python prepare.py $HERE/data/made.json\nmkdir -p")
            or t.edit("run.sh", "data/train.json", "data/made.json")
        ),
        lambda t: t.edit("run.sh", "NAME=mini\n", "echo ${LATER:-no} '$LATER'\nNAME=mini\nLATER=1\n"),
        lambda t: t.edit("run.sh", "NAME=mini\n", "f() { echo $LATER; }\nNAME=mini\nLATER=1\n"),
        lambda t: t.edit("run.sh", "NAME=mini\n", "NAME=mini\nexport PATH=$HERE/bin:$PATH\n"),
        lambda t: t.edit("run.sh", "NAME=mini\n", "NAME=mini\nfor i in 1 2; do echo $LAST; LAST=$i; done\n"),
        lambda t: zero3(t, stage3_gather_16bit_weights_on_model_save=True),
        lambda t: zero3(t) or t.edit("train.py", "import transformers", GATHERS, last=False),
        lambda t: (
            t.edit("run.sh", "$HERE/train.py", "--module lorapatch.attach $HERE/train.py")
            or t.edit("train.py", "get_peft_model(model, config)", "model")
        ),
    ],
)
def test_what_is_right_is_left_alone(toolkit: Toolkit, change: Callable[[Toolkit], object]) -> None:
    change(toolkit)
    assert toolkit.check() == []


def test_a_script_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "dos.sh").write_bytes(b"echo 1\r\necho 2\r\n")
    for path in (tmp_path / "nothing.sh", tmp_path, tmp_path / "dos.sh"):
        (found,) = check_script(path)
        assert (found.rule, found.severity, found.line) == ("LP100", "error", 1)
        assert check_script(path, lint.CheckOptions(ignore=["LP100"])) == []
        assert check_script(path, lint.CheckOptions(select=["LP2"])) == [found]


def test_rules_are_selected_and_ignored_by_id_beginning_and_name(toolkit: Toolkit) -> None:
    toolkit.edit("run.sh", "2e-4", "2e-5")
    toolkit.edit("run.sh", "--lora_alpha 32", "--lora_alpha 256")
    assert [d.rule for d in toolkit.check()] == ["LP203", "LP202"]
    assert [d.rule for d in toolkit.check(select=["LP202"])] == ["LP202"]
    assert [d.rule for d in toolkit.check(select=["lp2"], ignore=["unusual-scale"])] == ["LP202"]
    assert toolkit.check(ignore=["LP2"]) == []
    with pytest.raises(UsageError, match="there is no rule LP999"):
        CheckOptions(select=["LP999"])


def test_a_comment_above_the_command_or_on_the_line_silences_a_rule(toolkit: Toolkit) -> None:
    toolkit.edit("run.sh", "2e-4", "2e-5")
    toolkit.edit("run.sh", "tee pre.log\n", "tee pre.log\n# lorapatch: ignore=LP203, full-tuning-rate\n# fine-tuning\n")
    assert toolkit.check() == []
    toolkit.edit("run.sh", "full-tuning-rate", "LP201")
    assert [d.rule for d in toolkit.check()] == ["LP202"]
    toolkit.edit("run.sh", "tee fine.log", "tee fine.log  # lorapatch: ignore=LP202")
    assert toolkit.check() == []


def test_the_trainer_is_found_through_a_given_root(toolkit: Toolkit, tmp_path: Path) -> None:
    toolkit.write("code/train.py", TRAINER)
    (toolkit.folder / "train.py").unlink()
    toolkit.edit("run.sh", "--lora_r 16", "--lora_rnk 16")
    assert "LP506" in [d.rule for d in toolkit.check()]
    assert [d.rule for d in toolkit.check(roots=[tmp_path / "code"])] == ["LP501"]


def test_the_transformers_of_the_launch_s_own_interpreter_counts(toolkit: Toolkit) -> None:
    library = "env/lib/python3.10/site-packages/transformers"
    toolkit.write(f"{library}/__init__.py", '__version__ = "4.38.2"\n')
    toolkit.write(f"{library}/training_args.py", "class TrainingArguments:\n    output_dir: str = ''\n")
    for name, text in (("python", "#!/bin/sh\n"), ("deepspeed", f"#!{toolkit.folder}/env/bin/python\n")):
        toolkit.write(f"env/bin/{name}", text)
        (toolkit.folder / "env/bin" / name).chmod(0o755)
    toolkit.edit("run.sh", "deepspeed --num", f"{toolkit.folder}/env/bin/deepspeed --num")
    assert {d.line for d in toolkit.check() if "--bf16 is not" in d.sentence} == {toolkit.line("--bf16")}


def test_nothing_of_script_or_trainer_runs(toolkit: Toolkit) -> None:
    mark = toolkit.folder / "ran"
    toolkit.edit("train.py", "import transformers", f"import transformers\nopen({str(mark)!r}, 'w')", last=False)
    toolkit.edit("run.sh", "NAME=mini\n", f"NAME=mini\ntouch {mark}\nX=$(touch {mark})\n")
    toolkit.check()
    assert not mark.exists()


def test_errors_end_with_one_and_warnings_only_under_strict(toolkit: Toolkit) -> None:
    assert exit_code(toolkit.check()) == 0
    toolkit.edit("run.sh", "2e-4", "2e-5")
    assert (exit_code(toolkit.check()), exit_code(toolkit.check(), strict=True)) == (0, 1)
    toolkit.edit("run.sh", "--lora_r 16", "--lora_rnk 16")
    assert exit_code(toolkit.check()) == 1


@pytest.fixture
def two(toolkit: Toolkit) -> list[Diagnostic]:
    toolkit.edit("run.sh", "2e-4", "2e-5")
    toolkit.edit("run.sh", "--lora_r 16", "--lora_rnk 16")
    return check_scripts([toolkit.script])


def test_text_for_people(two: list[Diagnostic], toolkit: Toolkit) -> None:
    lines = lint.as_text(two, 1).splitlines()
    assert lines[0].startswith(
        f"{toolkit.script}:25: error LP501 [unknown-flag] {toolkit.folder / 'train.py'}: --lora_rnk is not"
    )
    assert lines[1] == "    remedy: write --lora_r for it"
    assert lines[-1] == "1 script: 1 error, 1 warning"


def test_json(two: list[Diagnostic]) -> None:
    document = json.loads(lint.as_json(two))
    assert document["schema"] == 1
    assert [(d["rule"], d["severity"], d["line"]) for d in document["diagnostics"]] == [
        ("LP501", "error", 25),
        ("LP202", "warning", 32),
    ]


def test_github_annotations_are_escaped() -> None:
    found = Diagnostic(Path("a,b:c.sh"), 3, "LP202", "full-tuning-rate", "warning", "50%\nmore", "less")
    assert lint.as_github([found]) == (
        "::warning file=a%2Cb%3Ac.sh,line=3,title=LP202 full-tuning-rate::50%25%0Amore (less)"
    )


def test_sarif_names_every_rule_and_place(two: list[Diagnostic]) -> None:
    document = json.loads(lint.as_sarif(two))
    assert document["version"] == "2.1.0"
    (run,) = document["runs"]
    assert {rule["id"] for rule in run["tool"]["driver"]["rules"]} == {rule.id for rule in lint.rules()}
    assert [result["ruleId"] for result in run["results"]] == ["LP501", "LP202"]
    place = run["results"][0]["locations"][0]["physicalLocation"]
    assert (place["region"], place["artifactLocation"]["uri"][:8]) == ({"startLine": 25}, "file:///")
