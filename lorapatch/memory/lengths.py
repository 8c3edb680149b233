"""How long a data file's samples are in tokens, images included: a quick pass that reads no image."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lorapatch.errors import Refused

__all__ = ["Lengths", "Turn", "measure_lengths", "read_samples", "turns_of"]

READ_B = 64 << 20  # of a longer file the beginning alone is read
QUANTILES = 100
ENCODED = 600  # samples that are tokenised when there are more: the longest by their characters, and others evenly
BYTES_PER_TOKEN = 3.6  # of English text, where there is no tokenizer
_IMAGE = ("<image>", "<__dj__image>")

# What stands around a question and an answer; MGM's and LLaVA's conversation.py. The answer is what is supervised.
_TEMPLATES = {
    "gemma": ("<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "{}<end_of_turn>\n<eos>"),
    "chatml": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>\n"),
    "llama_3": (
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "{}<|eot_id|>",
    ),
    "mistral": ("[INST] {} [/INST]", " {}</s>"),
    "plain": ("{}", "{}\n"),
    "v1": ("USER: {} ASSISTANT:", " {}</s>"),
}
_OF_MODEL = {"gemma": "gemma", "qwen": "chatml", "llama": "v1", "mistral": "mistral"}


class Turn(NamedTuple):
    """One turn of a sample; ``answer``: it is supervised."""

    text: str
    answer: bool


@dataclass(frozen=True)
class Lengths:
    """Tokens of the samples that a trainer sees, cut at ``limit``; ``labels`` are the supervised positions.

    ``how`` says in words what was counted and with what. ``whole``: every sample was, none only sampled. ``quantiles``
    are evenly spaced and ascending, the last is the longest.
    """

    samples: int
    quantiles: tuple[int, ...]
    p50: int
    p99: int
    longest: int
    labels_mean: int
    labels_most: int
    images: int
    whole: bool
    exact: bool
    how: str

    def labels(self, micro_batch: int) -> int:
        """Supervised positions of one sample, fair for the peak over a run: chance evens out in large micro-batches."""
        return math.ceil(self.labels_mean + (self.labels_most - self.labels_mean) / math.sqrt(max(micro_batch, 1)))


def measure_lengths(
    data: Path, tokenizer: Path | None, *, version: str, image_tokens: int, limit: int
) -> Lengths:
    """The lengths of the samples in ``data``, tokenised by ``tokenizer``'s tokenizer.json if there is one.

    ``version`` is the conversation template (``--version``) or the model's kind, ``image_tokens`` what one image takes,
    ``limit`` ``--model_max_length``. Raises Refused when the file is not readable or holds no samples.
    """
    stamps = tuple(_stamp(path) for path in (data, tokenizer / "tokenizer.json" if tokenizer else None))
    return _measured(data, tokenizer, version, image_tokens, limit, stamps)


def _stamp(path: Path | None) -> int:
    try:
        return path.stat().st_mtime_ns if path is not None else 0
    except OSError:
        return 0


@lru_cache(maxsize=64)
def _measured(
    data: Path, tokenizer: Path | None, version: str, image_tokens: int, limit: int, _stamps: tuple[int, ...]
) -> Lengths:
    samples, whole = read_samples(data)
    kept, fair = _chosen(samples)
    encode, with_what = _encoder(tokenizer)
    question, answer = _template(version)
    rows = []
    for index in kept:
        turns, images = turns_of(samples[index])
        written = [(answer if turn.answer else question).format(_marked(turn.text)) for turn in turns]
        answers = [_plain(text) for text, turn in zip(written, turns, strict=True) if turn.answer]
        rows.append(("".join(written).split(_IMAGE[0]), answers, images))
    counts = iter(encode([piece for pieces, answers, _ in rows for piece in (*pieces, *answers)]))
    lengths, labels, numbers = [], [], []
    for pieces, answers, images in rows:
        text = sum(next(counts) for _ in pieces)
        supervised = sum(next(counts) for _ in answers)
        uncut = 1 + text + images * image_tokens  # with the token of the beginning
        lengths.append(min(uncut, limit))
        labels.append(max(supervised - max(uncut - limit, 0), 0))  # the answer comes last, so it is what is cut
        numbers.append(images)
    every = whole and len(kept) == len(samples)
    ordered = sorted(length for index, length in zip(kept, lengths, strict=True) if index in fair)
    longest = max(lengths)
    told = f"{len(kept)} of {len(samples)} samples" if len(kept) < len(samples) else f"{len(samples)} samples"
    behind = "" if whole else f" (the first {READ_B >> 20} MiB of the file)"
    return Lengths(
        samples=len(samples), quantiles=(*(_quantile(ordered, (n + 0.5) / QUANTILES) for n in range(QUANTILES)), longest),
        p50=_quantile(ordered, 0.5), p99=_quantile(ordered, 0.99), longest=longest,
        labels_mean=math.ceil(sum(labels) / len(labels)), labels_most=max(labels),
        images=_quantile(sorted(numbers), 0.99), whole=every, exact=tokenizer is not None and with_what is None,
        how=f"{data.name}: {told}{behind}, {with_what or 'by the tokenizer of the model'}",
    )  # fmt: skip


def _quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else 0


def _template(version: str) -> tuple[str, str]:
    name = next((known for known in _TEMPLATES if version.startswith(known)), None)
    name = name or next((template for kind, template in _OF_MODEL.items() if version.startswith(kind)), "v1")
    return tuple(text.replace("{}", "\0").replace("{", "{{").replace("}", "}}").replace("\0", "{}")
                 for text in _TEMPLATES[name])  # type: ignore[return-value]  # fmt: skip


def _chosen(samples: Sequence[Mapping[str, Any]]) -> tuple[list[int], set[int]]:
    """Which samples are tokenised: all of a few; of many the longest by their characters, and an even choice.

    The second are those that stand for all the others: the even choice.
    """
    if len(samples) <= ENCODED:
        return list(range(len(samples))), set(range(len(samples)))
    by_size = sorted(range(len(samples)), key=lambda i: -sum(len(turn.text) for turn in turns_of(samples[i])[0]))
    step = len(samples) / (ENCODED * 2 // 3)
    even = {int(step * i) for i in range(ENCODED * 2 // 3)}
    return sorted({*by_size[: ENCODED // 3], *even}), even


def _encoder(tokenizer: Path | None) -> tuple[Any, str | None]:
    """A function from texts to their numbers of tokens, and in words what it is if it is only a guess."""
    path = tokenizer / "tokenizer.json" if tokenizer is not None else None
    reason = "without the model's folder" if path is None else "without a tokenizer.json"
    if path is not None and path.is_file():
        try:
            from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]

            found = Tokenizer.from_file(str(path))
        except ImportError:
            reason = "without the package tokenizers"
        except Exception:  # noqa: BLE001 - tokenizers raises plain Exception for a file that it cannot read
            reason = f"{path} cannot be read"
        else:
            return lambda texts: [len(e.ids) for e in found.encode_batch(texts, add_special_tokens=False)], None
    return (
        lambda texts: [math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) for text in texts],
        f"at {BYTES_PER_TOKEN} bytes a token ({reason})",
    )


def _marked(text: str) -> str:
    """``text`` with one kind of mark for its images."""
    return text.replace(_IMAGE[1], _IMAGE[0])


def _plain(text: str) -> str:
    return text.replace(_IMAGE[0], "")


def turns_of(sample: Mapping[str, Any]) -> tuple[list[Turn], int]:
    """The turns of a sample in LLaVA's format, as messages, as instruction and output, or as plain text; its images."""
    turns = []
    conversation = sample.get("conversations") or sample.get("messages")
    if isinstance(conversation, list):
        for turn in conversation:
            if isinstance(turn, dict):
                said = turn.get("value", turn.get("content", ""))
                turns.append(Turn(_text(said), turn.get("from", turn.get("role")) in ("gpt", "assistant", "model")))
    else:
        asked = [str(sample[name]) for name in ("instruction", "input", "prompt", "question") if sample.get(name)]
        given = [str(sample[name]) for name in ("output", "completion", "response", "answer") if sample.get(name)]
        turns = [Turn("\n".join(asked), False)] if asked else []
        turns += [Turn("\n".join(given), True)] if given else []
        if not turns and isinstance(sample.get("text"), str):
            turns = [Turn(sample["text"], True)]
    files = sample.get("image") or sample.get("images") or []
    return turns, len(files) if isinstance(files, list) else 1


def _text(said: Any) -> str:
    if isinstance(said, list):  # a message's parts
        return "".join(str(part.get("text", "")) for part in said if isinstance(part, dict))
    return str(said)


def read_samples(path: Path) -> tuple[list[Mapping[str, Any]], bool]:
    """The samples in a JSON list or a file of JSON lines, and whether they are all of them. Raises Refused."""
    try:
        with path.open("rb") as file:
            data = file.read(READ_B + 1)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from error
    whole = len(data) <= READ_B
    text = data[:READ_B].decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    found: list[Mapping[str, Any]] = [sample for sample in _values(text, whole) if isinstance(sample, dict)]
    if not found:
        raise Refused(f"{path} holds no samples: a JSON list, or a JSON object in each line")
    return found, whole


def _values(text: str, whole: bool) -> Iterator[Any]:
    if whole and text.startswith("["):
        try:
            yield from json.loads(text)
        except ValueError:
            return
        return
    decoder, at = json.JSONDecoder(), 1 if text.startswith("[") else 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:  # the end, or the sample that is cut off
            return
        yield value
