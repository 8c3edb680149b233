"""A model zoo and a data set small enough for seconds: the true architecture, random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
CLIP_SIDE, AUX_SIDE, TOKENS = 56, 64, 16


@dataclass(frozen=True)
class Zoo:
    """Folders of the tiny language model and towers, and of LLaVA data that goes with them."""

    root: Path

    @property
    def language(self) -> Path:
        return self.root / "gemma-tiny"

    @property
    def clip(self) -> Path:
        return self.root / "clip-tiny"

    @property
    def aux(self) -> Path:
        return self.root / "openclip-tiny"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def images(self) -> Path:
        return self.root / "images"

    def flags(self, output: Path, **changes: Any) -> list[str]:
        """The flags of a run of four steps in float32; ``changes`` replace or add (None takes away)."""
        flags: dict[str, Any] = {
            "model_name_or_path": self.language,
            "version": "gemma",
            "data_path": self.data,
            "image_folder": self.images,
            "vision_tower": self.clip,
            "vision_tower_aux": self.aux,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "image_size_aux": AUX_SIDE,
            "image_aspect_ratio": "pad",
            "output_dir": output,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "evaluation_strategy": "no",
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "model_max_length": 256,
            "gradient_checkpointing": True,
            "group_by_modality_length": True,
            "lazy_preprocess": True,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        flags.update(changes)
        return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def make_zoo(root: Path) -> Zoo:
    """Build everything under ``root``."""
    zoo = Zoo(root)
    torch.manual_seed(0)
    make_tokenizer(zoo.language)
    make_language_model(zoo.language)
    make_towers(zoo)
    make_data(zoo)
    return zoo


def make_tokenizer(folder: Path) -> None:
    """Bytes behind Gemma's special tokens: any text can be written, nothing has to be learned."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_language_model(folder: Path) -> None:
    """Gemma with two layers."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        vocab_size=len(SPECIAL) + 256 + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    GemmaForCausalLM(config).save_pretrained(folder)


def make_towers(zoo: Zoo) -> None:
    """CLIP with four by four patches, ConvNeXt with four stages as an open_clip folder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, ConvNextConfig

    from lorapatch.trainer.towers import ConvNextTower, to_open_clip

    clip = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=CLIP_SIDE,
        patch_size=14,
    )
    CLIPVisionModel(clip).save_pretrained(zoo.clip)
    tower = ConvNextTower(ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32]))
    for p in tower.parameters():
        p.data += 0.1 * torch.randn_like(p)
    zoo.aux.mkdir(parents=True)
    torch.save(to_open_clip(tower.state_dict()), zoo.aux / "open_clip_pytorch_model.bin")
    settings = {"model_cfg": {"embed_dim": 16, "vision_cfg": {"timm_model_name": "convnext_tiny"}}}
    (zoo.aux / "open_clip_config.json").write_text(json.dumps(settings))


def make_data(zoo: Zoo, count: int = 24) -> None:
    """Coloured rectangles and what colour they have; every fourth sample has no image."""
    zoo.images.mkdir(parents=True)
    colours = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
    samples: list[dict[str, Any]] = []
    for number in range(count):
        name = list(colours)[number % 3]
        question, answer = "What colour is it?", f"It is {name}." * (1 + number % 2)
        sample: dict[str, Any] = {"id": f"s{number}"}
        if number % 4 == 3:
            question = "Say the colour: " + name
        else:
            Image.new("RGB", (40 + number, 30), colours[name]).save(zoo.images / f"{number}.png")
            sample["image"] = f"{number}.png"
            question = f"<image>\n{question}"
        sample["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        samples.append(sample)
    zoo.data.write_text(json.dumps(samples))
