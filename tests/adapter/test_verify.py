"""An adapter is proved loaded and merged: text models through PEFT, MGM with its eyes through the embedded trainer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    edit_config,
    load_base,
    make_adapter,
    make_base,
    make_partly_trained,
    rewrite,
    tensors_of,
    trainer_zoo,
)  # fmt: skip

from lorapatch.adapter import subject
from lorapatch.adapter.findings import Finding
from lorapatch.adapter.update import Update
from lorapatch.adapter.verify import verify
from lorapatch.errors import Refused, UsageError

Make = Callable[..., Path]


def by_id(directory: Path, **options: Any) -> dict[str, Finding]:
    verification = verify(directory, **options)
    json.dumps(verification.as_dict())
    return {finding.id: finding for finding in verification.findings}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["gemma", "llama", "qwen2"])
def test_a_sound_adapter_passes_every_tier(family: str, dtype: str, bases: Make, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", bases(family, dtype))
    found = by_id(adapter, peers=True)
    assert {name for name, finding in found.items() if finding.state != "pass"} == {"bridge", "pictures", "answers"}
    assert found["effect"].figures["relative_difference"] > 0.01
    merged = found["merged"].figures
    assert merged["relative_difference"] <= merged["tolerance"] < merged["effect"]
    assert found["peers"].figures["identical"] == found["peers"].figures["compared"] == 6
    assert list(tmp_path.iterdir()) == [adapter]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_too_large_for_float32_is_loaded_in_its_own_type(
    dtype: str, bases: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "_SMALL", 0)
    adapter = make_adapter(tmp_path / "adapter", bases("qwen2", dtype), target_modules="all-linear")
    found = by_id(adapter, tiers=(2, 3), peers=True)
    assert found["loaded"].figures["dtype"] == dtype
    assert {found[name].state for name in ("loaded", "effect", "merged", "peers")} == {"pass"}
    assert found["merged"].figures["relative_difference"] > 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_every_variant_passes_every_tier(options: dict[str, Any], bases: Make, tmp_path: Path) -> None:
    verification = verify(make_adapter(tmp_path / "adapter", bases("gemma"), **options), peers=True)
    assert verification.passed, [finding.sentence for finding in verification.failures]


def test_an_adapter_that_does_nothing_is_told_apart(adapter: Path) -> None:
    tensors = tensors_of(adapter)
    rewrite(adapter, {name: x * (".lora_B." not in name) for name, x in tensors.items()})
    found = by_id(adapter, tiers=(1, 2))
    assert found["moved"].state == "fail"
    sentence = "the logits are the same with and without the adapter: it does nothing"
    assert (found["effect"].state, found["effect"].sentence) == ("fail", sentence)


def test_tensors_that_peft_passes_over_are_found(adapter: Path) -> None:
    tensors = tensors_of(adapter)
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    for matrix in "AB":
        tensors[f"{q.replace('q_proj', 'o_proj')}.lora_{matrix}.weight"] = tensors[f"{q}.lora_{matrix}.weight"].clone()
    rewrite(adapter, tensors)
    loaded = by_id(adapter, tiers=(2,))["loaded"]
    assert loaded.state == "fail" and loaded.sentence.startswith(
        "2 tensors did not arrive in the model, such as model."
    )


@pytest.mark.parametrize("family", ["gemma", "qwen2"])
def test_what_was_trained_beside_lora_is_loaded_with_it(family: str, bases: Make, tmp_path: Path) -> None:
    live = make_partly_trained(tmp_path / "adapter", bases(family))
    tuned = subject.TextSubject(bases(family), tmp_path / "adapter", "cpu", torch.float32)
    loaded = dict(tuned.model.named_parameters())
    assert tuned.unplaced == () and all(torch.equal(loaded[name], p) for name, p in live.named_parameters())
    found = by_id(tmp_path / "adapter")
    assert [found[name].state for name in ("bridge", "loaded", "effect", "merged")] == ["pass"] * 4
    assert found["merged"].figures["relative_difference"] < 1e-5
    file = tmp_path / "adapter" / "non_lora_trainables.bin"
    others = torch.load(file)
    others["base_model.model.model.norm.weight"] = torch.ones(3)
    torch.save(others, file)
    damaged = by_id(tmp_path / "adapter", tiers=(2,))["loaded"]
    assert damaged.sentence == "1 tensor did not arrive in the model, such as model.norm.weight"


def test_an_adapter_whose_logits_are_not_finite_fails(adapter: Path) -> None:
    rewrite(adapter, {name: x * 1e30 for name, x in tensors_of(adapter).items()})
    found = by_id(adapter, tiers=(2,))
    assert found["effect"].sentence == "the logits are not finite with the adapter"


def test_a_merge_that_loses_the_adapter_is_found(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Update, "rows", lambda self, weight, first, out=None: weight.float())
    merged = by_id(adapter, tiers=(3,))["merged"]
    assert merged.state == "fail" and merged.sentence.endswith("it is another model")


@pytest.mark.parametrize(("kind", "state"), [("llava_unheard_of", "not checked"), ("unheard_of", "fail")])
def test_a_merged_model_that_transformers_does_not_know_is_no_traceback(
    kind: str, state: str, adapter: Path, bases: Make
) -> None:
    config = json.loads((bases() / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    merged = by_id(adapter, tiers=(2, 3))["merged"]
    assert merged.state == state and "merged, but transformers here cannot load it: The checkpoint" in merged.sentence


def test_a_tolerance_that_is_larger_than_the_effect_says_that_it_proves_little(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorapatch.adapter import loaded_tier

    monkeypatch.setitem(loaded_tier.TOLERANCES, "F32", 10.0)
    merged = by_id(adapter, tiers=(3,))["merged"]
    assert merged.state == "pass" and "is smaller, so this proves little" in merged.sentence


def test_peers_that_disagree_are_found(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Update.rows
    monkeypatch.setattr(Update, "rows", lambda self, weight, first, out=None: real(self, weight, first, out) + 1e-3)
    peers = by_id(adapter, tiers=(1,), peers=True)["peers"]
    assert peers.state == "fail" and "PEFT merges it otherwise" in peers.sentence


def test_an_mgm_adapter_sees(mgm_made: tuple[Any, Path]) -> None:
    zoo, adapter = mgm_made
    found = by_id(adapter, data=zoo.data, peers=True)
    assert {name for name, finding in found.items() if finding.state != "pass"} <= {"loss"}
    assert found["pictures"].figures["relative_difference"] > 0.01
    rows = found["answers"].figures["answers"]
    assert len(rows) == 16 and set(rows[0]) == {"question", "expected", "before", "after"}
    assert rows[0]["question"] == "What colour is it?"
    assert found["merged"].figures["relative_difference"] < 1e-4


def test_another_base_is_used_where_it_is_given(mgm: Path, mgm_made: tuple[Any, Path], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(mgm_made[0].language, tmp_path / "moved"))
    edit_config(mgm, base_model_name_or_path="/nowhere")
    without = by_id(mgm, tiers=(2,))
    assert without["loaded"].state == "not checked" and "/nowhere is not here" in without["loaded"].sentence
    found = by_id(mgm, base=moved, tiers=(2, 3))
    assert {found[name].state for name in ("loaded", "effect", "pictures", "merged")} == {"pass"}
    assert json.loads((mgm / "adapter_config.json").read_text())["base_model_name_or_path"] == "/nowhere"


def test_without_its_towers_the_text_part_is_checked_and_the_reason_given(mgm: Path) -> None:
    config = json.loads((mgm / "config.json").read_text())
    (mgm / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "/nowhere/clip"}))
    found = by_id(mgm, tiers=(2, 3))
    assert found["effect"].state == "pass"
    assert found["pictures"].state == "not checked"
    assert (
        "the text part alone was loaded (" in found["pictures"].sentence
        and "/nowhere/clip" in found["pictures"].sentence
    )


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text adapter that was really trained a little, one that was trained to be wrong, and samples they saw."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("taught")
    base = make_base(folder / "base", "llama", vocab_size=264)
    trainer_zoo().make_tokenizer(base)
    words = ("red", "green", "blue")
    samples = [
        {"conversations": [{"from": "human", "value": f"Say {word}"}, {"from": "gpt", "value": word}]} for word in words
    ]
    (folder / "data.json").write_text(json.dumps(samples))
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [torch.tensor([tokenizer(f"Say {word}\n{word}").input_ids]) for word in words]
    train(base, texts, steps=60, sign=1).save_pretrained(str(folder / "adapter"))
    train(base, texts, steps=6, sign=-1).save_pretrained(str(folder / "worse"))
    return folder / "adapter", folder / "data.json"


def train(base: Path, texts: list[Any], steps: int, sign: int) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_base(base), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(steps):
        ids = texts[step % len(texts)]
        (sign * model(input_ids=ids, labels=ids).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_held_out_samples_show_what_training_did(taught: tuple[Path, Path]) -> None:
    adapter, data = taught
    found = by_id(adapter, data=data, tiers=(2,))
    assert found["loss"].state == "pass" and found["loss"].figures["after"] < 0.5 * found["loss"].figures["before"]
    assert found["answers"].state == "pass" and found["answers"].figures["before"] == 0
    assert "held-out loss" in found["loss"].sentence and "(3 samples)" in found["loss"].sentence


def test_an_adapter_that_makes_it_worse_fails(taught: tuple[Path, Path]) -> None:
    loss = by_id(taught[0].with_name("worse"), data=taught[1], tiers=(2,))["loss"]
    assert loss.state == "fail" and loss.sentence.endswith("it does not help")


def test_spoiled_answers_fail_only_where_chance_does_not_explain_them() -> None:
    from lorapatch.adapter.loaded_tier import _check_answers

    def judge(before: list[str], after: list[str]) -> str:
        turn = {"conversations": [{"value": "?"}, {"value": "Yes"}]}
        return _check_answers([turn] * len(before), before, after).state

    assert judge(["yes."] * 3, ["no"] * 3) == "pass"
    assert judge(["yes"] * 8, ["no"] * 8) == "fail"
    assert judge(["no"] * 8, ["Yes"] * 8) == "pass"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read"),
        ('{"a": 1}', "is no list of samples"),
        ("[]", "has no sample with a question and an answer"),
        ('[{"conversations": []}]', "has no sample with a question and an answer"),
    ],
)
def test_data_that_is_no_data_is_one_sentence(
    content: str, sentence: str, taught: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text(content)
    answers = by_id(taught[0], data=tmp_path / "data.json", tiers=(2,))["answers"]
    assert answers.state == "not checked" and sentence in answers.sentence


def test_a_missing_image_is_one_sentence(mgm: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "gone.png", "conversations": turns}]))
    answers = by_id(mgm, data=tmp_path / "data.json", tiers=(2,))["answers"]
    assert answers.state == "not checked" and "gone.png" in answers.sentence


def test_what_is_broken_is_not_loaded(adapter: Path) -> None:
    edit_config(adapter, r=8)
    found = by_id(adapter)
    for name in ("loaded", "merged"):
        assert found[name].state == "not checked"
        assert found[name].sentence.startswith("tier 1 failed (rank: ")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    found = by_id(adapter)
    assert found["file"].state == "fail" and found["merged"].sentence == "its files cannot be read"


@pytest.mark.parametrize("name", ["torch", "transformers", "peft"])
def test_a_missing_library_leaves_the_tiers_unchecked(name: str, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    found = by_id(good)
    assert found["finite"].state == "pass"
    assert (found["loaded"].state, found["loaded"].sentence) == ("not checked", f"{name} is not installed here")


def test_only_the_tiers_asked_for_are_made(good: Path) -> None:
    assert {finding.tier for finding in verify(good, tiers=(1,)).findings} == {1}
    assert {finding.tier for finding in verify(good, tiers=(2,)).findings} == {2}
    assert {finding.tier for finding in verify(good, tiers=(3,)).findings} == {3}
    with pytest.raises(UsageError, match="--tiers 4: there are 1, 2 and 3"):
        verify(good, tiers=(4,))


def test_the_last_checkpoint_is_verified_where_the_run_left_no_adapter(good: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no adapter"):
        verify(tmp_path)
    for step in (2, 10):
        shutil.copytree(good, tmp_path / f"checkpoint-{step}")
    assert verify(tmp_path, tiers=(1,)).directory == tmp_path / "checkpoint-10"


@pytest.mark.train
def test_what_the_trainer_left_passes_every_tier_and_answers_the_same_when_merged(tmp_path: Path) -> None:
    from lorapatch.adapter.merge import merge
    from lorapatch.trainer.inference import answers, load

    zoo = trainer_zoo().make_zoo(tmp_path / "zoo")
    output = tmp_path / "MGM-2B-Finetune-test"
    flags = zoo.flags(output, lora_enable=True, lora_r=4, lora_alpha=8, max_steps=20, learning_rate=5e-3)
    subprocess.run([sys.executable, "-m", "lorapatch.trainer.train", *flags], check=True, timeout=120)
    verification = verify(output, data=zoo.data, peers=True)
    assert verification.passed, [finding.sentence for finding in verification.failures]
    assert {f.id for f in verification.findings if f.state == "not checked"} == set()
    done = merge(output, output)
    assert done.kept is not None and done.warnings == ()
    questions = [(zoo.images / f"{number}.png", "What colour is it?") for number in range(3)]
    assert answers(load(done.kept), questions, 8) == answers(load(output), questions, 8)
