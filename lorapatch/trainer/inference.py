"""A trained folder, full model or adapter, put to work: answers and loss."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoTokenizer

from lorapatch.trainer.data import Collator, ImageSettings, Samples, Template, encode, expand, load_image, template_for
from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.model import load_model, mgm_config
from lorapatch.trainer.saving import load_bridge

__all__ = ["Loaded", "answers", "load", "loss"]

BATCH = 16


@dataclass(frozen=True)
class Loaded:
    """A model ready for questions: with its adapter on it, where there is one."""

    model: Any
    tokenizer: Any
    template: Template
    settings: ImageSettings

    @property
    def inner(self) -> Any:
        """The MGM model itself, whatever PEFT has put around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def tokens_per_image(self) -> int:
        """Positions an image takes."""
        return int(self.inner.clip.grid) ** 2


def load(
    folder: str | Path, *, base: str | Path | None = None, device: str = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """A full model folder, an adapter folder, or what pre-training left (``mm_projector.bin``).

    The latter two need a base model: the one that ``adapter_config.json`` names, unless ``base`` says where it is now.
    Raises TrainerError when the folder, its base or its towers are not there.
    """
    folder = Path(folder)
    adapter, bridge = folder / "adapter_config.json", folder / "mm_projector.bin"
    config = mgm_config(folder)
    config.name_or_path = str(_base(folder, adapter, bridge, base))
    model: Any = load_model(config, dtype=dtype or torch.float32)
    if adapter.is_file():
        from peft import PeftModel

        load_bridge(model, folder / "non_lora_trainables.bin")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)  # PEFT's old name for it
                model = PeftModel.from_pretrained(model, str(folder))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise TrainerError(f"the adapter in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    elif bridge.is_file():
        load_bridge(model, bridge)
    model.to(device).eval()
    inner = model.get_base_model() if adapter.is_file() else model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = template_for(getattr(config, "mgm_version", None), config.model_type)
    return Loaded(model, tokenizer, template, ImageSettings.of(inner))


def _base(folder: Path, adapter: Path, bridge: Path, base: str | Path | None) -> Path:
    if not adapter.is_file() and not bridge.is_file():
        return folder
    named = base
    if named is None and adapter.is_file():
        named = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if named is None:
        raise TrainerError(f"{folder} holds a projector alone: say which language model it belongs to")
    if not (Path(named) / "config.json").is_file():
        raise TrainerError(f"the base model of {folder}, {named}, is not there")
    return Path(named)


@torch.no_grad()
def answers(
    loaded: Loaded, questions: Sequence[tuple[str | Path | Image.Image | None, str]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to (image or None, question) pairs, in their order; an image stands before its question."""
    found: list[str] = []
    for start in range(0, len(questions), BATCH):
        found += _batch(loaded, questions[start : start + BATCH], max_new_tokens)
    return found


def _batch(loaded: Loaded, questions: Sequence[tuple[Any, str]], max_new_tokens: int) -> list[str]:
    tokenizer = loaded.tokenizer
    rows = []
    images = []
    for image, question in questions:
        text = question if image is None else f"<image>\n{question}"
        prompt, labels = encode([(text, None)], tokenizer, loaded.template)
        rows.append(expand(prompt, labels, loaded.tokens_per_image, 10**9)[0])
        images += [] if image is None else [load_image(image, loaded.settings)]
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    device = loaded.inner.lm_head.weight.device
    taken = ids < 0
    embeddings = loaded.inner.embed(
        ids.masked_fill(taken, pad).to(device),
        torch.stack(images).to(device) if images else None,
        taken.flatten().nonzero().squeeze(-1).to(device),
        torch.arange(int(taken.sum()), device=device),
    )
    written = loaded.model.generate(
        inputs_embeds=embeddings,
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=_ends(loaded),
        pad_token_id=pad,
    )
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def _ends(loaded: Loaded) -> list[int]:
    """End of text, and what the template writes behind an answer where that is one token."""
    behind = loaded.template.answer.replace("{}", "").strip()
    ids = loaded.tokenizer(behind, add_special_tokens=False).input_ids[:1] if behind else []
    return sorted({int(loaded.tokenizer.eos_token_id), *ids})


@torch.no_grad()
def loss(loaded: Loaded, samples: Sequence[dict[str, Any]], image_folder: str | Path = "") -> float:
    """Mean loss over the supervised positions of ``samples`` (LLaVA's format; an image may be a path or an image)."""
    data = Samples(
        list(samples),
        loaded.tokenizer,
        loaded.template,
        image_folder=image_folder,
        settings=loaded.settings,
        tokens_per_image=loaded.tokens_per_image,
        max_length=loaded.tokenizer.model_max_length,
    )
    collate = Collator(loaded.tokenizer.pad_token_id, loaded.settings.size, loaded.tokens_per_image)
    device = loaded.inner.lm_head.weight.device
    total = count = 0.0
    for start in range(0, len(samples), BATCH):
        batch = collate([data.item(sample) for sample in samples[start : start + BATCH]])
        del batch["token_count"]
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        number = len(moved["targets"])
        total += float(loaded.model(**moved).loss) * number
        count += number
    return total / max(count, 1)
