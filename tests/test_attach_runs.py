"""Real DeepSpeed on the CPU through lorapatch.attach: trainers in eight styles, ZeRO-2 and 3, resumed, in every variant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lorapatch
from lorapatch.adapter.inspect import inspect_adapter
from lorapatch.adapter.merge import merge
from lorapatch.adapter.verify import verify
from lorapatch.run.log import Announcement, LogParser, Metrics
from lorapatch.run.runs import RunOptions, smoke

pytestmark = pytest.mark.train
for _name in ("torch", "transformers", "peft", "deepspeed", "psutil"):
    pytest.importorskip(_name)

TRAINERS = Path(__file__).with_name("attach")
LORA = "--lora_enable True --lora_r 4 --lora_alpha 8 --lora_dropout 0 --lora_bias none".split()
COMMON = (
    "--use_cpu True --bf16 True --max_steps 4 --save_steps 2 --logging_steps 1 --per_device_train_batch_size 2"
    " --learning_rate 5e-3 --report_to none"
).split()
# One thread a rank, and no processes that wait for something to compile.
CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Forge:
    """One process that has the libraries loaded; each run is forked from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Run] = {}
        environment = {**os.environ, **CPU, "PYTHONPATH": str(Path(lorapatch.__file__).parents[1])}
        program = [sys.executable, "-u", str(TRAINERS / "runner.py")]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(program, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._answer()
        for stage in (2, 3):
            zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
            sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
            config = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(sizes, "auto")}
            (folder / f"zero{stage}.json").write_text(json.dumps(config))

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith(("ready", "[")) or line.startswith("[20"):
            line = self.process.stdout.readline()
        return line

    def style(self, name: str) -> Run:
        """``name``.py as it is; run once."""
        if name not in self.done:
            self.done[name] = self.run(name, name)
        return self.done[name]

    def run(
        self, style: str, out: str, *more: str, zero: int | None = 2, ranks: int = 1, fresh: bool = True, fails: bool = False
    ) -> Run:
        """``style``.py under ZeRO-``zero``, with the model in ``model`` if it takes one, into ``out``."""
        if fresh:
            shutil.rmtree(self.folder / out, ignore_errors=True)
        model = [] if style == "checkpoints_inside" else ["--model_name_or_path", str(self.folder / "model")]
        words = [*model, *COMMON, "--output_dir", str(self.folder / out)]
        if zero:
            words += ["--deepspeed", str(self.folder / f"zero{zero}.json")]
        if style == "argparse_only":
            words = ["--model", str(self.folder / "model"), "--output_dir", str(self.folder / out), *words[-2:]]
        return self.start([str(TRAINERS / f"{style}.py"), *words, *LORA, *more], out, ranks, fails)

    def start(self, argv: list[str], out: str, ranks: int, fails: bool) -> Run:
        log = self.folder / f"{out}.txt"
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"argv": argv, "ranks": ranks, "log": str(log)}) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self._answer())
        assert fails or codes == [0] * ranks, log.read_text()[-3000:]
        return Run(self.folder / out, log.read_bytes(), codes)


class Run:
    """What a run said and left."""

    def __init__(self, folder: Path, log: bytes, codes: list[int]) -> None:
        self.folder, self.text, self.codes = folder, log.decode(), codes
        parser = LogParser()
        events = [*parser.feed(log), *parser.close()]
        self.said = {event.kind: event.data for event in events if isinstance(event, Announcement)}
        self.losses = [e.values["loss"] for e in events if isinstance(e, Metrics) and "loss" in e.values]

    def copy(self, name: str) -> Run:
        """The same run in another folder, to be gone on with."""
        copied = Run.__new__(Run)
        copied.__dict__.update(self.__dict__, folder=self.folder.with_name(name))
        shutil.copytree(self.folder, copied.folder)
        return copied

    @property
    def lora(self) -> dict[str, Any]:
        return self.said["lora"]

    def tensors(self, checkpoint: str = "") -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(self.folder / checkpoint / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("attach")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(max_position_embeddings=64, **shape)).save_pretrained(folder / "model")
    forge = Forge(folder)
    yield forge
    forge.process.communicate()


def assert_accepted(run: Run, tiers: tuple[int, ...] = (1, 2, 3)) -> None:
    found = verify(run.folder, tiers=tiers)
    assert found.passed, found.failures
    adapter = inspect_adapter(run.folder)
    assert adapter.moved == len(adapter.modules) and not adapter.base_tensors


@pytest.mark.parametrize("style", ["plain", "own_optimizer", "own_saving", "sft", "argparse_only"])
def test_a_trainer_without_lora_leaves_an_adapter_that_verify_accepts(forge: Forge, style: str) -> None:
    run = forge.style(style)
    assert run.lora == {
        "trainable": 4352, "total": 29088, "lora": 4352, "tensors": 28, "modules": SEVEN, "r": 4, "alpha": 8
    }  # fmt: skip
    assert run.said["speed"]["steps"] == 3 and run.said["speed"]["samples_per_s"] > 0
    assert len(run.losses) == 4 and run.losses[-1] < 4.3
    assert_accepted(run)
    checkpoints = [] if style == "argparse_only" else ["checkpoint-2", "checkpoint-4"]
    for name in checkpoints:
        assert inspect_adapter(run.folder / name).moved == 14
        (states,) = (run.folder / name).glob("global_step*/mp_rank_00_model_states.pt")
        assert states.stat().st_size < 40_000  # what is frozen is not in there


def test_flags_that_a_trainer_declares_itself_reach_it(forge: Forge) -> None:
    run = forge.run("argparse_only", "declared", "--lora_dropout", "0.25")
    assert "lora_dropout 0.25\n" in run.text
    assert json.loads((run.folder / "adapter_config.json").read_text())["lora_dropout"] == 0.25


def test_an_optimizer_of_the_trainer_s_own_gets_the_trainable_parameters_alone(forge: Forge) -> None:
    assert "groups [4352] rates [0.005]\n" in forge.style("own_optimizer").text
    run = forge.run("own_optimizer", "plus", "--lora_plus_ratio", "16", "--lora_also_train", "norm")
    assert "groups [2048, 160, 2304] rates [0.005, 1e-05, 0.08]\n" in run.text
    import torch

    others = torch.load(run.folder / "non_lora_trainables.bin", weights_only=True)
    assert_accepted(run)
    assert len(others) == 5 and "base_model.model.model.norm.weight" in others
    assert run.lora["trainable"] == 4352 + 160


def test_a_trainer_s_own_lora_gets_the_modules_that_were_asked_for_and_nothing_else_changes(forge: Forge) -> None:
    argv = [str(TRAINERS / "own_lora.py"), "--model_name_or_path", str(forge.folder / "model"), *COMMON]
    argv += ["--output_dir", str(forge.folder / "own"), "--deepspeed", str(forge.folder / "zero2.json")]
    asked = ["--lora_enable", "True", "--lora_rank", "2", "--lora_target_modules", "q_proj,v_proj,o_proj"]
    run = forge.start([*argv, *asked], "own", 1, False)
    assert "the trainer's own LoRA gets target_modules ['q_proj', 'v_proj', 'o_proj']\n" in run.text
    assert (run.lora["r"], run.lora["alpha"], run.lora["lora"]) == (2, 16, 2 * 3 * 2 * 64)
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.05 and sorted(config["target_modules"]) == ["o_proj", "q_proj", "v_proj"]
    assert_accepted(run)
    refused = forge.start([*argv, *asked, "--lora_variant", "pissa"], "own", 1, True)
    assert refused.codes == [3] and "the trainer saves its LoRA itself" in refused.text


def test_a_plain_module_that_checkpoints_by_itself_learns_and_its_projector_too(forge: Forge) -> None:
    import torch

    run = forge.run("checkpoints_inside", "inside")
    assert run.lora["modules"] == ["q_proj", "up_proj"] and run.lora["lora"] == 1024
    assert "the trainer saved in a way of its own; the adapter is in" in run.text
    assert_accepted(run, (1,))
    others = torch.load(run.folder / "non_lora_trainables.bin", weights_only=True)
    assert list(others) == ["base_model.model.connector.weight", "base_model.model.connector.bias"]
    assert not any("vision_tower" in name for name in run.tensors())
    weights = torch.load(run.folder / "weights.pt", weights_only=True)
    assert any(".lora_A." in name for name in weights)  # what the trainer saved itself is there as well


def test_fsdp_shards_it_and_the_adapter_is_whole(forge: Forge) -> None:
    wrap = '{"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'
    run = forge.run("fsdp", "fsdp", "--fsdp", "full_shard auto_wrap", "--fsdp_config", wrap, zero=None, ranks=2)
    assert run.lora["lora"] == 4352
    assert_accepted(run)
    assert inspect_adapter(run.folder / "checkpoint-2").moved == 14


def test_zero_3_on_two_ranks_gathers_and_goes_on_from_a_checkpoint(forge: Forge) -> None:
    run = forge.run("plain", "zero3", zero=3, ranks=2)
    assert run.lora["total"] == 29088 and run.lora["lora"] == 4352
    assert_accepted(run)
    assert_goes_on(forge, run, zero=3, ranks=2)


def test_one_rank_that_saves_alone_under_zero_3_has_the_whole_adapter(forge: Forge) -> None:
    assert_accepted(forge.run("own_saving", "saving3", zero=3, ranks=2))


def assert_goes_on(forge: Forge, run: Run, *more: str, zero: int | None, ranks: int = 1) -> None:
    """Cut off behind checkpoint-2 and started again, the run comes to where it came before."""
    whole = update(run.tensors())
    for name in ("checkpoint-4", "adapter_model.safetensors"):
        path = run.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = forge.run("plain", run.folder.name, *more, zero=zero, ranks=ranks, fresh=False)
    assert len(again.losses) == 2 and again.losses == pytest.approx(run.losses[2:], abs=0.01)
    for name, delta in update(again.tensors()).items():
        assert (delta - whole[name]).abs().max() < 0.05 * whole[name].abs().max(), name


def update(tensors: dict[str, Any]) -> dict[str, Any]:
    """B·A of every module."""
    pairs = {name.split(".lora_A")[0] for name in tensors if ".lora_A" in name}
    return {p: tensors[f"{p}.lora_B.weight"].float() @ tensors[f"{p}.lora_A.weight"].float() for p in pairs}


def test_a_run_goes_on_from_its_checkpoint_under_zero_2(forge: Forge) -> None:
    assert_goes_on(forge, forge.style("plain").copy("resumed"), zero=2)


def test_without_deepspeed_a_run_goes_on_too_and_the_best_checkpoint_is_loaded(forge: Forge) -> None:
    best = ["--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", "2"]
    run = forge.run("plain", "best", *best, zero=None)
    state = json.loads((run.folder / "trainer_state.json").read_text())
    chosen, final = run.tensors(state["best_model_checkpoint"]), run.tensors()
    assert all((final[name] == tensor).all() for name, tensor in chosen.items())
    assert_goes_on(forge, run, *best, zero=None)


def test_resume_from_checkpoint_works_as_a_flag_though_the_trainer_never_passes_it_on(forge: Forge) -> None:
    forge.style("sft").copy("flagged")
    checkpoint = str(forge.folder / "flagged/checkpoint-4")
    more = forge.run("sft", "flagged", "--max_steps", "5", "--resume_from_checkpoint", checkpoint, fresh=False)
    assert len(more.losses) == 1


def test_a_checkpoint_of_another_kind_is_refused(forge: Forge) -> None:
    forge.run("plain", "full", "--lora_enable", "False", zero=None)
    assert (forge.folder / "full/model.safetensors").is_file()
    refused = forge.run("plain", "full", zero=None, fresh=False, fails=True)
    assert refused.codes == [3] and "holds no adapter, it is of a full fine-tuning" in refused.text
    forge.style("plain").copy("rank4")
    other = forge.run("plain", "rank4", "--lora_r", "8", fresh=False, fails=True)
    assert other.codes == [3] and "is of LoRA of rank 4, this run has rank 8" in other.text


def test_a_vocabulary_that_the_trainer_changed_is_saved_with_the_adapter(forge: Forge, tmp_path: Path) -> None:
    import torch

    run = forge.run("alpaca", "alpaca")
    assert run.lora["trainable"] == run.lora["lora"] == 4352
    others = torch.load(run.folder / "non_lora_trainables.bin", weights_only=True)
    embedding, head = (others[f"base_model.model.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    assert embedding.shape == head.shape == (65, 32) and (embedding[-1] == 7).all()
    assert_accepted(run)
    merged = merge(run.folder, tmp_path / "merged").output
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == 65
    forge.run("alpaca", "alpaca", "--max_steps", "5", "--last_row", "3", fresh=False)
    again = torch.load(run.folder / "non_lora_trainables.bin", weights_only=True)
    assert (again["base_model.model.model.embed_tokens.weight"][-1] == 7).all()  # the checkpoint's, not the new run's


SHORT = ["--max_steps", "1", "--save_strategy", "no"]


def test_a_trainer_that_logs_tensors_can_write_its_state(forge: Forge) -> None:
    run = forge.run("fails", "logs", "--max_steps", "2", zero=None)
    for folder in (run.folder, run.folder / "checkpoint-2"):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert [entry["half"] for entry in history if "half" in entry] == pytest.approx([x / 2 for x in run.losses], abs=1e-2)
    alone = forge.run("fails", "logs", *SHORT, "--lora_enable", "False", zero=None, fails=True)
    assert alone.codes == [1] and "Object of type Tensor is not JSON serializable" in alone.text


def test_a_trainer_that_fails_behind_its_training_leaves_the_adapter_and_its_error(forge: Forge) -> None:
    run = forge.run("fails", "saving", *SHORT, "--where", "saving", zero=3, ranks=2, fails=True)
    assert run.codes == [1, 1] and "OSError: the disk of another machine is gone" in run.text
    assert f"after training the trainer failed (OSError); the adapter is in {run.folder}\n" in run.text
    assert_accepted(run, (1,))
    exits = forge.run("fails", "exits", *SHORT, "--where", "exit", zero=None, fails=True)
    assert exits.codes == [1] and "after training the trainer failed (SystemExit); the adapter is in" in exits.text
    assert_accepted(exits, (1,))


def test_so_does_one_with_lora_of_its_own(forge: Forge) -> None:
    import torch

    run = forge.run("fails", "own_fails", *SHORT, "--own", "True", "--where", "saving", fails=True)
    assert run.codes == [1] and f"the adapter is in {run.folder}\n" in run.text
    assert_accepted(run)
    others = torch.load(run.folder / "non_lora_trainables.bin", weights_only=True)
    assert list(others) == ["base_model.model.model.embed_tokens.weight"]
    fine = forge.run("fails", "own_fine", *SHORT, "--own", "True")
    assert "the adapter is in" not in fine.text and inspect_adapter(fine.folder).moved == 2


def test_what_one_rank_alone_does_not_have_is_not_saved_and_it_says_so(forge: Forge) -> None:
    best = "--max_steps 1 --save_steps 1 --load_best_model_at_end True --eval_strategy steps --eval_steps 1".split()
    run = forge.run("fails", "last", *best, zero=3, fails=True)
    assert "OSError: the best checkpoint is gone" in run.text and "under ZeRO-3 and FSDP that takes all ranks" in run.text
    assert not (run.folder / "adapter_config.json").exists()
    whole = forge.run("fails", "last", *best, zero=2, fails=True)
    assert "OSError: the best checkpoint is gone" in whole.text and "; the adapter is in" in whole.text
    assert_accepted(whole, (1,))


@pytest.mark.parametrize("variant", ["rslora", "dora", "pissa"])
def test_a_variant_is_trained_saved_and_accepted(forge: Forge, variant: str) -> None:
    run = forge.run("plain", variant, "--lora_variant", variant)
    assert_accepted(run)
    assert run.lora["lora"] == (4928 if variant == "dora" else 4352)
    assert abs(run.losses[0] - 4.168) < 0.02  # it begins as the base model
    if variant == "pissa":
        assert json.loads((run.folder / "adapter_config.json").read_text())["r"] == 8
        assert_goes_on(forge, run, "--lora_variant", variant, zero=2)


SCRIPT = """#!/bin/bash
HERE=$(cd "$(dirname "$0")" && pwd)
deepspeed $HERE/own_saving.py \\
    --model_name_or_path $HERE/model \\
    --deepspeed $HERE/zero2.json \\
    --output_dir $HERE/out \\
    --use_cpu True \\
    --bf16 True \\
    --max_steps 8 \\
    --save_steps 4 \\
    --logging_steps 1 \\
    --per_device_train_batch_size 2 \\
    --learning_rate 5e-3 \\
    --report_to none 2>&1 | tee $HERE/train.log
"""


def test_smoke_makes_a_script_without_lora_a_lora_run_of_two_ranks_and_accepts_it(
    forge: Forge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own_saving.py", "toy.py"):
        shutil.copy(TRAINERS / name, tmp_path)
    shutil.copy(forge.folder / "zero2.json", tmp_path)
    shutil.copytree(forge.folder / "model", tmp_path / "model")
    script = tmp_path / "train.sh"
    script.write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(lorapatch.__file__).parents[1]))
    for name, value in CPU.items():
        monkeypatch.setenv(name, value)
    report = smoke(script, None, RunOptions(runs=tmp_path / "runs", interval_s=1, timeout_s=400, num_gpus=2))
    assert report.passed, (report.sentence, (report.folder / "log.txt").read_text()[-3000:])
    states = {line.what: line.state for line in report.verdict.lines}
    assert [what for what, state in states.items() if state != "pass"] == ["the peak is under the budget"]
    assert len(report.record["launch"]["ranks"]) == 2 and "lorapatch.attach" in report.record["launch"]["argv"]
    assert report.record["metrics"]["trainer"]["lora"]["lora"] == 17408
