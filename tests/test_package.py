"""The wheel holds what the commands need, and installs with nothing but the patching half."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lorapatch.resources import resource_dir

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from what the checkout tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("lorapatch", "templates", "original_scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True,
        capture_output=True,
    )
    (found,) = folder.glob("*.whl")
    return found


def test_templates_and_scripts_are_found_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "from lorapatch.resources import resource_dir\n"
        "for name in ('templates', 'original_scripts'):\n"
        "    folder = resource_dir(name)\n"
        "    print(folder.parent.name, *sorted(path.name for path in folder.iterdir() if path.suffix in ('.j2', '.sh')))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    templates, scripts = ran.stdout.splitlines()
    assert templates.split()[0] == scripts.split()[0] == "lorapatch", ran.stderr
    assert set(templates.split()[1:]) == {path.name for path in (ROOT / "templates").glob("*.j2")}
    assert scripts.split()[1:] == ["train_mgm_2b_stage_1_10k_baseline.sh"]


def test_every_file_that_the_checkout_has_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for path in (ROOT / "lorapatch").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert str(path.relative_to(ROOT)) in names


def test_the_patching_half_needs_seven_small_packages() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needs = [line.split()[0] for line in config["options"]["install_requires"].split("\n") if line.strip()]
    assert needs == ["bashlex", "tree-sitter", "tree-sitter-bash", "click", "jinja2", "rich", "pyyaml"]
    extra = [line for line in config["options.extras_require"]["train"].split("\n") if line.strip()]
    assert {"torch", "transformers", "peft", "deepspeed", "accelerate"} <= set(extra)
    assert not any("<" in line or "==" in line for line in extra)


def test_an_editable_install_finds_the_same_files() -> None:
    assert resource_dir("templates") == ROOT / "templates"
    with pytest.raises(FileNotFoundError):
        resource_dir("nothing")
