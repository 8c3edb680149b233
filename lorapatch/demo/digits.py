"""Handwritten digits as pictures, and questions about them: pure functions of a random generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["KINDS", "WORDS", "Question", "ask", "caption", "draw", "labels", "split"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LETTERS = "ABCD"
HELD_OUT = 5  # every fifth picture of the collection is never trained on
SIDE = 96  # pixels of a digit's square; the canvas is up to a quarter wider or higher

# One wording of the caption for each request: what is left to learn from a pair is the digit.
CAPTIONS = {
    "Describe the image concisely.": "The digit {}.",
    "Give a brief description of the image.": "A handwritten {}.",
    "What is shown in this picture?": "This is the digit {}.",
    "Share a short caption of the image.": "The picture shows the digit {}.",
}


@dataclass(frozen=True)
class Question:
    """A question about a digit; ``options`` are the choices of a multiple-choice question, else empty."""

    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def _collection() -> Any:
    """scikit-learn's 1,797 digits: ``images`` [1797, 8, 8] of 0…16, ``target`` [1797]."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    return load_digits()


def labels() -> list[int]:
    """The digit on each of the 1,797 pictures."""
    return [int(label) for label in _collection().target]


def split() -> tuple[list[int], list[int]]:
    """Indices of the pictures for training and of those held out, with no picture in both."""
    count = len(labels())
    held_out = list(range(0, count, HELD_OUT))
    return [index for index in range(count) if index % HELD_OUT], held_out


def draw(index: int, rng: random.Random) -> Image:
    """Picture ``index``: dark ink on white paper, RGB, 96 to 120 pixels wide and high."""
    from PIL import Image

    # One black pixel of the collection is 16; repeated here into bytes, then enlarged smoothly.
    grey = (255 - _collection().images[index] * (255 / 16)).astype("uint8")
    digit = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    width, height = SIDE + rng.randrange(SIDE // 4 + 1), SIDE
    if rng.random() < 0.5:
        width, height = height, width
    paper = Image.new("RGB", (width, height), "white")
    paper.paste(digit.convert("RGB"), ((width - SIDE) // 2, (height - SIDE) // 2))
    return paper


def caption(digit: int, rng: random.Random) -> tuple[str, str]:
    """A request for a short description of a picture of ``digit``, and the description."""
    request, wording = rng.choice(tuple(CAPTIONS.items()))
    return request, wording.format(WORDS[digit])


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _name(digit: int, rng: random.Random) -> Question:
    text = rng.choice(("What digit is this?", "Which digit is shown?", "Name the digit in the picture."))
    return Question("name", text, WORDS[digit])


def _parity(digit: int, rng: random.Random) -> Question:
    even = rng.random() < 0.5
    return Question("parity", f"Is the digit {'even' if even else 'odd'}?", _yes((digit % 2 == 0) == even))


def _size(digit: int, rng: random.Random) -> Question:
    larger = rng.random() < 0.5
    text = "Is the digit larger than four?" if larger else "Is the digit smaller than five?"
    return Question("size", text, _yes((digit > 4) == larger))


def _next(digit: int, rng: random.Random) -> Question:
    text = rng.choice(("What is one more than the digit?", "Which number comes after the digit?"))
    return Question("next", text, WORDS[digit + 1])


def _choice(digit: int, rng: random.Random) -> Question:
    # Neighbours in order, so that a small model learns it soon: the answer follows from digit and first option.
    first = rng.randint(max(0, digit - 3), min(digit, 6))
    options = WORDS[first : first + len(LETTERS)]
    return Question("choice", "Which digit is shown?", LETTERS[digit - first], options)


KINDS: dict[str, Callable[[int, random.Random], Question]] = {
    "name": _name,
    "parity": _parity,
    "size": _size,
    "next": _next,
    "choice": _choice,
}


def ask(digit: int, kind: str, rng: random.Random) -> Question:
    """A question of ``kind`` (one of `KINDS`) about a picture of ``digit``."""
    return KINDS[kind](digit, rng)
