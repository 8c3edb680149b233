from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, ConvNextConfig, ConvNextModel
from zoo import AUX_SIDE, CLIP_SIDE, Zoo

from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.towers import (
    ClipTower,
    ConvNextTower,
    from_open_clip,
    stack_stages,
    to_open_clip,
    tower_state,
)


def test_aux_tower_of_an_open_clip_folder_computes_what_its_weights_say_under_their_own_names(zoo: Zoo) -> None:
    state = torch.load(zoo.aux / "open_clip_pytorch_model.bin", weights_only=True)
    pixels = torch.randn(2, 3, AUX_SIDE, AUX_SIDE)
    maps = ConvNextTower.from_folder(zoo.aux)(pixels)
    expected = reference.convnext(state, pixels)
    assert [m.shape for m in maps] == [m.shape for m in expected]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_open_clip_tensor_changes_the_output_it_should(zoo: Zoo) -> None:
    """Tensor by tensor: a weight that landed in the wrong place would move the two forwards apart."""
    state = torch.load(zoo.aux / "open_clip_pytorch_model.bin", weights_only=True)
    pixels = torch.randn(1, 3, 32, 32)
    tower = ConvNextTower.from_folder(zoo.aux)
    for key in state:
        changed = {**state, key: state[key] + torch.randn_like(state[key])}
        tower.load_state_dict(from_open_clip(changed))
        for ours, theirs in zip(tower(pixels), reference.convnext(changed, pixels), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, msg=key)


def test_mapping_there_and_back_is_the_identity() -> None:
    tower = ConvNextTower(ConvNextConfig(depths=[1, 2, 1, 1], hidden_sizes=[4, 8, 12, 16]))
    state = tower.state_dict()
    named = to_open_clip(state)
    assert set(named) >= {"visual.trunk.stem.0.weight", "visual.trunk.stages.1.blocks.1.mlp.fc2.bias"}
    back = from_open_clip({**named, "visual.head.proj.weight": torch.zeros(1), "text.ln_final.weight": torch.zeros(1)})
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_name_that_is_no_part_of_the_tower_is_an_error() -> None:
    with pytest.raises(ValueError, match="layernorm"):
        to_open_clip({"layernorm.weight": torch.zeros(1)})


def test_aux_tower_of_a_hugging_face_folder(tmp_path: Path) -> None:
    model = ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[4, 8, 12, 16]))
    model.save_pretrained(tmp_path)
    tower = ConvNextTower.from_folder(tmp_path)
    pixels = torch.randn(1, 3, 64, 64)
    expected = model.eval()(pixels).last_hidden_state
    torch.testing.assert_close(tower(pixels)[-1], expected)
    assert tower.hidden_size == 40
    assert not any(p.requires_grad for p in tower.parameters())


def test_stages_are_stacked_on_the_first_ones_grid() -> None:
    maps = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    stacked = stack_stages(maps)
    assert stacked.shape == (2, 8, 8, 8)
    torch.testing.assert_close(stacked[:, :3], maps[0])


def test_clip_tower_gives_the_patch_tokens_of_the_chosen_hidden_state(zoo: Zoo) -> None:
    pixels = torch.randn(2, 3, CLIP_SIDE, CLIP_SIDE)
    model = CLIPVisionModel.from_pretrained(zoo.clip).eval()
    states = model(pixels, output_hidden_states=True).hidden_states
    for layer in (-2, -1, 1):
        tower = ClipTower.from_folder(zoo.clip, select_layer=layer)
        torch.testing.assert_close(tower(pixels), states[layer][:, 1:])
    assert (tower.grid, tower.hidden_size, tower.image_size) == (4, 32, CLIP_SIDE)


def test_clip_tower_of_a_whole_clip_folder_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    """The published folders hold both halves, the vision one under ``vision_model.``."""
    half = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**half, "image_size": CLIP_SIDE, "patch_size": 14},
        text_config={**half, "vocab_size": 30, "max_position_embeddings": 8},
    )
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    assert any(key.startswith("vision_model.embeddings") for key in load_file(tmp_path / "model.safetensors"))
    pixels = torch.randn(1, 3, CLIP_SIDE, CLIP_SIDE)
    expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(ClipTower.from_folder(tmp_path)(pixels), expected)


def test_a_hidden_state_that_is_not_there_is_refused(zoo: Zoo) -> None:
    with pytest.raises(TrainerError, match="has 4 hidden states, from -4 to 3"):
        ClipTower.from_folder(zoo.clip, select_layer=9)


def test_true_sizes_are_the_measured_ones() -> None:
    with torch.device("meta"):
        clip = ClipTower(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            )
        )
        aux = ConvNextTower(ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536]))
    assert sum(p.numel() for p in clip.parameters()) == 303_507_456
    assert sum(p.numel() for p in aux.parameters()) == 196_227_264
    assert (clip.grid, aux.hidden_size) == (24, 2880)


def test_towers_are_saved_under_upstreams_names(zoo: Zoo) -> None:
    state = tower_state(ClipTower.from_folder(zoo.clip), ConvNextTower.from_folder(zoo.aux))
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in state
    assert "model.vision_tower_aux.vision_stem.0.weight" in state
    assert "model.vision_tower_aux.vision_stages.3.downsample.1.weight" in state


def test_stochastic_depth_is_read_from_the_open_clip_folder(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.aux, tmp_path / "aux")
    settings = {"model_cfg": {"vision_cfg": {"timm_drop_path": 0.1}}}
    (tmp_path / "aux" / "open_clip_config.json").write_text(json.dumps(settings))
    assert ConvNextTower.read_config(tmp_path / "aux").drop_path_rate == 0.1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("open_clip_pytorch_model.bin", None, "has no open_clip_pytorch_model.bin"),
        ("open_clip_pytorch_model.bin", b"not a pickle", "is damaged"),
        ("open_clip_config.json", b"{", "is not JSON"),
        ("open_clip_config.json", b"[]", "is not a JSON object"),
    ],
)
def test_a_broken_aux_folder_is_one_sentence(
    zoo: Zoo, tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    folder = tmp_path / "aux"
    shutil.copytree(zoo.aux, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(TrainerError, match=sentence):
        ConvNextTower.from_folder(folder)


def test_a_folder_of_another_kind_of_model_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="holds a 'gemma' model: a CLIP folder"):
        ClipTower.from_folder(zoo.language)
    with pytest.raises(TrainerError, match="holds a 'gemma' model: an open_clip folder"):
        ConvNextTower.from_folder(zoo.language)
    with pytest.raises(TrainerError, match="cannot be read"):
        ClipTower.from_folder(tmp_path / "nowhere")
    torch.save({"text.ln_final.weight": torch.zeros(1)}, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(TrainerError, match="holds no ConvNeXt"):
        ConvNextTower.from_folder(tmp_path)


def test_a_tower_that_lacks_weights_is_refused_and_not_filled_with_random_ones(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.clip, tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    del state[next(key for key in state if key.endswith("fc1.weight"))]
    save_file(state, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainerError, match="lacks 1 tensors of the tower, .*fc1.weight among them"):
        ClipTower.from_folder(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainerError, match="--vision_tower .* cannot be loaded"):
        ClipTower.from_folder(tmp_path / "clip")
    shutil.copytree(zoo.aux, tmp_path / "aux")
    weights = torch.load(tmp_path / "aux" / "open_clip_pytorch_model.bin", weights_only=True)
    del weights["visual.trunk.stem.1.bias"]
    torch.save(weights, tmp_path / "aux" / "open_clip_pytorch_model.bin")
    with pytest.raises(TrainerError, match="lacks 1 tensors, embeddings.layernorm.bias among them"):
        ConvNextTower.from_folder(tmp_path / "aux")
