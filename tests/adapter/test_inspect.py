"""An adapter's files are read without torch, and each way to be wrong has its own sentence."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorapatch.adapter.inspect import find_adapter, inspect_adapter
from lorapatch.adapter.tensors import read_tensors
from lorapatch.errors import Refused

torch = pytest.importorskip("torch")
save_file = pytest.importorskip("safetensors.torch").save_file

LAYER = "base_model.model.model.layers.0.self_attn"
CONFIG = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "bias": "none",
    "modules_to_save": None,
}


def good(dtype: Any = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{LAYER}.{name}.lora_{matrix}.weight": torch.randn(shape, generator=generator).to(dtype or torch.float32)
        for name in ("q_proj", "v_proj")
        for matrix, shape in (("A", (4, 16)), ("B", (12, 4)))
    }


def write(directory: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None, binary: bool = False) -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    if binary:
        torch.save(tensors, directory / "adapter_model.bin")
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors"
        )
    return directory


KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_good_adapter_is_counted_and_has_no_problem(tmp_path: Path, dtype: str, binary: bool) -> None:
    tensors = good(getattr(torch, dtype))
    adapter = inspect_adapter(write(tmp_path, tensors, binary=binary))
    assert adapter.problems == () and adapter.base_tensors == ()
    assert (adapter.tensors, adapter.lora_parameters, adapter.rank, adapter.moved) == (4, 224, 4, 2)
    assert adapter.modules == ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
    assert adapter.dtypes == (KINDS[dtype],)
    digest = subprocess.run(["sha256sum", adapter.file], capture_output=True, text=True, check=True).stdout.split()[0]
    assert adapter.sha256 == digest


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
def test_norms_are_torchs(tmp_path: Path, dtype: str, binary: bool) -> None:
    tensors = good(getattr(torch, dtype))
    write(tmp_path, tensors, binary=binary)
    found = read_tensors(tmp_path / ("adapter_model.bin" if binary else "adapter_model.safetensors"))
    for name, tensor in found.items():
        assert tensor.norm() == pytest.approx(tensors[name].double().norm().item(), rel=1e-6)
        assert not tensor.is_zero()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("binary", [False, True])
def test_one_number_that_is_not_finite_is_found(tmp_path: Path, dtype: str, value: float, binary: bool) -> None:
    tensors = good(getattr(torch, dtype))
    tensors[f"{LAYER}.v_proj.lora_A.weight"][3, 7] = value
    problems = inspect_adapter(write(tmp_path, tensors, binary=binary)).problems
    assert problems[0] == f"1 tensor holds NaN or infinity, such as {LAYER}.v_proj.lora_A.weight"


@pytest.mark.parametrize("dtype", KINDS)
def test_the_largest_finite_number_is_finite(tmp_path: Path, dtype: str) -> None:
    kind = getattr(torch, dtype)
    tensors = {
        f"{LAYER}.q_proj.lora_{m}.weight": torch.full(s, torch.finfo(kind).max, dtype=kind)
        for m, s in (("A", (4, 1)), ("B", (1, 4)))
    }
    found = read_tensors(write(tmp_path, tensors) / "adapter_model.safetensors")
    assert all(tensor.is_finite() for tensor in found.values())


def test_an_adapter_whose_b_never_moved_says_so(tmp_path: Path) -> None:
    tensors = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in good().items()}
    adapter = inspect_adapter(write(tmp_path, tensors))
    assert adapter.moved == 0 and "every lora_B is zero" in adapter.problems[0]


def test_zero_threes_empty_tensors_are_found(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(0) for name in good()}
    assert "every tensor is empty: ZeRO-3" in inspect_adapter(write(tmp_path / "all", tensors)).problems[0]
    some = {**good(), f"{LAYER}.q_proj.lora_A.weight": torch.zeros(0)}
    assert "1 tensor is empty" in inspect_adapter(write(tmp_path / "some", some)).problems[0]


def test_parameters_of_the_base_model_are_found(tmp_path: Path) -> None:
    tensors = {**good(), f"{LAYER}.q_proj.weight": torch.ones(2, 2)}
    adapter = inspect_adapter(write(tmp_path, tensors))
    assert adapter.base_tensors == ("model.layers.0.self_attn.q_proj.weight",)
    assert adapter.problems == ("1 tensor is the base model's, such as model.layers.0.self_attn.q_proj.weight",)


def test_biases_saved_modules_and_magnitudes_belong_to_an_adapter_that_says_so(tmp_path: Path) -> None:
    extra = {
        f"{LAYER}.q_proj.bias": torch.ones(2),
        f"{LAYER}.q_proj.lora_magnitude_vector": torch.ones(2),
        "base_model.model.lm_head.weight": torch.ones(2, 2),
    }
    config = {"bias": "all", "modules_to_save": ["lm_head"]}
    assert inspect_adapter(write(tmp_path / "said", {**good(), **extra}, config)).problems == ()
    assert len(inspect_adapter(write(tmp_path / "not", {**good(), **extra})).base_tensors) == 2


def test_a_wrong_rank_and_a_half_pair_are_found(tmp_path: Path) -> None:
    problems = inspect_adapter(write(tmp_path / "r", good(), {"r": 8})).problems
    assert problems == ("model.layers.0.self_attn.q_proj has the ranks 4 and 4, adapter_config.json says 8",)
    half = {name: tensor for name, tensor in good().items() if name != f"{LAYER}.q_proj.lora_B.weight"}
    assert "1 module has only one of lora_A and lora_B" in inspect_adapter(write(tmp_path / "h", half)).problems[0]
    pattern = {"r": 8, "rank_pattern": {"q_proj": 4, "v_proj": 4}}
    assert inspect_adapter(write(tmp_path / "p", good(), pattern)).problems == ()


def test_no_lora_at_all_is_a_problem(tmp_path: Path) -> None:
    assert "no tensor is LoRA's" in inspect_adapter(write(tmp_path, {"lm_head.weight": torch.ones(2)})).problems


def test_transposed_sliced_and_repeated_tensors_are_read_in_their_own_order(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        "whole": whole, "transposed": whole.T, "sliced": whole[1:3, ::2], "repeated": torch.ones(1).expand(3, 2),
        "row": whole[2], "cube": torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1), "half": whole.bfloat16().T,
        "number": torch.tensor(3.0),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "x.bin")
    for name, tensor in read_tensors(tmp_path / "x.bin").items():
        expected = tensors[name].contiguous()
        assert tensor.shape == tuple(expected.shape)
        assert torch.frombuffer(bytearray(tensor.read()), dtype=expected.dtype).tolist() == expected.flatten().tolist()
        assert (tensor.start is None) == (name not in {"whole", "row", "number"})


def test_the_places_of_tensors_are_where_their_bytes_are(tmp_path: Path) -> None:
    for binary, name in ((False, "adapter_model.safetensors"), (True, "adapter_model.bin")):
        content = (write(tmp_path, good(), binary=binary) / name).read_bytes()
        for tensor in read_tensors(tmp_path / name).values():
            assert tensor.start is not None
            assert content[tensor.start : tensor.start + tensor.nbytes] == tensor.read()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
@pytest.mark.parametrize("binary", [False, True])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int, binary: bool) -> None:
    write(tmp_path, good(), binary=binary)
    path = tmp_path / ("adapter_model.bin" if binary else "adapter_model.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Refused, match=r"cut short|damaged"):
        inspect_adapter(tmp_path)


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    write(tmp_path, good())
    path = tmp_path / "adapter_model.safetensors"
    for header in (b"[1]", b"\xff", b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b'{"a": 1}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(Refused, match="damaged"):
            inspect_adapter(tmp_path)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    write(tmp_path, good(), binary=True)
    torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(Refused, match="could run code"):
        inspect_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.save({"x": 1}, tmp_path / "adapter_model.bin")
    with pytest.raises(Refused, match="more than tensors"):
        inspect_adapter(tmp_path)


def test_parameters_in_a_pickle_are_tensors_too(tmp_path: Path) -> None:
    tensors = {name: torch.nn.Parameter(tensor) for name, tensor in good().items()}
    assert inspect_adapter(write(tmp_path, tensors, binary=True)).problems == ()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no adapter"):
        inspect_adapter(tmp_path)
    write(tmp_path, good())
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(Refused, match=r"adapter_config\.json cannot be read"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(Refused, match="is not a JSON object"):
        inspect_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(Refused, match=r"adapter_config\.json is missing"):
        inspect_adapter(tmp_path)


def test_the_last_adapter_of_a_run_is_found(tmp_path: Path) -> None:
    assert find_adapter(tmp_path) is None
    for step in (2, 10, 4):
        write(tmp_path / f"checkpoint-{step}", good())
    assert find_adapter(tmp_path) == tmp_path / "checkpoint-10"
    write(tmp_path, good())
    assert find_adapter(tmp_path) == tmp_path


def test_the_adapter_that_a_merged_model_took_the_place_of_is_found(tmp_path: Path) -> None:
    write(tmp_path / "out-lora", good())
    (tmp_path / "out").mkdir()
    assert find_adapter(tmp_path / "out") is None
    (tmp_path / "out" / "lorapatch_merge.json").write_text(json.dumps({"adapter": "../out-lora"}))
    found = find_adapter(tmp_path / "out")
    assert found is not None and found.resolve() == tmp_path / "out-lora"


def test_it_needs_no_torch() -> None:
    code = "import sys, lorapatch.adapter.inspect; print({'torch', 'numpy', 'safetensors'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
