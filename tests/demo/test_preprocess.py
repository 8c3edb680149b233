"""The checks before a training: global batch size and number of samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorapatch.demo import preprocess
from lorapatch.demo.preprocess import check_global_batch_size, check_sample_number
from lorapatch.errors import Refused, UsageError


@pytest.mark.parametrize(("devices", "printed"), [(1, "True\n"), (2, "False\n")])
def test_the_batch_size_counts_every_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], devices: int, printed: str
) -> None:
    monkeypatch.setattr(preprocess, "device_count", lambda: devices)
    check_global_batch_size(["4", "32", "128"])
    out, err = capsys.readouterr()
    assert out == printed
    assert err == ("" if devices == 1 else "4 x 32 x 2 devices = 256, not 128\n")


def test_without_a_gpu_there_is_as_many_a_process_as_deepspeed_starts() -> None:
    deepspeed = pytest.importorskip("deepspeed")
    torch = pytest.importorskip("torch")
    assert preprocess.device_count() == deepspeed.accelerator.get_accelerator().device_count()
    assert preprocess.device_count() == (torch.cuda.device_count() or preprocess.device_count()) > 0


@pytest.mark.parametrize("arguments", [[], ["4", "32"], ["4", "32", "128", "1"], ["0", "32", "128"], ["4", "-1", "128"]])
def test_bad_numbers_are_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        check_global_batch_size(arguments)


def lines(count: int) -> str:
    return "".join(f'{{"id": {number}}}\n' for number in range(count))


def test_few_enough_samples_are_all_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text(lines(3) + "\n\n")
    check_sample_number([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "200000"])
    assert (tmp_path / "out.jsonl").read_text() == lines(3)
    assert capsys.readouterr().out == "3 samples in in.jsonl, 3 kept\n"


def test_too_many_are_drawn_the_same_way_each_time_and_stay_in_order(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines(100))
    kept = []
    for name in ("a", "b"):
        check_sample_number([str(tmp_path / "in.jsonl"), str(tmp_path / name), "10"])
        kept.append((tmp_path / name).read_text().splitlines())
    assert kept[0] == kept[1]
    assert len(kept[0]) == 10
    assert kept[0] == [line for line in lines(100).splitlines() if line in kept[0]]


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "cannot read"), (b"\n \n", "holds no samples"), (b"\xff", "is not UTF-8 text")]
)
def test_an_input_without_samples_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(Refused, match=sentence):
        check_sample_number([str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(lines(3))
    with pytest.raises(Refused, match="cannot write"):
        check_sample_number([str(tmp_path / "in.jsonl"), str(tmp_path / "nowhere" / "out.jsonl")])


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "0"], ["a", "b", "many"], ["a", "b", "1", "c"]])
def test_bad_arguments_are_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        check_sample_number(arguments)
