"""What a trainer does with each flag, for trainers in each argument style."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorapatch.errors import Refused
from lorapatch.lora.support import TrainerSupport, find_trainer, read_trainer
from lorapatch.lora.support import transformers_fields as fields

HF_TRAIN = """
import transformers
from pkg.arguments import *
from .work import put_lora

def train(attention=None):
    parser = transformers.HfArgumentParser((ModelArguments, TrainingArguments))
    model_args, training_args = parser.parse_args_into_dataclasses()
    model = put_lora(load(model_args.model_path), training_args)
    transformers.Trainer(model=model, args=training_args).train()
"""
HF_ARGUMENTS = """
from dataclasses import dataclass, field
from typing import List, Optional
import transformers

@dataclass
class ModelArguments:
    model_path: Optional[str] = field(default="x")
    freeze_all: bool = field(default=False)

@dataclass
class TrainingArguments(transformers.TrainingArguments):
    use_lora: bool = False
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_target: List[str] = field(default_factory=lambda: ["q_proj"], metadata={"aliases": ["--targets"]})
    optim: str = field(default="adamw_torch")
    keep_me: bool = field(default=True)
    derived: int = field(init=False, default=0)
"""
HF_WORK = """
from peft import LoraConfig, get_peft_model

def put_lora(model, args):
    model.flag = args.keep_me
    if args.use_lora:
        config = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=args.lora_target)
        model.enable_input_require_grads()
        model = get_peft_model(model, config)
    return model
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def read(folder: Path, files: dict[str, str], entry: str = "train.py") -> TrainerSupport:
    return read_trainer(write(folder, files) / entry)


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without transformers: the built-in table decides."""
    monkeypatch.setattr(fields, "_installed", lambda: None)


@pytest.fixture
def hf(tmp_path: Path, no_transformers: None) -> TrainerSupport:
    files = {
        "pkg/__init__.py": "",
        "pkg/train.py": HF_TRAIN,
        "pkg/arguments.py": HF_ARGUMENTS,
        "pkg/work.py": HF_WORK,
        "pkg/train_mem.py": "from pkg.train import train\nif __name__ == '__main__':\n    train('flash')\n",
    }
    return read(tmp_path, files, "pkg/train_mem.py")


def test_dataclasses_are_followed_over_files_star_imports_and_bases(hf: TrainerSupport, tmp_path: Path) -> None:
    found = hf.flag("--lora_rank")
    assert (found.state, found.kind) == ("accepted", "int")
    assert str(found.place) == f"{tmp_path / 'pkg/arguments.py'}:14"
    assert {path.name for path in hf.files} == {"train_mem.py", "train.py", "arguments.py", "work.py", "__init__.py"}
    assert hf.complete and not hf.problems


@pytest.mark.parametrize(
    ("flag", "state"),
    [
        ("--lora-rank", "accepted"),
        ("lora_rank", "accepted"),
        ("--lora_rank=4", "accepted"),
        ("--targets", "accepted"),
        ("--no_keep_me", "accepted"),
        ("--bf16", "accepted"),
        ("--no_dataloader_pin_memory", "accepted"),
        ("--freeze_all", "unused"),
        ("--derived", "unknown"),
        ("--lora_r", "accepted"),  # argparse takes it for --lora_rank
        ("--lora_", "unknown"),  # the beginning of several
        ("--lora_ranks", "unknown"),
    ],
)
def test_each_flag_of_an_hf_trainer_has_its_state(hf: TrainerSupport, flag: str, state: str) -> None:
    assert hf.flag(flag).state == state


def test_an_unknown_flag_names_the_nearest_known_one(hf: TrainerSupport) -> None:
    found = hf.flag("--lora_ranks")
    assert found.nearest == "--lora_rank"
    assert "did you mean --lora_rank?" in found.sentence


def test_an_unused_flag_says_where_it_is_declared(hf: TrainerSupport, tmp_path: Path) -> None:
    assert hf.flag("--freeze_all").sentence.startswith(
        f"{tmp_path / 'pkg/arguments.py'}:9: --freeze_all is declared by"
    )


def test_a_field_of_transformers_that_the_trainer_redeclares_is_not_unused(hf: TrainerSupport) -> None:
    assert hf.flag("--optim").state == "accepted"


def test_a_field_that_came_or_went_with_a_release_is_judged_by_the_pinned_one(
    tmp_path: Path, no_transformers: None
) -> None:
    trainer = "import transformers\nP = transformers.HfArgumentParser\nP(transformers.TrainingArguments).parse_args()\n"
    pin = "[project]\ndependencies = ['transformers==4.40.1']\n"
    old = read(tmp_path / "old", {"train.py": trainer, "pyproject.toml": pin})
    assert old.flag("--evaluation_strategy").state == "accepted"
    assert old.flag("--eval_strategy").state == "unknown"
    new = read(tmp_path / "new", {"train.py": trainer, "requirements.txt": "transformers==5.20.0\n"})
    assert new.flag("--eval_strategy").state == "accepted"
    found = new.flag("--evaluation_strategy")
    assert (found.state, found.nearest) == ("unknown", "--eval_strategy")
    assert "up to 4.50" in found.sentence


def test_releases_that_disagree_leave_a_flag_unsure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = fields.Release("transformers 5.20.0 (installed here)", fields.table_fields("5.20.0"))
    monkeypatch.setattr(fields, "_installed", lambda: here)
    trainer = "import transformers as t\nt.HfArgumentParser((t.TrainingArguments,)).parse_args_into_dataclasses()\n"
    support = read(tmp_path, {"train.py": trainer, "setup.py": "setup(install_requires=['transformers==4.38.2'])\n"})
    found = support.flag("--evaluation_strategy")
    assert found.state == "unsure"
    assert "4.38.2 (pinned in setup.py) takes it, transformers 5.20.0 (installed here) does not" in found.sentence


def test_the_interpreter_that_runs_the_trainer_decides_alone(tmp_path: Path, no_transformers: None) -> None:
    library = "env/lib/python3.11/site-packages/transformers"
    arguments = "class TrainingArguments:\n    evaluation_strategy: str = 'no'\n    hidden: ClassVar[int] = 1\n"
    files = {f"{library}/__init__.py": '__version__ = "4.40.2"\n', f"{library}/training_args.py": arguments}
    source = "import transformers as t\nt.HfArgumentParser((t.TrainingArguments,)).parse_args_into_dataclasses()\n"
    write(tmp_path, files | {"train.py": source, "requirements.txt": "transformers==5.20.0\n"})
    support = read_trainer(tmp_path / "train.py", python=tmp_path / "env/bin/python")
    assert [release.label for release in support.releases] == [f"transformers 4.40.2 (of {tmp_path}/env/bin/python)"]
    assert support.flag("--evaluation_strategy").state == "accepted"
    assert support.flag("--hidden").state == "unknown"
    elsewhere = read_trainer(tmp_path / "train.py", python=tmp_path / "none/bin/python")
    assert elsewhere.releases[0].label == "transformers 5.20.0 (pinned in requirements.txt)"


def test_the_table_agrees_with_the_installed_transformers() -> None:
    release = fields._installed()
    if release is None or not (match := fields.re.search(r"(\d+)\.(\d+)", release.label)):
        pytest.skip("transformers is not installed")
    line = (int(match[1]), int(match[2]))
    if not fields.FIRST <= line <= fields.LAST:
        pytest.skip("the installed transformers is outside the table")
    assert release.fields == fields.table_fields(match[0])


def test_a_field_declared_by_two_dataclasses_is_reported(tmp_path: Path, no_transformers: None) -> None:
    source = """
from dataclasses import dataclass
from transformers import HfArgumentParser
@dataclass
class A:
    cache_dir: str = "a"
@dataclass
class B:
    cache_dir: str = "b"
a, b = HfArgumentParser([A, B]).parse_args_into_dataclasses()
print(a.cache_dir)
"""
    (twice,) = read(tmp_path, {"train.py": source}).command_line.declared_twice
    assert (twice[0], twice[1].place.line, twice[2].place.line) == ("cache_dir", 6, 9)


@pytest.mark.parametrize("classes", ["CLASSES", "(A,) + MORE", "[A, *MORE]", "tuple(CLASSES)"])
def test_dataclasses_are_found_behind_variables(tmp_path: Path, no_transformers: None, classes: str) -> None:
    source = f"""
from dataclasses import dataclass
from transformers import HfArgumentParser
@dataclass
class A:
    one: int = 1
@dataclass
class B(A):
    two: int = 2
MORE = (B,)
CLASSES = (A, B)
def main():
    found = {classes}
    args = HfArgumentParser(found).parse_args_into_dataclasses()
    use(args.one, args.two)
main()
"""
    support = read(tmp_path, {"train.py": source})
    assert support.flag("--two").state == "accepted"
    assert support.flag("--three").state == "unknown"


ARGPARSE = """
import argparse, deepspeed

def parse():
    parser = argparse.ArgumentParser()
    group = parser.add_argument_group("lora")
    group.add_argument("--lora_dim", "--rank", type=int, default=0)
    group.add_argument("--only-lora", dest="only", action="store_true")
    group.add_argument("--names", nargs="*", default=[])
    group.add_argument("--mode", choices=["a", "b"])
    group.add_argument("--forgotten", type=float)
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args()

def main():
    args = parse()
    if args.only: print(args.names, args.mode, args.lora_dim)

if __name__ == "__main__":
    main()
"""


def test_argparse_options_have_their_kinds(tmp_path: Path) -> None:
    support = read(tmp_path, {"train.py": ARGPARSE})
    kinds = {
        name: support.flag(name).kind for name in ("--rank", "--only-lora", "--names", "--mode", "--deepspeed_config")
    }
    assert kinds == {
        "--rank": "int",
        "--only-lora": "switch",
        "--names": "list",
        "--mode": "str",
        "--deepspeed_config": "str",
    }
    assert support.flag("--mode").choices == ("a", "b")
    assert support.flag("--forgotten").state == "unused"
    assert support.flag("--lora_enable").state == "unknown"
    assert support.flag("--learning_rate").state == "unknown"


def test_unknown_flags_that_the_trainer_itself_refuses_are_unknown(tmp_path: Path) -> None:
    refuses = "args, rest = parser.parse_known_args(today(sys.argv))\n    if rest: raise SystemExit(rest)\n    return args"
    rename = '\nRENAMED = {"old_rank": "rank"}\ndef today(words): return [RENAMED.get(word, word) for word in words]\n'
    support = read(tmp_path, {"train.py": rename + ARGPARSE.replace("return parser.parse_args()", refuses)})
    assert support.flag("--nothing").state == "unknown"
    assert support.flag("--old_rank").state == "unsure" and "may stand for another" in support.flag("--old_rank").sentence


def test_parse_known_args_leaves_unknown_flags_unsure(tmp_path: Path) -> None:
    source = ARGPARSE.replace("parser.parse_args()", "parser.parse_known_args()[0]")
    found = read(tmp_path, {"train.py": source}).flag("--lora_enable")
    assert found.state == "unsure"
    assert found.sentence.startswith(f"{tmp_path / 'train.py'}:13: ")


def test_options_with_computed_names_leave_unknown_flags_unsure(tmp_path: Path) -> None:
    source = "import argparse\np = argparse.ArgumentParser()\nfor n in names: p.add_argument(f'--{n}')\np.parse_args()"
    assert read(tmp_path, {"train.py": source}).flag("--lora_r").state == "unsure"


def test_a_parser_of_another_library_leaves_flags_unsure(tmp_path: Path) -> None:
    found = read(tmp_path, {"train.py": "import tyro\nargs = tyro.cli(dict)\n"}).flag("--lora_r")
    assert found.state == "unsure"
    assert "tyro.cli" in found.sentence


def test_vars_of_the_arguments_means_that_any_may_be_used(tmp_path: Path) -> None:
    source = ARGPARSE.replace("    args = parse()\n", "    args = parse()\n    log(vars(args))\n")
    assert read(tmp_path, {"train.py": source}).flag("--forgotten").state == "accepted"


CLICK = """
import click

@click.command()
@click.option("--lora-rank", "rank", default=8)
@click.option("--use-lora/--no-use-lora", default=False)
@click.option("--kind", type=click.Choice(["lora", "full"]))
@click.option("--lost", is_flag=True)
@click.argument("data")
def main(rank, use_lora, kind, lost, data):
    print(rank, use_lora, kind, data)

if __name__ == "__main__":
    main()
"""


def test_click_options(tmp_path: Path) -> None:
    support = read(tmp_path, {"train.py": CLICK})
    assert (support.flag("--lora-rank").state, support.flag("--lora-rank").kind) == ("accepted", "int")
    assert support.flag("--no-use-lora").kind == "switch"
    assert support.flag("--kind").choices == ("lora", "full")
    assert support.flag("--lost").state == "unused"
    assert support.flag("--lora_rank").state == "unknown"
    assert support.flag("--lora-ran").state == "unknown"  # click knows no abbreviations


TYPER = """
import typer
from typing import Annotated, List

app = typer.Typer()

@app.command()
def main(data: str, lora_rank: int = 8, use_lora: bool = False, alpha: Annotated[int, typer.Option("--a")] = 16,
         targets: List[str] = typer.Option(["q_proj"], "--target"), lost: int = 0):
    print(data, lora_rank, use_lora, alpha, targets)

if __name__ == "__main__":
    app()
"""


def test_typer_options(tmp_path: Path) -> None:
    support = read(tmp_path, {"train.py": TYPER})
    states = {f: support.flag(f).state for f in ("--lora-rank", "--no-use-lora", "--a", "--target", "--lost", "--data")}
    assert states == {
        "--lora-rank": "accepted",
        "--no-use-lora": "accepted",
        "--a": "accepted",
        "--target": "accepted",
        "--lost": "unused",
        "--data": "unknown",
    }
    assert support.flag("--target").kind == "repeat"


def test_fire_options(tmp_path: Path) -> None:
    source = (
        "import fire\ndef train(lora_r: int = 8, targets: list = None):\n    print(lora_r, targets)\nfire.Fire(train)\n"
    )
    support = read(tmp_path, {"train.py": source})
    assert support.flag("--lora_r").state == "accepted"
    assert support.flag("--targets").kind == "literal"
    assert support.flag("--lora_alpha").state == "unknown"


def test_a_parser_in_an_imported_tool_that_never_runs_does_not_count(tmp_path: Path) -> None:
    tool = """
import argparse
def helper(): return 1
def cli():
    p = argparse.ArgumentParser(); p.add_argument("--lora_enable"); return p.parse_args()
if __name__ == "__main__":
    cli()
"""
    entry = ARGPARSE.replace(
        "import argparse, deepspeed", "import argparse, deepspeed\nfrom tool import helper\nhelper()"
    )
    assert read(tmp_path, {"train.py": entry, "tool.py": tool}).flag("--lora_enable").state == "unknown"


def test_no_parser_at_all_leaves_flags_unsure(tmp_path: Path) -> None:
    found = read(tmp_path, {"train.py": "print(1)\n"}).flag("--lora_r")
    assert (found.state, "no command-line parser" in found.sentence) == ("unsure", True)


def test_a_syntax_error_is_one_sentence_with_file_and_line(tmp_path: Path) -> None:
    support = read(tmp_path, {"train.py": "import argparse\nimport broken\n", "broken.py": "x = 1\ndef f(:\n"})
    (problem,) = support.problems
    assert problem.startswith(f"{tmp_path / 'broken.py'}:2: Python cannot read this file (")
    assert support.flag("--lora_r").state == "unsure"
    itself = read(tmp_path / "b", {"train.py": "print 'python 2'\n"})
    assert itself.problems[0].startswith(f"{tmp_path / 'b/train.py'}:1: ")
    assert itself.flag("--x").state == "unsure"


@pytest.mark.parametrize("content", [b"\0\0", b"\xff\xfe\x00", b"x = " + b"(" * 5000])
def test_odd_bytes_are_a_problem_and_not_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.py").write_bytes(content)
    assert len(read_trainer(tmp_path / "train.py").problems) == 1


def test_a_trainer_that_is_not_there_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"nowhere\.py: the trainer cannot be read"):
        read_trainer(tmp_path / "nowhere.py")
    with pytest.raises(Refused, match="cannot be read"):
        read_trainer(tmp_path)


def test_import_cycles_end(tmp_path: Path) -> None:
    files = {
        "train.py": "from a import run\nimport argparse\nargparse.ArgumentParser().parse_args()\nrun()\n",
        "a.py": "from b import *\nfrom train import x\ndef run(): y()\n",
        "b.py": "from a import *\nfrom b import z\nclass C(C): pass\nq = q\n",
    }
    assert len(read(tmp_path, files).files) == 3


def test_nothing_of_the_trainer_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = f"open({str(mark)!r}, 'w')\nimport side\nimport argparse\nargparse.ArgumentParser().parse_args()\n"
    read(tmp_path, {"train.py": source, "side.py": source})
    assert not mark.exists()


def test_packages_imported_by_name_are_followed(tmp_path: Path) -> None:
    files = {
        "train.py": "import argparse, importlib\nimportlib.import_module('plug')\n"
        "p = argparse.ArgumentParser()\np.add_argument('--depth')\nargs = p.parse_args()\n",
        "plug/__init__.py": "import pkgutil\nfor m in pkgutil.iter_modules(__path__): pass\n",
        "plug/deep.py": "def f(args): return args.depth\n",
    }
    support = read(tmp_path, files)
    assert tmp_path / "plug/deep.py" in support.files
    assert support.flag("--depth").state == "accepted"


def test_a_module_imported_under_a_computed_name_hides_no_use(tmp_path: Path) -> None:
    source = (
        "import argparse, importlib, sys\nimportlib.import_module(sys.argv[1])\np = argparse.ArgumentParser()\n"
        "p.add_argument('--depth')\np.parse_args()\n"
    )
    support = read(tmp_path, {"train.py": source})
    assert not support.complete
    assert support.flag("--depth").state == "accepted"


def test_given_roots_are_imported_from(tmp_path: Path) -> None:
    write(tmp_path, {"else/where/lib/opts.py": ARGPARSE, "run/train.py": "from lib.opts import main\nmain()\n"})
    support = read_trainer(tmp_path / "run/train.py", roots=[tmp_path / "else/where"])
    assert support.flag("--lora_dim").state == "accepted"


def test_a_trainer_is_found_from_the_script_upwards_and_by_module(tmp_path: Path) -> None:
    write(tmp_path, {"llm/train/run.py": "", "llm/tool/__main__.py": "", "scripts/v1/go.sh": "", "setup.py": ""})
    scripts = tmp_path / "scripts/v1"
    run = tmp_path / "llm/train/run.py"
    assert find_trainer("llm/train/run.py", module=False, script_dir=scripts) == run
    assert find_trainer(str(run), module=False, script_dir=scripts) == run
    assert find_trainer("llm.train.run", module=True, script_dir=scripts) == run
    assert find_trainer("llm.tool", module=True, script_dir=scripts) == tmp_path / "llm/tool/__main__.py"
    assert find_trainer("train/run.py", module=False, script_dir=scripts, roots=[tmp_path / "llm"]) == run
    assert find_trainer("$PWD/llm/train/run.py", module=False, script_dir=scripts) == run
    assert find_trainer("`pwd`/../../llm/train/run.py", module=False, script_dir=scripts).samefile(run)  # type: ignore[union-attr]
    for name, module in (
        ("nothing.py", False),
        ("$DIR/train/run.py", False),
        ("$DIR/run.py", False),
        ("llm.nothing", True),
        ("a b", True),
        ("", False),
    ):
        assert find_trainer(name, module=module, script_dir=scripts) is None


def test_the_whole_of_it_goes_into_json(hf: TrainerSupport) -> None:
    document = json.loads(json.dumps(hf.as_dict()))
    assert document["schema"] == 1
    assert document["options"]["--freeze_all"]["unused"] is True
    assert document["calls"][0]["arguments"]["r"] == {
        "kind": "flag",
        "text": "args.lora_rank",
        "options": ["lora_rank"],
        "place": document["calls"][0]["place"],
    }


def test_a_thin_script_around_an_installed_trainer_is_followed_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        {"site/mytrainer_pkg/__init__.py": "", "site/mytrainer_pkg/go.py": ARGPARSE, "site/big/__init__.py": ""},
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    support = read(tmp_path / "work", {"train.py": "from mytrainer_pkg.go import main\nmain()\n"})
    assert support.flag("--lora_dim").state == "accepted"
    assert support.flag("--nothing").state == "unknown"
