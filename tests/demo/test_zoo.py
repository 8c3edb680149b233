"""The model zoo: true sizes counted without memory, tiny ones in the formats of their publishers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

from lorapatch.demo import zoo  # noqa: E402
from lorapatch.trainer.towers import ClipTower, ConvNextTower  # noqa: E402


def made(name: str, device: str, dtype: Any) -> zoo.Zoo:
    return zoo.build(zoo.SIZES[name], tokens=500, device=device, dtype=dtype)


def kinds(model: Any) -> set[str]:
    """Names of the parameters, whatever the number of their layer."""
    return {re.sub(r"\d+", "N", name) for name, _ in model.named_parameters()}


def test_the_true_models_have_the_numbers_of_parameters_of_the_published_ones() -> None:
    true = made("true", "meta", torch.bfloat16)
    assert true.parameters() == {"language": 2_506_172_416, "vision": 303_507_456, "vision_aux": 199_770_816}
    assert sum(p.numel() for p in true.vision_aux.parameters()) == 196_227_264
    models = (true.language, true.vision, true.vision_aux)
    assert {p.dtype for model in models for p in model.parameters()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in true.head.values()} == {torch.bfloat16}


def test_the_tiny_models_have_the_architecture_of_the_true_ones() -> None:
    tiny, true = made("tiny", "cpu", torch.float32), made("true", "meta", torch.bfloat16)
    for name in ("language", "vision", "vision_aux"):
        assert kinds(getattr(tiny, name)) == kinds(getattr(true, name))
    assert tiny.head.keys() == true.head.keys()
    assert tiny.language.config.num_key_value_heads == 1
    assert len(tiny.vision_aux.config.depths) == 4


def test_the_grids_of_the_tiny_towers_fit_at_the_scripts_768_pixels() -> None:
    tiny = made("tiny", "cpu", torch.float32)
    clip = ClipTower(tiny.vision.config, model=tiny.vision)
    maps = tiny.vision_aux(torch.zeros(1, 3, 768, 768))
    assert len(maps) == 4
    assert maps[0].shape[-1] % clip.grid == 0


def test_the_default_dtype_is_left_as_it_was() -> None:
    made("true", "meta", torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


def test_what_is_saved_is_what_the_loaders_find(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = made("tiny", "cpu", torch.float32)
    zoo.save(tiny, zoo.SIZES["tiny"], tmp_path)
    language = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / zoo.FOLDERS["language"])
    clip = ClipTower.from_folder(tmp_path / zoo.FOLDERS["vision"])
    aux = ConvNextTower.from_folder(tmp_path / zoo.FOLDERS["vision_aux"])
    pairs = [(language, tiny.language), (clip.vision_tower, tiny.vision), (aux, tiny.vision_aux)]
    for loaded, saved in pairs:
        found = loaded.state_dict()
        assert found.keys() == saved.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in saved.state_dict().items())


def test_the_folders_are_laid_out_as_their_publishers_do(tmp_path: Path) -> None:
    from safetensors import safe_open

    zoo.save(made("tiny", "cpu", torch.float32), zoo.SIZES["tiny"], tmp_path)
    language = tmp_path / zoo.FOLDERS["language"]
    config = json.loads((language / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gemma", ["GemmaForCausalLM"])
    with safe_open(language / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 (a safe_open is no dict)
    with safe_open(tmp_path / zoo.FOLDERS["vision"] / "model.safetensors", "pt") as weights:
        assert all(name.startswith("vision_model.") for name in weights.keys())  # noqa: SIM118
    aux = tmp_path / zoo.FOLDERS["vision_aux"]
    state = torch.load(aux / "open_clip_pytorch_model.bin", weights_only=True)
    assert {"visual.trunk.stem.0.weight", "visual.trunk.head.norm.weight", "visual.head.mlp.fc2.weight"} <= state.keys()
    timm = json.loads((aux / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]["timm_model_name"]
    assert timm == "convnext_large"
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 1  # safetensors' own files can be read by their owner alone
