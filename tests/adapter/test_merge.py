"""A merged model is PEFT's to the bit, is laid out as loaders want it, and appears at once or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    FAMILIES,
    edit_config,
    load_base,
    make_adapter,
    make_base,
    make_partly_trained,
    merged_by_peft,
    rewrite,
    tensors_of,
)  # fmt: skip

from lorapatch.adapter import merge as merge_module
from lorapatch.adapter import shards
from lorapatch.adapter.base_model import BaseModel, shapes_by_config
from lorapatch.adapter.inspect import find_adapter
from lorapatch.adapter.merge import merge
from lorapatch.adapter.shards import bytes_of
from lorapatch.adapter.tensors import read_tensors
from lorapatch.errors import Refused, UsageError

Make = Callable[..., Path]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ALL},
    "LoRA, alpha no power of two": {"lora_alpha": 3},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}},
    "bias": {"bias": "all"},
    "bias of LoRA's modules": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
}
SPLIT_AGAIN = ("PiSSA", "OLoRA")  # PEFT rounds their base to its type once more


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Every tensor of ``theirs`` in ``ours``, to the bit; a tied head may be left out."""
    for name, tensor in theirs.items():
        if name not in ours:
            assert torch.equal(tensor, theirs["model.embed_tokens.weight"]), name
            continue
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert not set(ours) - set(theirs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_has_the_bits_of_peft(family: str, variant: str, bases: Make, tmp_path: Path) -> None:
    base = bases(family)
    adapter = make_adapter(tmp_path / "adapter", base, **VARIANTS[variant])
    merge(adapter, tmp_path / "out")
    same(tensors_of(tmp_path / "out"), merged_by_peft(base, adapter))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_rounded_once(family: str, variant: str, bases: Make, tmp_path: Path) -> None:
    base = bases(family, "bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base, **VARIANTS[variant])
    merge(adapter, tmp_path / "out")
    ours, theirs = tensors_of(tmp_path / "out"), merged_by_peft(base, adapter)
    if variant not in SPLIT_AGAIN:
        same(ours, theirs)
        return
    for name, tensor in ours.items():  # their two roundings against our one: at most two units in the last place
        unit = 2.0 ** (torch.floor(torch.log2(theirs[name].float().abs().clamp_min(1e-3))) - 7)
        assert ((tensor.float() - theirs[name].float()).abs() <= 2 * unit.clamp_min(2**-10)).all(), name


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"lora_bias": True, "lora_alpha": 3}])
def test_the_bias_of_lora_b_goes_into_the_bias(options: dict[str, Any], bases: Make, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        base = bases("qwen2", dtype)
        adapter = make_adapter(tmp_path / dtype, base, target_modules=["q_proj", "v_proj"], **options)
        merge(adapter, tmp_path / f"out-{dtype}")
        same(tensors_of(tmp_path / f"out-{dtype}"), merged_by_peft(base, adapter))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_trained_beside_lora_is_in_the_merged_model(family: str, bases: Make, tmp_path: Path) -> None:
    live = make_partly_trained(tmp_path / "adapter", bases(family))
    merge(tmp_path / "adapter", tmp_path / "out")
    assert set(tensors_of(tmp_path / "out")) == set(tensors_of(bases(family)))
    ids = torch.arange(12)[None]
    with torch.no_grad(), live.disable_adapter():
        without = live(input_ids=ids).logits
    with torch.no_grad():
        whole, merged = live(input_ids=ids).logits, load_base(tmp_path / "out")(input_ids=ids).logits
    assert torch.allclose(merged, whole, atol=1e-5) and not torch.allclose(merged, without, atol=1e-3)


def test_true_widths_have_the_bits_of_peft_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorapatch.adapter.inspect import Pair
    from lorapatch.adapter.settings import Settings
    from lorapatch.adapter.update import Update

    generator = torch.Generator().manual_seed(3)
    for out, size in ((1536, 8960), (2048, 2048), (256, 2048), (1000, 37)):
        a, b = torch.randn(16, size, generator=generator), torch.randn(out, 16, generator=generator)
        weight = torch.randn(out, size, generator=generator)
        rewrite(tmp_path, {"m.lora_A.weight": a, "m.lora_B.weight": b})
        read = read_tensors(tmp_path / "adapter_model.safetensors")
        pair = Pair("m", read["m.lora_A.weight"], read["m.lora_B.weight"])
        update = Update(pair, Settings({"r": 16, "lora_alpha": 24}))
        expected = weight + (b @ a) * 1.5
        for step in (out, 128, 61):
            parts = [update.rows(weight[first : first + step], first) for first in range(0, out, step)]
            assert torch.equal(torch.cat(parts), expected), (out, size, step)


@pytest.mark.parametrize("shard_size", ["5KB", "20KB", "1GB"])
@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_layout_of_the_base_gives_the_same_model(
    sharded: bool, binary: bool, shard_size: str, bases: Make, good: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tensors = tensors_of(bases())
    base.mkdir()
    shutil.copy(bases() / "config.json", base)
    names = list(tensors)
    parts = [names[::2], names[1::2]] if sharded else [names]
    ending, stem = ("bin", "pytorch_model") if binary else ("safetensors", "model")
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-0000{number}-of-00002.{ending}" if sharded else f"{stem}.{ending}"
        rewrite(tmp_path, {name: tensors[name] for name in part}, binary)
        shutil.move(tmp_path / f"adapter_model.{ending}", base / file)
        weight_map.update(dict.fromkeys(part, file))
    if sharded:
        (base / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = merge(good, tmp_path / "out", base=base, shard_size=shard_size)
    same(tensors_of(tmp_path / "out"), merged_by_peft(bases(), good))
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) == done.shards
    for file in files:
        content = read_tensors(file)
        assert sum(t.nbytes for t in content.values()) <= bytes_of(shard_size) or len(content) == 1


def test_adapters_of_the_old_format_and_tensors_that_lie_across_are_read_right(
    bases: Make, good: Path, adapter: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(bases() / "config.json", base)
    across = {name: x.T.contiguous().T if x.ndim == 2 else x for name, x in tensors_of(bases()).items()}
    assert not across["lm_head.weight"].is_contiguous()
    torch.save(across, base / "pytorch_model.bin")
    rewrite(adapter, tensors_of(good), binary=True)
    merge(adapter, tmp_path / "out", base=base)
    same(tensors_of(tmp_path / "out"), merged_by_peft(bases(), good))


def test_the_index_names_every_tensor_even_for_one_shard_and_transformers_loads_it(good: Path, tmp_path: Path) -> None:
    done = merge(good, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert done.shards == 1 and set(index["weight_map"].values()) == {"model-00001-of-00001.safetensors"}
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "out"))
    assert index["metadata"]["total_size"] == done.bytes == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    model = load_base(tmp_path / "out")
    assert torch.equal(
        model.model.layers[0].self_attn.q_proj.weight,
        tensors_of(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"],
    )


@pytest.mark.parametrize(
    ("word", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_the_type_is_chosen(word: str, dtype: torch.dtype, bases: Make, tmp_path: Path) -> None:
    base = bases("llama", "bfloat16")
    adapter = make_adapter(tmp_path / "adapter", base)
    done = merge(adapter, tmp_path / "out", dtype=word)
    ours = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    assert json.loads((done.output / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    merge(adapter, tmp_path / "exact", dtype="fp32")
    for name, tensor in tensors_of(tmp_path / "exact").items():
        assert torch.equal(ours[name], tensor.to(dtype)), name


def test_numbers_too_large_for_fp16_are_refused_and_nothing_is_left(bases: Make, good: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="bfloat16")
    tensors = tensors_of(base)
    tensors["model.norm.weight"][0] = 1e5
    rewrite(base, tensors)
    shutil.move(base / "adapter_model.safetensors", base / "model.safetensors")
    with pytest.raises(Refused, match=r"model\.norm\.weight has numbers that fp16 cannot hold: merge to bf16 or fp32"):
        merge(good, tmp_path / "out", base=base, dtype="fp16")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ],
    ids=str,
)
def test_tied_embeddings_part_where_training_changed_one_of_them(
    options: dict[str, Any], bases: Make, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = bases("gemma")
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    done = merge(adapter, tmp_path / "out")
    assert json.loads((done.output / "config.json").read_text())["tie_word_embeddings"] is False
    assert "no longer one tensor" in done.warnings[0]
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(load_base(base), str(adapter))(input_ids=ids).logits
        assert torch.allclose(load_base(done.output)(input_ids=ids).logits, tuned, atol=1e-5)


def test_tied_embeddings_stay_one_tensor_otherwise(bases: Make, tmp_path: Path) -> None:
    done = merge(make_adapter(tmp_path / "adapter", bases("gemma")), tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(done.output) and done.warnings == ()
    assert json.loads((done.output / "config.json").read_text()).get("tie_word_embeddings", True)


def test_embeddings_resized_in_training_are_written_with_their_new_size(bases: Make, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = load_base(bases())
    model.resize_token_embeddings(100)
    tuned = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    )
    torch.nn.init.normal_(tuned.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    done = merge(tmp_path / "adapter", tmp_path / "out", base=bases())
    assert json.loads((done.output / "config.json").read_text())["vocab_size"] == 100
    assert load_base(done.output).lm_head.weight.shape == (100, 32)


def test_an_mgm_model_has_what_upstreams_loader_wants(mgm_made: tuple[Any, Path], mgm: Path, tmp_path: Path) -> None:
    done = merge(mgm, tmp_path / "MGM-2B-merged", shard_size="100KB")
    assert done.warnings == () and done.changed == 6
    tensors = tensors_of(done.output)
    bridge = torch.load(mgm / "non_lora_trainables.bin")
    for name, tensor in bridge.items():
        assert torch.equal(tensors[name.removeprefix("base_model.model.")], tensor)
    index = json.loads((done.output / "model.safetensors.index.json").read_text())["weight_map"]
    homes = {file for name, file in index.items() if "vlm_uni" in name or "mm_projector" in name}
    assert len(homes) == 1 and len(set(index.values())) > 2
    config = json.loads((done.output / "config.json").read_text())
    own = json.loads((mgm / "config.json").read_text())
    assert config["model_type"] == "mgm_gemma" and {k for k in own if k.startswith("mm_")} <= set(config)
    assert (done.output / "tokenizer.json").read_bytes() == (mgm / "tokenizer.json").read_bytes()
    assert not (done.output / "adapter_config.json").exists()  # transformers would load it on top


def test_the_tokenizer_is_the_bases_unless_training_added_tokens(mgm: Path, tmp_path: Path) -> None:
    base = Path(json.loads((mgm / "adapter_config.json").read_text())["base_model_name_or_path"])
    ours = json.loads((mgm / "tokenizer.json").read_text())
    newer = json.dumps(ours | {"written by": "newer libraries"})
    (mgm / "tokenizer.json").write_text(newer)
    same = merge(mgm, tmp_path / "mgm-2b-same").output
    assert (same / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    ours["added_tokens"].append({"id": 9999, "content": "<new>", "special": True})
    (mgm / "tokenizer.json").write_text(json.dumps(ours))
    changed = merge(mgm, tmp_path / "mgm-2b-changed").output
    assert (changed / "tokenizer.json").read_bytes() == (mgm / "tokenizer.json").read_bytes()
    (mgm / "tokenizer.json").write_text("{")
    assert (merge(mgm, tmp_path / "mgm-2b-odd").output / "tokenizer.json").read_text() == "{"


def test_the_towers_of_a_whole_mgm_base_share_the_shard_of_the_bridge(mgm: Path, tmp_path: Path) -> None:
    from lorapatch.trainer.model import load_model, mgm_config
    from lorapatch.trainer.saving import RunKind, save

    class NoTokenizer:
        def save_pretrained(self, folder: str) -> None:
            pass

    config = mgm_config(mgm)
    config.name_or_path = json.loads((mgm / "adapter_config.json").read_text())["base_model_name_or_path"]
    save(load_model(config), NoTokenizer(), RunKind.of("full"), tmp_path / "whole", writer=True)
    done = merge(mgm, tmp_path / "MGM-2B-merged", base=tmp_path / "whole", shard_size="50KB")
    index = json.loads((done.output / "model.safetensors.index.json").read_text())["weight_map"]
    homes = {file for name, file in index.items() if "vision_tower.vision_tower." in name or "vlm_uni" in name}
    assert len(homes) == 1 and any("vision_tower_aux" in name for name in index)


def test_names_and_towers_that_upstreams_loader_would_miss_are_warned_of(mgm: Path, tmp_path: Path) -> None:
    config = json.loads((mgm / "config.json").read_text())
    (mgm / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "/nowhere/clip"}))
    warnings = merge(mgm, tmp_path / "my-model").warnings
    assert warnings[0].startswith('upstream\'s loader looks for "mgm" and "2b" in the name of the folder')
    assert "mm_vision_tower /nowhere/clip is no folder here" in warnings[1]
    assert not merge(mgm, tmp_path / "mgm-2b", base=None).warnings[1:]


def test_a_quantised_run_leaves_no_quantisation_in_the_merged_config(mgm: Path, tmp_path: Path) -> None:
    config = json.loads((mgm / "config.json").read_text())
    (mgm / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    done = merge(mgm, tmp_path / "mgm-2b")
    assert "quantization_config" not in json.loads((done.output / "config.json").read_text())


def test_in_its_own_place_the_adapter_is_kept_beside(adapter: Path) -> None:
    (adapter / "train.log").write_text("loss")
    (adapter / "checkpoint-2").mkdir()
    before = {path.name for path in adapter.iterdir()}
    done = merge(adapter, f"{adapter}/.")
    assert done.kept == adapter.with_name("adapter-lora") and done.output == adapter
    assert {path.name for path in done.kept.iterdir()} == before
    assert load_base(adapter).config.model_type == "llama"
    found = find_adapter(adapter)
    assert found is not None and found.resolve() == done.kept


def test_a_script_that_runs_again_leaves_the_new_model_and_both_adapters(good: Path, adapter: Path) -> None:
    first = merge(adapter, adapter)
    for path in good.iterdir():  # the next training writes into the same folder
        shutil.copy(path, adapter)
    second = merge(adapter, adapter)
    assert second.kept == adapter.with_name("adapter-lora.1")
    assert {path.name for path in second.kept.iterdir()} >= {path.name for path in good.iterdir()}
    assert not list(second.kept.glob("model-*.safetensors")) and not (second.kept / "lorapatch_merge.json").exists()
    assert first.kept is not None and find_adapter(first.kept) == first.kept
    assert list(adapter.glob("model-*.safetensors"))


def test_in_place_through_a_symbolic_link_the_link_stays(adapter: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(adapter)
    done = merge(link, link)
    assert link.is_symlink() and done.output == adapter and (link / "config.json").is_file()


def test_a_merged_folder_is_no_adapter(adapter: Path) -> None:
    merge(adapter, adapter)
    with pytest.raises(Refused, match="holds no adapter"):
        merge(adapter, adapter)


def test_a_training_that_did_not_end_is_not_merged_from_its_checkpoint(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "out" / "checkpoint-4")
    with pytest.raises(Refused, match="holds no adapter, so its training did not end; checkpoint-4 in it has one"):
        merge(tmp_path / "out", tmp_path / "out")
    assert merge(tmp_path / "out" / "checkpoint-4", tmp_path / "merged").output.is_dir()


def test_nothing_is_overwritten(good: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for target in (full, tmp_path / "file"):
        with pytest.raises(Refused, match="exists already; choose another -o, or remove it first"):
            merge(good, target)
    (tmp_path / "empty").mkdir()
    assert merge(good, tmp_path / "empty").output.is_dir()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_leaves_everything_as_it_was(
    code: int, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    before = sorted(adapter.iterdir())
    monkeypatch.setattr(shards.os, "pwrite", fail)
    with pytest.raises(Refused, match="the disk is full" if code == errno.ENOSPC else "Input/output error"):
        merge(adapter, adapter)
    assert sorted(adapter.iterdir()) == before and sorted(adapter.parent.iterdir()) == [adapter]


def test_an_interrupt_leaves_nothing_behind(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "copy_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [adapter]


def test_a_second_rename_that_fails_gives_the_adapter_back(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.rename, []

    def rename(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    before = sorted(path.name for path in adapter.iterdir())
    monkeypatch.setattr(merge_module.os, "rename", rename)
    with pytest.raises(Refused, match="Permission denied"):
        merge(adapter, adapter)
    assert sorted(path.name for path in adapter.iterdir()) == before and sorted(adapter.parent.iterdir()) == [adapter]


def test_leftovers_of_a_killed_merge_are_cleared_away(good: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from lorapatch.adapter import merge as m; "
        "m.copy_files = lambda *a: os.kill(os.getpid(), signal.SIGKILL); m.merge(*sys.argv[1:3])"
    )
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", code, good, out]).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.merging" and not out.exists()
    merge(good, out)
    assert list(tmp_path.iterdir()) == [out]


def test_two_merges_into_one_folder_do_not_meet(good: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / ".out.merging").mkdir()
    handle = os.open(tmp_path / ".out.merging", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(Refused, match="another merge into .* is running"):
        merge(good, tmp_path / "out")
    os.close(handle)
    assert merge(good, tmp_path / "out").output.is_dir()


def test_too_little_space_is_found_before_anything_is_written(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1 << 20))
    with pytest.raises(Refused, match=r"has 0\.00 GiB free, the merged model needs 0\.06 GiB"):
        merge(good, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_broken_adapter_is_not_merged(adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, r=8)
    with pytest.raises(Refused, match=r"the adapter in .* is not merged: .* has the ranks 4 and 4"):
        merge(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"init_lora_weights": "pissa_niter_4"},
            "'pissa_niter_4' and not converted, so its base is not the one on the",
        ),
        ({"init_lora_weights": "loftq"}, "'loftq' and not converted"),
        ({"layer_replication": [[0, 2]]}, "sets layer_replication, which only PEFT's own merge_and_unload can merge"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"use_quantum": True}, "sets use_quantum"),
    ],
)
def test_what_cannot_be_merged_right_is_refused(
    changes: dict[str, Any], sentence: str, adapter: Path, tmp_path: Path
) -> None:
    edit_config(adapter, **changes)
    with pytest.raises(Refused, match=sentence):
        merge(adapter, tmp_path / "out")


def test_a_base_that_is_not_there_is_named(adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, base_model_name_or_path="somebody/some-model-that-is-not-here")
    with pytest.raises(
        Refused, match="base model somebody/some-model-that-is-not-here is not here: give it with --base"
    ):
        merge(adapter, tmp_path / "out")
    with pytest.raises(Refused, match=r"is no model folder: it has no config\.json"):
        merge(adapter, tmp_path / "out", base=tmp_path)


def test_a_base_of_the_hub_is_found_where_it_was_downloaded_to(adapter: Path, bases: Make, tmp_path: Path) -> None:
    home = tmp_path / "hub"
    snapshot = home / "models--somebody--tiny" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(bases(), snapshot)
    (home / "models--somebody--tiny" / "refs").mkdir()
    (home / "models--somebody--tiny" / "refs" / "main").write_text(snapshot.name)
    edit_config(adapter, base_model_name_or_path="somebody/tiny")
    code = "import sys; from lorapatch.adapter.merge import merge; print(merge(*sys.argv[1:]).base)"
    run = [sys.executable, "-c", code, adapter, tmp_path / "out"]
    done = subprocess.run(run, env=os.environ | {"HF_HUB_CACHE": str(home)}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(snapshot)


def test_only_a_few_megabytes_of_the_base_are_in_memory(tmp_path: Path) -> None:
    """Peak resident memory of a process that merges 192 MB, over that of one that only loads torch."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    weights = {f"model.layers.0.mlp.{name}.weight": torch.zeros(4096, 4096) for name in ("up_proj", "gate_proj")}
    weights["model.embed_tokens.weight"] = torch.zeros(16384, 1024)
    rewrite(base, weights)
    (base / "adapter_model.safetensors").rename(base / "model.safetensors")
    (base / "config.json").write_text('{"model_type": "other"}')
    pair = {"lora_A": torch.ones(8, 4096), "lora_B": torch.ones(4096, 8)}
    rewrite(adapter, {f"base_model.model.model.layers.0.mlp.up_proj.{name}.weight": x for name, x in pair.items()})
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["up_proj"], "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merging = "from lorapatch.adapter.merge import merge; merge(*sys.argv[1:], shard_size='64MB')"
    peaks = []
    for work in ("import torch", merging):
        code = f"import sys, resource; {work}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        run = [sys.executable, "-c", code, adapter, tmp_path / "out"]
        peaks.append(int(subprocess.run(run, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 128 << 10  # KiB; some buffers for each thread


def test_a_damaged_base_is_named(good: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for content, sentence in (
        (whole[:-10], "is cut short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of git-lfs, not the weights: run git lfs pull"),
    ):
        file.write_bytes(content)
        with pytest.raises(Refused, match=sentence):
            merge(good, tmp_path / "out", base=base)
    file.unlink()
    with pytest.raises(Refused, match="holds no weights"):
        merge(good, tmp_path / "out", base=base)
    assert sorted(tmp_path.iterdir()) == [base]


def test_a_quantised_base_is_refused(good: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = {name: x.to(torch.uint8) if "q_proj" in name else x for name, x in tensors_of(base).items()}
    rewrite(base, tensors)
    shutil.move(base / "adapter_model.safetensors", base / "model.safetensors")
    with pytest.raises(Refused, match=r"q_proj\.weight is U8: the base is quantised; give the plain one with --base"):
        merge(good, tmp_path / "out", base=base)


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 3 << 29), (7, 7), ("9", 9)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 apples", "-1GB", "0"])
def test_no_sizes(text: str, good: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no size: write 2GB or 500MB"):
        merge(good, tmp_path / "out", shard_size=text)


def test_an_unknown_type_is_a_usage_error(good: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--dtype int4 is unknown: fp32, fp16, bf16"):
        merge(good, tmp_path / "out", dtype="int4")


def test_the_configurations_shapes_are_those_of_the_weights(bases: Make) -> None:
    for family in FAMILIES:
        model = BaseModel(bases(family))
        shapes = shapes_by_config(model.config)
        assert shapes is not None
        for name, shape in model.shapes().items():
            assert shapes[name] == shape


def test_without_copy_file_range_the_copy_is_the_same(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    merge(good, tmp_path / "one")
    monkeypatch.setattr(shards.os, "copy_file_range", unsupported)
    merge(good, tmp_path / "two")
    one, two = (path / "model-00001-of-00001.safetensors" for path in (tmp_path / "one", tmp_path / "two"))
    assert one.read_bytes() == two.read_bytes()


def test_torchs_threads_are_as_before(good: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    merge(good, tmp_path / "out")
    assert torch.get_num_threads() == before


def test_the_result_is_told_in_json(good: Path, tmp_path: Path) -> None:
    told = json.loads(json.dumps(merge(good, tmp_path / "out").as_dict()))
    assert told["schema"] == 1 and told["output"] == str(tmp_path / "out") and told["kept"] is None
    assert (told["tensors"], told["changed"], told["shards"], told["dtype"]) == (21, 6, 1, "F32")
