from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from zoo import AUX_SIDE, CLIP_SIDE, TOKENS, Zoo

from lorapatch.trainer.counting import count_parameters
from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.head import POSITIONS_AT_ONCE
from lorapatch.trainer.mining import KeyProjector, ValueProjector, build_projector, build_query_projector, mine
from lorapatch.trainer.model import (
    CAUSAL_SDPA,
    IGNORE_INDEX,
    MGMForCausalLM,
    MGMGemmaConfig,
    MGMGemmaForCausalLM,
    load_model,
    mgm_config,
)
from lorapatch.trainer.towers import ClipTower, ConvNextTower


def load(zoo: Zoo, **fields: Any) -> MGMForCausalLM:
    fields = {
        "mm_vision_tower": str(zoo.clip),
        "mm_vision_tower_aux": str(zoo.aux),
        "mm_projector_type": "mlp2x_gelu",
        "image_size_aux": AUX_SIDE,
        **fields,
    }
    torch.manual_seed(1)
    return load_model(mgm_config(zoo.language, **fields))


@pytest.fixture(scope="module")
def model(zoo: Zoo) -> MGMForCausalLM:
    return load(zoo)


def batch(count: int = 3, length: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(7, 264, (count, length), generator=generator)
    labels = ids.clone()
    labels[:, :25] = IGNORE_INDEX
    labels[1, 30:] = IGNORE_INDEX
    places = torch.cat([torch.arange(TOKENS) + 4 + length * row for row in range(count)])
    images = torch.randint(0, 256, (count, 3, AUX_SIDE, AUX_SIDE), generator=generator, dtype=torch.uint8)
    return {
        "input_ids": ids,
        "labels": labels,
        "images": images,
        "image_positions": places,
        "image_rows": torch.arange(count * TOKENS),
    }


def test_parameter_names_are_upstreams(model: MGMForCausalLM) -> None:
    names = {name for name, _ in model.named_parameters()}
    for expected in (
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vlm_uni_query_projector.0.weight",
        "model.vlm_uni_aux_projector.1.weight",
        "model.vlm_uni_val_projector.1.bias",
    ):
        assert expected in names
    assert "lm_head.weight" in model.state_dict()
    assert not any("tower" in name for name in names)


def test_mining_equals_the_attention_it_abbreviates_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    images, size = 5, 32
    maps = [torch.randn(images, channels, 16 >> i, 16 >> i) for i, channels in enumerate((8, 16, 24, 32))]
    tokens = torch.randn(images, 16, size)
    bridge = torch.nn.ModuleDict(
        {
            "vlm_uni_query_projector": build_query_projector(size),
            "vlm_uni_aux_projector": KeyProjector(80, size),
            "vlm_uni_val_projector": ValueProjector(80, size),
        }
    )
    for p in bridge.parameters():
        torch.nn.init.normal_(p, std=0.3)

    def ours(recompute: bool) -> torch.Tensor:
        folded = bridge["vlm_uni_aux_projector"](bridge["vlm_uni_query_projector"](tokens))
        return tokens + bridge["vlm_uni_val_projector"](mine(*folded, maps, recompute=recompute))

    def gradients(output: torch.Tensor) -> dict[str, torch.Tensor]:
        bridge.zero_grad()
        output.square().sum().backward()
        return {name: p.grad.clone() for name, p in bridge.named_parameters() if p.grad is not None}

    expected = reference.mining(dict(bridge.named_parameters()), tokens, maps)
    expected_gradients = gradients(expected)
    for recompute in (False, True):
        output = ours(recompute)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        found = gradients(output)
        assert found.keys() == expected_gradients.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-3, msg=name)


def test_recomputed_mining_keeps_the_stages_and_not_the_stacked_features() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, channels, 32 >> i, 32 >> i) for i, channels in enumerate((8, 16, 24, 32))]
    folded, offset = torch.randn(2, 16, 80, requires_grad=True), torch.randn(2, 16, 1, requires_grad=True)

    def kept(recompute: bool) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mine(folded, offset, maps, recompute=recompute)
        return sum(seen.values())

    stacked = 2 * 80 * 32 * 32
    assert kept(False) >= stacked
    assert kept(True) < stacked / 2


def full_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The long way: towers by their own names, every logit, every label, one mean."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = (inputs["images"].float() / 255 - mean) / std
    small = functional.interpolate(pixels, size=(CLIP_SIDE, CLIP_SIDE), mode="bilinear", align_corners=False)
    states = model.clip.vision_tower(small, output_hidden_states=True).hidden_states
    bridge = {name.removeprefix("model."): p for name, p in model.named_parameters()}
    seen = model.model.mm_projector(reference.mining(bridge, states[-2][:, 1:], model.aux(pixels)))
    seen = seen * model.config.hidden_size**0.5
    embeddings = model.model.embed_tokens(inputs["input_ids"]).clone()
    for row in range(len(embeddings)):
        embeddings[row, 4 : 4 + TOKENS] = seen[row]
    mask = torch.ones(embeddings.shape[:2])
    logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def test_loss_and_gradients_equal_the_full_computation(model: MGMForCausalLM) -> None:
    inputs = batch()
    model.train()

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours, expected = model(**inputs).loss, full_loss(model, inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(ours), gradients(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_logits_exist_only_where_a_label_is(model: MGMForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    original = functional.cross_entropy

    def watched(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        rows.append(len(logits))
        return original(logits, *args, **options)

    monkeypatch.setattr(functional, "cross_entropy", watched)
    output = model(**batch())
    assert output.logits is None
    assert sum(rows) == 15 + 5 + 15


def test_many_labels_are_taken_in_parts_with_the_same_loss(model: MGMForCausalLM) -> None:
    model.train()
    hidden = torch.randn(2 * POSITIONS_AT_ONCE + 5, 64, requires_grad=True)
    targets = torch.randint(0, 264, (len(hidden),))
    loss = model.lm_head(hidden, targets)
    expected = functional.cross_entropy(model.lm_head(hidden), targets, reduction="sum")
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(ours, wanted)


def test_a_batch_without_labels_has_loss_zero_and_zero_gradients(model: MGMForCausalLM) -> None:
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORE_INDEX)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_images_of_a_batch_of_text_change_nothing_but_stay_in_the_graph(model: MGMForCausalLM) -> None:
    inputs = batch()
    text = {"input_ids": inputs["input_ids"], "labels": inputs["labels"]}
    nowhere = torch.empty(0, dtype=torch.long)
    black = torch.zeros(1, 3, AUX_SIDE, AUX_SIDE, dtype=torch.uint8)
    model.zero_grad()
    loss = model(**text, images=black, image_positions=nowhere, image_rows=nowhere).loss
    torch.testing.assert_close(loss, model(**text).loss)
    loss.backward()
    gradient = model.model.mm_projector[0].weight.grad
    assert gradient is not None and not gradient.any()


def test_a_cut_image_uses_its_first_tokens(model: MGMForCausalLM) -> None:
    model.eval()
    inputs = batch(count=2)
    whole = model.embed(inputs["input_ids"], inputs["images"], inputs["image_positions"], inputs["image_rows"])
    rows = torch.cat([torch.arange(5), torch.arange(TOKENS, 2 * TOKENS)])
    places = torch.cat([torch.arange(5) + 4, torch.arange(TOKENS) + 44])
    cut = model.embed(inputs["input_ids"], inputs["images"], places, rows)
    torch.testing.assert_close(cut[0, 4:9], whole[0, 4:9])
    torch.testing.assert_close(cut[1], whole[1])
    torch.testing.assert_close(cut[0, 9:], model.model.embed_tokens(inputs["input_ids"])[0, 9:])


def test_attention_without_a_mask_is_the_same_on_right_padded_batches(model: MGMForCausalLM) -> None:
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 31:] = 0
    model.eval()
    expected = model(**inputs, attention_mask=mask).loss
    model.set_attn_implementation(CAUSAL_SDPA)
    try:
        torch.testing.assert_close(model(**inputs).loss, expected)
    finally:
        model.set_attn_implementation("sdpa")


def test_towers_stay_frozen_and_follow_the_model_while_rotary_frequencies_stay_float32(zoo: Zoo) -> None:
    model = load(zoo)
    model.to(torch.bfloat16)
    assert {p.dtype for tower in model.towers for p in tower.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for tower in model.towers for p in tower.parameters())
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, load(zoo).model.rotary_emb.inv_freq, rtol=0, atol=0)
    assert torch.isfinite(model(**batch()).loss)


def test_modes_reach_every_module_of_the_model_and_none_of_the_towers(zoo: Zoo) -> None:
    model = load(zoo)
    for mode in (True, False, True, True, False, False):
        model.train(mode)
        assert all(module.training is mode for module in model.modules())
        assert not any(tower.training for tower in model.towers)


def test_new_bridge_layers_start_as_torch_starts_them(model: MGMForCausalLM) -> None:
    weight = model.model.mm_projector[0].weight
    bound = weight.shape[1] ** -0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert model.model.vlm_uni_aux_projector[0].weight.eq(1).all()


BACKBONES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_backbone_is_told_by_the_configuration_not_by_the_folders_name(zoo: Zoo, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "gemma-by-name-only"
    config_class, model_class = BACKBONES[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model_class(config_class(vocab_size=264, num_key_value_heads=1, **sizes)).save_pretrained(folder)
    config = mgm_config(
        folder, mm_vision_tower=str(zoo.clip), mm_vision_tower_aux=str(zoo.aux), image_size_aux=AUX_SIDE
    )
    assert config.model_type == f"mgm_{kind}"
    model = load_model(config)
    assert isinstance(model, model_class)
    assert torch.isfinite(model(**batch()).loss)


def test_a_model_without_aux_tower_works_as_upstreams_does(zoo: Zoo) -> None:
    model = load(zoo, mm_vision_tower_aux=None)
    assert not hasattr(model.model, "vlm_uni_aux_projector")
    assert torch.isfinite(model(**batch()).loss)


@pytest.mark.parametrize(
    ("kind", "names"), [("linear", ["weight", "bias"]), ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"])]
)
def test_projector_types(kind: str, names: list[str]) -> None:
    assert [name for name, _ in build_projector(kind, 4, 8).named_parameters()] == names


def test_wrong_folders_and_settings_are_one_sentence(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="--mm_projector_type resampler is unknown"):
        load(zoo, mm_projector_type="resampler")
    with pytest.raises(TrainerError, match="--image_size_aux 60: it has to be a multiple of 16"):
        load(zoo, image_size_aux=60)
    with pytest.raises(TrainerError, match=r"config.json cannot be read"):
        mgm_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(TrainerError, match="holds a 'bert' model; the trainer knows gemma, llama, mistral, qwen2"):
        mgm_config(tmp_path)
    with pytest.raises(TrainerError, match="--vision_tower names no CLIP folder"):
        mgm_config(zoo.language)
    (tmp_path / "config.json").write_text((zoo.language / "config.json").read_text())
    with pytest.raises(TrainerError, match="cannot be loaded"):
        load_model(mgm_config(tmp_path, mm_vision_tower=str(zoo.clip)))


def test_towers_that_want_other_pixels_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    for file in zoo.aux.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(TrainerError, match="normalise images differently"):
        load(zoo, mm_vision_tower_aux=str(tmp_path))


def test_an_attention_that_is_not_there_falls_back_to_sdpa(zoo: Zoo, capsys: pytest.CaptureFixture[str]) -> None:
    config = mgm_config(zoo.language, mm_vision_tower=str(zoo.clip))
    model = load_model(config, attn_implementation="flash_attention_2")
    assert model.config._attn_implementation == "sdpa"
    assert "flash_attention_2 is not to be had here" in capsys.readouterr().err


def true_size() -> MGMGemmaForCausalLM:
    config = MGMGemmaConfig(
        vocab_size=256000,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=1024,
        mm_hidden_size_aux=2880,
    )
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = MGMGemmaForCausalLM(config)
        aux = ConvNextTower(ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536]))
        model.attach_towers(ClipTower(clip), aux, CLIP_MEAN, CLIP_STD)
    model.tie_weights()
    return model


def test_parameter_counts_at_true_size_are_the_ones_measured_upstream() -> None:
    model = true_size()
    language = sum(p.numel() for name, p in model.named_parameters() if "vlm_uni" not in name and "mm_" not in name)
    assert language == 2_506_172_416
    assert count_parameters(model).trainable - language == 13_259_008
    assert count_parameters(model).total == 3_019_166_144


@pytest.mark.parametrize(
    ("wanted", "lora", "tensors", "total"),
    [("all-linear", 19_611_648, 252, 3_038_777_792), ("q_proj,v_proj,o_proj", 3_022_848, 108, 3_022_188_992)],
)
def test_lora_counts_at_true_size(wanted: str, lora: int, tensors: int, total: int) -> None:
    from lorapatch.trainer.arguments import TrainingArguments
    from lorapatch.trainer.lora import add_lora

    args = TrainingArguments(output_dir="unused", lora_r=16, lora_target_modules=wanted, use_cpu=True)
    with torch.device("meta"):
        counts = count_parameters(add_lora(true_size(), args))
    assert (counts.lora, counts.tensors, counts.total) == (lora, tensors, total)
    assert counts.trainable == lora + 13_259_008
