"""Tier 1: every way in which an adapter's files can be wrong has a sentence of its own; torch is not needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import edit_config, make_adapter, make_base, rewrite, tensors_of

from lorapatch.adapter.file_tier import check_files
from lorapatch.adapter.findings import Finding
from lorapatch.adapter.inspect import inspect_adapter
from lorapatch.adapter.peft_version import InstalledPeft, check_version, installed_peft
from lorapatch.adapter.verify import verify

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def first_tier(directory: Path, base: Path | None = None) -> dict[str, Finding]:
    return {finding.id: finding for finding in verify(directory, base=base, tiers=(1,)).findings}


def failures(directory: Path, base: Path | None = None) -> dict[str, str]:
    return {name: finding.sentence for name, finding in first_tier(directory, base).items() if finding.state == "fail"}


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change(folder: Path, edit: Callable[[dict[str, Any]], Any], binary: bool = False) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    rewrite(folder, tensors, binary)


def swap(tensors: dict[str, Any]) -> None:
    for name in [name for name in tensors if ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def foreign_pickle(folder: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("it ran",))

    rewrite(folder, {"weight": Runs()}, binary=True)


def more_modules(folder: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        for matrix in "AB":
            name = f"{Q}.lora_{matrix}.weight"
            tensors[name.replace("q_proj", "o_proj")] = tensors[name].clone()

    change(folder, edit)


def whole(dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


CORRUPTIONS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "truncated file": (truncate, "file", r"adapter_model\.safetensors is cut short: .* should end at byte \d+ of \d+"),
    "empty tensors": (
        lambda f: change(f, lambda t: t.update({name: torch.zeros(0) for name in t})),
        "empty",
        r"every tensor is empty: ZeRO-3's shares were not gathered when it was saved",
    ),
    "NaN": (
        lambda f: change(f, lambda t: t[f"{Q}.lora_B.weight"].view(-1).__setitem__(5, float("nan"))),
        "finite",
        rf"1 tensor holds NaN or infinity, such as {re.escape(Q)}\.lora_B\.weight",
    ),
    "wrong rank": (
        lambda f: edit_config(f, r=8),
        "rank",
        r"model\.layers\.\d\.\S+ has the ranks 4 and 4, adapter_config\.json says 8",
    ),
    "foreign pickle": (foreign_pickle, "file", r"its pickle asks for \w+\.print; only tensors are read, .* run code"),
    "swapped A and B": (
        lambda f: change(f, swap),
        "pairs",
        r"lora_A and lora_B are swapped in 6 modules, such as model\.layers\.0\.\S+",
    ),
    "zero B": (
        lambda f: change(f, lambda t: [t[name].zero_() for name in t if ".lora_B." in name]),
        "moved",
        r"every lora_B is zero, as at the start: LoRA was never trained",
    ),
    "extra modules": (
        more_modules,
        "modules",
        r"1 module with LoRA that target_modules does not name: model\.layers\.0\.self_attn\.o_proj",
    ),
    "newer PEFT fields": (
        lambda f: edit_config(f, peft_version="9.0", use_quantum=True),
        "peft",
        r"written by PEFT 9\.0, has 1 field that PEFT [\d.]+ does not know \(use_quantum\): install the PEFT that",
    ),
    "wrong dtype": (
        lambda f: change(f, lambda t: t.update({name: (100 * x).to(torch.int8) for name, x in t.items()})),
        "dtype",
        r"the LoRA tensors are I8: LoRA is trained in one of F32, BF16 and F16, so another program changed them",
    ),
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_corruption_has_its_own_sentence(kind: str, adapter: Path) -> None:
    corrupt, name, sentence = CORRUPTIONS[kind]
    corrupt(adapter)
    found = failures(adapter)
    assert name in found and re.search(sentence, found[name]), found
    if kind not in ("truncated file", "foreign pickle"):
        assert set(found) == {name}


def test_the_sentences_of_all_corruptions_differ(good: Path, tmp_path: Path) -> None:
    seen = set()
    for number, (corrupt, name, _) in enumerate(CORRUPTIONS.values()):
        folder = Path(shutil.copytree(good, tmp_path / str(number)))
        corrupt(folder)
        seen.add(failures(folder)[name].replace(str(folder), ""))
    assert len(seen) == len(CORRUPTIONS)


def test_a_wrong_base_is_named_with_both_shapes(adapter: Path, bases: Callable[..., Path]) -> None:
    other = bases("llama", hidden_size=64)
    found = failures(adapter, other)
    assert set(found) == {"base"}
    assert re.match(
        r"wrong base: model\.layers\.0\.\S+ is made for \[\d+, \d+\], the base has \[\d+, \d+\]", found["base"]
    )
    assert str(other) in found["base"]


def test_modules_that_the_base_does_not_have_are_named(adapter: Path, bases: Callable[..., Path]) -> None:
    found = failures(adapter, bases("llama", num_hidden_layers=1))
    assert "3 modules with LoRA that" in found["base"] and "model.layers.1.mlp.down_proj" in found["base"]


def test_modules_without_lora_that_target_modules_names_are_named(adapter: Path) -> None:
    change(adapter, lambda t: [t.pop(name) for name in list(t) if name.startswith(Q)])
    found = failures(adapter)
    assert found == {"modules": "1 module of target_modules without LoRA: model.layers.0.self_attn.q_proj"}


@pytest.mark.parametrize("family", ["gemma", "llama", "qwen2"])
def test_the_base_is_known_by_its_config_alone(family: str, bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases(family)
    folder = make_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(base / "config.json", only)
    found = first_tier(folder, only)
    assert (found["modules"].state, found["base"].state) == ("pass", "pass")
    assert found["modules"].figures["expected"] == 14
    assert failures(folder, base) == {}


def test_without_a_base_the_rest_is_checked_and_the_sentence_says_what_is_missing(adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path="/nowhere/model")
    found = first_tier(adapter)
    assert found["base"].state == found["modules"].state == "not checked"
    assert "/nowhere/model is not here: give it with --base" in found["base"].sentence
    assert found["finite"].state == "pass"


def test_lora_on_the_vision_tower_is_found(adapter: Path) -> None:
    tower = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"

    def edit(tensors: dict[str, Any]) -> None:
        for matrix in "AB":
            tensors[f"{tower}.lora_{matrix}.weight"] = tensors[f"{Q}.lora_{matrix}.weight"].clone()

    change(adapter, edit)
    assert "1 of 7 modules with LoRA belong to a vision tower" in failures(adapter)["vision"]


def test_mixed_types_are_a_fault(adapter: Path) -> None:
    change(adapter, lambda t: t.update({name: x.bfloat16() for name, x in t.items() if ".lora_B." in name}))
    assert failures(adapter) == {
        "dtype": "the LoRA tensors are BF16 and F32: LoRA is trained in one of F32, BF16 and F16, so another program "
        "changed them"
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("binary", [False, True])
def test_a_sound_adapter_passes_in_every_type_and_format(adapter: Path, dtype: torch.dtype, binary: bool) -> None:
    change(adapter, whole(dtype), binary)
    found = first_tier(adapter)
    assert failures(adapter) == {}
    assert found["norms"].figures["b_norm_by_layer"].keys() == {"0", "1"}
    assert found["file"].figures["tensors"] == 12 and len(found["file"].figures["sha256"]) == 64


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": r"model\.layers\.1\..*(q|v)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"bias": "all", "target_modules": ["q_proj"]},
        {"lora_bias": True, "target_modules": ["q_proj"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_no_variant_of_lora_is_taken_for_a_fault(
    options: dict[str, Any], bases: Callable[..., Path], tmp_path: Path
) -> None:
    assert failures(make_adapter(tmp_path / "adapter", bases("qwen2"), **options)) == {}


def test_what_a_variant_promises_has_to_be_there(adapter: Path) -> None:
    edit_config(adapter, use_dora=True)
    assert "the file lacks 6 tensors of adapter_config.json" in failures(adapter)["variant"]
    edit_config(adapter, use_dora=False, modules_to_save=["lm_head"])
    assert failures(adapter)["variant"] == "the file lacks 1 tensor of adapter_config.json, such as lm_head"


def test_a_missing_bridge_is_named(mgm: Path) -> None:
    assert failures(mgm) == {}
    (mgm / "non_lora_trainables.bin").unlink()
    sentence = "non_lora_trainables.bin is missing: 16 tensors of projector and vlm_uni were not saved"
    assert failures(mgm) == {"bridge": sentence}


def test_each_fault_of_the_bridge_has_its_sentence(mgm: Path) -> None:
    file = mgm / "non_lora_trainables.bin"
    sound = torch.load(file)
    name = next(name for name in sound if name.endswith("mm_projector.2.weight"))

    def fault(tensors: dict[str, Any]) -> str:
        torch.save(tensors, file)
        return failures(mgm)["bridge"]

    assert fault({key: x for key, x in sound.items() if key != name}) == (
        "non_lora_trainables.bin lacks 1 of 16 tensors, such as model.mm_projector.2.weight"
    )
    assert "has the shape [2, 2], config.json asks for [64, 64]" in fault(sound | {name: torch.ones(2, 2)})
    assert "is empty: ZeRO-3's shares were not gathered" in fault(sound | {name: torch.zeros(0)})
    assert "1 tensor holds NaN or infinity" in fault(sound | {name: torch.full((64, 64), float("inf"))})
    assert "could run code" in fault({"x": Path("p")})
    file.write_bytes(file.read_bytes()[:200])
    assert "is cut short" in failures(mgm)["bridge"]


def test_a_bridge_without_its_config_is_a_fault(mgm: Path) -> None:
    (mgm / "config.json").unlink()
    assert "no config.json with mm_* fields" in failures(mgm)["bridge"]


def test_fields_that_are_not_set_are_harmless_to_a_peft_that_passes_over_them() -> None:
    config = {"r": 4, "lora_alpha": 8, "new_field": None, "peft_version": "9.0"}
    old, new = (
        InstalledPeft("0.4.0", frozenset({"r", "lora_alpha", "peft_version"}), lenient) for lenient in (False, True)
    )
    finding = check_version(config, old)
    assert (
        finding.state == "fail" and "would end in 'unexpected keyword'; none is set, so remove them" in finding.sentence
    )
    assert check_version(config, new).state == "pass"
    assert check_version(config, None).state == "not checked"


def test_the_fields_of_the_installed_peft_are_read_from_its_source() -> None:
    from dataclasses import fields

    from peft import LoraConfig

    found = installed_peft()
    assert found is not None and found.lenient
    assert {field.name for field in fields(LoraConfig)} <= found.fields


def test_a_configuration_of_another_kind_is_one_sentence(adapter: Path) -> None:
    for changes, sentence in (
        ({"peft_type": "IA3"}, "describes a IA3 adapter; only LoRA is known here"),
        ({"r": "16"}, "is no LoRA configuration: r is '16'"),
        ({"r": 4, "rank_pattern": [1]}, r"is no LoRA configuration: rank_pattern is \[1\]"),
    ):
        path = adapter / "adapter_config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | changes))
        assert re.search(sentence, failures(adapter)["file"])
        path.write_text(before)


def test_it_needs_no_torch(good: Path) -> None:
    code = (
        "import sys; from lorapatch.adapter.verify import verify; "
        f"v = verify({str(good)!r}, tiers=(1,)); "
        "print(v.passed, {'torch', 'numpy', 'safetensors', 'peft'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "True set()\n"
    )


def test_findings_of_the_files_do_not_depend_on_the_order(good: Path) -> None:
    names = [finding.id for finding in check_files(inspect_adapter(good))]
    assert len(names) == len(set(names))


def test_a_base_whose_index_names_a_missing_shard_still_tells_by_its_config(good: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert failures(good, base) == {}
