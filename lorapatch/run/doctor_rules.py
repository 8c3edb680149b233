"""Which versions fit each other, each rule with its source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["DRIVERS", "IMPORT_ERRORS", "RULES", "Misfit", "Rule", "misfits"]


@dataclass(frozen=True)
class Rule:
    """If ``package`` is in ``versions`` and ``other`` in ``other_versions`` (PEP 440), then ``sentence``."""

    package: str
    versions: str
    other: str
    other_versions: str
    fails: bool
    sentence: str
    remedy: str
    source: str


RULES = (
    Rule("numpy", ">=2", "torch", "<2.3", True,
         "torch before 2.3 was built against NumPy 1, so tensors cannot be turned into arrays",
         "pip install 'numpy<2'", "NumPy 2.0 migration guide; PyTorch 2.3 release notes"),
    Rule("torch", ">=2.4", "deepspeed", "<0.14.4", True,
         "deepspeed before 0.14.4 imports a name that torch 2.4 has renamed, so it cannot be imported",
         "pip install 'deepspeed>=0.14.4'", "DeepSpeed issue 5337"),
    Rule("transformers", ">=4.52", "torch", "<2.6", False,
         "transformers from 4.52 on loads no .bin checkpoint with torch before 2.6, only safetensors",
         "pip install 'torch>=2.6', or convert the checkpoint to safetensors",
         "transformers/utils/import_utils.py, check_torch_load_is_safe"),
    Rule("bitsandbytes", "<0.43.3", "deepspeed", ">=0", False,
         "4-bit training under ZeRO-3 needs bitsandbytes 0.43.3 or newer",
         "pip install 'bitsandbytes>=0.43.3', or use ZeRO-2", "PEFT documentation, DeepSpeed with QLoRA"),
    Rule("peft", ">=0.14", "transformers", "<4.43", True,
         "peft from 0.14 on imports EncoderDecoderCache, which transformers before 4.43 lacks",
         "pip install 'peft<0.14'", "PEFT issue 2292"),
)  # fmt: skip

# What an import says when versions clash, and what to do then.
IMPORT_ERRORS = (
    ("EncoderDecoderCache", "pip install 'peft<0.14', or a newer transformers", "PEFT issue 2292"),
    ("HybridCache", "pip install --upgrade peft: this one is too old for transformers 5", "PEFT issue 3333"),
    ("torch.distributed.elastic", "pip install 'deepspeed>=0.14.4'", "DeepSpeed issue 5337"),
    ("No module named", "install it into this environment with pip", "Python"),
    ("undefined symbol", "this package was built for another torch: reinstall it after torch", "PyTorch C++ ABI"),
    ("GLIBCXX", "the C++ runtime is older than the package needs: install a newer libstdc++", "GCC ABI policy"),
    ("libcud", "torch's CUDA libraries are not found: reinstall torch", "PyTorch installation notes"),
)

# CUDA major version -> the oldest driver branch that runs it (NVIDIA, CUDA minor version compatibility).
DRIVERS = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Misfit:
    """Two packages that do not fit: what is wrong, what to do, and who says so."""

    name: str
    fails: bool
    sentence: str
    remedy: str
    source: str


def misfits(versions: dict[str, str], requires: dict[str, list[str]], minimum: dict[str, str]) -> Iterator[Misfit]:
    """Every pair of installed packages that do not fit each other.

    ``requires``: the dependency lines of each package's metadata. ``minimum``: what transformers' code asks of others.
    """
    named = set()
    for misfit in (*_by_metadata(versions, requires), *_by_code(versions, minimum), *_by_table(versions)):
        if misfit.name not in named:  # one pair, one line
            named.add(misfit.name)
            yield misfit


def _by_code(versions: dict[str, str], minimum: dict[str, str]) -> Iterator[Misfit]:
    for package, least in minimum.items():
        if package in versions and not _is_in(versions[package], f">={least}"):
            here = (
                f"transformers {versions['transformers']} needs {package} {least} or newer, here is {versions[package]}"
            )
            source = "the constants in transformers' own files"
            yield Misfit(f"transformers-{package}", True, here, f"pip install '{package}>={least}'", source)


def _by_table(versions: dict[str, str]) -> Iterator[Misfit]:
    for rule in RULES:
        if _is_in(versions.get(rule.package), rule.versions) and _is_in(versions.get(rule.other), rule.other_versions):
            here = f"{rule.package} {versions[rule.package]} with {rule.other} {versions[rule.other]}"
            name = f"{rule.package}-{rule.other}"
            yield Misfit(name, rule.fails, f"{here}: {rule.sentence}", rule.remedy, rule.source)


def _by_metadata(versions: dict[str, str], requires: dict[str, list[str]]) -> Iterator[Misfit]:
    """Each package's own list of what it needs, its extras for torch, accelerate and deepspeed included."""
    from packaging.requirements import InvalidRequirement, Requirement

    for package, lines in requires.items():
        seen = set()
        for line in lines:
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            name = requirement.name.replace("-", "_").lower()
            wanted = str(requirement.specifier)
            if name not in versions or (name, wanted) in seen or not _applies(requirement):
                continue
            seen.add((name, wanted))
            if not _is_in(versions[name], wanted):
                sentence = f"{package} {versions[package]} needs {name} {wanted}, here is {versions[name]}"
                source = f"the metadata of {package} {versions[package]}"
                yield Misfit(f"{package}-{name}", True, sentence, f"pip install '{name}{wanted}'", source)


def _applies(requirement: Any) -> bool:
    """Whether the requirement counts here: without an extra, or for one that training uses."""
    if requirement.marker is None:
        return True
    return any(requirement.marker.evaluate({"extra": extra}) for extra in ("", "torch", "accelerate", "deepspeed"))


def _is_in(version: str | None, specifiers: str) -> bool:
    """Whether a version is in a set of specifiers; one that cannot be read counts as fitting nothing but "any"."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    if version is None:
        return False
    try:
        return SpecifierSet(specifiers).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return not specifiers
