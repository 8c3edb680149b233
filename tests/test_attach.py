"""lorapatch.attach by itself: its command line, the parsers it watches, the modules it chooses."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import lorapatch
from lorapatch import attach

torch = pytest.importorskip("torch")
nn = torch.nn


# -- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("train.py --a 1", ([], False, "train.py", ["--a", "1"])),
        ("--local_rank=3 train.py x", (["--local_rank=3"], False, "train.py", ["x"])),
        ("--local-rank=0 -m pkg.mod -m", (["--local-rank=0"], True, "pkg.mod", ["-m"])),
    ],
)
def test_the_trainer_is_found_behind_what_the_launcher_puts_in_front(
    words: str, found: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()
    assert attach.split_command(words.split()) == found


@pytest.mark.parametrize(
    ("words", "sentence"), [("", "which trainer?"), ("--a 1", "which trainer?"), ("no.py", "no.py does not exist")]
)
def test_a_command_without_a_trainer_is_refused(words: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        attach.split_command(words.split())
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_only_our_flags_are_taken_and_each_keeps_its_words() -> None:
    line = "--lr 1 --lora_r 8 pos --lora-alpha=4 more --lora_target_modules q v --lora_enable --x --lora_r 16 --lora_rank 2"
    found, rest = attach.take_flags(line.split())
    assert found == {
        "lora_r": ["--lora_r", "16"],
        "lora_alpha": ["--lora-alpha=4"],
        "lora_target_modules": ["--lora_target_modules", "q", "v"],
        "lora_enable": ["--lora_enable"],
    }
    assert rest == "--lr 1 pos more --x --lora_rank 2".split()
    settings = attach.Flags(found)
    assert (settings.value("r"), settings.value("alpha"), settings.value("target_modules")) == ("16", "4", "q,v")
    assert settings.enabled and settings.value("dropout") == "0.1"
    assert not attach.Flags({"lora_enable": ["--lora_enable", "False"]}).enabled


def test_a_parser_gets_the_flags_back_that_it_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    flags, rest = attach.take_flags("--lr 1 --lora_r 8 --lora_dropout 0.3".split())
    attachment = attach.Attachment(attach.Flags(flags))
    monkeypatch.setattr(sys, "argv", ["train.py", *rest])
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr")
    assert attachment.words_for(parser, None) == ["--lr", "1"] and attachment.declared == set()
    parser.add_argument("--lora_dropout")
    assert attachment.words_for(parser, None) == ["--lr", "1", "--lora_dropout", "0.3"]
    assert attachment.words_for(parser, ["--lr", "1"]) == ["--lr", "1", "--lora_dropout", "0.3"]
    assert attachment.words_for(parser, ["--other", "2"]) == ["--other", "2"]  # not of the command line
    assert attachment.words_for(parser, []) == []
    assert attachment.declared == {"lora_dropout"}


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("r", "x", "--lora_r x: a whole number from 1 up is needed"),
        ("r", "0", "a whole number from 1"),
        ("dropout", "1.5", "a number from 0"),
        ("bias", "some", "there are none, all, lora_only"),
        ("variant", "lokr", "there are lora, rslora, dora, pissa"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(
    flag: str, value: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = attach.Flags({f"lora_{flag}": [f"--lora_{flag}", value]})
    with pytest.raises(SystemExit) as end:
        flags.config_values([flag])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_a_variant_that_the_installed_peft_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(peft.LoraConfig, "__dataclass_fields__", {"r": None})
    monkeypatch.setattr(peft, "__version__", "0.4.0")
    with pytest.raises(SystemExit) as end:
        attach.Flags({"lora_variant": ["--lora_variant", "dora"]}).config_values(["variant"])
    assert end.value.code == 3
    assert "--lora_variant dora needs peft 0.9 or newer, here is 0.4.0: pip install -U peft" in capsys.readouterr().err


def test_a_trainer_is_run_as_python_would_run_it_and_finds_nothing_imported(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "beside.py").write_text("HERE = 1\n")
    (tmp_path / "sub" / "train.py").write_text(
        "import sys, beside\n"
        "heavy = {'torch', 'transformers', 'peft', 'click', 'bashlex'} & set(sys.modules)\n"
        "print(__name__, sys.argv, sys.path[0] == sys.argv[-1], sorted(heavy), sys.modules['__main__'].__file__)\n"
    )
    folder = str(Path(lorapatch.__file__).parents[1])
    by_name = [sys.executable, "-m", "lorapatch.attach"]
    by_path = [sys.executable, str(Path(lorapatch.__file__).with_name("attach.py"))]
    for program in (by_name, by_path):
        done = subprocess.run(
            [*program, "sub/train.py", "--lora_enable", "False", "--a", str(tmp_path / "sub")],
            cwd=tmp_path, env={"PYTHONPATH": folder if program is by_name else "", "PATH": ""}, capture_output=True, text=True,
        )  # fmt: skip
        argv = ["sub/train.py", "--a", str(tmp_path / "sub")]
        assert done.stdout == f"__main__ {argv} True [] sub/train.py\n", done.stderr


def test_a_module_is_run_too_and_a_trainer_s_own_end_stays(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "train.py").write_text("import sys\nprint(__package__, sys.argv[1:])\nsys.exit(7)\n")
    folder = str(Path(lorapatch.__file__).parents[1])
    program = [sys.executable, "-m", "lorapatch.attach", "--local_rank=0", "-m", "pkg.train", "--lora_r", "4", "x"]
    done = subprocess.run(program, cwd=tmp_path, env={"PYTHONPATH": folder}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (7, "pkg ['--local_rank=0', 'x']\n")


@pytest.mark.parametrize("steps", [0, 1])
def test_a_trainer_without_a_transformers_trainer_is_stopped(tmp_path: Path, steps: int) -> None:
    (tmp_path / "train.py").write_text(
        f"import torch\np = torch.nn.Parameter(torch.ones(2))\no = torch.optim.SGD([p], lr=1.0)\n"
        f"for _ in range({steps}):\n    p.sum().backward()\n    try:\n        o.step()\n    except Exception:\n        pass\n"
        "print('ended')\n"
    )
    folder = str(Path(lorapatch.__file__).parents[1])
    program = [sys.executable, "-m", "lorapatch.attach", "train.py"]
    done = subprocess.run(program, cwd=tmp_path, env={"PYTHONPATH": folder}, capture_output=True, text=True)
    assert done.returncode == 3 and "no transformers.Trainer, so nothing" in done.stderr
    assert ("ended" in done.stdout) is (steps == 0)


# -- modules ---------------------------------------------------------------------------------------------------------


class Layer(nn.Module):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)


class Multimodal(nn.Module):  # type: ignore[misc,name-defined]
    """A language model whose tower's layers have the same names, at the end of the same paths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.vision_tower = nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(3))})
        self.mm_projector = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.embed, self.lm_head = nn.Embedding(8, 4), nn.Linear(4, 8)


def test_lora_goes_onto_the_language_model_s_linear_layers_alone() -> None:
    model = Multimodal()
    every = [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "v_proj")]
    assert attach.targets(model, "all-linear") == every
    assert attach.targets(model, "v_proj") == every[1::2]
    assert attach.targets(model, "1.q_proj, v_proj") == [every[1], *every[2:4], every[5]]
    assert attach.targets(model, r"layers\.[02]\.q_proj") == ["layers.0.q_proj", "layers.2.q_proj"]
    assert attach.targets(model, r".*\.(q|v)_proj") == every


def test_what_the_trainer_froze_gets_no_lora() -> None:
    model = Multimodal()
    model.layers[0].requires_grad_(False)
    assert attach.targets(model, "q_proj") == ["layers.1.q_proj", "layers.2.q_proj"]
    assert attach.targets(model, "q_proj", frozen=True)[0] == "layers.0.q_proj"
    model.requires_grad_(False)
    with pytest.raises(SystemExit):
        attach.targets(model, "all-linear")


def test_a_model_that_is_nothing_but_a_tower_gets_it_there() -> None:
    tower = nn.ModuleDict({"vision_model": nn.ModuleList([Layer()])})
    assert attach.targets(tower, "all-linear") == ["vision_model.0.q_proj", "vision_model.0.v_proj"]


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("k_proj", "no linear layer that could be trained is called k_proj; there are q_proj, v_proj"),
        (r"nothing\..*", "matches none of the 6 linear layers, layers.0.q_proj for one"),
        ("(q", "is no regular expression"),
    ],
)
def test_targets_that_are_not_there_are_refused(wanted: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        attach.targets(Multimodal(), wanted)
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_the_configuration_names_exactly_the_modules_that_were_chosen() -> None:
    peft = pytest.importorskip("peft")
    model = Multimodal()
    assert attach.compact(model.layers, ["0.q_proj", "1.q_proj", "2.q_proj"]) == ["q_proj"]
    chosen = attach.targets(model, "all-linear")
    pattern = attach.compact(model, chosen)
    assert pattern == r"layers\.\d+\.q_proj|layers\.\d+\.v_proj"
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=pattern))
    found = {name.split(".lora_A")[0] for name, _ in tuned.named_parameters() if ".lora_A." in name}
    assert found == {f"base_model.model.{path}" for path in chosen}
    assert attach.compact(Multimodal(), ["layers.1.q_proj"]) == r"layers\.1\.q_proj"


def test_checkpointing_is_seen_by_flag_by_the_model_s_state_and_in_its_code() -> None:
    class Inside(nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: object) -> object:
            from torch.utils.checkpoint import checkpoint

            return checkpoint(torch.tanh, x, use_reentrant=True)

    class On(nn.Module):  # type: ignore[misc,name-defined]
        gradient_checkpointing = True

    plain = argparse.Namespace(gradient_checkpointing=False)
    assert not attach.checkpoints(Multimodal(), plain)
    assert attach.checkpoints(Multimodal(), argparse.Namespace(gradient_checkpointing=True))
    assert attach.checkpoints(nn.Sequential(On()), plain) and attach.checkpoints(nn.Sequential(Inside()), plain)


def test_the_optimizer_holds_what_is_trainable_and_lora_plus_speeds_up_b() -> None:
    peft = pytest.importorskip("peft")
    flags = {"lora_r": ["--lora_r", "2"], "lora_plus_ratio": ["--lora_plus_ratio", "16"]}
    model = Multimodal()
    groups = [{"params": model.layers.parameters()}, {"params": model.embed.parameters(), "lr": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    attachment = attach.Attachment(attach.Flags(flags))
    args = argparse.Namespace(gradient_checkpointing=False, process_index=1, should_save=True)
    attachment.adopt(model, args)
    attachment.retarget(optimizer)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(rates) == len(lora) == 12 and peft is not None
    assert {rates[id(p)] for name, p in lora.items() if "lora_A" in name} == {1e-3}
    assert {rates[id(p)] for name, p in lora.items() if "lora_B" in name} == {16e-3}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(lora) | {f"mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert attachment.adopt(model, args) is model and len(dict(model.named_parameters())) == len(lora) + 31
