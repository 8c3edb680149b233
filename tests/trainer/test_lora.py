from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GemmaForCausalLM
from zoo import AUX_SIDE, Zoo

from lorapatch.trainer.arguments import TrainingArguments
from lorapatch.trainer.counting import count_parameters
from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.lora import add_lora, quantization, restore_adapter, target_modules, touched_modules
from lorapatch.trainer.model import MGMForCausalLM, load_model, mgm_config
from lorapatch.trainer.saving import RunKind, save

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def model(zoo: Zoo) -> MGMForCausalLM:
    config = mgm_config(
        zoo.language,
        mm_vision_tower=str(zoo.clip),
        mm_vision_tower_aux=str(zoo.aux),
        mm_projector_type="mlp2x_gelu",
        image_size_aux=AUX_SIDE,
    )
    torch.manual_seed(1)
    return load_model(config)


def arguments(**fields: Any) -> Any:
    return TrainingArguments(output_dir="unused", use_cpu=True, lora_r=4, lora_alpha=8, lora_dropout=0.0, **fields)


def stir(model: torch.nn.Module) -> None:
    """Give the adapter something to say: LoRA's second half starts at zero."""
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data += 0.2 * torch.randn_like(p)


def write(model: Any, zoo: Zoo, folder: Path, args: Any) -> None:
    from transformers import AutoTokenizer

    run = RunKind.of("lora", args, target_modules(model.get_base_model(), "all-linear"))
    save(model, AutoTokenizer.from_pretrained(zoo.language), run, folder, writer=True)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("all-linear", SEVEN),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (" v_proj , q_proj,", ["q_proj", "v_proj"]),
        ("self_attn.o_proj", ["o_proj"]),
        (r"model\.layers\.\d+\.mlp\..*", ["gate_proj", "up_proj", "down_proj"]),
        (r".*\.1\.self_attn\.[qk]_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]),
        (r".*", SEVEN),
    ],
)
def test_target_modules_as_names_all_or_expression(model: MGMForCausalLM, wanted: str, expected: list[str]) -> None:
    assert target_modules(model, wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("q_prj", "no linear layer of the language model is called q_prj; there are q_proj, k_proj"),
        ("lm_head", "is called lm_head"),
        ("mm_projector", "is called mm_projector"),
        (r".*fc1", "matches none of the 14 linear layers"),
        (r"(", "is no regular expression"),
    ],
)
def test_target_modules_that_match_nothing_are_refused(model: MGMForCausalLM, wanted: str, sentence: str) -> None:
    with pytest.raises(TrainerError) as caught:
        target_modules(model, wanted)
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2


def test_lora_lies_on_the_language_model_alone_and_the_bridge_stays_trainable(model: MGMForCausalLM) -> None:
    bridge = sum(p.numel() for name, p in model.named_parameters() if "vlm_uni" in name or "mm_projector" in name)
    wrapped = add_lora(model, arguments())
    assert touched_modules(wrapped) == SEVEN
    counts = count_parameters(wrapped)
    assert counts.trainable == counts.lora + bridge
    learning = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "mm_projector" in name or "vlm_uni" in name for name in learning)
    assert not any("lora_" in name and ("mm_projector" in name or "vlm_uni" in name) for name in learning)
    assert not any("lora" in name for tower in model.towers for name, _ in tower.named_modules())


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_an_adapter_loads_with_plain_peft_on_plain_gemma(
    model: MGMForCausalLM, zoo: Zoo, tmp_path: Path, variant: str
) -> None:
    from peft import PeftModel

    args = arguments(lora_variant=variant)
    wrapped = add_lora(model, args)
    stir(wrapped)
    write(wrapped, zoo, tmp_path, args)
    plain = PeftModel.from_pretrained(GemmaForCausalLM.from_pretrained(zoo.language), tmp_path)
    ids = torch.randint(7, 260, (2, 20))
    wrapped.eval(), plain.eval()
    expected = wrapped(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    base = GemmaForCausalLM.from_pretrained(zoo.language).eval()
    assert not torch.allclose(base(input_ids=ids).logits, expected, atol=1e-2)


def test_adapter_configuration_names_base_and_modules(model: MGMForCausalLM, zoo: Zoo, tmp_path: Path) -> None:
    args = arguments()
    write(add_lora(model, args), zoo, tmp_path, args)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(zoo.language)
    assert sorted(written["target_modules"]) == sorted(SEVEN)
    assert (written["r"], written["lora_alpha"], written["task_type"]) == (4, 8, "CAUSAL_LM")


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_an_adapter_comes_back_as_it_was(model: MGMForCausalLM, zoo: Zoo, tmp_path: Path, variant: str) -> None:
    args = arguments(lora_variant=variant)
    wrapped = add_lora(model, args)
    stir(wrapped)
    write(wrapped, zoo, tmp_path, args)
    ids = torch.randint(7, 260, (2, 20))
    expected = wrapped.eval()(input_ids=ids).logits
    torch.manual_seed(99)  # another first split than PiSSA made before
    again = add_lora(load_model(model.config), args)
    restore_adapter(again, tmp_path)
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    for (name, p), (_, q) in zip(again.named_parameters(), wrapped.named_parameters(), strict=True):
        if "lora_" in name:
            torch.testing.assert_close(p, q, msg=name)


def test_an_adapter_of_another_rank_or_kind_is_refused(model: MGMForCausalLM, zoo: Zoo, tmp_path: Path) -> None:
    args = arguments()
    write(add_lora(model, args), zoo, tmp_path, args)
    base = model.config
    args.lora_r = 8
    with pytest.raises(TrainerError, match="does not fit this run"):
        restore_adapter(add_lora(load_model(base), args), tmp_path)
    args.lora_r, args.lora_target_modules = 4, "q_proj"
    with pytest.raises(TrainerError, match="does not fit this run"):
        restore_adapter(add_lora(load_model(base), args), tmp_path)
    pissa = arguments(lora_variant="pissa")
    with pytest.raises(TrainerError, match="not of twice PiSSA's rank"):
        restore_adapter(add_lora(load_model(base), pissa), tmp_path)


def test_a_missing_or_torn_adapter_is_one_sentence(model: MGMForCausalLM, tmp_path: Path) -> None:
    wrapped = add_lora(model, arguments())
    with pytest.raises(TrainerError, match="holds no adapter"):
        restore_adapter(wrapped, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainerError, match="is damaged"):
        restore_adapter(wrapped, tmp_path)


def test_bits_without_bitsandbytes_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert quantization(16, dtype=torch.bfloat16, double=True, kind="nf4") is None
    with pytest.raises(TrainerError, match="--bits 4 needs bitsandbytes, which cannot be imported here"):
        quantization(4, dtype=torch.bfloat16, double=True, kind="nf4")
