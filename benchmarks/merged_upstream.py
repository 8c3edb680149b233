"""A LoRA run verified, merged, and the merged model read by MGM's own, unmodified evaluation code: logits and answers.

    python benchmarks/merged_upstream.py --upstream MGM --upstream-path OLD_PACKAGES --data samples.json --images FOLDER

The embedded trainer trains an adapter (random weights, LoRA r 16 on all seven projections, ZeRO-2); ``lorapatch verify``
and ``lorapatch merge`` are timed. Then upstream's loader and data set (``mgm/model/builder.py``,
``mgm/eval/model_vqa_loader.py``) give the logits behind a few prompts with images, in its float16, and this project the
same for the adapter that is *not* merged, in bfloat16 and float32. Upstream's evaluation itself answers the same questions.
Differences are root mean squares as a share of the logits' spread, as in ``lorapatch verify``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import upstream

HERE = Path(__file__).resolve().parent
TOLERANCE = 5e-2  # of verify, for bf16
NAME = "MGM-2B-merged"  # upstream chooses its classes by these words


def train(options: argparse.Namespace, samples: list[dict[str, Any]]) -> Path:
    """An adapter of a few steps; the folder."""
    if not (options.work / "zoo/parameters.json").is_file():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # its GPU memory is gone with it
            process.submit(upstream.make_zoo, options.work / "zoo", samples, options.size).result()
    many = [{**samples[i % len(samples)], "id": str(i)} for i in range(options.steps * 8)]
    (options.work / "samples.json").write_text(json.dumps(many), encoding="utf-8")
    run = upstream.Run("lorapatch", 4, 2)
    output = options.work / "runs" / "lora"
    words = upstream.command(options, run)
    words[words.index("--output_dir") + 1] = str(output)
    shell(words, upstream.environment(options, run), options.work / "logs" / "train.log")
    return output


def shell(words: list[str], environment: dict[str, str], log: Path) -> float:
    """Run ``words``; seconds. Raises SystemExit with the end of the log when they fail."""
    started = time.monotonic()
    with log.open("wb") as file:
        code = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise SystemExit(f"{words[:4]} ended with {code}\n{log.read_text(errors='replace')[-3000:]}")
    return time.monotonic() - started


def questions(samples: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first turns of ``samples`` in the form that upstream's evaluation reads."""
    turns = [sample["conversations"][0]["value"].replace("<image>", "").strip() for sample in samples[:count]]
    return [
        {"question_id": number, "image": sample["image"], "text": text}
        for number, (sample, text) in enumerate(zip(samples, turns, strict=False))
    ]


def logits_of_upstream(model_path: str, asked: list[dict[str, Any]], images: str, out: str) -> None:
    """In upstream's process: its loader, its data set, its forward pass; logits [questions, vocabulary]."""
    import torch
    from mgm.eval import model_vqa_loader as evaluation
    from mgm.mm_utils import get_model_name_from_path
    from mgm.model.builder import load_pretrained_model

    evaluation.args = argparse.Namespace(conv_mode="gemma")
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = get_model_name_from_path(model_path)
    tokenizer, model, processor, _ = load_pretrained_model(model_path, None, name, device_map={"": device}, device=device)
    loaded = time.monotonic() - started
    rows = []
    for ids, image, aux in evaluation.create_data_loader(asked, images, tokenizer, processor, model.config, num_workers=0):
        pictures = {"images": image.to(model.dtype), "images_aux": aux.to(model.dtype)}
        with torch.inference_mode():
            found = model(ids.to(device), **{key: value.to(device) for key, value in pictures.items()}, use_cache=False)
        rows.append(found.logits[0, -1].float().cpu())
    torch.save({"logits": torch.stack(rows), "load_s": loaded, "class": type(model).__name__}, out)


def logits_of_ours(folder: str, asked: list[dict[str, Any]], images: str, out: str) -> None:
    """The adapter on its base through the embedded trainer, in bf16 and float32; answers of the bf16 model."""
    import torch

    from lorapatch.trainer.data import encode, expand, load_image
    from lorapatch.trainer.inference import answers, load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load(folder, device=device, dtype=dtype)
        rows = []
        for question in asked:
            ids, labels = encode([(f"<image>\n{question['text']}", None)], loaded.tokenizer, loaded.template)
            row = expand(ids, labels, loaded.tokens_per_image, 10**9)[0][None].to(device)
            taken = row < 0
            picture = load_image(Path(images) / question["image"], loaded.settings)[None].to(device)
            places = taken.flatten().nonzero().squeeze(-1)
            with torch.inference_mode():
                embedded = loaded.inner.embed(row.masked_fill(taken, 0), picture, places, torch.arange(len(places)).to(device))
                rows.append(loaded.model(inputs_embeds=embedded).logits[0, -1].float().cpu())
        found[str(dtype).removeprefix("torch.")] = torch.stack(rows)
    pairs: list[Any] = [(Path(images) / question["image"], question["text"]) for question in asked]
    found["answers"] = answers(loaded, pairs, 16)
    torch.save(found, out)


def compare(options: argparse.Namespace, adapter: Path, merged: Path, samples: list[dict[str, Any]]) -> int:
    """Both sides' logits and answers; 1 if they are further apart than bf16 explains."""
    import torch

    asked = questions(samples, options.questions)
    files = {side: options.work / f"{side}.pt" for side in ("theirs", "ours")}
    for side, model in (("theirs", merged), ("ours", adapter)):
        trainer = "upstream" if side == "theirs" else "lorapatch"
        words = [sys.executable, str(HERE / "merged_upstream.py"), "--side", side, str(model), json.dumps(asked)]
        words += [str(options.images), str(files[side])]
        environment = upstream.environment(options, upstream.Run(trainer, 1, 1))
        print(f"{side}: {shell(words, environment, options.work / 'logs' / f'{side}.log'):.1f} s")
    theirs, ours = (torch.load(files[side], weights_only=True) for side in ("theirs", "ours"))
    known = theirs["logits"].shape[1]  # upstream's loader cuts the vocabulary to the tokenizer's
    ours |= {dtype: ours[dtype][:, :known] for dtype in ("float32", "bfloat16")}
    print(f"upstream loads it as {theirs['class']} in {theirs['load_s']:.1f} s")
    apart = difference(ours["float32"], theirs["logits"])
    rounding = difference(ours["float32"], ours["bfloat16"])
    print(f"upstream, merged, float16 | adapter, not merged, float32: {apart:.4%} apart; bfloat16 alone: {rounding:.4%}")
    same = (ours["float32"].argmax(-1) == theirs["logits"].argmax(-1)).sum()
    print(f"the same first token for {same} of {len(asked)} questions")
    print(f"the same answer for {_answers(options, merged, asked, ours['answers'])} of {len(asked)} questions")
    return int(not apart < TOLERANCE)


def difference(one: Any, other: Any) -> float:
    return float((one - other).square().mean().sqrt() / one.std())


def _answers(options: argparse.Namespace, merged: Path, asked: list[dict[str, Any]], ours: list[str]) -> int:
    """How many answers of upstream's evaluation, run as it is, are ours."""
    file, out = options.work / "questions.jsonl", options.work / "answers.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in asked), encoding="utf-8")
    words = [sys.executable, "-m", "mgm.eval.model_vqa_loader", "--model-path", str(merged), "--image-folder"]
    words += [str(options.images), "--question-file", str(file), "--answers-file", str(out), "--conv-mode", "gemma"]
    words += ["--temperature", "0", "--max_new_tokens", "16"]
    seconds = shell(words, upstream.environment(options, upstream.Run("upstream", 1, 1)), options.work / "logs/answers.log")
    print(f"upstream's evaluation: {seconds:.1f} s")
    theirs = [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    return sum(one == other for one, other in zip(ours, theirs, strict=True))


def main(argv: list[str]) -> int:
    """Train, verify, merge, compare; 1 if the logits are further apart than bf16 explains."""
    if argv[:1] == ["--side"]:
        call = logits_of_upstream if argv[1] == "theirs" else logits_of_ours
        call(argv[2], json.loads(argv[3]), *argv[4:6])
        return 0
    if not argv:
        print("needs a checkout of MGM and samples; nothing was run (--help says how)")
        return 0
    options = _options(argv)
    for name in ("logs", "runs"):
        (options.work / name).mkdir(parents=True, exist_ok=True)
    samples = json.loads(options.data.read_text(encoding="utf-8"))
    adapter, merged = train(options, samples), options.work / NAME
    ours = upstream.environment(options, upstream.Run("lorapatch", 1, 1))
    cli = [sys.executable, "-m", "lorapatch.cli"]
    for what, words in {
        "verify, files alone": ["verify", str(adapter), "--tier", "1"],
        "verify, all tiers": ["verify", str(adapter)],
        "merge": ["merge", str(adapter), "-o", str(merged)],
    }.items():
        log = options.work / "logs" / f"{what.split(',')[0]}.log"
        print(f"{what}: {shell([*cli, *words], ours, log):.1f} s\n{log.read_text(errors='replace').strip()}", flush=True)
    return compare(options, adapter, merged, samples)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True, help="folder that holds upstream's mgm/")
    parser.add_argument("--upstream-path", default="", help="folders of the packages it pins, as in PYTHONPATH")
    parser.add_argument("--data", type=Path, required=True, help="samples in LLaVA's format, each with an image")
    parser.add_argument("--images", type=Path, required=True, help="folder that the samples' image paths begin in")
    parser.add_argument("--work", type=Path, default=Path("build/merged"), help="weights, logs and results")
    parser.add_argument("--size", choices=["tiny", "true"], default="true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--questions", type=int, default=8)
    options = parser.parse_args(argv)
    for name in ("upstream", "data", "images", "work"):
        setattr(options, name, getattr(options, name).resolve())
    return options


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(sys.argv[1:]))
