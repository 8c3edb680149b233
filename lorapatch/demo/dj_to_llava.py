"""From Data-Juicer's format (JSON lines, one text with special tokens) to LLaVA's (JSON, conversations)."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lorapatch.demo.preprocess import write_whole
from lorapatch.errors import Refused, UsageError

__all__ = ["convert", "dj_to_llava"]

ROLE = re.compile(r"\[\[([a-zA-Z]+)\]\]: ")
IMAGE = "<image>"
ROLES = ("human", "gpt")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}.")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def dj_to_llava(arguments: Sequence[str]) -> None:
    """Convert SOURCE (JSON lines) to TARGET (.json); the options are those of Data-Juicer's own tool.

    Raises UsageError for bad arguments, Refused for a bad sample, naming its file and line.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--image_special_token", default=IMAGE)
    parser.add_argument("--eoc_special_token", default="<|__dj__eoc|>")
    parser.add_argument("--keep_only_first_image", type=_truth, default=True)
    parser.add_argument("--sent_separator", default="\n")
    parser.add_argument("--restore_questions", type=_truth, default=False)
    parser.add_argument("--original_llava_ds_path", type=Path)
    options = parser.parse_args(list(arguments))
    if options.target.suffix != ".json":
        raise UsageError(f"the target {options.target} has to be a .json file.")
    originals = None
    if options.restore_questions:
        if options.original_llava_ds_path is None:
            raise UsageError("--restore_questions True needs --original_llava_ds_path.")
        originals = _originals(options.original_llava_ds_path)
    samples = [convert(sample, options, originals, where) for where, sample in _samples(options.source)]
    if not samples:
        raise Refused(f"{options.source} holds no samples.")
    options.target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.target, json.dumps(samples, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(samples)} samples converted to {options.target.name}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8 text.") from error


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each sample of a JSON-lines file with its place, "FILE, line N"."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise Refused(f"{where}: not a JSON object ({error}).") from error
        if not isinstance(sample, dict) or "id" not in sample or not isinstance(sample.get("text"), str):
            raise Refused(f"{where}: a sample needs an id and a text.")
        yield where, sample


def _originals(path: Path) -> dict[str, dict[str, Any]]:
    """The samples of a LLaVA data set, by id."""
    try:
        samples = json.loads(_read(path))
        originals = {str(sample["id"]): sample for sample in samples}
        for sample in samples:
            sample["conversations"][0]["value"], sample["conversations"][1]["from"]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise Refused(f"{path} is not a LLaVA data set: a JSON list of samples with conversations.") from error
    return originals


def convert(
    sample: dict[str, Any], options: argparse.Namespace, originals: dict[str, dict[str, Any]] | None, where: str
) -> dict[str, Any]:
    """One sample in LLaVA's format; with ``originals`` the text is an answer, and its question comes from there.

    Raises Refused for several pictures, an unknown id or unpaired turns.
    """
    pictures = sorted(set(sample.get("images") or []))
    if len(pictures) > 1:
        raise Refused(f"{where}: {len(pictures)} pictures in one sample; LLaVA's format holds one.")
    identity = sample["id"]
    if originals is None:
        conversations = _turns(sample["text"], options, where)
    else:
        original = originals.get(str(identity))
        if original is None:
            raise Refused(f"{where}: the id {identity!r} is not in {options.original_llava_ds_path}.")
        question, answer = original["conversations"][:2]
        identity = original["id"]
        conversations = [question, {"from": answer["from"], "value": _clean(sample["text"], options, first=False)}]
    result = {"id": identity, "conversations": conversations}
    return result | {"image": pictures[0]} if pictures else result


def _turns(text: str, options: argparse.Namespace, where: str) -> list[dict[str, str]]:
    """Split "[[human]]: … [[gpt]]: …" into turns."""
    parts = ROLE.split(text)[1:]
    roles, values = parts[0::2], parts[1::2]
    if not roles or roles != [ROLES[number % 2] for number in range(len(roles))] or len(roles) % 2:
        raise Refused(f"{where}: the text is not pairs of [[human]]: and [[gpt]]: turns.")
    cleaned = [_clean(value, options, first=number == 0) for number, value in enumerate(values)]
    return [{"from": role, "value": value} for role, value in zip(roles, cleaned, strict=True)]


def _clean(text: str, options: argparse.Namespace, *, first: bool) -> str:
    """Without the end-of-chunk token, and without a picture's token at either end where it does not belong."""
    text = text.strip().removesuffix(options.eoc_special_token).strip()
    token = options.image_special_token
    if first or not options.keep_only_first_image:
        return text.replace(token, IMAGE)
    return text.removeprefix(token).removesuffix(token).strip().removesuffix(options.sent_separator).strip()
