"""How many samples a shorter limit would cut: the lengths of the data file's samples in tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorapatch.errors import Refused
from lorapatch.launch.model import Launch
from lorapatch.lora.lint.facts import LaunchFacts

__all__ = ["cut_by", "token_lengths"]

_MOST = 20_000  # samples that are looked at; of more an even choice


def cut_by(lengths: Sequence[int], limit: int | None) -> str:
    """What ``limit`` tokens a sample cut of samples of these ``lengths``, in words."""
    cut = sum(length > limit for length in lengths) if limit is not None else 0
    share = 100 * cut / len(lengths)
    return f"{limit} tokens cut {cut} of {len(lengths)} samples ({share:.2g} %), the longest has {max(lengths)}"


def token_lengths(launch: Launch, folder: Path) -> list[int] | None:
    """Tokens of each sample of the launch's data file, image tokens included; None where they cannot be counted.

    Counted with the model's own tokenizer.json; of more than 20,000 samples an even choice.
    """
    from lorapatch.memory.lengths import read_samples, turns_of

    facts = LaunchFacts(launch, folder, [])
    data, model, tower = (_file(facts, name) for name in ("data_path", "model_name_or_path", "vision_tower"))
    if data is None or model is None or not (model / "tokenizer.json").is_file():
        return None
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        samples, _ = read_samples(data)
    except (ImportError, OSError, Refused):
        return None
    samples = samples[:: -(-len(samples) // _MOST)]
    found = [turns_of(sample) for sample in samples]
    texts = ["\n".join(turn.text.replace("<image>", "") for turn in turns) for turns, _ in found]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    image = _image_tokens(tower)
    # What the conversation template adds, a few tokens a turn, is left out.
    return [len(text.ids) + 1 + images * image for text, (_, images) in zip(encoded, found)]


def _file(facts: LaunchFacts, name: str) -> Path | None:
    value = facts.value(name)
    return facts.find(value) if value else None


def _image_tokens(tower: Path | None) -> int:
    """The patches of a CLIP tower; 0 without one."""
    try:
        config = json.loads((tower / "config.json").read_text(encoding="utf-8")) if tower else {}
    except (OSError, ValueError):
        return 0
    config = config.get("vision_config", config)
    size, patch = config.get("image_size"), config.get("patch_size")
    return (size // patch) ** 2 if isinstance(size, int) and isinstance(patch, int) and patch else 0
