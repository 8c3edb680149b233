"""The trace: bytes counted by hand, the same run really made on the CPU, exact numbers of parameters."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import IMAGE_TEXT, ZERO2, ZERO3, folder, mgm_run, text_run, true_mgm_run  # noqa: E402

from lorapatch.memory import towers  # noqa: E402
from lorapatch.memory.closed_form import closed_form  # noqa: E402
from lorapatch.memory.model import CATEGORIES, LoraSetup, RunSetup  # noqa: E402
from lorapatch.memory.parameters import parts_of  # noqa: E402
from lorapatch.memory.trace.engines.zero3 import Zero3Engine  # noqa: E402
from lorapatch.memory.trace.recorder import Recorder  # noqa: E402
from lorapatch.memory.trace.run import measure, trace_subject  # noqa: E402
from lorapatch.memory.trace.subjects import embedded, image_text, plain, upstream  # noqa: E402

WORKSPACES = 2 * 32 * (1 << 20)  # cuBLAS on Hopper, for two threads
HIDDEN, INTER, VOCABULARY, LAYERS, RANK = 64, 128, 512, 2, 4
KEYS = 32  # two groups of 16
LINEARS = [
    (HIDDEN, HIDDEN),
    (KEYS, HIDDEN),
    (KEYS, HIDDEN),
    (HIDDEN, HIDDEN),
    (INTER, HIDDEN),
    (INTER, HIDDEN),
    (HIDDEN, INTER),
]


def block(elements: int, width: int) -> int:
    return -(-elements * width // 512) * 512


FROZEN = [out * into for out, into in LINEARS] * LAYERS + [HIDDEN] * (2 * LAYERS + 1) + [VOCABULARY * HIDDEN] * 2
ADAPTER = [n for out, into in LINEARS for n in (RANK * into, out * RANK)] * LAYERS


def live_before_backward(recorder: Recorder) -> list[Any]:
    """What lives when the last backward pass begins."""
    begin = max(r.born for r in recorder.records if r.phase == "backward" and r.operation.startswith("ones_like"))
    return [r for r in recorder.records if r.born < begin and (r.died is None or r.died > begin)]


def record(setup: RunSetup, subject: Any = None, mode: Any = None) -> Recorder:
    built = subject or (embedded if setup.trainer == "embedded" else plain).build(setup)
    return trace_subject(built, setup, 90, mode)


def test_weights_and_states_of_a_lora_run_are_counted_to_the_byte(tmp_path: Path) -> None:
    found = measure(text_run(tmp_path), 90)
    assert found.categories["frozen_weights"] == sum(block(n, 2) for n in FROZEN)
    assert found.categories["trainable_weights"] == sum(block(n, 4) for n in ADAPTER)  # PEFT's float32
    assert found.categories["optimizer_states"] == sum(2 * block(n, 4) + 512 for n in ADAPTER)  # m, v and a step
    assert found.categories["gradients"] == sum(block(n, 4) for n in ADAPTER)
    assert found.categories["master_copies"] == 0
    assert found.total_parameters == sum(FROZEN) + sum(ADAPTER)
    assert found.trainable_parameters == found.lora_parameters == sum(ADAPTER)


def test_masters_states_and_gradients_of_zero_2_are_counted_to_the_byte(tmp_path: Path) -> None:
    found = measure(text_run(tmp_path, zero=ZERO2, optimizer="adamw_torch"), 90)
    assert found.categories["trainable_weights"] == block(sum(ADAPTER), 2)
    assert found.categories["master_copies"] == block(sum(ADAPTER), 4)
    assert found.categories["optimizer_states"] == 2 * block(sum(ADAPTER), 4)


def test_full_tuning_under_zero_2_keeps_both_groups_gradients_while_the_first_is_stepped(tmp_path: Path) -> None:
    found = measure(text_run(tmp_path, method="full", lora=None, zero=ZERO2, optimizer="adamw_torch", sequence=4), 90)
    matrices, vectors = sum(n for n in FROZEN if n != HIDDEN), HIDDEN * (2 * LAYERS + 1)
    assert found.phase == "step"
    assert found.operation.startswith("_foreach_sqrt")
    assert found.categories["master_copies"] == block(matrices, 4) + block(vectors, 4)
    assert found.categories["optimizer_states"] == 2 * (block(matrices, 4) + block(vectors, 4))
    # 16-bit gradients of both groups (the second holds them), the first group's float32 copy
    assert found.categories["gradients"] == block(matrices + vectors, 2) + block(matrices, 4)


def test_checkpoints_and_logits_are_counted_to_the_byte(tmp_path: Path) -> None:
    setup = text_run(tmp_path, zero=ZERO2)
    recorder = record(setup)
    rows = setup.micro_batch * setup.sequence
    kept = live_before_backward(recorder)
    hidden = [r for r in kept if r.shape == (2, 32, HIDDEN)]
    # One checkpoint for each layer's input, and the float32 copy that the final norm keeps of the last one's output.
    assert sum(r.nbytes for r in hidden if r.dtype == torch.bfloat16) == LAYERS * block(rows * HIDDEN, 2)
    assert sum(r.nbytes for r in hidden if r.dtype == torch.float32) == block(rows * HIDDEN, 4)
    logits = [r for r in kept if r.shape and r.shape[-1] == VOCABULARY]
    assert [r.nbytes for r in logits] == [block(rows * VOCABULARY, 4)]  # the log-softmax, in float32


def test_without_checkpointing_every_layer_keeps_its_activations(tmp_path: Path) -> None:
    with_them = measure(text_run(tmp_path, sequence=128), 90)
    without = measure(text_run(tmp_path, sequence=128, gradient_checkpointing=False), 90)
    assert without.categories["activations"] > 2 * with_them.categories["activations"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": False},
        {"zero": ZERO2, "use_reentrant": True},
        {"zero": ZERO2, "method": "full", "lora": None, "optimizer": "adamw_torch"},
        {"zero": ZERO3, "method": "full", "lora": None},
    ],
)
def test_a_real_run_on_the_cpu_allocates_what_the_trace_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    setup = text_run(tmp_path, **changes)

    def recorded(mode: Any) -> Recorder:
        subject = plain.build(setup)
        subject.make_batch = lambda length: {
            name: torch.ones((2, 32), dtype=torch.long) for name in ("input_ids", "labels", "attention_mask")
        }
        return record(setup, subject, mode)

    fake, real = recorded(None), recorded(contextlib.nullcontext())
    assert fake.phases == real.phases
    assert (fake.peak, fake.allocator.peak_reserved) == (real.peak, real.allocator.peak_reserved)


@pytest.mark.parametrize(
    ("method", "zero"),
    [
        ("lora", ZERO2),
        ("lora", ZERO3),
        ("lora", None),
        ("full", None),
        ("full", replace(ZERO2, stage=1)),
        ("full", replace(ZERO2, offload_optimizer=True)),
        ("pretrain", ZERO2),
    ],
)
def test_the_categories_of_the_peak_add_up_to_what_is_allocated(tmp_path: Path, method: str, zero: Any) -> None:
    setup = mgm_run(tmp_path, zero=zero, method=method, lora=LoraSetup(r=4) if method == "lora" else None)
    found = measure(setup, 90)
    assert set(found.categories) == set(CATEGORIES)
    assert sum(found.categories.values()) == found.allocated == max(found.phases.values())
    assert set(found.phases) == {"load", "forward", "backward", "step"}
    assert found.reserved is not None
    assert found.reserved >= found.allocated > WORKSPACES
    assert len(found.biggest) == 5


def test_what_is_offloaded_lies_in_host_memory(tmp_path: Path) -> None:
    at_home = measure(mgm_run(tmp_path, method="full", lora=None), 90)
    away = measure(mgm_run(tmp_path, method="full", lora=None, zero=replace(ZERO2, offload_optimizer=True)), 90)
    assert away.categories["master_copies"] == away.categories["optimizer_states"] == 0
    assert at_home.host == 0
    assert away.allocated < at_home.allocated - 16 * away.trainable_parameters


def test_pinned_buffers_are_rounded_up_to_powers_of_two(tmp_path: Path) -> None:
    def rounding(pinned: bool) -> int:
        zero = replace(ZERO2, offload_optimizer=True, pin_memory=pinned)
        return record(text_run(tmp_path, zero=zero, method="full", lora=None, accumulation=1)).host_rounding

    matrices, vectors = sum(n for n in FROZEN if n != HIDDEN), HIDDEN * (2 * LAYERS + 1)
    buffers = [4 * n for n in (matrices, vectors)] * 2 + [2 * n for n in (matrices, vectors, VOCABULARY * HIDDEN)]
    # masters and gradients in float32, parameters and the largest gradient in 16 bits; not the optimizer's moments
    assert rounding(True) == sum((1 << (size - 1).bit_length()) - size for size in buffers) > 0
    assert rounding(False) == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_host_memory_of_offloaded_states_is_counted_to_the_byte(tmp_path: Path, accumulation: int) -> None:
    changes = {"method": "full", "lora": None, "optimizer": "adamw_torch", "accumulation": accumulation}
    whole, largest = sum(FROZEN), VOCABULARY * HIDDEN
    two = measure(text_run(tmp_path, zero=replace(ZERO2, offload_optimizer=True), **changes), 90)
    # masters, gradients, two moments in float32, the 16-bit parameters and one gradient; the gradients that add up
    assert two.host == 18 * whole + 2 * largest + (2 * whole if accumulation > 1 else 0)
    one = measure(text_run(tmp_path, zero=replace(ZERO2, stage=1, offload_optimizer=True), **changes), 90)
    assert one.host == 18 * whole + 2 * largest  # ZeRO-1 accumulates on the GPU
    three = measure(text_run(tmp_path, zero=replace(ZERO3, offload_optimizer=True), **changes), 90)
    assert three.host == 18 * whole  # no 16-bit parameters, all gradients
    both = measure(text_run(tmp_path, zero=replace(ZERO3, offload_optimizer=True, offload_param=True), **changes), 90)
    assert both.host == 20 * whole


def test_adamw_on_the_cpu_takes_twice_its_largest_group_while_it_steps(tmp_path: Path) -> None:
    zero = replace(ZERO2, offload_optimizer=True)
    setup = text_run(tmp_path, zero=zero, method="full", lora=None, optimizer="adamw_torch")
    recorder = record(setup)
    matrices = sum(n for n in FROZEN if n != HIDDEN)
    assert recorder.host_peak - recorder.host_held == 2 * 4 * matrices  # the denominator's square root and its quotient
    assert any("while the optimizer steps on the CPU" in said for said in measure(setup, 90).assumed)
    fused = record(replace(setup, optimizer="adamw_torch_fused"))
    assert fused.host_peak == fused.host_held


def test_the_whole_model_lies_nowhere_while_shares_of_it_are_made(tmp_path: Path) -> None:
    assert measure(text_run(tmp_path, zero=ZERO3, gpus=2), 90).host == 0
    half = measure(text_run(tmp_path, zero=replace(ZERO3, offload_param=True), gpus=2), 90)
    assert half.host == 2 * (sum(FROZEN) + sum(ADAPTER)) // 2


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize(("stage", "param"), [(1, False), (2, False), (3, False), (3, True)])
def test_both_ways_count_the_same_host_memory(
    tmp_path: Path, method: str, accumulation: int, gpus: int, stage: int, param: bool
) -> None:
    zero = replace(ZERO3 if stage == 3 else ZERO2, stage=stage, offload_optimizer=True, offload_param=param)
    setup = mgm_run(tmp_path, zero=zero, method=method, lora=LoraSetup(r=4) if method == "lora" else None,
                    accumulation=accumulation, gpus=gpus)  # fmt: skip
    assert closed_form(setup).host == pytest.approx(measure(setup, 90).host, rel=0.03)


def test_several_gpus_hold_a_share_each(tmp_path: Path) -> None:
    one, four = (measure(mgm_run(tmp_path, method="full", lora=None, gpus=n), 90) for n in (1, 4))
    assert four.categories["master_copies"] == pytest.approx(one.categories["master_copies"] / 4, abs=1024)
    parts = [measure(text_run(tmp_path, method="full", lora=None, zero=ZERO3, gpus=n), 90) for n in (1, 4)]
    assert parts[1].categories["trainable_weights"] < parts[0].categories["trainable_weights"] / 2
    assert parts[1].categories["master_copies"] == pytest.approx(parts[0].categories["master_copies"] / 4, abs=2048)


@pytest.mark.parametrize("method", ["lora", "full", "pretrain"])
@pytest.mark.parametrize("changes", [{"gpus": 2}, {"zero": replace(ZERO3, offload_param=True, offload_optimizer=True)}])
def test_the_embedded_trainers_projectors_are_gathered_whole(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    lora = LoraSetup(r=4) if method == "lora" else None
    found = measure(mgm_run(tmp_path, **{"zero": ZERO3, "method": method, "lora": lora} | changes), 90)
    assert sum(found.categories.values()) == found.allocated


def test_an_offloaded_gradient_takes_its_way_over_the_gpu(tmp_path: Path) -> None:
    zero = replace(ZERO3, offload_param=True, offload_optimizer=True)
    largest = VOCABULARY * HIDDEN
    made = [
        r.nbytes
        for r in record(text_run(tmp_path, zero=zero, method="full", lora=None)).records
        if r.category == "gradients" and r.phase == "backward"
    ]
    # itself and its copy in each of three micro-batches; its norm and its float32 before the two steps
    for width, micro_batches in ((8, 2), (4, 2)):
        assert made.count(block(largest, width)) == 2 * micro_batches  # the embedding's and the head's
    assert made.count(block(largest, 2)) >= 2 * 3


def test_a_leaf_gathers_for_its_children_and_is_reduced_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pair(torch.nn.Sequential):
        pass

    order: list[str] = []
    monkeypatch.setattr(Zero3Engine, "_reduce_leaf", lambda *_: order.append("leaf"))
    leaf, before = Pair(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)), torch.nn.Linear(16, 16)
    with Recorder() as recorder:
        engine = Zero3Engine(recorder, torch.nn.Sequential(before, leaf), text_run(tmp_path, zero=ZERO3, gpus=2), (Pair,))
        assert not any(linear._forward_pre_hooks or linear._backward_hooks for linear in leaf)
        shapes: list[Any] = []
        leaf.register_forward_pre_hook(lambda *_: shapes.append([tuple(p.shape) for p in leaf.parameters()]))
        leaf[0].register_full_backward_hook(lambda *_: order.append("its first child"))
        leaf(before(torch.ones(1, 16))).sum().backward()
        engine.close()
    assert shapes == [[(16, 16), (16,), (16, 16), (16,)]]
    assert order == ["its first child", "leaf"]


@pytest.mark.parametrize(("bits", "width"), [(4, 0.5), (8, 1)])
def test_packed_weights_take_their_bits_and_their_scales(tmp_path: Path, bits: int, width: float) -> None:
    found = measure(text_run(tmp_path, bits=bits, double_quant=False), 90)
    sizes = [out * into for out, into in LINEARS] * LAYERS
    scales = [n // 64 for n in sizes] if bits == 4 else [out for out, _ in LINEARS] * LAYERS
    packed = sum(block(int(n * width), 1) for n in sizes) + sum(block(n, 4) for n in scales)
    packed += len(sizes) * 512 if bits == 4 else 0  # the 16 values of a 4-bit number
    whole = sum(block(n, 4) for n in FROZEN if n == HIDDEN or n == VOCABULARY * HIDDEN)  # made float32 by PEFT
    assert found.categories["frozen_weights"] == packed + whole
    assert found.total_parameters == sum(FROZEN) + sum(ADAPTER)


def test_double_quantisation_keeps_the_scales_in_a_byte(tmp_path: Path) -> None:
    once, twice = (measure(text_run(tmp_path, bits=4, double_quant=d), 90) for d in (False, True))
    assert twice.total_parameters == once.total_parameters
    assert twice.allocated != once.allocated


def test_the_embedded_trainer_makes_logits_for_labels_alone_and_upstream_for_every_position(tmp_path: Path) -> None:
    few = record(mgm_run(tmp_path))
    rows = {r.shape[0] for r in few.records if len(r.shape) == 2 and r.shape[-1] == 512 and r.phase != "load"}
    assert rows == {2 * 8}
    setup = mgm_run(tmp_path, trainer="upstream")
    every = record(setup, upstream.build(setup))
    assert any(r.shape == (2, 48, 512) or r.shape == (2 * 48, 512) for r in every.records)


@pytest.mark.parametrize("kind", ["llava", "paligemma", "qwen2_vl"])
def test_image_text_models_are_traced_with_their_towers(tmp_path: Path, kind: str) -> None:
    setup = text_run(tmp_path, family="image_text", model=folder(tmp_path / kind, IMAGE_TEXT[kind]), sequence=64)
    found = measure(setup, 90)
    assert sum(found.categories.values()) == found.allocated
    assert found.lora_parameters == 2 * sum(RANK * (out + into) for out, into in lora_shapes(kind))
    assert any("images are" in said for said in found.assumed)
    more = measure(replace(setup, images=2), 90)
    assert more.categories["activations"] > found.categories["activations"]


@pytest.mark.parametrize("size", [448, 224])
def test_an_image_of_any_size_is_as_many_tokens_as_the_trace_has_patches_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    for module in (towers, image_text):
        monkeypatch.setattr(module, "ANY_SIZE", size)
    setup = text_run(tmp_path, family="image_text", model=folder(tmp_path / "model", IMAGE_TEXT["qwen2_vl"]), images=3)
    config = plain.read_config(setup)
    pixels = image_text._pixels(config, setup)
    patches = [time * rows * columns for time, rows, columns in pixels["grid"]]
    tokens = towers.vision_of(IMAGE_TEXT["qwen2_vl"], "").tokens
    assert tokens == (size // 28) ** 2  # 14 pixels a patch, 2 x 2 patches a token
    assert patches == [4 * tokens] * setup.micro_batch * 3 and pixels["shape"][0] == sum(patches)


@pytest.mark.parametrize("kind", list(IMAGE_TEXT))
@pytest.mark.parametrize("method", ["lora", "full"])
def test_both_ways_count_the_same_parameters_of_image_text_models(tmp_path: Path, kind: str, method: str) -> None:
    lora = LoraSetup(r=4) if method == "lora" else None
    model = folder(tmp_path / kind, IMAGE_TEXT[kind])
    setup = text_run(tmp_path, family="image_text", model=model, method=method, lora=lora)
    counted, built = parts_of(setup), image_text.build(setup)
    assert (counted.total, counted.trainable, counted.lora) == (built.total, built.trainable, built.lora)
    assert counted.notes == ()


def lora_shapes(kind: str) -> list[tuple[int, int]]:
    """The language model's linear layers (of one layer of two), whatever the tower's are called."""
    keys = 16 if kind == "paligemma" else KEYS
    return [(keys, into) if out == KEYS else (out, into) for out, into in LINEARS]


def test_mgm_2b_has_its_exact_number_of_parameters(tmp_path: Path) -> None:
    everywhere = embedded.build(true_mgm_run(tmp_path))
    assert (everywhere.total - everywhere.lora, everywhere.lora) == (3_019_166_144, 19_611_648)
    assert everywhere.trainable == 32_870_656
    some = embedded.build(true_mgm_run(tmp_path, lora=LoraSetup(target_modules="q_proj,v_proj,o_proj")))
    assert some.lora == 3_022_848
    theirs = upstream.build(true_mgm_run(tmp_path, trainer="upstream"))
    assert (theirs.total - theirs.lora, theirs.lora) == (3_019_166_144, 19_611_648)


def test_a_longer_sample_takes_more_and_so_does_a_larger_micro_batch(tmp_path: Path) -> None:
    base, longer, more = (
        measure(mgm_run(tmp_path, gradient_checkpointing=False, **changes), 90).categories["activations"]
        for changes in ({}, {"sequence": 96}, {"micro_batch": 4})
    )
    assert base < longer
    assert base < more


@pytest.mark.parametrize(
    "name", ["adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd"]
)
def test_optimizers_differ_in_their_states(tmp_path: Path, name: str) -> None:
    setup = text_run(tmp_path, method="full", lora=None, optimizer=name)
    recorder = record(setup)
    states = sum(r.nbytes for r in recorder.records if r.category == "optimizer_states")
    whole = sum(block(n, 2) for n in FROZEN)  # states of bfloat16 parameters are bfloat16
    if name in ("adamw_torch", "adamw_hf"):
        assert states == 2 * whole
    elif name == "adamw_torch_fused":
        assert states == 2 * whole + 512 * len(FROZEN)
    elif name in ("sgd", "paged_adamw_8bit"):
        assert states == 0
    else:
        assert 0 < states < 2 * whole
    assert (recorder.host_held > 0) == (name == "paged_adamw_8bit")


def test_an_unknown_optimizer_is_taken_for_adamw_and_said(tmp_path: Path) -> None:
    found = measure(text_run(tmp_path, optimizer="galore_adamw"), 90)
    assert "the optimizer galore_adamw is counted as AdamW" in found.assumed


def test_the_cublas_workspace_depends_on_the_card(tmp_path: Path) -> None:
    hopper, ampere = (measure(text_run(tmp_path), capability) for capability in (90, 80))
    assert hopper.categories["buffers"] - ampere.categories["buffers"] == WORKSPACES - 2 * (8 * (1 << 20) + 128 * 1024)
