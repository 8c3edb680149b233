"""Pictures of digits, and questions about them."""

from __future__ import annotations

import random

import pytest

from lorapatch.demo import data, digits

pytest.importorskip("sklearn")


def value(word: str) -> int:
    return digits.WORDS.index(word)


@pytest.mark.parametrize("digit", range(10))
@pytest.mark.parametrize("kind", digits.KINDS)
def test_an_answer_is_true(kind: str, digit: int) -> None:
    for seed in range(30):
        question = digits.ask(digit, kind, random.Random(seed))
        truth = {
            "even?": digit % 2 == 0,
            "odd?": digit % 2 == 1,
            "larger than four?": digit > 4,
            "smaller than five?": digit < 5,
        }
        said = [holds for words, holds in truth.items() if question.text.endswith(words)]
        if kind in ("parity", "size"):
            assert question.answer == ("yes" if said == [True] else "no")
        elif kind == "choice":
            assert question.options["ABCD".index(question.answer)] == digits.WORDS[digit]
            assert len(set(question.options)) == 4
        else:
            assert value(question.answer) == digit + (kind == "next")


def test_no_kind_of_question_is_answered_by_its_wording_alone() -> None:
    rng = random.Random(0)
    for kind in digits.KINDS:
        answers = {digits.ask(digit, kind, rng).answer for digit in range(10) for _ in range(20)}
        assert len(answers) > 1


def test_a_choice_prompt_lists_the_options_by_letter() -> None:
    question = digits.ask(7, "choice", random.Random(0))
    lines = data.prompt(question).split("\n")
    assert lines[1:5] == [f"{letter}. {option}" for letter, option in zip("ABCD", question.options, strict=True)]
    assert lines[5] == data.CHOICE_HINT


def test_an_instruction_without_a_picture_names_its_number() -> None:
    for seed in range(30):
        text, answer = data.instruction(8, random.Random(seed))
        assert "eight" in text
        assert answer in ("yes", "no", "nine")


def test_held_out_pictures_are_never_trained_on() -> None:
    seen, unseen = digits.split()
    assert not set(seen) & set(unseen)
    assert sorted(seen + unseen) == list(range(1797))
    assert {digits.labels()[index] for index in unseen} == set(range(10))


def test_pictures_differ_in_shape_so_that_padding_has_work() -> None:
    sizes = {digits.draw(0, random.Random(seed)).size for seed in range(20)}
    assert any(width > height for width, height in sizes)
    assert any(width < height for width, height in sizes)
    assert all(min(size) == digits.SIDE for size in sizes)


def test_a_picture_is_dark_ink_on_white_paper() -> None:
    picture = digits.draw(3, random.Random(0))
    assert picture.mode == "RGB"
    assert picture.getextrema() == ((0, 255),) * 3
