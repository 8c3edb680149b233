"""What an adapter's files say, without a model: tensors, shapes, whether LoRA moved, whether the base slipped in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorapatch.adapter.findings import Finding, counted, judged
from lorapatch.adapter.settings import Settings, is_vision, read_json, read_settings
from lorapatch.adapter.tensors import Tensor, read_tensors
from lorapatch.errors import Refused

__all__ = ["Adapter", "Pair", "find_adapter", "inspect_adapter"]

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")
_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.(?P<leaf>weight|bias))?$"
)
_TRAINED_IN = frozenset({"F32", "BF16", "F16"})
MERGE_FILE = "lorapatch_merge.json"


@dataclass(frozen=True)
class Pair:
    """The LoRA tensors of one module: A [r, in] and B [out, r], for an embedding A [r, rows] and B [width, r].

    ``magnitude`` is DoRA's [out], ``bias`` the B's own [out] (``lora_bias``).
    """

    module: str
    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files show it; ``findings`` are about the files alone."""

    directory: Path
    file: Path
    bytes: int
    sha256: str
    settings: Settings
    pairs: Mapping[str, Pair]  # by the module's path in the model
    others: Mapping[str, Tensor]  # biases and whole modules, by their name in the base model
    all_tensors: Mapping[str, Tensor]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[str, ...]:
        """One sentence for each thing that is wrong with it."""
        return tuple(finding.sentence for finding in self.findings if finding.state == "fail")

    @property
    def config(self) -> Mapping[str, Any]:
        """All of ``adapter_config.json``."""
        return self.settings.raw

    @property
    def rank(self) -> int:
        """The rank of its configuration."""
        return int(self.settings.raw["r"])

    @property
    def tensors(self) -> int:
        """The number of its tensors."""
        return len(self.all_tensors)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The types of its tensors."""
        return tuple(sorted({tensor.dtype for tensor in self.all_tensors.values()}))

    @property
    def lora_parameters(self) -> int:
        """Elements of the LoRA tensors."""
        return sum(tensor.parameters for name, tensor in self.all_tensors.items() if ".lora_" in name)

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that carry LoRA."""
        return tuple(sorted(self.pairs))

    @property
    def base_tensors(self) -> tuple[str, ...]:
        """Tensors of the base model that have no business here."""
        return tuple(name for name in self.others if not _belongs(name, self))

    @cached_property
    def still(self) -> tuple[str, ...]:
        """The modules whose lora_B is zero, as it was at the start."""
        return tuple(m for m, p in self.pairs.items() if p.b is not None and p.b.parameters and p.b.is_zero())

    @property
    def moved(self) -> int:
        """How many lora_B are no longer zero."""
        return sum(not _is_empty(pair.b) for pair in self.pairs.values()) - len(self.still)


def find_adapter(output: Path) -> Path | None:
    """The folder of the adapter that a run left in ``output``; None if there is none.

    It is ``output`` itself, or the folder that its adapter was moved to when a merged model took its place, or its last
    checkpoint.
    """
    numbered = (
        (int(match[1]), folder) for folder in output.glob("checkpoint-*") if (match := _CHECKPOINT.search(folder.name))
    )
    candidates = [output, *_moved_to(output), *(folder for _, folder in sorted(numbered, reverse=True))]
    return next((folder for folder in candidates for name in _FILES if (folder / name).is_file()), None)


def _moved_to(output: Path) -> list[Path]:
    try:
        return [output / str(read_json(output / MERGE_FILE)["adapter"])]
    except (Refused, KeyError):
        return []


def inspect_adapter(directory: Path) -> Adapter:
    """Read the adapter in ``directory``.

    Raises Refused when there is none, or its files are damaged or are not what they claim to be.
    """
    file = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if file is None:
        raise Refused(f"{directory} holds no adapter ({' or '.join(_FILES)})")
    settings = read_settings(directory)
    tensors = read_tensors(file)
    pairs, others = _sorted_out(tensors)
    read = Adapter(directory, file, file.stat().st_size, _sha256(file), settings, pairs, others, tensors, ())
    findings = (_file_finding(read), *_check_tensors(read), *_check_pairs(read), *_check_names(read))
    return Adapter(directory, file, read.bytes, read.sha256, settings, pairs, others, tensors, findings)


def _sorted_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The LoRA tensors by module; the others by the name they have in the base model."""
    parts: dict[str, dict[str, Any]] = {}
    others = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix(_PREFIX)
        match = _LORA.fullmatch(plain)
        if ".original_module." in plain:  # PEFT saves a resized embedding twice: as it was, and as it was trained
            continue
        if match is None:
            plain = plain.replace(".modules_to_save", "").replace(".base_layer", "").replace(".default.", ".")
            others[plain] = tensor
            continue
        found = parts.setdefault(match["module"], {})
        part = match["part"].removeprefix("embedding_")
        if part == "magnitude_vector":
            found["magnitude"] = tensor
        elif match["leaf"] == "bias":
            found["bias"] = tensor
        else:
            found[part.lower()] = tensor
            found["embedding"] = match["part"].startswith("embedding_")
    return {module: Pair(module, **found) for module, found in parts.items()}, others


def _belongs(name: str, adapter: Adapter) -> bool:
    """Whether a tensor that is not one of a pair is part of the adapter all the same."""
    if ".token_adapter." in name or ".lora_" in name:
        return True
    if name.endswith(".bias") and adapter.config.get("bias", "none") != "none":
        return True
    module = name.rsplit(".", 1)[0]
    if module in adapter.pairs:  # PEFT saves an embedding that carries LoRA whole, because it may have been resized
        return adapter.pairs[module].embedding or module.endswith(("lm_head", "embed_tokens"))
    return any(f".{saved}." in f".{name}" for saved in adapter.settings.saved_modules)


def _file_finding(adapter: Adapter) -> Finding:
    sentence = (
        f"{adapter.file.name}: {counted(adapter.tensors, 'tensor')}, {adapter.lora_parameters:,} LoRA parameters, "
        f"{adapter.bytes:,} bytes, sha256 {adapter.sha256[:16]}"
    )
    figures = {
        "file": adapter.file.name, "tensors": adapter.tensors, "lora_parameters": adapter.lora_parameters,
        "bytes": adapter.bytes, "sha256": adapter.sha256,
    }  # fmt: skip
    return Finding("file", 1, "pass", sentence, figures)


def _check_tensors(adapter: Adapter) -> Iterator[Finding]:
    """What is wrong with single tensors: empty, not finite, of a type that no LoRA is trained in."""
    tensors = adapter.all_tensors
    empty = [name for name, tensor in tensors.items() if tensor.parameters == 0]
    fault = ""
    if len(empty) == len(tensors):
        fault = "every tensor is empty: ZeRO-3's shares were not gathered when it was saved"
    elif empty:
        fault = f"{counted(len(empty), 'tensor', 'is')} empty, such as {empty[0]}: ZeRO-3's shares were not gathered"
    yield judged("empty", 1, fault, "no tensor is empty", {"empty": len(empty)})
    broken = [name for name, tensor in tensors.items() if not tensor.is_finite()]
    fault = f"{counted(len(broken), 'tensor', 'holds')} NaN or infinity, such as {broken[0]}" if broken else ""
    yield judged("finite", 1, fault, "every number is finite", {"not_finite": broken[:10]})
    kinds = sorted({tensor.dtype for name, tensor in tensors.items() if ".lora_" in name})
    fine = f"the LoRA tensors are {' and '.join(kinds)}"
    odd = len(kinds) > 1 or not _TRAINED_IN.issuperset(kinds)
    fault = f"{fine}: LoRA is trained in one of F32, BF16 and F16, so another program changed them" if odd else ""
    yield judged("dtype", 1, fault, fine, {"dtypes": kinds})


def _check_pairs(adapter: Adapter) -> Iterator[Finding]:
    """What is wrong with A and B together: one alone, swapped, of another rank; not trained."""
    pairs = adapter.pairs
    single = [module for module, pair in pairs.items() if pair.a is None or pair.b is None]
    swapped, wrong = _misfits(adapter)
    fault = ""
    if single:
        fault = f"{counted(len(single), 'module', 'has')} only one of lora_A and lora_B, such as {single[0]}"
    elif swapped:
        fault = f"lora_A and lora_B are swapped in {counted(len(swapped), 'module')}, such as {swapped[0]}"
    elif not pairs:
        fault = "no tensor is LoRA's"
    yield judged("pairs", 1, fault, f"{counted(len(pairs), 'module')} with lora_A and lora_B", {"modules": len(pairs)})
    ranks = sorted(adapter.settings.ranks)
    fault = f"{wrong[0]}, adapter_config.json says {adapter.rank}" if wrong else ""
    yield judged("rank", 1, fault, f"rank {', '.join(map(str, ranks))}", {"wrong": len(wrong), "ranks": ranks})
    yield _check_moved(adapter)


def _misfits(adapter: Adapter) -> tuple[list[str], list[str]]:
    """The modules whose A and B are swapped, and in words those whose rank is another than the configuration's."""
    swapped, wrong = [], []
    for module, pair in adapter.pairs.items():
        if pair.a is None or pair.b is None or _is_empty(pair.a) or _is_empty(pair.b):
            continue
        rank = adapter.settings.rank(module)
        if len(pair.a.shape) < 2 or len(pair.b.shape) < 2:
            wrong.append(f"{module} has lora_A of the shape {list(pair.a.shape)}")
        elif (pair.a.shape[0], pair.b.shape[1]) == (rank, rank):
            continue
        elif (pair.a.shape[1], pair.b.shape[0]) == (rank, rank):
            swapped.append(module)
        else:
            wrong.append(f"{module} has the ranks {pair.a.shape[0]} and {pair.b.shape[1]}")
    return swapped, wrong


def _check_moved(adapter: Adapter) -> Finding:
    """Whether training moved B from zero; PiSSA and its like begin elsewhere, but never at zero."""
    still, trained = adapter.still, adapter.moved
    figures = {"moved": trained, "modules": trained + len(still)}
    if not trained + len(still):
        return Finding("moved", 1, "not checked", "there is no lora_B to look at", figures)
    fault = "" if trained else "every lora_B is zero, as at the start: LoRA was never trained"
    fine = f"lora_B moved from zero in {trained} of {counted(trained + len(still), 'module')}"
    return judged("moved", 1, fault, f"{fine}, not in {still[0]}" if still else fine, figures)


def _is_empty(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.parameters == 0


def _check_names(adapter: Adapter) -> Iterator[Finding]:
    """What has no place in an adapter: tensors of the base model, LoRA on a vision tower."""
    base = adapter.base_tensors
    fault = f"{counted(len(base), 'tensor', 'is')} the base model's, such as {base[0]}" if base else ""
    yield judged("base_tensors", 1, fault, "it holds nothing of the base model", {"base_tensors": len(base)})
    seen = [module for module in adapter.pairs if is_vision(module)]
    fault = ""
    if seen:
        fault = (
            f"{len(seen)} of {counted(len(adapter.pairs), 'module')} with LoRA belong to a vision tower, such as "
            f"{seen[0]}: target_modules named leaves that the tower has, too"
        )
    yield judged("vision", 1, fault, "no vision tower carries LoRA", {"vision_modules": len(seen)})
    yield _check_variant(adapter)


def _check_variant(adapter: Adapter) -> Finding:
    """Whether what the configuration promises beside A and B is there."""
    missing = []
    pairs = adapter.pairs.values()
    if adapter.config.get("use_dora"):
        missing += [f"{pair.module}.lora_magnitude_vector" for pair in pairs if pair.magnitude is None]
    if adapter.config.get("lora_bias"):
        missing += [f"{pair.module}.lora_B.bias" for pair in pairs if pair.bias is None]
    for saved in adapter.settings.saved_modules:
        if not any(f".{saved}." in f".{name}" for name in adapter.others):
            missing.append(saved)
    fault = ""
    if missing:
        fault = f"the file lacks {counted(len(missing), 'tensor')} of adapter_config.json, such as {missing[0]}"
    fine = f"variant {adapter.settings.variant}: everything it needs is there"
    return judged("variant", 1, fault, fine, {"missing": missing[:10]})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
