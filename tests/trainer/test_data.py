from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from zoo import AUX_SIDE, TOKENS, Zoo

from lorapatch.trainer.data import (
    IMAGE_TOKEN,
    TEMPLATES,
    Collator,
    GroupedSampler,
    ImageSettings,
    Samples,
    encode,
    expand,
    load_image,
    template_for,
)
from lorapatch.trainer.errors import TrainerError
from lorapatch.trainer.model import IGNORE_INDEX

SETTINGS = ImageSettings(AUX_SIDE, pad=True, background=(122, 116, 104))


@pytest.fixture(scope="module")
def tokenizer(zoo: Zoo) -> Any:
    return AutoTokenizer.from_pretrained(zoo.language)


def samples(zoo: Zoo, tokenizer: Any, listed: list[dict[str, Any]] | None = None, **options: Any) -> Samples:
    settings: dict[str, Any] = {
        "image_folder": zoo.images,
        "settings": SETTINGS,
        "tokens_per_image": TOKENS,
        "max_length": 256,
        **options,
    }
    return Samples(listed or Samples.read(zoo.data), tokenizer, TEMPLATES["gemma"], **settings)


def sample(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "conversations": turns, **fields}


def supervised(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    assert all(label in {IGNORE_INDEX, i} for i, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORE_INDEX]))


def test_gemma_supervises_each_answer_with_its_end_of_turn_and_end_of_text(tokenizer: Any) -> None:
    ids, labels = encode([("<image>\nA?", "yes"), ("B?", "no")], tokenizer, TEMPLATES["gemma"])
    assert supervised(ids, labels, tokenizer) == "yes<end_of_turn>\n<eos>no<end_of_turn>\n<eos>"
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(IMAGE_TOKEN) == 1
    whole = tokenizer.decode([i for i in ids if i != IMAGE_TOKEN])
    assert whole == (
        "<bos><start_of_turn>user\n\nA?<end_of_turn>\n<start_of_turn>model\nyes<end_of_turn>\n<eos>"
        "<start_of_turn>user\nB?<end_of_turn>\n<start_of_turn>model\nno<end_of_turn>\n<eos>"
    )


def test_an_answer_of_none_leaves_the_prompt_open(tokenizer: Any) -> None:
    ids, labels = encode([("A?", None)], tokenizer, TEMPLATES["gemma"])
    assert tokenizer.decode(ids).endswith("<start_of_turn>model\n")
    assert set(labels) == {IGNORE_INDEX}


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_every_template_supervises_answers_alone(tokenizer: Any, name: str) -> None:
    ids, labels = encode([("What?", "This."), ("And?", "That.")], tokenizer, TEMPLATES[name])
    text = supervised(ids, labels, tokenizer)
    assert "This." in text and "That." in text
    assert "What" not in text and "And" not in text


def test_plain_template_keeps_image_and_caption(tokenizer: Any) -> None:
    ids, labels = encode([("<image>\nDescribe it.", "a cat")], tokenizer, TEMPLATES["plain"])
    assert ids[:2] == [tokenizer.bos_token_id, IMAGE_TOKEN]
    assert supervised(ids, labels, tokenizer) == "a cat\n" == tokenizer.decode(ids[2:])


def test_template_is_chosen_by_version_or_backbone() -> None:
    assert template_for("gemma", "mgm_gemma") is TEMPLATES["gemma"]
    assert template_for("gemma_2b", "mgm_gemma") is TEMPLATES["gemma"]
    assert template_for(None, "mgm_qwen2") is TEMPLATES["chatml_direct"]
    with pytest.raises(TrainerError, match="--version vicuna is unknown: gemma, "):
        template_for("vicuna", "mgm_llama")


def test_image_tokens_are_expanded_without_labels_and_cut_at_the_limit() -> None:
    ids, labels = expand([2, IMAGE_TOKEN, 9, 10], [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 10], tokens=4, limit=6)
    assert ids.tolist() == [2, *[IMAGE_TOKEN] * 4, 9]
    assert labels.tolist() == [IGNORE_INDEX] * 6


def test_image_stands_before_its_question_wherever_it_was_written(zoo: Zoo, tokenizer: Any) -> None:
    data = samples(zoo, tokenizer)
    item = data.item(sample("What is this?\n<image>", "red", image="0.png"))
    start = item["input_ids"].tolist()
    assert start[len(tokenizer("<bos><start_of_turn>user\n", add_special_tokens=False).input_ids)] == IMAGE_TOKEN
    assert (item["input_ids"] == IMAGE_TOKEN).sum() == TOKENS
    assert len(item["images"]) == 1


def test_pad_keeps_the_whole_image_and_square_cuts_it() -> None:
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    padded = load_image(image, ImageSettings(32, pad=True, background=(0, 255, 0)))
    assert padded.shape == (3, 32, 32) and padded.dtype == torch.uint8
    assert padded[:, 0, 16].tolist() == [0, 255, 0]
    assert padded[:, 16, 0].tolist() == [255, 0, 0]
    cut = load_image(image, ImageSettings(32, pad=False, background=(0, 255, 0)))
    assert cut.flatten(1).T.unique(dim=0).tolist() == [[255, 0, 0]]


def test_images_of_every_mode_and_shape_become_one_size(tmp_path: Path) -> None:
    for number, (mode, size) in enumerate([("L", (7, 90)), ("RGBA", (90, 7)), ("P", (64, 64)), ("1", (3, 3))]):
        file = tmp_path / f"{number}.png"
        Image.new(mode, size).save(file)
        for pad in (True, False):
            assert load_image(file, ImageSettings(32, pad, (0, 0, 0))).shape == (3, 32, 32)


def test_a_batch_knows_every_position_that_the_step_needs(zoo: Zoo, tokenizer: Any) -> None:
    data = samples(zoo, tokenizer)
    items = [data[0], data[3], data[1]]
    batch = Collator(tokenizer.pad_token_id, AUX_SIDE, TOKENS)(items)
    width = batch["input_ids"].shape[1]
    assert batch["images"].shape == (2, 3, AUX_SIDE, AUX_SIDE)
    assert batch["image_rows"].tolist() == list(range(2 * TOKENS))
    assert batch["token_count"] == sum(len(i["input_ids"]) for i in items)
    flat = torch.full((3, width), IGNORE_INDEX)
    flat.view(-1)[batch["label_positions"] + 1] = batch["targets"]
    for row, item in enumerate(items):
        expected = torch.full((width,), IGNORE_INDEX)
        expected[: len(item["labels"])] = item["labels"]
        assert torch.equal(flat[row], expected)
        places = batch["image_positions"][batch["image_positions"] // width == row] % width
        assert torch.equal(places, (item["input_ids"] == IMAGE_TOKEN).nonzero().squeeze(-1))
    assert batch["input_ids"].min() >= 0


def test_a_batch_of_text_brings_one_black_image(zoo: Zoo, tokenizer: Any) -> None:
    data = samples(zoo, tokenizer)
    batch = Collator(tokenizer.pad_token_id, AUX_SIDE, TOKENS)([data[3], data[7]])
    assert batch["images"].shape == (1, 3, AUX_SIDE, AUX_SIDE) and not batch["images"].any()
    assert not len(batch["image_positions"]) and not len(batch["image_rows"])


def test_a_sample_cut_inside_its_image_keeps_the_others_rows(zoo: Zoo, tokenizer: Any) -> None:
    items = [dict(samples(zoo, tokenizer)[index]) for index in (0, 1)]
    start = items[0]["input_ids"].tolist().index(IMAGE_TOKEN)
    for name in ("input_ids", "labels"):
        items[0][name] = items[0][name][: start + 3]
    batch = Collator(tokenizer.pad_token_id, AUX_SIDE, TOKENS)(items)
    assert batch["image_rows"].tolist() == [0, 1, 2, *range(TOKENS, 2 * TOKENS)]


def test_a_broken_image_is_reported_with_its_id_and_the_next_sample_taken(
    zoo: Zoo, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.png").write_bytes((zoo.images / "0.png").read_bytes()[:40])
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    listed = [
        {**sample("<image>\nA?", "a", image="torn.png"), "id": "torn"},
        {**sample("<image>\nB?", "b", image="gone.png"), "id": "gone"},
        {**sample("<image>\nC?", "c", image="good.png"), "id": "good"},
    ]
    data = samples(zoo, tokenizer, listed, image_folder=tmp_path, max_bad=2)
    assert torch.equal(data[0]["input_ids"], data[2]["input_ids"])
    told = capsys.readouterr().err
    assert "sample torn skipped: " in told
    assert f"sample gone skipped: {tmp_path / 'gone.png'} does not exist" in told
    assert data[0] and not capsys.readouterr().err  # said once


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"id": "s"}, "it has no conversation"),
        ({"id": "s", "conversations": [{"from": "human", "value": "?"}]}, "has not one answer for each question"),
        (sample("<image>?", "yes", image=["0.png", "1.png"]), "2 images, but 1 places for them"),
        (sample("What?" * 80, "yes"), "its answer lies behind --model_max_length 256"),
        (
            {"id": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "human and gpt do not take turns in it",
        ),
    ],
)
def test_a_malformed_sample_says_what_is_wrong(
    zoo: Zoo, tokenizer: Any, broken: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = samples(zoo, tokenizer, [broken, sample("Say red", "red")], max_bad=1)
    assert data[0]["images"] == []
    assert reason in capsys.readouterr().err


def test_more_broken_samples_than_allowed_end_the_run(zoo: Zoo, tokenizer: Any) -> None:
    listed = [sample("<image>?", "yes", image="gone.png")] * 3 + [sample("Say red", "red")] * 97
    data = samples(zoo, tokenizer, listed, max_bad=0.02)
    with pytest.raises(TrainerError, match="3 of 100 samples are broken, more than --max_bad_samples allows \\(2\\)"):
        for index in range(100):
            data[index]


def test_the_limit_counts_over_all_processes(zoo: Zoo, tokenizer: Any) -> None:
    listed = [sample("<image>?", "yes", image="gone.png")] * 4 + [sample("Say red", "red")] * 6
    data = samples(zoo, tokenizer, listed, max_bad=3)
    worker = multiprocessing.get_context("fork").Process(target=data.__getitem__, args=(1,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and data.bad.tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    with pytest.raises(TrainerError, match="4 of 10 samples are broken"):
        data[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), ("[{", "is not JSON"), ("{}", "is no list of samples"), ("[]", "is no list of samples")],
)
def test_a_broken_data_file_is_one_sentence(tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "data.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TrainerError, match=reason):
        Samples.read(file)


def test_json_lines_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(sample("A?", str(i))) + "\n" for i in range(3)))
    assert len(Samples.read(tmp_path / "data.jsonl")) == 3


def test_renamed_image_files_are_found(zoo: Zoo, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "ocr").mkdir()
    (tmp_path / "vg" / "images").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "ocr" / "1.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "vg" / "images" / "2.png")
    data = samples(zoo, tokenizer, image_folder=tmp_path)
    assert data.item(sample("<image>?", "a", image="ocr/1.jpg"))["images"]
    assert data.item(sample("<image>?", "a", image="vg/VG_100K_2/2.png"))["images"]


LENGTHS = [(1 + 7 * i % 90) * (-1 if i % 3 == 0 else 1) for i in range(203)]


def test_grouping_gives_every_sample_once_and_depends_on_seed_and_epoch() -> None:
    sampler = GroupedSampler(LENGTHS, batch=4, world=3, seed=5, by_modality=True)
    first = list(sampler)
    assert sorted(first) == list(range(len(LENGTHS)))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert len(sampler) == len(LENGTHS)


def test_grouping_keeps_kinds_apart_and_batches_alike_in_length() -> None:
    order = list(GroupedSampler(LENGTHS, batch=4, world=3, seed=5, by_modality=True))
    steps = [order[i : i + 12] for i in range(0, len(order), 12)]
    whole = [step for step in steps if len({LENGTHS[i] > 0 for i in step}) == 1 and len(step) == 12]
    assert len(whole) >= len(steps) - 2  # what is left over of both kinds comes last
    for step in whole:
        loads = [sum(abs(LENGTHS[i]) for i in step[part : part + 4]) for part in (0, 4, 8)]
        assert max(loads) <= 1.5 * min(loads)


def test_a_step_has_the_same_samples_however_ranks_and_accumulation_share_it() -> None:
    two_ranks = GroupedSampler(LENGTHS, batch=2, world=2 * 3, seed=0, by_modality=True)
    one_rank = GroupedSampler(LENGTHS, batch=2, world=1 * 6, seed=0, by_modality=True)
    assert list(two_ranks) == list(one_rank)


def test_lengths_tell_text_from_images(zoo: Zoo, tokenizer: Any) -> None:
    lengths = samples(zoo, tokenizer).lengths
    assert [n > 0 for n in lengths] == [i % 4 != 3 for i in range(len(lengths))]
