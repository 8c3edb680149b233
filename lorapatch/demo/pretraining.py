"""A short real training of the tiny zoo, so that fine-tuning it means something: text for Gemma, digits for the towers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from lorapatch.demo import data, digits
from lorapatch.demo.zoo import IMAGE_MEAN, IMAGE_STD, Zoo

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import CLIPVisionModel, GemmaForCausalLM

    from lorapatch.trainer.towers import ConvNextTower

__all__ = ["STEPS", "pretrain"]

Report = Callable[[int], None]
Pictures: TypeAlias = "tuple[Tensor, Tensor]"  # normalised [N, 3, 192, 192], and the digits on them [N]

LANGUAGE_STEPS, LANGUAGE_BATCH = 250, 32
VISION_STEPS, VISION_BATCH = 200, 64
AUX_STEPS, AUX_BATCH = 60, 32
STEPS = LANGUAGE_STEPS + VISION_STEPS + AUX_STEPS

# The script's learning rates are made for Gemma's 2,048 channels and some hundred steps; Adam moves what a layer computes
# by rate x channels x size of its input a step (muP, arXiv:2203.03466). The tiny model's norms make up for what it
# lacks, 16 times fewer channels and a quarter of the steps, and its weights are as much smaller: it computes the
# same, and a rate of 2e-5 moves it as it moves Gemma.
GAIN = 64.0
PICTURE_WORDS = 6  # words that stand for a picture in the language model's texts
LONGEST = 50.0  # how many times longer than a word's vector a projected patch may be
KINDS = ("caption", *("name", "parity", "size", "next") * 2, *("choice",) * 6)

SIDE = 192  # pixels of the pictures the towers are trained on


def pretrain(zoo: Zoo, tokenizer: Any, *, seed: int, report: Report) -> dict[str, float]:
    """Train the three models of ``zoo`` in place; ``report`` is called with the steps done, out of `STEPS`.

    Returns the share of right answers: ``language`` on fresh texts, ``vision`` and ``vision_aux`` on held-out pictures.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same weights whatever the number of cores, and hardly slower at this size
    rng = random.Random(seed)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            language = _train_language(zoo.language, tokenizer, rng, report)
            seen, unseen = (_pictures(indices, rng) for indices in digits.split())
            vision = _train_vision(zoo.vision, seen, unseen, rng, _after(LANGUAGE_STEPS, report))
            aux = _train_vision_aux(zoo.vision_aux, seen, unseen, rng, _after(LANGUAGE_STEPS + VISION_STEPS, report))
    finally:
        torch.set_num_threads(threads)
    return {"language": language, "vision": vision, "vision_aux": aux}


def _after(done: int, report: Report) -> Report:
    return lambda step: report(done + step)


def _train(parameters: list[nn.Parameter], losses: Iterator[Tensor], *, steps: int, rate: float, report: Report) -> None:
    """AdamW with a warm-up and a linear decay over the first ``steps`` of ``losses``."""
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    for step in range(1, steps + 1):
        loss = next(losses)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report(step)


def _train_language(model: GemmaForCausalLM, tokenizer: Any, rng: random.Random, report: Report) -> float:
    """Questions about a picture that is told in words: "seven seven seven\\nIs the digit even?" -> "no"."""
    import torch
    from torch.nn import functional

    _initialise_language(model)
    words = [tokenizer.convert_tokens_to_ids(f"▁{word}") for word in digits.WORDS[:10]]

    def texts(count: int) -> list[tuple[list[int], list[int]]]:
        return [_text(tokenizer, words, rng) for _ in range(count)]

    def batch() -> tuple[Tensor, Tensor]:
        rows = [(opening + question, answer) for question, answer in texts(LANGUAGE_BATCH)]
        width = max(len(question) + len(answer) for question, answer in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for row, (question, answer) in enumerate(rows):
            ids[row, : len(question) + len(answer)] = torch.tensor(question + answer)
            labels[row, len(question) : len(question) + len(answer)] = torch.tensor(answer)
        return ids.to(model.device), labels.to(model.device)

    opening = tokenizer("<start_of_turn>user\n").input_ids
    picture = slice(len(opening), len(opening) + PICTURE_WORDS)

    def logits(ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At the positions before a label: their logits [n, V], the labels [n], and their mask [B, L - 1]."""
        wanted = labels[:, 1:] != -100
        embedded = model.model.embed_tokens(ids)
        embedded = torch.cat([embedded[:, : picture.start], _blur(embedded[:, picture]), embedded[:, picture.stop :]], 1)
        mask = (ids != tokenizer.pad_token_id).long()
        hidden = model.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted], wanted

    def losses() -> Iterator[Tensor]:
        while True:
            predicted, labels, _ = logits(*batch())
            yield functional.cross_entropy(predicted, labels)

    model.train()
    _train(list(model.parameters()), losses(), steps=LANGUAGE_STEPS, rate=5e-5, report=report)
    model.train(False)
    with torch.no_grad():
        predicted, labels, wanted = logits(*batch())
        right = torch.ones_like(wanted)
        right[wanted] = predicted.argmax(-1) == labels
        return float(right.all(-1).float().mean())


def _initialise_language(model: GemmaForCausalLM) -> None:
    import torch

    depth = 2 * model.config.num_hidden_layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(GAIN - 1)  # Gemma's norms multiply by 1 + weight
            elif "o_proj" in name or "down_proj" in name:
                parameter.normal_(0, (parameter.shape[1] * depth) ** -0.5)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5 / GAIN)


def _text(tokenizer: Any, words: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Token ids of a question behind a picture in words, and of its answer."""
    digit, kind = rng.randrange(10), rng.choice(KINDS)
    if kind == "caption":
        question, answer = digits.caption(digit, rng)
    else:
        asked = digits.ask(digit, kind, rng)
        question, answer = data.prompt(asked), asked.answer
    picture = [words[digit]] * PICTURE_WORDS
    behind = f"\n{question}<end_of_turn>\n<start_of_turn>model\n"
    return (
        picture + tokenizer(behind, add_special_tokens=False).input_ids,
        tokenizer(f"{answer}<end_of_turn>\n<eos>", add_special_tokens=False).input_ids,
    )


def _blur(words: Tensor) -> Tensor:
    """Words [B, P, D] as a projector that has just begun to learn gives them: weak, displaced, noisy, of any length.

    A language model that can read these needs little from the projector (text-only training with noise, CapDec,
    arXiv:2211.00575).
    """
    import torch

    count, places, width = words.shape
    size = words.detach().square().mean().sqrt()
    strength, displaced, noisy, longer = torch.rand(4, count, 1, 1, device=words.device)
    offset = torch.randn(count, 1, width, device=words.device)
    noise = torch.randn(count, places, width, device=words.device)
    blurred = words * (0.3 + 0.7 * strength) + size * (1.5 * displaced * offset + noisy * noise)
    stretched: Tensor = blurred * LONGEST**longer
    return stretched


def _pictures(indices: list[int], rng: random.Random) -> Pictures:
    """Normalised pictures [N, 3, 192, 192], cut or padded to a square as the two stages do it, and their digits [N]."""
    import torch

    from lorapatch.trainer.data import ImageSettings, load_image

    mean = torch.tensor(IMAGE_MEAN).view(3, 1, 1) * 255
    std = torch.tensor(IMAGE_STD).view(3, 1, 1) * 255
    background = (122, 116, 104)  # the mean as bytes
    images = [
        load_image(digits.draw(index, rng), ImageSettings(SIDE, rng.random() < 0.5, background)) for index in indices
    ]
    labels = digits.labels()
    return (torch.stack(images) - mean) / std, torch.tensor([labels[index] for index in indices])


def _batches(pictures: Pictures, size: int, rng: random.Random) -> Iterator[Pictures]:
    """Random batches, each moved a little up or down and sideways."""
    import torch

    images, labels = pictures
    while True:
        chosen = torch.randint(len(labels), (size,))
        moves = (rng.randint(-6, 6), rng.randint(-6, 6))
        yield torch.roll(images[chosen], moves, (2, 3)), labels[chosen]


def _train_vision(
    model: CLIPVisionModel, seen: Pictures, unseen: Pictures, rng: random.Random, report: Report
) -> float:
    """Every patch of the last layer but one, which is what MGM reads, learns to name the digit."""
    import torch
    from torch.nn import functional

    from lorapatch.trainer.towers import ClipTower

    _initialise_tower(model)
    tower = ClipTower(model.config, model=model).requires_grad_(True)
    head = torch.nn.Linear(tower.hidden_size, 10).to(model.device)

    def small(pictures: Pictures) -> Pictures:
        images = functional.interpolate(pictures[0], size=(tower.image_size,) * 2, mode="bilinear")
        return images.to(model.device), pictures[1].to(model.device)

    def losses() -> Iterator[Tensor]:
        for images, labels in _batches(small(seen), VISION_BATCH, rng):
            yield functional.cross_entropy(head(tower(images)).flatten(0, 1), labels.repeat_interleave(tower.grid**2))

    used = [p for name, p in model.named_parameters() if f"layers.{tower.depth}." not in name and "post_" not in name]
    _train([*used, *head.parameters()], losses(), steps=VISION_STEPS, rate=1e-3, report=report)
    with torch.no_grad():
        images, labels = small(unseen)
        return float((head(tower(images)).argmax(-1) == labels[:, None]).float().mean())


def _train_vision_aux(
    tower: ConvNextTower, seen: Pictures, unseen: Pictures, rng: random.Random, report: Report
) -> float:
    """The last stage learns to name the digit, on pictures a quarter as wide as the script's 768 pixels.

    With a stem a quarter as wide, too. Enlarged in the end, it gives on a large picture what it gave on the small one:
    a convolution with every weight repeated 4 x 4 and divided by 16 sees the average of 4 x 4 pixels.
    """
    import torch
    from torch.nn import functional

    from lorapatch.trainer.towers import ConvNextTower

    config = type(tower.config).from_dict(tower.config.to_dict() | {"patch_size": tower.config.patch_size // 4})
    device = next(tower.parameters()).device
    small = ConvNextTower(config).to(device).requires_grad_(True)
    _initialise_tower(small)
    head = torch.nn.Linear(config.hidden_sizes[-1], 10).to(device)

    def predict(images: Tensor) -> Tensor:
        pooled = small(images)[-1].mean((2, 3))
        predicted: Tensor = head(functional.layer_norm(pooled, pooled.shape[-1:]))
        return predicted

    def losses() -> Iterator[Tensor]:
        for images, labels in _batches(seen, AUX_BATCH, rng):
            yield functional.cross_entropy(predict(images.to(device)), labels.to(device))

    _train([*small.parameters(), *head.parameters()], losses(), steps=AUX_STEPS, rate=4e-3, report=report)
    state = small.state_dict()
    stem = "embeddings.patch_embeddings.weight"
    state[stem] = state[stem].repeat_interleave(4, 2).repeat_interleave(4, 3) / 16
    tower.load_state_dict(state)
    with torch.no_grad():
        images, labels = unseen
        return float((predict(images.to(device)).argmax(-1).cpu() == labels).float().mean())


def _initialise_tower(model: torch.nn.Module) -> None:
    """Weights that keep the size of what passes through: the towers' own tiny ones learn nothing in so few steps."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name:
                parameter.normal_(0, 0.3)
            elif parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
