"""The plan of a patch: what is changed in place, what is added where, and what is refused."""

from __future__ import annotations

import pytest

from lorapatch.errors import Refused
from lorapatch.launch import read_source
from lorapatch.lora import PatchOptions, plan_patch

FLAGS = "--lora_enable True --lora_r 16 --lora_alpha 32 --lora_dropout 0.1 --lora_bias none"
TRAIN = "deepspeed train.py --learning_rate 1e-5"


def patched(text: str, **options: object) -> str:
    return plan_patch(read_source(text.encode()), PatchOptions(**options)).text.decode()  # type: ignore[arg-type]


def test_a_value_is_changed_where_it_stands_and_its_quotes_are_kept() -> None:
    text = f"{TRAIN} --lora_r \"8\" --lora_alpha='4' --lora_bias all\n"
    assert patched(text) == (
        f"{TRAIN} --lora_r \"16\" --lora_alpha='32' --lora_bias none --lora_enable True --lora_dropout 0.1\n"
    )


def test_quotes_inside_a_string_are_kept_too() -> None:
    assert r"--lora_r \"16\" --x" in patched(rf'C="{TRAIN} --lora_r \"8\" --x 1"' + "\neval $C\n")
    assert '--lora_r "16" --x' in patched(f'C=\'{TRAIN} --lora_r "8" --x 1\'\neval "$C"\n')


def test_values_that_say_the_same_stay_as_they_are() -> None:
    text = f"{TRAIN} --lora_enable true --lora_r 16 --lora_alpha 32.0 --lora_dropout .10 --lora_bias none\n"
    plan = plan_patch(read_source(text.encode()))
    assert plan.text.decode() == text and not plan.changed


def test_a_dash_for_an_underscore_is_the_same_flag() -> None:
    assert "--lora-r 16" in patched(f"{TRAIN} --lora-r 8\n")


def test_a_variable_as_value_is_replaced_for_this_launch_alone() -> None:
    assert "--lora_r 16 " in patched(f"R=8\n{TRAIN} --lora_r $R --x 1\n")


def test_a_variable_that_holds_the_value_already_stays() -> None:
    assert "--lora_r $R " in patched(f"R=16\n{TRAIN} --lora_r $R --x 1\n")


def test_several_values_become_one() -> None:
    text = f"{TRAIN} --lora_target_modules q_proj k_proj --x 1\n"
    assert patched(text, target_modules="all-linear") == (f"{TRAIN} --lora_target_modules all-linear --x 1 {FLAGS}\n")


def test_a_flag_given_twice_is_reported_and_the_last_one_set() -> None:
    plan = plan_patch(read_source(f"{TRAIN} --lora_r 4 --lora_r 8\n".encode()))
    assert b"--lora_r 4 --lora_r 16" in plan.text
    assert plan.notes == ("--lora_r is given 2 times (lines 1, 1); the last counts",)


def test_a_value_with_blanks_or_quotes_is_quoted() -> None:
    text = patched(f"{TRAIN}\n", extra={"run_name": "it's $mine"})
    assert text.endswith("""--run_name 'it'"'"'s $mine'\n""")


def test_a_value_that_needs_quotes_is_refused_inside_a_string() -> None:
    with pytest.raises(Refused, match="would need quotes inside the string"):
        patched(f"C='{TRAIN}'\neval $C\n", extra={"run_name": "a b"})


def test_the_learning_rate_and_other_flags_are_set_on_request() -> None:
    assert patched(f"{TRAIN}\n", learning_rate=2e-4).startswith("deepspeed train.py --learning_rate 2e-4 --lora_enable")


def test_a_flag_shared_with_another_launch_is_not_changed() -> None:
    text = (
        "C='--lora_r 8 --learning_rate 1e-5'\ndeepspeed train.py $C --tune_mm_mlp_adapter True\n"
        "deepspeed train.py $C --output_dir finetune\n"
    )
    with pytest.raises(Refused, match="line 1: --lora_r stands in a variable that the launch on line 2 uses too"):
        patched(text)


def test_a_lora_flag_added_only_in_some_cases_is_refused() -> None:
    text = f"O='--x 1'\nif [ $L ]; then O+=' --lora_r 8'; fi\n{TRAIN} $O\n"
    with pytest.raises(Refused, match="line 2: --lora_r stands in a variable that is not always set the same way"):
        patched(text)


def test_a_stage_can_be_named_by_number_or_name() -> None:
    text = f"{TRAIN} --tune_mm_mlp_adapter True\n{TRAIN} --output_dir a\n{TRAIN} --output_dir b\n"
    with pytest.raises(Refused, match="2 launches could be the fine-tuning one.*2: line 2.*3: line 3"):
        patched(text)
    assert patched(text, stage="3").splitlines()[2].endswith(FLAGS)
    note = plan_patch(read_source(text.encode()), PatchOptions(stage="pretrain")).notes
    assert "freezes everything but the projector" in note[0]
    with pytest.raises(Refused, match="--stage 9 fits no launch"):
        patched(text, stage="9")


def test_what_does_not_train_is_not_patched_even_when_asked_for() -> None:
    with pytest.raises(Refused, match="not a training launch"):
        patched("python eval_model.py --x 1\n", stage="1")


@pytest.mark.parametrize("argument", ["config.yaml", "model.path=x trainer.epochs=3"])
def test_a_trainer_that_takes_no_flags_is_refused(argument: str) -> None:
    with pytest.raises(Refused, match="not flags; set LoRA there"):
        patched(f"torchrun train.py {argument}\n")


def test_bash_may_object_already() -> None:
    with pytest.raises(Refused, match="bash finds a syntax error already: line 2"):
        patched(f"{TRAIN}\nfi\n")


def test_the_only_pretraining_launch_is_refused() -> None:
    with pytest.raises(Refused, match="only pre-training launches"):
        patched(f"{TRAIN} --tune_mm_mlp_adapter True\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# only a comment\n", "has no command"),
        ("echo hello\n", "no launch was found"),
        ("bash scripts/train.sh x\n", r"other scripts are run \(line 1: scripts/train.sh\); patch that script"),
        ("python eval.py\n", "no training launch was found, only these: 1: line 1, python eval.py, evaluation"),
    ],
)
def test_a_script_without_a_training_launch_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        patched(text)
