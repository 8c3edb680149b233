"""Samples in LLaVA's format, read when needed: templates, label masks, images, batches, and their order."""

# mypy: allow-untyped-calls
from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.model import IGNORE_INDEX, MGMForCausalLM

__all__ = [
    "IMAGE",
    "IMAGE_TOKEN",
    "TEMPLATES",
    "Collator",
    "GroupedSampler",
    "ImageSettings",
    "Samples",
    "Template",
    "encode",
    "expand",
    "load_image",
    "template_for",
]

IMAGE = "<image>"
IMAGE_TOKEN = -200


@dataclass(frozen=True)
class Template:
    """How one turn is written. What ``answer`` writes is supervised, everything else is not."""

    question: str
    answer: str
    image_only: bool = False  # a caption: what was asked is left out


TEMPLATES = {
    "gemma": Template("<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "{}<end_of_turn>\n<eos>"),
    "chatml_direct": Template("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>\n"),
    "llama_3": Template(
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>",
    ),
    "mistral_instruct": Template("[INST] {} [/INST]", " {}</s>"),
    "plain": Template("{}", "{}\n", image_only=True),
}
_OF_BACKBONE = {"gemma": "gemma", "qwen2": "chatml_direct", "llama": "llama_3", "mistral": "mistral_instruct"}


def template_for(version: str | None, model_type: str) -> Template:
    """The template that ``--version`` names (``gemma_2b`` is gemma, too), or the one of the backbone."""
    name = version or _OF_BACKBONE[model_type.removeprefix("mgm_")]
    found = TEMPLATES.get(name) or next((t for known, t in TEMPLATES.items() if name.startswith(known)), None)
    if found is None:
        raise TrainerError(f"--version {version} is unknown: {', '.join(TEMPLATES)}", exit_code=2)
    return found


def encode(turns: Sequence[tuple[str, str | None]], tokenizer: Any, template: Template) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation; ``<image>`` is one id, IMAGE_TOKEN. An answer of None is left open.

    The whole text is tokenised at once and the parts before each answer again, to know where its labels begin: so the
    ids are those that inference sees, whatever merges across a boundary (MGM's way).
    """
    text = ""
    spans = []
    for question, answer in turns:
        text += template.question.format(IMAGE * question.count(IMAGE) if template.image_only else question)
        if answer is not None:
            begin, text = text, text + template.answer.format(answer)
            spans.append((len(_ids(begin, tokenizer)), len(_ids(text, tokenizer))))
    ids = _ids(text, tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return ids, labels


def _ids(text: str, tokenizer: Any) -> list[int]:
    ids = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    for number, part in enumerate(text.split(IMAGE)):
        if number:
            ids.append(IMAGE_TOKEN)
        if part:
            ids += tokenizer(part, add_special_tokens=False).input_ids
    return ids


def expand(ids: list[int], labels: list[int], tokens: int, limit: int) -> tuple[Tensor, Tensor]:
    """Each IMAGE_TOKEN becomes ``tokens`` of them, without labels; what lies behind ``limit`` positions is cut."""
    sizes = torch.tensor([tokens if i == IMAGE_TOKEN else 1 for i in ids])
    return (
        torch.tensor(ids).repeat_interleave(sizes)[:limit],
        torch.tensor(labels).repeat_interleave(sizes)[:limit],
    )


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes ``size`` x ``size`` pixels; ``background`` fills what ``pad`` adds."""

    size: int
    pad: bool
    background: tuple[int, int, int]

    @classmethod
    def of(cls, model: MGMForCausalLM) -> ImageSettings:
        """What ``model``'s towers and configuration ask for."""
        size = model.config.image_size_aux if model.aux is not None else model.clip.image_size
        red, green, blue = (int(value) for value in model.pixel_scale[0].flatten().tolist())
        return cls(size, model.config.image_aspect_ratio == "pad", (red, green, blue))


def load_image(source: str | Path | Image.Image, settings: ImageSettings) -> Tensor:
    """A file or an image -> [3, size, size] uint8: padded to a square or cut to one, resized with bicubic weights."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    image = image.convert("RGB")
    if settings.pad and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), settings.background)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    width, height = (settings.size * edge // min(image.size) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - settings.size) // 2, (height - settings.size) // 2
    image = image.crop((left, top, left + settings.size, top + settings.size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class Samples(Dataset[dict[str, Any]]):
    """The samples of a LLaVA JSON file; a broken one is reported with its id and the next good one is given instead.

    ``max_bad`` is a share of the samples (below 1) or a number; one more broken sample raises TrainerError.
    """

    def __init__(
        self,
        samples: list[dict[str, Any]],
        tokenizer: Any,
        template: Template,
        *,
        image_folder: str | Path = "",
        settings: ImageSettings,
        tokens_per_image: int,
        max_length: int,
        max_bad: float = 0.01,
    ) -> None:
        self.samples = samples
        self.tokenizer = tokenizer
        self.template = template
        self.image_folder = Path(image_folder)
        self.settings = settings
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        self.allowed = int(max_bad * len(samples)) if max_bad < 1 else int(max_bad)
        # Shared with the loader's workers, so that the limit counts over all of them.
        self.bad = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    @staticmethod
    def read(file: str | Path) -> list[dict[str, Any]]:
        """The list in ``file`` (JSON, or JSON lines where it is called ``.jsonl``); raises TrainerError."""
        try:
            text = Path(file).read_text(encoding="utf-8")
            lines = text.splitlines()
            found = [json.loads(x) for x in lines if x.strip()] if str(file).endswith(".jsonl") else json.loads(text)
        except OSError as error:
            raise TrainerError(f"--data_path {file} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise TrainerError(f"--data_path {file} is not JSON ({error})") from error
        if not isinstance(found, list) or not found or not all(isinstance(s, dict) for s in found):
            raise TrainerError(f"--data_path {file} is no list of samples (or an empty one)")
        return found

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, negative for one without an image: what the sampler groups by."""
        counts = []
        for sample in self.samples:
            turns = sample.get("conversations")
            words = sum(len(str(t.get("value", "")).split()) for t in turns) if isinstance(turns, list) else 1
            counts.append(max(words, 1) if "image" in sample else -max(words, 1))
        return counts

    def __getitem__(self, index: int) -> dict[str, Any]:
        for step in range(len(self.samples)):
            at = (index + step) % len(self.samples)
            try:
                return self.item(self.samples[at])
            except Exception as error:  # noqa: BLE001 - Pillow alone raises OSError, SyntaxError, ValueError and its own
                self._report(at, error)
        raise TrainerError("no sample of --data_path can be used")

    def _report(self, at: int, error: Exception) -> None:
        if not self.bad[at]:
            self.bad[at] = 1
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            name = self.samples[at].get("id", f"number {at}")
            print(f"lorapatch trainer: sample {name} skipped: {reason}", file=sys.stderr, flush=True)
        if int(self.bad.sum()) > self.allowed:
            raise TrainerError(
                f"{int(self.bad.sum())} of {len(self.samples)} samples are broken, more than --max_bad_samples allows "
                f"({self.allowed}): mend --data_path and --image_folder (the lines above name each), or raise the limit"
            )

    def item(self, sample: dict[str, Any]) -> dict[str, Any]:
        """One sample: ``input_ids``, ``labels`` [L] (image tokens in place) and ``images`` [k, 3, S, S] uint8."""
        turns = _turns(sample)
        files = sample.get("image", [])
        files = [files] if isinstance(files, (str, Image.Image)) else list(files)
        wanted = sum(question.count(IMAGE) for question, _ in turns)
        if files and wanted not in {0, len(files)}:
            raise ValueError(f"{len(files)} images, but {wanted} places for them")
        ids, labels = encode(turns, self.tokenizer, self.template)
        tokens, supervised = expand(ids, labels, self.tokens_per_image, self.max_length)
        if not (supervised[1:] != IGNORE_INDEX).any():
            raise ValueError(f"its answer lies behind --model_max_length {self.max_length}, or is empty")
        images = [load_image(self._locate(file), self.settings) for file in files[:wanted]]
        return {"input_ids": tokens, "labels": supervised, "images": images}

    def _locate(self, name: str | Image.Image) -> Path | Image.Image:
        if isinstance(name, Image.Image):
            return name
        path = self.image_folder / name
        # OCR-VQA changed its file type and Visual Genome its folders since the data sets were written.
        genome = name.replace("VG_100K_2", "images").replace("VG_100K", "images")
        candidates = [path, path.with_suffix(".png"), self.image_folder / genome]
        found = next((c for c in candidates if c.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path} does not exist")
        return found


def _turns(sample: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Question and answer pairs, the image in front of its question (and out of a text-only sample's way)."""
    written = sample.get("conversations")
    if not isinstance(written, list) or not all(isinstance(t, dict) and "value" in t for t in written):
        raise ValueError("it has no conversation")
    if written and written[0].get("from") != "human":
        written = written[1:]
    if not written or len(written) % 2:
        raise ValueError("its conversation has not one answer for each question")
    if [t.get("from") for t in written] != ["human", "gpt"] * (len(written) // 2):
        raise ValueError("human and gpt do not take turns in it")
    turns: list[tuple[str, str | None]] = []
    for question, answer in zip(written[::2], written[1::2], strict=True):
        text, reply = str(question["value"]), str(answer["value"])
        plain = text.replace(IMAGE, "").strip()
        if IMAGE in text:
            text = f"{IMAGE}\n{plain}".strip() if "image" in sample else plain
        turns.append((text, reply.replace(IMAGE, "").strip() if IMAGE in reply else reply))
    return turns


class Collator:
    """Items to a batch for ``MGMForCausalLM.forward``: everything a step needs to know is worked out here, on the CPU.

    Gives ``input_ids`` [B, L]; ``images`` [N, 3, S, S] uint8 (one black image if the batch has none, so that every rank
    makes the same calls); ``image_positions`` and ``image_rows`` [M]; ``label_positions`` and ``targets`` [n]. Padding
    stands on the right, where causal attention never looks back from: no mask is needed.
    """

    def __init__(self, pad_token_id: int, image_size: int, tokens_per_image: int) -> None:
        self.pad = pad_token_id
        self.image_size = image_size
        self.tokens_per_image = tokens_per_image

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([i["input_ids"] for i in items], batch_first=True, padding_value=self.pad)
        labels = pad([i["labels"] for i in items], batch_first=True, padding_value=IGNORE_INDEX)
        following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        label_positions = (following != IGNORE_INDEX).nonzero().squeeze(-1)
        taken = ids == IMAGE_TOKEN
        rows, start = [], 0
        for item, count in zip(items, taken.sum(1).tolist(), strict=True):
            rows.append(torch.arange(start, start + count))  # a cut sample uses the first of its rows
            start += len(item["images"]) * self.tokens_per_image
        images = [image for item in items for image in item["images"]]
        black = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        return {
            "input_ids": ids.masked_fill(taken, self.pad),
            "images": torch.stack(images or [black]),
            "image_positions": taken.flatten().nonzero().squeeze(-1),
            "image_rows": torch.cat(rows),
            "label_positions": label_positions,
            "targets": following[label_positions],
            "token_count": sum(len(i["input_ids"]) for i in items),
        }


class GroupedSampler(Sampler[int]):
    """Batches of like length, and (``by_modality``) of like kind; a step's batches weigh about the same on every rank.

    ``lengths`` are :attr:`Samples.lengths`. The order depends on ``seed`` and epoch alone, so a resumed run sees the
    same one and ``world`` (ranks times accumulation) batches make a step whatever share of them one rank has.
    """

    def __init__(self, lengths: list[int], batch: int, world: int, seed: int, *, by_modality: bool) -> None:
        self.lengths, self.batch, self.world, self.seed, self.by_modality = lengths, batch, world, seed, by_modality
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order for each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        kinds = [range(len(self.lengths))]
        if self.by_modality:
            kinds = [[i for i, n in enumerate(self.lengths) if (n > 0) == seen] for seen in (True, False)]  # type: ignore[misc]
        whole: list[list[int]] = []
        left: list[int] = []
        for members in kinds:
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            steps = [order[i : i + self.batch * self.world] for i in range(0, len(order), self.batch * self.world)]
            if steps and len(steps[-1]) < self.batch * self.world:
                left += steps.pop()
            whole += [self._balanced(step) for step in steps]
        for i in torch.randperm(len(whole), generator=generator).tolist():
            yield from whole[i]
        yield from sorted(left, key=lambda i: abs(self.lengths[i]), reverse=True)

    def _balanced(self, step: list[int]) -> list[int]:
        """The step's samples as ``world`` batches of ``batch``, longest first, each put where the load is least."""
        batches: list[list[int]] = [[] for _ in range(self.world)]
        loads = [0.0] * self.world
        for i in sorted(step, key=lambda i: abs(self.lengths[i]), reverse=True):
            least = min(range(self.world), key=loads.__getitem__)
            batches[least].append(i)
            loads[least] = float("inf") if len(batches[least]) == self.batch else loads[least] + abs(self.lengths[i])
        return [i for batch in batches for i in batch]
