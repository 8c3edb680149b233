"""Tiers 2 and 3: the adapter loaded (does it change anything, does it help?), merged (is it the same model?)."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapatch.adapter.base_model import BaseModel, find_base
from lorapatch.adapter.bridge import is_multimodal, read_config
from lorapatch.adapter.findings import Finding, counted, judged
from lorapatch.adapter.inspect import Adapter
from lorapatch.adapter.merge import merge
from lorapatch.adapter.subject import MgmSubject, Subject, TextSubject, place_and_type, read_samples
from lorapatch.errors import Refused

if TYPE_CHECKING:
    import torch

__all__ = ["check_loaded", "TOLERANCES"]

# The difference of logits, as a share of their spread, that computing and rounding in a type explains.
TOLERANCES = {"F64": 1e-4, "F32": 1e-4, "F16": 1e-2, "BF16": 5e-2}
ANSWERS, LOSSES = 16, 64  # samples at most
LENGTH = 32  # tokens of an answer


def check_loaded(
    adapter: Adapter, base: Path | None, data: Path | None, *, peers: bool, tiers: Sequence[int]
) -> list[Finding]:
    """The findings of tiers 2 and 3, as far as ``tiers`` asks for them. Needs torch, transformers and PEFT."""
    findings: list[Finding] = []
    try:
        model = find_base(adapter.settings, base)
        device, dtype = place_and_type(model)
        subject, note = _open(adapter, model, device, dtype, data)
    except ImportError as error:
        return [Finding("loaded", 2, "not checked", f"{error.name} is not installed here")]
    except Refused as refusal:
        return [Finding("loaded", 2, "not checked", str(refusal))]
    except Exception as error:  # transformers and PEFT raise whatever they meet
        return [Finding("loaded", 2, "fail", f"the adapter cannot be loaded: {_first_line(error)}")]
    shown = range(subject.pictures)
    before = [subject.logits(), *(subject.logits(number) for number in shown)]
    if 2 in tiers:
        findings += [_check_state(adapter, subject, model.weights, device, dtype), _check_effect(subject, before[0])]
        findings.append(_check_pictures(before, note))
        findings += _check_samples(subject, data)
    with subject.without_adapter():
        plain = subject.logits()
    if peers:
        from lorapatch.adapter.peers import check_peers

        findings.append(check_peers(adapter, model, subject.model))
    kind = type(subject)
    subject.close()
    if 3 in tiers:
        findings.append(_check_merged(adapter, model, kind, (device, dtype), before, plain))
    return findings


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _open(
    adapter: Adapter, model: BaseModel, device: str, dtype: torch.dtype, data: Path | None
) -> tuple[Subject, str]:
    """The adapter on its base: with its eyes if it is MGM's and they are here; else the text part, and why."""
    config = read_config(adapter.directory)
    kind = str(config.get("model_type"))
    if not is_multimodal(config):
        reason = "a text model"
    elif not kind.startswith("mgm"):
        reason = f"the text part of {kind} alone was loaded"
    else:
        try:
            images = None if data is None else data.parent
            return MgmSubject(adapter.directory, model.directory, device, dtype, images), ""
        except (Refused, ImportError) as error:
            reason = f"the text part alone was loaded ({error})"
    return TextSubject(model.directory, adapter.directory, device, dtype), reason


def _check_state(
    adapter: Adapter, subject: Subject, in_base: Collection[str], device: str, dtype: torch.dtype
) -> Finding:
    """Whether the model holds the files' tensors: PEFT passes over what it finds no place for."""
    from lorapatch.adapter.update import as_torch

    loaded = {
        name.removeprefix("base_model.model.").replace(".default", ""): value
        for name, value in subject.model.state_dict().items()
        if ".lora_" in name
    }
    wrong = [name for name in subject.unplaced if name in in_base]  # others: of eyes, or of a head, not loaded here
    for name, tensor in adapter.all_tensors.items():
        plain = name.removeprefix("base_model.model.").replace(".default", "")
        if ".lora_" not in plain:
            continue
        found = loaded.get(plain, loaded.get(f"{plain}.weight"))
        want = as_torch(tensor).float()
        if found is None or found.shape != want.shape or not bool((found.float().cpu() == want).all()):
            wrong.append(plain)
    fault = f"{counted(len(wrong), 'tensor')} did not arrive in the model, such as {wrong[0]}" if wrong else ""
    where = f"on the {'GPU' if device == 'cuda' else 'CPU'} in {str(dtype).removeprefix('torch.')}"
    figures = {"device": device, "dtype": str(dtype).removeprefix("torch."), "wrong": wrong[:10]}
    return judged("loaded", 2, fault, f"loaded {where}; PEFT holds every LoRA tensor of the file", figures)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The root mean square of the difference of two sets of logits, as a share of the spread of the first."""
    return float((one - other).square().mean().sqrt() / one.std().clamp_min(1e-12))


def _check_effect(subject: Subject, tuned: torch.Tensor) -> Finding:
    with subject.without_adapter():
        plain = subject.logits()
    change = _difference(plain, tuned)
    words = float((plain.argmax(-1) != tuned.argmax(-1)).float().mean())
    figures = {"relative_difference": change, "other_top_token": words}
    if not math.isfinite(change):
        return Finding("effect", 2, "fail", "the logits are not finite with the adapter", figures)
    fault = "" if change else "the logits are the same with and without the adapter: it does nothing"
    fine = f"the adapter moves the logits by {change:.3g} of their spread, {words:.0%} of the next tokens change"
    return judged("effect", 2, fault, fine, figures)


def _check_pictures(logits: Sequence[torch.Tensor], note: str) -> Finding:
    if len(logits) < 3:
        return Finding("pictures", 2, "not checked", f"no picture was shown: {note}")
    change = _difference(logits[1], logits[2])
    fault = "" if change else "another picture gives the same logits: the model does not see"
    fine = f"another picture moves the logits by {change:.3g} of their spread"
    return judged("pictures", 2, fault, fine, {"relative_difference": change})


def _check_samples(subject: Subject, data: Path | None) -> Iterator[Finding]:
    """Held-out samples with and without the adapter: answers side by side, exact match, loss."""
    if data is None:
        yield Finding("answers", 2, "not checked", "no held-out samples were given (--data)")
        return
    try:
        samples = read_samples(data)
        asked = samples[:: max(1, len(samples) // ANSWERS)][:ANSWERS]
        read = samples[:: max(1, len(samples) // LOSSES)][:LOSSES]
        tuned = subject.answers(asked, LENGTH), subject.loss(read)
        with subject.without_adapter():
            plain = subject.answers(asked, LENGTH), subject.loss(read)
    except Refused as refusal:
        yield Finding("answers", 2, "not checked", str(refusal))
        return
    except Exception as error:  # an image that is no image, a sample that is too long
        yield Finding("answers", 2, "not checked", f"{data}: {_first_line(error)}")
        return
    yield _check_answers(asked, plain[0], tuned[0])
    figures = {"samples": len(read), "before": plain[1], "after": tuned[1]}
    fault = ""
    if not tuned[1] < plain[1]:
        fault = f"held-out loss is {tuned[1]:.4f} with the adapter, {plain[1]:.4f} without: it does not help"
    fine = f"held-out loss {plain[1]:.4f} without the adapter, {tuned[1]:.4f} with it ({counted(len(read), 'sample')})"
    yield judged("loss", 2, fault, fine, figures)


def _check_answers(asked: Sequence[Mapping[str, Any]], plain: Sequence[str], tuned: Sequence[str]) -> Finding:
    """Exact match; it fails where the adapter spoils significantly more answers than it mends (McNemar's test, 2 σ)."""
    rows = []
    for sample, one, other in zip(asked, plain, tuned, strict=True):
        turns = sample["conversations"]
        question = str(turns[0]["value"]).replace("<image>", "").strip()
        rows.append({"question": question, "expected": str(turns[1]["value"]).strip(), "before": one, "after": other})
    before = sum(_same(row["before"], row["expected"]) for row in rows)
    after = sum(_same(row["after"], row["expected"]) for row in rows)
    spoiled = sum(_same(r["before"], r["expected"]) and not _same(r["after"], r["expected"]) for r in rows)
    mended = after - before + spoiled
    text = f"exact match {before} of {len(rows)} without the adapter, {after} with it"
    fault = f"{text}: it spoils answers" if spoiled - mended > 2 * math.sqrt(spoiled + mended) else ""
    return judged("answers", 2, fault, text, {"samples": len(rows), "before": before, "after": after, "answers": rows})


def _same(answer: str, expected: str) -> bool:
    return answer.strip().rstrip(".").casefold() == expected.strip().rstrip(".").casefold()


def _check_merged(
    adapter: Adapter,
    model: BaseModel,
    kind: type[Subject],
    place: tuple[str, torch.dtype],
    tuned: Sequence[torch.Tensor],
    plain: torch.Tensor,
) -> Finding:
    """The merged model's logits against the tuned one's; the base's distance says what the tolerance is worth."""
    try:
        with _scratch(adapter.directory) as folder:
            merged = merge(adapter.directory, folder / "mgm-2b", base=model.directory)
            if kind is MgmSubject:
                subject: Subject = MgmSubject(merged.output, None, *place, None)
            else:
                subject = TextSubject(merged.output, None, *place)
            found = [subject.logits(), *(subject.logits(number) for number in range(subject.pictures))]
            subject.close()
    except Refused as refusal:
        return Finding("merged", 3, "fail", str(refusal))
    except Exception as error:  # transformers raises whatever it meets, and knows no llava_llama
        sentence = f"merged, but transformers here cannot load it: {_first_line(error)}"
        if is_multimodal(read_config(adapter.directory)):
            return Finding("merged", 3, "not checked", sentence)
        return Finding("merged", 3, "fail", sentence)
    change = max(_difference(one, other) for one, other in zip(tuned, found, strict=True))
    effect, nearest = _difference(tuned[0], plain), _difference(tuned[0], found[0])
    limit = TOLERANCES[merged.dtype]
    figures = {"relative_difference": change, "tolerance": limit, "dtype": merged.dtype, "effect": effect}
    figures["seconds"] = round(merged.seconds, 3)
    text = f"merged in {merged.dtype}, the logits differ by {change:.2g} of their spread (tolerance {limit:.2g}"
    fault = ""
    if not change <= limit:
        fault = f"{text}): it is another model"
    elif effect > limit and nearest >= effect:
        fault = f"{text}), no less than without the adapter: the merge lost it"
    weak = "" if effect > limit else "; the adapter's own effect is smaller, so this proves little"
    return judged("merged", 3, fault, f"{text}; the adapter's effect is {effect:.2g}{weak})", figures)


@contextlib.contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """A folder for a while: beside the adapter, where there is room for models, or where temporary files go."""
    with contextlib.ExitStack() as stack:
        try:
            beside = directory.resolve().parent
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix=".lorapatch-", dir=beside))
        except OSError:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="lorapatch-"))
        yield Path(name)
