"""The values of a patch: the plan's five flags, the presets, and what is out of range."""

from __future__ import annotations

from typing import Any

import pytest

from lorapatch.errors import UsageError
from lorapatch.lora.flags import PatchOptions, wanted_flags


def test_without_options_the_flags_are_the_plans_five_in_its_order() -> None:
    assert list(wanted_flags(PatchOptions()).items()) == [
        ("lora_enable", "True"),
        ("lora_r", "16"),
        ("lora_alpha", "32"),
        ("lora_dropout", "0.1"),
        ("lora_bias", "none"),
    ]


def test_presets_set_rank_alpha_and_modules() -> None:
    aggressive = wanted_flags(PatchOptions(preset="aggressive"))
    assert aggressive["lora_r"] == "8" and aggressive["lora_alpha"] == "16"
    assert aggressive["lora_target_modules"] == "q_proj,v_proj" and aggressive["gradient_checkpointing"] == "True"
    expressive = wanted_flags(PatchOptions(preset="expressive"))
    assert expressive["lora_r"] == "32" and expressive["lora_alpha"] == "64"
    assert expressive["lora_target_modules"].count(",") == 6
    assert wanted_flags(PatchOptions(preset="conservative"))["lora_target_modules"] == "q_proj,v_proj,o_proj"


def test_values_given_win_over_the_preset() -> None:
    flags = wanted_flags(PatchOptions(preset="expressive", r=4, dropout=0.0, bias="all", target_modules="all-linear"))
    assert flags["lora_r"] == "4" and flags["lora_dropout"] == "0" and flags["lora_bias"] == "all"
    assert flags["lora_alpha"] == "8"  # the preset's ratio of alpha to rank
    assert flags["lora_target_modules"] == "all-linear"


def test_further_flags_come_last() -> None:
    flags = wanted_flags(PatchOptions(bits=4, learning_rate=2e-4, extra={"--max_steps": "5"}))
    assert list(flags.items())[5:] == [("bits", "4"), ("learning_rate", "2e-4"), ("max_steps", "5")]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"r": 0}, "rank must be at least 1"),
        ({"alpha": -1}, "alpha must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only"),
        ({"bits": 3}, "bits must be 4, 8 or 16"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": 2.0}, "learning rate"),
        ({"target_modules": "q_proj,,v_proj"}, "target modules"),
        ({"target_modules": "$(rm)"}, "target modules"),
        ({"preset": "huge"}, "no preset is called huge"),
        ({"extra": {"a b": "1"}}, "not the name of a flag"),
    ],
)
def test_a_value_out_of_range_is_an_error_before_any_script_is_read(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        PatchOptions(**values)
