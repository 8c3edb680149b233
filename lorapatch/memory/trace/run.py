"""The trace itself: build the model, load it, train two steps, say what was allocated."""

# mypy: allow-untyped-calls
from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorapatch.memory.allocator import WASTEFUL, CachingAllocator, settings
from lorapatch.memory.model import CATEGORIES, Breakdown, RunSetup
from lorapatch.memory.model import Tensor as BigTensor
from lorapatch.memory.trace import optimizers
from lorapatch.memory.trace.cuda import autocast, cublas_workspace, cuda_kernels
from lorapatch.memory.trace.engines.plain import PlainEngine
from lorapatch.memory.trace.engines.zero import ZeroEngine
from lorapatch.memory.trace.engines.zero3 import Zero3Engine
from lorapatch.memory.trace.fake import swap
from lorapatch.memory.trace.recorder import Record, Recorder
from lorapatch.memory.trace.subjects.subject import DTYPES, Subject
from lorapatch.memory.trace.varied import Reserved, Traced, reserved, short_length
from lorapatch.memory.zero import said_of_host

__all__ = ["measure", "trace_subject", "traced_by"]

STEPS = 2  # optimizer states exist from the end of the first step on
BIGGEST = 5
GIB = 1 << 30
NOT_MODELLED = ("workspaces of convolutions and of sorting kernels",)


def measure(setup: RunSetup, architecture: int, capacity: int | None = None) -> Breakdown:
    """Two optimizer steps of the run ``setup`` describes; raises Refused or the trainer's own error.

    ``capacity``: bytes that the allocator may reserve before it gives cached blocks back.
    """
    started = time.monotonic()
    subject = _subject(setup)
    recorder = trace_subject(subject, setup, architecture)
    peak = recorder.alive_at_peak()
    at = recorder.records[recorder.events[recorder.peak_event][1]]
    categories = dict.fromkeys(CATEGORIES, 0)
    for record in peak:
        categories[_category(record, subject)] += record.nbytes
    reserved, advice = _reserved(recorder, setup, capacity)
    biggest = sorted(peak, key=lambda record: -record.nbytes)[:BIGGEST]
    assumed = [*subject.assumed]
    if recorder.questions:
        assumed.append("no sample is padded or packed (the masks were not looked at)")
    if said := optimizers.assumption(setup.optimizer):
        assumed.append(said)
    assumed += said_of_host(recorder.host_held, recorder.host_peak - recorder.host_held, recorder.host_rounding)
    return Breakdown(
        way="trace",
        categories=categories,
        allocated=recorder.peak,
        phases=recorder.phases,
        phase=at.phase,
        operation=at.operation,
        biggest=tuple(BigTensor(r.nbytes, r.shape, str(r.dtype).removeprefix("torch."), r.phase, r.operation) for r in biggest),
        reserved=reserved.expected,
        reserved_high=reserved.high,
        host=recorder.host_held,
        total_parameters=subject.total,
        trainable_parameters=subject.trainable,
        lora_parameters=subject.lora,
        assumed=tuple(assumed),
        advice=advice,
        not_modelled=(*NOT_MODELLED, *subject.not_modelled),
        versions={name: version for name in ("torch", "transformers", "peft") if (version := _version(name))},
        seconds=time.monotonic() - started,
    )


def _reserved(recorder: Recorder, setup: RunSetup, capacity: int | None) -> tuple[Reserved, tuple[str, ...]]:
    """Over micro-batches of all lengths, on a card of that capacity (as recorded where neither matters); advice."""
    once = recorder.allocator.peak_reserved
    short = short_length(setup.lengths, setup.micro_batch)
    limit = capacity if capacity is not None and recorder.peak <= capacity else None  # what is too large stays as it is
    if short is None and (limit is None or once <= limit):
        return Reserved(once, once), ()
    traced = traced_by(recorder)
    lengths = setup.lengths if short is not None else ()
    options = settings(setup.allocator, limit)
    found = reserved(traced, lengths, setup.micro_batch, options)
    if options.expandable_segments or found.expected <= WASTEFUL * recorder.peak:
        return found, ()
    better = reserved(traced, lengths, setup.micro_batch, replace(options, expandable_segments=True), orders=1).expected
    if better * WASTEFUL > found.expected:
        return found, ()
    return found, (
        f"the allocator's memory is fragmented: {found.expected / GIB:.2f} GiB are reserved for "
        f"{recorder.peak / GIB:.2f}; with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it would be {better / GIB:.2f}",
    )


def traced_by(recorder: Recorder) -> Traced:
    """What was recorded, for the replay at other lengths."""
    made_by = [(r.operation, r.phase, r.dtype, len(r.shape)) for r in recorder.records]
    return Traced(recorder.events, recorder.marks, recorder.streams, made_by)


def _category(record: Record, subject: Subject) -> str:
    """Activations as wide as the vocabulary are logits (their gradients, too)."""
    wide = bool(record.shape) and record.shape[-1] == subject.vocabulary and record.dtype.is_floating_point
    return "logits" if wide and record.category == "activations" else record.category


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _subject(setup: RunSetup) -> Subject:
    if setup.trainer == "embedded":
        from lorapatch.memory.trace.subjects import embedded

        return embedded.build(setup)
    if setup.trainer == "upstream":
        from lorapatch.memory.trace.subjects import upstream

        return upstream.build(setup)
    if setup.family == "image_text":
        from lorapatch.memory.trace.subjects import image_text

        return image_text.build(setup)
    from lorapatch.memory.trace.subjects import plain

    return plain.build(setup)


def trace_subject(subject: Subject, setup: RunSetup, architecture: int, mode: Any = None) -> Recorder:
    """Load ``subject``, train it, and give back what was recorded.

    ``mode`` makes its tensors (a FakeTensorMode without it; under nullcontext they are real, and empty at first).
    """
    recorder = Recorder(CachingAllocator(settings(setup.allocator)))
    mode = FakeTensorMode(allow_non_fake_inputs=True) if mode is None else mode
    recorder.computes_known = isinstance(mode, FakeTensorMode)
    with mode, recorder, cuda_kernels(recorder):
        zero = setup.zero
        partitioned = zero is not None and zero.stage == 3 and (setup.gpus > 1 or zero.offload_param)
        # zero.Init hands out shares of each parameter as soon as it is made: the whole model is nowhere
        with recorder.uncounted() if partitioned else contextlib.nullcontext():
            _load([subject.model], recorder, mode)
        if partitioned:
            for buffer in subject.model.buffers():
                recorder.add(buffer, "buffers")
        _load(subject.towers, recorder, mode)
        for holder, name in subject.tensors:
            value = getattr(holder, name)
            object.__setattr__(holder, name, torch.empty(value.shape, dtype=value.dtype))
        engine = _engine(subject, setup, recorder)
        gc.collect()
        _train(subject, setup, engine, recorder, cublas_workspace(architecture))
        recorder.host_held = recorder.host_live
        engine.close()
    return recorder


def _load(modules: list[nn.Module], recorder: Recorder, mode: Any) -> None:
    """The model goes to the GPU, tensor by tensor."""
    for tensor in swap(modules, mode):
        learns = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        frozen = isinstance(tensor, nn.Parameter) or hasattr(tensor, "quantised")
        recorder.add(tensor, "trainable_weights" if learns else "frozen_weights" if frozen else "buffers")
    for record in recorder.records:
        record.operation = "load"


def _engine(subject: Subject, setup: RunSetup, recorder: Recorder) -> Any:
    if setup.zero is None or setup.zero.stage == 0:
        return PlainEngine(recorder, subject.model, setup)
    if setup.zero.stage == 3:
        return Zero3Engine(recorder, subject.model, setup, subject.leaves)
    return ZeroEngine(recorder, subject.model, setup)


def _train(subject: Subject, setup: RunSetup, engine: Any, recorder: Recorder, workspace: int) -> None:
    low = DTYPES[setup.dtype] if setup.zero is None and setup.dtype != "fp32" else None
    recorder.keep(workspace, "cuBLAS")  # one for the thread of the forward pass, one for the engine's
    recorder.keep(workspace, "cuBLAS")
    count = max(setup.accumulation, 1)
    short = short_length(setup.lengths, setup.micro_batch) or setup.sequence
    for step in range(STEPS):
        micro_batches = min(count, 2) if step else 1  # the first step only has to make the states
        length = setup.sequence if step else short
        recorder.mark("inputs", length)
        held = [_inputs(subject, recorder, length) for _ in range(count if subject.batches_at_once else 0)]
        for number in range(micro_batches):
            recorder.mark("micro-batch", length)
            batch = held[number] if held else _inputs(subject, recorder, length)
            recorder.phase = "forward"
            loss = _loss(subject, batch, low)
            del batch
            recorder.phase = "backward"
            engine.backward(loss, boundary=number == micro_batches - 1)
            del loss
        recorder.mark("step")
        recorder.phase = "step"
        recorder.phases["step"] = max(recorder.phases.get("step", 0), recorder.live)
        engine.step()
        del held


def _loss(subject: Subject, batch: dict[str, Tensor], low: torch.dtype | None) -> Tensor:
    with autocast(low):
        outputs = subject.forward(subject.model, batch)
    if low is not None:  # accelerate's convert_outputs_to_fp32, around the whole forward pass
        outputs = {name: _wide(value) for name, value in outputs.items()}
    loss: Tensor = outputs["loss"]
    return loss


def _wide(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value


def _inputs(subject: Subject, recorder: Recorder, length: int) -> dict[str, Tensor]:
    recorder.phase = "forward"
    with recorder.of("activations"):
        return subject.make_batch(length)
