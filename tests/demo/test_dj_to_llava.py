"""From Data-Juicer's JSON lines to LLaVA's conversations."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lorapatch.demo.dj_to_llava import dj_to_llava
from lorapatch.demo.preprocess import tool
from lorapatch.errors import Refused, UsageError

ORIGINAL = [
    {
        "id": 7,
        "image": "images/7.png",
        "conversations": [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "old"}],
    }
]


def convert(folder: Path, samples: list[Any], *options: str) -> list[dict[str, Any]]:
    source, target = folder / "in.jsonl", folder / "out.json"
    source.write_text("".join(f"{sample if isinstance(sample, str) else json.dumps(sample)}\n" for sample in samples))
    dj_to_llava([str(source), str(target), *options])
    converted: list[dict[str, Any]] = json.loads(target.read_text())
    return converted


def restoring(folder: Path, original: Any = ORIGINAL) -> list[str]:
    path = folder / "stage_1.json"
    path.write_text(original if isinstance(original, str) else json.dumps(original))
    words = ["--image_special_token", "<__dj__image>", "--restore_questions", "True", "--original_llava_ds_path"]
    return [*words, str(path)]


def test_a_caption_gets_its_question_back(tmp_path: Path) -> None:
    sample = {"id": "7", "images": ["images/7.png"], "text": "<__dj__image>\nA seven. <|__dj__eoc|>"}
    assert convert(tmp_path, [sample], *restoring(tmp_path)) == [
        {
            "id": 7,
            "conversations": [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A seven."}],
            "image": "images/7.png",
        }
    ]


def test_a_picture_token_behind_the_caption_goes_too(tmp_path: Path) -> None:
    sample = {"id": 7, "images": ["a", "a"], "text": "A seven.\n<__dj__image> <|__dj__eoc|>"}
    (converted,) = convert(tmp_path, [sample], *restoring(tmp_path))
    assert converted["conversations"][1]["value"] == "A seven."
    assert converted["image"] == "a"


def test_turns_are_split_and_only_the_first_keeps_its_picture(tmp_path: Path) -> None:
    text = "[[human]]: <__dj__image>\nWhich?\n[[gpt]]: Seven.\n[[human]]: <__dj__image>\nEven?\n[[gpt]]: No. <|__dj__eoc|>"
    (converted,) = convert(tmp_path, [{"id": "a", "text": text}], "--image_special_token", "<__dj__image>")
    assert "image" not in converted
    assert [turn["value"] for turn in converted["conversations"]] == ["<image>\nWhich?", "Seven.", "Even?", "No."]
    assert [turn["from"] for turn in converted["conversations"]] == ["human", "gpt"] * 2


def test_a_line_separator_inside_a_text_is_no_new_sample(tmp_path: Path) -> None:
    line = '{"id": 1, "text": "[[human]]: a\u2028b [[gpt]]: c"}'
    (converted,) = convert(tmp_path, [line, ""])
    assert converted["conversations"][0]["value"] == "a\u2028b"


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (["{"], "in.jsonl, line 1: not a JSON object"),
        (['{"id": 1, "text": "[[human]]: a [[gpt]]: b"}', "[]"], "line 2: a sample needs an id and a text"),
        ([{"id": 1}], "line 1: a sample needs an id and a text"),
        ([{"id": 1, "text": "no turns"}], "line 1: the text is not pairs"),
        ([{"id": 1, "text": "[[human]]: a"}], "line 1: the text is not pairs"),
        ([{"id": 1, "text": "[[human]]: a [[gpt]]: b", "images": ["x", "y"]}], "2 pictures in one sample"),
        ([], "holds no samples"),
    ],
)
def test_a_bad_sample_is_named_by_file_and_line_and_nothing_is_written(
    tmp_path: Path, samples: list[Any], sentence: str
) -> None:
    with pytest.raises(Refused, match=sentence):
        convert(tmp_path, samples)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("original", ["{", "5", '[{"id": 1}]', '[{"id": 1, "conversations": []}]'])
def test_an_original_that_is_no_llava_data_set_is_refused(tmp_path: Path, original: str) -> None:
    with pytest.raises(Refused, match="stage_1.json is not a LLaVA data set"):
        convert(tmp_path, [{"id": 7, "text": "x"}], *restoring(tmp_path, original))


def test_an_id_that_the_original_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="line 1: the id 8 is not in"):
        convert(tmp_path, [{"id": 8, "text": "x"}], *restoring(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "required"),
        (["a.jsonl", "b.txt"], "has to be a .json file"),
        (["a.jsonl", "b.json", "--restore_questions", "True"], "needs --original_llava_ds_path"),
        (["a.jsonl", "b.json", "--restore_questions", "maybe"], "neither True nor False"),
        (["a.jsonl", "b.json", "--color"], "unrecognized arguments: --color"),
    ],
)
def test_bad_arguments_are_a_usage_error(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        dj_to_llava(arguments)


def test_a_tool_says_its_error_in_one_sentence_and_ends_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/dj_to_llava.py", "missing.jsonl", "out.json"])
    assert tool(dj_to_llava) == 3
    assert capsys.readouterr().err == "dj_to_llava.py: cannot read missing.jsonl: No such file or directory.\n"
    monkeypatch.setattr(sys, "argv", ["/x/dj_to_llava.py"])
    assert tool(dj_to_llava) == 2
