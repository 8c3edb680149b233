from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from zoo import AUX_SIDE, Zoo

from lorapatch.trainer import saving
from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.model import BRIDGE, MGMForCausalLM, load_model, mgm_config
from lorapatch.trainer.saving import RunKind, fitting, last_checkpoint, load_bridge, restore, save


@pytest.fixture
def model(zoo: Zoo) -> MGMForCausalLM:
    return fresh(zoo, 1)


def fresh(zoo: Zoo, seed: int, folder: Path | None = None) -> MGMForCausalLM:
    torch.manual_seed(seed)
    config = mgm_config(
        folder or zoo.language,
        mm_vision_tower=str(zoo.clip),
        mm_vision_tower_aux=str(zoo.aux),
        mm_projector_type="mlp2x_gelu",
        image_size_aux=AUX_SIDE,
    )
    return load_model(config)


def bridge(model: MGMForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if any(f".{part}." in name for part in BRIDGE)}


def test_a_full_model_is_written_with_index_and_towers_and_read_again(
    model: MGMForCausalLM, zoo: Zoo, tmp_path: Path
) -> None:
    save(model, AutoTokenizer.from_pretrained(zoo.language), RunKind.of("full"), tmp_path, writer=True)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding" in index
    assert "model.vision_tower_aux.vision_stages.0.blocks.0.gamma" in index
    assert "model.vlm_uni_aux_projector.1.weight" in index
    assert "lm_head.weight" not in index  # tied
    assert set(index) == {key for file in set(index.values()) for key in load_file(tmp_path / file)}
    again = fresh(zoo, 2, tmp_path)
    assert again.config.model_type == "mgm_gemma"
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_large_model_is_cut_into_shards(
    model: MGMForCausalLM, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "SHARD_SIZE", "100KB")
    save(model, AutoTokenizer.from_pretrained(zoo.language), RunKind.of("full"), tmp_path, writer=True)
    files = sorted(file.name for file in tmp_path.glob("model-*"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = fresh(zoo, 2, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_configuration_speaks_the_words_of_transformers_4_too(model: MGMForCausalLM, zoo: Zoo, tmp_path: Path) -> None:
    model.config.tokenizer_model_max_length = 256
    save(model, AutoTokenizer.from_pretrained(zoo.language), RunKind.of("pretrain"), tmp_path, writer=True)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "mgm_gemma"
    assert written["architectures"] == ["MGMGemmaForCausalLM"]
    assert (written["torch_dtype"], written["rope_theta"]) == ("float32", 10000.0)
    assert (written["mm_hidden_size"], written["mm_hidden_size_aux"]) == (32, 80)
    assert written["mm_vision_tower"] == str(zoo.clip)


def test_pre_training_writes_the_bridge_under_upstreams_names_and_the_next_stage_reads_it(
    model: MGMForCausalLM, zoo: Zoo, tmp_path: Path
) -> None:
    model.requires_grad_(False)
    for name in BRIDGE:
        getattr(model.model, name).requires_grad_(True)
    save(model, AutoTokenizer.from_pretrained(zoo.language), RunKind.of("pretrain"), tmp_path, writer=True)
    written = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert written.keys() == bridge(model).keys() >= {"model.mm_projector.0.weight"}
    again = fresh(zoo, 2)
    assert not torch.equal(again.model.mm_projector[0].weight, model.model.mm_projector[0].weight)
    load_bridge(again, tmp_path / "mm_projector.bin")
    assert all(torch.equal(p, q) for p, q in zip(bridge(model).values(), bridge(again).values(), strict=True))


def test_a_bridge_of_upstreams_lora_run_with_towers_in_it_is_read(
    model: MGMForCausalLM, zoo: Zoo, tmp_path: Path
) -> None:
    state = {f"base_model.model.{name}": p.detach() for name, p in bridge(model).items()}
    state["base_model.model.model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "non_lora_trainables.bin")
    again = fresh(zoo, 2)
    load_bridge(again, tmp_path / "non_lora_trainables.bin")
    assert all(torch.equal(p, q) for p, q in zip(bridge(model).values(), bridge(again).values(), strict=True))


def test_a_bridge_that_does_not_fit_is_refused_and_one_with_less_is_told(
    model: MGMForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mm_projector.bin"
    with pytest.raises(TrainerError, match="cannot be read .*: run the pre-training stage first"):
        load_bridge(model, file)
    file.write_bytes(b"torn")
    with pytest.raises(TrainerError, match="is damaged"):
        load_bridge(model, file)
    torch.save({"model.mm_projector.0.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(TrainerError, match=r"mm_projector.0.weight is \(3, 3\), the model needs \(64, 32\)"):
        load_bridge(model, file)
    torch.save({name: p for name, p in bridge(model).items() if "mm_projector" in name}, file)
    load_bridge(model, file)
    assert "has no vlm_uni_query_projector, which keeps its first values" in capsys.readouterr().err


def checkpoint(folder: Path, step: int, run: RunKind | None = None, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if run is not None:
        (path / "lorapatch_run.json").write_text(json.dumps(run))
    if whole:
        (path / "trainer_state.json").write_text("{}")
    return path


LORA = RunKind(kind="lora", r=4, variant="lora", modules=["q_proj"])


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert last_checkpoint(tmp_path / "nowhere", LORA) is None
    expected = checkpoint(tmp_path, 10, LORA)
    checkpoint(tmp_path, 9, LORA)
    cut_off = checkpoint(tmp_path, 20, LORA, whole=False)
    assert last_checkpoint(tmp_path, LORA) == expected
    assert f"{cut_off} is incomplete" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other",
    [
        RunKind(kind="full"),
        RunKind(kind="pretrain"),
        RunKind(kind="lora", r=8, variant="lora", modules=["q_proj"]),
        RunKind(kind="lora", r=4, variant="dora", modules=["q_proj"]),
        RunKind(kind="lora", r=4, variant="lora", modules=["q_proj", "v_proj"]),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused_with_the_remedy(tmp_path: Path, other: RunKind) -> None:
    checkpoint(tmp_path, 4, other)
    with pytest.raises(TrainerError, match="another kind of run.*choose another --output_dir, or move"):
        last_checkpoint(tmp_path, LORA)


def test_upstreams_checkpoints_are_told_by_their_files(tmp_path: Path) -> None:
    lora = checkpoint(tmp_path / "a", 1)
    (lora / "adapter_config.json").write_text(json.dumps({"r": 4, "target_modules": ["q_proj"]}))
    assert last_checkpoint(tmp_path / "a", LORA) == lora
    (checkpoint(tmp_path / "b", 1) / "mm_projector.bin").write_bytes(b"")
    with pytest.raises(TrainerError, match="another kind of run, pre-training, and this one is LoRA"):
        last_checkpoint(tmp_path / "b", LORA)
    checkpoint(tmp_path / "c", 1)
    with pytest.raises(TrainerError, match="another kind of run, full fine-tuning"):
        last_checkpoint(tmp_path / "c", LORA)


def test_a_checkpoint_that_was_named_has_to_be_whole(tmp_path: Path) -> None:
    assert fitting(checkpoint(tmp_path, 1, LORA), LORA)
    with pytest.raises(TrainerError, match="is no whole checkpoint"):
        fitting(checkpoint(tmp_path, 2, LORA, whole=False), LORA)


def test_a_checkpoint_of_other_ranks_is_refused(tmp_path: Path) -> None:
    states = checkpoint(tmp_path, 1, LORA) / "global_step1"
    states.mkdir()
    for rank in range(2):
        (states / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    assert last_checkpoint(tmp_path, LORA, ranks=2)
    for ranks in (0, 1, 3):
        with pytest.raises(TrainerError, match="holds the optimizer of 2 DeepSpeed ranks, and this run has"):
            last_checkpoint(tmp_path, LORA, ranks=ranks)


def test_frozen_weights_may_be_absent_from_a_checkpoint_and_learning_ones_not(model: MGMForCausalLM) -> None:
    model.requires_grad_(False)
    model.model.mm_projector.requires_grad_(True)
    state = {name: p.detach() for name, p in bridge(model).items() if "mm_projector" in name}
    model.load_state_dict(state)
    del state["model.mm_projector.0.weight"]
    with pytest.raises(RuntimeError, match="mm_projector.0.weight"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)


def test_full_weights_are_restored_from_a_checkpoint(model: MGMForCausalLM, zoo: Zoo, tmp_path: Path) -> None:
    save(model, AutoTokenizer.from_pretrained(zoo.language), RunKind.of("full"), tmp_path, writer=True)
    again = fresh(zoo, 2)
    for p in again.parameters():
        p.data.zero_()
    restore(again, RunKind.of("full"), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_failed_write_leaves_the_old_file(
    model: MGMForCausalLM, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.language)
    save(model, tokenizer, RunKind.of("pretrain"), tmp_path, writer=True)
    before = (tmp_path / "mm_projector.bin").read_bytes()

    def full_disk(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(model, tokenizer, RunKind.of("pretrain"), tmp_path, writer=True)
    assert (tmp_path / "mm_projector.bin").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))


def test_only_the_writing_rank_writes(model: MGMForCausalLM, zoo: Zoo, tmp_path: Path) -> None:
    save(model, None, RunKind.of("full"), tmp_path / "out", writer=False)
    assert not (tmp_path / "out").exists()
