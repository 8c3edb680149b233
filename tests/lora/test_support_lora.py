"""Whether a trainer takes LoRA, under which names, and which mode follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorapatch.lora.support import Setting, TrainerSupport, read_trainer
from lorapatch.lora.support import transformers_fields as fields

HEAD = """
import argparse
from dataclasses import dataclass, field
from typing import List, Optional
import transformers
from transformers import Trainer
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

def parse():
    p = argparse.ArgumentParser()
{arguments}
    return p.parse_args()

def main():
    args = parse()
    model = load()
{body}
    Trainer(model=model).train()

if __name__ == "__main__":
    main()
"""


@pytest.fixture(autouse=True)
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_installed", lambda: None)


def trainer(tmp_path: Path, arguments: str, body: str, *, head: str = HEAD) -> TrainerSupport:
    def indent(text: str) -> str:
        return "\n".join(f"    {line}" for line in text.strip().splitlines()) or "    pass"

    path = tmp_path / "train.py"
    path.write_text(head.format(arguments=indent(arguments), body=indent(body)))
    return read_trainer(path)


RANK = 'p.add_argument("--rank_of_lora", type=int, default=8)'


def test_names_come_from_what_lora_config_is_built_of(tmp_path: Path) -> None:
    support = trainer(
        tmp_path,
        f"""{RANK}
p.add_argument("--scale", type=float)
p.add_argument("--drop", type=float)
p.add_argument("--with_lora", action="store_true")
p.add_argument("--layers", nargs="+")""",
        """
r = int(args.rank_of_lora)
if args.with_lora:
    config = LoraConfig(r=r, lora_alpha=args.scale, lora_dropout=args.drop, target_modules=args.layers, bias="none")
    model = get_peft_model(model, config)""",
    )
    assert support.lora_names == {
        "lora_enable": "--with_lora",
        "lora_r": "--rank_of_lora",
        "lora_alpha": "--scale",
        "lora_dropout": "--drop",
        "lora_target_modules": "--layers",
    }
    assert support.settings("lora_enable") == [Setting("--with_lora", ())]
    assert support.settings("lora_r", "16") == [Setting("--rank_of_lora", ("16",))]
    assert support.settings("lora_target_modules", ["q_proj", "v_proj"]) == [Setting("--layers", ("q_proj", "v_proj"))]
    assert support.settings("lora_bias", "none") is None  # a constant there
    assert (support.recommendation, support.target_modules) == ("flags", "flag")
    assert "--with_lora" in support.reason


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ('p.add_argument("--mods", type=str)', 'args.mods.split(",")', ("q_proj,v_proj",)),
        ('p.add_argument("--mods", type=str)', '[m.strip() for m in args.mods.split(",")]', ("q_proj,v_proj",)),
        ('p.add_argument("--mods", nargs="*")', "args.mods or None", ("q_proj", "v_proj")),
        ('p.add_argument("--mods", type=str)', "args.mods", (r".*\.(q_proj|v_proj)",)),
    ],
)
def test_target_modules_are_given_as_the_trainer_reads_them(
    tmp_path: Path, argument: str, value: str, words: tuple[str, ...]
) -> None:
    body = f"model = get_peft_model(model, LoraConfig(r=args.rank_of_lora, target_modules={value}))"
    support = trainer(tmp_path, f"{RANK}\n{argument}", body)
    assert support.target_modules == "flag"
    assert support.settings("lora_target_modules", ["q_proj", "v_proj"]) == [Setting("--mods", words)]
    assert support.recommend(target_modules=True).mode == "flags"


def test_all_linear_can_only_be_said_where_peft_gets_the_word_itself(tmp_path: Path) -> None:
    body = "model = get_peft_model(model, LoraConfig(r=args.rank_of_lora, target_modules={}))"
    plain = trainer(tmp_path, f'{RANK}\np.add_argument("--mods")', body.format("args.mods"))
    assert plain.settings("lora_target_modules", ["all-linear"]) == [Setting("--mods", ("all-linear",))]
    split = trainer(tmp_path, f'{RANK}\np.add_argument("--mods")', body.format('args.mods.split(",")'))
    assert split.settings("lora_target_modules", ["all-linear"]) is None


@pytest.mark.parametrize(
    ("value", "how"),
    [('["q_proj", "v_proj"]', "constant"), ("TARGETS", "constant"), ("find_linear(model, args.bits)", "computed")],
)
def test_target_modules_that_no_flag_chooses_ask_for_attach(tmp_path: Path, value: str, how: str) -> None:
    head = HEAD.replace("def main", "TARGETS = ['q_proj']\ndef find_linear(m, b): return b\ndef main")
    body = f"model = get_peft_model(model, LoraConfig(r=args.rank_of_lora, target_modules={value}))"
    support = trainer(tmp_path, f'{RANK}\np.add_argument("--bits", type=int)', body, head=head)
    assert support.target_modules == how
    assert support.target_evidence is not None
    assert support.recommendation == "flags"
    wanted = support.recommend(target_modules=True)
    assert wanted.mode == "attach"
    assert how.replace("constant", "fixed") in wanted.reason


def test_no_lora_at_all_is_attach_with_a_trainer_and_neither_without(tmp_path: Path) -> None:
    with_trainer = trainer(tmp_path, RANK, "print(args.rank_of_lora)")
    assert (with_trainer.recommendation, with_trainer.lora_names.get("lora_enable")) == ("attach", None)
    assert "puts no LoRA on its model" in with_trainer.reason
    loop = trainer(tmp_path, RANK, "pass", head=HEAD.replace("Trainer(model=model).train()", "loop(model)"))
    assert loop.recommendation is None
    assert "no transformers Trainer" in loop.reason


def test_a_trainer_that_is_a_subclass_of_the_project_counts(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from transformers import Trainer as Base\nclass Mine(Base):\n    pass\n")
    head = HEAD.replace("from transformers import Trainer", "from mine import Mine as Trainer")
    assert trainer(tmp_path, RANK, "pass", head=head).recommendation == "attach"


def test_lora_that_is_always_on_needs_no_switch(tmp_path: Path) -> None:
    support = trainer(tmp_path, RANK, "model = get_peft_model(model, LoraConfig(r=args.rank_of_lora))")
    assert support.always_on
    assert support.settings("lora_enable") == []
    assert support.recommendation == "flags"


def test_lora_under_a_condition_that_is_no_flag_is_not_promised(tmp_path: Path) -> None:
    body = 'if config["lora"]:\n    model = get_peft_model(model, LoraConfig(r=args.rank_of_lora))'
    support = trainer(tmp_path, RANK, body)
    assert not support.always_on
    assert support.settings("lora_enable") is None
    assert support.recommendation == "attach"


@pytest.mark.parametrize(
    ("argument", "test", "settings"),
    [
        ('"--tuner", default="full"', 'args.tuner == "lora"', [Setting("--tuner", ("lora",))]),
        ('"--tuner", default="full"', 'args.tuner in ("qlora", "lora")', [Setting("--tuner", ("lora",))]),
        ('"--use_peft", type=str2bool', "args.use_peft and model", [Setting("--use_peft", ("True",))]),
        ('"--full", action="store_true"', "not args.full", []),
        ('"--full_tuning", type=str2bool', "not args.full_tuning", [Setting("--full_tuning", ("False",))]),
        ('"--unrelated"', "args.rank_of_lora > 0", []),
        ('"--unrelated"', "args.rank_of_lora", []),
    ],
)
def test_every_way_of_turning_lora_on(tmp_path: Path, argument: str, test: str, settings: list[Setting]) -> None:
    body = f"if {test}:\n    model = get_peft_model(model, LoraConfig(r=args.rank_of_lora))"
    support = trainer(tmp_path, f"{RANK}\np.add_argument({argument})", body)
    assert support.settings("lora_enable") == settings
    assert support.recommendation == "flags"


def test_the_switch_is_found_around_the_call_of_the_function_that_builds_lora(tmp_path: Path) -> None:
    head = HEAD.replace(
        "def main",
        "def wrap(model, rank):\n    if model is None:\n        return model\n"
        "    return get_peft_model(model, LoraConfig(r=rank))\ndef main",
    )
    body = "if not args.adapter_on:\n    return\nmodel = wrap(model, args.rank_of_lora)"
    support = trainer(tmp_path, f'{RANK}\np.add_argument("--adapter_on", action="store_true")', body, head=head)
    assert support.lora_names == {"lora_enable": "--adapter_on", "lora_r": "--rank_of_lora"}


def test_arguments_in_a_dictionary_are_seen_through(tmp_path: Path) -> None:
    body = """
kwargs = {"r": args.rank_of_lora, "lora_alpha": 2 * args.rank_of_lora}
model = get_peft_model(model, LoraConfig(**kwargs))"""
    support = trainer(tmp_path, RANK, body)
    (config,) = support.use.configs
    assert (config.arguments["r"].kind, config.arguments["lora_alpha"].kind) == ("flag", "computed")
    assert support.lora_names == {"lora_r": "--rank_of_lora"}


def test_a_lora_of_its_own_without_peft(tmp_path: Path) -> None:
    head = HEAD.replace("def main", "def convert_linear_to_lora(m, r): return m\ndef main").replace(
        "Trainer(model=model).train()", "loop()"
    )
    body = "if args.lora_dim > 0:\n    model = convert_linear_to_lora(model, args.lora_dim)"
    support = trainer(tmp_path, 'p.add_argument("--lora_dim", type=int, default=0)', body, head=head)
    assert support.lora_names == {"lora_enable": "--lora_dim", "lora_r": "--lora_dim"}
    assert (support.recommendation, support.recommend(target_modules=True).mode) == ("flags", None)


def test_a_registry_and_a_compared_word_are_two_switches(tmp_path: Path) -> None:
    recipes = """
from peft import LoraConfig, get_peft_model
REGISTRY = {}
def register(name):
    def keep(cls):
        REGISTRY[name] = cls
        return cls
    return keep
def pick(name): return REGISTRY[name]
@register("lora")
class Lora:
    def __call__(self, model):
        if self.args.tune_vision == "lora": model.vision = True
        if self.args.tune_llm == "lora": model.llm = True
        return get_peft_model(model, LoraConfig(r=self.args.rank_of_lora))
"""
    (tmp_path / "recipes.py").write_text(recipes)
    head = HEAD.replace("def main", "from recipes import pick\ndef main")
    arguments = f'{RANK}\np.add_argument("--recipe")\np.add_argument("--tune_llm")\np.add_argument("--tune_vision")'
    support = trainer(tmp_path, arguments, "model = pick(args.recipe)(args)(model)", head=head)
    assert support.settings("lora_enable") == [Setting("--recipe", ("lora",)), Setting("--tune_llm", ("lora",))]


def test_lora_flags_that_nothing_reads_do_not_count(tmp_path: Path) -> None:
    support = trainer(
        tmp_path, 'p.add_argument("--lora_r")\np.add_argument("--lora_enable", action="store_true")', "pass"
    )
    assert support.lora_names == {}
    assert support.flag("--lora_r").state == "unused"
    assert support.recommendation == "attach"


@pytest.mark.parametrize(
    ("argument", "bits", "settings"),
    [
        ('"--bits", type=int', "4", [Setting("--bits", ("4",))]),
        ('"--load_in_4bit", action="store_true"', "4", [Setting("--load_in_4bit", ())]),
        ('"--load_in_4bit", action="store_true"', "16", []),
        ('"--load_in_4bit", action="store_true"', "8", None),
        ('"--q_lora", type=str2bool', "4", [Setting("--q_lora", ("True",))]),
        ('"--quantization_bit", type=int', "8", [Setting("--quantization_bit", ("8",))]),
        ('"--nothing"', "4", None),
    ],
)
def test_bits_under_their_several_names(
    tmp_path: Path, argument: str, bits: str, settings: list[Setting] | None
) -> None:
    names = argument.split('"')[1].lstrip("-")
    body = f"print(args.{names})\nmodel = get_peft_model(model, LoraConfig(r=args.rank_of_lora))"
    assert trainer(tmp_path, f"{RANK}\np.add_argument({argument})", body).settings("bits", bits) == settings


def test_what_freezes_the_model_and_what_gradient_checkpointing_needs_are_found(tmp_path: Path) -> None:
    body = """
if args.tune_adapter:
    model.requires_grad_(False)
model = prepare_model_for_kbit_training(model)
model.enable_input_require_grads()"""
    support = trainer(tmp_path, 'p.add_argument("--tune_adapter", action="store_true")', body)
    assert [name for name in support.traits.frozen_by] == ["tune_adapter"]
    assert {call.name for call in support.use.input_grads} == {
        "prepare_model_for_kbit_training",
        "enable_input_require_grads",
    }


def test_options_that_click_and_fire_hand_to_parameters(tmp_path: Path) -> None:
    body = """def train(rank: int = 8, targets: list = None):
    model = get_peft_model(load(), LoraConfig(r=rank, target_modules=targets))
    Trainer(model=model).train()
"""
    imports = "from peft import LoraConfig, get_peft_model\nfrom transformers import Trainer\n"
    path = tmp_path / "fired.py"
    path.write_text(f"import fire\n{imports}{body}fire.Fire(train)\n")
    fired = read_trainer(path)
    assert fired.lora_names == {"lora_r": "--rank", "lora_target_modules": "--targets"}
    assert fired.settings("lora_target_modules", ["a", "b"]) == [Setting("--targets", ("[a,b]",))]
    assert fired.recommendation == "flags"
    clicked = tmp_path / "clicked.py"
    decorators = '@click.command()\n@click.option("--rank", default=8)\n@click.option("--targets", multiple=True)\n'
    clicked.write_text(f"import click\n{imports}{decorators}{body}train()\n")
    support = read_trainer(clicked)
    assert support.settings("lora_target_modules", ["a", "b"]) == [
        Setting("--targets", ("a",)),
        Setting("--targets", ("b",)),
    ]


def test_trl_is_known_without_being_installed(tmp_path: Path) -> None:
    source = """
from dataclasses import dataclass
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config
def main():
    config, model_args = TrlParser((SFTConfig, ModelConfig)).parse_args_and_config()
    SFTTrainer(args=config, peft_config=get_peft_config(model_args)).train()
main()
"""
    (tmp_path / "train.py").write_text(source)
    support = read_trainer(tmp_path / "train.py")
    assert support.settings("lora_enable") == [Setting("--use_peft", ("True",))]
    assert support.lora_names["lora_r"] == "--lora_r"
    assert support.recommendation == "flags"
    assert support.flag("--learning_rate").state == "accepted"
    assert support.flag("--packing").state == "unsure"


def test_a_program_in_which_many_ways_lead_to_lora_is_read_all_the_same(tmp_path: Path) -> None:
    """Each of thirty functions is called at three places, and hands its argument on: 3 ** 30 ways to follow."""
    layers = "\n".join(
        f"def build_{i}(model, rank):\n" + f"    build_{i + 1}(model, rank)\n" * 3 for i in range(30)
    )
    last = "def build_30(model, rank):\n    get_peft_model(model, LoraConfig(r=rank))\n\n"
    support = trainer(
        tmp_path,
        f'{RANK}\np.add_argument("--use_lora", action="store_true")',
        "if args.use_lora:\n    build_0(model, args.rank_of_lora)\nbuild_20(model, args.rank_of_lora)",
        head=last + layers + HEAD,
    )
    assert support.settings("lora_enable", "True") == [Setting("--use_lora", ())]


def test_a_configuration_that_is_built_under_a_flag_makes_that_flag_the_switch(tmp_path: Path) -> None:
    body = """
config = None
if args.use_peft_lora:
    config = LoraConfig(r=args.rank_of_lora)
Trainer(model=model, peft_config=config)"""
    support = trainer(tmp_path, f'{RANK}\np.add_argument("--use_peft_lora", action="store_true")', body)
    assert not support.always_on
    assert support.settings("lora_enable") == [Setting("--use_peft_lora", ())]


def test_in_a_checkout_of_peft_an_example_is_the_project_and_peft_is_not(tmp_path: Path) -> None:
    package = tmp_path / "src" / "peft"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_peft_model(model, config):\n    model.add_adapter(config)\n")
    support = trainer(tmp_path, RANK, "get_peft_model(model, LoraConfig(r=args.rank_of_lora))")
    assert support.files == (tmp_path / "train.py",) and support.always_on


def test_a_trainer_that_python_cannot_read_is_said_to_be_that(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("def (\n")
    support = read_trainer(tmp_path / "train.py")
    assert support.recommendation is None
    assert support.reason.startswith(f"{tmp_path / 'train.py'}:1: Python cannot read this file")
