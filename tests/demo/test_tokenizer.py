"""The tokenizer in Gemma's format."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lorapatch.demo import data
from lorapatch.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    count = train_tokenizer(data.corpus(random.Random(0)), folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == count
    return loaded


def test_it_loads_as_a_fast_gemma_tokenizer(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    assert "Gemma" in type(tokenizer).__name__
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)


def test_special_tokens_are_one_id_each_inside_text(tokenizer: Any) -> None:
    for number, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer(f"{token}", add_special_tokens=False).input_ids == [number]
    ids = tokenizer("<start_of_turn>user\nhi<end_of_turn>\n").input_ids
    assert ids[:2] == [2, SPECIAL_TOKENS.index("<start_of_turn>")]


def test_what_was_learned_comes_back_letter_by_letter(tokenizer: Any) -> None:
    for text in ("Which digit is shown?\nA. three\nB. four", "  two  blanks ", "äß€ 漢字 🙂"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_number_words_are_single_tokens(tokenizer: Any) -> None:
    for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"):
        assert len(tokenizer(f"is {word}", add_special_tokens=False).input_ids) == 2


def test_the_chat_template_writes_gemmas_turns(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "x"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n"
        "<start_of_turn>user\nx<end_of_turn>\n<start_of_turn>model\n"
    )


def test_the_same_text_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(data.corpus(random.Random(5)), tmp_path / name)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
