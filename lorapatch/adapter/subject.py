"""A model put to the test, tuned or merged: through transformers and PEFT, MGM through the embedded trainer."""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapatch.adapter.base_model import BaseModel
from lorapatch.adapter.bridge import plain_name, read_bridge
from lorapatch.adapter.settings import read_json
from lorapatch.errors import Refused

if TYPE_CHECKING:
    import torch

__all__ = ["MgmSubject", "Subject", "TextSubject", "place_and_type", "read_samples"]

QUESTIONS = ("What is in the picture?", "The capital of France is", "1, 2, 3, 4,")
POSITIONS = 4  # the last ones of each question are compared
_SMALL = 6 << 30  # bytes in float32: on a CPU, what is larger stays in its own type


def place_and_type(base: BaseModel) -> tuple[str, torch.dtype]:
    """Where and in which type to load: the base's own type on a GPU, float32 on a CPU unless that is too large."""
    import torch

    from lorapatch.adapter.merge_plan import usual_dtype
    from lorapatch.adapter.update import torch_dtype

    own = torch_dtype(usual_dtype(base.weights))
    if torch.cuda.is_available():
        return "cuda", own
    size = 4 * sum(tensor.parameters for tensor in base.weights.values())
    return "cpu", torch.float32 if size <= _SMALL else own


class Subject:
    """A model that answers; ``pictures`` is the number of test images that it can be shown (0: a text model)."""

    pictures = 0
    model: Any
    unplaced: tuple[str, ...] = ()  # tensors trained beside LoRA that the model has no place for

    def logits(self, picture: int | None = None) -> torch.Tensor:
        """Logits [n, vocabulary] (float32, CPU) at the last positions of the test questions, with a picture or none."""
        raise NotImplementedError

    def answers(self, samples: Sequence[Mapping[str, Any]], length: int) -> list[str]:
        """Greedy answers of at most ``length`` tokens to the first questions of ``samples``."""
        raise NotImplementedError

    def loss(self, samples: Sequence[Mapping[str, Any]]) -> float:
        """Mean loss over the answers' tokens."""
        raise NotImplementedError

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model; modules saved whole and what was trained beside LoRA stay as trained."""
        with self.model.disable_adapter():
            yield

    def close(self) -> None:
        """Give its memory back."""
        import torch

        self.__dict__.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class TextSubject(Subject):
    """A causal language model, with an adapter on it where ``adapter`` names its folder."""

    def __init__(self, folder: Path, adapter: Path | None, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        with _quietly():
            self.model = AutoModelForCausalLM.from_pretrained(folder, **{_type_word(): dtype})
            if adapter is not None:
                from peft import PeftModel

                self.model = PeftModel.from_pretrained(self.model, str(adapter))
                self.unplaced = _put_others(self.model, adapter)
        self.model.to(device).eval()
        self.device = device
        self.tokenizer = _tokenizer(adapter, folder)

    def logits(self, picture: int | None = None) -> torch.Tensor:
        import torch

        with torch.no_grad():
            found = [self.model(input_ids=ids).logits[0, -POSITIONS:].float().cpu() for ids in self._questions()]
        return torch.cat(found)

    def _questions(self) -> list[torch.Tensor]:
        import torch

        if self.tokenizer is None:  # any ids will do to see whether two models say the same
            count = int(self.model.config.vocab_size)
            generator = torch.Generator().manual_seed(0)
            return [torch.randint(count, (1, 12), generator=generator).to(self.device) for _ in QUESTIONS]
        return [self._ids(text) for text in QUESTIONS]

    def _ids(self, text: str) -> torch.Tensor:
        import torch

        return torch.tensor([self.tokenizer(text).input_ids], device=self.device)

    def _prompt(self, question: str) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            return question.rstrip() + "\n"
        turn = [{"role": "user", "content": question}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def answers(self, samples: Sequence[Mapping[str, Any]], length: int) -> list[str]:
        import torch

        found = []
        for question, _ in map(_first_turn, samples):
            ids = self._ids(self._prompt(question))
            with torch.no_grad():
                written = self.model.generate(input_ids=ids, max_new_tokens=length, do_sample=False)
            found.append(str(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)).strip())
        return found

    def loss(self, samples: Sequence[Mapping[str, Any]]) -> float:
        import torch

        total = count = 0.0
        for question, answer in map(_first_turn, samples):
            prompt = self._prompt(question)
            ids, before = self._ids(prompt + answer), self._ids(prompt).shape[1]
            with torch.no_grad():
                logits = self.model(input_ids=ids).logits[0, before - 1 : -1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, before:], reduction="sum"))
            count += ids.shape[1] - before
        return total / max(count, 1)


def _put_others(model: Any, adapter: Path) -> tuple[str, ...]:
    """Put what was trained beside LoRA into ``model``; returns the names of what it has no place for."""
    import torch

    from lorapatch.adapter.update import as_torch

    others = read_bridge(adapter)
    if not others:
        return ()
    base = model.get_base_model()
    words = base.get_input_embeddings().weight
    embedding = next((plain_name(name) for name, parameter in model.named_parameters() if parameter is words), "")
    if embedding in others and others[embedding].shape[0] != words.shape[0]:
        resize = base.resize_token_embeddings
        plain = {"mean_resizing": False} if "mean_resizing" in inspect.signature(resize).parameters else {}
        resize(others[embedding].shape[0], **plain)
    places = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    left = []
    for name, tensor in others.items():
        place = places.get(name)
        if place is None or tuple(place.shape) != tuple(tensor.shape):
            left.append(name)
            continue
        with torch.no_grad():
            place.copy_(as_torch(tensor))
    return tuple(left)


class MgmSubject(Subject):
    """An MGM model, tuned (``folder`` holds an adapter) or whole, seen through the embedded trainer."""

    pictures = 2

    def __init__(self, folder: Path, base: Path | None, device: str, dtype: torch.dtype, images: Path | None) -> None:
        from lorapatch.trainer.errors import TrainerError
        from lorapatch.trainer.inference import load

        try:
            with _quietly(), _with_base(folder, base) as view:
                self.loaded = load(view, device=device, dtype=dtype)
        except TrainerError as error:
            raise Refused(str(error)) from error
        self.model = self.loaded.model
        self.images = images or Path()

    def logits(self, picture: int | None = None) -> torch.Tensor:
        import torch

        with torch.no_grad():
            texts = QUESTIONS if picture is None else QUESTIONS[:1]
            return torch.cat([self._ask(text, picture) for text in texts])

    def _ask(self, question: str, picture: int | None) -> torch.Tensor:
        import torch

        from lorapatch.trainer.data import encode, expand, load_image

        loaded, device = self.loaded, self.loaded.inner.lm_head.weight.device
        text = question if picture is None else f"<image>\n{question}"
        ids, labels = encode([(text, None)], loaded.tokenizer, loaded.template)
        row = expand(ids, labels, loaded.tokens_per_image, 10**9)[0][None].to(device)
        taken = row < 0
        images = None if picture is None else load_image(_picture(picture), loaded.settings)[None].to(device)
        embeddings = loaded.inner.embed(
            row.masked_fill(taken, loaded.tokenizer.pad_token_id or 0),
            images,
            taken.flatten().nonzero().squeeze(-1),
            torch.arange(int(taken.sum()), device=device),
        )
        logits: torch.Tensor = self.model(inputs_embeds=embeddings).logits[0, -POSITIONS:].float().cpu()
        return logits

    def answers(self, samples: Sequence[Mapping[str, Any]], length: int) -> list[str]:
        from lorapatch.trainer.inference import answers

        pairs: list[tuple[str | Path | Any | None, str]] = []
        for sample in samples:
            image = sample.get("image")
            image = image[0] if isinstance(image, list) else image
            pairs.append((None if image is None else self._folder(samples) / str(image), _first_turn(sample)[0]))
        return answers(self.loaded, pairs, length)

    def _folder(self, samples: Sequence[Mapping[str, Any]]) -> Path:
        """Where the images of ``samples`` are: beside the data, or in ``images/`` there."""
        names = [sample["image"] for sample in samples if isinstance(sample.get("image"), str)]
        inner = self.images / "images"
        return inner if names and not (self.images / names[0]).exists() and (inner / names[0]).exists() else self.images

    def loss(self, samples: Sequence[Mapping[str, Any]]) -> float:
        from lorapatch.trainer.inference import loss

        return loss(self.loaded, [dict(sample) for sample in samples], self._folder(samples))


def _type_word() -> str:
    """transformers 4.56 renamed an option."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _picture(number: int) -> Any:
    """Two images that have nothing in common."""
    from PIL import Image

    gradient = Image.linear_gradient("L") if number == 0 else Image.radial_gradient("L").rotate(30)
    flat = Image.new("L", gradient.size, 40 if number == 0 else 200)
    return Image.merge("RGB", (gradient, flat, gradient) if number == 0 else (flat, gradient, flat))


def _tokenizer(*folders: Path | None) -> Any:
    """The tokenizer of the first folder that has one; None if none has."""
    from transformers import AutoTokenizer

    for folder in folders:
        if folder is not None and (folder / "tokenizer_config.json").is_file():
            with contextlib.suppress(Exception), _quietly():  # half a tokenizer is no reason to fail
                return AutoTokenizer.from_pretrained(folder)
    return None


@contextlib.contextmanager
def _with_base(folder: Path, base: Path | None) -> Iterator[Path]:
    """``folder``, or a copy made of links whose ``adapter_config.json`` names another base."""
    config = folder / "adapter_config.json"
    if base is None or not config.is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="lorapatch-") as name:
        view = Path(name)
        for path in folder.iterdir():
            if path.name != config.name:
                (view / path.name).symlink_to(path.resolve())
        changed = read_json(config) | {"base_model_name_or_path": str(base.resolve())}
        (view / config.name).write_text(json.dumps(changed), encoding="utf-8")
        yield view


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without progress bars, and without warnings that are about other people's code."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Samples in LLaVA's format, from JSON or JSON lines. Raises Refused."""
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else []
        found = [json.loads(line) for line in lines] or json.loads(text)
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({error})") from error
    if not isinstance(found, list):
        raise Refused(f"{path} is no list of samples")
    kept = [sample for sample in found if isinstance(sample, dict) and all(_first_turn(sample))]
    if not kept:
        raise Refused(f"{path} has no sample with a question and an answer (LLaVA's format, conversations)")
    return kept


def _first_turn(sample: Mapping[str, Any]) -> tuple[str, str]:
    """Question and answer, the image's place left out; empty where there is none."""
    turns = sample.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns[:2]):
        return "", ""
    question, answer = (str(turn.get("value", "")) for turn in turns[:2])
    return question.replace("<image>", "").strip(), answer.strip()
