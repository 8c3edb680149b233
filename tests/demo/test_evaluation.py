"""Scores of answers, and questions that cannot be asked; answering itself is tested where models are trained."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from lorapatch.demo.evaluation import answer_mmbench, answer_textvqa, score_mmbench, score_textvqa
from lorapatch.errors import Refused, RunFailed, UsageError


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(**paths: Path | str | int) -> list[str]:
    return [word for name, value in paths.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def scored(score: Any, folder: Path, annotations: Path, answers: list[str]) -> dict[str, Any]:
    rows = [{"question_id": number, "text": text} for number, text in enumerate(answers)]
    result = jsonl(folder / "answers.jsonl", rows)
    score(arguments(annotation_file=annotations, result_file=result, score_file=folder / "score.json"))
    figures: dict[str, Any] = json.loads((folder / "score.json").read_text())
    return figures


def textvqa(folder: Path, *wanted: str) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps({"data": [{"question_id": n, "answers": [text]} for n, text in enumerate(wanted)]}))
    return path


def mmbench(folder: Path, *wanted: str, image: str = "") -> Path:
    path = folder / "table.tsv"
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "image"]
    rows = [[str(number), "Which?", "", "one", "two", "", "", letter, image] for number, letter in enumerate(wanted)]
    path.write_text("".join("\t".join(row) + "\n" for row in [columns, *rows]))
    return path


def test_textvqa_counts_exact_answers_but_for_case_and_a_full_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = scored(score_textvqa, tmp_path, textvqa(tmp_path, "yes", "seven", "no", "six"), [" Yes. ", "sevens", "", "six"])
    assert figures == {
        "benchmark": "TextVQA", "metric": "exact match", "accuracy": 0.5, "right": 2, "questions": 4,
    }  # fmt: skip
    assert capsys.readouterr().out == "TextVQA: 50.0 % right by exact match (2 of 4)\n"


def test_mmbench_counts_right_letters(tmp_path: Path) -> None:
    figures = scored(score_mmbench, tmp_path, mmbench(tmp_path, "A", "B", "A", "B"), ["a", "B.", "B", "B. two"])
    assert (figures["right"], figures["questions"]) == (2, 4)


def test_an_answer_that_is_missing_is_wrong(tmp_path: Path) -> None:
    assert scored(score_textvqa, tmp_path, textvqa(tmp_path, "yes", "no"), ["yes"])["accuracy"] == 0.5


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data": [{"answers": []}]}'])
def test_annotations_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(Refused, match="is no list of questions"):
        scored(score_textvqa, tmp_path, tmp_path / "annotations.json", ["yes"])


@pytest.mark.parametrize("content", ["", "a\tb\n1\t2\n", "index\tquestion\tanswer\timage\tA\tB\n"])
def test_a_table_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "table.tsv").write_text(content)
    with pytest.raises(Refused, match="is no MMBench table"):
        scored(score_mmbench, tmp_path, tmp_path / "table.tsv", ["A"])


def test_answers_that_are_damaged_are_named_by_line(tmp_path: Path) -> None:
    result = tmp_path / "answers.jsonl"
    result.write_text('{"question_id": 0, "text": "yes"}\n{"question_id"\n')
    words = arguments(annotation_file=textvqa(tmp_path, "yes"), result_file=result, score_file=tmp_path / "score.json")
    with pytest.raises(Refused, match="answers.jsonl, line 2"):
        score_textvqa(words)
    assert not (tmp_path / "score.json").exists()


def test_missing_files_and_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--result-file"):
        score_textvqa(["--annotation-file", "x"])
    with pytest.raises(Refused, match=r"cannot read .*x\.jsonl"):
        scored_paths = arguments(annotation_file=textvqa(tmp_path), result_file="x.jsonl", score_file="y.json")
        score_textvqa(scored_paths)


def test_a_chunk_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    words = arguments(model_path="m", question_file="q", image_folder="i", answers_file="a", num_chunks=2, chunk_idx=2)
    with pytest.raises(UsageError, match="--chunk-idx 2 is not below --num-chunks 2"):
        answer_textvqa(words)


def test_a_model_that_is_not_there_fails_the_run_in_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    questions = jsonl(tmp_path / "q.jsonl", [{"question_id": 0, "image": "0.png", "text": "Which?"}])
    words = arguments(
        model_path=tmp_path / "MGM", question_file=questions, image_folder=tmp_path, answers_file=tmp_path / "a.jsonl"
    )
    with pytest.raises(RunFailed, match="MGM cannot answer: "):
        answer_textvqa(words)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize("image", ["%%%", base64.b64encode(b"no picture").decode()])
def test_a_damaged_picture_in_the_table_is_named_by_its_question(tmp_path: Path, image: str) -> None:
    table = mmbench(tmp_path, "A", image=image)
    with pytest.raises(Refused, match="the picture of question 0 is damaged"):
        answer_mmbench(arguments(model_path="m", question_file=table, answers_file="a"))


def test_a_whole_picture_in_the_table_is_read(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    table = mmbench(tmp_path, "A", image=base64.b64encode(buffer.getvalue()).decode())
    with pytest.raises(RunFailed, match="cannot answer"):  # it came as far as the model
        answer_mmbench(arguments(model_path=tmp_path / "m", question_file=table, answers_file=tmp_path / "a"))
