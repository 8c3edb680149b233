"""The data sets of the miniature toolkit, from handwritten digits: pre-training, fine-tuning, held-out evaluation."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorapatch.demo import digits
from lorapatch.demo.digits import Question

__all__ = ["CHOICE_HINT", "corpus", "instruction", "prompt", "write_evaluation", "write_finetuning", "write_pretraining"]

PRETRAINING_SAMPLES = 2_560  # ten steps of 256
FINETUNING_SAMPLES = 2_560  # twenty steps of 128
TEXTVQA_QUESTIONS = 360
MMBENCH_QUESTIONS = 180
TEXT_ONLY = 0.05  # share of fine-tuning samples without a picture
TWO_TURNS = 0.2  # share of fine-tuning samples with a second question about the picture
OPEN_KINDS = ("name", "parity", "size", "next")
CHOICE_HINT = "Answer with the option's letter from the given choices directly."


def prompt(question: Question) -> str:
    """The question as a user's turn without its picture; choices as MMBench words them."""
    if not question.options:
        return question.text
    choices = [f"{letter}. {option}" for letter, option in zip(digits.LETTERS, question.options, strict=False)]
    return "\n".join([question.text, *choices, CHOICE_HINT])


def corpus(rng: random.Random) -> Iterator[str]:
    """Text to train a tokenizer on: every wording that occurs in the data sets, several times over."""
    yield from ("user\n", "model\n")
    for _ in range(300):
        for digit in range(10):
            question = digits.ask(digit, rng.choice(tuple(digits.KINDS)), rng)
            yield f"{prompt(question)}\n{question.answer}"
            yield "\n".join(digits.caption(digit, rng))
            yield instruction(digit, rng)[0]


def instruction(digit: int, rng: random.Random) -> tuple[str, str]:
    """A question about the number ``digit`` that needs no picture, and its answer."""
    question = digits.ask(digit, rng.choice(("parity", "size", "next")), rng)
    return question.text.replace("the digit", f"the digit {digits.WORDS[digit]}"), question.answer


def _save(index: int, folder: Path, rng: random.Random) -> str:
    """Draw picture ``index`` into ``folder``/images unless it is there; its path relative to ``folder``."""
    path = folder / "images" / f"{index:05d}.png"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        digits.draw(index, rng).save(path)
    return f"images/{path.name}"


def _turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    roles = ("human", "gpt")
    return [{"from": role, "value": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _dump_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _rounds(indices: list[int], count: int, rng: random.Random) -> list[int]:
    """``count`` picks from ``indices``, each as often as the others, in random order."""
    picks = [indices[number % len(indices)] for number in range(count)]
    rng.shuffle(picks)
    return picks


def write_pretraining(folder: Path, rng: random.Random) -> None:
    """Captions, as Data-Juicer's JSON lines (caption alone) and as the LLaVA data set their questions come from."""
    labels = digits.labels()
    lines, originals = [], []
    for number, index in enumerate(_rounds(digits.split()[0], PRETRAINING_SAMPLES, rng)):
        identity, image = f"{number:09d}", _save(index, folder, rng)
        request, text = digits.caption(labels[index], rng)
        request = f"<image>\n{request}" if rng.random() < 0.5 else f"{request}\n<image>"
        lines.append({"id": identity, "images": [image], "text": f"<__dj__image>\n{text} <|__dj__eoc|>"})
        originals.append({"id": identity, "image": image, "conversations": _turns((request, text))})
    _dump_lines(folder / "mgm_pretrain_stage_1_10k.jsonl", lines)
    _dump(folder / "stage_1.json", originals)


def write_finetuning(folder: Path, rng: random.Random) -> None:
    """Questions and answers in LLaVA's format: of every kind, some in two turns, some without a picture."""
    labels = digits.labels()
    samples: list[dict[str, Any]] = []
    for number, index in enumerate(_rounds(digits.split()[0], FINETUNING_SAMPLES, rng)):
        sample: dict[str, Any] = {"id": f"digits_{number:06d}"}
        if rng.random() < TEXT_ONLY:
            sample["conversations"] = _turns(instruction(labels[index], rng))
        else:
            kinds = rng.sample(tuple(digits.KINDS), 2 if rng.random() < TWO_TURNS else 1)
            questions = [digits.ask(labels[index], kind, rng) for kind in kinds]
            sample["image"] = _save(index, folder, rng)
            sample["conversations"] = _turns(*((prompt(question), question.answer) for question in questions))
            sample["conversations"][0]["value"] = "<image>\n" + sample["conversations"][0]["value"]
        samples.append(sample)
    _dump(folder / "mgm_instruction_stage_1_12k.json", samples)


def write_evaluation(folder: Path, rng: random.Random) -> None:
    """Held-out pictures: open questions in TextVQA's files, multiple choice in MMBench's table."""
    _write_textvqa(folder / "textvqa", rng)
    _write_mmbench(folder / "mmbench" / "mmbench_dev_20230712.tsv", rng)


def _write_textvqa(folder: Path, rng: random.Random) -> None:
    labels = digits.labels()
    pictures = folder / "train_images"
    pictures.mkdir(parents=True)
    questions, annotations = [], []
    for number, index in enumerate(_rounds(digits.split()[1], TEXTVQA_QUESTIONS, rng)):
        name = f"{index:05d}"
        if not (pictures / f"{name}.png").exists():
            digits.draw(index, rng).save(pictures / f"{name}.png")
        question = digits.ask(labels[index], OPEN_KINDS[number % len(OPEN_KINDS)], rng)
        row = {"question_id": number, "image": f"{name}.png", "text": question.text, "category": question.kind}
        questions.append(row)
        annotations.append(
            {"question_id": number, "image_id": name, "question": question.text, "answers": [question.answer]}
        )
    _dump_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", questions)
    _dump(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "split": "val", "data": annotations})


def _write_mmbench(path: Path, rng: random.Random) -> None:
    labels = digits.labels()
    path.parent.mkdir(parents=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["index", "question", "hint", *digits.LETTERS, "answer", "category", "image", "split"])
        for number, index in enumerate(_rounds(digits.split()[1], MMBENCH_QUESTIONS, rng)):
            question = digits.ask(labels[index], "choice", rng)
            buffer = io.BytesIO()
            digits.draw(index, rng).save(buffer, format="PNG")
            image = base64.b64encode(buffer.getvalue()).decode("ascii")
            table.writerow([number, question.text, "", *question.options, question.answer, "digit", image, "dev"])
