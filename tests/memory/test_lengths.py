"""Lengths of samples: every format, the tokenizer where there is one, an estimate that says so where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.memory import lengths
from lorapatch.memory.lengths import measure_lengths, read_samples, turns_of


def words(folder: Path) -> Path:
    """A tokenizer of whole words: each word and each sign is a token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def conversation(question: str, answer: str, **more: object) -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


def test_tokens_of_text_template_and_images_add_up(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([conversation("<image>\none two", "three four five", image="a.png")]))
    found = measure_lengths(data, words(tmp_path / "model"), version="v1", image_tokens=10, limit=100)
    # the beginning, USER:, ten of the image, one two, ASSISTANT:, three four five</s>
    assert (found.longest, found.labels_most, found.images) == (1 + 1 + 10 + 2 + 1 + 3, 3, 1)
    assert found.exact and found.whole and "1 samples, by the tokenizer of the model" in found.how


def test_quantiles_and_the_cut_at_the_longest_allowed(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([conversation("q", "a " * n) for n in range(1, 101)]))
    found = measure_lengths(data, words(tmp_path / "model"), version="v1", image_tokens=0, limit=60)
    assert found.p50 < found.p99 == found.longest == 60
    # four tokens before an answer of n + 1: what is left of it is at most 56
    assert (found.labels_mean, found.labels_most) == (42, 56)


def test_without_a_tokenizer_bytes_are_counted_and_that_is_said(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([conversation("q" * 360, "a" * 36)]))
    found = measure_lengths(data, tmp_path, version="plain", image_tokens=0, limit=1000)
    assert not found.exact and "at 3.6 bytes a token (without a tokenizer.json)" in found.how
    assert found.longest == pytest.approx(111, abs=2)


def test_a_damaged_tokenizer_is_no_end(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "data.json").write_text(json.dumps([conversation("q", "a")]))
    found = measure_lengths(tmp_path / "data.json", tmp_path, version="plain", image_tokens=0, limit=1000)
    assert not found.exact and "cannot be read" in found.how


@pytest.mark.parametrize(
    ("sample", "questions", "answers", "images"),
    [
        (conversation("a", "b", image="x.png"), ["a"], ["b"], 1),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}],
          "images": ["x", "y"]}, ["a"], ["b"], 2),
        ({"instruction": "do", "input": "this", "output": "done"}, ["do\nthis"], ["done"], 0),
        ({"prompt": "a", "completion": "b"}, ["a"], ["b"], 0),
        ({"text": "all of it"}, [], ["all of it"], 0),
        ({"odd": 1}, [], [], 0),
    ],
)  # fmt: skip
def test_every_format_of_a_sample(sample: dict[str, object], questions: list[str], answers: list[str], images: int) -> None:
    turns, count = turns_of(sample)
    assert [turn.text for turn in turns if not turn.answer] == questions
    assert [turn.text for turn in turns if turn.answer] == answers
    assert count == images


def test_json_lines_are_samples_too(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(conversation("q", "a")) for _ in range(5)) + "\n")
    samples, whole = read_samples(data)
    assert len(samples) == 5 and whole


def test_of_a_long_file_the_beginning_is_read_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "READ_B", 1000)
    data = tmp_path / "data.json"
    data.write_text(json.dumps([conversation("q" * 50, "a" * 50) for _ in range(50)], indent=1))
    samples, whole = read_samples(data)
    assert 2 <= len(samples) < 10 and not whole
    found = measure_lengths(data, None, version="v1", image_tokens=0, limit=1000)
    assert not found.whole and "the first" in found.how


def test_of_many_samples_the_longest_are_among_those_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "ENCODED", 30)
    data = tmp_path / "data.json"
    samples = [conversation("q", "a " * (5 + i % 3)) for i in range(500)]
    samples[333] = conversation("q", "a " * 200)
    data.write_text(json.dumps(samples))
    found = measure_lengths(data, words(tmp_path / "model"), version="plain", image_tokens=0, limit=1000)
    assert found.longest > 200 > 20 > found.p50
    assert not found.whole and "of 500 samples" in found.how


@pytest.mark.parametrize("content", ["[]", "{", "nothing", "[1, 2]"])
def test_a_file_without_samples_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(Refused, match="holds no samples"):
        read_samples(tmp_path / "data.json")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot be read"):
        read_samples(tmp_path / "none.json")
