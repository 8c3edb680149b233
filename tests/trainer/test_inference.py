from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from zoo import AUX_SIDE, Zoo

from lorapatch.trainer.arguments import TrainingArguments
from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.inference import Loaded, answers, load, loss
from lorapatch.trainer.lora import add_lora
from lorapatch.trainer.model import MGMForCausalLM, load_model, mgm_config
from lorapatch.trainer.saving import RunKind, save


def build(zoo: Zoo) -> MGMForCausalLM:
    torch.manual_seed(1)
    return load_model(
        mgm_config(
            zoo.language,
            mm_vision_tower=str(zoo.clip),
            mm_vision_tower_aux=str(zoo.aux),
            mm_projector_type="mlp2x_gelu",
            image_size_aux=AUX_SIDE,
            image_aspect_ratio="pad",
            mgm_version="gemma",
        )
    )


@pytest.fixture(scope="module")
def full(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full")
    save(build(zoo), AutoTokenizer.from_pretrained(zoo.language), RunKind.of("full"), folder, writer=True)
    yield folder


@pytest.fixture(scope="module")
def loaded(full: Path) -> Loaded:
    return load(full)


def test_questions_with_and_without_images_are_answered_together_as_alone(loaded: Loaded, zoo: Zoo) -> None:
    questions = [
        (zoo.images / "0.png", "What colour is it?"),
        (None, "A longer question without any image at all?"),
        (Image.new("RGB", (20, 40), (0, 0, 255)), "And this?"),
    ]
    together = answers(loaded, questions, max_new_tokens=9)
    assert len(together) == 3
    assert together == [answers(loaded, [question], max_new_tokens=9)[0] for question in questions]


def test_no_questions_have_no_answers(loaded: Loaded) -> None:
    assert answers(loaded, [], max_new_tokens=4) == []


def test_loss_weighs_every_label_alike(loaded: Loaded, zoo: Zoo) -> None:
    samples = json.loads(zoo.data.read_text())[:5]
    each = [loss(loaded, [sample], zoo.images) for sample in samples]
    labels = [len(s["conversations"][1]["value"]) + 3 for s in samples]  # and <end_of_turn>, newline, <eos>
    expected = sum(a * b for a, b in zip(each, labels, strict=True)) / sum(labels)
    assert loss(loaded, samples, zoo.images) == pytest.approx(expected, rel=1e-4)


def test_an_image_may_be_an_object(loaded: Loaded, zoo: Zoo) -> None:
    sample = json.loads(zoo.data.read_text())[0]
    with Image.open(zoo.images / sample["image"]) as image:
        inside = loss(loaded, [{**sample, "image": image.copy()}])
    assert inside == pytest.approx(loss(loaded, [sample], zoo.images), rel=1e-6)


def test_pre_training_folder_is_loaded_over_the_base_that_is_named(zoo: Zoo, tmp_path: Path) -> None:
    model = build(zoo)
    save(model, AutoTokenizer.from_pretrained(zoo.language), RunKind.of("pretrain"), tmp_path, writer=True)
    with pytest.raises(TrainerError, match="holds a projector alone: say which language model"):
        load(tmp_path)
    again = load(tmp_path, base=zoo.language)
    assert torch.equal(again.inner.model.mm_projector[0].weight, model.model.mm_projector[0].weight)


def test_an_adapter_whose_base_moved_or_whose_weights_are_torn(zoo: Zoo, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir="unused", use_cpu=True, lora_r=2)
    wrapped = add_lora(build(zoo), args)
    run = RunKind.of("lora", args, ["q_proj"])
    save(wrapped, AutoTokenizer.from_pretrained(zoo.language), run, tmp_path, writer=True)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(str(zoo.language), "/moved/away"))
    with pytest.raises(TrainerError, match="the base model of .*, /moved/away, is not there"):
        load(tmp_path)
    assert load(tmp_path, base=zoo.language).inner.config.name_or_path == str(zoo.language)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainerError, match="cannot be loaded"):
        load(tmp_path, base=zoo.language)


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="config.json cannot be read"):
        load(tmp_path)
