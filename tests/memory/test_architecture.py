"""Parameters are counted from configuration files alone, and the counts are the models'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import CLIP_L, CONVNEXT_L, GEMMA_2B, LLAMA, mgm_run, write_json

import lorapatch
from lorapatch.errors import Refused
from lorapatch.memory.architecture import language_in, read_config, read_language
from lorapatch.memory.defaults import LANGUAGES, TOWERS, language_defaults
from lorapatch.memory.model import RunSetup
from lorapatch.memory.parameters import parts_of
from lorapatch.memory.towers import read_convnext, read_vision


def test_mgm_2b_has_the_parameters_that_were_measured(tmp_path: Path) -> None:
    mgm_run(tmp_path)
    assert language_in(tmp_path / "gemma").parameters == 2_506_172_416
    assert read_vision(tmp_path / "clip").parameters == 303_507_456
    assert read_convnext(tmp_path / "convnext").parameters == 196_227_264
    found = lorapatch.estimate(mgm_run(tmp_path), fast=True)
    assert found.before is not None and found.after is not None
    assert parts_of(found.before.setup).bridge == 13_259_008
    assert found.before.breakdown.total_parameters == 3_019_166_144
    assert found.before.breakdown.trainable_parameters == 2_506_172_416 + 13_259_008


@pytest.mark.parametrize(("targets", "lora"), [("all-linear", 19_611_648), ("q_proj,v_proj,o_proj", 3_022_848)])
def test_lora_of_mgm_2b_has_the_parameters_that_were_measured(targets: str, lora: int) -> None:
    language = read_language(GEMMA_2B)
    assert language.layers * sum(16 * (x.inputs + x.outputs) for x in language.targets(targets)) == lora


def _small(**more: Any) -> dict[str, Any]:
    return {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 300,
            **more}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("LlamaConfig", _small(num_key_value_heads=2)),
        ("LlamaConfig", _small(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)),
        ("MistralConfig", _small(num_key_value_heads=2)),
        ("GemmaConfig", _small(num_key_value_heads=1, head_dim=32)),
        ("Gemma2Config", _small(num_key_value_heads=2, head_dim=16)),
        ("Gemma3TextConfig", _small(num_key_value_heads=2, head_dim=16)),
        ("Qwen2Config", _small(num_key_value_heads=2)),
        ("Qwen3Config", _small(num_key_value_heads=2)),
        ("PhiConfig", _small()),
        ("Phi3Config", _small(num_key_value_heads=2, pad_token_id=0)),
        ("GPT2Config", {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 128}),
        ("GPTNeoXConfig", _small()),
    ],
)
def test_parameters_are_those_of_the_model_that_transformers_builds(name: str, fields: dict[str, Any]) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    config = getattr(transformers, name)(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    written = {**json.loads(config.to_json_string()), **({} if name == "GPT2Config" else fields)}
    language = read_language(written)
    assert language.known
    assert language.parameters == sum(p.numel() for p in model.parameters())
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    linear = [m for n, m in model.named_modules() if isinstance(m, kinds) and ".lm_head" not in f".{n}"]
    linear = [m for m in linear if m is not getattr(model, "embed_out", None)]
    assert language.linear_parameters == sum(m.weight.numel() for m in linear)


def test_towers_of_other_sizes_are_counted_as_transformers_builds_them(tmp_path: Path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    clip = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                         image_size=28, patch_size=14)  # fmt: skip
    convnext = transformers.ConvNextConfig(depths=[1, 2, 1, 1], hidden_sizes=[8, 16, 24, 32], patch_size=4)
    with torch.device("meta"):
        real = [sum(p.numel() for p in m.parameters()) for m in (transformers.CLIPVisionModel(clip),
                                                                 transformers.ConvNextModel(convnext))]  # fmt: skip
    write_json(tmp_path / "clip/config.json", json.loads(clip.to_json_string()))
    write_json(tmp_path / "convnext/config.json", json.loads(convnext.to_json_string()))
    assert read_vision(tmp_path / "clip").parameters == real[0]
    norm = 2 * 32  # behind the pooling, which a tower does not use
    assert read_convnext(tmp_path / "convnext").parameters == real[1] - norm


@pytest.mark.parametrize("kind", sorted(LANGUAGES))
def test_what_a_language_models_configuration_leaves_out_is_what_transformers_has(kind: str) -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    named = f"{kind}_text" if f"{kind}_text" in auto.CONFIG_MAPPING else kind
    config = auto.CONFIG_MAPPING[named]()
    found = language_defaults(kind)
    assert found.pop("num_key_value_heads") in (config.num_key_value_heads, None)
    assert found == {name: getattr(config, name) for name in found}
    ours = read_language({"model_type": named})
    assert ours.known and ours.kv_heads == config.num_key_value_heads
    assert ours.head_dim == getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert ours == read_language({"text_config": {"model_type": named}, "hidden_size": 5, "model_type": "whole"})


@pytest.mark.parametrize("kind", sorted(TOWERS))
def test_what_a_towers_configuration_leaves_out_is_what_transformers_has(kind: str) -> None:
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    config = auto.CONFIG_MAPPING[kind]()
    config = getattr(config, "vision_config", config)
    assert TOWERS[kind] == {name: getattr(config, name) for name in TOWERS[kind]}


def test_llavas_published_configuration_names_hardly_more_than_its_parts(tmp_path: Path) -> None:
    written = {
        "model_type": "llava", "image_token_index": 32000, "vision_feature_layer": -2, "tie_word_embeddings": False,
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
            "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
        },
    }  # fmt: skip
    write_json(tmp_path / "config.json", written)
    setup = RunSetup(family="image_text", trainer="transformers", model=tmp_path, method="full", micro_batch=1, sequence=9,
                     labels=9)  # fmt: skip
    assert language_in(tmp_path).positions == 4096
    assert parts_of(setup).total == 7_063_427_072


@pytest.mark.parametrize(
    ("written", "kind"),
    [("qwen2_vl_text", "qwen2_vl"), ("qwen2_5_vl_text", "qwen2_5_vl"), ("qwen3_vl_text", "qwen3"), ("gemma3_text", "gemma3")],
)
def test_a_nested_models_type_is_that_of_its_family(written: str, kind: str) -> None:
    nested = read_language({**LLAMA, "model_type": written})
    assert nested.known and nested.parameters == read_language({**LLAMA, "model_type": kind}).parameters
    assert nested.parameters != read_language(LLAMA).parameters


def test_an_unknown_model_is_counted_as_a_llama_and_says_so() -> None:
    language = read_language({**LLAMA, "model_type": "zebra"})
    assert language.parameters == read_language(LLAMA).parameters
    assert not language.known and "zebra model is not known" in language.notes[0]


def test_experts_are_counted_and_said_to_be_a_guess() -> None:
    language = read_language({**LLAMA, "model_type": "mixtral", "num_local_experts": 8})
    assert language.parameters - read_language(LLAMA).parameters == 2 * 7 * 3 * 64 * 128
    assert not language.known and any("8 experts" in note for note in language.notes)


def test_a_model_that_is_not_here_has_the_size_in_its_name() -> None:
    language = language_in(Path("models/vicuna-7b"))
    assert language.parameters == pytest.approx(7e9, rel=0.1)
    assert not language.known and "7 billion" in language.notes[0]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"model_type": "zebra"}', "config.json of a zebra model has no"),
        ('{"model_type": "phi", "vocab_size": 5}', "config.json of a phi model has no hidden_size"),
        ('{"model_type": "llama", "vocab_size": 5, "hidden_size": "wide", "num_hidden_layers": 2}', "a size that cannot be"),
        ('{"model_type": "llama", "vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 0}', "a size below 1"),
        ("[1, 2]", "is not a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_a_configuration_that_says_nothing_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(Refused, match=sentence):
        language_in(tmp_path)


def test_no_folder_and_no_size_in_the_name_is_refused() -> None:
    with pytest.raises(Refused, match="does not say how large"):
        language_in(Path("models/mine"))


def test_a_tower_without_sizes_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "clip"})
    with pytest.raises(Refused, match="vision tower"):
        read_vision(tmp_path)
    write_json(tmp_path / "config.json", {**CLIP_L, "patch_size": -1})
    with pytest.raises(Refused, match="a size below 1"):
        read_vision(tmp_path)
    write_json(tmp_path / "open_clip_config.json", {"model_cfg": {"vision_cfg": {"timm_model_name": "vit"}}})
    with pytest.raises(Refused, match="names no ConvNeXt"):
        read_convnext(tmp_path)


def test_convnext_is_read_off_its_weights_where_they_are(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    write_json(tmp_path / "open_clip_config.json", CONVNEXT_L)
    state = {"visual.trunk.stem.0.weight": torch.zeros(8, 3, 16, 16)}
    state |= {f"visual.trunk.stages.{i}.blocks.0.conv_dw.weight": torch.zeros(8 << i, 1, 7, 7) for i in range(4)}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    tower = read_convnext(tmp_path)
    assert (tower.patch_size, tower.depths, tower.widths) == (16, (1, 1, 1, 1), (8, 16, 32, 64))


def test_clip_inside_a_whole_clip_configuration_is_found(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "clip", "vision_config": CLIP_L})
    assert read_vision(tmp_path).tokens == 576
    assert read_config(tmp_path)["model_type"] == "clip"
