"""TextVQA and MMBench on the held-out digits: generate answers with a trained model, and score them."""

from __future__ import annotations

import argparse
import base64
import binascii
import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lorapatch.demo.data import prompt
from lorapatch.demo.digits import LETTERS, Question
from lorapatch.demo.preprocess import write_whole
from lorapatch.errors import Refused, RunFailed, UsageError

__all__ = ["answer_mmbench", "answer_textvqa", "score_mmbench", "score_textvqa"]

MAX_NEW_TOKENS = 16


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}.")


def _options(arguments: Sequence[str], *names: str, **defaults: Any) -> argparse.Namespace:
    """Paths by name (all needed), and further options with a default whose type they keep."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value) if value is not None else Path, default=value)
    return parser.parse_args(list(arguments))


def answer_textvqa(arguments: Sequence[str]) -> None:
    """Answer this process's chunk of the questions, one JSON line each. Raises UsageError, Refused, RunFailed."""
    options = _options(
        arguments, "model-path", "question-file", "image-folder", "answers-file", model_base=None, num_chunks=1, chunk_idx=0
    )
    if not 0 <= options.chunk_idx < options.num_chunks:
        raise UsageError(f"--chunk-idx {options.chunk_idx} is not below --num-chunks {options.num_chunks}.")
    rows = list(_json_lines(options.question_file))[options.chunk_idx :: options.num_chunks]
    questions = [(options.image_folder / str(row["image"]), str(row["text"])) for row in rows]
    texts = _answers(options, questions)
    name = options.model_path.name
    _write_lines(
        options.answers_file,
        [
            {"question_id": row["question_id"], "prompt": row["text"], "text": text, "model_id": name}
            for row, text in zip(rows, texts, strict=True)
        ],
    )


def answer_mmbench(arguments: Sequence[str]) -> None:
    """Answer a table of multiple-choice questions, one JSON line each. Raises UsageError, Refused, RunFailed."""
    from PIL import Image, UnidentifiedImageError

    options = _options(arguments, "model-path", "question-file", "answers-file", model_base=None)
    rows = _table(options.question_file)
    questions = []
    for row in rows:
        try:
            image = Image.open(io.BytesIO(base64.b64decode(row["image"], validate=True)))
        except (binascii.Error, UnidentifiedImageError) as error:
            raise Refused(f"{options.question_file}: the picture of question {row['index']} is damaged.") from error
        choices = tuple(row[letter] for letter in LETTERS if row.get(letter))
        asked = "\n".join(part for part in (row.get("hint"), row["question"]) if part)
        questions.append((image, prompt(Question("choice", asked, row.get("answer", ""), choices))))
    texts = _answers(options, questions)
    name = options.model_path.name
    _write_lines(
        options.answers_file,
        [
            {"question_id": row["index"], "prompt": asked, "text": text, "model_id": name}
            for row, (_, asked), text in zip(rows, questions, texts, strict=True)
        ],
    )


def score_textvqa(arguments: Sequence[str]) -> None:
    """Share of answers that are exactly one of the wanted ones, but for case and a closing full stop."""
    options = _options(arguments, "annotation-file", "result-file", "score-file")
    try:
        data = json.loads(_read(options.annotation_file))["data"]
        wanted = {entry["question_id"]: {str(answer).lower() for answer in entry["answers"]} for entry in data}
    except (ValueError, TypeError, KeyError) as error:
        raise Refused(f"{options.annotation_file} is no list of questions with their answers.") from error
    given = {row["question_id"]: str(row["text"]).strip().removesuffix(".").lower() for row in _json_lines(options.result_file)}
    _score(options, "TextVQA", "exact match", [given.get(number) in answers for number, answers in wanted.items()])


def score_mmbench(arguments: Sequence[str]) -> None:
    """Share of answers whose letter is the right one."""
    options = _options(arguments, "annotation-file", "result-file", "score-file")
    given = {str(row["question_id"]): str(row["text"]).strip().rstrip(".").upper() for row in _json_lines(options.result_file)}
    rows = _table(options.annotation_file)
    _score(options, "MMBench", "multiple choice", [given.get(row["index"]) == row["answer"] for row in rows])


def _score(options: argparse.Namespace, benchmark: str, metric: str, right: list[bool]) -> None:
    figures = {"benchmark": benchmark, "metric": metric, "accuracy": sum(right) / len(right), "right": sum(right)}
    write_whole(options.score_file, json.dumps(figures | {"questions": len(right)}, indent=2) + "\n")
    print(f"{benchmark}: {100 * sum(right) / len(right):.1f} % right by {metric} ({sum(right)} of {len(right)})")


def _answers(options: argparse.Namespace, questions: list[tuple[Any, str]]) -> list[str]:
    """The answers of the model that the options name. Raises RunFailed when it cannot be loaded.

    The model is a full one, an adapter, or what pre-training left: a projector for the language model --model-base.
    """
    import torch

    from lorapatch.trainer.errors import TrainerError
    from lorapatch.trainer.inference import answers, load

    projector = (options.model_path / "mm_projector.bin").is_file()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    try:
        loaded = load(options.model_path, base=options.model_base if projector else None, device=device, dtype=dtype)
        return answers(loaded, questions, MAX_NEW_TOKENS)
    except (TrainerError, OSError) as error:
        raise RunFailed(f"{options.model_path} cannot answer: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8 text.") from error


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["question_id"], row["text"]
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(f"{path}, line {number}: no JSON object with question_id and text.") from error
        yield row


def _table(path: Path) -> list[dict[str, str]]:
    """The rows of an MMBench table; raises Refused for one without its columns or without rows."""
    csv.field_size_limit(1 << 26)  # a picture is one field
    rows = list(csv.DictReader(io.StringIO(_read(path), newline=""), delimiter="\t"))
    needed = {"index", "question", "answer", "image", *LETTERS[:2]}
    if not rows or not needed <= rows[0].keys():
        raise Refused(f"{path} is no MMBench table with rows and the columns {', '.join(sorted(needed))}.")
    return rows


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
